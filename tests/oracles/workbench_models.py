"""What a whole FLUX.1 workflow needs, small enough for a CPU: text encoder, VAE and checkpoints.

Run in the oracle interpreter: ``python workbench_models.py OUT WIDTH CASE ...`` writes

| under OUT                     | what                                                             |
|-------------------------------|------------------------------------------------------------------|
| text_encoders/clip_l          | CLIP-L of random weights, fp16, as ComfyUI's CLIPLoader reads it |
| vae_approx/taef1_{en,de}coder | TAESD for FLUX latents, random weights (ComfyUI's VAE ``taef1``) |
| CASE/                         | the checkpoint that the sdnq package saved                       |
| CASE.original                 | the unquantized model, bf16                                      |
| CASE.dequantized              | float32 weights as the package itself dequantizes them           |

(all safetensors). The transformer takes CLIP-L's 768 channels as text, so that no T5 is needed.
"""

from __future__ import annotations

import sys
from pathlib import Path

import sdnq_models
import torch
from safetensors.torch import load_file, save_file
from tiny_models import SPECS, Spec, build, flux_config, flux_inputs, flux_run
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

FAMILY = "flux_clip_l"
SPECS[FAMILY] = Spec(
    "FluxTransformer2DModel",
    lambda width: flux_config(
        width,
        num_single_layers=4,
        joint_attention_dim=768,
        pooled_projection_dim=768,
    ),
    256,
    flux_inputs,
    flux_run,
)


def clip_l() -> dict[str, Tensor]:
    """Random weights under CLIP-L's names."""
    config = CLIPTextConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
    )
    state = CLIPTextModel(config).half().state_dict()
    return {
        f"text_model.{name.removeprefix('text_model.')}": value
        for name, value in state.items()
        if not name.endswith("position_ids")
    }


def conv(name: str, inputs: int, outputs: int, bias: bool = True) -> dict[str, Tensor]:
    layer = nn.Conv2d(inputs, outputs, 3, bias=bias)
    return {f"{name}.{key}": value.detach() for key, value in layer.named_parameters()}


def block(name: str) -> dict[str, Tensor]:
    return {
        key: value for i in (0, 2, 4) for key, value in conv(f"{name}.conv.{i}", 64, 64).items()
    }


def taesd_encoder() -> dict[str, Tensor]:
    """TAESD's encoder: places in its sequence are names."""
    state = conv("0", 3, 64) | block("1") | conv("14", 64, 16)
    for stage in (2, 6, 10):
        state |= conv(str(stage), 64, 64, bias=False)
        for place in (1, 2, 3):
            state |= block(str(stage + place))
    return state


def taesd_decoder() -> dict[str, Tensor]:
    """TAESD's decoder (places 0, 2, 6, 11 and 16 hold no weights)."""
    state = conv("1", 16, 64) | block("18") | conv("19", 64, 3)
    for stage in (3, 8, 13):
        for place in (0, 1, 2):
            state |= block(str(stage + place))
        state |= conv(str(stage + 4), 64, 64, bias=False)
    # Random layers lose contrast; the last one brings the picture back into 0..1.
    return state | {"19.weight": state["19.weight"] * 12, "19.bias": torch.full((3,), 0.5)}


def twins(out: Path, width: int, case: str) -> None:
    """The float models beside a quantized checkpoint."""
    original = build(FAMILY, width=width, seed=sum(map(ord, case))).state_dict()
    golden = load_file(out / f"{case}.golden.safetensors")
    stored: dict[str, Tensor] = {}
    for file in sorted((out / case).glob("*.safetensors")):
        stored |= load_file(file)
    for name, value in golden.items():
        error = (value - original[name]).norm() / original[name].norm()
        assert error < 0.8, f"{case}: {name} is not what was quantized ({error:.2f} away)"
    exact = {name: golden.get(name, stored.get(name)).float() for name in original}
    save_file(exact, out / f"{case}.dequantized.safetensors")
    plain = {name: value.bfloat16() for name, value in original.items()}
    save_file(plain, out / f"{case}.original.safetensors")
    for part in ("golden", "run"):  # told by the two files above
        (out / f"{case}.{part}.safetensors").unlink()


def main(out: str, width: str, *cases: str) -> None:
    unknown = set(cases) - set(sdnq_models.CASES)
    if unknown:
        sys.exit(f"unknown: {', '.join(unknown)}; known: {', '.join(sdnq_models.CASES)}")
    torch.set_num_threads(2)
    torch.manual_seed(20)
    files = {
        "text_encoders/clip_l": clip_l(),
        "vae_approx/taef1_encoder": taesd_encoder(),
        "vae_approx/taef1_decoder": taesd_decoder(),
    }
    for name, state in files.items():
        path = Path(out) / f"{name}.safetensors"
        path.parent.mkdir(exist_ok=True)
        save_file({key: value.contiguous() for key, value in state.items()}, path)
    for case in cases:
        sdnq_models.make(FAMILY, int(width), case, Path(out))
        twins(Path(out), int(width), case)


if __name__ == "__main__":
    main(*sys.argv[1:])

"""MODELs for the tests of this folder: small FLUX checkpoints that the sdnq package wrote."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from comfy_models import comfy_forward, run_inputs
from safetensors.torch import load_file
from support import oracle, pack

pack()  # before anything of ComfyUI: it chooses the CPU where there is no GPU

#: checkpoint -> its bits
CASES = {
    "int8": 8,
    "fp8": 8,
    "int8_mm": 8,
    "uint4": 4,
    "uint4_svd": 4,
    "uint4_had_svd": 4,
    "uint4_cb": 4,
    "dyn4_mixed_svd_mm": 4,
}
#: the dynamic one's ``double_blocks.0.img_attn.qkv`` and others have parts of several formats
MIXED = "dyn4_mixed_svd_mm"


@cache
def checkpoints() -> Path:
    """The folder of all cases; made once and kept in the cache."""
    return oracle("sdnq_models.py", "flux", "256", *CASES)


def load(case: str | Path, *, dynamic: bool = False, **options: str):
    """A MODEL of our loader: in float32 and dequantizing, where nothing else is asked for."""
    path = checkpoints() / case if isinstance(case, str) else case
    given = {"compute_dtype": "fp32", "matmul": "dequantize", **options}
    return pack("loaders.host.api").load_diffusion_model(str(path), given, not dynamic)


@cache
def inputs(case: str = "int8") -> dict[str, torch.Tensor]:
    """Inputs of one pass."""
    return run_inputs(load_file(checkpoints() / f"{case}.run.safetensors"))


def on_device(patcher):
    """Load a MODEL as a sampler does."""
    import comfy.model_management

    comfy.model_management.load_models_gpu([patcher])
    return patcher


def run(patcher, **changed: torch.Tensor) -> torch.Tensor:
    """One pass of the diffusion model as it is loaded at this moment, in inference mode."""
    dtype = patcher.model.manual_cast_dtype or torch.float32
    given = {name: value.to(dtype) for name, value in (inputs() | changed).items()}
    with torch.inference_mode():
        return comfy_forward("flux", patcher.model.diffusion_model, given).float()


def layers(patcher) -> dict[str, torch.nn.Module]:
    """Modules whose weight is a composite, by name."""
    layout = pack("loaders.layouts.composite").LAYOUT
    return {
        name: module
        for name, module in patcher.model.diffusion_model.named_modules()
        if getattr(getattr(module, "weight", None), "_layout_cls", None) == layout
    }


def memory_of(weight) -> tuple[torch.Tensor, ...]:
    """Every tensor that a composite weight is made of: codes of its parts, and the side."""
    return weight.layout_cls.get_plain_tensors(weight)


def codes(patcher) -> dict[str, torch.Tensor]:
    """A copy of every composite's bytes, side included."""
    return {name: torch.cat(memory_of(module.weight)) for name, module in layers(patcher).items()}


def same_codes(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether two results of ``codes`` agree in every bit."""
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def floats(patcher) -> dict[str, torch.Tensor]:
    """Every parameter of the diffusion model, dequantized to float32 and with its patches."""
    found = {
        name: (p.data.dequantize() if hasattr(p.data, "_layout_cls") else p.data).float()
        for name, p in patcher.model.diffusion_model.named_parameters()
    }
    for name, module in patcher.model.diffusion_model.named_modules():
        patched = getattr(module, "patched", None)
        if patched is not None:
            weight = module.weight
            found[f"{name}.weight"] = patched.whole(module, weight, weight.device)
    return found


def plain_model(weights: dict[str, torch.Tensor], *, dynamic: bool = False):
    """The host's own MODEL over float32 weights under native names."""
    import comfy.sd

    given = {name: value.clone() for name, value in weights.items()}
    return comfy.sd.load_diffusion_model_state_dict(
        given, {"dtype": torch.float32}, disable_dynamic=not dynamic
    )


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference relative to the largest expected value."""
    return ((found - expected).abs().max() / expected.abs().max()).item()


def made(weight: torch.Tensor, fmt: str, **how):
    """A float weight quantized by the pack, in normal form."""
    return pack("quant.weight").quantize(weight, fmt, **how)


def composite(parts, dtype: torch.dtype = torch.float32, axis: int = 0):
    """A ``QuantizedTensor`` over ``{name: weight in normal form}``, or over one weight."""
    parts = parts if isinstance(parts, dict) else {"layer": parts}
    named = [(name, weight, None) for name, weight in parts.items()]
    return pack("loaders.layouts.composite").build(named, dtype, axis)

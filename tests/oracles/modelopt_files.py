"""Checkpoints of whole small models written by the real ModelOpt, with what they mean.

Run in the ``modelopt`` interpreter: ``python modelopt_files.py OUT FAMILY CASE ...`` writes for
each case (``all`` stands for every one)

    OUT/CASE/                    as ``export_hf_checkpoint`` leaves it: one component, or a
                                 pipeline of two
    OUT/CASE.golden.safetensors  ``<layer>.weight``: ModelOpt's own float32 dequantization of what
                                 is stored, ``[N, K]``; ``<layer>.meaning``, where the layer has a
                                 ``pre_quant_scale`` or a low-rank branch: the matrix that the
                                 whole layer multiplies x with
    OUT/CASE.run.safetensors     ``in.*``; ``out``: the float diffusers model with those weights;
                                 ``fake``: ModelOpt's own model with those weights and with its
                                 quantizers of activations at work
    OUT/cases.json               of each case: its layers' formats, and how far ModelOpt's
                                 fake-quantized weights are from the dequantized ones

Everything is exported from CPU. Three things of ModelOpt need CUDA, and have stand-ins here that
are made of its own code (see ``cpu_stand_ins``): fake quantization in dynamic blocks, which the
calibration of NVFP4 AWQ and SVDQuant and the ``fake`` run use, is replaced by ModelOpt's
quantize and dequantize of the stored form; the 3D convolution's own kernel by torch's. No format
had to be built by hand. What no stand-in helps: static FP4 blocks (Triton), MXFP6 and MXINT8,
which the exporter does not know.
"""

from __future__ import annotations

import copy
import json
import os
import re
import sys
import tempfile
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ["CUDA_VISIBLE_DEVICES"] = ""
warnings.filterwarnings("ignore")

import modelopt.torch.quantization as mtq  # noqa: E402
import torch  # noqa: E402
from diffusers import UniPCMultistepScheduler, WanPipeline  # noqa: E402
from modelopt.torch.export import export_hf_checkpoint, unified_export_hf  # noqa: E402
from modelopt.torch.export.quant_utils import (  # noqa: E402
    get_quantization_format,
    get_weight_block_size,
    pack_int4_in_uint8,
)
from modelopt.torch.opt.config_loader import load_config  # noqa: E402
from modelopt.torch.quantization import tensor_quant  # noqa: E402
from modelopt.torch.quantization.nn.modules.quant_conv import _QuantConv3d  # noqa: E402
from modelopt.torch.quantization.qtensor import (  # noqa: E402
    FP8QTensor,
    INT8QTensor,
    MXFP4QTensor,
    MXFP8QTensor,
    NVFP4QTensor,
)
from safetensors import safe_open  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from tiny_models import build, example_inputs, forward  # noqa: E402
from torch import Tensor, nn  # noqa: E402

#: ``{family: (key of tiny_models.SPECS, width, arguments of the class, layers left alone)}``; the
#: patterns are those of ModelOpt's own example for diffusers.
EDGES = r"proj_out.*|.*(time_text_embed|context_embedder|x_embedder|norm_out|time_guidance_embed|stream_modulation).*"  # noqa: E501
FAMILIES: dict[str, tuple[str, int, dict[str, Any], str]] = {
    "flux": ("flux", 256, {"num_layers": 1, "num_single_layers": 1}, EDGES),
    # what the server's text encoder fits
    "flux_server": (
        "flux", 256,
        {"num_layers": 1, "num_single_layers": 1, "joint_attention_dim": 768,
         "pooled_projection_dim": 768},
        EDGES,
    ),
    "flux2": ("flux2", 256, {}, EDGES),
    "wan": ("wan", 256, {}, r".*(patch_embedding|condition_embedder|proj_out).*"),
    # widths that are no multiples of 128, of 64 rows or of 4 groups of 16
    "wan_odd": (
        "wan", 128, {"ffn_dim": 352, "text_dim": 256},
        r".*(patch_embedding|condition_embedder|proj_out).*",
    ),
    "qwen_image": ("qwen_image", 256, {"num_layers": 1}, r"(?!.*transformer_blocks).*"),
    # what ComfyUI builds
    "qwen_image_whole": ("qwen_image_whole", 3072, {}, r"(?!.*transformer_blocks).*"),
}  # fmt: skip

PRESETS = "configs/ptq/presets/diffusers"


@dataclass(frozen=True)
class Case:
    """How to quantize and export one model.

    Args:
        config: Of ``mtq``, a preset's path, or ``mixed``.
        export: Arguments of the exporter.
        early: Leave layers alone before the calibration; ModelOpt's example does it after it, so
            that they, too, are smoothed and get low-rank branches.
        dtype: Of the model.
        pipeline: Export a Wan 2.2 pipeline: this model and an unquantized second one.
    """

    config: str
    export: dict[str, Any] = field(default_factory=dict)
    early: bool = False
    dtype: torch.dtype = torch.bfloat16
    pipeline: bool = False


LAYERWISE = {"enable_layerwise_quant_metadata": True}
SWIZZLED = {"enable_swizzle_layout": True}
CASES = {
    "fp8": Case("FP8_DEFAULT_CFG"),
    "fp8_per_channel_per_token": Case("FP8_PER_CHANNEL_PER_TOKEN_CFG"),
    "fp8_pb_wo": Case("FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG"),
    "nvfp4": Case("NVFP4_DEFAULT_CFG"),
    "w4a16_nvfp4": Case("W4A16_NVFP4_CFG"),
    "nvfp4_awq": Case("NVFP4_AWQ_LITE_CFG"),
    "nvfp4_svd": Case("NVFP4_SVDQUANT_DEFAULT_CFG"),
    "w4a8_nvfp4_fp8": Case("W4A8_NVFP4_FP8_CFG"),
    "mxfp8": Case("MXFP8_DEFAULT_CFG"),
    "mxfp4": Case("MXFP4_DEFAULT_CFG"),
    "w4a8_mxfp4_fp8": Case("W4A8_MXFP4_FP8_CFG"),
    "w8a8_sq": Case("INT8_SMOOTHQUANT_CFG"),
    "w8a8": Case("INT8_DEFAULT_CFG"),
    "w8a16": Case("INT8_WEIGHT_ONLY_CFG"),
    "w4a16_awq": Case("INT4_AWQ_CFG"),
    "w4a16": Case("INT4_BLOCKWISE_WEIGHT_ONLY_CFG"),
    "w4a8_awq": Case("W4A8_AWQ_BETA_CFG"),
    "mixed": Case("mixed"),
    # the presets of ModelOpt's example for diffusers
    "preset_fp8": Case(f"{PRESETS}/fp8"),
    "preset_int8": Case(f"{PRESETS}/int8"),
    "preset_nvfp4": Case(f"{PRESETS}/nvfp4"),
    "preset_nvfp4_fp8_mha": Case(f"{PRESETS}/nvfp4_fp8_mha"),
    # what the exporter does for single-file runtimes
    "fp8_layerwise": Case("FP8_DEFAULT_CFG", LAYERWISE),
    "nvfp4_layerwise": Case("NVFP4_DEFAULT_CFG", LAYERWISE),
    "nvfp4_swizzled": Case("NVFP4_DEFAULT_CFG", SWIZZLED | LAYERWISE),
    "nvfp4_swizzled_only": Case("NVFP4_DEFAULT_CFG", SWIZZLED),
    "nvfp4_padded_swizzled": Case(
        "NVFP4_DEFAULT_CFG", SWIZZLED | LAYERWISE | {"padding_strategy": "row_col"}
    ),
    "nvfp4_sharded": Case("NVFP4_DEFAULT_CFG", {"max_shard_size": "1MB"}),
    # other ways to the same formats
    "fp8_half": Case("FP8_DEFAULT_CFG", dtype=torch.float16),
    "nvfp4_svd_half": Case("NVFP4_SVDQUANT_DEFAULT_CFG", dtype=torch.float16),
    "nvfp4_svd_early": Case("NVFP4_SVDQUANT_DEFAULT_CFG", early=True),
    "w8a8_sq_early": Case("INT8_SMOOTHQUANT_CFG", early=True),
    "w4a16_nvfp4_mlp": Case("NVFP4_MLP_WEIGHT_ONLY_CFG"),  # groups of 32, like w4a8_nvfp4_fp8
    "nvfp4_pipeline": Case("NVFP4_DEFAULT_CFG", pipeline=True),
}


def fits(family: str, case: str) -> bool:
    """Whether that model can be quantized in that way."""
    if case in ("w4a16_awq", "w4a16", "w4a8_awq", "mixed"):
        return family != "wan_odd"  # the exporter refuses int4 where K is no multiple of 128
    if case == "w4a16_nvfp4_mlp":
        return not family.startswith("wan")  # no layer of that name
    return family.startswith("wan") or not CASES[case].pipeline


#: Rules of the mixed case, beside NVFP4: the last one that fits a layer holds. The exporter refuses
#: to_q, to_k and to_v of different formats.
MIXED = {
    "*.to_out*": "FP8_DEFAULT_CFG",
    "*.add_[qkv]_proj*": "INT8_WEIGHT_ONLY_CFG",
    "*.attn2.to_[qkv]*": "INT8_DEFAULT_CFG",
    "*net.0*": "MXFP8_DEFAULT_CFG",
    "*net.2*": "INT4_BLOCKWISE_WEIGHT_ONLY_CFG",
    "*.linear_in*": "MXFP8_DEFAULT_CFG",
    "*.linear_out*": "W4A16_NVFP4_CFG",
    "*.norm*": "FP8_PER_CHANNEL_PER_TOKEN_CFG",
    "*_mod.*": "FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG",
    "*.proj_mlp*": "W4A8_NVFP4_FP8_CFG",
    "*.1.attn.to_qkv_mlp_proj*": "W4A8_MXFP4_FP8_CFG",
}


def cpu_stand_ins() -> None:
    """Replace what needs CUDA by ModelOpt's own code that does not."""

    def quantize_blocks(
        x: Tensor,
        block: int,
        amax: Tensor | None,
        bits: int,
        exponent: int,
        scale_bits: int,
        scale_exponent: int,
    ) -> Tensor:
        sizes = {-1: block}
        kind = (bits, exponent, scale_bits, scale_exponent)
        if kind == (4, 2, 8, 4):
            top = x.abs().amax() if amax is None else amax.amax()
            second = top.float() / (6.0 * 448.0)
            made, scale, _ = NVFP4QTensor.quantize(x.float().clone(), block, None, second)
            wide = made.dequantize(
                dtype=torch.float32, scale=scale, double_scale=second, block_sizes=sizes
            )
        elif kind == (4, 2, 9, 8):
            made, scale = MXFP4QTensor.quantize(x.float().contiguous(), block)
            wide = made.dequantize(dtype=torch.float32, scale=scale, block_sizes=sizes)
        elif kind == (8, 4, 9, 8):
            made, scale = MXFP8QTensor.quantize(x.float())
            wide = made.dequantize(dtype=torch.float32, scale=scale)
        else:
            raise NotImplementedError(f"blocks of {kind}")
        return wide.to(x.dtype)

    tensor_quant.dynamic_block_quantize_op = quantize_blocks
    _QuantConv3d._should_use_implicit_gemm = lambda self: False


def quant_config(name: str) -> dict[str, Any]:
    """A configuration for ``mtq.quantize``."""
    if name == "mixed":
        config = copy.deepcopy(mtq.NVFP4_DEFAULT_CFG)
        rules = config["quant_cfg"] = list(config["quant_cfg"])
        for pattern, kind in MIXED.items():
            for part in ("weight_quantizer", "input_quantizer"):
                cfg = [
                    rule
                    for rule in getattr(mtq, kind)["quant_cfg"]
                    if rule["quantizer_name"] == f"*{part}" and rule.get("enable", True)
                ]
                rules.append(
                    {"quantizer_name": f"{pattern}{part}", "cfg": copy.deepcopy(cfg[0]["cfg"])}
                    if cfg
                    else {"quantizer_name": f"{pattern}{part}", "enable": False}
                )
    elif name.endswith("_CFG"):
        config = copy.deepcopy(getattr(mtq, name))
        config["quant_cfg"] = list(config["quant_cfg"])
        if "AWQ" in name:  # fewer candidates: the search is slow here
            config["algorithm"] = {"method": "awq_lite", "alpha_step": 0.5}
    else:
        config = load_config(name).model_dump()
        config["quant_cfg"] = list(config["quant_cfg"])
    # ModelOpt's example leaves convolutions of the video models alone
    config["quant_cfg"].append({"quantizer_name": "*patch_embedding*", "enable": False})
    return config


def shake(model: nn.Module, seed: int) -> None:
    """Give each layer another magnitude and a run of zeros, as real ones have."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.weight.mul_(2.0 ** float(torch.rand((), generator=generator) * 2 - 1))
                module.weight[0, :32] = 0


def cast(inputs: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {
        name: value.to(dtype) if value.is_floating_point() else value
        for name, value in inputs.items()
    }


def stored(folder: Path) -> dict[str, Tensor]:
    """Every tensor of an exported component."""
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as handle:
            tensors |= {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118
    return tensors


def dequantize(
    kind: str, layer: str, tensors: dict[str, Tensor], columns: int, group: int
) -> Tensor:
    """ModelOpt's float32 meaning of one stored weight of ``columns`` in groups of ``group``."""
    weight, scale = tensors[f"{layer}.weight"], tensors[f"{layer}.weight_scale"]
    rows = weight.shape[0] * (2 if kind in ("int4_awq", "w4a8_awq") else 1)
    shape = torch.Size((rows, columns))
    wide = {"dtype": torch.float32, "scale": scale}
    if kind == "fp8":
        return FP8QTensor(shape, torch.bfloat16, weight).dequantize(**wide)
    if kind == "fp8_pc_pt":
        wide["scale"] = scale[:, None]
        return FP8QTensor(shape, torch.bfloat16, weight).dequantize(**wide)
    if kind == "fp8_pb_wo":
        wide["scale"] = scale.reshape(-(-rows // group), -(-columns // group))
        sizes = {-1: group, -2: group}
        return FP8QTensor(shape, torch.bfloat16, weight).dequantize(**wide, block_sizes=sizes)
    if kind in ("nvfp4", "w4a16_nvfp4", "nvfp4_awq", "nvfp4_svdquant", "w4a8_nvfp4_fp8"):
        second = tensors[f"{layer}.weight_scale_2"]
        made = NVFP4QTensor(shape, torch.bfloat16, weight)
        return made.dequantize(**wide, double_scale=second, block_sizes={-1: group})
    if kind == "mxfp8":
        return MXFP8QTensor(shape, torch.bfloat16, weight).dequantize(**wide)
    if kind in ("mxfp4", "w4a8_mxfp4_fp8"):
        made = MXFP4QTensor(shape, torch.bfloat16, weight)
        return made.dequantize(**wide, block_sizes={-1: group})
    if kind in ("int8_sq", "int8_wo"):
        wide["scale"] = scale[:, None]
        return INT8QTensor(shape, torch.bfloat16, weight).dequantize(**wide)
    if kind in ("int4_awq", "w4a8_awq"):
        return unpack_int4(weight, scale, group)
    raise NotImplementedError(kind)


def unpack_int4(weight: Tensor, scale: Tensor, group: int) -> Tensor:
    """The inverse of ``pack_int4_in_uint8``, proven by that function: ModelOpt has none."""
    low, high = (weight & 15).to(torch.int8), (weight >> 4).to(torch.int8)
    codes = torch.stack([low, high], dim=1).reshape(-1, weight.shape[1])
    wide = torch.where(codes > 7, codes - 16, codes) * scale.repeat_interleave(group, dim=1)
    assert torch.equal(pack_int4_in_uint8(wide, scale, group), weight)
    return wide


class Exported:
    """A quantized model as the exporter leaves it, with the weights as it met them.

    The exporter averages ``pre_quant_scale`` over to_q, to_k and to_v before it packs them, which
    changes their weights once more.
    """

    def __init__(self, model: nn.Module, folder: Path, second: nn.Module | None, **options: Any):
        self.model = model
        self.packed: dict[str, Tensor] = {}
        inner = unified_export_hf._process_quantized_modules

        def process(module: nn.Module, *args: Any, **more: Any) -> Any:
            self.packed = {
                name: child.weight.detach().clone()
                for name, child in module.named_modules()
                if isinstance(child, nn.Linear)
            }
            return inner(module, *args, **more)

        unified_export_hf._process_quantized_modules = process
        whole = model if second is None else wan_pipeline(model, second)
        try:
            export_hf_checkpoint(whole, export_dir=folder, **options)
        finally:
            unified_export_hf._process_quantized_modules = inner
        self.tensors = stored(folder if second is None else folder / "transformer")


def wan_pipeline(first: nn.Module, second: nn.Module) -> WanPipeline:
    """What is exported of Wan 2.2 beside text encoder and VAE."""
    return WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        scheduler=UniPCMultistepScheduler(),
        transformer=first,
        transformer_2=second,
        boundary_ratio=0.875,
    )


def whole_layer(module: nn.Module, columns: int) -> Tensor:
    """The matrix that a layer multiplies x with, found by running ModelOpt's own layer on 1."""
    bias, module.bias = module.bias, None
    quantizer = module.input_quantizer
    enabled = quantizer.is_enabled
    quantizer.disable()  # what smooths x is no part of that
    matrix = module(torch.eye(columns)).T.contiguous()
    if enabled:
        quantizer.enable()
    module.bias = bias
    return matrix


@torch.no_grad()
def make(family: str, case: str, out: Path) -> dict[str, Any]:
    """One checkpoint with its goldens."""
    spec, width, less, skip = FAMILIES[family]
    told = CASES[case]
    seed = sum(map(ord, family + case))
    torch.manual_seed(seed)
    source = build(spec, width=width, seed=seed, **less)
    shake(source, seed)

    def calibrate(module: nn.Module) -> None:
        for more in range(2):
            forward(spec, module, cast(example_inputs(spec, module, seed + more), told.dtype))

    model = copy.deepcopy(source).to(told.dtype).eval()
    config = quant_config(told.config)
    if told.early:
        config["quant_cfg"] += [
            {"quantizer_name": f"{name}.*", "enable": False}
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and re.match(skip, name)
        ]
    model = mtq.quantize(model, config, forward_loop=calibrate)
    mtq.disable_quantizer(model, lambda name: re.match(skip, name) is not None)
    kinds = {
        name: get_quantization_format(module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }
    kinds = {name: kind for name, kind in kinds.items() if kind is not None}
    assert kinds, f"{case} quantized no layer of {family}"
    if "enable_swizzle_layout" in told.export:
        export_hf_checkpoint(copy.deepcopy(model), export_dir=out / case, **told.export)
        with tempfile.TemporaryDirectory() as folder:
            done = Exported(model, Path(folder), None)  # without what follows the export
    else:
        second = build(spec, width=width, seed=seed + 1, **less) if told.pipeline else None
        second = second.to(told.dtype) if second is not None else None
        done = Exported(model, out / case, second, **told.export)

    golden, meaning, apart = {}, {}, {}
    model = done.model.float()
    for name, buffer in source.named_buffers():
        model.get_buffer(name).copy_(buffer)  # positions, which were rounded with the weights
    for name, kind in kinds.items():
        module, packed = model.get_submodule(name), done.packed[name]
        group = get_weight_block_size(module)
        wide = dequantize(kind, name, done.tensors, packed.shape[1], group).contiguous()
        golden[f"{name}.weight"] = meaning[f"{name}.weight"] = wide
        fake = module.weight_quantizer(packed.float())
        apart[name] = float((fake - wide).norm() / fake.norm())
        module.weight = nn.Parameter(wide)
        module.weight_quantizer.disable()
    for key in done.tensors:
        name, _, what = key.rpartition(".")
        if what == "pre_quant_scale":  # on layers left alone, too
            module = model.get_submodule(name)
            whole = whole_layer(module, module.in_features)
            golden[f"{name}.meaning"] = meaning[f"{name}.weight"] = whole
    save_file(golden, out / f"{case}.golden.safetensors")

    state = source.state_dict()
    lost = {key: float((meaning[key] - state[key]).norm() / state[key].norm()) for key in meaning}
    assert max(lost.values()) < 0.35, f"{case} of {family} means something else: {lost}"
    source.load_state_dict(
        {key: meaning[key] if key in meaning else done.tensors[key].float() for key in state}
    )
    inputs = example_inputs(spec, source, seed)
    result = {f"in.{name}": value.contiguous() for name, value in inputs.items()}
    result["out"] = forward(spec, source, inputs).contiguous()
    result["fake"] = forward(spec, model, inputs).contiguous()
    save_file(result, out / f"{case}.run.safetensors")
    return {"formats": kinds, "fake_quant": apart, "lost": lost}


def main(out: str, family: str, *cases: str) -> None:
    """Write the cases and a list of them."""
    torch.set_num_threads(2 if "whole" in family else 1)  # tiny tensors: threads get in the way
    cpu_stand_ins()
    names = list(cases)
    if cases == ("all",):
        names = [case for case in CASES if fits(family, case)]
    made = {case: make(family, case, Path(out)) for case in names}
    (Path(out) / "cases.json").write_text(json.dumps(made, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])

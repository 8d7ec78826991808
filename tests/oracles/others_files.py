"""Small models saved by diffusers with bitsandbytes, torchao and quanto, with what they mean.

Run in the ``others`` interpreter: ``python others_files.py OUT FAMILY CASE ...`` writes for each
case (``all`` stands for every one)

    OUT/CASE/                    as ``save_pretrained`` leaves it
    OUT/CASE.golden.safetensors  ``<layer>.weight``: the package's own dequantization, float32
    OUT/CASE.run.safetensors     ``in.*`` and ``out``: the float diffusers model with those weights

What the packages and diffusers do not do on a CPU: diffusers asks for a GPU before it quantizes
by bitsandbytes, which does it on CPU as well (that question is left out here); torchao's int4
needs a library of CUDA kernels, and so do fp8 weights with fp8 activations, whose files look like
those of fp8 weights alone. diffusers saves torchao's tensors as pickles only (``*_pickle``); the
other torchao cases are flattened by torchao's own function for safetensors, which transformers
saves by.

Scales in bf16 make these packages round what they dequantize to bf16. They are made float32 first,
so that the golden is exact.
"""

from __future__ import annotations

import copy
import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

os.environ["CUDA_VISIBLE_DEVICES"] = ""
warnings.filterwarnings("ignore")
# Without this part of it quanto unpacks in Python, instead of compiling C++ for a minute.
sys.modules["optimum.quanto.library.extensions.cpp"] = ModuleType("cpp")

import bitsandbytes as bnb  # noqa: E402
import diffusers  # noqa: E402
import torch  # noqa: E402
import torchao.quantization as ao  # noqa: E402
from diffusers import BitsAndBytesConfig, QuantoConfig, TorchAoConfig  # noqa: E402
from diffusers.quantizers.bitsandbytes.bnb_quantizer import (  # noqa: E402
    BnB4BitDiffusersQuantizer,
    BnB8BitDiffusersQuantizer,
)
from optimum.quanto import QLinear, QTensor  # noqa: E402
from optimum.quanto.tensor.packed import PackedTensor  # noqa: E402
from optimum.quanto.tensor.weights.qbits import WeightQBitsTensor  # noqa: E402
from optimum.quanto.tensor.weights.qbytes import WeightQBytesTensor  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from tiny_models import SPECS, build, example_inputs, forward  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torchao.prototype.mx_formats import NVFP4WeightOnlyConfig  # noqa: E402
from torchao.prototype.safetensors.safetensors_support import (  # noqa: E402
    flatten_tensor_state_dict,
)
from torchao.utils import TorchAOBaseTensor  # noqa: E402

#: ``{family: (width, arguments of the class)}``
FAMILIES: dict[str, tuple[int, dict[str, Any]]] = {
    "flux": (256, {"num_layers": 1, "num_single_layers": 1}),
    # what the server's text encoder fits
    "flux_server": (
        256,
        {
            "num_layers": 1,
            "num_single_layers": 1,
            "joint_attention_dim": 768,
            "pooled_projection_dim": 768,
        },
    ),
    "wan": (256, {"num_layers": 2}),
}
SPECS["flux_server"] = SPECS["flux"]
#: A width that no group divides: bitsandbytes' blocks then run across rows.
ODD = {"flux": {"pooled_projection_dim": 40}, "flux_server": {}, "wan": {}}


@dataclass(frozen=True)
class Case:
    """How to quantize one model; ``odd`` cases have a layer of an odd width."""

    config: Callable[[], Any]
    odd: bool = False
    pickle: bool = False


def bits4(kind: str, **more: Any) -> Callable[[], BitsAndBytesConfig]:
    return lambda: BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_compute_dtype=torch.bfloat16,
        **more,
    )


def torchao(config: Callable[..., Any], **arguments: Any) -> Callable[[], TorchAoConfig]:
    return lambda: TorchAoConfig(config(**arguments))


CASES = {
    "bnb_nf4": Case(bits4("nf4"), odd=True),
    "bnb_nf4_double": Case(bits4("nf4", bnb_4bit_use_double_quant=True), odd=True),
    "bnb_fp4": Case(bits4("fp4"), odd=True),
    "bnb_fp4_double": Case(bits4("fp4", bnb_4bit_use_double_quant=True)),
    "bnb_nf4_bf16_storage": Case(bits4("nf4", bnb_4bit_quant_storage=torch.bfloat16)),
    "bnb_int8": Case(lambda: BitsAndBytesConfig(load_in_8bit=True), odd=True),
    "torchao_int8": Case(torchao(ao.Int8WeightOnlyConfig), odd=True),
    "torchao_int8_tensor": Case(torchao(ao.Int8WeightOnlyConfig, granularity=ao.PerTensor())),
    "torchao_int8_group": Case(torchao(ao.Int8WeightOnlyConfig, granularity=ao.PerGroup(64))),
    "torchao_int8_dynamic": Case(torchao(ao.Int8DynamicActivationInt8WeightConfig)),
    "torchao_fp8": Case(torchao(ao.Float8WeightOnlyConfig), odd=True),
    "torchao_fp8_e5m2": Case(
        torchao(ao.Float8WeightOnlyConfig, weight_dtype=torch.float8_e5m2), odd=True
    ),
    "torchao_int4_unpacked": Case(
        torchao(ao.IntxWeightOnlyConfig, weight_dtype=torch.int4, granularity=ao.PerGroup(32))
    ),
    "torchao_nvfp4": Case(torchao(NVFP4WeightOnlyConfig)),
    "torchao_int8_pickle": Case(torchao(ao.Int8WeightOnlyConfig), pickle=True),
    "quanto_int8": Case(lambda: QuantoConfig("int8"), odd=True),
    "quanto_fp8": Case(lambda: QuantoConfig("float8"), odd=True),
    "quanto_int4": Case(lambda: QuantoConfig("int4"), odd=True),
    "quanto_int2": Case(lambda: QuantoConfig("int2"), odd=True),
}


def dequantize(module: nn.Linear) -> Tensor | None:
    """The package's float32 meaning of a layer's weight; None when the layer is a plain one."""
    weight = module.weight
    if isinstance(module, bnb.nn.Linear4bit):
        weight.quant_state.dtype = torch.float32
        data = weight.data.view(torch.uint8).view(-1, 1)
        return bnb.functional.dequantize_4bit(data, weight.quant_state)
    if isinstance(module, bnb.nn.Linear8bitLt):
        return bnb.functional.int8_vectorwise_dequant(weight.data, weight.SCB)
    if isinstance(weight, TorchAOBaseTensor):
        if hasattr(weight, "target_dtype"):  # Intx, which cannot be asked for another dtype
            return weight.to(torch.float32).dequantize()
        return weight.dequantize(torch.float32)
    return None


def dequantize_quanto(module: QLinear, layer: str, tensors: dict[str, Tensor]) -> Tensor:
    """The same for quanto, from the saved tensors: what lies in memory cannot change its dtype."""
    weight = module.weight
    kind, size, stride = weight.qtype, weight.size(), weight.stride()
    told = {
        name.removeprefix(f"{layer}.weight."): value
        for name, value in tensors.items()
        if name.startswith(f"{layer}.weight.")
    }
    scale = told["_scale"].float()
    if "_shift" not in told:
        return WeightQBytesTensor(kind, 0, size, stride, told["_data"], scale, None).dequantize()
    group = module.weight_group_size or size[1]
    whole = torch.Size((size.numel() // group, group))
    data = PackedTensor(told["_data._data"], kind.bits, whole, (group, 1))
    shift = told["_shift"].float()
    return WeightQBitsTensor(kind, 0, group, size, stride, data, scale, shift).dequantize()


@torch.no_grad()
def make(family: str, case: str, out: Path) -> None:
    """One checkpoint with its golden."""
    told = CASES[case]
    width, less = FAMILIES[family]
    less = less | (ODD[family] if told.odd else {})
    seed = sum(map(ord, family + case))
    torch.manual_seed(seed)
    source = build(family, width=width, seed=seed, **less)
    with tempfile.TemporaryDirectory() as folder:
        # A copy: rounded in place, buffers that no file holds would stay rounded.
        copy.deepcopy(source).to(torch.bfloat16).save_pretrained(folder)
        model = getattr(diffusers, SPECS[family].cls).from_pretrained(
            folder,
            quantization_config=told.config(),
            torch_dtype=torch.bfloat16,
            device_map={"": "cpu"} if case.startswith("bnb") else None,
        )
    target = out / case
    if case.startswith("torchao"):
        model.save_pretrained(target, safe_serialization=False)
        if not told.pickle:
            (target / "diffusion_pytorch_model.bin").unlink()
            tensors, metadata = flatten_tensor_state_dict(model.state_dict())
            tensors = {name: value.contiguous() for name, value in tensors.items()}
            file = target / "diffusion_pytorch_model.safetensors"
            save_file(tensors, file, metadata={"format": "pt"} | metadata)
    else:
        model.save_pretrained(target)

    golden = {}
    for name, module in model.named_modules():
        if isinstance(module, QLinear) and isinstance(module.weight, QTensor):
            tensors = load_file(target / "diffusion_pytorch_model.safetensors")
            golden[f"{name}.weight"] = dequantize_quanto(module, name, tensors).contiguous()
        elif isinstance(module, nn.Linear):
            wide = dequantize(module)
            if wide is not None:
                golden[f"{name}.weight"] = wide.contiguous()
    assert golden, f"{case} quantized no layer of {family}"
    save_file(golden, out / f"{case}.golden.safetensors")

    state, held = source.state_dict(), model.state_dict()
    lost = {key: float((golden[key] - state[key]).norm() / state[key].norm()) for key in golden}
    worst = 0.6 if case == "quanto_int2" else 0.15
    assert max(lost.values()) < worst, f"{case} of {family} means something else: {lost}"
    source.load_state_dict(
        {key: golden[key] if key in golden else held[key].float() for key in state}
    )
    inputs = example_inputs(family, source, seed)
    result = {f"in.{name}": value.contiguous() for name, value in inputs.items()}
    result["out"] = forward(family, source, inputs).contiguous()
    save_file(result, out / f"{case}.run.safetensors")
    print(case, max(lost.values()), len(golden))


def main(out: str, family: str, *cases: str) -> None:
    """Write the cases."""
    torch.set_num_threads(1)  # tiny tensors: threads only get in each other's way
    for quantizer in (BnB4BitDiffusersQuantizer, BnB8BitDiffusersQuantizer):
        quantizer.validate_environment = lambda self, *args, **more: None
    for case in CASES if cases == ("all",) else cases:
        make(family, case, Path(out))


if __name__ == "__main__":
    main(*sys.argv[1:])

"""The unit cases of the sdnq package (``oracles/sdnq_units.py``) in the pack's normal form."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache

import torch
from safetensors.torch import load_file
from support import oracle, pack
from torch import Tensor

# What a dequantized weight may differ by, relative to its largest value.
RELATIVE = 1e-6


@dataclass(frozen=True)
class Case:
    """What the package said about one case, and its tensors."""

    name: str
    facts: dict
    tensors: dict[str, Tensor]


@cache
def units(part: str) -> tuple[Case, ...]:
    """All cases of a part."""
    folder = oracle("sdnq_units.py")
    tensors: dict[str, dict[str, Tensor]] = {}
    for key, tensor in load_file(folder / f"{part}.safetensors").items():
        case, _, name = key.rpartition("/")
        tensors.setdefault(case, {})[name] = tensor
    told = json.loads((folder / f"{part}.json").read_text(encoding="utf-8"))
    assert told
    return tuple(Case(name, facts, tensors[name]) for name, facts in told.items())


def normal_form(case: Case):
    """The case's layer as a QuantizedWeight."""
    facts, stored = case.facts, case.tensors
    fmt = pack("quant.dtypes").get_format(facts["format"])
    weight, scale = stored["weight"], stored["scale"]
    if facts["transposed"]:
        weight, scale = weight.t().contiguous(), scale.t().contiguous()
    code_shape = tuple(facts["code_shape"])
    tensors = {"codes": weight.reshape(-1)}
    if facts["codebook"]:
        tensors["levels"] = scale.view(1, 1, -1) if scale.dim() == 1 else scale
    else:
        tensors["scale"] = scale
    if "zero_point" in stored:
        zero_point = stored["zero_point"]
        tensors["zero_point"] = zero_point.t().contiguous() if facts["transposed"] else zero_point
    rank = 0
    if "svd_up" in stored:
        up, down = stored["svd_up"], stored["svd_down"]
        if facts["svd_transposed"]:
            up, down = up.t(), down.t()
        tensors |= {"svd_up": up.contiguous(), "svd_down": down.contiguous()}
        rank = up.shape[1]
    spec = pack("kernels.spec").WeightSpec(
        format=fmt,
        shape=tuple(facts["shape"]),
        code_shape=code_shape,
        hadamard=facts["hadamard"],
        hadamard_basis=4,
        rank=rank,
        codebook=facts["codebook"],
    )
    return pack("quant.weight").QuantizedWeight(spec, tensors)


def assert_near(found: Tensor, expected: Tensor, what: object, relative: float = RELATIVE) -> None:
    """Equal within `relative` of the largest expected value; NaN nowhere."""
    assert found.shape == expected.shape, (what, found.shape, expected.shape)
    error = (found.to(torch.float64) - expected.to(torch.float64)).abs().max().item()
    largest = expected.abs().max().item()
    assert error <= relative * largest, (what, error / max(largest, 1e-30))

"""Random weights of SVDQuant's kinds: the numbers of a file, and the pack's normal form of them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from support import pack
from torch import Tensor

SHIFT = 0.171875
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6.0])


@dataclass(frozen=True)
class Layer:
    """The numbers of a layer: what a file stores, unpacked.

    codes: [N, K], -8..7 or the 4 bits of e2m1.
    scale: [N, G]. second: [N] or [1], nvfp4 only. smooth: [K]. down: [R, K]. up: [N, R].
    stored_bias: [N] as the engine adds it; bias: that of the float layer.
    """

    fp4: bool
    unsigned: bool
    codes: Tensor
    scale: Tensor
    second: Tensor
    smooth: Tensor
    down: Tensor
    up: Tensor
    stored_bias: Tensor
    bias: Tensor

    @property
    def residual(self) -> Tensor:
        """[N, K] that smoothed activations meet, float64."""
        values = E2M1.double()[self.codes.long()] if self.fp4 else self.codes.double()
        rows, groups = self.scale.shape
        scale = self.scale.double() * self.second.double().view(-1, 1)
        return (values.view(rows, groups, -1) * scale[:, :, None]).view(rows, -1)

    @property
    def dense(self) -> Tensor:
        """[N, K] that raw activations would meet, float64."""
        return self.residual / self.smooth.double() + self.up.double() @ self.down.double()


def layer(
    kind: str,
    rows: int,
    columns: int,
    *,
    rank: int = 16,
    seed: int = 0,
    half: torch.dtype = torch.bfloat16,
    by_row: bool = False,
) -> Layer:
    """A layer of a kind: "int4", "uint4" (int4 weight, unsigned activations) or "nvfp4"."""
    noise = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=noise)

    fp4 = kind == "nvfp4"
    group = 16 if fp4 else 64
    groups = columns // group
    bits = torch.randint(0, 16, (rows, columns), generator=noise)
    scale = (0.5 + normal(rows, groups).abs()) * columns**-0.5 / (1 if fp4 else 3)
    second = torch.ones(1)
    if fp4:
        second = scale.max(dim=1).values / 448 if by_row else scale.max().view(1) / 448
        scale = (scale / second.view(-1, 1)).to(torch.float8_e4m3fn)
    else:
        scale = scale.to(half)
    smooth = (0.5 + normal(columns).abs()).to(half)
    made = Layer(
        fp4=fp4,
        unsigned=kind == "uint4",
        codes=bits if fp4 else bits - 8,
        scale=scale,
        second=second,
        smooth=smooth,
        down=(normal(rank, columns) * columns**-0.5).to(half),
        up=(normal(rows, rank) * 0.3).to(half),
        stored_bias=torch.zeros(rows),
        bias=normal(rows),
    )
    if not made.unsigned:
        return replace(made, stored_bias=made.bias)
    correction = SHIFT * (made.residual / made.smooth.double()).sum(dim=1)
    return replace(made, stored_bias=(made.bias.double() - correction).float())


def normal_form(made: Layer):
    """The layer as a QuantizedWeight."""
    spec, fmt = pack("kernels.spec"), pack("quant.dtypes").get_format
    rows, groups = made.scale.shape
    columns = made.codes.shape[1]
    form = fmt("float4_e2m1fn" if made.fp4 else "int4")
    tensors = {
        "codes": pack("quant.packing").pack(made.codes, form),
        "scale": made.scale.view(rows, groups, 1),
        "smooth": made.smooth,
    }
    if made.down.shape[0]:
        tensors |= {"svd_up": made.up, "svd_down": made.down}
    if made.fp4:
        tensors["scale_2"] = made.second.view(-1, 1, 1)
    if made.unsigned:
        residual = made.residual / made.smooth.double()
        tensors["shift_bias"] = (SHIFT * residual.sum(dim=1)).float()
    group = columns // groups
    activation = spec.ActivationSpec(
        format="float4_e2m1fn" if made.fp4 else "uint4" if made.unsigned else "int4",
        group=group,
        scale="float8_e4m3fn" if made.fp4 else "",
        shift=SHIFT if made.unsigned else 0.0,
    )
    return pack("quant.weight").QuantizedWeight(
        spec.WeightSpec(
            format=form,
            shape=(rows, columns),
            code_shape=(rows, groups, group),
            rank=made.down.shape[0],
            smoothing="divide",
            two_level=made.fp4,
            activation=activation,
        ),
        tensors,
    )


def activations(made: Layer, *shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    """Random inputs [*shape, K]; those of an unsigned layer come out of a GELU."""
    noise = torch.Generator().manual_seed(1000 + seed)
    x = torch.randn((*shape, made.codes.shape[1]), generator=noise)
    x = torch.nn.functional.gelu(2 * x, approximate="tanh") if made.unsigned else x
    return x.to(dtype)


def relative(found: Tensor, expected: Tensor) -> float:
    """Error of a tensor, relative in norm."""
    assert found.shape == expected.shape, (found.shape, expected.shape)
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()

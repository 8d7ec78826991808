"""The arithmetic of the engine that SVDQuant checkpoints are written for, as formulas.

``half`` is the dtype of the activations. Shift, smoothing, rounding of activations and their scales
are in float32 and ``half`` as the engine does them; sums, whose order is nobody's promise, are in
float64 and rounded once. Layers are those of ``svdq_models``: nothing here has seen a packed byte.

Let x be the raw activations, g a group of K, d the low-rank branch:

====================  ===========================================================================
int4                  q = round(xs / s), s = max|xs| / 7 in a group; 15 where unsigned
nvfp4                 q = e2m1(xs / s), s = max|xs| / 6 in a group, itself rounded to e4m3
both                  xs = half(half(x + shift) / smooth); y = half(sum of q * w * scales + bias)
low rank              y = half(y + half(x @ down.T) @ up.T), on x itself
W4A16                 y = half(x @ half(code * scale + zero).T + bias)
====================  ===========================================================================
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from svdq_models import E2M1, SHIFT, Awq, Made, Svdq
from torch import Tensor

__all__ = ["by_formulas", "formula", "forward"]


def forward(layer: Svdq | Awq, x: Tensor) -> Tensor:
    """``x [..., K]`` of the activations' dtype through a layer, ``[..., N]`` of the same dtype."""
    half = x.dtype
    if isinstance(layer, Awq):
        rows, groups = layer.scale.shape
        code = layer.codes.float().view(rows, groups, -1)
        scale, zero = layer.scale.float()[:, :, None], layer.zero.float()[:, :, None]
        weight = (code * scale + zero).to(half).reshape(rows, -1)
        y = x.double() @ weight.double().T
        return (y if layer.bias is None else y + layer.bias.double()).to(half)
    rounded = nvfp4 if layer.precision == "nvfp4" else int4
    y = rounded(layer, x)
    la = (x.double() @ layer.down.double().T).float().to(half)
    return (y.double() + la.double() @ layer.up.double().T).to(half)


def int4(layer: Svdq, x: Tensor) -> Tensor:
    """The rounded part, with the bias as the file has it."""
    half = x.dtype
    top = 15 if layer.unsigned else 7
    x = x + SHIFT if layer.unsigned else x
    xs = (x.float() / layer.smooth.float()).to(half).unflatten(-1, (-1, 64))
    exact = xs.abs().amax(-1, keepdim=True).float() * torch.tensor(1 / top)
    scale = exact.to(half)
    q = torch.round(xs.float() * exact.reciprocal().nan_to_num(posinf=0))
    q = q.clamp(0, 15) if layer.unsigned else q.clamp(-8, 7)
    y = summed(layer, q, scale)
    return (y if layer.stored_bias is None else y + layer.stored_bias.double()).to(half)


def nvfp4(layer: Svdq, x: Tensor) -> Tensor:
    """The rounded part with its bias; never shifted."""
    assert not layer.unsigned
    half = x.dtype
    xs = (x.float() / layer.smooth.float()).to(half).unflatten(-1, (-1, 16))
    exact = (xs.abs().amax(-1, keepdim=True).float() * torch.tensor(1 / 6)).clamp_max(448)
    scale = exact.to(torch.float8_e4m3fn)
    q = e2m1(xs.float() * exact.reciprocal().nan_to_num(posinf=0))
    y = summed(layer, q, scale)
    for level in (layer.tensor_scale, layer.row_scale):
        y = y if level is None else y * level.double()
    return (y if layer.stored_bias is None else y + layer.stored_bias.double()).to(half)


def e2m1(values: Tensor) -> Tensor:
    """The nearest of e2m1's values; between two of them, the one of even code."""
    steps = E2M1[:8].float()
    size = values.abs().clamp_max(6)
    between = (steps[1:] + steps[:-1]) / 2
    under, over = torch.bucketize(size, between), torch.bucketize(size, between, right=True)
    code = torch.where(under % 2 == 0, under, over)
    return steps[code].copysign(values)


def summed(layer: Svdq, q: Tensor, scale: Tensor) -> Tensor:
    """``[..., G, g]`` rounded activations times the rounded weight, float64 ``[..., N]``."""
    weight = layer.values.view(*layer.scale.shape, -1) * layer.scale.double()[:, :, None]
    x = q.double() * scale.double()
    return x.flatten(-2) @ weight.flatten(1).T


# ------------------------------------------------------------------------------ layers of a model


def formula(made: Made, module: str) -> Callable[[Tensor], Tensor] | None:
    """What a Linear of ComfyUI's model computes; None for one that is not quantized."""
    _, moves = made.moves()
    found = [move for move in moves if move.native == f"{module}.weight"]
    pieces = [piece.key.removesuffix(".weight") for move in found for piece in move.pieces]
    if not any(piece in made.uses for piece in pieces):
        return None

    def run(x: Tensor) -> Tensor:
        return torch.cat([one(made, piece, x) for piece in pieces], dim=-1)

    return run


def one(made: Made, module: str, x: Tensor) -> Tensor:
    """A Linear of diffusers, from the layers of the file that it is made of."""
    outputs = [
        forward(made.layers[use.layer], x[..., slice(*use.columns)])[..., slice(*use.rows)]
        for use in made.uses[module]
    ]
    if len({use.columns for use in made.uses[module]}) == 1:
        return torch.cat(outputs, dim=-1)
    return sum(output.double() for output in outputs).to(x.dtype)


def by_formulas(
    made: Made, model: torch.nn.Module, watch: Callable[[str, Tensor, Tensor], None] | None = None
) -> None:
    """Let every quantized Linear of a float model compute by its formula.

    Args:
        made: The checkpoint.
        model: ComfyUI's model; changed.
        watch: Called with a layer's name, its input and its output whenever one runs.
    """
    for name, module in model.named_modules():
        run = formula(made, name) if isinstance(module, torch.nn.Linear) else None
        if run is not None:
            module.forward = run if watch is None else _watched(name, run, watch)


def _watched(name: str, run: Callable[[Tensor], Tensor], watch) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        y = run(x)
        watch(name, x, y)
        return y

    return forward

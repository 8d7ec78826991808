"""A quantized weight as one value: made from floats, rounded anew, cut and joined by rows.

The tensors and their shapes are those of `kernels.spec`. Conv weights are quantized over their
input channels, so each kernel position has a scale of its own:

| weight            | grouped code_shape | scale             | one group       | scale           |
|-------------------|--------------------|-------------------|-----------------|-----------------|
| [O, I], [V, E]    | [O, G, g]          | [O, G, 1]         | [O, I]          | [O, 1]          |
| [O, C, kh, kw]    | [O, G, g, kh, kw]  | [O, G, 1, kh, kw] | [O, C, kh, kw]  | [O, 1, kh, kw]  |
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..kernels import faithful, reference
from ..kernels.spec import SHARED, SMOOTHINGS, CodeFormat, WeightSpec
from . import affine, codebook, lowrank, rotation
from .dtypes import get_format
from .errors import LowBitError
from .packing import pack
from .rounding import generator, nearest_level, round_to_codes

__all__ = [
    "QuantizedWeight",
    "concat_rows",
    "quantize",
    "requantize_like",
    "swap_halves",
    "take_rows",
]

TENSORWISE = -2
_E4M3_REACH = 464.0  # what still rounds to the largest float8_e4m3fn, 448


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight in normal form: `spec` says what `tensors` mean."""

    spec: WeightSpec
    tensors: dict[str, Tensor]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight in `spec.shape`."""
        return reference.dequantize(self.tensors, self.spec, dtype)

    def check(self) -> None:
        """Raise LowBitError, naming the tensor, unless every shape and dtype fits the spec."""
        spec, fmt = self.spec, self.spec.format
        if math.prod(spec.code_shape) != spec.numel or spec.code_shape[0] != spec.rows:
            raise LowBitError(
                "The codes cannot be viewed as the weight.",
                found=f"codes of {list(spec.code_shape)}",
                expected=f"as many as in {list(spec.shape)}, with the same rows",
            )
        _check_tensor(self.tensors, "codes", fmt.word, numel=fmt.storage_numel(spec.numel))
        if spec.rank:
            _check_tensor(self.tensors, "svd_up", None, shape=(spec.rows, spec.rank))
            _check_tensor(self.tensors, "svd_down", None, shape=(spec.rank, spec.columns))
        if spec.codebook:
            levels = _check_tensor(self.tensors, "levels", None)
            axis = reference.reduced_axis(spec) if levels.dim() == len(spec.code_shape) else -1
            if levels.numel() == levels.shape[-1]:  # one set of levels for the whole weight
                axis = -1
            if levels.shape[axis] != 1 << fmt.bits:
                raise LowBitError(
                    "The codebook does not have the levels of its format.",
                    found=list(levels.shape),
                    expected=f"{1 << fmt.bits} levels in each group",
                )
        elif fmt.kind != "native" or "scale" in self.tensors:
            self._check_scale("scale")
            if not fmt.signed:
                self._check_scale("zero_point")
        if spec.two_level:
            self._check_scale("scale_2", torch.float32)
        self._check_activations()

    def _check_scale(self, name: str, dtype: torch.dtype | None = None) -> None:
        shape, whole = _check_tensor(self.tensors, name, dtype).shape, self.spec.code_shape
        if len(shape) != len(whole) or any(
            size not in (1, full) for size, full in zip(shape, whole, strict=True)
        ):
            raise LowBitError(
                f"The {name} does not fit the codes.",
                found=list(shape),
                expected=f"{list(whole)} with 1 in some places",
            )

    def _check_activations(self) -> None:
        """Smoothing and the rounding of activations: tensors, and names that kernels know."""
        spec, rounding = self.spec, self.spec.activation
        if spec.smoothing not in SMOOTHINGS:
            raise LowBitError(
                "The weight has a smoothing that is not known.",
                found=repr(spec.smoothing),
                expected=" or ".join(map(repr, SMOOTHINGS)),
            )
        if spec.smoothing:
            _check_tensor(self.tensors, "smooth", None, shape=(spec.columns,))
        if rounding is None:
            return
        if rounding.format not in faithful.ACTIVATIONS or rounding.scale not in faithful.SCALES:
            raise LowBitError(
                "Activations are rounded in a way that is not known.",
                found=f"{rounding.format} with scales in {rounding.scale or 'their own dtype'}",
                expected=f"one of {', '.join(faithful.ACTIVATIONS)}, with scales in "
                + ", ".join(faithful.SCALES[1:]),
            )
        if rounding.group > 0 and spec.columns % rounding.group:
            raise LowBitError(
                "The groups of the activations do not fit the weight.",
                found=f"rows of {spec.columns}",
                expected=f"a multiple of {rounding.group}",
            )
        if rounding.static:
            _check_tensor(self.tensors, "input_scale", torch.float32, shape=(1,))
        if rounding.offset:
            _check_tensor(self.tensors, "input_offset", torch.float32, shape=(1,))
        if rounding.shift:
            _check_tensor(self.tensors, "shift_bias", torch.float32, shape=(spec.rows,))


def _check_tensor(
    tensors: dict[str, Tensor],
    name: str,
    dtype: torch.dtype | None,
    *,
    shape: tuple[int, ...] | None = None,
    numel: int | None = None,
) -> Tensor:
    tensor = tensors.get(name)
    if tensor is None:
        raise LowBitError(
            f"The weight has no {name}.",
            found=", ".join(sorted(tensors)),
            expected=name,
            remedy="The file is incomplete; get another copy.",
        )
    wrong_dtype = tensor.dtype != dtype if dtype else not tensor.dtype.is_floating_point
    if wrong_dtype:
        raise LowBitError(
            f"The {name} has the wrong dtype.",
            found=tensor.dtype,
            expected=dtype or "a float dtype",
        )
    wrong_shape = shape is not None and tuple(tensor.shape) != shape
    if wrong_shape or (numel is not None and tensor.numel() != numel):
        raise LowBitError(
            f"The {name} has the wrong size.",
            found=list(tensor.shape),
            expected=list(shape) if shape is not None else f"{numel} elements",
        )
    return tensor


# ------------------------------------------------------------------------------------- quantize


def quantize(
    weight: Tensor,
    fmt: str | CodeFormat,
    *,
    group_size: int = 0,
    svd_rank: int = 0,
    svd_steps: int = 8,
    svd_dtype: torch.dtype | None = None,
    hadamard_group_size: int = 0,
    hadamard_basis: int = 4,
    use_codebook: bool = False,
    codebook_steps: int = 24,
    scale_dtype: torch.dtype = torch.float32,
    embedding: bool = False,
    seed: int = 0,
    stochastic: bool = False,
) -> QuantizedWeight:
    """Quantize a float weight [O, I], [V, E] or [O, C, kh, kw] as SDNQ does.

    Args:
        fmt: a format or its name.
        group_size: inputs that share a scale; 0 chooses by bit width, -1 is row-wise, -2 one scale
            for the whole weight.
        svd_rank, svd_steps, svd_dtype: rank of the low-rank branch (0: none), its power iterations,
            and the dtype of its factors (default: that of `weight`).
        hadamard_group_size, hadamard_basis: wanted rotation block (0: none) and its seed matrix.
        use_codebook, codebook_steps: learnt levels in place of scales; unsigned integers only.
        scale_dtype: of scale, zero point and levels.
        embedding: the weight is a table: affects the automatic group size.
        seed: of the low-rank method and of stochastic rounding.
        stochastic: round up or down at random, unbiased, rather than to the nearest.

    Own floats are rounded to the nearest value, which SDNQ's encoder does not always reach.

    Raises:
        LowBitError: not a float weight of 2 to 5 dimensions, a value that is not finite, a codebook
            of a format that cannot have one.
    """
    fmt = get_format(fmt) if isinstance(fmt, str) else fmt
    _check_input(weight, fmt, use_codebook)
    shape = tuple(weight.shape)
    svd_dtype = svd_dtype or weight.dtype
    flat = weight.detach().to(torch.float32).reshape(shape[0], -1)
    tensors: dict[str, Tensor] = {}

    block = rotation.block_size(shape[1], hadamard_group_size) if hadamard_group_size > 0 else 0
    if block:
        flat = reference.hadamard(flat, block, hadamard_basis)
    rank = min(svd_rank, *flat.shape)
    if rank:
        tensors["svd_up"], tensors["svd_down"], flat = lowrank.find_branch(
            flat, rank, steps=svd_steps, dtype=svd_dtype, seed=seed
        )

    if group_size == 0:
        linear = len(shape) == 2 and not embedding
        group_size = affine.auto_group_size(fmt, linear=linear, svd=rank > 0, codebook=use_codebook)
    groups = affine.group_count(shape[1], group_size)
    code_shape = shape
    if groups > 1:
        code_shape = (shape[0], groups, shape[1] // groups, *shape[2:])
    spec = WeightSpec(
        format=fmt,
        shape=shape,
        code_shape=code_shape,
        hadamard=block,
        hadamard_basis=hadamard_basis,
        rank=rank,
        codebook=use_codebook,
    )
    values = flat.view(code_shape)
    axis = reference.reduced_axis(spec)
    axes = tuple(range(values.dim())) if group_size == TENSORWISE else (axis,)

    if use_codebook:
        codes, tensors["levels"] = _learn_levels(values, spec, axes, codebook_steps, scale_dtype)
    else:
        noise = generator(max(seed, 1), values.device) if stochastic else None
        codes = _round(values, spec, axes, scale_dtype, noise, tensors)
    tensors["codes"] = pack(codes, fmt)
    return QuantizedWeight(spec, tensors)


def _check_input(weight: Tensor, fmt: CodeFormat, use_codebook: bool) -> None:
    if not weight.is_floating_point() or not 2 <= weight.dim() <= 5 or not weight.numel():
        raise LowBitError(
            "This tensor cannot be quantized.",
            found=f"{weight.dtype} {list(weight.shape)}",
            expected="a float weight of 2 to 5 dimensions",
        )
    if fmt.name == "float8_e8m0fnu":
        raise LowBitError(
            "This format cannot hold weights: it has no sign.",
            found=fmt.name,
            expected="a format for weights, such as float8_e4m3fn",
        )
    if use_codebook and (fmt.kind != "uint" or fmt.bits > 8):
        raise LowBitError(
            "This format cannot have a codebook.",
            found=fmt.name,
            expected="one of uint1 … uint8",
            remedy="Choose an unsigned integer format, or switch the codebook off.",
        )
    if not torch.isfinite(weight).all():
        raise LowBitError(
            "The weight has values that are not finite.",
            found="NaN or infinity",
            expected="finite numbers",
            remedy="The model is damaged, or overflowed in a narrower dtype; use another copy.",
        )


def _round(
    values: Tensor,
    spec: WeightSpec,
    axes: Sequence[int],
    scale_dtype: torch.dtype,
    noise: torch.Generator | None,
    into: dict[str, Tensor],
) -> Tensor:
    """Codes of `values` in code_shape; scales and zero point go `into` the tensors.

    With two levels, the second scale that stands `into` the tensors already gives its shape.
    """
    exact = scale_dtype.itemsize == 1 or spec.two_level
    scale, zero_point = affine.find_scale(
        values, spec.format, axes, torch.float32 if exact else scale_dtype
    )
    if spec.two_level:
        into["scale_2"] = _second_scale(scale, into["scale_2"], scale_dtype)
        scale = affine.divide(scale, into["scale_2"], None)
    if exact:
        scale = faithful.round_scale(scale, str(scale_dtype).removeprefix("torch."))
    into["scale"] = scale.to(scale_dtype)
    if zero_point is not None:
        into["zero_point"] = zero_point.to(scale_dtype)
    units = affine.divide(values, reference.full_scale(into, spec), into.get("zero_point"))
    return round_to_codes(units, spec.format, noise)


def _second_scale(scale: Tensor, second: Tensor, dtype: torch.dtype) -> Tensor:
    """`second` times the powers of two that make `scale` / `second` fill a narrow `dtype`.

    A power of two moves no rounding, so that what did not change keeps its codes.
    """
    if dtype != torch.float8_e4m3fn:
        return second
    axes = [axis for axis, size in enumerate(second.shape) if size == 1]
    largest = affine.divide(scale, second, None).amax(dim=axes, keepdim=True)
    room = torch.where(largest == 0, 1.0, _E4M3_REACH / largest)
    return torch.ldexp(second, 1 - torch.frexp(room).exponent)


def _learn_levels(
    values: Tensor, spec: WeightSpec, axes: Sequence[int], steps: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Codes in code_shape and levels, which stand where the reduced axis was."""
    count = 1 << spec.format.bits
    if len(axes) > 1:
        levels, codes = codebook.find_levels(values.reshape(1, -1), count, steps)
        axis = reference.reduced_axis(spec)
        levels = levels.view([count if i == axis else 1 for i in range(values.dim())])
        return codes.view(values.shape), levels.to(dtype)
    last = values.movedim(axes[0], -1)
    levels, codes = codebook.find_levels(last.reshape(-1, last.shape[-1]), count, steps)
    codes = codes.view(last.shape).movedim(-1, axes[0])
    levels = levels.view(*last.shape[:-1], count).movedim(-1, axes[0])
    return codes, levels.to(dtype).contiguous()


# ----------------------------------------------------------------------------- rounding anew


def requantize_like(
    weight: Tensor,
    spec: WeightSpec,
    tensors: dict[str, Tensor],
    *,
    stochastic_seed: int = 0,
) -> dict[str, Tensor]:
    """Round a changed weight to the format, grouping and dtypes that it had.

    Args:
        weight: float tensor of `spec.shape` on any device, which the result is on as well.
        spec, tensors: the weight as it was. The low-rank factors and a codebook's levels are kept;
            codes, scale and zero point are made anew for what remains.
        stochastic_seed: above 0, rounding is stochastic: unbiased, and repeatable for a seed on one
            kind of device.

    Raises:
        LowBitError: `weight` does not have the shape of the spec.
    """
    if tuple(weight.shape) != spec.shape:
        raise LowBitError(
            "The changed weight does not fit the quantized one.",
            found=list(weight.shape),
            expected=list(spec.shape),
        )
    device = weight.device
    noise = generator(stochastic_seed, device)
    result = {name: tensor.to(device) for name, tensor in tensors.items()}
    flat = weight.detach().to(torch.float32).reshape(spec.rows, spec.columns)
    if spec.hadamard:
        flat = reference.hadamard(flat, spec.hadamard, spec.hadamard_basis)
    if spec.rank:
        up, down = result["svd_up"].to(torch.float32), result["svd_down"].to(torch.float32)
        flat = torch.addmm(flat, up, down, alpha=-1)
    if spec.smoothing:
        smooth = result["smooth"].to(torch.float32)
        flat = flat * smooth if spec.smoothing == "divide" else affine.divide(flat, smooth, None)
    values = flat.view(spec.code_shape)
    if spec.codebook:
        codes = _nearest_in_codebook(values, spec, result["levels"], noise)
    elif "scale" in tensors:
        scale = tensors["scale"]
        axes = [axis for axis, size in enumerate(scale.shape) if size == 1]
        codes = _round(values, spec, axes, scale.dtype, noise, result)
    else:
        codes = round_to_codes(values, spec.format, noise)
    result["codes"] = pack(codes, spec.format).view(tensors["codes"].shape)
    if spec.activation is not None and spec.activation.shift:
        residual = reference.dequantize(result, spec, branch=False, unrotate=False)
        sums = residual.view(spec.rows, spec.columns).sum(dim=1)
        result["shift_bias"] = spec.activation.shift * sums
    return result


def _nearest_in_codebook(
    values: Tensor, spec: WeightSpec, levels: Tensor, noise: torch.Generator | None
) -> Tensor:
    """Indices into `levels`, which need not be sorted, of the level for each value."""
    axis = reference.reduced_axis(spec)
    if levels.numel() == levels.shape[-1]:
        ordered, order = levels.reshape(-1).to(torch.float32).sort()
        return order[nearest_level(ordered, values, noise)]
    if levels.dim() > values.dim():
        levels = levels.squeeze(1)
    last = values.movedim(axis, -1).contiguous()
    ordered, order = levels.to(torch.float32).movedim(axis, -1).sort(dim=-1)
    index = nearest_level(ordered.contiguous(), last, noise)
    return order.gather(-1, index).movedim(-1, axis)


# ----------------------------------------------------------------------------------------- rows


def take_rows(weight: QuantizedWeight, start: int, length: int) -> QuantizedWeight:
    """Rows [start, start + length) as a weight of its own, with exactly the same values.

    Tensors are views where the rows begin and end on whole pack blocks.

    Raises:
        LowBitError: the range is not inside the weight.
    """
    spec, fmt = weight.spec, weight.spec.format
    if start < 0 or length < 1 or start + length > spec.rows:
        raise LowBitError(
            "The rows to take are not in the weight.",
            found=f"rows {start} to {start + length}",
            expected=f"within {spec.rows} rows",
        )
    first, last = start * spec.columns, (start + length) * spec.columns
    block = first // fmt.block_values
    words = weight.tensors["codes"].reshape(-1)
    words = words[block * fmt.block_words : fmt.storage_numel(last)]
    skipped = first - block * fmt.block_values
    if skipped:
        words = pack(reference.unpack(words, fmt, last - first + skipped)[skipped:], fmt)
    tensors = {"codes": words}
    for name, tensor in weight.tensors.items():
        if name != "codes":
            shared = name in SHARED or tensor.shape[0] == 1
            tensors[name] = tensor if shared else tensor[start : start + length]
    rows = replace(spec, shape=(length, *spec.shape[1:]), code_shape=(length, *spec.code_shape[1:]))
    return QuantizedWeight(rows, tensors)


def swap_halves(weight: QuantizedWeight) -> QuantizedWeight | None:
    """The weight with its second half of rows before its first; None for an odd number of rows."""
    half, odd = divmod(weight.spec.rows, 2)
    if odd:
        return None
    return concat_rows([take_rows(weight, half, half), take_rows(weight, 0, half)])


def concat_rows(parts: Sequence[QuantizedWeight]) -> QuantizedWeight | None:
    """The parts below each other as one weight with exactly the same values.

    None where no single spec says it: another format, grouping, rotation, dtype of scale, or
    SHARED tensors (such as `svd_down`) that differ. Scales of whole parts become scales of rows.
    """
    first = parts[0]
    spec = first.spec
    for part in parts[1:]:
        other = replace(part.spec, shape=spec.shape, code_shape=spec.code_shape)
        if (
            other != spec
            or part.spec.shape[1:] != spec.shape[1:]
            or part.spec.code_shape[1:] != spec.code_shape[1:]
            or part.tensors.keys() != first.tensors.keys()
        ):
            return None
        for name, tensor in first.tensors.items():
            mine = part.tensors[name]
            if mine.dtype != tensor.dtype or (mine.dim() != tensor.dim() and name != "codes"):
                return None
            if name in SHARED and not (mine is tensor or torch.equal(mine, tensor)):
                return None
    rows = sum(part.spec.rows for part in parts)
    tensors: dict[str, Tensor] = {}
    for name, tensor in first.tensors.items():
        if name == "codes":
            tensors[name] = _join_codes(parts)
        elif name in SHARED:
            tensors[name] = tensor
        else:
            joined = _join_rows(name, parts)
            if joined is None:
                return None
            tensors[name] = joined
    whole = replace(spec, shape=(rows, *spec.shape[1:]), code_shape=(rows, *spec.code_shape[1:]))
    return QuantizedWeight(whole, tensors)


def _join_codes(parts: Sequence[QuantizedWeight]) -> Tensor:
    fmt = parts[0].spec.format
    if all(part.spec.numel % fmt.block_values == 0 for part in parts[:-1]):
        words = [part.tensors["codes"].reshape(-1) for part in parts]
        # Not every dtype can be concatenated; its bytes can.
        return torch.cat([word.view(torch.uint8) for word in words]).view(fmt.word)
    values = [reference.unpack(p.tensors["codes"], fmt, p.spec.numel) for p in parts]
    return pack(torch.cat(values), fmt)


def _join_rows(name: str, parts: Sequence[QuantizedWeight]) -> Tensor | None:
    """Row-wise tensors below each other; one that serves all rows of a part is repeated."""
    tensors = [part.tensors[name] for part in parts]
    if len({tuple(tensor.shape[1:]) for tensor in tensors}) > 1:
        return None
    if all(tensor.shape[0] == 1 for tensor in tensors) and all(
        torch.equal(_comparable(tensor), _comparable(tensors[0])) for tensor in tensors[1:]
    ):
        return tensors[0]
    return torch.cat(
        [
            tensor.expand(part.spec.rows, *tensor.shape[1:])
            for tensor, part in zip(tensors, parts, strict=True)
        ]
    )


def _comparable(tensor: Tensor) -> Tensor:
    """Dtypes of one byte cannot be compared; their bytes can."""
    return tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor

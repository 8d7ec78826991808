"""Rounding whole weights by chunks of rows: limits, scales, codes, packed words, and the error.

Scales follow from the limits (smallest and largest value) of what shares them:

| scale of the recipe | stored                                 | codes count from                  |
|---------------------|----------------------------------------|-----------------------------------|
| a float dtype       | largest / qmax, (high - low) / qmax    | 0; low of unsigned formats        |
| `float8_e4m3fn`     | the same over `scale_2`, at least 2^-9 | 0                                 |
| `float8_e8m0fnu`    | the next power of two                  | 0                                 |
| with integer offset | (high - low) / qmax, 0 among the range | -code * scale                     |

`scale_2` brings the largest scale of all to 448 (of weights that meet fp8 activations: the largest
value to 448). A group of zeros has the scale 1 there. Scales are rounded to their dtype before any
value is divided by them; SDNQ's coded scales alone are rounded afterwards, as it does that.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels import faithful, reference
from ..kernels.spec import CodeFormat, WeightSpec
from . import codebook, rounding
from .errors import LowBitError
from .packing import pack
from .recipe import LayerRecipe
from .values import as_coded, codes_of, round_as_sdnq, round_values, words_of
from .weight_rows import Errors, Rows

__all__ = ["Grid", "feedback_factor", "scale_dtype"]

_BLOCK = 128
_FEEDBACK_CHUNK = 1 << 22
_FEEDBACK_BLOCK = 128


class Limits(NamedTuple):
    """Smallest and largest value of what shares a scale, kept as 1 in the shape of codes."""

    low: Tensor
    high: Tensor

    def shrunk(self, factor: float | Tensor, signed: bool) -> Limits:
        """Closer to 0, or for unsigned formats to the middle."""
        if signed:
            return Limits(self.low * factor, self.high * factor)
        middle = (self.low + self.high) * 0.5
        return Limits(middle + (self.low - middle) * factor, middle + (self.high - middle) * factor)


class Scales(NamedTuple):
    """`scale` and `zero_point` as they are stored, and float32 `step` and `base` of a code."""

    scale: Tensor
    zero_point: Tensor | None
    step: Tensor
    base: Tensor | None


@dataclass(frozen=True)
class Grid:
    """How the rows of one weight are rounded.

    Attributes:
        spec: Of the result.
        layer: The recipe.
        dtype: Of scales; what "model" stands for is filled in.
        model: Dtype of the weight.
        limit: Largest value that scales of the whole weight span, None for that of the weight.
    """

    spec: WeightSpec
    layer: LayerRecipe
    dtype: torch.dtype
    model: torch.dtype
    limit: float | None = None

    # what shares a scale

    @property
    def axis(self) -> int:
        return reference.reduced_axis(self.spec)

    @property
    def fmt(self) -> CodeFormat:
        return self.spec.format

    def view(self, rows: Tensor) -> Tensor:
        """Rows [r, K] in the shape of codes."""
        return rows.view(rows.shape[0], *self.spec.code_shape[1:])

    def limits(self, values: Tensor) -> Limits:
        """Limits of values in the shape of codes; not for one scale in all."""
        # Much faster on a CPU than both at once.
        low, high = values.amin(self.axis, keepdim=True), values.amax(self.axis, keepdim=True)
        if self.layer.span == _BLOCK:
            low, high = self._in_blocks(low, "amin"), self._in_blocks(high, "amax")
            if self.limit is not None:
                high = torch.full_like(high, self.limit)
        return Limits(low, high)

    def _in_blocks(self, found: Tensor, how: str) -> Tensor:
        """Values of groups [r, G, 1] or rows [r, 1] joined over their blocks of 128 x 128."""
        rows, columns = found.shape[0], self.spec.columns
        flat = found.view(rows, -1)
        per = _BLOCK * flat.shape[1] // columns if columns > _BLOCK else flat.shape[1]
        missing = (0, -flat.shape[1] % per, 0, -rows % _BLOCK)
        fill = {"amin": torch.inf, "amax": -torch.inf, "sum": 0.0}[how]
        padded = torch.nn.functional.pad(flat, missing, value=fill)
        blocks = padded.view(-1, _BLOCK, padded.shape[1] // per, per)
        joined = getattr(blocks, how)(dim=(1, 3), keepdim=True).expand_as(blocks)
        return joined.reshape(padded.shape)[:rows, : flat.shape[1]].reshape(found.shape)

    @property
    def global_limits(self) -> bool:
        """Whether the limits of the whole weight have to be known first."""
        return self.layer.span == 0 or self.spec.two_level

    def whole(self, rows: Rows) -> Limits:
        """Limits of all rows, of one element each."""
        shape = [1] * len(self.spec.code_shape)
        if self.limit is not None:
            high = torch.full(shape, self.limit, device=rows.device)
            return Limits(-high, high)
        lows, highs = [], []
        for start, stop in rows.chunks():
            low, high = torch.aminmax(rows.get(start, stop))
            lows.append(low)
            highs.append(high)
        return Limits(torch.stack(lows).amin().view(shape), torch.stack(highs).amax().view(shape))

    def second(self, whole: Limits) -> Tensor:
        """`scale_2` of two levels."""
        largest = torch.maximum(whole.low.abs(), whole.high.abs())
        activation = self.layer.activation
        fp8 = activation is not None and activation.format == "float8_e4m3fn"
        found = largest / (448.0 if fp8 else self.fmt.qmax * 448.0)
        return torch.where(found == 0, 1.0, found)

    # scales

    def scales(self, limits: Limits, second: Tensor | None = None) -> Scales:
        """Scales that span the limits."""
        low, high = limits
        qmax = self.fmt.qmax
        if self.fmt.signed:
            largest = torch.maximum(low.abs(), high.abs())
            if second is not None:
                scale = largest / (qmax * second)
                scale = torch.where(scale == 0, 1.0, scale).clamp_(2.0**-9, 448.0)
                scale = scale.to(torch.float8_e4m3fn)
                return Scales(scale, None, scale.to(torch.float32) * second, None)
            scale = largest / qmax
            if self.dtype.itemsize == 1:
                scale = faithful.round_scale(scale, "float8_e8m0fnu")
                return Scales(scale.to(self.dtype), None, scale, None)
            scale = scale.to(self.dtype)
            return Scales(scale, None, scale.to(torch.float32), None)
        if self.layer.offset == "integer":
            low, high = low.clamp(max=0), high.clamp(min=0)
            step = ((high - low) / qmax).to(self.dtype).to(torch.float32)
            zero = (-low / torch.where(step == 0, torch.inf, step)).round_().clamp_(0, qmax)
            # Such products need more bits than a scale of 16.
            base = -(zero * step)
            return Scales(step, base, step, base)
        scale, zero_point = ((high - low) / qmax).to(self.dtype), low.to(self.dtype)
        return Scales(scale, zero_point, scale.to(torch.float32), zero_point.to(torch.float32))

    def values(self, rows: Tensor, scales: Scales) -> Tensor:
        """Rows in the shape of codes as the nearest values of the format; `rows` is overwritten."""
        step = torch.where(scales.step == 0, torch.inf, scales.step)
        if scales.base is not None:
            rows.sub_(scales.base)
        rows.div_(step)
        if self.layer.method == "fp8" and self.layer.span == 0:
            rows = rows.to(self.model).to(torch.float32)  # as ModelOpt divides by a single scale
        return self.nearest(rows)

    def nearest(self, units: Tensor) -> Tensor:
        """Values of the format for numbers in its units, which are overwritten."""
        if self.layer.method == "sdnq" and self.fmt.kind == "float" and not self.layer.nearest:
            return round_as_sdnq(units, self.fmt)
        return round_values(units, self.fmt)

    def approximate(self, values: Tensor, scales: Scales) -> Tensor:
        """What values of the format stand for; they are overwritten."""
        values.mul_(scales.step)
        return values if scales.base is None else values.add_(scales.base)

    # searching

    @property
    def factors(self) -> list[float]:
        """By which limits are shrunk, 1 first."""
        tried = self.layer.scale_search
        return [1 - 0.5 * number / tried for number in range(tried + 1)] if tried else [1.0]

    def _loss(self, values: Tensor, limits: Limits, second: Tensor | None, count: Tensor | None):
        """Squared error of the values in the shape of codes."""
        scales = self.scales(limits, second)
        error = self.approximate(self.values(values.clone(), scales), scales).sub_(values).square_()
        return error if count is None else error.mul_(count)

    def searched(
        self, values: Tensor, limits: Limits, second: Tensor | None, importance: Tensor | None
    ) -> Limits:
        """The shrunk limits with the least error, for each scale its own."""
        count = None if importance is None else self.view(importance.view(1, -1))
        best, least = limits, None
        for factor in self.factors:
            tried = limits.shrunk(factor, self.fmt.signed)
            loss = self._loss(values, tried, second, count).sum(dim=self.axis, keepdim=True)
            if self.layer.span == _BLOCK:
                loss = self._in_blocks(loss, "sum")
            if least is None:
                least = loss
                continue
            better = loss < least
            least = torch.where(better, loss, least)
            best = Limits(*(torch.where(better, a, b) for a, b in zip(tried, best, strict=True)))
        return best

    def searched_whole(self, rows: Rows, whole: Limits, importance: Tensor | None) -> Limits:
        """The same for one scale in all."""
        count = None if importance is None else self.view(importance.view(1, -1))
        losses = [0.0] * len(self.factors)
        for start, stop in rows.chunks():
            values = self.view(rows.get(start, stop))
            for index, factor in enumerate(self.factors):
                tried = whole.shrunk(factor, self.fmt.signed)
                losses[index] += float(self._loss(values, tried, None, count).sum())
        return whole.shrunk(self.factors[losses.index(min(losses))], self.fmt.signed)

    # rounding

    def prepared(
        self, rows: Rows, importance: Tensor | None = None
    ) -> tuple[Limits | None, Tensor | None]:
        """Limits of the whole weight, where one scale serves all of it, and `scale_2`."""
        whole = self.whole(rows) if self.global_limits else None
        second = self.second(whole) if self.spec.two_level else None
        if self.layer.span:
            return None, second
        if self.layer.scale_search:
            whole = self.searched_whole(rows, whole, importance)
        return whole, second

    def scales_for(
        self,
        values: Tensor,
        whole: Limits | None,
        second: Tensor | None,
        importance: Tensor | None,
    ) -> Scales:
        """Scales of some rows in the shape of codes."""
        limits = whole if whole is not None else self.limits(values)
        if self.layer.scale_search and whole is None:
            limits = self.searched(values, limits, second, importance)
        return self.scales(limits, second)

    def rounded(self, rows: Rows, importance: Tensor | None = None) -> Iterator[tuple[int, Tensor]]:
        """What is left of each chunk of rows after rounding: (first row, values [r, K])."""
        whole, second = self.prepared(rows, importance)
        for start, stop in rows.chunks(self.multiple):
            values = self.view(rows.get(start, stop))
            if self.spec.codebook:
                yield start, self._by_levels(values)[2].view(stop - start, -1)
                continue
            scales = self.scales_for(values, whole, second, importance)
            values = self.approximate(self.values(values, scales), scales)
            yield start, values.view(stop - start, -1)

    @property
    def multiple(self) -> int:
        """Rows that a chunk must hold whole numbers of; all of them for one codebook in all."""
        if self.spec.codebook and self.layer.span == 0:
            return self.spec.rows
        return _BLOCK if self.layer.span == _BLOCK else 1

    def _by_levels(self, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Indices, levels where the reduced axis was, and what both stand for."""
        count, axis = 1 << self.fmt.bits, self.axis
        steps = self.layer.codebook
        if self.layer.span == 0:
            levels, index = codebook.find_levels(values.reshape(1, -1), count, steps)
            levels = levels.to(self.dtype)
            meant = levels.to(torch.float32).view(-1)[index.view(values.shape)]
            shape = [count if i == axis else 1 for i in range(values.dim())]
            return index.view(values.shape), levels.view(shape), meant
        last = values.movedim(axis, -1)
        levels, index = codebook.find_levels(last.reshape(-1, last.shape[-1]), count, steps)
        levels = levels.to(self.dtype)
        meant = levels.to(torch.float32).gather(-1, index)
        meant, index = (t.view(last.shape).movedim(-1, axis) for t in (meant, index))
        levels = levels.view(*last.shape[:-1], count).movedim(-1, axis)
        return index, levels.contiguous(), meant.contiguous()

    def round(
        self,
        rows: Rows,
        importance: Tensor | None = None,
        noise: torch.Generator | None = None,
        moments: Tensor | None = None,
        upper: Tensor | None = None,
    ) -> tuple[dict[str, Tensor], Errors]:
        """Tensors of the normal form but for the branch and the smoothing, and the error.

        Args:
            importance: What the error of a column counts, for a search.
            noise: For stochastic rounding.
            moments: [K], for the weighted error.
            upper: [K, K], for error feedback; of `feedback_factor`.
        """
        whole, second = self.prepared(rows, importance)
        fmt, columns = self.fmt, self.spec.columns
        words = torch.empty(fmt.storage_numel(self.spec.numel), dtype=fmt.word, device=rows.device)
        parts: dict[str, list[Tensor]] = {}
        errors = Errors()
        chunk = _FEEDBACK_CHUNK if upper is not None else 0
        for start, stop in rows.chunks(self.multiple, chunk):
            original = rows.get(start, stop)
            if self.spec.codebook:
                index, levels, meant = self._by_levels(self.view(original))
                parts.setdefault("levels", []).append(levels)
                packed = words_of(index.to(torch.uint8), fmt)
            else:
                meant = self.view(original.clone())
                scales = self.scales_for(meant, whole, second, importance)
                parts.setdefault("scale", []).append(scales.scale)
                if scales.zero_point is not None:
                    parts.setdefault("zero_point", []).append(scales.zero_point)
                if noise is None:
                    if upper is None:
                        values = self.values(meant, scales)
                    else:
                        values = self._fed_back(meant.view_as(original), scales, upper)
                    packed = words_of(codes_of(values, fmt), fmt)
                else:
                    packed, values = self._at_random(meant, scales, noise)
                meant = self.approximate(values, scales)
            first = fmt.storage_numel(start * columns)
            words[first : first + packed.numel()] = packed
            self._measure(rows, start, stop, original, meant.view_as(original), moments, errors)
        tensors = {"codes": words}
        for name, found in parts.items():
            one = self.layer.span == 0
            tensors[name] = found[0] if one else torch.cat(found)
        if second is not None:
            tensors["scale_2"] = second
        return self._coded(tensors), errors

    def _at_random(
        self, values: Tensor, scales: Scales, noise: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        step = torch.where(scales.step == 0, torch.inf, scales.step)
        if scales.base is not None:
            values = values - scales.base
        codes = rounding.round_to_codes(values / step, self.fmt, noise)
        packed = pack(codes, self.fmt)
        return packed, reference.decode(packed, self.fmt, values.numel()).view(values.shape)

    def _fed_back(self, rows: Tensor, scales: Scales, upper: Tensor) -> Tensor:
        """As `values`, each column corrected for the rounding of those before it."""
        shape = rows.shape[0], *self.spec.code_shape[1:]
        step, base = (
            None if tensor is None else tensor.expand(shape).reshape(rows.shape)
            for tensor in (torch.where(scales.step == 0, torch.inf, scales.step), scales.base)
        )
        values = torch.empty_like(rows)
        for first in range(0, rows.shape[1], _FEEDBACK_BLOCK):
            last = min(first + _FEEDBACK_BLOCK, rows.shape[1])
            lost = torch.empty(rows.shape[0], last - first, device=rows.device)
            for column in range(first, last):
                left = rows[:, column].clone()
                units = left if base is None else left - base[:, column]
                found = self.nearest(units / step[:, column])
                values[:, column] = found
                left -= torch.where(found == 0, 0.0, found * step[:, column])
                if base is not None:
                    left -= base[:, column]
                left /= upper[column, column]
                rows[:, column:last].addr_(left, upper[column, column:last], alpha=-1)
                lost[:, column - first] = left
            rows[:, last:].addmm_(lost, upper[first:last, last:], alpha=-1)
        return values.view(shape)

    def _measure(
        self,
        rows: Rows,
        start: int,
        stop: int,
        original: Tensor,
        rounded: Tensor,
        moments: Tensor | None,
        into: Errors,
    ) -> None:
        plain = rows.up is None and not rows.smoothing and not rows.block
        weight = original if plain else rows.weight[start:stop].to(torch.float32)
        if rows.block and not rows.wide:
            original = rows.get(start, stop, wide=True)
        error = rows.meant(rounded.sub_(original), unrotate=True)
        into.add(weight, error, moments)

    def _coded(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Scales and zero points as they read back from their own formats."""
        for name, dtype in zip(("scale", "zero_point"), self.layer.coded, strict=True):
            name = "levels" if name == "scale" and self.spec.codebook else name
            if dtype and name in tensors:
                tensors[name] = as_coded(tensors[name], dtype, self.layer.coded_levels)
        return tensors


def feedback_factor(rows: Rows, products: Tensor) -> Tensor:
    """The upper factor [K, K] of the inverse of the products of the inputs that rows meet.

    Each row of it says how the rounding error of a column is best spread over those after it
    (Frantar and others, 2022).
    """
    found = rows.rotated_products(products)
    if rows.smoothing:
        factor = 1 / rows.smooth if rows.smoothing == "divide" else rows.smooth
        found = found * factor.view(-1, 1) * factor
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(found))
    return torch.linalg.cholesky(inverse, upper=True)


def scale_dtype(layer: LayerRecipe, model: torch.dtype) -> torch.dtype:
    """Dtype that a layer's scales are kept in.

    Raises:
        LowBitError: This torch lacks it.
    """
    if layer.scale == "model":
        return torch.bfloat16 if layer.narrow and model.itemsize > 2 else model
    found = getattr(torch, layer.scale, None)
    if found is None:
        raise LowBitError(
            "This torch lacks the dtype of the scales.",
            found=f"torch {torch.__version__}",
            expected=layer.scale,
            remedy="Update torch, or choose another method.",
        )
    return found

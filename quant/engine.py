"""Quantizing one weight after another, as a recipe decided: tensors in normal form, and the error.

    layer = recipe.decide(name, weight.shape, kind, facts)
    made, error = quantize_layer(weight, layer)

Works on the device that the weight is on. Beside the weight and the result there are chunks of
some rows; with a low-rank branch two float32 copies of the weight, three if it is refitted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..kernels import reference
from ..kernels.faithful import ACTIVATIONS
from ..kernels.spec import WeightSpec
from .dtypes import get_format
from .errors import LowBitError
from .fitting import Metric, fit_branch, search_smoothing, smooth_columns
from .grids import Grid, feedback_factor, scale_dtype
from .recipe import Kept, LayerRecipe
from .rounding import generator
from .weight import QuantizedWeight, take_rows
from .weight_rows import Errors, Rows

__all__ = [
    "Activations",
    "LayerError",
    "dry",
    "quantize_layer",
    "quantize_together",
    "spec_of",
]


class Activations:
    """What was measured of the inputs of a layer: filled by `add`, or given.

    Attributes:
        second_moment: [K], mean squares; None before anything was added.
        products: [K, K], mean of x.T @ x; None unless it is asked for.
        largest: Largest absolute value.
    """

    def __init__(
        self,
        second_moment: Tensor | None = None,
        products: Tensor | None = None,
        largest: float = 0.0,
        *,
        want_products: bool = False,
    ) -> None:
        self.second_moment, self.products, self.largest = second_moment, products, largest
        if second_moment is None and products is not None:
            self.second_moment = products.diagonal().clone()
        self.want_products = want_products
        self._rows = 0

    def add(self, x: Tensor) -> None:
        """Inputs [..., K] of one call of the layer."""
        rows = x.detach().reshape(-1, x.shape[-1]).to(torch.float32)
        if not rows.shape[0]:
            return
        total = self._rows + rows.shape[0]
        old, new = self._rows / total, 1 / total
        squares = rows.square().sum(dim=0) * new
        known = self.second_moment
        self.second_moment = squares if known is None else known * old + squares
        if self.want_products:
            products = (rows.t() @ rows) * new
            self.products = products if self.products is None else self.products * old + products
        self.largest = max(self.largest, float(rows.abs().max()))
        self._rows = total


@dataclass(frozen=True)
class LayerError:
    """What quantizing one weight cost.

    Attributes:
        method, dtype, group: As reports call them; group 0 is a whole row, -1 the whole weight.
        before, after: Bytes.
        relative: Frobenius norm of the error over that of the weight.
        snr: Signal to noise in dB; infinite without an error.
        largest: Largest absolute error.
        weighted: `relative` with columns weighed by the activations; None where none were given.
        rank: Of the low-rank branch.
    """

    method: str
    dtype: str
    group: int
    before: int
    after: int
    relative: float
    snr: float
    largest: float
    weighted: float | None = None
    rank: int = 0


# -------------------------------------------------------------------------------------------- spec


def spec_of(layer: LayerRecipe, shape: Sequence[int]) -> WeightSpec:
    """The spec of a weight of `shape` under a recipe."""
    shape = tuple(shape)
    code_shape = shape
    if layer.flat:
        code_shape = (shape[0], math.prod(shape[1:]))
    elif layer.groups > 1:
        code_shape = (shape[0], layer.groups, shape[1] // layer.groups, *shape[2:])
    return WeightSpec(
        format=get_format(layer.format),
        shape=shape,
        code_shape=code_shape,
        hadamard=layer.hadamard,
        hadamard_basis=4 if layer.method == "sdnq" else 2,
        rank=layer.rank,
        codebook=layer.codebook >= 0,
        smoothing=layer.smoothing,
        two_level=layer.scale == "float8_e4m3fn",
        activation=layer.activation,
    )


def _group(layer: LayerRecipe, spec: WeightSpec) -> int:
    if layer.span == 0:
        return -1
    return spec.code_shape[2] if layer.groups > 1 else 0


def _narrow(layer: LayerRecipe, model: torch.dtype) -> torch.dtype:
    return torch.bfloat16 if layer.narrow and model.itemsize > 2 else model


def dry(layer: LayerRecipe, shape: Sequence[int], dtype: torch.dtype = torch.bfloat16) -> int:
    """Bytes that a weight of `shape` and `dtype` will have. Of candidates the first one counts."""
    layer = layer.candidates[0] if layer.candidates else layer
    spec = spec_of(layer, shape)
    fmt, narrow, scales = spec.format, _narrow(layer, dtype), scale_dtype(layer, dtype)
    total = fmt.storage_numel(spec.numel) * fmt.word.itemsize
    count = 1
    if layer.span:
        axis = reference.reduced_axis(spec)
        count = math.prod(size for i, size in enumerate(spec.code_shape) if i != axis)
    if spec.codebook:
        total += count * (1 << fmt.bits) * scales.itemsize
    elif layer.offset == "integer":
        total += count * 8
    else:
        total += count * scales.itemsize * (2 if layer.offset else 1)
    total += 4 * spec.two_level
    total += spec.rank * (spec.rows + spec.columns) * narrow.itemsize
    if spec.smoothing:
        total += spec.columns * narrow.itemsize
    if spec.activation is not None:
        total += 4 * spec.activation.static + 4 * spec.rows * bool(spec.activation.shift)
    return total


# ---------------------------------------------------------------------------------------- quantize


def _check(weight: Tensor) -> None:
    if not weight.is_floating_point() or not 2 <= weight.dim() <= 5 or not weight.numel():
        raise LowBitError(
            "This tensor cannot be quantized.",
            found=f"{weight.dtype} {list(weight.shape)}",
            expected="a float weight of 2 to 5 dimensions",
        )


def _check_finite(weight: Tensor) -> None:
    # One pass without temporaries: a NaN or an infinity makes an extreme that is none.
    if weight.element_size() > 1 and not all(math.isfinite(v) for v in torch.aminmax(weight)):
        raise LowBitError(
            "The weight has values that are not finite.",
            found="NaN or infinity",
            expected="finite numbers",
            remedy="The model is damaged, or overflowed in a narrower dtype; use another copy.",
        )


def quantize_layer(
    weight: Tensor,
    layer: LayerRecipe,
    *,
    seed: int = 0,
    activations: Activations | None = None,
    limit: float | None = None,
) -> tuple[QuantizedWeight, LayerError] | tuple[None, Kept]:
    """One weight in normal form, and its error.

    Args:
        weight: Float, on any device.
        layer: What `Recipe.decide` gave for its shape.
        seed: Of the low-rank method and of stochastic rounding.
        activations: Of the layer's inputs: for recipes that weigh by them or round them statically.
        limit: The largest absolute value that a scale of the whole weight is to span, where other
            weights share it; that of the weight itself when None.

    Returns:
        The weight and its error; None and the reason where a dynamic recipe finds no format good
        enough.

    Raises:
        LowBitError: Not a float weight of 2 to 5 dimensions, values that are not finite, or no
            activations where the recipe needs them.
    """
    _check(weight)
    if layer.rank or layer.smoothing or layer.candidates:
        _check_finite(weight)
    work = _Work(weight.detach(), layer, seed, activations, limit)
    found = work.chosen()
    if found is None:
        return None, Kept(f"no format has a loss of at most {layer.threshold:.3g}")
    return work.made(found)


class _Work:
    """One weight while it is quantized."""

    def __init__(
        self,
        weight: Tensor,
        layer: LayerRecipe,
        seed: int,
        activations: Activations | None,
        limit: float | None,
    ) -> None:
        self.weight, self.layer, self.seed, self.limit = weight, layer, seed, limit
        self.activations = activations
        self.moments = None
        if layer.weighted and activations is not None and activations.second_moment is not None:
            self.moments = activations.second_moment.to(weight.device, torch.float32)
        columns = weight[0].numel()
        if self.moments is not None and self.moments.shape != (columns,):
            raise LowBitError(
                "The measured activations are not those of the layer.",
                found=f"mean squares of {list(self.moments.shape)}",
                expected=f"one for each of {columns} inputs",
            )
        self.narrow = _narrow(layer, weight.dtype)
        # SDNQ rotates in the weight's own dtype, but for dynamic formats; who refines wants better.
        refined = layer.scale_search or layer.refits or layer.weighted or layer.feedback
        exact = bool(layer.candidates or refined)
        self.rows = Rows(weight.reshape(weight.shape[0], -1), layer.hadamard, wide=exact)
        self._beside_codes()

    def grid(self, layer: LayerRecipe) -> Grid:
        spec = spec_of(layer, self.weight.shape)
        dtype = scale_dtype(layer, self.weight.dtype)
        return Grid(spec, layer, dtype, self.weight.dtype, self.limit)

    def _products(self) -> Tensor | None:
        if self.activations is None or not (self.layer.weighted or self.layer.feedback):
            return None
        return self.activations.products

    def _beside_codes(self) -> None:
        """Smoothing and branch of the rows."""
        layer, rows = self.layer, self.rows
        grid = self.grid(layer)
        rows.smoothing = layer.smoothing
        if layer.smoothing:
            if layer.strength is None:
                smooth = search_smoothing(rows, grid, layer.search, self.narrow, self.moments)
            else:
                smooth = smooth_columns(
                    rows, layer.smoothing, layer.strength, self.narrow, self.moments
                )
            self.smooth = smooth
            rows.smooth = smooth.to(torch.float32)
        if layer.rank:
            products = self._products() if layer.weighted else None
            metric = Metric.of(rows, self.moments, products)
            fit_branch(
                rows,
                grid,
                metric=metric,
                moments=self.moments,
                dtype=self.narrow,
                seed=self.seed,
            )

    # dynamic formats

    def chosen(self) -> LayerRecipe | None:
        """The recipe, or the first of its candidates whose loss is small enough."""
        layer = self.layer
        if not layer.candidates:
            return layer
        variance = max(_variance(self.rows), 1e-8)
        for candidate in layer.candidates:
            grid, rows = self.grid(candidate), self.rows
            loss = 0.0
            for start, rounded in grid.rounded(rows, rows.importance(self.moments)):
                error = rows.get(start, start + rounded.shape[0]).sub_(rounded)
                loss += float(error.square_().sum())
            if loss / self.weight.numel() / variance <= layer.threshold:
                return replace(candidate, threshold=layer.threshold)
        return None

    # the result

    def made(self, layer: LayerRecipe) -> tuple[QuantizedWeight, LayerError]:
        grid, rows, weight = self.grid(layer), self.rows, self.weight
        spec = grid.spec
        importance = rows.importance(self.moments)
        noise = generator(max(self.seed, 1), weight.device) if layer.stochastic else None
        upper = self._feedback(grid)
        tensors, errors = grid.round(rows, importance, noise, self.moments, upper)
        if not math.isfinite(errors.weight):
            _check_finite(weight)
        if spec.smoothing:
            tensors["smooth"] = self.smooth
        if spec.rank:
            tensors["svd_up"], tensors["svd_down"] = rows.up, rows.down
        activation = spec.activation
        if activation is not None and activation.static:
            tensors["input_scale"] = self._input_scale(layer)
        if activation is not None and activation.shift:
            tensors["shift_bias"] = activation.shift * _residual_sums(tensors, spec)
        made = QuantizedWeight(spec, tensors)
        if any(layer.coded):  # scales were rounded after the codes
            errors = _measured(rows, made, self.moments)
        return made, _told(layer, made, weight, errors)

    def _feedback(self, grid: Grid) -> Tensor | None:
        products = self._products()
        layer = self.layer
        plain = grid.spec.codebook or len(grid.spec.shape) != 2 or layer.stochastic
        if not layer.feedback or products is None or plain:
            return None
        return feedback_factor(self.rows, products)

    def _input_scale(self, layer: LayerRecipe) -> Tensor:
        found = self.activations.largest if self.activations is not None else 0.0
        if not found > 0:
            raise LowBitError(
                "A recipe rounds activations statically, but none were measured for a layer.",
                found="no largest value" if self.activations is None else f"largest {found}",
                expected="activations of a few runs of the model",
                remedy="Choose dynamic activations, or measure them first.",
            )
        activation = layer.activation
        largest = ACTIVATIONS[activation.format].largest
        if activation.group > 0:  # two levels
            largest *= 448.0
        return torch.tensor([found / largest], dtype=torch.float32, device=self.weight.device)


def _variance(rows: Rows) -> float:
    """Unbiased, of all elements, in float64."""
    count = rows.weight.numel()
    total = square = 0.0
    for start, stop in rows.chunks():
        chunk = rows.weight[start:stop].to(torch.float64)
        total += float(chunk.sum())
        square += float(chunk.square_().sum())
    return max(square - total * total / count, 0.0) / max(count - 1, 1)


def _residual_sums(tensors: dict[str, Tensor], spec: WeightSpec) -> Tensor:
    """Sums of the rows of the codes' part of the weight, float32 [O]."""
    rest = reference.dequantize(tensors, spec, branch=False, unrotate=False)
    return rest.view(spec.rows, spec.columns).sum(dim=1)


def _measured(rows: Rows, made: QuantizedWeight, moments: Tensor | None) -> Errors:
    """The error of a weight by what it dequantizes to."""
    errors, whole = Errors(), made.dequantize().view(rows.shape)
    for start, stop in rows.chunks():
        weight = rows.weight[start:stop].to(torch.float32)
        errors.add(weight, whole[start:stop] - weight, moments)
    return errors


def _told(layer: LayerRecipe, made: QuantizedWeight, weight: Tensor, errors: Errors) -> LayerError:
    relative = math.sqrt(errors.error / errors.weight) if errors.weight else 0.0
    weighted = None
    if errors.weighted_weight:
        weighted = math.sqrt(errors.weighted_error / errors.weighted_weight)
    return LayerError(
        method=layer.method,
        dtype=layer.format,
        group=_group(layer, made.spec),
        before=weight.nbytes,
        after=made.nbytes,
        relative=relative,
        snr=-20 * math.log10(relative) if relative else math.inf,
        largest=errors.largest,
        weighted=weighted,
        rank=layer.rank,
    )


def quantize_together(
    weights: Sequence[Tensor],
    layer: LayerRecipe,
    *,
    seed: int = 0,
    activations: Activations | None = None,
) -> list[tuple[QuantizedWeight, LayerError]]:
    """Weights of one input as one: they share smoothing, the branch's inner factor and `scale_2`.

    Args:
        weights: [N, K] each; the recipe is what `Recipe.decide` gives for one of them.

    Returns:
        Each with its own error.
    """
    whole = torch.cat([weight.reshape(weight.shape[0], -1) for weight in weights])
    made, _ = quantize_layer(whole, layer, seed=seed, activations=activations)
    first, found = 0, []
    for weight in weights:
        part = take_rows(made, first, weight.shape[0])
        first += weight.shape[0]
        errors = _measured(Rows(weight.reshape(weight.shape[0], -1)), part, None)
        found.append((part, _told(layer, part, weight, errors)))
    return found

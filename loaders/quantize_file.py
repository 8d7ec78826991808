"""Quantizing a model to disk, layer by layer: one float layer in memory at a time.

``FloatModel -> names of the container -> recipe -> engine -> container -> store``. Whatever names
and formats the source has, its tensors are read under ComfyUI's names, cut or joined as the
container names them, quantized, and written before the next one is read.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..quant.engine import Activations, dry, quantize_layer, spec_of
from ..quant.errors import LowBitError
from ..quant.recipe import Facts, Kept, LayerRecipe, Recipe, Split
from ..quant.report import QuantizeReport
from .families.base import Move, Piece
from .families.configs import diffusers_config
from .families.facts import facts_of
from .families.reverse import reverse
from .float_model import FloatModel, assemble, shape_of
from .provenance import Hashing, provenance
from .store import TensorFile, TensorFolder, check_room
from .writers.base import Container, Layer, Model, Part

__all__ = ["Job", "Progress", "Step", "Work", "layer_kind", "prepare", "write_report"]

WEIGHT, BIAS = ".weight", ".bias"
REPORT = ".report.json"
Progress = Callable[[int, int, str], None]
"""``(steps done, steps in all, name of the next layer)``; may raise to interrupt."""

#: A table of vectors rather than a matrix: ComfyUI's and diffusers' names for them.
_TABLE = re.compile(r"(^|[._])(embedding|embed_tokens|wte|emb)$")


@dataclass(frozen=True)
class Step:
    """One module of the file, or one tensor that no module has.

    Attributes:
        name: Module, or the tensor's full name, as the container names it.
        move: How its weight (or the tensor) is made of native tensors.
        bias: How its bias is made; None where it has none.
        shape: Of the weight.
        decided: ``(first column, last + 1, recipe)`` of each part; empty where it stays as it is.
        kept: Why it stays, for what could have been quantized; "" for all else.
    """

    name: str
    move: Move
    bias: Move | None
    shape: tuple[int, ...]
    decided: tuple[tuple[int, int, LayerRecipe], ...] = ()
    kept: str = ""

    @property
    def native(self) -> tuple[str, ...]:
        """Native modules that the weight is of."""
        return tuple(dict.fromkeys(p.key.removesuffix(WEIGHT) for p in self.move.pieces))


@dataclass(frozen=True)
class Job:
    """What will be done, told from shapes alone. Made by :func:`prepare`."""

    source: FloatModel
    container: Container
    model: Model
    steps: tuple[Step, ...]

    def estimate(self) -> QuantizeReport:
        """Sizes without work: a report whose errors are unknown."""
        report = QuantizeReport.of(self.model.recipe, dry=True)
        for step in self.steps:
            dtype = self._dtype(step)
            for first, last, recipe in step.decided:
                shape = _part_shape(step, first, last)
                spec = spec_of(recipe, shape)
                grouped = len(spec.code_shape) > len(shape)
                group = -1 if recipe.span == 0 else spec.code_shape[2] if grouped else 0
                before = math.prod(shape) * dtype.itemsize
                after = dry(recipe, shape, dtype)
                name = _part_name(step, first, last)
                report.plan(name, recipe.method, recipe.format, group, before, after)
            if step.kept:
                report.keep(step.name, step.kept, math.prod(step.shape) * dtype.itemsize)
        return report

    def nbytes(self) -> int:
        """Bytes of the tensors that will be written, as far as they are known before."""
        return sum(
            self._bytes(step)
            if step.decided
            else math.prod(step.shape) * self._dtype(step).itemsize
            for step in self.steps
        )

    def _dtype(self, step: Step) -> torch.dtype:
        """Of the float tensor that is quantized."""
        key = step.move.pieces[0].key
        narrow = key in self.source.lowbit or self.container.half
        return self.model.dtype if narrow else self.source.dtypes[key]

    def _bytes(self, step: Step) -> int:
        return sum(
            dry(recipe, _part_shape(step, first, last), self._dtype(step))
            for first, last, recipe in step.decided
        )

    def run(
        self,
        target: Path,
        *,
        device: torch.device | str = "cpu",
        seed: int = 0,
        progress: Progress | None = None,
        activations: Mapping[str, Activations] | None = None,
        overwrite: bool = False,
        hash_source: bool = True,
    ) -> QuantizeReport:
        """Write the quantized model.

        Args:
            target: A file, or a folder where the container is one.
            device: Where layers are quantized.
            seed: Of low-rank methods and stochastic rounding.
            progress: Told before each layer; what it raises ends the work, and nothing is left.
            activations: Of native modules, for recipes that need them.
            overwrite: Replace an existing file.
            hash_source: Tell the SHA-256 of the source in the file.

        Returns:
            The report, which also lies beside the file as JSON.

        Raises:
            LowBitError: A layer cannot be quantized as asked, or the disk refuses.
        """
        check_room(target, self.nbytes())
        files = self._files() if hash_source else []
        work = Work(self, torch.device(device), seed, activations or {})
        with Hashing(files) as hashing, self._writer(target, overwrite) as writer:
            for number, step in enumerate(self.steps):
                if progress is not None:
                    progress(number, len(self.steps), step.name)
                for name, tensor in work.stored(step).items():
                    writer.add(name, tensor)
            if progress is not None:
                progress(len(self.steps), len(self.steps), "")
            report, model = work.report, replace(self.model, quantized=work.done, kept=work.kept)
            errors = {name: error.relative for name, error in report.layers.items()}
            source = self.source.path.name if self.source.path else "a model in memory"
            told = provenance(model.recipe, source, hashing.result() if files else None, errors)
            metadata = {**self.container.metadata(model), **told}
            if isinstance(writer, TensorFolder):
                for name, value in self.container.files(model).items():
                    writer.add_json(name, value)
            writer.finish(metadata)
        write_report(target, report)
        return report

    def _files(self) -> list[Path]:
        path = self.source.path
        if path is None:
            return []
        if path.is_file():
            return [path]
        return sorted(path.glob("*.safetensors"))

    def _writer(self, target: Path, overwrite: bool) -> TensorFile | TensorFolder:
        entries = sum(8 if step.decided else 2 for step in self.steps)
        # A line of provenance for each layer, and the container's own notes.
        room = {"entries": entries, "metadata_bytes": 65536 + 256 * len(self.steps)}
        if self.container.stem:
            return TensorFolder(target, self.container.stem, **room)
        return TensorFile(target, overwrite=overwrite, **room)


class Work:
    """The work on the steps of a job, and what came of it.

    Attributes:
        report: Errors and sizes so far.
        done: ``{module: recipe of each part}``; of dynamic ones the format that was chosen.
        kept: ``{module: reason}``, those that no format was good enough for among them.
    """

    def __init__(
        self,
        job: Job,
        device: torch.device,
        seed: int,
        activations: Mapping[str, Activations],
    ) -> None:
        self._job, self._device, self._seed, self._activations = job, device, seed, activations
        self._check_activations()
        self._read = _Reader(job.source, job.model.dtype, job.container.half)
        self._limits = _Limits(job, self._read)
        self.report = QuantizeReport.of(job.model.recipe)
        self.done: dict[str, Sequence[LayerRecipe]] = {}
        self.kept = dict(job.model.kept)

    def _check_activations(self) -> None:
        """Settings that ask for measured activations would do nothing without them."""
        for step in self._job.steps:
            for _, _, recipe in step.decided:
                if (recipe.weighted or recipe.feedback) and not self._activations:
                    raise LowBitError(
                        "The recipe weighs errors by activations, but none were measured.",
                        file=self._job.source.path,
                        layer=step.name,
                        expected="activations of a few runs of the model",
                        remedy="Quantize a MODEL with a prompt and a latent connected, or switch "
                        "activation_weighted and error_feedback off.",
                    )

    def stored(self, step: Step) -> dict[str, torch.Tensor]:
        """The tensors that one step writes."""
        try:
            return self._stored(step)
        except LowBitError as error:
            raise error.located(file=self._job.source.path, layer=step.name) from None

    def _stored(self, step: Step) -> dict[str, torch.Tensor]:
        job, model = self._job, self._job.model
        bias = None if step.bias is None else assemble(step.bias, self._read)
        weight = assemble(step.move, self._read)
        parts = self._parts(step, weight) if step.decided else []
        if parts:
            self.done[step.name] = [part.recipe for part in parts]
            layer = Layer(step.name, step.native, tuple(parts), bias)
            return job.container.tensors(layer, model)
        if step.kept:
            self.report.keep(step.name, step.kept, weight.nbytes)
        if step.name == step.move.native:
            return job.container.plain(step.name, weight)
        made = job.container.plain(step.name + WEIGHT, weight)
        return made if bias is None else made | job.container.plain(step.name + BIAS, bias)

    def _parts(self, step: Step, weight: torch.Tensor) -> list[Part]:
        """The quantized parts; none where a dynamic recipe finds no format good enough."""
        columns, limit = step.shape[1], self._limits.of(step)
        measured = self._activations.get(step.native[0])
        parts, errors = [], {}
        for first, last, recipe in step.decided:
            made, error = quantize_layer(
                weight[:, first:last].to(self._device),
                recipe,
                seed=self._seed,
                activations=_columns(measured, first, last, columns),
                limit=limit,
            )
            if made is None:
                self.kept[step.name] = error.reason
                self.report.keep(step.name, error.reason, weight.nbytes)
                return []
            chosen = (c for c in recipe.candidates if c.format == made.spec.format.name)
            parts.append(Part(made, next(chosen, recipe)))
            errors[_part_name(step, first, last)] = error
        for name, error in errors.items():
            self.report.add(name, error)
        return parts


def prepare(
    source: FloatModel,
    recipe: Recipe,
    container: Container,
    *,
    facts: Facts | None = None,
    config: Mapping[str, object] | None = None,
    kinds: Mapping[str, str] | None = None,
    stuck: Mapping[str, str] | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Job:
    """Decide everything from shapes.

    Args:
        source: The float model.
        recipe: How to quantize it.
        container: How to store it.
        facts: Of its family; told from the names when None.
        config: diffusers' config.json of the source.
        kinds: ``{native module: "linear", "conv" or "embedding"}`` where the caller knows; told
            from names and shapes elsewhere.
        stuck: ``{native module: why it cannot be quantized}``.
        dtype: Of float tensors that were low-bit in the source.

    Raises:
        LowBitError: The container cannot hold what the recipe asks for, or nothing would be
            quantized.
    """
    shapes = source.shapes
    if facts is None:
        _, facts = facts_of([key.removesuffix(WEIGHT) for key in shapes if key.endswith(WEIGHT)])
    if container.half and dtype.itemsize > 2:
        dtype = torch.bfloat16
    # Plans have their pipeline's scheduler in the config.
    config = {key: value for key, value in (config or {}).items() if key != "scheduler"}
    moves, family, class_name, left = _named(shapes, container.style)
    stored = {key: shape for key, (_, shape) in moves.items()}
    if class_name and not config:
        names = stored if container.style == "diffusers" else _diffusers(shapes)
        config = diffusers_config(class_name, names, left)
    steps = tuple(
        _decided(step, recipe, facts, shapes, kinds or {}, stuck or {}) for step in _steps(moves)
    )
    model = Model(
        recipe,
        family,
        class_name,
        config,
        shapes,
        stored,
        {step.name: [part[2] for part in step.decided] for step in steps if step.decided},
        {step.name: step.native for step in steps if step.decided or step.kept},
        {step.name: step.kept for step in steps if step.kept},
        dtype,
    )
    if not model.quantized:
        kept = next(iter(model.kept.items()), ("none", "there is none"))
        raise LowBitError(
            "Nothing would be quantized.",
            file=source.path,
            layer=kept[0],
            found=f"{len(model.kept)} layers kept, the first of them because: {kept[1]}",
            expected="at least one layer that the recipe quantizes",
            remedy="Change the recipe, or the layers that it keeps.",
        )
    container.check(model)
    return Job(source, container, model, steps)


def _named(
    shapes: Mapping[str, tuple[int, ...]], style: str
) -> tuple[dict[str, tuple[Move, tuple[int, ...]]], str, str, Collection[str]]:
    """``{tensor of the file: (how it is made, shape)}``, family, class, and what is left out."""
    if style == "native":
        named = {key: (Move(key, (Piece(key),)), shape) for key, shape in shapes.items()}
        return named, "", "", ()
    back = reverse(shapes, style)
    for key, why in back.left.items():
        logging.info("LowBit: %s is left out: %s", key, why)
    named = {move.native: (move, shape_of(move, shapes)) for move in back.moves}
    return named, back.family.name, back.family.classes[0], back.left


def _diffusers(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    return {move.native: shape_of(move, shapes) for move in reverse(shapes).moves}


def _steps(moves: Mapping[str, tuple[Move, tuple[int, ...]]]) -> Iterator[Step]:
    for key, (move, shape) in moves.items():
        module = key.removesuffix(WEIGHT)
        if key.endswith(BIAS) and f"{key.removesuffix(BIAS)}{WEIGHT}" in moves:
            continue
        if module == key:
            yield Step(key, move, None, shape)
            continue
        bias = moves.get(module + BIAS)
        yield Step(module, move, bias[0] if bias else None, shape)


def _decided(
    step: Step,
    recipe: Recipe,
    facts: Facts,
    shapes: Mapping[str, tuple[int, ...]],
    kinds: Mapping[str, str],
    stuck: Mapping[str, str],
) -> Step:
    """The step with what the recipe says of it."""
    if step.move.native == step.name or len(step.shape) < 2:
        return step
    native = step.native[0]
    if native in stuck:
        return replace(step, kept=stuck[native])
    kind = kinds.get(native) or layer_kind(native, step.shape)
    (first, *_) = step.move.pieces
    whole = step.shape if first.columns is None else shapes[first.key]
    found = recipe.decide(native, whole, kind, facts)
    if isinstance(found, Kept):
        return replace(step, kept=found.reason)
    columns = step.shape[1]
    if isinstance(found, LayerRecipe):
        if first.columns is not None:
            found = recipe.decide(native, step.shape, kind, facts)
        return replace(step, decided=((0, columns, found),))
    assert isinstance(found, Split)
    if first.columns is None:
        return replace(step, decided=found.parts)
    start, count = first.columns
    fits = [part for begin, end, part in found.parts if (begin, end) == (start, start + count)]
    if not fits:
        raise LowBitError(
            "The container takes a layer apart where the recipe does not.",
            layer=native,
            found=f"columns {start} to {start + count}",
            expected=", ".join(f"{begin} to {end}" for begin, end, _ in found.parts),
        )
    return replace(step, decided=((0, columns, fits[0]),))


def layer_kind(module: str, shape: tuple[int, ...]) -> str:
    """What a layer is, as far as its name and shape tell: "linear", "conv" or "embedding"."""
    if len(shape) > 2:
        return "conv"
    return "embedding" if _TABLE.search(module) else "linear"


class _Reader:
    """Reads native tensors; the last one is kept, because a file may want it in parts."""

    def __init__(self, source: FloatModel, dtype: torch.dtype, half: bool) -> None:
        self._source, self._dtype, self._half = source, dtype, half
        self._kept: tuple[str, torch.Tensor] | None = None

    def __call__(self, key: str) -> torch.Tensor:
        if self._kept is None or self._kept[0] != key:
            self._kept = None
            tensor = self._source.read(key)
            wide = self._half and tensor.dtype in (torch.float32, torch.float64)
            if key in self._source.lowbit or wide:
                tensor = tensor.to(self._dtype)
            self._kept = key, tensor
        return self._kept[1]


class _Limits:
    """Largest values that several layers' scales span together."""

    def __init__(self, job: Job, read: _Reader) -> None:
        self._read = read
        steps = {step.name: step for step in job.steps if step.decided}
        self._groups = {
            name: [steps[other] for other in group]
            for group in job.container.together(steps, job.model)
            for name in group
        }
        self._found: dict[str, float] = {}

    def of(self, step: Step) -> float | None:
        """None where the layer's own largest value counts."""
        group = self._groups.get(step.name)
        if group is None:
            return None
        if step.name not in self._found:
            largest = max(float(assemble(s.move, self._read).abs().max()) for s in group)
            self._found = dict.fromkeys((s.name for s in group), largest)
        return self._found[step.name]


def _columns(
    measured: Activations | None, first: int, last: int, columns: int
) -> Activations | None:
    """Those of some of a layer's inputs."""
    if measured is None or (first, last) == (0, columns):
        return measured
    moment, products = measured.second_moment, measured.products
    return Activations(
        None if moment is None else moment[first:last],
        None if products is None else products[first:last, first:last],
        measured.largest,
    )


def _part_shape(step: Step, first: int, last: int) -> tuple[int, ...]:
    return (step.shape[0], last - first, *step.shape[2:])


def _part_name(step: Step, first: int, last: int) -> str:
    """As reports call a part."""
    whole = (first, last) == (0, step.shape[1])
    return step.name if whole else f"{step.name}[{first}:{last}]"


def write_report(target: Path, report: QuantizeReport) -> None:
    """Put a report as JSON beside a file, or into a folder."""
    path = target / "lowbit_report.json" if target.is_dir() else target.with_suffix(REPORT)
    text = json.dumps(report.to_json(), indent=1, ensure_ascii=False, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")

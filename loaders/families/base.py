"""Key maps between a checkpoint's tensor names and ComfyUI's own, as data.

A family is a set of models whose checkpoints name their tensors alike. It answers, from names and
logical shapes alone (no tensor is read):

==============  ================================================================================
``matches``     is this checkpoint of my kind, and by which evidence
``moves``       which tensors of the file make up each tensor of ComfyUI's model
``ignored``     tensors of the file that ComfyUI's model has no place for, and why
``zeros``       those of them that change nothing because they are zero, which loading checks
``extras``      small tensors that ComfyUI expects and the file does not hold
``optional``    names in ComfyUI's model that a complete checkpoint need not fill, and why
==============  ================================================================================

Keys are *logical*: a scheme's own suffixes are gone, so a layer has ``X.weight``, perhaps
``X.bias``, and free parameters have their own name. A wrapper prefix (``PREFIXES``) is taken off
before a family sees the keys, and put back in the pieces.

Operations on a piece (``Piece.op``), each of which every scheme can do without rounding anew:

``swap_halves``  exchange the upper and the lower half of the rows: where one side says
                 (scale, shift) and the other (shift, scale)

One tensor of the file may fill several native ones (``Split``): a fused projection that ComfyUI
keeps apart is taken apart by its rows, in equal shares.

No family here needs a piece reshaped: ComfyUI reads 1x1 convolutions and linear layers alike from
the shape that the file has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from ...quant.errors import LowBitError
from ...quant.recipe import Facts
from .facts import FACTS, UNKNOWN

if TYPE_CHECKING:
    import torch

__all__ = [
    "OPS",
    "PREFIXES",
    "Family",
    "Move",
    "Piece",
    "Rule",
    "Shapes",
    "Split",
    "apply_rule",
    "apply_split",
    "identity",
    "join",
    "split_prefix",
    "take_apart",
]

Shapes = Callable[[str], tuple[int, ...]]
Name = str | tuple[str, ...]
"""A name in the file; several are spellings of one name, of which a file uses one."""

OPS = ("swap_halves",)
AXES = ("single", "rows", "columns", "sum")
ENDS = ("", ".weight", ".bias")

#: Wrapper prefixes. The first one marks the diffusion model inside a whole checkpoint, whatever
#: lies beside it; the others count only where nothing but other components lies beside them,
#: because native names of some models begin with the same word.
PREFIXES = ("model.diffusion_model.", "diffusion_model.", "transformer.", "unet.")
COMPONENTS = (
    "cond_stage_model.",
    "conditioner.",
    "first_stage_model.",
    "text_encoder.",
    "text_encoder_2.",
    "text_encoder_3.",
    "text_encoders.",
    "vae.",
)


@dataclass(frozen=True)
class Piece:
    """One tensor of the file, or some of its rows, that goes into a native tensor.

    Args:
        key: The tensor's logical key as the file spells it.
        rows: ``(first, count)`` of the rows (dim 0) to take; all of them when None.
        op: One of ``OPS``, done after the rows are taken; None for the rows as they are.
        columns: As ``rows`` of dim 1, where a writer takes a native layer apart (:mod:`.reverse`).
    """

    key: str
    rows: tuple[int, int] | None = None
    op: str | None = None
    columns: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.op is not None and self.op not in OPS:
            raise ValueError(f"piece {self.key}: operation {self.op!r} is not one of {OPS}")


@dataclass(frozen=True)
class Move:
    """How one tensor of ComfyUI's model is made from tensors of the file.

    Args:
        native: The name in ComfyUI's model.
        pieces: Its parts, in order.
        axis: ``single`` (one piece, as it is), ``rows`` (concatenated along dim 0), ``columns``
            (concatenated along dim 1) or ``sum`` (added).
    """

    native: str
    pieces: tuple[Piece, ...]
    axis: str = "single"

    def __post_init__(self) -> None:
        if self.axis not in AXES:
            raise ValueError(f"move to {self.native}: axis {self.axis!r} is not one of {AXES}")
        if not self.pieces or (self.axis == "single") != (len(self.pieces) == 1):
            raise ValueError(
                f"move to {self.native}: {len(self.pieces)} pieces on axis {self.axis}"
            )


@dataclass(frozen=True)
class Rule:
    """One line of a family's table: a module or free parameter, under both names.

    Args:
        sources: Names in the file, without ``.weight`` or ``.bias``; more than one are fused
            along ``axis``, in order. ``{}`` stands for a block's number, once in each name.
        native: The name in ComfyUI's model, with as many ``{}``.
        op: As ``Piece.op``.
        axis: ``rows``, or ``columns`` for parts that each see some of the inputs: their weights
            stand side by side, their biases (which not every part need have) are added.
    """

    sources: tuple[Name, ...]
    native: str
    op: str | None = None
    axis: str = "rows"


@dataclass(frozen=True)
class Split:
    """One line of a family's table: a fused module of the file that ComfyUI keeps apart.

    Args:
        source: The name in the file, as in ``Rule.sources``.
        natives: The names in ComfyUI's model, in the order of the rows, which they share evenly.
    """

    source: Name
    natives: tuple[str, ...]


def split_prefix(keys: Iterable[str]) -> tuple[str, dict[str, str]]:
    """The wrapper prefix of a checkpoint, and what lies outside it.

    Returns:
        The prefix (empty when there is none), and the keys outside it with the reason why they
        are no part of the diffusion model.
    """
    keys = set(keys)
    for prefix in PREFIXES:
        outside = {key for key in keys if not key.startswith(prefix)}
        if len(outside) == len(keys):
            continue
        if prefix == PREFIXES[0] or all(key.startswith(COMPONENTS) for key in outside):
            reason = f"lies outside {prefix[:-1]}: another part of the checkpoint"
            return prefix, dict.fromkeys(sorted(outside), reason)
    return "", {}


class Family:
    """A family whose map is a table of rules. Subclasses fill in the class attributes.

    Attributes:
        name: Short name, used in reports and by other modules.
        display: Name for people.
        classes: Values of ``_class_name`` in config.json that support the match.
        signature: Keys (without prefix) that together are found in this family alone; of a tuple
            of spellings, one is enough.
        rules: The map.
        optional: Native names that may stay unfilled, with the reason.
        unwritten: Native names that say what such a file says elsewhere, with the place.
        shares_names: What no rule names is called alike on both sides.
    """

    name: str
    display: str
    classes: tuple[str, ...] = ()
    signature: tuple[Name, ...] = ()
    rules: tuple[Rule | Split, ...] = ()
    optional: ClassVar[Mapping[str, str]] = {}
    unwritten: ClassVar[Mapping[str, str]] = {}
    shares_names: ClassVar[bool] = False

    def __repr__(self) -> str:
        return f"<family {self.name}>"

    # what the rest of the pack calls

    @property
    def facts(self) -> Facts:
        """What quantizing has to know of the family."""
        return FACTS.get(self.name, UNKNOWN)

    def matches(self, keys: set[str], config: Mapping[str, Any], shapes: Shapes) -> str | None:
        """Evidence that a checkpoint is of this family, or None."""
        prefix, _ = split_prefix(keys)
        found = [
            next((key for key in _spellings(name) if prefix + key in keys), None)
            for name in self.signature
        ]
        if not found or None in found:
            return None
        evidence = "keys " + ", ".join(prefix + key for key in found)
        named = config.get("_class_name")
        if named in self.classes:
            evidence += f"; config.json names {named}"
        elif named:
            evidence += f"; config.json names {named}, which the keys overrule"
        return evidence

    def moves(self, keys: set[str], config: Mapping[str, Any], shapes: Shapes) -> list[Move]:
        """The moves that fill ComfyUI's model, each native name once.

        Raises:
            LowBitError: A fused layer lacks a part, or two tensors claim one native name.
        """
        prefix, outside = split_prefix(keys)
        inside = {key[len(prefix) :] for key in keys if key not in outside}
        found = self._moves(inside, config, lambda key: shapes(prefix + key))
        taken: dict[str, Move] = {}
        for move in found:
            if move.native in taken:
                both = [piece.key for m in (taken[move.native], move) for piece in m.pieces]
                raise _clash(move.native, [prefix + key for key in both])
            taken[move.native] = move
        if not prefix:
            return found
        return [
            replace(
                move, pieces=tuple(replace(piece, key=prefix + piece.key) for piece in move.pieces)
            )
            for move in found
        ]

    def ignored(self, keys: set[str], config: Mapping[str, Any]) -> dict[str, str]:
        """Keys that are left out, with the reason for each."""
        return split_prefix(keys)[1]

    def zeros(self, keys: set[str], config: Mapping[str, Any]) -> set[str]:
        """Those of the ignored keys that may be left out only where every value is zero."""
        return set()

    def extras(self, keys: set[str], config: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """Native names and tensors to add, because ComfyUI reads something from their presence."""
        return {}

    def spelled(self, name: str, natives: Mapping[str, tuple[int, ...]]) -> str:
        """The spelling of a module's name in a file that is written from ComfyUI's tensors."""
        return name

    # what a subclass may replace; keys are without prefix

    def _moves(self, keys: set[str], config: Mapping[str, Any], shapes: Shapes) -> list[Move]:
        made = []
        for rule in self.rules:
            if isinstance(rule, Split):
                made += apply_split(rule, keys, shapes)
            else:
                made += apply_rule(rule, keys)
        return made


def apply_rule(rule: Rule, keys: set[str]) -> list[Move]:
    """The moves that one rule gives for a set of keys: none where no source is there."""
    made = []
    for number in _numbers(rule.sources[0], keys):
        sources = [_numbered(source, number) for source in rule.sources]
        native = rule.native.replace("{}", number)
        for end in ENDS:
            parts = [tuple(name + end for name in source) for source in sources]
            move = join(native + end, parts, keys, rule.op, rule.axis)
            if move is not None:
                made.append(move)
    return made


def apply_split(split: Split, keys: set[str], shapes: Shapes) -> list[Move]:
    """The moves that take a fused module apart: none where the file has none."""
    made = []
    for number in _numbers(split.source, keys):
        source = _numbered(split.source, number)
        natives = [native.replace("{}", number) for native in split.natives]
        for end in ENDS:
            key = _chosen(natives[0] + end, tuple(name + end for name in source), keys)
            if key is not None:
                made += take_apart(key, [native + end for native in natives], shapes)
    return made


def take_apart(key: str, natives: list[str], shapes: Shapes) -> list[Move]:
    """Moves that share the rows of one tensor evenly, in order.

    Raises:
        LowBitError: The rows cannot be shared evenly.
    """
    rows = (shapes(key) or (0,))[0]
    share, rest = divmod(rows, len(natives))
    if rest or not share:
        raise LowBitError(
            "A fused layer of the checkpoint cannot be taken apart.",
            layer=key,
            found=f"{rows} rows",
            expected=f"{len(natives)} equal parts, for {', '.join(natives)}",
            remedy="The checkpoint does not have the architecture that its names say.",
        )
    return [
        Move(native, (Piece(key, rows=(number * share, share)),))
        for number, native in enumerate(natives)
    ]


def join(
    native: str,
    sources: list[Name],
    keys: set[str],
    op: str | None = None,
    axis: str = "rows",
) -> Move | None:
    """A move that puts ``sources`` together; None when none of them is there.

    Raises:
        LowBitError: Some sources are there and others are not, or one is there twice.
    """
    found = [_chosen(native, source, keys) for source in sources]
    present = [key for key in found if key is not None]
    if not present:
        return None
    if axis == "columns" and native.endswith(".bias"):
        axis = "sum"
    elif len(present) < len(found):
        raise LowBitError(
            "A layer that ComfyUI keeps fused lacks a part in the checkpoint.",
            layer=native,
            found=", ".join(present),
            expected=", ".join(
                key or " or ".join(_spellings(source))
                for key, source in zip(found, sources, strict=True)
            ),
            remedy="The file is incomplete: get it from its source again.",
        )
    pieces = tuple(Piece(key, op=op) for key in present)
    return Move(native, pieces, "single" if len(pieces) == 1 else axis)


def identity(keys: set[str]) -> list[Move]:
    """Every key under its own name."""
    return [Move(key, (Piece(key),)) for key in sorted(keys)]


def _spellings(name: Name) -> tuple[str, ...]:
    return (name,) if isinstance(name, str) else name


def _numbered(name: Name, number: str) -> tuple[str, ...]:
    """The spellings of a name in one block."""
    return tuple(spelling.replace("{}", number) for spelling in _spellings(name))


def _chosen(native: str, name: Name, keys: set[str]) -> str | None:
    """The spelling that the file uses, None when it has none."""
    found = [spelling for spelling in _spellings(name) if spelling in keys]
    if len(found) > 1:
        raise _clash(native, found)
    return found[0] if found else None


def _clash(native: str, keys: list[str]) -> LowBitError:
    return LowBitError(
        "Two layers of the checkpoint claim the same place in the model.",
        layer=native,
        found=", ".join(keys),
        expected="one of them",
        remedy="The file mixes two naming schemes; get it from its source again.",
    )


def _numbers(source: Name, keys: set[str]) -> list[str]:
    """Block numbers that occur where ``source`` has ``{}``; one empty one when it has none."""
    head, mark, _ = _spellings(source)[0].partition("{}")
    if not mark:
        return [""]
    heads = {key[len(head) :].partition(".")[0] for key in keys if key.startswith(head)}
    return sorted((number for number in heads if number.isdecimal()), key=int)

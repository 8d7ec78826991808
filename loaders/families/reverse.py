"""From ComfyUI's names back to those of a file: the families' tables, read from right to left.

What a loader joins, a writer takes apart. A :class:`~.base.Move` stands here for one tensor of the
file: ``native`` is its name there, its pieces are tensors of ComfyUI's model.

=============  ===================================================================================
``diffusers``  names of diffusers' own classes, every projection apart
``nunchaku``   names of SVDQuant files in the first spelling of Nunchaku's engine: q, k and v fused,
               a single block's last layer taken apart by its inputs
=============  ===================================================================================

A fused native layer does not say where its parts end, but attention is as wide as its input in
every family here: q has as many rows as the layer has columns, k and v share what is left or have
as many, and a feed-forward part takes the rest. Along the columns attention is as wide as the
output.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ...quant.errors import LowBitError
from . import FAMILIES
from .base import ENDS, Family, Move, Piece, Rule, Split, _spellings
from .mapped import MappedFamily

__all__ = ["STYLES", "Reversed", "reverse"]

STYLES = ("diffusers", "nunchaku")

#: Last names of modules as Nunchaku's engine spells them, the first spelling.
NUNCHAKU = (
    "qkv_proj",
    "qkv_proj_context",
    "out_proj",
    "out_proj_context",
    "mlp_fc1",
    "mlp_fc2",
    "mlp_context_fc1",
    "mlp_context_fc2",
    "norm_q",
    "norm_k",
    "norm_added_q",
    "norm_added_k",
    "to_qkv",
    "add_qkv_proj",
    "net.0.proj",
    "net.2",
)

Native = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Reversed:
    """How a file of some naming is made of ComfyUI's tensors.

    Attributes:
        family: The family whose names they are.
        moves: One for each tensor of the file; its pieces are native tensors.
        left: Native tensors that such a file has no place for, with the reason.
    """

    family: Family
    moves: tuple[Move, ...]
    left: Mapping[str, str]


def reverse(natives: Native, style: str = "diffusers") -> Reversed:
    """Name ComfyUI's tensors as a file does.

    Args:
        natives: ``{native key: logical shape}`` of a whole model.
        style: One of ``STYLES``.

    Raises:
        LowBitError: No family has such names, or it has none in this style.
    """
    for family in FAMILIES:
        if not family.classes:
            continue
        mapped = isinstance(family, MappedFamily)
        made = _mapped(family, natives) if mapped else _by_rules(family, natives, style)
        if made is None:
            continue
        if mapped and style == "nunchaku":
            made = _fused_attention(made)
        used = {piece.key for move in made for piece in move.pieces}
        left = {
            key: why
            for key, why in (family.unwritten | family.optional).items()
            if key in natives and key not in used
        }
        names = {move.native for move in made}
        if set(natives) - used - set(left) or not family.matches(names, {}, lambda key: ()):
            continue
        if style == "nunchaku" and not _fused(names):
            break
        return Reversed(family, tuple(made), left)
    raise LowBitError(
        f"The model cannot be written with names of {style}.",
        found=f"{len(natives)} tensors, the first of them {next(iter(natives), 'none')}",
        expected="a model of " + ", ".join(f.display for f in FAMILIES if f.classes),
        remedy='Choose the container "comfy", which keeps ComfyUI\'s names.',
    )


# -------------------------------------------------------------------------- families with tables


def _by_rules(family: Family, natives: Native, style: str) -> list[Move] | None:
    """Moves of a family with rules; None where a native tensor has no rule."""
    rules: dict[str, Rule | Split] = {}
    for rule in family.rules:
        for native in rule.natives if isinstance(rule, Split) else (rule.native,):
            if native not in rules or _prefers(rule, rules[native], style):
                rules[native] = rule
    made: dict[str, Move] = {}
    for key in natives:
        if key in family.unwritten:
            continue
        module, end = _ending(key)
        pattern, number = _pattern(module, rules)
        if pattern is None:
            if key in family.optional:
                continue
            if not family.shares_names:
                return None
            made[key] = Move(key, (Piece(key),))
            continue
        rule = rules[pattern]
        moves = (
            _join(rule, number, end, natives, style)
            if isinstance(rule, Split)
            else _take_apart(family, rule, key, end, number, natives, style)
        )
        made |= {move.native: move for move in moves}
    return list(made.values())


def _prefers(rule: Rule | Split, other: Rule | Split, style: str) -> bool:
    """Whether a rule suits a style better than one that stands before it."""
    ours, theirs = _engine(rule), _engine(other)
    return ours > theirs if style == "nunchaku" else ours < theirs


def _engine(rule: Rule | Split) -> bool:
    """Whether every source has a spelling of Nunchaku's."""
    sources = (rule.source,) if isinstance(rule, Split) else rule.sources
    return all(_of_nunchaku(source) is not None for source in sources)


def _of_nunchaku(source) -> str | None:
    ends = tuple(f".{name}" for name in NUNCHAKU)
    return next((name for name in reversed(_spellings(source)) if name.endswith(ends)), None)


def _spelled(source, style: str, number: str) -> str:
    chosen = (_of_nunchaku(source) if style == "nunchaku" else None) or _spellings(source)[0]
    return chosen.replace("{}", number)


def _take_apart(
    family: Family, rule: Rule, key: str, end: str, number: str, natives: Native, style: str
) -> list[Move]:
    """The tensors of a file that one native tensor becomes."""
    names = [family.spelled(_spelled(s, style, number), natives) + end for s in rule.sources]
    if len(names) == 1:
        return [Move(names[0], (Piece(key, op=rule.op),))]
    weight = natives.get(key.removesuffix(end) + ".weight", ())
    if len(weight) < 2:
        raise _unlike(key, weight, "a matrix")
    shares = _shares(weight, len(names), rule.axis, key)
    if rule.axis == "columns" and end == ".bias":
        # The outputs are added: one part brings the whole bias, the one that it does in Nunchaku's.
        return [Move(names[-1], (Piece(key),))]
    made, start = [], 0
    for name, share in zip(names, shares, strict=True):
        cut = {"columns" if rule.axis == "columns" else "rows": (start, share)}
        made.append(Move(name, (Piece(key, op=rule.op, **cut),)))
        start += share
    return made


def _shares(weight: Sequence[int], count: int, axis: str, key: str) -> list[int]:
    rows, columns = weight[0], weight[1]
    if axis == "columns":
        shares = [rows, columns - rows]
    elif count == 2:
        shares = [3 * columns, rows - 3 * columns]
    elif count == 3:
        shares = [columns, (rows - columns) // 2, (rows - columns) // 2]
    else:
        shares = [columns, columns, columns, rows - 3 * columns]
    if sum(shares) != (columns if axis == "columns" else rows) or min(shares) <= 0:
        raise _unlike(key, tuple(weight), f"{count} parts as wide as attention is")
    return shares


def _unlike(key: str, found: Sequence[int], expected: str) -> LowBitError:
    return LowBitError(
        "A fused layer cannot be taken apart.",
        layer=key,
        found=f"shape {tuple(found)}",
        expected=expected,
        remedy='Choose the container "comfy", which keeps the layer fused.',
    )


def _join(split: Split, number: str, end: str, natives: Native, style: str) -> list[Move]:
    """The one tensor that several native ones become, or each by itself."""
    keys = [native.replace("{}", number) + end for native in split.natives]
    if style != "nunchaku" or any(key not in natives for key in keys):
        return [Move(key, (Piece(key),)) for key in keys if key in natives]
    return [Move(_spelled(split.source, style, number) + end, tuple(map(Piece, keys)), "rows")]


def _ending(key: str) -> tuple[str, str]:
    end = next((end for end in ENDS if end and key.endswith(end)), "")
    return key.removesuffix(end), end


def _pattern(module: str, rules: Mapping[str, object]) -> tuple[str | None, str]:
    """The rule's native name for a module, and its block number."""
    if module in rules:
        return module, ""
    words = module.split(".")
    for place, word in enumerate(words):
        if word.isdecimal():
            pattern = ".".join((*words[:place], "{}", *words[place + 1 :]))
            if pattern in rules:
                return pattern, word
    return None, ""


# ------------------------------------------------------------------ families by ComfyUI's own map


def _mapped(family: MappedFamily, natives: Native) -> list[Move] | None:
    table = family.native_table(natives)
    if not table:
        return None
    made, seen = [], set()
    for source, target in table.items():
        if target.native not in natives or (target.native, target.rows) in seen:
            continue
        seen.add((target.native, target.rows))
        op = "swap_halves" if target.swap_halves else None
        made.append(Move(source, (Piece(target.native, rows=target.rows, op=op),)))
    return made


def _fused_attention(made: list[Move]) -> list[Move]:
    """``attn1``'s q, k and v as one, as SVDQuant files of a UNet have them."""
    named = {move.native: move for move in made}
    for key in list(named):
        if ".attn1.to_q." not in key:
            continue
        parts = [named.pop(key.replace(".to_q.", f".to_{part}.")) for part in "qkv"]
        fused = key.replace(".to_q.", ".to_qkv.")
        named[fused] = Move(fused, tuple(p for part in parts for p in part.pieces), "rows")
    return list(named.values())


def _fused(names: set[str]) -> bool:
    return any(f".{name}.weight" in key for key in names for name in ("qkv_proj", "to_qkv"))

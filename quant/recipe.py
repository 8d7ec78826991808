"""Recipes: how a model is to be quantized, as frozen data with a JSON form.

A recipe is one method with its settings, and what makes layers differ from each other:

| field       | meaning                                                                        |
|-------------|--------------------------------------------------------------------------------|
| `method`    | a key of METHODS                                                               |
| `settings`  | the method's settings, a table of `Setting`; unnamed ones have their defaults  |
| `keep`      | patterns of layers that stay as they are; `!pattern` quantizes them after all  |
| `overrides` | pattern -> settings that differ there; `method` among them changes the method  |
| `refine`    | what is better than rounding to the nearest, REFINEMENTS; all of it is off     |

Patterns are globs of ComfyUI's own layer names, such as `double_blocks.*.img_mod`; a pattern stands
for everything below its name, too. Where several patterns fit, the last one counts. What the
model's family keeps by itself comes before the recipe's patterns, so that `!*` empties that list.

`Recipe.decide` gives what `quant.engine` does with one layer: a `LayerRecipe`, in which the method
is dissolved into plain numbers; `Split`, for a layer that is quantized in parts; or `Kept`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from .decisions import NO_FACTS, Decision, Facts, Kept, LayerRecipe, Split, matches
from .dtypes import get_format
from .errors import LowBitError
from .methods import METHODS, Layer, Method, check_settings
from .settings import REFINEMENTS, Setting, did_you_mean

__all__ = [
    "METHODS",
    "REFINEMENTS",
    "VERSION",
    "Facts",
    "Kept",
    "LayerRecipe",
    "Recipe",
    "Setting",
    "Split",
    "matches",
    "parse_overrides",
    "parse_patterns",
]

VERSION = 1
MARK = "lowbit_recipe"  # key of the version in the JSON form
_FORMATS_TOO = ("fp8", "int8", "int4")  # methods whose names are those of formats as well

Pairs = tuple[tuple[str, Any], ...]


def _method(name: object) -> Method:
    found = METHODS.get(name) if isinstance(name, str) else None
    if found is None:
        raise LowBitError(
            "There is no such method of quantization.",
            found=repr(name),
            expected="one of " + ", ".join(METHODS),
            remedy=did_you_mean(name, METHODS),
        )
    return found


def _checked(told: Any, known: Mapping[str, Setting], what: str) -> Pairs:
    """Settings as sorted pairs; LowBitError for a name or a value that is none."""
    _mapping(told, what)
    for name in told:
        if name not in known:
            raise LowBitError(
                f"There is no such setting of {what}.",
                found=repr(name),
                expected="one of " + ", ".join(known),
                remedy=did_you_mean(name, known),
            )
    return tuple(sorted((name, known[name].check(value)) for name, value in told.items()))


def _mapping(value: Any, what: str) -> None:
    if not isinstance(value, Mapping):
        raise LowBitError(
            f"The settings of {what} are no table.",
            found=repr(value),
            expected="names with their values",
        )


def _pattern(value: Any) -> str:
    if not isinstance(value, str) or not value.removeprefix("!").strip():
        raise LowBitError(
            "A pattern of layers is empty or no text.",
            found=repr(value),
            expected="a layer's name, in which * stands for anything",
        )
    return value.strip()


@dataclass(frozen=True)
class Recipe:
    """A method with its settings, and the layers that differ. Made by `make` or `from_json`.

    Attributes:
        method: Key of METHODS.
        settings: All settings of the method, sorted.
        keep: Patterns; "!" before one quantizes what it means after all.
        overrides: (pattern, settings that differ), in order.
        refine: All of REFINEMENTS, sorted.
    """

    method: str
    settings: Pairs
    keep: tuple[str, ...] = ()
    overrides: tuple[tuple[str, Pairs], ...] = ()
    refine: Pairs = ()

    @classmethod
    def make(
        cls,
        method: str,
        settings: Mapping[str, Any] | None = None,
        *,
        keep: Iterable[str] = (),
        overrides: Mapping[str, Mapping[str, Any]] | None = None,
        refine: Mapping[str, Any] | None = None,
    ) -> Recipe:
        """A recipe of settings that differ from their defaults.

        Raises:
            LowBitError: A method, setting or value that is not known, with those that are near.
        """
        known = _method(method).settings
        told = dict(_checked(settings or {}, known, method))
        better = dict(_checked(refine or {}, REFINEMENTS, "refinements"))
        if isinstance(keep, str):
            keep = parse_patterns(keep)
        found = []
        for pattern, changes in (overrides or {}).items():
            _mapping(changes, f"the override {pattern}")
            other = changes.get("method", method)
            rest = {name: value for name, value in changes.items() if name != "method"}
            pairs = _checked(rest, _method(other).settings, f"the override {pattern} ({other})")
            found.append((_pattern(pattern), (*pairs, ("method", other))))
        made = cls(
            method,
            tuple(sorted((name, told.get(name, s.default)) for name, s in known.items())),
            tuple(map(_pattern, keep)),
            tuple(found),
            tuple(sorted((name, better.get(name, s.default)) for name, s in REFINEMENTS.items())),
        )
        check_settings(method, dict(made.settings))
        for _, changes in made.overrides:
            check_settings(*made._settings_with([changes]))
        return made

    def __getitem__(self, setting: str) -> Any:
        return dict(self.settings)[setting]

    # JSON

    def to_json(self) -> dict[str, Any]:
        """The recipe as plain JSON values, every setting named."""
        return {
            MARK: VERSION,
            "method": self.method,
            "settings": dict(self.settings),
            "keep": list(self.keep),
            "overrides": {pattern: dict(changes) for pattern, changes in self.overrides},
            "refine": dict(self.refine),
        }

    def to_text(self) -> str:
        """The JSON form as text."""
        return json.dumps(self.to_json(), indent=1)

    @classmethod
    def from_json(cls, data: str | Mapping[str, Any]) -> Recipe:
        """A recipe of its JSON form, as text or as values.

        Raises:
            LowBitError: It is none, or a newer one than this pack knows.
        """
        if isinstance(data, str):
            try:
                data = json.loads(data)
            except json.JSONDecodeError as error:
                raise LowBitError(
                    "The recipe is no JSON.",
                    found=f"{error.msg} in line {error.lineno}",
                    expected="a JSON object",
                ) from None
        if not isinstance(data, Mapping) or MARK not in data:
            raise LowBitError(
                "This is no recipe.",
                found=type(data).__name__ if not isinstance(data, Mapping) else ", ".join(data),
                expected=f"a JSON object with {MARK} and method",
            )
        if data[MARK] != VERSION:
            raise LowBitError(
                "The recipe is of another version.",
                found=repr(data[MARK]),
                expected=VERSION,
                remedy="Update ComfyUI-LowBit.",
            )
        known = (MARK, "method", "settings", "keep", "overrides", "refine")
        for name in data:
            if name not in known:
                raise LowBitError(
                    "A recipe has no such part.",
                    found=repr(name),
                    expected="one of " + ", ".join(known),
                    remedy=did_you_mean(name, known),
                )
        keep = data.get("keep", [])
        if not isinstance(keep, list):
            raise LowBitError(
                "The patterns of layers to keep are no list.", found=repr(keep), expected="a list"
            )
        parts = {name: data.get(name, {}) for name in ("settings", "overrides", "refine")}
        for name, value in parts.items():
            _mapping(value, name)
        return cls.make(
            data.get("method"),
            parts["settings"],
            keep=keep,
            overrides=parts["overrides"],
            refine=parts["refine"],
        )

    def describe(self) -> str:
        """The recipe in one line: the method and what differs from its defaults."""
        known = METHODS[self.method].settings
        said = [METHODS[self.method].display]
        said += [f"{n} {v}" for n, v in self.settings if v != known[n].default]
        said += [f"{n} {v}" for n, v in self.refine if v != REFINEMENTS[n].default]
        if self.overrides:
            said.append(f"{len(self.overrides)} overrides")
        return ", ".join(said)

    # deciding

    def _settings_with(self, changes: Iterable[Pairs]) -> tuple[str, dict[str, Any]]:
        """Method and settings after changes, the later ones counting."""
        method, told = self.method, dict(self.settings)
        for pairs in changes:
            found = dict(pairs)
            other = found.pop("method")
            if other != method:
                method = other
                told = {name: s.default for name, s in METHODS[other].settings.items()}
            told |= found
        return method, told

    def settings_for(self, name: str) -> tuple[str, dict[str, Any]]:
        """Method and settings of a layer after every override."""
        name = name.removesuffix(".weight")
        return self._settings_with(
            changes for pattern, changes in self.overrides if matches(name, pattern)
        )

    def keeps(self, name: str, facts: Facts = NO_FACTS) -> str | None:
        """The reason why patterns keep a layer, None where they do not."""
        name = name.removesuffix(".weight")
        reason = None
        method, _ = self.settings_for(name)
        patterns = [(p, "the model's family keeps it") for p in facts.kept_by(method)]
        patterns += [(p, "the recipe keeps it") for p in self.keep]
        for pattern, who in patterns:
            if matches(name, pattern.removeprefix("!")):
                reason = None if pattern.startswith("!") else f"{who} ({pattern})"
        return reason

    def decide(
        self,
        name: str,
        shape: tuple[int, ...],
        kind: str = "linear",
        facts: Facts = NO_FACTS,
    ) -> Decision:
        """What is done to a layer.

        Args:
            name: Its native name, with or without ".weight".
            shape: Of its weight.
            kind: "linear", "conv" or "embedding".
            facts: Of the model's family.
        """
        name, shape = name.removesuffix(".weight"), tuple(shape)
        if not 2 <= len(shape) <= 5:
            return Kept(f"a tensor of {len(shape)} dimensions")
        reason = self.keeps(name, facts)
        if reason is not None:
            return Kept(reason)
        method, told = self.settings_for(name)
        layer = Layer(name, shape, kind, facts, dict(self.refine))
        return METHODS[method].decide(told, layer)


# -------------------------------------------------------------------------------------------- text


def parse_patterns(text: str) -> tuple[str, ...]:
    """Patterns out of lines; commas separate them as well, and # begins a remark."""
    lines = [line.partition("#")[0] for line in text.splitlines()]
    return tuple(part.strip() for line in lines for part in line.split(",") if part.strip())


def parse_overrides(text: str, method: str) -> dict[str, dict[str, Any]]:
    """Overrides out of lines such as `*.img_mod = int8` or `*.mlp.0 = group_size=32, use_svd=true`.

    A value without a name is a method, or one of SDNQ's number formats. What is both ("int8") is a
    format where the method is SDNQ's.

    Raises:
        LowBitError: A line is neither.
    """
    found: dict[str, dict[str, Any]] = {}
    for line in text.splitlines():
        line = line.partition("#")[0].strip()
        if not line:
            continue
        pattern, equals, rest = line.partition("=")
        if not equals or not pattern.strip() or not rest.strip():
            raise LowBitError(
                "An override is no pattern with what is different there.",
                found=line,
                expected="a line such as: double_blocks.*.img_mod = int8",
            )
        changes = found.setdefault(pattern.strip(), {})
        for part in rest.split(","):
            name, equals, value = (piece.strip() for piece in part.partition("="))
            now = changes.get("method", method)
            if equals:
                changes[name] = _value(value)
            elif name in METHODS and (now != "sdnq" or name not in _FORMATS_TOO):
                changes["method"] = name
            else:
                changes["weights_dtype"] = get_format(name).name
                changes["method"] = "sdnq"
    return found


def _value(text: str) -> Any:
    """A value as it would stand in JSON; a word that is none is text."""
    try:
        return json.loads(text.lower() if text.lower() in ("true", "false") else text)
    except json.JSONDecodeError:
        return None if text.lower() == "none" else text

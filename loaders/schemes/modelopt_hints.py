"""What a ModelOpt checkpoint says of itself beside its tensors.

| where                                         | what                                             |
|-----------------------------------------------|--------------------------------------------------|
| ``config.json``, ``quantization_config``      | ``quant_algo``, ``config_groups``, ``ignore``    |
| ``hf_quant_config.json``                      | the same one level deeper, ``exclude_modules``   |
| header, ``quantization_config``               | the same: post-processed exports, converters     |
| header, ``_quantization_metadata``, flat      | the same: SGLang's converters                    |
| header, ``_quantization_metadata.layers``     | names of formats: layer-wise exports             |
| any of them, ``quantized_layers``             | each layer's ``quant_algo`` (MIXED_PRECISION)    |
| any of them, ``swap_weight_nibbles``          | SGLang's converters: whether bytes hold the even |
|                                               | column in their high half                        |

Scaled FP8 of other producers is stored alike, and is read alike:

| ``quant_method``                              | what                                             |
|-----------------------------------------------|--------------------------------------------------|
| ``fp8``                                       | ``activation_scheme``, ``weight_block_size``     |
| ``compressed-tensors``, ``float-quantized``   | ``config_groups``: strategy and activations      |

All of it is evidence to be checked: each layer's tensors tell its format. A declared algorithm
that the tensors contradict is an error; lists of left-out layers are often stale, which is told.
Only one thing is believed: what rounds activations where the tensors are the same either way.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from ...quant.errors import LowBitError
from ..detect import metadata_object
from ..header import read_json
from ..source import Source

__all__ = ["ALGORITHMS", "MIXED", "Declaration", "Hints", "read_hints"]

MIXED = "MIXED_PRECISION"
#: ``{quant_algo: kinds of layers it may have}``; kinds are those of :mod:`.modelopt_layers`.
ALGORITHMS: Mapping[str, tuple[str, ...]] = {
    "FP8": ("fp8",),
    "FP8_PER_CHANNEL_PER_TOKEN": ("fp8-rows",),
    "FP8_PB_WO": ("fp8-blocks", "fp8"),  # a layer of one block has one scale
    "FP8_PB_REAL": ("fp8-blocks", "fp8"),
    "NVFP4": ("nvfp4",),
    "NVFP4_AWQ": ("nvfp4",),
    "NVFP4_SVD": ("nvfp4",),
    "W4A16_NVFP4": ("nvfp4", "nvfp4-32"),
    "W4A8_NVFP4_FP8": ("nvfp4-32",),
    "MXFP8": ("mxfp8",),
    "MXFP4": ("mxfp4",),
    "W4A8_MXFP4_FP8": ("mxfp4",),
    "W8A8_SQ_PER_CHANNEL": ("int8",),
    "W8A16": ("int8",),
    "W4A16_AWQ": ("int4",),
    "W4A8_AWQ": ("int4",),
    # of other producers, who call them otherwise
    "FP8_DYNAMIC": ("fp8",),
    "FP8_BLOCKS_DYNAMIC": ("fp8-blocks", "fp8"),
}
QUANT_FILE = "hf_quant_config.json"
BLOCK = 128
FOREIGN = ("fp8", "compressed-tensors")
REGET = "weights and config are of different models: download both again"


@dataclass(frozen=True)
class Declaration:
    """What one place says.

    Attributes:
        where: The place.
        algorithm: Upper case, None where it names none.
        layers: ``{layer: algorithm}`` of MIXED_PRECISION.
        ignore: Names and patterns of layers that are not quantized.
        swapped: ``swap_weight_nibbles``, None where it is not there.
        by: Producer and version.
        own: Whether it is ModelOpt's, not another producer's of scaled FP8.
    """

    where: str
    algorithm: str | None = None
    layers: Mapping[str, str] = field(default_factory=dict)
    ignore: tuple[str, ...] = ()
    swapped: bool | None = None
    by: str = ""
    own: bool = True

    def of_layer(self, layer: str) -> str | None:
        """The algorithm declared for a layer; None where that is open."""
        return self.layers.get(layer) if self.algorithm == MIXED else self.algorithm

    def leaves_out(self, layer: str) -> bool:
        """Whether the layer is said not to be quantized."""
        return any(
            layer == pattern or layer.startswith(f"{pattern}.") or fnmatchcase(layer, pattern)
            for pattern in self.ignore
        )


@dataclass(frozen=True)
class Hints:
    """What all places say.

    Attributes:
        places: Each.
        processed: Whether the exporter rewrote the file after the export, which may have brought
            block scales into tiles.
        foreign: Whether the header names formats of layers, but not as ModelOpt does, which would
            have its config beside them: another program may have converted the file.
    """

    places: tuple[Declaration, ...] = ()
    processed: bool = False
    foreign: bool = False

    def algorithm(self, layer: str) -> str | None:
        """What is declared for a layer."""
        told = (place.of_layer(layer) for place in self.places)
        return next((name for name in told if name), None)

    @property
    def swapped(self) -> tuple[bool, str] | None:
        """``swap_weight_nibbles`` and where it stands."""
        told = [(p.swapped, p.where) for p in self.places if p.swapped is not None]
        return told[0] if told else None

    def told(self) -> str:
        """In one line, for reports."""
        return ", ".join(
            f"{place.algorithm or 'no algorithm'} ({place.where}"
            + (f", {place.by})" if place.by else ")")
            for place in self.places
        )


def read_hints(source: Source) -> Hints:
    """Read them.

    Raises:
        LowBitError: One is damaged, names an algorithm that is not known, or contradicts another.
    """
    places = tuple(
        _declaration(source, where, config) for where, config in _configs(source) if config
    )
    swaps = {place.swapped for place in places if place.swapped is not None}
    if len(swaps) > 1:
        raise LowBitError(
            "The configs contradict each other.",
            file=source.path,
            layer="swap_weight_nibbles",
            found=", ".join(f"{p.swapped} ({p.where})" for p in places if p.swapped is not None),
            expected="one value",
            remedy=REGET,
        )
    layered = isinstance(metadata_object(source, "_quantization_metadata").get("layers"), dict)
    flat = "_quantization_metadata" in source.metadata and not layered
    rewritten = "quantization_config" in source.metadata and not flat
    return Hints(places, rewritten, layered and not rewritten)


def _configs(source: Source) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """``(where, config)`` of every place that has one."""
    names = {file.name for file in source.configs}
    own = "quantization_config.json"
    yield (own if own in names else "config.json"), source.quantization_config
    if QUANT_FILE in source.beside:
        folder = source.path if source.path.is_dir() else source.path.parent
        yield QUANT_FILE, read_json(folder / QUANT_FILE)
    yield "metadata quantization_config", metadata_object(source, "quantization_config")
    layered = metadata_object(source, "_quantization_metadata")
    if not isinstance(layered.get("layers"), dict):
        yield "metadata _quantization_metadata", layered


def _declaration(source: Source, where: str, config: Mapping[str, Any]) -> Declaration:
    def wrong(name: str, found: Any, expected: str) -> LowBitError:
        return LowBitError(
            "The quantization config is damaged.",
            file=source.path,
            layer=f"{where}: {name}",
            found=f"{found!r:.120}",
            expected=expected,
            remedy="restore the config from the model's origin",
        )

    def get(name: str, kind: type, expected: str, default: Any) -> Any:
        found = inner.get(name, config.get(name, default))
        if found is not None and not isinstance(found, kind):
            raise wrong(name, found, expected)
        return default if found is None else found

    config = {**config, **_foreign(source, where, config)}
    inner = config.get("quantization", config)
    if not isinstance(inner, Mapping):
        raise wrong("quantization", inner, "an object")
    algorithm = get("quant_algo", str, "the name of an algorithm", None)
    layers = {}
    for layer, entry in get("quantized_layers", Mapping, "an object", {}).items():
        name = entry.get("quant_algo") if isinstance(entry, Mapping) else None
        if not isinstance(name, str):
            raise wrong(f"quantized_layers, {layer}", entry, '{"quant_algo": ...}')
        layers[layer] = name.upper()
    known = (*ALGORITHMS, MIXED)
    for name, place in ((algorithm, "quant_algo"), *((n, layer) for layer, n in layers.items())):
        if name is not None and name.upper() not in known:
            raise LowBitError(
                "The quantization config names an algorithm that is not known.",
                file=source.path,
                layer=f"{where}: {place}",
                found=name,
                expected=", ".join(known),
                remedy="Update this pack; if that does not help, get the model in another format.",
            )
    ignore = [
        *get("ignore", list, "a list of names", []),
        *get("exclude_modules", list, "a list of names", []),
    ]
    if not all(isinstance(name, str) for name in ignore):
        raise wrong("ignore", ignore, "a list of names")
    producer = get("producer", Mapping, "an object", {})
    return Declaration(
        where,
        algorithm.upper() if algorithm else None,
        layers,
        tuple(ignore),
        get("swap_weight_nibbles", bool, "true or false", None),
        " ".join(str(producer[key]) for key in ("name", "version") if key in producer),
        str(config.get("quant_method", "")).lower() not in FOREIGN,
    )


def _foreign(source: Source, where: str, config: Mapping[str, Any]) -> dict[str, str]:
    """ModelOpt's word for what another producer of FP8 declares; empty where it has none."""
    method = str(config.get("quant_method", "")).lower()
    if method == FOREIGN[0]:
        block = config.get("weight_block_size")
        if block not in (None, [BLOCK, BLOCK]):
            raise LowBitError(
                "Blocks of FP8 are of a size that is not read.",
                file=source.path,
                layer=f"{where}: weight_block_size",
                found=f"{block!r:.80}",
                expected=f"[{BLOCK}, {BLOCK}]",
                remedy="Get the model in another format.",
            )
        if config.get("activation_scheme") == "dynamic":
            return {"quant_algo": "FP8_BLOCKS_DYNAMIC" if block else "FP8_DYNAMIC"}
        return {"quant_algo": "FP8_PB_WO" if block else "FP8"}
    if method == FOREIGN[1]:
        groups = config.get("config_groups")
        first = next(iter(groups.values()), None) if isinstance(groups, Mapping) else None
        parts = [
            part if isinstance(part, Mapping) else {}
            for name in ("weights", "input_activations")
            for part in [first.get(name) if isinstance(first, Mapping) else None]
        ]
        told = tuple(part.get("strategy") for part in parts)
        names = {
            ("channel", "token"): "FP8_PER_CHANNEL_PER_TOKEN",
            ("tensor", "tensor"): "FP8_DYNAMIC" if parts[1].get("dynamic") else "FP8",
        }
        return {"quant_algo": names[told]} if told in names else {}
    return {}

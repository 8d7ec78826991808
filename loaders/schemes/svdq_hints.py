"""What an SVDQuant checkpoint says of itself beside its tensors.

| where                                          | what                                            |
|------------------------------------------------|-------------------------------------------------|
| header, ``model_class``                        | ``Nunchaku...``: made for Nunchaku's own engine |
| header, ``quantization_config``                | ``weight`` {``dtype``, ``group_size``,          |
|                                                | ``scale_dtype`` or ``scale_dtypes``}, ``rank``  |
| header, its ``runtime_manifest`` (version 1)   | each layer's operation, precision, rank, splits |
| ``config.json`` of diffusers' Nunchaku Lite    | ``svdq_w4a4`` and ``awq_w4a16``: precision,     |
|                                                | rank and the names of the layers                |
| the file's name                                | ``svdq-(int4 or fp4)_r{rank}``                  |

All of it are hints: the tensors tell precision, group size and rank themselves, and are believed.
What only a hint can tell is how a layer of 16-bit activations is ordered, and which engine a file
was made for.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ...quant.errors import LowBitError
from ..detect import metadata_object
from ..source import Source

__all__ = ["MANIFEST", "Hints", "Target", "read_hints"]

SCHEMA = "nunchaku_lite.runtime_manifest"
OPERATIONS = ("svdq_w4a4", "awq_w4a16", "adanorm_awq_w4a16")
MANIFEST = "the runtime manifest"
LITE = ("svdq_w4a4", "awq_w4a16")  # sections of diffusers' config
PRECISIONS = {
    "int4": "int4",
    "sint4": "int4",
    "fp4": "nvfp4",
    "nvfp4": "nvfp4",
    "fp4_e2m1_all": "nvfp4",
    "sfp4_e2m1_all": "nvfp4",
    "mxfp4": "mxfp4",
}
NAME = re.compile(r"svdq-(int4|fp4|nvfp4|mxfp4)_r(\d+)", re.IGNORECASE)
REGET = "get the checkpoint from its origin again: what it says of itself is damaged"


class Target(NamedTuple):
    """One layer as a manifest or a config names it."""

    operation: str
    where: str
    precision: str | None = None
    rank: int | None = None
    splits: int = 0  # of an adanorm layer


@dataclass(frozen=True)
class Hints:
    """What the file says.

    Attributes:
        precision: ``{where it stands: "int4", "nvfp4" or "mxfp4"}``, of the file as a whole.
        rank: ``{where it stands: rank}``.
        targets: ``{module: Target}``.
        engine: The ``model_class`` of Nunchaku's own engine, None for another or none.
        lite: Whether a config says that diffusers' Nunchaku Lite made the file.
    """

    precision: Mapping[str, str] = field(default_factory=dict)
    rank: Mapping[str, int] = field(default_factory=dict)
    targets: Mapping[str, Target] = field(default_factory=dict)
    engine: str | None = None
    lite: bool = False

    def against(self, module: str, precision: str, rank: int) -> tuple[str, ...]:
        """What is said otherwise than a layer's tensors show it."""
        target = self.targets.get(module)
        said = dict(self.precision)
        ranks = dict(self.rank)
        if target is not None:
            # Of one layer it says more than what is said of the whole file.
            said = {target.where: target.precision} if target.precision else said
            ranks = {target.where: target.rank} if target.rank is not None else ranks
        notes = [
            f"{where} says {other}, but the tensors are {precision} and are believed"
            for where, other in said.items()
            if other != precision
        ]
        notes += [
            f"{where} says rank {other}, but the tensors have rank {rank} and are believed"
            for where, other in ranks.items()
            if other != rank
        ]
        return tuple(notes)

    def told(self) -> str:
        """All of it in one line, for reports."""
        parts = [f"{name} ({where})" for where, name in self.precision.items()]
        parts += [f"rank {rank} ({where})" for where, rank in self.rank.items()]
        if self.targets:
            places = sorted({target.where for target in self.targets.values()})
            parts.append(f"{len(self.targets)} layers named by {' and '.join(places)}")
        if self.engine:
            parts.append(f"model_class {self.engine}")
        return ", ".join(parts)


def read_hints(source: Source) -> Hints:
    """Read them.

    Raises:
        LowBitError: One is of the wrong type, or a manifest is of a version that is not known.
    """
    precision: dict[str, str] = {}
    rank: dict[str, int] = {}
    targets: dict[str, Target] = {}
    where = "the metadata's quantization_config"
    config = metadata_object(source, "quantization_config")
    _of_whole(source, config, where, precision, rank)
    if config.get("runtime_manifest") is not None:
        targets |= _manifest(source, _kind(source, config, "runtime_manifest", dict, where))
    lite = source.quantization_config.get("quant_method") == "nunchaku_lite"
    if lite:
        targets |= _lite(source)
    elif source.quantization_config:
        _of_whole(source, source.quantization_config, "config.json", precision, rank)
    for name in dict.fromkeys((source.path.name, *(file.name for file in source.files))):
        found = NAME.search(name)
        if found:
            precision["the file's name"] = PRECISIONS[found[1].lower()]
            rank["the file's name"] = int(found[2])
            break
    model_class = source.metadata.get("model_class", "")
    engine = model_class if model_class.startswith("Nunchaku") else None
    return Hints(precision, rank, targets, engine, lite)


def _of_whole(
    source: Source,
    config: Mapping[str, Any],
    where: str,
    precision: dict[str, str],
    rank: dict[str, int],
) -> None:
    """``weight`` and ``rank`` of a quantization config."""
    weight = _kind(source, config, "weight", (dict, type(None)), where) or {}
    name = _kind(source, weight, "dtype", (str, type(None)), f"{where}.weight")
    scales = weight.get("scale_dtypes", weight.get("scale_dtype"))
    scales = scales if isinstance(scales, list) else [scales]
    if name in PRECISIONS:
        micro = weight.get("group_size") == 32 or any("ue8m0" in str(one) for one in scales)
        found = PRECISIONS[name]
        precision[where] = "mxfp4" if found == "nvfp4" and micro else found
    if _kind(source, config, "rank", (int, type(None)), where) is not None:
        rank[where] = config["rank"]


def _manifest(source: Source, manifest: Mapping[str, Any]) -> dict[str, Target]:
    where = MANIFEST
    for key, wanted in (("schema", SCHEMA), ("version", 1), ("nunchaku_format_version", 1)):
        if manifest.get(key, 1) != wanted:
            raise LowBitError(
                "the runtime manifest is of a version that is not known",
                file=source.files[0],
                layer=f"__metadata__.quantization_config.runtime_manifest.{key}",
                found=repr(manifest.get(key)),
                expected=repr(wanted),
                remedy="update ComfyUI-LowBit, or get the checkpoint as another exporter writes it",
            )
    targets = {}
    for target in _kind(source, manifest, "targets", list, where):
        if not isinstance(target, dict):
            raise _wrong(source, f"{where}.targets", target, dict)
        module = _kind(source, target, "checkpoint_prefix", str, where)
        operation = _kind(source, target, "nunchaku_op", str, where)
        options = _kind(source, target, "op_options", (dict, type(None)), where) or {}
        splits = options.get("adanorm_splits", 0)
        adanorm = operation == "adanorm_awq_w4a16"
        if operation not in OPERATIONS or splits not in ((3, 6) if adanorm else (0,)):
            raise LowBitError(
                "the runtime manifest names an operation that is not known",
                file=source.files[0],
                layer=module,
                found=f"{operation}, adanorm_splits {splits!r}",
                expected=", ".join(OPERATIONS) + "; adanorm_splits 3 or 6 for the last",
                remedy="update ComfyUI-LowBit, or get the checkpoint as another exporter writes it",
            )
        targets[module] = Target(
            operation,
            where,
            None if operation != "svdq_w4a4" else PRECISIONS.get(target.get("precision")),
            _kind(source, target, "rank", int, where) if operation == "svdq_w4a4" else None,
            splits,
        )
    return targets


def _lite(source: Source) -> dict[str, Target]:
    where = "config.json's quantization_config"
    targets = {}
    for operation in LITE:
        section = _kind(source, source.quantization_config, operation, (dict, type(None)), where)
        if section is None:
            continue
        inside = f"{where}.{operation}"
        precision = _kind(source, section, "precision", (str, type(None)), inside)
        rank = _kind(source, section, "rank", (int, type(None)), inside)
        svdq = operation == "svdq_w4a4"
        for module in _kind(source, section, "targets", list, inside):
            if not isinstance(module, str):
                raise _wrong(source, f"{inside}.targets", module, str)
            targets[module] = Target(
                operation,
                where,
                PRECISIONS.get(precision) if svdq else None,
                rank if svdq else None,
            )
    return targets


def _kind(source: Source, data: Mapping[str, Any], key: str, kind, where: str) -> Any:
    """``data[key]``, checked to be of a type."""
    value = data.get(key)
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if not isinstance(value, kinds) or isinstance(value, bool):
        raise _wrong(source, f"{where}.{key}", value, kind)
    return value


def _wrong(source: Source, what: str, value: object, kind) -> LowBitError:
    kinds = kind if isinstance(kind, tuple) else (kind,)
    return LowBitError(
        "a setting of the quantization config is of the wrong type",
        file=source.files[0] if "config.json" not in what else source.path,
        layer=what,
        found=f"{value!r:.80} ({type(value).__name__})",
        expected=" or ".join(one.__name__ for one in kinds if one is not type(None)),
        remedy=REGET,
    )

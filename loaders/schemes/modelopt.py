"""NVIDIA ModelOpt's checkpoints to logical layers, every algorithm that it exports.

What a layer is, its own tensors tell (the table in :mod:`.modelopt_layers`); what the file declares
is checked against them (:mod:`.modelopt_hints`); the order of NVFP4's bytes, which tensors do not
tell, has rules of its own (:mod:`.modelopt_nvfp4`). Left out are quantizers of attention and of
key-value caches, which ComfyUI has no place for:

=======================  ============================================
``X.k_scale``, v_scale   scales of a cache or of FP8 attention
``X._quantizer...``      state of the quantizer that older exports leak
=======================  ============================================
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping

from ...quant.errors import LowBitError
from ..families.base import split_prefix
from ..header import DOWNLOAD_AGAIN
from ..source import Source, TensorInfo
from .base import Contents, Entry, SchemeOptions, ShapeOf
from .modelopt_fallbacks import fallback_set
from .modelopt_hints import ALGORITHMS, MIXED, REGET, Hints, read_hints
from .modelopt_layers import FLOATS, PARTS, SCALES, SMOOTHING, Layer, Place, PlainLayer, kind_of
from .modelopt_nvfp4 import LAYOUTS, Layout, Stored, decide_layout, padded

__all__ = ["read"]

RENAMED = {"weight_scale_inv": "weight_scale"}  # as block FP8 of other producers spells it
ATTENTION = ("k_scale", "v_scale", "q_scale", "p_scale", "output_scale")
CACHE = "scales of attention or of a key-value cache: ComfyUI's attention stays in 16 bits"
LEAKED = "state of ModelOpt's quantizer that its export left behind"
NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")  # of a block


def read(
    source: Source,
    shape_of: ShapeOf | None = None,
    options: SchemeOptions | None = None,
) -> Contents:
    """Logical tensors of a ModelOpt checkpoint.

    Args:
        source: The open checkpoint.
        shape_of: Shapes that the architecture gives, for layers that seem to be padded.
        options: What the user insists on.

    Raises:
        LowBitError: A layer lacks a tensor, contradicts itself or what is declared, or nothing
            tells the order of its bytes.
    """
    options = options or SchemeOptions()
    if options.nvfp4_layout not in ("auto", *LAYOUTS):
        raise LowBitError(
            "The setting nvfp4_layout has a value that it cannot have.",
            file=source.path,
            layer="nvfp4_layout",
            found=repr(options.nvfp4_layout),
            expected=", ".join(("auto", *LAYOUTS)),
            remedy="Set nvfp4_layout to auto.",
        )
    hints = read_hints(source)
    prefix, _ = split_prefix(source.tensors)
    ignored, places = _places(source)
    kinds = {name: kind_of(p) for name, p in places.items() if "weight_scale" in p.infos}
    declared = {name: hints.algorithm(name.removeprefix(prefix)) for name in kinds}
    layout = _layout(source, hints, places, kinds, declared, options)
    if not kinds:
        raise LowBitError(
            "The checkpoint is said to be ModelOpt's, but no layer is quantized.",
            file=source.path,
            layer="*.weight_scale",
            found=hints.told() or f"{len(source.tensors)} tensors",
            expected="weights with weight_scale beside them",
            remedy="Get the quantized checkpoint, or remove the config beside this one.",
        )
    layers: dict[str, Layer] = {}
    for name, kind in kinds.items():
        shape = shape_of(f"{name}.weight") if shape_of else None
        own = layout if kind.startswith("nvfp4") else None
        layers[name] = Layer(places[name], kind, declared[name], own, shape)
        _check_declared(source, hints, name, name.removeprefix(prefix), kind)
    return _contents(source, hints, prefix, places, layers, ignored, layout, shape_of is None)


def _places(source: Source) -> tuple[dict[str, str], dict[str, Place]]:
    """``({left-out name: reason}, {module: its tensors})`` of modules with more than a weight."""
    ignored: dict[str, str] = {}
    modules: dict[str, dict[str, TensorInfo]] = {}
    for name, info in source.tensors.items():
        module, _, suffix = name.rpartition(".")
        part = RENAMED.get(suffix, suffix)
        if "_quantizer." in name:
            ignored[name] = LEAKED
        elif suffix in ATTENTION:
            ignored[name] = CACHE
        elif part in modules.setdefault(module, {}):
            raise LowBitError(
                "A layer has a tensor twice, under two names.",
                file=info.file,
                layer=name,
                found=f"{modules[module][part].name} and {name}",
                expected="one of them",
                remedy=DOWNLOAD_AGAIN,
            )
        else:
            modules[module][part] = info
    places = {}
    for module in sorted(modules):
        infos = modules[module]
        place = Place(source, module, infos)
        own = [part for part in (*SCALES, *SMOOTHING) if part in infos]
        if "weight" not in infos:
            if own:
                raise place.error(
                    "A layer has scales but no weight.",
                    f"{', '.join(sorted(infos))} alone",
                    "weight beside them",
                    DOWNLOAD_AGAIN,
                    part=own[0],
                )
            continue
        codes = infos["weight"].dtype not in FLOATS
        if "weight_scale" not in infos and (codes or set(own) & set(SCALES)):
            raise place.error(
                "A layer's scale is missing.",
                f"weight {place.told('weight')} with {', '.join(own) or 'nothing'} beside it",
                "weight_scale",
                "Older exports kept the scales in a file of their own: export the model again, or "
                "get a newer copy.",
                part="weight_scale",
            )
        if not own:
            continue
        surplus = [part for part in infos if part not in PARTS]
        if surplus:
            raise place.error(
                "A layer has a tensor that nothing accounts for.",
                f"{surplus[0]} beside {', '.join(sorted(set(infos) - set(surplus)))}",
                f"only {', '.join(PARTS)}",
                part=surplus[0],
            )
        places[module] = place
    return ignored, places


def _layout(
    source: Source,
    hints: Hints,
    places: Mapping[str, Place],
    kinds: dict[str, str],
    declared: Mapping[str, str | None],
    options: SchemeOptions,
) -> Layout | None:
    """The order of NVFP4's bytes; sets the kinds of layers in groups of 32."""
    stored = {}
    for name, kind in kinds.items():
        if kind == "nvfp4":
            rows, width = places[name].shape("weight")
            group = 32 if ALGORITHMS.get(declared[name] or "") == ("nvfp4-32",) else 16
            scales = places[name].shape("weight_scale")
            stored[name] = Stored(name, rows, width * 2, scales, group)
    if not stored:
        if options.nvfp4_layout != "auto":
            raise LowBitError(
                "A layout of NVFP4 was asked for, but no layer is NVFP4.",
                file=source.path,
                layer="nvfp4_layout",
                found=", ".join(sorted(set(kinds.values()))) or "no quantized layer",
                expected="U8 weights with F8_E4M3 scales",
                remedy="Set nvfp4_layout to auto.",
            )
        return None
    layout = decide_layout(source, hints, list(stored.values()), options.nvfp4_layout)
    for name, found in stored.items():
        if (found.in_tiles() if layout.tiles else found.in_rows()) == 32:
            kinds[name] = "nvfp4-32"
    return layout


def _check_declared(source: Source, hints: Hints, name: str, plain: str, kind: str) -> None:
    """Every place that declares an algorithm for the layer must mean what its tensors are."""
    for place in hints.places:
        algorithm = place.of_layer(plain)
        if algorithm is None or algorithm == MIXED or kind in ALGORITHMS[algorithm]:
            continue
        raise LowBitError(
            f"The checkpoint contradicts itself: a layer is declared as {algorithm}, but stored as "
            f"{kind}.",
            file=source.path,
            layer=name,
            found=f"{algorithm} in {place.where}, {kind} by its tensors",
            expected=f"tensors of {' or '.join(ALGORITHMS[algorithm])}",
            remedy=f"{REGET}; if the weights are right, remove the quantization config",
        )


def _contents(
    source: Source,
    hints: Hints,
    prefix: str,
    places: Mapping[str, Place],
    layers: Mapping[str, Layer],
    ignored: Mapping[str, str],
    layout: Layout | None,
    alone: bool,
) -> Contents:
    sizes = {size for name, i in source.tensors.items() if name not in ignored for size in i.shape}
    entries: dict[str, Entry] = {}
    for name, layer in layers.items():
        entries[f"{name}.weight"] = _entry(layer, sizes if alone else set())
    plain = [place for name, place in places.items() if name not in layers]
    for place in plain:
        entries[f"{place.name}.weight"] = _plain_entry(place)
    for name, info in source.tensors.items():
        module, _, suffix = name.rpartition(".")
        if name in ignored or (module in places and suffix != "bias"):
            continue
        entries[name] = Entry(
            key=name,
            shape=tuple(info.shape),
            dtype=info.dtype,
            stored=(name,),
            nbytes=info.nbytes,
            read=lambda name=name: source.get(name),
        )
        layer = layers.get(module)
        if layer is not None and tuple(info.shape) != layer.spec.shape[:1]:
            raise layer.place.error(
                "A layer's bias does not fit its weight.",
                layer.place.told("bias"),
                f"[{layer.spec.rows}]",
                part="bias",
            )
    facts = _facts(source, hints, prefix, layers, plain, layout, entries)
    return Contents(entries, ignored, facts)


def _entry(layer: Layer, sizes: set[int]) -> Entry:
    place, spec = layer.place, layer.spec
    stored = [info for part, info in place.infos.items() if part != "bias"]
    return Entry(
        key=f"{place.name}.weight",
        shape=spec.shape,
        dtype=layer.format,
        stored=tuple(info.name for info in stored),
        nbytes=sum(info.nbytes for info in stored),
        parts=((spec, layer.wish),),
        doubtful=layer.layout is not None
        and any(
            size % multiple and padded(size, multiple) == full
            for size in sizes
            for full, multiple in zip(spec.shape, (16, 32), strict=True)
        ),
        read=layer.weight,
    )


def _plain_entry(place: Place) -> Entry:
    layer = PlainLayer(place)
    stored = [info for part, info in place.infos.items() if part != "bias"]
    extra = [part for part in SMOOTHING if part in place.infos]
    return Entry(
        key=f"{place.name}.weight",
        shape=place.shape("weight"),
        dtype="F32",
        stored=tuple(info.name for info in stored),
        nbytes=sum(info.nbytes for info in stored),
        notes=(f"{', '.join(extra)} of a layer in 16 bits folded into its weight",),
        read=layer.weight,
    )


def _facts(
    source: Source,
    hints: Hints,
    prefix: str,
    layers: Mapping[str, Layer],
    plain: list[Place],
    layout: Layout | None,
    entries: Mapping[str, Entry],
) -> dict[str, str]:
    formats = Counter(layer.format for layer in layers.values())
    rounds = Counter(layer.spec.activation is not None for layer in layers.values())
    names = [name.removeprefix(prefix) for name in layers]
    facts = {
        "declared": hints.told() or "nothing: told by the tensors alone",
        "formats": ", ".join(f"{name} x{count}" for name, count in formats.most_common()),
        "activations": ", ".join(
            f"{'rounded' if told else 'in 16 bits'} x{rounds[told]}"
            for told in (True, False)
            if rounds[told]
        ),
        "left in 16 bits": _left(entries, prefix),
    }
    if layout is not None:
        facts["nvfp4 layout"] = layout.told()
    if len({file.name for file in source.files}) == 1 and source.path.is_dir():
        facts["weights"] = source.files[0].name
    for place in hints.places:
        stale = [name for name in names if place.leaves_out(name)]
        listed = [name for name in place.layers if f"{prefix}{name}" not in layers]
        unlisted = [n for n in names if place.algorithm == MIXED and n not in place.layers]
        said = [
            f"{len(which)} layers such as {which[0]} {what}"
            for which, what in (
                (stale, "are said to be left out, but are quantized"),
                (listed, "are listed as quantized, but are not"),
                (unlisted, "are quantized, but not listed"),
            )
            if which
        ]
        if said:
            facts[f"stale in {place.where}"] = "; ".join(said) + ". The tensors are believed"
    return facts


def _left(entries: Mapping[str, Entry], prefix: str) -> str:
    """Modules with a float matrix, numbers of blocks put together, and the set that they are."""
    found = Counter(
        NUMBER.sub("*", key.removeprefix(prefix).removesuffix(".weight"), count=1)
        for key, entry in entries.items()
        if key.endswith(".weight") and not entry.parts and entry.shape and len(entry.shape) > 1
    )
    told = ", ".join(f"{name} x{n}" if n > 1 else name for name, n in sorted(found.items()))
    known = fallback_set(found)
    return f"{told} (SGLang's fallback set for {known})" if known else told

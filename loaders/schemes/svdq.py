"""SVDQuant checkpoints (Nunchaku, its relatives, ComfyUI-quants) to logical layers.

A layer ``X`` of N outputs and K inputs, rank r, in Nunchaku's packing (:mod:`...quant.svdq`):

=======================  ==========================  ===========================================
``X.qweight``            int8 ``[N, K/2]``           4-bit codes, two's complement or e2m1
``X.wscales``            16-bit ``[K/64, N]``        int4
..                       F8_E4M3 ``[K/16, N]``       nvfp4
..                       U8 ``[K/32, N]``            mxfp4, exponents (AutoRound)
``X.wtscale``            ``[1]``                     nvfp4: of the tensor; 1 without it
``X.wcscales``           ``[N]``                     of each output channel; 1 without it
``X.smooth``             ``[K]``                     what activations are divided by; as version 2
                                                     spells it, ``smooth_factor``
``X.lora_down``, ``up``  ``[K, r]``, ``[N, r]``      ``proj_down``, ``proj_up``; of raw activations
``X.bias``               ``[N]``                     of an unsigned layer: less ``shift_bias``
=======================  ==========================  ===========================================

Modulation layers are W4A16 (AWQ) or plain. Those of Nunchaku's engine keep the rows of their S
chunks interleaved, and 1 added to the bias of every scale:

=======================  ==========================  ===========================================
``X.qweight``            int32 ``[N/4, K/2]``        codes 0..15; also int16 ``[N/4, K]``
``X.wscales``, wzeros    16-bit ``[K/64, N]``        W = code * scale + zero; rows may be padded
=======================  ==========================  ===========================================

ComfyUI-quants writes both for comfy-kitchen, rows in order or in tiles, under a ``comfy_quant``
marker. No released ComfyUI reads them, and comfy-kitchen's own layout class gives another weight
to LoRAs and merges than its kernels multiply by: they are read here on every host.

=======================  ==========================  ===========================================
``X.weight``             int8 ``[N, K/2]``           or tiles ``[N/128, K/64, 32, 128]``
``X.weight_scale``       16-bit ``[K/64, N]``        or tiles ``[N/128, K/64, 128]``
``X.proj_down``, ``up``  ``[K, r]``, ``[N, r]``      up also in tiles ``[N/128, r, 128]``
``X.smooth_factor``      ``[K]``                     plain, as is the bias
``X.weight_zero``        16-bit ``[K/64, N]``        W4A16: W = (code - 8) * scale + zero
=======================  ==========================  ===========================================

In normal form the bias is that of the float layer, and modulation stands in the model's order.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from ...quant import svdq
from ...quant.errors import LowBitError
from ..detect import marked_layers
from ..families.base import split_prefix
from ..folder import TWO_FILES
from ..source import Source, TensorInfo
from .base import Contents, Entry, SchemeOptions, ShapeOf
from .svdq_hints import read_hints
from .svdq_layers import (
    FLOATS,
    MARKED,
    MARKED_PARTS,
    PARTS,
    REGET,
    SCALE_CHUNKS,
    W4A4,
    W4A16,
    Awq,
    File,
    Layer,
    Nunchaku,
    is_raised,
    lowered,
    order,
)

__all__ = ["read"]

CODES = ("I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64")
OWN = frozenset(("wscales", "wzeros", "wtscale", "wcscales", *PARTS, *PARTS.values()))
UNUSED = "smooth_orig: the smoothing before it was moved elsewhere; no engine reads it"

# Fused layers that only Nunchaku's engine (and adapters to it) has under these names.
ENGINE = re.compile(
    r"(?:single_)?transformer_blocks\.\d+\."
    r"(?:qkv_proj(?:_context)?|attn\.to_qkv|attn\.add_qkv_proj)"
)


def read(
    source: Source,
    shape_of: ShapeOf | None = None,
    options: SchemeOptions | None = None,
) -> Contents:
    """Logical tensors of an SVDQuant checkpoint.

    Args:
        source: The open checkpoint.
        shape_of: Shapes that the architecture gives, for layers that seem to be padded.
        options: What the user insists on.

    Raises:
        LowBitError: A layer lacks a tensor, contradicts itself, or cannot be what was asked for.
    """
    options = options or SchemeOptions()
    _check_options(source, options)
    marks = marked_layers(source)
    groups = _groups(source, marks)
    file = _file(source, groups, marks, options)
    layers: dict[str, Layer] = {}
    consumed: dict[str, str] = {}
    ignored: dict[str, str] = {}
    for module, (kind, infos) in groups.items():
        layer = kind(file, module, infos, shape_of(f"{module}.weight") if shape_of else None)
        layers[module] = layer
        for part, info in infos.items():
            consumed[info.name] = module
            if part == "smooth_orig":
                ignored[info.name] = UNUSED
    _check_rank(source, layers, options)
    _check_unsigned(source, layers, options)
    plain = {name: info for name, info in source.tensors.items() if name not in consumed}
    padded = _padded_sizes(plain) if shape_of is None else frozenset()
    entries: dict[str, Entry] = {}
    for module, layer in layers.items():
        entries.update(_entries(module, layer, padded))
    for name, info in plain.items():
        _refuse_orphan(source, marks, name, info)
        entries[name] = _plain_entry(file, name, info)
    return Contents(entries, ignored, _facts(file, layers))


def _check_options(source: Source, options: SchemeOptions) -> None:
    for name, allowed in (
        ("svdq_precision", ("auto", "int4", "nvfp4")),
        ("act_unsigned", ("auto", "on", "off")),
    ):
        if getattr(options, name) not in allowed:
            raise LowBitError(
                f"The setting {name} has a value that it cannot have.",
                file=source.path,
                layer=name,
                found=repr(getattr(options, name)),
                expected=", ".join(allowed),
                remedy=f"Set {name} to auto.",
            )


def _groups(
    source: Source, marks: Mapping[str, Mapping[str, Any]]
) -> dict[str, tuple[type[Layer], dict[str, TensorInfo]]]:
    """``{module: (kind, {part: TensorInfo})}`` of every layer that is stored in 4 bits."""
    modules: dict[str, dict[str, TensorInfo]] = {}
    for name, info in source.tensors.items():
        module, _, suffix = name.rpartition(".")
        modules.setdefault(module, {})[suffix] = info
    groups = {}
    for module in sorted(modules):
        suffixes = modules[module]
        marked = MARKED.get(marks[module]["format"]) if module in marks else None
        if marked is not None:
            kind, names = marked, MARKED_PARTS
        elif "qweight" in suffixes:
            codes = suffixes["qweight"].dtype
            awq = codes in ("I32", "I16") or (codes not in ("I8", "U8") and "wzeros" in suffixes)
            kind, names = (Awq if awq else Nunchaku), PARTS
        elif OWN & suffixes.keys():
            part = sorted(OWN & suffixes.keys())[0]
            raise LowBitError(
                "A layer's codes are missing.",
                file=suffixes[part].file,
                layer=f"{module}.qweight",
                found=f"{', '.join(sorted(suffixes))} alone",
                expected="qweight beside them",
                remedy=REGET,
            )
        else:
            continue
        infos: dict[str, TensorInfo] = {}
        for suffix, info in suffixes.items():
            part = names.get(suffix, suffix)
            if part in infos:
                raise LowBitError(
                    "A layer has a tensor twice, under two names.",
                    file=info.file,
                    layer=info.name,
                    found=f"{infos[part].name} and {info.name}",
                    expected="one of them",
                    remedy=REGET,
                )
            infos[part] = info
        groups[module] = kind, infos
    return groups


def _file(
    source: Source,
    groups: Mapping[str, Any],
    marks: Mapping[str, Mapping[str, Any]],
    options: SchemeOptions,
) -> File:
    """What is known of the file as a whole; refuses what no host has a model for."""
    prefix, _ = split_prefix(source.tensors)
    names = [name.removeprefix(prefix) for name in source.tensors]
    hints = read_hints(source)
    held = {file.name for file in source.files} & set(TWO_FILES)
    if len(held) == 1:
        (here,) = held
        (missing,) = set(TWO_FILES) - held
        raise LowBitError(
            "Half of the checkpoint is missing.",
            file=source.path,
            layer=missing,
            found=here,
            expected=" and ".join(TWO_FILES),
            remedy=f"Put {missing} of the same model into the folder beside {here}.",
        )
    if not groups:
        raise LowBitError(
            "The checkpoint is said to be SVDQuant's, but no layer is stored so.",
            file=source.path,
            layer="*.qweight",
            found=hints.told() or f"{len(names)} tensors, none of them 4-bit codes",
            expected="layers with qweight and wscales",
            remedy="Get the quantized checkpoint, or remove the config beside this one.",
        )
    modules = [m.removeprefix(prefix) for m, (kind, _) in groups.items() if kind is Nunchaku]
    fused = [module for module in modules if ENGINE.fullmatch(module)]
    engine = f"model_class {hints.engine}" if hints.engine else None
    if engine is None and fused:
        engine = f"fused layers such as {fused[0]}"
    gelu = any(name.startswith("single_transformer_blocks.") for name in names)
    return File(source, options, hints, marks, prefix, engine, gelu)


def _check_rank(source: Source, layers: Mapping[str, Layer], options: SchemeOptions) -> None:
    wanted = options.svdq_rank
    if wanted and not any(layer.spec.rank == wanted for layer in layers.values()):
        raise LowBitError(
            f"The rank {wanted} was asked for, but no layer has a low-rank branch.",
            file=source.path,
            layer=next(iter(layers)),
            found="rank 0 everywhere",
            expected=f"rank {wanted}",
            remedy="Set svdq_rank to 0.",
        )


def _check_unsigned(source: Source, layers: Mapping[str, Layer], options: SchemeOptions) -> None:
    """Asked for unsigned activations, some layer must have them."""
    if options.act_unsigned != "on":
        return
    if not any(isinstance(layer, W4A4) and layer.unsigned for layer in layers.values()):
        formats = ", ".join(sorted({layer.format for layer in layers.values()}))
        raise LowBitError(
            "Unsigned activations were asked for, but no layer can have them.",
            file=source.path,
            layer=next(iter(layers)),
            found=f"{formats}, no int4 layer that follows a GELU",
            expected="int4 layers behind a GELU, as FLUX, Chroma and Qwen-Image have them",
            remedy="Set act_unsigned to auto.",
        )


def _padded_sizes(plain: Mapping[str, TensorInfo]) -> frozenset[int]:
    """Sizes that a layer may have been padded to: the file's other tensors have a smaller one."""
    sizes = {size for info in plain.values() for size in info.shape}
    return frozenset(-(-size // 128) * 128 for size in sizes if size > 128 and size % 128)


def _entries(module: str, layer: Layer, padded: frozenset[int]) -> Iterator[tuple[str, Entry]]:
    parts = [info for part, info in layer.infos.items() if part not in ("bias", "smooth_orig")]
    yield (
        f"{module}.weight",
        Entry(
            key=f"{module}.weight",
            shape=layer.spec.shape,
            dtype=layer.format,
            stored=tuple(info.name for info in parts),
            nbytes=sum(info.nbytes for info in parts),
            parts=((layer.spec, layer.wish),),
            notes=layer.notes,
            doubtful=isinstance(layer, Nunchaku) and not padded.isdisjoint(layer.spec.shape),
            read=layer.weight,
        ),
    )
    if layer.has_bias:
        info = layer.infos.get("bias")
        yield (
            f"{module}.bias",
            Entry(
                key=f"{module}.bias",
                shape=(layer.spec.rows,),
                dtype=info.dtype if info else "F32",
                stored=(info.name,) if info else (),
                nbytes=info.nbytes if info else 0,
                read=layer.bias,
            ),
        )


def _plain_entry(file: File, name: str, info: TensorInfo) -> Entry:
    """A tensor as it is, or a modulation layer's brought to the model's order."""
    module, _, suffix = name.rpartition(".")
    chunks = file.chunks(module) if file.engine and suffix in ("weight", "bias") else 0
    notes: tuple[str, ...] = ()
    raised = False
    if chunks and info.shape[0] % chunks == 0:
        bias = file.source.tensors.get(f"{module}.bias")
        if bias is not None and bias.shape == info.shape[:1] and bias.dtype in FLOATS:
            raised, why = is_raised(file.source.get(bias.name), chunks)
            notes = (order(chunks if raised else 0, why),) if suffix == "weight" else ()

    def read() -> torch.Tensor:
        tensor = file.source.get(name)
        if not raised:
            return tensor
        tensor = svdq.deinterleave_rows(tensor, chunks)
        return lowered(tensor.float(), chunks) if suffix == "bias" else tensor

    return Entry(
        key=name,
        shape=tuple(info.shape),
        dtype=info.dtype,
        stored=(name,),
        nbytes=info.nbytes,
        notes=notes,
        read=read,
    )


def _refuse_orphan(source: Source, marks: Mapping, name: str, info: TensorInfo) -> None:
    """Codes with nothing to decode them. Layers of ComfyUI's own formats go to it untouched."""
    module, _, suffix = name.rpartition(".")
    if suffix != "weight" or info.dtype not in CODES or module in marks:
        return
    raise LowBitError(
        "A weight holds codes, but nothing beside it says how to decode them.",
        file=info.file,
        layer=name,
        found=f"{info.dtype}{list(info.shape)}",
        expected="a float weight, or qweight with its scales",
        remedy="The layer is of a scheme that is not known in these files. " + REGET,
    )


def _facts(file: File, layers: Mapping[str, Layer]) -> dict[str, str]:
    formats = Counter(
        f"{layer.format} (groups of {layer.spec.code_shape[2]})" for layer in layers.values()
    )
    ranks = Counter(layer.spec.rank for layer in layers.values() if isinstance(layer, W4A4))
    unsigned = sum(isinstance(layer, W4A4) and layer.unsigned for layer in layers.values())
    awq = Counter(layer.splits for layer in layers.values() if isinstance(layer, W4A16))
    orders = {0: "in the model's order"} | {n: f"interleaved by {n}" for n in SCALE_CHUNKS}
    return {
        "precision": ", ".join(f"{name} x{count}" for name, count in formats.most_common()),
        "low-rank branch": ", ".join(f"rank {rank} x{count}" for rank, count in ranks.items()),
        "unsigned activations": f"{unsigned} layers" if unsigned else "none",
        "W4A16 layers": ", ".join(f"{count} {orders[n]}" for n, count in sorted(awq.items())),
        "made for": f"Nunchaku's engine ({file.engine})" if file.engine else "",
        "the file says": file.hints.told(),
    }

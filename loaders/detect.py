"""Which on-disk scheme a checkpoint is in, told from its headers, configs and markers alone.

Three witnesses are heard. *Tensors*: which suffixes stand beside a weight (the table ``SIGNS``),
the ``comfy_quant`` markers, SDNQ's weight and scale pairs. *Configs*: ``quantization_config`` and
files that only one producer writes. *Metadata*: what a header declares. One scheme must come out;
witnesses that name two are an error, because every guess would load noise for one of them. No
witness at all means plain floating-point weights, which ComfyUI itself reads.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from ..quant.errors import LowBitError
from .source import Source, TensorInfo

__all__ = ["SCHEMES", "Detection", "detect_scheme", "marked_layers", "metadata_object"]

SCHEMES = (
    "sdnq",
    "svdq",
    "modelopt",
    "fp8",
    "modelslim",
    "bitsandbytes",
    "torchao",
    "quanto",
    "lowbit",
    "comfy",
)
MODEL_PREFIX = "model.diffusion_model."
MAX_MARKER = 65536  # bytes; real ones have about a hundred
SVDQ_FORMATS = ("svdquant_w4a4", "awq_w4a16")  # markers of formats that no host reads


@dataclass(frozen=True)
class Detection:
    """The scheme (one of ``SCHEMES``) and, in words, what it was told by."""

    scheme: str
    evidence: tuple[str, ...]


@dataclass(frozen=True)
class _Finding:
    scheme: str
    text: str
    by_tensors: bool  # the tensors themselves show it; False: a config or metadata says so


# Scheme -> (its name for people, what to do instead). Recognised, so that the message is right.
_OTHER = "get this model as SDNQ, as one of ComfyUI's own formats, or unquantized"
_REFUSED = {
    "nunchaku-encoder": (
        "Nunchaku's AWQ text encoder",
        "this is a text encoder and no diffusion model: choose the file of the transformer, and "
        "load the encoder in another format with a CLIP loader",
    ),
    "compressed-tensors": ("compressed-tensors", _OTHER),
    "gptq": ("GPTQ / AWQ", _OTHER),
    "mxfp4": ("MXFP4 blocks", _OTHER),
    "gguf": ("GGUF", "open it with the nodes of ComfyUI-GGUF (city96), or " + _OTHER),
    "hqqsvd": (
        "hqqsvd (written by kanttouchthis/ComfyUI-SDNQ, not by the sdnq package)",
        "open it with the pack that wrote it, or " + _OTHER,
    ),
    "hqq": ("HQQ", _OTHER),
}

# quant_method (or Nunchaku's "method") -> scheme.
_METHODS = {
    "sdnq": "sdnq",
    "sdnq_training": "sdnq",
    "svdquant": "svdq",
    "nunchaku": "svdq",
    "nunchaku_lite": "svdq",
    "modelopt": "modelopt",
    "modelopt_fp8": "modelopt",
    "modelopt_fp4": "modelopt",
    "modelslim": "modelslim",
    "ascend": "modelslim",
    "compressed-tensors": "compressed-tensors",
    "fp8": "fp8",
    "bitsandbytes": "bitsandbytes",
    "bitsandbytes_4bit": "bitsandbytes",
    "bitsandbytes_8bit": "bitsandbytes",
    "quanto": "quanto",
    "torchao": "torchao",
    "gptq": "gptq",
    "awq": "gptq",
    "auto-round": "gptq",
    "intel/auto-round": "gptq",
    "mxfp4": "mxfp4",
    "gguf": "gguf",
    "hqq": "hqq",
}

# Start of a file's name that only one producer gives -> scheme.
FILE_NAMES = {
    "quant_model_description": "modelslim",
    "quant_model_weight": "modelslim",
    "hf_quant_config": "modelopt",
}

# What stands under one prefix in the file -> scheme; the first row that fits a prefix wins.
SIGNS: tuple[tuple[str, frozenset[str]], ...] = tuple(
    (scheme, frozenset(suffixes.split()))
    for scheme, suffixes in (
        ("svdq", "qweight wscales"),
        ("nunchaku-encoder", "qweight scales scaled_zeros"),
        ("gptq", "qweight scales"),
        ("bitsandbytes", "absmax quant_map"),
        ("bitsandbytes", "bitsandbytes__nf4"),
        ("bitsandbytes", "bitsandbytes__fp4"),
        ("bitsandbytes", "weight SCB"),
        ("quanto", "_data _scale"),
        ("quanto", "_scale _shift"),
        ("torchao", "_weight_qdata"),
        ("hqqsvd", "nbits svd_up scale"),
        ("hqq", "W_q"),
        ("compressed-tensors", "weight_packed"),
        ("fp8", "weight weight_scale_inv"),
        ("modelslim", "weight weight_scale weight_offset"),
        ("modelslim", "weight deq_scale quant_bias"),
        ("modelslim", "mul_scale"),
        ("modelslim", "svd_lowrank_l1"),
        ("modelslim", "weight_dual_scale"),
        ("modelopt", "weight weight_scale"),
    )
)

_FLOATS = ("F16", "BF16", "F32", "F64")
# A weight of these means nothing without scales. Plain 8-bit floats do: ComfyUI casts them.
_CODES = ("U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64", "F4", "F6_E2M3", "F6_E3M2")


def detect_scheme(source: Source, override: str = "auto") -> Detection:
    """The scheme of ``source``; with an ``override``, that one, if nothing speaks against it.

    An override decides between a config and tensors that contradict each other, in favour of what
    the tensors show; it cannot make a file something that it shows no sign of.

    Raises:
        LowBitError: The evidence is contradictory, broken, or of a scheme that is not read (yet);
            or the override contradicts it.
    """
    if override != "auto" and override not in SCHEMES:
        display = _REFUSED.get(override, (override,))[0]
        raise LowBitError(
            f"the scheme {display} is not supported" if override in _REFUSED else "unknown scheme",
            file=source.path,
            found=repr(override),
            expected=f"auto, {', '.join(SCHEMES)}",
            remedy="set scheme to auto",
        )
    findings = [*_by_tensors(source), *_by_metadata(source), *_by_configs(source)]
    shown = {finding.scheme for finding in findings if finding.by_tensors}
    if shown & {"comfy", "lowbit"}:
        # Core's markers are the last word on a file made from a ModelOpt export: converters leave
        # the export's config beside the new file.
        findings = [f for f in findings if f.by_tensors or f.scheme != "modelopt"]
    elif any(f.scheme == "modelopt" for f in findings):
        # ModelOpt itself writes core's kind of metadata, over tensors that core would misread.
        findings = [f for f in findings if f.scheme != "comfy"]
    for other in ("modelslim", "fp8"):
        # Some of their layers are stored as ModelOpt's are; what stands beside them tells.
        if any(f.scheme == other for f in findings):
            findings = [_as_of(other, finding) for finding in findings]
            shown = {finding.scheme for finding in findings if finding.by_tensors}
    for host in ("lowbit", "svdq"):
        # Such files keep some layers in core's own formats.
        if host in shown:
            findings = [_within(host, finding) for finding in findings]
            shown.discard("comfy")
    named = dict.fromkeys(finding.scheme for finding in findings)
    said = "; ".join(finding.text for finding in findings)

    if override != "auto":
        against = set(shown if override in shown else named) - {override}
        if against or (override not in named and (named or override != "comfy")):
            raise LowBitError(
                f"the scheme {override} was asked for, but the checkpoint shows "
                f"{' and '.join(sorted(against)) or 'plain weights'}",
                file=source.path,
                found=said or "no sign of any quantization",
                expected=f"signs of {override}",
                remedy="set scheme to auto",
            )
        kept = [finding.text for finding in findings if finding.scheme == override]
        return Detection(override, (f"chosen by the user: {override}", *kept))

    if len(named) > 1:
        raise LowBitError(
            f"the checkpoint contradicts itself: {' and '.join(sorted(named))}",
            file=source.path,
            found=said,
            expected="signs of one scheme",
            remedy="weights and config are of different models: download both again"
            + (
                f", or set scheme to {next(iter(shown))} if the weights are right"
                if len(shown) == 1 and shown & set(SCHEMES)
                else ""
            ),
        )
    for scheme in named:
        if scheme in _REFUSED:
            display, remedy = _REFUSED[scheme]
            raise LowBitError(
                f"a checkpoint of the scheme {display} is not supported",
                file=source.path,
                found=said,
                expected=f"one of {', '.join(SCHEMES)}",
                remedy=remedy,
            )
        return Detection(scheme, tuple(finding.text for finding in findings))
    return Detection("comfy", (_plain(source),))


def _as_of(scheme: str, finding: _Finding) -> _Finding:
    if finding.scheme != "modelopt" or not finding.by_tensors:
        return finding
    return _Finding(scheme, finding.text.replace("modelopt", scheme), True)


def _within(host: str, finding: _Finding) -> _Finding:
    if finding.scheme != "comfy":
        return finding
    return _Finding(host, finding.text, finding.by_tensors)


def _plain(source: Source) -> str:
    """The evidence for plain weights. Raises where one holds codes with nothing to decode them."""
    dtypes: Counter[str] = Counter()
    for info in source.tensors.values():
        if info.name == "weight" or info.name.endswith(".weight"):
            if info.dtype in _CODES:
                raise LowBitError(
                    "a weight holds codes, but nothing in the checkpoint says how to decode them",
                    file=info.file,
                    layer=info.name,
                    found=f"{info.dtype} {list(info.shape)} without a scale or a marker",
                    expected="a scale tensor beside it, a config, or a float weight",
                    remedy="the file is incomplete or of an unknown scheme: check its origin",
                )
            dtypes[info.dtype] += 1
    kinds = ", ".join(f"{count} {dtype}" for dtype, count in dtypes.most_common())
    return f"no sign of any quantization: plain weights ({kinds or 'none named .weight'})"


# ------------------------------------------------------------------------------------- tensors


def _by_tensors(source: Source) -> Iterator[_Finding]:
    groups: dict[str, dict[str, TensorInfo]] = {}
    for name, info in source.tensors.items():
        prefix, _, suffix = name.rpartition(".")
        prefix = prefix.removesuffix(".quant_state")  # of bitsandbytes, about what it stands beside
        groups.setdefault(prefix, {})[suffix] = info
    markers, layers = _markers(source), _metadata_layers(source)
    yield from _formats_found(markers, "layers with a comfy_quant marker", True)
    yield from _formats_found(layers, "layers in the metadata _quantization_metadata", False)
    old_fp8 = [p for p, group in groups.items() if "scaled_fp8" in group]
    if old_fp8:
        yield _Finding("comfy", "the marker scaled_fp8 of ComfyUI's older FP8 files", True)
    hits: dict[str, list[str]] = {}
    for prefix, group in groups.items():
        # Core reads the metadata's names after it has cut off a checkpoint's prefix.
        if prefix in markers or prefix in layers or prefix.removeprefix(MODEL_PREFIX) in layers:
            continue
        scheme = next((s for s, suffixes in SIGNS if suffixes <= group.keys()), None)
        if scheme is None and _is_sdnq(group):
            scheme = "sdnq"
        if scheme is None and "scale_weight" in group and not old_fp8:
            raise LowBitError(
                "a layer has an FP8 scale, but the marker scaled_fp8 is missing",
                file=source.path,
                layer=prefix,
                found="scale_weight",
                expected="a tensor scaled_fp8, without which ComfyUI would ignore the scale",
                remedy="get the model from its origin again: this copy lost a tensor",
            )
        if scheme is not None:
            hits.setdefault(scheme, []).append(prefix)
    for scheme, prefixes in hits.items():
        suffixes = sorted(groups[prefixes[0]].keys() - {"bias"})
        yield _Finding(
            scheme,
            f"{len(prefixes)} layers as {scheme} stores them, such as {prefixes[0]} with "
            f"{', '.join(suffixes)}",
            True,
        )


def _is_sdnq(group: dict[str, TensorInfo]) -> bool:
    """Whether a module's ``weight`` and ``scale`` are a pair as sdnq writes it."""
    weight, scale = group.get("weight"), group.get("scale")
    if weight is None or scale is None:
        return False
    if weight.dtype not in _FLOATS:
        return scale.dtype in _FLOATS or "scale_2" in group
    # A float weight with a scale may be a layer that simply has such a parameter; sdnq's scale of
    # a 16-bit weight has the weight's rank, and 1 where it is shared.
    return scale.dtype in _FLOATS and len(scale.shape) >= 2 and 1 in scale.shape


def _formats_found(entries: dict[str, dict], what: str, by_tensors: bool) -> Iterator[_Finding]:
    formats: dict[str, Counter[str]] = {}
    for entry in entries.values():
        name = entry["format"]
        scheme = (
            "lowbit" if name.startswith("lowbit_") else "svdq" if name in SVDQ_FORMATS else "comfy"
        )
        formats.setdefault(scheme, Counter())[name] += 1
    for scheme in ("lowbit", "svdq", "comfy"):
        if scheme in formats:
            words = ", ".join(f"{count} {name}" for name, count in sorted(formats[scheme].items()))
            yield _Finding(scheme, f"{what}: {words}", by_tensors)


def marked_layers(source: Source) -> dict[str, dict]:
    """``{module: its marker}``, as the tensors or else the metadata have it.

    Raises:
        LowBitError: A marker is broken.
    """
    told = _metadata_layers(source)
    prefixed = {MODEL_PREFIX + layer: entry for layer, entry in told.items()}
    return {**prefixed, **told, **_markers(source)}


def _metadata_layers(source: Source) -> dict[str, dict]:
    """Module -> marker by the headers' ``_quantization_metadata``.

    Without ``layers`` it is a ModelOpt config that some converters put there, and marks nothing.
    """
    layers = metadata_object(source, "_quantization_metadata").get("layers")
    if not isinstance(layers, dict):
        return {}
    for layer, entry in layers.items():
        _check_format(source, layer, entry)
    return layers


def _markers(source: Source) -> dict[str, dict]:
    """Module -> marker by the ``comfy_quant`` tensors (uint8, JSON text, maybe padded by NULs)."""
    markers: dict[str, dict] = {}
    for name, info in source.tensors.items():
        prefix, _, suffix = name.rpartition(".")
        if suffix != "comfy_quant":
            continue
        if info.dtype not in ("U8", "I8") or info.nbytes > MAX_MARKER:
            raise LowBitError(
                "the comfy_quant marker is not a text",
                file=info.file,
                layer=prefix,
                found=f"{info.dtype} {list(info.shape)}",
                expected="U8, the bytes of a small JSON object",
                remedy="get the model from its origin again, or convert it again",
            )
        raw = source.get(info.name).numpy().tobytes().rstrip(b"\0")
        try:
            entry = json.loads(raw.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise LowBitError(
                "the comfy_quant marker is broken",
                file=info.file,
                layer=prefix,
                found=str(error),
                expected='{"format": ...} in UTF-8',
                remedy="get the model from its origin again, or convert it again",
            ) from error
        _check_format(source, prefix, entry)
        markers[prefix] = entry
    return markers


def _check_format(source: Source, layer: str, entry: object) -> None:
    name = entry.get("format") if isinstance(entry, dict) else None
    if not isinstance(name, str) or not name:
        raise LowBitError(
            "a layer is marked as quantized, but not in which format",
            file=source.path,
            layer=layer,
            found=f"{entry!r:.80}",
            expected='{"format": "float8_e4m3fn"} or another format of ComfyUI',
            remedy="get the model from its origin again, or convert it again",
        )


# -------------------------------------------------------------------------- metadata and configs


def metadata_object(source: Source, key: str) -> dict:
    """A JSON object kept as text in the headers' metadata; empty without one."""
    text = source.metadata.get(key)
    if text is None:
        return {}
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        value = error
    if not isinstance(value, dict):
        raise LowBitError(
            "the header's metadata is broken",
            file=source.files[0],
            layer=f"__metadata__.{key}",
            found=f"{value!s:.200}",
            expected="a JSON object as text",
            remedy="get the model from its origin again, or convert it again",
        )
    return value


def _by_metadata(source: Source) -> Iterator[_Finding]:
    model_class = source.metadata.get("model_class", "")
    if model_class.startswith("Nunchaku"):
        scheme = "nunchaku-encoder" if "Encoder" in model_class else "svdq"
        yield _Finding(scheme, f"metadata: model_class {model_class}", False)
    yield from _declared(source, metadata_object(source, "quantization_config"), "metadata")
    layered = metadata_object(source, "_quantization_metadata")
    if layered and not isinstance(layered.get("layers"), dict):
        yield from _declared(source, layered, "metadata _quantization_metadata")


def _by_configs(source: Source) -> Iterator[_Finding]:
    where = next(
        (f.name for f in source.configs if f.name == "quantization_config.json"), "config.json"
    )
    yield from _declared(source, source.quantization_config, where)
    for name in sorted({*source.beside, *(file.name for file in source.files)}):
        scheme = next((s for start, s in FILE_NAMES.items() if name.startswith(start)), None)
        if scheme:
            yield _Finding(scheme, f"the file {name}", False)


def _declared(source: Source, config: dict, where: str) -> Iterator[_Finding]:
    """What a quantization config declares. Raises on a method that nobody here knows."""
    if not config:
        return
    method = config.get("quant_method", config.get("method"))
    producer = config.get("producer")
    if isinstance(method, str) and method.lower() in _METHODS:
        scheme = _METHODS[method.lower()]
        if scheme == "compressed-tensors" and config.get("format") == "float-quantized":
            scheme = "fp8"
        version = config.get("sdnq_version")
        note = f", sdnq_version {version}" if version is not None else ""
        yield _Finding(scheme, f"{where}: quant_method {method}{note}", False)
    elif method is None and ("runtime_manifest" in config or "svdq_w4a4" in config):
        yield _Finding("svdq", f"{where}: a list of SVDQuant layers", False)
    elif method is None and "weights_dtype" in config:
        yield _Finding("sdnq", f"{where}: weights_dtype {config['weights_dtype']}", False)
    elif method is None and (
        "quant_algo" in config
        or (isinstance(producer, dict) and producer.get("name") == "modelopt")
    ):
        yield _Finding("modelopt", f"{where}: quant_algo {config.get('quant_algo')}", False)
    elif method is None and (config.get("load_in_4bit") or config.get("load_in_8bit")):
        yield _Finding("bitsandbytes", f"{where}: load_in_4bit or load_in_8bit", False)
    else:
        raise LowBitError(
            "the quantization config names an unknown method",
            file=source.path / where if where in source.beside else source.path,
            layer=None if where.endswith(".json") else where,
            found=f"quant_method {method!r:.80}" if method is not None else "no quant_method",
            expected=f"one of {', '.join(sorted(_METHODS))}",
            remedy="this scheme is not supported: get the model in another one, or unquantized",
        )

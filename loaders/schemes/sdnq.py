"""SDNQ checkpoints (Disty0/sdnq, every release from October 2025 on) to logical layers.

Stored tensors of a quantized module ``X`` (O output channels, I inputs, G groups, b bits):

==================  ======================================================  =====================
``X.weight``        packed words, or raw ``[O, I]``, ``[O, G, I/G]``, or    by ``weights_dtype``
                    transposed ``[I, O]`` for quantized matmul, with a
                    convolution's kernel in I; up to 0.1.3 packed words
                    of transposed codes as well
``X.scale``         ``[O, G, 1]``, ``[O, 1]``, ``[1, 1]``, ``[1, O]``;      F32, BF16, F16, or
                    convolutions ``[O, 1, kh, kw]``, ``[O, G, 1, kh, kw]``; coded (``scale_2``)
                    a codebook has its ``2^b`` levels where the reduced
                    axis has 1
``X.zero_point``    as ``scale``; unsigned formats only                     as ``scale``
``X.svd_up/down``   ``[O, r]``, ``[r, I]``, or both transposed              BF16, F32
``X.scale_2`` ...   one factor (or ``2^b`` levels) of the coded scale       F32
==================  ======================================================  =====================

The files tell no logical shape: it is found from the scales and the number of codes. The
configuration is a hint that is checked against the tensors. Everything is brought to the normal
form of :mod:`...kernels.spec`, so that nothing below knows that SDNQ exists.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ...kernels.reference import decode, unpack
from ...kernels.spec import CodeFormat, WeightSpec
from ...quant.dtypes import get_format
from ...quant.errors import LowBitError
from ...quant.packing import pack
from ...quant.weight import QuantizedWeight
from ..source import Source, TensorInfo
from .base import Contents, Entry, ShapeOf

__all__ = ["Config", "read"]

PARTS = (
    "scale",
    "zero_point",
    "svd_up",
    "svd_down",
    "scale_2",
    "scale_zero_point",
    "zero_point_scale",
    "zero_point_2",
)
NEEDS_SCALE = PARTS[1:]

STORED = {
    torch.uint8: ("U8",),
    torch.int8: ("I8",),
    torch.int16: ("I16",),
    torch.uint16: ("U16",),
    torch.int32: ("I32",),
    torch.uint32: ("U32",),
    torch.float16: ("F16",),
    torch.bfloat16: ("BF16",),
    torch.float32: ("F32",),
    torch.float8_e4m3fn: ("F8_E4M3",),
    torch.float8_e5m2: ("F8_E5M2",),
    torch.float8_e4m3fnuz: ("F8_E4M3FNUZ",),
    torch.float8_e5m2fnuz: ("F8_E5M2FNUZ",),
    torch.float8_e8m0fnu: ("F8_E8M0",),
}
"""Safetensors' name of each word dtype."""

FLOATS = ("F64", "F32", "F16", "BF16")
UNTOLD = "no config: the number format is told by the tensors, and no Hadamard rotation is assumed"
REGET = "Get the checkpoint from its source again, or make it again with sdnq."


# ----------------------------------------------------------------------------- configuration


class Config:
    """``quantization_config`` of a checkpoint, resolved for each layer.

    Args:
        data: The JSON object; empty where the checkpoint has none.
        file: For messages.

    Raises:
        LowBitError: A value is of the wrong type.
    """

    KINDS = {  # noqa: RUF012 - a table
        "weights_dtype": str,
        "scale_dtype": (str, type(None)),
        "zero_point_dtype": (str, type(None)),
        "quantized_matmul_dtype": (str, type(None)),
        "group_size": int,
        "hadamard_group_size": int,
        "use_svd": bool,
        "use_hadamard": bool,
        "use_codebook": bool,
        "use_codebook_scale": bool,
        "use_quantized_matmul": bool,
        "use_quantized_matmul_conv": bool,
        "quant_conv": bool,
        "modules_dtype_dict": dict,
        "modules_quant_config": dict,
        "modules_to_not_use_matmul": list,
        "modules_to_not_convert": list,
    }

    def __init__(self, data: Mapping[str, Any], file: Path) -> None:
        self.file = file
        self.data = {k: v for k, v in data.items() if v is not None or k in ("scale_dtype",)}
        for key, kind in self.KINDS.items():
            value = self.data.get(key)
            if value is not None and not isinstance(value, kind):
                self._wrong(key, value, kind)
        for key in ("modules_dtype_dict", "modules_quant_config"):
            inner = list if key == "modules_dtype_dict" else dict
            for name, value in self.data.get(key, {}).items():
                if not isinstance(value, inner):
                    self._wrong(f"{key}[{name!r}]", value, inner)

    def _wrong(self, key: str, value: object, kind) -> None:
        kinds = kind if isinstance(kind, tuple) else (kind,)
        raise LowBitError(
            "A setting of the quantization config is of the wrong type.",
            file=self.file,
            layer=f"quantization_config.{key}",
            found=f"{value!r} ({type(value).__name__})",
            expected=" or ".join(k.__name__ for k in kinds),
            remedy=REGET,
        )

    @cached_property
    def version(self) -> tuple[int, ...]:
        """``sdnq_version``; (0,) for files from before the key existed."""
        text = str(self.data.get("sdnq_version", "0"))
        return tuple(int(n) for n in re.findall(r"\d+", text)[:3]) or (0,)

    @property
    def subnormals(self) -> bool:
        """Whether own floats have subnormals: since 0.2.2. A missing config reads as a new one."""
        return not self.data or self.version >= (0, 2, 2)

    def for_layer(self, module: str) -> dict[str, Any]:
        """Settings of one module after every override."""
        name = f"{module}.weight"
        settings = {key: self.data.get(key) for key in self.KINDS if not key.startswith("modules_")}
        override = self._match(name, self.data.get("modules_quant_config", {}))
        if override is not None:
            settings |= self.data["modules_quant_config"][override]
        by_dtype = self.data.get("modules_dtype_dict", {})
        for key, names in by_dtype.items():
            if self._match(name, names) is not None:
                settings["weights_dtype"] = self._minimum(settings["weights_dtype"], str(key), name)
                break
        if self._match(name, self.data.get("modules_to_not_use_matmul", [])) is not None:
            settings["use_quantized_matmul"] = False
        return settings

    def _match(self, name: str, entries) -> str | None:
        """First entry that names a parameter (sdnq.md 1.8)."""
        parts = name.split(".")
        for entry in entries:
            if not isinstance(entry, str):
                self._wrong("modules_*", entry, str)
            if entry.startswith("."):
                if name.startswith(entry[1:]):
                    return entry
            elif name == entry or entry in parts:
                return entry
            elif "*" in entry:
                try:
                    if re.match(entry.replace(".*", "\\.*").replace("*", ".*"), name):
                        return entry
                except re.error:
                    self._wrong("modules_*", entry, str)
        return None

    def _minimum(self, base: str | None, key: str, name: str) -> str:
        """A dtype key: a name, or a least width such as "minimum_6bit" or "minimum_uint4"."""
        key = key.lower()
        if not (key.startswith("minimum") or key.endswith(("bit", "bits"))):
            return key
        match = re.fullmatch(r"(?:minimum)?[-_]?(u?)(?:int)?(\d+)[-_]?(?:bits?)?", key)
        if match is None:
            raise LowBitError(
                "A key of modules_dtype_dict is not a dtype.",
                file=self.file,
                layer=name,
                found=key,
                expected='a dtype such as "int5", or a least width such as "minimum_6bit"',
                remedy=REGET,
            )
        unsigned, bits = match[1] == "u", int(match[2])
        if base is not None and get_format(base).bits >= bits:
            return base
        return f"uint{bits}" if unsigned or bits <= 4 else f"int{bits}"


# ---------------------------------------------------------------------------------- layers


class _Form(NamedTuple):
    """How a weight is stored: all shapes as before transposing, the reduced axis of ``scale`` 1."""

    shape: tuple[int, ...]
    codes: tuple[int, ...]
    scale: tuple[int, ...]
    axis: int | None  # the reduced one, where a codebook has its levels
    transposed: bool


@dataclass(frozen=True)
class _Layer:
    """One quantized module while its shape is being found."""

    name: str
    infos: Mapping[str, TensorInfo]  # {suffix: info}
    settings: Mapping[str, Any]
    config: Config
    expected: tuple[int, ...] | None  # shape that the architecture gives

    def error(self, what: str, found: object, expected: object, remedy: str = REGET, part=""):
        layer = f"{self.name}.{part}" if part else self.name
        return LowBitError(
            what,
            file=self.infos[part].file if part in self.infos else self.config.file,
            layer=layer,
            found=found,
            expected=expected,
            remedy=remedy,
        )

    def shape(self, suffix: str) -> tuple[int, ...]:
        return tuple(self.infos[suffix].shape)

    @cached_property
    def format(self) -> CodeFormat:
        """Code format: the config's word, checked against the stored words."""
        name = self.settings.get("weights_dtype")
        if name is None:
            return self._inferred()
        try:
            format_ = get_format(name, subnormals=self.config.subnormals)
        except LowBitError as error:
            raise error.located(file=self.config.file, layer=self.name) from None
        scale = self.shape("scale")
        convolution = len(scale) > 3 or (len(scale) == 3 and scale[1] == 1)
        if convolution and format_.bits < 4 and self.config.version < (0, 1, 3):
            format_ = get_format("uint4")  # whatever the config says, at that time
        stored = self.infos["weight"].dtype
        allowed = STORED[format_.word] + (("I64",) if format_.bits == 1 else ())
        if stored not in allowed:
            raise self.error(
                "A layer's stored type contradicts the quantization config.",
                f"{stored} words",
                f"{' or '.join(allowed)} words of {format_.name}",
                part="weight",
            )
        if format_.kind in ("uint",) or (format_.kind == "float" and not format_.signed):
            return format_
        if "zero_point" in self.infos:
            raise self.error(
                "A layer has a zero point, which its signed format has no use for.",
                f"zero_point{list(self.shape('zero_point'))} beside {format_.name}",
                "no zero_point, or an unsigned format",
            )
        return format_

    def _inferred(self) -> CodeFormat:
        """Code format of a file without config, where the tensors tell it beyond doubt."""
        stored, shape = self.infos["weight"].dtype, self.shape("weight")
        asymmetric = "zero_point" in self.infos
        raw = {dtype: code for code, (dtype, *_) in STORED.items()}
        name = None
        if math.prod(self.shape("scale")) == 1 and len(set(shape)) == 1:
            pass  # a square matrix under one scale: it may be stored transposed
        elif stored in ("I8", "F8_E4M3", "F8_E5M2", "F16") and not asymmetric:
            name = str(raw[stored]).removeprefix("torch.")
        elif stored == "U8" and asymmetric and len(shape) == len(self.shape("scale")) > 1:
            rows = self.shape("scale")[0]
            name = "uint8" if shape[0] == rows or self.shape("scale")[0] == 1 else None
        if name is None and stored == "U8" and asymmetric:
            name = self._inferred_packed(shape)
        if name is None:
            raise self.error(
                "Without its config a file of packed codes does not tell its number format.",
                f"{stored}{list(shape)}, no weights_dtype",
                "config.json or quantization_config.json beside the weights",
                "Put the checkpoint's config.json (or quantization_config.json) into a folder with "
                "the weights file named diffusion_pytorch_model.safetensors, and open the folder.",
                part="weight",
            )
        return get_format(name, subnormals=self.config.subnormals)

    def _inferred_packed(self, shape: tuple[int, ...]) -> str | None:
        """uint2..7 with a zero point: the one width whose automatic group size fits."""
        scale = self.shape("scale")
        if len(scale) != 3 or scale[2] != 1:
            return None
        words = math.prod(shape)
        fits = []
        for bits in range(2, 8):
            format_ = get_format(f"uint{bits}")
            columns = 1 if len(shape) == 1 else shape[1]
            if (bits in (2, 4)) != (len(shape) == 1) or columns != (
                1 if bits in (2, 4) else format_.block_words
            ):
                continue
            values = words // format_.block_words * format_.block_values
            group = values / (scale[0] * scale[1])
            automatic = 2 ** (2 + bits + ("svd_up" in self.infos))
            if group == automatic:
                fits.append(format_.name)
        return fits[0] if len(fits) == 1 else None

    @cached_property
    def values(self) -> int:
        """Number of codes that the words hold."""
        words = math.prod(self.shape("weight"))
        if words % self.format.block_words:
            raise self.error(
                "A layer's words are no whole number of blocks.",
                f"{words} words",
                f"a multiple of {self.format.block_words} for {self.format.name}",
                part="weight",
            )
        return words // self.format.block_words * self.format.block_values

    @cached_property
    def codebook(self) -> bool:
        """Unsigned codes without a zero point index a codebook."""
        unsigned = not self.format.signed and self.format.kind != "native"
        return unsigned and "zero_point" not in self.infos

    @cached_property
    def outputs(self) -> int | None:
        """Output channels as the tensors beside the codes tell them."""
        if "bias" in self.infos:
            return self.shape("bias")[0]
        if "svd_up" in self.infos and "svd_down" in self.infos:
            up, down = self.shape("svd_up"), self.shape("svd_down")
            if len(up) == len(down) == 2:
                if up == down[::-1]:  # a square layer in either orientation: its rank is less
                    return max(up)
                return up[0] if up[1] == down[0] else up[1]
        return None

    @cached_property
    def scale_values(self) -> int:
        """Number of scales (or levels) after decoding."""
        return self._decoded_numel("scale", "scale_2", "scale_dtype")

    def _decoded_numel(self, suffix: str, factor: str, setting: str) -> int:
        numel = math.prod(self.shape(suffix))
        if factor not in self.infos:
            return numel
        format_ = self.coded_format(setting)
        return numel // format_.block_words * format_.block_values

    def coded_format(self, setting: str) -> CodeFormat:
        """Format of a coded scale or zero point."""
        name = self.settings.get(setting)
        if name in (None, "none") and setting == "zero_point_dtype":
            name = self.settings.get("scale_dtype")
        if name in (None, "none"):
            raise self.error(
                "A layer's scales are coded, but the config does not name their format.",
                f"{setting} {name!r}",
                "the name of a number format",
            )
        try:
            return get_format(name)
        except LowBitError as error:
            raise error.located(file=self.config.file, layer=self.name) from None

    @cached_property
    def told_scale_shape(self) -> tuple[int, ...] | None:
        """Shape of the scale as upstream had it, None where packing it lost its shape."""
        for suffix, factor, setting in (
            ("scale", "scale_2", "scale_dtype"),
            ("zero_point", "zero_point_scale", "zero_point_dtype"),  # it has the same shape
        ):
            if suffix in self.infos and (
                factor not in self.infos or not self.coded_format(setting).packed
            ):
                return self.shape(suffix)
        return None

    @cached_property
    def scale_shape(self) -> tuple[int, ...]:
        """Shape of the decoded scale as upstream had it (levels on the reduced axis)."""
        if self.told_scale_shape is not None:
            return self.told_scale_shape
        count = self.scale_values
        levels = 2**self.format.bits if self.codebook else 1
        if count == levels:
            return (levels,) if self.codebook else (1, 1)
        weight = () if self.format.packed else self.shape("weight")
        grouped = len(weight) in (3, 5) and count == math.prod(weight) // weight[2] * levels
        outputs = weight[0] if weight else self.outputs
        kernel = weight[3:] if grouped else weight[2:]
        if outputs is None:
            raise self._unknown_shape()
        groups, rest = divmod(count, outputs * math.prod(kernel) * levels)
        if rest or groups < 1:
            if self.settings.get("quant_conv"):
                raise self._unknown_shape()
            raise self.error(
                "A layer's number of scales does not fit its rows.",
                f"{count} scales for {outputs} rows",
                "a whole number of groups in each row",
                part="scale",
            )
        if groups == 1:
            return (outputs, levels, *kernel)
        return (outputs, groups, levels, *kernel)

    def _unknown_shape(self) -> LowBitError:
        return self.error(
            "A layer's shape cannot be told from its tensors, and its architecture is unknown.",
            f"weight{list(self.shape('weight'))} with scale{list(self.shape('scale'))}",
            "a scale for each row, a bias, or a known model family",
            "Open the whole component folder with its config.json, or quantize the model again "
            "with group_size 0.",
        )

    def resolve(self) -> tuple[WeightSpec, tuple[int, ...], bool]:
        """``(spec, scale shape to broadcast, transposed)``."""
        form = self._guess() if self.expected is None else self._told(self.expected)
        shape, code_shape, flat, axis, transposed = form
        if axis == 0:
            raise self.error(
                "A transposed convolution has a codebook, which no diffusion model needs.",
                f"scale{list(self.shape('scale'))}",
                "a codebook for each row or group of another kind of layer",
                "Quantize the model again without use_codebook or without quant_conv.",
            )
        if "bias" in self.infos and self.shape("bias")[0] not in shape[:2]:
            raise self.error(
                "A layer's bias does not fit its rows.",
                f"bias of {self.shape('bias')[0]}",
                f"{shape[0]}",
                part="bias",
            )
        block, basis = self._hadamard(shape)
        spec = WeightSpec(
            format=self.format,
            shape=shape,
            code_shape=code_shape,
            hadamard=block,
            hadamard_basis=basis,
            rank=self._rank(shape),
            codebook=self.codebook,
        )
        levels = flat if axis is None else (*flat[:axis], 2**self.format.bits, *flat[axis + 1 :])
        return spec, levels, transposed

    def _guess(self) -> _Form:
        """The form that the stored tensors tell by themselves."""
        axis, scale = self._level_axis()
        flat = scale if axis is None else (*scale[:axis], 1, *scale[axis + 1 :])
        if self.format.packed:
            code_shape, transposed = self._packed_code_shape(flat)
        else:
            code_shape, transposed = self._raw_code_shape(flat)
        if transposed:
            flat = flat[::-1]
        self._check_broadcast(flat, code_shape)
        return _Form(self._logical(flat, code_shape), code_shape, flat, axis, transposed)

    @property
    def doubtful(self) -> bool:
        """Whether the guess may take one kind of layer for another.

        A convolution for quantized matmul is stored as a matrix, and tensor-wise levels and packed
        scales tell nothing of a kernel. Several axes may be as long as a codebook has levels.
        """
        if self.expected is not None:
            return False
        levels, scale = 2**self.format.bits, self.told_scale_shape
        if self.codebook and scale is not None and scale[1:].count(levels) > 1:
            return True
        if self.config.data and not self.settings.get("quant_conv"):
            return False
        if self.format.packed:
            return scale is None or len(scale) == 1
        if len(self.shape("weight")) != 2:
            return False
        flattened = not self.config.data or self.settings.get("use_quantized_matmul_conv")
        return scale is None or len(scale) == 1 or (scale[0] == 1 and bool(flattened))

    def _told(self, shape: tuple[int, ...]) -> _Form:
        """The form that a layer of this shape is stored in."""
        levels = 2**self.format.bits if self.codebook else 1
        stored, told = self.shape("weight"), self.told_scale_shape
        for form in self._forms(shape):
            scale = form.scale[::-1] if form.transposed else form.scale
            if self.codebook:
                one = math.prod(scale) == 1
                scale = (levels,) if one else (*scale[: form.axis], levels, *scale[form.axis + 1 :])
            if told != scale and (told is not None or math.prod(scale) != self.scale_values):
                continue
            codes = form.codes[::-1] if form.transposed else form.codes
            if stored == codes or (self.format.packed and self.values == math.prod(codes)):
                return form if self.codebook else form._replace(axis=None)
        raise self.error(
            "A layer's shape is not the one its architecture has.",
            f"weight{list(stored)} ({self.values} codes) with scale{list(self.shape('scale'))}",
            list(shape),
            part="weight",
        )

    def _forms(self, shape: tuple[int, ...]) -> Iterator[_Form]:
        """Every form that upstream stores a layer of this logical shape in."""
        rows, columns, *kernel = shape
        flat = (rows, math.prod(shape[1:]))
        transposed = _Form(shape, flat, (rows, 1), 1, True)
        tensorwise = _Form(shape, shape, (1,) * len(shape), 1, False)
        turned = _Form(shape, flat, (1, 1), 1, True)
        yield _Form(shape, shape, (rows, 1, *kernel), 1, False)
        yield transposed
        # A square matrix fits both ways: the config decides, by the order.
        yield from (turned, tensorwise) if self._stored_for_matmul(shape) else (tensorwise, turned)
        for groups in range(2, columns):
            if columns % groups == 0:
                codes = (rows, groups, columns // groups, *kernel)
                yield _Form(shape, codes, (rows, groups, 1, *kernel), 2, False)
        if kernel:  # a transposed convolution reduces over axis 0
            yield _Form(shape, shape, (1, columns, *kernel), 0, False)

    def _level_axis(self) -> tuple[int | None, tuple[int, ...]]:
        """Axis of the scale that holds a codebook's levels, and the scale's shape."""
        scale = self.scale_shape
        if not self.codebook:
            return None, scale
        count = 2**self.format.bits
        if scale == (count,):
            return 1, (1, count)
        for axis in (1, 2, 0) if len(scale) == 4 else (2, 1, 0):
            if len(scale) > axis and scale[axis] == count:
                return axis, scale
        raise self.error(
            "A layer of unsigned codes has neither a zero point nor a codebook.",
            f"scale{list(scale)}",
            f"a zero_point, or {count} levels for each group",
            part="scale",
        )

    def _packed_code_shape(self, scale: tuple[int, ...]) -> tuple[tuple[int, ...], bool]:
        """Shape of the codes, and whether they were packed in transposed order."""
        values = self.values
        if math.prod(scale) == 1:
            if self.outputs is None or len(scale) > 2:
                raise self._unknown_shape()
            return (self.outputs, self._share(self.outputs)), False
        if len(scale) == 2:
            # Up to 0.1.3 a layer for quantized matmul was transposed and then packed.
            rows = max(scale)
            return (rows, self._share(rows)), scale[0] == 1
        if scale[1] > 1 and scale[2] == 1 and scale[0] > 1:
            kernel = scale[3:]
            group = self._share(scale[0] * scale[1] * math.prod(kernel))
            return (scale[0], scale[1], group, *kernel), False
        if scale[0] == 1:  # a transposed convolution reduces over axis 0
            return (self._share(math.prod(scale)), *scale[1:]), False
        if scale[1] != 1:
            raise self.error(
                "A layer's scale has a shape that no layer kind gives.",
                list(scale),
                "[O, G, 1], [O, 1], [O, 1, kh, kw] or [O, G, 1, kh, kw]",
                part="scale",
            )
        return (scale[0], values // math.prod(scale), *scale[2:]), False

    def _share(self, count: int) -> int:
        share, rest = divmod(self.values, count) if count else (0, 1)
        if rest or share == 0:
            raise self.error(
                "A layer's number of codes does not fit its scales.",
                f"{self.values} {self.format.name} codes for {count} scales or rows",
                "the same number of codes for each",
                "The group count or the dtype in the config is not this file's. " + REGET,
                part="weight",
            )
        return share

    def _raw_code_shape(self, scale: tuple[int, ...]) -> tuple[tuple[int, ...], bool]:
        """Shape of raw codes as ``[O, ...]`` and whether they are stored transposed."""
        weight = self.shape("weight")
        if len(weight) != 2:
            return weight, False
        if len(scale) == 3:  # a grouped layer whose codes were stored flat
            return (scale[0], scale[1], self._share(scale[0] * scale[1])), False
        rows = self.outputs if self.outputs in weight else None
        if scale != (1, 1):
            transposed = scale[0] == 1 and scale[1] == weight[1]
        elif rows is not None and weight[0] != weight[1]:
            transposed = rows == weight[1]
        elif self.config.data:
            transposed = self._stored_for_matmul(weight)
        else:
            raise self._unknown_shape()
        return (weight[::-1] if transposed else weight), transposed

    def _check_broadcast(self, scale: tuple[int, ...], codes: tuple[int, ...]) -> None:
        if math.prod(codes) != self.values:
            raise self.error(
                "A layer's number of codes does not fit its shape.",
                f"{self.values} {self.format.name} codes",
                f"{math.prod(codes)} for {list(codes)}",
                "The dtype in the config is not this file's. " + REGET,
                part="weight",
            )
        if len(scale) != len(codes) or any(
            s not in (1, c) for s, c in zip(scale, codes, strict=True)
        ):
            if math.prod(scale) == 1:
                return
            raise self.error(
                "A layer's scale does not fit its codes.",
                f"scale{list(self.shape('scale'))} for codes {list(codes)}",
                "one scale for each row or group",
                part="scale",
            )
        if "zero_point" in self.infos:
            have = self._decoded_numel("zero_point", "zero_point_scale", "zero_point_dtype")
            if have != math.prod(scale):
                raise self.error(
                    "A layer has another number of zero points than of scales.",
                    have,
                    math.prod(scale),
                    part="zero_point",
                )

    def _logical(self, scale: tuple[int, ...], codes: tuple[int, ...]) -> tuple[int, ...]:
        """Logical shape: the group axis folded into the channels."""
        if len(codes) == 3 and len(scale) == 3 and scale[2] == 1 and scale[1] == codes[1] > 1:
            return (codes[0], codes[1] * codes[2])
        if len(codes) > 3 and scale[1] == codes[1] > 1 and scale[2] == 1 and scale[0] > 1:
            return (codes[0], codes[1] * codes[2], *codes[3:])
        return codes

    def _rank(self, shape: tuple[int, ...]) -> int:
        have = [s for s in ("svd_up", "svd_down") if s in self.infos]
        if not have:
            return 0
        if len(have) == 1:
            raise self.error(
                "A layer has one half of its low-rank branch.",
                have[0],
                "svd_up and svd_down",
            )
        up, down = self.shape("svd_up"), self.shape("svd_down")
        rows, columns = shape[0], math.prod(shape[1:])
        if len(up) == len(down) == 2:
            turned = self.svd_transposed(shape)
            have_shapes = (up[::-1], down[::-1]) if turned else (up, down)
            rank = have_shapes[0][1]
            if have_shapes == ((rows, rank), (rank, columns)):
                return rank
        raise self.error(
            "A layer's low-rank branch does not fit its shape.",
            f"svd_up{list(up)}, svd_down{list(down)}",
            f"[{rows}, r] and [r, {columns}], or both transposed",
            part="svd_up",
        )

    def svd_transposed(self, shape: tuple[int, ...]) -> bool:
        """Whether the factors are stored transposed, as for quantized matmul."""
        up, down = self.shape("svd_up"), self.shape("svd_down")
        rows, columns = shape[0], math.prod(shape[1:])
        normal = (up[0], down[1], up[1]) == (rows, columns, down[0])
        turned = (up[1], down[0], up[0]) == (rows, columns, down[1])
        if normal and turned:  # square all round: only the config can tell
            return self.wish(shape) is not None
        return turned

    def _hadamard(self, shape: tuple[int, ...]) -> tuple[int, int]:
        if not self.settings.get("use_hadamard"):
            return 0, 2
        old = self.config.version < (0, 2, 0)
        limit = self.settings.get("hadamard_group_size") or (128 if old else 256)
        block = 1 << (min(shape[1], limit) - 1).bit_length()
        while shape[1] % block:
            block //= 2
        if block < 4:
            return 0, 2
        power_of_four = block.bit_length() % 2 == 1
        return block, 4 if power_of_four and not old else 2

    def wish(self, shape: tuple[int, ...]) -> str | None:
        """The quantized matmul that the file asks for."""
        setting = "use_quantized_matmul" if len(shape) == 2 else "use_quantized_matmul_conv"
        if not self.settings.get(setting) or any(n < 32 or n % 16 for n in shape[:2]):
            return None
        name = self.settings.get("quantized_matmul_dtype")
        if name is None:
            if self.format.is_integer:
                new = self.config.version >= (0, 2, 2)
                return "uint8" if self.format.name == "uint8" and new else "int8"
            return "fp8" if self.format.bits < 16 else "fp16"
        return {"float8_e4m3fn": "fp8", "float16": "fp16"}.get(name, name)

    def _stored_for_matmul(self, shape: tuple[int, ...]) -> bool:
        """Whether upstream stores such a layer transposed, tensor-wise ones being in question."""
        name = self.wish(shape)
        coded = self.codebook or "scale_2" in self.infos or "zero_point_scale" in self.infos
        if name is None or coded or self.format.packed or self.format.kind == "float":
            return False
        integer = name in ("int8", "uint8")
        fits = self.format.bits <= (16 if name == "fp16" else 8)
        return fits and self.format.is_integer == integer


# ------------------------------------------------------------------------------------ reading


def read(source: Source, shape_of: ShapeOf | None = None) -> Contents:
    """Logical tensors of an SDNQ checkpoint.

    Args:
        source: The open checkpoint.
        shape_of: Shapes that the architecture gives, for the few layers whose own tensors do not
            tell theirs; such entries have shape None without it.

    Raises:
        LowBitError: A layer lacks a tensor, contradicts its config or itself.
    """
    config = Config(source.quantization_config, source.path)
    tensors = source.tensors
    modules = {name.removesuffix(".scale") for name in tensors if name.endswith(".scale")}
    modules = {module for module in modules if f"{module}.weight" in tensors}
    entries: dict[str, Entry] = {}
    consumed: set[str] = set()
    for module in sorted(modules):
        infos = {
            suffix: tensors[f"{module}.{suffix}"]
            for suffix in ("weight", "bias", *PARTS)
            if f"{module}.{suffix}" in tensors
        }
        expected = shape_of(f"{module}.weight") if shape_of is not None else None
        layer = _Layer(module, infos, config.for_layer(module), config, expected)
        stored = tuple(f"{module}.{suffix}" for suffix in infos if suffix != "bias")
        consumed.update(stored)
        entries[f"{module}.weight"] = _entry(source, layer, stored, known=shape_of is not None)
    for name, info in tensors.items():
        if name in consumed:
            continue
        _refuse_orphan(source, name, info)
        entries[name] = Entry(
            key=name,
            shape=tuple(info.shape),
            dtype=info.dtype,
            stored=(name,),
            nbytes=info.nbytes,
            read=partial(source.get, name),
        )
    return Contents(entries, {}, _facts(config, entries))


def _entry(source: Source, layer: _Layer, stored: tuple[str, ...], known: bool) -> Entry:
    common = {
        "key": f"{layer.name}.weight",
        "stored": stored,
        "nbytes": sum(source.tensors[name].nbytes for name in stored),
    }
    try:
        spec, scale_shape, transposed = layer.resolve()
    except LowBitError as error:
        if not known and error.what == layer._unknown_shape().what:
            return Entry(shape=None, dtype=layer.format.name, **common)
        raise
    return Entry(
        shape=spec.shape,
        dtype=layer.format.name,
        parts=((spec, layer.wish(spec.shape)),),
        notes=() if layer.settings.get("weights_dtype") else (UNTOLD,),
        doubtful=layer.doubtful,
        read=partial(_read, source, layer, spec, scale_shape, transposed),
        **common,
    )


def _refuse_orphan(source: Source, name: str, info: TensorInfo) -> None:
    """Tensors that only make sense beside others."""
    module, _, suffix = name.rpartition(".")
    if (
        suffix in PARTS
        and f"{module}.weight" not in source.tensors
        and (suffix != "scale" or f"{module}.bias" in source.tensors)
    ):
        missing, what = "weight", "A layer has a scale but no weight."
    elif (suffix == "weight" and info.dtype not in FLOATS) or (
        suffix in NEEDS_SCALE and f"{module}.scale" not in source.tensors
    ):
        missing, what = "scale", "A layer's scale is missing."
    else:
        return
    raise LowBitError(
        what,
        file=source.path,
        layer=f"{module}.{missing}",
        found=f"{name} ({info.dtype}{list(info.shape)}) alone",
        expected=f"{module}.{missing} beside it",
        remedy=REGET,
    )


def _read(
    source: Source,
    layer: _Layer,
    spec: WeightSpec,
    scale_shape: tuple[int, ...],
    transposed: bool,
) -> QuantizedWeight:
    """One weight in normal form; codes stay memory-mapped."""
    codes = source.get(f"{layer.name}.weight")
    if transposed and not spec.format.packed:
        codes = codes.t()
    if spec.format.bits == 1 and codes.dtype != torch.uint8:
        # Upstream stores one byte value in each int64 (sdnq.md 1.3).
        if codes.min() < 0 or codes.max() > 255:
            raise layer.error(
                "A layer's 1-bit words are no bytes.",
                f"{codes.min().item()} to {codes.max().item()}",
                "0 to 255",
                part="weight",
            )
        codes = codes.to(torch.uint8)
    if spec.format.packed:
        codes = codes.reshape(-1)
    if transposed and spec.format.packed:
        values = unpack(codes, spec.format, spec.numel).view(spec.columns, spec.rows)
        codes = pack(values.t(), spec.format)
    tensors = {"codes": codes}
    scale = _factor(source, layer, "scale", "scale_2", "scale_zero_point", "scale_dtype")
    scale = scale.t() if transposed and scale.ndim == 2 else scale
    tensors["levels" if spec.codebook else "scale"] = scale.reshape(scale_shape)
    if "zero_point" in layer.infos:
        zero = _factor(
            source, layer, "zero_point", "zero_point_scale", "zero_point_2", "zero_point_dtype"
        )
        zero = zero.t() if transposed and zero.ndim == 2 else zero
        tensors["zero_point"] = zero.reshape(scale_shape)
    if spec.rank:
        for suffix in ("svd_up", "svd_down"):
            factor = source.get(f"{layer.name}.{suffix}")
            _finite(layer, suffix, factor)
            tensors[suffix] = factor.t() if layer.svd_transposed(spec.shape) else factor
    return QuantizedWeight(spec, tensors)


def _factor(
    source: Source, layer: _Layer, suffix: str, factor: str, offset: str, setting: str
) -> torch.Tensor:
    """A scale or zero point, decoded to float32 where it is coded itself."""
    stored = source.get(f"{layer.name}.{suffix}")
    if factor not in layer.infos:
        if layer.infos[suffix].dtype not in FLOATS:
            raise layer.error(
                "A layer's scales are coded, but their own scale is missing.",
                f"{suffix} of {layer.infos[suffix].dtype}",
                f"{factor} beside it, or a float {suffix}",
                part=suffix,
            )
        _finite(layer, suffix, stored)
        return stored
    format_ = layer.coded_format(setting)
    allowed = STORED[format_.word] + (("I64",) if format_.bits == 1 else ())
    if layer.infos[suffix].dtype not in allowed:
        raise layer.error(
            "A layer's coded scales contradict the quantization config.",
            f"{layer.infos[suffix].dtype} words",
            f"{' or '.join(allowed)} words of {format_.name}",
            part=suffix,
        )
    second = source.get(f"{layer.name}.{factor}").float().reshape(-1)
    _finite(layer, factor, second)
    numel = math.prod(layer.shape(suffix)) // format_.block_words * format_.block_values
    words = stored.reshape(-1)
    words = words.to(torch.uint8) if format_.bits == 1 else words
    if second.numel() > 1:
        values = second[decode(words, format_, numel).long()]
    else:
        values = decode(words, format_, numel) * second
        if offset in layer.infos:
            values = values + source.get(f"{layer.name}.{offset}").float().reshape(-1)
    return values


def _finite(layer: _Layer, suffix: str, tensor: torch.Tensor) -> None:
    # One pass without temporaries: the extremes are NaN if any value is, infinite if any is.
    if tensor.numel() == 0 or all(math.isfinite(value) for value in tensor.aminmax()):
        return
    bad = int((~torch.isfinite(tensor.float())).sum())
    raise layer.error(
        "A layer has scales that are no numbers.",
        f"{bad} of {tensor.numel()} are NaN or infinite",
        "finite values",
        part=suffix,
    )


def _facts(config: Config, entries: Mapping[str, Entry]) -> dict[str, str]:
    quantized = [entry for entry in entries.values() if entry.dtype and entry.spec is not None]
    formats = Counter(entry.dtype for entry in quantized)
    facts = {
        "sdnq version": str(config.data.get("sdnq_version", "before 0.1.0, or not told")),
        "formats": ", ".join(f"{name} x{count}" for name, count in formats.most_common()),
    }
    if any(entry.spec.rank for entry in quantized):
        ranks = sorted({entry.spec.rank for entry in quantized if entry.spec.rank})
        facts["low-rank branch"] = "rank " + ", ".join(map(str, ranks))
    if any(entry.spec.hadamard for entry in quantized):
        blocks = sorted({entry.spec.hadamard for entry in quantized if entry.spec.hadamard})
        facts["Hadamard rotation"] = "blocks of " + ", ".join(map(str, blocks))
    if any(entry.spec.codebook for entry in quantized):
        facts["codebook"] = "yes"
    wishes = Counter(entry.wish for entry in quantized if entry.wish)
    if wishes:
        facts["matmul that the file asks for"] = ", ".join(wishes)
    return facts

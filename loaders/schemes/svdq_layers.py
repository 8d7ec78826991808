"""How SVDQuant files store a layer, each way one class: told from headers, read when asked.

The tables of stored tensors are in :mod:`.svdq`. Every class brings a layer to the normal form of
:mod:`...kernels.spec`, and its bias to that of the float layer.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from ...kernels.spec import ActivationSpec, WeightSpec
from ...quant import svdq
from ...quant.dtypes import get_format
from ...quant.errors import LowBitError
from ...quant.weight import QuantizedWeight
from ..header import DOWNLOAD_AGAIN
from ..source import Source, TensorInfo
from .base import SchemeOptions
from .svdq_hints import MANIFEST, Hints

__all__ = [
    "FLOATS",
    "MARKED",
    "MARKED_PARTS",
    "PARTS",
    "REGET",
    "SCALE_CHUNKS",
    "W4A4",
    "W4A16",
    "Awq",
    "File",
    "Layer",
    "Nunchaku",
    "is_raised",
    "lowered",
    "order",
]

HALVES = ("F16", "BF16")
FLOATS = ("F64", "F32", *HALVES)
REGET = "Get the checkpoint from its origin again, or have it converted again."
MARKER = "comfy_quant"

# What stands under a layer's name in either version of the names -> what it is called here.
PARTS = {
    "smooth_factor": "smooth",
    "smooth_factor_orig": "smooth_orig",
    "proj_down": "lora_down",
    "proj_up": "lora_up",
}
# As comfy-kitchen's layout class would save them, and as ComfyUI-quants writes them.
MARKED_PARTS = {
    "weight_smooth_factor": "smooth",
    "weight_proj_down": "lora_down",
    "weight_proj_up": "lora_up",
    "weight_zeros": "weight_zero",
    **PARTS,
}
# Layers behind a GELU, whose activations Nunchaku's int4 engine shifts and rounds to 0..15.
SECOND_MLP = re.compile(
    r"single_transformer_blocks\.\d+\.mlp_fc2"
    r"|transformer_blocks\.\d+\."
    r"(?:mlp_fc2|mlp_context_fc2|ff\.net\.2|ff_context\.net\.2|(?:img|txt)_mlp\.net\.2)"
)
QWEN_MLP = re.compile(r"transformer_blocks\.\d+\.(?:img|txt)_mlp\.net\.2")
# Chunks of modulation layers.
MODULATION = {
    re.compile(r"transformer_blocks\.\d+\.(?:norm1(?:_context)?\.linear|(?:img|txt)_mod\.1)"): 6,
    re.compile(r"single_transformer_blocks\.\d+\.norm\.linear"): 3,
}
SCALE_CHUNKS = {6: (1, 4), 3: (1,)}


@dataclass(frozen=True)
class Precision:
    """One way of rounding to 4 bits.

    Attributes:
        format: Code format.
        group: Inputs that share a scale.
        scales: Dtypes that ``wscales`` have in files.
        unpack: ``wscales`` to ``[N, G]``.
        as_dtype: What the bytes of scales are, None where their dtype says so.
        rounding: What scales of activations are rounded to.
    """

    format: str
    group: int
    scales: tuple[str, ...]
    unpack: Any
    as_dtype: torch.dtype | None = None
    rounding: str = ""


PRECISIONS = {
    "int4": Precision("int4", 64, HALVES, svdq.unpack_scales_int4),
    "nvfp4": Precision(
        "float4_e2m1fn",
        16,
        ("F8_E4M3", "U8"),
        svdq.unpack_scales_nvfp4,
        torch.float8_e4m3fn,
        "float8_e4m3fn",
    ),
    "mxfp4": Precision(
        "float4_e2m1fn",
        32,
        ("U8", "F8_E8M0"),
        svdq.unpack_scales_mxfp4,
        getattr(torch, "float8_e8m0fnu", None),  # torch 2.7
        "float8_e8m0fnu",
    ),
}


@dataclass(frozen=True)
class File:
    """What is known of the file as a whole.

    Attributes:
        source, options, hints: As read.
        marks: ``{module: its comfy_quant marker}``, of this scheme's formats.
        prefix: Of all its layers.
        engine: Why its layers are those of Nunchaku's own engine; None where nothing says so.
        gelu: Whether ``ff.net.2`` stands behind a GELU: in models that have single blocks too.
    """

    source: Source
    options: SchemeOptions
    hints: Hints
    marks: Mapping[str, Mapping[str, Any]]
    prefix: str
    engine: str | None
    gelu: bool

    def plain_name(self, name: str) -> str:
        return name.removeprefix(self.prefix)

    def second_mlp(self, name: str) -> bool:
        name = self.plain_name(name)
        return SECOND_MLP.fullmatch(name) is not None and (self.gelu or ".ff" not in name)

    def chunks(self, name: str) -> int:
        """Chunks of a modulation layer by its name, 0 for any other layer."""
        name = self.plain_name(name)
        return next((count for names, count in MODULATION.items() if names.fullmatch(name)), 0)


# ------------------------------------------------------------------------------------------ layers


class Layer:
    """One module of the file. Subclasses are the ways of storing one; they read it when asked.

    Args:
        file: The file.
        name: The module.
        infos: ``{part: TensorInfo}``.
        shape: What the architecture gives, None where it is not asked.
    """

    needs: ClassVar[tuple[str, ...]]
    may_have: ClassVar[tuple[str, ...]]
    wish: ClassVar[str | None] = None
    format: str  # as reports call it

    def __init__(
        self,
        file: File,
        name: str,
        infos: Mapping[str, TensorInfo],
        shape: tuple[int, ...] | None = None,
    ) -> None:
        self.file, self.name, self.infos = file, name, infos
        missing = [part for part in self.needs if part not in infos]
        surplus = [part for part in infos if part not in (*self.needs, *self.may_have)]
        has = ", ".join(sorted(infos))
        if missing:
            raise self.error(f"A layer lacks its {missing[0]}.", has, ", ".join(self.needs))
        if surplus:
            raise self.error(
                "A layer has a tensor that nothing accounts for.",
                f"{surplus[0]} beside {has}",
                f"only {', '.join((*self.needs, *self.may_have))}",
                part=surplus[0],
            )
        self.notes: tuple[str, ...] = ()
        self.spec = self.told()
        if shape is not None:
            self.cut(tuple(shape))

    def error(self, what: str, found: object, expected: object, remedy=REGET, part: str = ""):
        info = self.infos.get(part)
        return LowBitError(
            what,
            file=info.file if info else self.file.source.path,
            layer=info.name if info else self.name,
            found=found,
            expected=expected,
            remedy=remedy,
        )

    def shape(self, part: str) -> tuple[int, ...]:
        return tuple(self.infos[part].shape)

    def get(self, part: str) -> torch.Tensor:
        return self.file.source.get(self.infos[part].name)

    def check(self, part: str, dtypes: tuple[str, ...], *shapes: tuple[int, ...]) -> None:
        """A part's dtype, and that its shape is one of ``shapes``."""
        if part not in self.infos:
            return
        info = self.infos[part]
        if info.dtype not in dtypes:
            raise self.error(
                f"A layer's {part} has the wrong dtype.",
                f"{info.dtype}{list(info.shape)}",
                " or ".join(dtypes),
                part=part,
            )
        if tuple(info.shape) not in shapes:
            raise self.error(
                f"A layer's {part} does not fit its codes.",
                list(info.shape),
                " or ".join(str(list(shape)) for shape in shapes),
                part=part,
            )

    def finite(self, part: str, tensor: torch.Tensor, zero: bool = True) -> torch.Tensor:
        """The tensor, if it holds numbers, and any that is not 0 (no 0 at all without ``zero``)."""
        small = tensor.element_size() == 1
        low, high = (tensor.float() if small else tensor).aminmax()
        if not (math.isfinite(low) and math.isfinite(high)):
            bad = int((~torch.isfinite(tensor.float())).sum())
            found = f"{bad} of {tensor.numel()} are NaN or infinite"
        elif not zero and bool((tensor == 0).any()):
            found = f"{int((tensor == 0).sum())} of {tensor.numel()} are 0"
        else:
            return tensor
        raise self.error(
            f"A layer's {part} holds values that cannot be meant.",
            found,
            "finite numbers" if zero else "finite numbers other than 0",
            DOWNLOAD_AGAIN,
            part=part,
        )

    def scales(self, part: str, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor, if it can be scales. One of 0 is the scale of a group of zeros."""
        self.finite(part, tensor)
        if not bool((tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor).any()):
            raise self.error(
                "All scales of a layer are 0.",
                f"{part} of {tensor.numel()} zeros",
                "scales other than 0",
                DOWNLOAD_AGAIN,
                part=part,
            )
        return tensor

    # what a subclass says

    def told(self) -> WeightSpec:
        """The spec that the stored tensors tell; checks all shapes and dtypes."""
        raise NotImplementedError

    def weight(self) -> QuantizedWeight:
        """The weight in normal form."""
        raise NotImplementedError

    def bias(self) -> torch.Tensor:
        """The bias of the float layer, float32 [N]."""
        raise NotImplementedError

    @property
    def has_bias(self) -> bool:
        return "bias" in self.infos

    def cut(self, shape: tuple[int, ...]) -> None:
        """Take padded rows and columns away, where the architecture gives fewer of them."""
        if shape != self.spec.shape:
            raise self.wrong_shape(shape)

    def wrong_shape(self, shape: tuple[int, ...]) -> LowBitError:
        return self.error(
            "A layer's shape is not the one its architecture has.",
            list(self.spec.shape),
            list(shape),
        )


class W4A4(Layer):
    """A low-rank branch in 16 bits beside 4-bit codes that meet 4-bit activations."""

    wish = "faithful"
    unsigned = False
    precision = "int4"

    @property
    def format(self) -> str:
        return f"svdq-{self.precision}"

    def make_spec(self, rows: int, columns: int, rank: int, two_level: bool) -> WeightSpec:
        found = PRECISIONS[self.precision]
        return WeightSpec(
            format=get_format(found.format),
            shape=(rows, columns),
            code_shape=(rows, columns // found.group, found.group),
            rank=rank,
            smoothing="divide",
            two_level=two_level,
            activation=ActivationSpec(
                format="uint4" if self.unsigned else found.format,
                group=found.group,
                scale=found.rounding,
                shift=svdq.SHIFT if self.unsigned else 0.0,
            ),
        )

    def check_options(self, rank: int) -> None:
        """What the user insists on against what the tensors show."""
        options = self.file.options
        if options.svdq_precision not in ("auto", self.precision):
            raise self.error(
                f"The precision {options.svdq_precision} was asked for, but a layer is "
                f"{self.precision}.",
                f"{self.infos[self.scale_part].dtype} scales, one for "
                f"{PRECISIONS[self.precision].group} inputs",
                f"{' or '.join(PRECISIONS[options.svdq_precision].scales)} scales",
                "Set svdq_precision to auto.",
                part=self.scale_part,
            )
        if options.svdq_rank and rank and rank != options.svdq_rank:
            raise self.error(
                f"The rank {options.svdq_rank} was asked for, but a layer has rank {rank}.",
                f"low-rank factors of {rank}",
                f"low-rank factors of {options.svdq_rank}",
                "Set svdq_rank to 0.",
            )

    def rank(self) -> int:
        """Of the low-rank branch, its two shapes left to be checked."""
        have = [part for part in ("lora_down", "lora_up") if part in self.infos]
        if len(have) == 1:
            raise self.error(
                "A layer has one half of its low-rank branch.",
                self.infos[have[0]].name,
                "both factors or none",
            )
        if not have:
            return 0
        down = self.shape("lora_down")
        if len(down) != 2:
            raise self.error(
                "A layer's low-rank branch does not fit its shape.",
                list(down),
                "[inputs, rank]",
                part="lora_down",
            )
        return down[1]

    def decide_unsigned(self, marked: Mapping[str, Any] | None = None) -> None:
        """Whether activations are shifted and rounded to 0..15, and by which evidence."""
        file, plain = self.file, self.file.plain_name(self.name)
        marks = marked is not None and "act_unsigned" in marked
        if self.precision != "int4" or not (marks or file.second_mlp(self.name)):
            return
        wanted = file.options.act_unsigned
        target = file.hints.targets.get(self.name) or file.hints.targets.get(plain)
        if wanted != "auto" and file.second_mlp(self.name):
            told, why = wanted == "on", f"set by act_unsigned {wanted}"
        elif marks:
            told, why = bool(marked["act_unsigned"]), "said by the layer's comfy_quant marker"
        elif marked is not None:
            told = QWEN_MLP.fullmatch(plain) is not None
            why = "the layer's comfy_quant marker does not say, so told by the layer's name"
        elif target is not None and target.where == MANIFEST:
            told, why = False, f"{target.where} lists the layer, and knows of none other"
        elif file.engine is not None:
            told, why = True, f"int4 behind a GELU in a file for Nunchaku's engine: {file.engine}"
        elif target is not None or file.hints.lite:
            told, why = False, "a file of Nunchaku Lite, which knows of none other"
        else:
            told, why = False, "nothing says that the file is for Nunchaku's engine"
        self.unsigned = told
        kind = f"unsigned, shifted by {svdq.SHIFT}" if told else "signed"
        self.notes = (*self.notes, f"4-bit activations of the second MLP layer are {kind} ({why})")

    def weight(self) -> QuantizedWeight:
        weight = self.normal_form()
        if self.unsigned:
            weight.tensors["shift_bias"] = self.shift_bias(weight)
        return weight

    def normal_form(self) -> QuantizedWeight:
        """All tensors but ``shift_bias``."""
        raise NotImplementedError

    def stored_bias(self) -> torch.Tensor:
        """The bias as it stands in the file, rows in order."""
        raise NotImplementedError

    _shift_bias: torch.Tensor | None = None

    def shift_bias(self, weight: QuantizedWeight | None = None) -> torch.Tensor:
        if self._shift_bias is None:
            weight = weight or self.normal_form()
            self._shift_bias = _shift_bias(weight, self.spec.activation.shift)
        return self._shift_bias

    @property
    def has_bias(self) -> bool:
        return self.unsigned or super().has_bias

    def bias(self) -> torch.Tensor:
        bias = torch.zeros(self.spec.rows)
        if "bias" in self.infos:
            bias = self.finite("bias", self.stored_bias()).float()
        return bias + self.shift_bias() if self.unsigned else bias


def _shift_bias(weight: QuantizedWeight, shift: float) -> torch.Tensor:
    """What shifting every activation adds to an int4 product: shift * sum over k of W[n, k].

    There are up to a hundred such layers of 40 million codes in a file: both codes of a byte are
    taken at once, some rows at a time.
    """
    spec, tensors = weight.spec, weight.tensors
    groups, size = spec.code_shape[1:]
    words = tensors["codes"].view(spec.rows, -1)
    scale = (tensors["scale"].float() * tensors.get("scale_2", 1)).view(-1, groups).double()
    inverse = 1 / tensors["smooth"].float()
    low, high = inverse[0::2].contiguous(), inverse[1::2].contiguous()
    sums = torch.empty(spec.rows, dtype=torch.float64)
    step = 256
    for start in range(0, spec.rows, step):
        some = words[start : start + step]
        # stored codes lie 8 above the true ones, whose sums are small: taken off before, not after
        products = (some & 15).float().sub_(8).mul_(low)
        products.addcmul_((some >> 4).float().sub_(8), high)
        inner = products.view(-1, groups, size // 2).sum(-1)
        sums[start : start + step] = (inner.double() * scale[start : start + step]).sum(1)
    return (shift * sums).float()


class Nunchaku(W4A4):
    """W4A4 in Nunchaku's packing."""

    needs = ("qweight", "wscales", "smooth")
    may_have = ("bias", "wtscale", "wcscales", "smooth_orig", "lora_down", "lora_up")
    scale_part = "wscales"

    def told(self) -> WeightSpec:
        qweight, scales = self.infos["qweight"], self.infos["wscales"]
        if len(qweight.shape) != 2 or len(scales.shape) != 2:
            raise self.error(
                "A layer's codes and scales are no matrices.",
                f"qweight{list(qweight.shape)}, wscales{list(scales.shape)}",
                "qweight [N, K/2] and wscales [groups, N]",
                part="qweight",
            )
        rows, columns = qweight.shape[0], 2 * qweight.shape[1]
        if rows % 128 or columns % 128 or not rows or not columns:
            raise self.error(
                "A layer's codes are not padded to tiles of 128.",
                f"{rows} outputs, {columns} inputs",
                "multiples of 128, as every file of Nunchaku has them",
                part="qweight",
            )
        self.check("qweight", ("I8", "U8"), (rows, columns // 2))
        self.precision = self._precision(scales, rows, columns)
        found = PRECISIONS[self.precision]
        rank = self.rank()
        self.check("wscales", found.scales, (columns // found.group, rows))
        self.check("smooth", FLOATS, (columns,))
        self.check("smooth_orig", FLOATS, (columns,))
        self.check("wcscales", FLOATS, (rows,))
        self.check("wtscale", FLOATS, (1,), ())
        self.check("bias", FLOATS, (rows,))
        self.check("lora_down", FLOATS, (columns, rank))
        self.check("lora_up", FLOATS, (rows, rank))
        if rank % 16:
            raise self.error(
                "A layer's rank cannot be packed.", rank, "a multiple of 16", part="lora_down"
            )
        if self.precision == "int4" and "wtscale" in self.infos:
            raise self.error(
                "An int4 layer has a scale of the whole tensor, which no kernel reads.",
                f"wtscale beside {scales.dtype} wscales",
                "no wtscale, or F8_E4M3 wscales",
                part="wtscale",
            )
        self.check_options(rank)
        plain = self.file.plain_name(self.name)
        self.notes = self.file.hints.against(plain, self.precision, rank)
        self.decide_unsigned()
        two_level = "wtscale" in self.infos or "wcscales" in self.infos
        return self.make_spec(rows, columns, rank, two_level)

    def _precision(self, scales: TensorInfo, rows: int, columns: int) -> str:
        fits = [name for name, one in PRECISIONS.items() if scales.dtype in one.scales]
        if not fits:
            raise self.error(
                "A layer's wscales has the wrong dtype.",
                f"{scales.dtype}{list(scales.shape)}",
                "F16 or BF16 (int4), F8_E4M3 (nvfp4), or U8 (mxfp4)",
                part="wscales",
            )
        for name in fits:
            if scales.shape == (columns // PRECISIONS[name].group, rows):
                return name
        found = f"{scales.dtype}{list(scales.shape)}"
        wanted = " or ".join(
            f"{[columns // PRECISIONS[name].group, rows]} ({name})" for name in fits
        )
        raise self.error(
            "A layer's number of scales does not fit its codes.",
            f"{found} for {rows} outputs and {columns} inputs",
            wanted,
            part="wscales",
        )

    def cut(self, shape: tuple[int, ...]) -> None:
        group = self.spec.code_shape[2]
        if (
            len(shape) != 2
            or any(
                -(-new // 128) * 128 != old for new, old in zip(shape, self.spec.shape, strict=True)
            )
            or shape[1] % group
        ):
            raise self.wrong_shape(shape)
        self.spec = replace(self.spec, shape=shape, code_shape=(shape[0], shape[1] // group, group))

    def normal_form(self) -> QuantizedWeight:
        spec = self.spec
        rows, columns = spec.shape
        groups = spec.code_shape[1]
        found = PRECISIONS[self.precision]
        unpack = svdq.unpack_to_int4 if self.precision == "int4" else svdq.unpack_to_float4
        stored_rows, half = self.shape("qweight")
        words = unpack(self.get("qweight")).view(stored_rows, half)
        scale = found.unpack(self.get("wscales"))[:rows, :groups].contiguous()
        if found.as_dtype is not None:
            scale = scale.view(found.as_dtype)
        tensors = {
            "codes": words[:rows, : columns // 2].contiguous().view(-1),
            "scale": self.scales("wscales", scale).unsqueeze(-1),
            "smooth": self.finite("smooth", self.vector("smooth")[:columns], zero=False),
        }
        if spec.two_level:
            tensors["scale_2"] = self._second()[:rows]
        if spec.rank:
            down, up = self.get("lora_down"), self.get("lora_up")
            self.finite("lora_down", down)
            self.finite("lora_up", up)
            tensors["svd_down"] = svdq.unpack_down(down)[:, :columns].contiguous()
            tensors["svd_up"] = svdq.unpack_up(up)[:rows]
        return QuantizedWeight(spec, tensors)

    def _second(self) -> torch.Tensor:
        """Second level of scales, [1, 1, 1] or [N, 1, 1]."""
        scale = torch.ones(1)
        if "wtscale" in self.infos:
            stored = self.get("wtscale").float().reshape(1)
            scale = scale * self.finite("wtscale", stored, zero=False)
        if "wcscales" in self.infos:
            scale = scale * self.scales("wcscales", self.vector("wcscales").float())
        return scale.view(-1, 1, 1)

    def vector(self, part: str) -> torch.Tensor:
        return svdq.unpack_vector(self.get(part))

    def stored_bias(self) -> torch.Tensor:
        return self.vector("bias")[: self.spec.rows]


class Marked(W4A4):
    """W4A4 as ComfyUI-quants writes it for comfy-kitchen."""

    needs = ("weight", "weight_scale", "smooth", "lora_down", "lora_up")
    may_have = ("bias", MARKER)
    scale_part = "weight_scale"

    def told(self) -> WeightSpec:
        shape = self.shape("weight")
        tiled = len(shape) == 4
        if tiled:
            rows, columns = 128 * shape[0], 64 * shape[1]
        elif len(shape) == 2:
            rows, columns = shape[0], 2 * shape[1]
        else:
            rows = columns = 0
        if not rows or not columns or columns % 64 or (tiled and shape[2:] != (32, 128)):
            raise self.error(
                "A layer's codes are in no layout of comfy-kitchen.",
                list(shape),
                "[N, K/2] with K a multiple of 64, or tiles [N/128, K/64, 32, 128]",
                part="weight",
            )
        groups, rank = columns // 64, self.rank()
        self.check("weight", ("I8", "U8"), shape)
        tiles = [(rows // 128, groups, 128)] if rows % 128 == 0 else []
        self.check("weight_scale", (*HALVES, "F32"), (groups, rows), *tiles)
        self.check("smooth", FLOATS, (columns,))
        self.check("lora_down", FLOATS, (columns, rank))
        tiles = [(rows // 128, rank, 128)] if rows % 128 == 0 else []
        self.check("lora_up", FLOATS, (rows, rank), *tiles)
        self.check("bias", FLOATS, (rows,))
        self.check_options(rank)
        marked = self.file.marks[self.name]
        basis = marked.get("lowrank_branch_input_basis", "raw")
        if basis not in ("raw", "post_smoothing"):
            raise self.error(
                "A layer's marker names a low-rank branch of an unknown kind.",
                repr(basis),
                "raw or post_smoothing",
                part=MARKER,
            )
        self.decide_unsigned(marked)
        return self.make_spec(rows, columns, rank, two_level=False)

    def normal_form(self) -> QuantizedWeight:
        scale, up = self.get("weight_scale"), self.get("lora_up")
        scale = svdq.untile_rows(scale) if scale.dim() == 3 else scale.t().contiguous()
        up = svdq.untile_rows(up) if up.dim() == 3 else up
        tensors = {
            "codes": svdq.kitchen_to_int4(self.get("weight")),
            "scale": self.scales("weight_scale", scale).unsqueeze(-1),
            "smooth": self.finite("smooth", self.get("smooth"), zero=False),
        }
        if self.spec.rank:
            down = self.finite("lora_down", self.get("lora_down")).t()
            if self.file.marks[self.name].get("lowrank_branch_input_basis") == "post_smoothing":
                down = down.float() / tensors["smooth"].float()  # that of raw activations
            tensors["svd_down"] = down
            tensors["svd_up"] = self.finite("lora_up", up)
        return QuantizedWeight(self.spec, tensors)

    def stored_bias(self) -> torch.Tensor:
        return self.get("bias")


class W4A16(Layer):
    """4-bit codes with scale and zero point for groups of inputs."""

    format = "awq-uint4"
    splits = 0

    def make_spec(self, rows: int, groups: int, group: int) -> WeightSpec:
        return WeightSpec(
            format=get_format("uint4"),
            shape=(rows, groups * group),
            code_shape=(rows, groups, group),
        )

    def bias(self) -> torch.Tensor:
        bias = self.finite("bias", self.get("bias")).float()
        return (
            lowered(svdq.deinterleave_rows(bias, self.splits), self.splits) if self.splits else bias
        )


class Awq(W4A16):
    """W4A16 in AWQ's packing."""

    needs = ("qweight", "wscales", "wzeros")
    may_have = ("bias",)
    group = 64

    def told(self) -> WeightSpec:
        info = self.infos["qweight"]
        wide = {"I32": 2, "I16": 1}.get(info.dtype)
        if wide is None or len(info.shape) != 2:
            raise self.error(
                "A layer's qweight has the wrong dtype.",
                f"{info.dtype}{list(info.shape)}",
                "I32 [N/4, K/2] or I16 [N/4, K] beside wzeros",
                part="qweight",
            )
        rows, columns = 4 * info.shape[0], wide * info.shape[1]
        groups = columns // self.group
        if not rows or not columns or columns % self.group:
            raise self.error(
                "A layer's inputs are no whole number of groups.",
                f"{columns} inputs",
                f"a multiple of {self.group}",
                part="qweight",
            )
        # AWQ pads the groups of a row to 16.
        counts = range(groups, -(-groups // 16) * 16 + 1)
        stored = self.shape("wscales")
        if len(stored) != 2 or stored[0] not in counts:
            raise self.error(
                "A layer's number of scales does not fit its codes.",
                f"wscales{list(stored)} for {rows} outputs and {columns} inputs",
                [groups, rows],
                part="wscales",
            )
        for part in ("wscales", "wzeros"):
            self.check(part, (*HALVES, "F32"), (stored[0], rows))
        self.check("bias", FLOATS, (rows,))
        self._decide()
        if self.splits and rows % self.splits:
            raise self.error(
                "A modulation layer's rows are no whole chunks.",
                f"{rows} outputs",
                f"a multiple of {self.splits}",
                part="qweight",
            )
        if self.splits and not self.has_bias:
            raise self.error(
                "A modulation layer of Nunchaku's engine lacks its bias.",
                ", ".join(sorted(self.infos)),
                "a bias, which holds 1 more than the model's in the scales",
            )
        return self.make_spec(rows, groups, self.group)

    def _decide(self) -> None:
        """Whether rows are interleaved, and by which evidence."""
        file, plain = self.file, self.file.plain_name(self.name)
        target = file.hints.targets.get(self.name) or file.hints.targets.get(plain)
        chunks = file.chunks(self.name)
        if target is not None:
            self.splits = target.splits
            why = f"{target.where} says {target.operation}"
        elif chunks and file.engine is not None:
            self.splits = chunks
            why = f"by the layer's name, in a file for Nunchaku's engine: {file.engine}"
        elif chunks and self.has_bias and self.shape("bias")[0] % chunks == 0:
            raised, why = is_raised(self.get("bias"), chunks)
            self.splits = chunks if raised else 0
        elif chunks:
            why = "nothing says that the file is for Nunchaku's engine"
        else:
            return
        self.notes = (order(self.splits, why),)

    def weight(self) -> QuantizedWeight:
        groups, splits = self.spec.code_shape[1], self.splits or 1

        def rows_first(part: str) -> torch.Tensor:
            return svdq.deinterleave_rows(self.get(part)[:groups].t(), splits).unsqueeze(-1)

        return QuantizedWeight(
            self.spec,
            {
                "codes": svdq.unpack_to_uint4(self.get("qweight"), splits),
                "scale": self.scales("wscales", rows_first("wscales")),
                "zero_point": self.finite("wzeros", rows_first("wzeros")),
            },
        )


class MarkedAwq(W4A16):
    """W4A16 as ComfyUI-quants writes it for comfy-kitchen."""

    needs = ("weight", "weight_scale", "weight_zero")
    may_have = ("bias", MARKER)

    def told(self) -> WeightSpec:
        shape, scales = self.shape("weight"), self.shape("weight_scale")
        rows, columns = (shape[0], 2 * shape[1]) if len(shape) == 2 else (0, 0)
        groups = scales[0] if len(scales) == 2 else 0
        if not rows or not columns or not groups or columns % groups:
            raise self.error(
                "A layer's number of scales does not fit its codes.",
                f"weight_scale{list(scales)} for weight{list(shape)}",
                "weight [N, K/2] and weight_scale [K/64, N]",
                part="weight_scale",
            )
        self.check("weight", ("I8", "U8"), shape)
        for part in ("weight_scale", "weight_zero"):
            self.check(part, (*HALVES, "F32"), (groups, rows))
        self.check("bias", FLOATS, (rows,))
        return self.make_spec(rows, groups, columns // groups)

    def weight(self) -> QuantizedWeight:
        scale = self.scales("weight_scale", self.get("weight_scale")).float().t()
        zero = self.finite("weight_zero", self.get("weight_zero")).float().t()
        return QuantizedWeight(
            self.spec,
            {
                "codes": self.get("weight").contiguous().view(torch.uint8).view(-1),
                "scale": scale.unsqueeze(-1),
                # Codes are counted from 8 there.
                "zero_point": (zero - 8 * scale).unsqueeze(-1),
            },
        )


MARKED: dict[str, type[Layer]] = {"svdquant_w4a4": Marked, "awq_w4a16": MarkedAwq}


# -------------------------------------------------------------------------------------- modulation


def is_raised(bias: torch.Tensor, chunks: int) -> tuple[bool, str]:
    """Whether a bias is Nunchaku's: interleaved, with 1 in its scales; and why.

    Scales of trained models lie around 0. Where rows are interleaved and 1 was added, those of
    the interleaved scales lie around 1.
    """
    scales = list(SCALE_CHUNKS[chunks])
    values = bias.float()
    there = float(values.view(-1, chunks)[:, scales].mean())
    here = float(values.view(chunks, -1)[scales].mean())
    raised = there > 0.5 and there > here
    return raised, (
        "told by the bias: its scales lie around 1 if rows are interleaved"
        if raised
        else "told by the bias: its scales do not lie around 1 if rows are interleaved"
    )


def lowered(bias: torch.Tensor, chunks: int) -> torch.Tensor:
    """A bias in the model's order without the 1 that Nunchaku adds to scales."""
    bias = bias.clone()
    bias.view(chunks, -1)[list(SCALE_CHUNKS[chunks])] -= 1
    return bias


def order(splits: int, why: str) -> str:
    if splits:
        return f"modulation is interleaved by {splits}, with 1 added to the bias of scales ({why})"
    return f"modulation stands in the model's own order ({why})"

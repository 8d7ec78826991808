"""One ModelOpt layer: its kind told from its tensors, and its weight in normal form.

A layer ``X`` of N outputs and K inputs; every kind may have ``pre_quant_scale``, ``svdquant_lora``
and ``bias``:

| kind         | ``weight``       | ``weight_scale``                 | W =                   |
|--------------|------------------|----------------------------------|-----------------------|
| fp8          | F8_E4M3 [N,K]    | F32, one                         | w * s                 |
| fp8-rows     | F8_E4M3 [N,K]    | F32 [N] or [N,1]                 | w * s                 |
| fp8-blocks   | F8_E4M3 [N,K]    | F32 [N/128,1,K/128,1], 2-D as    | w * s of its block    |
|              |                  | ``weight_scale_inv``             |                       |
| mxfp8        | F8_E4M3 [N,K]    | U8 [N,K/32], exponents           | w * 2^(s-127)         |
| nvfp4        | U8 [N,K/2]       | F8_E4M3 [N,K/16]                 | e2m1 * s * scale_2    |
| nvfp4-32     | U8 [N,K/2]       | F8_E4M3 [N,K/32]                 | e2m1 * s * scale_2    |
| mxfp4        | U8 [N,K/2]       | U8 [N,K/32], exponents           | e2m1 * 2^(s-127)      |
| int8         | I8 [N,K]         | F32, one, [N] or [N,1]           | w * s                 |
| int4         | U8 [N/2,K]       | F32 [N,K/g]                      | w * s                 |

Rows 2r and 2r + 1 of int4 share bytes, low half first, in two's complement; bytes of nvfp4 are the
business of :mod:`.modelopt_nvfp4`. fp8 and int8 may be convolutions. Further tensors:

| tensor                    | what it is                                                        |
|---------------------------|-------------------------------------------------------------------|
| ``weight_scale_2``        | F32, one: second level of nvfp4; W4A8_AWQ has one that only its   |
|                           | kernel needs                                                      |
| ``input_scale``           | F32, one: scale of the activations                                |
| ``pre_quant_scale``       | [K], multiplies x; ``weight`` is divided by it already            |
| ``svdquant_lora_a``, b    | [r,K], [N,r]: branch of the *smoothed* x                          |

ModelOpt's examples switch layers off only after the calibration, so that plain float layers have
the last two as well: these are folded into the weight, in float32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ...kernels.spec import ActivationSpec, WeightSpec
from ...quant.dtypes import get_format
from ...quant.errors import LowBitError
from ...quant.weight import QuantizedWeight
from ..header import DOWNLOAD_AGAIN
from ..source import Source, TensorInfo
from .modelopt_nvfp4 import Layout, Stored, from_tiles, padded, swap_halves

__all__ = ["FLOATS", "PARTS", "Layer", "PlainLayer", "kind_of"]

FLOATS = ("F64", "F32", "F16", "BF16")
FP8 = ("F8_E4M3", "F8_E5M2")
EXPONENTS = ("U8", "F8_E8M0")
BLOCK = 128  # rows and columns of a block of fp8
MX = 32
SMOOTHING = ("pre_quant_scale", "svdquant_lora_a", "svdquant_lora_b")
SCALES = ("weight_scale", "weight_scale_2", "input_scale")
PARTS = ("weight", "bias", *SCALES, *SMOOTHING)
REGET = "Get the checkpoint from its origin again, or export it again."

STATIC_FP8 = ActivationSpec("float8_e4m3fn", -1, "float32", static=True)
DYNAMIC_FP8 = ActivationSpec("float8_e4m3fn", -1, "float32")
GROUP_FP8 = ActivationSpec("float8_e4m3fn", BLOCK, "float32")
TOKEN_FP8 = ActivationSpec("float8_e4m3fn", 0, "float32")
STATIC_INT8 = ActivationSpec("int8", -1, "float32", static=True)
STATIC_NVFP4 = ActivationSpec("float4_e2m1fn", 16, "float8_e4m3fn", static=True)
MX_FP8 = ActivationSpec("float8_e4m3fn", MX, "float8_e8m0fnu")
MX_FP4 = ActivationSpec("float4_e2m1fn", MX, "float8_e8m0fnu")

# What rounds activations where the layer has an input_scale.
STATIC = {
    "fp8": STATIC_FP8,
    "fp8-rows": STATIC_FP8,
    "nvfp4": STATIC_NVFP4,
    "nvfp4-32": STATIC_FP8,
    "mxfp4": STATIC_FP8,
    "int8": STATIC_INT8,
    "int4": STATIC_FP8,
}
# What rounds them where it has none, by the declared algorithm; of mxfp8 everywhere.
DYNAMIC = {
    "FP8_PER_CHANNEL_PER_TOKEN": TOKEN_FP8,
    "FP8_DYNAMIC": DYNAMIC_FP8,
    "FP8_BLOCKS_DYNAMIC": GROUP_FP8,
    "MXFP8": MX_FP8,
    "MXFP4": MX_FP4,
    "W4A8_MXFP4_FP8": DYNAMIC_FP8,
}


@dataclass(frozen=True)
class Place:
    """Where a layer stands: for errors, and to read it."""

    source: Source
    name: str
    infos: Mapping[str, TensorInfo]

    def error(self, what: str, found: object, expected: object, remedy=REGET, part: str = ""):
        info = self.infos.get(part)
        return LowBitError(
            what,
            file=info.file if info else self.source.path,
            layer=info.name if info else f"{self.name}.{part}" if part else self.name,
            found=found,
            expected=expected,
            remedy=remedy,
        )

    def shape(self, part: str) -> tuple[int, ...]:
        return tuple(self.infos[part].shape)

    def dtype(self, part: str) -> str:
        return self.infos[part].dtype if part in self.infos else ""

    def told(self, part: str) -> str:
        return f"{self.dtype(part)}{list(self.shape(part))}"

    def check(self, part: str, dtypes: tuple[str, ...], *shapes: tuple[int, ...]) -> None:
        """A part's dtype, and that its shape is one of ``shapes``."""
        if self.dtype(part) not in dtypes:
            raise self.error(
                f"A layer's {part} has the wrong dtype.",
                self.told(part),
                " or ".join(dtypes),
                part=part,
            )
        if self.shape(part) not in shapes:
            raise self.error(
                f"A layer's {part} does not fit its weight.",
                self.told(part),
                " or ".join(str(list(shape)) for shape in shapes),
                part=part,
            )

    def get(self, part: str) -> torch.Tensor:
        return self.source.get(self.infos[part].name)

    def bad(self, part: str, found: str, expected: str) -> LowBitError:
        return self.error(
            f"A layer's {part} holds values that cannot be meant.",
            found,
            expected,
            DOWNLOAD_AGAIN,
            part=part,
        )

    def finite(self, part: str) -> torch.Tensor:
        """The tensor in its dtype, all of it numbers."""
        tensor = self.get(part)
        if not all(math.isfinite(value) for value in tensor.aminmax()):
            count = int((~torch.isfinite(tensor.float())).sum())
            raise self.bad(part, f"{count} of {tensor.numel()} are NaN or infinite", "numbers")
        return tensor

    def positive(self, part: str, zero: bool = False) -> torch.Tensor:
        """The tensor in its dtype, all of it finite and above 0 (with ``zero``: not below it)."""
        tensor = self.finite(part)
        wrong = tensor < 0 if zero else tensor <= 0
        if bool(wrong.any()):
            found = f"{int(wrong.sum())} of {tensor.numel()} are {'negative' if zero else '<= 0'}"
            raise self.bad(part, found, "scales above 0")
        return tensor

    def bytes_up_to(self, part: str, largest: int, meaning: str) -> torch.Tensor:
        """One-byte scales as they are, none with a bit pattern above ``largest``."""
        tensor = self.get(part)
        wrong = int((tensor.view(torch.uint8) > largest).sum())
        if wrong:
            raise self.bad(part, f"{wrong} of {tensor.numel()} are {meaning}", "scales above 0")
        return tensor

    def check_smoothing(self, rows: int, columns: int) -> int:
        """Shapes of the smoothing and of the branch; its rank."""
        if "pre_quant_scale" in self.infos:
            self.check("pre_quant_scale", FLOATS, (columns,))
        have = [part for part in SMOOTHING[1:] if part in self.infos]
        if len(have) == 1:
            raise self.error(
                "A layer has one half of its low-rank branch.",
                f"{have[0]} alone",
                " and ".join(SMOOTHING[1:]),
                part=have[0],
            )
        if not have:
            return 0
        rank = self.shape("svdquant_lora_a")[0] if self.shape("svdquant_lora_a") else 0
        if rank == 0:
            raise self.error(
                "A layer's low-rank branch is empty.",
                self.told("svdquant_lora_a"),
                f"[rank, {columns}]",
                part="svdquant_lora_a",
            )
        self.check("svdquant_lora_a", FLOATS, (rank, columns))
        self.check("svdquant_lora_b", FLOATS, (rows, rank))
        return rank

    def branch(self) -> tuple[torch.Tensor, torch.Tensor]:
        """``up`` [N, r] and ``down`` [r, K] of the branch of raw activations."""
        down = self.finite("svdquant_lora_a").float()
        if "pre_quant_scale" in self.infos:  # exact: both have 16 bits
            down = down * self.positive("pre_quant_scale").float()
        return self.finite("svdquant_lora_b"), down


def kind_of(place: Place) -> str:
    """The kind of a quantized layer.

    Raises:
        LowBitError: Its weight and scale are no pair that is known.
    """
    weight, scale = place.dtype("weight"), place.dtype("weight_scale")
    shape, scales = place.shape("weight"), place.shape("weight_scale")
    one = math.prod(scales) == 1
    if scale in FLOATS and weight in (*FP8, "I8") and len(shape) >= 2:
        whole = "int8" if weight == "I8" else "fp8"
        if one:
            return whole
        if scales in ((shape[0],), (shape[0], 1)):
            return whole if weight == "I8" else "fp8-rows"
        blocks = tuple(-(-size // BLOCK) for size in shape)
        if weight in FP8 and scales in ((blocks[0], 1, *blocks[1:], 1), blocks):
            return "fp8-blocks"
    if len(shape) == 2 and len(scales) == 2:
        if weight == "F8_E4M3" and scale in EXPONENTS:
            return "mxfp8"
        if weight == "U8" and scale == "F8_E4M3":
            return "nvfp4"
        if weight == "U8" and scale in EXPONENTS:
            return "mxfp4"
        if weight == "U8" and scale in FLOATS and scales[0] == 2 * shape[0]:
            return "int4"
    raise place.error(
        "A layer's weight and its scales are no pair that is known.",
        f"weight {place.told('weight')}, weight_scale {place.told('weight_scale')}",
        "one of ModelOpt's: FP8 with one scale, one for a row or for 128 x 128; U8 codes of NVFP4, "
        "MXFP4 or INT4; I8 with one for a row",
        part="weight_scale",
    )


class Layer:
    """A quantized layer.

    Args:
        place: Where it stands.
        kind: Of :func:`kind_of`.
        algorithm: What the file declares for it, None where it declares nothing.
        layout: Of NVFP4 bytes; None for other kinds.
        shape: What the architecture gives, None where it is not asked.
    """

    def __init__(
        self,
        place: Place,
        kind: str,
        algorithm: str | None,
        layout: Layout | None = None,
        shape: tuple[int, ...] | None = None,
    ) -> None:
        self.place, self.kind, self.algorithm, self.layout = place, kind, algorithm, layout
        for part in ("weight_scale_2", "input_scale"):
            if part in place.infos:
                place.check(part, ("F32",), (), (1,))
        self.scale_shape: tuple[int, ...] = ()
        self.spec = self._spec(shape)
        place.check_smoothing(self.spec.rows, self.spec.columns)

    @property
    def format(self) -> str:
        """As reports call it."""
        more = "-awq" if self.spec.smoothing else ""
        return self.kind + ("-svd" if self.spec.rank else more)

    @property
    def wish(self) -> str | None:
        """The matmul that the file asks for.

        int8 is multiplied with one scale for each row of activations, as ComfyUI does: every card
        has a kernel for that, and none for one scale in all.
        """
        if self.spec.activation is None:
            return None
        return "int8" if self.kind == "int8" else "faithful"

    def _activation(self, columns: int) -> ActivationSpec | None:
        place = self.place
        if len(place.shape("weight")) != 2:
            return None
        if "input_scale" in place.infos:
            found = STATIC.get(self.kind)
            if found is None:
                raise place.error(
                    "A layer has a scale of activations that its format does not have.",
                    f"input_scale beside {self.kind}",
                    "none: they are scaled in groups as they come",
                    part="input_scale",
                )
        else:
            found = DYNAMIC.get("MXFP8" if self.kind == "mxfp8" else self.algorithm or "")
        if found is None or (found.group > 0 and columns % found.group):
            return None
        return found

    def _spec(self, shape: tuple[int, ...] | None) -> WeightSpec:
        place, kind = self.place, self.kind
        stored = place.shape("weight")
        name = {"nvfp4": "float4_e2m1fn", "mxfp4": "float4_e2m1fn", "int8": "int8", "int4": "int4"}
        format_ = name.get(kind.removesuffix("-32"), "")
        if kind.startswith(("fp8", "mxfp8")):
            format_ = {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}[place.dtype("weight")]
        logical, group = self._shapes(stored, shape)
        if shape is not None and logical != tuple(shape):
            raise place.error(
                "A layer's shape is not the one its architecture has.", list(logical), list(shape)
            )
        code_shape = (logical[0], logical[1] // group, group) if group else logical
        needs_second = kind.startswith("nvfp4")
        if needs_second and "weight_scale_2" not in place.infos:
            raise place.error(
                "A layer's second scale is missing.",
                f"{', '.join(sorted(place.infos))}",
                "weight_scale_2 beside them",
                part="weight_scale_2",
            )
        if "weight_scale_2" in place.infos and not needs_second and kind != "int4":
            raise place.error(
                "A layer has a second scale that its format does not have.",
                f"weight_scale_2 beside {kind}",
                "none",
                part="weight_scale_2",
            )
        return WeightSpec(
            format=get_format(format_),
            shape=logical,
            code_shape=code_shape,
            rank=place.check_smoothing(logical[0], math.prod(logical[1:])),
            smoothing="multiply" if "pre_quant_scale" in place.infos else "",
            two_level=needs_second,
            activation=self._activation(math.prod(logical[1:])),
        )

    def _shapes(
        self, stored: tuple[int, ...], shape: tuple[int, ...] | None
    ) -> tuple[tuple[int, ...], int]:
        """Logical shape and elements of a row that share a scale (0: a row)."""
        place, kind = self.place, self.kind
        if kind in ("fp8", "fp8-rows", "int8"):
            return stored, 0
        rows, columns = stored
        if kind == "fp8-blocks":
            return stored, math.gcd(columns, BLOCK)
        if kind == "mxfp8":
            place.check("weight_scale", EXPONENTS, (rows, columns // MX))
            self._whole(columns, MX)
            return stored, MX
        if kind == "mxfp4":
            place.check("weight_scale", EXPONENTS, (rows, columns * 2 // MX))
            self._whole(columns * 2, MX)
            return (rows, columns * 2), MX
        if kind == "int4":
            groups = place.shape("weight_scale")[1]
            if not groups or columns % groups:
                raise self._misfit(2 * rows, columns)
            self._whole(columns, 2)
            return (2 * rows, columns), columns // groups
        found = Stored(place.name, rows, columns * 2, place.shape("weight_scale"))
        group = found.in_tiles() if self.layout.tiles else found.in_rows()
        if group is None:
            raise self._misfit(rows, columns * 2)
        logical = rows, columns * 2
        if shape is not None and tuple(shape) != logical and self.may_be_padded_from(shape):
            logical = tuple(shape)
        return logical, group

    def may_be_padded_from(self, shape: tuple[int, ...]) -> bool:
        """Whether a layer of this shape would be padded to the stored one: to 16 rows and bytes."""
        rows, columns = self.place.shape("weight")
        return (
            len(shape) == 2
            and padded(shape[0], 16) == padded(rows, 16)
            and padded(shape[1], 32) == padded(columns * 2, 32)
            and shape[0] <= rows
            and shape[1] <= columns * 2
            and shape[1] % 16 == 0
        )

    def _whole(self, columns: int, group: int) -> None:
        if columns % group:
            raise self.place.error(
                "A layer's columns do not fill its groups.",
                f"{columns} columns",
                f"a multiple of {group}",
                part="weight",
            )

    def _misfit(self, rows: int, columns: int) -> LowBitError:
        return self.place.error(
            "A layer's block scales do not fit its codes.",
            f"{self.place.told('weight_scale')} for {rows} rows of {columns} columns",
            f"[{rows}, {columns} / size of a group]",
            part="weight_scale",
        )

    # reading

    def weight(self) -> QuantizedWeight:
        """The weight in normal form; codes stay memory-mapped where they are in its order."""
        place, spec = self.place, self.spec
        tensors = {"codes": self._codes(), "scale": self._scale()}
        if spec.two_level:
            tensors["scale_2"] = place.positive("weight_scale_2").reshape(1, 1, 1)
        if spec.smoothing:
            tensors["smooth"] = place.positive("pre_quant_scale")
        if spec.rank:
            tensors["svd_up"], tensors["svd_down"] = place.branch()
        if spec.activation is not None and spec.activation.static:
            tensors["input_scale"] = place.positive("input_scale").reshape(1)
        return QuantizedWeight(spec, tensors)

    def _codes(self) -> torch.Tensor:
        codes = self.place.get("weight")
        if self.kind == "int4":
            return _int4_words(codes)
        if self.spec.format.packed:
            if self.layout is not None and self.layout.high:
                codes = swap_halves(codes)
            rows, columns = self.spec.shape
            return codes[:rows, : columns // 2].reshape(-1)
        return codes

    def _scale(self) -> torch.Tensor:
        place, spec, kind = self.place, self.spec, self.kind
        if kind in ("mxfp8", "mxfp4"):
            scale = place.bytes_up_to("weight_scale", 254, "no numbers")
            return scale.view(torch.float8_e8m0fnu).unsqueeze(-1)
        if kind.startswith("nvfp4"):
            scale = place.bytes_up_to("weight_scale", 0x7E, "negative or no numbers")
            scale = from_tiles(scale) if self.layout.tiles else scale
            rows, groups, _ = spec.code_shape
            return scale[:rows, :groups].unsqueeze(-1)
        scale = place.positive("weight_scale", zero=True).float()
        if not bool(scale.any()) and bool(place.get("weight").view(torch.uint8).any()):
            raise place.bad("weight_scale", "nothing but zeros", "scales above 0")
        if kind == "fp8-blocks":
            return _block_rows(scale, spec)
        if kind == "int4":
            return scale.unsqueeze(-1)
        return scale.reshape(-1, *[1] * (len(spec.shape) - 1))


class PlainLayer:
    """A float layer that ModelOpt smoothed, or gave a branch, before it was switched off."""

    def __init__(self, place: Place) -> None:
        self.place = place
        shape = place.shape("weight")
        if len(shape) != 2:
            raise place.error(
                "Only the inputs of a Linear can be smoothed.",
                f"{place.told('weight')} with {', '.join(sorted(place.infos))}",
                "a weight of two dimensions",
                part="weight",
            )
        self.rank = place.check_smoothing(*shape)

    def weight(self) -> torch.Tensor:
        """float32 [N, K]: what the layer multiplies raw activations by."""
        place = self.place
        weight = place.get("weight").float()
        if "pre_quant_scale" in place.infos:
            weight = weight * place.positive("pre_quant_scale").float()
        if self.rank:
            up, down = place.branch()
            weight = weight.addmm(up.float(), down)
        return weight


def _int4_words(stored: torch.Tensor) -> torch.Tensor:
    """Bytes of row pairs [N / 2, K] as packed words of int4: pairs of columns, offset-binary."""
    words = []
    for half in (stored & 15, stored >> 4):
        words.append((half[:, 0::2] | (half[:, 1::2] << 4)) ^ 0x88)
    return torch.stack(words, dim=1).reshape(-1)


def _block_rows(scale: torch.Tensor, spec: WeightSpec) -> torch.Tensor:
    """Scales of blocks [N/128, .., K/128] for each row and group; every group is in one block."""
    rows, columns = spec.shape
    blocks = scale.reshape(-(-rows // BLOCK), -(-columns // BLOCK))
    by_row = blocks.repeat_interleave(BLOCK, dim=0)[:rows]
    block_of_group = torch.arange(0, columns, spec.code_shape[2]) // BLOCK
    return by_row[:, block_of_group].unsqueeze(-1)

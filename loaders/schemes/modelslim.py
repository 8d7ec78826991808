"""ModelSlim checkpoints (msModelSlim, for Huawei's Ascend) to logical layers.

A layer ``X`` of N outputs and K inputs by its type, which ``quant_model_description*.json`` gives
to every tensor; beside each stand ``weight`` and perhaps ``bias``, a float ``[N]``:

====================  ====================================================  =======================
type                  stored                                                activations
====================  ====================================================  =======================
W8A8                  I8 ``[N, K]``, ``deq_scale`` F32 ``[N]`` (or I64 of   int8, static with an
                      its bits), ``quant_bias`` I32 ``[N]``,                offset
                      ``input_scale``, ``input_offset`` F32 ``[1]``
W8A8_DYNAMIC          I8 ``[N, K]``; ``weight_scale``, ``weight_offset``    int8, one scale a token
                      F32 ``[N, 1]`` or ``[N, K/g]``
W8A16                 the same                                              as they are
W4A4_DYNAMIC          the same, values -8..7, one a byte                    int4, one scale a token
WFP8AFP8_DYNAMIC      F8_E4M3 ``[N, K]``, ``weight_scale`` F32 ``[N, 1]``   e4m3, one scale a token
W8A8_MXFP8            F8_E4M3 ``[N, K]``, ``weight_scale`` U8               e4m3 by 32
                      ``[N, K/32]``, powers of two
W4A4_MXFP4            U8 ``[N, K/2]``, first value in the low nibble;       e2m1 by 32
                      scales as above
W4A8_MXFP             the same                                              e4m3 by 32
W4A4_MXFP4_DUALSCALE  the same; ``weight_dual_scale`` F32                   two levels of scales,
                      ``[N, K/512, 1]`` multiplies                          not done here
FLOAT, W16A16S        a float ``[N, K]``                                    as they are
====================  ====================================================  =======================

    W = (code - weight_offset) * weight_scale                        W8A8: scale = deq / input_scale
    y = (round(x / input_scale + input_offset) @ code.T + quant_bias) * deq              (W8A8)
    quant_bias = round(bias / deq - input_offset * sum of a row's codes)

Any of them may be wrapped: ``X.div.mul_scale`` ``[K]`` multiplies x, and the layer itself is then
``X.linear`` (``X.mul_scale`` and ``X`` after the repacking for diffusers); ``svd_lowrank_l1``
``[r, K]`` and ``svd_lowrank_l2`` ``[N, r]`` add ``l2 @ l1`` to W, as what multiplied x meets, and
``_SVD`` to the type. In normal form the branch takes x as it came.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch

from ...kernels.spec import ActivationSpec, WeightSpec
from ...quant.dtypes import get_format
from ...quant.errors import LowBitError
from ...quant.packing import pack
from ...quant.weight import QuantizedWeight
from ..folder import DESCRIPTION, list_folder
from ..header import DOWNLOAD_AGAIN, read_json
from ..source import Source, TensorInfo
from .base import Contents, Entry, ShapeOf

__all__ = ["read"]

WEIGHTS = "quant_model_weight"
REGET = "Get the checkpoint from its origin again, or have it converted again."
FLOATS = ("F64", "F32", "F16", "BF16")
BYTE_SCALES = ("U8", "F8_E8M0")
MX = 32
DUAL = 512
PLAIN_TYPES = ("FLOAT", "W16A16S")
ATTENTION = ("FAQuant", "C8")

STATIC = ("deq_scale", "quant_bias", "input_scale", "input_offset")
LOW_RANK = ("svd_lowrank_l1", "svd_lowrank_l2")
SCALED = ("weight_scale", "weight_offset")
OWN = frozenset((*STATIC, *SCALED, *LOW_RANK, "weight_dual_scale", "mul_scale"))
ROTATIONS = ("heads_rotation", "kronecker_rotation_m", "kronecker_rotation_n", "left_trans",
             "right_trans", "clip_ratio")  # fmt: skip
ROTATED = ("q_rot", "k_rot")


class Kind(NamedTuple):
    """One type of layer.

    Attributes:
        format: Of the codes.
        needs: Tensors beside the weight.
        group: Inputs that share a scale; 0 where the scales' number tells.
        activation: How activations are rounded; None where they are not.
    """

    format: str
    needs: tuple[str, ...]
    group: int = 0
    activation: ActivationSpec | None = None


KINDS: dict[str, Kind] = {
    "W8A8": Kind("int8", STATIC, 0, ActivationSpec("int8", -1, "float32", True, offset=True)),
    "W8A8_DYNAMIC": Kind("int8", SCALED, 0, ActivationSpec("int8", 0, "float32")),
    "W8A16": Kind("int8", SCALED),
    "W4A4_DYNAMIC": Kind("int4", SCALED, 0, ActivationSpec("int4", 0, "float32")),
    "WFP8AFP8_DYNAMIC": Kind(
        "float8_e4m3fn", SCALED[:1], 0, ActivationSpec("float8_e4m3fn", 0, "float32")
    ),
    "W8A8_MXFP8": Kind(
        "float8_e4m3fn", SCALED[:1], MX, ActivationSpec("float8_e4m3fn", MX, "ocp_e8m0")
    ),
    "W4A4_MXFP4": Kind(
        "float4_e2m1fn", SCALED[:1], MX, ActivationSpec("float4_e2m1fn", MX, "ocp_e8m0")
    ),
    "W4A8_MXFP": Kind(
        "float4_e2m1fn", SCALED[:1], MX, ActivationSpec("float8_e4m3fn", MX, "ocp_e8m0")
    ),
    "W4A4_MXFP4_DUALSCALE": Kind("float4_e2m1fn", ("weight_scale", "weight_dual_scale"), MX),
    "FLOAT": Kind("", ()),
}


def read(source: Source, shape_of: ShapeOf | None = None) -> Contents:
    """Logical tensors of a ModelSlim checkpoint.

    Args:
        source: The open checkpoint.
        shape_of: Not asked: the stored tensors tell every shape.

    Raises:
        LowBitError: A layer lacks a tensor, or contradicts itself or what describes it.
    """
    _refuse_rotations(source)
    groups = _groups(source)
    told = _description(source, groups)
    ignored = _attention(source, told)
    entries: dict[str, Entry] = {}
    kinds: Counter[str] = Counter()
    for module, infos in groups.items():
        described = told.types.get(f"{module}.weight")
        if OWN & infos.keys() or (described and described not in PLAIN_TYPES):
            layer = Layer(source, module, infos, told)
            entries.update(layer.entries())
            kinds[layer.described] += layer.spec is not None
            continue
        for info in infos.values():
            if info.name not in ignored:
                _refuse_unknown(info)
                entries[info.name] = _plain(source, info)
    if not kinds.total():
        raise LowBitError(
            "The checkpoint is said to be ModelSlim's, but no layer is quantized.",
            file=source.path,
            layer="*.weight_scale",
            found=f"{len(entries)} tensors, none of them quantized",
            expected="layers with weight_scale or deq_scale",
            remedy="Get the quantized checkpoint, or remove the description beside this one.",
        )
    facts = {
        "layers": ", ".join(f"{count} {name}" for name, count in kinds.most_common() if count),
        "described by": told.told(),
    }
    return Contents(entries, ignored, facts)


def _plain(source: Source, info: TensorInfo) -> Entry:
    return Entry(
        key=info.name,
        shape=tuple(info.shape),
        dtype=info.dtype,
        stored=(info.name,),
        nbytes=info.nbytes,
        read=lambda: source.get(info.name),
    )


def _refuse_rotations(source: Source) -> None:
    for name, info in source.tensors.items():
        if name.rpartition(".")[2] in ROTATIONS:
            raise LowBitError(
                "A layer's activations are rotated, which is not read.",
                file=info.file,
                layer=name,
                found=f"a tensor {name} {list(info.shape)}",
                expected="layers without a rotation at run time",
                remedy="Get the model quantized without QuaRot's online rotation and FlatQuant.",
            )


def _refuse_unknown(info: TensorInfo) -> None:
    if info.name.endswith(".weight") and info.dtype not in FLOATS:
        raise LowBitError(
            "A weight holds codes, but nothing beside it says how to decode them.",
            file=info.file,
            layer=info.name,
            found=f"{info.dtype}{list(info.shape)}",
            expected="a float weight, or weight_scale or deq_scale beside it",
            remedy=REGET,
        )


# --------------------------------------------------------------------------------------- names


def _wrapped(names: Iterator[str] | Mapping[str, object]) -> frozenset[str]:
    """Modules whose layer stands below ``.linear``, beside ``.div``."""
    return frozenset(
        name.removesuffix(".div.mul_scale") for name in names if name.endswith(".div.mul_scale")
    )


def _unwrapped(name: str, wrapped: frozenset[str]) -> tuple[str, str]:
    """Module and part that a stored name stands for."""
    module, _, part = name.rpartition(".")
    for inner in (".div", ".linear"):
        outer = module.removesuffix(inner)
        if outer != module and outer in wrapped:
            return outer, part
    return module, part


def _groups(source: Source) -> dict[str, dict[str, TensorInfo]]:
    """``{module: {part: TensorInfo}}`` of all tensors, wrappers taken off."""
    wrapped = _wrapped(source.tensors)
    groups: dict[str, dict[str, TensorInfo]] = {}
    for name, info in source.tensors.items():
        module, part = _unwrapped(name, wrapped)
        group = groups.setdefault(module, {})
        if part in group:
            raise LowBitError(
                "A layer has a tensor twice, under two names.",
                file=info.file,
                layer=info.name,
                found=f"{group[part].name} and {info.name}",
                expected="one of them",
                remedy=REGET,
            )
        group[part] = info
    return groups


# ---------------------------------------------------------------------------------- description


@dataclass(frozen=True)
class Description:
    """What the JSON file beside the weights says.

    Attributes:
        path: The file; None without one.
        types: ``{logical tensor name: type}``.
        whole: The type that it gives the model.
    """

    path: Path | None = None
    types: Mapping[str, str] = field(default_factory=dict)
    whole: str = ""

    def told(self) -> str:
        if self.path is None:
            return ""
        return self.path.name + (f" ({self.whole})" if self.whole else "")


def _description(source: Source, groups: Mapping[str, Mapping[str, TensorInfo]]) -> Description:
    path = _description_path(source)
    if path is None:
        return Description()
    content = read_json(path)
    wrapped = _wrapped(content) | _wrapped(source.tensors)
    types: dict[str, str] = {}
    for name, type_ in content.items():
        if "." not in name or name.endswith(".quant_type"):
            continue
        if not isinstance(type_, str):
            raise LowBitError(
                "The description gives a tensor no type.",
                file=path,
                layer=name,
                found=f"{type_!r:.80}",
                expected=f"one of {', '.join(KINDS)}",
                remedy=REGET,
            )
        types[".".join(_unwrapped(name, wrapped))] = type_
    for name, type_ in types.items():
        module, _, part = name.rpartition(".")
        if type_ in PLAIN_TYPES or type_ in ATTENTION or part in groups.get(module, ()):
            continue
        raise LowBitError(
            "The description names a tensor that the checkpoint lacks.",
            file=source.path,
            layer=name,
            found=f"{type_} in {path.name}",
            expected="every tensor that the description names",
            remedy="Weights and description are of different models, or a file is missing: get "
            "both again.",
        )
    whole = content.get("model_quant_type")
    return Description(path, types, whole if isinstance(whole, str) else "")


def _description_path(source: Source) -> Path | None:
    """The description of these weights; of several the one that ends as the weights' name does."""
    folder = source.files[0].parent
    stem = source.files[0].stem
    if source.beside:
        names = source.beside
    elif stem.startswith(WEIGHTS):
        names = list_folder(folder)[0]
    else:  # a lone file: what lies beside it may describe another
        return None
    found = sorted(n for n in names if n.startswith(DESCRIPTION) and n.endswith(".json"))
    if len(found) < 2:
        return folder / found[0] if found else None
    ends = {name: name[len(DESCRIPTION) : -len(".json")].lstrip("_") for name in found}
    ours = stem.removeprefix(WEIGHTS + "s").removeprefix(WEIGHTS).lstrip("_").partition("-0")[0]
    same = [name for name, end in ends.items() if end == ours]
    if len(same) == 1:
        return folder / same[0]
    raise LowBitError(
        "Several files describe the checkpoint, and nothing says which is meant.",
        file=source.path,
        layer=", ".join(found),
        found=", ".join(found),
        expected=f"{DESCRIPTION}.json, or one that ends as the weights' name does",
        remedy="Leave the one that belongs to these weights in the folder.",
    )


def _attention(source: Source, told: Description) -> dict[str, str]:
    """Tensors that only attention in few bits needs, with the reason why they are left out."""
    ignored = {}
    for name in source.tensors:
        type_ = told.types.get(name)
        if type_ in ATTENTION:
            ignored[name] = f"{type_}: attention is not rounded here"
        module, _, part = name.rpartition(".")
        if part not in ROTATED:
            continue
        pair = [source.tensors.get(f"{module}.{other}") for other in ROTATED]
        if None in pair or not torch.equal(*(source.get(info.name) for info in pair)):
            raise LowBitError(
                "Queries and keys are rotated differently.",
                file=source.tensors[name].file,
                layer=name,
                found=" and ".join(info.name for info in pair if info is not None),
                expected=f"the same rotation in {' and '.join(ROTATED)}, which attention undoes",
                remedy=REGET,
            )
        ignored[name] = "a rotation of queries and keys alike: changes attention in few bits alone"
    return ignored


# ----------------------------------------------------------------------------------------- layers


class Layer:
    """One module: told from headers (and a few small tensors), read when asked.

    Args:
        source: The open checkpoint.
        name: The module, without wrappers.
        infos: ``{part: TensorInfo}``.
        told: The description.
    """

    def __init__(
        self, source: Source, name: str, infos: Mapping[str, TensorInfo], told: Description
    ) -> None:
        self.source, self.name, self.infos = source, name, infos
        self.notes: tuple[str, ...] = ()
        self.rounds = True
        if "weight" not in infos:
            has = ", ".join(sorted(infos))
            raise self.error("A layer lacks its weight.", has, "weight", part=next(iter(infos)))
        self.type = self._type(told)
        self.kind = KINDS[self.type]
        self._check_parts()
        self.rank = self._rank()
        self.described = self.type.replace("_DYNAMIC", "_SVD_DYNAMIC") if self.rank else self.type
        if self.rank and self.described == self.type:
            self.described += "_SVD"
        self._check_rank(told)
        self.rows, self.columns = self._shape()
        self._check_shapes()
        self.spec = None if self.type == "FLOAT" else self._spec()

    def error(self, what: str, found: object, expected: object, remedy=REGET, part: str = ""):
        info = self.infos.get(part)
        return LowBitError(
            what,
            file=info.file if info else self.source.path,
            layer=info.name if info else self.name,
            found=found,
            expected=expected,
            remedy=remedy,
        )

    def get(self, part: str) -> torch.Tensor:
        return self.source.get(self.infos[part].name)

    # what the headers tell

    def _type(self, told: Description) -> str:
        """The type: what the description says, if the tensors allow it."""
        fits = self._fitting()
        described = told.types.get(f"{self.name}.weight")
        if described is None:
            if len(fits) == 1:
                return fits[0]
            self.notes = (
                "nothing says how activations are rounded, so they are not: "
                + ("no description lies" if told.path is None else f"{told.path.name} has no word")
                + f" beside layers that may be {' or '.join(fits)}",
            )
            self.rounds = False
            return "W8A16" if "W8A16" in fits else fits[0]
        plain = described.replace("_SVD", "", 1)
        plain = "FLOAT" if plain in PLAIN_TYPES else plain
        if plain not in KINDS:
            raise self.error(
                f"A layer is of the type {described}, which is not read.",
                f"{described} in {told.path.name}",
                f"one of {', '.join(KINDS)}",
                "Get the model quantized in another way.",
                part="weight",
            )
        if plain not in fits:
            stored = ", ".join(f"{part} {i.dtype}{list(i.shape)}" for part, i in self.infos.items())
            raise self.error(
                "A layer's tensors contradict the description.",
                f"{stored}: as {' or '.join(fits)} is stored",
                f"{described}, as {told.path.name} says",
                "Weights and description are of different models: get both again.",
                part="weight",
            )
        return plain

    def _fitting(self) -> tuple[str, ...]:
        """Types that are stored with these tensors and dtypes."""
        codes = self.infos["weight"].dtype
        scale = self.infos["weight_scale"].dtype if "weight_scale" in self.infos else ""
        if self.infos.keys() & {*STATIC}:
            return ("W8A8",)
        if codes in FLOATS:
            return ("FLOAT",)
        if codes == "I8":
            return ("W8A8_DYNAMIC", "W8A16", "W4A4_DYNAMIC")
        if codes == "F8_E4M3":
            return ("W8A8_MXFP8",) if scale in BYTE_SCALES else ("WFP8AFP8_DYNAMIC",)
        if codes == "U8":
            dual = "weight_dual_scale" in self.infos
            return ("W4A4_MXFP4_DUALSCALE",) if dual else ("W4A4_MXFP4", "W4A8_MXFP")
        raise self.error(
            "A layer's weight has a dtype that ModelSlim does not write.",
            f"{codes}{list(self.infos['weight'].shape)}",
            "I8, F8_E4M3, U8 or a float",
            part="weight",
        )

    def _check_parts(self) -> None:
        needs = ("weight", *self.kind.needs)
        may = {*needs, "bias", "mul_scale", *LOW_RANK}
        if self.type == "WFP8AFP8_DYNAMIC":
            may.add("weight_offset")
        has = ", ".join(sorted(self.infos))
        for part in needs:
            if part not in self.infos:
                raise self.error(f"A layer lacks its {part}.", has, ", ".join(needs), part="weight")
        for part in self.infos:
            if part not in may:
                raise self.error(
                    "A layer has a tensor that nothing accounts for.",
                    f"{part} beside {has}",
                    f"only {', '.join(sorted(may))}, as {self.type} has them",
                    part=part,
                )

    def _rank(self) -> int:
        have = [part for part in LOW_RANK if part in self.infos]
        if len(have) == 1:
            raise self.error(
                "A layer has one half of its low-rank branch.",
                self.infos[have[0]].name,
                " and ".join(LOW_RANK),
                part=have[0],
            )
        if not have:
            return 0
        down = self.infos["svd_lowrank_l1"].shape
        return down[0] if len(down) == 2 else 0

    def _check_rank(self, told: Description) -> None:
        described = told.types.get(f"{self.name}.weight", "")
        if described in ("", *PLAIN_TYPES):
            return
        has = "svd_lowrank_l1" in self.infos
        if has != ("_SVD" in described):
            raise self.error(
                "A layer's tensors contradict the description.",
                f"{'a' if has else 'no'} low-rank branch",
                f"{described}, as {told.path.name} says",
                "Weights and description are of different models: get both again.",
                part="weight",
            )

    def _shape(self) -> tuple[int, int]:
        stored = self.infos["weight"].shape
        if len(stored) != 2 or 0 in stored:
            raise self.error(
                "A layer's weight is no matrix.", list(stored), "[outputs, inputs]", part="weight"
            )
        rows, columns = stored
        return rows, 2 * columns if self.kind.format == "float4_e2m1fn" else columns

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
                f"A layer's {part} does not fit its weight.",
                f"{list(info.shape)} beside {self.rows} outputs and {self.columns} inputs",
                " or ".join(str(list(shape)) for shape in shapes),
                part=part,
            )

    def _check_shapes(self) -> None:
        rows, columns, group = self.rows, self.columns, self.kind.group
        if group and columns % group:
            raise self.error(
                "A layer's inputs are no whole number of groups.",
                f"{columns} inputs",
                f"a multiple of {group}",
                part="weight",
            )
        self.check("bias", FLOATS, (rows,))
        self.check("mul_scale", FLOATS, (columns,))
        self.check("svd_lowrank_l1", FLOATS, (self.rank, columns))
        self.check("svd_lowrank_l2", FLOATS, (rows, self.rank))
        if self.type == "W8A8":
            self.check("weight", ("I8",), (rows, columns))
            self.check("deq_scale", ("F32", "I64"), (rows,), (rows, 1))
            self.check("quant_bias", ("I32",), (rows,), (rows, 1))
            self.check("input_scale", FLOATS, (), (1,))
            self.check("input_offset", (*FLOATS, "I8", "I32"), (), (1,))
        elif group:
            self.check("weight_scale", BYTE_SCALES, (rows, columns // group))
            self.check("weight_dual_scale", FLOATS, (rows, -(-columns // DUAL), 1))
        elif self.type != "FLOAT":
            shapes = [(rows,), (rows, 1)]
            groups = tuple(self.infos["weight_scale"].shape)[1:]
            if len(groups) == 1 and groups[0] and columns % groups[0] == 0:
                shapes.append((rows, *groups))
            self.check("weight_scale", FLOATS, *shapes)
            self.check("weight_offset", FLOATS, tuple(self.infos["weight_scale"].shape))

    def _spec(self) -> WeightSpec:
        rows, columns = self.rows, self.columns
        groups = columns // self.kind.group if self.kind.group else 1
        if not self.kind.group and "weight_scale" in self.infos:
            groups = (*self.infos["weight_scale"].shape, 1)[1]
        activation = self.kind.activation if self.rounds else None
        if self.type == "W8A8" and not self.offset():
            activation = ActivationSpec("int8", -1, "float32", static=True)
        name = self.kind.format
        if self.type not in ("W8A8", "WFP8AFP8_DYNAMIC") and self.offset("weight_offset"):
            name = f"u{name}"
        if self.type == "W4A4_MXFP4_DUALSCALE":
            self.notes = (
                "activations in two levels of scales are not imitated: they are not rounded",
            )
        return WeightSpec(
            format=get_format(name),
            shape=(rows, columns),
            code_shape=(rows, columns) if groups == 1 else (rows, groups, columns // groups),
            rank=self.rank,
            smoothing="multiply" if "mul_scale" in self.infos else "",
            two_level="weight_dual_scale" in self.infos,
            activation=activation,
        )

    def offset(self, part: str = "input_offset") -> bool:
        """Whether an offset is there that is not 0."""
        if part not in self.infos:
            return False
        return bool(self.finite(part, self.get(part)).any())

    # what the tensors hold

    def finite(self, part: str, tensor: torch.Tensor) -> torch.Tensor:
        values = tensor.float() if tensor.element_size() == 1 else tensor
        low, high = values.aminmax()
        if math.isfinite(low) and math.isfinite(high):
            return tensor
        bad = int((~torch.isfinite(values)).sum())
        raise self.error(
            f"A layer's {part} holds values that cannot be meant.",
            f"{bad} of {tensor.numel()} are NaN or infinite",
            "finite numbers",
            DOWNLOAD_AGAIN,
            part=part,
        )

    def positive(self, part: str, tensor: torch.Tensor, zero: bool = False) -> torch.Tensor:
        """Scales; ``zero`` where some of them may be those of rows or groups of zeros."""
        self.finite(part, tensor)
        low, high = (float(value) for value in tensor.float().aminmax())
        if low > 0 or (zero and low == 0 and high > 0):
            return tensor
        raise self.error(
            f"A layer's {part} holds values that cannot be scales.",
            f"values from {low:g} to {high:g}",
            "positive numbers",
            DOWNLOAD_AGAIN,
            part=part,
        )

    def weight(self) -> QuantizedWeight | torch.Tensor:
        """The weight in normal form; float where it is not quantized."""
        smooth = None
        if "mul_scale" in self.infos:
            smooth = self.positive("mul_scale", self.get("mul_scale")).float()
        tensors: dict[str, torch.Tensor] = {}
        if self.rank:
            down = self.finite(LOW_RANK[0], self.get(LOW_RANK[0])).float()
            # Stored for multiplied activations; here it takes them as they came.
            tensors["svd_down"] = down if smooth is None else down * smooth
            tensors["svd_up"] = self.finite(LOW_RANK[1], self.get(LOW_RANK[1])).float()
        if self.spec is None:
            weight = self.get("weight").float()
            weight = weight if smooth is None else weight * smooth
            return weight + tensors["svd_up"] @ tensors["svd_down"] if self.rank else weight
        if smooth is not None:
            tensors["smooth"] = smooth
        if self.type == "W8A8":
            tensors |= self._static()
        elif self.spec.format.is_integer:
            tensors |= self._integers()
        else:
            tensors |= self._floats()
        return QuantizedWeight(self.spec, tensors)

    def _deq(self) -> torch.Tensor:
        """deq_scale [N], float32."""
        stored = self.get("deq_scale").reshape(-1)
        if stored.dtype == torch.int64:
            if bool(((stored < 0) | (stored > 0x7FFFFFFF)).any()):
                raise self.error(
                    "A layer's deq_scale holds more than the bits of a float.",
                    f"values from {int(stored.min())} to {int(stored.max())}",
                    "float32 bits in the lower 32",
                    DOWNLOAD_AGAIN,
                    part="deq_scale",
                )
            stored = stored.to(torch.int32).view(torch.float32)
        return self.positive("deq_scale", stored, zero=True)

    def _static(self) -> dict[str, torch.Tensor]:
        input_scale = self.positive("input_scale", self.get("input_scale")).float().reshape(1)
        tensors = {
            "codes": self.get("weight"),
            "scale": (self._deq() / input_scale).view(-1, 1),
            "input_scale": input_scale,
        }
        if self.spec.activation.offset:
            tensors["input_offset"] = self.get("input_offset").float().reshape(1)
        return tensors

    def _integers(self) -> dict[str, torch.Tensor]:
        scale = self.positive("weight_scale", self.get("weight_scale"), zero=True).float()
        codes, fmt = self.get("weight"), self.spec.format
        if fmt.bits == 4:
            low, high = codes.aminmax()
            if low < -8 or high > 7:
                raise self.error(
                    "A layer's codes are no 4-bit ones.",
                    f"values from {int(low)} to {int(high)}",
                    "-8 to 7, one in a byte (the order of two in a byte is nowhere said)",
                    part="weight",
                )
        shape = (*self.spec.code_shape[:-1], 1)
        tensors = {"scale": scale.view(shape)}
        if fmt.signed:
            tensors["codes"] = codes if fmt.bits == 8 else pack(codes, fmt)
            return tensors
        # An offset makes the codes unsigned ones, counted from the smallest.
        smallest = 1 << (fmt.bits - 1)
        offset = self.get("weight_offset").float().view(shape)
        unsigned = codes.view(torch.uint8) ^ 0x80 if fmt.bits == 8 else codes + smallest
        tensors["codes"] = pack(unsigned, fmt)
        tensors["zero_point"] = -(offset + smallest) * tensors["scale"]
        return tensors

    def _floats(self) -> dict[str, torch.Tensor]:
        shape = (*self.spec.code_shape[:-1], 1)
        codes, stored = self.get("weight"), self.get("weight_scale")
        if self.kind.format == "float4_e2m1fn":
            codes = codes.view(-1)
        elif bool((codes.view(torch.uint8) & 0x7F == 0x7F).any()):
            raise self.error(
                "A layer's weight holds values that cannot be meant.",
                "NaN among its codes",
                "finite numbers",
                DOWNLOAD_AGAIN,
                part="weight",
            )
        if not self.kind.group:
            if self.offset("weight_offset"):
                raise self.error(
                    "A layer's float codes have an offset.",
                    "values other than 0",
                    "0 everywhere",
                    part="weight_offset",
                )
            scale = self.positive("weight_scale", stored, zero=True).float()
            return {"codes": codes, "scale": scale.view(shape)}
        scale = stored.view(torch.uint8).view(torch.float8_e8m0fnu)
        tensors = {"codes": codes, "scale": self.finite("weight_scale", scale).view(shape)}
        if self.spec.two_level:
            dual = self.positive("weight_dual_scale", self.get("weight_dual_scale"), zero=True)
            dual = dual.float().repeat_interleave(DUAL // MX, dim=1)[:, : shape[1]]
            tensors["scale_2"] = dual.contiguous()
        return tensors

    def _from_quant_bias(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What quant_bias says of the bias [N], and how far it may be off, float64."""
        codes = self.get("weight")
        offset = float(self.get("input_offset").float())
        correction = codes.sum(dim=1, dtype=torch.int32).double() * offset
        deq = self._deq().double()
        units = self.get("quant_bias").reshape(-1).double() + correction
        # Rounded to a whole number, from float32.
        room = 0.5 + correction.abs() * 2.0**-21 + units.abs() * 2.0**-21 + 1e-3
        return units * deq, room * deq

    def has_bias(self) -> bool:
        """Whether the float layer has one; quant_bias alone is there without one too."""
        if "bias" in self.infos or self.type != "W8A8":
            return "bias" in self.infos
        bias, room = self._from_quant_bias()
        return bool((bias.abs() > room).any())

    def bias(self) -> torch.Tensor:
        """The bias of the float layer."""
        if self.type != "W8A8":
            return self.finite("bias", self.get("bias"))
        told, room = self._from_quant_bias()
        if "bias" not in self.infos:
            return told.float()
        bias = self.finite("bias", self.get("bias"))
        # A bias in 16 bits was rounded once more.
        room = room + bias.double().abs() * torch.finfo(bias.dtype).eps
        away = (bias.double() - told).abs() > room
        if bool(away.any()):
            worst = int((bias.double() - told).abs().argmax())
            raise self.error(
                "A layer's quant_bias contradicts its bias.",
                f"{float(told[worst]):g} and {float(bias[worst]):g} for output {worst}, and "
                f"{int(away.sum())} of {away.numel()} differ",
                "quant_bias = round(bias / deq_scale - input_offset * sum of codes)",
                part="quant_bias",
            )
        return bias

    def entries(self) -> Iterator[tuple[str, Entry]]:
        parts = [info for part, info in self.infos.items() if part not in ("bias", "quant_bias")]
        quantized = self.spec is not None
        wish = "faithful" if quantized and self.spec.activation else None
        weight = f"{self.name}.weight"
        yield (
            weight,
            Entry(
                key=weight,
                shape=(self.rows, self.columns),
                dtype=self.described if quantized else self.infos["weight"].dtype,
                stored=tuple(info.name for info in parts),
                nbytes=sum(info.nbytes for info in parts),
                parts=((self.spec, wish),) if quantized else (),
                notes=self.notes,
                read=self.weight,
            ),
        )
        if self.has_bias():
            stored = [self.infos[part] for part in ("bias", "quant_bias") if part in self.infos]
            yield (
                f"{self.name}.bias",
                Entry(
                    key=f"{self.name}.bias",
                    shape=(self.rows,),
                    dtype=stored[0].dtype if "bias" in self.infos else "F32",
                    stored=tuple(info.name for info in stored),
                    nbytes=sum(info.nbytes for info in stored),
                    read=self.bias,
                ),
            )

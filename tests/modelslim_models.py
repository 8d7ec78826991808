"""ModelSlim checkpoints with known content, made from a float model by the format's formulas.

A layer is made from floats in numpy's float64; what was put into it stays known, and ``forward``
is the format's own arithmetic on it, written out:

| type                 | y of multiplied activations x                                           |
|----------------------|-------------------------------------------------------------------------|
| W8A8                 | (round(x / is + io) @ q.T + quant_bias) * deq, codes in -128..127       |
| W8A8_DYNAMIC         | round(x / s) @ (q - off).T * s * ws + bias, s = max|x| / 127 of a token |
| W4A4_DYNAMIC         | the same with s = max|x| / 7                                            |
| WFP8AFP8_DYNAMIC     | e4m3(x / s), s = max|x| / 448 of a token                                |
| W8A8_MXFP8 and so on | e4m3 or e2m1 of x / 2^(floor(log2 max|x|) - 8 or 2) by 32               |
| W8A16, dual scales   | x as it is                                                              |
| all                  | + (x @ l1.T) @ l2.T                                                     |

Nothing of the pack is used here.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

__all__ = ["TYPES", "WAN", "Slim", "diffusers_name", "make_layer", "stored", "wan_floats", "write"]

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
TYPES = (
    "W8A8",
    "W8A8_DYNAMIC",
    "W8A16",
    "W4A4_DYNAMIC",
    "WFP8AFP8_DYNAMIC",
    "W8A8_MXFP8",
    "W4A4_MXFP4",
    "W4A8_MXFP",
    "W4A4_MXFP4_DUALSCALE",
)
STEPS = {"W8A8_DYNAMIC": 127, "W4A4_DYNAMIC": 7}


def e4m3(x: np.ndarray) -> np.ndarray:
    """The nearest floats of 4 exponent and 3 mantissa bits, ties to even, at most 448."""
    size = np.maximum(np.abs(x), 2.0**-30)
    step = 2.0 ** (np.maximum(np.floor(np.log2(size)), -6) - 3)
    return np.clip(np.round(x / step) * step, -448, 448)


def e2m1(x: np.ndarray) -> np.ndarray:
    """The nearest of the sixteen values, ties to the even code."""
    size = np.minimum(np.abs(x), 6)
    away = np.abs(size[..., None] - E2M1)
    # Of two as near, the one with the even code.
    code = np.argmin(away + 1e-12 * (np.arange(8) % 2), axis=-1)
    return np.sign(x) * E2M1[code]


def power_below(size: np.ndarray) -> np.ndarray:
    """2^floor(log2), exact; 1 for zeros."""
    return 2.0 ** (np.frexp(np.where(size > 0, size, 1))[1] - 1)


@dataclass
class Slim:
    """A layer: tensors as stored, without its name, their types, and what they mean.

    Attributes:
        type: As the description has it.
        tensors: ``{suffix: tensor}``; with ``inner`` those of ``X.linear``.
        types: ``{suffix: type}``.
        residual: ``[N, K]`` that rounded activations meet, float64.
        bias: ``[N]`` float64, or None.
        smooth: ``[K]``, or None.
        low: ``(l1, l2)``, or None.
        numbers: What the formulas of its type need.
    """

    type: str
    tensors: dict[str, torch.Tensor]
    types: dict[str, str]
    residual: np.ndarray
    bias: np.ndarray | None
    smooth: np.ndarray | None = None
    low: tuple[np.ndarray, np.ndarray] | None = None
    numbers: dict[str, np.ndarray | float] = field(default_factory=dict)

    @property
    def plain_type(self) -> str:
        return self.type.replace("_SVD", "")

    def weight(self) -> np.ndarray:
        """W of activations as they come."""
        weight = self.residual
        if self.low is not None:
            weight = weight + self.low[1] @ self.low[0]
        return weight if self.smooth is None else weight * self.smooth

    def forward(
        self,
        x: np.ndarray,
        offset_sign: int = 1,
        per_token: bool = True,
        half: Callable[[np.ndarray], np.ndarray] = np.asarray,
    ) -> np.ndarray:
        """The layer's product.

        Args:
            x: ``[M, K]`` float64.
            offset_sign, per_token: -1 and False make wrong readings.
            half: Rounds multiplied activations to those of the engine.
        """
        x = x if self.smooth is None else x * self.smooth
        y = self._rounded(half(x), offset_sign, per_token)
        if self.low is not None:
            y = y + (x @ self.low[0].T) @ self.low[1].T
        return y

    def _rounded(self, x: np.ndarray, offset_sign: int, per_token: bool) -> np.ndarray:
        n, kind = self.numbers, self.plain_type
        if kind == "W8A8":
            codes = np.round(x / n["input_scale"] + offset_sign * n["input_offset"])
            return (np.clip(codes, -128, 127) @ n["codes"].T + n["quant_bias"]) * n["deq"]
        bias = 0 if self.bias is None else self.bias
        axis = -1 if per_token else None
        size = np.abs(x).max(axis=axis, keepdims=True)
        if kind in STEPS:
            scale = size / STEPS[kind]
            codes = np.clip(np.round(x / scale), -STEPS[kind] - 1, STEPS[kind])
            return (codes * scale) @ self.residual.T + bias
        if kind == "WFP8AFP8_DYNAMIC":
            scale = size / 448
            return (e4m3(x / scale) * scale) @ self.residual.T + bias
        if kind in ("W8A8_MXFP8", "W4A8_MXFP", "W4A4_MXFP4"):
            blocks = x.reshape(x.shape[0], -1, 32)
            below, rounding = (2, e2m1) if kind == "W4A4_MXFP4" else (8, e4m3)
            scale = power_below(np.abs(blocks).max(axis=-1, keepdims=True)) * 2.0**-below
            rounded = (rounding(blocks / scale) * scale).reshape(x.shape)
            return rounded @ self.residual.T + bias
        return x @ self.residual.T + bias


def make_layer(
    type_: str,
    weight: np.ndarray,
    bias: np.ndarray | None,
    seed: int = 0,
    *,
    smooth: bool = False,
    rank: int = 0,
    group: int = 0,
    asymmetric: bool = False,
    int64: bool = False,
    stored_bias: bool = True,
    offset: int | None = None,
    reach: float = 6,
) -> Slim:
    """Quantize a float layer.

    Args:
        type_: One of TYPES, without ``_SVD``.
        weight: ``[N, K]``.
        bias: ``[N]`` or None.
        seed: Of what is chosen at random: smoothing, offsets, static scales.
        smooth: Behind a multiplication of the activations.
        rank: Of the low-rank branch, 0 for none.
        group: Inputs that share a scale (integers only), 0 for all.
        asymmetric: Integer codes with offsets (integers only).
        int64: ``deq_scale`` as models in float16 have it.
        stored_bias: Also store the float bias, which older files of W8A8 do not have.
        offset: ``input_offset``; chosen at random without one.
        reach: Largest of the activations that static scales are for.
    """
    rng = np.random.default_rng(seed)
    columns = weight.shape[1]
    weight = weight.astype(np.float64)
    bias = None if bias is None else bias.astype(np.float32).astype(np.float64)
    tensors: dict[str, torch.Tensor] = {}
    multiply, low = None, None
    if smooth:
        multiply = rng.uniform(0.5, 2, columns).astype(np.float32).astype(np.float64)
        weight, reach = weight / multiply, reach * multiply.max()
        tensors["mul_scale"] = f32(multiply)
    if rank:
        u, s, v = np.linalg.svd(weight, full_matrices=False)
        low = tuple(
            part.astype(np.float32).astype(np.float64)
            for part in (v[:rank], u[:, :rank] * s[:rank])
        )
        weight = weight - low[1] @ low[0]
        tensors |= {"svd_lowrank_l1": f32(low[0]), "svd_lowrank_l2": f32(low[1])}
    makers = {"W8A8": static, "W8A8_DYNAMIC": integers, "W8A16": integers, "W4A4_DYNAMIC": integers}
    options = {"group": group, "asymmetric": asymmetric, "bits": 4 if type_[1] == "4" else 8}
    if type_ == "W8A8":
        options = {"bias": bias, "int64": int64, "rng": rng, "offset": offset, "reach": reach}
    elif type_ not in makers:
        options = {"type_": type_}
    made, residual, numbers = makers.get(type_, floats)(weight, **options)
    tensors |= made
    name = type_
    if rank:
        dynamic = type_.endswith("_DYNAMIC")
        name = type_.replace("_DYNAMIC", "_SVD_DYNAMIC") if dynamic else f"{type_}_SVD"
    types = dict.fromkeys(tensors, "FLOAT") | dict.fromkeys(made, name)
    if bias is not None and (stored_bias or type_ != "W8A8"):
        tensors["bias"], types["bias"] = f32(bias), "FLOAT"
    return Slim(name, tensors, types, residual, bias, multiply, low, numbers)


def f32(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))


def static(weight, bias, int64, rng, offset, reach):
    """int8 with one scale a row, for activations with one scale and offset in all."""
    scale = np.float32(1) * (np.abs(weight).max(axis=1) / 127).astype(np.float32)
    codes = np.clip(np.round(weight / scale[:, None]), -128, 127)
    if offset is None:
        offset = int(rng.integers(10, 60) * rng.choice([-1, 1]))
    room = 127 - abs(offset) if abs(offset) < 127 else 255
    input_scale = np.float32(reach * rng.uniform(0.9, 1.1) / room)
    deq = (input_scale * scale).astype(np.float32)
    given = np.zeros(len(weight)) if bias is None else bias
    quant_bias = np.round(given / deq.astype(np.float64) - codes.sum(axis=1) * offset)
    stored = torch.from_numpy(deq)
    tensors = {
        "weight": torch.from_numpy(codes.astype(np.int8)),
        "quant_bias": torch.from_numpy(quant_bias.astype(np.int32)),
        "input_scale": torch.tensor([float(input_scale)]),
        "input_offset": torch.tensor([float(offset)]),
        "deq_scale": stored.view(torch.int32).to(torch.int64) if int64 else stored,
    }
    exact = deq.astype(np.float64)
    numbers = {
        "codes": codes,
        "deq": exact,
        "quant_bias": quant_bias,
        "input_scale": float(input_scale),
        "input_offset": float(offset),
    }
    return tensors, codes * (exact / float(input_scale))[:, None], numbers


def integers(weight, group, asymmetric, bits):
    """int8, or int4 one in a byte, with scales and offsets of rows or groups."""
    rows, columns = weight.shape
    blocks = weight.reshape(rows, -1, group or columns)
    top = 2 ** (bits - 1) - 1
    if asymmetric:
        low, high = blocks.min(axis=-1, keepdims=True), blocks.max(axis=-1, keepdims=True)
        scale = ((high - low) / (2 * top + 1)).astype(np.float32).astype(np.float64)
        offset = np.round(-low / scale) - top - 1
    else:
        size = np.abs(blocks).max(axis=-1, keepdims=True)
        scale = (size / top).astype(np.float32).astype(np.float64)
        offset = np.zeros_like(scale)
    codes = np.clip(np.round(blocks / scale + offset), -top - 1, top)
    residual = ((codes - offset) * scale).reshape(rows, columns)
    tensors = {
        "weight": torch.from_numpy(codes.reshape(rows, columns).astype(np.int8)),
        "weight_scale": f32(scale[..., 0]),
        "weight_offset": f32(offset[..., 0]),
    }
    return tensors, residual, {}


def floats(weight, type_):
    """Float codes, with scales of rows or powers of two of blocks."""
    rows, columns = weight.shape
    if type_ == "WFP8AFP8_DYNAMIC":
        scale = (np.abs(weight).max(axis=1, keepdims=True) / 448).astype(np.float32)
        scale = scale.astype(np.float64)
        values = e4m3(weight / scale)
        tensors = {
            "weight": f32(values).to(torch.float8_e4m3fn),
            "weight_scale": f32(scale),
            "weight_offset": torch.zeros(rows, 1),
        }
        return tensors, values * scale, {}
    tensors, dual = {}, np.ones((rows, 1))
    if type_ == "W4A4_MXFP4_DUALSCALE":
        parts = [weight[:, i : i + 512] for i in range(0, columns, 512)]
        dual = np.stack([np.abs(part).max(axis=1) / 6 for part in parts], axis=1)
        dual = dual.astype(np.float32).astype(np.float64)
        tensors["weight_dual_scale"] = f32(dual[..., None])
        dual = np.repeat(dual, 512, axis=1)[:, :columns]
    blocks = (weight / dual).reshape(rows, -1, 32)
    eight = type_ == "W8A8_MXFP8"
    scale = power_below(np.abs(blocks).max(axis=-1, keepdims=True)) * 2.0 ** (-8 if eight else -2)
    values = (e4m3 if eight else e2m1)(blocks / scale)
    exponents = np.round(np.log2(scale[..., 0])) + 127
    tensors["weight_scale"] = torch.from_numpy(exponents.astype(np.uint8))
    flat = values.reshape(rows, columns)
    if eight:
        tensors["weight"] = f32(flat).to(torch.float8_e4m3fn)
    else:
        code = np.searchsorted(E2M1, np.abs(flat)) + 8 * (flat < 0)
        packed = code[:, 0::2] + 16 * code[:, 1::2]
        tensors["weight"] = torch.from_numpy(packed.astype(np.uint8))
    return tensors, (values * scale).reshape(rows, columns) * dual, {}


# ------------------------------------------------------------------------------------------ files


def stored(name: str, layer: Slim, wrapped: bool = True) -> dict[str, tuple[torch.Tensor, str]]:
    """``{stored name: (tensor, type)}``; wrappers are taken off when repacked for diffusers."""
    inner = f"{name}.linear" if layer.smooth is not None and wrapped else name
    return {
        f"{name}.div.mul_scale" if part == "mul_scale" and wrapped else f"{inner}.{part}": (
            tensor,
            layer.types[part],
        )
        for part, tensor in layer.tensors.items()
    }


def write(
    folder: Path,
    tensors: dict[str, tuple[torch.Tensor, str]],
    *,
    weights: str = "quant_model_weights",
    description: str | None = "quant_model_description",
    config: dict | None = None,
    shards: int = 1,
    more: dict | None = None,
) -> Path:
    """A folder as the savers write it; ``more`` is added to the description."""
    folder.mkdir(parents=True, exist_ok=True)
    data = {name: tensor.contiguous() for name, (tensor, _) in tensors.items()}
    if shards > 1:
        names = sorted(data)
        index = {}
        for number in range(shards):
            file = f"{weights}-{number + 1:05}-of-{shards:05}.safetensors"
            part = names[number::shards]
            save_file({name: data[name] for name in part}, folder / file)
            index |= dict.fromkeys(part, file)
        text = json.dumps({"metadata": {}, "weight_map": index})
        (folder / f"{weights}.safetensors.index.json").write_text(text, encoding="utf-8")
    else:
        save_file(data, folder / f"{weights}.safetensors")
    if description is not None:
        types = {name: type_ for name, (_, type_) in tensors.items()}
        kinds = sorted({type_ for type_ in types.values() if type_ != "FLOAT"}) or ["FLOAT"]
        about = {"version": "1.0.0", "model_quant_type": kinds[0], "group_size": 0}
        about |= {"metadata": {}, "optional": {}, **types, **(more or {})}
        (folder / f"{description}.json").write_text(json.dumps(about), encoding="utf-8")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


# -------------------------------------------------------------------------------------------- Wan

#: shapes of a small Wan 2.2 under the names of its authors, which ComfyUI uses
WIDTH, FFN, TEXT, CHANNELS, BLOCKS = 256, 512, 4096, 16, 2
WAN = {
    "patch_embedding.weight": (WIDTH, CHANNELS, 1, 2, 2),
    "patch_embedding.bias": (WIDTH,),
    "text_embedding.0": (WIDTH, TEXT),
    "text_embedding.2": (WIDTH, WIDTH),
    "time_embedding.0": (WIDTH, 256),
    "time_embedding.2": (WIDTH, WIDTH),
    "time_projection.1": (6 * WIDTH, WIDTH),
    "head.head": (4 * CHANNELS, WIDTH),
    "head.modulation": (1, 2, WIDTH),
    **{
        f"blocks.{block}.{name}": shape
        for block in range(BLOCKS)
        for name, shape in {
            **{
                f"{attention}.{part}": (WIDTH, WIDTH)
                for attention in ("self_attn", "cross_attn")
                for part in "qkvo"
            },
            **{
                f"{attention}.norm_{part}.weight": (WIDTH,)
                for attention in ("self_attn", "cross_attn")
                for part in "qk"
            },
            "norm3.weight": (WIDTH,),
            "norm3.bias": (WIDTH,),
            "ffn.0": (FFN, WIDTH),
            "ffn.2": (WIDTH, FFN),
            "modulation": (1, 6, WIDTH),
        }.items()
    },
}

#: what turns these names into those of diffusers, one after the other
RENAMES = (
    ("time_embedding.0", "condition_embedder.time_embedder.linear_1"),
    ("time_embedding.2", "condition_embedder.time_embedder.linear_2"),
    ("text_embedding.0", "condition_embedder.text_embedder.linear_1"),
    ("text_embedding.2", "condition_embedder.text_embedder.linear_2"),
    ("time_projection.1", "condition_embedder.time_proj"),
    ("head.modulation", "scale_shift_table"),
    ("head.head", "proj_out"),
    ("modulation", "scale_shift_table"),
    ("ffn.0", "ffn.net.0.proj"),
    ("ffn.2", "ffn.net.2"),
    ("norm2", "norm__placeholder"),
    ("norm3", "norm2"),
    ("norm__placeholder", "norm3"),
    *((f"self_attn.{part}", f"attn1.to_{part}") for part in "qkv"),
    ("self_attn.o", "attn1.to_out.0"),
    *((f"cross_attn.{part}", f"attn2.to_{part}") for part in "qkv"),
    ("cross_attn.o", "attn2.to_out.0"),
    ("self_attn.norm", "attn1.norm"),
    ("cross_attn.norm", "attn2.norm"),
)


def diffusers_name(name: str) -> str:
    for old, new in RENAMES:
        name = name.replace(old, new)
    return name


def wan_floats(seed: int = 0) -> dict[str, np.ndarray]:
    """A float model: ``{native name: tensor}``, of float32 values."""
    rng = np.random.default_rng(seed)
    made = {}
    for name, shape in WAN.items():
        if name.endswith((".weight", ".bias", "modulation")):
            near = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            made[name] = near + 0.1 * rng.standard_normal(shape)
        else:
            made[f"{name}.weight"] = rng.standard_normal(shape) / shape[1] ** 0.5
            made[f"{name}.bias"] = 0.1 * rng.standard_normal(shape[0])
    return {name: value.astype(np.float32) for name, value in made.items()}

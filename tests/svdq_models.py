"""SVDQuant checkpoints with known content, made from float models as published converters do.

A float model under diffusers' names becomes a checkpoint in one of the published forms; what was
put into it stays known, layer by layer:

| step                          | how                                                            |
|-------------------------------|----------------------------------------------------------------|
| fuse                          | q, k, v and w3, w1; FLUX's last single layer becomes two       |
| smooth                        | columns times 0.5 ... 2, the same for layers of one input      |
| low rank                      | SVD of the smoothed weight; ``down`` is divided by smooth then |
| round                         | the rest, to int4 by 64 or nvfp4 by 16 (two levels of scales)  |
| shift                         | second MLP layers of int4: the bias gives back what x + shift  |
|                               | adds to the rounded part                                       |
| modulation                    | int4 by 64 with zero points, rows interleaved, +1 in the bias  |
| pack                          | ``svdq_layouts``                                               |

Nothing of the pack is used here but the map of unquantized diffusers checkpoints, which
``test_families`` holds against diffusers itself.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from tempfile import TemporaryDirectory

import svdq_layouts as layouts
import torch
from comfy_models import run_inputs
from safetensors.torch import load_file, save_file
from support import oracle, pack, run_oracle
from torch import Tensor

__all__ = ["SHIFT", "Awq", "Made", "Options", "Svdq", "float_model", "make"]

SHIFT = 0.171875
#: what the four bits of e2m1 stand for
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]).double()
GROUP = {"int4": 64, "nvfp4": 16}
SMALL = (
    "flux", "flux_schnell", "flux_depth", "flux_fill", "flux2_klein", "chroma", "qwen_image",
    "qwen_image_edit", "z_image", "sdxl", "flux_server",
)  # fmt: skip


@dataclass(frozen=True)
class Options:
    """What published files differ in.

    Attributes:
        precision: "int4" or "nvfp4".
        rank: Of the low-rank branch, a multiple of 16; 0 for an empty one.
        dtype: Of everything that is not quantized.
        scales: nvfp4's second level. "file": of the whole layer, but of each row where layers were
            fused; "rows": of each row everywhere; "both": the product of the two; "none".
        modulation: "awq", "plain", or "interleaved": plain in the rows' order of "awq".
        names: 1 or 2, the engine's generation; 0 for the family's own.
        form: "file", "folder" (the old one, of two files), "lite" (diffusers' folder of stock
            layers), or "manifest" (a file that lists its layers in its metadata).
        metadata: Whether a single file has any.
        refiners: Whether Z-Image's refiners are quantized.
    """

    precision: str = "int4"
    rank: int = 32
    dtype: torch.dtype = torch.bfloat16
    scales: str = "file"
    modulation: str = "awq"
    names: int = 0
    form: str = "file"
    metadata: bool = True
    refiners: bool = True


# ------------------------------------------------------------------------------------- one layer


@dataclass(frozen=True)
class Svdq:
    """A W4A4 layer ``[N, K]``, as constructed.

    Attributes:
        name: Its module in the file.
        precision: "int4" or "nvfp4".
        unsigned: Whether its activations are shifted and rounded to 0..15.
        codes: ``[N, K]`` nibbles, 0..15.
        scale: ``[N, G]`` in the file's dtype.
        tensor_scale: ``[1]`` or None.
        row_scale: ``[N]`` or None.
        smooth: ``[K]``.
        down, up: ``[R, K]`` and ``[N, R]``.
        stored_bias: ``[N]`` as the file has it, or None.
        wanted: The float weight that was quantized, and its bias.
    """

    name: str
    precision: str
    unsigned: bool
    codes: Tensor
    scale: Tensor
    tensor_scale: Tensor | None
    row_scale: Tensor | None
    smooth: Tensor
    down: Tensor
    up: Tensor
    stored_bias: Tensor | None
    wanted: tuple[Tensor, Tensor | None]

    @property
    def values(self) -> Tensor:
        """What the codes stand for, ``[N, K]`` float64."""
        if self.precision == "nvfp4":
            return E2M1[self.codes.long()]
        return (self.codes.long() - 16 * (self.codes > 7)).double()

    @property
    def second(self) -> Tensor:
        """The second level of scales, ``[N, 1]`` float64."""
        scale = torch.ones(len(self.codes), 1, dtype=torch.float64)
        for level in (self.tensor_scale, self.row_scale):
            if level is not None:
                scale = scale * level.double()[:, None]
        return scale

    @property
    def rounded(self) -> Tensor:
        """The rounded part of the weight, for smoothed activations: ``[N, K]`` float64."""
        rows, groups = self.scale.shape
        grouped = self.values.view(rows, groups, -1) * self.scale.double()[:, :, None]
        return grouped.reshape(rows, -1) * self.second

    @cached_property
    def weight(self) -> Tensor:
        """The weight that the layer stands for."""
        exact = self.rounded / self.smooth.double() + self.up.double() @ self.down.double()
        return exact.float()

    @property
    def bias(self) -> Tensor | None:
        """The bias of the same layer without a shift."""
        if not self.unsigned:
            return None if self.stored_bias is None else self.stored_bias.float()
        return (self.stored_bias.double() + self.shift_bias).float()

    @property
    def shift_bias(self) -> Tensor:
        """What shifting the activations adds to the product."""
        return SHIFT * (self.rounded / self.smooth.double()).sum(1)

    def tensors(self, names: int) -> dict[str, Tensor]:
        """The tensors of the file, without the layer's name."""
        rank = self.up.shape[1]
        packed = {
            "qweight": layouts.pack_codes(self.codes),
            "smooth": layouts.pack_vector(self.smooth),
            # what smoothing was before converters moved it elsewhere; no engine reads it
            "smooth_orig": layouts.pack_vector(self.smooth.roll(1) * 1.5),
            "lora_down": (
                layouts.pack_down(self.down) if rank else self.down.new_empty(self.down.shape[1], 0)
            ),
            "lora_up": layouts.pack_up(self.up) if rank else self.up,
        }
        if self.precision == "int4":
            packed["wscales"] = layouts.pack_scales_int4(self.scale)
        else:
            packed["wscales"] = layouts.pack_scales_nvfp4(self.scale)
        if self.tensor_scale is not None:
            packed["wtscale"] = self.tensor_scale
        if self.row_scale is not None:
            packed["wcscales"] = layouts.pack_vector(self.row_scale)
        if self.stored_bias is not None:
            packed["bias"] = layouts.pack_vector(self.stored_bias)
        if names == 2:
            new = {"smooth": "smooth_factor", "smooth_orig": "smooth_factor_orig"}
            new |= {"lora_down": "proj_down", "lora_up": "proj_up"}
            packed = {new.get(key, key): value for key, value in packed.items()}
        return packed


@dataclass(frozen=True)
class Awq:
    """A W4A16 layer ``[N, K]``, as constructed: ``code * scale + zero`` by groups of 64.

    Attributes:
        name: Its module in the file.
        codes: ``[N, K]``, 0..15.
        scale, zero: ``[N, G]``.
        raised: ``[N]``, the bias as the file has it, rows in the model's own order; or None.
        splits: Chunks whose rows the file interleaves; 1 where it does not.
        wanted: The float weight that was quantized, and its bias.
    """

    name: str
    codes: Tensor
    scale: Tensor
    zero: Tensor
    raised: Tensor | None
    splits: int
    wanted: tuple[Tensor, Tensor | None]

    @cached_property
    def weight(self) -> Tensor:
        """The weight that the layer stands for."""
        rows, groups = self.scale.shape
        grouped = self.codes.double().view(rows, groups, -1)
        exact = grouped * self.scale.double()[:, :, None] + self.zero.double()[:, :, None]
        return exact.reshape(rows, -1).float()

    @property
    def bias(self) -> Tensor | None:
        """The bias without the ones."""
        if self.raised is None:
            return None
        return self.raised.float() - ones_of_scales(len(self.raised), self.splits)

    def tensors(self, names: int) -> dict[str, Tensor]:
        def turned(rows: Tensor) -> Tensor:
            return layouts.interleave_rows(rows, self.splits)

        packed = {
            "qweight": layouts.pack_awq(turned(self.codes)),
            "wscales": turned(self.scale).T.contiguous(),
            "wzeros": turned(self.zero).T.contiguous(),
        }
        return packed if self.raised is None else packed | {"bias": turned(self.raised)}


def ones_of_scales(rows: int, splits: int) -> Tensor:
    """``[rows]``: one where a chunk is a scale, which the engine does not add 1 to itself."""
    ones = torch.zeros(splits, rows // splits)
    if splits > 1:
        ones[1] = ones[-2] = 1
    return ones.flatten()


def quantize_svdq(
    name: str,
    weight: Tensor,
    bias: Tensor | None,
    smooth: Tensor,
    options: Options,
    *,
    unsigned: bool,
    parts: Iterable[int],
) -> Svdq:
    """A float layer as the converter rounds it.

    Args:
        name: Its module in the file.
        weight, bias: float32.
        smooth: ``[K]`` in the file's dtype.
        options: Of the file.
        unsigned: Whether activations are shifted.
        parts: Rows of the layers that were fused into it, one after the other.
    """
    dtype = options.dtype
    smoothed = weight.double() * smooth.double()
    up, down = low_rank(smoothed, options.rank)
    up, down = up.to(dtype), down.to(dtype)
    rest = (smoothed - up.double() @ down.double()).view(len(weight), -1, GROUP[options.precision])
    largest = rest.abs().amax(-1)
    tensor_scale = row_scale = None
    if options.precision == "int4":
        scale = (largest / 7).to(dtype)
        steps = rest / scale.double()[:, :, None].clamp_min(1e-30)
        codes = steps.round().clamp(-8, 7).long() & 15
    else:
        tensor_scale, row_scale = second_level(largest, parts, options)
        second = torch.ones(len(weight), 1, dtype=torch.float64)
        for level in (tensor_scale, row_scale):
            second = second if level is None else second * level.double()[:, None]
        scale = (largest / 6 / second).clamp_max(448).to(torch.float8_e4m3fn)
        steps = rest / (scale.double() * second)[:, :, None].clamp_min(1e-30)
        between = (E2M1[1:8] + E2M1[:7]) / 2
        codes = torch.bucketize(steps.abs(), between) + 8 * (steps < 0)
    codes = codes.reshape(weight.shape).to(torch.uint8)
    unsmoothed = (down.double() / smooth.double()).to(dtype)
    made = Svdq(
        name, options.precision, unsigned, codes, scale, tensor_scale, row_scale, smooth,
        unsmoothed, up, None, (weight, bias),
    )  # fmt: skip
    if unsigned:
        return replace(made, stored_bias=(bias.double() - made.shift_bias).to(dtype))
    return made if bias is None else replace(made, stored_bias=bias.to(dtype))


def low_rank(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """``[N, R]`` and ``[R, K]`` whose product is the largest part of a weight."""
    if not rank:
        return weight.new_empty(len(weight), 0), weight.new_empty(0, weight.shape[1])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(rank)
        u, values, v = torch.svd_lowrank(weight.float(), q=rank, niter=1)
    return (u * values).double(), v.T.double()


def second_level(
    largest: Tensor, parts: Iterable[int], options: Options
) -> tuple[Tensor | None, Tensor | None]:
    """nvfp4's scale of the tensor, and those of the rows."""
    parts = list(parts)
    kind = options.scales
    if kind == "file":
        kind = "rows" if len(parts) > 1 else "tensor"
    if kind == "none":
        return None, None
    tops = torch.stack([part.max() for part in largest.split(parts)]) / 6 / 448
    if kind == "tensor":
        return tops.to(options.dtype), None
    if kind == "both":  # the tensor's in float32, as some write it
        spread = torch.linspace(0.5, 1, len(largest)).double()
        return tops.max().float()[None], spread.to(options.dtype)
    return None, tops.repeat_interleave(torch.tensor(parts)).to(options.dtype)


def quantize_awq(
    name: str, weight: Tensor, bias: Tensor | None, splits: int, dtype: torch.dtype
) -> Awq:
    """A float layer as the converter rounds it; arguments as of ``quantize_svdq``."""
    grouped = weight.double().view(len(weight), -1, 64)
    scale = (grouped.abs().amax(-1) / 7).to(dtype)
    codes = (grouped / scale.double()[:, :, None]).round().clamp(-7, 8) + 7
    raised = None if bias is None else (bias + ones_of_scales(len(bias), splits)).to(dtype)
    codes = codes.reshape(weight.shape).to(torch.uint8)
    return Awq(name, codes, scale, (-7 * scale.double()).to(dtype), raised, splits, (weight, bias))


# ------------------------------------------------------------------------- what becomes a layer


@dataclass(frozen=True)
class Target:
    """A layer of the file.

    Attributes:
        name: Its module in the file.
        sources: diffusers' modules whose rows it has, in order.
        columns: ``(first, number)`` of the sources' columns; None for all.
        unsigned: Whether GELU feeds it.
        splits: Chunks of a modulation; 0 for a W4A4 layer.
        input: Name of what flows in, where layers share their smoothing; the layer's own otherwise.
        fused: Smoothing was moved into the layer before.
        no_bias: A part of a layer whose other part has the bias.
        plain: Only fused, not quantized.
    """

    name: str
    sources: tuple[str, ...]
    columns: tuple[int, int] | None = None
    unsigned: bool = False
    splits: int = 0
    input: str = ""
    fused: bool = False
    no_bias: bool = False
    plain: bool = False


def qkv(block: str, name: str, **more) -> Target:
    return Target(f"{block}.{name}", tuple(f"{block}.attn.to_{part}" for part in "qkv"), **more)


def added_qkv(block: str, name: str) -> Target:
    sources = tuple(f"{block}.attn.add_{part}_proj" for part in "qkv")
    return Target(f"{block}.{name}", sources)


def blocks(weights: Mapping[str, Tensor], stack: str) -> list[str]:
    heads = {key.split(".")[1] for key in weights if key.startswith(f"{stack}.")}
    return [f"{stack}.{number}" for number in sorted(heads, key=int)]


def flux_targets(weights: Mapping[str, Tensor], options: Options) -> list[Target]:
    """FLUX.1 and Chroma, which has no modulation in its blocks."""
    targets = []
    gelu = options.precision == "int4"
    for block in blocks(weights, "transformer_blocks"):
        for norm in ("norm1", "norm1_context"):
            if f"{block}.{norm}.linear.weight" in weights:
                name = f"{block}.{norm}.linear"
                targets.append(Target(name, (name,), splits=6))
        targets += [
            qkv(block, "qkv_proj"),
            added_qkv(block, "qkv_proj_context"),
            Target(f"{block}.out_proj", (f"{block}.attn.to_out.0",), fused=True),
            Target(f"{block}.out_proj_context", (f"{block}.attn.to_add_out",), fused=True),
        ]
        for stream in ("", "_context"):
            ff = f"{block}.ff{stream}.net"
            targets += [
                Target(f"{block}.mlp{stream}_fc1", (f"{ff}.0.proj",)),
                Target(f"{block}.mlp{stream}_fc2", (f"{ff}.2",), unsigned=gelu),
            ]
    for block in blocks(weights, "single_transformer_blocks"):
        if f"{block}.norm.linear.weight" in weights:
            targets.append(Target(f"{block}.norm.linear", (f"{block}.norm.linear",), splits=3))
        last = (f"{block}.proj_out",)
        rows, columns = weights[f"{block}.proj_out.weight"].shape
        second = (rows, columns - rows)
        targets += [
            qkv(block, "qkv_proj", input=block),
            Target(f"{block}.mlp_fc1", (f"{block}.proj_mlp",), input=block),
            Target(f"{block}.out_proj", last, (0, rows), fused=True, no_bias=True),
            Target(f"{block}.mlp_fc2", last, second, unsigned=gelu),
        ]
    return targets


#: the engine's second generation of names; of a single block's layers, mlp_fc1 and mlp_fc2 stay
FLUX_NEW = {
    "qkv_proj": "attn.to_qkv",
    "qkv_proj_context": "attn.add_qkv_proj",
    "out_proj": "attn.to_out.0",
    "out_proj_context": "attn.to_add_out",
    "mlp_fc1": "ff.net.0.proj",
    "mlp_fc2": "ff.net.2",
    "mlp_context_fc1": "ff_context.net.0.proj",
    "mlp_context_fc2": "ff_context.net.2",
}
FLUX_NEW_SINGLE = {"qkv_proj": "attn.to_qkv", "out_proj": "attn.to_out"}


def flux_renamed(targets: list[Target], options: Options) -> list[Target]:
    """The layers under the names of the engine's second generation."""
    if options.names != 2:
        return targets
    named = []
    for target in targets:
        block, local = ".".join(target.name.split(".")[:2]), target.name.split(".", 2)[2]
        table = FLUX_NEW_SINGLE if block.startswith("single") else FLUX_NEW
        named.append(replace(target, name=f"{block}.{table.get(local, local)}"))
    return named


def flux_file_name(key: str, options: Options) -> str:
    """The first generation keeps norms in the block itself."""
    return key.replace(".attn.norm_", ".norm_") if options.names == 1 else key


def qwen_targets(weights: Mapping[str, Tensor], options: Options) -> list[Target]:
    targets = []
    for block in blocks(weights, "transformer_blocks"):
        targets += [
            qkv(block, "attn.to_qkv"),
            added_qkv(block, "attn.add_qkv_proj"),
            Target(f"{block}.attn.to_out.0", (f"{block}.attn.to_out.0",)),
            Target(f"{block}.attn.to_add_out", (f"{block}.attn.to_add_out",)),
        ]
        for stream in ("img", "txt"):
            first, second = f"{block}.{stream}_mlp.net.0.proj", f"{block}.{stream}_mlp.net.2"
            modulation = f"{block}.{stream}_mod.1"
            targets += [
                Target(first, (first,)),
                Target(second, (second,), unsigned=options.precision == "int4"),
                Target(modulation, (modulation,), splits=6),
            ]
    return targets


def z_image_targets(weights: Mapping[str, Tensor], options: Options) -> list[Target]:
    targets = []
    for stack in ("layers", "noise_refiner", "context_refiner"):
        plain = stack != "layers" and not options.refiners
        for block in blocks(weights, stack):
            attention, ff = f"{block}.attention", f"{block}.feed_forward"
            targets.append(Target(f"{ff}.net.0.proj", (f"{ff}.w3", f"{ff}.w1"), plain=plain))
            targets.append(Target(f"{ff}.net.2", (f"{ff}.w2",), plain=plain))
            if not plain:
                names = tuple(f"{attention}.to_{part}" for part in "qkv")
                targets.append(Target(f"{attention}.to_qkv", names))
                targets.append(Target(f"{attention}.to_out.0", (f"{attention}.to_out.0",)))
    return targets


def sdxl_targets(weights: Mapping[str, Tensor], options: Options) -> list[Target]:
    targets = []
    for key in sorted(weights):
        if not key.endswith(".attn1.to_q.weight"):
            continue
        block = key.removesuffix(".attn1.to_q.weight")
        names = tuple(f"{block}.attn1.to_{part}" for part in "qkv")
        targets.append(Target(f"{block}.attn1.to_qkv", names))
        for name in ("attn1.to_out.0", "attn2.to_q", "attn2.to_out.0", "ff.net.0.proj", "ff.net.2"):
            targets.append(Target(f"{block}.{name}", (f"{block}.{name}",)))
    return targets


def flux2_targets(weights: Mapping[str, Tensor], options: Options) -> list[Target]:
    targets = []
    for block in blocks(weights, "transformer_blocks"):
        targets += [qkv(block, "attn.to_qkv"), added_qkv(block, "attn.to_added_qkv")]
        for name in (
            *("attn.to_out.0", "attn.to_add_out", "ff.linear_in", "ff.linear_out"),
            *("ff_context.linear_in", "ff_context.linear_out"),
        ):
            targets.append(Target(f"{block}.{name}", (f"{block}.{name}",)))
    return targets


def flux2_single_targets(weights: Mapping[str, Tensor]) -> list[Target]:
    """FLUX.2's single blocks keep q, k, v, gate and up in one layer, which is cut by rows."""
    targets = []
    for block in blocks(weights, "single_transformer_blocks"):
        rows, columns = weights[f"{block}.attn.to_out.weight"].shape
        last = (f"{block}.attn.to_out",)
        first = f"{block}.attn.to_qkv_mlp_proj"
        targets += [
            Target(f"{block}.attn.qkv_proj", (f"{first}[:{3 * rows}]",), input=block),
            Target(f"{block}.attn.mlp_fc1", (f"{first}[{3 * rows}:]",), input=block),
            Target(f"{block}.attn.out_proj", last, (0, rows)),
            Target(f"{block}.attn.mlp_fc2", last, (rows, columns - rows)),
        ]
    return targets


def lite_targets(weights: Mapping[str, Tensor], options: Options) -> list[Target]:
    """Every layer of the blocks under its stock name, none shifted, modulation not interleaved."""
    targets = []
    for key in sorted(weights):
        name = key.removesuffix(".weight")
        if name == key or weights[key].ndim != 2 or any(n % 128 for n in weights[key].shape):
            continue
        inside = "transformer_blocks." in name or name.startswith("layers.")
        if "_modulation_" in name or (inside and ("norm" in name or "_mod." in name)):
            targets.append(Target(name, (name,), splits=1))
        elif inside and "adaLN" not in name:
            targets.append(Target(name, (name,)))
    return targets


@dataclass(frozen=True)
class Family:
    """How the files of a family are.

    Attributes:
        targets: Its layers.
        names: The generation of their names.
        model_class: What the metadata call it.
        file_name: The name in the file of a tensor that is not quantized.
    """

    targets: Callable[[Mapping[str, Tensor], Options], list[Target]]
    names: int
    model_class: str
    file_name: Callable[[str, Options], str] = lambda key, options: key


FAMILIES = {
    "FluxTransformer2DModel": Family(
        lambda weights, options: flux_renamed(flux_targets(weights, options), options),
        1,
        "NunchakuFluxTransformer2dModel",
        flux_file_name,
    ),
    "ChromaTransformer2DModel": Family(
        lambda weights, options: flux_renamed(flux_targets(weights, options), options),
        1,
        "NunchakuChromaTransformer2dModel",
        flux_file_name,
    ),
    "QwenImageTransformer2DModel": Family(qwen_targets, 2, "NunchakuQwenImageTransformer2DModel"),
    "ZImageTransformer2DModel": Family(z_image_targets, 2, "NunchakuZImageTransformer2DModel"),
    "UNet2DConditionModel": Family(sdxl_targets, 1, "NunchakuSDXLUNet2DConditionModel"),
    "Flux2Transformer2DModel": Family(
        lambda weights, options: flux2_targets(weights, options) + flux2_single_targets(weights),
        2,
        "NunchakuFlux2Transformer2DModel",
    ),
}


# -------------------------------------------------------------------------------- a whole model


Floats = tuple[dict[str, Tensor], dict, dict[str, Tensor]]


def float_model(name: str) -> Floats:
    """Weights under diffusers' names, config.json, and inputs by ComfyUI's names."""
    if name in SMALL:
        return small_model(name)
    with TemporaryDirectory() as folder:  # gigabytes
        return read_model(run_oracle("svdq_floats.py", Path(folder), name) / name)


@cache
def small_model(name: str) -> Floats:
    return read_model(oracle("svdq_floats.py", *SMALL) / name)


def read_model(folder: Path) -> Floats:
    weights = {}
    for file in sorted(folder.glob("diffusion_pytorch_model*.safetensors")):
        weights |= load_file(file)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return weights, config, run_inputs(load_file(folder / "run.safetensors"))


@dataclass(frozen=True)
class Use:
    """Where a layer of the file stands in a layer of diffusers: rows of the one, columns of the
    other.

    Attributes:
        layer: Its module in the file.
        rows: First and last + 1 of its rows.
        columns: First and last + 1 of the columns that it takes.
    """

    layer: str
    rows: tuple[int, int]
    columns: tuple[int, int]


@dataclass
class Made:
    """A checkpoint on the disk and what it holds.

    Attributes:
        path: File or folder.
        options: As made.
        layers: Quantized layers by their module in the file.
        uses: diffusers' module -> the layers that it is made of.
        weights: diffusers' names -> float32: what the checkpoint means.
        config: The float model's config.json.
        inputs: Of one pass.
    """

    path: Path
    options: Options
    layers: dict[str, Svdq | Awq]
    uses: dict[str, list[Use]]
    weights: dict[str, Tensor]
    config: dict
    inputs: dict[str, Tensor]

    def native(self) -> dict[str, Tensor]:
        """What the checkpoint means, under ComfyUI's names."""
        family, moves = self.moves()
        return {move.native: self._join(move) for move in moves} | family.extras(
            set(self.weights), self.config
        )

    def moves(self):
        """The family and the moves of diffusers' names to ComfyUI's, as of any float checkpoint."""
        keys = set(self.weights)

        def shapes(key: str) -> tuple[int, ...]:
            return tuple(self.weights[key].shape)

        family, _ = pack("loaders.families").detect_family(keys, self.config, shapes)
        return family, family.moves(keys, self.config, shapes)

    def _join(self, move) -> Tensor:
        pieces = []
        for piece in move.pieces:
            tensor = self.weights[piece.key]
            if piece.op == "swap_halves":
                tensor = torch.cat(tensor.chunk(2)[::-1])
            pieces.append(tensor)
        return pieces[0] if move.axis == "single" else torch.cat(pieces)


def make(
    model: str, path: Path, options: Options | None = None, /, seed: int = 0, **changed
) -> Made:
    """Write a checkpoint of a float model.

    Args:
        model: A name of ``oracles/svdq_floats.py``.
        path: File to write; a folder in the forms that are folders.
        options: What it is like.
        seed: Of the smoothing.
        changed: Fields of ``Options`` to set.
    """
    options = replace(options or Options(), **changed)
    floats, config, inputs = float_model(model)
    family = FAMILIES[config["_class_name"]]
    if options.form in ("lite", "manifest"):
        options = replace(options, names=2)
    options = replace(options, names=options.names or family.names)
    if options.form == "lite":
        targets = lite_targets(floats, options)
    else:
        targets = family.targets(floats, options)
    if options.form == "manifest":
        targets = [replace(target, unsigned=False) for target in targets]

    stored: dict[str, Tensor] = {}
    layers: dict[str, Svdq | Awq] = {}
    uses: dict[str, list[Use]] = {}
    meant: dict[str, Tensor] = {}
    taken = set()
    for target in targets:
        parts = [read_source(floats, source) for source in target.sources]
        taken |= {source.partition("[")[0] for source in target.sources}
        weight = torch.cat([part[0] for part in parts])
        biases = [part[1] for part in parts if part[1] is not None]
        bias = torch.cat(biases) if biases and not target.no_bias else None
        sizes = [len(part[0]) for part in parts]
        if target.columns is not None:
            weight = weight.narrow(1, *target.columns)
            if target.no_bias and biases:  # converters write zeros where a layer has none
                bias = torch.zeros(len(weight))
        if target.plain or (target.splits and options.modulation != "awq"):
            write_plain(target, weight, bias, sizes, options, stored, meant)
            continue
        if target.splits:
            layer = quantize_awq(target.name, weight, bias, target.splits, options.dtype)
        else:
            layer = quantize_svdq(
                target.name, weight, bias, smoothing(target, weight.shape[1], options, seed),
                options, unsigned=target.unsigned, parts=sizes,
            )  # fmt: skip
        layers[target.name] = layer
        for key, value in layer.tensors(options.names).items():
            stored[f"{target.name}.{key}"] = value
        note_uses(target, sizes, weight.shape[1], uses)
    for module, found in uses.items():
        assemble(module, found, layers, floats, meant)
    for key, value in floats.items():
        if key.rpartition(".")[0] in taken:
            continue
        stored[family.file_name(key, options)] = value.to(options.dtype)
        meant[key] = value.to(options.dtype).float()
    assert meant.keys() == floats.keys()
    write(path, stored, config, family.model_class, targets, layers, options)
    return Made(path, options, layers, uses, meant, config, inputs)


def read_source(floats: Mapping[str, Tensor], source: str) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a module, or of the rows that ``[a:b]`` behind its name says."""
    name, _, rows = source.partition("[")
    weight, bias = floats[f"{name}.weight"], floats.get(f"{name}.bias")
    if rows:
        first, last = (int(end) if end else None for end in rows.rstrip("]").split(":"))
        weight, bias = weight[first:last], None if bias is None else bias[first:last]
    return weight, bias


def smoothing(target: Target, columns: int, options: Options, seed: int) -> Tensor:
    """``[K]``: 0.5 ... 2, or ones where the layer before smooths."""
    if target.fused:
        return torch.ones(columns, dtype=options.dtype)
    name = target.input or target.name
    generator = torch.Generator().manual_seed(seed + sum(map(ord, name)))
    return (2 ** (2 * torch.rand(columns, generator=generator) - 1)).to(options.dtype)


def write_plain(target, weight, bias, sizes, options, stored, meant) -> None:
    """A layer that is fused or turned as if it were quantized, but in floats."""
    splits = target.splits if options.modulation == "interleaved" else 1
    for part, value in (("weight", weight), ("bias", bias)):
        if value is None:
            continue
        ones = ones_of_scales(len(value), splits) if part == "bias" else 0
        raised = (value + ones).to(options.dtype)
        turned = layouts.interleave_rows(raised, splits) if splits > 1 else raised
        stored[f"{target.name}.{part}"] = turned
        exact = (raised.float() - ones).split(sizes)
        for source, rows in zip(target.sources, exact, strict=True):
            meant[f"{source}.{part}"] = rows


def note_uses(target: Target, sizes: list[int], columns: int, uses) -> None:
    first = 0
    start = target.columns[0] if target.columns else 0
    for source, rows in zip(target.sources, sizes, strict=True):
        use = Use(target.name, (first, first + rows), (start, start + columns))
        uses.setdefault(source.partition("[")[0], []).append(use)
        first += rows


def assemble(module, found, layers, floats, meant) -> None:
    """A module of diffusers from the layers that it is made of."""
    weights = [layers[use.layer].weight[slice(*use.rows)] for use in found]
    biases = [layers[use.layer].bias for use in found]
    biases = [
        bias[slice(*use.rows)] for bias, use in zip(biases, found, strict=True) if bias is not None
    ]
    by_columns = len({use.columns for use in found}) > 1
    meant[f"{module}.weight"] = torch.cat(weights, dim=1 if by_columns else 0)
    assert meant[f"{module}.weight"].shape == floats[f"{module}.weight"].shape, module
    if biases:
        meant[f"{module}.bias"] = sum(biases) if by_columns else torch.cat(biases)


# ------------------------------------------------------------------------------------- the files


def write(path: Path, stored, config, model_class, targets, layers, options) -> None:
    stored = {key: value.contiguous() for key, value in stored.items()}
    if options.form == "lite":
        path.mkdir(parents=True)
        kinds = {Svdq: "svdq_w4a4", Awq: "awq_w4a16"}
        precision = {"int4": "int4", "nvfp4": "fp4"}[options.precision]
        group = GROUP[options.precision]
        about = {
            "quant_method": "nunchaku_lite",
            "compute_dtype": str(options.dtype).removeprefix("torch."),
            "svdq_w4a4": {"precision": precision, "group_size": group, "rank": options.rank},
            "awq_w4a16": {"precision": "int4", "group_size": 64},
        }
        for cls, kind in kinds.items():
            about[kind]["targets"] = [name for name, layer in layers.items() if type(layer) is cls]
        text = json.dumps(config | {"quantization_config": about})
        (path / "config.json").write_text(text, encoding="utf-8")
        save_file(stored, path / "diffusion_pytorch_model.safetensors")
    elif options.form == "folder":
        path.mkdir(parents=True)
        blocks_of = {key for key in stored if "transformer_blocks." in key}
        save_file({key: stored[key] for key in blocks_of}, path / "transformer_blocks.safetensors")
        rest = {key: value for key, value in stored.items() if key not in blocks_of}
        save_file(rest, path / "unquantized_layers.safetensors")
        (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
        (path / "comfy_config.json").write_text(json.dumps(comfy_config(config)), encoding="utf-8")
    else:
        words = quantization(options)
        if options.form == "manifest":
            words["runtime_manifest"] = manifest(targets, layers, options)
        told = {"model_class": model_class, "config": json.dumps(config)}
        told["quantization_config"] = json.dumps(words)
        if config["_class_name"] == "FluxTransformer2DModel":
            told["comfy_config"] = json.dumps(comfy_config(config))
        save_file(stored, path, told if options.metadata else None)


def comfy_config(config) -> dict:
    return {"model_class": "Flux", "model_config": {"in_channels": config["in_channels"] // 4}}


def quantization(options: Options) -> dict:
    """The engine's own words for what the file holds."""
    if options.precision == "int4":
        number = {"dtype": "int4", "scale_dtype": None, "group_size": 64}
        both = {"weight": number, "activation": number}
    else:
        number = {"dtype": "fp4_e2m1_all", "group_size": 16}
        both = {
            "weight": number | {"scale_dtype": [None, "fp8_e4m3_nan"]},
            "activation": number | {"scale_dtype": "fp8_e4m3_nan"},
        }
    told = {"method": "svdquant", **both, "rank": options.rank}
    return told if options.refiners else told | {"skip_refiners": True}


def manifest(targets: list[Target], layers, options: Options) -> dict:
    """What diffuse-compressor says about each layer."""
    told = []
    for target in targets:
        layer = layers[target.name]
        common = {"checkpoint_prefix": target.name, "source_modules": list(target.sources)}
        if isinstance(layer, Awq):
            told.append(
                common
                | {"nunchaku_op": "adanorm_awq_w4a16", "precision": "int4", "group_size": 64}
                | {"has_bias": True, "op_options": {"adanorm_splits": target.splits}}
            )
        else:
            told.append(
                common
                | {"nunchaku_op": "svdq_w4a4", "rank": options.rank}
                | {"precision": {"int4": "int4", "nvfp4": "fp4"}[options.precision]}
                | {"group_size": GROUP[options.precision], "op_options": {}}
                | {"has_bias": layer.stored_bias is not None}
            )
    return {
        "schema": "nunchaku_lite.runtime_manifest",
        "version": 1,
        "nunchaku_format_version": 1,
        "targets": told,
        "structural_patches": [],
    }

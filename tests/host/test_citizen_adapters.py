"""Every kind of adapter on a layer of every scheme, in each way that the host hands patches over.

The oracle is ComfyUI's own float layer with the same patches: what they change in its product is
what they have to change in ours. A weight that is rounded anew cannot pass, see
``test_rounding_the_weight_anew_would_fail``.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import citizens
import comfy.lora
import comfy.memory_management as memory
import comfy.model_management as mm
import comfy.model_patcher
import comfy.ops
import pytest
import torch
import w4a4
from support import pack

CPU = torch.device("cpu")
ROWS, COLUMNS = 96, 128
EXACT = 1e-3


@pytest.fixture(autouse=True)
def as_nodes_run():
    """Inference mode from loading to running: the server runs every node so."""
    with torch.inference_mode():
        yield


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------- schemes


def like(shape, fmt: str, scale, seed: int, **spec):
    """A weight of a scheme's spec, its codes by rounding; ``scale`` gives shape and dtype."""
    module, spec_of = pack("quant.weight"), pack("kernels.spec").WeightSpec
    form = pack("quant.dtypes").get_format(fmt)
    code_shape = spec.pop("code_shape", shape)
    tensors = {
        "codes": torch.zeros(form.storage_numel(shape[0] * shape[1]), dtype=form.word),
        "scale": scale,
    } | spec.pop("tensors", {})
    spec = spec_of(format=form, shape=shape, code_shape=code_shape, **spec)
    weight = noise(*shape, seed=seed) / shape[1] ** 0.5
    return module.QuantizedWeight(spec, module.requantize_like(weight, spec, tensors))


def static(fmt: str, reach: float, **more):
    """Activations of one scale that the file gives."""
    rounding = pack("kernels.spec").ActivationSpec(format=fmt, group=-1, static=True, **more)
    tensors = {"input_scale": torch.tensor([4.0 / reach])}
    if rounding.offset:
        tensors["input_offset"] = torch.tensor([3.0])
    return rounding, tensors


def modelopt_fp8(seed: int):
    rounding, tensors = static("float8_e4m3fn", 448)
    scale = torch.ones(1, 1)
    shape = (ROWS, COLUMNS)
    return like(shape, "float8_e4m3fn", scale, seed, activation=rounding, tensors=tensors)


def modelopt_nvfp4(seed: int):
    groups = COLUMNS // 16
    return like(
        (ROWS, COLUMNS),
        "float4_e2m1fn",
        torch.ones(ROWS, groups, 1).to(torch.float8_e4m3fn),
        seed,
        code_shape=(ROWS, groups, 16),
        two_level=True,
        tensors={"scale_2": torch.ones(1, 1, 1)},
    )


def modelopt_int4(seed: int):
    smooth = 0.5 + noise(COLUMNS, seed=seed + 50).abs()
    return like(
        (ROWS, COLUMNS),
        "int4",
        torch.ones(ROWS, 2, 1),
        seed,
        code_shape=(ROWS, 2, 64),
        smoothing="multiply",
        tensors={"smooth": smooth},
    )


def modelslim(seed: int):
    rounding, tensors = static("int8", 127, offset=True)
    scale = torch.ones(ROWS, 1)
    return like((ROWS, COLUMNS), "int8", scale, seed, activation=rounding, tensors=tensors)


def sdnq(fmt: str, **how):
    return lambda seed: citizens.made(noise(ROWS, COLUMNS, seed=seed) / COLUMNS**0.5, fmt, **how)


def svdq(kind: str):
    return lambda seed: w4a4.normal_form(w4a4.layer(kind, ROWS, COLUMNS, seed=seed))


SCHEMES = {
    "sdnq uint4": sdnq("uint4"),
    "sdnq int4 grouped": sdnq("int4", group_size=32),
    "sdnq svd": sdnq("uint4", svd_rank=16),
    "sdnq hadamard svd": sdnq("int4", svd_rank=8, hadamard_group_size=32),
    "sdnq codebook": sdnq("uint3", use_codebook=True),
    "sdnq int8": sdnq("int8"),
    "sdnq fp8": sdnq("float8_e4m3fn"),
    "svdq int4": svdq("int4"),
    "svdq unsigned": svdq("uint4"),
    "svdq nvfp4": svdq("nvfp4"),
    "modelopt fp8": modelopt_fp8,
    "modelopt nvfp4": modelopt_nvfp4,
    "modelopt int4": modelopt_int4,
    "modelslim": modelslim,
    "bitsandbytes nf4": sdnq("nf4_bnb", group_size=64),
}
EVERY_SCHEME = pytest.mark.parametrize("scheme", SCHEMES)
FOUR_BITS = [name for name in SCHEMES if not name.endswith(("int8", "fp8", "modelslim"))]


@cache
def weight_of(scheme: str):
    return citizens.composite(SCHEMES[scheme](3))


@cache
def fused():
    """Three layers of different schemes that the model keeps as one."""
    parts = {
        name: SCHEMES[name](n) for n, name in enumerate(("svdq int4", "sdnq int8", "sdnq svd"))
    }
    return citizens.composite(parts)


# ------------------------------------------------------------------------------------ adapters


def small(*shape: int, seed: int) -> torch.Tensor:
    return noise(*shape, seed=seed) * 0.05


def lora(rows, columns, rank=8, **more):
    return {
        "lora_up.weight": small(rows, rank, seed=21),
        "lora_down.weight": small(rank, columns, seed=22),
        "alpha": torch.tensor(3.0),
        **more,
    }


def loha(rows, columns, **more):
    names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    sizes = ((rows, 4), (4, columns)) * 2
    tensors = (noise(*size, seed=30 + n) * 0.12 for n, size in enumerate(sizes))
    return {**dict(zip(names, tensors, strict=True)), "alpha": torch.tensor(4.0), **more}


def lokr(rows, columns, **more):
    return {
        "lokr_w1": small(8, 4, seed=41),
        "lokr_w2_a": noise(rows // 8, 4, seed=42) * 0.3,
        "lokr_w2_b": noise(4, columns // 4, seed=43) * 0.3,
        "alpha": torch.tensor(4.0),
        **more,
    }


def scales(*shape: int) -> dict[str, torch.Tensor]:
    return {"dora_scale": 1 + 0.1 * noise(*shape, seed=44)}


ADAPTERS = {
    "lora": lora,
    "loha": loha,
    "lokr": lokr,
    "lokr whole": lambda rows, columns: {
        "lokr_w1": small(8, 4, seed=41),
        "lokr_w2": noise(rows // 8, columns // 4, seed=42) * 0.3,
    },
    "dora": lambda rows, columns: lora(rows, columns, **scales(rows, 1)),
    "dora of inputs": lambda rows, columns: lora(rows, columns, **scales(1, columns)),
    "loha dora": lambda rows, columns: loha(rows, columns, **scales(rows, 1)),
    "lokr dora": lambda rows, columns: lokr(rows, columns, **scales(rows, 1)),
    "oft": lambda rows, columns: {"oft_blocks": small(rows // 8, 8, 8, seed=51)},
    "boft": lambda rows, columns: {
        "oft_blocks": small(2, rows // 8, 8, 8, seed=51),
        "alpha": torch.tensor(0.5),
    },
    "diff": lambda rows, columns: {"diff": small(rows, columns, seed=52) * 0.3},
    "set": lambda rows, columns: {"set_weight": small(rows, columns, seed=53)},
    "bias": lambda rows, columns: {"diff_b": small(rows, seed=54)},
    "weight and bias": lambda rows, columns: lora(rows, columns, diff_b=small(rows, seed=54)),
}
CARRIED = {"lora": "side matmul", "weight and bias": "side matmul", "bias": "float weight"}
EVERY_ADAPTER = pytest.mark.parametrize("adapter", ADAPTERS)


def tensors_of(adapter: str, rows: int = ROWS, columns: int = COLUMNS):
    return {f"layer.{name}": value for name, value in ADAPTERS[adapter](rows, columns).items()}


def patches_of(adapter: str, rows: int = ROWS, columns: int = COLUMNS, at="layer.weight"):
    """As the host reads the adapter's file; ``at`` may be a piece of a layer."""
    return comfy.lora.load_lora(tensors_of(adapter, rows, columns), {"layer": at})


# --------------------------------------------------------------------------------------- layers


class Net(torch.nn.Module):
    def __init__(self, ops, rows, columns):
        super().__init__()
        self.layer = ops.Linear(columns, rows)


def ours_of(weight, matmul: str = "dequantize") -> Net:
    """Our layer, in a model."""
    rows, columns = weight.shape
    net = Net(pack("loaders.host.ops").make_ops(weight.dtype, matmul), rows, columns)
    bias = noise(rows, seed=8).to(weight.dtype)
    net.load_state_dict({"layer.weight": weight.clone(), "layer.bias": bias})
    return net.requires_grad_(False)


def floats_of(weight) -> Net:
    """The host's float layer with the same weight."""
    rows, columns = weight.shape
    net = Net(comfy.ops.manual_cast, rows, columns)
    dense = weight.to(torch.float32).dequantize()
    net.load_state_dict({"layer.weight": dense, "layer.bias": noise(rows, seed=8)})
    return net.requires_grad_(False)


def patcher_of(net: Net, *patches, install: bool = True):
    """The host's patcher with patches: each ``(patches, strength)``."""
    patcher = comfy.model_patcher.ModelPatcher(net, CPU, CPU)
    if install:
        pack("loaders.host.patches").install(patcher)
    for given, strength in patches:
        assert patcher.add_patches(given, strength)
    return patcher


def fully(patcher):
    patcher.patch_model(CPU)


def partly(patcher):
    patcher.patch_model(CPU, lowvram_model_memory=0.1)


def moved_out(patcher):
    patcher.patch_model(CPU)
    patcher.partially_unload(CPU, 1e9)


def loaded_again(patcher):
    patcher.patch_model(CPU)
    patcher.detach()
    patcher.patch_model(CPU)


LOADS = {load.__name__: load for load in (fully, partly, moved_out, loaded_again)}


def true_change(weight, x, *patches) -> torch.Tensor:
    """What the float layer changes."""
    net = floats_of(weight)
    before = net.layer(x)
    patcher_of(net, *patches, install=False).patch_model(CPU)
    return net.layer(x) - before


def off(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((found - wanted).norm() / wanted.norm()).item()


def inputs(columns: int, seed: int = 9) -> torch.Tensor:
    return noise(2, 40, columns, seed=seed)


# --------------------------------------------------------------------------------------- tests


@EVERY_SCHEME
@EVERY_ADAPTER
def test_an_adapter_changes_a_layer_as_it_does_the_float_one(scheme, adapter):
    weight, x = weight_of(scheme), inputs(COLUMNS)
    given = (patches_of(adapter), 0.8)
    wanted = true_change(weight, x, given)
    for matmul in ("dequantize", "faithful"):
        net = ours_of(weight, matmul)
        before, bits = net.layer(x), [part.clone() for part in citizens.memory_of(net.layer.weight)]
        assert wanted.norm() > 1e-3 * before.norm()
        found = {}
        for name, load in LOADS.items():
            patcher = patcher_of(net, given)
            load(patcher)
            found[name] = net.layer(x)
            assert off(found[name] - before, wanted) < EXACT, (matmul, name)
            now = citizens.memory_of(net.layer.weight)
            assert all(map(torch.equal, now, bits)), (matmul, name)
            carried = {fate.carried for fate in pack("loaders.host.patches").fates(patcher)}
            expected = {CARRIED.get(adapter, "dequantized weight")}
            assert carried == expected | ({"float weight"} if "bias" in adapter else set())
            patcher.detach()
            assert torch.equal(net.layer(x), before), (matmul, name)
        assert all(torch.equal(y, found["fully"]) for y in found.values())


@pytest.mark.parametrize("scheme", [*FOUR_BITS, "sdnq int8", "sdnq fp8"])
def test_rounding_the_weight_anew_would_fail(scheme):
    """The same measure on what the host does with a quantized layer that does nothing about it."""
    weight, x = weight_of(scheme), inputs(COLUMNS)
    given = (patches_of("lora"), 0.8)
    wanted = true_change(weight, x, given)
    net = ours_of(weight)
    before = net.layer(x)
    patcher_of(net, given, install=False).patch_model(CPU)
    wrong = off(net.layer(x) - before, wanted)
    assert wrong > (0.5 if scheme in FOUR_BITS else 0.05), wrong


@EVERY_ADAPTER
def test_pieces_of_fused_layers(adapter):
    """A patch for q, k or v alone, beside one for the whole layer."""
    weight, x = fused(), inputs(COLUMNS)
    pieces = [
        (patches_of(adapter, at=("layer.weight", (0, start, ROWS))), strength)
        for start, strength in ((0, 1.0), (ROWS, 0.5), (2 * ROWS, -0.7))
    ]
    if "bias" in adapter:
        pieces = [({key: value for key, value in given.items() if "bias" not in key}, strength)
                  for given, strength in pieces if len(given) > 1]  # fmt: skip
    whole = (patches_of("lora", 3 * ROWS), 0.6)
    wanted = true_change(weight, x, *pieces, whole)
    for order in ((*pieces, whole), (whole, *reversed(pieces))):
        net = ours_of(weight, "faithful")
        before = net.layer(x)
        patcher = patcher_of(net, *order)
        fully(patcher)
        if adapter in ("lora", "loha", "lokr", "lokr whole", "diff") or order[-1] is whole:
            assert off(net.layer(x) - before, wanted) < EXACT
        patcher.detach()


def test_pieces_along_the_columns():
    parts = {"attention": SCHEMES["sdnq svd"](1), "mlp": SCHEMES["svdq int4"](2)}
    weight = citizens.composite(parts, axis=1)
    x = inputs(2 * COLUMNS)
    given = [
        (patches_of("lora", at=("layer.weight", (1, 0, COLUMNS))), 0.5),
        (patches_of("lora", at=("layer.weight", (1, COLUMNS, COLUMNS))), -1.0),
        (patches_of("loha", at=("layer.weight", (1, COLUMNS, COLUMNS))), 1.0),
    ]
    wanted = true_change(weight, x, *given)
    net = ours_of(weight)
    before = net.layer(x)
    fully(patcher_of(net, *given))
    assert off(net.layer(x) - before, wanted) < EXACT


@pytest.mark.parametrize("first", ["lora", "dora", "oft", "set"])
@pytest.mark.parametrize("second", ["lora", "lokr", "dora", "diff"])
def test_several_adapters_follow_each_other(first, second):
    weight, x = weight_of("svdq int4"), inputs(COLUMNS)
    given = [(patches_of(first), 0.7), (patches_of(second), -0.4)]
    wanted = true_change(weight, x, *given)
    net = ours_of(weight)
    before = net.layer(x)
    fully(patcher_of(net, *given))
    assert off(net.layer(x) - before, wanted) < EXACT


@EVERY_ADAPTER
def test_strength_zero_changes_no_bit(adapter):
    weight, x = weight_of("sdnq svd"), inputs(COLUMNS)
    net = ours_of(weight, "faithful")
    before = net.layer(x)
    for load in LOADS.values():
        patcher = patcher_of(net, (patches_of(adapter), 0.0))
        load(patcher)
        changed = adapter == "set"  # which has no strength
        assert torch.equal(net.layer(x), before) != changed
        patcher.detach()


def test_a_patch_with_a_strength_of_the_model():
    """ModelMerge's kind: the weight counts for less, and a part of another one is added."""
    weight, x = weight_of("svdq nvfp4"), inputs(COLUMNS)
    other = noise(ROWS, COLUMNS, seed=70) / COLUMNS**0.5
    results = []
    for net in (floats_of(weight), ours_of(weight)):
        before = net.layer(x)
        patcher = patcher_of(net)
        patcher.add_patches({"layer.weight": [(other, lambda a, **kw: a)]}, 0.3, 0.7)
        patcher.add_patches(patches_of("lora"), 0.5)
        fully(patcher)
        results.append(net.layer(x) - before)
    assert off(results[1], results[0]) < EXACT


@pytest.mark.parametrize("load", [fully, partly])
def test_a_patch_that_changes_the_shape(load):
    """As FLUX's control LoRAs do to ``img_in``: the model looks at the layer's shape."""
    wide = 2 * COLUMNS
    more = {"reshape_weight": torch.tensor([ROWS, wide])}
    tensors = {f"layer.{name}": value for name, value in lora(ROWS, wide, **more).items()}
    given = comfy.lora.load_lora(tensors, {"layer": "layer.weight"})
    for patch in (
        given,
        {"layer.weight": ("diff", (small(ROWS, wide, seed=60), {"pad_weight": 1}))},
    ):
        x = inputs(wide)
        weight = weight_of("sdnq hadamard svd")
        reference = floats_of(weight)
        patcher_of(reference, (patch, 0.5), install=False).patch_model(CPU)
        wanted = reference.layer(x)
        net = ours_of(weight)
        before = net.layer(x[..., :COLUMNS])
        patcher = patcher_of(net, (patch, 0.5))
        load(patcher)
        assert tuple(net.layer.weight.shape) == (ROWS, wide)
        assert off(net.layer(x), wanted) < EXACT
        fully(patcher)  # all of it, after a part
        assert off(net.layer(x), wanted) < EXACT
        patcher.detach()
        assert torch.equal(net.layer(x[..., :COLUMNS]), before)


def test_a_float_layer_of_our_model_that_changes_its_shape_while_it_is_streamed():
    """The host's own lists would give the weight its shape too late for the model to see."""
    wide = 2 * COLUMNS
    more = {"reshape_weight": torch.tensor([ROWS, wide])}
    tensors = {f"layer.{name}": value for name, value in lora(ROWS, wide, **more).items()}
    given = comfy.lora.load_lora(tensors, {"layer": "layer.weight"})
    dense, x = noise(ROWS, COLUMNS, seed=5), inputs(wide)
    nets = [Net(pack("loaders.host.ops").make_ops(torch.float32), ROWS, COLUMNS) for _ in range(2)]
    for net in nets:
        net.load_state_dict({"layer.weight": dense.clone(), "layer.bias": noise(ROWS, seed=8)})
        net.requires_grad_(False)
    reference, net = nets
    before = net.layer(x[..., :COLUMNS])
    patcher_of(reference, (given, 0.5), install=False).patch_model(CPU)
    patcher = patcher_of(net, (given, 0.5))
    for load in (partly, fully):
        load(patcher)
        assert tuple(net.layer.weight.shape) == (ROWS, wide)
        assert torch.equal(net.layer(x), reference.layer(x))
    patcher.detach()
    assert torch.equal(net.layer(x[..., :COLUMNS]), before)


def test_a_lora_of_another_size_is_left_out_aloud(caplog):
    weight, x = weight_of("sdnq uint4"), inputs(COLUMNS)
    net = ours_of(weight)
    before = net.layer(x)
    fully(patcher_of(net, (patches_of("lora", ROWS + 8), 1.0), (patches_of("diff", 8), 1.0)))
    assert torch.equal(net.layer(x), before)
    assert caplog.text.count("of another size") == 2


# A lora is the only one with a product of its own; the others stand for what depends on the weight,
# what does not, and what torch.compile cannot follow.
COMPILED = ("lora", "lokr", "dora", "boft")


@pytest.mark.parametrize(
    "adapter",
    [a if a in COMPILED else pytest.param(a, marks=pytest.mark.slow) for a in ADAPTERS],
)
def test_a_patched_layer_compiles(adapter):
    """Into one graph, if the host asks no tensor for a value; and without the patch again."""
    torch._dynamo.reset()
    weight, x = weight_of("sdnq svd"), inputs(COLUMNS)
    net, given = ours_of(weight), (patches_of(adapter), 0.8)
    before = net.layer(x)
    patcher = patcher_of(net, given)
    fully(patcher)
    layer = torch.compile(net.layer, backend="aot_eager", fullgraph=adapter != "boft")
    assert off(layer(x) - before, true_change(weight, x, given)) < EXACT
    assert torch.equal(layer(x), net.layer(x))
    patcher.detach()
    assert torch.equal(layer(x), before)
    torch._dynamo.reset()


@pytest.mark.parametrize("adapter", ["lora", "dora", "lokr"])
def test_gradients_of_the_input(adapter):
    """Training an adapter on top: loaded as nodes do, run outside of their inference mode."""
    weight = weight_of("svdq int4")
    given = (patches_of(adapter), 0.8)
    nets = [floats_of(weight), ours_of(weight)]
    for number, net in enumerate(nets):
        fully(patcher_of(net, given, install=bool(number)))
    found = []
    with torch.inference_mode(False):
        for net in nets:
            net.layer.bias = torch.nn.Parameter(net.layer.bias.clone(), requires_grad=False)
            if net is nets[0]:
                plain = net.layer.weight.clone()
                net.layer.weight = torch.nn.Parameter(plain, requires_grad=False)
            x = inputs(COLUMNS).clone().requires_grad_()
            net.layer(x).square().sum().backward()
            found.append(x.grad)
    assert off(found[1], found[0]) < EXACT


@pytest.mark.parametrize("adapter", ["lora", "dora", "lokr", "diff"])
def test_half_precision(adapter):
    """To 1 % of a change as large as the product, which bfloat16 rounds to 0.4 %."""
    scheme = SCHEMES["svdq int4"](3)
    weight, x = citizens.composite(scheme, torch.bfloat16), inputs(COLUMNS)
    given = (patches_of(adapter), 30.0)
    wanted = true_change(weight, x, given)
    net = ours_of(weight)
    before = net.layer(x.to(torch.bfloat16))
    for load in (fully, partly):
        patcher = patcher_of(net, given)
        load(patcher)
        found = net.layer(x.to(torch.bfloat16))
        assert found.dtype == torch.bfloat16
        assert off(found.float() - before.float(), wanted) < 0.01
        patcher.detach()


# ------------------------------------------------------------------------- convolutions, tables


CONVS = {"Conv1d": (64, 32, 3), "Conv2d": (64, 32, 3, 3), "Conv3d": (64, 32, 1, 3, 3)}
KERNEL_ADAPTERS = ("lora", "small", "mid", "loha", "loha tucker", "lokr", "dora", "oft", "diff")


def conv_adapter(name: str, shape) -> dict[str, torch.Tensor]:
    rows, columns, *kernel = shape
    ones, flat = [1] * len(kernel), columns * torch.Size(kernel).numel()
    up, down = small(rows, 8, *ones, seed=61), small(8, columns, *kernel, seed=62)
    found = {
        "lora": {"lora_up.weight": up, "lora_down.weight": down},
        "small": {"lora_up.weight": up.flatten(1), "lora_down.weight": down.flatten(1)},
        "mid": {
            "lora_up.weight": up,
            "lora_down.weight": noise(8, columns, *ones, seed=63) * 0.3,
            "lora_mid.weight": noise(8, 8, *kernel, seed=64) * 0.3,
        },
        "loha": loha(rows, flat),
        "loha tucker": {
            **{f"hada_t{n}": noise(4, 4, *kernel, seed=65 + n) * 0.3 for n in (1, 2)},
            **{f"hada_w{n}_a": noise(4, rows, seed=67 + n) * 0.3 for n in (1, 2)},
            **{f"hada_w{n}_b": noise(4, columns, seed=69 + n) * 0.3 for n in (1, 2)},
        },
        "lokr": {
            "lokr_w1": small(8, 4, seed=71),
            "lokr_w2": noise(rows // 8, columns // 4, *kernel, seed=72) * 0.3,
        },
        "dora": {
            "lora_up.weight": up,
            "lora_down.weight": down,
            "dora_scale": 1 + 0.1 * noise(rows, *[1] * (len(shape) - 1), seed=73),
        },
        "oft": {"oft_blocks": small(rows // 8, 8, 8, seed=74)},
        "diff": {"diff": small(*shape, seed=75)},
    }[name]
    return {f"layer.{key}": value for key, value in found.items()}


@pytest.mark.parametrize("kind", CONVS)
@pytest.mark.parametrize("adapter", KERNEL_ADAPTERS)
@pytest.mark.parametrize("groups", [1, 2])
def test_adapters_on_convolutions(kind, adapter, groups):
    if adapter in ("mid", "loha tucker", "lokr") and kind != "Conv2d":
        kind = "Conv2d"  # the only one that the host knows these for
    rows, columns, *kernel = CONVS[kind]
    shape = (rows, columns // groups, *kernel)
    how = {"stride": 2, "padding": tuple(size // 2 for size in kernel), "groups": groups}
    weight = citizens.composite(citizens.made(noise(*shape, seed=5) * 0.1, "uint4", svd_rank=4))
    x = noise(2, columns, *[7] * len(kernel), seed=6)
    given = comfy.lora.load_lora(conv_adapter(adapter, shape), {"layer": "layer.weight"})
    changes = []
    for ops, dense in (
        (comfy.ops.manual_cast, True),
        (pack("loaders.host.ops").make_ops(torch.float32), False),
    ):
        net = torch.nn.Module()
        net.layer = getattr(ops, kind)(columns, rows, tuple(kernel), **how)
        net.load_state_dict(
            {
                "layer.weight": weight.dequantize() if dense else weight,
                "layer.bias": noise(rows, seed=8),
            }
        )
        net.requires_grad_(False)
        before = net.layer(x)
        patcher = patcher_of(net, (given, 0.8), install=not dense)
        for load in (fully,) if dense else (fully, partly):
            load(patcher)
            changes.append(net.layer(x) - before)
            patcher.unpatch_model(CPU)
            assert torch.equal(net.layer(x), before)
    wanted, *found = changes
    assert wanted.norm() > 1e-3 * before.norm()
    assert all(off(change, wanted) < EXACT for change in found)


@pytest.mark.parametrize("adapter", ["lora", "loha", "lokr", "dora", "diff", "set"])
def test_adapters_on_tables(adapter):
    table = noise(ROWS, COLUMNS, seed=5)
    weight = citizens.composite(citizens.made(table, "uint4", embedding=True))
    index = torch.tensor([[0, ROWS - 1, 7], [7, 3, 3]])
    changes = []
    for ops, dense in (
        (comfy.ops.manual_cast, True),
        (pack("loaders.host.ops").make_ops(torch.float32), False),
    ):
        net = torch.nn.Module()
        net.layer = ops.Embedding(ROWS, COLUMNS)
        net.load_state_dict({"layer.weight": weight.dequantize() if dense else weight})
        net.requires_grad_(False)
        before = net.layer(index)
        patcher = patcher_of(net, (patches_of(adapter), 0.8), install=not dense)
        patcher.add_patches(patches_of("lora", 8, at=("layer.weight", (0, 0, 8))), 1.0)
        for load in (fully,) if dense else (fully, partly):
            load(patcher)
            changes.append(net.layer(index) - before)
            patcher.unpatch_model(CPU)
            assert torch.equal(net.layer(index), before)
    wanted, *found = changes
    assert all(off(change, wanted) < EXACT for change in found)


# --------------------------------------------------------------------------------- Dynamic VRAM


def page_of(module, resident: bool = False) -> torch.Tensor:
    """Hand the host's Dynamic VRAM cast a page, the only part of it that needs a GPU."""
    sources = [module.weight, module.bias]
    page = torch.empty(memory.vram_aligned_size(sources), dtype=torch.uint8)
    mm.cast_to_gathered(sources, page)
    module._prefetch = {
        "resident": resident,
        "needs_cast": False,
        "xfer_dest": page,
        "cast_geometry": memory.tensors_to_geometries(sources),
        "signature": 1,
    }
    module.seed_key = "layer"
    return page


@pytest.mark.parametrize("scheme", ["sdnq uint4", "svdq int4", "sdnq int8", "modelopt fp8"])
@pytest.mark.parametrize("adapter", ["lora", "dora", "lokr", "diff", "set", "bias"])
def test_dynamic_vram_keeps_its_page_and_the_layer_its_patch(scheme, adapter, monkeypatch):
    """Its cast finds no patch of the weight; a second pass, and one after an eviction, as well."""
    weight, x = weight_of(scheme), inputs(COLUMNS)
    given = patches_of(adapter)
    wanted = true_change(weight, x, (given, 0.8))
    net = ours_of(weight)
    layer, before = net.layer, net.layer(x)
    listed = {key: [(0.8, value, 1.0, None, None)] for key, value in given.items()}
    for name in ("weight", "bias"):  # as ModelPatcherDynamic.load sets up a parameter
        key = f"layer.{name}"
        patch = comfy.model_patcher.LowVramPatch(key, listed) if key in listed else None
        setattr(layer, f"{name}_lowvram_function", patch)
        setattr(layer, f"{name}_function", [])
    assert layer.weight_lowvram_function is None

    def cast(module, input=None, **kwargs):
        given = kwargs | ({} if input is None else {"dtype": input.dtype, "device": input.device})
        return (
            *comfy.ops.resolve_cast_module_with_vbar(
                module,
                given["dtype"],
                given["device"],
                given.get("bias_dtype", given["dtype"]),
                given.get("compute_dtype"),
                given.get("want_requant", False),
            ),
            None,
        )

    monkeypatch.setattr(comfy.ops, "cast_bias_weight", cast)
    for _ in range(2):  # the second one after an eviction
        page = page_of(layer)
        bytes_before = page[: layer.weight._qdata.numel()].clone()
        first = layer(x)
        assert off(first - before, wanted) < EXACT
        assert torch.equal(layer(x), first), "resident"
        assert torch.equal(page[: layer.weight._qdata.numel()], bytes_before)
    # The next load, of a clone without the patch.
    for name in ("weight", "bias"):
        setattr(layer, f"{name}_lowvram_function", None)
        setattr(layer, f"{name}_function", [])
    page_of(layer)
    assert torch.equal(layer(x), before)


def test_dynamic_vram_loads_small_layers_by_force():
    """``patch_weight_to_device(force_cast=True)`` before the callback, with a patch and without."""
    net, x = ours_of(weight_of("sdnq svd")), inputs(COLUMNS)
    before = net.layer(x)
    plain = patcher_of(net)
    plain.patch_weight_to_device("layer.weight", device_to=CPU, force_cast=True)
    load = plain.get_all_callbacks("on_load_after")
    assert len(load) == 1
    load[0](plain, CPU, 0, False, False)
    assert torch.equal(net.layer(x), before)
    plain.unpatch_model(CPU)
    given = (patches_of("dora"), 0.8)
    patched = patcher_of(net, given)
    patched.patch_weight_to_device("layer.weight", device_to=CPU, force_cast=True)
    load[0](patched, CPU, 0, False, False)
    wanted = true_change(weight_of("sdnq svd"), x, given)
    assert off(net.layer(x) - before, wanted) < EXACT
    patched.unpatch_model(CPU)
    assert torch.equal(net.layer(x), before)


def test_a_patch_from_outside_of_a_load_is_an_error():
    """What no callback tells cannot be carried; going on without it would be silent."""
    net, x = ours_of(weight_of("sdnq svd")), inputs(COLUMNS)
    patcher = patcher_of(net, (patches_of("lora"), 1.0))
    patcher.patch_weight_to_device("layer.weight", device_to=CPU)
    with pytest.raises(pack("quant.errors").LowBitError, match="outside of its MODEL"):
        net.layer(x)
    patcher.unpatch_model(CPU)
    net.layer(x)


@pytest.mark.gpu
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("adapter", ["lora", "dora", "lokr", "diff"])
def test_adapters_on_a_gpu(dynamic, adapter):
    """The same through the host's own loads there, Dynamic VRAM's included, and after evictions."""
    ours = citizens.load("uint4_svd", dynamic=dynamic)
    name = "double_blocks.0.img_mlp.0"
    rows, columns = citizens.layers(ours)[name].weight.shape
    given = patches_of(adapter, rows, columns, at=f"diffusion_model.{name}.weight")
    reference = citizens.plain_model(citizens.floats(ours))
    device, x = mm.get_torch_device(), inputs(columns)

    def run(patcher):
        citizens.on_device(patcher)
        return patcher.model.diffusion_model.get_submodule(name)(x.to(device)).cpu()

    before, plain = run(ours), run(reference)
    patched, true = ours.clone(), reference.clone()
    for clone in (patched, true):
        assert clone.add_patches(given, 0.8)
    wanted = run(true) - plain
    first = run(patched)
    assert off(first - before, wanted) < 0.01
    patched.partially_unload(patched.offload_device, patched.model_size())
    assert torch.equal(run(patched), first)
    mm.unload_model_and_clones(patched)
    assert torch.equal(run(patched), first)
    assert torch.equal(run(ours), before)
    mm.unload_all_models()


# ------------------------------------------------------------------------ layers of the host's own


def hosts_own(fmt: str):
    """A Linear of our operations over one of the host's own formats, and its float weight."""
    ops = pack("loaders.host.ops").make_ops(torch.float32)
    net = Net(ops, ROWS, COLUMNS)
    compat = pack("loaders.host.compat")
    weight = {
        "int8_tensorwise": SCHEMES["sdnq int8"],
        "float8_e4m3fn": modelopt_fp8,
        "nvfp4": hosts_nvfp4,
    }[fmt](3)
    make = compat.int8_tensorwise if fmt == "int8_tensorwise" else compat.NATIVE[fmt]
    net.load_state_dict(
        make("layer", citizens.composite(weight)) | {"layer.bias": noise(ROWS, seed=8)}
    )
    return net.requires_grad_(False)


def hosts_nvfp4(seed: int):
    made = modelopt_nvfp4(seed)
    rounding = pack("kernels.spec").ActivationSpec(
        "float4_e2m1fn", 16, "float8_e4m3fn", static=True
    )
    tensors = made.tensors | {"input_scale": torch.tensor([0.01])}
    return replace(made, spec=replace(made.spec, activation=rounding), tensors=tensors)


@pytest.mark.parametrize("fmt", ["int8_tensorwise", "float8_e4m3fn", "nvfp4"])
@pytest.mark.parametrize("adapter", ["lora", "lokr", "dora", "set"])
@pytest.mark.parametrize("load", [fully, partly, moved_out])
def test_adapters_on_layers_in_the_hosts_formats(fmt, adapter, load):
    net, x = hosts_own(fmt), inputs(COLUMNS)
    assert (
        type(net.layer.weight._layout_cls) is str and "LowBit" not in net.layer.weight._layout_cls
    )
    before, given = net.layer(x), (patches_of(adapter), 0.8)
    wanted = true_change(net.layer.weight.data, x, given)
    patcher = patcher_of(net, given)
    load(patcher)
    assert off(net.layer(x) - before, wanted) < EXACT
    patcher.detach()
    assert torch.equal(net.layer(x), before)


@pytest.mark.skipif(
    "pre_quant_scale" not in comfy.ops.QUANT_ALGOS["nvfp4"]["parameters"],
    reason="this ComfyUI cannot smooth activations of its NVFP4: the loader keeps such layers",
)
def test_smoothed_activations_of_the_hosts_nvfp4():
    """Its weight meets smoothed activations, a LoRA does not."""
    net, x = hosts_own("nvfp4"), inputs(COLUMNS)
    smooth = 0.5 + noise(COLUMNS, seed=77).abs()
    net.layer.pre_quant_scale = torch.nn.Parameter(smooth, requires_grad=False)
    before = net.layer(x)
    dense = net.layer.weight.data.dequantize() * smooth
    for adapter in ("lora", "dora"):
        given = (patches_of(adapter), 0.8)
        reference = Net(comfy.ops.manual_cast, ROWS, COLUMNS)
        reference.load_state_dict({"layer.weight": dense, "layer.bias": noise(ROWS, seed=8)})
        reference.requires_grad_(False)
        base = reference.layer(x)
        patcher_of(reference, given, install=False).patch_model(CPU)
        patcher = patcher_of(net, given)
        fully(patcher)
        assert off(net.layer(x) - before, reference.layer(x) - base) < EXACT
        patcher.detach()

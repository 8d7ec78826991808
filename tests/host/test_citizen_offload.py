"""Offload modes: the same bits in less memory, by ComfyUI's own patcher and sampler.

The CPU runs the patcher of ComfyUI's older memory management, where weights "on the device" and
others lie in the same RAM; what it counts as loaded, and which layers it streams, is the same.
"""

from __future__ import annotations

import ctypes
import gc
import json
import platform
import weakref
from functools import cache
from pathlib import Path

import citizens
import comfy.cli_args
import comfy.model_management as mm
import nodes
import psutil
import pytest
import svdq_models
import torch
from comfy.patcher_extension import CallbacksMP, WrappersMP
from comfy_api.torch_helpers import set_torch_compile_wrapper
from support import pack

CPU = torch.device("cpu")
GIB = 2**30
CASES = ("int8", "uint4_svd", "uint4_had_svd", citizens.MIXED)
KEY = "test"
LIMITED = {
    "layerwise by budget": {"mode": "layerwise", "share": 0.6},
    "layerwise by blocks": {"mode": "layerwise", "blocks_on_gpu": 1},
    "no block": {"mode": "layerwise"},
    "sequential": {"mode": "sequential"},
}
WHOLE = {mode: {"mode": mode} for mode in ("auto", "resident", "model")}


@pytest.fixture(autouse=True)
def as_nodes_run():
    """In inference mode, beginning with nothing loaded."""
    citizens.inputs()  # shared with other tests: made outside
    with torch.inference_mode():
        mm.unload_all_models()
        yield
        mm.unload_all_models()


def memory():
    return pack("loaders.host.memory")


def with_mode(patcher, mode: str, share: float = 0.0, blocks_on_gpu: int = 0):
    budget = patcher.model_size() * share / GIB
    return memory().set_mode(patcher, mode, budget, blocks_on_gpu)


def sample(patcher, steps: int = 2, seed: int = 3, side: int = 8) -> torch.Tensor:
    """A latent, as the KSampler node makes it."""
    given = citizens.inputs()
    conditioning = [[given["context"], {"pooled_output": given["y"], "guidance": 3.5}]]
    latent = {"samples": torch.zeros(1, 16, side, side)}
    (done,) = nodes.common_ksampler(
        patcher, seed, steps, 1.0, "euler", "simple", conditioning, conditioning, latent
    )
    return done["samples"]


def loaded_during(patcher) -> list[int]:
    """Gets what is loaded, as the host counts it, before each pass of later samplings."""
    found: list[int] = []
    patcher.add_callback_with_key(
        CallbacksMP.ON_PREPARE_STATE, KEY, lambda running, *_: found.append(running.loaded_size())
    )
    return found


def streaming(patcher) -> list[str]:
    """Layers that wait for their turn."""
    return [
        name
        for name, module in citizens.layers(patcher).items()
        if hasattr(module, "prev_comfy_cast_weights")
    ]


def unbound(patcher) -> int:
    """Bytes that the host counts and cannot unload: buffers outside all layers."""
    return sum(buffer.nbytes for buffer in patcher.model.buffers())


# ------------------------------------------------------------------------------- what each does


@pytest.fixture(scope="module")
def svdquant(tmp_path_factory):
    """Paths of SVDQuant checkpoints, by precision."""
    folder = tmp_path_factory.mktemp("svdquant")

    @cache
    def write(precision: str) -> Path:
        path = folder / f"{precision}.safetensors"
        svdq_models.make("flux", path, precision=precision)
        return path

    return write


@pytest.mark.parametrize("precision", ["int4", "nvfp4"])
def test_limited_modes_with_rounded_activations(svdquant, precision):
    limited_modes(citizens.load(svdquant(precision), matmul="faithful"))


@pytest.mark.parametrize("case", CASES)
def test_limited_modes_give_the_same_bits_within_their_budget(case):
    limited_modes(citizens.load(case))


def limited_modes(patcher):
    bits, size = citizens.codes(patcher), patcher.model_size()
    wanted = sample(patcher)
    assert wanted.std() > 0.1
    for name, how in LIMITED.items():
        chosen = with_mode(patcher, **how)
        ceiling = memory().offload_of(chosen).ceiling
        loaded = loaded_during(chosen)
        assert torch.equal(sample(chosen), wanted), name
        assert len(loaded) == 2 and max(loaded) <= max(ceiling, unbound(patcher)), name
        assert ceiling < size and streaming(chosen), name
        if how["mode"] == "sequential":
            assert set(streaming(chosen)) == set(bits), name
        else:
            assert max(loaded) > 0.1 * ceiling and set(streaming(chosen)) < set(bits), name
    assert citizens.same_codes(bits, citizens.codes(patcher))


@pytest.mark.parametrize("case", ["int8", citizens.MIXED])
def test_whole_modes_give_the_same_bits(case):
    patcher = citizens.load(case)
    wanted, size = sample(patcher), patcher.model_size()
    for name, how in WHOLE.items():
        chosen = with_mode(patcher, **how)
        loaded = loaded_during(chosen)
        asked = []
        chosen.add_wrapper_with_key(
            WrappersMP.PREPARE_SAMPLING,
            KEY,
            lambda executor, *a, asked=asked, **k: asked.append(k) or executor(*a, **k),
        )
        assert torch.equal(sample(chosen), wanted), name
        assert loaded == [size, size], name
        assert [k["force_full_load"] for k in asked] == [name != "auto"], name
        mine = [p for p in mm.loaded_models() if p.is_clone(patcher)]
        assert (len(mine), patcher.loaded_size()) == ((0, 0) if name == "model" else (1, size))


def test_a_smaller_budget_keeps_less():
    patcher = citizens.load("uint4_svd")
    wanted, before = sample(patcher), patcher.model_size() + 1
    for share in (1.1, 0.8, 0.6, 0.4, 0.2):
        chosen = with_mode(patcher, "layerwise", share)
        loaded = loaded_during(chosen)
        assert torch.equal(sample(chosen), wanted)
        assert max(loaded) < before and max(loaded) <= max(share * patcher.model_size(), 50_000)
        before = max(loaded)


def test_all_blocks_or_a_large_budget_stream_nothing():
    patcher = citizens.load("int8")
    blocks = len(memory().plan_of(patcher).weights.blocks)
    for how in ({"blocks_on_gpu": blocks}, {"share": 1.5}):
        chosen = with_mode(patcher, "layerwise", **how)
        sample(chosen)
        assert not streaming(chosen) and chosen.loaded_size() == patcher.model_size()


def test_switching_between_clones_of_one_model():
    """A clone that is loaded whole makes the host skip the load of the next: the mode must not."""
    patcher = citizens.load("uint4_svd")
    size, wanted = patcher.model_size(), sample(patcher)
    clones = {name: with_mode(patcher, **how) for name, how in (WHOLE | LIMITED).items()}
    order = ["auto", "sequential", "resident", "layerwise by budget", "auto", "no block", "model",
             "layerwise by blocks", "resident", "sequential", "auto"]  # fmt: skip
    for name in order:
        clone = clones[name].clone()
        loaded = loaded_during(clone)
        assert torch.equal(sample(clone), wanted), name
        ceiling = memory().offload_of(clone).ceiling
        if ceiling is None:
            assert loaded == [size, size], name
        else:
            assert max(loaded) <= max(ceiling, unbound(patcher)), name


def test_the_last_mode_set_is_the_only_one():
    patcher = citizens.load("int8")
    chosen = with_mode(with_mode(with_mode(patcher, "model"), "sequential"), "layerwise", 0.5)
    for call in (CallbacksMP.ON_LOAD, CallbacksMP.ON_PRE_RUN):
        assert len(chosen.get_callbacks(call, "lowbit_offload")) == 1
    assert not chosen.get_callbacks(CallbacksMP.ON_CLEANUP, "lowbit_offload")
    assert not chosen.get_wrappers(WrappersMP.PREPARE_SAMPLING, "lowbit_offload")
    assert len(chosen.get_callbacks(CallbacksMP.ON_CLEANUP, "lowbit_run")) == 1
    back = with_mode(chosen, "auto")
    assert not any(back.get_callbacks(c, "lowbit_offload") for c in back.callbacks)
    # and the MODEL that came in is as it was
    assert patcher.get_attachment("lowbit_offload") is None
    assert not any(patcher.get_callbacks(c, "lowbit_offload") for c in patcher.callbacks)


def test_the_hosts_own_models_have_modes_too():
    patcher = citizens.plain_model(citizens.floats(citizens.load("int8")))
    wanted = sample(patcher)
    for how in (LIMITED["layerwise by budget"], LIMITED["sequential"], WHOLE["model"]):
        chosen = with_mode(patcher, **how)
        loaded = loaded_during(chosen)
        assert torch.equal(sample(chosen), wanted)
        ceiling = memory().offload_of(chosen).ceiling
        assert ceiling is None or max(loaded) <= max(ceiling, unbound(patcher))


# ---------------------------------------------------------------------- together with other nodes


@pytest.mark.parametrize("case", ["int8", "uint4_svd"])
def test_with_a_lora_before_or_after(case):
    patcher = citizens.load(case)
    names = list(citizens.layers(patcher))
    generator = torch.Generator().manual_seed(7)
    deltas = {
        f"diffusion_model.{name}.weight": (
            torch.randn(citizens.layers(patcher)[name].weight.shape, generator=generator) * 0.02,
        )
        for name in names[::3]
    }

    def with_lora(model):
        model = model.clone()
        assert len(model.add_patches(deltas, 1.0)) == len(deltas)
        return model

    plain, wanted = sample(patcher), sample(with_lora(patcher))
    effect = (wanted - plain).norm()
    assert effect > 0.01 * plain.norm()
    for chosen in (
        with_mode(with_lora(patcher), **LIMITED["layerwise by budget"]),
        with_lora(with_mode(patcher, **LIMITED["sequential"])),
    ):
        loaded = loaded_during(chosen)
        found = sample(chosen)
        assert (found - wanted).norm() < 0.05 * effect
        assert max(loaded) <= max(memory().offload_of(chosen).ceiling, unbound(patcher))
        assert torch.equal(sample(chosen), found)
    assert torch.equal(sample(patcher), plain)


def test_copies_on_another_device_and_reloaded_ones_keep_the_mode():
    from comfy_extras.nodes_multigpu import SelectModelDeviceNode

    patcher = citizens.load("uint4_svd")
    wanted = sample(patcher)
    chosen = with_mode(patcher, "layerwise", 0.5)
    budget = memory().offload_of(chosen).budget
    (moved,) = SelectModelDeviceNode.execute(chosen, "cpu").args
    for copy in (moved, chosen.deepclone_multigpu(new_load_device=CPU), chosen.clone(True)):
        loaded = loaded_during(copy)
        assert torch.equal(sample(copy), wanted)
        assert max(loaded) <= budget and streaming(copy)


def test_with_torch_compile():
    patcher = citizens.load("uint4")
    wanted = sample(patcher)
    chosen = with_mode(patcher, "layerwise", 0.6)
    compiled = chosen.clone(disable_dynamic=True)
    block = "diffusion_model.single_blocks.0"
    set_torch_compile_wrapper(compiled, backend="eager", keys=[block])
    loaded = loaded_during(compiled)
    assert torch.equal(sample(compiled), wanted)
    assert max(loaded) <= memory().offload_of(chosen).budget and streaming(compiled)


# --------------------------------------------------------------------------------- out of memory


@pytest.mark.parametrize(
    ("kind", "unloads"), [(torch.OutOfMemoryError, True), (MemoryError, False)]
)
def test_out_of_memory_in_the_middle_of_a_step(kind, unloads):
    """The next run is bit-equal, whether the host unloads all models first, as its server does."""
    patcher = citizens.load("uint4_svd")
    wanted, bits = sample(patcher), citizens.codes(patcher)
    module = citizens.layers(patcher)["single_blocks.0.linear2"]
    for name in ("auto", "model", "layerwise by budget", "sequential"):
        chosen = with_mode(patcher, **(WHOLE | LIMITED)[name])
        passes = loaded_during(chosen)

        def fail(*_, passes=passes):
            if len(passes) == 2:  # in the second step
                raise kind("no memory left")

        hook = module.register_forward_pre_hook(fail)
        with pytest.raises(kind):
            sample(chosen)
        hook.remove()
        if name == "model":
            assert patcher.loaded_size() == 0
        if unloads:
            mm.unload_all_models()
            assert patcher.loaded_size() == 0
        assert torch.equal(sample(chosen), wanted), name
    assert citizens.same_codes(bits, citizens.codes(patcher))


# -------------------------------------------------------------------------------- again and again


def cycle(wanted: torch.Tensor | None, number: int) -> torch.Tensor:
    """Load, run, offload, switch, unload."""
    patcher = citizens.load("uint4_svd")
    for how in (WHOLE["auto"], *LIMITED.values(), WHOLE["model"]):
        chosen = with_mode(patcher, **how)
        if number % 2:
            chosen = with_mode(chosen.clone(), "layerwise", 0.5)
        found = sample(chosen, steps=1)
        assert wanted is None or torch.equal(found, wanted)
        wanted = found
        mm.unload_model_and_clones(chosen)
    return wanted


def test_nothing_is_left_of_a_model_that_is_gone():
    before = len(mm.current_loaded_models)
    patcher = citizens.load("uint4_svd")
    model = weakref.ref(patcher.model)
    clones = [with_mode(patcher, **how) for how in (WHOLE | LIMITED).values()]
    for clone in clones:
        sample(clone, steps=1)
    mm.unload_all_models()
    del patcher, clones, clone
    gc.collect()
    assert model() is None and len(mm.current_loaded_models) == before


def settled_memory() -> int:
    """RSS without what the C library keeps for later."""
    gc.collect()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
    return psutil.Process().memory_info().rss


@pytest.mark.slow
def test_memory_does_not_grow_over_200_cycles():
    wanted, before = None, 0
    for number in range(200):
        wanted = cycle(wanted, number)
        if number == 20:  # pools of threads and allocators are filled by then
            before = settled_memory()
    grown = settled_memory() / before
    assert grown < 1.01, f"{grown:.4f} of {before / 2**20:.0f} MiB"


# ---------------------------------------------------------------------------------- what is told


def test_a_mode_that_is_not_there_is_an_error():
    patcher = citizens.load("int8")
    error = pack("quant.errors").LowBitError
    with pytest.raises(error, match="offload mode"):
        memory().set_mode(patcher, "swap")
    with pytest.raises(error, match="fewer blocks"):
        memory().set_mode(patcher, "layerwise", 0, 1000)


@pytest.mark.parametrize(
    ("flag", "value", "mode", "wins", "forced"),
    [
        ("highvram", True, "sequential", "--highvram: wins", "resident"),
        ("gpu_only", True, "layerwise", "--gpu-only: wins", "resident"),
        ("novram", True, "resident", "--novram: wins", "sequential"),
        ("disable_smart_memory", True, "resident", "--disable-smart-memory: wins", None),
        ("disable_async_offload", True, "layerwise", "without overlap", None),
        ("disable_pinned_memory", True, "sequential", "unpinned", None),
        ("disable_dynamic_vram", True, "layerwise", "--disable-dynamic-vram", None),
        ("lowvram", True, "layerwise", "text encoders only", None),
        ("reserve_vram", 2.0, "auto", "--reserve-vram: 2.0 GiB", None),
    ],
)
def test_a_flag_of_the_command_line_is_told(monkeypatch, flag, value, mode, wins, forced):
    chosen = with_mode(citizens.load("int8"), mode)
    assert "--" not in memory().explain(chosen)
    monkeypatch.setattr(comfy.cli_args.args, flag, value)
    assert wins in memory().explain(chosen)
    assert memory().forced_mode() == forced


def test_inputs_without_a_part_are_told():
    chosen = with_mode(citizens.load("int8"), "resident")
    assert "no part" not in memory().explain(chosen)
    assert "vram_budget_gb and blocks_on_gpu: no part" in memory().explain(chosen, 2.0, 1)


def test_measured_figures_of_the_last_run():
    patcher = citizens.load("uint4_svd")
    found = memory().measured(patcher)
    assert (found.mode, found.passes, found.resident) == ("auto", 0, 0)
    assert found.streamed == found.total == patcher.model_size()
    chosen = with_mode(patcher, "layerwise", 0.5)
    loaded = loaded_during(chosen)
    sample(chosen, steps=4)
    for model in (chosen, chosen.clone()):
        found = memory().measured(model)
        assert (found.mode, found.passes, found.resident) == ("layerwise", 4, loaded[-1])
        assert found.resident + found.streamed == found.total
        assert 0 < found.seconds_per_pass < 60 and found.peak is None
        assert "4 passes" in found.text and "4 passes" in memory().explain(model)
    assert json.loads(json.dumps(found.to_json()))["resident"] == loaded[-1]
    sample(with_mode(patcher, "model"), steps=1)
    found = memory().measured(patcher)
    assert (found.mode, found.passes, found.resident) == ("model", 1, found.total)


def test_the_plan_of_a_loaded_model_counts_what_the_host_counts():
    for case in CASES:
        patcher = citizens.load(case)
        weights = memory().plan_of(patcher).weights
        assert abs(weights.total - patcher.model_size()) < 0.01 * patcher.model_size()
        assert len(weights.blocks) == 4  # two of each kind
        module = citizens.layers(patcher)["single_blocks.0.linear1"]
        own = sum(t.nbytes for t in citizens.memory_of(module.weight)) + module.bias.nbytes
        assert weights.largest >= own and weights.widest == module.weight.numel() * 4


# ----------------------------------------------------------------------------------- on a real GPU


def flux_shapes(width: int, double: int, single: int, context: int, pooled: int):
    """Shapes of a FLUX.1 under ComfyUI's names."""
    shapes = {
        "img_in": (width, 64),
        "txt_in": (width, context),
        "vector_in.in_layer": (width, pooled),
        "final_layer.linear": (64, width),
        "final_layer.adaLN_modulation.1": (2 * width, width),
        **{f"{name}.in_layer": (width, 256) for name in ("time_in", "guidance_in")},
        **{f"{name}.out_layer": (width, width) for name in ("time_in", "guidance_in", "vector_in")},
    }
    norms = []
    for i in range(double):
        for stream in ("img", "txt"):
            block = f"double_blocks.{i}.{stream}"
            shapes[f"{block}_attn.qkv"] = (3 * width, width)
            shapes[f"{block}_attn.proj"] = (width, width)
            shapes[f"{block}_mlp.0"] = (4 * width, width)
            shapes[f"{block}_mlp.2"] = (width, 4 * width)
            shapes[f"{block}_mod.lin"] = (6 * width, width)
            norms.append(f"{block}_attn.norm")
    for i in range(single):
        block = f"single_blocks.{i}"
        shapes[f"{block}.linear1"] = (7 * width, width)
        shapes[f"{block}.linear2"] = (width, 5 * width)
        shapes[f"{block}.modulation.lin"] = (3 * width, width)
        norms.append(f"{block}.norm")
    return shapes, norms


def made_model(fmt: str, width: int, double: int, single: int):
    """A MODEL of random weights of one format, blocks quantized, that takes ``inputs()``."""
    import comfy.sd

    given, device = citizens.inputs(), mm.get_torch_device()
    shapes, norms = flux_shapes(
        width, double, single, given["context"].shape[-1], given["y"].shape[-1]
    )
    marker = pack("loaders.layouts.composite").marker
    dtype, sd = torch.bfloat16, {}
    generator = torch.Generator(device).manual_seed(5)
    for name, shape in shapes.items():
        weight = torch.randn(shape, device=device, generator=generator) * shape[1] ** -0.5
        sd[f"{name}.bias"] = torch.zeros(shape[0], dtype=dtype)
        if "blocks" in name:
            weight = citizens.composite(citizens.made(weight, fmt), dtype)
            sd[f"{name}.weight"] = weight.to("cpu")
            sd[f"{name}.comfy_quant"] = marker(weight._params.spec)
        else:
            sd[f"{name}.weight"] = weight.to("cpu", dtype)
    for name in norms:
        for which in ("query", "key"):
            sd[f"{name}.{which}_norm.scale"] = torch.ones(128, dtype=dtype)
    ops = pack("loaders.host.ops").make_ops(dtype)
    patcher = comfy.sd.load_diffusion_model_state_dict(
        sd, {"custom_operations": ops, "dtype": dtype}, disable_dynamic=True
    )
    memory().watch(patcher)
    return patcher


def test_a_made_model_keeps_its_budget_too():
    """The model of the test on a GPU, at a small width."""
    patcher = made_model("uint4", 128, 1, 1)
    wanted = sample(patcher)
    assert wanted.std() > 0.1
    chosen = with_mode(patcher, "layerwise", 0.7)
    loaded = loaded_during(chosen)
    assert torch.equal(sample(chosen), wanted) and streaming(chosen)
    assert max(loaded) <= memory().offload_of(chosen).budget


@pytest.mark.gpu
@pytest.mark.parametrize("fmt", ["int8", "uint4"])
def test_budgets_and_step_times_on_a_gpu(fmt, record_property):
    """ComfyUI's older management (Dynamic VRAM begins with the server): peaks, times, bits."""
    patcher = made_model(fmt, 3072, 2, 8)
    wanted = sample(with_mode(patcher, "resident"), steps=4, side=128)
    base = memory().measured(patcher)
    working = base.peak - base.resident
    bandwidth = host_to_device(patcher.load_device)
    for name, how in LIMITED.items():
        chosen = with_mode(patcher, **how)
        assert torch.equal(sample(chosen, steps=4, side=128), wanted), name
        found, ceiling = memory().measured(chosen), memory().offload_of(chosen).ceiling
        buffers = memory().plan_of(chosen).mode(how["mode"]).buffers
        record_property(
            f"{fmt}, {name}",
            f"{found.seconds_per_pass:.4f} s a pass, resident {base.seconds_per_pass:.4f} s, "
            f"copies alone {found.streamed / bandwidth:.4f} s; ceiling {ceiling}, "
            f"peak {found.peak}, of loading {found.load_peak}, working {working}",
        )
        assert found.peak <= (max(ceiling, buffers) + working) * 1.05, name
    sample(with_mode(patcher, "model"), steps=1, side=128)
    assert patcher.loaded_size() == 0


def host_to_device(device: torch.device) -> float:
    """Bytes per second from pinned RAM."""
    source = torch.empty(2**28, dtype=torch.uint8, pin_memory=True)
    there = torch.empty_like(source, device=device)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    there.copy_(source)
    begin.record()
    for _ in range(8):
        there.copy_(source, non_blocking=True)
    end.record()
    torch.cuda.synchronize()
    return 8 * source.numel() / (begin.elapsed_time(end) / 1000)

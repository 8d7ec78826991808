"""The memory plan: what each offload mode takes of a device, before anything is loaded."""

from __future__ import annotations

import json

import pytest
import svdq_models
import torch
from support import oracle, pack

GIB, MIB = 2**30, 2**20
#: two kinds of blocks, and what lies outside them; (name, elements, bytes)
TENSORS = [
    ("embed.weight", 100, 200),
    ("time.0.weight", 60, 120),  # steps of a Sequential
    ("time.2.weight", 60, 120),
    ("label.0.0.weight", 60, 120),
    *(
        (f"wide.{i}.{layer}.weight", 1000, 500)
        for i in range(3)
        for layer in ("attn.qkv", "attn.out", "mlp.0", "mlp.2")
    ),
    ("wide.0.attn.qkv.bias", 50, 100),
    *((f"single.{i}.linear{j}.weight", 2000, 1000) for i in range(2) for j in (1, 2)),
]


def plans():
    return pack("loaders.memory_plan")


def weights(total=12 * GIB, count=20, largest=64 * MIB, widest=128 * MIB):
    return plans().Weights(total, (total // (count + 4),) * count, largest, widest)


def facts(device="cuda", memory=24 * GIB, host_memory=64 * GIB, reserve=GIB, streams=2):
    return plans().DeviceFacts(
        torch.device(device), f"a {device}", memory, memory, host_memory, reserve, streams
    )


def test_layers_and_blocks_are_counted_by_their_names():
    found = plans().Weights.of(TENSORS, 2)
    assert found.total == sum(nbytes for _, _, nbytes in TENSORS) == 10_660
    assert found.blocks == (2100, 2000, 2000, 2000, 2000)
    assert found.largest == 1000 and found.widest == 4000
    assert found.with_blocks(0) == 560
    assert found.with_blocks(2) == 560 + 2100 + 2000
    assert found.with_blocks(5) == found.total
    assert plans().Weights.of([], 2) == plans().Weights(0, (), 0, 0)


def test_everything_fits():
    plan = plans().make_memory_plan(weights(), facts(), 2 * GIB, "1024 x 1024")
    working = 2 * GIB + 128 * MIB
    assert plan.usable == 24 * GIB - working
    for mode in ("auto", "resident", "model"):
        found = plan.mode(mode)
        assert (found.resident, found.streamed, found.buffers) == (12 * GIB, 0, 0)
        assert found.peak == 12 * GIB + working and found.verdict == "fits"
    found = plan.mode("sequential")
    assert (found.resident, found.streamed, found.buffers) == (0, 12 * GIB, 128 * MIB)
    assert found.peak == 128 * MIB + working and found.verdict == "streams"
    found = plan.mode("layerwise")  # nothing asked for: no block
    assert (found.resident, found.verdict) == (weights().with_blocks(0), "streams")


def test_what_does_not_fit_streams():
    plan = plans().make_memory_plan(weights(), facts(memory=8 * GIB), GIB // 2, "")
    room = 8 * GIB - GIB  # the host's reserve is more than what a pass works in
    assert plan.usable == room
    found = plan.mode("auto")
    assert found.resident == room - 128 * MIB and found.resident + found.streamed == 12 * GIB
    assert found.verdict == "streams" and found.peak < 8 * GIB
    for mode in ("resident", "model"):
        assert plan.mode(mode).verdict == "too big"
        assert plan.mode(mode).peak > 12 * GIB
    assert plan.mode("sequential").verdict == "streams"


def test_what_cannot_even_stream_is_too_big():
    plan = plans().make_memory_plan(weights(), facts(memory=8 * GIB, host_memory=10 * GIB))
    assert {mode.verdict for mode in plan.modes} == {"too big"}
    # No room for one layer beside the activations
    plan = plans().make_memory_plan(weights(), facts(memory=4 * GIB), 4 * GIB - 150 * MIB)
    assert plan.mode("sequential").verdict == "too big"


@pytest.mark.parametrize("budget", [GIB, 5 * GIB, 11 * GIB, 12 * GIB, 20 * GIB])
def test_a_budget_holds_weights_and_buffers(budget):
    found = plans().make_memory_plan(weights(), facts(), budget=budget).mode("layerwise")
    assert found.resident + found.buffers == min(budget, 12 * GIB)
    assert found.verdict == ("fits" if budget >= 12 * GIB else "streams")
    # and not more than the device has
    small = plans().make_memory_plan(weights(), facts(memory=4 * GIB), budget=budget)
    assert small.mode("layerwise").peak <= 4 * GIB


def test_budgets_of_the_nodes_inputs():
    model, device = weights(), facts()
    per = model.blocks[0]
    buffers = 2 * model.largest
    outside = model.total - 20 * per

    def given(gigabytes, blocks):
        return plans().budget_of(model, device, gigabytes, blocks)

    assert given(0, 0) == outside + buffers
    assert given(0, 3) == outside + 3 * per + buffers
    assert given(0, 20) == model.total
    assert given(2.5, 0) == int(2.5 * GIB)
    assert given(2.5, 3) == min(int(2.5 * GIB), outside + 3 * per + buffers)
    assert given(100, 3) == outside + 3 * per + buffers
    error = pack("quant.errors").LowBitError
    with pytest.raises(error, match="fewer blocks"):
        given(0, 21)


def test_a_global_mode_holds_for_every_other():
    plan = plans().make_memory_plan(weights(), facts(), forced="sequential")
    assert {mode.resident for mode in plan.modes} == {0}
    plan = plans().make_memory_plan(weights(), facts(), forced="resident")
    assert {mode.streamed for mode in plan.modes} == {0}


def test_a_cpu_holds_everything_in_each_mode():
    plan = plans().make_memory_plan(weights(), facts("cpu", host_memory=16 * GIB), GIB, "x")
    assert {(m.resident, m.streamed, m.verdict) for m in plan.modes} == {(12 * GIB, 0, "fits")}
    plan = plans().make_memory_plan(weights(), facts("cpu", host_memory=12 * GIB), GIB, "x")
    assert {m.verdict for m in plan.modes} == {"too big"}


def test_text_json_and_picture():
    charts = pack("loaders.charts")
    plan = plans().make_memory_plan(weights(), facts(memory=8 * GIB), GIB // 2, "1024 x 1024")
    lines = plan.text.splitlines()
    assert lines[0].endswith("8.00 GiB, 7.00 GiB for weights and buffers")
    assert "0.50 GiB at 1024 x 1024" in lines[1]
    (auto,) = [line for line in lines if line.strip().startswith("auto")]
    assert auto.split()[1:] == ["6.88", "GiB", "5.12", "GiB", "0.12", "GiB", "7.62", "GiB",
                                "streams"]  # fmt: skip
    told = json.loads(json.dumps(plan.to_json()))
    assert [mode["mode"] for mode in told["modes"]] == list(plans().MODES)
    assert told["modes"][0]["streamed"] == plan.mode("auto").streamed
    panel, streamed = plan.chart.panels
    assert [value for _, ((_, value),) in streamed.rows] == [m.streamed for m in plan.modes]
    for (label, parts), mode in zip(panel.rows, plan.modes, strict=True):
        assert label == f"{mode.mode}: {mode.verdict}"
        assert sum(value for _, value in parts) == mode.peak
    assert charts.draw(plan.chart).width == 1024
    unknown = plans().make_memory_plan(weights(), facts())
    assert "activations: unknown" in unknown.text


@pytest.mark.parametrize("case", ["int8", "uint4_svd", "dyn4_mixed_svd_mm"])
def test_headers_tell_what_is_loaded(case):
    """The plan of a checkpoint's headers against the one of the loaded model."""
    path = oracle("sdnq_models.py", "flux", "256", "int8", "fp8", "int8_mm", "uint4", "uint4_svd",
                  "uint4_had_svd", "uint4_cb", "dyn4_mixed_svd_mm") / case  # fmt: skip
    api, memory = pack("loaders.host.api"), pack("loaders.host.memory")
    plan = pack("loaders.plan").make_plan(path, native_shapes=api.native_shapes)
    with plan.source:
        hollow = api.hollow_model({name: shape for name, (shape, _) in plan.native().items()})
        shapes = {
            name: tuple(value.shape) for name, value in hollow.diffusion_model.state_dict().items()
        }
        assert {name: shape for name, (shape, _) in plan.native().items()} == shapes
        estimate = memory.activations_of(hollow)
        report = pack("loaders.report").inspect(
            plan, pack("loaders.host.devices").device_facts(), activations=estimate
        )
    patcher = api.load_diffusion_model(str(path), {"compute_dtype": "bf16"}, True)
    loaded = memory.plan_of(patcher)
    told, found = report.memory.weights, loaded.weights
    assert told.total == report.weight_bytes
    assert abs(told.total - found.total) < 0.02 * found.total
    assert len(told.blocks) == len(found.blocks) == 4
    assert told.widest == found.widest
    assert report.memory.activations == estimate[0] > 0 and loaded.assumed == estimate[1]
    assert report.memory.text in report.text
    assert json.loads(json.dumps(report.to_json()))["memory"]["usable"] > 0
    assert pack("loaders.charts").draw(report.chart).height > 300


def test_tensors_that_are_taken_apart_are_counted_once(tmp_path):
    """SVDQuant fuses layers of Z-Image that ComfyUI has apart."""
    path = tmp_path / "fused.safetensors"
    svdq_models.make("z_image", path, precision="int4")
    plan = pack("loaders.plan").make_plan(path)
    with plan.source:
        assert any(piece.rows for move in plan.moves for piece in move.pieces)
        native = sum(nbytes for _, nbytes in plan.native().values())
        assert native == sum(nbytes for _, _, nbytes in plan.by_format().values())


def test_estimates_are_for_pictures_or_clips():
    """ComfyUI's own models, without their layers: the latent that the estimate is for."""
    import comfy.model_base
    import comfy.supported_models as models

    activations_of = pack("loaders.host.memory").activations_of
    for kind, image_model, assumed in (
        (models.Flux, "flux", "1024 x 1024"),
        (models.QwenImage, "qwen_image", "1024 x 1024"),
        (models.WAN21_T2V, "wan2.1", "81 frames of 832 x 480"),
        (models.SDXL, None, "1024 x 1024"),
    ):
        config = kind({"image_model": image_model, "disable_unet_model_creation": True})
        config.set_inference_dtype(torch.bfloat16, None)
        nbytes, told = activations_of(comfy.model_base.BaseModel(config))
        assert told == assumed and nbytes > 100 * MIB, kind
    assert activations_of(None) == (None, "")

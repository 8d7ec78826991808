"""Compare Two Models: its figures against tensors that the host's own sampler gives."""

from __future__ import annotations

import json
import math

import pytest
import tiny_unet
import torch
from support import pack


@pytest.fixture(autouse=True)
def as_nodes_run():
    """Inference mode, as the server runs every node."""
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def models():
    """A low-bit MODEL and the float one that it was made of, and the float one of its weights."""
    weights = tiny_unet.float_weights()
    return {
        "uint4": tiny_unet.ours("uint4"),
        "same": tiny_unet.floats("uint4"),
        "original": tiny_unet.of_floats(weights),
    }


class Decoder:
    """What a VAE does for the node: [B, 4, h, w] to pictures of twice the size."""

    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        doubled = latent[:, :3].repeat_interleave(2, -1).repeat_interleave(2, -2)
        return (doubled.movedim(1, -1) / 300 + 0.5).clamp(0, 1)


def compared(one, other, steps: int = 3, sampler: str = "euler", batch: int = 1, **more):
    node = pack("nodes.compare").LowBitCompare
    latent = {"samples": torch.zeros(batch, 4, 16, 12)}
    report, image, text = node.execute(
        one,
        other,
        tiny_unet.conditioning(1),
        tiny_unet.conditioning(2),
        latent,
        5,
        steps,
        4.0,
        sampler,
        "normal",
        **more,
    ).args
    for patcher in (one, other):
        tiny_unet.mm.unload_model_and_clones(patcher)
    assert report.text == text and image.dtype == torch.float32
    assert image.min() >= 0 and image.max() <= 1 and image.shape[-1] == 3
    json.dumps(report.to_json(), allow_nan=False)
    return report, image


def test_the_result_is_the_samplers_own(models):
    report, image = compared(models["original"], models["uint4"])
    one, other = (tiny_unet.sample(models[name], steps=3) for name in ("original", "uint4"))
    told = report.to_json()
    true = float((one - other).norm() / one.norm())
    assert true > 0.01 and math.isclose(told["difference"], true, rel_tol=1e-3)
    assert len(told["difference_by_step"]) == 3
    # where the latents differ, the picture is bright: eight pixels for a value
    assert image.shape == (1, 128, 96, 3)
    apart = (one - other).square().mean(1).sqrt() / one.square().mean().sqrt() * 8
    assert torch.allclose(image[:, ::8, ::8, 0], apart.clamp(0, 1), atol=1e-3)
    assert report.chart.panels[0].series[""][2][1] == pytest.approx(
        100 * told["difference_by_step"][2]
    )


def test_the_first_step_is_that_of_one_input(models):
    """By hand: the models' own answers to the same noise."""
    answers = []
    for name in ("original", "uint4"):
        patcher, seen = models[name].clone(), []
        patcher.set_model_sampler_post_cfg_function(
            lambda given, seen=seen: seen.append(given["denoised"].clone()) or given["denoised"]
        )
        tiny_unet.sample(patcher, steps=3)
        answers.append(seen[0])
    report, _ = compared(models["original"], models["uint4"])
    true = float((answers[0] - answers[1]).norm() / answers[0].norm())
    assert math.isclose(report.by_step[0], true, rel_tol=1e-3)


def test_the_same_weights_are_told_as_equal(models):
    report, image = compared(models["same"], models["same"])
    assert "equal, bit for bit" in report.text and image.max() == 0
    assert set(report.to_json()["difference_by_step"]) == {0.0}
    near, _ = compared(models["same"], models["uint4"])
    assert near.of_result < 1e-5


def test_with_a_vae_three_pictures_and_their_psnr(models):
    report, image = compared(models["original"], models["uint4"], vae=Decoder(), gain=2.0, batch=2)
    assert image.shape == (2, 32, 3 * 24, 3)
    one, other, apart = image.split(24, dim=2)
    assert torch.equal(apart, ((one - other).abs() * 2).clamp(0, 1)) and apart.max() > 0.01
    noise = float(((one - other) ** 2).mean())
    assert report.to_json()["psnr_db"] == pytest.approx(-10 * math.log10(noise), abs=1e-3)
    assert "dB PSNR" in report.text


def test_sizes_and_paces(models):
    report, _ = compared(models["original"], models["uint4"])
    told = report.to_json()
    assert told["a"]["bytes"] == models["original"].model_size()
    assert told["b"]["bytes"] == models["uint4"].model_size() < told["a"]["bytes"] / 3
    assert 0 < told["a"]["seconds_per_step"] < 60
    single, _ = compared(models["original"], models["uint4"], steps=1)
    assert single.to_json()["a"]["seconds_per_step"] is None


def test_a_sampler_that_draws_noise_draws_the_same_for_both(models):
    report, _ = compared(models["same"], models["uint4"], sampler="euler_ancestral")
    assert report.of_result < 1e-4


@pytest.mark.slow
def test_a_sampler_that_chooses_its_steps(models):
    report, _ = compared(models["original"], models["uint4"], steps=2, sampler="dpm_adaptive")
    assert report.by_step and report.of_result > 0

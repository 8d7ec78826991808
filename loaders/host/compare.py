"""Sampling two MODELs alike, by the host's own sampler."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import comfy.sample
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher

from ..compare_report import CompareReport, Sampled, psnr
from .loaded import name_of

__all__ = ["Sampling", "compare"]


@dataclass(frozen=True)
class Sampling:
    """What both are sampled with, as KSampler has it."""

    seed: int
    steps: int
    cfg: float
    sampler: str
    scheduler: str
    positive: list
    negative: list
    latent: dict
    denoise: float = 1.0

    def told(self) -> dict[str, str | int | float]:
        """For the report."""
        names = ("seed", "steps", "cfg", "sampler", "scheduler", "denoise")
        return {name: getattr(self, name) for name in names}


def compare(
    one: ModelPatcher, other: ModelPatcher, how: Sampling, vae=None, gain: float = 8.0
) -> tuple[CompareReport, torch.Tensor]:
    """Sample both and tell the difference.

    Args:
        one: What the other is compared with.
        other: The other.
        how: Noise, prompt and sampler.
        vae: Decodes the results; None shows the difference of the latents.
        gain: Differences are shown this many times as large.

    Returns:
        The report, and a picture ``[B, H, W, 3]``: with a VAE both results and their difference
        side by side, else the difference of the latents.
    """
    bar = comfy.utils.ProgressBar(2 * how.steps)
    done = [_sample(patcher, how, bar) for patcher in (one, other)]
    (sampled, results) = zip(*done, strict=True)
    if vae is None:
        report = CompareReport(*sampled, how.told())
        return report, _latent_difference(*map(_first, results), gain)
    pictures = [_decoded(vae, result) for result in results]
    report = CompareReport(*sampled, how.told(), psnr(*pictures), True)
    apart = ((pictures[0] - pictures[1]).abs() * gain).clamp(0, 1)
    return report, torch.cat([*pictures, apart], dim=2)


def _sample(patcher: ModelPatcher, how: Sampling, bar) -> tuple[Sampled, torch.Tensor]:
    latent = comfy.sample.fix_empty_latent_channels(
        patcher,
        how.latent["samples"],
        how.latent.get("downscale_ratio_spacial"),
        how.latent.get("downscale_ratio_temporal"),
    )
    steps, times = [], []

    def noted(step, denoised, x, total) -> None:
        steps.append(_flat(denoised))
        times.append(time.perf_counter())
        bar.update(1)

    result = comfy.sample.sample(
        patcher,
        comfy.sample.prepare_noise(latent, how.seed, how.latent.get("batch_index")),
        how.steps,
        how.cfg,
        how.sampler,
        how.scheduler,
        how.positive,
        how.negative,
        latent,
        denoise=how.denoise,
        noise_mask=how.latent.get("noise_mask"),
        callback=noted,
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        seed=how.seed,
    )
    seconds = [end - begin for begin, end in pairwise(times)]
    size = int(patcher.model_size())
    return Sampled(name_of(patcher), size, steps, seconds, _flat(result)), result


def _parts(latent: torch.Tensor) -> Sequence[torch.Tensor]:
    """A latent's tensors: models of picture and sound have several."""
    return latent.tensors if latent.is_nested else [latent]


def _first(latent: torch.Tensor) -> torch.Tensor:
    return _parts(latent)[0].float().cpu()


def _flat(latent: torch.Tensor) -> torch.Tensor:
    return torch.cat([part.float().cpu().flatten() for part in _parts(latent)])


def _decoded(vae, latent: torch.Tensor) -> torch.Tensor:
    """Pictures ``[B, H, W, 3]``, the frames of clips one after the other."""
    pictures = vae.decode(_parts(latent)[0]).float().cpu()
    return pictures.reshape(-1, *pictures.shape[-3:])


def _latent_difference(one: torch.Tensor, other: torch.Tensor, gain: float) -> torch.Tensor:
    """Root mean square over channels, as a share of the first's; eight pixels for a value."""
    apart = (one - other).square().mean(1).sqrt() / one.square().mean().sqrt().clamp(min=1e-12)
    apart = apart.reshape(-1, *apart.shape[-2:]) if apart.dim() > 2 else apart[:, None]
    shown = (apart * gain).clamp(0, 1).repeat_interleave(8, -1).repeat_interleave(8, -2)
    return shown[..., None].expand(*shown.shape, 3).contiguous()

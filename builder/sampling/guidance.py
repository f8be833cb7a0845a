"""At which denoising steps guidance is at work, and what an image costs by it.

Guidance in a limited interval (Kynkäänniemi 2024, arXiv 2404.07724): classifier-free guidance harms at high noise
levels, where it cuts variety, does next to nothing at low ones, and helps in between only. The interval is given as the
paper does, by the noise level sigma = sqrt((1 - abar) / abar) of latents of about unit variance: guided are the steps
with low < sigma <= high. The paper's interval for SDXL is (0.28, 5.42]; SDXL's levels run from 14.6 to 0.03.
Outside it only the prompted half of the batch is computed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from builder.config import SampleConfig
from builder.sampling.schedulers import make_scheduler


def guided_steps(scheduler: Any, guidance: float, interval: Sequence[float]) -> list[bool]:
    """For each of the scheduler's timesteps (set before), whether both halves of guidance are computed.

    interval: [low, high] in sigma, or empty for all steps. A guidance scale of 1 is none.
    """
    levels = noise_levels(scheduler)
    if guidance <= 1:
        return [False] * len(levels)
    return [not interval or interval[0] < level <= interval[1] for level in levels]


def noise_levels(scheduler: Any) -> list[float]:
    """Sigma at each of the scheduler's timesteps, highest first."""
    if hasattr(scheduler, "sigmas"):
        levels: list[float] = scheduler.sigmas[: len(scheduler.timesteps)].tolist()
        return levels
    kept = scheduler.alphas_cumprod[scheduler.timesteps.cpu().long()]  # DDIM: its timesteps are whole numbers
    return ((1 - kept) / kept).sqrt().tolist()


def evaluations(config: SampleConfig, checkpoint_config: Mapping[str, Any]) -> int:
    """How many images the denoiser sees to make one: the unit of what an image costs.

    checkpoint_config: of the checkpoint's scheduler. Two for a guided step, one for another; Heun's steps are double.
    """
    scheduler = make_scheduler(config.scheduler, checkpoint_config)
    scheduler.set_timesteps(config.steps)
    return sum(1 + guided for guided in guided_steps(scheduler, config.guidance, config.guidance_interval))

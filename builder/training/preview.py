"""What to look at while training: reconstructions, samples from fixed seeds, and the loss curve, as PNG files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler
from PIL import Image
from torch import Tensor

from builder.config import Config
from builder.models.sdxl import Pipeline
from builder.training.data import step_generator
from builder.training.diffusion import Prompts
from builder.training.vae import encode


def to_pixels(image: Tensor) -> Tensor:
    """float [B, 3, H, W] in [-1, 1] -> uint8, rounded."""
    return ((image.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()


def write_grid(rows: list[Tensor], file: Path, least: int = 96) -> None:
    """Rows of uint8 [B, 3, S, S] as one PNG; small images are enlarged by a whole factor to at least `least` px."""
    lines = [torch.cat(list(row), dim=-1) for row in rows]
    grid = torch.cat(lines, dim=-2).permute(1, 2, 0).numpy()
    factor = max(1, -(-least // rows[0].shape[-1]))
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.repeat(np.repeat(grid, factor, axis=0), factor, axis=1)).save(file)


@torch.no_grad()
def write_reconstructions(pipeline: Pipeline, pixels: Tensor, file: Path, device: torch.device) -> None:
    """Crops (uint8 [B, 3, S, S]) above what the autoencoder makes of them."""
    mean, _ = encode(pipeline.vae, pixels, device)
    write_grid([pixels, to_pixels(pipeline.vae.decode(mean.to(device)).sample)], file)


@torch.no_grad()
def write_samples(
    pipeline: Pipeline, prompts: Prompts, sizes: dict[str, list[int]], config: Config,
    file: Path, device: torch.device, per_class: int = 8,
) -> None:  # fmt: skip
    """A row of samples per class, always from the same noise, with the config's steps and guidance."""
    scheduler = DPMSolverMultistepScheduler.from_config(
        pipeline.scheduler.config, algorithm_type="dpmsolver++", solver_order=2, use_karras_sigmas=True
    )
    channels, side = pipeline.unet.config.in_channels, pipeline.unet.config.sample_size
    negative = torch.full((per_class,), prompts.classes)
    rows = []
    for label, code in enumerate(config.classes.codes):
        scheduler.set_timesteps(config.sample.steps, device=device)
        noise = torch.randn(per_class, channels, side, side, generator=step_generator(config.seed, "preview", code))
        latents = noise.to(device) * scheduler.init_noise_sigma
        text = torch.cat([negative, torch.full((per_class,), label)]).to(device)
        native = torch.tensor([sizes[code][i * len(sizes[code]) // per_class] for i in range(per_class)]).float()
        zero, size = torch.zeros(per_class), torch.full((per_class,), float(config.train.size))
        time_ids = torch.stack([native, native, zero, zero, size, size], dim=1).repeat(2, 1).to(device)
        conditions = {"text_embeds": prompts.pooled[text], "time_ids": time_ids}
        for time in scheduler.timesteps:
            pair = scheduler.scale_model_input(torch.cat([latents, latents]), time)
            without, asked = pipeline.unet(
                pair, time, encoder_hidden_states=prompts.hidden[text], added_cond_kwargs=conditions
            ).sample.chunk(2)
            latents = scheduler.step(without + config.sample.guidance * (asked - without), time, latents).prev_sample
        rows.append(to_pixels(pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample))
    write_grid(rows, file)


def write_curve(log: Path, file: Path) -> bool:
    """The losses of log.jsonl by stage; False (and no file) when matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    stages = list(dict.fromkeys(line["stage"] for line in lines))
    figure, axes = pyplot.subplots(1, len(stages), figsize=(6 * len(stages), 4), squeeze=False)
    for axis, stage in zip(axes[0], stages, strict=True):
        # After an interruption some steps were logged twice, equally: the last one counts.
        points = {line["step"]: line["loss"] for line in lines if line["stage"] == stage}
        axis.plot(sorted(points), [points[step] for step in sorted(points)], linewidth=0.8)
        axis.set(title=stage, xlabel="step", ylabel="loss", yscale="log")
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    pyplot.close(figure)
    return True

"""What to look at while training: reconstructions, samples of fixed seeds, and the loss curve, as PNG files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from builder import plotting
from builder.files import replace_file
from builder.models.building import Pipeline
from builder.phases import ClassTable
from builder.sampling.grain import with_grain
from builder.sampling.pixels import to_pixels
from builder.sampling.sampler import Request, Sampler
from builder.training.vae import encode


def write_grid(rows: list[np.ndarray], file: Path, least: int = 96) -> None:
    """Rows of uint8 [B, S, S, 3] as one PNG; small images are enlarged by a whole factor to at least `least` px."""
    grid = np.concatenate([np.concatenate(list(row), axis=1) for row in rows])
    factor = max(1, -(-least // rows[0].shape[1]))
    image = Image.fromarray(np.repeat(np.repeat(grid, factor, axis=0), factor, axis=1))
    replace_file(file, lambda stream: image.save(stream, "PNG"))


@torch.no_grad()
def write_reconstructions(pipeline: Pipeline, pixels: Tensor, file: Path, device: torch.device) -> None:
    """Crops (uint8 [B, 3, S, S]) above what the autoencoder makes of them."""
    mean, _ = encode(pipeline.vae, pixels, device)
    decoded = to_pixels(with_grain(pipeline.vae, pipeline.vae.decode(mean.to(device)).sample, range(len(mean))))
    write_grid([pixels.permute(0, 2, 3, 1).numpy(), decoded], file)


def write_samples(sampler: Sampler, classes: ClassTable, file: Path, per_class: int = 8) -> None:
    """A row of samples per class, always of the same seeds; these are spread over the sizes the class is asked at."""
    rows = []
    for label, code in enumerate(classes.codes):
        sizes = len(sampler.original_sizes[code])
        seeds = [number * max(1, sizes // per_class) for number in range(per_class)]
        rows.append(sampler.generate([Request(code, label, seed) for seed in seeds]).pixels)
    write_grid(rows, file)


def write_curve(log: Path, file: Path) -> None:
    """The losses of log.jsonl by stage."""
    pyplot = plotting.pyplot()
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    stages = list(dict.fromkeys(line["stage"] for line in lines))
    figure, axes = pyplot.subplots(1, len(stages), figsize=(6 * len(stages), 4), squeeze=False)
    for axis, stage in zip(axes[0], stages, strict=True):
        # After an interruption some steps were logged twice, equally: the last one counts.
        points = {line["step"]: line["loss"] for line in lines if line["stage"] == stage}
        axis.plot(sorted(points), [points[step] for step in sorted(points)], linewidth=0.8)
        scale = "log" if min(points.values()) > 0 else "linear"  # an adversarial loss may be negative
        axis.set(title=stage, xlabel="step", ylabel="loss", yscale=scale)
        axis.grid(alpha=0.3)
    figure.tight_layout()
    replace_file(file, lambda stream: figure.savefig(stream, dpi=110, format="png"))
    pyplot.close(figure)

"""What the job is measured against: the loop that one writes first, with nothing but the libraries.

The diffusers pipeline is called with a prompt (or a batch of prompts) at a time, each image saved by PIL and compared
with each of the panel's by torchmetrics, pair by pair. With 50 steps and one prompt at a time it is the old system's
way. It has all cores of the machine (or the GPU); no other score is computed.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from builder.config import SampleConfig
from builder.quality.ssim import SIGMA, WINDOW, bring_to
from builder.sampling.schedulers import make_scheduler


@dataclass(frozen=True)
class Loop:
    """Seconds of a plain loop over `images`, by what it did."""

    images: int
    draw: float
    save: float
    compare: float

    @property
    def per_image(self) -> float:
        return (self.draw + self.save + self.compare) / self.images

    @property
    def unscored(self) -> float:
        return (self.draw + self.save) / self.images


class PlainLoop:
    """A pipeline and panels, ready to loop. panels: phase -> uint8 RGB crops, brought to `size` px beforehand."""

    def __init__(
        self, pipeline: Any, config: SampleConfig, prompts: Mapping[str, str],
        panels: Mapping[str, Sequence[np.ndarray]], size: int,
    ) -> None:  # fmt: skip
        self.pipeline, self.config, self.prompts, self.size = pipeline, config, dict(prompts), size
        pipeline.scheduler = make_scheduler(config.scheduler, pipeline.scheduler.config)
        pipeline.set_progress_bar_config(disable=True)
        self._panels = {code: [self._ready(crop) for crop in crops] for code, crops in panels.items()}

    def run(self, codes: Sequence[str], steps: int, batch: int, folder: Path) -> Loop:
        """Draw an image of each of `codes`, `batch` prompts a call; save and compare each."""
        spent = {"draw": 0.0, "save": 0.0, "compare": 0.0}
        for start in tqdm(range(0, len(codes), batch), f"plain loop, {steps} steps", unit="call", leave=False):
            part = codes[start : start + batch]
            began = time.perf_counter()
            images = self.pipeline(
                prompt=[self.prompts[code] for code in part],
                negative_prompt=[self.config.negative_prompt] * len(part),
                height=self.config.size, width=self.config.size,
                num_inference_steps=steps, guidance_scale=self.config.guidance,
                generator=[torch.Generator("cpu").manual_seed(start + i) for i in range(len(part))],
            ).images  # fmt: skip
            drawn = time.perf_counter()
            for i, image in enumerate(images):
                image.save(folder / f"{start + i}.png")
            saved = time.perf_counter()
            for image, code in zip(images, part, strict=True):
                self._compared(np.asarray(image), code)
            spent["draw"] += drawn - began
            spent["save"] += saved - drawn
            spent["compare"] += time.perf_counter() - saved
        return Loop(len(codes), **spent)

    def _compared(self, pixels: np.ndarray, code: str) -> float | None:
        """The best SSIM over the phase's panel; None where there is no panel."""
        from torchmetrics.functional.image import structural_similarity_index_measure

        panel = self._panels.get(code)
        if not panel:
            return None
        image = self._ready(pixels)
        pairs = [
            structural_similarity_index_measure(image, crop, sigma=SIGMA, kernel_size=WINDOW, data_range=1.0)
            for crop in panel
        ]
        return max(map(float, pairs))  # type: ignore[arg-type]  # a tensor, unless the whole map is asked for

    def _ready(self, pixels: np.ndarray) -> torch.Tensor:
        """uint8 [H, W, 3] -> [1, 3, size, size] where the pipeline is."""
        image = bring_to(torch.from_numpy(np.array(pixels)).permute(2, 0, 1)[None], self.size)
        return image.to(self.pipeline.device)

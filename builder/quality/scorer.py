"""All scores of images: the scorers, each with its columns, and the one that runs them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch

from builder.config import ScoreConfig
from builder.errors import BuilderError
from builder.quality.panel import panel_sha256
from builder.quality.reference import SCORE_VERSION, Reference
from builder.quality.ssim import PanelSSIM
from builder.quality.statistics import image_statistics
from builder.shards.dataset import Dataset

Images = Sequence[np.ndarray]  # uint8 RGB [H, W, 3] each
Rows = list[dict[str, float]]


class ImageScorer(Protocol):
    """Some score columns of images; made with the panel's crops (phase -> images), the reference and a device."""

    def __init__(self, panels: dict[str, list[np.ndarray]], reference: Reference, device: str) -> None: ...

    def score(self, images: Images, codes: Sequence[str]) -> Rows: ...


class SsimScorer:
    """`ssim`, `ssim_mean`; see quality.ssim."""

    def __init__(self, panels: dict[str, list[np.ndarray]], reference: Reference, device: str) -> None:
        self._ssim = PanelSSIM(panels, reference.ssim_size, reference.ssim_stride, device)

    def score(self, images: Images, codes: Sequence[str]) -> Rows:
        tensors = [torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images]
        best, mean = self._ssim.score(tensors, codes)
        return [{"ssim": float(b), "ssim_mean": float(m)} for b, m in zip(best, mean, strict=True)]


class StatisticsScorer:
    """`sharpness`, `contrast`, `clipped`, mean colour; see quality.statistics."""

    def __init__(self, panels: dict[str, list[np.ndarray]], reference: Reference, device: str) -> None:
        pass  # needs no reference

    def score(self, images: Images, codes: Sequence[str]) -> Rows:
        return [image_statistics(image) for image in images]


SCORERS: dict[str, type[ImageScorer]] = {"ssim": SsimScorer, "statistics": StatisticsScorer}


class Scorer:
    """Every score column of an image, against the panel that `reference` names in the dataset `real`."""

    def __init__(self, reference: Reference, real: Dataset, config: ScoreConfig, device: str = "cpu") -> None:
        """BuilderError when `config` asks for another protocol than the reference's, or `real` has changed since."""
        require_protocol(reference, config)
        self.version = reference.version
        panels = _panel_images(reference, real)
        self._scorers = [scorer(panels, reference, device) for scorer in SCORERS.values()]

    def score(self, pixels: Images | np.ndarray, codes: Sequence[str]) -> Rows:
        """One dict of scores an image: uint8 RGB [H, W, 3] each (a list of any sizes, or an array [N, H, W, 3])."""
        images = list(pixels)
        for image in images:
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
                raise TypeError(f"an image must be uint8 [H, W, 3], not {image.dtype} {list(image.shape)}")
        parts = [scorer.score(images, codes) for scorer in self._scorers]
        return [{name: value for part in row for name, value in part.items()} for row in zip(*parts, strict=True)]


def require_protocol(reference: Reference, config: ScoreConfig) -> None:
    """Refuse to score by a protocol other than the reference's: the numbers could not be compared."""
    asked = {
        "ssim_size": config.ssim_size, "ssim_stride": config.ssim_stride,
        "panel_size": config.panel, "panel_seed": config.panel_seed, "score_version": SCORE_VERSION,
    }  # fmt: skip
    had = {key: getattr(reference, key) for key in asked}
    differs = [f"{key} {had[key]} -> {asked[key]}" for key in asked if had[key] != asked[key]]
    if differs:
        raise BuilderError(
            f"the dataset was scored by another protocol: {', '.join(differs)}",
            "keep the score settings, or run `builder score` to score all of it anew",
        )


def _panel_images(reference: Reference, real: Dataset) -> dict[str, list[np.ndarray]]:
    wanted = {key for keys in reference.panel.values() for key in keys}
    found = {row["key"]: row for row in real.table().to_pylist() if row["key"] in wanted}
    panel = {code: [found[key] for key in keys if key in found] for code, keys in reference.panel.items()}
    if panel_sha256(panel) != reference.panel_sha256:
        raise BuilderError(
            f"dataset '{real.name}' no longer holds the panel that these scores stand on",
            f"bring back the dataset '{reference.against}' as it was, or run `builder score` to score all anew",
        )
    return {code: [real.pixels(row) for row in rows] for code, rows in panel.items()}

"""All scores of images: the scorers, each with its columns, and the one that runs them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch

from builder.config import ScoreConfig
from builder.errors import BuilderError
from builder.quality.feature_scores import FeatureScores
from builder.quality.features import load_extractor
from builder.quality.features.extractor import Extractor
from builder.quality.lpips import PanelLPIPS, why_missing
from builder.quality.panel import patient_of
from builder.quality.probe import Probe
from builder.quality.reference import SCORE_VERSION, Reference
from builder.quality.ssim import PanelSSIM
from builder.quality.statistics import image_statistics
from builder.quality.training_crops import TrainingCrops, panel_rows, require_same_crops
from builder.shards.dataset import Dataset
from builder.shards.schema import PERCENTILES, SCORE_NAMES

Images = Sequence[np.ndarray]  # uint8 RGB [H, W, 3] each
Patients = Sequence[str | None]  # whose crops are left out of all that each image is compared with; None: nobody's
Rows = list[dict[str, Any]]
KEEP = "keep the score settings, or run `builder score` to score all of it anew"
RANKED = {field.name: field.name.removesuffix("_real_pct") for field in PERCENTILES}


class ImageScorer(Protocol):
    """Some score columns of images."""

    def score(self, images: Images, codes: Sequence[str], patients: Patients) -> Rows: ...


class PanelScorer:
    """`ssim`, `ssim_mean` or `lpips`, `lpips_mean`: the best and the mean over the panel."""

    def __init__(self, name: str, measure: PanelSSIM | PanelLPIPS, owners: dict[str, list[str]], size: int) -> None:
        """`owners`: phase -> the patient of each panel crop, reserves behind; `size`: of the panel proper."""
        self._name, self._measure, self._owners, self._size = name, measure, owners, size
        self._best = np.max if name == "ssim" else np.min  # a similarity, a distance

    def score(self, images: Images, codes: Sequence[str], patients: Patients) -> Rows:
        tensors = [torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images]
        rows = []
        for each, code, patient in zip(self._measure.each(tensors, codes), codes, patients, strict=True):
            others = [place for place, owner in enumerate(self._owners[code]) if owner != patient][: self._size]
            best, mean = (float(self._best(each[others])), float(each[others].mean())) if others else (None, None)
            rows.append({self._name: best, f"{self._name}_mean": mean})
        return rows


class StatisticsScorer:
    """Sharpness, contrast, clipping, noise, mean colour; see quality.statistics."""

    def score(self, images: Images, codes: Sequence[str], patients: Patients) -> Rows:
        return [dict(image_statistics(image)) for image in images]


class FeatureScorer:
    """`feature_distance`, `realism`, `phase_probability`, `phase_margin`; see quality.feature_scores."""

    def __init__(self, crops: TrainingCrops, probe: Probe | None) -> None:
        self._extractor = crops.extractor
        self._scores = FeatureScores(crops.features, crops.patients, probe)
        self.last = np.empty((0, crops.extractor.dimension), np.float32)  # features of the images last scored, to keep

    def score(self, images: Images, codes: Sequence[str], patients: Patients) -> Rows:
        self.last = self._extractor.of(images)
        return self._scores.score(self.last, codes, patients)


class CopyScorer:
    """`copy_score`, `copy_of`; see quality.copies."""

    def __init__(self, crops: TrainingCrops) -> None:
        self._index = crops.copy_index

    def score(self, images: Images, codes: Sequence[str], patients: Patients) -> Rows:
        scores, keys = self._index.search(images, patients)
        return [{"copy_score": float(score), "copy_of": key} for score, key in zip(scores, keys, strict=True)]


class Scorer:
    """Every score of an image against the training crops of `real`, by the protocol of `reference`."""

    def __init__(
        self, reference: Reference, real: Dataset, config: ScoreConfig, device: str = "cpu", *,
        crops: TrainingCrops | None = None, leave_out: bool = False,
    ) -> None:  # fmt: skip
        """`leave_out`: patients will be named to `score`, so that panels need reserves.

        BuilderError when `config` asks for another protocol than the reference's, or `real` has changed since.
        """
        self.reference, self.version = reference, reference.version
        crops = crops or TrainingCrops(
            real, list(reference.panel), load_extractor(config.features, device=device), reference.image_size
        )
        require_protocol(reference, config, crops.extractor)
        require_same_crops(crops, reference)
        rows = {code: panel_rows(crops.rows[code], reference, code, reserves=leave_out) for code in reference.panel}
        panels = {code: [real.pixels(row) for row in own] for code, own in rows.items()}
        owners = {code: [patient_of(row) for row in own] for code, own in rows.items()}
        size = reference.ssim_size
        ssim = PanelSSIM(panels, size, reference.ssim_stride, device)
        self._features = FeatureScorer(crops, Probe.from_json(reference.probe) if reference.probe else None)
        self._scorers: list[ImageScorer] = [
            PanelScorer("ssim", ssim, owners, reference.panel_size),
            self._features,
            StatisticsScorer(),
            CopyScorer(crops),
        ]
        if reference.lpips:
            lpips = PanelLPIPS(panels, size, config.lpips, device)
            _require_equal({"lpips": reference.lpips}, {"lpips": lpips.weights_sha256})
            self._scorers.append(PanelScorer("lpips", lpips, owners, reference.panel_size))

    @property
    def extractor(self) -> Extractor:
        return self._features._extractor

    def score(self, pixels: Images | np.ndarray, codes: Sequence[str], patients: Patients | None = None) -> Rows:
        """One dict of all scores an image: uint8 RGB [H, W, 3] each (a list of any sizes, or an array [N, H, W, 3]).

        `patients`: whose crops are left out of what each image is compared with (for real crops: their own).
        """
        images = list(pixels)
        for image in images:
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
                raise TypeError(f"an image must be uint8 [H, W, 3], not {image.dtype} {list(image.shape)}")
        parts = [scorer.score(images, codes, patients or [None] * len(images)) for scorer in self._scorers]
        rows = [{name: value for part in row for name, value in part.items()} for row in zip(*parts, strict=True)]
        return [
            dict.fromkeys(SCORE_NAMES) | row | real_percentiles(row, self.reference.real.get(code, {}))
            for row, code in zip(rows, codes, strict=True)
        ]

    @property
    def last_features(self) -> np.ndarray:
        """Features float32 [N, D] of the images of the last call of `score`: worth keeping, they were dear."""
        return self._features.last


def real_percentiles(row: dict[str, Any], real: dict[str, list[float]]) -> dict[str, float | None]:
    """Where each score lies among the sorted values of real crops, in % (mid-rank); None where either is missing."""
    found: dict[str, float | None] = {}
    for name, score in RANKED.items():
        value, scale = row.get(score), real.get(score)
        if value is None or not scale:
            found[name] = None
        else:
            below, up_to = np.searchsorted(scale, value, "left"), np.searchsorted(scale, value, "right")
            found[name] = float(50 * (below + up_to) / len(scale))
    return found


def require_protocol(reference: Reference, config: ScoreConfig, extractor: Extractor) -> None:
    """Refuse to score by a protocol other than the reference's: the numbers could not be compared."""
    asked = {
        "ssim_size": config.ssim_size, "ssim_stride": config.ssim_stride,
        "panel_size": config.panel, "panel_seed": config.panel_seed, "score_version": SCORE_VERSION,
        "features": extractor.id,
    }  # fmt: skip
    _require_equal({key: getattr(reference, key) for key in asked}, asked)
    if reference.lpips and (reason := why_missing(config)):
        raise BuilderError(f"the dataset was scored with LPIPS, but now {reason}", KEEP)


def _require_equal(had: dict[str, Any], asked: dict[str, Any]) -> None:
    differs = [f"{key} {had[key]} -> {asked[key]}" for key in asked if had[key] != asked[key]]
    if differs:
        raise BuilderError(
            f"the dataset was scored by another protocol: {', '.join(differs)}",
            KEEP,
        )

"""The scores of an image: one class a score, with its columns, its version and its cost, behind one small protocol.

| score | columns | cost |
|---|---|---|
| `SsimScore` | ssim, ssim_mean | high: one comparison with each crop of the panel |
| `LpipsScore` | lpips, lpips_mean | high: a network, and one comparison with each crop of the panel |
| `FeatureScore` | feature_distance, realism, phase_probability, phase_margin | high: a network |
| `StatisticsScore` | sharpness, contrast, clipped, noise, chroma_noise, mean_r, mean_g, mean_b | low |
| `CopyScore` | copy_score, copy_of | medium: one search among all training crops |

To add one: write its class here or in a module of its own, name it in `SCORES`, and describe its columns in
shards.schema. `builder score` then fills its columns in datasets that were scored before, and computes nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, Protocol

import numpy as np
import torch

from builder.config import ScoreConfig, fingerprint
from builder.errors import BuilderError
from builder.quality.feature_scores import FeatureScores
from builder.quality.lpips import PanelLPIPS
from builder.quality.panel import patient_of
from builder.quality.probe import Probe
from builder.quality.reference import Reference
from builder.quality.ssim import PanelSSIM
from builder.quality.statistics import image_statistics
from builder.quality.training_crops import TrainingCrops, panel_rows
from builder.shards.dataset import Dataset
from builder.shards.schema import PERCENTILES, SCORE_VERSIONS, STAMP

Images = Sequence[np.ndarray]  # uint8 RGB [H, W, 3] each
Patients = Sequence[str | None]  # whose crops are left out of all that each image is compared with; None: nobody's
Rows = list[dict[str, Any]]
KEEP = "keep the score settings, or run `builder score` to score all of it anew"
RANKED = {field.name: field.name.removesuffix("_real_pct") for field in PERCENTILES}  # percentile -> its score
COMMON = ("score_version", "training_sha256", "image_size")  # of the reference: what the percentiles stand on


class ImageScore(Protocol):
    """Some columns of an image.

    Attributes:
        name: of the score, for messages and records.
        columns: what `score` gives, named and described in shards.schema.
        cost: low (statistics), medium or high (networks, panels), for who chooses what to compute.
        code_version: of the definition; raised when a value of the same image changes.
        stands_on: attributes of the Reference that decide the values, beside COMMON.
    """

    name: ClassVar[str]
    columns: ClassVar[tuple[str, ...]]
    cost: ClassVar[str]
    code_version: ClassVar[int]
    stands_on: ClassVar[tuple[str, ...]]

    def score(self, images: Images, codes: Sequence[str], patients: Patients) -> Rows:
        """One row of `columns` an image.

        Args:
            images: uint8 RGB [H, W, 3] each.
            codes: the phase of each.
            patients: whose crops are left out of what each is compared with; None: nobody's.
        """


@dataclass(frozen=True)
class ScoreContext:
    """What scores are made from: the reference, the crops behind it, and where to compute."""

    reference: Reference
    real: Dataset
    crops: TrainingCrops
    config: ScoreConfig
    device: str = "cpu"
    leave_out: bool = False  # patients will be named, so that panels need reserves

    @cached_property
    def _panel_rows(self) -> dict[str, Any]:
        return {
            code: panel_rows(self.crops.rows[code], self.reference, code, reserves=self.leave_out)
            for code in self.reference.panel
        }

    @cached_property
    def panels(self) -> dict[str, list[np.ndarray]]:
        """Phase -> pixels of its panel, reserves behind."""
        return {code: [self.real.pixels(row) for row in rows] for code, rows in self._panel_rows.items()}

    @cached_property
    def owners(self) -> dict[str, list[str]]:
        """Phase -> the patient of each crop of its panel."""
        return {code: [patient_of(row) for row in rows] for code, rows in self._panel_rows.items()}


class _PanelScore:
    """The best and the mean over a phase's panel, without the crops of the image's own patient."""

    columns: ClassVar[tuple[str, ...]]

    def __init__(
        self, measure: PanelSSIM | PanelLPIPS, best: Callable[[np.ndarray], Any], context: ScoreContext
    ) -> None:
        self._measure, self._best = measure, best
        self._owners, self._size = context.owners, context.reference.panel_size

    def score(self, images: Images, codes: Sequence[str], patients: Patients) -> Rows:
        tensors = [torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images]
        rows = []
        for each, code, patient in zip(self._measure.each(tensors, codes), codes, patients, strict=True):
            others = [place for place, owner in enumerate(self._owners[code]) if owner != patient][: self._size]
            best, mean = (float(self._best(each[others])), float(each[others].mean())) if others else (None, None)
            rows.append(dict(zip(self.columns, (best, mean), strict=True)))
        return rows


class SsimScore(_PanelScore):
    """Structural similarity (Wang 2004) to the panel: best and mean."""

    name, cost, code_version = "ssim", "high", 1
    columns = ("ssim", "ssim_mean")
    stands_on = ("ssim_size", "ssim_stride", "panel_sha256")

    def __init__(self, context: ScoreContext) -> None:
        reference = context.reference
        measure = PanelSSIM(context.panels, reference.ssim_size, reference.ssim_stride, context.device)
        super().__init__(measure, np.max, context)


class LpipsScore(_PanelScore):
    """LPIPS (Zhang 2018) to the panel: least and mean. Without its weights there is none."""

    name, cost, code_version = "lpips", "high", 1
    columns = ("lpips", "lpips_mean")
    stands_on = ("ssim_size", "lpips", "panel_sha256")

    def __init__(self, context: ScoreContext) -> None:
        """BuilderError when the weights are other ones than those of the reference."""
        reference = context.reference
        measure = PanelLPIPS(context.panels, reference.ssim_size, context.config.lpips, context.device)
        require_equal({"lpips": reference.lpips}, {"lpips": measure.weights_sha256})
        super().__init__(measure, np.min, context)


class StatisticsScore:
    """Sharpness, contrast, clipping, noise, mean colour; see quality.statistics."""

    name, cost, code_version = "statistics", "low", 1
    columns = ("sharpness", "contrast", "clipped", "noise", "chroma_noise", "mean_r", "mean_g", "mean_b")
    stands_on: ClassVar[tuple[str, ...]] = ()

    def __init__(self, context: ScoreContext) -> None:
        """Nothing of the context is needed."""

    def score(self, images: Images, codes: Sequence[str], patients: Patients) -> Rows:
        return [dict(image_statistics(image)) for image in images]


class FeatureScore:
    """Distance to the training crops in feature space, realism, and what the phase probe says."""

    name, cost, code_version = "features", "high", 1
    columns = ("feature_distance", "realism", "phase_probability", "phase_margin")
    stands_on = ("features",)

    def __init__(self, context: ScoreContext) -> None:
        crops, probe = context.crops, context.reference.probe
        self.extractor = crops.extractor
        self._scores = FeatureScores(crops.features, crops.patients, Probe.from_json(probe) if probe else None)
        self.last = np.empty((0, self.extractor.dimension), np.float32)  # features of the images last scored

    def score(self, images: Images, codes: Sequence[str], patients: Patients) -> Rows:
        self.last = self.extractor.of(images)
        return self._scores.score(self.last, codes, patients)


class CopyScore:
    """Pixel similarity to the most similar training crop; see quality.copies."""

    name, cost, code_version = "copies", "medium", 1
    columns = ("copy_score", "copy_of")
    stands_on: ClassVar[tuple[str, ...]] = ()

    def __init__(self, context: ScoreContext) -> None:
        self._index = context.crops.copy_index

    def score(self, images: Images, codes: Sequence[str], patients: Patients) -> Rows:
        scores, keys = self._index.search(images, patients)
        return [{"copy_score": float(score), "copy_of": key} for score, key in zip(scores, keys, strict=True)]


SCORES: tuple[Any, ...] = (SsimScore, FeatureScore, StatisticsScore, CopyScore, LpipsScore)


def kinds_of(reference: Reference) -> list[Any]:
    """The scores that are computed by a reference: all, but LPIPS without its weights."""
    return [kind for kind in SCORES if kind is not LpipsScore or reference.lpips]


def version_of(kind: Any, reference: Reference, code_version: int | None = None) -> str:
    """Values of one score and of equal version can be compared: SHA-256 over its definition and what it stands on."""
    return fingerprint(
        {
            "score": kind.name,
            "code": kind.code_version if code_version is None else code_version,
            **{name: getattr(reference, name) for name in (*COMMON, *kind.stands_on)},
        }
    )


def versions_of(reference: Reference) -> dict[str, str]:
    """Score -> its version by this reference, as a manifest records them."""
    return {kind.name: version_of(kind, reference) for kind in kinds_of(reference)}


def recorded_versions(metadata: Mapping[str, str], reference: Reference) -> dict[str, str]:
    """The versions of the scores in a manifest, from its metadata.

    Manifests from before scores had versions of their own hold the first definition of each, by the protocol that their
    stamp tells.
    """
    if SCORE_VERSIONS in metadata:
        try:
            found = json.loads(metadata[SCORE_VERSIONS])
        except ValueError:
            return {}
        return {str(name): str(version) for name, version in found.items()} if isinstance(found, dict) else {}
    if metadata.get(STAMP) != replace(reference, code_versions={}).version:
        return {}
    return {kind.name: version_of(kind, reference, 1) for kind in kinds_of(reference)}


def stamps_of(reference: Reference) -> dict[str, str]:
    """What a manifest's metadata say of scores that are all by this reference."""
    return {STAMP: reference.version, SCORE_VERSIONS: json.dumps(versions_of(reference), sort_keys=True)}


def outdated(columns: Collection[str], recorded: Mapping[str, str], reference: Reference) -> list[Any]:
    """The scores that a manifest lacks.

    Args:
        columns: that the manifest has.
        recorded: the versions of the scores in it; of one that is not named, nothing is known.
        reference: by which it is to be scored.

    Returns:
        Those of another version, and those of which a column, or the percentile of one, is missing.
    """
    percentiles = {score: name for name, score in RANKED.items()}
    return [
        kind
        for kind in kinds_of(reference)
        if recorded.get(kind.name) != version_of(kind, reference)
        or any(name not in columns or percentiles.get(name, name) not in columns for name in kind.columns)
    ]


def require_equal(had: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """Refuse to score by a protocol other than the reference's, naming what differs."""
    differs = [f"{key} {had[key]} -> {asked[key]}" for key in asked if had[key] != asked[key]]
    if differs:
        raise BuilderError(f"the dataset was scored by another protocol: {', '.join(differs)}", KEEP)

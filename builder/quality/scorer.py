"""The one that runs all scores of images, by the protocol of a reference."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from builder.config import ScoreConfig
from builder.errors import BuilderError
from builder.quality.features import load_extractor
from builder.quality.features.extractor import Extractor
from builder.quality.image_scores import (
    KEEP,
    RANKED,
    FeatureScore,
    Images,
    ImageScore,
    Patients,
    Rows,
    ScoreContext,
    kinds_of,
    require_equal,
)
from builder.quality.lpips import why_missing
from builder.quality.reference import SCORE_VERSION, Reference
from builder.quality.training_crops import TrainingCrops, require_same_crops
from builder.shards.dataset import Dataset
from builder.shards.schema import SCORE_NAMES


class Scorer:
    """Every score of an image against the training crops of `real`, by the protocol of `reference`."""

    def __init__(
        self, reference: Reference, real: Dataset, config: ScoreConfig, device: str = "cpu", *,
        crops: TrainingCrops | None = None, leave_out: bool = False, only: Collection[str] | None = None,
    ) -> None:  # fmt: skip
        """`leave_out`: patients will be named to `score`, so that panels need reserves. `only`: the names of the scores
        that are wanted; None: all.

        BuilderError when `config` asks for another protocol than the reference's, or `real` has changed since.
        """
        self.reference, self.version = reference, reference.version
        crops = crops or TrainingCrops(
            real, list(reference.panel), load_extractor(config.features, device=device), reference.image_size
        )
        require_protocol(reference, config, crops.extractor)
        require_same_crops(crops, reference)
        self._context = ScoreContext(reference, real, crops, config, device, leave_out)
        kinds = kinds_of(reference) if only is None else [kind for kind in kinds_of(reference) if kind.name in only]
        self._made: list[Any] = [kind(self._context) for kind in kinds]

    @property
    def extractor(self) -> Extractor:
        return self._context.crops.extractor

    @property
    def scores(self) -> list[ImageScore]:
        """What is computed, in order."""
        return self._made

    def score(
        self, pixels: Images | np.ndarray, codes: Sequence[str], patients: Patients | None = None, *,
        only: Collection[str] | None = None,
    ) -> Rows:  # fmt: skip
        """One dict of all scores an image; a score that isn't computed is None.

        Args:
            pixels: uint8 RGB [H, W, 3] each: a list of any sizes, or an array [N, H, W, 3].
            codes: the phase of each image.
            patients: whose crops are left out of what each image is compared with (for real crops: their own).
            only: the names of the scores that are wanted; None: all that this scorer has.
        """
        images = list(pixels)
        for image in images:
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
                raise TypeError(f"an image must be uint8 [H, W, 3], not {image.dtype} {list(image.shape)}")
        rows: Rows = [{} for _ in images]
        for each in self.scores:
            if only is None or each.name in only:
                found = each.score(images, codes, patients or [None] * len(images))
                for row, own in zip(rows, found, strict=True):
                    row |= own
        return [
            dict.fromkeys(SCORE_NAMES) | row | real_percentiles(row, self.reference.real.get(code, {}))
            for row, code in zip(rows, codes, strict=True)
        ]

    @property
    def last_features(self) -> np.ndarray:
        """Features float32 [N, D] of the images of the last call of `score`: worth keeping, they were dear.

        Empty where no score of features is computed.
        """
        for score in self._made:
            if isinstance(score, FeatureScore):
                return score.last
        return np.empty((0, 0), np.float32)


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
    require_equal({key: getattr(reference, key) for key in asked}, asked)
    if reference.lpips and (reason := why_missing(config)):
        raise BuilderError(f"the dataset was scored with LPIPS, but now {reason}", KEEP)

"""Can synthetic images be told from real ones? A cross-validated probe on features, and plain traits one by one.

An AUC of 0.5 says no. A trait that alone tells them apart (sharpness, a colour, bytes of the codec) is a shortcut that
a classifier trained on the mixture can take instead of looking at the wound.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from builder.quality.sets.distances import Counts, checked
from builder.quality.statistics import image_statistics

FOLDS = 5
STRENGTH = 0.01  # inverse regularisation (C) of the probe on standardised features: these are many, images are few
GIVES_AWAY = 0.7  # AUC; a trait whose whole interval lies above gives an image away by itself
TRAITS = (
    "sharpness", "contrast", "clipped", "mean_r", "mean_g", "mean_b", "saturation", "noise", "chroma_noise",
    "bytes_per_pixel",
)  # fmt: skip


def traits(pixels: np.ndarray, row: Mapping[str, Any]) -> dict[str, float]:
    """The TRAITS of a uint8 RGB image [H, W, 3] and its manifest row.

    Those of quality.statistics; saturation: mean of the largest less the smallest channel (0..255); bytes_per_pixel:
    of the stored payload, as the codec left it, at the stored size.
    """
    return {
        **image_statistics(pixels),
        "saturation": float((pixels.max(2).astype(float) - pixels.min(2)).mean()),
        "bytes_per_pixel": row["size"] / (row["width"] * row["height"]),
    }


class Auc:
    """The area under the ROC curve of resamples: the share of pairs of a real and a synthetic image in which the
    synthetic one has the larger score, ties for a half (Mann & Whitney 1947); 0..1.

    Given `folds`, pairs are of one fold, because scores of different fits do not compare.
    """

    def __init__(
        self, real: np.ndarray, synthetic: np.ndarray, folds: tuple[np.ndarray, np.ndarray] | None = None
    ) -> None:
        real, synthetic = np.asarray(real, np.float64)[:, None], np.asarray(synthetic, np.float64)[None]
        self._larger = (synthetic > real) + 0.5 * (synthetic == real)
        self._pairs = np.ones_like(self._larger)
        if folds is not None:
            self._pairs = (folds[0][:, None] == folds[1][None]).astype(np.float64)
            self._larger *= self._pairs

    def __call__(self, w: Counts, v: Counts) -> float:
        """NaN without a pair."""
        pairs = w @ self._pairs @ v
        return float(w @ self._larger @ v / pairs) if pairs else float("nan")


def probe_auc(
    real: np.ndarray, synthetic: np.ndarray, real_groups: Sequence[str], synthetic_groups: Sequence[str]
) -> Auc | None:
    """The AUC of a logistic regression on features [N, D], [M, D] for images of groups (patients) that it was not
    trained on: at most FOLDS folds that keep groups whole; scores are kept, so resamples are not fitted anew.

    None when either side has a single group: there is nothing to leave out.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    n_folds = min(FOLDS, len(set(real_groups)), len(set(synthetic_groups)))
    if n_folds < 2:
        return None
    folds = _folds(real_groups, n_folds), _folds(synthetic_groups, n_folds)
    x = np.concatenate([checked(real), checked(synthetic)])
    origin, fold = np.repeat([0, 1], [len(real), len(synthetic)]), np.concatenate(folds)
    scores = np.empty(len(x))
    for left_out in range(n_folds):
        probe = make_pipeline(StandardScaler(), LogisticRegression(C=STRENGTH, class_weight="balanced", max_iter=500))
        probe.fit(x[fold != left_out], origin[fold != left_out])
        scores[fold == left_out] = probe.decision_function(x[fold == left_out])
    return Auc(scores[: len(real)], scores[len(real) :], folds)


def _folds(groups: Sequence[str], n: int) -> np.ndarray:
    """A fold 0..n-1 for each image: groups go whole, the largest first, each to the smallest fold so far."""
    names, member, sizes = np.unique(np.asarray(groups, dtype=str), return_inverse=True, return_counts=True)
    of_group, filled = np.empty(len(names), int), np.zeros(n, int)
    for group in np.argsort(-sizes, kind="stable"):
        of_group[group] = filled.argmin()
        filled[of_group[group]] += sizes[group]
    return np.asarray(of_group[member])

"""Where images lie among others by their nearest neighbours in feature space: precision, recall, density, coverage.
numpy float64; distances are Euclidean."""

from __future__ import annotations

import numpy as np
from scipy.spatial.distance import cdist

from builder.quality.sets.distances import Counts, checked

NEIGHBOURS = 5  # k, as Naeem et al. 2020 advise
NAMES = ("precision", "recall", "density", "coverage")


def manifold_scores(real: np.ndarray, synthetic: np.ndarray, k: int = NEIGHBOURS) -> dict[str, float]:
    """Precision, recall (Kynkäänniemi et al. 2019), density, coverage (Naeem et al. 2020) of two sets [N, D], [M, D].

    With a ball around each image that reaches to its k-th nearest neighbour in its own set:
    precision: share of synthetic images within some real ball (0..1);
    recall: share of real images within some synthetic ball (0..1);
    density: real balls that a synthetic image lies in, mean, divided by k (0.., 1 in the mean for equal sets);
    coverage: share of real balls that hold some synthetic image (0..1).
    A point on the boundary lies within. BuilderError when a set has no more than k images.
    """
    real, synthetic = checked(real, k + 1), checked(synthetic, k + 1)
    neighbours = Neighbours(real, synthetic, k)
    return neighbours(np.ones(len(real), int), np.ones(len(synthetic), int))


class Neighbours:
    """The manifold scores of resamples of two sets; distances are computed and sorted once.

    An image drawn several times counts so often as a neighbour of others, and never as its own: else its ball would
    shrink to nothing.
    """

    def __init__(self, real: np.ndarray, synthetic: np.ndarray, k: int = NEIGHBOURS) -> None:
        real, synthetic = checked(real), checked(synthetic)
        self._k = k
        self._sorted = [_sorted(cdist(x, x)) for x in (real, synthetic)]
        self._between = cdist(real, synthetic)

    def __call__(self, w: Counts, v: Counts) -> dict[str, float]:
        """Each NaN when an image of a resample has fewer than k others."""
        i, j = np.flatnonzero(w), np.flatnonzero(v)
        real_radii, synthetic_radii = (
            _radii(*ordered, counts, self._k) for ordered, counts in zip(self._sorted, (w, v), strict=True)
        )
        if (
            not len(i)
            or not len(j)
            or not np.isfinite(real_radii[i]).all()
            or not np.isfinite(synthetic_radii[j]).all()
        ):
            return dict.fromkeys(NAMES, float("nan"))
        between = self._between[np.ix_(i, j)]
        in_real, in_synthetic = between <= real_radii[i, None], between <= synthetic_radii[j]
        n, m = w.sum(), v.sum()
        values = (
            in_real.any(0) @ v[j] / m,
            in_synthetic.any(1) @ w[i] / n,
            w[i] @ in_real @ v[j] / (self._k * m),
            in_real.any(1) @ w[i] / n,
        )
        return dict(zip(NAMES, map(float, values), strict=True))


def _sorted(distances: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each row the distances to the others in ascending order, and whose they are; itself left out."""
    np.fill_diagonal(distances, -1.0)  # sorts first, also among equals
    order = np.argsort(distances, axis=1, kind="stable")[:, 1:]
    return np.take_along_axis(distances, order, 1), order


def _radii(distances: np.ndarray, order: np.ndarray, counts: Counts, k: int) -> np.ndarray:
    """The distance of each image to its k-th nearest other, images counted as often as drawn; infinite without one."""
    reached = np.cumsum(counts[order], axis=1, dtype=np.int32) >= k
    if not reached.shape[1]:
        return np.full(len(distances), np.inf)
    radii = np.take_along_axis(distances, reached.argmax(1)[:, None], 1)[:, 0]
    return np.where(reached[:, -1], radii, np.inf)

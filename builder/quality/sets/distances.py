"""Distances between two sets of features: Fréchet (mean and covariance) and kernel (unbiased MMD). numpy float64.

Sets are arrays [N, D]. The classes hold what a resampled set needs too, computed once: called with multiplicities of
the rows (whole numbers, 0: not drawn) they give the distance of the resampled sets without touching features again.
"""

from __future__ import annotations

import numpy as np
from scipy.linalg import svdvals

from builder.errors import BuilderError

Counts = np.ndarray  # how often each row of a set was drawn: int [N]


def checked(features: np.ndarray, least: int = 1) -> np.ndarray:
    """Features as float64 [N, D]. BuilderError when they are no such array, hold NaN or infinity, or N < `least`."""
    x = np.asarray(features, dtype=np.float64)
    if x.ndim != 2 or x.shape[1] < 1:
        raise BuilderError(f"features have the shape {list(x.shape)}", "they must be [images, dimensions]")
    if not np.isfinite(x).all():
        bad = int((~np.isfinite(x)).any(1).sum())
        raise BuilderError(f"the features of {bad} of {len(x)} images are not finite", "look for damaged images")
    if len(x) < least:
        raise BuilderError(f"there are {len(x)} images", f"this figure needs at least {least}")
    return x


def frechet_distance(x: np.ndarray, y: np.ndarray) -> float:
    """The Fréchet distance (Heusel et al. 2017) of the Gaussians fitted to two sets [N, D] and [M, D]; >= 0.

    |m_x - m_y|^2 + tr S_x + tr S_y - 2 tr (S_x S_y)^1/2, S unbiased (N - 1). With S_x = A^T A and S_y = B^T B the last
    trace is the nuclear norm of A B^T, so no square root of a D x D matrix is needed, and N < D is exact.
    Biased upwards at small N: compare it with real against real at the same N. BuilderError below two images.
    """
    x, y = checked(x, 2), checked(y, 2)
    a, b = ((z - z.mean(0)) / np.sqrt(len(z) - 1) for z in (x, y))
    spread = (a**2).sum() + (b**2).sum()
    a, b = (np.asarray(np.linalg.qr(z, mode="r")) if len(z) > z.shape[1] else z for z in (a, b))
    means = ((x.mean(0) - y.mean(0)) ** 2).sum()
    return max(0.0, float(means + spread - 2 * svdvals(a @ b.T).sum()))


class Frechet:
    """The Fréchet distance of resamples of two sets; cubic in the smaller resample's different images, not in D."""

    def __init__(self, x: np.ndarray, y: np.ndarray) -> None:
        x, y = checked(x, 2), checked(y, 2)
        centre = np.concatenate([x, y]).mean(0)
        self._x, self._y = x - centre, y - centre
        self._norms = (self._x**2).sum(1), (self._y**2).sum(1)
        self._gram = self._x @ self._y.T

    def __call__(self, w: Counts, v: Counts) -> float:
        """NaN when a resample holds fewer than two images."""
        n, m = int(w.sum()), int(v.sum())
        if min(n, m) < 2:
            return float("nan")
        mean_x, mean_y = w @ self._x / n, v @ self._y / m
        spread = (w @ self._norms[0] - n * mean_x @ mean_x) / (n - 1)
        spread += (v @ self._norms[1] - m * mean_y @ mean_y) / (m - 1)
        i, j = np.flatnonzero(w), np.flatnonzero(v)
        cross = self._gram[np.ix_(i, j)] - (self._gram[i] @ v / m)[:, None] - w @ self._gram[:, j] / n + mean_x @ mean_y
        cross *= np.sqrt(w[i, None] * v[None, j] / ((n - 1) * (m - 1)))
        return max(0.0, float(((mean_x - mean_y) ** 2).sum() + spread - 2 * svdvals(cross).sum()))


def kernel_distance(x: np.ndarray, y: np.ndarray) -> float:
    """The kernel distance (Bińkowski et al. 2018) of two sets [N, D], [M, D]: unbiased MMD^2 over all pairs.

    Kernel (x.y / D + 1)^3. Zero in the mean for two draws from one distribution, so it can be slightly negative.
    BuilderError below two images.
    """
    kernel = Kernel(x, y)
    return kernel(np.ones(len(x), int), np.ones(len(y), int))


def kernel_distance_blocks(x: np.ndarray, y: np.ndarray, size: int = 100) -> np.ndarray:
    """The kernel distances of disjoint blocks of `size` rows of either set, in the order given: their spread is that
    of the figure at N = `size`. Empty when not even two blocks fit; shuffle the rows first."""
    blocks = min(len(x), len(y)) // size
    starts = range(0, blocks * size, size) if blocks > 1 else ()
    return np.array([kernel_distance(x[start : start + size], y[start : start + size]) for start in starts])


class Kernel:
    """The kernel distance of resamples of two sets. An image drawn twice makes no pair with itself."""

    def __init__(self, x: np.ndarray, y: np.ndarray) -> None:
        x, y = checked(x, 2), checked(y, 2)
        self._xx, self._yy, self._xy = (_cubic(a, b) for a, b in ((x, x), (y, y), (x, y)))

    def __call__(self, w: Counts, v: Counts) -> float:
        """NaN when a resample holds fewer than two different images."""
        if min(np.count_nonzero(w), np.count_nonzero(v)) < 2:
            return float("nan")
        return _within(self._xx, w) + _within(self._yy, v) - 2 * float(w @ self._xy @ v) / float(w.sum() * v.sum())


def _cubic(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.asarray((x @ y.T / x.shape[1] + 1) ** 3)


def _within(kernel: np.ndarray, w: Counts) -> float:
    """The mean of a kernel matrix over pairs of different images, drawn `w` times each."""
    squares = w.astype(np.int64) ** 2
    return float(w @ kernel @ w - squares @ kernel.diagonal()) / float(w.sum() ** 2 - squares.sum())

"""How various a set is: the Vendi score, and the Inception Score. numpy float64."""

from __future__ import annotations

import numpy as np
from scipy.linalg import eigvalsh

from builder.quality.sets.distances import Counts, checked


def vendi_score(features: np.ndarray) -> float:
    """The Vendi score (Friedman & Dieng 2023) of a set [N, D]: the effective number of different images, 1..N.

    exp of the Shannon entropy of the eigenvalues of K / N, K the cosine similarities. It grows with N: compare sets
    of equal N only. An image whose features are all zero is like no other. BuilderError without images.
    """
    x = checked(features)
    return Vendi(x)(np.ones(len(x), int))


class Vendi:
    """The Vendi score of resamples of a set [N, D]."""

    def __init__(self, features: np.ndarray) -> None:
        x = checked(features)
        norms = np.linalg.norm(x, axis=1, keepdims=True)
        x = np.divide(x, norms, out=np.zeros_like(x), where=norms > 0)
        self._similar = x @ x.T
        np.fill_diagonal(self._similar, 1.0)

    def __call__(self, counts: Counts) -> float:
        """NaN without images."""
        drawn = np.flatnonzero(counts)
        if not len(drawn):
            return float("nan")
        root = np.sqrt(counts[drawn] / counts.sum())
        values = eigvalsh(self._similar[np.ix_(drawn, drawn)] * root[:, None] * root)
        values = values[values > 0]
        return float(np.exp(-(values * np.log(values)).sum()))


class VendiRatio:
    """The Vendi score of a synthetic set as a ratio to that of as many real images: 1 where it is as various.

    The larger set is cut to its first rows: they must be in random order.
    """

    def __init__(self, real: np.ndarray, synthetic: np.ndarray) -> None:
        self.n = min(len(real), len(synthetic))
        self._real, self._synthetic = Vendi(real[: self.n]), Vendi(synthetic[: self.n])

    def __call__(self, w: Counts, v: Counts) -> float:
        """NaN when a resample is empty within the first n rows."""
        return self._synthetic(v[: self.n]) / self._real(w[: self.n])


class Inception:
    """The Inception Score (Salimans et al. 2016) of resamples of a set, from the standard network's logits [N, C]:
    exp of the mean KL divergence between an image's class distribution and the set's. One part, no splits; 1..C."""

    def __init__(self, logits: np.ndarray) -> None:
        shifted = checked(logits) - np.max(logits, axis=1, keepdims=True)
        self._log = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
        self._p = np.exp(self._log)
        self._own = (self._p * self._log).sum(1)

    def __call__(self, counts: Counts) -> float:
        """NaN without images."""
        if not (n := counts.sum()):
            return float("nan")
        mean = counts @ self._p / n
        entropy = -(mean * np.log(np.where(mean > 0, mean, 1.0))).sum()
        return float(np.exp(counts @ self._own / n + entropy))

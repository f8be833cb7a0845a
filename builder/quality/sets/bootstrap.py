"""Bootstrap intervals: real images resampled by patient, synthetic ones by image. numpy only.

A resample is told by how often each image was drawn; figures take such counts (see quality.sets.distances).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

Counts = np.ndarray
LEVEL = 0.95


def patient_counts(groups: Sequence[str], replicates: int, chance: np.random.Generator) -> Counts:
    """How often each image is drawn when as many patients as there are get drawn with replacement: int [R, N]."""
    names, member = np.unique(np.asarray(groups, dtype=str), return_inverse=True)
    drawn = chance.integers(len(names), size=(replicates, len(names)))
    rows = np.arange(replicates)[:, None]
    counts = np.zeros((replicates, len(names)), np.int64)
    np.add.at(counts, (rows, drawn), 1)
    return np.asarray(counts[:, member])


def image_counts(n: int, replicates: int, chance: np.random.Generator) -> Counts:
    """How often each of n images is drawn when n get drawn with replacement: int [R, n]."""
    return np.asarray(chance.multinomial(n, np.full(n, 1 / n), size=replicates))


def replicate(figure: Callable[[Counts, Counts], dict[str, float]], w: Counts, v: Counts) -> dict[str, np.ndarray]:
    """The values of figures over resamples: real counts [R, N] and synthetic counts [R, M] -> name -> float [R]."""
    rows = [figure(a, b) for a, b in zip(w, v, strict=True)]
    return {name: np.array([row[name] for row in rows]) for name in (rows[0] if rows else {})}


def interval(
    estimate: float, replicates: np.ndarray, bounds: tuple[float, float] = (-np.inf, np.inf)
) -> tuple[float, float] | None:
    """The 95 % interval around an estimate, from its values over resamples; None when half of them are NaN.

    The bootstrap distribution moved so that its median is the estimate, between its 2.5 % and 97.5 % quantiles, cut
    at `bounds`. Moved, because figures such as the Fréchet distance are biased by the number of different images, and
    a resample holds fewer of them (63 %): its plain percentiles lie beside the estimate, and do not even contain it.
    The width is the bootstrap's, the place the estimate's; the estimate's own bias remains, and the floor shows it.
    """
    values = replicates[np.isfinite(replicates)]
    if 2 * len(values) <= len(replicates):
        return None
    low, middle, high = np.quantile(values, [(1 - LEVEL) / 2, 0.5, (1 + LEVEL) / 2])
    low, high = estimate + low - middle, estimate + high - middle
    return float(np.clip(low, *bounds)), float(np.clip(high, *bounds))

"""Sanity gates: the range of a statistic that real crops of the phase show. What lies outside is not a wound crop.

SSIM rewards smoothness: a flat image scores higher than a real one. The gates turn such images away first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from builder.shards.filter import Range

Gates = dict[str, list[float]]  # statistic -> [low, high]

QUANTILE = 0.005  # of the training crops on either side
SLACK = 0.4  # of the distance from the median to that quantile: other patients differ a little
ABOVE_BLURRED = 1.1  # times the sharpest blurred crop: blurred crops of other patients are a little sharper
CLIPPED_SLACK = 0.02  # share of pixels


def make_gates(real: Sequence[Mapping[str, float]], blurred: Sequence[Mapping[str, float]]) -> Gates:
    """The gates of a phase from the statistics of real training crops and of the same crops blurred beyond use.

    sharpness: between the 0.5 % and 99.5 % quantiles, widened by the slack; but the lower gate stays a tenth above
    every blurred crop, and at least half way from the sharpest of them to the quantile. contrast: at least half the
    0.5 % quantile (sharpness says nothing of what is nearly flat). clipped: up to the 99.5 % quantile and the slack.
    """
    sharpness = [row["sharpness"] for row in real]
    low, median, high = (float(q) for q in np.quantile(sharpness, [QUANTILE, 0.5, 1 - QUANTILE]))
    sharpest_blurred = max(row["sharpness"] for row in blurred)
    floor = max(ABOVE_BLURRED * sharpest_blurred, (sharpest_blurred + low) / 2)
    contrast = float(np.quantile([row["contrast"] for row in real], QUANTILE))
    clipped = float(np.quantile([row["clipped"] for row in real], 1 - QUANTILE))
    return {
        "sharpness": [max(floor, low - SLACK * (median - low)), min(1.0, high + SLACK * (high - median))],
        "contrast": [contrast / 2, 127.5],
        "clipped": [0.0, min(1.0, clipped * (1 + SLACK) + CLIPPED_SLACK)],
    }


def gate_ranges(gates: Mapping[str, Gates]) -> list[Range]:
    """The gates of each phase as a filter takes them."""
    return [
        Range(statistic, low, high, phase, reason=f"gate {statistic}")
        for phase, limits in gates.items()
        for statistic, (low, high) in limits.items()
    ]

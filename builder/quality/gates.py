"""Sanity gates: the range of a statistic that real crops of the phase show. What lies outside is not a wound crop.

SSIM rewards smoothness: a flat image scores higher than a real one. The gates turn such images away first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Gates = dict[str, list[float]]  # statistic -> [low, high]

QUANTILE = 0.005  # of the training crops on either side
SLACK = 0.4  # of the distance from the median to that quantile: other patients differ a little
CLIPPED_SLACK = 0.02  # share of pixels


def make_gates(real: Sequence[Mapping[str, float]], blurred: Sequence[Mapping[str, float]]) -> Gates:
    """The gates of a phase from the statistics of real training crops and of the same crops blurred beyond use.

    sharpness: between the 0.5 % and 99.5 % quantiles, widened by the slack; but the lower gate stays above every
    blurred crop, at least half way from the sharpest of them to the quantile. contrast: at least half the 0.5 %
    quantile (sharpness says nothing of what is nearly flat). clipped: up to the 99.5 % quantile and the slack.
    """
    sharpness = [row["sharpness"] for row in real]
    low, median, high = (float(q) for q in np.quantile(sharpness, [QUANTILE, 0.5, 1 - QUANTILE]))
    sharpest_blurred = max(row["sharpness"] for row in blurred)
    floor = max(sharpest_blurred, (sharpest_blurred + low) / 2)
    contrast = float(np.quantile([row["contrast"] for row in real], QUANTILE))
    clipped = float(np.quantile([row["clipped"] for row in real], 1 - QUANTILE))
    return {
        "sharpness": [max(floor, low - SLACK * (median - low)), min(1.0, high + SLACK * (high - median))],
        "contrast": [contrast / 2, 127.5],
        "clipped": [0.0, min(1.0, clipped * (1 + SLACK) + CLIPPED_SLACK)],
    }


def passes(row: Mapping[str, Any], gates: Gates) -> list[str]:
    """Why a row is turned away, e.g. ['sharpness 0.08 < 0.21']; empty when it passes. A missing statistic fails."""
    reasons = []
    for name, (low, high) in gates.items():
        value = row.get(name)
        if value is None:
            reasons.append(f"{name} missing")
        elif not value >= low:  # also true of NaN
            reasons.append(f"{name} {value:.3g} < {low:.3g}")
        elif value > high:
            reasons.append(f"{name} {value:.3g} > {high:.3g}")
    return reasons

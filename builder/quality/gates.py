"""Sanity gates: the range of a score that real crops of the phase show. What lies outside is not a wound crop of it.

SSIM rewards smoothness: a flat image scores higher than a real one. The gates turn such images away first, and with
them what looks like another phase, or like nothing that the training crops show. (The alarm of copies is one more; it
holds for all phases alike: Reference.copy.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from builder.shards.criteria import Range

Gates = dict[str, list[float | None]]  # score -> [low, high]; None: open
Row = Mapping[str, float | None]

QUANTILE = 0.005  # of the training crops on either side
SLACK = 0.4  # of the distance from the median to that quantile: other patients differ a little
ABOVE_BLURRED = 1.1  # times the sharpest blurred crop: blurred crops of other patients are a little sharper
CLIPPED_SLACK = 0.02  # share of pixels
LEAST_CROPS, LEAST_PATIENTS = 20, 5  # behind a gate of realism or phase probability: fewer say nothing of their edge
PHASE_QUANTILE = 0.05  # of the training crops, of patients the probe has not seen, look least like their phase


def make_gates(real: Sequence[Row], blurred: Sequence[Row], patients: int) -> Gates:
    """The gates of a phase from scores of real training crops (own patient left out) and of the same crops blurred.

    sharpness: between the 0.5 % and 99.5 % quantiles, widened by the slack; but the lower gate stays a tenth above
    every blurred crop, and at least half way from the sharpest of them to the quantile. contrast: at least half the
    0.5 % quantile (sharpness says nothing of what is nearly flat). clipped, noise, chroma_noise: up to the 99.5 %
    quantile and the slack; realism: from the 0.5 % quantile less the slack. phase_probability: from the 5 % quantile,
    without slack. These two say how crops of one patient look beside those of others, and need at least 20 crops of 5
    `patients`. A score that real crops don't have (no probe, one patient) has no gate.
    """
    sharpest_blurred = max(_values(blurred, "sharpness"))
    low = float(np.quantile(_values(real, "sharpness"), QUANTILE))
    floor = max(ABOVE_BLURRED * sharpest_blurred, (sharpest_blurred + low) / 2)
    gates: Gates = {
        "sharpness": [
            max(floor, _limit(real, "sharpness", QUANTILE)),
            min(1.0, _limit(real, "sharpness", 1 - QUANTILE)),
        ],
        "contrast": [float(np.quantile(_values(real, "contrast"), QUANTILE)) / 2, None],
        "clipped": [None, min(1.0, _limit(real, "clipped", 1 - QUANTILE) + CLIPPED_SLACK)],
        "noise": [None, _limit(real, "noise", 1 - QUANTILE)],
        "chroma_noise": [None, _limit(real, "chroma_noise", 1 - QUANTILE)],
    }
    if len(real) < LEAST_CROPS or patients < LEAST_PATIENTS:
        return gates
    if _values(real, "realism"):
        gates["realism"] = [max(0.0, _limit(real, "realism", QUANTILE)), None]
    if said := _values(real, "phase_probability"):
        gates["phase_probability"] = [float(np.quantile(said, PHASE_QUANTILE)), None]
    return gates


def gate_ranges(gates: Mapping[str, Gates]) -> list[Range]:
    """The gates of each phase as a filter takes them."""
    return [
        Range(score, low, high, phase, reason=f"gate {score}")
        for phase, limits in gates.items()
        for score, (low, high) in limits.items()
    ]


def _limit(rows: Sequence[Row], score: str, quantile: float) -> float:
    """The quantile, moved away from the median by the slack."""
    values = _values(rows, score)
    edge, median = (float(q) for q in np.quantile(values, [quantile, 0.5]))
    return edge + SLACK * (edge - median)


def _values(rows: Sequence[Row], score: str) -> list[float]:
    return [value for row in rows if (value := row.get(score)) is not None]

"""What the images of a setting are held against: the base's own images, and the real crops.

The base look of an image is the probability that a linear probe gives to 'made by the base' rather than 'a real
training crop': the probe of quality.probe, calibrated on images and patients that it was not fitted on. The base's
images are asked for with the prompts of all styles, before anything was fine-tuned.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from builder.errors import BuilderError
from builder.phases import ClassTable
from builder.quality.panel import patient_of
from builder.quality.probe import Probe, fit_probe
from builder.quality.sets.comparison import Side

BASE, REAL = "base", "real"


@dataclass(frozen=True)
class Probes:
    """Linear probes on features: one for the base's look, one for the phase."""

    look: Probe
    phase: Probe
    base_look: float  # mean over the base's own images, each judged by a probe that wasn't fitted on it

    def judge(self, sides: dict[str, Side], codes: Sequence[str]) -> dict[str, float]:
        """Means over phases of images by phase: `base_look`; `phase_right`, the share taken for what it should be."""
        looks = [self.looks(side.features) for side in sides.values()]
        right = [
            (self.phase.probabilities(side.features).argmax(1) == codes.index(code)).mean()
            for code, side in sides.items()
        ]
        return {"base_look": float(np.mean(looks)), "phase_right": float(np.mean(right))}

    def looks(self, features: np.ndarray) -> float:
        """Mean base look of features [N, D]."""
        return float(self.look.probabilities(features)[:, self.look.codes.index(BASE)].mean())


def fit_probes(
    base: np.ndarray, crops: np.ndarray, rows: Sequence[dict[str, Any]], classes: ClassTable, seed: int = 0
) -> Probes:
    """base: features [N, D] of the base's images; crops: [M, D] of real training crops, of which `rows` are the rows.

    As many real crops as base images take part in the look's probe (all, if they are fewer): else it would call
    everything by the name of the larger side. BuilderError when patients are too few to leave some out.
    """
    chosen = np.random.default_rng(seed).permutation(len(crops))[: len(base)]
    names = [BASE] * len(base) + [REAL] * len(chosen)
    groups = [f"image {number}" for number in range(len(base))] + [patient_of(rows[place]) for place in chosen]
    look = fit_probe(np.concatenate([base, crops[chosen]]), names, groups, (BASE, REAL), seed)
    phase = fit_probe(crops, [row["phase"] for row in rows], [patient_of(row) for row in rows], classes.codes, seed)
    for fitted in (look, phase):
        if isinstance(fitted, str):
            raise BuilderError(f"an ablation needs probes, and {fitted}", "pack crops of more patients and phases")
    assert not isinstance(look, str) and not isinstance(phase, str)
    return Probes(look[0], phase[0], float(look[1][: len(base), 0].mean()))

"""What the images of a setting are held against: what the base was pretrained on, and the real crops.

The pretraining look of an image is the probability that a linear probe gives to 'a picture of pretraining' rather than
'a real training crop': the probe of quality.probe, calibrated on pictures and patients that it was not fitted on. Where
the pretraining's own pictures are at hand (ablation.pretrain), both sides are photographs, so the probe knows styles
and not the softness that generated images share. Else the base's own images stand in for them, asked for with the
prompts of all styles, and part of what the probe finds is that images are generated at all: then only differences
between settings mean something.
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

PRETRAINING, REAL = "pretraining", "real"


@dataclass(frozen=True)
class Pictures:
    """Features [N, D] of pictures of the pretraining, and whose each is: a patient, or nobody else's."""

    features: np.ndarray
    groups: Sequence[str]


@dataclass(frozen=True)
class Probes:
    """Linear probes on features: one for the look of pretraining, one for the phase."""

    look: Probe
    phase: Probe
    pictures_look: float  # mean over the pretraining's pictures, each judged by a probe that wasn't fitted on it

    def judge(self, sides: dict[str, Side], codes: Sequence[str]) -> dict[str, float]:
        """Of images by phase, means over phases: `pretraining_look`; `phase_right`, the share that is taken for what it
        should be."""
        looks = [self.look.probabilities(side.features)[:, 0].mean() for side in sides.values()]
        right = [
            (self.phase.probabilities(side.features).argmax(1) == codes.index(code)).mean()
            for code, side in sides.items()
        ]
        return {"pretraining_look": float(np.mean(looks)), "phase_right": float(np.mean(right))}


def fit_probes(
    pictures: Pictures, crops: np.ndarray, rows: Sequence[dict[str, Any]], classes: ClassTable, seed: int = 0
) -> Probes:
    """crops: features [M, D] of real training crops, of which `rows` are the rows.

    The look's probe takes as many of either side: else it would call everything by the name of the larger one.
    BuilderError when patients are too few to leave some out.
    """
    chance = np.random.default_rng(seed)
    many = min(len(pictures.features), len(crops))
    shown, real = (chance.permutation(count)[:many] for count in (len(pictures.features), len(crops)))
    names = [PRETRAINING] * many + [REAL] * many
    groups = [f"{PRETRAINING} {pictures.groups[place]}" for place in shown] + [patient_of(rows[n]) for n in real]
    features = np.concatenate([pictures.features[shown], crops[real]])
    look = fit_probe(features, names, groups, (PRETRAINING, REAL), seed)
    phase = fit_probe(crops, [row["phase"] for row in rows], [patient_of(row) for row in rows], classes.codes, seed)
    for fitted in (look, phase):
        if isinstance(fitted, str):
            raise BuilderError(f"an ablation needs probes, and {fitted}", "pack crops of more patients and phases")
    assert not isinstance(look, str) and not isinstance(phase, str)
    return Probes(look[0], phase[0], float(look[1][:many, 0].mean()))

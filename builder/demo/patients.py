"""Patients that never were: one skin, one limb, a wound or two, and visits along which they heal."""

from dataclasses import dataclass
from math import exp

import numpy as np
from scipy.special import ndtri

from builder.demo.noise import generator

ANGLES = ("left", "middle", "right")

# Healing runs from 0 (fresh) to 1 (closed). The cuts are where a clinician would name the next phase;
# they are set so that the boxes of many patients fall 29 / 60 / 11 % into I / P / R.
INFLAMMATORY_UNTIL = 0.375
PROLIFERATIVE_UNTIL = 0.90

# Share of patients with 1, 2, ... 6 visits: 4.13 on average, so 233 patients make about 2,884 photographs.
_VISITS = (0.04, 0.09, 0.18, 0.25, 0.28, 0.16)
_SECOND_WOUND = 0.20
_SECOND_WOUND_SEEN = 0.56

# Steps of the R4 low-discrepancy sequence: any first n patients have about the mix of all patients.
_SPREAD = 1.0 / np.power(1.1673039782614187, np.arange(1, 5))


@dataclass(frozen=True)
class Wound:
    """One wound of a patient. `number` counts from 1; lengths are pixels of a photograph from straight on."""

    number: int
    seed: tuple[int, ...]
    x: float
    y: float
    diameter: float
    elongation: float
    turn: float
    healing: tuple[float | None, ...]
    """Per visit 0 (fresh) to 1 (closed); None where the wound was not photographed."""

    def size(self, visit: int) -> float:
        """Diameter at a visit: a wound contracts by a third until it is closed."""
        healing = self.healing[visit]
        assert healing is not None, "the wound was not photographed at this visit"
        return self.diameter * (1.15 - 0.35 * healing)


@dataclass(frozen=True)
class Patient:
    """One patient. `fitzpatrick` is the skin type 1-6; `limb` one of leg, foot, heel; angles are radians."""

    number: int
    seed: tuple[int, ...]
    fitzpatrick: int
    limb: str
    limb_width: float
    limb_turn: float
    wounds: tuple[Wound, ...]
    visits: int


def phase_of(healing: float) -> str:
    """The phase code of a degree of healing (0-1)."""
    if healing < INFLAMMATORY_UNTIL:
        return "I"
    return "P" if healing < PROLIFERATIVE_UNTIL else "R"


def make_patient(number: int, seed: int = 0) -> Patient:
    """Patient `number` (from 1) of the cohort `seed`; it depends on nothing else."""
    key = (seed, number)
    rng = generator(*key)
    start, pace, visits_at, second_at = (generator(seed).random(4) + number * _SPREAD) % 1.0
    visits = 1 + int(np.searchsorted(np.cumsum(_VISITS)[:-1], visits_at, side="right"))
    has_second = second_at < _SECOND_WOUND

    diameters = [_diameter(rng, 105 if has_second else 205)]
    if has_second:
        diameters.append(_diameter(rng, 80))
    turn = float(rng.normal(0, 0.25))
    # Two wounds lie along the limb, far enough apart that neither's crop shows the other.
    gap = 0.82 * sum(diameters) + 14 if has_second else 0.0
    along = [0.0] if not has_second else [-gap * diameters[1] / sum(diameters), gap * diameters[0] / sum(diameters)]
    wounds = []
    for i, (diameter, a) in enumerate(zip(diameters, along, strict=True)):
        across = float(rng.normal(0, 6)) if has_second else 0.0
        # A second wound is of its own age; the first carries the spread that keeps the mix of phases steady.
        begin = start if i == 0 else float(rng.random())
        wounds.append(
            Wound(
                number=i + 1,
                seed=(*key, i + 1),
                x=float(a * np.cos(turn) - across * np.sin(turn)),
                y=float(a * np.sin(turn) + across * np.cos(turn)),
                diameter=diameter,
                elongation=float(np.exp(rng.normal(0, 0.14))),
                turn=float(rng.uniform(0, np.pi)),
                healing=_course(rng, begin, pace, visits, always_seen=i == 0),
            )
        )
    return Patient(
        number=number,
        seed=key,
        fitzpatrick=int(rng.choice(6, p=(0.12, 0.22, 0.24, 0.18, 0.14, 0.10))) + 1,
        limb=str(rng.choice(("leg", "foot", "heel"), p=(0.4, 0.4, 0.2))),
        limb_width=float(max(rng.uniform(150, 330), 1.35 * max(diameters))),
        limb_turn=turn,
        wounds=tuple(wounds),
        visits=visits,
    )


def _diameter(rng: np.random.Generator, largest: float) -> float:
    # Median 55 px with a long upper tail (5-95 %: 32-170), as the real boxes have.
    z = float(ndtri(rng.uniform(0.01, 0.99)))
    return min(52 * exp(z * (0.33 if z < 0 else 0.80)), largest)


def _course(
    rng: np.random.Generator, start: float, pace: float, visits: int, always_seen: bool
) -> tuple[float | None, ...]:
    step = 0.03 + 0.11 * pace
    first = start * (1 - 0.6 * step * (visits - 1))
    # The jitter is the occasional setback between two visits.
    healing = first + step * np.arange(visits) + rng.normal(0, 0.02, visits)
    seen = rng.random(visits) < _SECOND_WOUND_SEEN
    return tuple(float(min(max(h, 0.0), 1.0)) if always_seen or s else None for h, s in zip(healing, seen, strict=True))

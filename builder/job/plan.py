"""The plan: one endless sequence of phases, and the cut of its first COUNT positions into units.

Position p of the plan is image `index` of a phase. The sequence repeats with the period of the weights (error
diffusion: at each step the phase furthest behind its share is taken), so place and index are found in O(1).
COUNT only says how far to go; it changes nothing that comes before.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

import numpy as np

from builder.errors import BuilderError

MAX_PERIOD = 100_000


@dataclass(frozen=True)
class Unit:
    """One shard to make: positions [start, stop) of the plan."""

    number: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Plan:
    """Phases (codes, in table order) and their weights as whole numbers without a common divisor."""

    codes: tuple[str, ...]
    weights: tuple[int, ...]

    @classmethod
    def of(cls, codes: Sequence[str], weights: dict[str, float] | None = None) -> Plan:
        """A plan over `codes`; weights default to 1 each. BuilderError for a weight that is not positive."""
        weights = weights or {}
        for code in weights:
            if code not in codes:
                raise BuilderError(
                    f"a weight is given for phase '{code}', which is not asked for", f"asked for: {', '.join(codes)}"
                )
        if not all(0 < weight < math.inf for weight in weights.values()):
            raise BuilderError(f"weights must be positive: {weights}", "leave a phase out with --phases instead")
        exact = [Fraction(str(weights.get(code, 1))).limit_denominator(1000) for code in codes]
        if not all(exact):
            raise BuilderError(f"a weight of {weights} is below 0.001", "use whole numbers, e.g. 1 and 2000")
        scale = math.lcm(*(weight.denominator for weight in exact))
        whole = [int(weight * scale) for weight in exact]
        divisor = math.gcd(*whole)
        plan = cls(tuple(codes), tuple(weight // divisor for weight in whole))
        if plan.period > MAX_PERIOD:
            raise BuilderError(
                f"weights {weights} repeat only after {plan.period} images", "use rounder weights, e.g. 1 and 2.5"
            )
        return plan

    @property
    def period(self) -> int:
        return sum(self.weights)

    @cached_property
    def _cycle(self) -> tuple[np.ndarray, np.ndarray]:
        """Phase number at each place of one period, and how often that phase stood before it in the period."""
        order = np.empty(self.period, np.int64)
        rank = np.empty(self.period, np.int64)
        taken = np.zeros(len(self.codes), np.int64)
        weights = np.array(self.weights)
        for place in range(self.period):
            behind = weights * (place + 1) - taken * self.period  # in images times period: exact in integers
            phase = int(np.argmax(behind))
            order[place], rank[place] = phase, taken[phase]
            taken[phase] += 1
        return order, rank

    def at(self, start: int, stop: int) -> list[tuple[str, int]]:
        """(phase code, index within the phase) at positions [start, stop)."""
        order, rank = self._cycle
        positions = np.arange(start, stop)
        rounds, places = np.divmod(positions, self.period)
        phases = order[places]
        indices = rounds * np.array(self.weights)[phases] + rank[places]
        return [(self.codes[phase], int(index)) for phase, index in zip(phases, indices, strict=True)]

    def counts(self, count: int) -> dict[str, int]:
        """Images of each phase among the first `count` positions."""
        rounds, rest = divmod(count, self.period)
        order, _ = self._cycle
        tail = np.bincount(order[:rest], minlength=len(self.codes))
        return {
            code: rounds * weight + int(tail[i])
            for i, (code, weight) in enumerate(zip(self.codes, self.weights, strict=True))
        }

    def reach(self, code: str, images: int) -> int:
        """How far to go along the plan for the first `images` (1 or more) images of a phase: the least COUNT."""
        phase = self.codes.index(code)
        order, rank = self._cycle
        rounds, last = divmod(images - 1, self.weights[phase])
        return rounds * self.period + int(np.flatnonzero((order == phase) & (rank == last))[0]) + 1


def batches(unit: Unit, batch_size: int) -> list[tuple[int, int]]:
    """The plan's whole batches [start, stop) that a unit touches.

    Batches lie on a fixed grid over the plan: pixels depend on which images are denoised together, so a unit that
    ends inside a batch makes the whole batch and keeps its part; the extension makes it again and keeps the rest.
    """
    first = unit.start // batch_size * batch_size
    return [(start, start + batch_size) for start in range(first, unit.stop, batch_size)]

"""The synthetic share over time: one number, or piecewise constant by epoch or by step."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from builder.errors import BuilderError

UNITS = ("epoch", "step")


@dataclass(frozen=True)
class RatioSchedule:
    """`shares[i]` (0-1) holds from `starts[i]` on, counted in epochs or in global steps; `starts[0]` is 0."""

    starts: tuple[int, ...]
    shares: tuple[float, ...]
    unit: str = "epoch"

    @classmethod
    def of(cls, ratio: float | Mapping[int, float], unit: str = "epoch") -> RatioSchedule:
        """Of one share, or of a table such as {0: 1.0, 10: 0.25}: from epoch (or step) 10 on a quarter.

        BuilderError for a share outside 0-1, and a table that does not begin at 0.
        """
        table = dict(ratio) if isinstance(ratio, Mapping) else {0: ratio}
        for start, share in table.items():
            if not isinstance(start, Integral) or start < 0:
                raise BuilderError(f"the ratio schedule has the {unit} {start!r}", "give whole numbers from 0 on")
            if not isinstance(share, Real) or not 0 <= share <= 1:
                raise BuilderError(f"ratio is {share}", "it is the synthetic share of a batch, from 0 to 1")
        if 0 not in table:
            raise BuilderError(
                f"the ratio schedule begins at {unit} {min(table, default='none')}", "say the ratio from 0 on"
            )
        starts = tuple(sorted(table))
        return cls(tuple(int(start) for start in starts), tuple(float(table[start]) for start in starts), unit)

    @property
    def is_constant(self) -> bool:
        return len(self.starts) == 1

    def stretches(self, epoch: int, step: int) -> list[tuple[int | None, float]]:
        """Length in steps, and share, of each stretch from the start of `epoch` on; `step` steps were made before it.

        The last one has no end (None): an epoch ends for other reasons than its ratio.
        """
        if self.unit == "epoch":
            return [(None, self.shares[bisect_right(self.starts, epoch) - 1])]
        first = bisect_right(self.starts, step) - 1
        begins = [step, *self.starts[first + 1 :]]
        ends = [*self.starts[first + 1 :], None]
        return [
            (None if end is None else end - begin, share)
            for begin, end, share in zip(begins, ends, self.shares[first:], strict=True)
        ]

    def is_settled(self, epoch: int, step: int) -> bool:
        """Whether the ratio changes no more from the start of `epoch`, before which `step` steps were made."""
        return (epoch if self.unit == "epoch" else step) >= self.starts[-1]

    def to_json(self) -> Any:
        """What a saved state holds of it."""
        if self.is_constant:
            return self.shares[0]
        return {"unit": self.unit, "table": [list(pair) for pair in zip(self.starts, self.shares, strict=True)]}


def ratio_of(
    ratio: float | Mapping[int, float] | None, unit: str, default: float, *, real: bool, synthetic: bool
) -> RatioSchedule:
    """The schedule asked for; BuilderError where it needs real or synthetic data that is not given."""
    schedule = RatioSchedule.of((default if synthetic else 0.0) if ratio is None else ratio, unit)
    most, least = max(schedule.shares), min(schedule.shares)
    if most > 0 and not synthetic:
        raise BuilderError(f"ratio is {most:g}, but no synthetic dataset is given", "pass synthetic=..., or ratio=0")
    if least < 1 and not real:
        raise BuilderError(
            f"ratio is {least:g}, but no real dataset is given", "pass real=..., or ratio=1 for synthetic samples alone"
        )
    return schedule


def batch_of(counts: tuple[int, ...]) -> tuple[int, float, list[float]]:
    """Batch size, ratio and weights of the synthetic datasets, of the samples of each source in a batch, real first."""
    if not all(isinstance(count, Integral) and count >= 0 for count in counts) or not sum(counts):
        raise BuilderError(
            f"counts are {list(counts)}", "give the samples of each source in a batch, real first, e.g. (24, 8)"
        )
    total = math.fsum(counts)
    return int(total), math.fsum(counts[1:]) / total, [float(count) for count in counts[1:]]

"""Quotas: an endless sequence over a few choices whose every prefix keeps the weights to within one sample.

The chairman assignment (Tijdeman 1980, "The chairman assignment problem", Discrete Mathematics 32): with k choices of
share s_i, the counts x_i of every prefix of length n obey |x_i - s_i n| <= 1 - 1/(2k-2), the best bound possible.
Choosing the one furthest behind instead (greedy error diffusion) exceeds one for weights such as
1 1 1 1 3 1 1 4 4 4.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from builder.errors import BuilderError

MAX_DENOMINATOR = 1_000_000  # real weights become fractions; what repeats only later is put on this grid


class Quota:
    """The sequence for whole-number weights; a choice of weight 0 never comes. It repeats with the sum of the weights.

    Position p holds `choice` for the `rank`-th time (0-based); both are found without replay, for arrays at once.
    """

    def __init__(self, weights: Sequence[int]) -> None:
        """BuilderError when a weight is negative or none is positive. Costs about 1 µs per position of the period."""
        whole = [int(weight) for weight in weights]
        if min(whole, default=0) < 0 or not any(whole):
            raise BuilderError(
                f"weights {whole} cannot be shared out", "give weights of 0 or more, one of them positive"
            )
        divisor = math.gcd(*whole)
        self.weights = np.array([weight // divisor for weight in whole], np.int64)
        self.period = int(self.weights.sum())
        self._order = _chairman(self.weights)
        self._rank = np.empty(self.period, np.int32)
        for choice, weight in enumerate(self.weights):
            self._rank[self._order == choice] = np.arange(weight)

    @classmethod
    def of(cls, weights: Sequence[float]) -> Quota:
        """Quotas for real weights: exact for decimals and fractions of a period up to a million, else to 1e-6."""
        if not all(math.isfinite(weight) and weight >= 0 for weight in weights) or not any(weights):
            raise BuilderError(
                f"weights {list(weights)} cannot be shared out", "give weights of 0 or more, one of them positive"
            )
        exact = [Fraction(repr(float(weight))).limit_denominator(MAX_DENOMINATOR) for weight in weights]
        scale = math.lcm(*(weight.denominator for weight in exact))
        whole = [int(weight * scale) for weight in exact]
        if not any(whole) or sum(whole) // math.gcd(*whole) > MAX_DENOMINATOR:
            total = sum(weights)
            whole = [max(1, round(weight / total * MAX_DENOMINATOR)) if weight else 0 for weight in weights]
        return cls(whole)

    def at(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """`choice` and `rank` (both int64 [n]) at `positions` (int64 [n], 0 or more)."""
        rounds, places = np.divmod(positions, self.period)
        choice = self._order[places].astype(np.int64)
        return choice, rounds * self.weights[choice] + self._rank[places]

    def counts(self, length: int) -> np.ndarray:
        """How often each choice (int64 [k]) stands among the first `length` positions."""
        rounds, rest = divmod(length, self.period)
        return rounds * self.weights + np.bincount(self._order[:rest], minlength=len(self.weights))

    def position(self, choice: int, rank: int) -> int:
        """Where `choice` (of positive weight) stands for the `rank`-th time (0-based): the inverse of `at`."""
        rounds, rest = divmod(rank, int(self.weights[choice]))
        return rounds * self.period + int(np.flatnonzero(self._order == choice)[rest])


def _chairman(weights: np.ndarray) -> np.ndarray:
    """One period of the assignment, int16 [sum of weights].

    The j-th sample of a choice of share s may come at the n-th place (1-based) when s n - j >= d, and must come while
    s n - j <= 1 - d, where d = 1/(2k-2) and j counts from 0. Tijdeman showed that there is room for all of them; taking
    the one whose time ends first (earliest deadline) finds it.
    """
    total = int(weights.sum())
    choices = np.flatnonzero(weights)
    k = len(choices)
    if k == 1:
        return np.full(total, choices[0], np.int16)
    choice = np.repeat(choices, weights[choices])
    weight = weights[choice]
    nth = np.concatenate([np.arange(w) for w in weights[choices]])
    margin = 2 * k - 2
    release = -(-(margin * nth + 1) * total // (margin * weight))
    deadline = (margin * (nth + 1) - 1) * total // (margin * weight)
    by_release = np.argsort(release, kind="stable")
    # One number a sample, so that the heap compares plain integers: deadline first, then choice.
    codes = (deadline * len(weights) + choice)[by_release].tolist()
    released = np.searchsorted(release[by_release], np.arange(1, total + 1), side="right").tolist()
    waiting: list[int] = []
    order = []
    pushed = 0
    for available in released:
        while pushed < available:
            heapq.heappush(waiting, codes[pushed])
            pushed += 1
        order.append(heapq.heappop(waiting))
    return (np.array(order, np.int64) % len(weights)).astype(np.int16)

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

MANY = 20_000  # places, from which on a period is found by blocks
RARE = 3000  # times rarer than this, a choice is remembered for too long for that
BLOCK, WARM_UP = 256, 64  # places
MAX_DENOMINATOR = 1_000_000  # real weights become fractions; what repeats only later is put on this grid


class Quota:
    """The sequence for whole-number weights; a choice of weight 0 never comes. It repeats with the sum of the weights.

    Position p holds `choice` for the `rank`-th time (0-based); both are found without replay, for arrays at once.
    """

    def __init__(self, weights: Sequence[int]) -> None:
        """BuilderError when a weight is negative or none is positive. Costs about 0.2 µs per position of the period."""
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
        exact = [Fraction(repr(float(weight))) for weight in weights]
        shares = [weight / sum(exact) for weight in exact]
        near = [share.limit_denominator(MAX_DENOMINATOR) for share in shares]
        scale = math.lcm(*(share.denominator for share in near))
        whole = [int(share * scale) for share in near]
        lost = any(share and not kept for share, kept in zip(shares, whole, strict=True))
        if lost or sum(whole) // math.gcd(*whole) > MAX_DENOMINATOR:
            whole = [max(1, round(share * MAX_DENOMINATOR)) if share else 0 for share in shares]
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
    margin = 2 * k - 2
    windows = []
    for number, weight in enumerate(weights[choices]):
        nth = np.arange(weight)
        release = -(-(margin * nth + 1) * total // (margin * weight))
        deadline = (margin * (nth + 1) - 1) * total // (margin * weight)
        windows.append((release, deadline * k + number))  # one number to compare: deadline first, then choice
    forgets = MANY <= total <= RARE * weights[choices].min()
    places = _by_blocks(windows, total) if forgets else _one_by_one(windows, total)
    return choices[places].astype(np.int16)


Windows = Sequence[tuple[np.ndarray, np.ndarray]]  # of each choice: release, and deadline * k + choice; int64 [weight]


def _one_by_one(windows: Windows, total: int) -> np.ndarray:
    """The choice at each place, int64 [total]: the first deadline of what is released, from a heap."""
    release, codes = (np.concatenate(part) for part in zip(*windows, strict=True))
    by_release = np.argsort(release, kind="stable")
    queue = codes[by_release].tolist()
    released = np.searchsorted(release[by_release], np.arange(1, total + 1), side="right").tolist()
    waiting: list[int] = []
    order = []
    pushed = 0
    for available in released:
        while pushed < available:
            heapq.heappush(waiting, queue[pushed])
            pushed += 1
        order.append(heapq.heappop(waiting))
    return np.array(order, np.int64) % len(windows)


def _by_blocks(windows: Windows, total: int) -> np.ndarray:
    """The same as `_one_by_one`, of all blocks of BLOCK places at once: several times faster.

    What a block begins with (how often each choice has come) is guessed: the shares, rounded, some places before it,
    from where the assignment is followed; it soon forgets where it came from. Blocks that were guessed wrong are made
    again from the end of the one before, until all fit; the first one is exact, so all are.
    """
    k, blocks = len(windows), -(-total // BLOCK)
    never = np.full(WARM_UP + BLOCK, 2 * k * total)  # beyond the last sample, and after wrong guesses
    bounds = np.cumsum([0, *(len(release) + len(never) for release, _ in windows)])[:-1, None]
    release, codes = (np.concatenate([x for w in part for x in (w, never)]) for part in zip(*windows, strict=True))

    def follow(taken: np.ndarray, begins: np.ndarray, places: int) -> tuple[np.ndarray, np.ndarray]:
        """How often each choice has come (int64 [k, blocks]) after `places` more places, and what comes at these."""
        at, block = bounds + taken, np.arange(len(begins))
        opens, ends = release[at], codes[at]
        chosen = np.empty((places, len(begins)), np.int64)
        for place in range(places):
            choice = np.where(opens <= begins + place + 1, ends, never[0]).min(axis=0) % k
            chosen[place] = choice
            at[choice, block] += 1
            following = at[choice, block]
            opens[choice, block], ends[choice, block] = release[following], codes[following]
        return at - bounds, chosen

    begins = np.arange(blocks) * BLOCK
    start = _rounded(np.array([len(release) for release, _ in windows]), begins - WARM_UP)
    start, _ = follow(start, begins - WARM_UP, WARM_UP)
    start[:, 0] = 0
    end, chosen = follow(start, begins, BLOCK)
    while len(wrong := 1 + np.flatnonzero((start[:, 1:] != end[:, :-1]).any(axis=0))):
        start[:, wrong] = end[:, wrong - 1]
        end[:, wrong], chosen[:, wrong] = follow(start[:, wrong], begins[wrong], BLOCK)
    return chosen.T.reshape(-1)[:total]


def _rounded(weights: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """How often each choice comes in `lengths` places, about: whole numbers (int64 [k, n]) that add up; 0 or more."""
    whole, part = np.divmod(weights[:, None] * np.maximum(lengths, 0), weights.sum())
    rank = np.argsort(np.argsort(-part, axis=0, kind="stable"), axis=0, kind="stable")
    return whole + (rank < np.maximum(lengths, 0) - whole.sum(axis=0))

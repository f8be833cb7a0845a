"""How far to go along the plan until COUNT images are accepted: in rounds, each decided by what was made before it.

A round is a prefix of the plan, up to the end of a unit. It is a function of COUNT, the limit, the cut into units and
of how many images pass in the rounds before, and of nothing else: not of who made which unit when. So every engine,
and a run that was killed and started again, goes through the same rounds by reading the committed units from the first
on, makes the same shards, and stops at the same place.

The first round is small, so that a threshold which nothing passes costs few units. Each later one goes only as far as
must be gone if the rates are the highest that what was seen allows: so hardly a unit is made that is not needed, and
as the rates are known better, a round comes nearer to the end. While it is in doubt whether a phase can get there at
all, a round goes at most twice as far as the last, so that this shows early. Two to five rounds are usual.

Phases are never made alone: the plan has one order, and a unit is a range of it. What this costs is the surplus of the
phases that pass more often than the slowest: all go as far as that one needs.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

from builder.job.acceptance import Share, Shares
from builder.job.plan import Plan

FIRST_UNITS = 4  # units of the first round: enough images to tell 0 % from the 20 % that a factor of 5 needs
GROWTH = 2  # of a round over the last, while its phases may or may not get there
CONFIDENCE = 0.998  # of a rate's interval: looked at in every round and phase, some 20 times in a run


@dataclass(frozen=True)
class Rounds:
    """The rounds for `count` accepted images, over units that end at `stops` (positions of the plan, rising).

    The last of the stops is the limit: COUNT times the factor, or the end of what is committed where that is further.
    """

    plan: Plan
    count: int
    stops: Sequence[int]

    def first(self) -> int:
        """The end of the first round: few units, and no more than COUNT needs at best."""
        return self.stops[min(FIRST_UNITS - 1, bisect_left(self.stops, self.count))]

    def after(self, end: int, shares: Shares) -> int | None:
        """The end of the round after [0, end), from the shares of it that pass; None: enough has passed.

        Call it where `hopeless` finds nothing.
        """
        lacking = self._lacking(shares)
        if not lacking:
            return None
        left = self.images_left(end)
        furthest, doubtful = 0, False
        for code, number in lacking.items():
            low, high = shares[code].interval(CONFIDENCE)
            more = min(left[code], math.ceil(number / high))
            furthest = max(furthest, self.plan.reach(code, shares[code].made + more))
            doubtful |= low * left[code] < number
        if doubtful:
            furthest = min(furthest, GROWTH * end)
        return self.stops[bisect_left(self.stops, furthest)]

    def hopeless(self, end: int, shares: Shares) -> list[str]:
        """The phases that can't get there: even at the upper bound of its rate, too few pass up to the limit."""
        left = self.images_left(end)
        return [
            code
            for code, number in self._lacking(shares).items()
            if shares[code].interval(CONFIDENCE)[1] * left[code] < number
        ]

    def images_left(self, end: int) -> dict[str, int]:
        """Images of each phase between `end` and the limit."""
        made = self.plan.counts(end)
        return {code: number - made[code] for code, number in self.plan.counts(self.stops[-1]).items()}

    def why_hopeless(self, code: str, end: int, share: Share) -> str:
        """The reason in words."""
        bound = share.interval(CONFIDENCE)[1]
        left = self.images_left(end)[code]
        wanted = self.plan.counts(self.count)[code]
        if not left:
            return f"phase {code}: {share} pass, {wanted:,} are wanted, and {self.stops[-1]:,} images are the limit"
        return (
            f"phase {code}: {share} pass, at most {bound:.1%} in the long run ({CONFIDENCE:.1%} interval); "
            f"{wanted:,} are wanted, and the {left:,} images of it that are left would give at most some "
            f"{math.floor(bound * left):,} more"
        )

    def _lacking(self, shares: Shares) -> dict[str, int]:
        """Phases that have not enough yet, and how many they lack."""
        wanted = self.plan.counts(self.count)
        return {code: wanted[code] - shares[code].passed for code in wanted if shares[code].passed < wanted[code]}

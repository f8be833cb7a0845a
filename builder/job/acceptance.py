"""What share of the images made passes a filter, phase by phase, how sure that is, and what it implies for COUNT."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from scipy.stats import binomtest

from builder.errors import BuilderError
from builder.job.plan import Plan
from builder.shards.criteria import SURPLUS
from builder.shards.dataset import Dataset


@dataclass(frozen=True)
class Share:
    """Of `made` images of a phase, `passed` pass."""

    passed: int
    made: int

    @property
    def rate(self) -> float:
        """In 0..1; NaN when nothing was made."""
        return self.passed / self.made if self.made else math.nan

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """The exact interval of the rate (Clopper & Pearson, Biometrika 26, 1934); (0, 1) when nothing was made.

        It takes the images for independent, as those of different seeds are; near-copies of each other are not.
        """
        if not self.made:
            return 0.0, 1.0
        ends = binomtest(self.passed, self.made).proportion_ci(confidence, "exact")
        return float(ends.low), float(ends.high)

    def __str__(self) -> str:
        return f"{self.passed:,} of {self.made:,} ({self.rate:.1%})" if self.made else "none made"


Shares = Mapping[str, Share]  # by phase


def accepted_shares(accepted: Dataset) -> dict[str, Share]:
    """Of each phase, how many images of a former run passed, from what `builder filter` or `--accepted` wrote.

    A surplus image passed as well. BuilderError when `accepted` was not filtered from another dataset, or --balance
    turned away images of which nobody knows any more whether they passed.
    """
    criteria = accepted.info.get("filter")
    if criteria is None:
        raise BuilderError(f"'{accepted.name}' was not filtered from another dataset", "name the result of a filter")
    if criteria.get("balance"):
        raise BuilderError(
            f"'{accepted.name}' was balanced: how many of its images passed is not known", "filter without --balance"
        )
    passed = Counter(accepted.table(["phase"])["phase"].to_pylist())
    made = passed.copy()
    folder = f"manifests/{accepted.name}/rejects"
    for name in accepted.storage.list(folder, ".parquet"):
        rows = accepted.rejects(name, ["phase", "reason"]).to_pydict()
        made.update(rows["phase"])
        passed.update(code for code, why in zip(rows["phase"], rows["reason"], strict=True) if why == SURPLUS)
    return {code: Share(passed[code], made[code]) for code in accepted.classes.codes if made[code]}


def images_needed(
    plan: Plan, count: int, shares: Shares, rate: Callable[[Share], float] = lambda share: share.rate
) -> int | None:
    """How far along the plan the phases' shares of `count` are likely to have passed; None: never, at a rate of 0.

    `rate`: which rate to reckon with: the one that was seen, or e.g. `lambda share: share.interval()[0]` for the worst.
    KeyError for a phase of the plan without a share.
    """
    wanted = {code: number for code, number in plan.counts(count).items() if number}
    rates = {code: rate(shares[code]) for code in wanted}
    if not all(value > 0 for value in rates.values()):  # also NaN
        return None
    return max(plan.reach(code, math.ceil(number / rates[code])) for code, number in wanted.items())

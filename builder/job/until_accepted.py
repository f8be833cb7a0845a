"""Make images along the plan until COUNT of them pass a filter, and keep just these: `builder shards --accepted`.

What comes of it are two datasets: NAME with every image made, complete, and NAME-accepted, the first of each phase that
pass. Which images count is decided by their order in the plan, and how far it goes in rounds (see job.rounds) that are
read off the committed units: so there is no state to lose, and every engine and restart makes the same shards.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from tqdm import tqdm

from builder.errors import BuilderError
from builder.job.acceptance import Share
from builder.job.engines import engine_name
from builder.job.pending import all_units
from builder.job.plan import Unit
from builder.job.rounds import Rounds
from builder.job.run import Outcome, begun, crew_of, run_job
from builder.job.spec import JobSpec
from builder.quality.reference import copy_reference, load_reference
from builder.shards.criteria import Criteria, Facts, Judgement, judge
from builder.shards.dataset import Dataset
from builder.shards.filter import filter_dataset, judge_dataset
from builder.shards.remove import remove_dataset
from builder.shards.schema import SCHEMA
from builder.shards.storage import Storage

log = logging.getLogger(__name__)
MAX_FACTOR = 5.0
UNSTEADY = ("seconds", "device")  # columns that differ between runs which make the same images
CriteriaOf = Callable[[Dataset], Criteria]  # of a dataset whose reference is there: the gates stand in it


@dataclass
class Accepted:
    """What a run did. `raw`: the job's own outcome, over all rounds.

    shares: of the images [0, end) of the plan, how many of each phase pass. wanted: accepted images asked for by phase.
    hopeless: why phases can't get there, in words; empty when all did. judgement: over all of the raw dataset; None
    when units failed, or `accepted` was there already.
    """

    raw: Outcome
    accepted: Dataset
    wanted: dict[str, int]
    end: int = 0
    shares: dict[str, Share] = field(default_factory=dict)
    hopeless: list[str] = field(default_factory=list)
    judgement: Judgement | None = None


def run_until_accepted(
    spec: JobSpec, count: int, criteria_of: CriteriaOf, *, max_factor: float = MAX_FACTOR, lineage: dict[str, Any],
    licence: dict[str, str], engine: str = "local", say: Callable[[str], None] = print, **how: Any,
) -> Accepted:  # fmt: skip
    """Make images until each phase's share of `count` passes; at most count x max_factor, beside what is there already.

    `how`: workers, address and grace, as of `run_job`.

    A run that stops because a phase can't get there leaves the raw dataset complete, and writes no accepted one.
    BuilderError for criteria that cannot be decided image by image, for an accepted dataset made by other criteria, and
    as `run_job`.
    """
    dataset = Dataset(spec.name, Storage(spec.out))
    progress = _Rounds(spec, count, max_factor, dataset, criteria_of)
    raw, last = Outcome(dataset, 0, 0, 0, 0.0), 0
    while not (state := progress.replay()).ended:
        if state.end == last:
            raise BuilderError(
                f"dataset '{spec.name}' lacks units or duplicate scores before image {last:,}, though it was complete",
                f"run `builder verify {spec.name}` and `builder score {spec.name} --against REAL`, then this again",
            )
        said = progress.describe(state)
        say(said)
        log.info("%s", said)
        outcome = run_job(
            spec, state.end, lineage=lineage, licence=licence, engine=engine, say=say, watch=progress, **how
        )
        raw = _together(raw, outcome)
        if outcome.failed:
            return Accepted(raw, progress.accepted, progress.wanted)
        last = state.end
    raw.images = sum(len(unit) for unit in begun(spec)[1])
    result = Accepted(raw, progress.accepted, progress.wanted, state.end, state.shares, state.hopeless)
    if state.hopeless:
        log.error("stopped: %s", "; ".join(state.hopeless))
        result.judgement = judge_dataset(dataset, progress.criteria)  # says so where a score was never computed
        return result

    def write() -> None:
        criteria = replace(progress.criteria, first=tuple(progress.wanted.items()))
        result.judgement = _write(dataset, criteria, progress.accepted)

    with crew_of(engine_name(engine), spec, progress.asked) as crew:
        if not progress.has_accepted():
            crew.once("accepted", progress.has_accepted, write)
    return result


def accepted_dataset(dataset: Dataset) -> Dataset:
    """Where the accepted images of a job's dataset go. BuilderError when its name gets too long."""
    return Dataset(f"{dataset.name}-accepted", dataset.storage)


def require_decidable(criteria: Criteria) -> None:
    """Refuse criteria by which the verdict on an image depends on more than its own row, or on who made it."""
    by_set = {
        "--quantile": (criteria.quantiles, "a quantile moves with every image that is made", "a score, or --band with "
                       "a score's _real_pct, which stands on real crops and stays"),
        "--keep-hard": (criteria.keep_hard, "which images come back depends on all that are made", "no --keep-hard"),
        "--balance": (criteria.balance, "each phase's share of COUNT is exact already", "--weights for other shares"),
    }  # fmt: skip
    for option, (asked, why, instead) in by_set.items():
        if asked:
            raise BuilderError(
                f"{option} can't be decided image by image: {why}",
                f"with --accepted use {instead}, or run `builder filter` with {option} on the finished dataset",
            )
    if criteria.where:
        rows = SCHEMA.empty_table()
        Facts(criteria).of(rows)  # a mistake in it is told before any image is made
        try:
            Facts(criteria).of(rows.drop_columns(list(UNSTEADY)))
        except BuilderError:
            raise BuilderError(
                f"--where '{criteria.where}' asks for {' or '.join(UNSTEADY)}, which differ from run to run",
                "which images are accepted must not; leave it out",
            ) from None


@dataclass(frozen=True)
class _State:
    """Round `number` goes to `end`; `ended`: no image is missing for the verdict. `shares`: of what was judged."""

    number: int
    end: int
    shares: dict[str, Share]
    ended: bool = False
    hopeless: list[str] = field(default_factory=list)


class _Rounds:
    """Replays the rounds from what is committed, and watches the job that makes the units of the next."""

    def __init__(self, spec: JobSpec, count: int, max_factor: float, dataset: Dataset, criteria_of: CriteriaOf) -> None:
        self.spec, self.count, self.dataset = spec, count, dataset
        self.most = math.floor(count * max_factor + 1e-6)  # 1.15 x 100 is 115
        self.accepted = accepted_dataset(dataset)
        self.wanted = spec.plan.counts(count)
        self.asked = f"accepted {count} of {self.most}"
        self._criteria_of = criteria_of
        self._judged: dict[int, Counter[str]] = {}  # by unit: the images of each phase that pass
        self._seen: dict[str, Share] = {}  # of all committed units, also beyond the round: for the progress bar

    @cached_property
    def criteria(self) -> Criteria:
        """Only once there is a reference that stays: with the first unit."""
        criteria = self._criteria_of(self.dataset)
        require_decidable(criteria)
        missing = load_reference(self.dataset).missing
        for name in criteria.scores:
            if why := missing.get(name.removesuffix("_real_pct")):
                raise BuilderError(f"the score '{name}' cannot be computed: {why}", "choose another score")
        return criteria

    # -- the rounds -----------------------------------------------------------------------------------------------

    def replay(self) -> _State:
        """Go through the rounds from the first, as far as their units are committed."""
        info, committed = begun(self.spec)
        there = {unit.number for unit in committed} if info else set()
        if there:
            self.has_accepted()  # another's name is refused before anything is changed
        units = all_units(committed, self.most, self.spec.config.shards.images_per_shard)
        rounds = Rounds(self.spec.plan, self.count, [unit.stop for unit in units])
        passed: Counter[str] = Counter()
        number, start, end = 1, 0, rounds.first()
        ahead = iter(tqdm(units, desc=f"judging {self.dataset.name}", unit="shard", delay=5, leave=False))
        while True:
            shares = self._shares(passed, start)
            for unit in _up_to(ahead, start, end):
                own = self._passed(unit) if unit.number in there else None
                if own is None:
                    return _State(number, end, shares)
                passed.update(own)
            shares = self._shares(passed, end)
            hopeless = [rounds.why_hopeless(code, end, shares[code]) for code in rounds.hopeless(end, shares)]
            further = None if hopeless else rounds.after(end, shares)
            if further is None:  # a run may have been killed just before it called the dataset complete
                return _State(number, end, shares, info["state"] == "complete", hopeless)
            number, start, end = number + 1, end, further

    def describe(self, state: _State) -> str:
        """What a round is to make, in words."""
        wanted = ", ".join(f"{code} {number:,}" for code, number in self.wanted.items())
        if state.number == 1:
            return f"until accepted: {wanted} are wanted, of at most {self.most:,} images; the first {state.end:,} now"
        so_far = ", ".join(f"{code} {share}" for code, share in state.shares.items())
        return f"round {state.number}: accepted so far {so_far}; {wanted} are wanted: on to {state.end:,} images"

    def has_accepted(self) -> bool:
        """Whether the accepted dataset has what is wanted, or more; BuilderError when it is something else.

        What is not finished, or holds fewer by the same criteria, is made anew.
        """
        criteria = self.criteria
        if not self.accepted.exists():
            return False
        info, source = self.accepted.info, self.dataset.info
        ours = info.get("parent") == self.dataset.name and "filter" in info
        if ours and info["state"] != "complete":
            return False
        had = dict(info["filter"].get("first", [])) if ours else {}
        asked = replace(criteria, first=tuple(had.items())).to_json()
        same = info.get("filter") == asked and not info.get("view")
        unchanged = info.get("parent_created") == source.get("created") and info.get("scores") == source.get("scores")
        if not (had and same and unchanged):
            raise BuilderError(
                f"dataset '{self.accepted.name}' exists and was made with other settings",
                f"`builder rm {self.accepted.name}` first, or choose another --name for the job",
            )
        return all(had.get(code, 0) >= number for code, number in self.wanted.items())

    def _passed(self, unit: Unit) -> Counter[str] | None:
        """Images of a unit that pass; None while duplicates are asked for and were not looked for in it yet."""
        if unit.number not in self._judged:
            table = self.dataset.shard_table(unit.number, Facts(self.criteria).columns)
            if self.criteria.no_duplicates and table["duplicate_score"].null_count:
                return None
            self._judged[unit.number] = judge(table, self.criteria).kept
        return self._judged[unit.number]

    def _shares(self, passed: Counter[str], end: int) -> dict[str, Share]:
        return {code: Share(passed[code], made) for code, made in self.spec.plan.counts(end).items()}

    # -- watching the job -----------------------------------------------------------------------------------------

    def ready(self, dataset: Dataset) -> None:
        """Refuse, before images are made, what cannot be judged or written; count what is there."""
        self.has_accepted()
        self._seen = dict.fromkeys(self.spec.plan.codes, Share(0, 0))
        for unit in begun(self.spec)[1]:
            self._see(unit)

    def committed(self, unit: Unit) -> dict[str, str]:
        """What passes so far, by phase; duplicates still count, for they are looked for at the end of the round."""
        self._see(unit)
        return {
            code: f"{share.passed}/{self.wanted[code]} ({share.rate:.0%})"
            for code, share in self._seen.items() if share.made
        }  # fmt: skip

    def _see(self, unit: Unit) -> None:
        kept = self._judged.get(unit.number)
        if kept is None:
            kept = judge(self.dataset.shard_table(unit.number, Facts(self.criteria).columns), self.criteria).kept
        before, after = self.spec.plan.counts(unit.start), self.spec.plan.counts(unit.stop)
        for code, share in self._seen.items():
            self._seen[code] = Share(share.passed + kept[code], share.made + after[code] - before[code])


def _up_to(units: Iterator[Unit], start: int, end: int) -> Iterator[Unit]:
    """The next units, up to the one that ends at `end`."""
    while start < end:
        unit = next(units)
        yield unit
        start = unit.stop


def _together(one: Outcome, other: Outcome) -> Outcome:
    return Outcome(
        other.dataset, other.images, one.made + other.made, one.replaced + other.replaced,
        one.seconds + other.seconds, other.failed,
    )  # fmt: skip


def _write(dataset: Dataset, criteria: Criteria, target: Dataset) -> Judgement:
    """Write the accepted dataset; one with fewer images, by the same criteria, gives way to it."""
    if target.exists() and target.info["state"] == "complete":
        remove_dataset(target.storage, target.name)  # refused while a view reads it
    judgement = judge_dataset(dataset, criteria)
    filter_dataset(dataset, criteria, judgement, target, write_beside=lambda: copy_reference(dataset, target))
    return judgement

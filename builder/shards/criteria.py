"""What the images of a dataset must satisfy, and the verdict over its rows. numpy, pyarrow and duckdb only."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from builder.errors import BuilderError, did_you_mean
from builder.shards.schema import SCORE_NAMES

if TYPE_CHECKING:
    from builder.shards.where import WhereProcess

HARD_PERCENT = 25.0  # %; of real crops are this hard for the probe: so is a hard image
HARD_SCORES = ("phase_margin", "phase_probability_real_pct")
WHERE, DUPLICATE = "satisfies_where", "is_duplicate"  # columns of the facts
SURPLUS = "surplus"  # the reason against an image that passes, though as many as were wanted stand before it
ROUNDING = 1e-9  # of a share of a count, before it is rounded up

Bools = np.ndarray  # bool [N]


@dataclass(frozen=True)
class Range:
    """A column must lie in [low, high]; of one phase, or of all (None). A missing value or NaN does not."""

    column: str
    low: float | None = None
    high: float | None = None
    phase: str | None = None
    reason: str = ""


@dataclass(frozen=True)
class Quantile:
    """A column must lie between two quantiles (0..1) of its values among all images of the phase in the dataset."""

    column: str
    low: float
    high: float


@dataclass(frozen=True)
class Criteria:
    """What an image must satisfy; equal criteria give equal JSON.

    gates: ranges that nothing lifts (sanity, copies). ranges: thresholds and bands. where: an SQL condition over the
    manifest row ('' for none). no_duplicates: of images that repeat an earlier one of their phase, none.
    keep_hard: the least share of hard images in what is kept of each phase; those that only ranges or quantiles
    turned away are re-admitted for it. balance: as many of each phase as of the one with the fewest. first: of what is
    kept of a phase, in the order of the dataset, so many (phase, number); a phase that is not named keeps all.
    """

    ranges: tuple[Range, ...] = ()
    where: str = ""
    gates: tuple[Range, ...] = ()
    quantiles: tuple[Quantile, ...] = ()
    no_duplicates: bool = False
    keep_hard: float = 0.0
    balance: bool = False
    first: tuple[tuple[str, int], ...] = ()

    @property
    def per_image(self) -> bool:
        """Whether the verdict on an image depends on its own row alone, so that images can be judged as they come."""
        return not (self.quantiles or self.keep_hard or self.balance or self.first)

    @property
    def scores(self) -> tuple[str, ...]:
        """The columns whose values are compared."""
        asked = [limit.column for limit in (*self.gates, *self.ranges)] + [each.column for each in self.quantiles]
        asked += HARD_SCORES if self.keep_hard else ()
        asked += ("duplicate_score",) if self.no_duplicates else ()
        return tuple(dict.fromkeys(asked))

    def to_json(self) -> dict[str, Any]:
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        if not self.first:  # younger than some filtered datasets, which must stay equal to themselves
            del plain["first"]
        return plain


class Judgement:
    """The verdict over N rows, in their order.

    `codes` and `phases` (int [N], indices into codes); `reasons` and `masks` (uint64 [N]; bit i: reasons[i] speaks
    against the row); `accepted` (bool [N]): no reason, or re-admitted as hard; `hard` (bool [N], None when not asked).
    """

    def __init__(self, phases: pa.ChunkedArray) -> None:
        coded = phases.combine_chunks().dictionary_encode()
        self.codes: list[str] = coded.dictionary.to_pylist()
        self.phases = coded.indices.to_numpy(zero_copy_only=False).astype(np.int16)
        self.reasons: list[str] = []
        self.masks = np.zeros(len(self.phases), np.uint64)
        self.accepted: Bools = np.ones(len(self.phases), bool)
        self.hard: Bools | None = None
        self.readmitted: Counter[str] = Counter()  # per phase, before --balance

    def __len__(self) -> int:
        return len(self.masks)

    def against(self, reason: str, rows: Bools) -> None:
        """Turn rows away, for this reason."""
        if not rows.any():
            return
        if reason not in self.reasons:
            self.reasons.append(reason)
        if len(self.reasons) > 64:
            raise BuilderError("an image may be turned away for 64 reasons at most", "filter in two steps")
        self.masks[rows] |= np.uint64(1 << self.reasons.index(reason))
        self.accepted[rows] = False

    def __iter__(self) -> Iterator[list[str]]:
        """The reasons against each row."""
        return iter(self.reasons_of(slice(None)))

    def reasons_of(self, rows: slice | Bools) -> list[list[str]]:
        """The reasons against some of the rows."""
        said: dict[int, list[str]] = {}
        for mask in np.unique(self.masks[rows]).tolist():
            said[mask] = [reason for bit, reason in enumerate(self.reasons) if mask >> bit & 1]
        return [said[mask] for mask in self.masks[rows].tolist()]

    def of(self, code: str) -> Bools:
        """The rows of a phase."""
        return self.phases == self.codes.index(code) if code in self.codes else np.zeros(len(self), bool)

    def count(self, rows: Bools) -> Counter[str]:
        """How many of these rows are of each phase."""
        counts = np.bincount(self.phases[rows], minlength=len(self.codes)).tolist()
        return Counter({code: count for code, count in zip(self.codes, counts, strict=True) if count})

    @property
    def kept(self) -> Counter[str]:
        return self.count(self.accepted)

    @property
    def rejected(self) -> Counter[str]:
        return self.count(~self.accepted)

    @property
    def kept_hard(self) -> Counter[str]:
        return Counter() if self.hard is None else self.count(self.accepted & self.hard)

    def reason_counts(self) -> Counter[tuple[str, str]]:
        """How often each reason turned an image of a phase away; an image may have several."""
        counts: Counter[tuple[str, str]] = Counter()
        for bit, reason in enumerate(self.reasons):
            rows = ~self.accepted & (self.masks & np.uint64(1 << bit) != 0)
            counts.update({(code, reason): count for code, count in self.count(rows).items()})
        return counts


class Facts:
    """Reduces manifests to what criteria ask of them: little enough to hold all rows of a dataset at once."""

    def __init__(self, criteria: Criteria) -> None:
        self.criteria = criteria
        self._where: WhereProcess | None = None

    @property
    def columns(self) -> list[str] | None:
        """Columns of the manifest that must be read; None for all (an SQL condition may name any)."""
        duplicates = ["duplicate_of"] if self.criteria.no_duplicates else []
        return None if self.criteria.where else ["phase", *self.criteria.scores, *duplicates]

    def of(self, table: pa.Table) -> pa.Table:
        """Of some manifest rows: phase, the scores asked (float32), and whether duplicate and whether --where holds."""
        columns = {"phase": table["phase"]}
        for name in self.criteria.scores:
            columns[name] = pc.cast(_column(table, name), pa.float32())
        if self.criteria.no_duplicates:
            columns[DUPLICATE] = _column(table, "duplicate_of").is_valid()
        if self.criteria.where:
            columns[WHERE] = self._satisfies(table)
        return pa.table(columns)

    def _satisfies(self, table: pa.Table) -> pa.Array:
        """Which rows satisfy the SQL condition (duckdb's dialect); unknown counts as not."""
        from builder.shards.where import WhereProcess

        if self._where is None:
            self._where = WhereProcess(self.criteria.where)
        return pa.array(self._where.satisfies(table))


def judge(table: pa.Table, criteria: Criteria) -> Judgement:
    """The verdict over the rows of a manifest, taken for all of the dataset. BuilderError for an unknown column."""
    return judge_facts(Facts(criteria).of(table), criteria)


def judge_facts(facts: pa.Table, criteria: Criteria) -> Judgement:
    """The verdict over all rows of a dataset, from their facts.

    Hard is an image whose label the probe confirms (phase_margin > 0), though with a phase_probability that three
    quarters of real crops exceed. Where a phase lacks hard images, those with the largest margin (the surest of their
    label) come back first. To balance, the first rows of a phase stay; hard ones go last where they are short.
    """
    judgement = Judgement(facts["phase"])
    for limit in criteria.gates:
        _judge_range(judgement, facts, limit)
    if criteria.where:
        judgement.against(f"not {criteria.where}", ~_values(facts, WHERE))
    if criteria.no_duplicates:
        judgement.against("duplicate", _values(facts, DUPLICATE))
    sound = judgement.accepted.copy()
    for limit in (*criteria.ranges, *_quantile_ranges(judgement, facts, criteria.quantiles)):
        _judge_range(judgement, facts, limit)
    readmitted = (
        _keep_hard(judgement, facts, sound, criteria.keep_hard) if criteria.keep_hard else np.empty(0, np.int64)
    )
    if criteria.balance:
        _balance(judgement, readmitted, criteria.keep_hard)
    for code, number in criteria.first:
        passing = judgement.accepted & judgement.of(code)
        judgement.against(SURPLUS, passing & (np.cumsum(passing) > number))
    return judgement


def _judge_range(judgement: Judgement, facts: pa.Table, limit: Range) -> None:
    values = _values(facts, limit.column)
    # Scores are stored in 32 bits: compare at that precision, so that 0.7 passes --min 0.7.
    low = np.float32(-math.inf if limit.low is None else limit.low)
    high = np.float32(math.inf if limit.high is None else limit.high)
    outside = (values < low) | (values > high)
    missing = np.isnan(values)
    if limit.phase is not None:
        of_phase = judgement.of(limit.phase)
        outside &= of_phase
        missing &= of_phase
    judgement.against(limit.reason, outside)
    judgement.against(f"no {limit.column}: never scored", missing)


def _quantile_ranges(judgement: Judgement, facts: pa.Table, quantiles: tuple[Quantile, ...]) -> list[Range]:
    ranges = []
    for asked in quantiles:
        values = _values(facts, asked.column)
        reason = f"{asked.column} outside the quantiles {asked.low:g} to {asked.high:g} of its phase"
        for code in judgement.codes:
            of_phase = values[judgement.of(code)]
            there = of_phase[~np.isnan(of_phase)]
            low, high = np.quantile(there, [asked.low, asked.high]) if len(there) else (-math.inf, math.inf)
            ranges.append(Range(asked.column, float(low), float(high), code, reason))
    return ranges


def _keep_hard(judgement: Judgement, facts: pa.Table, sound: Bools, share: float) -> np.ndarray:
    """Re-admit hard images that thresholds alone turned away; returns their rows, in the order of admission."""
    margin, percentile = (_values(facts, name) for name in HARD_SCORES)
    judgement.hard = hard = (margin > 0) & (percentile <= HARD_PERCENT)
    admitted = [np.empty(0, np.int64)]
    for code in judgement.codes:
        of_phase = judgement.of(code)
        kept, kept_hard = (int((judgement.accepted & rows).sum()) for rows in (of_phase, of_phase & hard))
        candidates = np.flatnonzero(of_phase & hard & sound & ~judgement.accepted)
        # m more make (kept_hard + m) / (kept + m) >= share
        lacking = (share * kept - kept_hard) / (1 - share) if share < 1 else math.inf if kept_hard < kept else 0
        needed = min(max(0, lacking), len(candidates))
        surest = np.argsort(-margin[candidates], kind="stable")[: math.ceil(needed - ROUNDING)]
        admitted.append(candidates[surest])
        judgement.readmitted[code] = len(surest)
        judgement.accepted[candidates[surest]] = True
    return np.concatenate(admitted)


def _balance(judgement: Judgement, readmitted: np.ndarray, share: float) -> None:
    """Of each phase in the dataset, keep as many as of the one with the fewest, at least `share` of them hard."""
    each = min((judgement.kept[code] for code in judgement.codes), default=0)
    hard = np.zeros(len(judgement), bool) if judgement.hard is None else judgement.hard
    for code in judgement.codes:
        of_phase = judgement.of(code)
        passing = judgement.accepted & of_phase
        passing[readmitted] = False
        late = readmitted[of_phase[readmitted]]
        order = np.concatenate([np.flatnonzero(passing), late])  # what passed by itself goes before what came back
        hard_first, easy_first = order[hard[order]], order[~hard[order]]
        wanted = min(len(hard_first), math.ceil(share * each - ROUNDING))
        n_hard = max(wanted, int(hard[order[:each]].sum()))
        stays = np.zeros(len(judgement), bool)
        stays[hard_first[:n_hard]] = True
        stays[easy_first[: each - n_hard]] = True
        judgement.against("balance", of_phase & judgement.accepted & ~stays)


def _column(table: pa.Table, name: str) -> pa.ChunkedArray:
    if name in table.column_names:
        return table[name]
    remedy = "run `builder score` again" if name in SCORE_NAMES else did_you_mean(name, SCORE_NAMES)
    raise BuilderError(f"there is no column '{name}' in the manifest", remedy)


def _values(facts: pa.Table, name: str) -> np.ndarray:
    """A column of the facts: float32, missing as NaN; or bool."""
    return np.asarray(facts[name].to_numpy())

"""Accept or turn away the images of a dataset by what its manifests say, and write the accepted as a new one."""

from __future__ import annotations

import datetime
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from builder.errors import BuilderError, did_you_mean
from builder.shards.dataset import Dataset
from builder.shards.schema import IDENTITY, SCORE_NAMES
from builder.shards.writer import IMAGES_PER_SHARD, Sample, manifest_path, shard_name, write_manifest, write_shards

PLACE = ("shard", "offset", "size")
HISTORY = ("inputs", "summary", "adopted_from")  # of dataset.json: how the source came to be, which is not the target's


@dataclass(frozen=True)
class Range:
    """A column must lie in [low, high]; of one phase, or of all (None). A missing value or NaN does not."""

    column: str
    low: float | None = None
    high: float | None = None
    phase: str | None = None
    reason: str = ""


@dataclass(frozen=True)
class Criteria:
    """What an image must satisfy: every range, and the SQL condition over its manifest row ('' for none)."""

    ranges: tuple[Range, ...] = ()
    where: str = ""

    def to_json(self) -> dict[str, Any]:
        return {"ranges": [asdict(r) for r in self.ranges], "where": self.where}


@dataclass
class Tally:
    """Kept and rejected per phase, and how often each reason was given (an image may have several)."""

    kept: Counter[str] = field(default_factory=Counter)
    rejected: Counter[str] = field(default_factory=Counter)
    reasons: Counter[tuple[str, str]] = field(default_factory=Counter)

    def add(self, phases: Sequence[str], reasons: Sequence[Sequence[str]]) -> None:
        for phase, said in zip(phases, reasons, strict=True):
            (self.rejected if said else self.kept)[phase] += 1
            self.reasons.update((phase, reason) for reason in said)


def judge(table: pa.Table, criteria: Criteria) -> list[list[str]]:
    """The reasons against each row of a manifest; an empty list means accepted. BuilderError for an unknown column."""
    reasons: list[list[str]] = [[] for _ in range(table.num_rows)]
    for limit in criteria.ranges:
        violating = pc.indices_nonzero(_violates(table, limit)).to_pylist()
        there = table[limit.column].is_valid().to_pylist()
        for row in violating:
            reasons[row].append(limit.reason if there[row] else f"no {limit.column}: never scored")
    if criteria.where:
        for row in _where_not(table, criteria.where):
            reasons[row].append(f"not {criteria.where}")
    return reasons


def filter_dataset(dataset: Dataset, criteria: Criteria, target: Dataset | None, *, view: bool = False) -> Tally:
    """Judge every image of `dataset`; with a `target`, write the accepted there and the rest to its rejects.

    A view's manifests point into the source's tars; otherwise the images are repacked, byte for byte, into full
    shards. The source is never touched. Interrupted, the target stays partial and is made anew. BuilderError when
    `target` is another dataset's name.
    """
    if target is None:
        tally = Tally()
        for _ in _judged(dataset, criteria, tally, None):
            continue
        return tally
    if already_filtered(dataset, criteria, target, view=view):
        return filter_dataset(dataset, criteria, None)
    info = _begin(dataset, criteria, target, view=view)
    tally = Tally()
    judged = _judged(dataset, criteria, tally, target)
    if view:
        _write_view(judged, target)
    else:
        per_shard = info.get("config", {}).get("shards", {}).get("images_per_shard", IMAGES_PER_SHARD)
        write_shards(target.storage, target.name, _samples(judged, dataset), per_shard)
    target.write_info({**info, "state": "complete", "count": sum(tally.kept.values())})
    return tally


def already_filtered(dataset: Dataset, criteria: Criteria, target: Dataset, *, view: bool) -> bool:
    """Whether `target` is just this; BuilderError when it is something else, finished or not.

    What an interrupted run of any filter over `dataset` left may be made anew.
    """
    if not target.exists():
        return False
    info, source = target.info, dataset.info
    ours = info.get("parent") == dataset.name and "filter" in info
    if ours and info["state"] != "complete":
        return False
    same = info.get("filter") == criteria.to_json() and info.get("view") == view
    unchanged = info.get("parent_created") == source.get("created") and info.get("parent_count") == source.get("count")
    if ours and same and unchanged:
        return True
    raise BuilderError(
        f"dataset '{target.name}' exists and was made with other settings",
        f"choose another --name, or `builder rm {target.name}` first",
    )


def _begin(dataset: Dataset, criteria: Criteria, target: Dataset, *, view: bool) -> dict[str, Any]:
    source = dataset.info
    target.clear()  # what an interrupted run left; complete targets are refused before
    info = {
        **{key: value for key, value in source.items() if key not in HISTORY},
        "name": target.name,
        "state": "partial",
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "parent": dataset.name,
        "parent_created": source.get("created"),
        "parent_count": source.get("count"),
        "filter": criteria.to_json(),
        "view": view,
    }
    target.write_info(info)
    return info


def _judged(
    dataset: Dataset, criteria: Criteria, tally: Tally, target: Dataset | None
) -> Iterator[tuple[int, pa.Table]]:
    """Number and accepted rows of each shard; the rest is counted and, with a target, written to its rejects."""
    for number in dataset.shard_numbers():
        table = dataset.shard_table(number)
        reasons = judge(table, criteria)
        tally.add(table["phase"].to_pylist(), reasons)
        rejected = pa.array([bool(said) for said in reasons], pa.bool_())
        if target is not None and pc.any(rejected).as_py():
            turned_away = table.filter(rejected).append_column("reason", pa.array(["; ".join(r) for r in reasons if r]))
            path = f"manifests/{target.name}/rejects/{shard_name(number)}.parquet"
            write_manifest(target.storage, path, turned_away)
        yield number, table.filter(pc.invert(rejected))


def _write_view(judged: Iterable[tuple[int, pa.Table]], target: Dataset) -> None:
    for number, accepted in judged:
        if accepted.num_rows:
            write_manifest(target.storage, manifest_path(target.name, number), accepted)


def _samples(judged: Iterable[tuple[int, pa.Table]], dataset: Dataset) -> Iterator[Sample]:
    """The accepted images with their payloads, byte for byte."""
    for _, accepted in judged:
        for row in accepted.to_pylist():
            yield Sample({name: value for name, value in row.items() if name not in PLACE}, dataset.payload(row))


def _violates(table: pa.Table, limit: Range) -> pa.Array:
    if limit.column not in table.column_names:
        numeric = [name for name in SCORE_NAMES if name in table.column_names]
        raise BuilderError(f"there is no column '{limit.column}' in the manifest", did_you_mean(limit.column, numeric))
    values = pc.cast(table[limit.column], pa.float64())
    low = -math.inf if limit.low is None else limit.low
    high = math.inf if limit.high is None else limit.high
    # Scores are stored in 32 bits: compare at that precision, so that 0.7 passes --min 0.7.
    low, high = (pa.scalar(pc.cast(pa.scalar(v), pa.float32()).as_py(), pa.float64()) for v in (low, high))
    inside = pc.and_(pc.greater_equal(values, low), pc.less_equal(values, high))
    outside = pc.invert(pc.fill_null(inside, False))
    if limit.phase is not None:
        outside = pc.and_(outside, pc.equal(table["phase"], limit.phase))
    return outside


def _where_not(table: pa.Table, where: str) -> list[int]:
    """Row numbers that do not satisfy an SQL condition (duckdb's dialect); unknown counts as not."""
    import duckdb

    numbered = table.append_column("row_number_", pa.array(range(table.num_rows), pa.int64()))
    try:
        with duckdb.connect() as connection:
            connection.execute("SET enable_external_access = false")
            connection.register("manifest", numbered)
            query = f"SELECT row_number_ FROM manifest WHERE NOT coalesce(({where}), false) ORDER BY 1"
            return [row for (row,) in connection.execute(query).fetchall()]
    except duckdb.Error as error:
        columns = ", ".join([*(field.name for field in IDENTITY), *SCORE_NAMES])
        raise BuilderError(
            f"--where '{where}' is no condition over the manifest: {str(error).splitlines()[0]}",
            f"write for example --where \"ssim > 0.7 and phase = 'I'\"; columns are, among others, {columns}",
        ) from None

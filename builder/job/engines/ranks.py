"""The engine of launched ranks: processes that torchrun, srun or a SLURM array started, on any machines, at any time.

Rank r of w owns the units of the full plan whose number is r modulo w. It makes those first, then helps with what
nobody has committed or claimed, from the plan's end, so that it does not get in the way of their owners. Ranks never
speak with each other: what is committed stands in the dataset, what is being made in claims, which fall with their
owner. A rank that dies, or never starts, is missed by its share of speed only.
"""

from __future__ import annotations

import logging
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from typing import Protocol

from builder.errors import BuilderError
from builder.job import stopping
from builder.job.crew import Together
from builder.job.devices import prepare
from builder.job.engines import Load, Maker, Report, load_worker
from builder.job.failures import MAX_FAILURES, Failures
from builder.job.plan import Unit
from builder.job.spec import JobSpec
from builder.shards.writer import manifest_path, shard_name

log = logging.getLogger(__name__)


class RankReport(Report, Protocol):
    """Hears in addition of units that other ranks made."""

    def elsewhere(self, unit: Unit) -> None: ...


def run(
    spec: JobSpec, units: Sequence[Unit], report: RankReport, crew: Together, failures: Failures, *,
    load: Load = load_worker,
) -> None:  # fmt: skip
    """Return when each of `units`, of the whole dataset, is committed or given up, by whatever rank."""
    rank = _Rank(spec, report, crew, failures, load)
    todo = in_order(units, crew.place.rank, crew.place.world)
    while todo and not stopping.asked():
        before = rank.turns
        todo = [unit for unit in todo if not rank.settled(unit)]
        if todo and rank.turns == before:
            time.sleep(crew.poll)


def in_order(units: Sequence[Unit], rank: int, world: int) -> list[Unit]:
    """The units as this rank goes through them: its own, then, from the end, the others'."""
    own = [unit for unit in units if unit.number % world == rank]
    return own + [unit for unit in reversed(units) if unit.number % world != rank]


class _Rank:
    """One process of the job; what it makes with is loaded when it gets its first unit."""

    def __init__(self, spec: JobSpec, report: RankReport, crew: Together, failures: Failures, load: Load) -> None:
        self.spec, self.report, self.crew, self.failures, self.load = spec, report, crew, failures, load
        self.dataset = spec.dataset
        self.device = prepare(crew.place.local)
        self.worker: Maker | None = None
        self.turns = 0  # units that this rank had a go at
        self.failed: Counter[int] = Counter()  # by unit, here

    def settled(self, unit: Unit) -> bool:
        """Look after a unit: whether it is committed or given up now. One that a peer holds is not."""
        if stopping.asked():
            return False
        if self._made_elsewhere(unit):
            return True
        claim = self.crew.claims.take(shard_name(unit.number))
        if claim is None:
            return False
        try:
            return self._made_elsewhere(unit) or self._tried(unit, claim.tries)
        finally:
            self.crew.claims.release(claim.name)

    def _made_elsewhere(self, unit: Unit) -> bool:
        there = self.dataset.storage.exists(manifest_path(self.dataset.name, unit.number))
        if there:
            self.report.elsewhere(unit)
        return there

    def _tried(self, unit: Unit, tries: int) -> bool:
        """Make a unit, or give it up; False when it failed, but not often enough yet."""
        reason = self.failures.of_this_run(unit)
        if reason is None and tries > MAX_FAILURES:
            reason = f"{tries - 1} workers died while they made it"
        if reason is None:
            reason = self._make(unit)
            if reason is None:
                return True
            if self.failed[unit.number] < MAX_FAILURES:
                return False
        self.report.failed(unit, reason)
        return True

    def _make(self, unit: Unit) -> str | None:
        """Make a unit; why it failed, or None."""
        self.turns += 1
        made = 0

        def heard(images: int) -> None:
            nonlocal made
            made += images
            self.report.batch(images)

        if self.worker is None:
            self.worker = self.load(self.spec, self.device)
        try:
            with self.crew.presence.making(unit, heard) as on_batch:
                replaced = self.worker.make(unit, on_batch)
        except BuilderError:
            raise
        except Exception:
            log.exception("unit %d", unit.number)
            self.report.batch(-made)
            self.failed[unit.number] += 1
            return traceback.format_exc()
        self.report.done(unit, replaced)
        return None

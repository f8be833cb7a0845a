"""The engine without processes: all units in this one, in order. For debugging and small models."""

from __future__ import annotations

from collections.abc import Sequence

from builder.job.devices import prepare
from builder.job.engines import Report
from builder.job.plan import Unit
from builder.job.spec import JobSpec


def run(spec: JobSpec, units: Sequence[Unit], workers: int, report: Report) -> None:
    """Run the units here; `workers` is not used."""
    device = prepare(0)
    from builder.job.worker import Worker  # after `prepare`, which sets the thread count before any work

    worker = Worker(spec, device)
    for unit in units:
        report.done(unit, worker.make(unit, report.batch))

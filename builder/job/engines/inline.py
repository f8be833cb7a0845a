"""The engine without processes: all units in this one, in order. For debugging and small models."""

from __future__ import annotations

from collections.abc import Sequence

from builder.job import stopping
from builder.job.devices import prepare
from builder.job.engines import Load, Report, load_worker
from builder.job.plan import Unit
from builder.job.presence import Presence
from builder.job.spec import JobSpec


def run(
    spec: JobSpec, units: Sequence[Unit], workers: int, report: Report, *, load: Load = load_worker
) -> None:  # fmt: skip
    """Run the units here; `workers` is not used."""
    device = prepare(0)
    worker = load(spec, device)
    with Presence(spec.dataset, "inline", device) as presence:
        for unit in units:
            if stopping.asked():
                return
            with presence.making(unit, report.batch) as on_batch:
                replaced = worker.make(unit, on_batch)
            report.done(unit, replaced)

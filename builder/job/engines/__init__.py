"""Engines run units and report each as it is done. An engine keeps no state: the dataset does.

The protocol: `engine(spec, units, workers, report)` runs every unit once, calls `report.batch(images)` as images are
made, `report.done(unit, replaced)` when a unit is committed, `report.failed(unit, reason)` when it is given up, and
returns when all units are done or given up. A BuilderError (bad input, full disk) ends the run at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from builder.errors import BuilderError, did_you_mean
from builder.job.plan import Unit
from builder.job.spec import JobSpec


class Report(Protocol):
    def batch(self, images: int) -> None: ...
    def done(self, unit: Unit, replaced: int) -> None: ...
    def failed(self, unit: Unit, reason: str) -> None: ...


Engine = Callable[[JobSpec, Sequence[Unit], int, Report], None]


def engine_of(name: str) -> Engine:
    """The engine of a name; BuilderError for an unknown one."""
    from builder.job.engines import inline, local

    engines: dict[str, Engine] = {"local": local.run, "inline": inline.run}
    if name not in engines:
        raise BuilderError(f"unknown engine '{name}'", did_you_mean(name, engines))
    return engines[name]

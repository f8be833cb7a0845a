"""Engines run units and report each as it is done. An engine keeps no state: the dataset does.

The protocol: `engine(spec, units, workers, report)` runs every unit once, calls `report.batch(images)` as images are
made, `report.done(unit, replaced)` when a unit is committed, `report.failed(unit, reason)` when it is given up, and
returns when all units are done or given up, or when the process was told to end (see job.stopping) and what was in hand
is finished. A BuilderError (bad input, full disk) ends the run at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

from builder.errors import BuilderError, did_you_mean
from builder.job.launch import place_of
from builder.job.plan import Unit
from builder.job.spec import JobSpec

NAMES = ("local", "ranks", "ray", "inline")


class Report(Protocol):
    def batch(self, images: int) -> None: ...
    def done(self, unit: Unit, replaced: int) -> None: ...
    def failed(self, unit: Unit, reason: str) -> None: ...


class Maker(Protocol):
    """What a worker process loads once: makes and commits units, says of each how many images it replaced."""

    def make(self, unit: Unit, on_batch: Callable[[int], None]) -> int: ...


Engine = Callable[[JobSpec, Sequence[Unit], int, Report], None]
Load = Callable[[JobSpec, str], Maker]  # on a device; travels to worker processes, so a function of a module


def engine_name(name: str) -> str:
    """The engine that `name` means: 'auto' is `ranks` where a launcher started several processes, else `local`.

    BuilderError for an unknown one.
    """
    if name == "auto":
        return "ranks" if place_of().world > 1 else "local"
    if name not in NAMES:
        raise BuilderError(f"unknown engine '{name}'", did_you_mean(name, ("auto", *NAMES)))
    return name


def engine_of(name: str, address: str = "auto") -> Engine:
    """The engine of a name that runs its units alone (for `ranks` see there); `address`: of the Ray cluster.

    BuilderError when Ray is asked for and not there, before anything is made.
    """
    from builder.job.engines import inline, local, ray

    if name == "ray":
        ray.connect(address)
    engines: dict[str, Engine] = {"local": local.run, "inline": inline.run, "ray": partial(ray.run, address=address)}
    return engines[name]


def load_worker(spec: JobSpec, device: str) -> Maker:
    """The worker that generates, scores and commits; call job.devices.prepare before: it sets the thread count."""
    from builder.job.worker import Worker

    return Worker(spec, device)

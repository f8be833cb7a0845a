"""Stand-ins for what a worker loads: each commits a small picture a unit, and some of them fail or wait.

Light to import, because worker processes and Ray's actors do so.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable

import numpy as np

from builder.job.plan import Unit
from builder.job.presence import signs
from builder.job.spec import JobSpec
from builder.shards.storage import Storage
from builder.shards.writer import Sample, encode_png, image_row, write_shard


def units_of(count: int) -> list[Unit]:
    """Units of one image each."""
    return [Unit(number, number, number + 1) for number in range(count)]


class Maker:
    """Commits one picture a unit; `before(unit)` may raise, wait or count."""

    def __init__(self, spec: JobSpec, before: Callable[[Unit], None]) -> None:
        self.spec, self.before = spec, before

    def make(self, unit: Unit, on_batch: Callable[[int], None]) -> int:
        on_batch(1)
        self.before(unit)
        pixels = np.random.default_rng(unit.number).integers(0, 256, (8, 8, 3), np.uint8)
        row = image_row(f"{self.spec.name}-I-{unit.number:08d}", "I", 0, "synthetic", pixels)
        metadata = {"start": str(unit.start), "stop": str(unit.stop)}
        sample = Sample(row, encode_png(pixels))
        write_shard(Storage(self.spec.out), self.spec.name, unit.number, [sample], metadata, shared=True)
        return 0


def tells_all_to_end(spec: JobSpec, device: str) -> Maker:
    """For a local worker: in the middle of unit 1 all of the job gets SIGTERM, as from SLURM."""
    parent = multiprocessing.parent_process()
    assert parent and parent.pid

    def told(unit: Unit) -> None:
        if unit.number == 1:
            for process in {parent.pid, os.getppid(), os.getpid()}:  # the second is the fork server, where there is one
                os.kill(process, signal.SIGTERM)
            time.sleep(0.2)

    return Maker(spec, told)


def fails_or_dies(spec: JobSpec, device: str) -> Maker:
    """Unit 1 raises, unit 2 kills the process."""

    def cursed(unit: Unit) -> None:
        if unit.number == 1:
            raise RuntimeError("cursed")
        if unit.number == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    return Maker(spec, cursed)


def waits_for_a_third(spec: JobSpec, device: str) -> Maker:
    """For an actor: from unit 8 on units take until an actor beyond the first two is there, so that it gets some."""

    def wait(unit: Unit) -> None:
        time.sleep(0.1)
        for _ in range(1200):
            if unit.number < 8 or any(actor_number(sign.label) >= 2 for sign in signs(spec.dataset).values()):
                return
            time.sleep(0.1)

    return Maker(spec, wait)


def actor_number(label: str) -> int:
    return int(label.split()[-1])

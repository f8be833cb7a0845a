"""The engine of one machine: a persistent worker process per device, units handed out one at a time.

The parent knows which unit each worker holds, so a worker that dies (out of memory, kill -9) is started again and its
unit goes back into the queue; a unit that fails three times is given up and the rest goes on.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import traceback
from collections import Counter, deque
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import Any

from builder.errors import BuilderError
from builder.job.engines import Report
from builder.job.plan import Unit
from builder.job.spec import JobSpec

MAX_FAILURES = 3

log = logging.getLogger(__name__)
_context = multiprocessing.get_context("spawn")  # CUDA and torch threads do not survive a fork


class _Process:
    """A worker process, the pipe to it, and the unit it holds."""

    def __init__(self, spec: JobSpec, number: int) -> None:
        self.number = number
        self.unit: Unit | None = None
        self.unit_images = 0
        self.connection, theirs = _context.Pipe()
        self.process = _context.Process(target=_work, args=(spec, number, theirs), daemon=True)
        self.process.start()
        theirs.close()  # so that the worker's death reads as end of file here

    def give(self, unit: Unit | None) -> None:
        self.unit, self.unit_images = unit, 0
        with suppress(OSError):  # it just died: the pipe's end of file is read next and brings the unit back
            self.connection.send(unit)

    def stop(self) -> None:
        self.process.terminate()
        self.process.join()
        self.connection.close()


def run(spec: JobSpec, units: Sequence[Unit], workers: int, report: Report) -> None:
    """Run `units` on `workers` processes. However this ends, no worker is left behind."""
    queue = deque(units)
    failures: Counter[int] = Counter()
    pool = [_Process(spec, number) for number in range(min(workers, len(units)))]
    try:
        while pool:
            for connection in wait([worker.connection for worker in pool]):
                worker = next(worker for worker in pool if worker.connection is connection)
                try:
                    kind, value = worker.connection.recv()
                except (EOFError, ConnectionResetError):
                    worker.process.join()
                    kind, value = "died", f"worker {worker.number} died (exit code {worker.process.exitcode})"
                _hear(spec, worker, kind, value, pool, queue, failures, report)
    finally:
        for worker in pool:
            worker.stop()


def _hear(
    spec: JobSpec, worker: _Process, kind: str, value: Any,
    pool: list[_Process], queue: deque[Unit], failures: Counter[int], report: Report,
) -> None:  # fmt: skip
    """Act on one message of a worker."""
    if kind == "error":  # the user's mistake or a full disk: the same for every worker
        raise value
    if kind == "batch":
        worker.unit_images += value
        report.batch(value)
        return
    if kind == "done" and worker.unit is not None:
        report.done(worker.unit, value)
        worker.unit = None
    if kind in ("failed", "died"):
        log.error("%s", value)
        report.batch(-worker.unit_images)
        _count_failure(worker, value, queue, failures, report)
    if kind == "died":
        pool.remove(worker)
        worker.stop()
        if queue:
            pool.append(_Process(spec, worker.number))
    elif queue:
        worker.give(queue.popleft())
    else:
        pool.remove(worker)
        worker.give(None)
        worker.process.join()
        worker.connection.close()


def _count_failure(worker: _Process, reason: str, queue: deque[Unit], failures: Counter[int], report: Report) -> None:
    unit, worker.unit = worker.unit, None
    if unit is None:  # it died before it got any work, e.g. while loading the model
        failures[-1] += 1
        if failures[-1] >= MAX_FAILURES:
            raise BuilderError(
                f"workers die while loading: {reason}", "the run's log has their last words; try fewer --workers"
            )
        return
    failures[unit.number] += 1
    if failures[unit.number] < MAX_FAILURES:
        queue.appendleft(unit)
    else:
        report.failed(unit, reason)


def _work(spec: JobSpec, number: int, connection: Connection) -> None:
    """A worker process: load once, then a unit at a time until None comes or the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the parent, which stops its workers
    from builder.job.devices import prepare

    try:
        device = prepare(number)
        from builder.job.worker import Worker

        worker = Worker(spec, device)
        connection.send(("ready", None))
        while (unit := connection.recv()) is not None:
            try:
                replaced = worker.make(unit, lambda images: connection.send(("batch", images)))
                connection.send(("done", replaced))
            except (BuilderError, BrokenPipeError):
                raise
            except Exception:
                connection.send(("failed", f"unit {unit.number}:\n{traceback.format_exc()}"))
    except BuilderError as error:
        connection.send(("error", error))
    except (EOFError, BrokenPipeError):
        os._exit(1)  # the parent was killed: nobody waits for this unit

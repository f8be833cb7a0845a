"""The engine of one machine: a persistent worker process per device, units handed out one at a time.

The parent knows which unit each worker holds, so a worker that dies (out of memory, kill -9) is started again and its
unit goes back into the queue; a unit that fails three times is given up and the rest goes on.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
import traceback
from collections import Counter, deque
from collections.abc import Sequence
from contextlib import suppress
from logging.handlers import QueueHandler
from multiprocessing.connection import Connection, wait
from typing import Any

from builder.errors import BuilderError
from builder.job.engines import Report
from builder.job.plan import Unit
from builder.job.spec import JobSpec

MAX_FAILURES = 3  # of a unit before it is given up; of a worker to load, in a row, before it is not started again

log = logging.getLogger(__name__)
_context = multiprocessing.get_context("spawn")  # CUDA and torch threads do not survive a fork


def run(spec: JobSpec, units: Sequence[Unit], workers: int, report: Report) -> None:
    """Run `units` on `workers` processes. However this ends, no worker is left behind."""
    pool = _Pool(spec, units, report)
    try:
        for number in range(min(workers, len(units))):
            pool.start(number)
        pool.serve()
    finally:
        pool.stop()


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

    def hear(self) -> tuple[str, Any]:
        """Its next message: ('ready' | 'log' | 'batch' | 'done' | 'failed' | 'error' | 'died', value)."""
        try:
            message: tuple[str, Any] = self.connection.recv()
            return message
        except (EOFError, ConnectionResetError):
            self.process.join()
            return "died", f"worker {self.number} died (exit code {self.process.exitcode})"

    def stop(self) -> None:
        self.process.terminate()
        self.process.join()
        self.connection.close()


class _Pool:
    """The workers that live, the units that nobody holds, and how often each failed."""

    def __init__(self, spec: JobSpec, units: Sequence[Unit], report: Report) -> None:
        self.spec = spec
        self.report = report
        self.queue = deque(units)
        self.workers: list[_Process] = []
        self.failures: Counter[int] = Counter()  # by unit
        self.failed_loads: Counter[int] = Counter()  # by worker, in a row

    def start(self, number: int) -> None:
        self.workers.append(_Process(self.spec, number))

    def stop(self) -> None:
        for worker in self.workers:
            worker.stop()

    def serve(self) -> None:
        """Hand out units and report until there is no more to do."""
        while self.workers:
            ready = wait([worker.connection for worker in self.workers])
            for worker in [worker for worker in self.workers if worker.connection in ready]:
                kind, value = worker.hear()
                getattr(self, f"_on_{kind}")(worker, value)

    def _on_log(self, worker: _Process, record: logging.LogRecord) -> None:
        logging.getLogger(record.name).handle(record)

    def _on_error(self, worker: _Process, error: BuilderError) -> None:
        raise error  # the user's mistake or a full disk: the same for every worker

    def _on_ready(self, worker: _Process, value: None) -> None:
        self.failed_loads[worker.number] = 0
        self._next(worker)

    def _on_batch(self, worker: _Process, images: int) -> None:
        worker.unit_images += images
        self.report.batch(images)

    def _on_done(self, worker: _Process, replaced: int) -> None:
        assert worker.unit is not None
        self.report.done(worker.unit, replaced)
        self._next(worker)

    def _on_failed(self, worker: _Process, reason: str) -> None:
        self._take_back(worker, reason)
        self._next(worker)

    def _on_died(self, worker: _Process, reason: str) -> None:
        self.workers.remove(worker)
        worker.stop()
        if worker.unit is None:
            log.error("%s before it could work", reason)
            self.failed_loads[worker.number] += 1
        else:
            self._take_back(worker, reason)
        if self.queue and self.failed_loads[worker.number] < MAX_FAILURES:
            self.start(worker.number)
        elif self.queue and not self.workers:
            raise BuilderError(
                f"workers die while loading: {reason}", "the run's log has their last words; try fewer --workers"
            )

    def _next(self, worker: _Process) -> None:
        if self.queue:
            worker.give(self.queue.popleft())
            return
        self.workers.remove(worker)
        worker.give(None)
        worker.process.join()
        worker.connection.close()

    def _take_back(self, worker: _Process, reason: str) -> None:
        """The unit that a worker could not make goes back into the queue, or is given up."""
        unit, worker.unit = worker.unit, None
        assert unit is not None
        log.error("unit %d: %s", unit.number, reason)
        self.report.batch(-worker.unit_images)
        self.failures[unit.number] += 1
        if self.failures[unit.number] < MAX_FAILURES:
            self.queue.appendleft(unit)
        else:
            self.report.failed(unit, reason)


class _ToParent(QueueHandler):
    """Hands log records to the parent, which has the run's log file."""

    def enqueue(self, record: logging.LogRecord) -> None:
        self.queue.send(("log", record))  # type: ignore[attr-defined]


def _leave_with_parent() -> None:
    """End this process at once when its parent was killed: while it loads, works or commits, all of which is safe."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(spec: JobSpec, number: int, connection: Connection) -> None:
    """A worker process: load once, then a unit at a time until None comes or the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the parent, which stops its workers
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    logging.basicConfig(handlers=[_ToParent(connection)], level=logging.INFO)  # type: ignore[arg-type]
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
                connection.send(("failed", traceback.format_exc()))
    except BuilderError as error:
        connection.send(("error", error))
    except (EOFError, BrokenPipeError):
        os._exit(1)  # the parent is gone, see _leave_with_parent
    except Exception:
        log.exception("worker %d cannot load", number)
        os._exit(1)

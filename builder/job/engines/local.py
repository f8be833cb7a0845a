"""The engine of one machine: a persistent worker process per device, units handed out one at a time.

The parent knows which unit each worker holds, so a worker that dies (out of memory, kill -9) is started again and its
unit goes back into the queue; a unit that fails three times is given up and the rest goes on.
"""

from __future__ import annotations

import logging
import multiprocessing.context
import os
import signal
import sys
import threading
import traceback
from collections import Counter, deque
from collections.abc import Sequence
from contextlib import suppress
from logging.handlers import QueueHandler
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any

from builder.errors import BuilderError
from builder.job import stopping
from builder.job.devices import device_kind, prepare
from builder.job.engines import Load, Report, load_worker
from builder.job.failures import MAX_FAILURES
from builder.job.plan import Unit
from builder.job.presence import Presence
from builder.job.spec import JobSpec

log = logging.getLogger(__name__)
INTERRUPTS = signal.SIGINT, signal.SIGTERM
Context = multiprocessing.context.SpawnContext | multiprocessing.context.ForkServerContext


def run(
    spec: JobSpec, units: Sequence[Unit], workers: int, report: Report, *, load: Load = load_worker
) -> None:  # fmt: skip
    """Run `units` on `workers` processes. However this ends, no worker is left behind."""
    pool = _Pool(spec, units, report, load)
    try:
        for number in range(min(workers, len(units))):
            pool.start(number)
        pool.serve()
    finally:
        pool.stop()


def context_of(device: str) -> Context:
    """How workers for devices of this kind are started.

    On the CPU by a fork server, which loads torch and diffusers once for all of them: seconds of a core and hundreds
    of MB, which each would need again. CUDA does not survive a fork, and an optional package may begin it while it is
    loaded; macOS' own libraries don't survive one either. There each worker starts anew.
    """
    if device != "cpu" or sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["builder.job.engines.preload"])
    # A terminal and SLURM send their signals to every process of a job. The server, which inherits this mask, has to
    # outlive them: workers finish what they have in hand, and only it hears how they end. It leaves with its last user.
    resource_tracker.ensure_running()  # the server's start sees to it, and would lift the mask
    before = signal.pthread_sigmask(signal.SIG_BLOCK, INTERRUPTS)
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return context


class _Process:
    """A worker process, the pipe to it, and the unit it holds."""

    def __init__(self, spec: JobSpec, number: int, load: Load, context: Context) -> None:
        self.number = number
        self.unit: Unit | None = None
        self.unit_images = 0
        self.connection, theirs = context.Pipe()
        words = spec, number, theirs, load, dict(os.environ)  # a fork server knows the variables of its own start only
        self.process = context.Process(target=_work, args=words, daemon=True)
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
        self.process.kill()  # it does not hear SIGTERM; the commit allows it anywhere
        self.process.join()
        self.connection.close()


class _Pool:
    """The workers that live, the units that nobody holds, and how often each failed."""

    def __init__(self, spec: JobSpec, units: Sequence[Unit], report: Report, load: Load) -> None:
        self.spec, self.report, self.load = spec, report, load
        self.queue = deque(units)
        self.workers: list[_Process] = []
        self.failures: Counter[int] = Counter()  # by unit
        self.failed_loads: Counter[int] = Counter()  # by worker, in a row
        self.context = context_of(device_kind())

    def start(self, number: int) -> None:
        self.workers.append(_Process(self.spec, number, self.load, self.context))

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
        if not self.queue or stopping.asked():
            return
        if self.failed_loads[worker.number] < MAX_FAILURES:
            self.start(worker.number)
        elif not self.workers:
            raise BuilderError(
                f"workers die while loading: {reason}", "the run's log has their last words; try fewer --workers"
            )

    def _next(self, worker: _Process) -> None:
        if self.queue and not stopping.asked():
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


def _work(spec: JobSpec, number: int, connection: Connection, load: Load, environ: dict[str, str]) -> None:
    """A worker process: load once, then a unit at a time until None comes or the parent is gone."""
    os.environ.clear()
    os.environ.update(environ)
    for interrupt in INTERRUPTS:  # a terminal and SLURM send them to every process of the job; the parent
        signal.signal(interrupt, signal.SIG_IGN)  # hears them, too, and stops its workers in its own time
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    logging.basicConfig(handlers=[_ToParent(connection)], level=logging.INFO)  # type: ignore[arg-type]
    try:
        device = prepare(number)
        worker = load(spec, device)
        with Presence(spec.dataset, f"worker {number}", device) as presence:
            connection.send(("ready", None))
            while (unit := connection.recv()) is not None:
                try:
                    with presence.making(unit, lambda images: connection.send(("batch", images))) as on_batch:
                        replaced = worker.make(unit, on_batch)
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

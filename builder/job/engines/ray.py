"""The engine of a Ray cluster: an actor per GPU (per core where the cluster has none), for as long as there is work.

The driver holds the queue. It looks at the cluster again and again: a new node gets actors, the unit of a lost one goes
to another. A unit that fails three times is given up. Nodes must see the output root, the checkpoint and the real crops
under the same paths, and have this package in their environment.
"""

from __future__ import annotations

import logging
import signal
import socket
import time
import traceback
from collections import Counter, deque
from collections.abc import Sequence
from typing import Any

from builder.errors import BuilderError
from builder.job import stopping
from builder.job.engines import Load, Maker, Report, load_worker
from builder.job.failures import MAX_FAILURES
from builder.job.plan import Unit
from builder.job.presence import Presence
from builder.job.spec import JobSpec

LOOK = 2.0  # s between two looks at the cluster
LOST = 600.0  # s without a single living worker, and the job ends: the cluster is gone
CONNECT = 5.0  # s that an address may take to answer

log = logging.getLogger(__name__)


def run(
    spec: JobSpec, units: Sequence[Unit], workers: int, report: Report, *, address: str = "auto",
    load: Load = load_worker,
) -> None:  # fmt: skip
    """Run `units` on the cluster at `address`, on at most `workers` actors (0: as many as there are devices)."""
    cluster = connect(address)
    try:
        pool = _Pool(cluster, spec, units, workers, report, load)
        try:
            pool.serve()
        finally:
            pool.stop()
    finally:
        cluster.shutdown()


def connect(address: str) -> Any:
    """The module `ray`, connected; BuilderError when it is not installed, or nothing answers at `address`."""
    try:
        import ray
    except ImportError:
        raise BuilderError("Ray is not installed", "pip install 'builder[ray]' here and on every node") from None
    remedy = "start a cluster (`ray start --head`), or give its HOST:PORT with --address"
    host, colon, port = address.rpartition(":")
    if colon and port.isdigit():  # Ray itself would try for minutes
        try:
            socket.create_connection((host.rpartition("/")[2], int(port)), CONNECT).close()
        except (OSError, OverflowError) as error:
            raise BuilderError(f"no Ray cluster answers at '{address}': {error}", remedy) from None
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        ray.init(address=address, log_to_driver=False, configure_logging=False, ignore_reinit_error=True)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise BuilderError(f"no Ray cluster at '{address}': {error}", remedy) from None
    finally:
        for number, handler in handlers.items():  # Ray puts its own there, which would end the driver at once
            signal.signal(number, handler)
    return ray


class _Actor:
    """What runs on a node: loads once, then makes a unit a call. It raises nothing: errors arrive as they are."""

    def __init__(self, spec: JobSpec, number: int, load: Load) -> None:
        self.spec, self.number, self.load_worker = spec, number, load
        self.worker: Maker | None = None

    def load(self) -> tuple[str, Any]:
        from builder.job.devices import prepare

        try:
            device = prepare(0)  # Ray shows an actor its own GPU only
            self.worker = self.load_worker(self.spec, device)
            self.presence = Presence(self.spec.dataset, f"actor {self.number}", device)
            self.presence.__enter__()
        except BuilderError as error:
            return "error", error
        except Exception:
            return "failed", traceback.format_exc()
        return "ready", None

    def make(self, unit: Unit) -> tuple[str, Any]:
        assert self.worker is not None
        try:
            with self.presence.making(unit, lambda images: None) as on_batch:
                return "done", self.worker.make(unit, on_batch)
        except BuilderError as error:
            return "error", error
        except Exception:
            return "failed", traceback.format_exc()

    def leave(self) -> None:
        if self.worker is not None:
            self.presence.__exit__()


class _Pool:
    """The actors that live or are asked for, each with the call it is busy with, and the units that nobody holds."""

    def __init__(
        self, ray: Any, spec: JobSpec, units: Sequence[Unit], workers: int, report: Report, load: Load
    ) -> None:  # fmt: skip
        self.ray, self.spec, self.workers, self.report, self.load = ray, spec, workers, report, load
        self.queue = deque(units)
        self.busy: dict[Any, tuple[Any, Unit | None]] = {}  # call -> its actor, and the unit; None: it is loading
        self.failures: Counter[int] = Counter()  # by unit
        self.failed_loads = 0  # in a row
        self.started = 0
        self.alive_at = time.monotonic()
        self.looked_at = -LOOK
        kind = "GPU" if ray.cluster_resources().get("GPU") else "CPU"
        self.kind, options = kind, {"num_gpus": 1} if kind == "GPU" else {"num_cpus": 1}
        self.remote = ray.remote(**options, max_restarts=0, max_task_retries=0)(_Actor)

    def serve(self) -> None:
        """Hand out units until each is done or given up, or the process is told to end and nothing is in hand."""
        while self.queue or any(unit is not None for _, unit in self.busy.values()):
            if stopping.asked():
                self.queue.clear()
            else:
                self._grow()
            ready, _ = self.ray.wait(list(self.busy), num_returns=1, timeout=LOOK) if self.busy else ([], None)
            for call in ready:
                self._hear(call, *self.busy.pop(call))
            if not ready:
                self._require_life()

    def stop(self) -> None:
        for actor, _ in self.busy.values():
            self.ray.kill(actor)

    def _grow(self) -> None:
        """Ask for as many actors as the cluster has devices now, or units need."""
        if time.monotonic() - self.looked_at < LOOK:
            return
        self.looked_at = time.monotonic()
        there = int(self.ray.cluster_resources().get(self.kind, 0))
        held = sum(unit is not None for _, unit in self.busy.values())
        wanted = min(self.workers or there, there, len(self.queue) + held)
        while len(self.busy) < wanted:
            actor = self.remote.remote(self.spec, self.started, self.load)
            self.busy[actor.load.remote()] = actor, None
            self.started += 1

    def _hear(self, call: Any, actor: Any, unit: Unit | None) -> None:
        try:
            kind, value = self.ray.get(call)
        except self.ray.exceptions.RayError as error:  # the actor, or its node, is no more
            kind, value = "died", f"{type(error).__name__}: {str(error).splitlines()[0]}"
            self.ray.kill(actor)  # if it is only out of reach, it must not come back: the unit goes to another
        if kind == "error":
            raise value  # the user's mistake or a full disk: the same for every worker
        if unit is None and kind != "ready":
            self._on_failed_load(str(value))
            return
        self.alive_at = time.monotonic()
        self.failed_loads = 0
        if unit is not None and kind == "done":
            self.report.batch(len(unit))
            self.report.done(unit, value)
        elif unit is not None:
            self._take_back(unit, str(value))
        if kind != "died":
            self._next(actor)

    def _next(self, actor: Any) -> None:
        if self.queue:
            unit = self.queue.popleft()
            self.busy[actor.make.remote(unit)] = actor, unit
            return
        try:
            self.ray.get(actor.leave.remote(), timeout=CONNECT)
        except self.ray.exceptions.RayError as error:
            log.info("an actor that had no more to do did not say good-bye: %s", error)
        self.ray.kill(actor)

    def _take_back(self, unit: Unit, reason: str) -> None:
        """The unit that an actor could not make goes back into the queue, or is given up."""
        log.error("unit %d: %s", unit.number, reason)
        self.failures[unit.number] += 1
        if self.failures[unit.number] < MAX_FAILURES:
            self.queue.appendleft(unit)
        else:
            self.report.failed(unit, reason)

    def _on_failed_load(self, reason: str) -> None:
        log.error("an actor could not load: %s", reason)
        self.failed_loads += 1
        if self.failed_loads >= MAX_FAILURES:
            raise BuilderError(
                f"Ray actors die while loading: {reason.strip().splitlines()[-1]}",
                "every node needs this package, and must see the checkpoint and the output root; the log says more",
            )

    def _require_life(self) -> None:
        """Lost nodes may come back, or others take their place; but not for ever."""
        if any(unit is not None for _, unit in self.busy.values()):
            self.alive_at = time.monotonic()
        elif time.monotonic() - self.alive_at > LOST:
            raise BuilderError(
                f"the Ray cluster has had no working node for {LOST / 60:.0f} minutes",
                "look at `ray status`; the same command continues",
            )

"""Where a worker's time goes: one unit of the job with its stages on the clock."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from builder.job import worker as job
from builder.job.plan import Unit

STAGES = ("denoise", "decode", "score", "encode", "write")
PART = "- "  # before the name of a scorer, whose time is part of "score"
IDLE = "idle"


class Clock:
    """Wall and CPU seconds by stage, over all threads."""

    def __init__(self, device: torch.device | None = None) -> None:
        self.wall: dict[str, float] = defaultdict(float)
        self.cpu: dict[str, float] = defaultdict(float)
        self._device = device
        self._lock = threading.Lock()

    def timed(self, stage: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """`call`, whose time counts towards `stage`; on a GPU until the device is through with it."""

        def clocked(*args: Any, **keywords: Any) -> Any:
            wall, cpu = time.perf_counter(), time.thread_time()
            try:
                result = call(*args, **keywords)
                if self._device is not None and self._device.type == "cuda":
                    torch.cuda.current_stream(self._device).synchronize()
                return result
            finally:
                with self._lock:
                    self.wall[stage] += time.perf_counter() - wall
                    self.cpu[stage] += time.thread_time() - cpu

        return clocked


@dataclass(frozen=True)
class Stages:
    """Seconds of one unit of `images`, by stage; stages overlap where the worker has threads.

    `idle`: of a device with threads beside it, the time in which it neither denoised nor decoded; of a CPU worker, what
    is in no stage. `parts`: the scorers', which make up "score".
    """

    images: int
    replaced: int
    seconds: float
    cpu_seconds: float
    wall: dict[str, float]
    cpu: dict[str, float]
    parts: list[str] = field(default_factory=list)

    def share(self, stage: str) -> float:
        return self.wall[stage] / self.seconds

    def table(self) -> list[tuple[str, ...]]:
        """Rows: stage, ms an image, CPU ms an image, share of the unit's time."""
        order = [*STAGES[:3], *self.parts, *STAGES[3:], IDLE]
        rows = [(stage, self.wall[stage], self.cpu.get(stage, 0.0)) for stage in order]
        rows.append(("unit", self.seconds, self.cpu_seconds))
        return [
            (stage, f"{1000 * wall / self.images:.2f}", f"{1000 * cpu / self.images:.2f}", f"{wall / self.seconds:.1%}")
            for stage, wall, cpu in rows
        ]


COLUMNS = ("stage", "ms/image", "CPU ms/image", "share")


def measure_unit(worker: job.Worker, unit: Unit) -> Stages:
    """Let a worker make one unit, and say where the time went. The unit is committed, as in the job."""
    clock = Clock(worker.sampler.device)
    cpu, wall = time.process_time(), time.perf_counter()
    with _watched(worker, clock):
        replaced = worker.make(unit, lambda images: None)
    seconds, cpu_seconds = time.perf_counter() - wall, time.process_time() - cpu
    spent = {stage: clock.wall[stage] for stage in STAGES}
    overlapped = worker.sampler.device.type != "cpu"
    busy = spent["denoise"] + spent["decode"] if overlapped else sum(spent.values())
    parts = sorted(stage for stage in clock.wall if stage.startswith(PART))
    times = {**spent, **{part: clock.wall[part] for part in parts}, IDLE: max(seconds - busy, 0.0)}
    return Stages(len(unit), replaced, seconds, cpu_seconds, times, dict(clock.cpu), parts)


@contextmanager
def _watched(worker: job.Worker, clock: Clock) -> Iterator[None]:
    """Put the steps on the clock where the worker looks them up."""
    steps: list[tuple[str, Any, str]] = [
        ("denoise", worker.sampler, "_denoise"),
        ("decode", worker.sampler, "_decode"),
        ("score", worker.scorer, "score"),
        ("encode", job, "encode_png"),
        ("write", job, "write_shard"),
    ]
    steps += [(f"{PART}{type(scorer).__name__}", scorer, "score") for scorer in worker.scorer.scores]
    before = [(owner, name, vars(owner).get(name)) for _, owner, name in steps]
    for stage, owner, name in steps:
        setattr(owner, name, clock.timed(stage, getattr(owner, name)))
    try:
        yield
    finally:
        for owner, name, had in before:
            setattr(owner, name, had) if had is not None else delattr(owner, name)

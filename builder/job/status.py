"""How far a job is: read from its dataset's folder, from any machine that sees it. Asks nobody, disturbs nobody."""

from __future__ import annotations

import secrets
from contextlib import suppress
from dataclasses import dataclass, field

from builder.errors import BuilderError
from builder.job.failures import Failures
from builder.job.pending import all_units, committed_units
from builder.job.presence import GONE, Sign, died_here, signs, workers_folder
from builder.shards.dataset import Dataset


@dataclass(frozen=True)
class WorkerStatus:
    """A worker's last sign, how many seconds ago it was (None where the file system gives no times), if it lives."""

    sign: Sign
    age: float | None
    alive: bool

    @property
    def rate(self) -> float:
        """Images/s while it made units."""
        return self.sign.images / self.sign.seconds if self.sign.seconds > 0 else 0.0


@dataclass(frozen=True)
class Status:
    """Units and images of a job; `failed`: unit -> reason. Units that live workers hold are `in_hand`."""

    complete: bool
    units: int
    done: int
    images: int
    images_done: int
    failed: dict[int, str]
    workers: list[WorkerStatus] = field(default_factory=list)

    @property
    def in_hand(self) -> int:
        return len({worker.sign.unit for worker in self.workers if worker.alive and worker.sign.unit is not None})

    @property
    def pending(self) -> int:
        return self.units - self.done - len(self.failed) - self.in_hand

    @property
    def rate(self) -> float:
        """Images/s of all workers that are alive."""
        return sum(worker.rate for worker in self.workers if worker.alive)

    @property
    def seconds_left(self) -> float | None:
        """At the rate of now; None while nobody works, or has finished a batch."""
        return (self.images - self.images_done) / self.rate if self.rate else None


def job_status(dataset: Dataset) -> Status:
    """The status of a batch job's dataset; BuilderError when no batch job made it."""
    info = dataset.info
    if "fingerprint_keys" not in info:
        raise BuilderError(
            f"dataset '{dataset.name}' was not made by a batch job", "see `builder list` for what is there"
        )
    committed = committed_units(dataset)
    count = info.get("planned") or info.get("count") or sum(len(unit) for unit in committed)
    units = all_units(committed, count, info["fingerprint_keys"]["images_per_shard"])
    done = {unit.number for unit in committed}
    return Status(
        complete=info["state"] == "complete",
        units=len(units),
        done=len(done),
        images=sum(len(unit) for unit in units),
        images_done=sum(len(unit) for unit in committed),
        failed={number: reason for number, reason in Failures(dataset).all().items() if number not in done},
        workers=_workers(dataset),
    )


def _workers(dataset: Dataset) -> list[WorkerStatus]:
    """Every worker that left a sign, by label. Ages are differences of times of one file system, whatever its clock."""
    found = signs(dataset)
    now = _time_there(dataset) if found else None
    workers = []
    for worker, sign in found.items():
        written = _modified(dataset, f"{workers_folder(dataset)}/{worker}.json") if now is not None else None
        age = max(0.0, now - written) if now is not None and written is not None else None
        gone = sign.left or died_here(sign.process) or (age is not None and age > GONE)
        workers.append(WorkerStatus(sign, age, not gone))
    return sorted(workers, key=lambda worker: (not worker.alive, worker.sign.label))


def _time_there(dataset: Dataset) -> float | None:
    """What the file system that holds the dataset calls now; None where it cannot be written to."""
    probe = f"manifests/{dataset.name}/job/now-{secrets.token_hex(8)}"
    try:
        dataset.storage.create(probe, b"")
        return _modified(dataset, probe)
    except OSError:
        return None
    finally:
        with suppress(OSError):
            dataset.storage.remove(probe)


def _modified(dataset: Dataset, path: str) -> float | None:
    """When a file was written, in seconds of its own file system's clock."""
    try:
        return float(dataset.storage.fs.modified(dataset.storage.path(path)).timestamp())
    except (OSError, NotImplementedError):
        return None

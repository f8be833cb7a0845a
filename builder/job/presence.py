"""Signs of life: each worker keeps one small file in the dataset, which its peers and `builder status` read.

manifests/NAME/job/workers/ID.json is written anew every BEAT seconds with a higher `beat`. No clock is compared: who
watches a worker measures, by its own monotonic clock, how long `beat` has stayed the same.
"""

from __future__ import annotations

import json
import logging
import os
import re
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from builder.job.plan import Unit
from builder.shards.dataset import Dataset

BEAT = 10.0  # s between signs of life
GONE = 60.0  # s without one, and a worker is taken for dead; well above a pause of a loaded file server
STUCK = 7200.0  # s without a batch of the unit in hand, and a worker gives no more signs: its peers take it for dead

log = logging.getLogger(__name__)


@dataclass
class Sign:
    """What a worker says of itself; `seconds` is the time it spent on units, `process` names it on its machine."""

    label: str
    device: str = ""
    job: str = ""
    process: str = ""
    beat: int = 0
    unit: int | None = None
    units: int = 0
    images: int = 0
    seconds: float = 0.0
    left: bool = False


def workers_folder(dataset: Dataset) -> str:
    return f"manifests/{dataset.name}/job/workers"


def read_sign(dataset: Dataset, worker: str) -> Sign | None:
    """The last sign of the worker with this id; None when there is none, or one that cannot be read."""
    return _sign(read_json(dataset, f"{workers_folder(dataset)}/{worker}.json"))


def signs(dataset: Dataset) -> dict[str, Sign]:
    """The last signs of all workers, by id."""
    found = {
        name[:-5]: read_sign(dataset, name[:-5]) for name in dataset.storage.list(workers_folder(dataset), ".json")
    }
    return {worker: sign for worker, sign in found.items() if sign is not None}


def read_json(dataset: Dataset, path: str) -> dict[str, Any] | None:
    """A small file of the job's; None when it is not there, or damaged: nothing here is worth a failure."""
    try:
        data = json.loads(dataset.storage.read(path))
    except (FileNotFoundError, ValueError):
        return None
    return data if isinstance(data, dict) else None


def _sign(data: dict[str, Any] | None) -> Sign | None:
    try:
        return None if data is None else Sign(**data)
    except TypeError:
        return None


class Presence:
    """This worker's sign of life, for as long as the block lasts; a thread beats."""

    def __init__(
        self, dataset: Dataset, label: str, device: str = "", job: str = "", *,
        beat: float = BEAT, stuck: float = STUCK,
    ) -> None:  # fmt: skip
        self.dataset, self.beat, self.stuck = dataset, beat, stuck
        self.id = f"{re.sub('[^A-Za-z0-9-]', '-', socket.gethostname())[:40]}-{os.getpid()}-{secrets.token_hex(4)}"
        self.sign = Sign(f"{socket.gethostname()} {label}", device, job, process_name(os.getpid()) or "")
        self._since: float | None = None  # when the unit in hand was begun
        self._moved = 0.0  # when it last went on
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> Presence:
        self._write()
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._end.set()
        self._thread.join()
        self.sign.left = True
        self._write()

    @contextmanager
    def making(self, unit: Unit, on_batch: Callable[[int], None]) -> Iterator[Callable[[int], None]]:
        """Around the making of a unit; gives what shall hear of its images in place of `on_batch`."""
        before = self.sign.images

        def heard(images: int) -> None:
            self._moved = time.monotonic()
            self.sign.images += images
            on_batch(images)

        self.sign.unit, self._since = unit.number, time.monotonic()
        self._moved = self._since
        try:
            yield heard
        except BaseException:
            self.sign.images = before  # they are nowhere
            raise
        else:
            self.sign.units += 1
        finally:
            self.sign.seconds += time.monotonic() - self._since
            self.sign.unit = self._since = None

    def _beat(self) -> None:
        while not self._end.wait(self.beat):
            if self._since is None or time.monotonic() - self._moved < self.stuck:
                self._write()

    def _write(self) -> None:
        self.sign.beat += 1
        since = self._since
        seconds = self.sign.seconds + (time.monotonic() - since if since is not None else 0.0)
        data = json.dumps(asdict(self.sign) | {"seconds": seconds}).encode()
        try:
            self.dataset.storage.write(f"{workers_folder(self.dataset)}/{self.id}.json", data)
        except OSError as error:  # a full disk is told by the shard that does not fit
            log.warning("no sign of life could be written: %s", error)


class Watch:
    """Tells from outside whether workers live, by looking again and again."""

    def __init__(self, dataset: Dataset, gone: float = GONE) -> None:
        self.dataset, self.limit = dataset, gone
        self._seen: dict[str, tuple[int, float]] = {}  # worker -> its last beat, and when we first saw that one

    def gone(self, worker: str) -> bool:
        """Whether a worker left, died on this machine, or has given no sign for too long since our first look."""
        sign = read_sign(self.dataset, worker)
        if sign is None or sign.left or died_here(sign.process):
            return True
        beat, since = self._seen.get(worker, (None, 0.0))
        now = time.monotonic()
        if sign.beat != beat:
            self._seen[worker] = sign.beat, now
            return False
        return now - since > self.limit


def died_here(process: str) -> bool:
    """Whether a process ran on this machine (in this container) and runs no more: known at once, without waiting."""
    machine, _, rest = process.rpartition("/")
    if not machine or machine != _machine():
        return False
    return process_name(int(rest.split("@")[0])) != process


def process_name(pid: int) -> str | None:
    """'machine/pid@start' of a living process; None when it does not live, or the system does not say (no /proc).

    The start, in ticks since boot, tells it from a later process with the same number.
    """
    with suppress(OSError, IndexError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        if fields[0] != "Z" and (machine := _machine()):
            return f"{machine}/{pid}@{fields[19]}"
    return None


@cache
def _machine() -> str:
    """The boot and the process numbering of this machine or container; empty when the system does not say."""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}:{os.stat('/proc/self/ns/pid').st_ino}"
    return ""

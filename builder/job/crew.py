"""Whether a process runs its job alone or as one of many ranks, and what has to be done once for all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from builder.errors import BuilderError
from builder.job.claims import Claims
from builder.job.launch import Place
from builder.job.presence import Presence, Sign, died_here, signs, workers_folder
from builder.shards.dataset import Dataset
from builder.shards.lock import exclusive, shared

POLL = 1.0  # s between two looks at what peers do


class Alone:
    """A process with a dataset to itself."""

    place = Place()

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def once(self, name: str, is_done: Callable[[], bool], make: Callable[[], None]) -> None:
        """Run `make`: there is nobody who could have."""
        make()

    def require_no_other_job(self, why: str) -> None:
        """There is none."""

    def tidy(self) -> None:
        """Remove what killed processes were writing, and what they noted."""
        for folder in (f"shards/{self.dataset.name}", f"manifests/{self.dataset.name}"):
            self.dataset.storage.sweep(folder)
        self.dataset.storage.remove(f"manifests/{self.dataset.name}/job")


class Together:
    """A rank among peers: other processes, on any machine, that run the same job, now or later."""

    def __init__(self, dataset: Dataset, place: Place, presence: Presence, claims: Claims, poll: float = POLL) -> None:
        self.dataset, self.place, self.presence, self.claims, self.poll = dataset, place, presence, claims, poll

    def once(self, name: str, is_done: Callable[[], bool], make: Callable[[], None]) -> None:
        """Return when `make` was run, by this rank or, as `is_done` tells, by a peer.

        Who claims `name` runs it; the others wait, and one of them takes over when that one dies.
        """
        while not is_done():
            if self.claims.take(name) is None:
                time.sleep(self.poll)
                continue
            try:
                if not is_done():
                    make()
            finally:
                self.claims.release(name)

    def require_no_other_job(self, why: str) -> None:
        """BuilderError (`why`) when a worker of another job is alive: waits until each gave a sign, or was silent."""
        others = {worker: sign.beat for worker, sign in self._others().items()}
        while others:
            for worker, sign in self._others().items():
                if sign.beat != others.get(worker, -1) and not sign.left:
                    raise BuilderError(
                        f"{why}, and {sign.label} is at work on it",
                        "give all ranks the same command; or wait for them, stop them, or choose another --name",
                    )
            others = {worker: beat for worker, beat in others.items() if not self.claims.watch.gone(worker)}
            if others:
                time.sleep(self.poll)

    def tidy(self) -> None:
        """Remove the signs of workers that are known to be gone. Of what peers may be writing nothing is touched."""
        for worker, sign in signs(self.dataset).items():
            if sign.left or died_here(sign.process):
                self.dataset.storage.remove(f"{workers_folder(self.dataset)}/{worker}.json")

    def _others(self) -> dict[str, Sign]:
        """Signs of the workers that run another job than this one."""
        mine = self.presence.sign.job
        return {worker: sign for worker, sign in signs(self.dataset).items() if sign.job != mine}


@contextmanager
def alone(dataset: Dataset) -> Iterator[Alone]:
    """Hold the dataset; BuilderError when another process does."""
    with exclusive(dataset):
        yield Alone(dataset)


@contextmanager
def together(dataset: Dataset, place: Place, job: str, device: str) -> Iterator[Together]:
    """Join the ranks that work on the dataset. `job` names what is made: ranks of one job agree in it."""
    with shared(dataset), Presence(dataset, f"rank {place.rank} of {place.world}", device, job) as presence:
        yield Together(dataset, place, presence, Claims(dataset, presence))

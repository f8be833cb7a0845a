"""Claims: which rank makes which unit. They save work and guard nothing: what two make, the commit decides.

A claim is a file that is created exclusively (manifests/NAME/job/claims/WHAT.json) and names its owner. It is as alive
as its owner (job.presence), so it expires without a clock that two machines would have to share. Who finds a claim
expired removes it and makes its own; where two do that at once, both may work on the unit: rare, and harmless.
"""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass

from builder.job.presence import GONE, Presence, Watch, read_json
from builder.shards.dataset import Dataset


@dataclass(frozen=True)
class Claim:
    """What is claimed, and how many workers have had it one after the other, this one included, and died."""

    name: str
    tries: int


class Claims:
    """The claims of one rank."""

    def __init__(self, dataset: Dataset, presence: Presence, gone: float = GONE) -> None:
        self.dataset, self.presence = dataset, presence
        self.watch = Watch(dataset, gone)
        folder = f"manifests/{dataset.name}/job/claims"
        self._folder = folder
        # A death before we came is no unit's fault that we know of: the whole job may have been killed.
        self._before = {name: read_json(dataset, f"{folder}/{name}") for name in dataset.storage.list(folder, ".json")}

    def take(self, name: str) -> Claim | None:
        """Claim `name`; None when a living peer has it."""
        path = self._path(name)
        tries = 1
        if self.dataset.storage.exists(path):
            held = read_json(self.dataset, path)
            if held is not None:
                if held["owner"] != self.presence.id and not self.watch.gone(held["owner"]):
                    return None
                if held != self._before.get(f"{name}.json"):
                    tries += held["tries"]
                if read_json(self.dataset, path) != held:  # a peer was faster
                    return None
            self._remove(path)
        data = json.dumps({"owner": self.presence.id, "tries": tries}).encode()
        return Claim(name, tries) if self.dataset.storage.create(path, data) else None

    def release(self, name: str) -> None:
        """Give a claim up, unless a peer has taken it over meanwhile."""
        held = read_json(self.dataset, self._path(name))
        if held is not None and held["owner"] == self.presence.id:
            self._remove(self._path(name))

    def _path(self, name: str) -> str:
        return f"{self._folder}/{name}.json"

    def _remove(self, path: str) -> None:
        with suppress(FileNotFoundError):
            self.dataset.storage.remove(path)

"""Units that were given up, recorded in the dataset, so that other ranks and `builder status` see them."""

from __future__ import annotations

import json
import re
import secrets
from typing import Any

from builder.job.plan import Unit
from builder.job.presence import read_json
from builder.shards.dataset import Dataset
from builder.shards.writer import shard_name

MAX_FAILURES = 3  # of a unit before it is given up; of a worker to load, in a row, before it is not started again


class Failures:
    """The records of one dataset: manifests/NAME/job/failed/shard-NNNNNN.json.

    Those that were there when a run began are none of its own: the same command again tries every unit once more.
    """

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset
        self._folder = f"manifests/{dataset.name}/job/failed"
        self._before = self._all()

    def record(self, unit: Unit, reason: str) -> None:
        data = {"unit": unit.number, "images": len(unit), "reason": reason, "record": secrets.token_hex(8)}
        self.dataset.storage.write(self._path(unit.number), json.dumps(data, indent=1).encode() + b"\n")

    def clear(self, unit: Unit) -> None:
        """The unit was made after all."""
        if unit.number in self._before:
            self.dataset.storage.remove(self._path(unit.number))

    def of_this_run(self, unit: Unit) -> str | None:
        """Why a unit was given up since this run began, by whomever; None when it was not."""
        data = read_json(self.dataset, self._path(unit.number))
        return None if data is None or data == self._before.get(unit.number) else str(data.get("reason"))

    def all(self) -> dict[int, str]:
        """Unit -> reason, of every record."""
        return {number: str(data["reason"]) for number, data in self._all().items()}

    def _all(self) -> dict[int, dict[str, Any]]:
        names = [n for n in self.dataset.storage.list(self._folder, ".json") if re.fullmatch(r"shard-\d{6,}\.json", n)]
        read = {int(name[6:-5]): read_json(self.dataset, f"{self._folder}/{name}") for name in names}
        return {number: data for number, data in read.items() if data is not None and "reason" in data}

    def _path(self, number: int) -> str:
        return f"{self._folder}/{shard_name(number)}.json"

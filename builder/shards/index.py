"""The index of a dataset: one Parquet over its many small manifests, so that a column of all of them is one read.

It only saves reading. manifests/NAME/index.parquet holds the manifests' rows in order, in row groups of whole shards;
its footer says of each shard what its manifest looked like (size and stamp: time of writing or the store's checksum).
A shard whose manifest looks otherwise now is not taken from the index, and one that is not there any more neither.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from builder.shards.storage import Storage

INDEX = "index.parquet"
SHARDS = b"builder.shards"  # key in the footer's metadata: a JSON list of entries

Stamps = dict[str, tuple[int, str]]  # as Storage.stamps


@dataclass(frozen=True)
class Entry:
    """One shard in the index: how its manifest looked, where its rows are, what rode in its schema metadata."""

    number: int
    size: int
    stamp: str
    group: int
    start: int  # row within the group
    rows: int
    metadata: dict[str, str]


class Index:
    """An opened index. `number in index` says whether the shard's rows there are those of its manifest as it is now."""

    def __init__(self, file: pq.ParquetFile, stamps: Stamps) -> None:
        self._file = file
        entries = [Entry(**entry) for entry in json.loads(file.metadata.metadata[SHARDS])]
        self.covers = len(entries)
        self._entries = {
            entry.number: entry
            for entry in entries
            if stamps.get(f"shard-{entry.number:06d}.parquet") == (entry.size, entry.stamp)
        }
        self._read: tuple[int, tuple[str, ...] | None, pa.Table] | None = None

    def __contains__(self, number: int) -> bool:
        return number in self._entries

    def __len__(self) -> int:
        """Shards that are in step."""
        return len(self._entries)

    def whole(self, columns: tuple[str, ...] | None) -> pa.Table:
        """The rows of all shards in order, in one reading."""
        return self._file.read(list(columns) if columns is not None else None, use_threads=False)

    def metadata(self, number: int) -> dict[str, str]:
        return self._entries[number].metadata

    def table(self, number: int, columns: tuple[str, ...] | None) -> pa.Table:
        """The rows of a shard, as its manifest has them; fast when shards are asked for in order."""
        entry = self._entries[number]
        if self._read is None or self._read[:2] != (entry.group, columns):
            self._read = None  # the last group goes before the next one comes
            chosen = list(columns) if columns is not None else None
            self._read = entry.group, columns, self._file.read_row_group(entry.group, chosen, use_threads=False)
        return self._read[2].slice(entry.start, entry.rows).replace_schema_metadata(entry.metadata)


def open_index(storage: Storage, name: str, stamps: Stamps) -> Index | None:
    """The index of dataset `name`, seen against the manifests' stamps; None when there is none, or it is damaged."""
    if INDEX not in stamps:
        return None
    try:
        return Index(pq.ParquetFile(storage.open(f"manifests/{name}/{INDEX}")), stamps)
    except (pa.ArrowException, OSError, ValueError, TypeError, KeyError):
        return None


def footer(entries: list[Entry]) -> dict[bytes, bytes]:
    """What the footer's metadata says of the shards."""
    listed: list[dict[str, Any]] = [asdict(entry) for entry in entries]
    return {SHARDS: json.dumps(listed, separators=(",", ":")).encode()}

"""The index of a dataset: one Parquet over its many small manifests, so that a column of all of them is one read.

It only saves reading. manifests/NAME/index.parquet holds the manifests' rows in order, in row groups of whole shards;
its footer says of each shard what its manifest looked like (size and stamp: time of writing or the store's checksum).
A shard whose manifest looks otherwise now is not taken from the index, and one that is not there any more neither.

An index may be large, so that not all of it is read to check it. Its footer is sealed as shards.sealed says, but over
the footer alone; in it stands the SHA-256 of every column chunk (a column of a row group), and those chunks that are
read are checked. An index that is damaged is not used.
"""

from __future__ import annotations

import hashlib
import io
import json
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from builder.documents import parse_json
from builder.errors import BuilderError
from builder.shards.received import ManifestError, checked, read_parquet
from builder.shards.sealed import DIGEST_LENGTH, FILE_KEY, MARK, SEAL_KEY, UNSET, DamagedError
from builder.shards.storage import Storage

INDEX = "index.parquet"
SHARDS = b"builder.shards"  # key in the footer's metadata: a JSON list of entries
CHUNKS = b"builder.chunks"  # key in the footer's metadata: the digests of the column chunks, group by group
END = 8  # bytes after the footer: its length, and PAR1

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

    def __init__(self, chunks: _Chunks, stamps: Stamps) -> None:
        self._chunks = chunks
        entries = _entries(chunks.footer)
        self.covers = len(entries)
        self._metadatas: dict[int, list[dict[str, str]]] = {}  # by row group, also of shards that are not in step
        for entry in entries:
            self._metadatas.setdefault(entry.group, []).append(entry.metadata)
        self._entries = {
            entry.number: entry
            for entry in entries
            if stamps.get(f"shard-{entry.number:06d}.parquet") == (entry.size, entry.stamp)
        }
        self._read: tuple[int, tuple[str, ...] | None, pa.Table | None] | None = None

    def __contains__(self, number: int) -> bool:
        return number in self._entries

    def __len__(self) -> int:
        """Shards that are in step."""
        return len(self._entries)

    def whole(self, columns: tuple[str, ...] | None) -> pa.Table | None:
        """The rows of all shards in order, in one reading; None when what has to be read is damaged."""
        return self._sound(range(self._chunks.footer.num_row_groups), columns)

    def metadata(self, number: int) -> dict[str, str]:
        return self._entries[number].metadata

    def table(self, number: int, columns: tuple[str, ...] | None) -> pa.Table | None:
        """The rows of a shard, as its manifest has them; fast when shards are asked for in order.

        None when what has to be read of the index is damaged.
        """
        entry = self._entries[number]
        if self._read is None or self._read[:2] != (entry.group, columns):
            self._read = None  # the last group goes before the next one comes
            self._read = entry.group, columns, self._sound([entry.group], columns)
        group = self._read[2]
        if group is None or entry.start + entry.rows > group.num_rows:
            return None
        return group.slice(entry.start, entry.rows).replace_schema_metadata(entry.metadata)

    def _sound(self, groups: Sequence[int], columns: tuple[str, ...] | None) -> pa.Table | None:
        """The rows of row groups; None when they are damaged or not as the schema says: the manifests say how."""
        table = self._chunks.read(groups, columns)
        metadatas = [metadata for group in groups for metadata in self._metadatas.get(group, [])]
        try:
            return None if table is None else checked(table, metadatas, columns)
        except (ManifestError, pa.ArrowException):
            return None

    def findings(self) -> list[str]:
        """What is damaged in all of it, one line each; for `builder verify`."""
        groups = range(self._chunks.footer.num_row_groups)
        return [
            f"the rows of group {group} are damaged" for group in groups if self._chunks.read([group], None) is None
        ]

    @property
    def is_sealed(self) -> bool:
        return self._chunks.digests is not None


def open_index(storage: Storage, name: str, stamps: Stamps) -> Index | None:
    """The index of dataset `name`, seen against the manifests' stamps; None when there is none, or it is damaged."""
    if INDEX not in stamps:
        return None
    try:
        return Index(_Chunks(storage, f"manifests/{name}/{INDEX}", stamps[INDEX][0]), stamps)
    except (pa.ArrowException, OSError, ValueError, TypeError, KeyError, BuilderError):
        return None


def _entries(footer: pq.FileMetaData) -> list[Entry]:
    """What the footer says of the shards. BuilderError, KeyError, TypeError or ValueError when it is damaged."""
    entries = [Entry(**entry) for entry in parse_json((footer.metadata or {})[SHARDS], INDEX)]
    for entry in entries:
        numbers = (entry.number, entry.size, entry.group, entry.start, entry.rows)
        sound = all(type(number) is int and number >= 0 for number in numbers) and entry.group < footer.num_row_groups
        if not sound or type(entry.metadata) is not dict or {*map(type, entry.metadata.values())} - {str}:
            raise ValueError(f"an entry of the index is {entry}")
    return entries


def footer(entries: list[Entry], chunks: int) -> dict[bytes, bytes]:
    """What the footer's metadata says: the shards, and room for the digests of `chunks` column chunks and the seal."""
    listed: list[dict[str, Any]] = [asdict(entry) for entry in entries]
    return {
        SHARDS: json.dumps(listed, separators=(",", ":")).encode(),
        CHUNKS: b"-" * (DIGEST_LENGTH * chunks),
        FILE_KEY: INDEX.encode(),
        SEAL_KEY: UNSET,
    }


def seal_index(path: Path) -> None:
    """Put the digests of all column chunks, and then that of the footer, into the room that `footer` left for them."""
    with open(path, "r+b") as file:
        metadata = pq.read_metadata(file)
        digests = b""
        for group in range(metadata.num_row_groups):
            for column in range(metadata.num_columns):
                start, size = _range(metadata, group, column)
                file.seek(start)
                digests += hashlib.sha256(file.read(size)).hexdigest().encode()
        length = metadata.serialized_size
        file.seek(-length - END, io.SEEK_END)
        start = file.tell()
        tail = bytearray(file.read())
        room = tail.index(b"-" * len(digests)) if digests else 0
        tail[room : room + len(digests)] = digests
        place = tail.rindex(MARK) + len(MARK)
        tail[place : place + DIGEST_LENGTH] = hashlib.sha256(tail).hexdigest().encode()
        file.seek(start)
        file.write(tail)


class _Chunks:
    """An index file of which only the column chunks that are asked for are read, and each of those is checked."""

    def __init__(self, storage: Storage, path: str, size: int) -> None:
        self._storage, self._path, self._size = storage, path, size
        end = storage.read(path, size - END, END)
        length = int.from_bytes(end[:4], "little")
        if end[4:] != b"PAR1" or not 0 < length <= size - END - 4:
            raise DamagedError("it does not end as a Parquet file does")
        tail = storage.read(path, size - END - length, length + END)
        sealed = _require_footer(tail)
        self.footer = pq.read_metadata(io.BytesIO(b"PAR1" + tail))
        self.digests = self.footer.metadata[CHUNKS] if sealed else None
        self._columns = [self.footer.schema.column(place).path for place in range(self.footer.num_columns)]

    def read(self, groups: Sequence[int], columns: tuple[str, ...] | None) -> pa.Table | None:
        """The rows of row groups; None when a chunk of them is damaged."""
        wanted = [
            place for place, path in enumerate(self._columns) if columns is None or path.partition(".")[0] in columns
        ]
        try:
            pieces = {}
            for group in groups:
                for place in wanted:
                    start, size = _range(self.footer, group, place)
                    pieces[start] = self._checked(group, place, self._storage.read(self._path, start, size))

            def opened(texts: list[str]) -> pq.ParquetFile:
                return pq.ParquetFile(
                    pa.PythonFile(_Pieces(pieces, self._size), mode="r"),
                    metadata=self.footer,
                    read_dictionary=texts,
                    pre_buffer=False,  # else it would read what lies between the chunks, too
                    page_checksum_verification=True,
                )

            table = read_parquet(opened, columns, groups)
        except (pa.ArrowException, OSError, ValueError):
            return None
        return table.replace_schema_metadata()

    def _checked(self, group: int, place: int, data: bytes) -> bytes:
        if self.digests is not None:
            at = DIGEST_LENGTH * (group * len(self._columns) + place)
            if hashlib.sha256(data).hexdigest().encode() != self.digests[at : at + DIGEST_LENGTH]:
                raise DamagedError(f"the column {self._columns[place]} of group {group} is damaged")
        return data


class _Pieces(io.RawIOBase):
    """A file of which only some pieces are there; reading beside them is an OSError."""

    def __init__(self, pieces: dict[int, bytes], size: int) -> None:
        self._pieces, self._starts, self._size, self._at = pieces, sorted(pieces), size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = base + offset
        return self._at

    def read(self, size: int = -1) -> bytes:
        place = bisect_right(self._starts, self._at) - 1
        start = self._starts[place] if place >= 0 else 0
        piece = self._pieces.get(start, b"")
        inside = self._at - start
        if size < 0 or inside + size > len(piece):
            raise OSError(f"bytes {self._at} to {self._at + size} of the index were not read before")
        self._at += size
        return piece[inside : inside + size]


def _require_footer(tail: bytes) -> bool:
    """Whether a footer (with what follows it) is sealed. DamagedError when it is, and is not as it was."""
    at = tail.rfind(MARK)
    if at < 0:
        if CHUNKS in tail or FILE_KEY in tail:
            raise DamagedError("the seal of its footer is damaged")
        return False
    place = at + len(MARK)
    unset = tail[:place] + UNSET + tail[place + DIGEST_LENGTH :]
    if hashlib.sha256(unset).hexdigest().encode() != tail[place : place + DIGEST_LENGTH]:
        raise DamagedError("its footer is not what its seal (SHA-256) says")
    return True


def _range(metadata: pq.FileMetaData, group: int, column: int) -> tuple[int, int]:
    """Start and length in bytes of a column chunk."""
    chunk = metadata.row_group(group).column(column)
    start = chunk.data_page_offset
    if chunk.has_dictionary_page:
        start = min(start, chunk.dictionary_page_offset)
    return start, chunk.total_compressed_size

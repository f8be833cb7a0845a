"""Stream reading: the samples of a source one after another, as they stand in the tars, behind a shuffle buffer.

A pass goes through all tars in an order of its own. The samples in that order are cut into equal stretches, one for
each reader (world x workers); so a tar is shared out by sample number where a stretch ends inside it, or where there
are fewer tars than readers, and with fewer samples than readers these take turns from pass to pass. Within a stretch a
sample comes at most `buffer` places later than it stands.

All of this follows from (key, pass), so where a reader stands is two numbers, and from there it goes on in just the
order in which it would have. What it does not need before its place is not read, neither whole tars nor the first part
of one.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from builder.errors import BuilderError
from builder.mixing.schedule import keyed_integer, keyed_shuffle
from builder.mixing.sources import Source
from builder.shards.foreign import IMAGES, split_name
from builder.shards.sequential import Sequential
from builder.shards.tars import BLOCK, TarError, read_members

BUFFER = 1000  # samples, encoded; of each source in each reader
FINE = 20  # bits of a displacement below one place

Position = tuple[int, int]  # pass, and how many samples of its stretch a reader has given
Stretch = list[tuple[int, int, int]]  # tar, first place in it, the place after the last


def buffered_shuffle(count: int, buffer: int, *key: object) -> np.ndarray:
    """A permutation of 0..count-1 (int32) that a buffer of `buffer` samples can make; depends on `key` alone.

    Each place is put off by a random length below `buffer`. So what is waiting at any time lies within `buffer` places.
    """
    raw = np.random.PCG64(keyed_integer(*key)).random_raw(count)
    late = (raw >> np.uint64(64 - FINE)).astype(np.int64) * buffer
    return np.argsort((np.arange(count) << FINE) + late, kind="stable").astype(np.int32)


class Layout:
    """Where the samples of a source lie. Places 0, 1, ... are its rows by tar and offset; 4 bytes a sample.

    Only what the source lists counts: of a view, or a split, what else is in the tars is passed over.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self.rows = np.lexsort((source.offset, source.shard)).astype(np.int32)
        counts = np.bincount(source.shard, minlength=len(source.shards))
        self.bounds = np.concatenate([[0], np.cumsum(counts)])  # int64 [tars + 1]: the places of each tar

    def stretch(self, turn: int, number: int, readers: int, key: tuple[object, ...]) -> Stretch:
        """What the reader `number` of `readers` reads in pass `turn`; empty if there are fewer samples than readers."""
        tars = keyed_shuffle(len(self.bounds) - 1, *key, "tars", turn)
        sizes = np.diff(self.bounds)[tars]
        ends = np.cumsum(sizes)
        slot = (number + turn) % readers
        start, stop = (len(self.rows) * edge // readers for edge in (slot, slot + 1))
        return [
            (
                int(tar),
                int(self.bounds[tar] + max(0, start - end + size)),
                int(self.bounds[tar + 1] - max(0, end - stop)),
            )
            for tar, size, end in zip(tars, sizes, ends, strict=True)
            if max(start, end - size) < min(stop, end)
        ]

    def images(self, tar: int, start: int, stop: int) -> Iterator[tuple[int, bytes | BuilderError]]:
        """Place and encoded image of the places [start, stop) of a tar, read forwards.

        What can't be read is a BuilderError in its place, naming tar and key; after it the tar is opened anew.
        """
        place = start
        while place < stop:
            try:
                for payload in self._members(tar, place, stop):
                    yield place, payload
                    place += 1
            except (TarError, EOFError, OSError, BuilderError) as error:
                why = error.what if isinstance(error, BuilderError) else str(error)
                yield place, self.source.unreadable(int(self.rows[place]), why)
                place += 1

    def _members(self, tar: int, start: int, stop: int) -> Iterator[bytes]:
        """The encoded images of the places [start, stop)."""
        source, rows = self.source, self.rows[start:stop]
        keys = source.keys.take(pa.array(rows)).to_pylist()
        first = self._header(tar, start)
        end = int(source.offset[rows[-1]]) + int(source.size[rows[-1]])
        with Sequential(source.storage, source.shards[tar], first, end) as file:
            members = read_members(file, end, start=first, unique=False)
            for row, key in zip(rows.tolist(), keys, strict=True):
                found = next((member for member in members if _image_key(member.name) == key), None)
                if found is None or (found.offset, found.size) != (source.offset[row], source.size[row]):
                    raise TarError("it is not at its place in the tar")
                yield found.read()

    def _header(self, tar: int, place: int) -> int:
        """A byte of the tar where a header begins, before the image at `place` and after the one before it."""
        if place == self.bounds[tar]:
            return 0
        row = self.rows[place - 1]
        return -(-(int(self.source.offset[row]) + int(self.source.size[row])) // BLOCK) * BLOCK


def _image_key(name: str) -> str | None:
    """The key of the sample whose image a member is; None for other members."""
    key, suffix = split_name(name)
    return key if suffix.lower() in IMAGES else None


class Reader:
    """One of `readers` that read a source together, without end: rows with their encoded images.

    In each pass the readers together give every sample once. `key` makes the order. Not to be shared by processes.
    """

    def __init__(
        self, layout: Layout, number: int, readers: int, key: tuple[object, ...], buffer: int = BUFFER
    ) -> None:
        self._layout, self._number, self._readers, self._key, self._buffer = layout, number, readers, key, buffer
        self._begin(0, 0)

    @property
    def position(self) -> Position:
        """Where it stands: what `seek` goes on from."""
        return self._turn, self._given

    def seek(self, position: Position) -> None:
        """Go to a position that a reader of this key and number, among as many, has stood at."""
        if position != self.position:
            self._begin(*position)

    def __iter__(self) -> Reader:
        return self

    def __next__(self) -> tuple[int, bytes | BuilderError]:
        while self._given == len(self._order):
            self._begin(self._turn + 1, 0)
        index = int(self._order[self._given])
        while index not in self._waiting:
            at, payload = next(self._stream)
            self._waiting[at] = payload
        self._given += 1
        return int(self._layout.rows[self._places[index]]), self._waiting.pop(index)

    def _begin(self, turn: int, given: int) -> None:
        self._turn, self._given = turn, given
        self._stretch = self._layout.stretch(turn, self._number, self._readers, self._key)
        parts = [np.arange(first, last) for _, first, last in self._stretch]
        self._places = np.concatenate([np.empty(0, np.int64), *parts])
        self._order = buffered_shuffle(len(self._places), self._buffer, *self._key, "buffer", turn, self._number)
        self._waiting: dict[int, bytes | BuilderError] = {}
        self._stream = self._read(given)

    def _read(self, given: int) -> Iterator[tuple[int, bytes | BuilderError]]:
        """Index in the stretch, and image, of all that is left when `given` are given."""
        if given == len(self._order):
            return
        first = int(self._order[given:].min())
        before = set(self._order[:given][self._order[:given] > first].tolist())
        begin = 0  # index of a tar's first place
        for tar, start, stop in self._stretch:
            if begin + stop - start > first:
                for place, payload in self._layout.images(tar, start + max(0, first - begin), stop):
                    if begin + place - start not in before:
                        yield begin + place - start, payload
            begin += stop - start

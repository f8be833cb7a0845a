"""Which sample stands where: a pure function of (seed, epoch, position), without state and without replay.

Positions 0, 1, 2, ... of an epoch are shared out by quota: first between real and synthetic, then among the synthetic
sources, then among the classes of a source. How many ranks read, and in what batches, changes nothing of it: a batch
is a range of positions, so every rank's batch keeps the ratio.

- Origins and sources: in every prefix of every epoch, counts are within one sample of their target (of synthetic
  sources: their share of the synthetic samples so far).
- Classes: the class sequence of a source runs on from epoch to epoch, so that rare classes get their share however
  short an epoch is; in every prefix of that sequence, counts are within one sample of their target.
- Samples: an epoch takes the next stretch of a fixed circle through the samples of a class, in an order shuffled anew
  for each epoch and each time round. So within a class, repeats differ by at most one in every epoch, and since the
  start; what fills the last step of an epoch up to whole batches is not counted in the stretch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from builder.mixing.quota import Quota


def keyed_integer(*key: object) -> int:
    """A 63-bit integer that depends on `key` (numbers and texts) alone: the seed of a random generator."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "little") >> 1


def keyed_shuffle(count: int, *key: object) -> np.ndarray:
    """A permutation of 0..count-1 (int32) that depends on `key` alone, whatever the version of numpy.

    The numbers of PCG64 are ranked; numpy promises its raw stream for good, but not what `permutation` makes of it.
    """
    raw = np.random.PCG64(keyed_integer(*key)).random_raw(count)
    return np.argsort(raw, kind="stable").astype(np.int32)


class Stream:
    """The samples of one source in the order of their use: class by quota, then sample by shuffled circle.

    `members[c]` are the rows (int [n_c]) of class c, `weights[c]` its share (whole number, 0 where n_c is 0).
    """

    def __init__(self, members: Sequence[np.ndarray], weights: Sequence[int], key: tuple[object, ...]) -> None:
        self.key = key
        self.quota = Quota(weights)
        self.circles = [rows[keyed_shuffle(len(rows), *key, c)].astype(np.int32) for c, rows in enumerate(members)]
        self.count = sum(len(circle) for circle in self.circles)
        self._window = (-1, -1)  # epoch and draws that what is kept below belongs to
        self._starts = self._quotas = np.zeros(len(self.circles), np.int64)
        self._shuffles: dict[tuple[int, int], np.ndarray] = {}

    def rows(self, epoch: int, drawn: int, indices: np.ndarray) -> np.ndarray:
        """The rows (int64 [n]) that are the `indices`-th (int64 [n]) drawn in an epoch which draws `drawn` in all."""
        if self._window != (epoch, drawn):
            self._window = (epoch, drawn)
            self._starts, self._quotas = self.quota.counts(epoch * drawn), self.classes(epoch, drawn)
            self._shuffles.clear()
        classes, ranks = self.quota.at(epoch * drawn + indices)
        places = ranks - self._starts[classes]
        result = np.empty(len(indices), np.int64)
        for c in np.unique(classes):
            circle = self.circles[c]
            rounds, within = np.divmod(places[classes == c], len(circle))
            chosen = np.empty(len(rounds), np.int64)
            for turn in np.unique(rounds):
                shuffle = self._shuffle(epoch, int(c), int(turn))
                chosen[rounds == turn] = circle[(self._starts[c] + shuffle[within[rounds == turn]]) % len(circle)]
            result[classes == c] = chosen
        return result

    def classes(self, epoch: int, drawn: int) -> np.ndarray:
        """How many samples of each class (int64 [classes]) an epoch draws that draws `drawn` in all."""
        return self.quota.counts((epoch + 1) * drawn) - self.quota.counts(epoch * drawn)

    def _shuffle(self, epoch: int, c: int, turn: int) -> np.ndarray:
        """The order of the `turn`-th time round the circle: where the quota ends inside it, its part comes first."""
        if (c, turn) not in self._shuffles:
            count = len(self.circles[c])
            whole, part = divmod(int(self._quotas[c]), count)
            key = (*self.key, c, epoch, turn)
            if turn == whole and part:
                rest = part + keyed_shuffle(count - part, *key, "rest")
                self._shuffles[c, turn] = np.concatenate([keyed_shuffle(part, *key), rest])
            else:
                self._shuffles[c, turn] = keyed_shuffle(count, *key)
        return self._shuffles[c, turn]


class Mix:
    """Real and synthetic streams at a ratio. Stream 0 is the real one, 1, 2, ... the synthetic ones.

    `ratio` is the synthetic share (0-1), `weights` shares out the synthetic streams, `length` is the number of
    positions of an epoch; None: one pass over the real stream (at ratio 1: over the first synthetic one).
    """

    repeats = True  # past `length` the sequence goes on, so that the last step can be filled

    def __init__(
        self,
        real: Stream | None,
        synthetic: Sequence[Stream],
        weights: Sequence[float],
        ratio: float,
        length: int | None,
        seed: int,
    ) -> None:
        self.seed = seed
        self.streams = [real, *synthetic]
        self._origins = Quota.of([1 - ratio, ratio])
        self._sources = Quota.of(weights if synthetic else [1.0])
        self.length = self._one_pass() if length is None else length
        self.drawn = self._counts(self.length)

    def batch(self, epoch: int, start: int, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Stream and row (both int64 [size]) of the samples at positions [start, start + size), shuffled."""
        streams, indices = self._locate(np.arange(start, start + size))
        rows = np.empty(size, np.int64)
        for number in np.unique(streams):
            stream, chosen = self.streams[number], streams == number
            assert stream is not None  # without a real stream the ratio is 1: its quota is 0
            rows[chosen] = stream.rows(epoch, int(self.drawn[number]), indices[chosen])
        order = keyed_shuffle(size, self.seed, "batch", epoch, start)
        return streams[order], rows[order]

    def _locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        origins, indices = self._origins.at(positions)
        streams = origins.copy()
        synthetic = origins == 1
        sources, indices[synthetic] = self._sources.at(indices[synthetic])
        streams[synthetic] = 1 + sources
        return streams, indices

    def _counts(self, length: int) -> np.ndarray:
        real, synthetic = self._origins.counts(length)
        return np.concatenate([[real], self._sources.counts(int(synthetic))])[: len(self.streams)]

    def _one_pass(self) -> int:
        if self._origins.weights[0]:
            assert self.streams[0] is not None
            return self._origins.position(0, self.streams[0].count - 1) + 1
        first = next(number for number, weight in enumerate(self._sources.weights) if weight)
        stream = self.streams[1 + first]
        assert stream is not None
        return self._sources.position(first, stream.count - 1) + 1


class InOrder:
    """One source from its first row to its last, for evaluation: nothing shuffled, nothing twice."""

    repeats = False

    def __init__(self, count: int) -> None:
        self.length = count
        self.drawn = np.array([count])

    def batch(self, epoch: int, start: int, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Stream (always 0) and row (both int64) of positions [start, start + size), as far as there are any."""
        rows = np.arange(start, min(start + size, self.length))
        return np.zeros(len(rows), np.int64), rows

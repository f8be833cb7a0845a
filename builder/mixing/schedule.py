"""The samples of one source in the order of their use: a pure function of (seed, epoch, place), without replay.

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


class Deck:
    """The samples of one source in the order of their use: class by quota, then sample by shuffled circle.

    `members[c]` are the rows (int [n_c]) of class c, `weights[c]` its share (whole number, 0 where n_c is 0).
    """

    def __init__(self, members: Sequence[np.ndarray], weights: Sequence[int], key: tuple[object, ...]) -> None:
        self.key = key
        self.quota = Quota(weights)
        self.circles = [rows[keyed_shuffle(len(rows), *key, c)].astype(np.int32) for c, rows in enumerate(members)]
        self.count = sum(len(circle) for circle in self.circles)
        self._window = (-1, -1, -1)  # epoch, draws before it and in it, that what is kept below belongs to
        self._starts = self._quotas = np.zeros(len(self.circles), np.int64)
        self._shuffles: dict[tuple[int, int], np.ndarray] = {}

    def rows(self, epoch: int, before: int, drawn: int, indices: np.ndarray) -> np.ndarray:
        """The rows (int64 [n]) that are the `indices`-th (int64 [n]) drawn in an epoch.

        It draws `drawn` in all, and the epochs before it drew `before`.
        """
        if self._window != (epoch, before, drawn):
            self._window = (epoch, before, drawn)
            self._starts, self._quotas = self.quota.counts(before), self.classes(before, drawn)
            self._shuffles.clear()
        classes, ranks = self.quota.at(before + indices)
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

    def classes(self, before: int, drawn: int) -> np.ndarray:
        """How many samples of each class (int64 [classes]) are drawn after `before`, `drawn` in all."""
        return self.quota.counts(before + drawn) - self.quota.counts(before)

    def lasts(self, before: int) -> int:
        """How many can be drawn after `before` until a sample of any class would come again."""
        counts = self.quota.counts(before)
        classes = np.flatnonzero(self.quota.weights)
        return min(self.quota.position(int(c), int(counts[c]) + len(self.circles[c])) - before for c in classes)

    def others(self, row: int, label: int, *key: object) -> np.ndarray:
        """The other rows of the class of `row`, in an order that depends on `key`."""
        circle = self.circles[label]
        shuffled = circle[keyed_shuffle(len(circle), *self.key, *key)]
        return shuffled[shuffled != row]

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


class InOrder:
    """One source from its first row to its last, for evaluation: nothing shuffled, nothing twice."""

    def __init__(self, count: int) -> None:
        self.length = count

    def batch(self, epoch: int, start: int, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Deck (always 0) and row (both int64) of positions [start, start + size), as far as there are any."""
        rows = np.arange(start, min(start + size, self.length))
        return np.zeros(len(rows), np.int64), rows

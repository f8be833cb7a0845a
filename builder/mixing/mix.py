"""Which source stands where: a pure function of (seed, epoch, position), without state and without replay.

Positions 0, 1, 2, ... of an epoch are shared out by quota: first between real and synthetic, then among the synthetic
sources; each source then by its own classes (`schedule.Deck`). How many ranks read, and in what batches, changes
nothing of it: a batch is a range of positions, so every rank's batch keeps the ratio. In every prefix of every epoch,
counts are within one sample of their target (of synthetic sources: their share of the synthetic samples so far).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from builder.errors import BuilderError
from builder.mixing.quota import Quota
from builder.mixing.ratio import RatioSchedule
from builder.mixing.schedule import Deck, keyed_shuffle

Stretches = Sequence[tuple[int | None, Quota]]  # length in positions (the last: None), and the quotas of origins


@dataclass(frozen=True)
class Epoch:
    """What one epoch draws; a stretch is a range of its positions with one ratio."""

    number: int
    step: int  # global steps before it
    length: int  # positions
    edges: np.ndarray  # int64 [stretches]: where each begins
    origins: tuple[Quota, ...]  # real and synthetic within each stretch
    reached: np.ndarray  # int64 [stretches, 2]: real and synthetic drawn in this epoch before each stretch
    before: np.ndarray  # int64 [decks]: drawn in the epochs before
    drawn: np.ndarray  # int64 [decks]
    read: np.ndarray  # int64 [decks]: with what fills the last step


class Mix:
    """Real and synthetic decks at a ratio. Deck 0 is the real one, 1, 2, ... the synthetic ones.

    `weights` shares out the synthetic decks. `length` is the number of positions of an epoch; None: one pass over
    the real deck (where only synthetic samples are drawn: over the first synthetic one). `stride`: positions of a
    global step, at whose multiples a ratio schedule by step changes. With `stop`, an epoch ends with the last whole
    step before any sample would come again; else such a source goes round again, and past its length an epoch goes on,
    so that the last step can be filled.
    """

    def __init__(
        self,
        real: Deck | None,
        synthetic: Sequence[Deck],
        weights: Sequence[float],
        ratio: RatioSchedule,
        length: int | None,
        seed: int,
        *,
        stride: int = 1,
        stop: bool = False,
    ) -> None:
        self.seed, self.ratio, self.length, self.stride, self.stop = seed, ratio, length, stride, stop
        self.decks = [real, *synthetic]
        self._origins = {share: Quota.of([1 - share, share]) for share in set(ratio.shares)}
        self._sources = Quota.of(weights if synthetic else [1.0])
        self._epochs: list[Epoch] = []

    def epoch(self, number: int) -> Epoch:
        """What epoch `number` draws. It follows from the lengths of those before, of which each takes microseconds."""
        while len(self._epochs) <= number:
            self._epochs.append(self._next())
        return self._epochs[number]

    def steps(self, number: int) -> int:
        """Global steps of an epoch."""
        return -(-self.epoch(number).length // self.stride)

    def batch(self, epoch: int, start: int, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Deck and row (both int64 [size]) of the samples at positions [start, start + size), shuffled."""
        plan = self.epoch(epoch)
        decks, indices = self._locate(plan, np.arange(start, start + size))
        rows = np.empty(size, np.int64)
        for number in np.unique(decks):
            deck, chosen = self.decks[number], decks == number
            assert deck is not None  # without a real deck the ratio is 1: its quota is 0
            rows[chosen] = deck.rows(epoch, int(plan.before[number]), int(plan.drawn[number]), indices[chosen])
        order = self._order(epoch, start, size)
        return decks[order], rows[order]

    def sources(self, epoch: int, start: int, size: int) -> np.ndarray:
        """The decks alone (int64 [size]) that `batch` gives, for those who choose the samples themselves."""
        decks, _ = self._locate(self.epoch(epoch), np.arange(start, start + size))
        return decks[self._order(epoch, start, size)]

    def others(self, number: int, row: int, label: int, *key: object) -> np.ndarray:
        """The rows that may stand in for a row of a deck: the others of its class, in an order that `key` makes."""
        deck = self.decks[number]
        assert deck is not None
        return deck.others(row, label, *key)

    def changing(self) -> list[Epoch]:
        """The epochs up to the first after whose start the ratio changes no more."""
        plans = [self.epoch(0)]
        while not self.ratio.is_settled(plans[-1].number, plans[-1].step):
            plans.append(self.epoch(plans[-1].number + 1))
        return plans

    @property
    def weights(self) -> list[int]:
        """Of the synthetic decks among each other, as whole numbers."""
        return [int(weight) for weight in self._sources.weights]

    def _order(self, epoch: int, start: int, size: int) -> np.ndarray:
        return keyed_shuffle(size, self.seed, "batch", epoch, start)

    def _locate(self, plan: Epoch, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        decks, indices = np.empty(len(positions), np.int64), np.empty(len(positions), np.int64)
        stretches = np.searchsorted(plan.edges, positions, side="right") - 1
        for stretch in np.unique(stretches):
            chosen = stretches == stretch
            origins, ranks = plan.origins[stretch].at(positions[chosen] - plan.edges[stretch])
            decks[chosen], indices[chosen] = origins, ranks + plan.reached[stretch, origins]
        synthetic = decks == 1
        begin = int(plan.before[1:].sum())  # the synthetic sources' quota runs on, as their classes' do
        sources, ranks = self._sources.at(begin + indices[synthetic])
        indices[synthetic] = ranks - plan.before[1 + sources]
        decks[synthetic] = 1 + sources
        return decks, indices

    # -- epochs -----------------------------------------------------------------------------------------------------

    def _next(self) -> Epoch:
        last = self._epochs[-1] if self._epochs else None
        number = 0 if last is None else last.number + 1
        step = 0 if last is None else last.step + self.steps(last.number)
        before = np.zeros(len(self.decks), np.int64) if last is None else last.before + last.drawn
        stretches = [
            (None if steps is None else steps * self.stride, self._origins[share])
            for steps, share in self.ratio.stretches(number, step)
        ]
        length = self._one_pass(stretches, before) if self.length is None else self.length
        if self.stop:
            length = min([length, *self._ends(stretches, before)]) // self.stride * self.stride
            if not length:
                raise BuilderError(
                    f"a source runs out within the first step of epoch {number}, which takes {self.stride} samples",
                    "choose a smaller batch size, or exhausted='cycle'",
                )
        edges = np.cumsum([0, *(stretch or 0 for stretch, _ in stretches[:-1])])
        counts = [quota.counts(stretch or 0) for stretch, quota in stretches[:-1]]
        reached = np.cumsum([np.zeros(2, np.int64), *counts], axis=0)
        return Epoch(
            number, step, length, edges, tuple(quota for _, quota in stretches), reached, before,
            self._counts(stretches, length, before),
            self._counts(stretches, -(-length // self.stride) * self.stride, before),
        )  # fmt: skip

    def _counts(self, stretches: Stretches, length: int, before: np.ndarray) -> np.ndarray:
        """How many of each deck (int64 [decks]) stand among the first `length` positions."""
        origins = np.zeros(2, np.int64)
        for stretch, quota in stretches:
            here = length if stretch is None else min(length, stretch)
            origins += quota.counts(here)
            length -= here
        synthetic = self._sources.counts(int(before[1:].sum() + origins[1]))[: len(before) - 1] - before[1:]
        return np.concatenate([origins[:1], synthetic])

    def _one_pass(self, stretches: Stretches, before: np.ndarray) -> int:
        if self.decks[0] is not None:
            position = _position(stretches, 0, self.decks[0].count - 1)
            if position is not None:
                return position + 1
        first = int(np.flatnonzero(self._sources.weights)[0])
        deck = self.decks[1 + first]
        assert deck is not None
        index = self._sources.position(first, int(before[1 + first]) + deck.count - 1) - int(before[1:].sum())
        position = _position(stretches, 1, index)
        assert position is not None  # no end of real samples, then one of synthetic ones
        return position + 1

    def _ends(self, stretches: Stretches, before: np.ndarray) -> list[int]:
        """Where each deck would repeat a sample, as far as it comes to that."""
        ends = []
        for number, deck in enumerate(self.decks):
            if deck is None or (number and not self._sources.weights[number - 1]):
                continue
            index = deck.lasts(int(before[number]))
            if number:
                index = self._sources.position(number - 1, int(before[number]) + index) - int(before[1:].sum())
            ends.append(_position(stretches, min(number, 1), index))
        return [end for end in ends if end is not None]


def _position(stretches: Stretches, origin: int, index: int) -> int | None:
    """Where the `index`-th sample (0-based) of an origin stands in an epoch; None when it never comes."""
    start = 0
    for stretch, quota in stretches:
        if quota.weights[origin]:
            place = quota.position(origin, index)
            if stretch is None or place < stretch:
                return start + place
        if stretch is not None:
            index -= int(quota.counts(stretch)[origin])
            start += stretch
    return None

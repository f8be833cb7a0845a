"""`for images, labels, origin in MixedLoader(...)`: batches of real and synthetic samples at an exact ratio."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from builder.errors import BuilderError
from builder.mixing.batches import Assembly, Batch, Batches, Requests, Transform, unchanged, wanted
from builder.mixing.first_batches import FirstBatches
from builder.mixing.mix import Mix
from builder.mixing.mixture import Reference, Wish, listed, mixture
from builder.mixing.options import group_place, one_of, place, whole
from builder.mixing.ratio import UNITS
from builder.mixing.schedule import keyed_integer, keyed_shuffle
from builder.mixing.slots import AHEAD, Slots
from builder.mixing.stream import BUFFER, Cursor, StreamBatch, StreamBatches
from builder.shards.lineage import SPLITS

COLLATE = ("tuple", "dict", "numpy")
MAX_REPEATS = 10  # in an epoch; a classifier soon knows by heart what it sees more often
END = object()


class MixedLoader:
    """Batches `(images, labels, origin)` of real and synthetic samples, decoded and resized in the same way.

    images: [B, 3, H, W], uint8 (0-255) or float32 (0-1); labels: int64 [B], index in the class table; origin: uint8
    [B], 0 real, 1 synthetic.

    real, synthetic: a dataset's name under `out`, a path to it, or a Dataset; synthetic may be a list of them,
        shared out by `weights` (default: by their sizes). Filtered views are datasets like any other.
    held_out: further real datasets that the classifier will be judged on: no synthetic dataset may come from a
        generator that saw any of their patients, as of the val and test patients of `real`.
    ratio: synthetic share of a batch, 0-1 (default: 0.25 with synthetic data, else 0; at 0 none is opened). If
        ratio x batch_size is whole, every batch of every rank has exactly that many; else counts are rounded so that
        they add up. A table makes a schedule: {0: 1.0, 10: 0.0} is synthetic first, then real only. It counts in
        epochs, or with `ratio_unit="step"` in the loader's steps since epoch 0.
    counts: instead of ratio, weights and batch_size: the samples of each source in a batch, real first: (24, 6, 2).
    size: side of the square images in px; None when all stored images have one size.
    split: "train" mixes; "val" and "test" give the real samples of the split alone, in order, each once over all ranks.
    classes: share of the classes within each source: "natural" (as it has them), "match_real" (as the real data has
        them), "balance" (equal).
    epoch: "real": one pass over the real data (where only synthetic data is drawn: over its first dataset); or a number
        of samples, real and synthetic on all ranks. All ranks make the same number of steps.
    exhausted: what happens when an epoch asks for more of a source than it has. "cycle": it starts again, in another
        order; the last step is filled up with repeats (`filled` says how many). "stop": the epoch ends with the last
        whole step before any sample would come again. The ratio holds either way.
    max_repeats: warns when a sample is drawn more often than this in an epoch, and names its class; None: never.
    transform: called with each image, uint8 [3, H, W]; torch's random numbers in it depend on seed, epoch and place
        (those of random and numpy on seed, rank and worker). A table {"real": ..., "synthetic": ...} for one each.
    collate: "tuple"; "dict" (images, labels, origin, keys); "numpy": the tuple as arrays with images [B, H, W, 3],
        as TensorFlow takes them.
    reading: "indexed": random access into the tars, a shuffle of the whole source. "stream": the tars are read
        forwards, behind a shuffle buffer of `buffer` samples of each source in each worker: for object stores and huge
        sets. The ratio in every batch is as exact, and each pass of a source has every sample once; but passes begin
        at no epoch's start, a batch's classes are as they come, and order and state belong to rank, world and workers
        (see mixing.stream). Validation and test are always read by index.
    on_error: "raise", when an image cannot be read; or "skip": another sample of its source and class stands in (in
        evaluation it is left out), a warning names it, and `skipped` counts.
    workers: processes that read ahead; by index, batches are the same whatever their number. pin_memory: as in
        DataLoader.
    rank, world: of this process; default: from torch.distributed, or the launcher's environment, else a single one.
        Validation is shared out, too: with rank=0, world=1 one process reads all of it.
    allow_leak: the reason to use synthetic data that held-out patients may have leaked into.
    partial: take datasets that are not complete.

    Each iteration is the next epoch, also after one that was broken off; `set_epoch` sets it. One at a time: a new
    iteration ends those before. It shares out the samples to the ranks itself: accelerate's `prepare` and Lightning
    take it as it is (accelerate doesn't move its batches to the device). BuilderError: what cannot be mixed.
    """

    def __init__(
        self,
        real: Reference | None = None,
        synthetic: Reference | Sequence[Reference] | None = None,
        *,
        ratio: float | Mapping[int, float] | None = None,
        ratio_unit: str = "epoch",
        counts: Sequence[int] | None = None,
        weights: Sequence[float] | None = None,
        batch_size: int = 32,
        size: int | None = None,
        out: str = ".",
        split: str = "train",
        classes: str = "natural",
        epoch: str | int = "real",
        held_out: Reference | Sequence[Reference] | None = None,
        exhausted: str = "cycle",
        max_repeats: int | None = MAX_REPEATS,
        seed: int = 0,
        workers: int = 0,
        pin_memory: bool = False,
        transform: Transform | Mapping[str, Transform] | None = None,
        dtype: str = "uint8",
        collate: str = "tuple",
        reading: str = "indexed",
        buffer: int = BUFFER,
        on_error: str = "raise",
        rank: int | None = None,
        world: int | None = None,
        allow_leak: str | None = None,
        partial: bool = False,
    ) -> None:
        one_of(split, SPLITS, "split")
        one_of(ratio_unit, UNITS, "ratio_unit")
        one_of(classes, ("natural", "match_real", "balance"), "classes")
        one_of(exhausted, ("cycle", "stop"), "exhausted")
        one_of(dtype, ("uint8", "float32"), "dtype")
        one_of(collate, COLLATE, "collate")
        one_of(reading, ("indexed", "stream"), "reading")
        one_of(on_error, ("raise", "skip"), "on_error")
        size = None if size is None else whole(size, "size")
        epoch = epoch if epoch == "real" else whole(epoch, "epoch")
        max_repeats = None if max_repeats is None else whole(max_repeats, "max_repeats")
        seed, buffer = whole(seed, "seed", 0), whole(buffer, "buffer")
        self.rank, self.world = place(rank, world)
        self._told_place = rank is not None
        mixed = mixture(
            Wish(
                real=real, held_out=listed(held_out), synthetic=listed(synthetic), ratio=ratio, ratio_unit=ratio_unit,
                counts=None if counts is None else list(counts), weights=weights, size=size, out=out, split=split,
                batch_size=whole(batch_size, "batch_size"), classes=classes, epoch=epoch,
                exhausted=exhausted, seed=seed, world=self.world, allow_leak=allow_leak, partial=partial,
            )
        )  # fmt: skip
        self.sources, self.schedule, self.classes = mixed.sources, mixed.schedule, mixed.classes
        self.ratio, self.batch_size = mixed.ratio, mixed.batch_size
        self.split, self.class_mode, self.seed, self.collate = split, classes, seed, collate
        self.length, self.exhausted, self.max_repeats = epoch, exhausted, max_repeats
        self.skipped: Counter[str] = Counter()  # how often each key could not be read
        self.epoch = 0
        self._step = 0  # the next one
        self._offset = 0  # position where step 0 begins; not 0 only after a restore from another world or batch size
        self._begun = 0  # iterations
        self._restored = self._asked = False  # restored, or set; and then asked by set_epoch for the epoch restored
        self._first_batches = FirstBatches(judge_range=isinstance(transform, Mapping))
        self._requests = Requests()
        assembly, skip = Assembly(transform, dtype, seed), on_error == "skip"
        self._cursor: Cursor | None = None  # of streams: where the readers stand
        if reading == "stream" and isinstance(self.schedule, Mix):
            if exhausted == "stop":
                raise BuilderError(
                    "exhausted='stop' needs passes that begin with the epoch", 'pass reading="indexed", or "cycle"'
                )
            streamed = StreamBatches(
                self.sources, self.schedule.sources, size, assembly, seed=seed, rank=self.rank, world=self.world,
                workers=workers, buffer=buffer, skip=skip, classes=classes,
            )  # fmt: skip
            self._cursor = Cursor(streamed)
        indexed = Batches(self.sources, self.schedule, size, assembly, skip=skip)
        width, height = (size, size) if size else mixed.drawn[0].dimensions[2:]
        room = self.batch_size * 3 * height * width * (4 if dtype == "float32" else 1)
        self._slots = Slots(streamed if self._cursor else indexed, workers, room, pin_memory=pin_memory)
        self._loader = DataLoader(
            self._slots,
            batch_size=None,
            sampler=self._requests,
            collate_fn=unchanged,
            num_workers=workers,
            prefetch_factor=AHEAD if workers else None,
            persistent_workers=workers > 0,
            pin_memory=pin_memory,
            # Seeds the workers' random and numpy; without one each epoch would draw from the caller's random numbers.
            generator=torch.Generator().manual_seed(keyed_integer(seed, "workers", self.rank)),
        )
        self._available = {
            number: np.bincount(source.labels, minlength=len(self.classes))
            for number, source in enumerate(self.sources)
            if source is not None
        }
        self._warn_of_repeats()

    # -- the epoch ------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        """Steps of the current epoch; in training the same on every rank."""
        ahead = 0 if isinstance(self.schedule, Mix) else self.rank * self.batch_size
        return max(0, math.ceil((self._positions - self._offset - ahead) / self._stride))

    @property
    def filled(self) -> int:
        """Samples beyond the epoch that fill up its last step, over all ranks: fewer than world x batch_size."""
        if not isinstance(self.schedule, Mix):
            return 0
        return max(0, len(self) * self._stride - (self._positions - self._offset))

    def __iter__(self) -> Iterator[Any]:
        self._begun += 1
        mine = self._begun
        self._check_group()
        # A state saved after the last batch goes on with the next epoch, unless this one was asked for: then nothing of
        # it is left.
        over = 0 < len(self) <= self._step and not self._asked
        if over or not self._restored:
            self._go_to(self.epoch + (self._step > 0))
        self._restored = self._asked = False
        first = self._step
        starts = [self._start(step) for step in range(first, len(self))]
        to_come = wanted(self.epoch, starts, self.batch_size, self._loader.num_workers)
        self._requests.waiting = self._cursor.requests(to_come) if self._cursor else to_come
        for step, batch in enumerate(self._received(mine), first):
            if isinstance(batch, BuilderError):
                # Not `batch` itself: that would tie frame and loader into a cycle.
                raise BuilderError(batch.what, batch.remedy)
            self._look_at(batch)
            self._step = step + 1
            if self._cursor:
                self._cursor.seen(batch)
            if len(batch.labels):  # in evaluation all of a batch may be left out
                yield self._shaped(batch)
        self._go_to(self.epoch + 1)

    def _received(self, mine: int) -> Iterator[Any]:
        """What the workers make, as long as no other iteration has begun: it would take the batches of that one."""
        items = iter(self._loader)
        while mine == self._begun:
            item = next(items, END)
            if item is END:
                return
            if item is not None:
                yield self._slots.received(item)
        raise BuilderError("another iteration of this loader has begun", "make a loader for each")

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of `epoch` (0 or more); nothing changes when a restored state stands in it already."""
        epoch = whole(epoch, "epoch", 0)
        self._asked = epoch == self.epoch and self._restored
        if not self._asked:
            self._go_to(epoch)

    def _go_to(self, epoch: int) -> None:
        self.epoch, self._step, self._offset, self._restored = epoch, 0, 0, False

    def _check_group(self) -> None:
        group = None if self._told_place else group_place()
        if group is not None and group != (self.rank, self.world):
            raise BuilderError(
                f"this loader was made as rank {self.rank} of {self.world}, the process group has rank {group[0]} of "
                f"{group[1]}",
                "make it when the group is there (Lightning: in train_dataloader()), or pass rank= and world=",
            )

    def keys(self, step: int, epoch: int | None = None) -> list[str]:
        """The keys of this rank's batch at `step` of `epoch` (default: the current one), in order; reads no image."""
        if self._cursor:
            raise BuilderError("a stream's keys are known when they come", 'pass collate="dict", which gives them')
        epoch = self.epoch if epoch is None else epoch
        picked = self.schedule.batch(epoch, self._start(step, epoch), self.batch_size)
        sources = self.sources
        return [sources[number].keys[int(row)].as_py() for number, row in zip(*picked, strict=True)]

    def _look_at(self, batch: Batch | StreamBatch) -> None:
        for key in batch.skipped:
            if key not in self.skipped:
                warnings.warn(f"the image {key} cannot be read, and is skipped: run `builder verify`", stacklevel=3)
            self.skipped[key] += 1
        if not self._first_batches.done:
            self._first_batches.see(batch.images, batch.origin)

    def _shaped(self, batch: Batch | StreamBatch) -> Any:
        if self.collate == "dict":
            return {"images": batch.images, "labels": batch.labels, "origin": batch.origin, "keys": batch.keys}
        if self.collate == "numpy":
            images = np.ascontiguousarray(batch.images.permute(0, 2, 3, 1).numpy())
            return images, batch.labels.numpy(), batch.origin.numpy()
        return batch.images, batch.labels, batch.origin

    # -- what it draws --------------------------------------------------------------------------------------------

    def composition(self, epoch: int | None = None) -> list[dict[str, Any]]:
        """What an epoch (default: the current one) draws of each source, over all ranks.

        name, origin, samples, drawn, passes (drawn / samples), repeats (how often a sample comes at most, with what
        fills the last step; None for streams, whose passes begin at no epoch's start), and by class code: classes
        (drawn; of streams on average) and available (samples).
        """
        epoch = self.epoch if epoch is None else epoch
        described = []
        for number, source in enumerate(self.sources):
            if source is None:
                continue
            available = self._available[number]
            by_class, read = self._by_class(number, epoch, available)
            drawn = int(by_class.sum())
            most = int(np.ceil(read / np.maximum(available, 1)).max())
            described.append(
                {
                    "name": source.name,
                    "origin": "synthetic" if number else "real",
                    "samples": len(source),
                    "drawn": drawn,
                    "passes": drawn / len(source),
                    "repeats": None if self._cursor else most,
                    "classes": dict(zip(self.classes.codes, by_class.tolist(), strict=True)),
                    "available": dict(zip(self.classes.codes, available.tolist(), strict=True)),
                }
            )
        return described

    def _by_class(self, number: int, epoch: int, available: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """How many of each class (int64 [classes]) an epoch draws, and reads with what fills its last step."""
        if not isinstance(self.schedule, Mix):
            return available, available
        deck, plan = self.schedule.decks[number], self.schedule.epoch(epoch)
        if deck is None:
            return np.zeros_like(available), np.zeros_like(available)
        before = int(plan.before[number])
        return deck.classes(before, int(plan.drawn[number])), deck.classes(before, int(plan.read[number]))

    def _warn_of_repeats(self) -> None:
        if not self.max_repeats or not isinstance(self.schedule, Mix):
            return
        worst: dict[int, tuple[int, dict[str, Any]]] = {}
        for plan in self.schedule.changing():
            for number, part in enumerate(self.composition(plan.number)):
                repeats = part["repeats"] or math.ceil(max(_draws_of_one(part).values()))
                if repeats > worst.get(number, (self.max_repeats, {}))[0]:
                    worst[number] = repeats, part
        for repeats, part in worst.values():
            draws = _draws_of_one(part)
            code = max(draws, key=draws.__getitem__)
            warnings.warn(
                f"samples of '{part['name']}' come up to {repeats} times an epoch, max_repeats is {self.max_repeats}: "
                f"it has {part['samples']}, and {part['drawn']} are drawn; of {code} it has {part['available'][code]}, "
                f"for {part['classes'][code]} draws: make more of them, lower the ratio, or pass max_repeats=None",
                stacklevel=3,
            )

    # -- state ----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Where the iteration stands: epoch and position in it, and what it belongs to; JSON.

        The same on every rank; with streams also where this rank's readers stand.
        """
        state = {"epoch": self.epoch, "position": self._offset + self._step * self._stride, **self._identity()}
        return {**state, "streams": self._cursor.state_dict()} if self._cursor else state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` stood: the next iteration yields the rest of that epoch.

        Workers, world and batch size may differ (not the last two where the ratio changes by step, or with
        exhausted="stop"; none with streams). BuilderError when ratio, seed, sources or classes do.
        """
        for name, value in self._identity().items():
            if state.get(name) != value:
                raise BuilderError(
                    f"the saved state is of {name} {state.get(name)}, this loader of {value}",
                    "restore it into the same mixture",
                )
        if self._cursor:
            self._cursor.load_state_dict(state["streams"])
        self.epoch = int(state["epoch"])
        self._step, self._offset = divmod(int(state["position"]), self._stride)
        self._restored, self._asked = True, False

    def _identity(self) -> dict[str, Any]:
        sources = [[source.name, len(source), source.fingerprint] for source in self.sources if source]
        identity = {
            "seed": self.seed, "ratio": self.ratio.to_json(), "classes": self.class_mode, "split": self.split,
            "length": self.length, "exhausted": self.exhausted, "sources": sources,
            "reading": "stream" if self._cursor else "indexed",
        }  # fmt: skip
        if isinstance(self.schedule, Mix):
            if self._cursor or self.exhausted == "stop" or (self.ratio.unit == "step" and not self.ratio.is_constant):
                identity["samples a step"] = self._stride
            identity["weights"] = self.schedule.weights
        return identity

    @property
    def _positions(self) -> int:
        return self.schedule.epoch(self.epoch).length if isinstance(self.schedule, Mix) else self.schedule.length

    @property
    def _stride(self) -> int:
        return self.world * self.batch_size

    def _start(self, step: int, epoch: int | None = None) -> int:
        """Where this rank's batch of a step begins; in an epoch other than the current one, as in a whole one."""
        epoch = self.epoch if epoch is None else epoch
        begin = (self._offset if epoch == self.epoch else 0) + step * self._stride
        if self.world == 1 or not isinstance(self.schedule, Mix):
            return begin + self.rank * self.batch_size
        # Else a rank would meet the same part of a quota's period at every step, and so the same few classes.
        turn = keyed_shuffle(self.world, self.seed, "ranks", epoch, begin)[self.rank]
        return begin + int(turn) * self.batch_size


def _draws_of_one(part: Mapping[str, Any]) -> dict[str, float]:
    """How often a sample of each class comes in an epoch, on average; `part` of a loader's composition."""
    return {code: drawn / max(1, part["available"][code]) for code, drawn in part["classes"].items()}

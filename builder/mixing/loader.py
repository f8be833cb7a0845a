"""`for images, labels, origin in MixedLoader(...)`: batches of real and synthetic samples at an exact ratio."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from builder.errors import BuilderError, did_you_mean
from builder.mixing.batches import Batches, Requests, Transform, unchanged
from builder.mixing.guards import check_lineage, check_sizes, class_weights, resolve
from builder.mixing.schedule import InOrder, Mix, Stream
from builder.mixing.slots import AHEAD, Slots
from builder.mixing.sources import Source
from builder.shards.dataset import Dataset

Reference = str | Path | Dataset
DEFAULT_RATIO = 0.25


class MixedLoader:
    """Batches `(images, labels, origin)` of real and synthetic samples, decoded and resized in the same way.

    images: [B, 3, H, W], uint8 (0-255) or float32 (0-1); labels: int64 [B], index in the class table; origin: uint8
    [B], 0 real, 1 synthetic.

    real, synthetic: a dataset's name under `out`, a path to it, or a Dataset; synthetic may be a list of them,
        shared out by `weights` (default: by their sizes). Filtered views are datasets like any other.
    ratio: synthetic share of a batch, 0-1 (default: 0.25 with synthetic data, else 0; at 0 none is opened). If
        ratio x batch_size is whole, every batch of every rank has exactly that many; else counts are rounded so that
        they add up.
    size: side of the square images in px; None when all stored images have one size.
    split: "train" mixes; "val" and "test" give the real samples of the split alone, in order, each once over all ranks.
    classes: share of the classes within each source: "natural" (as it has them), "match_real" (as the real data has
        them), "balance" (equal).
    epoch: "real": one pass over the real data (at ratio 1: over the first synthetic dataset); or a number of
        samples, real and synthetic on all ranks. All ranks make the same number of steps; the last one is filled up
        with repeats. A source that runs out starts again in another order.
    transform: called with each image, uint8 [3, H, W]; torch's random numbers in it depend on seed, epoch and place.
    workers: processes that read ahead; batches are the same whatever their number.
    rank, world: of this process; default: from torch.distributed, else a single one.
    allow_leak: the reason to use synthetic data that held-out patients may have leaked into.
    partial: take datasets that are not complete.

    An iteration to the end moves on to the next epoch; `set_epoch` sets it. BuilderError: what cannot be mixed.
    """

    def __init__(
        self,
        real: Reference | None = None,
        synthetic: Reference | Sequence[Reference] | None = None,
        *,
        ratio: float | None = None,
        weights: Sequence[float] | None = None,
        batch_size: int = 32,
        size: int | None = None,
        out: str = ".",
        split: str = "train",
        classes: str = "natural",
        epoch: str | int = "real",
        seed: int = 0,
        workers: int = 0,
        transform: Transform | None = None,
        dtype: str = "uint8",
        rank: int | None = None,
        world: int | None = None,
        allow_leak: str | None = None,
        partial: bool = False,
    ) -> None:
        _one_of(split, ("train", "val", "test"), "split")
        listed = _listed(synthetic)
        self.ratio = _ratio(ratio, real is not None, bool(listed), split)
        self.split, self.class_mode, self.seed = split, classes, seed
        self.rank, self.world = _place(rank, world)
        self.batch_size = _positive(batch_size, "batch_size")
        _one_of(classes, ("natural", "match_real", "balance"), "classes")
        _one_of(dtype, ("uint8", "float32"), "dtype")
        if epoch != "real":
            _positive(epoch, "epoch")
        if size is not None:
            _positive(size, "size")

        real_data = None if real is None else resolve(real, "real", out, partial)
        others = [resolve(reference, "synthetic", out, partial) for reference in listed] if self.ratio else []
        for other in others:
            if real_data is None:
                warnings.warn(
                    f"no real dataset is given: the lineage of '{other.name}' is not checked against anything",
                    stacklevel=2,
                )
            else:
                check_lineage(other, real_data, allow_leak)
        datasets = [dataset for dataset in (real_data, *others) if dataset is not None]
        for dataset in datasets[1:]:
            datasets[0].classes.require_same(dataset.classes, f"'{datasets[0].name}'", f"'{dataset.name}'")
        self.classes = datasets[0].classes

        real_source = None if real_data is None else Source(real_data, split)
        self.sources = [real_source, *(Source(other) for other in others)]
        drawn = [source for number, source in enumerate(self.sources) if source and (number or self.ratio < 1)]
        if size is None:
            check_sizes(drawn)
        self.schedule: Mix | InOrder
        if split == "train":
            self.schedule = self._mix(weights, None if epoch == "real" else int(epoch))
        else:
            self.schedule = InOrder(len(drawn[0]))
        self.epoch = 0
        self._step = 0  # the next one
        self._offset = 0  # position where step 0 begins; not 0 only after a restore from another world or batch size
        self._restored = False
        width, height = (size, size) if size else drawn[0].dimensions[2:]
        self._slots = Slots(workers, self.batch_size * 3 * height * width * (4 if dtype == "float32" else 1))
        self._requests = Requests(self._slots.count)
        self._loader = DataLoader(
            Batches(self.sources, self.schedule, size, transform, dtype, seed, self._slots),
            batch_size=None,
            sampler=self._requests,
            collate_fn=unchanged,
            num_workers=workers,
            prefetch_factor=AHEAD if workers else None,
            persistent_workers=workers > 0,
            generator=torch.Generator(),  # else each epoch would draw from the caller's random numbers
        )

    def _mix(self, weights: Sequence[float] | None, length: int | None) -> Mix:
        real, *others = self.sources
        streams: list[Stream | None] = []
        for number, source in enumerate(self.sources):
            if source is None or (number == 0 and self.ratio == 1):
                streams.append(None)
                continue
            shares = class_weights(self.class_mode, source, real, self.classes)
            streams.append(Stream(source.members(len(self.classes)), shares, (self.seed, number)))
        if weights is not None and len(weights) != len(others):
            raise BuilderError(
                f"{len(weights)} weights are given for {len(others)} synthetic datasets", "give one each"
            )
        sizes = [float(len(source)) for source in others if source]
        mix = Mix(
            streams[0],
            [s for s in streams[1:] if s],
            sizes if weights is None else weights,
            self.ratio,
            length,
            self.seed,
        )
        for source, drawn in zip(self.sources, mix.drawn, strict=True):
            if source and not drawn and not (source is real and self.ratio == 1):
                raise BuilderError(
                    f"at ratio {self.ratio:g}, an epoch of {mix.length} samples has room for none of '{source.name}'",
                    "give a longer epoch (epoch=SAMPLES), or another ratio",
                )
        return mix

    # -- the epoch ------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        """Steps of the epoch; in training the same on every rank."""
        ahead = 0 if self.schedule.repeats else self.rank * self.batch_size
        return max(0, math.ceil((self.schedule.length - self._offset - ahead) / self._stride))

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        if not self._restored:
            self._step = self._offset = 0
        self._restored = False
        first = self._step
        self._requests.waiting = [(self.epoch, self._start(step), self.batch_size) for step in range(first, len(self))]
        for step, batch in enumerate(self._loader, first):
            if isinstance(batch, BuilderError):
                raise BuilderError(
                    batch.what, batch.remedy
                )  # not `batch`: that would tie frame and loader into a cycle
            self._step = step + 1
            images, labels, origin = batch
            yield self._slots.take(images), torch.from_numpy(labels), torch.from_numpy(origin)
        self.set_epoch(self.epoch + 1)

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of `epoch` (0 or more); nothing changes when a restored state stands in it already."""
        if epoch != self.epoch:
            self.epoch, self._step, self._offset, self._restored = epoch, 0, 0, False

    def keys(self, step: int, epoch: int | None = None) -> list[str]:
        """The keys of this rank's batch at `step` of `epoch` (default: the current one), in order; reads no image."""
        picked = self.schedule.batch(self.epoch if epoch is None else epoch, self._start(step), self.batch_size)
        sources = self.sources
        return [sources[number].keys[int(row)].as_py() for number, row in zip(*picked, strict=True)]

    def composition(self) -> list[dict[str, Any]]:
        """What the current epoch draws, by source: name, origin, samples, drawn, passes, classes (drawn, by code)."""
        described = []
        for number, (source, drawn) in enumerate(zip(self.sources, self.schedule.drawn.tolist(), strict=True)):
            if source is None:
                continue
            stream = self.schedule.streams[number] if isinstance(self.schedule, Mix) else None
            if stream is not None:
                by_class = stream.classes(self.epoch, drawn)
            else:
                by_class = np.bincount(source.labels, minlength=len(self.classes)) * bool(drawn)
            described.append(
                {
                    "name": source.name,
                    "origin": "synthetic" if number else "real",
                    "samples": len(source),
                    "drawn": drawn,
                    "passes": drawn / len(source),
                    "classes": dict(zip(self.classes.codes, by_class.tolist(), strict=True)),
                }
            )
        return described

    # -- state ----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Where the iteration stands: epoch and position in it, the same on every rank; and what it belongs to."""
        return {"epoch": self.epoch, "position": self._offset + self._step * self._stride, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` stood: the next iteration yields the rest of that epoch.

        Workers, world and batch size may differ. BuilderError when ratio, seed, sources or classes do.
        """
        for name, value in self._identity().items():
            if state.get(name) != value:
                raise BuilderError(
                    f"the saved state is of {name} {state.get(name)}, this loader of {value}",
                    "restore it into the same mixture",
                )
        self.epoch = int(state["epoch"])
        self._step, self._offset = divmod(int(state["position"]), self._stride)
        self._restored = True

    def _identity(self) -> dict[str, Any]:
        sources = [[source.name, len(source)] for source in self.sources if source]
        return {
            "seed": self.seed, "ratio": self.ratio, "classes": self.class_mode, "split": self.split,
            "length": self.schedule.length, "sources": sources, "drawn": self.schedule.drawn.tolist(),
        }  # fmt: skip

    @property
    def _stride(self) -> int:
        return self.world * self.batch_size

    def _start(self, step: int) -> int:
        return self._offset + step * self._stride + self.rank * self.batch_size


def _listed(synthetic: Reference | Sequence[Reference] | None) -> list[Reference]:
    if synthetic is None:
        return []
    return [synthetic] if isinstance(synthetic, str | Path | Dataset) else list(synthetic)


def _ratio(ratio: float | None, real: bool, synthetic: bool, split: str) -> float:
    if split != "train":
        if ratio or synthetic:
            raise BuilderError(f"the {split} split is never mixed with synthetic data", "leave out synthetic and ratio")
        if not real:
            raise BuilderError(f"no real dataset is given for the {split} split", "pass real=...")
        return 0.0
    if ratio is None:
        ratio = DEFAULT_RATIO if synthetic else 0.0
    if not 0 <= ratio <= 1:
        raise BuilderError(f"ratio is {ratio}", "it is the synthetic share of a batch, from 0 to 1")
    if ratio > 0 and not synthetic:
        raise BuilderError(f"ratio is {ratio:g}, but no synthetic dataset is given", "pass synthetic=..., or ratio=0")
    if ratio < 1 and not real:
        raise BuilderError(
            f"ratio is {ratio:g}, but no real dataset is given", "pass real=..., or ratio=1 for synthetic samples alone"
        )
    return float(ratio)


def _place(rank: int | None, world: int | None) -> tuple[int, int]:
    distributed = torch.distributed
    if rank is None and world is None and distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    rank, world = rank or 0, 1 if world is None else world
    if not 0 <= rank < world:
        raise BuilderError(f"rank {rank} of a world of {world}", "ranks count from 0 to world - 1")
    return rank, world


def _positive(value: Any, name: str) -> int:
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < 1:
        raise BuilderError(f"{name} is {value!r}", "it must be a whole number of 1 or more")
    return int(value)


def _one_of(value: str, known: tuple[str, ...], name: str) -> None:
    if value not in known:
        raise BuilderError(f"{name} is {value!r}", did_you_mean(str(value), known))

"""Reading a batch: from a place in the schedule to tensors, in this process or in a worker, with the same result."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from builder.errors import BuilderError, did_you_mean
from builder.mixing.mix import Mix
from builder.mixing.schedule import InOrder, keyed_integer
from builder.mixing.sources import Source

Transform = Callable[[torch.Tensor], torch.Tensor]
ORIGINS = ("real", "synthetic")
TRIES = 100  # images of which one may stand in for an unreadable one


class Batch(NamedTuple):
    """One batch as it leaves a worker."""

    images: torch.Tensor  # uint8 (0-255) or float32 (0-1) [B, 3, H, W]
    labels: torch.Tensor  # int64 [B]
    origin: torch.Tensor  # uint8 [B]: 0 real, 1 synthetic
    keys: list[str]
    skipped: list[str]  # keys of images that could not be read


class Wanted(NamedTuple):
    """A batch to come: its epoch, its positions, and where that begins which the same worker makes next."""

    epoch: int
    start: int
    size: int
    following: int | None


def wanted(epoch: int, starts: Sequence[int], size: int, workers: int) -> list[Wanted]:
    """The batches that begin at `starts`, made by so many workers in turn."""
    following = [*starts[max(1, workers) :], *[None] * max(1, workers)]
    return [Wanted(epoch, start, size, then) for start, then in zip(starts, following, strict=False)]


class Requests:
    """The batches to come, as `Slots` takes them; a new list each epoch, so an abandoned iterator keeps its own."""

    def __init__(self) -> None:
        self.waiting: Sequence[Any] = []

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        return enumerate(self.waiting)

    def __len__(self) -> int:
        return len(self.waiting)


class Assembly:
    """From decoded images to the tensors of a batch: transform, value range, one shape.

    transform: of both origins, or a table {"real": ..., "synthetic": ...}; called with uint8 [3, H, W].
    """

    def __init__(self, transform: Transform | Mapping[str, Transform] | None, dtype: str, seed: int) -> None:
        if isinstance(transform, Mapping):
            for origin in transform:
                if origin not in ORIGINS:
                    raise BuilderError(f"a transform is given for '{origin}'", did_you_mean(origin, ORIGINS))
            self.transforms = tuple(transform.get(origin) for origin in ORIGINS)
        else:
            self.transforms = (transform, transform)
        self.dtype, self.seed = dtype, seed

    def __call__(self, pixels: Sequence[np.ndarray], origin: np.ndarray, epoch: int, start: int) -> torch.Tensor:
        """Images (uint8 or float32 [B, 3, H, W]) of uint8 arrays [H, W, 3] and their origins (0 or 1, [B])."""
        images = torch.from_numpy(planes(pixels))
        if any(self.transforms):
            images = self._transformed(images, origin, keyed_integer(self.seed, "transform", epoch, start))
        return self._ranged(images)

    def _ranged(self, images: torch.Tensor) -> torch.Tensor:
        if self.dtype == "uint8":
            return images
        return images.float().div_(255) if images.dtype == torch.uint8 else images.float()

    def _transformed(self, images: torch.Tensor, origin: np.ndarray, seed: int) -> torch.Tensor:
        changed = []
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for image, synthetic in zip(images, origin.tolist(), strict=True):
                transform = self.transforms[synthetic]
                changed.append(image if transform is None else transform(image))
        shapes = sorted({tuple(image.shape) for image in changed})
        if len(shapes) > 1:
            raise BuilderError(f"the transform gives images of different shapes: {shapes}", "let it end at one size")
        kinds = {image.dtype for image in changed}
        if self.dtype == "uint8" and kinds != {torch.uint8}:
            wrong = next(kind for kind in kinds if kind != torch.uint8)
            raise BuilderError(f"the transform gives {wrong}, but the loader is to yield uint8", "pass dtype='float32'")
        return torch.stack(changed if len(kinds) == 1 else [self._ranged(image) for image in changed])


class Batches(Dataset):
    """Whole batches as items: a worker needs nothing but the request, so their number changes nothing.

    size: side in px that images are loaded at; None: as they are. skip: what can't be read is replaced by another
    sample of its source and class (in evaluation: left out), and its key returned.
    """

    def __init__(
        self,
        sources: Sequence[Source | None],
        schedule: Mix | InOrder,
        size: int | None,
        assembly: Assembly,
        *,
        skip: bool = False,
    ) -> None:
        self.sources, self.schedule, self.size, self.assembly, self.skip = sources, schedule, size, assembly, skip
        self._next: dict[tuple[int, int, int], tuple[np.ndarray, np.ndarray]] = {}

    def __getitem__(self, request: Wanted) -> Batch | BuilderError:
        try:
            return self._read(*request)
        except BuilderError as error:
            return error  # raised by the loader: torch would bury the message of a worker in its traceback

    def _read(self, epoch: int, start: int, size: int, following: int | None) -> Batch:
        pixels, labels, origin, keys = [], [], [], []
        skipped: list[str] = []
        decks, rows = self._drawn(epoch, start, size, following)
        for number, row in zip(decks.tolist(), rows.tolist(), strict=True):
            source = self.sources[number]
            assert source is not None
            found = self._pixels(number, source, row, skipped, epoch, start, row)
            if found is not None:
                pixels.append(found[0])
                keys.append(source.keys[found[1]].as_py())
                labels.append(int(source.labels[row]))
                origin.append(int(number > 0))
        origins = np.array(origin, np.uint8)
        images = self.assembly(pixels, origins, epoch, start) if pixels else torch.empty(0)
        return Batch(images, torch.tensor(labels), torch.from_numpy(origins), keys, skipped)

    def _drawn(self, epoch: int, start: int, size: int, following: int | None) -> tuple[np.ndarray, np.ndarray]:
        """Decks and rows of a batch. Those of the next one are fetched from the disk while this one is decoded."""
        drawn = self._next.pop((epoch, start, size), None) or self._expected(epoch, start, size)
        self._next = {} if following is None else {(epoch, following, size): self._expected(epoch, following, size)}
        return drawn

    def _expected(self, epoch: int, start: int, size: int) -> tuple[np.ndarray, np.ndarray]:
        decks, rows = self.schedule.batch(epoch, start, size)
        for number, source in enumerate(self.sources):
            if source is not None:
                source.expect(rows[decks == number])
        return decks, rows

    def _pixels(
        self, number: int, source: Source, row: int, skipped: list[str], *place: int
    ) -> tuple[np.ndarray, int] | None:
        """The image of a row, or of what stands in for it at this place, and the row it is of."""
        try:
            return source.pixels(row, self.size), row
        except BuilderError as error:
            if not self.skip:
                raise
            first = error
        skipped.append(source.keys[row].as_py())
        if isinstance(self.schedule, InOrder):
            return None
        others = self.schedule.others(number, row, int(source.labels[row]), "instead", *place)
        for other in others[:TRIES].tolist():
            with suppress(BuilderError):
                return source.pixels(other, self.size), other
        raise BuilderError(
            f"nothing can stand in for an image of '{source.name}': {min(len(others), TRIES)} others of its class "
            f"can't be read either; {first.what}",
            first.remedy,
        )


def planes(pixels: Sequence[np.ndarray]) -> np.ndarray:
    """Images as torch has them, uint8 [B, 3, H, W], of arrays [H, W, 3].

    Each by itself, which stays in the processor's cache: several times faster than to stack and permute them all.
    """
    images = np.empty((len(pixels), 3, *pixels[0].shape[:2]), np.uint8)
    for image, array in zip(images, pixels, strict=True):
        image[:] = array.transpose(2, 0, 1)
    return images


def unchanged(item: Any) -> Any:
    """The collate function of a DataLoader whose items are batches already."""
    return item

"""Reading a batch: from a place in the schedule to tensors, in this process or in a worker, with the same result."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from builder.errors import BuilderError
from builder.mixing.schedule import InOrder, Mix, keyed_integer
from builder.mixing.slots import Slots, Stored
from builder.mixing.sources import Source

Batch = tuple[torch.Tensor | Stored, np.ndarray, np.ndarray]  # images, labels, origin, as they leave a worker
Transform = Callable[[torch.Tensor], torch.Tensor]


class Requests:
    """The batches to come, (epoch, start, size); a new list each epoch, so an abandoned iterator keeps its own.

    They are handed out with the slot that each is to be left in.
    """

    def __init__(self, slots: int) -> None:
        self.waiting: list[tuple[int, int, int]] = []
        self.slots = slots

    def __iter__(self) -> Iterator[tuple[int, int, int, int]]:
        for number, request in enumerate(self.waiting):
            yield *request, number % self.slots

    def __len__(self) -> int:
        return len(self.waiting)


class Batches(Dataset):
    """Whole batches as items: a worker needs nothing but the request, so their number changes nothing."""

    def __init__(
        self,
        sources: Sequence[Source | None],
        schedule: Mix | InOrder,
        size: int | None,
        transform: Transform | None,
        dtype: str,
        seed: int,
        slots: Slots,
    ) -> None:
        self.sources, self.schedule, self.slots = sources, schedule, slots
        self.size, self.transform, self.dtype, self.seed = size, transform, dtype, seed

    def __getitem__(self, request: tuple[int, int, int, int]) -> Batch | BuilderError:
        try:
            *what, slot = request
            images, labels, origin = self._read(*what)
            return self.slots.put(slot, images), labels, origin
        except BuilderError as error:
            return error  # raised by the loader: torch would bury the message of a worker in its traceback

    def _read(self, epoch: int, start: int, size: int) -> tuple[torch.Tensor, np.ndarray, np.ndarray]:
        streams, rows = self.schedule.batch(epoch, start, size)
        for number in np.unique(streams).tolist():
            self.sources[number].expect(rows[streams == number].tolist())
        images, labels = [], np.empty(len(rows), np.int64)
        for place, (number, row) in enumerate(zip(streams.tolist(), rows.tolist(), strict=True)):
            source = self.sources[number]
            assert source is not None
            # Permuted one by one, while in the processor's cache: all at once takes several times longer.
            images.append(np.ascontiguousarray(source.pixels(row, self.size).transpose(2, 0, 1)))
            labels[place] = source.labels[row]
        batch = torch.from_numpy(np.stack(images))
        if self.transform is not None:
            batch = self._transformed(batch, self.transform, keyed_integer(self.seed, "transform", epoch, start))
        if self.dtype == "float32":
            batch = batch.float().div_(255) if batch.dtype == torch.uint8 else batch.float()
        return batch, labels, (streams > 0).astype(np.uint8)

    def _transformed(self, images: torch.Tensor, transform: Transform, seed: int) -> torch.Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            changed = [transform(image) for image in images]
        shapes = sorted({tuple(image.shape) for image in changed})
        if len(shapes) > 1:
            raise BuilderError(f"the transform gives images of different shapes: {shapes}", "let it end at one size")
        if self.dtype == "uint8" and changed[0].dtype != torch.uint8:
            raise BuilderError(
                f"the transform gives {changed[0].dtype}, but the loader is to yield uint8", "pass dtype='float32'"
            )
        return torch.stack(changed)


def unchanged(item: Any) -> Any:
    """The collate function of a DataLoader whose items are batches already."""
    return item

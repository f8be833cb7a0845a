"""How a worker hands over a batch: its images in memory that both see, kept for as long as the loader lives.

torch sends each tensor by a shared memory of its own, and a socket to fetch that by from a thread of the worker, which
waits for the worker's interpreter. With small images this takes longer than to copy them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import Dataset

AHEAD = 2  # batches that a worker reads ahead


@dataclass(frozen=True)
class Stored:
    """What goes through the queue instead of the images."""

    slot: int
    shape: tuple[int, ...]
    dtype: torch.dtype


class Slots(Dataset):
    """`batches`, whose items (named tuples with `images`, `labels`, `origin`; or errors) are handed over as above.

    A request comes with its number, which tells the slot. Slots are used in turn; there is one more than batches are
    under way, so a batch is copied out before the request that takes its slot again is sent. Without workers, items
    are what they are. size: bytes of the images of a batch; what a transform made larger goes torch's way.
    """

    def __init__(self, batches: Dataset, workers: int, size: int, *, pin_memory: bool) -> None:
        self.batches, self.pin_memory = batches, pin_memory and torch.accelerator.is_available()
        self._memory = torch.empty((workers * AHEAD + 1, size), dtype=torch.uint8).share_memory_() if workers else None

    def __getitem__(self, numbered: tuple[int, Any]) -> Any:
        number, request = numbered
        batch = self.batches[request]
        if self._memory is None or not isinstance(batch, tuple):
            return batch
        images: Any = batch.images  # type: ignore[attr-defined]
        if images.nbytes <= self._memory.shape[1]:
            stored = Stored(number % len(self._memory), tuple(images.shape), images.dtype)
            self._view(stored).copy_(images)
            images = stored
        return batch._replace(images=images, labels=batch.labels.numpy(), origin=batch.origin.numpy())  # type: ignore[attr-defined]

    def received(self, batch: Any) -> Any:
        """The item as the worker had it. Its images are a copy: the slot is free again."""
        if self._memory is None or not isinstance(batch, tuple):
            return batch
        images: Any = batch.images  # type: ignore[attr-defined]
        if isinstance(images, Stored):
            view = self._view(images)
            images = view.pin_memory() if self.pin_memory else view.clone()
        labels, origin = (torch.from_numpy(part) for part in (batch.labels, batch.origin))  # type: ignore[attr-defined]
        return batch._replace(images=images, labels=labels, origin=origin)  # type: ignore[attr-defined]

    def _view(self, stored: Stored) -> torch.Tensor:
        assert self._memory is not None
        size = math.prod(stored.shape) * stored.dtype.itemsize
        return self._memory[stored.slot, :size].view(stored.dtype).view(stored.shape)

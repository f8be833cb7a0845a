"""How a worker hands over a batch: in memory that both see, kept for as long as the loader lives.

torch sends a tensor by a shared memory of its own, and a socket to fetch that by from a thread of the worker, which waits
for the worker's interpreter. For small images this takes as long as decoding them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

AHEAD = 2  # batches that a worker reads ahead


@dataclass(frozen=True)
class Stored:
    """What goes through the queue instead of the images."""

    slot: int
    shape: tuple[int, ...]
    dtype: torch.dtype


class Slots:
    """Pieces of shared memory, each with room for `size` bytes, that `workers` processes use in turn.

    There is one more than batches are under way: a batch is copied out before the request that takes its slot again is
    sent. Without workers there is none, and `put` and `take` give back what they get.
    """

    def __init__(self, workers: int, size: int) -> None:
        self.count = workers * AHEAD + 1
        self._memory = torch.empty((self.count, size if workers else 0), dtype=torch.uint8).share_memory_()

    def put(self, slot: int, images: torch.Tensor) -> Stored | torch.Tensor:
        """Leave images in a slot; where they don't fit (a transform made them larger) they are returned as they are."""
        stored = Stored(slot, tuple(images.shape), images.dtype)
        if images.nbytes > self._memory.shape[1]:
            return images
        self._view(stored).copy_(images)
        return stored

    def take(self, stored: Stored | torch.Tensor) -> torch.Tensor:
        """A copy of what was put: the slot is free again."""
        return self._view(stored).clone() if isinstance(stored, Stored) else stored

    def _view(self, stored: Stored) -> torch.Tensor:
        size = math.prod(stored.shape) * stored.dtype.itemsize
        return self._memory[stored.slot, :size].view(stored.dtype).view(stored.shape)

"""Training crops, and the order they are drawn in: a pure function of the position, so a step is a state."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from builder.errors import BuilderError
from builder.progress import progress
from builder.shards.dataset import Dataset, resize


@dataclass(frozen=True)
class TrainingCrops:
    """`pixels` uint8 [N, 3, S, S]; `labels` int64 [N]; `native` (height, width) of each crop, int64 [N, 2], px."""

    pixels: Tensor
    labels: Tensor
    native: Tensor
    patients: list[str]  # keyed hashes, sorted: the lineage of what is trained on them; none if any crop's is unknown

    def __len__(self) -> int:
        return len(self.labels)


def training_rows(dataset: Dataset) -> list[dict[str, Any]]:
    """Manifest rows of the training split.

    Raises BuilderError when the dataset has no training crops, or a class has none.
    """
    rows = [row for row in dataset.table().to_pylist() if row["split"] == "train"]
    if not rows:
        raise BuilderError(
            f"dataset '{dataset.name}' has no crops of the split 'train'", "pack real photographs with `builder pack`"
        )
    empty = [code for code in dataset.classes.codes if not any(row["phase"] == code for row in rows)]
    if empty:
        raise BuilderError(
            f"dataset '{dataset.name}' has no training crops of {', '.join(empty)}",
            "pack more photographs, or leave the class out of `classes:`",
        )
    return rows


def load_crops(dataset: Dataset, size: int) -> TrainingCrops:
    """All crops of the training split, whole, resized to `size` px. BuilderError as `training_rows`."""
    rows = training_rows(dataset)
    reading = progress(dataset.images(rows), f"read {dataset.name}", "crop", len(rows))
    pixels = np.stack([resize(image, size) for _, image in reading])
    return TrainingCrops(
        pixels=torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(),
        labels=torch.tensor([row["label"] for row in rows]),
        native=torch.tensor([original_size(row)[::-1] for row in rows]),
        patients=known_patients(rows),
    )


def original_size(row: dict[str, Any]) -> tuple[int, int]:
    """Width and height of a crop at its photograph's resolution, px."""
    width, height = row["original_size"] or (row["width"], row["height"])
    return width, height


def known_patients(rows: list[dict[str, Any]]) -> list[str]:
    """The patients (keyed hashes, sorted) of crops; none when any crop's is unknown."""
    patients = {row["patient"] for row in rows}
    return [] if None in patients else sorted(patients)


class CropSampler:
    """Which crop stands at position 0, 1, 2, ... of an endless draw without replacement.

    Balanced: the classes take turns, and each goes through its own crops in passes, shuffled anew each pass. So in
    every stretch of positions the classes' counts differ by at most 1, and within a class the crops' by at most 1.
    """

    def __init__(self, labels: Tensor, *, balanced: bool, seed: int) -> None:
        groups = [torch.nonzero(labels == label).flatten() for label in labels.unique()]
        self.groups = groups if balanced else [torch.arange(len(labels))]
        self.seed = seed
        self._passes: dict[int, tuple[int, Tensor]] = {}  # group -> (number of the pass, its order)

    def batch(self, step: int, size: int) -> Tensor:
        """The crops of step `step` (from 0) at batch size `size`: int64 [size]."""
        count = len(self.groups)
        chosen = torch.empty(size, dtype=torch.int64)
        for group in range(count):
            first = (group - step * size) % count  # place in the batch where this group's turn comes first
            places = torch.arange(first, max(first, size), count)  # none, if the batch is smaller
            chosen[places] = self._turns(group, (step * size + first) // count, len(places))
        return chosen

    def _turns(self, group: int, first: int, turns: int) -> Tensor:
        """The crops of a group at turns `first`, `first` + 1, ...: int64 [turns]."""
        length = len(self.groups[group])
        parts = []
        while turns > 0:
            number, place = divmod(first, length)
            part = self._order(group, number)[place : place + turns]
            parts.append(part)
            first, turns = first + len(part), turns - len(part)
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)

    def _order(self, group: int, number: int) -> Tensor:
        """The order of pass `number` through a group."""
        if self._passes.get(group, (-1,))[0] != number:
            order = torch.randperm(len(self.groups[group]), generator=step_generator(self.seed, "pass", group, number))
            self._passes[group] = (number, self.groups[group][order])
        return self._passes[group][1]


def step_seed(seed: int, *names: object) -> int:
    """A 32-bit seed of its own for each (seed, names)."""
    return int.from_bytes(hashlib.sha256(repr((seed, *names)).encode()).digest()[:4], "little")


def step_generator(seed: int, *names: object) -> torch.Generator:
    """A CPU generator of its own for each (seed, names): what is drawn at a step doesn't depend on the steps before."""
    return torch.Generator().manual_seed(step_seed(seed, *names))


def size_quantiles(native: Tensor, labels: Tensor, codes: Sequence[str], most: int = 32) -> dict[str, list[int]]:
    """Per class, up to `most` quantiles of the crops' native longer side, px: what sampling conditions on."""
    sides = native.max(dim=1).values.double()
    found = {}
    for label, code in enumerate(codes):
        own = sides[labels == label]
        points = (torch.arange(min(most, len(own)), dtype=torch.double) + 0.5) / max(1, min(most, len(own)))
        found[code] = [round(value) for value in torch.quantile(own, points).tolist()] if len(own) else []
    return found

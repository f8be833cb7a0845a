"""Before a run: how long, how large, and how many images it takes for so many accepted ones."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow.compute as pc

from builder.sampling.sampler import Request, Sampler
from builder.shards.dataset import Dataset, all_datasets, readable
from builder.shards.writer import encode_png

SAMPLE_OVERHEAD = 4096  # bytes of one sample beside its payload: headers, label, JSON, padding, its manifest row


@dataclass(frozen=True)
class Forecast:
    """A run of `images` on `devices` like the one that makes `rate` images/s, `bytes_per_image` each."""

    images: int
    rate: float
    devices: int
    bytes_per_image: float

    @property
    def hours(self) -> float:
        return self.images / (self.rate * self.devices) / 3600

    @property
    def device_hours(self) -> float:
        return self.hours * self.devices

    @property
    def gigabytes(self) -> float:
        return self.images * self.bytes_per_image / 1e9


@dataclass(frozen=True)
class Drawn:
    """A short probe of the sampler alone: images/s of one worker, and bytes of an image's PNG."""

    rate: float
    payload: float


def probe(sampler: Sampler, requests: Sequence[Request]) -> Drawn:
    """Draw the requests in the plan's batches; the first batch comes twice, and is not timed."""
    size = sampler.config.batch_size
    sampler.generate(requests[:size])
    lengths = []
    started = time.perf_counter()
    for start in range(0, len(requests), size):
        batch = sampler.generate(requests[start : start + size])
        lengths += [len(encode_png(pixels)) for pixels in batch.pixels]
    return Drawn(len(requests) / (time.perf_counter() - started), sum(lengths) / len(lengths))


def bytes_per_image(dataset: Dataset) -> float:
    """Mean size on disk of an image of a dataset, with all that stands beside it in its tar and manifest."""
    sizes = dataset.table(["size"])["size"]
    return float(pc.mean(sizes).as_py()) + SAMPLE_OVERHEAD


def newest_filtered(dataset: Dataset) -> Dataset | None:
    """The newest complete dataset that was filtered from `dataset`; itself where it was; None: there is none."""
    if dataset.info.get("parent"):
        return dataset
    filtered = [
        (info.get("created", ""), other)
        for other, info in readable(all_datasets(dataset.storage))
        if info.get("parent") == dataset.name and info.get("state") == "complete"
    ]
    return max(filtered, key=lambda each: each[0])[1] if filtered else None

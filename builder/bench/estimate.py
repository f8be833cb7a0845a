"""Before a run: how long, how large, and how many images it takes for so many accepted ones."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pyarrow.compute as pc

from builder.errors import BuilderError
from builder.job.plan import Plan
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


def accepted_shares(dataset: Dataset) -> dict[str, float]:
    """Of each phase of `dataset`, what share its newest filtered dataset kept; empty where it was never filtered.

    A `dataset` that is filtered itself is compared with its parent.
    """
    parent = dataset.info.get("parent")
    if parent:
        return _shares(Dataset(parent, dataset.storage), dataset)
    filtered = [
        (info.get("created", ""), other)
        for other, info in readable(all_datasets(dataset.storage))
        if info.get("parent") == dataset.name and info.get("state") == "complete"
    ]
    return _shares(dataset, max(filtered, key=lambda each: each[0])[1]) if filtered else {}


def _shares(whole: Dataset, kept: Dataset) -> dict[str, float]:
    if not whole.exists():
        raise BuilderError(
            f"'{kept.name}' was filtered from '{whole.name}', which is not there any more",
            "give --accepted-share instead",
        )
    counts = [_counts(dataset) for dataset in (whole, kept)]
    return {code: counts[1].get(code, 0) / number for code, number in counts[0].items()}


def _counts(dataset: Dataset) -> dict[str, int]:
    found = pc.value_counts(dataset.table(["phase"])["phase"]).to_pylist()
    return {each["values"]: each["counts"] for each in found}


def images_for(plan: Plan, accepted: int, shares: Mapping[str, float]) -> tuple[int, str]:
    """How many images of the plan give each phase its part of `accepted`, and the phase that decides it.

    shares: of each phase, the share that passes. BuilderError where a phase never passes.
    """
    wanted = plan.counts(accepted)
    factors = {code: math.inf if shares[code] <= 0 else 1 / shares[code] for code in wanted if wanted[code]}
    scarce = max(factors, key=lambda code: factors[code])
    if math.isinf(factors[scarce]):
        raise BuilderError(
            f"no image of phase {scarce} passed: no COUNT gives accepted ones",
            "look at its rejects, loosen the filter, or train on",
        )
    return math.ceil(accepted * factors[scarce]), scarce

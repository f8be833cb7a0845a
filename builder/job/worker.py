"""One worker: a loaded model and scorer that turn units of the plan into committed shards."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from builder.errors import BuilderError
from builder.job.plan import Unit, batches
from builder.job.spec import JobSpec
from builder.models.checkpoint import read_checkpoint
from builder.phases import ClassTable
from builder.quality.features.cache import save_features
from builder.quality.reference import load_reference
from builder.quality.scorer import Scorer
from builder.sampling.device import dtype_name
from builder.sampling.sampler import HIGHER_PRECISION, Request, Sampler, load_sampler
from builder.sampling.seeds import MAX_RESERVE, seed_of
from builder.shards.dataset import Dataset, find_dataset
from builder.shards.schema import STAMP
from builder.shards.storage import Storage
from builder.shards.writer import Sample, encode_png, image_row, write_shard

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Image:
    """One finished image of the plan and how it came about."""

    code: str
    index: int
    position: int
    seed: int
    reserve: int
    dtype: str
    original_size: int
    seconds: float
    pixels: Any  # uint8 [H, W, 3]


class Worker:
    """Loads once; `make(unit)` generates, scores and commits one shard."""

    def __init__(self, spec: JobSpec, device: str) -> None:
        self.spec = spec
        self.dataset = Dataset(spec.name, Storage(spec.out))
        self.checkpoint = read_checkpoint(Path(spec.checkpoint))
        self.sampler = load_sampler(self.checkpoint, spec.config, device)
        real = find_dataset(spec.real, spec.real_out)
        self.reference = load_reference(self.dataset)
        self.scorer = Scorer(self.reference, real, spec.config.score, device)

    def make(self, unit: Unit, on_batch: Callable[[int], None]) -> int:
        """Make and commit one unit; `on_batch` hears of each batch's new images. Returns how many were replaced."""
        samples: list[Sample] = []
        features = []
        replaced = 0
        for start, stop in batches(unit, self.spec.config.sample.batch_size):
            images = make_batch(self.spec, self.sampler, start, stop)
            kept = [image for image in images if unit.start <= image.position < unit.stop]
            scores = self.scorer.score([image.pixels for image in kept], [image.code for image in kept])
            features.append(self.scorer.last_features)
            samples += [self._sample(image, score) for image, score in zip(kept, scores, strict=True)]
            replaced += sum(image.reserve > 0 for image in kept)
            on_batch(len(kept))
        place = {"start": str(unit.start), "stop": str(unit.stop), STAMP: self.reference.version}
        if not write_shard(self.dataset.storage, self.dataset.name, unit.number, samples, place, shared=True):
            return replaced  # a peer's shard is there, maybe with other pixels: these features are not of it
        hashes = [sample.row["sha256"] for sample in samples]
        size = self.spec.config.sample.size
        save_features(self.dataset, unit.number, self.scorer.extractor, size, hashes, np.concatenate(features))
        return replaced

    def _sample(self, image: Image, scores: dict[str, Any]) -> Sample:
        spec, sample = self.spec, self.spec.config.sample
        classes: ClassTable = spec.config.classes
        key = f"{spec.name}-{image.code}-{image.index:08d}"
        row = {
            **image_row(key, image.code, classes.label(image.code), "synthetic", image.pixels),
            "seed": image.seed,
            "index": image.index,
            "position": image.position,
            "reserve": image.reserve,
            "checkpoint": self.checkpoint.name,
            "checkpoint_sha256": spec.checkpoint_sha256,
            "prompt": classes[image.code].prompt,
            "negative_prompt": sample.negative_prompt,
            "guidance": sample.guidance,
            "steps": sample.steps,
            "scheduler": sample.scheduler,
            "batch_size": sample.batch_size,
            "dtype": image.dtype,
            "device": self.sampler.device_model,
            "seconds": image.seconds,
            "original_size": [image.original_size] * 2,
            **scores,
        }
        return Sample(row, encode_png(image.pixels))


def make_batch(spec: JobSpec, sampler: Sampler, start: int, stop: int) -> list[Image]:
    """The images at positions [start, stop) of the plan, made together; bad ones are made again.

    A NaN or black image is tried once in higher precision, then replaced from the phase's reserve seeds. A retry runs
    the same whole batch (all of it on the same reserve) and keeps only what is needed, so that position, reserve and
    dtype are enough to replay any image.
    """
    images: dict[int, Image] = {}
    for reserve in range(MAX_RESERVE + 1):
        for precise in (False, True):
            for image, bad in replay_batch(spec, sampler, start, stop, reserve, precise):
                if image.position in images:
                    continue
                if bad:
                    log.warning("bad image: %s-%08d, reserve %d, %s", image.code, image.index, reserve, image.dtype)
                else:
                    images[image.position] = image
            if len(images) == stop - start:
                return [images[position] for position in range(start, stop)]
    missing = min(set(range(start, stop)) - set(images))
    code, index = spec.plan.at(missing, missing + 1)[0]
    raise BuilderError(
        f"image {code}-{index:08d} came out black or not finite with its seed and all {MAX_RESERVE} reserves",
        f"the checkpoint {spec.checkpoint} is broken, or its size or dtype ({spec.dtype}) does not suit it",
    )


def replay_batch(
    spec: JobSpec, sampler: Sampler, start: int, stop: int, reserve: int, precise: bool
) -> list[tuple[Image, bool]]:
    """Run one batch of the plan on one reserve, in the job's dtype or the next higher: each image, and if it is bad."""
    places = spec.plan.at(start, stop)
    labels = [spec.config.classes.label(code) for code, _ in places]
    seeds = [seed_of(spec.config.seed, label, index, reserve) for (_, index), label in zip(places, labels, strict=True)]
    requests = [Request(code, label, seed) for (code, _), label, seed in zip(places, labels, seeds, strict=True)]
    batch = sampler.generate(requests, precise)
    dtype = dtype_name(HIGHER_PRECISION[sampler.dtype] if precise else sampler.dtype)
    seconds = batch.seconds / len(places)
    return [
        (
            Image(code, index, start + i, seeds[i], reserve, dtype, batch.original_sizes[i], seconds, batch.pixels[i]),
            bad,
        )
        for i, ((code, index), bad) in enumerate(zip(places, batch.bad, strict=True))
    ]

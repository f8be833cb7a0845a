"""One worker: a loaded model and scorer that turn units of the plan into committed shards."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from builder.errors import BuilderError
from builder.job.plan import Unit, batches
from builder.job.spec import JobSpec
from builder.phases import ClassTable
from builder.sampling.sampler import HIGHER_PRECISION, Batch, Request, Sampler, load_sampler
from builder.sampling.seeds import MAX_RESERVE, seed_of
from builder.shards.dataset import Dataset
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
    original_size: list[int]
    seconds: float
    pixels: Any  # uint8 [H, W, 3]


class Worker:
    """Loads once; `make(unit)` generates, scores and commits one shard."""

    def __init__(self, spec: JobSpec, device: str) -> None:
        # Imported late: scoring reads the real crops, which `regenerate` does without.
        from builder.quality.reference import load_reference
        from builder.quality.scorer import Scorer
        from builder.shards.dataset import find_dataset

        self.spec = spec
        self.dataset = Dataset(spec.name, Storage(spec.out))
        self.sampler = load_sampler(spec.checkpoint, spec.config, device, spec.dtype)
        real = find_dataset(spec.real, spec.real_out)
        self.scorer = Scorer(load_reference(self.dataset), real, spec.config.score, device)

    def make(self, unit: Unit, on_batch: Callable[[int], None]) -> int:
        """Make and commit one unit; `on_batch` hears of each batch's new images. Returns how many were replaced."""
        samples = []
        replaced = 0
        for start, stop in batches(unit, self.spec.config.sample.batch_size):
            images = make_batch(self.spec, self.sampler, start, stop)
            kept = [image for image in images if unit.start <= image.position < unit.stop]
            scores = self.scorer.score([image.pixels for image in kept], [image.code for image in kept])
            samples += [self._sample(image, score) for image, score in zip(kept, scores, strict=True)]
            replaced += sum(image.reserve > 0 for image in kept)
            on_batch(len(kept))
        place = {"start": str(unit.start), "stop": str(unit.stop), "scores": self.scorer.version}
        write_shard(self.dataset.storage, self.dataset.name, unit.number, samples, place)
        return replaced

    def _sample(self, image: Image, scores: dict[str, float]) -> Sample:
        spec, sample = self.spec, self.spec.config.sample
        classes: ClassTable = spec.config.classes
        key = f"{spec.name}-{image.code}-{image.index:08d}"
        row = {
            **image_row(key, image.code, classes.label(image.code), "synthetic", image.pixels),
            "seed": image.seed,
            "index": image.index,
            "position": image.position,
            "reserve": image.reserve,
            "checkpoint": self.sampler.checkpoint_name,
            "checkpoint_sha256": spec.checkpoint_sha256,
            "prompt": classes[image.code].prompt,
            "negative_prompt": sample.negative_prompt,
            "guidance": sample.guidance,
            "steps": sample.steps,
            "scheduler": sample.scheduler,
            "batch_size": sample.batch_size,
            "dtype": image.dtype,
            "device": self.sampler.device_name,
            "seconds": image.seconds,
            "original_size": image.original_size,
            **scores,
        }
        return Sample(row, encode_png(image.pixels))


def make_batch(spec: JobSpec, sampler: Sampler, start: int, stop: int) -> list[Image]:
    """The images at positions [start, stop) of the plan, made together; bad ones are made again.

    A NaN or black image is tried once in higher precision, then replaced from the phase's reserve seeds. A retry runs
    the same whole batch (all of it on the same reserve) and keeps only what is needed, so that position, reserve and
    dtype are enough to replay any image.
    """
    places = spec.plan.at(start, stop)
    images: dict[int, Image] = {}
    for reserve in range(MAX_RESERVE + 1):
        for dtype in (spec.dtype, HIGHER_PRECISION.get(spec.dtype)):
            if dtype is None:
                continue
            for image, bad in replay_batch(spec, sampler, start, stop, reserve, dtype):
                if image.position in images:
                    continue
                if bad:
                    log.warning("bad image: %s-%08d, reserve %d, %s", image.code, image.index, reserve, dtype)
                else:
                    images[image.position] = image
            if len(images) == len(places):
                return [images[position] for position in range(start, stop)]
    missing = next(f"{code}-{index:08d}" for p, (code, index) in enumerate(places, start) if p not in images)
    raise BuilderError(
        f"image {missing} came out black or not finite with its seed and all {MAX_RESERVE} reserves",
        f"the checkpoint {spec.checkpoint} or its dtype ({spec.dtype}) is broken: try --set sample.dtype=float32",
    )


def replay_batch(
    spec: JobSpec, sampler: Sampler, start: int, stop: int, reserve: int, dtype: str
) -> list[tuple[Image, bool]]:
    """Run one batch of the plan on one reserve in one dtype: each image, and whether it is bad."""
    places = spec.plan.at(start, stop)
    classes = spec.config.classes
    requests = [
        Request(code, classes.label(code), seed_of(spec.config.seed, classes.label(code), index, reserve))
        for code, index in places
    ]
    batch: Batch = sampler.generate(requests, dtype=dtype)
    return [
        (
            Image(
                code, index, start + i, requests[i].seed, reserve, dtype,
                list(batch.original_sizes[i]), batch.seconds / len(places), batch.pixels[i],
            ),
            bool(batch.bad[i]),
        )
        for i, (code, index) in enumerate(places)
    ]  # fmt: skip

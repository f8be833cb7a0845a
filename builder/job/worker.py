"""One worker: a loaded model and scorer that turn units of the plan into committed shards.

On a GPU a batch is scored and encoded on threads while the next is drawn, and a unit may be committed while the next
begins, so that the device has work all the time. A CPU worker has one core, on which threads would only take turns:
there everything happens in order. Samples are put together in the plan's order either way.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from builder.errors import BuilderError
from builder.job.plan import Unit, batches
from builder.job.spec import JobSpec
from builder.models.checkpoint import read_checkpoint
from builder.phases import ClassTable
from builder.quality.features.cache import save_features
from builder.quality.image_scores import stamps_of
from builder.quality.reference import load_reference
from builder.quality.scorer import Scorer
from builder.sampling.device import dtype_name
from builder.sampling.sampler import HIGHER_PRECISION, Request, Sampler, load_sampler
from builder.sampling.seeds import MAX_RESERVE, seed_of
from builder.shards.dataset import Dataset, find_dataset
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
    micro_batch: int
    original_size: int
    seconds: float
    pixels: Any  # uint8 [H, W, 3]


Finished = tuple[list[Sample], np.ndarray]  # of a batch: what goes into the shard, and the features [N, dimension]
ENCODERS = 4  # threads: a PNG of 512 px takes longer than its share of scoring


class _InOrder(Executor):
    """Runs what is submitted at once, here; an error is raised at once, too."""

    def submit(self, call: Callable[..., Any], /, *args: Any, **keywords: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(call(*args, **keywords))
        return future


class Worker:
    """Loads once; `make(unit)` generates, scores and commits one shard.

    device: a torch device. overlap: score, encode and commit on threads; None: where the device is not the CPU.
    """

    def __init__(self, spec: JobSpec, device: str, overlap: bool | None = None) -> None:
        self.spec = spec
        self.dataset = Dataset(spec.name, Storage(spec.out))
        self.checkpoint = read_checkpoint(Path(spec.checkpoint))
        self.sampler = load_sampler(self.checkpoint, spec.config, device)
        real = find_dataset(spec.real, spec.real_out)
        self.reference = load_reference(self.dataset)
        self.scorer = Scorer(self.reference, real, spec.config.score, device)
        self._scoring: Executor = _InOrder()
        self._encoding: Executor = _InOrder()
        if self.sampler.device.type != "cpu" if overlap is None else overlap:
            # One thread scores: the order of its work, and with it every bit, is that of the batches.
            self._scoring = ThreadPoolExecutor(1, "score", initializer=torch.set_num_threads, initargs=(1,))
            self._encoding = ThreadPoolExecutor(ENCODERS, "encode")
        self._stream: torch.cuda.Stream | None = None  # of its own, else scoring would wait for the next batch's steps
        if self.sampler.device.type == "cuda":
            torch.cuda.synchronize(self.sampler.device)  # what was loaded on the default stream is there
            self._stream = torch.cuda.Stream(self.sampler.device)

    def make(self, unit: Unit, on_batch: Callable[[int], None]) -> int:
        """Make and commit one unit; `on_batch` hears of each batch's new images. Returns how many were replaced."""
        return self.begin(unit, on_batch).result()

    def begin(self, unit: Unit, on_batch: Callable[[int], None]) -> Future[int]:
        """Draw one unit. The result, how many images were replaced, comes once the unit is committed.

        The next unit may begin before. An error of scoring or writing is the result's, or is raised here.
        """
        pending: list[Future[Finished]] = []
        replaced = 0
        try:
            for start, stop in batches(unit, self.spec.config.sample.batch_size):
                images = make_batch(self.spec, self.sampler, start, stop)
                kept = [image for image in images if unit.start <= image.position < unit.stop]
                pending.append(self._scoring.submit(self._finish, kept))
                replaced += sum(image.reserve > 0 for image in kept)
                on_batch(len(kept))
                _raise_errors(pending)
            return self._scoring.submit(self._commit, unit, pending, replaced)
        except BaseException:
            for future in pending:
                future.cancel()
            raise

    def _finish(self, images: Sequence[Image]) -> Finished:
        """Score and encode a batch."""
        payloads = self._encoding.map(encode_png, [image.pixels for image in images])
        with self._on_own_stream():
            scores = self.scorer.score([image.pixels for image in images], [image.code for image in images])
        samples = [
            self._sample(image, score, payload)
            for image, score, payload in zip(images, scores, payloads, strict=True)
        ]  # fmt: skip
        return samples, self.scorer.last_features

    def _commit(self, unit: Unit, pending: Sequence[Future[Finished]], replaced: int) -> int:
        """Write the shard of a unit whose batches are finished: they were submitted before this."""
        parts = [future.result() for future in pending]
        samples = [sample for part, _ in parts for sample in part]
        place = {"start": str(unit.start), "stop": str(unit.stop), **stamps_of(self.reference)}
        if not write_shard(self.dataset.storage, self.dataset.name, unit.number, samples, place, shared=True):
            return replaced  # a peer's shard is there, maybe with other pixels: these features are not of it
        hashes = [sample.row["sha256"] for sample in samples]
        size, features = self.spec.config.sample.size, np.concatenate([features for _, features in parts])
        save_features(self.dataset, unit.number, self.scorer.extractor, size, hashes, features)
        return replaced

    def _on_own_stream(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def _sample(self, image: Image, scores: dict[str, Any], payload: bytes) -> Sample:
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
            "guidance_interval": sample.guidance_interval or None,
            "steps": sample.steps,
            "scheduler": sample.scheduler,
            "batch_size": sample.batch_size,
            "micro_batch": image.micro_batch if image.micro_batch < sample.batch_size else None,
            "dtype": image.dtype,
            "device": self.sampler.device_model,
            "seconds": image.seconds,
            "original_size": [image.original_size] * 2,
            **scores,
        }
        return Sample(row, payload)


def _raise_errors(pending: Sequence[Future[Any]]) -> None:
    """Raise the error of a batch that could not be scored now, rather than once its whole unit is drawn."""
    for future in pending:
        if future.done():
            future.result()


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
    spec: JobSpec, sampler: Sampler, start: int, stop: int, reserve: int, precise: bool, micro_batch: int | None = None
) -> list[tuple[Image, bool]]:
    """Run one batch of the plan on one reserve, in the job's dtype or the next higher: each image, and if it is bad.

    `micro_batch`: how many images at once it was made of where memory had run out.
    """
    places = spec.plan.at(start, stop)
    labels = [spec.config.classes.label(code) for code, _ in places]
    seeds = [seed_of(spec.config.seed, label, index, reserve) for (_, index), label in zip(places, labels, strict=True)]
    requests = [Request(code, label, seed) for (code, _), label, seed in zip(places, labels, seeds, strict=True)]
    batch = sampler.generate(requests, precise, micro_batch)
    dtype = dtype_name(HIGHER_PRECISION[sampler.dtype] if precise else sampler.dtype)
    seconds = batch.seconds / len(places)
    return [
        (
            Image(
                code, index, start + i, seeds[i], reserve, dtype, batch.micro_batch, batch.original_sizes[i], seconds,
                batch.pixels[i],
            ),
            bad,
        )
        for i, ((code, index), bad) in enumerate(zip(places, batch.bad, strict=True))
    ]  # fmt: skip

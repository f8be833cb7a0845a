"""The whole job against the plain loop: same model, same machine, one run, interleaved, ratios with their spread."""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from builder.bench.flops import Cost, sampler_cost
from builder.bench.plain import Loop, PlainLoop
from builder.bench.stages import Stages, measure_unit
from builder.job.devices import cores, prepare
from builder.job.engines import engine_of
from builder.job.plan import Unit
from builder.job.spec import JobSpec
from builder.job.worker import Worker
from builder.models.checkpoint import read_checkpoint
from builder.models.load import load_pipeline
from builder.quality.reference import Reference, save_reference
from builder.sampling.device import resolve_dtype
from builder.shards.dataset import Dataset, find_dataset
from builder.shards.storage import Storage

OLD_STEPS = 50


@dataclass(frozen=True)
class JobTime:
    """A run of the job: images, seconds with loading, and seconds and images from the first batch on."""

    images: int
    seconds: float
    steady_images: int
    steady_seconds: float

    @property
    def rate(self) -> float:
        """Images/s once the workers are at work; loading comes once."""
        return self.steady_images / self.steady_seconds

    @property
    def whole_rate(self) -> float:
        return self.images / self.seconds


@dataclass(frozen=True)
class Round:
    """One repeat: the plain loop at the job's steps, the old way, one worker, all workers; in this order, at once."""

    same: Loop
    old: Loop
    one: JobTime
    all: JobTime

    @property
    def ratios(self) -> dict[str, float]:
        rate = self.all.rate
        return {
            "job / plain loop, same steps": rate * self.same.per_image,
            "job / plain loop, same steps, nothing compared": rate * self.same.unscored,
            "job / old way (50 steps, one by one)": rate * self.old.per_image,
            "job / old way, nothing compared": rate * self.old.unscored,
            "all workers / one worker": rate / self.one.rate,
            "all workers / one worker, with loading": self.all.whole_rate / self.one.whole_rate,
        }


class Bench:
    """A job to measure. `spec` says which; its name and output are not used: all goes into a temporary folder."""

    def __init__(self, spec: JobSpec, reference: Reference) -> None:
        self.spec, self.reference = spec, reference
        self.device = prepare(0)
        self._folder = tempfile.TemporaryDirectory(prefix="builder-bench-")
        self._runs = 0

    def close(self) -> None:
        self._folder.cleanup()

    def stages(self, images: int) -> tuple[Stages, Cost]:
        """One worker, in this process, on one unit: where its time goes, and what an image costs in FLOPs."""
        spec = self._fresh()
        worker = Worker(spec, self.device)
        worker.make(Unit(0, 0, spec.config.sample.batch_size), lambda images: None)  # to warm up
        first = spec.config.sample.batch_size
        stages = measure_unit(worker, Unit(1, first, first + images))
        return stages, sampler_cost(worker.sampler)

    def round(self, units: int, workers: int, plain_images: int, plain_batch: int, old_images: int) -> Round:
        """One repeat. units: of `shards.images_per_shard` images each, for either run of the job."""
        codes = [code for code, _ in self.spec.plan.at(0, max(plain_images, old_images))]
        with tempfile.TemporaryDirectory(dir=self._folder.name) as folder:
            plain = self._plain(codes)
            torch.set_num_threads(cores())  # the plain loop has the whole machine
            try:
                plain.run(codes[:1], 2, 1, Path(folder))  # to warm up
                steps = self.spec.config.sample.steps
                same = plain.run(codes[:plain_images], steps, plain_batch, Path(folder))
                old = plain.run(codes[:old_images], OLD_STEPS, 1, Path(folder))
            finally:
                torch.set_num_threads(1)
                del plain
        return Round(same, old, self._job(units, 1), self._job(units, workers))

    def _plain(self, codes: Sequence[str]) -> PlainLoop:
        config = self.spec.config
        dtype = resolve_dtype(config.sample.dtype, self.device)
        pipeline = load_pipeline(read_checkpoint(Path(self.spec.checkpoint)), self.device, dtype)
        real = find_dataset(self.spec.real, self.spec.real_out)
        keys = {key: code for code in set(codes) for key in self.reference.panel[code]}
        panels: dict[str, list[object]] = {code: [] for code in codes}
        for row in real.table().to_pylist():
            if row["key"] in keys:
                panels[keys[row["key"]]].append(real.pixels(row))
        prompts = {phase.code: phase.prompt for phase in config.classes}
        return PlainLoop(pipeline, config.sample, prompts, panels, config.score.ssim_size)  # type: ignore[arg-type]

    def _job(self, units: int, workers: int) -> JobTime:
        spec = self._fresh()
        length = spec.config.shards.images_per_shard
        watch = _Watch()
        started = time.perf_counter()
        planned = [Unit(number, number * length, (number + 1) * length) for number in range(units)]
        engine_of("local")(spec, planned, workers, watch)
        seconds = time.perf_counter() - started
        if watch.reasons or watch.began is None:
            raise RuntimeError(f"the job failed: {watch.reasons[:1]}")
        steady = watch.images - watch.first
        return JobTime(watch.images, seconds, steady, started + seconds - watch.began)

    def _fresh(self) -> JobSpec:
        """The job in an output root of its own, with the reference of its scores ready."""
        self._runs += 1
        spec = dataclasses.replace(self.spec, name="bench", out=f"{self._folder.name}/{self._runs}")
        save_reference(Dataset(spec.name, Storage(spec.out)), self.reference)
        return spec


class _Watch:
    """The Report that notes when the first images were there."""

    def __init__(self) -> None:
        self.images = self.first = 0
        self.began: float | None = None
        self.reasons: list[str] = []

    def batch(self, images: int) -> None:
        if self.began is None:
            self.began, self.first = time.perf_counter(), images
        self.images += images

    def done(self, unit: Unit, replaced: int) -> None: ...

    def failed(self, unit: Unit, reason: str) -> None:
        self.reasons.append(reason)


def spread(rounds: Sequence[Round]) -> list[tuple[str, float, float, float]]:
    """(ratio, median, least, largest) over the repeats."""
    found = {name: [each.ratios[name] for each in rounds] for name in rounds[0].ratios}
    return [(name, statistics.median(values), min(values), max(values)) for name, values in found.items()]


def repeat(count: int, one: Callable[[], Round], say: Callable[[str], None]) -> list[Round]:
    """`count` rounds, each told when it is done: a long run that is stopped has said something."""
    rounds = []
    for number in range(1, count + 1):
        rounds.append(one())
        found = rounds[-1]
        say(
            f"repeat {number} of {count}: plain {found.same.per_image:.2f} s an image "
            f"({found.same.unscored:.2f} without comparing), old way {found.old.per_image:.2f}, "
            f"one worker {found.one.rate:.2f} images/s, all {found.all.rate:.2f}"
        )
    return rounds

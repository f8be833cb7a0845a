"""Run a batch job from its spec to a complete dataset."""

from __future__ import annotations

import datetime
import logging
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from builder.config import fingerprint
from builder.errors import BuilderError
from builder.job import stopping
from builder.job.crew import Alone, Together, alone, together
from builder.job.devices import device_kind, prepare
from builder.job.engines import engine_name, engine_of, ranks
from builder.job.failures import Failures
from builder.job.launch import Place, place_of
from builder.job.notices import notices
from builder.job.pending import all_units, committed_units
from builder.job.plan import Unit
from builder.job.spec import JobSpec
from builder.models.checkpoint import DEMO
from builder.quality.build import build_reference
from builder.quality.duplicates import mark_duplicates
from builder.quality.reference import has_reference, load_reference, reference_path, save_reference
from builder.sampling.seeds import MAX_INDEX
from builder.shards.commit import STAGED
from builder.shards.dataset import Dataset, find_dataset
from builder.shards.lock import exclusive
from builder.shards.repair import drop_aside
from builder.shards.storage import Storage
from builder.trust import vouch

log = logging.getLogger(__name__)
VERSIONS = ("torch", "diffusers", "transformers", "numpy", "pillow")


@dataclass
class Outcome:
    """What a run did. `failed` maps unit numbers that were given up to the reason."""

    dataset: Dataset
    images: int
    made: int
    replaced: int
    seconds: float
    failed: dict[int, str] = field(default_factory=dict)


class Watch(Protocol):
    """Who looks on while a job runs in rounds, and may end it by raising."""

    asked: str  # what all rounds are for: ranks of one job agree in it, though one may be a round ahead of another

    def ready(self, dataset: Dataset) -> None:
        """The reference of the scores is there, and no unit of this run is made yet."""

    def committed(self, unit: Unit) -> dict[str, str]:
        """A unit is committed; what the progress bar shall say from now on."""


def run_job(
    spec: JobSpec, count: int, *, lineage: dict[str, Any], licence: dict[str, str],
    engine: str = "local", workers: int = 1, say: Callable[[str], None] = print,
    address: str = "auto", grace: float = 0.0, watch: Watch | None = None,
) -> Outcome:  # fmt: skip
    """Make the first `count` images of the spec's plan, continuing whatever is there.

    `lineage` and `licence` are the checkpoint's and go into dataset.json. `workers`: 0 leaves it to the engine.
    `grace`: seconds that the units in hand may take after SIGTERM, which ends in Terminated. Raises BuilderError for a
    bad count, for settings that differ from those its shards were made with, and for a full disk.
    """
    _require_possible(spec, count)
    engine = engine_name(engine)
    run_alone = engine_of(engine, address) if engine != "ranks" else None
    dataset = spec.dataset
    asked = watch.asked if watch else str(count)
    with stopping.graceful(grace), crew_of(engine, spec, asked) as crew:
        if crew.place.local:
            say = _to_nobody  # the first rank of a machine speaks for the others
        info, committed, units = _survey(spec, count)
        total = sum(len(unit) for unit in units)
        if len(committed) == len(units) and info["state"] == "complete":
            say(f"dataset '{spec.name}' has its {total:,} images already; nothing to do")
            return Outcome(dataset, total, 0, 0, 0.0)
        crew.once(
            "begin",
            partial(_is_begun, spec, count, asked),
            lambda: _begin(spec, count, asked, crew, _new_info(spec, lineage, licence), say),
        )
        _, committed, units = _survey(spec, count)
        done = {unit.number for unit in committed}
        pending = [unit for unit in units if unit.number not in done]
        failures = Failures(dataset)
        if watch:
            watch.ready(dataset)
        described = _describe(spec, count, units, pending, workers)
        say(described)
        log.info("%s", described)
        there = total - sum(len(unit) for unit in pending)
        progress = _Progress(total, there, max(1, workers), failures, crew.place, watch)
        started = time.monotonic()
        try:
            with progress.bar, notices(partial(progress.bar.write, file=sys.stderr)):
                if run_alone is not None:
                    run_alone(spec, pending, workers, progress)
                elif isinstance(crew, Together):
                    ranks.run(spec, pending, progress, crew, failures)
        except BaseException as stop:
            log.error("ended before its time: %r", stop)
            raise
        stopping.leave_if_asked()
        outcome = Outcome(
            dataset, total, progress.made, progress.replaced, time.monotonic() - started, progress.failures
        )
        log.info(
            "made %d images in %.0f s, %d replaced, %d units given up",
            outcome.made, outcome.seconds, outcome.replaced, len(outcome.failed),
        )  # fmt: skip
        if not outcome.failed:
            crew.once("finish", partial(_is_finished, spec, count, asked), lambda: _finish(dataset, total))
        return outcome


def crew_of(engine: str, spec: JobSpec, asked: str) -> AbstractContextManager[Alone | Together]:
    """The process alone, or the rank among its peers; ranks agree in the settings and in what is asked for."""
    if engine != "ranks":
        return alone(spec.dataset)
    return together(spec.dataset, place_of(), job=fingerprint({**spec.keys(), "asked": asked}), device=device_kind())


def begun(spec: JobSpec) -> tuple[dict[str, Any], list[Unit]]:
    """dataset.json (empty where there is none) and the committed units of what `spec` is to continue.

    BuilderError when no batch job made it, or one with other settings.
    """
    info = spec.dataset.info if spec.dataset.exists() else {}
    if info and (info.get("parent") or "fingerprint_keys" not in info):
        raise BuilderError(f"'{spec.name}' is a dataset that no batch job made", "choose another --name")
    committed = committed_units(spec.dataset)
    if info and committed:
        spec.require_same(info["fingerprint_keys"])
    return info, committed


def _survey(spec: JobSpec, count: int) -> tuple[dict[str, Any], list[Unit], list[Unit]]:
    """What is begun, and all units up to `count`."""
    info, committed = begun(spec)
    return info, committed, all_units(committed, count, spec.config.shards.images_per_shard)


def _planned(info: dict[str, Any], asked: str) -> int:
    """How far the plan of a job that asked for the same was to go, in dataset.json; 0: it isn't at work."""
    return int(info.get("planned", 0)) if info.get("asked") == asked else 0


def _is_begun(spec: JobSpec, count: int, asked: str) -> bool:
    """Whether a peer has prepared the dataset for this job, or for a later round of it."""
    if not spec.dataset.exists() or not has_reference(spec.dataset):
        return False
    info = spec.dataset.info
    return info["state"] == "partial" and _planned(info, asked) >= count and spec.is_same(info["fingerprint_keys"])


def _is_finished(spec: JobSpec, count: int, asked: str) -> bool:
    """Whether a peer has called the dataset complete, or is in a later round already."""
    info = spec.dataset.info
    return info["state"] == "complete" or _planned(info, asked) > count


def _begin(
    spec: JobSpec, count: int, asked: str, crew: Alone | Together, new: dict[str, Any], say: Callable[[str], None]
) -> None:
    """Prepare the dataset for the job: dataset.json, and the reference that its scores are measured by."""
    dataset = spec.dataset
    info, committed = begun(spec)
    if info and not (_planned(info, asked) and spec.is_same(info["fingerprint_keys"])):
        crew.require_no_other_job(f"dataset '{spec.name}' was begun with another COUNT or other settings")
    if not (info and committed):
        # without a shard there is nothing to keep: a mistake in the settings may be mended under the same name
        dataset.storage.remove(reference_path(dataset))
        info = new
    if committed and has_reference(dataset):
        load_reference(dataset)  # scores that can't be continued are said before anything is changed
    crew.tidy()
    info |= {"state": "partial", "asked": asked, "planned": count}
    if spec.config.allow_leak:
        info["allow_leak"] = spec.config.allow_leak  # travels with all that is filtered from it
    dataset.write_info(info)
    _build_reference(spec, dataset, say)


def _finish(dataset: Dataset, total: int) -> None:
    """All units are there: compare the images with each other, and call the dataset complete.

    Leftovers are swept away, also under ranks: what one of them may still be committing is there already.
    """
    for folder in (f"shards/{dataset.name}", f"manifests/{dataset.name}"):
        dataset.storage.sweep(folder)
    dataset.storage.remove(f"manifests/{dataset.name}/{STAGED}")
    drop_aside(dataset)
    reference = load_reference(dataset)
    mark_duplicates(dataset, reference.copy["threshold"], device=prepare(0))
    info = dataset.info
    info = {key: value for key, value in info.items() if key not in ("asked", "planned")}
    dataset.write_info(info | {"state": "complete", "count": total, "scores": reference.protocol()})


def log_to_file(spec: JobSpec) -> Path:
    """Send the run's log to logs/NAME-TIME.log beside the shards (object stores: in the working directory)."""
    storage = Storage(spec.out)
    folder = Path(storage.path("logs") if storage.is_local else "logs")
    folder.mkdir(parents=True, exist_ok=True)
    stamp = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%S")
    place = place_of()
    rank = f"-rank{place.rank}" if place.world > 1 else ""
    path = folder / f"{spec.name}-{stamp}{rank}.log"
    logging.basicConfig(
        filename=path, level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True
    )
    logging.raiseExceptions = False  # a full disk is told once, by the shard that does not fit; not by each log line
    log.info("command: %s", " ".join(sys.argv))
    log.info("fingerprint: %s %s", spec.fingerprint, spec.keys())
    return path


class Estimate:
    """How long a run takes, from its first batches: said once, after `first` batches beyond the very first.

    Loading and the first batch are left out: they come once, and the rest is what makes a run long.
    """

    def __init__(self, pending: int, first: int) -> None:
        self.pending, self.first = pending, first
        self.began: float | None = None
        self.batches = self.images = 0

    def batch(self, images: int, now: float) -> str | None:
        """Hear of a finished batch at `now` (seconds of a monotonic clock); the estimate in words when it is due."""
        if self.began is None:
            self.began = now
            return None
        self.batches += 1
        self.images += images
        if self.batches != self.first or self.images <= 0 or now <= self.began:
            return None
        rate = self.images / (now - self.began)
        minutes, seconds = divmod(round(self.pending / rate), 60)
        hours, minutes = divmod(minutes, 60)
        return f"estimate: {self.pending:,} images at {rate:.1f} images/s take {hours}:{minutes:02d}:{seconds:02d}"


class _Progress:
    """The Report that draws a progress bar and keeps count."""

    def __init__(
        self, total: int, there: int, workers: int, failed: Failures, place: Place, watch: Watch | None
    ) -> None:
        self.bar = tqdm(
            total=total, initial=there, unit=" images", dynamic_ncols=True, smoothing=0.05, disable=place.local > 0
        )
        self.estimate = Estimate((total - there) // place.world, first=2 * workers)
        self.failed_units, self.watch = failed, watch
        self.made = 0
        self.replaced = 0
        self.failures: dict[int, str] = {}

    def batch(self, images: int) -> None:
        self.bar.update(images)
        said = self.estimate.batch(images, time.monotonic())
        if said:
            self.bar.write(said)
            log.info("%s", said)

    def done(self, unit: Unit, replaced: int) -> None:
        log.info("unit %d committed: %d images, %d replaced", unit.number, len(unit), replaced)
        self.made += len(unit)
        self.replaced += replaced
        self.bar.set_postfix({"shard": str(unit.number), **(self.watch.committed(unit) if self.watch else {})})
        self.failed_units.clear(unit)

    def elsewhere(self, unit: Unit) -> None:
        """Another rank made it."""
        self.bar.update(len(unit))

    def failed(self, unit: Unit, reason: str) -> None:
        log.error("unit %d given up: %s", unit.number, reason)
        self.failures[unit.number] = reason
        self.failed_units.record(unit, reason)


def _require_possible(spec: JobSpec, count: int) -> None:
    """Refuse a COUNT without images, or beyond the seeds there are; the last batch may reach beyond COUNT."""
    if count < 1:
        raise BuilderError(f"COUNT is {count}", "ask for at least one image")
    counts = spec.plan.counts(count + spec.config.sample.batch_size)
    code = max(counts, key=lambda code: counts[code])
    if counts[code] > MAX_INDEX + 1:
        raise BuilderError(
            f"COUNT {count:,} asks for {counts[code]:,} images of phase {code}; {MAX_INDEX + 1:,} seeds are there",
            "split it over datasets with different --seed",
        )


def _new_info(spec: JobSpec, lineage: dict[str, Any], licence: dict[str, str]) -> dict[str, Any]:
    return {
        "name": spec.name,
        "state": "partial",
        "origin": "synthetic",
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "classes": spec.config.classes.to_json(),
        "config": spec.config.to_json(),
        "checkpoint": "demo" if Path(spec.checkpoint) == DEMO else spec.checkpoint,  # that one is wherever we are
        "checkpoint_voucher": vouch(spec.checkpoint),
        "fingerprint": spec.fingerprint,
        "fingerprint_keys": spec.keys(),
        "lineage": lineage,
        "licence": licence,
        "parent": None,
        "versions": {package: version(package) for package in VERSIONS},
    }


def _build_reference(spec: JobSpec, dataset: Dataset, say: Callable[[str], None]) -> None:
    """Panel, probe, gates and yardsticks from the real crops, once; they are the scores' version from then on."""
    if has_reference(dataset):
        return
    real = find_dataset(spec.real, spec.real_out)
    say(f"making the reference of the scores from the real crops of '{real.name}'")
    device = prepare(0)  # one thread here too: several fight with other processes, and then take minutes
    size = spec.config.sample.size
    save_reference(dataset, build_reference(real, spec.config.score, spec.plan.codes, image_size=size, device=device))


def remake_reference(spec: JobSpec) -> None:
    """Make the reference of a complete dataset's scores again, in place of one that is damaged or missing.

    BuilderError when what comes out is not what the scores were made by: the real crops or the settings have changed.
    """
    dataset, real = spec.dataset, find_dataset(spec.real, spec.real_out)
    recorded = dataset.info.get("scores", {}).get("version")
    size = spec.config.sample.size
    made = build_reference(real, spec.config.score, spec.plan.codes, image_size=size, device=prepare(0))
    if recorded is not None and made.version != recorded:
        raise BuilderError(
            f"the scores of '{dataset.name}' were not made by the crops that '{real.name}' now has",
            f"bring these back, or run `builder score {dataset.name} --against {real.name}`",
        )
    with exclusive(dataset):
        save_reference(dataset, made)


def _to_nobody(said: str) -> None:
    pass


def _describe(spec: JobSpec, count: int, units: list[Unit], pending: list[Unit], workers: int) -> str:
    """The plan in words. Disk is estimated from the bytes of a photographic PNG; time comes with the first images."""
    images = sum(len(unit) for unit in pending)
    size = spec.config.sample.size
    phases = ", ".join(f"{code} {n:,}" for code, n in spec.plan.counts(count).items())
    megabytes = images * (PNG_BYTES_PER_PIXEL * size * size + TAR_OVERHEAD) / 1e6
    by = f"{workers} worker{'s' if workers != 1 else ''}" if workers else "each worker there is"
    return (
        f"dataset '{spec.name}': {count:,} images of {size} px ({phases}) in {len(units)} shards, "
        f"{len(pending)} of them to make\n"
        f"{images:,} images on {by}, about {megabytes:,.0f} MB; "
        f"the time is estimated from the first batches"
    )


PNG_BYTES_PER_PIXEL = 2.0
TAR_OVERHEAD = 4096  # headers, label, JSON and padding of one sample

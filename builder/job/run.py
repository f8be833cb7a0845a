"""Run a batch job from its spec to a complete dataset."""

from __future__ import annotations

import datetime
import logging
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tqdm import tqdm

from builder.errors import BuilderError
from builder.job.devices import prepare
from builder.job.engines import engine_of
from builder.job.lock import exclusive
from builder.job.pending import all_units, committed_units
from builder.job.plan import Unit
from builder.job.spec import JobSpec
from builder.shards.dataset import Dataset, find_dataset
from builder.shards.storage import Storage

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


def run_job(
    spec: JobSpec, count: int, *, lineage: dict[str, Any], licence: dict[str, str],
    engine: str = "local", workers: int = 1, say: Callable[[str], None] = print,
) -> Outcome:  # fmt: skip
    """Make the first `count` images of the spec's plan, continuing whatever is there.

    `lineage` and `licence` are the checkpoint's and go into dataset.json. Raises BuilderError for a bad count, for
    settings that differ from those the dataset was begun with, and for a full disk.
    """
    if count < 1:
        raise BuilderError(f"COUNT is {count}", "ask for at least one image")
    run_units = engine_of(engine)
    dataset = Dataset(spec.name, Storage(spec.out))
    with exclusive(dataset):
        if dataset.exists():
            info = dataset.info
            if info.get("origin") != "synthetic" or "fingerprint_keys" not in info:
                raise BuilderError(f"'{spec.name}' is a dataset that no batch job made", "choose another --name")
            spec.require_same(info["fingerprint_keys"])
        else:
            info = _new_info(spec, lineage, licence)
        committed = committed_units(dataset)
        units = all_units(committed, count, spec.config.shards.images_per_shard)
        done = {unit.number for unit in committed}
        pending = [unit for unit in units if unit.number not in done]
        total = sum(len(unit) for unit in units)
        if not pending and info["state"] == "complete":
            say(f"dataset '{spec.name}' has its {total:,} images already; nothing to do")
            return Outcome(dataset, total, 0, 0, 0.0)
        info["state"] = "partial"
        dataset.write_info(info)
        _build_reference(spec, dataset, say)
        say(_describe(spec, count, units, pending, workers))
        progress = _Progress(total, total - sum(len(unit) for unit in pending))
        started = time.monotonic()
        with progress.bar:
            run_units(spec, pending, workers, progress)
        outcome = Outcome(
            dataset, total, progress.made, progress.replaced, time.monotonic() - started, progress.failures
        )
        if not outcome.failed:
            info.update(state="complete", count=total, scores=_score_protocol(dataset))
            dataset.write_info(info)
        return outcome


def log_to_file(spec: JobSpec) -> Path:
    """Send the run's log to logs/NAME-TIME.log beside the shards (object stores: in the working directory)."""
    folder = Path(spec.out if Storage(spec.out).is_local else ".") / "logs"
    folder.mkdir(parents=True, exist_ok=True)
    stamp = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%S")
    path = folder / f"{spec.name}-{stamp}.log"
    logging.basicConfig(
        filename=path, level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True
    )
    log.info("command: %s", " ".join(sys.argv))
    log.info("fingerprint: %s %s", spec.fingerprint, spec.keys())
    return path


class _Progress:
    """The Report that draws a progress bar and keeps count."""

    def __init__(self, total: int, there: int) -> None:
        self.bar = tqdm(total=total, initial=there, unit=" images", dynamic_ncols=True, smoothing=0.05)
        self.made = 0
        self.replaced = 0
        self.failures: dict[int, str] = {}

    def batch(self, images: int) -> None:
        self.bar.update(images)

    def done(self, unit: Unit, replaced: int) -> None:
        log.info("unit %d committed: %d images, %d replaced", unit.number, len(unit), replaced)
        self.made += len(unit)
        self.replaced += replaced
        self.bar.set_postfix(shard=unit.number)

    def failed(self, unit: Unit, reason: str) -> None:
        log.error("unit %d given up: %s", unit.number, reason)
        self.failures[unit.number] = reason


def _new_info(spec: JobSpec, lineage: dict[str, Any], licence: dict[str, str]) -> dict[str, Any]:
    return {
        "name": spec.name,
        "state": "partial",
        "origin": "synthetic",
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "classes": spec.config.classes.to_json(),
        "config": spec.config.to_json(),
        "checkpoint": spec.checkpoint,
        "fingerprint": spec.fingerprint,
        "fingerprint_keys": spec.keys(),
        "lineage": lineage,
        "licence": licence,
        "parent": None,
        "versions": {package: version(package) for package in VERSIONS},
    }


def _build_reference(spec: JobSpec, dataset: Dataset, say: Callable[[str], None]) -> None:
    """Panel, gates and yardsticks from the real crops, once; they are the scores' version from then on."""
    from builder.quality.reference import build_reference, has_reference, save_reference

    if has_reference(dataset):
        return
    real = find_dataset(spec.real, spec.real_out)
    say(f"choosing the reference panel and gates from the real crops of '{real.name}'")
    prepare(0)  # one thread here too: several fight with other processes, and then take minutes
    size = spec.config.sample.size
    save_reference(dataset, build_reference(real, spec.config.score, spec.plan.codes, image_size=size))


def _score_protocol(dataset: Dataset) -> dict[str, Any]:
    from builder.quality.reference import load_reference

    return load_reference(dataset).protocol()


def _describe(spec: JobSpec, count: int, units: list[Unit], pending: list[Unit], workers: int) -> str:
    """The plan in words. Disk is estimated from the bytes of a photographic PNG; time comes with the first images."""
    images = sum(len(unit) for unit in pending)
    size = spec.config.sample.size
    phases = ", ".join(f"{code} {n:,}" for code, n in spec.plan.counts(count).items())
    megabytes = images * (PNG_BYTES_PER_PIXEL * size * size + TAR_OVERHEAD) / 1e6
    return (
        f"dataset '{spec.name}': {count:,} images of {size} px ({phases}) in {len(units)} shards, "
        f"{len(pending)} of them to make\n"
        f"{images:,} images on {workers} worker{'s' if workers != 1 else ''}, about {megabytes:,.0f} MB; "
        f"time left is shown as soon as the first images are made"
    )


PNG_BYTES_PER_PIXEL = 2.0
TAR_OVERHEAD = 4096  # headers, label, JSON and padding of one sample

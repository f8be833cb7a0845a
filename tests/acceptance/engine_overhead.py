"""What an engine adds to the work: units without any, committed as ever; and the plan and status of a huge dataset.

    python -m tests.acceptance.engine_overhead [--units 10000] [--workers N] [--images 10000000] [--folder DIR]

Part 1 runs UNITS units of one one-pixel image through the `local` engine: hand-out, tar, Parquet, fsync, report. It
prints units/s with the split over the steps of a commit, and the memory of the parent on the way.
Part 2 puts down the manifests of IMAGES images in shards of 200 (only the few that are read have content) and times
what a job and `builder status` read before anything else.
Fails when a target of the project is missed: 100 units/s; a parent that grows by less than 20 MB; 10 s and 1 GB.
"""

from __future__ import annotations

import argparse
import cProfile
import os
import pstats
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from builder.config import Config
from builder.job.engines import local
from builder.job.plan import Plan, Unit
from builder.job.spec import JobSpec
from builder.shards.storage import Storage
from builder.shards.writer import Sample, encode_png, image_row, write_shard

NAME = "overhead"
UNITS_A_SECOND = 100
GROWTH_MB = 20
PLAN_SECONDS, PLAN_MB = 10, 1000
STEPS = {  # of a commit, by the function that takes the time
    "sync to disk": ("fsync",),
    "Parquet": ("_encoded", "to_table"),
    "tar": ("_tar",),
    "names (link, rename, remove, list)": ("link", "replace", "unlink", "listdir", "mkdir", "stat"),
}


class Empty:
    """Makes units without a model: one pixel each."""

    def __init__(self, spec: JobSpec) -> None:
        self.storage = Storage(spec.out)
        self.pixels = np.full((1, 1, 3), 128, np.uint8)

    def make(self, unit: Unit, on_batch: Callable[[int], None]) -> int:
        row = image_row(f"{NAME}-I-{unit.start:08d}", "I", 0, "synthetic", self.pixels) | {"index": unit.start}
        metadata = {"start": str(unit.start), "stop": str(unit.stop)}
        write_shard(self.storage, NAME, unit.number, [Sample(row, encode_png(self.pixels))], metadata, shared=True)
        on_batch(1)
        return 0


def load(spec: JobSpec, device: str) -> Empty:
    return Empty(spec)


class Memory:
    """A report that notes the parent's memory every tenth of the way."""

    def __init__(self, units: int) -> None:
        self.units, self.done_units = units, 0
        self.failures: list[str] = []
        self.began = time.monotonic()
        self.noted: list[tuple[int, float, float]] = []  # units, seconds, MB

    def batch(self, images: int) -> None:
        if self.done_units == 0:
            self.began = time.monotonic()

    def done(self, unit: Unit, replaced: int) -> None:
        self.done_units += 1
        if self.done_units in (1, self.units) or self.done_units % max(1, self.units // 10) == 0:
            self.noted.append((self.done_units, time.monotonic() - self.began, resident()))
            print(
                f"{self.noted[-1][0]:>7} units {self.noted[-1][1]:7.1f} s, parent {self.noted[-1][2]:.1f} MB",
                flush=True,
            )

    def failed(self, unit: Unit, reason: str) -> None:
        self.failures.append(reason)


def resident() -> float:
    """Memory of this process now, in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def spec_of(root: Path) -> JobSpec:
    return JobSpec(
        config=Config(), plan=Plan.of("IPR"), name=NAME, out=str(root), checkpoint="", checkpoint_sha256="",
        dtype="float32", real=None, real_out="",
    )  # fmt: skip


def measure_engine(root: Path, units: int, workers: int) -> bool:
    spec = spec_of(root)
    report = Memory(units)
    local.run(spec, [Unit(n, n, n + 1) for n in range(units)], workers, report, load=load)
    assert not report.failures, report.failures[0]
    assert len(spec.dataset.shard_numbers()) == units
    _, seconds, _ = report.noted[-1]
    rate = (units - 1) / seconds
    growth = report.noted[-1][2] - report.noted[1][2]
    print(f"{units} units on {workers} workers in {seconds:.1f} s: {rate:.0f} units/s (target {UNITS_A_SECOND})")
    print(f"parent grew by {growth:+.1f} MB from a tenth of them to the last (target < {GROWTH_MB})")
    return rate >= UNITS_A_SECOND and growth < GROWTH_MB


def measure_steps(root: Path, units: int = 300) -> None:
    """The split of a unit's time, in one process."""
    maker = Empty(spec_of(root))
    profile = cProfile.Profile()
    began, cpu = time.monotonic(), time.process_time()
    profile.enable()
    for number in range(units):
        maker.make(Unit(number, number, number + 1), lambda images: None)
    profile.disable()
    total, cpu = time.monotonic() - began, time.process_time() - cpu
    spent = dict.fromkeys([*STEPS, "other"], 0.0)
    for (_, _, function), (_, _, _, cumulative, _) in pstats.Stats(profile).stats.items():  # type: ignore[attr-defined]
        for step, names in STEPS.items():
            if any(function in (name, f"<built-in method posix.{name}>") for name in names):
                spent[step] += cumulative if function != "to_table" else 0.0
    spent["other"] = total - sum(spent.values())
    print(f"one process: {1000 * total / units:.2f} ms a unit (profiled), of which {1000 * cpu / units:.2f} ms of CPU")
    for step, seconds in spent.items():
        print(f"  {step:<36}{1000 * seconds / units:7.2f} ms")


PLAN = """
import resource, sys, time
began = time.monotonic()
from builder.job.pending import all_units, committed_units
from builder.job.status import job_status
from builder.shards.dataset import Dataset
from builder.shards.storage import Storage
dataset = Dataset("overhead", Storage(sys.argv[1]))
committed = committed_units(dataset)
units = all_units(committed, int(sys.argv[2]), 200)
print(f"plan: {len(committed):,} of {len(units):,} units committed, {time.monotonic() - began:.2f} s since the start")
status = job_status(dataset)
print(f"status: {status.done:,} done, {status.pending:,} pending, {time.monotonic() - began:.2f} s since the start")
seconds, peak = time.monotonic() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
print(f"{seconds:.2f} s and {peak:.0f} MB together (targets 10 s, 1000 MB)")
sys.exit(not (seconds < 10 and peak < 1000))
"""


def measure_plan(root: Path, images: int) -> bool:
    """All shards but one are there; those that have to be read are real manifests, the others only names."""
    spec = spec_of(root)
    count = images // 200 - 1
    folder = root / "manifests" / NAME
    for number in range(count):
        if number in (0, count - 1):
            row = image_row(f"{NAME}-I-{number:08d}", "I", 0, "synthetic", np.zeros((1, 1, 3), np.uint8))
            metadata = {"start": str(200 * number), "stop": str(200 * (number + 1))}
            write_shard(spec.dataset.storage, NAME, number, [Sample(row, b"")], metadata)
        else:
            (folder / f"shard-{number:06d}.parquet").touch()
    spec.dataset.write_info(
        {
            "state": "partial", "origin": "synthetic", "classes": spec.config.classes.to_json(), "planned": images,
            "fingerprint_keys": spec.keys(),
        }
    )  # fmt: skip
    return subprocess.run([sys.executable, "-c", PLAN, str(root), str(images)], check=False).returncode == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--units", type=int, default=10_000)
    parser.add_argument("--workers", type=int, default=8, help="they wait for the disk more than they compute")
    parser.add_argument("--images", type=int, default=10_000_000)
    parser.add_argument("--folder", help="on the disk to measure [default: a temporary one]")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="builder-overhead-", dir=options.folder))
    try:
        measure_steps(folder / "steps")
        fast = measure_engine(folder / "engine", options.units, options.workers)
        small = measure_plan(folder / "plan", options.images)
    finally:
        shutil.rmtree(folder)
    print(f"peak memory of the parent: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000:.0f} MB")
    print("engine overhead: " + ("all within the targets" if fast and small else "a target is missed"))
    sys.exit(0 if fast and small else 1)


if __name__ == "__main__":
    main()

"""Speed and ratio error of the mixing loader beside what people use: webdataset, MosaicML streaming, litdata.

    python -m tests.acceptance.mixing_speed --out FOLDER [--peers PYTHON] [--json FILE]
    python -m tests.acceptance.mixing_speed --out FOLDER --start 1000000

The same PNGs, 64 and 128 px, lie under FOLDER as our shards (which webdataset reads too) and in the peers' own formats.
Every system decodes them with the same function, in two workers, in a process of its own that the python PYTHON runs
(one environment for all; default: this one). Repeats are interleaved; ratios are taken within a repeat. Cold: all files
of the set are dropped from the page cache (posix_fadvise) before each run. What can't be imported there is named.

--start: manifests of ROWS made-up samples, half real, half synthetic, without and with an index: seconds of the
constructor, the first batch, and a resume at step 10,000; memory of the index.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from tqdm import tqdm

from builder.phases import HEALING_PHASES
from builder.shards.dataset import Dataset
from builder.shards.storage import Storage
from builder.shards.writer import Sample, encode_png, image_row, write_shard
from tests.acceptance import mixing_start
from tests.acceptance.mixing_systems import CONVERSIONS, SYSTEMS
from tests.conftest import textured
from tests.lineages import ALIKE

SIZES = (64, 128)  # px
PER_SHARD = 200
BASES = 64  # pictures that the others are shifted copies of
RATIOS = (0.25, 0.3)
LIMIT = 600  # seconds of one run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=Path, help="folder of the made-up sets; what is there is used")
    parser.add_argument("--peers", default=sys.executable, help="python that can import the peers")
    parser.add_argument("--start", type=int, metavar="ROWS", help="measure start and memory at so many samples")
    parser.add_argument("--samples", type=int, default=12_000, help="in a set, two thirds of them real")
    parser.add_argument("--sizes", type=int, nargs="*", default=SIZES)
    parser.add_argument("--systems", nargs="*", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--caches", nargs="*", choices=("warm", "cold"), default=("warm", "cold"))
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--ratio-batches", type=int, default=500)
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    options = parser.parse_args()
    if options.start:
        figures: dict[str, Any] = mixing_start.measure(options.out, options.start)
    else:
        figures = compare(options)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


def compare(options: argparse.Namespace) -> dict[str, Any]:
    versions = child(options.peers, "available")
    print("versions: " + ", ".join(f"{name} {version}" for name, version in versions.items()))
    usable = {
        name: title for name, (_, package, title) in SYSTEMS.items()
        if name in options.systems and not versions.get(package, "").startswith("absent")
    }  # fmt: skip
    figures: dict[str, Any] = {"versions": versions, "machine": machine(), "speed": {}, "ratio": {}}
    print(f"machine: {figures['machine']}")
    for size in options.sizes:
        folder = prepare(options, size, set(usable))
        for cache in options.caches if options.repeats else ():
            runs = repeated(options, folder, cache, list(usable))
            figures["speed"][f"{size} px, {cache}"] = runs
            print_speed(f"{size} px, {cache} cache", usable, runs)
    if options.ratio_batches:
        figures["ratio"] = ratio_errors(options, usable)
    return figures


def machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = {line.split(":")[1].strip() for line in lines if line.startswith("model name")}
    return f"{len(os.sched_getaffinity(0))} cores, {', '.join(sorted(models))}"


def child(python: str, *arguments: str | Path) -> Any:
    """What tests.acceptance.mixing_systems answers."""
    environment = {
        **os.environ, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore",
        "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    command = [python, "-m", "tests.acceptance.mixing_systems", *map(str, arguments)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LIMIT, check=False)
    if ended.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{ended.stderr[-3000:]}")
    return json.loads(ended.stdout.splitlines()[-1])


# -- the sets -----------------------------------------------------------------------------------------------------


def prepare(options: argparse.Namespace, size: int, usable: set[str]) -> Path:
    """The folder of a set, made where it isn't there yet: our shards and the peers' formats."""
    folder = options.out / f"{options.samples}-{size}"
    for name, share in (("real", 2), ("synthetic", 1)):
        make(folder, name, options.samples * share // 3, size)
    stored = sum(path.stat().st_size for path in (folder / "shards").rglob("*.tar"))
    print(f"== {size} px: {options.samples:,} samples, our shards {stored / 1e6:.0f} MB", end="")
    for target, (system, _) in CONVERSIONS.items():
        if system in usable:
            marker = folder / f"{target}.bytes"
            if not marker.exists():
                marker.write_text(str(child(options.peers, "convert", folder, target)))
            print(f", {target} {int(marker.read_text()) / 1e6:.0f} MB", end="")
    print(flush=True)
    return folder


def make(root: Path, name: str, count: int, size: int) -> None:
    """A dataset of textured pictures: shifted copies of a few, so that making them takes no longer than encoding."""
    dataset = Dataset(name, Storage(root))
    if dataset.exists():
        return
    bases = [textured(number, size) for number in range(BASES)]
    generator = np.random.default_rng(0)
    for number, start in enumerate(tqdm(range(0, count, PER_SHARD), f"{name} shards, {size} px")):
        samples = []
        for index in range(start, min(start + PER_SHARD, count)):
            pixels = np.roll(bases[index % BASES], generator.integers(0, size, 2), axis=(0, 1))
            label = index % len(HEALING_PHASES)
            code = HEALING_PHASES.codes[label]
            row = image_row(f"{name}-{code}-{index:08d}", code, label, name, pixels)
            if name == "real":
                row |= {"patient": f"{index // 10:032x}", "split": "train"}
            samples.append(Sample(row, encode_png(pixels)))
        write_shard(dataset.storage, name, number, samples)
    dataset.write_info(
        {
            "name": name, "state": "complete", "origin": name, "classes": HEALING_PHASES.to_json(), "count": count,
            "lineage": {"known": True, "key_fingerprint": "made up", "patients": [], **ALIKE},
        }
    )  # fmt: skip


def settle(folder: Path, cache: str) -> None:
    """Have all files of a set in the page cache, or none."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                if cache == "cold":
                    os.fsync(file.fileno())
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                else:
                    while file.read(1 << 20):
                        pass


# -- the measurements ---------------------------------------------------------------------------------------------


def repeated(options: argparse.Namespace, folder: Path, cache: str, systems: list[str]) -> dict[str, list[dict]]:
    """Each system's runs: less than an epoch each, so that a cold cache stays cold."""
    batches = options.samples * 2 // 3 // options.batch_size
    runs: dict[str, list[dict]] = {system: [] for system in systems}
    for repeat in range(options.repeats):
        for system in np.roll(systems, repeat).tolist():
            settle(folder, cache)
            runs[system].append(
                child(
                    options.peers, "run", folder, system, "--batches", str(batches),
                    "--batch-size", str(options.batch_size),
                )
            )  # fmt: skip
    return runs


def print_speed(title: str, systems: dict[str, str], runs: dict[str, list[dict]]) -> None:
    columns = "system", "samples/s, median (least-largest)", "ours is faster by", "µs of CPU a sample", "first batch, s"
    print(f"\n{title}\n| {' | '.join(columns)} |")
    print("|---|---|---|---|---|")
    for system, title in systems.items():
        rates, cpu, first = ([run[figure] for run in runs[system]] for figure in ("rate", "cpu", "first"))
        ratios = [mine["rate"] / run["rate"] for mine, run in zip(runs["ours"], runs[system], strict=True)]
        spread = "" if system == "ours" else f"{median(ratios):.2f}x ({min(ratios):.2f}-{max(ratios):.2f})"
        print(
            f"| {title} | {median(rates):,.0f} ({min(rates):,.0f}-{max(rates):,.0f}) | {spread} "
            f"| {median(cpu):.0f} | {median(first):.2f} |"
        )
    others = [system for system in systems if system != "ours"]
    if others:
        fastest = [max(runs[system][repeat]["rate"] for system in others) for repeat in range(len(runs["ours"]))]
        ratios = [run["rate"] / other for run, other in zip(runs["ours"], fastest, strict=True)]
        spread = f"{median(ratios):.2f}x ({min(ratios):.2f}-{max(ratios):.2f})"
        print(f"ours against the fastest other of each repeat: {spread}")
    print(flush=True)


def ratio_errors(options: argparse.Namespace, usable: dict[str, str]) -> dict[str, Any]:
    """Synthetic share of every batch, as the training process gets it."""
    folder = options.out / f"{options.samples}-{min(options.sizes)}"
    figures: dict[str, Any] = {}
    print(f"Deviation of the synthetic share of {options.ratio_batches} batches of {options.batch_size} from the ratio")
    print("| system | " + " | ".join(f"at {ratio:g}: mean, largest, share over all" for ratio in RATIOS) + " |")
    print("|---|" + "---|" * len(RATIOS))
    for system, title in usable.items():
        if system == "web":
            continue  # keeps no ratio
        cells = []
        for ratio in RATIOS:
            shares = child(
                options.peers, "run", folder, system, "--shares", "--batches", str(options.ratio_batches),
                "--batch-size", str(options.batch_size), "--ratio", str(ratio),
            )  # fmt: skip
            off, whole = np.abs(np.array(shares) - ratio), float(np.mean(shares))
            figures[f"{system} {ratio:g}"] = {"mean": off.mean(), "largest": off.max(), "overall": whole}
            cells.append(f"{off.mean():.4f}, {off.max():.4f}, {whole:.4f}")
        print(f"| {title} | " + " | ".join(cells) + " |", flush=True)
    least = [min(ratio * options.batch_size % 1, 1 - ratio * options.batch_size % 1) for ratio in RATIOS]
    print(f"(the least that whole samples allow: {', '.join(f'{x / options.batch_size:.4f}' for x in least)})")
    return figures


if __name__ == "__main__":
    main()

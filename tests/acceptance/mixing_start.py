"""Start and memory of the mixing loader on manifests of a million samples; `tests.acceptance.mixing_speed --start`."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from builder.phases import HEALING_PHASES
from builder.shards.compact import compact
from builder.shards.dataset import Dataset
from builder.shards.index import INDEX
from builder.shards.schema import SCHEMA
from builder.shards.storage import Storage
from builder.shards.writer import encode_png, manifest_path, tar_path, write_manifest
from tests.acceptance.manifests import SIZE, table_of
from tests.lineages import ALIKE

PER_SHARD = 200
BATCH = 32
RESUMED = 10_000  # step
NAMES = ("real", "synthetic")

CHILD = """
import json, sys, time
from pathlib import Path
import pyarrow.parquet
from builder.mixing import MixedLoader

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

root, what = sys.argv[1:]
pyarrow.array([0])  # imports pandas where there is one
before, began, cpu = resident(), time.perf_counter(), time.process_time()
loader = MixedLoader(real="real", synthetic="synthetic", ratio=0.25, batch_size={batch}, out=root)
made = time.perf_counter() - began
if what == "rows":
    found = [[a.tolist() for a in loader.schedule.batch(0, step * {batch}, {batch})] for step in (0, {step})]
    print(json.dumps(found))
    sys.exit()
if what == "resume":
    loader.load_state_dict({{**loader.state_dict(), "position": {step} * {batch}}})
next(iter(loader))
print(json.dumps({{
    "constructor": made, "batch": time.perf_counter() - began, "cpu": time.process_time() - cpu,
    "columns": sum(source.nbytes for source in loader.sources),
    "grown": resident() - before, "samples": sum(len(source) for source in loader.sources),
}}))
"""


def measure(out: Path, rows: int, repeats: int = 3) -> dict[str, Any]:
    """Print and return seconds and bytes a sample, without and with an index; the least of `repeats` runs each."""
    root = out / f"start-{rows}"
    datasets = [_make(root, name, rows // 2) for name in NAMES]
    for number, step in enumerate(_child(root, "rows")):
        for deck, row in zip(*step, strict=True):
            _fill(root, NAMES[deck], row)
        print(f"images of batch {(0, RESUMED)[number]:,} are there", flush=True)
    figures: dict[str, Any] = {}
    for index in ("without an index", "with an index"):
        for dataset in datasets:
            if index == "with an index":
                compact(dataset)
            else:
                (root / f"manifests/{dataset.name}" / INDEX).unlink(missing_ok=True)
        for what in ("first", "resume"):
            runs = [_child(root, what) for _ in range(repeats)]
            best = {name: min(run[name] for run in runs) for name in runs[0]}
            figures[f"{what}, {index}"] = best
            print(
                f"{what} batch, {index}: {best['batch']:.2f} s ({best['cpu']:.2f} s of CPU), of which constructor "
                f"{best['constructor']:.2f} s; columns {best['columns'] / best['samples']:.1f} bytes a sample, "
                f"process grown by {best['grown'] / best['samples']:.1f}",
                flush=True,
            )
    return figures


def _child(root: Path, what: str) -> Any:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", CHILD.format(batch=BATCH, step=RESUMED), str(root), what]
    return json.loads(subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True).stdout)


# -- made-up manifests whose images are made when they are needed -------------------------------------------------


def _pixels(name: str, row: int) -> np.ndarray:
    """The image of a row: uint8 RGB [8, 8, 3] that no other row has."""
    return np.frombuffer(f"{name:>12}{row:012d}".encode() * 8, np.uint8).reshape(8, 8, 3)


def _png(name: str, row: int) -> bytes:
    """Of the same length for all rows: padded by bytes after its end, which no reader looks at."""
    return encode_png(_pixels(name, row)).ljust(SIZE - 512, b"\0")


def _make(root: Path, name: str, rows: int) -> Dataset:
    """Manifests of `rows` rows beside tars that are holes; what is there is used."""
    dataset = Dataset(name, Storage(root))
    if dataset.exists():
        return dataset
    (root / f"shards/{name}").mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    first = table_of(generator, PER_SHARD)
    fixed = {
        "origin": [name] * PER_SHARD, "width": [8] * PER_SHARD, "height": [8] * PER_SHARD,
        "split": ["train" if name == "real" else None] * PER_SHARD,
    }  # fmt: skip
    for start in tqdm(range(0, rows, PER_SHARD), f"made-up manifests, {name}"):
        number, places = start // PER_SHARD, range(start, min(start + PER_SHARD, rows))
        labels = generator.integers(0, len(HEALING_PHASES), PER_SHARD).tolist()  # so quotas repeat only after all rows
        codes = [HEALING_PHASES.codes[label] for label in labels]
        changed = {
            **fixed,
            "label": labels,
            "phase": codes,
            "patient": [f"{place // 10:032x}" for place in places],
            "key": [f"{name}-{code}-{place:08d}" for code, place in zip(codes, places, strict=False)],
            "shard": [tar_path(name, number)] * PER_SHARD,
            "sha256": [hashlib.sha256(_pixels(name, place)).hexdigest() for place in places],
        }
        table = first.slice(0, len(places))
        for column, values in changed.items():
            field = SCHEMA.field(column)
            table = table.set_column(SCHEMA.get_field_index(column), field, pa.array(values[: len(places)], field.type))
        with open(root / tar_path(name, number), "wb") as file:
            file.truncate(PER_SHARD * (SIZE + 512))
        write_manifest(dataset.storage, manifest_path(name, number), table)
    dataset.write_info(
        {
            "name": name, "state": "complete", "origin": name, "classes": HEALING_PHASES.to_json(), "count": rows,
            "lineage": {"known": True, "key_fingerprint": "made up", "patients": [], **ALIKE},
        }
    )  # fmt: skip
    return dataset


def _fill(root: Path, name: str, row: int) -> None:
    number, place = divmod(row, PER_SHARD)
    with open(root / tar_path(name, number), "r+b") as file:
        file.seek(place * (SIZE + 512) + 512)
        file.write(_png(name, row))

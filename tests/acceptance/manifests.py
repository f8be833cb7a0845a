"""Read manifests of millions of rows: time and peak memory of the commands that promise to stream them.

    python -m tests.acceptance.manifests --root FOLDER [--rows 10000000] [--per-shard 200]

The manifests are made up, with every column there is; the tars are holes of the right size, so no image can be read.
What is there is used again. Each command runs in a process of its own, first without an index, then with one.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from builder.phases import HEALING_PHASES
from builder.shards.dataset import Dataset
from builder.shards.schema import SCHEMA
from builder.shards.storage import Storage
from builder.shards.writer import shard_name, tar_path, write_manifest
from tests.lineages import ALIKE

NAME = "many"
SIZE = 3000  # bytes of a made-up image
LIMIT = 2.0  # GB of peak memory

DRAW = """
from builder.quality.sets.scores import draw
from builder.shards.dataset import find_dataset
found = find_dataset("{name}", "{root}")
size, rows = draw(found, 1000, 0)
copies = found.table(("phase", "copy_score"))
print(f"metrics reads {{copies.num_rows:,}} rows, draws {{len(rows):,}} of {{size}} px")
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", required=True, help="Output root for the made-up dataset.")
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--per-shard", type=int, default=200)
    options = parser.parse_args()
    root = Path(options.root)
    dataset = make(root, options.rows, options.per_shard)
    print(f"{options.rows:,} rows in {len(dataset.shard_numbers()):,} manifests")
    builder = [sys.executable, "-m", "builder"]
    scores = ["--no-gates", "--band", "sharpness", "0.05", "0.95", "--min-ssim", "0.3", "--max-copy-score", "0.9"]
    whole = ["--quantile", "realism", "0.05", "0.95", "--keep-hard", "0.1", "--balance"]
    at = ["--out", str(root)]
    worst = 0.0
    for index in ("without an index", "with an index"):
        if index == "with an index":
            measure("compact", [*builder, "compact", NAME, *at])
        for title, command in (
            ("list", [*builder, "list", *at]),
            ("verify --fast", [*builder, "verify", NAME, "--fast", *at]),
            ("filter --dry-run", [*builder, "filter", NAME, *scores, *whole, "--dry-run", *at]),
            ("filter --view", [*builder, "filter", NAME, *scores, *whole, "--view", "--name", "seen", *at]),
            ("metrics' reading", [sys.executable, "-c", DRAW.format(name=NAME, root=root)]),
        ):
            worst = max(worst, measure(f"{title}, {index}", command))
        measure("rm", [*builder, "rm", "seen", "--yes", *at])
        Path(root / f"manifests/{NAME}/index.parquet").unlink(missing_ok=True)
    print(f"highest peak: {worst:.2f} GB, of {LIMIT:g} GB")
    assert worst < LIMIT


def measure(title: str, command: list[str]) -> float:
    """Run a command in a process of its own; its peak resident memory in GB."""
    started = time.monotonic()
    sys.stdout.flush()
    child = os.spawnv(os.P_NOWAIT, command[0], command)
    _, status, usage = os.wait4(child, 0)
    assert status == 0, f"{title} ended with {os.waitstatus_to_exitcode(status)}"
    peak = usage.ru_maxrss * 1024 / 1e9
    cpu = usage.ru_utime + usage.ru_stime
    print(f"== {title}: {time.monotonic() - started:.0f} s ({cpu:.0f} s of CPU), peak {peak:.2f} GB", flush=True)
    return peak


def make(root: Path, rows: int, per_shard: int) -> Dataset:
    """A complete synthetic dataset of made-up rows; what a killed run left is continued."""
    dataset = Dataset(NAME, Storage(root))
    if dataset.exists():
        return dataset
    generator = np.random.default_rng(0)
    folder = root / f"shards/{NAME}"
    folder.mkdir(parents=True, exist_ok=True)
    first = table_of(generator, per_shard)
    for number in tqdm(range(-(-rows // per_shard)), "made-up manifests"):
        start = number * per_shard
        table = _shard(first, number, start, min(per_shard, rows - start))
        with open(root / tar_path(NAME, number), "wb") as file:
            file.truncate(per_shard * (SIZE + 512))
        write_manifest(dataset.storage, f"manifests/{NAME}/{shard_name(number)}.parquet", table)
    info = {
        "name": NAME, "state": "complete", "origin": "synthetic", "created": "2026-01-01T00:00:00+00:00",
        "classes": HEALING_PHASES.to_json(), "count": rows, "config": {}, "parent": None,
        "lineage": {"known": True, "key_fingerprint": "test", "patients": [], **ALIKE},
        "licence": {"base": None, "data": "CC0"},
    }  # fmt: skip
    dataset.write_info(info)
    return dataset


def table_of(generator: np.random.Generator, rows: int) -> pa.Table:
    """Rows with a value in every column that synthetic images have."""
    columns = {}
    for field in SCHEMA:
        if field.type == pa.float32():
            top = 100 if field.name.endswith("_real_pct") else 1
            columns[field.name] = pa.array(generator.uniform(0, top, rows).astype(np.float32))
        elif field.type == pa.string():
            columns[field.name] = pa.nulls(rows, field.type)
        elif pa.types.is_integer(field.type):
            columns[field.name] = pa.array(np.zeros(rows, np.int64)).cast(field.type)
        else:
            columns[field.name] = pa.nulls(rows, field.type)
    codes = np.array(HEALING_PHASES.codes)[np.arange(rows) % 3]
    text = {
        "phase": codes.tolist(), "origin": ["synthetic"] * rows, "checkpoint": ["epoch_0030"] * rows,
        "checkpoint_sha256": ["c" * 64] * rows, "prompt": ["PHASE_I, diabetic foot ulcer, inflammatory phase"] * rows,
        "negative_prompt": ["blurry, out of focus, low quality, jpeg artifacts, text, watermark, logo"] * rows,
        "scheduler": ["dpmpp_2m_karras"] * rows, "dtype": ["bfloat16"] * rows, "device": ["a device"] * rows,
        "sha256": [generator.bytes(32).hex() for _ in range(rows)],
    }  # fmt: skip
    columns |= {name: pa.array(values) for name, values in text.items()}
    columns["label"] = pa.array(np.arange(rows) % 3, pa.int32())
    columns["offset"] = pa.array(np.arange(rows) * (SIZE + 512) + 512)
    columns["size"] = pa.array(np.full(rows, SIZE - 512))
    columns["width"] = columns["height"] = pa.array(np.full(rows, 512), pa.int32())
    return pa.table([columns[field.name] for field in SCHEMA], schema=SCHEMA)


def _shard(first: pa.Table, number: int, start: int, rows: int) -> pa.Table:
    """The rows of one shard: those of the first with other keys and places, and every score moved a little."""
    table = first.slice(0, rows)
    places = np.arange(start, start + rows)
    keys = [f"{NAME}-{code}-{place:08d}" for code, place in zip(table["phase"].to_pylist(), places, strict=True)]
    changed = {
        "key": pa.array(keys), "shard": pa.array([tar_path(NAME, number)] * rows), "index": pa.array(places // 3),
        "position": pa.array(places), "seed": pa.array(places.astype(np.uint32)),
    }  # fmt: skip
    for name in ("ssim", "realism", "sharpness", "copy_score", "phase_margin", "phase_probability_real_pct"):
        values = table[name].to_numpy()
        changed[name] = pa.array(np.roll(values, number) * np.float32(0.9 + number % 97 / 970))
    for name, values in changed.items():
        table = table.set_column(table.schema.get_field_index(name), SCHEMA.field(name), values)
    metadata = {"tar_sha256": f"{number:064x}", "start": str(start), "stop": str(start + rows), "scores": "s" * 64}
    return table.replace_schema_metadata(metadata)


if __name__ == "__main__":
    main()

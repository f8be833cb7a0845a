"""The damage matrix: every file of datasets, a checkpoint, an adapter's run, each damaged in every way; misses are 0.

    python -m tests.acceptance.damage [--flips 12] [--seed 0] [--only NAME,...]

The files are made by the commands themselves, on tiny data: a packed dataset, a scored one with index and caches, a
batch job's, one filtered by copying and one by view, one indexed in place, a checkpoint, a training run with its resume
states. Each file has single bits flipped at seeded places (half of them in its last 400 bytes), is cut short, zeroed,
emptied, deleted, and replaced by another of its kind. A damage is noticed when `builder verify` or `builder checkpoint
verify` ends with 1 or 2. It may pass only if what is read of the file is the same (the rule stands in
tests.damages.reads_the_same). Prints a table of kinds of files against kinds of damage: noticed of tried (and how many
read the same); exits with 1 when anything was missed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter
from pathlib import Path

from builder.errors import BuilderError
from tests.acceptance.torn import commands, import_all, run
from tests.damages import damages, files_of, of_one_kind, reads_the_same

MADE = ("pack", "shards", "filter", "filter --view", "index", "train", "compact", "export")
COLUMNS = ("flip", "truncate", "zero", "empty", "delete", "swap")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flips", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", metavar="NAME,...")
    options = parser.parse_args()
    import_all()
    tried, found, same = Counter[tuple[str, str]](), Counter[tuple[str, str]](), Counter[tuple[str, str]]()
    misses = []
    with tempfile.TemporaryDirectory(prefix="builder-damage-") as folder:
        made = {one.name: one for one in commands(Path(folder), only=MADE)}
        for name in [name for name in MADE if not options.only or name in options.only.split(",")]:
            root = made[name].root
            ended = run(root, made[name].words)
            if ended.code:
                raise AssertionError(f"{name} ended with {ended.code}:\n{ended.output}")
            if name == "filter":
                run(root, ["compact", "kept"])
            places = _places(name, root)
            noticed = _noticed(name, root)
            if noticed:
                raise AssertionError(f"undamaged, {name} has findings: {noticed}")
            files = [path for place in places for path in files_of(place)]
            for path in files:
                before = path.read_bytes()
                for what, damage in damages(path, of_one_kind(path, files), options.seed, options.flips):
                    kind = (_kind(name, path), what.split()[0])
                    damage()
                    tried[kind] += 1
                    if reads_the_same(path, before):
                        same[kind] += 1
                    elif _noticed(name, root):
                        found[kind] += 1
                    else:
                        misses.append(f"{name}: {path.relative_to(root)}: {what}")
                    path.write_bytes(before)
            print(f"{name}: {len(files)} files", file=sys.stderr, flush=True)
    _print(tried, found, same)
    for miss in misses:
        print(f"MISS {miss}")
    print(f"{sum(tried.values())} damages, {sum(same.values())} read the same, {len(misses)} misses")
    sys.exit(bool(misses))


def _places(name: str, root: Path) -> list[Path]:
    """The folders of what a command made."""
    folders = {
        "pack": ["manifests/packed", "shards/packed"], "shards": ["manifests/made", "shards/made"],
        "filter": ["manifests/kept", "shards/kept"], "filter --view": ["manifests/seen"],
        "index": ["manifests/theirs", "theirs-tars"], "train": ["run"],
        "compact": ["manifests/clinic", "shards/clinic"], "export": ["handed/on"],
    }  # fmt: skip
    return [root / folder for folder in folders[name]]


def _noticed(name: str, root: Path) -> list[str]:
    """What `verify`, or `checkpoint verify`, finds."""
    from builder.models.verification import verify_checkpoint
    from builder.shards.dataset import Dataset
    from builder.shards.storage import Storage
    from builder.shards.verify import verify_dataset
    from builder.training.verification import verify_run

    if name == "train":
        return verify_run(root / "run").findings
    if name == "export":
        report = verify_checkpoint(root / "handed/on")
        return report.findings + report.notes
    dataset = _places(name, root)[0].name
    try:
        return verify_dataset(Dataset(dataset, Storage(root)))
    except BuilderError as error:
        return [str(error)]


def _kind(name: str, path: Path) -> str:
    if path.suffix == ".parquet":
        return "rejects" if path.parent.name == "rejects" else "index" if path.name == "index.parquet" else "manifest"
    if path.suffix == ".pt":
        return "resume state"
    if path.suffix == ".safetensors":
        return "weights"
    if name in ("train", "export") and path.name not in ("checkpoint.json", "history.json"):
        return "settings"
    return {".npy": "features", ".tar": "tar"}.get(path.suffix, path.name)


def _print(tried: Counter[tuple[str, str]], found: Counter[tuple[str, str]], same: Counter[tuple[str, str]]) -> None:
    print(f"{'noticed of tried':<18}" + "".join(f"{column:>14}" for column in COLUMNS))
    for kind in sorted({kind for kind, _ in tried}):
        cells = []
        for column in COLUMNS:
            key = (kind, column)
            equal = f" (={same[key]})" if same[key] else ""
            cells.append(f"{found[key]}/{tried[key]}{equal}" if tried[key] else "-")
        print(f"{kind:<18}" + "".join(f"{cell:>14}" for cell in cells))


if __name__ == "__main__":
    main()

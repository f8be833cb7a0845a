"""Do pack, shards, filter and the loader take as long as in an earlier checkout? Both are timed in one run, in turns.

    git worktree add ../before COMMIT
    python -m tests.acceptance.speed_before_after --before ../before --repeats 5

What is compared is the processor time (user and system) of each whole command, of all its processes: other work on the
machine hardly changes it. Each side packs the same rendered photographs, and goes on with what it made itself.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from builder.demo.phantom import write_photographs
from tests.acceptance.report import Report

MOST = 1.05  # of the time before
LOADER = """
from builder.mixing import MixedLoader
train = MixedLoader(real="clinic0", synthetic="made0", ratio=0.5, batch_size=32, size=64, out=".", allow_leak="speed")
for epoch in range(EPOCHS):
    train.set_epoch(epoch)
    for batch in train:
        pass
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, required=True, help="checkout to compare with")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--patients", type=int, default=40)
    parser.add_argument("--count", type=int, default=200, help="images of `shards` and of `filter`")
    parser.add_argument("--epochs", type=int, default=20, help="of the loader")
    given = parser.parse_args()
    sides = {"before": given.before.resolve(), "now": Path(__file__).resolve().parents[2]}
    report = Report("processor time of commands, before and now", repeats=given.repeats, **sides)
    with tempfile.TemporaryDirectory(prefix="builder-speed-") as scratch:
        write_photographs(Path(scratch) / "clinic", patients=given.patients, workers=2)
        times: dict[str, dict[str, list[float]]] = {}
        for repeat in range(given.repeats):
            order = list(sides) if repeat % 2 else list(reversed(sides))
            for name, words in commands(Path(scratch) / "clinic", repeat, given.count, given.epochs).items():
                for side in order:
                    root = Path(scratch) / side
                    root.mkdir(exist_ok=True)
                    seconds = processor_seconds(words, sides[side], root)
                    times.setdefault(name, {}).setdefault(side, []).append(seconds)
    rows, ratios = [], {}
    for name, by_side in times.items():
        before, now = (by_side[side] for side in ("before", "now"))
        ratios[name] = statistics.median(now) / statistics.median(before)
        rows.append([name, *(f"{min(t):.2f} / {statistics.median(t):.2f}" for t in (before, now)), ratios[name]])
    report.table("seconds: least / median", ["command", "before", "now", "now/before"], rows)
    for name, ratio in ratios.items():
        report.criterion(f"{name} takes {ratio:.3f} of the time before (required <= {MOST})", ratio <= MOST)
    report.end()


def commands(clinic: Path, repeat: int, count: int, epochs: int) -> dict[str, list[str]]:
    """The words of each command, in the order in which they need each other; run with the root as working directory."""
    builder = [sys.executable, "-m", "builder"]
    made = f"made{repeat}"
    pack = [*builder, "pack", str(clinic / "photographs"), "--boxes", str(clinic / "boxes.csv")]
    pack += ["--labels", str(clinic / "labels.csv"), "--name", f"clinic{repeat}"]
    shards = [*builder, "shards", "--count", str(count), "--real", "clinic0", "--name", made, "--engine", "inline"]
    return {
        "pack": pack,
        "shards": [*shards, "--allow-leak", "speed"],
        "filter": [*builder, "filter", made, "--no-gates", "--min-ssim", "0"],
        "loader": [sys.executable, "-c", LOADER.replace("EPOCHS", str(epochs))],
    }


def processor_seconds(words: list[str], checkout: Path, root: Path) -> float:
    """User and system time of a command and its processes. RuntimeError, with what it said, when it fails."""
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(words, cwd=root, env=environment, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


if __name__ == "__main__":
    main()

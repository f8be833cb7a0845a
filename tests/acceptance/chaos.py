"""Kill the batch job again and again: no partial shard is ever visible, and the final shards are always the same.

    python -m tests.acceptance.chaos [--kills 25] [--count 200]

Two parts, on the demo checkpoint:
1. `kill -9` of the whole job (parent and workers) at random moments; after each kill what is visible is checked, and
   the same command is run again. At the end the tars are compared with an uninterrupted run's.
2. The commit itself: a process that dies (os._exit, no cleanup) at every single file-system step of committing a
   shard, one step further each time, until the commit survives.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from builder.shards.dataset import Dataset
from builder.shards.storage import Storage
from builder.shards.verify import verify_dataset

SHARD = 50  # images: four shards of a 200-image run, so that kills fall before, in and between commits

DYING_COMMIT = """
import os, sys
from builder.shards import storage, writer
from tests.conftest import textured

fatal, root = int(sys.argv[1]), sys.argv[2]
step = 0

def dies_at(call):
    def stepped(*args, **keywords):
        global step
        step += 1
        if step == fatal:
            os._exit(9)  # no cleanup, nothing flushed: as kill -9
        return call(*args, **keywords)
    return stepped

for name in ("fsync", "replace", "fdopen", "fchmod"):
    setattr(os, name, dies_at(getattr(os, name)))
storage.tempfile.mkstemp = dies_at(storage.tempfile.mkstemp)
pictures = [textured(i, 32) for i in range(3)]
samples = [
    writer.Sample(writer.image_row(f"x-I-{i:08d}", "I", 0, "real", p), writer.encode_png(p))
    for i, p in enumerate(pictures)
]
writer.write_shard(storage.Storage(root), "x", 0, samples)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="builder-chaos-") as folder:
        kill_the_commit(Path(folder) / "commit")
        kill_the_job(Path(folder), options.kills, options.count, random.Random(options.seed))
    print("chaos: all held")


def kill_the_commit(root: Path) -> None:
    """Die at every step of a commit: until the manifest is in place nothing is visible, from then on all of it."""
    visible_after = None
    for fatal in range(1, 200):
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir()
        died = subprocess.run([sys.executable, "-c", DYING_COMMIT, str(fatal), str(root)], check=False).returncode
        dataset = Dataset("x", Storage(root))
        if dataset.shard_numbers():
            visible_after = visible_after or fatal
            rows = list(dataset.images())  # every image decodes from its place in the tar
            assert len(rows) == 3, "a visible shard is not whole"
        else:
            assert visible_after is None, "a shard vanished"
        if died == 0:
            print(
                f"commit: killed before each of its {fatal - 1} steps; visible, and whole, before step {visible_after}"
            )
            return
        assert died == 9, f"the commit ended with {died}"
    raise AssertionError("the commit never ended")


def kill_the_job(root: Path, kills: int, count: int, chance: random.Random) -> None:
    """Kill whole jobs at random moments; what is visible must always verify, and the end must not differ."""
    command = [
        sys.executable, "-m", "builder", "shards", "--count", str(count), "--name", "chaos", "--workers", "2",
        "--set", f"shards.images_per_shard={SHARD}",
        "--allow-leak", "a small phantom holds out other patients than the checkpoint's; nothing is judged here",
    ]  # fmt: skip
    whole, chaotic = root / "whole", root / "chaotic"
    subprocess.run(
        [sys.executable, "-m", "builder", "demo", "phantom", "--patients", "60", "--out", str(whole)], check=True
    )
    chaotic.mkdir()
    for folder in ("shards", "manifests"):
        shutil.copytree(whole / folder, chaotic / folder)
    started = time.monotonic()
    subprocess.run([*command, "--out", str(whole)], check=True)
    length = time.monotonic() - started
    killed = 0
    while killed < kills:
        moment = chance.uniform(0, length)
        job = subprocess.Popen(
            [*command, "--out", str(chaotic)],
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            ended = job.wait(moment)
        except subprocess.TimeoutExpired:
            os.killpg(job.pid, signal.SIGKILL)
            ended = job.wait()
        dataset = Dataset("chaos", Storage(chaotic))
        visible = dataset.shard_numbers()
        if dataset.exists():
            partial = verify_dataset(dataset)
            assert not partial, f"after kill {killed + 1}: {partial}"
        if ended == -signal.SIGKILL:
            killed += 1
            print(f"kill {killed:>2} after {moment:5.1f} s of {length:.0f}: shards visible {visible}, all whole")
        else:  # it was done before its moment: that is no kill, so start over
            assert ended == 0, f"the job ended with {ended}"
            subprocess.run([sys.executable, "-m", "builder", "rm", "chaos", "--yes", "--out", str(chaotic)], check=True)
    subprocess.run([*command, "--out", str(chaotic)], check=True)
    one, two = _tars(whole), _tars(chaotic)
    assert one == two, f"the tars differ: {one} {two}"
    print(f"{kills} kills, then run to the end: {len(one)} tars, byte-identical to an uninterrupted run's")


def _tars(root: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(root.glob("shards/chaos/*.tar"))
    }


if __name__ == "__main__":
    main()

"""Kill the batch job again and again: no partial shard is ever visible, and the final shards are always the same.

    python -m tests.acceptance.chaos [--kills 25] [--tiny] [--engines local,ranks,array]

Two parts:
1. The commit itself: a process that dies (os._exit, no cleanup) at every single file-system step of committing a
   shard, one step further each time, until the commit survives.
2. `kill -9` of single workers and of the whole job (parent and workers, or all ranks) at random moments, each job under
   another engine than the one before: local workers, two ranks as torchrun starts them, a SLURM array of three. After
   each kill what is visible is checked, and the same command is run again; when a job comes to its end, COUNT grows and
   it goes on. At the end the tars are compared with those of an uninterrupted run in one process. A job that commits
   nothing for --patience seconds counts as hung.
The demo checkpoint, or with --tiny a small random one that makes an image in a millisecond, so that 200 kills take
minutes.
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
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from builder.job.presence import died_here, signs
from builder.shards.dataset import Dataset
from builder.shards.storage import Storage
from builder.shards.verify import verify_dataset

EARLY = 0.15  # share of jobs that are killed from the start on, while they load, too

TINY = """
name: tiny
real: clinic
sample: {size: 16, steps: 2, batch_size: 4}
score: {ssim_size: 64, panel: 2}
shards: {images_per_shard: 8}
"""

DYING_COMMIT = """
import os, sys
from builder.shards import storage, writer
from tests.conftest import textured

fatal, root, shared = int(sys.argv[1]), sys.argv[2], sys.argv[3] == "shared"
step = 0

def dies_at(call):
    def stepped(*args, **keywords):
        global step
        step += 1
        if step == fatal:
            os._exit(9)  # no cleanup, nothing flushed: as kill -9
        return call(*args, **keywords)
    return stepped

for name in ("fsync", "replace", "link", "unlink", "listdir", "mkdir", "fdopen", "fchmod"):
    setattr(os, name, dies_at(getattr(os, name)))
storage.tempfile.mkstemp = dies_at(storage.tempfile.mkstemp)
pictures = [textured(i, 32) for i in range(3)]
samples = [
    writer.Sample(writer.image_row(f"x-I-{i:08d}", "I", 0, "real", p), writer.encode_png(p))
    for i, p in enumerate(pictures)
]
writer.write_shard(storage.Storage(root), "x", 0, samples, shared=shared)
"""


@dataclass(frozen=True)
class Setting:
    """What is made, from what: the words of `builder shards`, images a shard, and how many shards COUNT grows by."""

    words: list[str]
    images_per_shard: int
    shards: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--engines", default="local,ranks,array")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--patience", type=float, default=600, metavar="SECONDS")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="builder-chaos-") as folder:
        for way in ("alone", "shared"):
            kill_the_commit(Path(folder) / "commit", way)
        setting = (tiny if options.tiny else demo)(Path(folder))
        chaos = Chaos(Path(folder), setting, options.engines.split(","), options.patience, random.Random(options.seed))
        chaos.kill(options.kills)
        chaos.compare()
    print("chaos: all held")


def kill_the_commit(root: Path, way: str) -> None:
    """Die at every step of a commit: until the manifest is in place nothing is visible, from then on all of it."""
    visible_after = None
    for fatal in range(1, 200):
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir()
        died = subprocess.run([sys.executable, "-c", DYING_COMMIT, str(fatal), str(root), way], check=False).returncode
        dataset = Dataset("x", Storage(root))
        if dataset.shard_numbers():
            visible_after = visible_after or fatal
            rows = list(dataset.images())  # every image decodes from its place in the tar
            assert len(rows) == 3, "a visible shard is not whole"
        else:
            assert visible_after is None, "a shard vanished"
        if died == 0:
            print(
                f"commit ({way}): killed before each of its {fatal - 1} steps; "
                f"visible, and whole, before step {visible_after}"
            )
            return
        assert died == 9, f"the commit ended with {died}"
    raise AssertionError("the commit never ended")


def demo(root: Path) -> Setting:
    """The checkpoint that ships, 50 images a shard: kills fall before, in and between commits."""
    subprocess.run(
        [sys.executable, "-m", "builder", "demo", "phantom", "--patients", "60", "--out", str(root / "real")],
        check=True,
    )
    words = [
        "--set", "shards.images_per_shard=50", "--real", str(root / "real/manifests/phantom"),
        "--allow-leak", "a small phantom holds out other patients than the checkpoint's; nothing is judged here",
    ]  # fmt: skip
    return Setting(words, images_per_shard=50, shards=4)


def tiny(root: Path) -> Setting:
    from tests.conftest import save_tiny_checkpoint, write_real

    write_real(root / "real", per_phase=6, size=24)
    (root / "tiny.yaml").write_text(TINY)
    words = ["--config", str(root / "tiny.yaml"), "--checkpoint", str(save_tiny_checkpoint(root / "tiny"))]
    return Setting([*words, "--real", str(root / "real/manifests/clinic")], images_per_shard=8, shards=12)


class Chaos:
    """One dataset, made by job after job, each killed or come to its end."""

    def __init__(
        self, root: Path, setting: Setting, engines: list[str], patience: float, chance: random.Random
    ) -> None:  # fmt: skip
        self.root, self.setting, self.engines, self.patience, self.chance = root, setting, engines, patience, chance
        self.dataset = Dataset("chaos", Storage(root / "chaotic"))
        self.shards = setting.shards
        self.killed: Counter[str] = Counter()

    def command(self, out: str, *words: str) -> list[str]:
        count = str(self.shards * self.setting.images_per_shard)
        return [
            sys.executable, "-m", "builder", "shards", "--count", count, "--name", "chaos", *self.setting.words,
            "--out", str(self.root / out), *words,
        ]  # fmt: skip

    def start(self, engine: str) -> list[subprocess.Popen[bytes]]:
        """The processes that a launcher would start; each leads a process group of its own."""
        if engine == "local":
            environs, words = [{}], ["--engine", "local", "--workers", "2"]
        elif engine == "ranks":
            environs = [{"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)} for rank in range(2)]
            words = []
        else:
            names = {"SLURM_ARRAY_TASK_COUNT": "3", "SLURM_ARRAY_TASK_MIN": "0"}
            environs, words = [{**names, "SLURM_ARRAY_TASK_ID": str(task)} for task in range(3)], []
        log = open(self.root / "job.log", "ab")  # noqa: SIM115 - the processes keep it
        return [
            subprocess.Popen(
                self.command("chaotic", *words), env={**os.environ, **environ}, start_new_session=True,
                stdout=log, stderr=log,
            )
            for environ in environs
        ]  # fmt: skip

    def kill(self, kills: int) -> None:
        """Kill workers and whole jobs, `kills` in all."""
        turn = 0
        while sum(self.killed.values()) < kills:
            engine = self.engines[turn % len(self.engines)]
            turn += 1
            jobs = self.start(engine)
            try:
                self._disturb(engine, jobs, kills)
            finally:
                for job in jobs:
                    _kill_group(job)

    def _disturb(self, engine: str, jobs: list[subprocess.Popen[bytes]], kills: int) -> None:
        """Let a job work, kill some of its workers, then all of it; or see it come to its end."""
        workers_to_kill = self.chance.randint(0, 2)
        seen, since = self.dataset.shard_numbers(), time.monotonic()
        early = self.chance.random() < EARLY
        moment = self._next_moment() if early else None
        while any(job.poll() is None for job in jobs):
            if (now := self.dataset.shard_numbers()) != seen:
                seen, since = now, time.monotonic()
            assert time.monotonic() - since < self.patience, f"{engine} hangs; {self._log()}"
            if moment is None and self._at_work():
                moment = self._next_moment()
            if moment is not None and time.monotonic() > moment and sum(self.killed.values()) < kills:
                if workers_to_kill and (worker := self._worker(engine, jobs)):
                    workers_to_kill -= 1
                    os.kill(worker, signal.SIGKILL)
                    self._note(f"a worker of {engine}")
                    moment = None
                elif not workers_to_kill:
                    for job in jobs:
                        _kill_group(job)
                    self._note(f"all of {engine}")
                    return
            time.sleep(0.02)
        codes = [job.wait() for job in jobs]
        left = [code for code in codes if code != -signal.SIGKILL]
        assert all(code == 0 for code in left), f"{engine} ended with {codes}; {self._log()}"
        if left:
            assert self.dataset.info["state"] == "complete", f"{engine} ended without completing the dataset"
            print(f"{engine} came to its end: {len(self.dataset.shard_numbers())} shards, complete")
            self.shards += self.setting.shards

    def _at_work(self) -> bool:
        """Whether a worker has loaded, or a rank begun."""
        found = signs(self.dataset).values()
        return any(not sign.left and not died_here(sign.process) for sign in found)

    def _next_moment(self) -> float:
        """Some time from now: half of them soon, so that they meet a worker in its first unit or in a commit."""
        return time.monotonic() + self.chance.choice([self.chance.uniform(0, 1), self.chance.uniform(1, 10)])

    def _worker(self, engine: str, jobs: list[subprocess.Popen[bytes]]) -> int | None:
        """A process to kill of those that make units; of ranks one must be left, or it is no single worker."""
        if engine == "local":
            children = _children(jobs[0].pid)
            workers = [pid for pid in children if b"spawn_main" in _command_line(pid)]
            for server in [pid for pid in children if b"forkserver" in _command_line(pid)]:
                workers += _children(server)
        else:
            workers = [job.pid for job in jobs if job.poll() is None]
            workers = workers if len(workers) > 1 else []
        return self.chance.choice(workers) if workers else None

    def _note(self, what: str) -> None:
        """Count a kill; what is visible after it must be whole."""
        self.killed[what] += 1
        numbers = self.dataset.shard_numbers()
        if self.dataset.exists():
            findings = verify_dataset(self.dataset)
            assert not findings, f"after kill {sum(self.killed.values())}: {findings}"
        print(f"kill {sum(self.killed.values()):>3}: {what}; {len(numbers)} of {self.shards} shards visible, all whole")

    def _log(self) -> str:
        return "the last words:\n" + (self.root / "job.log").read_text(errors="replace")[-3000:]

    def compare(self) -> None:
        """Run to the end, and once more elsewhere without a kill: tars and rows must be the same."""
        for out, words in (("chaotic", []), ("whole", ["--engine", "inline"])):
            subprocess.run(self.command(out, *words), check=True)
        one, two = (_tars(self.root / out) for out in ("whole", "chaotic"))
        assert one == two, f"the tars differ: {one} {two}"
        whole = Dataset("chaos", Storage(self.root / "whole"))
        rows = [dataset.table().drop_columns(["seconds"]) for dataset in (whole, self.dataset)]
        assert rows[0] == rows[1], "the rows differ"
        assert not verify_dataset(self.dataset)
        for what, kills in sorted(self.killed.items()):
            print(f"{kills:>4} x killed {what}")
        print(
            f"{sum(self.killed.values())} kills, then run to the end: {len(one)} tars, byte-identical to those of an "
            f"uninterrupted run in one process; {rows[0].num_rows} rows, each once"
        )


def _kill_group(job: subprocess.Popen[bytes]) -> None:
    """Kill a process and all that it started, as far as they live."""
    with suppress(ProcessLookupError):
        os.killpg(job.pid, signal.SIGKILL)
    job.wait()


def _children(pid: int) -> list[int]:
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []


def _command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""


def _tars(root: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(root.glob("shards/chaos/*.tar"))
    }


if __name__ == "__main__":
    main()

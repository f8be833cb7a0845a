"""Commands that write, on tiny data, each in a process of its own that dies, or finds the disk full, at a given moment.

The processes are forked from one that has imported everything, so that a trial takes as long as the work itself. For
tests.acceptance.kills and tests.acceptance.damage.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tests.damages import flip

DIED = 9  # exit code of a process that ended itself at a step
STEPS = ("fsync", "replace", "rename", "link", "unlink", "mkdir", "rmdir", "fdopen", "open", "truncate")
REFERENCES = "references"  # folder beside the trials
MAKERS = ("fsync", "link", "mkdir")  # of these, what a full disk refuses
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


@dataclass
class Ended:
    """How a command ended: exit code (negative: the signal), what it printed, file-system steps it took, seconds."""

    code: int
    output: str
    steps: int = 0
    seconds: float = 0.0


@dataclass
class Command:
    """A command line that writes. `root` is a folder with all it needs; `result` tells what it came to.

    left: paths under the root that only this command makes; they are compared with those of an undisturbed run.
    """

    name: str
    words: list[str]
    root: Path
    ignored: tuple[str, ...] = field(default=())


def run(
    root: Path, words: list[str], disturb: Callable[[Counter], None] | None = None, kill_after: float = 0.0
) -> Ended:
    """Run `builder WORDS` in `root`, in a forked process. kill_after: seconds until SIGKILL; 0: never."""
    said = root.parent / f"{root.name}.said"
    counted = root.parent / f"{root.name}.steps"
    counted.unlink(missing_ok=True)
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        _be_the_command(root, words, said, counted, disturb)
    if kill_after:
        while time.monotonic() - began < kill_after:
            if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                break
            time.sleep(0.002)
        else:
            os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    steps = int(counted.read_text()) if counted.is_file() and counted.stat().st_size else 0
    text = said.read_text(encoding="utf-8", errors="replace") if said.exists() else ""
    return Ended(os.waitstatus_to_exitcode(status), text, steps, time.monotonic() - began)


def _be_the_command(root: Path, words: list[str], said: Path, counted: Path, disturb: Any) -> None:
    """In the child: never returns."""
    code = 1
    try:
        handle = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        os.chdir(root)
        os.environ.pop("BUILDER_PATIENT_KEY", None)
        sys.argv = ["builder", *words]
        warnings.simplefilter("default")
        _reuse_references(root)
        counter = Counter(root)
        if disturb is not None:
            disturb(counter)
        counter.install()
        from builder.cli import main

        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
        counter.enabled = False
        sys.stdout.flush()
        sys.stderr.flush()
        counted.write_text(str(counter.steps))
    except BaseException:
        import traceback

        with contextlib.suppress(OSError):
            traceback.print_exc()
            sys.stderr.flush()
    finally:
        os._exit(code)


def _reuse_references(root: Path) -> None:
    """Take the references of scores that were made in the preparation: that takes seconds, and writes nothing."""
    import builder.job.run
    import builder.quality.score_dataset
    from builder.quality.reference import Reference

    folder = next((place for place in root.resolve().parents if (place / REFERENCES).is_dir()), None)
    for module in (builder.job.run, builder.quality.score_dataset):
        make = module.build_reference

        def known(real: Any, config: Any, codes: Any, *, make: Any = make, **settings: Any) -> Any:
            file = None if folder is None else folder / REFERENCES / f"{settings.get('image_size')}.json"
            if file is not None and file.is_file():
                return Reference.from_json(json.loads(file.read_text()))
            found = make(real, config, codes, **settings)
            if file is not None:
                file.write_text(json.dumps(found.to_json()))
            return found

        module.build_reference = known


class Counter:
    """Counts the steps on the file system, and dies at one of them, or finds the disk full from one of them on."""

    def __init__(self, root: Path) -> None:
        self.root = str(root)
        self.steps = self.die_at = self.full_at = 0
        self.enabled = True

    def install(self) -> None:
        for name in STEPS:
            setattr(os, name, self._stepped(name, getattr(os, name)))
        made = tempfile.mkstemp
        tempfile.mkstemp = self._stepped("mkstemp", made)

    def _stepped(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def step(*args: Any, **keywords: Any) -> Any:
            if not self.enabled or not self._counts(name, args):
                return call(*args, **keywords)
            self.steps += 1
            if self.steps == self.die_at:
                os._exit(DIED)  # nothing is flushed or cleaned up: as kill -9
            if self.full_at and self.steps >= self.full_at and (name in MAKERS or name in ("mkstemp", "open")):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return call(*args, **keywords)

        return step

    def _counts(self, name: str, args: tuple[Any, ...]) -> bool:
        if name == "open":  # only where a file is made or written
            return len(args) > 1 and bool(args[1] & WRITING) and not str(args[0]).startswith(("/dev", "/proc"))
        return True


def die_at(step: int) -> Callable[[Counter], None]:
    def set_it(counter: Counter) -> None:
        counter.die_at = step

    return set_it


def full_from(step: int) -> Callable[[Counter], None]:
    def set_it(counter: Counter) -> None:
        counter.full_at = step

    return set_it


@contextlib.contextmanager
def small_disk(folder: Path, size: int) -> Iterator[bool]:
    """A disk of `size` bytes at a folder, within the block; False where this user may not mount one."""
    folder.mkdir(parents=True, exist_ok=True)
    mounted = os.system(f"mount -t tmpfs -o size={size} tmpfs '{folder}' 2>/dev/null") == 0
    try:
        yield mounted
    finally:
        if mounted:
            os.system(f"umount -l '{folder}'")


def content(root: Path, ignored: tuple[str, ...] = ()) -> dict[str, str]:
    """By path under a root: the SHA-256 of each tar and of what else must not depend on time; of the others ''."""
    found = {}
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        if path.is_dir() or any(part in name for part in ("logs/", "job/workers/", ".lock", *ignored)):
            continue
        exact = path.suffix in (".tar", ".safetensors", ".npy")
        found[name] = hashlib.sha256(path.read_bytes()).hexdigest() if exact else ""
    return found


# -- the commands -----------------------------------------------------------------------------------------------------

CONFIG = {
    "name": "tiny", "real": "clinic", "checkpoint": "tiny", "sample": {"size": 16, "steps": 2, "batch_size": 4},
    "score": {"ssim_size": 64, "panel": 2}, "shards": {"images_per_shard": 8},
}  # fmt: skip


def commands(root: Path, only: Sequence[str] = ()) -> list[Command]:
    """Folders with all that each command needs, made by the commands themselves. only: their names (default: all)."""
    base = root / "base"
    (root / REFERENCES).mkdir()
    _in_child(lambda: _prepare(base))
    made: list[Command] = []

    def add(name: str, words: str, *before: str, ignored: tuple[str, ...] = ()) -> None:
        if only and name not in only:
            return
        folder = root / f"for-{re.sub('[^a-z]+', '-', name)}"
        shutil.copytree(base, folder, symlinks=True)
        for line in before:
            ended = run(folder, line.split())
            if ended.code:
                raise AssertionError(f"preparing {name}, `builder {line}` ended with {ended.code}:\n{ended.output}")
        made.append(Command(name, words.split(), folder, ignored))

    score = "score clinic --against clinic --config tiny.yaml"
    shards = "shards --config tiny.yaml --checkpoint tiny --count 24 --name made --engine inline"
    pack = "pack photographs --boxes boxes.csv --name packed --size 16"
    add("pack", pack + " --key-file site.key")
    add("pack, new key", pack, ignored=(".tar",))  # another key, other hashes of patients
    add("shards", shards, ignored=("features/",))
    add("score", score, ignored=("features/",))
    add("score foreign", "score theirs --name theirs --against clinic --config tiny.yaml", ignored=("features/",))
    add("filter", "filter clinic --name kept --no-gates --where key<'clinic-R'", score)
    add("filter --view", "filter clinic --name seen --view --no-gates --where key<'clinic-R'", score)
    add("index", "index theirs-tars --name theirs --origin synthetic")
    add("compact", "compact clinic", score)
    add("train", "train --config train.yaml --to run", ignored=("log.jsonl",))
    add("import", "checkpoint import old.pt --base tiny --to imported")
    add("export", "checkpoint export tiny --to handed/on")
    add("export file", "checkpoint export tiny --to handed.safetensors")
    add("rm", "rm clinic --yes")
    add("verify --repair", "verify made --repair", shards, ignored=("features/",))
    tar = root / "for-verify-repair/shards/made/shard-000001.tar"
    if tar.exists():
        flip(tar, 700, 0)
    return made


def _in_child(work: Callable[[], None]) -> None:
    """Do something with torch in a forked process: a process that ran torch can't be forked safely."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        raise AssertionError("the preparation failed")


def _prepare(base: Path) -> None:
    import io
    import tarfile

    import torch

    from builder.shards.writer import encode_png
    from tests.conftest import save_tiny_checkpoint, textured, write_real
    from tests.test_legacy import write_old
    from tests.test_training import CONFIG as TRAINING

    torch.set_num_threads(1)
    base.mkdir(parents=True)
    write_real(base, per_phase=12, size=24)
    (base / "tiny.yaml").write_text(yaml.safe_dump(CONFIG))
    training = json.loads(json.dumps(TRAINING.to_json()))
    (base / "train.yaml").write_text(yaml.safe_dump({**training, "real": "clinic"}))
    (base / "checkpoints").mkdir()
    save_tiny_checkpoint(base / "checkpoints/tiny")
    _write_photographs(base)
    from builder.models.load import load_pipeline

    unet = load_pipeline(base / "checkpoints/tiny").unet
    write_old(base / "old.pt", {name: value * 1.5 for name, value in unet.state_dict().items()})
    for code in "IPR":
        (base / "theirs" / code).mkdir(parents=True)
    (base / "theirs-tars").mkdir()
    for number in range(3):
        with tarfile.open(base / f"theirs-tars/{number}.tar", "w") as tar:
            for place, code in enumerate("IPR" * 4):
                payload = encode_png(textured(100 * number + place, 24))
                (base / "theirs" / code / f"{number}-{place}.png").write_bytes(payload)
                for suffix, data in ((".png", payload), (".cls", str("IPR".index(code)).encode())):
                    info = tarfile.TarInfo(f"{number}-{place}{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))


def _write_photographs(base: Path) -> None:
    """Twelve small photographs of six patients, with a box and a phase each."""
    from PIL import Image

    from tests.conftest import textured

    (base / "photographs").mkdir()
    lines = ["file,xmin,ymin,xmax,ymax,label,patient"]
    for number in range(18):
        name = f"wound-{number:02d}.png"
        Image.fromarray(textured(number, 48)).save(base / "photographs" / name)
        lines.append(f"{name},6,6,42,42,{'IPR'[number % 3]},{number % 6 // 3 + 2 * (number // 6)}")
    (base / "site.key").write_text("of nobody, for trials\n")
    (base / "site.key").chmod(0o600)
    (base / "boxes.csv").write_text("\n".join(lines) + "\n")


def import_all() -> None:
    """What commands need, once, before the forks."""
    import builder.cli
    import builder.job.run
    import builder.models.importing
    import builder.models.verification
    import builder.quality.score_dataset
    import builder.training.run
    import builder.training.verification  # noqa: F401


def rng(seed: int, *parts: object) -> random.Random:
    return random.Random(f"{seed} {parts}")

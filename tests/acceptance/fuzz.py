"""Does hostile or damaged input ever crash, hang, pass, run code or lead outside?

    OMP_NUM_THREADS=1 python -m tests.acceptance.fuzz [--cases 3000 --seed 0 --only datasets,tars --show 20]

Seeded cases of hostile datasets, checkpoints, tars, configs (YAML), conditions (--where) and arguments go through the
command line's own `main`, in this process. Counted are: tracebacks (any exception but the exit), hangs (over 60 s),
memory that ran out (8 GiB of addresses), exit 0 of `verify` on damage and of `index` on a tar that must be refused,
and breaches: a file outside the dataset that was opened, a connection, a process, or code that the data named. Each
must be 0. Exit 1 when one is not; `--show` prints the first of them.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import io
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from builder.cli import cli, main
from builder.config import find_config
from builder.errors import BuilderError
from builder.models.checkpoint import DEMO
from builder.phases import HEALING_PHASES
from builder.quality.gates import Gates
from builder.quality.reference import Reference, save_reference
from builder.shards.compact import compact
from builder.shards.dataset import Dataset
from builder.shards.foreign import adopt
from builder.shards.storage import Storage
from builder.shards.writer import Sample, encode_png, image_row, write_shard
from tests.acceptance import hostile
from tests.conftest import textured, write_real

HANG = 60  # s
FORBIDDEN = ("/etc/passwd", "/etc/hostname", "/dev/zero", "/dev/full")
MEMORY = 8 << 30  # bytes of addresses
SHARES = {"datasets": 0.34, "checkpoints": 0.1, "tars": 0.2, "yaml": 0.16, "arguments": 0.19, "where": 0.01}
GOALS = ("tracebacks", "hangs", "memory", "exit 0 on damage", "breaches")

Outcome = tuple[int | None, str, str]  # exit code (None: a traceback, or a hang), output, what went wrong


class HungError(BaseException):
    """A case took more than HANG seconds."""


class Watch:
    """What the interpreter is asked for while a case runs: files, connections, processes."""

    def __init__(self) -> None:
        self.armed = False
        self.outside = "/nowhere"
        self.seen: list[str] = []
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.armed:
            return
        if event == "open" and isinstance(arguments[0], (str, bytes)):
            path = os.fsdecode(arguments[0])
            if isinstance(arguments[2], int) and arguments[2] & os.O_NOFOLLOW and os.path.islink(path):
                return  # refused by the system
            real = os.path.realpath(path)
            if self.outside != "/nowhere" and real.startswith((self.outside, *FORBIDDEN)):
                self.seen.append(f"opened {real}")
        elif event in ("socket.connect", "socket.getaddrinfo", "os.system", "os.exec", "os.posix_spawn"):
            self.seen.append(f"{event} {arguments[1:2]}")
        elif event == "subprocess.Popen" and "where_worker" not in str(arguments[1]):
            self.seen.append(f"started {arguments[1]}")
        elif event == "import" and arguments[0] == "canary_module":
            self.seen.append("imported canary_module")


class Fuzzer:
    """The cases, the folder they live in, and the counts."""

    def __init__(self, folder: Path, seed: int, show: int) -> None:
        self.folder, self.seed, self.show = folder, seed, show
        self.watch = Watch()
        self.counts: dict[str, Counter[str]] = {}
        self.failures: list[str] = []
        self.sound = folder / "sound"
        make_sound(self.sound)
        self.pictures = [encode_png(textured(number, 16)) for number in range(4)]

    @contextlib.contextmanager
    def case(self, kind: str, number: int) -> Iterator[tuple[Path, random.Random]]:
        """A folder of its own with `outside` beside it, and the random state of the case."""
        place = Path(tempfile.mkdtemp(prefix="case-", dir=self.folder))
        (place / "outside").mkdir()
        (place / "outside" / "canary.png").write_bytes(b"secret")
        (place / "outside" / "canary.json").write_text('{"secret": 1}')
        (place / "canary_module.py").write_text("def make():\n    return lambda images: images.flatten(1)[:, :8]\n")
        self.watch.outside = str(place / "outside")
        before = os.getcwd()
        os.chdir(place)
        try:
            yield place, random.Random(f"{self.seed}/{kind}/{number}")
        finally:
            os.chdir(before)
            shutil.rmtree(place, ignore_errors=True)

    def run(self, kind: str, what: str, call: Callable[[], object], *, refused: bool = False) -> int | None:
        """Count what comes of a call; `refused`: it must not end with 0."""
        counts = self.counts.setdefault(kind, Counter())
        counts["runs"] += 1
        self.watch.seen.clear()
        code, said, wrong = attempt(call, self.watch)
        if wrong == "hang":
            counts["hangs"] += 1
        elif wrong:
            counts["tracebacks"] += 1
        elif code == 0 and refused:
            counts["exit 0 on damage"] += 1
            wrong = "exit 0"
        if "memory ran out" in said:
            counts["memory"] += 1
            wrong = "memory"
        if self.watch.seen:
            counts["breaches"] += 1
            wrong = "; ".join([wrong, *self.watch.seen[:3]])
        counts[f"exit {code}"] += 1
        if wrong:
            self.failures.append(f"[{kind}] {what}: {wrong}")
            if len(self.failures) <= self.show:
                print(f"  {self.failures[-1]}", file=sys.__stdout__, flush=True)
        return code

    # -- kinds ----------------------------------------------------------------------------------------------------

    def datasets(self, number: int) -> None:
        """A received dataset, spoilt; and commands that read it."""
        with self.case("datasets", number) as (place, r):
            root = place / "root"
            shutil.copytree(self.sound, root, copy_function=os.link)
            maker = r.choice([hostile.spoil_bytes, hostile.spoil_json, hostile.spoil_manifest, hostile.spoil_place])
            before = {path: path.stat().st_ino for path in hostile.files_of(root)}
            damage = maker(root, r)
            changed = [
                path.relative_to(root) for path in before if not path.is_file() or path.stat().st_ino != before[path]
            ]
            name = r.choice(["clinic", "syn"])
            said = f"{maker.__name__} {number} {' '.join(map(str, changed[:2]))}"
            if damage:
                codes = [
                    self.run("datasets", f"{said}: verify {each}", command("verify", each))
                    for each in ("clinic", "syn")
                ]
                if codes == [0, 0]:
                    self.counts["datasets"]["exit 0 on damage"] += 1
                    self.failures.append(f"[datasets] {said}: verify finds nothing")
                    print(f"  {self.failures[-1]}", file=sys.__stdout__, flush=True)
            for words in r.sample(readers(name, r), 2):
                self.run("datasets", f"{said}: {' '.join(words)}", command(*words))

    def checkpoints(self, number: int) -> None:
        """A received checkpoint, spoilt."""
        with self.case("checkpoints", number) as (place, r):
            folder = place / "root" / "given"
            shutil.copytree(DEMO, folder, copy_function=os.link, ignore=shutil.ignore_patterns("*.png"))
            small = [
                path for path in hostile.files_of(folder) if path.suffix == ".json" and path.stat().st_size < 20_000
            ]
            for path in hostile.files_of(folder):
                if path not in small and r.random() < 0.9:
                    path.unlink()  # what is left is read quickly
            maker = r.choice([hostile.spoil_json, hostile.spoil_json, hostile.spoil_bytes, hostile.spoil_place])
            maker(folder, r)
            for words in (["show", str(folder)], ["list"], ["export", str(folder), "--to", str(place / "out")]):
                name = r.choice(["show", "list", "export"])
                if words[0] == name:
                    self.run(
                        "checkpoints", f"{maker.__name__} {number}: {name}", command("checkpoint", *words, out=None)
                    )

    def tars(self, number: int) -> None:
        """A tar of others, hostile: indexed, or adopted."""
        with self.case("tars", number) as (place, r):
            data, refused = hostile.hostile_tar(hostile.sound_tar(self.pictures), self.pictures[0], r)
            (place / "t.tar").write_bytes(data)
            key = place / "root" / "patient.key"
            key.parent.mkdir()
            key.write_bytes(b"k" * 32)
            key.chmod(0o600)
            if r.random() < 0.7:
                words = ["index", "t.tar", "--name", "t", "--origin", r.choice(["real", "synthetic"])]
                self.run("tars", f"{number}: index", command(*words), refused=bool(refused))
                self.run("tars", f"{number}: verify", command("verify", "t"))
            else:

                def adopted() -> None:
                    adopt("t.tar", "t", Storage("root"), HEALING_PHASES)

                self.run("tars", f"{number}: adopt", adopted, refused=bool(refused))

    def yaml(self, number: int) -> None:
        """A config from elsewhere."""
        with self.case("yaml", number) as (place, r):
            sound = find_config(r.choice(["demo", "wound-type", "sdxl-lora"])).read_bytes()
            (place / "c.yaml").write_bytes(hostile.hostile_yaml(sound, r))
            words = r.choice([["config", "check", "c.yaml"], ["config", "show", "c.yaml"]])
            self.run("yaml", f"{number}: {words[1]}", command(*words, out=None))
            value = r.choice(hostile.TEXTS)
            key = r.choice(["seed", "sample.steps", "score.features", "classes", "a.b.c", "", "sample", "train.margin"])
            self.run(
                "yaml",
                f"{number}: --set {key}={value[:40]!r}",
                command("config", "show", "--set", f"{key}={value}", out=None),
            )

    def arguments(self, number: int) -> None:
        """Any command with odd values for some of its options and arguments; no dataset is there.

        Not those that start long work by themselves, without any.
        """
        with self.case("arguments", number) as (place, r):
            (place / "root").mkdir()
            (place / "file.txt").write_text("x")
            path, tool = [], cli
            while hasattr(tool, "commands"):
                name = r.choice(sorted(set(tool.commands) - {"demo", "bench", "doctor", "train", "ablate"}))
                path.append(name)
                tool = tool.commands[name]
            odd = [*hostile.TEXTS, "nan", "inf", "-inf", "1e999", "9" * 30, "9" * 5000, "-9" * 9, "0", "1", "1.5",
            "0x10", "١",
                   "file.txt", ".", "root", "root/nowhere", "file.txt/x", "a,b", "1:2,3", ":", "{1..9}", "{", "*",
                   "[", "--",
                   os.fsdecode(b"\xff\xfe")]  # fmt: skip
            words = list(path)
            for parameter in tool.params:
                needed = parameter.required or r.random() < 0.12
                if not needed or parameter.name in ("help", "trusted"):
                    continue
                value = r.choice(odd)
                if parameter.param_type_name == "argument":
                    words.append(value)
                elif getattr(parameter, "is_flag", False):
                    words.append(parameter.opts[0])
                else:
                    words += [parameter.opts[-1], value]
            self.watch.outside = "/nowhere"  # what is opened here, the user named
            self.run("arguments", f"{number}: {' '.join(words)[:200]!r}", command(*words, out=None))

    def where(self, number: int) -> None:
        """A condition that asks for files, code, memory or time."""
        conditions = [
            "len(repeat('x', 4000000000)) > 0", "(select count(*) from range(100000000000)) > 0",
            "read_text('/etc/passwd') = ''",
            "(select count(*) from read_csv('/etc/passwd')) > 0", "(select count(*) from glob('/etc/*')) > 0",
            "getenv('HOME') = ''",
            "1=1); copy (select 1) to '/tmp/x'; --", "(select count(*) from 'http://127.0.0.1:9/x.parquet') > 0",
            "\x00", "é\x1b[2J",
            "(" * 900 + "1=1" + ")" * 900, "x" * 30_000, "list_sum(range(1000000000)) > 0",
            "sha256(repeat('a', 1000000000)) = ''",
            "(select current_setting('enable_external_access'))", "phase in (select phase from clinic)",
            "ssim > 1e999", "",
            "1/0 = 1", "phase = 'I' or ", "?", "$1 = 1", "sleep_ms(100000)", "\ud800",
        ]  # fmt: skip
        with self.case("where", number) as (place, _):
            shutil.copytree(self.sound, place / "root", copy_function=os.link)
            condition = conditions[number % len(conditions)]
            words = ["filter", "syn", "--no-gates", "--dry-run", "--where", condition]
            self.run("where", f"{number}: {condition[:60]!r}", command(*words))


def command(*words: str, out: str | None = "root") -> Callable[[], object]:
    """The command line with these words, under the root of the case."""
    arguments = [*words, *(["--out", out] if out else [])]

    def call() -> None:
        sys.argv = ["builder", *arguments]
        main()

    return call


def readers(name: str, r: random.Random) -> list[list[str]]:
    """Commands that read a dataset and need no network of any kind."""
    return [
        ["verify", name, "--fast"], ["verify", name, "--partial"], ["list"], ["compact", name], ["rm", name, "--yes"],
        ["filter", name, "--no-gates", "--name", "kept"], ["filter", "syn", "--min-ssim=0.1", "--name", "kept"],
        ["filter", name, "--no-gates", "--view", "--name", "kept"], ["filter", "syn", "--dry-run", "--balance"],
        ["mix", "--real", "clinic", "--synthetic", "syn", "--batch-size", "4"],
        ["mix", "--real", "clinic", "--synthetic", "syn", "--batch-size", "4", "--reading", "stream"],
        ["sheet", name, "--per-phase", "2"], ["status", name], ["verify", name, "--repair"],
        ["index", f"root/shards/{name}", "--name", "again"], ["verify"],
    ]  # fmt: skip


def attempt(call: Callable[[], object], watch: Watch) -> Outcome:
    """The exit code, the output, and what went wrong, of a call within its limits."""
    out = io.StringIO()

    def hung(*_: object) -> None:
        raise HungError

    signal.signal(signal.SIGALRM, hung)
    signal.alarm(HANG)
    code: int | None = 0
    wrong = ""
    watch.armed = True
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            call()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BuilderError as error:  # of a call that is no command
        code = 2
        out.write(error.what)
    except HungError:
        code, wrong = None, "hang"
    except BaseException as error:  # whatever comes out is what is counted
        frames = traceback.extract_tb(error.__traceback__)
        ours = [frame for frame in frames if "/builder/" in frame.filename] or frames
        code = None
        wrong = f"{type(error).__name__}: {str(error)[:150]!r} at {Path(ours[-1].filename).name}:{ours[-1].lineno}"
    finally:
        watch.armed = False
        signal.alarm(0)
    return code, out.getvalue(), wrong


def make_sound(root: Path) -> None:
    """A real dataset and a synthetic one with scores, each with a reference; one has an index."""
    real = write_real(root, "clinic", per_phase=4, size=16)
    dataset = Dataset("syn", Storage(root))
    samples = []
    for index in range(12):
        code = "IPR"[index % 3]
        pixels = textured(500 + index, 16)
        row = image_row(f"syn-{code}-{index // 3:08d}", code, HEALING_PHASES.label(code), "synthetic", pixels)
        scores = {"ssim": 0.2 + index / 20, "sharpness": 0.3, "copy_score": 0.1, "duplicate_score": 0.0}
        made = {"seed": index, "index": index // 3, "position": index, "reserve": 0, "prompt": "a wound", "steps": 4}
        samples.append(Sample({**row, **made, **scores}, encode_png(pixels)))
    for number in range(2):
        part = samples[6 * number : 6 * number + 6]
        write_shard(dataset.storage, "syn", number, part, {"start": str(6 * number), "stop": str(6 * number + 6)})
    info = {**real.info, "name": "syn", "origin": "synthetic", "count": 12, "fingerprint_keys": {"images_per_shard": 6},
            "checkpoint": "demo"}  # fmt: skip
    gates: Gates = {"sharpness": [0.0, 1.0]}
    reference = Reference(
        against="clinic", ssim_size=64, ssim_stride=7, panel_seed=0, panel_size=4, features="f-0", lpips=None,
        panel={code: [f"clinic-{code}-00000000"] for code in "IPR"}, panel_sha256="0" * 64, training_sha256="1" * 64,
        copy={"threshold": 0.9}, gates=dict.fromkeys("IPR", gates),
        real={code: {"ssim": [0.1, 0.2]} for code in "IPR"},
        yardstick={code: {"real": [{"ssim": 0.5, "sharpness": 0.3}]} for code in "IPR"},
    )  # fmt: skip
    save_reference(dataset, reference)
    dataset.write_info({**info, "scores": reference.protocol()})
    compact(real)


def main_() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default=",".join(SHARES), help="kinds, with commas between")
    parser.add_argument("--show", type=int, default=30, help="failures that are printed")
    asked = parser.parse_args()
    np.seterr(all="ignore")
    faulthandler.dump_traceback_later(7200, exit=True)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    with tempfile.TemporaryDirectory(prefix="builder-fuzz-") as folder:
        fuzzer = Fuzzer(Path(folder), asked.seed, asked.show)
        begun = time.monotonic()
        kinds = asked.only.split(",")
        total = sum(SHARES[kind] for kind in kinds)
        cases = {kind: max(1, round(asked.cases * SHARES[kind] / total)) for kind in kinds}
        for kind in kinds:
            for number in range(cases[kind]):
                getattr(fuzzer, kind)(number)
        print(f"\nseed {asked.seed}, {sum(cases.values()):,} cases in {time.monotonic() - begun:.0f} s")
        print(f"{'kind':<13}{'cases':>7}{'runs':>7}" + "".join(f"{goal:>18}" for goal in GOALS) + "   exits")
        for kind in kinds:
            counts = fuzzer.counts[kind]
            exits = ", ".join(f"{key[5:]}: {count}" for key, count in sorted(counts.items()) if key.startswith("exit ")
                              and key not in GOALS)  # fmt: skip
            print(
                f"{kind:<13}{cases[kind]:>7}{counts['runs']:>7}"
                + "".join(f"{counts[goal]:>18}" for goal in GOALS)
                + f"   {exits}"
            )
        missed = sum(counts[goal] for counts in fuzzer.counts.values() for goal in GOALS)
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main_()

"""Kill every command that writes, and fill its disk, at many moments; then run the same command again.

    python -m tests.acceptance.kills [--kills 50] [--full 50] [--only NAME,...] [--seed 0]

Half of the kills fall at a step on the file system, drawn evenly from all steps that an undisturbed run takes, so also
between any two steps of a commit; half fall at a random time. Half of the full disks are a tmpfs of a random size
(where this user may mount one), half refuse from a random step on. After each:
- what can be seen is whole: `verify` of every dataset that is not being made, of every checkpoint and run;
- a full disk is told in one message, with exit code 2, without a traceback;
- the same command again ends with code 0, and what it leaves is what an undisturbed run leaves, with no leftovers.
Then every pair of commands that write one dataset is started at once: one wins, the other says so (exit code 2), or
finds it done. Prints a table; exits with 1 when anything was missed.
"""

from __future__ import annotations

import argparse
import itertools
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from builder.errors import BuilderError
from tests.acceptance.torn import (
    DIED,
    Command,
    Ended,
    commands,
    content,
    die_at,
    full_from,
    import_all,
    rng,
    run,
    small_disk,
)

SETTLED = (0, 2)  # exit codes of a command that was not killed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--full", type=int, default=50)
    parser.add_argument("--pairs", type=int, default=3, help="tries of each pair of commands at once")
    parser.add_argument("--only", default="", metavar="NAME,...")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    import_all()
    misses: list[str] = []
    with tempfile.TemporaryDirectory(prefix="builder-kills-") as folder:
        made = commands(Path(folder), options.only.split(",") if options.only else ())
        print(
            f"{'command':<18}{'steps':>7}{'kills':>7}{'hit':>6}{'full':>6}{'hit':>6}{'misses':>8}{'s':>8}", flush=True
        )
        for command in made:
            began = time.monotonic()
            trial = Trial(Path(folder) / "trial", command, options.seed)
            killed = [trial.kill(number) for number in range(options.kills)]
            filled = [trial.fill(number) for number in range(options.full)]
            misses += trial.misses
            print(
                f"{command.name:<18}{trial.steps:>7}{len(killed):>7}{sum(killed):>6}{len(filled):>6}{sum(filled):>6}"
                f"{len(trial.misses):>8}{time.monotonic() - began:>8.0f}",
                flush=True,
            )
            for miss in trial.misses:
                print(f"  MISS {miss}", flush=True)
        if not options.only:
            misses += pairs(Path(folder), {one.name: one for one in made}, options.pairs)
    print(f"{len(misses)} misses")
    sys.exit(bool(misses))


class Trial:
    """One command, disturbed again and again, each time in a fresh copy of its folder."""

    def __init__(self, root: Path, command: Command, seed: int) -> None:
        self.root, self.command, self.seed = root, command, seed
        self.misses: list[str] = []
        self._fresh(root)
        before = _size(root)
        ended = run(root, command.words)
        if ended.code:
            raise AssertionError(f"undisturbed, {command.name} ended with {ended.code}:\n{ended.output}")
        self.steps, self.seconds, self.grown = ended.steps, ended.seconds, max(1 << 16, _size(root) - before)
        self.expected = content(root, command.ignored)

    def kill(self, number: int) -> bool:
        """Whether the kill fell before the command's end."""
        draw = rng(self.seed, self.command.name, "kill", number)
        self._fresh(self.root)
        if number % 2:
            ended = run(self.root, self.command.words, kill_after=draw.uniform(0.001, self.seconds))
        else:
            ended = run(self.root, self.command.words, die_at(draw.randint(1, self.steps)))
        self._seen_is_whole(f"killed {number}", ended)
        self._ends(f"killed {number}")
        return ended.code in (DIED, -9)

    def fill(self, number: int) -> bool:
        """Whether the command met the full disk."""
        draw = rng(self.seed, self.command.name, "full", number)
        what = f"full disk {number}"
        if number % 2:
            self._fresh(self.root)
            ended = run(self.root, self.command.words, full_from(draw.randint(1, self.steps)))
            self._is_told(what, ended)
            self._seen_is_whole(what, ended)
            self._ends(what)
            return ended.code != 0
        disk = self.root.with_name("disk")
        size = _size(self.command.root)
        with small_disk(disk, size + draw.randint(1 << 14, self.grown + (1 << 16))) as mounted:
            root = disk / "root" if mounted else self.root
            self._fresh(root)
            temporary = os.environ.get("TMPDIR")
            ended = run(root, self.command.words)
            if mounted:
                self._is_told(what, ended)
                self._seen_is_whole(what, ended, root)
                self._fresh(self.root, root)  # the same folder, with room
            if temporary:
                os.environ["TMPDIR"] = temporary
        self._ends(what)
        return ended.code != 0

    def _fresh(self, root: Path, source: Path | None = None) -> None:
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(source or self.command.root, root, symlinks=True)

    def _miss(self, what: str, why: str) -> None:
        self.misses.append(f"{self.command.name}, {what}: {why}")

    def _is_told(self, what: str, ended: Ended) -> None:
        if ended.code not in SETTLED:
            self._miss(what, f"exit code {ended.code}: {ended.output[-1500:]}")
        elif ended.code == 2 and (ended.output.count("error: ") != 1 or "Traceback" in ended.output):
            self._miss(what, f"not one message: {ended.output[-1500:]}")

    def _seen_is_whole(self, what: str, ended: Ended, root: Path | None = None) -> None:
        for finding in seen(root or self.root):
            self._miss(what, f"{finding} (after exit code {ended.code})")

    def _ends(self, what: str) -> None:
        """The same command again; an export or import whose target is there already has ended before."""
        ended = run(self.root, self.command.words)
        done = (
            ended.code == 2 and "exists" in ended.output and content(self.root, self.command.ignored) == self.expected
        )
        gone = self.command.name == "rm" and "there is no dataset" in ended.output
        if ended.code and not done and not gone:
            self._miss(what, f"again, it ended with {ended.code}: {ended.output[-1500:]}")
            return
        now = content(self.root, self.command.ignored)
        if now != self.expected:
            differ = sorted(
                name for name in now.keys() | self.expected.keys() if now.get(name) != self.expected.get(name)
            )
            self._miss(what, f"again, it left something else: {', '.join(differ[:5])}")
        for finding in seen(self.root):
            self._miss(what, f"again, {finding}")


def seen(root: Path) -> list[str]:
    """What is off with what can be seen under a root: datasets (of partial ones their shards), checkpoints, runs."""
    from builder.models.checkpoint import is_checkpoint
    from builder.models.verification import verify_checkpoint
    from builder.shards.dataset import all_datasets
    from builder.shards.storage import Storage
    from builder.shards.verify import check_dataset
    from builder.training.verification import verify_run

    found = []
    for dataset in all_datasets(Storage(root)):
        try:
            report = check_dataset(dataset)
            scoring = (root / f"manifests/{dataset.name}/scoring.json").exists()
            found += [line for line in report.findings if not (scoring and "not the one that the images" in line)]
        except BuilderError as error:
            found.append(str(error))
    for folder in [root / "handed/on", *(root / "checkpoints").glob("*")]:
        if folder.is_dir() and not folder.name.startswith("."):
            found += verify_checkpoint(folder).findings if is_checkpoint(folder) else [f"{folder} is half a checkpoint"]
    if (root / "run").is_dir():
        found += verify_run(root / "run").findings
    if (file := root / "handed.safetensors").exists():
        from safetensors import safe_open

        with safe_open(file, "np") as opened:
            found += [] if list(opened.keys()) else [f"{file} is empty"]
    return found


# -- two at once ------------------------------------------------------------------------------------------------------


def pairs(root: Path, made: dict[str, Command], tries: int) -> list[str]:
    """Every two commands that write the dataset `clinic`, or the same new one, at once."""
    groups = {
        "clinic": ["score", "compact", "rm"],
        "kept": ["filter"],
        "packed": ["pack"],
        "made": ["shards"],
        "run": ["train"],
        "imported": ["import"],
        "handed": ["export"],
    }
    counts = Counter[str]()
    misses: list[str] = []
    for group in groups.values():
        for one, other in itertools.combinations_with_replacement([made[name] for name in group if name in made], 2):
            for number in range(tries):
                trial = root / "pair"
                shutil.rmtree(trial, ignore_errors=True)
                shutil.copytree(one.root, trial, symlinks=True)
                ends = _both(trial, one.words, other.words)
                codes = tuple(sorted(end.code for end in ends))
                said = " | ".join(end.output[-300:] for end in ends)
                counts[f"{one.name} + {other.name}: {codes}"] += 1
                if codes[0] not in (0, 2) or codes[1] not in (0, 2) or "Traceback" in said or codes == (2, 2):
                    misses.append(f"{one.name} with {other.name}, {number}: {codes}: {said}")
                if said.count("wrote dataset") > 1:
                    misses.append(f"{one.name} with {other.name}, {number}: both say that they wrote it")
                misses += [f"{one.name} with {other.name}, {number}: {line}" for line in seen(trial)]
    print("\ntwo at once, and their exit codes")
    for what, count in sorted(counts.items()):
        print(f"  {what:<44}{count:>3}")
    for miss in misses:
        print(f"  MISS {miss}")
    return misses


def _both(root: Path, *lines: list[str]) -> list[Ended]:
    """Both started in one folder at the same time."""
    children = []
    for number, words in enumerate(lines):
        said = root.parent / f"pair-{number}.json"
        child = os.fork()
        if child == 0:
            # A folder's name is also that of the file with what was said, so each gets a link of its own.
            link = root.parent / f"pair-{number}"
            link.unlink(missing_ok=True)
            link.symlink_to(root)
            ended = run(link, words)
            said.write_text(f"{ended.code}\n{ended.output}")
            os._exit(0)
        children.append((child, said))
    ends = []
    for child, said in children:
        os.waitpid(child, 0)
        code, _, output = said.read_text().partition("\n")
        ends.append(Ended(int(code), output))
    return ends


def _size(root: Path) -> int:
    """Bytes that a tree takes on a disk of pages of 4 kB."""
    return sum(-(-path.stat().st_size // 4096) * 4096 + 4096 for path in root.rglob("*"))


if __name__ == "__main__":
    main()

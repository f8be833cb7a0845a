"""Does one patient pass the leak guard under two spellings, or by a column here and a pattern there?

    python -m tests.acceptance.leaks

Twelve people, written in many ways, become a real dataset of every kind: by a column, by a pattern of the file names,
by the photograph, and by the members of an indexed tar. A generator that learned ALL of them in one dataset is then
judged on every other: by the guard of `train` (as its base) and of `shards`, by `MixedLoader`, `metrics` and
`classify`. Each must recognise its patients or refuse to compare; none may pass. Controls: a generator that saw
another's people alone, written alike, passes; so does the phantom's.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa

from builder.config import Config, load_config
from builder.errors import BuilderError
from builder.identity import PatientKey
from builder.mixing import MixedLoader
from builder.models.checkpoint import Checkpoint, Lineage
from builder.models.guards import leak_of_job, leak_of_training
from builder.quality.sets.scores import require_comparable
from builder.shards.dataset import Dataset
from builder.shards.lineage import find_leak
from builder.shards.storage import Storage
from tests.acceptance.report import Report
from tests.people import KINDS, lineage_from, of_kind, synthetic

PEOPLE = 12
KEY = PatientKey(b"the secret of one site", "acceptance")

SPELLINGS: dict[str, Callable[[int], str]] = {
    "001": lambda n: f"{n:03d}",
    "1": str,
    "1.0": lambda n: f"{n}.0",
    "P001": lambda n: f"P{n:03d}",
    "p-1": lambda n: f"p-{n}",
    "P\u2013001 (en dash)": lambda n: f"P\u2013{n:03d}",
    " 1 (spaces)": lambda n: f" {n} ",
    "full width": lambda n: "".join(chr(ord(digit) + 0xFEE0) for digit in f"{n:02d}"),
    "zero width": lambda n: "\u200b" + "\u200d".join(f"{n:03d}"),
    "Arabic digits": lambda n: "".join(chr(0x0660 + int(digit)) for digit in str(n)),
    "Patient 1": lambda n: f"Patient {n}",
    "sub-01": lambda n: f"sub-{n:02d}",
    "DFU-001": lambda n: f"DFU-{n:03d}",
    "dfu 1": lambda n: f"dfu {n}",
    "Cyrillic P": lambda n: f"\u0420{n:03d}",
    "1-2 (visit)": lambda n: f"{n}-2",
    "name": lambda n: f"M\u00fcller, {chr(64 + n)}nna",
    "initials": lambda n: f"{chr(64 + n)}. Mueller",
    "NAME decomposed": lambda n: f"{chr(64 + n)}NNA MU\u0308LLER",
}


class Kept(Dataset):
    """A dataset that nobody changes: what was read once is not read again for each of thousands of pairs."""

    @cached_property
    def info(self) -> dict[str, Any]:  # type: ignore[override]
        return super().info

    @cache  # noqa: B019  # a few dozen of them, as long as the measurement
    def _table(self, columns: tuple[str, ...] | None) -> pa.Table:
        return super().table(columns)

    def table(self, columns: Sequence[str] | None = None) -> pa.Table:
        return self._table(None if columns is None else tuple(columns))


def train(lineage: Lineage, made: Dataset, real: Dataset) -> str | None:
    base = Checkpoint(Path("base"), lineage=lineage)
    return leak_of_training(_config(), real, base)


@cache
def _config() -> Config:
    return load_config("demo")


def shards(lineage: Lineage, made: Dataset, real: Dataset) -> str | None:
    return leak_of_job(Checkpoint(Path("checkpoint"), lineage=lineage), real)


def loader(lineage: Lineage, made: Dataset, real: Dataset) -> str | None:
    return _refusal(lambda: MixedLoader(real, made, ratio=0.5, batch_size=4))


def metrics(lineage: Lineage, made: Dataset, real: Dataset) -> str | None:
    return _refusal(lambda: require_comparable(made, real, "test", None))


def classify(lineage: Lineage, made: Dataset, real: Dataset) -> str | None:
    return find_leak(made, real)


COMMANDS = (train, shards, loader, metrics, classify)


def _refusal(do: Callable[[], object]) -> str | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            do()
        except BuilderError as error:
            return error.what
    return None


def outcome(said: str | None) -> str:
    """How a guard ended: it recognised the patients, refused to compare them, or let them pass."""
    if said is None:
        return "passed"
    return "recognised" if "was trained on" in said or "both trained on and held out" in said else "refused"


def datasets(root: Path, spellings: Sequence[str]) -> dict[tuple[str, str], Dataset]:
    """(kind, spelling) -> the twelve people as such a dataset."""
    found = {}
    for (place, spelling), kind in itertools.product(enumerate(spellings), KINDS):
        ids = [SPELLINGS[spelling](number) for number in range(1, PEOPLE + 1)]
        found[kind, spelling] = Kept(of_kind(kind, root, f"{kind}-{place}", ids, KEY).name, Storage(root))
    return found


def matrix(root: Path, spellings: Sequence[str]) -> Counter[tuple[str, str, str, str, str, str]]:
    """(command, seen kind, held kind, seen spelling, held spelling, outcome) -> 1, over all pairs."""
    reals = datasets(root, spellings)
    seen = {}
    for (kind, spelling), real in reals.items():
        lineage = lineage_from(real)
        seen[kind, spelling] = lineage, Kept(synthetic(root, f"made-{real.name}", lineage).name, Storage(root))
    found: Counter[tuple[str, str, str, str, str, str]] = Counter()
    for (learned, (lineage, made)), (held, real) in itertools.product(seen.items(), reals.items()):
        for command in COMMANDS:
            ended = outcome(command(lineage, made, real))
            found[command.__name__, learned[0], held[0], learned[1], held[1], ended] += 1
    return found


def controls(root: Path) -> dict[str, bool]:
    """What must pass: name -> whether it did."""
    ids = [str(number) for number in range(1, PEOPLE + 1)]
    passed = {}
    for kind in KINDS:
        real = of_kind(kind, root, f"own-{kind}", ids, KEY)
        lineage = lineage_from(real, ("train",))
        made = synthetic(root, f"made-own-{kind}", lineage)
        said = [command(lineage, made, real) for command in COMMANDS]
        passed[f"{kind}: a generator of the training split, on its own dataset"] = said == [None] * len(COMMANDS)
    others = of_kind("column", root, "others", [str(100 + number) for number in range(PEOPLE)], KEY)
    lineage = lineage_from(others)
    made, real = synthetic(root, "made-others", lineage), of_kind("column", root, "judges", ids, KEY)
    passed["column: a generator of other people, written alike"] = all(
        command(lineage, made, real) is None for command in COMMANDS
    )
    return passed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    report = Report("leak guard over spellings and kinds", people=PEOPLE, spellings=len(SPELLINGS), kinds=len(KINDS))
    with tempfile.TemporaryDirectory() as folder:
        found = matrix(Path(folder), list(SPELLINGS))
        passing = controls(Path(folder))
    by_kind: Counter[tuple[str, str, str]] = Counter()
    by_command: Counter[tuple[str, str]] = Counter()
    for (command, learned, held, _, _, ended), count in found.items():
        by_kind[learned, held, ended] += count
        by_command[command, ended] += count
    ends = ("recognised", "refused", "passed")
    report.table("learned by, held out by", ("learned", "held out", *ends), [
        (learned, held, *(by_kind[learned, held, ended] for ended in ends))
        for learned, held in itertools.product(KINDS, KINDS)
    ])  # fmt: skip
    report.table("command", ("command", *ends), [
        (command.__name__, *(by_command[command.__name__, ended] for ended in ends)) for command in COMMANDS
    ])  # fmt: skip
    letters = {"recognised": "R", "refused": "-", "passed": "PASSED"}
    cells = {(k[3], k[4]): letters[k[5]] for k in found if k[:3] == ("shards", "column", "column")}
    report.table("column by column, R recognised, - refused (numbers as in the rows)",
        ("learned", *map(str, range(1, len(SPELLINGS) + 1))),
        [(f"{n} {one}", *(cells[one, other] for other in SPELLINGS)) for n, one in enumerate(SPELLINGS, 1)],
    )  # fmt: skip
    total, passed = sum(found.values()), sum(count for key, count in found.items() if key[5] == "passed")
    report.criterion(f"{passed} of {total} pairs passed (0 wanted)", passed == 0)
    for name, held in passing.items():
        report.criterion(f"control passes: {name}", held)
    report.end()


if __name__ == "__main__":
    main()

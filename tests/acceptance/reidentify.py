"""Can somebody with all names, and no key, tell which row of a dataset is whose?

    python -m tests.acceptance.reidentify [--packings 40]

Each packing has a key of its own. The attacker has the whole dataset (tars, manifests, dataset.json), the names of all
photographs with their phases, the list of patients with their photographs, and this program; not the key and not the
photographs. Every patient has as many photographs of each phase, so that counts say nothing (docs/privacy.md says what
counts do tell). The attacks guess, for each row, its photograph and its patient by the order of the rows; the split of
each patient by the program's own rule; names and patients by trying hashes; and the list of names by the recorded
fingerprints. With the key the same attacks match all: that is the positive control. The phantom's key, which is
public, is the other one: its rows lie in a plain order, and are all matched.

Bound: a random order has its n rows of a phase right with chance 1/n each, a random split a patient with the chance
that two draws agree. An attack is at chance when its matches lie within the two-sided 99.9 % interval of the binomial
distribution, divided by the number of attacks (Bonferroni).
"""

from __future__ import annotations

import argparse
import hashlib
import hmac
import secrets
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from scipy.stats import binom

from builder.config import fingerprint
from builder.crops.split import split_patients
from builder.demo.phantom_dataset import KEY as PHANTOM_KEY
from builder.identity import PatientKey
from builder.shards.dataset import Dataset
from tests.acceptance.report import Report
from tests.people import PHASES, packed

LEVEL = 0.001
SHARES = {"train": 0.7, "val": 0.15, "test": 0.15}
NAMES = [f"Anna-{number:02d}" for number in range(1, 25)]  # of the photographs; the ids are the numbers

Order = Callable[[str], bytes]


@dataclass(frozen=True)
class Knowledge:
    """What the attacker has: file name -> (phase, patient), the length of each file, and the dataset."""

    photographs: Mapping[str, tuple[str, str]]
    sizes: Mapping[str, int]
    dataset: Dataset

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """What the manifests say, in the order of the rows."""
        return self.dataset.table(("key", "phase", "patient", "split", "source")).to_pylist()

    @cached_property
    def info(self) -> dict[str, Any]:
        """What dataset.json says."""
        return self.dataset.info

    @property
    def patients(self) -> list[str]:
        return sorted({patient for _, patient in self.photographs.values()})


def _under(secret: bytes, name: str) -> bytes:
    """As PatientKey.order, also under the phantom's key, whose own order is the plain one."""
    return hmac.digest(secret, f"order {name}".encode(), "sha256")


def _digest(kind: str, text: str) -> bytes:
    return hashlib.new(kind, text.encode()).digest()


def orders(known: Knowledge) -> dict[str, Order]:
    """Orders of names that rows might lie in."""
    key = known.info["lineage"]["key_fingerprint"]
    keyed = {
        "an empty key": b"", "b'phantom'": b"phantom", "the fingerprint of the key": key.encode(),
        "the dataset's name": known.dataset.name.encode(),
    }  # fmt: skip
    found: dict[str, Order] = {
        "names": lambda name: name.encode(),
        "SHA-256 of 'order NAME' (the order before)": lambda name: _digest("sha256", f"order {name}"),
        "SHA-256": lambda name: _digest("sha256", name),
        "SHA-1": lambda name: _digest("sha1", name),
        "MD5": lambda name: _digest("md5", name),
        "patient, then name": lambda name: f"{known.photographs[name][1]:>9} {name}".encode(),
        "SHA-256 of the patient": lambda name: _digest("sha256", known.photographs[name][1]) + name.encode(),
        "length of the file": lambda name: known.sizes[name].to_bytes(8, "big") + name.encode(),
    }
    for named, secret in keyed.items():
        found[f"HMAC under {named}"] = partial(_under, secret)
    return found


def matched_rows(known: Knowledge, order: Order, truth: Mapping[str, str]) -> tuple[int, int]:
    """Rows whose photograph, and rows whose patient, is guessed right when the names of a phase are put in an order.

    truth: the hash in `source` -> file name; only to judge the guesses.
    """
    rows: dict[str, list[str]] = defaultdict(list)
    for row in known.rows:
        rows[row["phase"]].append(truth[row["source"]])
    photographs = patients = 0
    for phase, right in rows.items():
        guess = sorted((name for name, (own, _) in known.photographs.items() if own == phase), key=order)
        photographs += sum(one == other for one, other in zip(guess, right, strict=True))
        patients += sum(
            known.photographs[one][1] == known.photographs[other][1] for one, other in zip(guess, right, strict=True)
        )
    return photographs, patients


def splits(known: Knowledge) -> dict[str, dict[str, str]]:
    """Splits that the program's rule would give: from ids as they are, and from plain hashes of them."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for phase, patient in known.photographs.values():
        counts[patient][phase] += 1
    found = {}
    for name, change in (("ids", str), ("SHA-256", lambda text: hashlib.sha256(text.encode()).hexdigest()[:32]),
                         ("HMAC under b'phantom'", PatientKey(b"phantom", "").hash)):  # fmt: skip
        changed = {change(patient): patient for patient in counts}
        split = split_patients({one: counts[patient] for one, patient in changed.items()}, SHARES)
        found[name] = {changed[one]: where for one, where in split.items()}
    return found


def guessed_hashes(known: Knowledge) -> int:
    """How many hashes in the manifests are those of names or patients under anything that is no secret."""
    info = known.info
    publics = [b"", b"phantom", info["lineage"]["key_fingerprint"].encode(), known.dataset.name.encode()]
    texts = [*known.photographs, *known.patients, *(f"photograph {name}" for name in known.photographs)]
    tried = {hashlib.new(kind, text.encode()).hexdigest()[:32] for kind in ("sha256", "sha1", "md5") for text in texts}
    for secret in publics:
        key = PatientKey(secret, "")
        tried |= {key.photograph(name) for name in known.photographs} | {key.hash(one) for one in known.patients}
        tried |= {hmac.new(secret, text.encode(), "sha256").hexdigest()[:32] for text in texts}
    rows = known.rows
    return len({row[column] for row in rows for column in ("patient", "source")} & tried)


def confirmed_lists(known: Knowledge) -> int:
    """How many recorded fingerprints confirm a list of names: made as they were before, or without the key."""
    inputs = known.info["inputs"]
    listed = [[name, known.sizes[name]] for name in sorted(known.photographs)]
    crops = [[name, None, known.photographs[name][0]] for name in sorted(known.photographs)]
    tried = {fingerprint({"photographs": listed}), fingerprint({"crops": crops})}
    for value in (listed, crops, [name for name, _ in listed], known.patients):
        tried |= {PatientKey(secret, "").seal(value) for secret in (b"", b"phantom")} | {fingerprint({"": value})}
    return len(tried & {str(value) for value in _leaves([inputs, known.info["lineage"]])})


def _leaves(value: object) -> Iterable[object]:
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, Sequence) and not isinstance(value, str):
        for part in value:
            yield from _leaves(part)
    else:
        yield value


def one_packing(root: Path, secret: bytes) -> tuple[Knowledge, PatientKey, dict[str, str]]:
    """Pack the photographs under a key; what the attacker has, and for the judge the key and who is behind a hash."""
    key = PatientKey(secret, "acceptance")
    ids = [str(number) for number in range(1, len(NAMES) + 1)]
    dataset = packed(root, "real", NAMES, key, ids=ids, per_shard=30)
    photographs = {
        f"{name}_{phase}.png": (phase, patient) for name, patient in zip(NAMES, ids, strict=True) for phase in PHASES
    }
    folder = root / "real-photographs"
    sizes = {name: (folder / name).stat().st_size for name in photographs}
    return Knowledge(photographs, sizes, dataset), key, {key.photograph(name): name for name in photographs}


@dataclass
class Tally:
    """Matches of an attack, of how many guesses, and how many a guess at random has on average."""

    matches: int = 0
    guesses: int = 0
    expected: float = 0.0

    def add(self, matches: int, guesses: int, chance: float) -> None:
        self.matches += matches
        self.guesses += guesses
        self.expected += guesses * chance

    def interval(self, attacks: int) -> tuple[int, int]:
        low, high = binom.interval(1 - LEVEL / attacks, self.guesses, self.expected / self.guesses)
        return int(low), int(high)


def attack(packings: Iterable[tuple[Knowledge, PatientKey, dict[str, str]]]) -> dict[str, Tally]:
    """All attacks on all packings."""
    found: dict[str, Tally] = defaultdict(Tally)
    for known, key, truth in packings:
        rows, n = len(known.photographs), len(NAMES)
        for name, order in orders(known).items():
            photographs, patients = matched_rows(known, order, truth)
            found[f"row -> photograph, by {name}"].add(photographs, rows, 1 / n)
            found[f"row -> patient, by {name}"].add(patients, rows, 1 / n)
        hashed = {key.hash(patient): patient for patient in known.patients}
        told = known.rows
        right = {hashed[row["patient"]]: row["split"] for row in told}
        for name, guess in splits(known).items():
            sizes = [Counter(side.values()) for side in (guess, right)]
            chance = sum(sizes[0][split] * sizes[1][split] for split in SHARES) / n**2
            found[f"patient -> split, by {name}"].add(sum(guess[p] == right[p] for p in right), n, chance)
        found["hash -> name or patient, by trying"].add(guessed_hashes(known), rows + n, 0.0)
        found["fingerprint -> list of names"].add(confirmed_lists(known), 4, 0.0)
    return found


def with_key(known: Knowledge, key: PatientKey, truth: dict[str, str]) -> tuple[int, int]:
    """The positive control: rows matched by somebody who has the key."""
    return matched_rows(known, key.order, truth)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packings", type=int, default=40)
    options = parser.parse_args()
    rows = len(NAMES) * len(PHASES)
    report = Report("re-identification without the key", packings=options.packings, patients=len(NAMES), rows=rows)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        packings = [one_packing(root / str(n), secrets.token_bytes(32)) for n in range(options.packings)]
        found = attack(packings)
        keyed = [with_key(*packing) for packing in packings]
        public, _, truth = one_packing(root / "public", PHANTOM_KEY)
        before = orders(public)["SHA-256 of 'order NAME' (the order before)"]
        plain = matched_rows(public, before, truth)
        tried = guessed_hashes(public)
    report.table("attacks", ("attack", "matches", "guesses", "rate", "chance", "interval of chance"), [
        (name, tally.matches, tally.guesses, f"{tally.matches / tally.guesses:.4f}",
         f"{tally.expected / tally.guesses:.4f}", "{} to {}".format(*tally.interval(len(found))))
        for name, tally in found.items()
    ])  # fmt: skip
    report.table("controls", ("with", "rows -> photograph", "rows -> patient", "rows"), [
        ("the key", sum(a for a, _ in keyed), sum(b for _, b in keyed), rows * len(packings)),
        ("the phantom's public key", *plain, rows),
    ])  # fmt: skip
    outside = [
        name for name, tally in found.items()
        if not tally.interval(len(found))[0] <= tally.matches <= tally.interval(len(found))[1]
    ]  # fmt: skip
    report.criterion(f"{len(found) - len(outside)} of {len(found)} attacks at chance {outside or ''}", not outside)
    report.criterion("with the key, all rows are matched", keyed == [(rows, rows)] * len(packings))
    told = plain == (rows, rows) and tried == rows + len(NAMES)
    report.criterion("under a public key, all rows and hashes are matched", told)
    report.end()


if __name__ == "__main__":
    main()

"""What a classifier is trained and judged on: held-out crops, a smaller training set, and what cannot be judged."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from builder.crops.split import split_patients
from builder.errors import BuilderError
from builder.mixing import MixedLoader
from builder.quality.panel import patient_of
from builder.shards.dataset import Dataset
from builder.shards.index import Stamps

COLUMNS = ("key", "phase", "label", "split", "patient", "source", "sha256")
PATIENTS = "patients"
IDENTITY = ("key", "sha256", "label", "split", "patient")
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Limited(Dataset):
    """A dataset of which only the rows with these keys are there."""

    keys: frozenset[str] = field(default=frozenset())

    def tables(
        self, columns: Sequence[str] | None = None, stamps: Stamps | None = None
    ) -> Iterator[tuple[int, pa.Table]]:
        kept = pa.array(sorted(self.keys), pa.string())
        asked = None if columns is None else tuple(dict.fromkeys((*columns, "key")))
        for number, table in super().tables(asked, stamps):
            table = table.filter(pc.is_in(table["key"], kept))
            yield number, table if columns is None else table.select(list(columns))


@dataclass(frozen=True)
class HeldOut:
    """All crops of a split in the order of the manifest: uint8 [N, 3, S, S], labels int64 [N], and whose they are."""

    images: torch.Tensor
    labels: torch.Tensor
    patients: list[str]


def held_out(real: Dataset, split: str, size: int) -> HeldOut:
    """The crops of "val" or "test", square at `size` px, all in memory (12 kB each at 64 px)."""
    loader = MixedLoader(real=real, split=split, batch_size=64, size=size, partial=True)
    batches = [(images, labels) for images, labels, _ in loader]
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    return HeldOut(images, labels, [patient_of(row) for row in of_split(rows_of(real), split)])


def rows_of(dataset: Dataset) -> Rows:
    return list(dataset.table(COLUMNS).to_pylist())


def of_split(rows: Rows, split: str) -> Rows:
    return [row for row in rows if row["split"] == split]


def limited(real: Dataset, rows: Rows, crops: int, seed: int) -> Limited:
    """`real` with about this many training crops, of whole patients, phases as frequent as before; val and test stay.

    Another seed draws other patients. Whole patients seldom add up to the number asked for: what it became is for the
    caller to say.
    """
    training = of_split(rows, "train")
    counts: dict[str, Counter[str]] = {}
    for row in training:
        counts.setdefault(patient_of(row), Counter())[row["phase"]] += 1
    share = min(1.0, crops / len(training))
    chosen = split_patients(counts, {"train": share, "val": 1 - share}, seed)
    keys = {row["key"] for row in rows if row["split"] != "train" or chosen[patient_of(row)] == "train"}
    return Limited(real.name, real.storage, frozenset(keys))


def counts_of(rows: Rows) -> dict[str, int]:
    """Crops and patients."""
    return {"crops": len(rows), "patients": len({patient_of(row) for row in rows})}


def require_classes(there: Collection[str], codes: Sequence[str], what: str, remedy: str) -> None:
    """BuilderError when a class is not there: it could be neither learned nor judged."""
    missing = [code for code in codes if code not in there]
    if missing:
        raise BuilderError(f"{what} has no crop of {', '.join(missing)}", remedy)


def phases_of(rows: Rows) -> set[str]:
    return {row["phase"] for row in rows}


def unit_of(real: Dataset, rows: Rows) -> str:
    """What crops are grouped by and resampled by: patients, or what stands for them where they are unknown."""
    grouped_by = real.info.get("group_by")
    if grouped_by is None and all(row["patient"] for row in rows):
        return PATIENTS
    return "photographs" if grouped_by in (None, "photograph") else "groups"


def content_sha256(table: pa.Table) -> str:
    """Told by pixels, label, split and patient of every row: what decides a run, whenever and wherever it was made."""
    columns = [pc.fill_null(table[name].cast(pa.string()), "None") for name in IDENTITY]
    lines = pc.binary_join_element_wise(*columns, " ")
    digest = hashlib.sha256()
    for part in lines.chunks:
        digest.update("".join(f"{line}\n" for line in part.to_pylist()).encode())
    return digest.hexdigest()


def confusions(labels: np.ndarray, predictions: np.ndarray, patient: np.ndarray, classes: int) -> np.ndarray:
    """How often each class was taken for which, by patient: int [P, true, predicted]; `patient`: int [N], from 0."""
    tables = np.zeros((int(patient.max()) + 1, classes, classes), np.int64)
    np.add.at(tables, (patient, labels, predictions), 1)
    return tables

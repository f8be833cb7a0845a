"""The panel: a fixed, seeded choice of real training crops of each phase, which scores are measured against."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from typing import Any, TypeVar

import numpy as np

from builder.errors import BuilderError
from builder.shards.dataset import Dataset

Rows = list[dict[str, Any]]
Panel = TypeVar("Panel")


def choose_panel(dataset: Dataset, codes: Sequence[str], n: int = 16, seed: int = 0) -> dict[str, Rows]:
    """`n` training crops of each phase, or all there are: code -> manifest rows, in an order fixed by `seed`.

    One crop a patient before any patient's second. The choice depends on `seed` and the crops alone, not on how the
    dataset is cut into shards. BuilderError when a phase has no training crop.
    """
    by_phase = rows_by_phase(dataset, codes, splits=("train",))
    return {code: spread(rows, n, f"panel/{seed}/{code}") for code, rows in by_phase.items()}


def rows_by_phase(dataset: Dataset, codes: Sequence[str], splits: Sequence[str]) -> dict[str, Rows]:
    """Manifest rows of a real dataset's `splits`, by phase. BuilderError when a phase has no training crop."""
    rows = dataset.table().to_pylist()
    if not any(row["split"] for row in rows):
        raise BuilderError(
            f"dataset '{dataset.name}' has no training split", "score against a dataset that `builder pack` made"
        )
    found: dict[str, Rows] = {code: [] for code in codes}
    for row in rows:
        if row["split"] in splits and row["phase"] in found:
            found[row["phase"]].append(row)
    empty = [code for code, own in found.items() if not own]
    if empty and "train" in splits:
        raise BuilderError(
            f"dataset '{dataset.name}' has no training crops of phase {', '.join(empty)}",
            "score against a dataset that has them, or leave the phase out",
        )
    return found


def spread(rows: Rows, n: int, salt: str) -> Rows:
    """At most `n` rows in the order of hashes salted with `salt`: every patient's first, then the second ones, ..."""

    def rank(text: str) -> str:
        return hashlib.sha256(f"{salt}/{text}".encode()).hexdigest()

    patients: dict[str, Rows] = defaultdict(list)
    for row in sorted(rows, key=lambda row: rank(row["key"])):
        patients[patient_of(row)].append(row)
    turns = zip_longest(*(patients[patient] for patient in sorted(patients, key=rank)))
    return [row for turn in turns for row in turn if row is not None][:n]


def each_by_phase(
    images: Sequence[Any], codes: Sequence[str], panels: Mapping[str, Panel], batch: int,
    measure: Callable[[Sequence[Any], Panel], np.ndarray],
) -> list[np.ndarray]:  # fmt: skip
    """What `measure(images, panel)`, float64 [N, K], says of each image and the K crops of its phase's panel: [K] each.

    Images of a phase are measured `batch` at a time. BuilderError when a phase has no panel.
    """
    found: list[np.ndarray] = [np.empty(0)] * len(images)
    for code in sorted(set(codes)):
        if code not in panels:
            raise BuilderError(
                f"there is no panel for phase '{code}'", "score against a real dataset that has this phase"
            )
        places = [place for place, own in enumerate(codes) if own == code]
        for start in range(0, len(places), batch):
            part = places[start : start + batch]
            measured = measure([images[place] for place in part], panels[code])
            for place, row in zip(part, measured, strict=True):
                found[place] = row
    return found


def patient_of(row: Mapping[str, Any]) -> str:
    """Whose crop it is; where patients are unknown, the photograph, and else the crop itself."""
    return str(row["patient"] or row["source"] or row["key"])


def panel_sha256(panel: Mapping[str, Rows]) -> str:
    """SHA-256 over phase, key and pixel hash of every crop of the panel."""
    lines = [f"{code} {row['key']} {row['sha256']}\n" for code in sorted(panel) for row in panel[code]]
    return hashlib.sha256("".join(lines).encode()).hexdigest()

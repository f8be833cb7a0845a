"""Floors: what real images score against real images of other patients, at a given N."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from builder.errors import BuilderError
from builder.quality.panel import patient_of
from builder.quality.sets.comparison import Naming, Side, compare
from builder.quality.sets.scores import NEEDED, POOLED, Rows, describe, load_sides, shuffled
from builder.shards.dataset import Dataset

if TYPE_CHECKING:
    from builder.quality.features.extractor import Extractor


def real_floors(
    real: Dataset,
    extractor: Extractor,
    sizes: Sequence[int],
    *,
    repeats: int = 5,
    seed: int = 0,
    image_size: int | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """All figures of N real crops against N real crops of other patients; plain data for JSON.

    The patients of all splits are cut into random halves with about as many crops, `repeats` times; N crops are drawn
    from either. groups -> pooled or phase -> N -> {"figures": name -> {mean, sd, repeats}, "note": why there are none}.
    `image_size`: px that the crops are first brought to; None: as they are stored.
    """
    if repeats < 1 or not sizes or min(sizes) < 2:
        raise BuilderError(f"N is {list(sizes)}, repeats {repeats}", "give an N of at least 2 and at least one repeat")
    if real.info.get("origin") != "real":
        raise BuilderError(
            f"dataset '{real.name}' is {real.info.get('origin')}: it has no floor", "name a dataset of real crops"
        )
    rows = shuffled(real.table(NEEDED).to_pylist(), seed)
    loaded = load_sides(real, rows, extractor, image_size, progress=progress)
    naming = Naming(extractor.name, extractor.standard)
    groups = {POOLED: rows, **{code: [row for row in rows if row["phase"] == code] for code in real.classes.codes}}
    found: dict[str, dict[str, Any]] = {}
    with tqdm(total=len(groups) * repeats, desc="halves", disable=not progress) as bar:
        for name, own in groups.items():
            values: dict[int, list[dict[str, float | None]]] = {n: [] for n in sizes}
            largest = len(own)
            for repeat in range(repeats):
                halves = _halves(own, np.random.default_rng([seed, repeat]))
                largest = min(largest, *map(len, halves))
                for n in sizes:
                    if n <= min(map(len, halves)):
                        sides: list[Side] = [loaded.side(half[:n], by_patient=True) for half in halves]
                        estimates = compare(sides[0], sides[1], naming)
                        values[n].append({figure: estimate.value for figure, estimate in estimates.items()})
                bar.update()
            found[name] = {
                str(n): {"figures": _summary(values[n]), "note": "" if values[n] else f"halves hold {largest} crops"}
                for n in sizes
            }
    return {
        "dataset": real.name,
        "seed": seed,
        "repeats": repeats,
        "image_size": image_size,
        "without_patient": sum(row["patient"] is None for row in rows),
        "extractor": describe(extractor),
        "fingerprints": {real.name: real.info.get("fingerprint")},
        "groups": found,
    }


def _halves(rows: Rows, chance: np.random.Generator) -> tuple[Rows, Rows]:
    """Rows in random order, cut by patient: each patient in random order to the smaller half so far."""
    patients: dict[str, Rows] = {}
    for row in rows:
        patients.setdefault(patient_of(row), []).append(row)
    names = sorted(patients)
    halves: tuple[Rows, Rows] = ([], [])
    for index in chance.permutation(len(names)):
        min(halves, key=len).extend(patients[names[index]])
    first, second = ([half[i] for i in chance.permutation(len(half))] for half in halves)
    return first, second


def _summary(repeats: list[dict[str, float | None]]) -> dict[str, dict[str, float | int | None]]:
    """Mean and standard deviation (of one repeat: None) of each figure over the repeats that have it."""
    summary: dict[str, dict[str, float | int | None]] = {}
    for name in repeats[0] if repeats else ():
        values = [value for row in repeats if (value := row.get(name)) is not None]
        summary[name] = {
            "mean": float(np.mean(values)) if values else None,
            "sd": float(np.std(values, ddof=1)) if len(values) > 1 else None,
            "repeats": len(values),
        }
    return summary

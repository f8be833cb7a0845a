"""Which synthetic images repeat an earlier one of their phase; written into the manifests once all are there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tqdm import tqdm

from builder.quality.copies import find_duplicates
from builder.shards.dataset import Dataset
from builder.shards.schema import SCORES, with_columns
from builder.shards.writer import manifest_path, write_manifest

COLUMNS = ("duplicate_score", "duplicate_of")
FIELDS = [field for field in SCORES if field.name in COLUMNS]


def mark_duplicates(dataset: Dataset, threshold: float, *, progress: bool = True, device: str = "cpu") -> None:
    """Fill `duplicate_score` and, from `threshold` on, `duplicate_of` of every image that has none yet.

    An image is compared with those before it, in the order of the shards: what is known of the first images of a
    dataset stays true when more are added, and their manifests are not touched.
    """
    rows = dataset.table(["key", "phase", "sha256", "shard", "offset", "size", *COLUMNS]).to_pylist()
    found: dict[str, dict[str, Any]] = {}
    phases = [[row for row in rows if row["phase"] == code] for code in sorted({row["phase"] for row in rows})]
    pending = [own for own in phases if any(row["duplicate_score"] is None for row in own)]
    total = sum(len(own) for own in pending)
    with tqdm(desc=f"duplicates in {dataset.name}", total=total, unit="image", disable=not progress) as bar:
        for own in pending:
            first = next(place for place, row in enumerate(own) if row["duplicate_score"] is None)
            keys, equal = [row["key"] for row in own], _first_of_equal(own)
            scores, earlier = find_duplicates(_pixels(dataset, own, bar), keys, first, device)
            for key, score, other in zip(keys[first:], scores, earlier, strict=True):
                if equal[key] != key:  # also of flat images, whose correlation is 0
                    score, other = 1.0, equal[key]
                repeated = other if score >= threshold else None
                found[key] = {"duplicate_score": float(score), "duplicate_of": repeated}
    for number in dataset.shard_numbers() if found else []:
        table = dataset.shard_table(number)
        own = table.select(["key", *COLUMNS]).to_pylist()
        if any(row["key"] in found for row in own):
            marked = with_columns(table, [found.get(row["key"], row) for row in own], FIELDS)
            write_manifest(dataset.storage, manifest_path(dataset.name, number), marked)


def _first_of_equal(rows: list[dict[str, Any]]) -> dict[str, str]:
    """Key -> the key of the first image with the same pixels, maybe itself."""
    first: dict[str, str] = {}
    return {row["key"]: first.setdefault(row["sha256"], row["key"]) for row in rows}


def _pixels(dataset: Dataset, rows: list[dict[str, Any]], bar: Any) -> Iterator[Any]:
    for row in rows:
        yield dataset.pixels(row)
        bar.update(1)

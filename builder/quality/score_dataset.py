"""Score every image of a dataset and write the scores into its manifests."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
from tqdm import tqdm

from builder.config import ScoreConfig
from builder.quality.reference import STAMP, Reference, build_reference, save_reference
from builder.quality.scorer import Scorer
from builder.shards.dataset import Dataset
from builder.shards.schema import SCORES
from builder.shards.writer import manifest_path, write_manifest

CHUNK = 64  # images decoded and scored together


def score_dataset(
    dataset: Dataset, real: Dataset, config: ScoreConfig, *, progress: bool = True, device: str = "cpu"
) -> Reference:
    """Score `dataset` against the training crops of `real`; each manifest is replaced atomically, the tars untouched.

    Shards that already bear this version of the scores are passed over, so a killed run continues. Records the
    reference (reference.json) and, at the end, the protocol (`scores` in dataset.json).
    Raises BuilderError when the class tables differ or `real` has no training crop of a phase.
    """
    dataset.classes.require_same(real.classes, f"dataset '{dataset.name}'", f"'{real.name}'")
    rows = dataset.table(["phase", "width", "height"])
    codes = [code for code in dataset.classes.codes if code in set(rows["phase"].to_pylist())]
    sizes = set(rows["width"].to_pylist()) | set(rows["height"].to_pylist())
    reference = build_reference(real, config, codes, image_size=sizes.pop() if len(sizes) == 1 else None)
    save_reference(dataset, reference)
    scorer = Scorer(reference, real, config, device)
    numbers = dataset.shard_numbers()
    with tqdm(total=rows.num_rows, desc=f"scoring {dataset.name}", unit="image", disable=not progress) as bar:
        for number in numbers:
            metadata = dataset.shard_metadata(number)
            table = dataset.shard_table(number)
            if metadata.get(STAMP) != scorer.version:
                scored = _with_scores(table, _scores(dataset, table, scorer, bar), {**metadata, STAMP: scorer.version})
                write_manifest(dataset.storage, manifest_path(dataset.name, number), scored)
            else:
                bar.update(table.num_rows)
    dataset.write_info({**dataset.info, "scores": reference.protocol()})
    return reference


def _scores(dataset: Dataset, table: pa.Table, scorer: Scorer, bar: Any) -> list[dict[str, float]]:
    rows = table.to_pylist()
    scores = []
    for start in range(0, len(rows), CHUNK):
        chunk = rows[start : start + CHUNK]
        scores += scorer.score([dataset.pixels(row) for row in chunk], [row["phase"] for row in chunk])
        bar.update(len(chunk))
    return scores


def _with_scores(table: pa.Table, scores: list[dict[str, float]], metadata: dict[str, str]) -> pa.Table:
    """The manifest with its score columns replaced, in place where they stand, and new schema metadata."""
    for field in SCORES:
        values = pa.array([row.get(field.name) for row in scores], field.type)
        place = table.schema.get_field_index(field.name)
        table = table.set_column(place, field, values) if place >= 0 else table.append_column(field, values)
    return table.replace_schema_metadata(metadata)

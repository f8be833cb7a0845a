"""Score every image of a dataset and write the scores into its manifests."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from builder import __version__
from builder.config import ScoreConfig, fingerprint
from builder.documents import read_document, write_document
from builder.errors import BuilderError
from builder.quality.build import build_reference
from builder.quality.duplicates import mark_duplicates
from builder.quality.features.cache import save_features
from builder.quality.panel import patient_of
from builder.quality.reference import SCORE_VERSION, Reference, save_reference
from builder.quality.scorer import Scorer
from builder.shards.dataset import Dataset, one_size
from builder.shards.lock import exclusive
from builder.shards.schema import SCORES, STAMP, with_columns
from builder.shards.whole import sweep_leftovers
from builder.shards.writer import manifest_path, write_manifest

CHUNK = 64  # images decoded and scored together


def score_dataset(
    dataset: Dataset, real: Dataset, config: ScoreConfig, *, progress: bool = True, device: str = "cpu"
) -> Reference:
    """Score `dataset` against the training crops of `real`; each manifest is replaced atomically, the tars untouched.

    Real crops are compared with other patients' only. Records the reference (reference.json) and, at the end, the
    protocol (`scores` in dataset.json). Killed and run again, it continues: the reference is not made anew, and shards
    that already bear this version of the scores are passed over. Raises BuilderError when the class tables differ,
    `real` has no training crop of a phase, or a job is writing the dataset.
    """
    dataset.classes.require_same(real.classes, f"dataset '{dataset.name}'", f"'{real.name}'")
    with exclusive(dataset):
        sweep_leftovers(dataset)
        return _score_dataset(dataset, real, config, progress, device)


def _score_dataset(dataset: Dataset, real: Dataset, config: ScoreConfig, progress: bool, device: str) -> Reference:
    rows = dataset.table(["phase", "width", "height"])
    codes = [code for code in dataset.classes.codes if code in set(rows["phase"].to_pylist())]
    reference = _reference(dataset, real, config, codes, one_size(rows), device, progress)
    save_reference(dataset, reference)
    scorer = Scorer(reference, real, config, device, leave_out=dataset.info["origin"] == "real")
    with tqdm(total=rows.num_rows, desc=f"scoring {dataset.name}", unit="image", disable=not progress) as bar:
        for number in dataset.shard_numbers():
            metadata = dataset.shard_metadata(number)
            table = dataset.shard_table(number)
            if metadata.get(STAMP) != scorer.version:
                scored = with_columns(table, _scores(dataset, number, table, scorer, bar), SCORES)
                scored = scored.replace_schema_metadata({**metadata, STAMP: scorer.version})
                write_manifest(dataset.storage, manifest_path(dataset.name, number), scored)
            else:
                bar.update(table.num_rows)
    if dataset.info["origin"] == "synthetic":
        mark_duplicates(dataset, reference.copy["threshold"], progress=progress, device=device)
    dataset.write_info({**dataset.info, "scores": reference.protocol()})
    dataset.storage.remove(_unfinished(dataset))
    return reference


def _reference(
    dataset: Dataset, real: Dataset, config: ScoreConfig, codes: list[str], image_size: int | None, device: str,
    progress: bool,
) -> Reference:  # fmt: skip
    """The reference made from `real`: that of a run that was killed, where nothing it is made from has changed since.

    To make it takes as long as to score some thousand images.
    """
    crops = real.table(["key", "phase", "patient", "split", "sha256"])
    made_from = fingerprint(
        {
            "real": real.name, "crops": crops.to_pydict(), "config": asdict(config), "codes": codes,
            "image_size": image_size, "device": device, "version": [SCORE_VERSION, __version__],
        }
    )  # fmt: skip
    path = _unfinished(dataset)
    with suppress(FileNotFoundError, BuilderError, TypeError):  # a damaged one is made again
        kept = read_document(path, storage=dataset.storage)
        if kept.get("made_from") == made_from:
            return Reference.from_json(kept["reference"])
    made = build_reference(real, config, codes, image_size=image_size, device=device, progress=progress)
    write_document(path, {"made_from": made_from, "reference": made.to_json()}, dataset.storage)
    return made


def _unfinished(dataset: Dataset) -> str:
    """A document that is there while a dataset is being scored: a killed run goes on with its reference."""
    return f"manifests/{dataset.name}/scoring.json"


def _scores(dataset: Dataset, number: int, table: pa.Table, scorer: Scorer, bar: Any) -> list[dict[str, Any]]:
    rows = table.to_pylist()
    scores, features = [], []
    for start in range(0, len(rows), CHUNK):
        chunk = rows[start : start + CHUNK]
        patients = [patient_of(row) if row["origin"] == "real" else None for row in chunk]
        scores += scorer.score([dataset.pixels(row) for row in chunk], [row["phase"] for row in chunk], patients)
        features.append(scorer.last_features)
        bar.update(len(chunk))
    hashes = [row["sha256"] for row in rows]
    save_features(dataset, number, scorer.extractor, scorer.reference.image_size, hashes, np.concatenate(features))
    return scores

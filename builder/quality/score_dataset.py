"""Score every image of a dataset and write the scores into its manifests."""

from __future__ import annotations

from collections.abc import Collection, Sequence
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
from builder.quality.image_scores import RANKED, FeatureScore, kinds_of, outdated, recorded_versions, stamps_of
from builder.quality.image_scores import SCORES as KINDS
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

    Real crops are compared with other patients' only. Of each shard only the scores are computed that it lacks, or has
    by another definition or protocol: a score that was added later is filled in. Records the reference (reference.json)
    and, at the end, the protocol (`scores` in dataset.json). Killed and run again, it continues: the reference is not
    made anew, and what is written is not computed again. Raises BuilderError when the class tables differ, `real` has
    no training crop of a phase, or a job is writing the dataset.
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
    lacking = {number: _lacking(dataset, number, reference) for number in dataset.shard_numbers()}
    due = {kind.name for kinds in lacking.values() for kind in kinds}
    scorer = Scorer(reference, real, config, device, leave_out=dataset.info["origin"] == "real", only=due)
    with tqdm(total=rows.num_rows, desc=f"scoring {dataset.name}", unit="image", disable=not progress) as bar:
        for number, kinds in lacking.items():
            metadata, table = dataset.shard_metadata(number), dataset.shard_table(number)
            fields = _fields(table, kinds, reference)
            if fields or metadata.get(STAMP) != scorer.version:
                scores = _scores(dataset, number, table, scorer, {kind.name for kind in kinds}, bar)
                scored = with_columns(table, scores, fields)
                scored = scored.replace_schema_metadata({**metadata, **stamps_of(reference)})
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
            "scores": [[kind.name, kind.code_version, kind.columns] for kind in KINDS],
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


def _lacking(dataset: Dataset, number: int, reference: Reference) -> list[Any]:
    """The scores that a shard lacks, or has by another definition or protocol."""
    recorded = recorded_versions(dataset.shard_metadata(number), reference)
    return outdated(dataset.shard_schema(number).names, recorded, reference)


def _fields(table: pa.Table, kinds: Sequence[Any], reference: Reference) -> list[pa.Field]:
    """The columns of a manifest that are written: those of the scores that it lacks, and what else isn't there yet.

    Where all of it is scored anew, duplicates are looked for anew as well. Columns of a score that can no longer be
    computed (LPIPS without its weights) are emptied.
    """
    computed = kinds_of(reference)
    if len(kinds) == len(computed):
        return list(SCORES)
    missing = {field.name for field in SCORES} - set(table.column_names)
    gone = _columns([kind for kind in KINDS if kind not in computed]) - missing
    full = {name for name in gone if table[name].null_count < table.num_rows}
    wanted = missing | full | _columns(kinds)
    return [field for field in SCORES if field.name in wanted]


def _columns(kinds: Sequence[Any]) -> set[str]:
    """The columns of some scores, with their percentiles."""
    own = {name for kind in kinds for name in kind.columns}
    return own | {name for name, score in RANKED.items() if score in own}


def _scores(
    dataset: Dataset, number: int, table: pa.Table, scorer: Scorer, names: Collection[str], bar: Any
) -> list[dict[str, Any]]:
    """The scores of these names, a row an image; features are kept where they were computed."""
    rows = table.to_pylist()
    if not names:
        bar.update(len(rows))
        return [{} for _ in rows]
    scores, features = [], []
    for start in range(0, len(rows), CHUNK):
        chunk = rows[start : start + CHUNK]
        patients = [patient_of(row) if row["origin"] == "real" else None for row in chunk]
        pixels, codes = [dataset.pixels(row) for row in chunk], [row["phase"] for row in chunk]
        scores += scorer.score(pixels, codes, patients, only=names)
        features.append(scorer.last_features)
        bar.update(len(chunk))
    if FeatureScore.name in names:
        hashes = [row["sha256"] for row in rows]
        save_features(dataset, number, scorer.extractor, scorer.reference.image_size, hashes, np.concatenate(features))
    return scores

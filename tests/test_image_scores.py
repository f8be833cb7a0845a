"""A score that was added or defined anew is filled in by scoring again, and nothing else is computed."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pytest

import builder.quality.image_scores as room
import builder.quality.score_dataset as scoring
from builder.config import ScoreConfig
from builder.quality.build import build_reference
from builder.quality.image_scores import RANKED, SCORES, CopyScore, LpipsScore, SsimScore, StatisticsScore, version_of
from builder.quality.reference import Reference, load_reference
from builder.quality.score_dataset import score_dataset
from builder.shards.dataset import Dataset
from builder.shards.schema import SCORE_NAMES, SCORE_VERSIONS, STAMP
from builder.shards.writer import manifest_path, write_manifest
from tests.conftest import write_real

SMALL = ScoreConfig(ssim_size=64, panel=2)
DUPLICATES = {"duplicate_score", "duplicate_of"}


@pytest.fixture
def clinic(tmp_path: Path) -> Dataset:
    return write_real(tmp_path, per_phase=6, size=24)


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, frozenset[str]]]:
    """What `score_dataset` computes from now on: number of images, and the names of the scores."""
    calls: list[tuple[int, frozenset[str]]] = []
    score = scoring.Scorer.score

    def counted(self: Any, pixels: Any, codes: Any, patients: Any = None, *, only: Any = None) -> Any:
        if only is not None:  # else it is a yardstick
            calls.append((len(pixels), frozenset(only)))
        return score(self, pixels, codes, patients, only=only)

    monkeypatch.setattr(scoring.Scorer, "score", counted)
    return calls


def rewrite(dataset: Dataset, number: int, drop: tuple[str, ...] = (), **metadata: str | None) -> None:
    """Take columns out of a manifest, and change or (None) leave out what its metadata say."""
    table = dataset.shard_table(number).drop_columns(list(drop))
    told = {**dataset.shard_metadata(number), **metadata}
    kept = {name: value for name, value in told.items() if value is not None}
    path = manifest_path(dataset.name, number)
    write_manifest(dataset.storage, path, table.replace_schema_metadata(kept))


def scores(dataset: Dataset) -> pa.Table:
    return dataset.table().select(SCORE_NAMES)


def test_every_column_belongs_to_one_score() -> None:
    columns = [name for kind in SCORES for name in kind.columns]
    assert len(set(columns)) == len(columns)
    percentiles = [name for name, score in RANKED.items() if score in columns]
    assert {*columns, *percentiles, *DUPLICATES} == set(SCORE_NAMES)
    assert len({kind.name for kind in SCORES}) == len(SCORES)
    assert {kind.cost for kind in SCORES} <= {"low", "medium", "high"}


@pytest.mark.parametrize(
    ("drop", "names"),
    [
        (("sharpness",), {"statistics"}),
        (("ssim_real_pct",), {"ssim"}),
        (("copy_of", "realism"), {"copies", "features"}),
    ],
)
def test_a_missing_column_is_filled_and_nothing_else_computed(
    clinic: Dataset, computed: list[Any], drop: tuple[str, ...], names: set[str]
) -> None:
    score_dataset(clinic, clinic, SMALL, progress=False)
    before = scores(clinic)
    rewrite(clinic, 1, drop)
    computed.clear()
    score_dataset(clinic, clinic, SMALL, progress=False)
    assert computed == [(9, frozenset(names))]  # of one shard
    assert scores(clinic).equals(before)
    computed.clear()
    score_dataset(clinic, clinic, SMALL, progress=False)
    assert computed == []


def test_manifests_from_before_are_taken_by_their_stamp(clinic: Dataset, computed: list[Any]) -> None:
    """They hold no version of a single score."""
    reference = score_dataset(clinic, clinic, SMALL, progress=False)
    for number in (0, 1):
        rewrite(clinic, number, ("noise",) if number else (), **{SCORE_VERSIONS: None})
    computed.clear()
    score_dataset(clinic, clinic, SMALL, progress=False)
    assert computed == [(9, frozenset({"statistics"}))]
    for number, stamp in ((0, "of another protocol"), (1, None)):
        rewrite(clinic, number, **{SCORE_VERSIONS: None, STAMP: stamp})
    computed.clear()
    score_dataset(clinic, clinic, SMALL, progress=False)
    assert [names for _, names in computed] == [frozenset({"ssim", "features", "statistics", "copies"})] * 2
    assert load_reference(clinic) == reference


def test_columns_that_nobody_computes_are_there_and_empty(clinic: Dataset, computed: list[Any]) -> None:
    score_dataset(clinic, clinic, SMALL, progress=False)
    rewrite(clinic, 0, ("lpips", "duplicate_of"))
    computed.clear()
    score_dataset(clinic, clinic, SMALL, progress=False)
    assert computed == []
    assert {"lpips", "duplicate_of"} <= set(clinic.shard_table(0).column_names)


class Redness:
    """A score of one's own, in columns that the schema has: how red an image is."""

    name, cost, code_version = "redness", "low", 1
    columns = ("mean_r",)
    stands_on: ClassVar[tuple[str, ...]] = ()

    def __init__(self, context: Any) -> None: ...

    def score(self, images: Any, codes: Any, patients: Any) -> Any:
        return [{"mean_r": float(image[..., 0].mean()) / 1000} for image in images]


def test_a_score_that_is_added_is_filled_in(
    clinic: Dataset, computed: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    score_dataset(clinic, clinic, SMALL, progress=False)
    before = scores(clinic)
    monkeypatch.setattr(room, "SCORES", (*SCORES, Redness))
    monkeypatch.setattr(scoring, "KINDS", (*SCORES, Redness))
    computed.clear()
    score_dataset(clinic, clinic, SMALL, progress=False)
    assert computed == [(9, frozenset({"redness"}))] * 2
    after = scores(clinic)
    assert np.allclose(after["mean_r"], np.array(before["mean_r"]) / 1000)
    assert after.drop_columns(["mean_r"]).equals(before.drop_columns(["mean_r"]))
    assert json.loads(clinic.shard_metadata(0)[SCORE_VERSIONS])["redness"]


def test_a_score_that_is_defined_anew_is_computed_anew_and_the_scores_have_another_version(
    clinic: Dataset, computed: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = score_dataset(clinic, clinic, SMALL, progress=False)
    monkeypatch.setattr(StatisticsScore, "code_version", 2)
    computed.clear()
    second = score_dataset(clinic, clinic, SMALL, progress=False)
    assert computed == [(9, frozenset({"statistics"}))] * 2
    assert second.version != first.version == dataclasses.replace(second, code_versions={}).version
    assert load_reference(clinic) == second and second.code_versions == {"statistics": 2}


def test_versions_change_with_what_a_score_stands_on_and_nothing_else(clinic: Dataset) -> None:
    reference: Reference = build_reference(clinic, SMALL, "IPR", image_size=24, progress=False)

    def changed_by(**changes: Any) -> set[str]:
        other = dataclasses.replace(reference, **changes)
        return {kind.name for kind in SCORES if version_of(kind, other) != version_of(kind, reference)}

    assert changed_by(ssim_stride=5) == {"ssim"}
    assert changed_by(panel_sha256="0") == {"ssim", "lpips"}
    assert changed_by(lpips="weights") == {"lpips"}
    assert changed_by(features="x") == {"features"}
    assert changed_by(training_sha256="0") == {kind.name for kind in SCORES}
    assert changed_by(missing={"lpips": "why"}, panel_seed=3) == set()
    assert not reference.lpips and LpipsScore not in room.kinds_of(reference)
    assert {SsimScore, CopyScore} < set(room.kinds_of(reference))


def test_a_changed_setting_of_one_score_leaves_the_others(clinic: Dataset, computed: list[Any]) -> None:
    score_dataset(clinic, clinic, SMALL, progress=False)
    before = scores(clinic)
    computed.clear()
    score_dataset(clinic, clinic, dataclasses.replace(SMALL, ssim_stride=9), progress=False)
    assert computed == [(9, frozenset({"ssim"}))] * 2
    changed = [name for name in SCORE_NAMES if not scores(clinic)[name].equals(before[name])]
    assert changed and all(name.startswith("ssim") for name in changed)

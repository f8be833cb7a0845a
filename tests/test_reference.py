"""References: leaving a patient out, the scale of real crops, gates, and the scorer that stands on them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from builder.config import ScoreConfig
from builder.errors import BuilderError
from builder.quality.build import build_reference
from builder.quality.gates import gate_ranges, make_gates
from builder.quality.reference import Reference, load_reference, save_reference, yardstick_table
from builder.quality.score_dataset import score_dataset
from builder.quality.scorer import Scorer, real_percentiles
from builder.quality.training_crops import panel_rows
from builder.shards.dataset import Dataset
from builder.shards.schema import NUMERIC_SCORES, SCORE_NAMES
from builder.shards.storage import Storage
from builder.shards.writer import Sample, encode_png, image_row, write_shard
from tests.conftest import textured, write_real

SMALL = ScoreConfig(ssim_size=96, panel=3)


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write_real(tmp_path_factory.mktemp("real"))


@pytest.fixture(scope="module")
def reference(real: Dataset) -> Reference:
    return build_reference(real, SMALL, "IPR", progress=False)


def rows_of(*patients: str) -> list[dict[str, str]]:
    return [{"key": f"{number}{patient}", "patient": patient, "source": ""} for number, patient in enumerate(patients)]


def test_reserves_fill_the_panel_when_any_patient_is_left_out(reference: Reference) -> None:
    for patients in ("aaabbbcccddd", "abcdefgh", "aaaaaaab", "aaaa"):
        rows = rows_of(*patients)
        panel = panel_rows(rows, reference, "I", reserves=False)
        filled = panel_rows(rows, reference, "I", reserves=True)
        assert filled[: len(panel)] == panel and len(panel) == 3
        for patient in set(patients):
            others = [row for row in filled if row["patient"] != patient]
            assert len(others) >= min(3, sum(own != patient for own in patients))


def test_a_real_crop_is_compared_with_other_patients_only(real: Dataset, reference: Reference) -> None:
    scorer = Scorer(reference, real, SMALL, leave_out=True)
    row = next(row for row in real.table().to_pylist() if row["key"] in reference.panel["I"])
    seen, honest = (scorer.score([real.pixels(row)], ["I"], patients)[0] for patients in ([None], [row["patient"]]))
    assert seen["ssim"] == pytest.approx(1, abs=1e-4) and honest["ssim"] < 0.99
    assert seen["feature_distance"] < 1e-3 < honest["feature_distance"]
    assert seen["copy_of"] == row["key"] != honest["copy_of"]
    assert seen["copy_score"] > 0.99 > honest["copy_score"]


def test_percentiles_are_mid_ranks_among_real_crops() -> None:
    scale = {"ssim": [0.1, 0.2, 0.2, 0.4]}
    found = {value: real_percentiles({"ssim": value}, scale)["ssim_real_pct"] for value in (0.0, 0.1, 0.2, 0.3, 0.9)}
    assert found == {0.0: 0.0, 0.1: 12.5, 0.2: 50.0, 0.3: 75.0, 0.9: 100.0}
    assert real_percentiles({"ssim": None}, scale)["ssim_real_pct"] is None
    assert real_percentiles({"ssim": 0.5}, {})["ssim_real_pct"] is None


def test_real_crops_lie_everywhere_on_their_own_scale(real: Dataset, reference: Reference) -> None:
    scorer = Scorer(reference, real, SMALL, leave_out=True)
    rows = [row for row in real.table().to_pylist() if row["split"] == "train" and row["phase"] == "P"]
    scores = scorer.score([real.pixels(row) for row in rows], ["P"] * 8, [row["patient"] for row in rows])
    ranks = sorted(score["ssim_real_pct"] for score in scores)
    assert ranks == pytest.approx([100 * (i + 0.5) / 8 for i in range(8)], abs=1e-6)
    assert reference.real["P"]["ssim"] == pytest.approx(sorted(score["ssim"] for score in scores))


def test_every_column_is_there_and_what_is_missing_has_a_reason(real: Dataset, reference: Reference) -> None:
    rows = Scorer(reference, real, SMALL).score([textured(1, 64), textured(2, 40)], ["I", "P"])
    assert all(set(row) == set(SCORE_NAMES) for row in rows)
    empty = {name for row in rows for name, value in row.items() if value is None}
    assert {name.removesuffix("_real_pct") for name in empty} <= {*reference.missing, "duplicate_score", "duplicate_of"}
    values = [row[name] for row in rows for name in NUMERIC_SCORES if name not in empty]
    assert np.isfinite(values).all()


def test_no_phase_to_tell_apart_and_no_other_patient(tmp_path: Path) -> None:
    """One phase has no probe; one patient leaves nothing to compare its own crops with: no figure, no gate, no NaN."""
    storage = Storage(tmp_path)
    real = write_real(tmp_path, codes="I")
    single = build_reference(real, SMALL, "I", progress=False)
    assert single.probe is None and "phase_probability" in single.missing
    assert "phase_probability" not in single.gates["I"]
    rows = []
    for number in range(3):
        pixels = textured(number, 64)
        place = {"patient": "a" * 32, "split": "train", "source": "s", "original_size": [64, 64]}
        rows.append(Sample(image_row(f"one-I-{number:08d}", "I", 0, "real", pixels) | place, encode_png(pixels)))
    write_shard(storage, "one", 0, rows)
    one = Dataset("one", storage)
    one.write_info({**real.info, "name": "one", "count": 3})
    lonely = build_reference(one, SMALL, "I", progress=False)
    assert lonely.yardstick["I"]["real"] == []
    assert "ssim" not in lonely.real["I"] and "realism" not in lonely.gates["I"]
    score = Scorer(lonely, one, SMALL).score([textured(9, 64)], ["I"])[0]
    assert score["ssim"] is not None and score["ssim_real_pct"] is None and score["realism"] is None
    save_reference(one, lonely)
    assert load_reference(one) == lonely


def test_gates_leave_out_what_real_crops_lack() -> None:
    base = {"sharpness": 0.4, "contrast": 20.0, "clipped": 0.0, "noise": 2.0, "chroma_noise": 0.5}
    soft = [{"sharpness": 0.1}]
    assert "realism" not in make_gates([{**base, "realism": None}] * 3, soft)
    gates = make_gates([{**base, "realism": 1.0, "phase_probability": p} for p in np.linspace(0, 1, 101)], soft)
    assert gates["realism"] == [1.0, None]
    assert gates["phase_probability"] == [pytest.approx(0.05), None]
    assert {limit.reason for limit in gate_ranges({"I": gates})} >= {"gate noise", "gate phase_probability"}


def test_yardsticks_hold_every_kind(reference: Reference) -> None:
    tables = yardstick_table(reference)
    assert [table.num_rows for table in tables.values()] == [
        12,
        24,
        12,
        12,
        12,
    ]  # 4 of a phase, 8 of others
    said = tables["real crops, held-out"]
    assert set(said.column_names) == {"phase", *NUMERIC_SCORES}


def test_a_real_dataset_scored_against_itself_leaves_patients_out(tmp_path: Path) -> None:
    real = write_real(tmp_path)
    score_dataset(real, real, SMALL, progress=False)
    table = real.table()
    assert max(table["ssim"].to_pylist()) < 0.99 and max(table["copy_score"].to_pylist()) < 0.9
    assert table["duplicate_score"].null_count == table.num_rows  # repeats are a matter of synthetic images
    owner = dict(zip(table["key"].to_pylist(), table["patient"].to_pylist(), strict=True))
    pairs = zip(table["patient"].to_pylist(), table["copy_of"].to_pylist(), strict=True)
    assert all(owner[key] != patient for patient, key in pairs)


def test_a_changed_training_split_or_protocol_is_refused(real: Dataset, reference: Reference, tmp_path: Path) -> None:
    with pytest.raises(BuilderError, match="no longer holds the training crops"):
        Scorer(dataclasses.replace(reference, training_sha256="0"), real, SMALL)
    with pytest.raises(BuilderError, match="features "):
        Scorer(dataclasses.replace(reference, features="other-000000000000"), real, SMALL)
    other = Dataset("other", Storage(tmp_path))
    save_reference(other, dataclasses.replace(reference, score_version=1))
    with pytest.raises(BuilderError, match="another version of this program"):
        load_reference(other)

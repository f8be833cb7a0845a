"""References: leaving a patient out, the scale of real crops, gates, and the scorer that stands on them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from builder.config import ScoreConfig
from builder.errors import BuilderError
from builder.phases import HEALING_PHASES
from builder.quality.build import build_reference
from builder.quality.gates import gate_ranges, make_gates
from builder.quality.reference import Reference, load_reference, save_reference, yardstick_table
from builder.quality.score_dataset import score_dataset
from builder.quality.scorer import Scorer, real_percentiles
from builder.quality.training_crops import panel_rows
from builder.shards.dataset import Dataset
from builder.shards.foreign import adopt
from builder.shards.lock import exclusive
from builder.shards.schema import NUMERIC_SCORES, SCORE_NAMES, with_columns
from builder.shards.storage import Storage
from builder.shards.writer import Sample, encode_png, image_row, manifest_path, write_manifest, write_shard
from tests.conftest import textured, write_real

SMALL = ScoreConfig(ssim_size=96, panel=3)


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write_real(tmp_path_factory.mktemp("real"))


@pytest.fixture(scope="module")
def reference(real: Dataset) -> Reference:
    return build_reference(real, SMALL, "IPR", progress=False)


def test_a_reference_is_always_the_same(real: Dataset, reference: Reference) -> None:
    assert build_reference(real, SMALL, "IPR", progress=False).to_json() == reference.to_json()


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
    assert (lonely.copy["n"], lonely.copy["rate"], lonely.copy["interval"]) == (0, None, [0.0, 1.0])
    assert "ssim" not in lonely.real["I"] and "realism" not in lonely.gates["I"]
    score = Scorer(lonely, one, SMALL).score([textured(9, 64)], ["I"])[0]
    assert score["ssim"] is not None and score["ssim_real_pct"] is None and score["realism"] is None
    save_reference(one, lonely)
    assert load_reference(one) == lonely


def test_gates_leave_out_what_real_crops_lack() -> None:
    base = {"sharpness": 0.4, "contrast": 20.0, "clipped": 0.0, "noise": 2.0, "chroma_noise": 0.5}
    soft = [{"sharpness": 0.1}]
    assert "realism" not in make_gates([{**base, "realism": None}] * 30, soft, 9)
    gates = make_gates([{**base, "realism": 1.0, "phase_probability": p} for p in np.linspace(0, 1, 101)], soft, 9)
    assert gates["realism"] == [1.0, None]
    assert gates["phase_probability"] == [pytest.approx(0.05), None]
    assert {limit.reason for limit in gate_ranges({"I": gates})} >= {"gate noise", "gate phase_probability"}


def test_few_crops_or_patients_make_no_gate_of_how_a_phase_looks() -> None:
    """Of 6 crops the lowest value says nothing: a small phase must not be turned away whole."""
    row = {"sharpness": 0.4, "contrast": 20.0, "clipped": 0.0, "noise": 2.0, "chroma_noise": 0.5}
    row |= {"realism": 1.0, "phase_probability": 0.9}
    for crops, patients, there in ((30, 9, True), (6, 6, False), (30, 2, False)):
        gates = make_gates([row] * crops, [{"sharpness": 0.1}], patients)
        assert ("realism" in gates, "phase_probability" in gates) == (there, there)
        assert "sharpness" in gates and "noise" in gates


def test_a_phase_of_one_patient_leaves_the_others_their_probe(tmp_path: Path) -> None:
    real = write_real(tmp_path)
    for number in real.shard_numbers():
        table = real.shard_table(number)
        rows = [{**row, "patient": "r" * 32 if row["phase"] == "R" else row["patient"]} for row in table.to_pylist()]
        changed = with_columns(table, rows, [table.schema.field("patient")])
        write_manifest(real.storage, manifest_path("clinic", number), changed)
    reference = build_reference(real, SMALL, "IPR", progress=False)
    assert reference.probe is not None and reference.probe["codes"] == ["I", "P"]
    assert "phase R has crops of one patient" in reference.missing["phase_probability"]
    scores = Scorer(reference, real, SMALL).score([textured(1, 64)] * 2, ["P", "R"])
    assert scores[0]["phase_probability"] is not None and scores[1]["phase_probability"] is None


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


def test_an_interrupted_scoring_is_not_read_with_another_reference(
    real: Dataset, reference: Reference, tmp_path: Path
) -> None:
    scored = adopted(tmp_path, {"I": [textured(0, 48)]})
    score_dataset(scored, real, SMALL, progress=False)
    assert load_reference(scored).panel_size == 3
    save_reference(scored, dataclasses.replace(load_reference(scored), ssim_size=64))  # killed before the first shard
    with pytest.raises(BuilderError, match="scoring was interrupted"):
        load_reference(scored)
    scored.storage.write(f"manifests/{scored.name}/reference.json", b"\xff\xfe")
    with pytest.raises(BuilderError, match="damaged"):
        load_reference(scored)


def test_images_of_one_phase_are_still_told_from_all_phases(real: Dataset, tmp_path: Path) -> None:
    scored = adopted(tmp_path, {"I": [textured(0, 48)]})
    alone = score_dataset(scored, real, SMALL, progress=False)
    every = build_reference(real, SMALL, "IPR", image_size=48, progress=False)
    assert list(alone.panel) == ["I"] and alone.probe == every.probe
    assert alone.gates["I"] == every.gates["I"] and alone.yardstick["I"] == every.yardstick["I"]
    assert scored.table()["phase_probability"].null_count == 0


def test_equal_images_repeat_the_first_of_them_though_they_are_flat(real: Dataset, tmp_path: Path) -> None:
    flat = np.full((48, 48, 3), 128, np.uint8)
    scored = adopted(tmp_path, {"I": [flat, flat + 1, flat], "P": [flat]})
    score_dataset(scored, real, SMALL, progress=False)
    table = scored.table()
    keys = table["key"].to_pylist()
    assert table["duplicate_of"].to_pylist() == [None, None, keys[0], None]
    assert table["duplicate_score"].to_pylist() == [0.0, 0.0, 1.0, 0.0]


def test_a_dataset_that_a_job_is_writing_is_not_scored(real: Dataset, tmp_path: Path) -> None:
    written = adopted(tmp_path, {"I": [textured(0, 48)]})
    with exclusive(written), pytest.raises(BuilderError, match="another job is writing"):
        score_dataset(written, real, SMALL, progress=False)


def adopted(root: Path, images: dict[str, list[np.ndarray]]) -> Dataset:
    """Foreign images of these phases as a synthetic dataset."""
    for code, own in images.items():
        (root / "foreign" / code).mkdir(parents=True)
        for number, pixels in enumerate(own):
            (root / "foreign" / code / f"{number}.png").write_bytes(encode_png(pixels))
    return adopt(str(root / "foreign"), "adopted", Storage(root / "out"), HEALING_PHASES)

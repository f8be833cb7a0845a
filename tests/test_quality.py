"""Scores of an image: agreement with others, invariants, gates, references, foreign data, sheets."""

from __future__ import annotations

import dataclasses
import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from builder.config import ScoreConfig
from builder.errors import BuilderError
from builder.phases import HEALING_PHASES
from builder.quality.build import build_reference
from builder.quality.gates import Gates, gate_ranges, make_gates
from builder.quality.panel import choose_panel, panel_sha256, spread
from builder.quality.reference import Reference, load_reference, save_reference, yardstick_table
from builder.quality.score_dataset import score_dataset
from builder.quality.scorer import Scorer
from builder.quality.sheet import CELL, contact_sheet
from builder.quality.spoil import blurred, flat
from builder.quality.ssim import PanelSSIM, bring_to
from builder.quality.statistics import image_statistics
from builder.shards.criteria import Criteria, judge
from builder.shards.dataset import Dataset, resize
from builder.shards.foreign import adopt, is_foreign
from builder.shards.schema import NUMERIC_SCORES, SCORE_NAMES, STAMP
from builder.shards.storage import Storage
from builder.shards.verify import verify_dataset
from builder.shards.writer import encode_png
from tests.conftest import textured, write_real

SMALL = ScoreConfig(ssim_size=96, ssim_stride=7, panel=3)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def phantoms() -> list[np.ndarray]:
    """Crops of phantom wounds, with a margin, at their native sizes."""
    from builder.demo.patients import make_patient
    from builder.demo.phantom import render_photograph

    crops = []
    for number in range(1, 10):
        photograph = render_photograph(make_patient(number, 0), 0, "middle")
        for box in photograph.boxes:
            margin = (box.xmax - box.xmin) // 6
            crops.append(
                photograph.pixels[
                    max(0, box.ymin - margin) : box.ymax + margin, max(0, box.xmin - margin) : box.xmax + margin
                ]
            )
    return crops


@pytest.fixture
def real(tmp_path: Path) -> Dataset:
    return write_real(tmp_path)


def to_tensor(*images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


# -- SSIM -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("native", [33, 64, 160])
def test_full_grid_agrees_with_torchmetrics_and_skimage(native: int) -> None:
    from skimage.metrics import structural_similarity
    from torchmetrics.functional.image import structural_similarity_index_measure

    size = 160
    panel = [textured(1, 64), textured(2, 97)]
    images = [textured(3, native), flat(textured(4, native)), np.zeros((native, native, 3), np.uint8)]
    best, mean = PanelSSIM({"I": panel}, size=size, stride=1).score(to_tensor(*images), ["I"] * 3)
    for image, best_one, mean_one in zip(images, best, mean, strict=True):
        theirs, also = [], []
        for other in panel:
            x, y = (bring_to(to_tensor(one), size) for one in (image, other))
            _, whole_map = structural_similarity_index_measure(
                x.double(), y.double(), sigma=1.5, data_range=1.0, return_full_image=True
            )
            theirs.append(float(whole_map[..., 5:-5, 5:-5].mean()))  # its own mean counts mirrored borders too
            x, y = (one[0].permute(1, 2, 0).double().numpy() for one in (x, y))
            also.append(
                structural_similarity(
                    x, y, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1.0, channel_axis=2
                )
            )
        assert best_one == pytest.approx(max(theirs), abs=1e-5)
        assert mean_one == pytest.approx(np.mean(theirs), abs=1e-5)
        assert best_one == pytest.approx(max(also), abs=1e-5)


def test_sub_grid_stays_near_the_full_grid(phantoms: list[np.ndarray]) -> None:
    """At the protocol's size: phantoms from 64 px (as the demo's images are) and from native, and noise."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    noisy = np.clip(resize(phantoms[4], 64) + np.random.default_rng(1).normal(0, 13, (64, 64, 3)), 0, 255).astype(
        np.uint8
    )
    images = [
        torch.from_numpy(np.array(i)).permute(2, 0, 1) for i in (resize(phantoms[5], 64), phantoms[6], noise, noisy)
    ]
    panels = {"P": phantoms[:4]}
    protocol = ScoreConfig()
    full = PanelSSIM(panels, protocol.ssim_size, 1).score(images, ["P"] * len(images))
    grid = PanelSSIM(panels, protocol.ssim_size, protocol.ssim_stride).score(images, ["P"] * len(images))
    assert np.abs(np.array(full) - np.array(grid)).max() <= 0.005


@settings(max_examples=15, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 30), st.sampled_from([40, 64, 90]), st.sampled_from("IP")), min_size=1, max_size=20
    )
)
def test_scores_do_not_depend_on_batch_or_order(asked: list[tuple[int, int, str]]) -> None:
    scorer = _small_panel()
    images = [to_tensor(textured(seed, size))[0] for seed, size, _ in asked]
    codes = [code for *_, code in asked]
    together = np.array(scorer.score(images, codes))
    alone = np.array([scorer.score([image], [code]) for image, code in zip(images, codes, strict=True)])[:, :, 0].T
    backwards = np.array(scorer.score(images[::-1], codes[::-1]))[:, ::-1]
    np.testing.assert_allclose(together, alone, rtol=0, atol=1e-6)
    np.testing.assert_allclose(together, backwards, rtol=0, atol=1e-6)
    assert (np.abs(together) <= 1 + 1e-6).all()
    assert (together[0] >= together[1] - 1e-6).all()  # the best is no worse than the mean


def _small_panel() -> PanelSSIM:
    panels = {"I": [textured(100, 64), textured(101, 50)], "P": [textured(102, 64), textured(103, 80)]}
    return PanelSSIM(panels, size=96, stride=5)


def test_a_panel_image_is_most_similar_to_itself() -> None:
    best, mean = _small_panel().score(to_tensor(textured(102, 64)), ["P"])
    assert best[0] == pytest.approx(1, abs=1e-5)
    assert mean[0] < 0.9


def test_images_must_be_uint8_and_their_phase_have_a_panel() -> None:
    scorer = _small_panel()
    with pytest.raises(TypeError, match="uint8"):
        scorer.score(to_tensor(textured(1)).float() / 255, ["I"])
    with pytest.raises(BuilderError, match="no panel for phase 'R'"):
        scorer.score(to_tensor(textured(1)), ["R"])
    with pytest.raises(BuilderError, match="not possible"):
        PanelSSIM({}, size=8)
    assert [len(part) for part in scorer.score([], [])] == [0, 0]


# -- statistics and gates --------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 255), st.integers(1, 200), st.integers(1, 200))
def test_a_flat_image_has_no_sharpness(grey: int, height: int, width: int) -> None:
    statistics = image_statistics(np.full((height, width, 3), grey, np.uint8))
    assert statistics["sharpness"] == pytest.approx(0, abs=1e-9)
    assert statistics["contrast"] == pytest.approx(0, abs=1e-9)
    assert statistics["clipped"] == (1.0 if grey in (0, 255) else 0.0)
    assert statistics["mean_g"] == grey


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(16, 200))
def test_statistics_are_in_range_and_blur_lowers_sharpness(seed: int, size: int) -> None:
    pixels = textured(seed, size)
    statistics, soft = image_statistics(pixels), image_statistics(blurred(pixels))
    assert set(statistics) <= set(SCORE_NAMES)
    assert 0 <= soft["sharpness"] < statistics["sharpness"] <= 1
    assert 0 <= statistics["clipped"] <= 1
    assert 0 <= statistics["contrast"] <= 127.5


def test_sharpness_ignores_contrast_and_mean_colour() -> None:
    pixels = textured(3, 128)
    dim = (pixels * 0.5 + 60).round().astype(np.uint8)
    assert image_statistics(dim)["sharpness"] == pytest.approx(image_statistics(pixels)["sharpness"], abs=0.03)
    red = np.zeros((8, 8, 3), np.uint8)
    red[..., 0] = 200
    assert [image_statistics(red)[f"mean_{c}"] for c in "rgb"] == [200, 0, 0]


def passing(rows: list[dict[str, float]], gates: Gates) -> list[bool]:
    """Which rows of statistics a filter lets through."""
    table = pa.Table.from_pylist([{"phase": "I", **row} for row in rows])
    return [not reasons for reasons in judge(table, Criteria(tuple(gate_ranges({"I": gates}))))]


def test_gates_turn_away_spoilt_phantoms_and_pass_real_ones(phantoms: list[np.ndarray]) -> None:
    train, held_out = phantoms[::2], phantoms[1::2]
    gates = make_gates([image_statistics(c) for c in train], [image_statistics(blurred(c)) for c in train], 9)
    assert np.mean(passing([image_statistics(crop) for crop in held_out], gates)) >= 0.8  # few crops: rough gates
    black = np.zeros((64, 64, 3), np.uint8)
    near_black = np.random.default_rng(0).integers(0, 4, (64, 64, 3), dtype=np.uint8)
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    spoilt = [black, near_black, noise, *map(flat, phantoms), *map(blurred, phantoms)]
    spoilt += [blurred(resize(crop, 64)) for crop in phantoms]
    assert not any(passing([image_statistics(image) for image in spoilt], gates))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0.05, 0.9), min_size=1, max_size=30), st.lists(st.floats(0, 0.5), min_size=1, max_size=30))
def test_no_blurred_crop_passes_even_where_real_ones_are_as_soft(real: list[float], soft: list[float]) -> None:
    def rows(sharpness: list[float]) -> list[dict[str, float]]:
        rest = {"contrast": 20.0, "clipped": 0.0, "noise": 2.0, "chroma_noise": 0.5}
        return [{"sharpness": value, **rest} for value in sharpness]

    gates = make_gates(rows(real), rows(soft), 9)
    assert not any(passing(rows([*soft, 0.0]), gates))


def test_gates_turn_away_what_is_missing_or_not_a_number() -> None:
    gates = {"sharpness": [0.2, 0.6], "contrast": [5.0, 127.5], "clipped": [0.0, 0.1]}
    sound = {"sharpness": 0.4, "contrast": 20.0, "clipped": 0.0}
    spoilt = [{"sharpness": 0.1}, {"contrast": float("nan")}, {"contrast": None}, {"clipped": 0.5}]
    assert passing([sound, *({**sound, **change} for change in spoilt)], gates) == [True, False, False, False, False]


# -- panel and reference --------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 5), max_size=25), st.integers(0, 12), st.randoms(use_true_random=False))
def test_spread_takes_every_patient_before_any_twice(patients: list[int], n: int, random) -> None:
    rows = [{"key": f"k{i}", "patient": f"p{p}", "source": None} for i, p in enumerate(patients)]
    chosen = spread(rows, n, "salt")
    assert len(chosen) == min(n, len(rows)) == len({row["key"] for row in chosen})
    counts = [sum(row["patient"] == f"p{p}" for row in chosen) for p in set(patients)]
    available = [patients.count(p) for p in set(patients)]
    most = max(counts, default=0)
    assert all(count >= min(most - 1, there) for count, there in zip(counts, available, strict=True))
    random.shuffle(rows)
    assert spread(rows, n, "salt") == chosen


def test_panel_is_of_training_crops_fixed_by_its_seed(real: Dataset) -> None:
    panel = choose_panel(real, "IPR", n=4, seed=0)
    assert all(row["split"] == "train" and row["phase"] == code for code, rows in panel.items() for row in rows)
    assert all(len({row["patient"] for row in rows}) == 4 for rows in panel.values())
    assert panel_sha256(panel) == panel_sha256(choose_panel(real, "IPR", n=4, seed=0))
    assert panel_sha256(panel) != panel_sha256(choose_panel(real, "IPR", n=4, seed=1))
    assert len(choose_panel(real, "I", n=99)["I"]) == 8  # all training crops there are


def test_an_empty_phase_and_a_dataset_without_splits_are_refused(tmp_path: Path) -> None:
    two = write_real(tmp_path, codes="IP")
    with pytest.raises(BuilderError, match="no training crops of phase R"):
        choose_panel(two, "IPR")
    images = _folder(tmp_path / "in", {"I": 1})
    with pytest.raises(BuilderError, match="no training split"):
        choose_panel(adopt(str(images), "them", Storage(tmp_path), HEALING_PHASES), "I")


def test_reference_survives_json_and_names_what_it_stands_on(real: Dataset) -> None:
    reference = build_reference(real, SMALL, "IPR")
    again = Reference.from_json(json.loads(json.dumps(reference.to_json(), allow_nan=False)))
    assert again == reference
    assert again.version == reference.version == reference.protocol()["version"]
    assert reference.protocol()["panel"] == {"I": 3, "P": 3, "R": 3}
    for changed in (
        {"ssim_stride": 5},
        {"ssim_size": 64},
        {"panel_sha256": "0"},
        {"training_sha256": "0"},
        {"features": "x"},
    ):
        assert dataclasses.replace(reference, **changed).version != reference.version
    tables = yardstick_table(reference)
    held_out = 3 * 4  # of 12 crops a phase, the validation and the test patient have 4
    assert [table.num_rows for table in tables.values()] == [held_out, 2 * held_out, *[held_out] * 3]
    assert all(np.isfinite(table["ssim"].to_pylist()).all() for table in tables.values())
    long = dataclasses.replace(reference, yardstick={"I": {"flat": [{"ssim": 10**30, "more": "words"}]}})
    assert yardstick_table(long)["flat images (mean colour)"]["ssim"].to_pylist() == [pytest.approx(1e30)]
    gates = Criteria(tuple(gate_ranges(reference.gates)))
    kept = {kind: [not reasons for reasons in judge(table, gates)] for kind, table in tables.items()}
    assert any(kept["real crops, held-out"])
    assert not any(kept["real crops, blurred"] + kept["flat images (mean colour)"])


def test_scorer_refuses_another_protocol_or_changed_crops(real: Dataset, tmp_path: Path) -> None:
    reference = build_reference(real, SMALL, "I")
    with pytest.raises(BuilderError, match="ssim_stride 7 -> 9"):
        Scorer(reference, real, dataclasses.replace(SMALL, ssim_stride=9))
    with pytest.raises(BuilderError, match="panel_size 3 -> 4"):
        Scorer(reference, real, dataclasses.replace(SMALL, panel=4))
    with pytest.raises(BuilderError, match="score_version 0 -> "):
        Scorer(dataclasses.replace(reference, score_version=0), real, SMALL)
    with pytest.raises(BuilderError, match="no longer holds the training crops"):
        Scorer(reference, write_real(tmp_path / "other", name="other"), SMALL)
    with pytest.raises(TypeError, match="uint8"):
        Scorer(reference, real, SMALL).score([textured(1) / 255], ["I"])


def test_scores_do_not_depend_on_company(real: Dataset) -> None:
    scorer = Scorer(build_reference(real, SMALL, "IP", progress=False), real, SMALL)
    images = [textured(1, 64), textured(2, 40), textured(3, 64)]
    together = scorer.score(images, ["I", "P", "I"])
    alone = scorer.score(images[1:2], ["P"])[0]
    assert {k: v for k, v in together[1].items() if k != "copy_of"} == pytest.approx(
        {k: v for k, v in alone.items() if k != "copy_of"}, abs=1e-4
    )
    assert together[1]["copy_of"] == alone["copy_of"]
    assert scorer.score([], []) == []


# -- scoring a dataset, foreign data ----------------------------------------------------------------------------------


def _folder(root: Path, counts: dict[str, int], suffix: str = ".png") -> Path:
    for code, count in counts.items():
        (root / code).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            Image.fromarray(textured(ord(code) + 50 * index, 48)).save(root / code / f"{index}{suffix}")
    return root


def _tar(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def test_score_dataset_writes_scores_and_keeps_the_rest(real: Dataset, tmp_path: Path) -> None:
    theirs = adopt(str(_folder(tmp_path / "gen", {"I": 3, "R": 2})), None, real.storage, HEALING_PHASES)
    before = theirs.table().drop_columns(SCORE_NAMES)
    reference = score_dataset(theirs, real, SMALL, progress=False)
    after = theirs.table()
    assert after.drop_columns(SCORE_NAMES).equals(before)
    known = [name for name in NUMERIC_SCORES if name.removesuffix("_real_pct") not in reference.missing]
    assert all(np.isfinite(after[name].to_pylist()).all() for name in known)
    assert after["copy_of"].null_count == 0
    assert theirs.info["scores"] == reference.protocol()
    assert load_reference(theirs) == reference
    assert set(reference.gates) == {"I", "R"}  # the phases there are
    assert verify_dataset(theirs) == []
    assert theirs.shard_metadata(0)[STAMP] == reference.version


def test_score_dataset_continues_where_it_was_killed(real: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    import builder.quality.score_dataset as module

    write, calls = module.write_manifest, []

    def killed_at_the_second(storage, path, table):
        calls.append(path)
        if len(calls) == 2:
            raise KeyboardInterrupt
        write(storage, path, table)

    monkeypatch.setattr(module, "write_manifest", killed_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        score_dataset(real, real, SMALL, progress=False)
    assert real.table(["ssim"])["ssim"].null_count == real.shard_table(1).num_rows
    calls[:] = ["", ""]
    score_dataset(real, real, SMALL, progress=False)
    assert calls[2:] == ["manifests/clinic/shard-000001.parquet"]  # the first shard was passed over
    assert real.table(["ssim"])["ssim"].null_count == 0


def test_a_filtered_dataset_stands_on_its_parents_reference(real: Dataset) -> None:
    reference = build_reference(real, SMALL, "I")
    save_reference(real, reference)
    child = Dataset("child", real.storage)
    child.write_info({**real.info, "name": "child", "parent": "clinic"})
    assert load_reference(child) == reference
    orphan = Dataset("orphan", real.storage)
    orphan.write_info({**real.info, "name": "orphan"})
    with pytest.raises(BuilderError, match="never scored"):
        load_reference(orphan)


def test_adopt_reads_tars_of_others(tmp_path: Path) -> None:
    pixels = [textured(seed, 40) for seed in range(4)]
    jpeg = io.BytesIO()
    Image.fromarray(pixels[1]).save(jpeg, "JPEG")
    _tar(
        tmp_path / "gen/a.tar",
        {"x/0.png": encode_png(pixels[0]), "x/0.cls": b"2\n", "x/1.jpg": jpeg.getvalue(), "x/1.txt": b"P"},
    )
    _tar(
        tmp_path / "gen/b.tar",
        {"2.png": encode_png(pixels[2]), "2.json": b'{"label": 0}', "3.v1.png": b"no image suffix"},
    )
    for source in (tmp_path / "gen", tmp_path / "gen/*.tar"):
        assert is_foreign(str(source), str(tmp_path))
        found = adopt(str(source), f"them{len(str(source))}", Storage(tmp_path), HEALING_PHASES)
        rows = found.table().to_pylist()
        assert [(row["phase"], row["label"], row["source"]) for row in rows] == [
            ("R", 2, "x/0.png"),
            ("P", 1, "x/1.jpg"),
            ("I", 0, "2.png"),
        ]
        np.testing.assert_array_equal(found.pixels(rows[0]), pixels[0])
        assert verify_dataset(found) == []
        assert found.info["lineage"]["known"] is False
    assert not is_foreign(found.name, str(tmp_path))
    assert not is_foreign(str(tmp_path / "shards" / found.name), str(tmp_path))


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ({"0.png": b"no png", "0.cls": b"0"}, r"0\.png in bad\.tar cannot be read"),
        ({"0.png": encode_png(textured(0, 16))}, r"0\.png in bad\.tar has no class"),
        ({"0.png": encode_png(textured(0, 16)), "0.cls": b"3"}, r"0\.png in bad\.tar has the class '3'"),
        ({"0.png": encode_png(textured(0, 16)), "0.json": b"[1"}, r"the class of 0\.png in bad\.tar cannot be read"),
        ({"readme.md": b"hello"}, "holds no images"),
    ],
)
def test_adopt_names_what_is_wrong_and_leaves_nothing(tmp_path: Path, members: dict[str, bytes], said: str) -> None:
    tar = _tar(tmp_path / "in/bad.tar", members)
    with pytest.raises(BuilderError, match=said):
        adopt(str(tar), None, Storage(tmp_path), HEALING_PHASES)
    assert not (tmp_path / "manifests/bad").exists()
    assert not (tmp_path / "shards/bad").exists()


def test_adopt_refuses_what_is_no_tar_not_there_or_taken(tmp_path: Path, real: Dataset) -> None:
    (tmp_path / "broken.tar").write_bytes(b"x" * 2000)
    with pytest.raises(BuilderError, match=r"broken\.tar is not a readable tar"):
        adopt(str(tmp_path / "broken.tar"), None, Storage(tmp_path), HEALING_PHASES)
    with pytest.raises(BuilderError, match="there are no tars"):
        adopt(str(tmp_path / "nowhere/*.tar"), "nowhere", Storage(tmp_path), HEALING_PHASES)
    with pytest.raises(BuilderError, match="exists already"):
        adopt(str(_folder(tmp_path / "in", {"I": 1})), real.name, Storage(tmp_path), HEALING_PHASES)
    assert real.info["count"] == 36


# -- sheet --------------------------------------------------------------------------------


def test_sheets_have_a_row_a_phase_or_three(real: Dataset, tmp_path: Path) -> None:
    contact_sheet(real, tmp_path / "plain.png", per_phase=2)
    score_dataset(real, real, SMALL, progress=False)
    contact_sheet(real, tmp_path / "new/ranked.png", by="ssim", per_phase=2, against=real)
    with Image.open(tmp_path / "plain.png") as plain, Image.open(tmp_path / "new/ranked.png") as ranked:
        assert ranked.height > 2.5 * plain.height
        assert ranked.width > 4 * CELL
        assert len(plain.convert("RGB").getcolors(10**6) or []) > 500  # photographs, not an empty page


def test_sheets_say_what_is_wrong(real: Dataset, tmp_path: Path) -> None:
    score_dataset(real, real, SMALL, progress=False)
    with pytest.raises(BuilderError, match="did you mean 'ssim'"):
        contact_sheet(real, tmp_path / "x.png", by="sim")
    with pytest.raises(BuilderError, match="at least one"):
        contact_sheet(real, tmp_path / "x.png", per_phase=0)
    other = Dataset("other", real.storage)
    other.write_info({**real.info, "name": "other", "classes": [{"code": "P", "name": "pressure", "prompt": ""}]})
    with pytest.raises(BuilderError, match="'other' has P"):
        contact_sheet(real, tmp_path / "x.png", against=other)


# -- imports --------------------------------------------------------------------------------


def test_gates_references_and_sheets_do_without_torch() -> None:
    code = (
        "import sys, builder.quality.gates, builder.quality.reference, builder.quality.sheet, builder.shards.foreign; "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0

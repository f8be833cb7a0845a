"""The phantom: deterministic, complete, and as mixed as the wounds it stands in for."""

import csv
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from builder.config import load_config
from builder.demo.camera import HEIGHT, WIDTH
from builder.demo.patients import ANGLES, make_patient, phase_of
from builder.demo.phantom import BOX_COLUMNS, LABEL_COLUMNS, Photograph, render_photograph, write_photographs
from builder.demo.stock import SCENES


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def sample() -> list[Photograph]:
    """The first visit of forty patients and the last of forty others, from changing angles."""
    patients = [make_patient(number) for number in range(1, 81)]
    return [
        render_photograph(patient, 0 if patient.number % 2 else patient.visits - 1, ANGLES[patient.number % 3])
        for patient in patients
    ]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("phantom")
    summary = write_photographs(out, patients=3, workers=2)
    photographs = len(list((out / "photographs").iterdir()))
    assert str(summary).startswith(f"{photographs} photographs of 3 patients with {summary.boxes} boxes (I ")
    return out


def test_files_do_not_depend_on_workers_or_on_the_number_of_patients(written: Path, tmp_path: Path) -> None:
    write_photographs(tmp_path, patients=2, workers=1)
    names = sorted(path.name for path in (tmp_path / "photographs").iterdir())
    assert names
    for name in names:
        assert (tmp_path / "photographs" / name).read_bytes() == (written / "photographs" / name).read_bytes()
    for table in ("boxes.csv", "labels.csv"):
        assert (written / table).read_text().startswith((tmp_path / table).read_text())


def test_another_seed_gives_other_patients() -> None:
    one, other = make_patient(1, seed=0), make_patient(1, seed=1)
    assert one != other
    assert not np.array_equal(render_photograph(one, 0, "middle").pixels, render_photograph(other, 0, "middle").pixels)


def test_tables_have_the_columns_of_the_old_system_and_agree_with_the_files(written: Path) -> None:
    assert (written / "boxes.csv").read_text().splitlines()[0] == (
        "Filename,Patient#,Appt#,DFU#,DebriStat,Camera,Angle,Bounding Box Number,Xmin,Ymin,Xmax,Ymax"
    )
    boxes, labels = read(written / "boxes.csv"), read(written / "labels.csv")
    assert tuple(boxes[0]) == BOX_COLUMNS
    assert tuple(labels[0]) == LABEL_COLUMNS
    assert [(b["Filename"], b["Bounding Box Number"]) for b in boxes] == [
        (label["Filename"], label["Bounding Box Number"]) for label in labels
    ]
    assert {b["Filename"] for b in boxes} == {path.name for path in (written / "photographs").iterdir()}
    assert {label["Phase"] for label in labels} <= set("IPR")


def test_a_run_that_was_cut_off_can_be_run_again(written: Path) -> None:
    (written / "boxes.csv").unlink()
    victim = min((written / "photographs").iterdir())
    whole = victim.read_bytes()
    victim.write_bytes(whole[:100])
    write_photographs(written, patients=3, workers=1)
    assert victim.read_bytes() == whole
    assert (written / "boxes.csv").exists()


def test_cohort_has_the_size_and_mix_of_the_real_one() -> None:
    patients = [make_patient(number) for number in range(1, 234)]
    photographs = len(ANGLES) * sum(patient.visits for patient in patients)
    phases = [
        phase_of(healing)
        for patient in patients
        for wound in patient.wounds
        for healing in wound.healing
        if healing is not None
    ]
    assert photographs == pytest.approx(2884, rel=0.02)
    assert len(ANGLES) * len(phases) == pytest.approx(3255, rel=0.03)
    share = {code: count / len(phases) for code, count in Counter(phases).items()}
    assert share == pytest.approx({"I": 0.29, "P": 0.60, "R": 0.11}, abs=0.02)
    assert {patient.fitzpatrick for patient in patients} == {1, 2, 3, 4, 5, 6}
    assert {patient.visits for patient in patients} == {1, 2, 3, 4, 5, 6}


def test_wounds_mostly_heal_from_visit_to_visit() -> None:
    steps = np.concatenate(
        [np.diff(np.array(make_patient(number).wounds[0].healing, dtype=float)) for number in range(1, 234)]
    )
    assert 0.8 < (steps >= 0).mean() < 1


def test_boxes_lie_in_the_photograph_and_have_the_real_sizes(sample: list[Photograph]) -> None:
    boxes = [box for photograph in sample for box in photograph.boxes]
    assert all(0 <= b.xmin < b.xmax <= WIDTH and 0 <= b.ymin < b.ymax <= HEIGHT for b in boxes)
    sides = np.array([(b.xmax - b.xmin, b.ymax - b.ymin) for b in boxes])
    size = np.sqrt(sides.prod(axis=1))
    assert 48 < np.median(size) < 65
    assert 25 < np.quantile(size, 0.05) < 40
    assert 115 < np.quantile(size, 0.95) < 200
    assert 1.05 < np.exp(np.abs(np.log(sides[:, 0] / sides[:, 1]))).mean() < 1.5


def test_photographs_are_well_exposed(sample: list[Photograph]) -> None:
    for photograph in sample:
        assert photograph.pixels.shape == (HEIGHT, WIDTH, 3)
        assert photograph.pixels.dtype == np.uint8
        assert 25 < photograph.pixels.mean() < 235
        assert photograph.pixels.std() > 8


def test_phases_differ_but_their_mean_colours_overlap(sample: list[Photograph]) -> None:
    colours: dict[str, list[np.ndarray]] = {"I": [], "P": [], "R": []}
    for photograph in sample:
        for b in photograph.boxes:
            colours[b.phase].append(photograph.pixels[b.ymin : b.ymax, b.xmin : b.xmax].mean((0, 1)))
    means = {code: np.mean(values, axis=0) for code, values in colours.items()}
    spread = {code: np.std(values, axis=0).max() for code, values in colours.items()}
    for one, other in ("IP", "PR", "IR"):
        distance = np.abs(means[one] - means[other]).max()
        assert 4 < distance < 2.5 * (spread[one] + spread[other])


def test_three_angles_show_one_wound_from_three_sides() -> None:
    patient = make_patient(3)
    photographs = [render_photograph(patient, 0, angle) for angle in ANGLES]
    assert {tuple(box.phase for box in p.boxes) for p in photographs} == {(photographs[0].boxes[0].phase,)}
    assert not np.array_equal(photographs[0].pixels, photographs[1].pixels)


def test_stock_photographs_show_the_phantoms_wounds_in_other_styles(tmp_path: Path) -> None:
    """Smoother and more saturated than any clinic's picture, labelled by phase and style, of models of their own."""
    clinic, stock = tmp_path / "clinic", tmp_path / "stock"
    write_photographs(clinic, patients=2, seed=1000, workers=1)
    summary = write_photographs(stock, patients=2, seed=1000, workers=1, stock=True)
    assert set(summary.phases) <= {f"{phase}_{scene}" for phase in "IPR" for scene in SCENES}
    boxes, labels = read(stock / "boxes.csv"), read(stock / "labels.csv")
    assert {row["Patient#"] for row in boxes} == {"m001", "m002"}
    assert [row["Xmin"] for row in boxes] == [row["Xmin"] for row in read(clinic / "boxes.csv")]
    phases = {(row["Filename"], row["Bounding Box Number"]): row["Phase"] for row in read(clinic / "labels.csv")}
    scenes = set()
    for row in labels:
        phase, _, scene = row["Phase"].partition("_")
        assert phase == phases[row["Filename"], row["Bounding Box Number"]]
        scenes.add(scene)
        plain, styled = (pixels(folder / "photographs" / row["Filename"]) for folder in (clinic, stock))
        assert np.abs(plain - styled).mean() > 8
        if scene != "drawn":  # ink has edges
            assert np.abs(np.diff(styled, axis=1)).mean() < np.abs(np.diff(plain, axis=1)).mean()
    assert scenes == set(SCENES)


def test_the_stock_config_has_a_caption_for_each_wound_and_style() -> None:
    classes = load_config("stock").classes
    assert set(classes.codes) == {f"{phase}_{scene}" for phase in "IPR" for scene in SCENES}
    assert len({phase.prompt for phase in classes}) == len(classes)


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(float)

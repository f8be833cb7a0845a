"""`builder classify`: figures and intervals, the smaller training set, the network, going on, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.metrics import cohen_kappa_score, f1_score, recall_score

from builder.classify import study as study_module
from builder.classify.augment import SMALLEST, view
from builder.classify.data import confusions, counts_of, held_out, limited, of_split, rows_of, unit_of
from builder.classify.figures import HARMS, HELPS, MACRO_F1, NEITHER, figures_of, names_of, summarise, verdict
from builder.classify.network import build, model_sha256
from builder.classify.report import as_text, heading_of
from builder.errors import BuilderError
from builder.mixing import MixedLoader
from builder.phases import HEALING_PHASES, ClassTable
from builder.quality.panel import patient_of
from builder.shards.dataset import Dataset
from builder.shards.storage import Storage
from builder.shards.verify import verify_dataset
from builder.shards.writer import Sample, encode_png, image_row, write_shard
from tests.acceptance import classify_controls
from tests.conftest import Result, textured, write_real
from tests.lineages import ALIKE

pytestmark = pytest.mark.usefixtures("one_thread")

CODES = HEALING_PHASES.codes
TINY = ["--size", 16, "--steps", 4, "--batch-size", 6, "--bootstrap", 100]
Builder = Callable[..., Result]


def write_synthetic(
    root: Path, name: str = "made", codes: str = "IPR", *, patients: tuple[str, ...] = (),
    classes: ClassTable = HEALING_PHASES,
) -> Dataset:  # fmt: skip
    """Six textured crops of each of these phases, from a generator that saw these patients."""
    samples = []
    for code in codes:
        for index in range(6):
            key = f"{name}-{code}-{index:08d}"
            pixels = textured(7000 + 10 * ord(code) + index, 16)
            samples.append(Sample(image_row(key, code, classes.label(code), "synthetic", pixels), encode_png(pixels)))
    dataset = Dataset(name, Storage(root))
    write_shard(dataset.storage, name, 0, samples)
    lineage = {"known": True, "key_fingerprint": "test", "patients": list(patients), **ALIKE}
    dataset.write_info(
        {"name": name, "state": "complete", "origin": "synthetic", "classes": classes.to_json(),
         "count": len(samples), "lineage": lineage, "created": "2026-01-01T00:00:00+00:00"}
    )  # fmt: skip
    return dataset


# -- figures and intervals --------------------------------------------------------------------------------------------

answers = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=2, max_size=60)


@given(answers)
@settings(max_examples=60, deadline=None)
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.UndefinedMetricWarning", "ignore:A single label")
def test_figures_of_a_table_are_those_of_its_crops(pairs: list[tuple[int, int]]) -> None:
    true, predicted = map(np.array, zip(*pairs, strict=True))
    tables = confusions(true, predicted, np.arange(len(true)), 3)
    found = dict(zip(names_of(CODES), figures_of(tables.sum(0)), strict=True))
    there = np.unique(true)
    expected = f1_score(true, predicted, labels=there, average="macro", zero_division=0)
    assert found[MACRO_F1] == pytest.approx(expected)
    kappa = cohen_kappa_score(true, predicted)
    assert found["kappa"] == pytest.approx(kappa, nan_ok=True)
    recalls = recall_score(true, predicted, labels=range(3), average=None, zero_division=np.nan)
    assert [found[f"recall_{code}"] for code in CODES] == pytest.approx(recalls.tolist(), nan_ok=True)


def tables_of(right: float, *, patients: int = 24, seeds: int = 5, crops: int = 6, chance: int = 0) -> np.ndarray:
    """Counts [seeds, patients, 3, 3] of a classifier that is right so often, the classes taking turns over patients."""
    generator = np.random.default_rng(chance)
    labels = np.repeat(np.arange(patients) % 3, crops)
    patient = np.repeat(np.arange(patients), crops)
    made = []
    for _ in range(seeds):
        wrong = (labels + generator.integers(1, 3, len(labels))) % 3
        made.append(confusions(labels, np.where(generator.random(len(labels)) < right, labels, wrong), patient, 3))
    return np.stack(made)


def test_a_better_classifier_helps_a_worse_one_harms_and_the_same_one_does_neither() -> None:
    base = tables_of(0.6)
    found = summarise({0.0: base, 0.25: base, 0.5: tables_of(0.9), 1.0: tables_of(0.3)}, CODES, 500)
    assert [found[ratio].get("verdict") for ratio in found] == [None, NEITHER, HELPS, HARMS]
    assert found[0.25]["gains"][MACRO_F1] == [0, 0, 0]  # the same patients and seeds on both sides: no noise of its own
    for ratio, row in found.items():
        for name, (value, low, high) in row["figures"].items():
            assert -1 <= low <= value <= high <= 1, (ratio, name)
        if ratio:
            assert row["gains"][MACRO_F1][0] == pytest.approx(
                row["figures"][MACRO_F1][0] - found[0.0]["figures"][MACRO_F1][0]
            )


def test_more_crops_of_the_same_patients_make_no_interval_narrower() -> None:
    base, mixed = tables_of(0.6), tables_of(0.7, chance=1)
    once = summarise({0.0: base, 0.5: mixed}, CODES, 500)
    tenfold = summarise({0.0: 10 * base, 0.5: 10 * mixed}, CODES, 500)
    assert tenfold[0.5]["gains"][MACRO_F1] == pytest.approx(once[0.5]["gains"][MACRO_F1])


def test_intervals_cover_patients_and_seeds() -> None:
    def width(base: np.ndarray, mixed: np.ndarray) -> float:
        _, low, high = summarise({0.0: base, 0.5: mixed}, CODES, 500)[0.5]["gains"][MACRO_F1]
        return float(high - low)

    same = np.repeat(tables_of(0.6, seeds=1), 5, 0)
    by_seed = np.concatenate([tables_of(right, seeds=1, chance=3) for right in (0.2, 0.4, 0.6, 0.8, 1.0)])
    assert width(same, by_seed) > 2 * width(same, np.repeat(tables_of(0.6, seeds=1, chance=3), 5, 0)) > 0
    many = tables_of(0.6, patients=240), tables_of(0.7, patients=240)
    assert width(*many) < width(tables_of(0.6), tables_of(0.7))


def test_where_there_is_no_gain_few_intervals_say_there_is_one() -> None:
    """Answers of two equal classifiers: hard and easy patients for both, lucky and unlucky seeds for each."""
    generator = np.random.default_rng(0)
    classes = np.repeat([0, 1, 2], [15, 20, 6])
    labels, patient = np.repeat(classes, 12), np.repeat(np.arange(41), 12)

    def answered(hardness: np.ndarray) -> np.ndarray:
        made = []
        for _ in range(5):
            logit = 1.3 + hardness + generator.normal(0, 0.5, 41) + generator.normal(0, 0.4, 3)[classes]
            right = generator.random(len(labels)) < (1 / (1 + np.exp(-logit)))[patient]
            made.append(confusions(labels, np.where(right, labels, (labels + 1) % 3), patient, 3))
        return np.stack(made)

    verdicts = []
    for _ in range(150):
        hardness = generator.normal(0, 1, 41)
        found = summarise({0.0: answered(hardness), 1.0: answered(hardness)}, CODES, 200)
        verdicts.append(found[1.0]["verdict"])
    assert 0 < verdicts.count(HELPS) + verdicts.count(HARMS) <= 0.13 * 150  # 5 % are meant; few seeds cost some


def test_one_seed_and_a_class_of_one_patient_have_figures() -> None:
    table = tables_of(0.7, seeds=1, patients=3)
    found = summarise({0.0: table, 1.0: table}, CODES, 500)
    assert found[1.0]["gains"][MACRO_F1] == [0, 0, 0]
    value, low, high = found[0.0]["figures"]["recall_R"]  # resamples that lack the patient say nothing of it
    assert low == value == high


@pytest.mark.parametrize("crops", [3, 7, 54, 137])
def test_an_interval_that_ends_at_its_figure_holds_it(crops: int) -> None:
    table = np.zeros((5, 24, 3, 3), np.int64)
    table[:, np.arange(24), np.arange(24) % 3, np.arange(24) % 3] = crops
    table[0, 0, 0, 1], table[0, 0, 0, 0] = 1, crops - 1  # one crop wrong: most resamples have none
    right = table.copy()
    right[0, 0, 0, 1], right[0, 0, 0, 0] = 0, crops
    found = summarise({0.0: right, 1.0: table}, CODES, 200)
    for value, low, high in [*found[1.0]["figures"].values(), *found[1.0]["gains"].values()]:
        assert low <= value <= high
    assert found[1.0]["verdict"] == NEITHER and found[1.0]["gains"][MACRO_F1][0] < 0


@pytest.mark.parametrize(
    ("gain", "said"),
    [
        ([0.1, 0.01, 0.2], HELPS), ([-0.1, -0.2, -0.01], HARMS), ([0.1, -0.01, 0.2], NEITHER),
        ([0.0, 0.0, 0.0], NEITHER), ([0.5, None, None], NEITHER),
    ],
)  # fmt: skip
def test_verdicts(gain: list[float | None], said: str) -> None:
    assert verdict(gain) == said


# -- the smaller training set -----------------------------------------------------------------------------------------


@given(crops=st.integers(1, 40), seed=st.integers(0, 3))
@settings(max_examples=25, deadline=None)
def test_a_limited_dataset_has_whole_patients_and_all_that_is_held_out(real_root: Path, crops: int, seed: int) -> None:
    real = Dataset("clinic", Storage(real_root))
    rows = rows_of(real)
    kept = rows_of(limited(real, rows, crops, seed))
    for split in ("val", "test"):
        assert of_split(kept, split) == of_split(rows, split)
    training = of_split(kept, "train")
    chosen = {patient_of(row) for row in training}
    assert training == [row for row in of_split(rows, "train") if patient_of(row) in chosen]
    assert {row["phase"] for row in training} == set(CODES)
    assert abs(len(training) - min(crops, 24)) <= 6  # 12 patients of two crops each, four of each of three phases
    if crops >= 24:
        assert len(training) == 24


def test_another_seed_draws_other_patients_and_the_loader_sees_them_alone(real_root: Path) -> None:
    real = Dataset("clinic", Storage(real_root))
    rows = rows_of(real)
    drawn = [limited(real, rows, 6, seed) for seed in range(6)]
    assert limited(real, rows, 6, 0) == drawn[0]
    assert len({dataset.keys for dataset in drawn}) > 1
    training = {row["key"] for row in of_split(rows_of(drawn[0]), "train")}
    loader = MixedLoader(real=drawn[0], batch_size=3, size=16)
    assert {key for step in range(len(loader)) for key in loader.keys(step)} == training
    assert counts_of(of_split(rows_of(drawn[0]), "train")) == {"crops": 6, "patients": 3}
    assert len(MixedLoader(real=drawn[0], split="val", batch_size=1, size=16)) == 6


def test_what_stands_for_unknown_patients_is_said(real_root: Path) -> None:
    real = Dataset("clinic", Storage(real_root))
    rows = rows_of(real)
    assert unit_of(real, rows) == "patients"
    assert unit_of(real, [*rows[1:], {**rows[0], "patient": None}]) == "photographs"


def test_held_out_crops_are_in_the_order_of_the_manifest(real_root: Path) -> None:
    real = Dataset("clinic", Storage(real_root))
    crops = held_out(real, "test", 24)
    rows = of_split(rows_of(real), "test")
    assert crops.labels.tolist() == [row["label"] for row in rows]
    assert crops.patients == [row["patient"] for row in rows]
    expected = [real.pixels(row) for row in real.table().to_pylist() if row["split"] == "test"]
    assert np.array_equal(crops.images.permute(0, 2, 3, 1).numpy(), np.stack(expected))


# -- augmentation and network -----------------------------------------------------------------------------------------


@given(st.integers(8, 40), st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_a_view_keeps_size_type_and_colour_and_moves_little(size: int, seed: int) -> None:
    torch.manual_seed(seed)
    flat = torch.tensor([200, 40, 90], dtype=torch.uint8).view(3, 1, 1).expand(3, size, size)
    assert torch.equal(view(flat), flat)
    ramp = torch.arange(size, dtype=torch.uint8).mul(6).expand(3, size, size)
    torch.manual_seed(seed)
    seen = view(ramp)
    assert seen.shape == ramp.shape and seen.dtype == torch.uint8
    assert int(seen.max()) - int(seen.min()) >= 6 * (SMALLEST * size - 3)
    torch.manual_seed(seed)
    assert torch.equal(view(ramp), seen)


def test_the_seed_decides_the_weights() -> None:
    first, again, other = (build("", 3, 16, seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vision transformer for images of 16 px and three classes, as transformers saves it."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=16, patch_size=8,
        num_labels=3,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    ViTForImageClassification(config).save_pretrained(path)
    (path / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.1, 0.2, 0.3], "image_std": [2, 2, 2]}))
    return path


def test_a_model_folder_keeps_its_body_and_gets_a_new_head(folder: Path) -> None:
    from transformers import ViTForImageClassification

    saved = ViTForImageClassification.from_pretrained(folder).state_dict()
    network = build(str(folder), 3, 16, seed=5)
    ours: dict[str, Any] = network.model.state_dict()
    assert saved.keys() == ours.keys()
    changed = {name.partition(".")[0] for name in saved if not torch.equal(saved[name], ours[name])}
    assert changed == {"classifier"}
    assert network.mean.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])
    images = torch.rand(2, 3, 16, 16)
    normalised = (images - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)) / 2
    assert torch.allclose(network.eval()(images), network.model(pixel_values=normalised).logits)
    assert build(str(folder), 7, 16, seed=5).eval()(images).shape == (2, 7)


def test_a_folder_that_holds_no_classifier_or_of_another_size_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(BuilderError, match="has no config"):
        build(str(tmp_path), 3, 16, 0)
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(BuilderError, match="holds no image classifier"):
        build(str(tmp_path), 3, 16, 0)
    with pytest.raises(BuilderError, match="does not take images of 24 px"):
        build(str(folder), 3, 24, 0)


def test_a_model_is_told_by_its_weights(folder: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    before = model_sha256(str(tmp_path))
    assert before == model_sha256(str(tmp_path)) != model_sha256(str(folder))  # which has a preprocessor
    weights = bytearray((tmp_path / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (tmp_path / "model.safetensors").write_bytes(weights)
    assert model_sha256(str(tmp_path)) != before


# -- the command ------------------------------------------------------------------------------------------------------


def trained(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, int]]:
    """Ratio and seed of the trainings that are made from now on."""
    made: list[tuple[float, int]] = []
    real = study_module.train_and_judge

    def noted(recipe: Any, dataset: Any, synthetic: Any, ratio: float, seed: int, *rest: Any, **how: Any) -> Any:
        made.append((ratio, seed))
        return real(recipe, dataset, synthetic, ratio, seed, *rest, **how)

    monkeypatch.setattr(study_module, "train_and_judge", noted)
    return made


def predictions(folder: Path) -> dict[str, Any]:
    return {file.name: json.loads(file.read_text())["run"] for file in sorted(folder.glob("runs/*.json"))}


def test_the_command_answers_and_goes_on(builder: Builder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_real(tmp_path, per_phase=12, size=24)
    write_synthetic(tmp_path)
    write_synthetic(tmp_path, "others")
    made = trained(monkeypatch)
    command = ["classify", "--real", "clinic", "--synthetic", "made", "--ratios", "0.5,1", *TINY]
    result = builder(*command, "--seeds", 2)
    assert result.code == 0, result.output
    assert sorted(made) == [(ratio, seed) for ratio in (0, 0.5, 1) for seed in (0, 1)]  # 0 need not be asked for
    answer = json.loads((tmp_path / "classify/clinic/made.json").read_text())
    assert answer["training"] == [{"crops": 24, "patients": 12}] * 2 and answer["unit"] == "patients"
    assert answer["test"] == {"crops": 6, "patients": 3} and answer["test_classes"]["R"]["patients"] == 1
    assert [row["ratio"] for row in answer["ratios"]] == [0, 0.5, 1]
    assert answer["ratios"][0]["passes"] == {"real": 1.0}  # 4 steps of 6, of 24 crops
    assert answer["ratios"][1]["passes"] == {"real": 0.5, "synthetic": pytest.approx(12 / 18)}
    assert answer["ratios"][2]["passes"] == {"real": 0.0, "synthetic": pytest.approx(24 / 18)}
    for row in answer["ratios"][1:]:
        assert f"ratio {row['ratio']:g}: {row['verdict']}" in result.output
    assert as_text(answer) in result.output and "width" in result.output
    with Image.open(tmp_path / "classify/clinic/made.png") as picture:
        assert min(picture.size) > 400

    first = predictions(tmp_path / "classify/clinic")
    made.clear()
    assert as_text(answer) in builder(*command, "--seeds", 2).output and made == []
    assert builder(*command, "--seeds", 3).code == 0
    assert sorted(made) == [(0, 2), (0.5, 2), (1, 2)]
    made.clear()
    others = ["--real", "clinic", "--synthetic", "others", "--ratios", "1", *TINY, "--seeds", 2]
    assert builder("classify", *others).code == 0
    assert sorted(made) == [(1, 0), (1, 1)]  # real data alone was trained on before
    made.clear()
    assert builder(*command, "--seeds", 1, "--batch-size", 4).code == 0
    assert sorted(made) == [(0, 0), (0.5, 0), (1, 0)]  # another recipe lies beside
    assert builder(*command, "--seeds", 2, "--to", "again").code == 0
    assert predictions(tmp_path / "again") == first  # bit for bit


def test_an_interrupted_study_keeps_its_runs(builder: Builder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_real(tmp_path, per_phase=12, size=24)
    command = ["classify", "--real", "clinic", *TINY, "--seeds", 3]
    real, calls = study_module.train_and_judge, []

    def interrupted(*arguments: Any, **how: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments, **how)

    monkeypatch.setattr(study_module, "train_and_judge", interrupted)
    result = builder(*command)
    assert result.code == 130 and "the same command continues" in result.output
    assert len(predictions(tmp_path / "classify/clinic")) == 1
    assert builder(*command).code == 0
    assert len(calls) == 4 and len(predictions(tmp_path / "classify/clinic")) == 3
    file = next((tmp_path / "classify/clinic/runs").iterdir())
    file.write_text(file.read_text()[:50])
    damaged = builder(*command)
    assert damaged.code == 2 and file.name in damaged.output and "remove it" in damaged.output


def test_real_crops_may_be_limited_and_patients_unknown(builder: Builder, tmp_path: Path) -> None:
    real = write_real(tmp_path, per_phase=12, size=24)
    real.write_info({**real.info, "group_by": "photograph"})
    result = builder("classify", "--real", "clinic", *TINY, "--seeds", 1, "--real-limit", 6)
    assert result.code == 0, result.output
    answer = json.loads((tmp_path / "classify/clinic/real-at-6.json").read_text())
    assert answer["training"] == [{"crops": 6, "patients": 3}] and answer["unit"] == "photographs"
    for said in ("trained on 6 crops of 3 photographs", "patients are unknown", "one seed", "interval of macro-F1"):
        assert said in result.output
    assert any("patients unknown" in line for line in heading_of(answer))


def test_a_generator_that_learned_from_more_patients_is_told(builder: Builder, tmp_path: Path) -> None:
    real = write_real(tmp_path, per_phase=12, size=24)
    write_synthetic(tmp_path, patients=tuple({row["patient"] for row in of_split(rows_of(real), "train")}))
    command = ["classify", "--real", "clinic", "--synthetic", "made", "--ratios", 1, "--seeds", 1, *TINY]
    said = "learned from 12 training patients, more than the classifier sees"
    assert said not in builder(*command).output
    assert said in builder(*command, "--real-limit", 6).output
    answer = json.loads((tmp_path / "classify/clinic/made-at-6.json").read_text())
    assert "its generator learned from 12 patients" in heading_of(answer)


def test_a_model_folder_is_trained_on(builder: Builder, folder: Path, tmp_path: Path) -> None:
    write_real(tmp_path, per_phase=12, size=24)
    result = builder("classify", "--real", "clinic", *TINY, "--seeds", 1, "--model", folder)
    assert result.code == 0, result.output
    answer = json.loads((tmp_path / "classify/clinic/real.json").read_text())
    assert answer["recipe"]["learning_rate"] == 1e-4 and answer["recipe"]["model"] == str(folder)


def test_a_leak_is_refused_and_where_allowed_stamped(builder: Builder, tmp_path: Path) -> None:
    real = write_real(tmp_path, per_phase=12, size=24)
    tested = next(row["patient"] for row in rows_of(real) if row["split"] == "test")
    write_synthetic(tmp_path, patients=(tested,))
    command = ["classify", "--real", "clinic", "--synthetic", "made", "--ratios", 1, "--seeds", 1, *TINY]
    refused = builder(*command)
    assert refused.code == 2 and tested in refused.output and "--allow-leak REASON" in refused.output
    assert not (tmp_path / "classify").exists()
    assert "no reason" in builder(*command, "--allow-leak", " ").output
    with pytest.warns(UserWarning, match="that 'clinic' holds out"):
        allowed = builder(*command, "--allow-leak", "to see what it does")
    assert allowed.code == 0 and "because: to see what it does" in allowed.output
    answer = json.loads((tmp_path / "classify/clinic/made.json").read_text())
    assert tested in answer["leaks"][0] and answer["allow_leak"] == "to see what it does"
    assert any("to see what it does" in line for line in heading_of(answer))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--ratios", "0,0.5"], "no synthetic dataset is given"),
        (["--synthetic", "made", "--ratios", "0,1.5"], "from 0 to 1"),
        (["--synthetic", "made", "--ratios", "-0.5"], "from 0 to 1"),
        (["--synthetic", "made", "--ratios", "half"], "not a list of numbers"),
        (["--synthetic", "made", "--ratios", "nan"], "not a list of numbers"),
        (["--synthetic", "clinic"], "is real, and was given as synthetic"),
        (["--synthetic", "gone"], "there is no dataset 'gone'"),
        (["--synthetic", "rare"], "the synthetic data has no crop of I, P"),
        (["--synthetic", "types"], "labels would not mean the same"),
        (["--real", "lacking"], "the train split of 'lacking' has no crop of R"),
        (["--real", "alone"], "there is nothing to tell apart"),
        (["--real", "made"], "is synthetic, and was given as real"),
        (["--model", "nowhere"], "has no config.json"),
    ],
)
def test_mistakes_end_in_one_message(builder: Builder, tmp_path: Path, options: list[Any], said: str) -> None:
    write_real(tmp_path, per_phase=12, size=24)
    write_real(tmp_path, "lacking", per_phase=12, size=24, codes="IP")
    write_real(tmp_path, "alone", per_phase=12, size=24, classes=ClassTable(HEALING_PHASES.phases[:1]))
    write_synthetic(tmp_path)
    write_synthetic(tmp_path, "rare", "R")
    other = ClassTable([*HEALING_PHASES.phases[:2], type(HEALING_PHASES.phases[0])("X", "other", "other")])
    write_synthetic(tmp_path, "types", "IP", classes=other)
    result = builder("classify", "--real", "clinic", *TINY, "--seeds", 1, *options)
    assert result.code == 2 and said in result.output, result.output
    assert "Traceback" not in result.output and not list(tmp_path.glob("classify/*/*.json"))


def test_synthetic_crops_of_a_rare_class_alone_may_be_mixed_in(builder: Builder, tmp_path: Path) -> None:
    write_real(tmp_path, per_phase=12, size=24)
    write_synthetic(tmp_path, "rare", "R")
    command = ["classify", "--real", "clinic", "--synthetic", "rare", "--ratios", 0.5, "--seeds", 1, *TINY]
    with pytest.warns(UserWarning, match="has no sample of I, P"):
        result = builder(*command)
    assert result.code == 0, result.output


def test_the_controls_differ_in_their_labels_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    others = write_real(tmp_path / "elsewhere", "others", per_phase=6, size=16)
    monkeypatch.setattr(classify_controls, "_others", lambda folder: others)
    perfect, shuffled = classify_controls.ensure_controls(str(tmp_path))
    tables = {dataset.name: rows_of(dataset) for dataset in (perfect, shuffled)}
    assert [row["sha256"] for row in tables["perfect"]] == [row["sha256"] for row in rows_of(others)]
    assert [row["phase"] for row in tables["perfect"]] == [row["phase"] for row in rows_of(others)]
    assert [row["sha256"] for row in tables["shuffled"]] == [row["sha256"] for row in tables["perfect"]]
    dealt = [[row["phase"] for row in tables[name]] for name in ("perfect", "shuffled")]
    assert dealt[0] != dealt[1] and sorted(dealt[0]) == sorted(dealt[1])
    for dataset in (perfect, shuffled):
        assert verify_dataset(dataset) == []
        assert set(dataset.info["lineage"]["patients"]) == {row["patient"] for row in rows_of(others)}

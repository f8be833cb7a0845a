"""The base's crops and its training, in small."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from builder.config import load_config
from builder.demo.base_dataset import KEY, ensure_base
from builder.identity import PatientKey
from builder.shards.dataset import Dataset
from builder.shards.verify import verify_dataset
from builder.training.views import AugmentedCrops, DrawnAhead


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return ensure_base(str(tmp_path_factory.mktemp("base")), patients=3, workers=1)


def test_the_bases_crops_carry_no_phase_and_patients_of_their_own(base: Dataset) -> None:
    rows = base.table().to_pylist()
    assert {row["phase"] for row in rows} == {"W"} and base.classes.codes == ("W",)
    key = PatientKey(KEY, "")
    assert {row["patient"] for row in rows} == {key.hash(f"base-{number}") for number in (1, 2, 3)}
    assert not {row["patient"] for row in rows} & {key.hash(str(number)) for number in range(1, 4)}  # the phantom's
    by_split = {row["split"]: row["patient"] for row in rows}
    assert by_split["val"] == key.hash("base-3") and by_split["train"] != by_split["val"]
    assert verify_dataset(base) == []


def test_a_patient_is_the_same_however_many_are_rendered(base: Dataset, tmp_path: Path) -> None:
    two = ensure_base(str(tmp_path), patients=2, workers=1).table(["sha256", "patient", "source", "box"]).to_pylist()
    assert two == base.table(["sha256", "patient", "source", "box"]).to_pylist()[: len(two)]


def test_views_are_the_same_for_any_number_of_threads(base: Dataset) -> None:
    config = dataclasses.replace(load_config("base").train, size=16)
    drawn = []
    for threads in (1, 3):
        views = AugmentedCrops(
            torch.nn.Identity(), base, dataclasses.replace(config, threads=threads), torch.device("cpu")
        )
        drawn.append(DrawnAhead(views, 2, seed=0).crops())
    assert torch.equal(drawn[0].pixels, drawn[1].pixels)
    assert drawn[0].pixels.shape == (2 * len(views.labels), 3, 16, 16)
    assert len(drawn[0].pixels.unique(dim=0)) > len(views.labels)  # turns differ

"""What makes the mixing loader fast changes nothing: slots, quotas by blocks, columns by groups, a small speed run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from builder.errors import BuilderError
from builder.mixing import MixedLoader, columns, quota
from builder.mixing.columns import read_columns
from builder.mixing.slots import AHEAD, Slots, Stored
from builder.shards.dataset import Dataset
from builder.shards.storage import Storage
from tests.acceptance import mixing_speed, mixing_start
from tests.test_mixing import make


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("handover")
    make(out, "real", {"I": 30, "P": 24, "R": 6}, splits={"a": "train", "b": "train", "c": "val"})
    make(out, "synthetic", dict.fromkeys("IPR", 9), origin="synthetic")
    return out


def loader(out: Path, **settings: Any) -> MixedLoader:
    return MixedLoader("real", "synthetic", batch_size=4, out=str(out), allow_leak="made up", **settings)


def same(some: Any, others: Any) -> bool:
    pairs = [parts for batches in zip(some, others, strict=True) for parts in zip(*batches, strict=True)]
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_batches_that_are_kept_stay_as_they_were(pair: Path, dtype: str) -> None:
    """More of them than there are slots, so every slot is used again while its first batch is held."""
    helped = loader(pair, workers=2, dtype=dtype)
    kept = list(helped)
    assert len(kept) > 2 * AHEAD + 1
    assert same(kept, list(loader(pair, dtype=dtype)))
    assert len({batch[0].data_ptr() for batch in kept}) == len(kept)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_a_transform_made_larger_comes_all_the_same(pair: Path) -> None:
    def twice(image: torch.Tensor) -> torch.Tensor:
        return image.repeat(1, 2, 2)

    assert same(loader(pair, workers=1, transform=twice), loader(pair, transform=twice))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_an_iteration_after_one_that_was_abandoned(pair: Path) -> None:
    """What the workers had read ahead for the first is not mistaken for the second's."""
    helped, alone = loader(pair, workers=2), loader(pair)
    for wanted in (1, 2, 3):
        for number, _ in enumerate(helped, 1):
            if number == wanted:
                break
    alone.set_epoch(3)
    assert same(helped, alone)


class Plain(torch.utils.data.Dataset):
    def __getitem__(self, request: Any) -> Any:
        return request


def test_slots_pass_on_what_is_no_batch() -> None:
    slots = Slots(Plain(), 1, 12, pin_memory=False)
    error = BuilderError("what", "remedy")
    assert slots[3, error] is slots.received(error) is error
    assert slots[0, None] is slots.received(None) is None


def test_slots_hold_images_until_they_are_received() -> None:
    from builder.mixing.batches import Batch

    slots = Slots(Plain(), 1, 12, pin_memory=False)
    batches = [
        Batch(torch.full((1, 3, 2, 2), n, dtype=torch.uint8), torch.tensor([n]), torch.zeros(1), [str(n)], [])
        for n in range(4)
    ]
    sent = [slots[number, batch] for number, batch in enumerate(batches[:3])]
    assert [item.images.slot for item in sent] == [0, 1, 2]
    assert all(isinstance(item.images, Stored) for item in sent)
    first = slots.received(sent[0])
    assert slots[3, batches[3]].images.slot == 0
    assert torch.equal(first.images, batches[0].images)
    assert torch.equal(slots.received(sent[2]).images, batches[2].images)


# -- quotas ---------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 2000), min_size=2, max_size=9))
@settings(max_examples=40, deadline=None)
def test_quotas_by_blocks_are_those_one_by_one(weights: list[int]) -> None:
    whole = np.array(weights)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quota, "RARE", 10**9)
        patch.setattr(quota, "MANY", 0)
        by_blocks = quota._chairman(whole)
        patch.setattr(quota, "MANY", 10**9)
        assert np.array_equal(by_blocks, quota._chairman(whole))


@pytest.mark.parametrize("weights", [[166_812, 166_400, 166_788], [3, 5, 50_000]])
def test_long_periods_keep_the_bound(weights: list[int]) -> None:
    total, k = sum(weights), len(weights)
    order = quota._chairman(np.array(weights))
    counts = np.cumsum(order[:, None] == np.arange(k), axis=0)
    target = np.arange(1, total + 1)[:, None] * np.array(weights) / total
    assert np.abs(counts - target).max() <= 1 - 1 / (2 * k - 2) + 1e-9


# -- columns --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", [None, "train", "val"])
@pytest.mark.parametrize("group", [1, 10, 50_000])
def test_columns_by_groups_are_those_of_the_table(
    pair: Path, monkeypatch: pytest.MonkeyPatch, split: str | None, group: int
) -> None:
    monkeypatch.setattr(columns, "GROUP", group)
    dataset = Dataset("real", Storage(pair))
    rows = [row for row in dataset.table().to_pylist() if split in (None, row["split"])]
    found = read_columns(dataset, split)
    assert found.keys.to_pylist() == [row["key"] for row in rows]
    assert [found.shards[number] for number in found.shard] == [row["shard"] for row in rows]
    for name, column in (("offset", found.offset), ("size", found.size), ("label", found.labels)):
        assert column.tolist() == [row[name] for row in rows]
    assert [f"{number:016x}" for number in found.hashes.tolist()] == [row["sha256"][:16] for row in rows]
    assert found.dimensions == (12, 12, 12, 12)


def test_columns_of_a_split_that_is_not_there(pair: Path) -> None:
    dataset = Dataset("real", Storage(pair))
    with pytest.raises(BuilderError, match="no sample of the split 'test'") as caught:
        read_columns(dataset, "test")
    assert "its splits are train, val" in caught.value.remedy


# -- the measurements -----------------------------------------------------------------------------------------------


def test_speed_is_measured_against_what_can_be_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(mixing_speed, "PER_SHARD", 25)
    monkeypatch.setattr(sys, "argv", [
        "mixing_speed", "--out", str(tmp_path), "--samples", "300", "--sizes", "16", "--repeats", "1",
        "--caches", "cold", "--batch-size", "10", "--ratio-batches", "20", "--systems", "ours", "random_mix", "litdata",
    ])  # fmt: skip
    mixing_speed.main()
    printed = capsys.readouterr().out
    assert "ours against the fastest other of each repeat" in printed
    assert "| MixedLoader (ours) | 0.0500, 0.0500, 0.2500 | 0.0000, 0.0000, 0.3000 |" in printed
    assert ("litdata absent" in printed) != ("| litdata |" in printed)


def test_start_is_measured_without_and_with_an_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(mixing_start, "PER_SHARD", 50)
    monkeypatch.setattr(mixing_start, "RESUMED", 3)
    figures = mixing_start.measure(tmp_path, 400, repeats=1)
    assert set(figures) == {f"{what}, {how} an index" for what in ("first", "resume") for how in ("without", "with")}
    assert all(0 < figure["constructor"] <= figure["batch"] for figure in figures.values())
    assert figures["first, with an index"]["columns"] / 400 < 100

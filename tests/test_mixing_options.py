"""What a loader can be told beside the ratio: counts, schedules, running out, transforms, forms, damaged images."""

import json
import os
import subprocess
import sys
import textwrap
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from builder.errors import BuilderError
from builder.mixing import MixedLoader
from builder.mixing.first_batches import ENOUGH, FirstBatches
from builder.mixing.mix import Mix
from builder.mixing.ratio import RatioSchedule
from builder.shards.writer import tar_path
from tests.lineages import ALIKE
from tests.test_mixing import CODES, class_counts, decks, epoch_keys, make, make_pair, synthetic_count

pytestmark = pytest.mark.filterwarnings("ignore:synthetic images differ:UserWarning")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pair(tmp_path_factory.mktemp("options"))


# -- counts and schedules --------------------------------------------------------------------------------


def test_counts_say_ratio_weights_and_batch_size(pair: Path) -> None:
    loader = MixedLoader("real", ["synth", "other"], counts=(9, 3, 2), out=str(pair), rank=1, world=2)
    assert loader.batch_size == 14
    for keys in epoch_keys(loader):
        assert Counter(key.split("-")[0] for key in keys) == {"real": 9, "synth": 3, "other": 2}


@pytest.mark.parametrize(("arguments", "message"), [
    ({"counts": (3, 1), "ratio": 0.5}, "counts are given beside ratio"),
    ({"counts": (3, 1, 1)}, "3 counts are given for one real and 1 synthetic"),
    ({"counts": (3, -1)}, r"counts are \[3, -1\]"),
    ({"counts": (0, 0)}, r"counts are \[0, 0\]"),
    ({"ratio": {5: 0.5}}, "the ratio schedule begins at epoch 5"),
    ({"ratio": {}}, "the ratio schedule begins at epoch none"),
    ({"ratio": {0: 0.5, -1: 0.1}}, "has the epoch -1"),
    ({"ratio": {0: 0.5, 3: 1.5}}, r"ratio is 1\.5"),
    ({"ratio": {0: 0.5}, "ratio_unit": "batch"}, "ratio_unit is 'batch'"),
    ({"ratio": 0.5, "exhausted": "end"}, "exhausted is 'end'"),
    ({"ratio": 0.5, "collate": "list"}, "collate is 'list'"),
    ({"ratio": 0.5, "on_error": "ignore"}, "on_error is 'ignore'"),
    ({"ratio": 0.5, "max_repeats": 0}, "max_repeats is 0"),
    ({"ratio": 0.5, "transform": {"fake": abs}}, "a transform is given for 'fake'"),
    ({"ratio": 0.5, "exhausted": "stop", "batch_size": 99}, "runs out within the first step of epoch 0"),
])  # fmt: skip
def test_what_cannot_be_said_is_refused(pair: Path, arguments: dict, message: str) -> None:
    with pytest.raises(BuilderError, match=message):
        MixedLoader("real", "synth", **arguments, out=str(pair))


def test_synthetic_first_then_real_only(pair: Path) -> None:
    loader = MixedLoader("real", "synth", ratio={0: 1.0, 2: 0.5, 3: 0.0}, batch_size=8, out=str(pair))
    assert [len(epoch_keys(loader, e)) for e in (0, 0)] == [4, 4]  # one pass over the 27 synthetic ones
    drawn = []
    for _ in range(4):
        origins = torch.cat([origin for _, _, origin in loader]).float()
        drawn.append((len(origins) // 8, float(origins.mean())))
    assert drawn == [(4, 1.0), (4, 1.0), (10, 0.5), (5, 0.0)]
    assert loader.composition(0)[0]["drawn"] == 0
    assert loader.composition(2)[1]["drawn"] == 39
    real = [key for epoch in (2, 3) for key in _keys(loader, epoch) if key.startswith("real")]
    assert Counter(Counter(real).values()) == {2: 40}


def test_a_ratio_that_changes_within_an_epoch_by_step(pair: Path) -> None:
    table = {0: 0.0, 3: 0.5, 9: 1.0, 11: 0.25}
    ranks = [
        MixedLoader("real", "synth", ratio=table, ratio_unit="step", batch_size=4, out=str(pair), rank=r, world=2)
        for r in range(2)
    ]
    shares: list[set[float]] = []
    real: list[list[str]] = []
    for epoch in range(3):
        for loader in ranks:
            loader.set_epoch(epoch)
        steps = range(len(ranks[0]))
        assert len(ranks[1]) == len(ranks[0])
        shares += [{synthetic_count(loader.keys(step)) / 4 for loader in ranks} for step in steps]
        real.append([k for step in steps for loader in ranks for k in loader.keys(step) if k.startswith("real")])
    expected = [next(share for start, share in reversed(table.items()) if step >= start) for step in range(len(shares))]
    assert shares == [{share} for share in expected]
    for keys in real:  # each epoch is one pass over real, whatever the ratio was
        assert len(set(keys)) == 40 <= len(keys) < 40 + 8


@given(
    sizes=st.lists(class_counts, min_size=2, max_size=3),
    table=st.dictionaries(st.integers(1, 12), st.sampled_from([0.0, 0.25, 0.3, 0.5, 1.0]), max_size=4),
    first=st.sampled_from([0.0, 0.4, 1.0]),
    unit=st.sampled_from(["epoch", "step"]),
    world=st.integers(1, 3),
    batch=st.integers(1, 9),
    stop=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_schedules_keep_every_prefix_and_take_turns(
    sizes: list[list[int]], table: dict, first: float, unit: str, world: int, batch: int, stop: bool
) -> None:
    """In every stretch of one ratio the quota holds; samples of a class are drawn equally often, to within one."""
    real, *others = decks(sizes, "balance")
    schedule, stride = RatioSchedule.of({**table, 0: first}, unit), world * batch
    mix = Mix(real, others, [1.0] * len(others), schedule, None, 5, stride=stride, stop=stop)
    seen = [np.zeros(deck.count, np.int64) for deck in (real, *others)]
    step = 0
    for epoch in range(3):
        try:
            plan = mix.epoch(epoch)
        except BuilderError as error:
            assert_runs_out(stop, error)
            return
        assert plan.step == step
        step += mix.steps(epoch)
        drawn, rows = mix.batch(epoch, 0, plan.length)
        assert np.bincount(drawn, minlength=len(seen)).tolist() == plan.drawn.tolist()
        places = mix.sources(epoch, 0, plan.length)
        assert places.tolist() == drawn.tolist()
        for start in range(0, plan.length, stride):
            part, _ = mix.batch(epoch, start, min(stride, plan.length - start))
            share = _share(schedule, epoch, plan.step + start // stride)
            assert abs((part > 0).sum() - share * len(part)) <= 1 + 1e-9
        for number, deck in enumerate((real, *others)):
            now = np.bincount(rows[drawn == number], minlength=deck.count)
            seen[number] += now
            assert not stop or now.max() <= 1
            assert all(np.ptp(seen[number][circle]) <= 1 for circle in deck.circles if len(circle))


def assert_runs_out(stop: bool, error: BuilderError) -> None:
    assert stop
    assert "runs out within the first step" in str(error)


def _share(schedule: RatioSchedule, epoch: int, step: int) -> float:
    at = epoch if schedule.unit == "epoch" else step
    return [share for start, share in zip(schedule.starts, schedule.shares, strict=True) if start <= at][-1]


def test_a_far_epoch_is_reached_at_once_and_restores(pair: Path) -> None:
    arguments = {"ratio": {0: 0.5, 900: 0.25}, "batch_size": 8, "out": str(pair)}
    loader = MixedLoader("real", "synth", **arguments)
    loader.set_epoch(1000)
    state = json.loads(json.dumps(loader.state_dict()))
    again = MixedLoader("real", "synth", **arguments)
    again.load_state_dict(state)
    assert epoch_keys(again, 1000) == epoch_keys(loader, 1000)
    with pytest.raises(BuilderError, match="the saved state is of ratio"):
        MixedLoader("real", "synth", **{**arguments, "ratio": {0: 0.5, 800: 0.25}}).load_state_dict(state)


def test_where_steps_matter_another_batch_size_is_refused(pair: Path) -> None:
    for change in ({"exhausted": "stop"}, {"ratio": {0: 0.25, 3: 0.5}, "ratio_unit": "step"}):
        arguments = {"ratio": 0.25, "out": str(pair), "batch_size": 8, **change}
        state = MixedLoader("real", "synth", **arguments).state_dict()
        with pytest.raises(BuilderError, match="the saved state is of samples a step 8, this loader of 4"):
            MixedLoader("real", "synth", **{**arguments, "batch_size": 4}).load_state_dict(state)


# -- over epochs and ranks -----------------------------------------------------------------------


def test_the_quotas_of_synthetic_sources_run_on_from_epoch_to_epoch(pair: Path) -> None:
    loader = MixedLoader("real", ["synth", "other"], ratio=0.1, weights=[3, 1], batch_size=4, out=str(pair))
    drawn = np.sum([[part["drawn"] for part in loader.composition(epoch)] for epoch in range(100)], axis=0)
    assert abs(drawn[1] - 3 * drawn[2]) <= 3


def test_no_rank_is_left_with_the_same_few_classes(pair: Path) -> None:
    arguments = {"ratio": 0.75, "classes": "balance", "batch_size": 4, "out": str(pair)}
    for rank in range(3):
        loader = MixedLoader("real", "synth", rank=rank, world=3, **arguments)
        keys = [key for epoch in range(4) for batch in epoch_keys(loader, epoch) for key in batch]
        classes = Counter(key.split("-")[1] for key in keys if key.startswith("real"))
        assert set(classes) == set(CODES)
        assert max(classes.values()) < 0.7 * classes.total()


def test_numbers_of_numpy_are_numbers(pair: Path) -> None:
    plain = MixedLoader("real", "synth", ratio=0.25, seed=5, epoch=24, out=str(pair))
    arguments = {"ratio": np.float32(0.25), "seed": np.int64(5), "epoch": np.int32(24)}
    loader = MixedLoader("real", "synth", out=str(pair), **arguments)  # type: ignore[arg-type]
    loader.set_epoch(np.int64(3))  # type: ignore[arg-type]
    assert loader.keys(0) == plain.keys(0, 3)
    assert json.loads(json.dumps(loader.state_dict()))["epoch"] == 3
    counted = MixedLoader("real", "synth", counts=np.array([6, 2]), out=str(pair))  # type: ignore[arg-type]
    assert counted.batch_size == 8
    for wrong in (-1, "1", 1.5):
        with pytest.raises(BuilderError, match="epoch is "):
            loader.set_epoch(wrong)  # type: ignore[arg-type]


def test_a_state_of_other_weights_or_images_is_refused(pair: Path, tmp_path: Path) -> None:
    arguments = {"ratio": {0: 0.0, 1: 0.5}, "out": str(pair)}
    state = MixedLoader("real", ["synth", "other"], weights=[3, 1], **arguments).state_dict()
    with pytest.raises(BuilderError, match=r"the saved state is of weights \[3, 1\], this loader of \[1, 3\]"):
        MixedLoader("real", ["synth", "other"], weights=[1, 3], **arguments).load_state_dict(state)
    make(tmp_path, "real", {"I": 24, "P": 12, "R": 4})  # as many
    with pytest.raises(BuilderError, match="the saved state is of sources"):
        MixedLoader("real", out=str(tmp_path)).load_state_dict(MixedLoader("real", out=str(pair)).state_dict())


def test_a_loader_made_before_the_process_group_says_so(pair: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loader = MixedLoader("real", out=str(pair))
    told = MixedLoader("real", out=str(pair), rank=0, world=1)
    monkeypatch.setattr("builder.mixing.loader.group_place", lambda: (1, 2))
    with pytest.raises(BuilderError, match="was made as rank 0 of 1, the process group has rank 1 of 2"):
        next(iter(loader))
    next(iter(told))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(BuilderError, match="the environment has WORLD_SIZE, but no RANK"):
        MixedLoader("real", out=str(pair))
    with pytest.raises(BuilderError, match="rank is 1 and world is None"):
        MixedLoader("real", out=str(pair), rank=1)


def test_random_numbers_of_workers_differ_by_seed_and_rank(pair: Path) -> None:
    drawn = []
    for seed, rank in ((0, 0), (0, 0), (1, 0), (0, 1)):
        loader = MixedLoader(
            "real", out=str(pair), seed=seed, rank=rank, world=2, batch_size=2, workers=1, transform=noise
        )
        drawn.append(next(iter(loader))[0][0, 0, 0, 0].item())
    assert drawn[0] == drawn[1]
    assert len(set(drawn)) == 3


def noise(image: torch.Tensor) -> torch.Tensor:
    return torch.full_like(image, int(np.random.randint(256)))


def test_two_datasets_of_one_name_and_other_sizes_are_refused(tmp_path: Path) -> None:
    make(tmp_path / "a", "synth", dict.fromkeys(CODES, 3), origin="synthetic", sizes=(12,))
    make(tmp_path / "b", "synth", dict.fromkeys(CODES, 3), origin="synthetic", sizes=(9,))
    make(tmp_path, "real", dict.fromkeys(CODES, 3))
    with pytest.raises(BuilderError, match="differ in size"):
        MixedLoader("real", [str(tmp_path / "a/shards/synth"), str(tmp_path / "b/shards/synth")], out=str(tmp_path))


@pytest.mark.filterwarnings("ignore:no real dataset")
def test_patients_of_another_dataset_may_be_held_out(tmp_path: Path) -> None:
    make(tmp_path, "real", dict.fromkeys(CODES, 3), splits={"p0": "train"})
    make(tmp_path, "judged", dict.fromkeys(CODES, 3), splits={"p1": "train", "p2": "test"})
    known = {"known": True, "key_fingerprint": "f" * 16, "patients": ["p0", "p1"], **ALIKE}
    make(tmp_path, "synth", dict.fromkeys(CODES, 3), origin="synthetic", lineage=known)
    for dataset in ("real", "judged"):
        dataset_info = json.loads((tmp_path / f"manifests/{dataset}/dataset.json").read_text())
        assert dataset_info["lineage"]["key_fingerprint"] == "f" * 16
    assert len(MixedLoader("real", "synth", out=str(tmp_path)))
    with pytest.raises(BuilderError, match="trained on 1 patients that 'judged' holds out: p1"):
        MixedLoader("real", "synth", held_out="judged", out=str(tmp_path))


# -- running out --------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", ["natural", "balance"])
def test_stop_ends_before_anything_comes_again(pair: Path, classes: str) -> None:
    ranks = [
        MixedLoader(
            "real", ["synth", "other"], ratio=0.5, classes=classes, batch_size=4, exhausted="stop", epoch=500,
            out=str(pair), rank=r, world=2,
        )
        for r in range(2)
    ]  # fmt: skip
    for epoch in range(3):
        keys = [key for loader in ranks for key in _keys(loader, epoch)]
        assert keys
        assert len(set(keys)) == len(keys)
        assert synthetic_count(keys) * 2 == len(keys)
        assert ranks[0].filled == 0
    cycling = MixedLoader("real", "synth", ratio=0.5, batch_size=4, epoch=500, out=str(pair))
    assert len(cycling) == 125


def test_repeats_are_reported_and_warned_of(pair: Path) -> None:
    with pytest.warns(UserWarning, match="'other' come up to 8 times an epoch, max_repeats is 3: it has 8, and 59 are"):
        loader = MixedLoader("real", "other", ratio=0.6, batch_size=10, max_repeats=3, out=str(pair))
    assert [part["repeats"] for part in loader.composition()] == [1, 8]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        MixedLoader("real", "other", ratio=0.6, batch_size=10, max_repeats=8, out=str(pair))
    with pytest.warns(UserWarning, match="'other' come up to"):  # in an epoch to come
        MixedLoader("real", "other", ratio={0: 0.0, 2: 0.9}, max_repeats=2, out=str(pair))
    with pytest.warns(UserWarning, match="'real' come up to 4 times"):  # by what fills the last step
        MixedLoader("real", ratio=0, batch_size=40, world=4, rank=0, max_repeats=1, out=str(pair))
    with pytest.raises(BuilderError, match="the weight of 'other' is 0"):
        MixedLoader("real", ["synth", "other"], weights=[1, 0], out=str(pair))


def test_what_fills_the_last_step_is_counted(pair: Path) -> None:
    loader = MixedLoader("real", ratio=0, batch_size=7, out=str(pair), world=2, rank=0)
    assert len(loader) * 14 - loader.filled == 40
    assert MixedLoader("real", batch_size=8, out=str(pair)).filled == 0


# -- forms --------------------------------------------------------------------------------


def test_dicts_and_numpy(pair: Path) -> None:
    arguments = {"ratio": 0.25, "batch_size": 8, "out": str(pair), "dtype": "float32"}
    plain = list(MixedLoader("real", "synth", **arguments))
    named = MixedLoader("real", "synth", collate="dict", **arguments)
    arrays = MixedLoader("real", "synth", collate="numpy", workers=1, **arguments)
    for step, (batch, table, (images, labels, origin)) in enumerate(zip(plain, named, arrays, strict=True)):
        assert list(table) == ["images", "labels", "origin", "keys"]
        assert all(torch.equal(table[name], value) for name, value in zip(table, batch, strict=False))
        assert table["keys"] == named.keys(step, 0)
        assert (images.shape, images.dtype) == ((8, 12, 12, 3), np.float32)
        assert images.flags.c_contiguous
        assert np.array_equal(images, batch[0].permute(0, 2, 3, 1).numpy())
        assert (labels.tolist(), origin.tolist()) == (batch[1].tolist(), batch[2].tolist())


def test_a_transform_for_each_origin(pair: Path) -> None:
    def blank(image: torch.Tensor) -> torch.Tensor:
        return torch.full_like(image, 77)

    loader = MixedLoader("real", "synth", ratio=0.5, batch_size=8, out=str(pair), transform={"synthetic": blank})
    for images, _, origin in loader:
        assert (images[origin == 1] == 77).all()
        assert (images[origin == 0][:, 2] == 200).all()


def test_accelerate_takes_it_as_it_is(pair: Path) -> None:
    from accelerate import Accelerator

    loader = MixedLoader("real", "synth", ratio=0.5, batch_size=8, out=str(pair))
    assert Accelerator(cpu=True).prepare(loader) is loader


def test_the_launchers_rank_counts_before_there_is_a_group(pair: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    loader = MixedLoader("real", out=str(pair))
    assert (loader.rank, loader.world) == (1, 2)
    assert MixedLoader("real", out=str(pair), rank=0, world=1).world == 1


# -- range and colours --------------------------------------------------------------------------------


def test_other_value_ranges_are_refused(pair: Path) -> None:
    def scaled(image: torch.Tensor) -> torch.Tensor:
        return image.float() / 255

    arguments = {"ratio": 0.5, "batch_size": 16, "out": str(pair), "dtype": "float32"}
    with pytest.raises(BuilderError, match=r"real ones reach from 0 to 200, synthetic ones from 0 to 0\.\d+"):
        list(MixedLoader("real", "synth", transform={"real": torch.Tensor.float, "synthetic": scaled}, **arguments))
    signed = {"real": lambda image: image.float() / 127.5 - 1, "synthetic": scaled}
    with pytest.raises(BuilderError, match=r"value ranges: real ones reach from -1 to"):
        list(MixedLoader("real", "synth", transform=signed, **arguments))
    for same in (torch.Tensor.float, scaled, lambda image: image.float().mean((1, 2))):
        assert len(list(MixedLoader("real", "synth", transform=same, **arguments))) == 5


def test_colours_far_apart_are_warned_of_once() -> None:
    generator = torch.Generator().manual_seed(0)
    real = torch.randint(0, 200, (ENOUGH, 3, 8, 8), generator=generator, dtype=torch.uint8)
    origin = torch.tensor([0, 1]).repeat(ENOUGH)

    def look(synthetic: torch.Tensor) -> None:
        first = FirstBatches(judge_range=False)
        images = torch.stack([real, synthetic.to(torch.uint8)], dim=1).flatten(0, 1)
        for start in range(0, len(images), 16):
            first.see(images[start : start + 16], origin[start : start + 16])
        assert first.done

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        look(torch.randint(0, 200, real.shape, generator=generator))
    with pytest.warns(UserWarning, match=r"standard deviations in the mean of R, G, B") as caught:
        look(torch.randint(50, 250, real.shape, generator=generator))
    assert len(caught) == 1
    with pytest.warns(UserWarning, match=r"have 0\.2\d, 0\.2\d, 0\.2\d times their contrast"):
        look(torch.randint(75, 125, real.shape, generator=generator))


# -- damaged images --------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_skipped_images_are_replaced_and_counted(tmp_path: Path, workers: int) -> None:
    dataset = make(tmp_path, "real", {"I": 10, "P": 10}, splits={"a": "train", "b": "train"})
    row = next(row for row in dataset.table().to_pylist() if row["key"] == "real-I-00000004")
    tar = tmp_path / tar_path("real", 0)
    tar.write_bytes(tar.read_bytes()[: row["offset"] + 5])  # cut short: 4, 5 and 6 of I are gone
    loader = MixedLoader("real", out=str(tmp_path), batch_size=5, on_error="skip", collate="dict", workers=workers)
    with pytest.warns(UserWarning, match="the image real-I-0000000[456] cannot be read, and is skipped"):
        batches = list(loader)
    assert dict(loader.skipped) == {f"real-I-0000000{n}": 1 for n in (4, 5, 6)}
    assert len(list(loader)) == 4
    assert loader.skipped.total() == 6  # counted each time, named once
    assert [len(batch["keys"]) for batch in batches] == [5] * 4
    keys = [key for batch in batches for key in batch["keys"]]
    assert not set(keys) & set(loader.skipped)
    assert Counter(key.split("-")[1] for key in keys) == {"I": 10, "P": 10}  # the stand-ins are of the same class
    for batch in batches:  # what is returned is what the keys say
        assert [int(image[1, 0, 0]) for image in batch["images"]] == [int(key[-8:]) for key in batch["keys"]]
    if not workers:
        with pytest.raises(BuilderError, match=r"the image real-I-0000000[456] in shards/real/shard-000000\.tar"):
            list(MixedLoader("real", out=str(tmp_path), batch_size=5))


def test_in_evaluation_what_cannot_be_read_is_left_out_and_counted(tmp_path: Path) -> None:
    make(tmp_path, "real", {"I": 10}, splits={"a": "train", "b": "val"}, per_shard=5)
    (tmp_path / tar_path("real", 1)).unlink()
    loader = MixedLoader("real", split="val", batch_size=4, out=str(tmp_path), on_error="skip")
    with pytest.warns(UserWarning, match="is skipped"):
        assert sum(len(labels) for _, labels, _ in loader) == 2
    assert loader.skipped.total() == 3


@pytest.mark.filterwarnings("ignore:'real' has no sample of R")
def test_a_class_of_which_nothing_can_be_read_is_an_error(tmp_path: Path) -> None:
    make(tmp_path, "real", {"I": 4, "P": 4}, per_shard=4)
    (tmp_path / tar_path("real", 1)).unlink()
    with pytest.raises(BuilderError, match=r"nothing can stand in .* 3 others .*; the image real-P-0000000\d in"):
        list(MixedLoader("real", batch_size=8, out=str(tmp_path), on_error="skip"))


# -- counted steps ---------------------------------------------------------------------------------


def test_who_counts_the_steps_gets_the_next_epoch_too(pair: Path) -> None:
    """Some trainers take len(loader) batches and never see the end of the iteration."""
    loader = MixedLoader("real", "synth", ratio=0.5, batch_size=8, out=str(pair), collate="dict")
    for epoch in range(3):
        iterator = iter(loader)
        assert [next(iterator)["keys"] for _ in range(len(loader))] == epoch_keys(loader, epoch)
    loader.set_epoch(2)  # asked for again
    assert [batch["keys"] for batch in loader] == epoch_keys(loader, 2)


def test_a_state_saved_after_the_last_batch_goes_on_with_the_next_epoch(pair: Path) -> None:
    arguments = {"ratio": 0.5, "batch_size": 8, "out": str(pair), "collate": "dict"}
    loader = MixedLoader("real", "synth", **arguments)
    iterator = iter(loader)
    for _ in range(len(loader)):
        next(iterator)
    state = loader.state_dict()
    for asks in (False, True):
        restored = MixedLoader("real", "synth", **arguments)
        restored.load_state_dict(state)
        if asks:  # a loop that counts epochs itself, and finishes this one
            restored.set_epoch(0)
            assert list(restored) == []
        assert [batch["keys"] for batch in restored] == epoch_keys(loader, 1)


# -- processes --------------------------------------------------------------------------------


def test_a_fresh_process_with_other_workers_goes_on_with_the_same_keys(pair: Path, tmp_path: Path) -> None:
    arguments = {"ratio": 0.5, "batch_size": 4, "out": str(pair), "collate": "dict"}
    loader = MixedLoader("real", "synth", workers=2, **arguments)
    iterator = iter(loader)
    for _ in range(7):
        next(iterator)
    state, rest = loader.state_dict(), [batch["keys"] for batch in iterator]
    script = textwrap.dedent(f"""
        import json
        from builder.mixing import MixedLoader
        loader = MixedLoader("real", "synth", workers=1, **{arguments!r})
        loader.load_state_dict(json.loads({json.dumps(state)!r}))
        print(json.dumps([batch["keys"] for batch in loader]))
    """)
    environ = {**os.environ, "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environ)
    assert json.loads(done.stdout) == rest
    assert rest
    assert "ignored" not in done.stderr  # nothing is left to say when the process ends


DDP = """
import json, os, sys, warnings
import torch, torch.distributed as dist
from builder.mixing import MixedLoader
warnings.simplefilter("ignore")
dist.init_process_group("gloo")
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(3, 1))
loader = MixedLoader("real", ["synth", "other"], ratio=0.3, batch_size=6, workers=dist.get_rank(), out=sys.argv[1],
                     collate="dict", dtype="float32")
seen = []
for batch in loader:  # gradients are averaged at every step: another number of steps on one rank would hang
    model(batch["images"].mean((2, 3))).sum().backward()
    seen.append(batch["keys"])
gathered = [None, None]
dist.all_gather_object(gathered, seen)
if dist.get_rank() == 0:
    print(json.dumps(gathered))
dist.barrier()
sys.stdout.flush()
os._exit(0)  # gloo may abort a process whose peer is gone
"""


def test_two_ranks_of_torchrun_share_an_epoch(pair: Path, tmp_path: Path) -> None:
    script = tmp_path / "ddp.py"
    script.write_text(DDP)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script), str(pair)],
        capture_output=True, text=True, timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    ranks = json.loads(done.stdout)
    assert len(ranks[0]) == len(ranks[1]) == 5  # 40 real at 0.7 x 12 a step
    real = [[key for batch in rank for key in batch if key.startswith("real")] for rank in ranks]
    counts = Counter(real[0] + real[1])
    assert len(counts) == 40
    assert sum(counts.values()) - 40 < 12
    once = [{key for key in keys if counts[key] == 1} for keys in real]
    assert not once[0] & once[1]
    assert all(abs(synthetic_count(batch) - 1.8) < 1 for rank in ranks for batch in rank)


def _keys(loader: MixedLoader, epoch: int) -> list[str]:
    loader.set_epoch(epoch)
    return [key for batch in epoch_keys(loader, epoch) for key in batch]


# -- streams --------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_streams_keep_the_ratio_and_go_on_where_they_were(pair: Path, workers: int) -> None:
    arguments = {
        "ratio": 0.25, "batch_size": 8, "out": str(pair), "collate": "dict", "reading": "stream", "buffer": 9,
        "workers": workers,
    }  # fmt: skip
    loader = MixedLoader("real", ["synth", "other"], **arguments)
    epochs = [[batch["keys"] for batch in loader] for _ in range(3)]
    assert [len(epoch) for epoch in epochs] == [7, 7, 7]
    assert all(synthetic_count(keys) == 2 for epoch in epochs for keys in epoch)
    epochs += [[batch["keys"] for batch in loader] for _ in range(20)]
    passes = [position[0][0] for position in loader._cursor.positions]  # type: ignore[union-attr,index]
    assert max(passes) - min(passes) <= 1
    real = Counter(key for epoch in epochs for keys in epoch for key in keys if key.startswith("real"))
    assert set(real) == set(loader.sources[0].keys.to_pylist())  # type: ignore[union-attr]
    assert max(real.values()) - min(real.values()) <= 1 + bool(workers)  # a worker may be a batch ahead
    restored, first = MixedLoader("real", ["synth", "other"], **arguments), []
    iterator = iter(restored)
    for _ in range(3):
        first.append(next(iterator)["keys"])
    state = json.loads(json.dumps(restored.state_dict()))
    again = MixedLoader("real", ["synth", "other"], **arguments)
    again.load_state_dict(state)
    rest = [batch["keys"] for _ in range(2) for batch in again]
    assert [*first, *rest] == [*epochs[0], *epochs[1]]
    other = MixedLoader("real", ["synth", "other"], **{**arguments, "workers": workers + 1})
    with pytest.raises(BuilderError, match="the saved streams are of workers"):
        other.load_state_dict(state)
    with pytest.raises(BuilderError, match="this loader of indexed"):
        MixedLoader("real", ["synth", "other"], **{**arguments, "reading": "indexed"}).load_state_dict(state)


def test_what_streams_cannot_do_is_said(pair: Path) -> None:
    arguments = {"out": str(pair), "batch_size": 4, "reading": "stream"}
    with pytest.raises(BuilderError, match=r"exhausted='stop' needs passes that begin with the epoch"):
        MixedLoader("real", "synth", exhausted="stop", **arguments)
    with pytest.raises(BuilderError, match=r"classes='balance' cannot be kept while tars are streamed"):
        MixedLoader("real", "synth", classes="balance", **arguments)
    with pytest.raises(BuilderError, match=r"a stream's keys are known when they come"):
        MixedLoader("real", "synth", **arguments).keys(0)

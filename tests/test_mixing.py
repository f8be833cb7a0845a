"""The mixing loader: its quotas, its order, its reading, what it refuses, and how it goes on after a stop."""

import io
import json
import re
import tarfile
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from builder.errors import BuilderError
from builder.mixing import MixedLoader
from builder.mixing.mix import Mix
from builder.mixing.quota import Quota
from builder.mixing.ratio import RatioSchedule
from builder.mixing.schedule import Deck, keyed_shuffle
from builder.mixing.sources import Source
from builder.phases import HEALING_PHASES, ClassTable, Phase
from builder.shards.dataset import Dataset
from builder.shards.lineage import INVENTED
from builder.shards.storage import Storage
from builder.shards.writer import Sample, encode_png, image_row, manifest_path, tar_path, write_manifest, write_shard
from tests.lineages import ALIKE

CODES = HEALING_PHASES.codes
KEY = "f" * 16


def make(
    out: Path,
    name: str,
    counts: dict[str, int],
    *,
    origin: str = "real",
    sizes: tuple[int, ...] = (12,),
    splits: dict[str, str] | None = None,
    lineage: dict | None = None,
    classes: ClassTable = HEALING_PHASES,
    state: str = "complete",
    per_shard: int = 7,
) -> Dataset:
    """A dataset of flat images whose colour tells class and index; `splits` maps patients (i % len) to splits."""
    dataset = Dataset(name, Storage(out))
    patients = list((splits or {"p0": "train"}).items())
    samples = []
    for code, count in counts.items():
        for index in range(count):
            size = sizes[index % len(sizes)]
            pixels = np.full(
                (size, size, 3), (classes.label(code) * 40, index % 256, 200 if origin == "real" else 90), np.uint8
            )
            row = image_row(f"{name}-{code}-{index:08d}", code, classes.label(code), origin, pixels)
            if origin == "real":
                row["patient"], row["split"] = patients[index % len(patients)]
            samples.append(Sample(row, encode_png(pixels)))
    for number, start in enumerate(range(0, len(samples), per_shard)):
        write_shard(dataset.storage, name, number, samples[start : start + per_shard])
    known = {"known": True, "key_fingerprint": KEY, "patients": ["p0"], **ALIKE}
    dataset.write_info(
        {
            "name": name,
            "state": state,
            "origin": origin,
            "classes": classes.to_json(),
            "count": len(samples),
            "lineage": lineage or known,
        }
    )
    return dataset


def make_pair(out: Path) -> Path:
    """real: I 12, P 24, R 4 in train; synth: 9 of each; and two smaller synthetic ones."""
    make(out, "real", {"I": 12, "P": 24, "R": 4})
    make(out, "synth", dict.fromkeys(CODES, 9), origin="synthetic")
    make(out, "other", {"I": 5, "P": 1, "R": 2}, origin="synthetic")
    make(out, "single", {"P": 1}, origin="synthetic")
    return out


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pair(tmp_path_factory.mktemp("pair"))


def epoch_keys(loader: MixedLoader, epoch: int = 0) -> list[list[str]]:
    return [loader.keys(step, epoch) for step in range(len(loader))]


def synthetic_count(keys: list[str]) -> int:
    return sum(not key.startswith("real-") for key in keys)


# -- quotas --------------------------------------------------------------------------------

whole_weights = st.lists(st.one_of(st.integers(0, 9), st.integers(0, 400)), min_size=1, max_size=9).filter(any)


@given(whole_weights)
@settings(max_examples=150, deadline=None)
def test_every_prefix_is_within_the_bound_of_tijdeman(weights: list[int]) -> None:
    quota, k = Quota(weights), sum(weight > 0 for weight in weights)
    positions = np.arange(2 * quota.period + 3)
    choice, rank = quota.at(positions)
    counts = np.cumsum(choice[:, None] == np.arange(len(weights)), axis=0)
    target = (positions + 1)[:, None] * np.array(weights) / sum(weights)
    bound = 1 - 1 / (2 * k - 2) if k > 1 else 0
    assert np.abs(counts - target).max() <= bound + 1e-9
    assert (counts[positions, choice] == rank + 1).all()
    for length in (0, 1, quota.period, len(positions)):
        assert quota.counts(length).tolist() == (counts[length - 1].tolist() if length else [0] * len(weights))
    assert all(quota.position(int(choice[p]), int(rank[p])) == p for p in positions[:: max(1, len(positions) // 7)])


@given(st.lists(st.floats(0, 1e6, allow_subnormal=False), min_size=2, max_size=4).filter(lambda w: sum(w) > 1e-9))
@settings(max_examples=6, deadline=None)
def test_real_weights_are_kept(weights: list[float]) -> None:
    positions = np.arange(3000)
    choice, _ = Quota.of(weights).at(positions)
    counts = np.cumsum(choice[:, None] == np.arange(len(weights)), axis=0)
    assert np.abs(counts - (positions + 1)[:, None] * np.array(weights) / sum(weights)).max() < 1 + 3000 * 5e-6


def test_decimals_and_fractions_are_exact() -> None:
    assert Quota.of([0.7, 0.3]).weights.tolist() == [7, 3]
    assert Quota.of([2 / 3, 1 / 3]).weights.tolist() == [2, 1]
    assert Quota.of([1, 0]).weights.tolist() == [1, 0]
    assert Quota.of([4e-7, 6e-7]).weights.tolist() == [2, 3]
    assert Quota.of([1e-3, 4e-7]).weights.tolist() == [2500, 1]
    assert Quota.of([1.0, 1e-9]).weights.tolist() == [1_000_000, 1]  # never lost


def test_greedy_error_diffusion_would_exceed_one() -> None:
    """Why the assignment isn't simply 'the one furthest behind'."""
    weights = np.array([1, 1, 1, 1, 3, 1, 1, 4, 4, 4])
    behind, taken = 0.0, np.zeros(len(weights))
    for n in range(1, weights.sum() + 1):
        due = weights * n / weights.sum() - taken
        taken[np.argmax(due)] += 1
        behind = max(behind, np.abs(weights * n / weights.sum() - taken).max())
    choice, _ = Quota(weights.tolist()).at(np.arange(weights.sum()))
    counts = np.cumsum(choice[:, None] == np.arange(len(weights)), axis=0)
    ours = np.abs(counts - np.arange(1, weights.sum() + 1)[:, None] * weights / weights.sum()).max()
    assert ours < 1 < behind


@pytest.mark.parametrize("weights", [[], [0, 0], [-1, 2], [float("nan"), 1], [float("inf"), 1]])
def test_weights_that_cannot_be_shared_out(weights: list[float]) -> None:
    with pytest.raises(BuilderError, match="cannot be shared out"):
        Quota.of(weights)


def test_shuffles_are_the_same_for_ever() -> None:
    assert keyed_shuffle(8, 0, "a").tolist() == [4, 3, 6, 2, 7, 0, 1, 5]
    assert sorted(keyed_shuffle(100, 1).tolist()) == list(range(100))
    assert keyed_shuffle(100, 1).tolist() != keyed_shuffle(100, 2).tolist()


# -- schedule --------------------------------------------------------------------------------


def decks(sizes: list[list[int]], mode: str) -> list[Deck]:
    made = []
    for number, counts in enumerate(sizes):
        ends = np.cumsum(counts)
        members = [np.arange(end - count, end) for end, count in zip(ends, counts, strict=True)]
        made.append(Deck(members, counts if mode == "natural" else [int(count > 0) for count in counts], (5, number)))
    return made


class_counts = st.lists(st.integers(0, 30), min_size=3, max_size=3).filter(any)
mixtures = {
    "sizes": st.lists(class_counts, min_size=2, max_size=4),
    "mode": st.sampled_from(["natural", "balance"]),
    "ratio": st.one_of(
        st.sampled_from([0.0, 0.25, 0.3, 0.5, 0.75]), st.integers(0, 95).map(lambda percent: percent / 100)
    ),
    "world": st.integers(1, 8),
    "batch": st.one_of(st.integers(1, 48), st.integers(1, 256)),
}


@given(**mixtures)
@settings(max_examples=60, deadline=None)
def test_a_batch_of_any_rank_keeps_the_ratio_and_an_epoch_has_all_of_real(
    sizes: list[list[int]], mode: str, ratio: float, world: int, batch: int
) -> None:
    real, *others = decks(sizes, mode)
    mix = Mix(real, others, [deck.count for deck in others], RatioSchedule.of(ratio), None, seed=5)
    for epoch in (0, 3):
        steps = -(-mix.epoch(epoch).length // (world * batch))
        starts = [(step * world + rank) * batch for step in range(steps) for rank in range(world)]
        drawn = [mix.batch(epoch, start, batch) for start in starts]
        synthetic = np.array([(deck > 0).sum() for deck, _ in drawn])
        assert np.abs(synthetic - ratio * batch).max() < 1 + 1e-9  # a whole quota is met exactly, others are rounded
        assert np.abs(np.cumsum(synthetic) - ratio * batch * np.arange(1, len(starts) + 1)).max() <= 0.5 + 1e-9
        rows = np.concatenate([row[deck == 0] for deck, row in drawn])
        seen = np.bincount(rows, minlength=real.count)
        for c, circle in enumerate(real.circles):
            if len(circle):
                assert np.ptp(seen[circle]) <= 1, (epoch, c)  # repeats differ by at most one
        if mode == "natural":
            assert seen.min() >= 1
            assert len(rows) - real.count < world * batch
            before = np.concatenate([row[deck == 0] for deck, row in drawn[:-world]] or [np.array([])])
            assert len(set(before.tolist())) == len(before)  # only the last global step repeats


@given(**mixtures)
@settings(max_examples=40, deadline=None)
def test_position_alone_decides(sizes: list[list[int]], mode: str, ratio: float, world: int, batch: int) -> None:
    """The same positions, cut into other batches, hold the same samples."""
    real, *others = decks(sizes, mode)
    mix = Mix(real, others, [1.0] * len(others), RatioSchedule.of(ratio), 200, seed=5)
    whole = mix.batch(2, 0, world * batch)
    parts = [mix.batch(2, rank * batch, batch) for rank in range(world)]
    together = np.concatenate([np.stack(part, axis=1) for part in parts])
    assert sorted(map(tuple, together.tolist())) == sorted(map(tuple, np.stack(whole, axis=1).tolist()))


@given(**{name: mixtures[name] for name in ("sizes", "mode")}, length=st.integers(1, 90), epochs=st.integers(1, 6))
@settings(max_examples=40, deadline=None)
def test_over_epochs_classes_keep_their_share_and_samples_take_turns(
    sizes: list[list[int]], mode: str, length: int, epochs: int
) -> None:
    real, *others = decks(sizes, mode)
    mix = Mix(real, others, [1.0] * len(others), RatioSchedule.of(0.5), length, seed=5)
    for number, deck in enumerate([real, *others]):
        drawn = int(mix.epoch(0).drawn[number])
        rows = np.concatenate([deck.rows(e, e * drawn, drawn, np.arange(drawn)) for e in range(epochs)])
        label = np.repeat(np.arange(3), sizes[number])
        share = deck.quota.weights / deck.quota.period
        counts = np.cumsum(label[rows][:, None] == np.arange(3), axis=0)
        assert np.abs(counts - np.arange(1, len(rows) + 1)[:, None] * share).max(initial=0) < 1
        seen = np.bincount(rows, minlength=deck.count)
        assert all(np.ptp(seen[circle]) <= 1 for circle in deck.circles if len(circle))
        last = deck.classes((epochs - 1) * drawn, drawn)
        assert last.tolist() == np.bincount(label[rows[len(rows) - drawn :]], minlength=3).tolist()


def test_epochs_and_seeds_and_twins_differ(pair: Path) -> None:
    loader = MixedLoader("real", ["synth", "synth"], ratio=0.5, batch_size=8, out=str(pair))
    other = MixedLoader("real", ["synth", "synth"], ratio=0.5, batch_size=8, out=str(pair), seed=1)
    mix, seeded = loader.schedule, other.schedule
    assert isinstance(mix, Mix)
    assert isinstance(seeded, Mix)
    order = mix.decks[0].rows(0, 0, 40, np.arange(40)).tolist()  # type: ignore[union-attr]
    assert order != mix.decks[0].rows(1, 40, 40, np.arange(40)).tolist()  # type: ignore[union-attr]
    assert order != seeded.decks[0].rows(0, 0, 40, np.arange(40)).tolist()  # type: ignore[union-attr]
    places = mix.sources(0, 0, 64).tolist()  # within a batch too
    assert places != mix.sources(0, 64, 64).tolist()
    assert places != sorted(places)
    assert any(a > b for a, b in zip(places[:-2:3], places[1::3], strict=False))
    twins = [mix.decks[number].rows(0, 0, 27, np.arange(27)).tolist() for number in (1, 2)]  # type: ignore[union-attr]
    assert sorted(twins[0]) == sorted(twins[1])
    assert twins[0] != twins[1]


# -- loader --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_batches_are_what_the_keys_say(pair: Path, dtype: str) -> None:
    loader = MixedLoader("real", "synth", batch_size=8, out=str(pair), dtype=dtype)
    assert len(loader) == 7  # 40 real at 6 a batch
    for step, (images, labels, origin) in enumerate(loader):
        keys = loader.keys(step, 0)
        assert images.shape == (8, 3, 12, 12)
        assert images.is_contiguous()
        assert (images.dtype, labels.dtype, origin.dtype) == (getattr(torch, dtype), torch.int64, torch.uint8)
        assert origin.sum() == 2
        shown = images[:, :, 0, 0] if dtype == "uint8" else (images[:, :, 0, 0] * 255).round().to(torch.uint8)
        for key, label, synthetic, colour in zip(keys, labels, origin, shown, strict=True):
            name, code, index = key.split("-")
            assert (name == "synth") == bool(synthetic)
            assert label == HEALING_PHASES.label(code)
            assert colour.tolist() == [40 * int(label), int(index), 90 if synthetic else 200]


@pytest.mark.parametrize("ratio", [0.0, 0.3, 1.0])
def test_ranks_share_an_epoch(pair: Path, ratio: float) -> None:
    ranks = [MixedLoader("real", "synth", ratio=ratio, batch_size=5, out=str(pair), rank=r, world=3) for r in range(3)]
    assert len({len(loader) for loader in ranks}) == 1
    keys = [key for loader in ranks for batch in epoch_keys(loader) for key in batch]
    counts = Counter(key for key in keys if key.startswith("real" if ratio < 1 else "synth"))
    assert len(counts) == (40 if ratio < 1 else 27)
    assert sum(counts.values()) - len(counts) < 15
    assert all(abs(synthetic_count(batch) - 5 * ratio) < 1 for loader in ranks for batch in epoch_keys(loader))


@pytest.mark.parametrize("workers", [1, 3, 4])
def test_workers_change_nothing(pair: Path, workers: int) -> None:
    def jitter(image: torch.Tensor) -> torch.Tensor:
        return image + torch.randint(0, 20, (1,), dtype=torch.uint8)

    arguments = {"ratio": 0.5, "batch_size": 8, "out": str(pair), "transform": jitter}
    alone = MixedLoader("real", "synth", **arguments)
    helped = MixedLoader("real", "synth", workers=workers, **arguments)
    for _ in range(2):
        torch.manual_seed(3)
        for mine, theirs in zip(alone, helped, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
        assert torch.rand(1) == torch.rand(
            1, generator=torch.Generator().manual_seed(3)
        )  # the caller's numbers untouched
    assert alone.epoch == helped.epoch == 2


@pytest.mark.parametrize("synthetic", ["single", "other"])
@pytest.mark.parametrize("batch_size", [1, 64])
def test_tiny_sources_repeat_and_say_so(pair: Path, synthetic: str, batch_size: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loader = MixedLoader("real", synthetic, ratio=0.5, batch_size=batch_size, out=str(pair), workers=2)
    origins = torch.cat([origin for _, _, origin in loader])
    assert abs(int(origins.sum()) - len(origins) / 2) <= 0.5
    described = loader.composition()
    assert [part["origin"] for part in described] == ["real", "synthetic"]
    assert described[0] == {
        "name": "real", "origin": "real", "samples": 40, "drawn": 40, "passes": 1.0,
        "repeats": 1 + (batch_size > 1),  # what fills the last step of 64 comes again
        "classes": {"I": 12, "P": 24, "R": 4}, "available": {"I": 12, "P": 24, "R": 4},
    }  # fmt: skip
    assert described[1]["passes"] == described[1]["drawn"] / described[1]["samples"] > 4


@pytest.mark.parametrize(("mode", "real", "synthetic"), [
    ("natural", (0.3, 0.6, 0.1), (1 / 3, 1 / 3, 1 / 3)),
    ("match_real", (0.3, 0.6, 0.1), (0.3, 0.6, 0.1)),
    ("balance", (1 / 3, 1 / 3, 1 / 3), (1 / 3, 1 / 3, 1 / 3)),
])  # fmt: skip
def test_class_modes(pair: Path, mode: str, real: tuple, synthetic: tuple) -> None:
    loader = MixedLoader("real", "synth", ratio=0.5, batch_size=8, classes=mode, out=str(pair))
    for part, shares in zip(loader.composition(), (real, synthetic), strict=True):
        assert all(abs(part["classes"][c] - share * part["drawn"]) < 1 for c, share in zip(CODES, shares, strict=True))


def test_a_missing_class_gives_its_quota_away_and_says_so(tmp_path: Path) -> None:
    make(tmp_path, "real", {"I": 8, "P": 8, "R": 8})
    make(tmp_path, "synth", {"I": 3, "R": 3}, origin="synthetic")
    with pytest.warns(UserWarning, match="'synth' has no sample of P") as caught:
        loader = MixedLoader("real", "synth", ratio=0.5, classes="match_real", epoch=48, out=str(tmp_path))
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert loader.composition()[1]["classes"] == {"I": 12, "P": 0, "R": 12}


def test_several_synthetic_datasets_by_weight(pair: Path) -> None:
    loader = MixedLoader("real", ["synth", "other"], ratio=0.5, weights=[3, 1], batch_size=16, out=str(pair))
    for batch in epoch_keys(loader):
        assert Counter(key.split("-")[0] for key in batch) == {"real": 8, "synth": 6, "other": 2}
    by_size = MixedLoader("real", ["synth", "other"], ratio=0.5, epoch=700, batch_size=16, out=str(pair))
    assert [part["drawn"] for part in by_size.composition()] == [350, 270, 80]


def test_epoch_of_a_number_of_samples_goes_on_where_the_last_one_ended(pair: Path) -> None:
    loader = MixedLoader("real", "synth", ratio=0.5, epoch=20, batch_size=4, out=str(pair))
    assert len(loader) == 5
    keys = [key for epoch in range(4) for batch in epoch_keys(loader, epoch) for key in batch if key.startswith("real")]
    assert Counter(keys).most_common(1)[0][1] == 1
    assert len(keys) == 40  # four epochs of ten are one pass


def test_evaluation_is_real_only_in_order_and_without_repeats(tmp_path: Path) -> None:
    dataset = make(tmp_path, "real", {"I": 9, "P": 11}, splits={"a": "train", "b": "val", "c": "test"})
    expected = [row["key"] for row in dataset.table().to_pylist() if row["split"] == "val"]
    for world, workers in ((1, 0), (3, 2)):
        ranks = [
            MixedLoader("real", out=str(tmp_path), split="val", batch_size=3, rank=r, world=world, workers=workers)
            for r in range(world)
        ]
        batches = {(step, r): loader.keys(step) for r, loader in enumerate(ranks) for step in range(len(loader))}
        assert [key for place in sorted(batches) for key in batches[place]] == expected
        assert sum(len(labels) for loader in ranks for _, labels, _ in loader) == len(expected)
    small = [MixedLoader("real", out=str(tmp_path), split="val", batch_size=64, rank=r, world=2) for r in range(2)]
    assert [len(loader) for loader in small] == [1, 0]
    assert [len(list(loader)) for loader in small] == [1, 0]


def test_sizes_differ_only_with_a_loading_size(tmp_path: Path) -> None:
    make(tmp_path, "real", {"I": 6}, sizes=(9, 30, 14))
    with pytest.raises(BuilderError, match="differ in size: 'real' 9x9 to 30x30"):
        MixedLoader("real", out=str(tmp_path))
    images, _, _ = next(iter(MixedLoader("real", out=str(tmp_path), size=10, batch_size=6)))
    assert images.shape == (6, 3, 10, 10)


def test_transforms(pair: Path) -> None:
    def halve(image: torch.Tensor) -> torch.Tensor:
        return image[:, ::2, ::2].float() / 255

    images, _, _ = next(iter(MixedLoader("real", out=str(pair), transform=halve, dtype="float32", batch_size=4)))
    assert images.shape == (4, 3, 6, 6)
    assert 0 < images.max() <= 1
    with pytest.raises(BuilderError, match=r"the transform gives torch\.float32"):
        next(iter(MixedLoader("real", out=str(pair), transform=halve)))
    sides = iter(range(2, 10))
    with pytest.raises(BuilderError, match="different shapes"):
        next(iter(MixedLoader("real", out=str(pair), transform=lambda image: image[:, : next(sides)], batch_size=4)))


# -- reading --------------------------------------------------------------------------------


def test_a_filtered_view_reads_from_its_parent(pair: Path, tmp_path: Path) -> None:
    make(tmp_path, "real", {"I": 6})
    parent = make(tmp_path, "synth", {"I": 10, "P": 10}, origin="synthetic")
    view = Dataset("view", parent.storage)
    table = parent.table()
    write_manifest(view.storage, manifest_path("view", 0), table.filter(pc.greater(table["label"], 0)))
    view.write_info({**parent.info, "name": "view", "parent": "synth"})
    with pytest.warns(UserWarning, match="'view' has no sample of I, R"):
        loader = MixedLoader("real", view, ratio=0.5, batch_size=4, out=str(tmp_path))
    for images, labels, origin in loader:
        assert labels[origin == 1].tolist() == [1, 1]
        assert images[origin == 1][:, 0].unique().tolist() == [40]
    assert all(key.startswith(("real-", "synth-P")) for batch in epoch_keys(loader) for key in batch)


def test_names_paths_and_datasets_are_the_same(pair: Path) -> None:
    by_name = MixedLoader("real", "synth", out=str(pair))
    by_path = MixedLoader(pair / "shards" / "real", [str(pair / "manifests" / "synth")])
    by_dataset = MixedLoader(Dataset("real", Storage(pair)), Dataset("synth", Storage(pair)))
    assert epoch_keys(by_name) == epoch_keys(by_path) == epoch_keys(by_dataset)


def test_an_object_store_reads_like_a_folder(pair: Path) -> None:
    import fsspec

    remote = fsspec.filesystem("memory")
    remote.put(f"{pair}/", "memory://bucket/", recursive=True)
    local = list(MixedLoader("real", "synth", out=str(pair)))
    for mine, theirs in zip(local, MixedLoader("real", "synth", out="memory://bucket"), strict=True):
        assert torch.equal(mine[0], theirs[0])


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("damage", ["truncated", "missing", "corrupt"])
def test_a_damaged_tar_names_shard_and_key(tmp_path: Path, damage: str, workers: int) -> None:
    dataset = make(tmp_path, "real", {"I": 10})
    tar = tmp_path / tar_path("real", 1)
    row = dataset.table().to_pylist()[9]
    content = tar.read_bytes()
    if damage == "truncated":
        tar.write_bytes(content[: row["offset"] + 5])
    elif damage == "missing":
        tar.unlink()
    else:
        tar.write_bytes(content[: row["offset"]] + b"x" * row["size"] + content[row["offset"] + row["size"] :])
    message = ""
    try:  # not pytest.raises: it would keep the frames alive, and with them the worker
        list(MixedLoader("real", out=str(tmp_path), workers=workers))
    except BuilderError as error:
        message = str(error)
    assert re.match(r"the image real-I-0000000\d in shards/real/shard-000001.tar cannot be read", message)
    assert "Traceback" not in message


def test_the_index_is_small(pair: Path) -> None:
    source = Source(Dataset("synth", Storage(pair)))
    assert source.nbytes / len(source) < 60
    assert len(source.shards) == 4


def test_many_shards_keep_few_files_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builder.mixing.sources.OPEN_FILES", 3)
    make(tmp_path, "real", {"I": 20}, per_shard=2)
    loader = MixedLoader("real", out=str(tmp_path), batch_size=20)
    (images, _, _) = next(iter(loader))
    assert sorted(images[:, 1, 0, 0].tolist()) == list(range(20))
    assert len(loader.sources[0]._files) == 3  # type: ignore[union-attr]


# -- state --------------------------------------------------------------------------------


@given(step=st.integers(0, 10), epoch=st.integers(0, 2), world=st.integers(1, 3))
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_restored_loader_yields_the_rest(pair: Path, step: int, epoch: int, world: int) -> None:
    arguments = {
        "ratio": 0.5, "batch_size": 4, "out": str(pair), "rank": world - 1, "world": world, "collate": "dict"
    }  # fmt: skip
    loader = MixedLoader("real", "synth", **arguments)
    loader.set_epoch(epoch)
    step = min(step, len(loader))
    iterator = iter(loader)
    for _ in range(step):
        next(iterator)
    state = json.loads(json.dumps(loader.state_dict()))
    rest = [batch["keys"] for batch in iterator]
    restored = MixedLoader("real", "synth", **arguments)
    restored.load_state_dict(state)
    restored.set_epoch(epoch)  # what training loops do; it must not throw the position away
    assert restored.state_dict() == state
    assert [batch["keys"] for batch in restored] == rest
    assert len(rest) == len(loader) - step
    assert restored.epoch == epoch + 1
    assert restored.state_dict()["position"] == 0


@given(step=st.integers(0, 4), world=st.integers(1, 4), batch_size=st.integers(1, 9))
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_another_world_loses_and_doubles_nothing(pair: Path, step: int, world: int, batch_size: int) -> None:
    before = [MixedLoader("real", "synth", ratio=0.5, batch_size=7, out=str(pair), rank=r, world=2) for r in range(2)]
    done = [key for loader in before for s in range(step) for key in loader.keys(s)]
    iterator = iter(before[0])
    for _ in range(step):
        next(iterator)
    after = [
        MixedLoader("real", "synth", ratio=0.5, batch_size=batch_size, out=str(pair), rank=r, world=world)
        for r in range(world)
    ]
    for loader in after:
        loader.load_state_dict(before[0].state_dict())
        done += [key for s in range(loader._step, len(loader)) for key in loader.keys(s)]
    counts = Counter(key for key in done if key.startswith("real"))
    assert len(counts) == 40
    assert sum(counts.values()) - 40 < world * batch_size
    assert len({len(loader) for loader in after}) == 1


def test_an_epoch_that_was_left_early_is_over_unless_asked_for_again(pair: Path) -> None:
    loader = MixedLoader("real", "synth", batch_size=4, out=str(pair), workers=1, collate="dict")
    for epoch in range(3):  # as trainers do that take some batches an epoch
        assert next(iter(loader))["keys"] == loader.keys(0, epoch)
        assert (loader.epoch, loader.state_dict()["position"]) == (epoch, 4)
    loader.set_epoch(2)
    assert [batch["keys"] for batch in loader] == epoch_keys(loader, 2)
    assert loader.epoch == 3


@pytest.mark.parametrize("workers", [0, 2])
def test_a_new_iteration_ends_those_before(pair: Path, workers: int) -> None:
    loader = MixedLoader("real", "synth", batch_size=4, out=str(pair), workers=workers, collate="dict")
    first = iter(loader)
    next(first)
    second = iter(loader)
    assert next(second)["keys"] == loader.keys(0, 1)
    with pytest.raises(BuilderError, match="another iteration of this loader has begun"):
        next(first)
    assert len(list(second)) == len(loader) - 1


@pytest.mark.parametrize(
    "change", [{"ratio": 0.75}, {"seed": 9}, {"classes": "balance"}, {"synthetic": "other"}, {"epoch": 24}]
)
def test_a_state_of_another_mixture_is_refused(pair: Path, change: dict) -> None:
    arguments = {"synthetic": "synth", "ratio": 0.5, "out": str(pair)}
    state = MixedLoader("real", **arguments).state_dict()
    with pytest.raises(BuilderError, match="the saved state is of"):
        MixedLoader("real", **{**arguments, **change}).load_state_dict(state)


# -- guards --------------------------------------------------------------------------------


@pytest.mark.parametrize(("arguments", "message"), [
    ({"real": "real", "ratio": 0.5}, "no synthetic dataset is given"),
    ({"synthetic": "synth", "ratio": 0.5}, "no real dataset is given"),
    ({"synthetic": "synth"}, "no real dataset is given"),
    ({}, "no real dataset is given"),
    ({"real": "real", "synthetic": "synth", "ratio": 1.2}, "ratio is 1.2"),
    ({"real": "real", "synthetic": "synth", "ratio": float("nan")}, "ratio is nan"),
    ({"real": "real", "split": "val", "ratio": 0.1}, "the val split is never mixed"),
    ({"real": "real", "split": "test", "synthetic": "synth"}, "the test split is never mixed"),
    ({"split": "test"}, "no real dataset is given for the test split"),
    ({"real": "real", "split": "val"}, "no sample of the split 'val'"),
    ({"real": "real", "split": "trian"}, "split is 'trian'"),
    ({"real": "real", "classes": "equal"}, "classes is 'equal'"),
    ({"real": "real", "dtype": "float16"}, "dtype is 'float16'"),
    ({"real": "real", "batch_size": 0}, "batch_size is 0"),
    ({"real": "real", "epoch": "all"}, "epoch is 'all'"),
    ({"real": "real", "size": 1.5}, "size is 1.5"),
    ({"real": "real", "rank": 2, "world": 2}, "rank 2 of a world of 2"),
    ({"real": "synth"}, "'synth' is synthetic, and was given as real"),
    ({"real": "reel"}, "there is no dataset 'reel'"),
    ({"real": "real", "synthetic": ["synth"], "weights": [1, 2]}, "2 weights are given for 1"),
    ({"synthetic": "synth", "ratio": 1, "classes": "match_real"}, "needs a real dataset to match"),
    ({"real": "real", "synthetic": "synth", "ratio": 0.001}, "room for none of 'synth'"),
])  # fmt: skip
@pytest.mark.filterwarnings("ignore:no real dataset")
def test_what_cannot_be_mixed_is_said(pair: Path, arguments: dict, message: str) -> None:
    with pytest.raises(BuilderError, match=message):
        MixedLoader(**arguments, out=str(pair))


def test_synthetic_alone(pair: Path) -> None:
    with pytest.warns(UserWarning, match="lineage of 'synth' is not checked"):
        loader = MixedLoader(synthetic="synth", ratio=1, batch_size=9, out=str(pair))
    assert all(origin.all() for _, _, origin in loader)
    assert loader.epoch == 1
    assert sorted(key for batch in epoch_keys(loader) for key in batch) == sorted(loader.sources[1].keys.to_pylist())  # type: ignore[union-attr]


def test_at_ratio_0_the_synthetic_data_is_not_opened(pair: Path) -> None:
    loader = MixedLoader("real", "not-there", ratio=0, out=str(pair))
    assert not any(origin.any() for _, _, origin in loader)


def test_class_tables_must_agree(tmp_path: Path) -> None:
    make(tmp_path, "real", {"I": 3})
    table = ClassTable([Phase("P", "p", "p"), Phase("I", "i", "i")])
    make(tmp_path, "synth", {"I": 3}, origin="synthetic", classes=table)
    with pytest.raises(BuilderError, match="'real' has the classes I, P, R, but 'synth' has P, I"):
        MixedLoader("real", "synth", out=str(tmp_path))


def test_incomplete_data_needs_partial(tmp_path: Path) -> None:
    dataset = make(tmp_path, "real", {"I": 3, "P": 3, "R": 3}, state="partial")
    for reference in ("real", dataset):
        with pytest.raises(BuilderError, match=r"not complete\n.*partial=True"):
            MixedLoader(reference, out=str(tmp_path))
    assert len(MixedLoader("real", out=str(tmp_path), partial=True)) == 1


HELD_OUT = {"p0": "train", "p1": "val", **{f"p{n}": "test" for n in range(2, 9)}}


@pytest.mark.parametrize(("lineage", "message"), [
    ({"known": True, "key_fingerprint": KEY, "patients": ["p0", "p1"], **ALIKE},
     "1 patients that 'real' holds out: p1$"),
    ({"known": True, "key_fingerprint": KEY, "patients": list(HELD_OUT), **ALIKE}, r"p1, p2, p3, p4, p5 and 3 more"),
    ({"known": False, "key_fingerprint": None, "patients": []}, "the lineage of 'synth' is unknown"),
    ({"known": True, "key_fingerprint": "0" * 16, "patients": [], **ALIKE},
     "cannot be compared: .* with different keys"),
    ({"known": True, "patients": []}, "cannot be compared"),
])  # fmt: skip
def test_a_leak_is_refused_or_allowed_with_a_reason(tmp_path: Path, lineage: dict, message: str) -> None:
    make(tmp_path, "real", dict.fromkeys(CODES, 9), splits=HELD_OUT)
    make(tmp_path, "synth", dict.fromkeys(CODES, 3), origin="synthetic", lineage=lineage)
    with pytest.raises(BuilderError, match=f"(?m){message}"):
        MixedLoader("real", "synth", out=str(tmp_path))
    with pytest.warns(UserWarning, match="allowed, because: a control"):
        assert len(MixedLoader("real", "synth", out=str(tmp_path), allow_leak="a control"))


def test_a_generator_that_saw_rendered_patients_alone_is_no_leak(tmp_path: Path) -> None:
    make(tmp_path, "real", dict.fromkeys(CODES, 9), splits=HELD_OUT)
    lineage = {"known": True, "key_fingerprint": INVENTED, "patients": ["p1"], **ALIKE}
    make(tmp_path, "synth", dict.fromkeys(CODES, 3), origin="synthetic", lineage=lineage)
    assert len(MixedLoader("real", "synth", out=str(tmp_path)))


def test_held_out_samples_without_a_patient_are_refused(tmp_path: Path) -> None:
    make(tmp_path, "real", {"I": 4}, splits={"p0": "train", None: "test"})  # type: ignore[dict-item]
    make(tmp_path, "synth", {"I": 4}, origin="synthetic")
    with pytest.raises(BuilderError, match="held-out samples of 'real' have no patient"):
        MixedLoader("real", "synth", out=str(tmp_path))


def test_the_loader_and_plain_tar_readers_agree(pair: Path) -> None:
    """The index points at what a stranger finds in the tar."""
    source = Source(Dataset("synth", Storage(pair)))
    with tarfile.open(pair / source.shards[0]) as tar:
        for row in range(7):
            member = tar.extractfile(f"{source.keys[row].as_py()}.png")
            assert member is not None
            assert source._payload(row) == member.read()
            assert io.BytesIO(source._payload(row)).read(4) == b"\x89PNG"

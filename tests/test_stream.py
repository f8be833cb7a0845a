"""Stream reading: the ratio in every batch, every sample once a pass, and how it goes on after a stop."""

import json
import pickle
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
import webdataset as wds
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from builder.errors import BuilderError
from builder.mixing.quota import Quota
from builder.mixing.reader import Layout, Reader, buffered_shuffle
from builder.mixing.sources import Source
from builder.mixing.stream import Cursor, Request, StreamBatch, StreamBatches, StreamSamples
from builder.phases import HEALING_PHASES
from builder.shards.dataset import Dataset
from builder.shards.inplace import Description, index_tars
from builder.shards.schema import to_table
from builder.shards.storage import Storage
from builder.shards.writer import Sample, encode_png, image_row, manifest_path, tar_path, write_manifest, write_shard

KEY = ("order",)


def make(out: Path | str, name: str, shards: Sequence[int], *, size: int = 8, origin: str = "real") -> Dataset:
    """A dataset with so many images in each shard; every third one is in the split val."""
    dataset, count = Dataset(name, Storage(out)), 0
    for number, images in enumerate(shards):
        samples = []
        for index in range(count, count + images):
            pixels = np.full((size, size, 3), (index % 251, index // 251, 7 if origin == "real" else 9), np.uint8)
            code = HEALING_PHASES.codes[index % 3]
            row = image_row(f"{name}-{index:04d}", code, index % 3, origin, pixels)
            samples.append(Sample(row | {"split": "val" if index % 3 == 2 else "train"}, encode_png(pixels)))
        write_shard(dataset.storage, name, number, samples)
        count += images
    dataset.write_info(
        {"name": name, "state": "complete", "origin": origin, "classes": HEALING_PHASES.to_json(), "count": count}
    )
    return dataset


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("stream")
    make(out, "real", [7, 1, 12, 5])
    make(out, "synth", [9, 4], origin="synthetic")
    make(out, "single", [1], origin="synthetic")
    return out


def source(root: Path | str, name: str, split: str | None = None) -> Source:
    return Source(Dataset(name, Storage(root)), split)


def a_pass(reader: Reader) -> list[int]:
    """The rows of the pass that the reader stands at the beginning of."""
    turn, rows = reader.position[0], []
    while True:
        before = reader.position
        row, payload = next(reader)
        if reader.position[0] != turn:
            reader.seek(before)
            return rows
        assert isinstance(payload, bytes)
        rows.append(row)


# -- one source, some readers -----------------------------------------------------------------------------------------


@given(st.integers(0, 300), st.integers(1, 400), st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_a_buffer_can_make_the_shuffle(count: int, buffer: int, key: int) -> None:
    order = buffered_shuffle(count, buffer, key)
    assert sorted(order.tolist()) == list(range(count))
    read = np.maximum.accumulate(order) + 1 if count else order
    assert (read - np.arange(count) <= buffer).all()  # so many are waiting when each is given
    waited = np.arange(count) - order
    assert (waited < buffer).all()
    if buffer == 1:
        assert (order == np.arange(count)).all()


@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=7), readers=st.integers(1, 12), turn=st.integers(0, 20),
    seed=st.integers(0, 5),
)  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_readers_share_a_pass_out_evenly(sizes: list[int], readers: int, turn: int, seed: int) -> None:
    layout = Layout.__new__(Layout)
    layout.rows = np.arange(sum(sizes), dtype=np.int32)
    layout.bounds = np.concatenate([[0], np.cumsum(sizes)])
    stretches = [layout.stretch(turn, number, readers, (seed,)) for number in range(readers)]
    places = [[p for _, start, stop in stretch for p in range(start, stop)] for stretch in stretches]
    assert sorted(p for part in places for p in part) == list(range(sum(sizes)))
    lengths = [len(part) for part in places]
    assert max(lengths) - min(lengths) <= 1
    for stretch in stretches:
        assert all(layout.bounds[tar] <= start < stop <= layout.bounds[tar + 1] for tar, start, stop in stretch)


@pytest.mark.parametrize("readers", [1, 2, 3, 4, 7, 40])
@pytest.mark.parametrize("name", ["real", "synth", "single"])
def test_every_pass_gives_every_sample_once(root: Path, name: str, readers: int) -> None:
    layout = Layout(source(root, name))
    everyone = [Reader(layout, number, readers, KEY, buffer=5) for number in range(readers)]
    orders = []
    for _ in range(4):
        together = [row for reader in everyone for row in a_pass(reader)]
        assert sorted(together) == list(range(len(layout.source)))
        orders.append(together)
        for reader in everyone:
            reader.seek((reader.position[0] + 1, 0))
    if name == "real":
        assert len({tuple(order) for order in orders}) == 4  # each pass has an order of its own


def test_a_reader_without_a_sample_takes_its_turn(root: Path) -> None:
    layout = Layout(source(root, "single"))
    for number in range(4):
        reader = Reader(layout, number, 4, KEY)
        assert [next(reader)[0] for _ in range(3)] == [0, 0, 0]


def test_only_what_is_listed_counts(root: Path, tmp_path: Path) -> None:
    """A split, and a view with rows of several tars in one manifest."""
    train = source(root, "real", "train")
    assert sorted(a_pass(Reader(Layout(train), 0, 1, KEY))) == list(range(17))
    real = Dataset("real", Storage(root))
    rows = [row for row in real.table().to_pylist() if int(row["key"][-4:]) in (24, 3, 8, 19, 4)]
    view = Dataset("view", Storage(root))
    write_manifest(view.storage, manifest_path("view", 0), to_table(rows[::-1], {}))
    view.write_info({**real.info, "name": "view", "view": True})
    found = Source(view)
    reader = Reader(Layout(found), 0, 1, KEY)
    for _ in range(5):
        row, payload = next(reader)
        assert isinstance(payload, bytes)
        np.testing.assert_array_equal(found.decoded(row, payload, None), found.pixels(row, None))
    assert reader.position == (0, 5)
    for path in (root / "manifests/view").iterdir():
        path.unlink()


def test_it_goes_on_from_any_position_as_if_never_stopped(root: Path) -> None:
    layout = Layout(source(root, "real"))
    steady = Reader(layout, 1, 2, KEY, buffer=6)
    followed = [(steady.position, next(steady)) for _ in range(40)]
    for begin in range(0, 40, 3):
        late = Reader(layout, 1, 2, KEY, buffer=6)
        late.seek(followed[begin][0])
        assert [(late.position, next(late)) for _ in range(begin, 40)] == followed[begin:]


def test_what_is_before_the_position_is_not_read(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = Layout(source(root, "real"))
    read: list[tuple[str, int, int]] = []
    plain = Storage.read

    def noted(self: Storage, path: str, offset: int = 0, size: int | None = None) -> bytes:
        read.append((path, offset, size or 0))
        return plain(self, path, offset, size)

    monkeypatch.setattr(Storage, "read", noted)
    reader = Reader(layout, 0, 1, KEY, buffer=1)
    order = [tar for tar, _, _ in layout.stretch(0, 0, 1, KEY)]
    sizes = np.diff(layout.bounds)
    reader.seek((0, int(sizes[order[0]]) + 3))
    rows = [next(reader)[0] for _ in range(int(sizes[order[1]]) - 3)]
    assert {path for path, _, _ in read} == {layout.source.shards[order[1]]}
    before = layout.rows[layout.bounds[order[1]] + 2]
    assert min(offset for _, offset, _ in read) >= layout.source.offset[before] + layout.source.size[before]
    assert {int(layout.source.shard[row]) for row in rows} == {order[1]}


# -- batches ----------------------------------------------------------------------------------------------------------


def stacked(pixels: Sequence[np.ndarray], origin: np.ndarray, epoch: int, start: int) -> torch.Tensor:
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()


class Composed:
    """Sources by quota, shuffled within the batch."""

    def __init__(self, weights: Sequence[int]) -> None:
        self.quota = Quota(weights)

    def __call__(self, epoch: int, start: int, size: int) -> np.ndarray:
        drawn, _ = self.quota.at(np.arange(start, start + size))
        return drawn[np.random.default_rng([epoch, start]).permutation(size)]


def batches(root: Path | str, **options: object) -> StreamBatches:
    """A real source, and two synthetic ones: 4, 3 and 1 of 8."""
    sources = [source(root, "real", "train"), source(root, "synth"), source(root, "single")]
    told = {"seed": 3, "buffer": 6, "size": None} | options
    return StreamBatches(sources, Composed([4, 3, 1]), told.pop("size"), stacked, **told)  # type: ignore[arg-type]


def loader(of: StreamBatches, requests: list[Request | None]) -> DataLoader:
    return DataLoader(of, batch_size=None, sampler=requests, collate_fn=lambda item: item, num_workers=of.workers)


def iterate(of: StreamBatches, cursor: Cursor, first: int, stop: int, epoch: int = 0) -> Iterator[StreamBatch]:
    """What a loader makes of it."""
    step = first
    requests = cursor.requests([(epoch, 8 * (step * of.world + of.rank), 8, None) for step in range(first, stop)])
    for item in loader(of, requests):
        if item is None:
            continue
        if isinstance(item, BuilderError):
            raise item
        cursor.seen(item)
        step += 1
        yield item
    assert step == stop


@pytest.mark.parametrize("workers", [0, 1, 2, 3])
def test_every_batch_has_the_ratio_and_the_pixels_of_its_keys(root: Path, workers: int) -> None:
    of = batches(root, workers=workers)
    where = {layout.source.keys[row].as_py(): (layout.source, row)
             for layout in of.layouts if layout for row in range(len(layout.source))}  # fmt: skip
    for batch in iterate(of, Cursor(of), 0, 7):
        assert Counter(key.split("-")[0] for key in batch.keys) == {"real": 4, "synth": 3, "single": 1}
        assert batch.origin.dtype == torch.uint8
        assert batch.labels.dtype == torch.int64
        assert batch.skipped == []
        for image, label, origin, key in zip(batch.images, batch.labels, batch.origin, batch.keys, strict=True):
            of_key, row = where[key]
            np.testing.assert_array_equal(image.permute(1, 2, 0).numpy(), of_key.pixels(row, None))
            assert int(label) == of_key.labels[row]
            assert bool(origin) is not key.startswith("real")


@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize("workers", [0, 2, 3])
def test_all_ranks_and_workers_together_see_each_sample_once_a_pass(root: Path, world: int, workers: int) -> None:
    lanes = max(1, workers)
    readers, steps = world * lanes, 13 * lanes  # 52 real samples: three passes and one more
    passes: dict[int, list[str]] = {0: [], 1: [], 2: []}
    for rank in range(world):
        of = batches(root, rank=rank, world=world, workers=workers)
        real = of.layouts[0]
        assert real is not None
        streams: list[list[str]] = [[] for _ in range(lanes)]
        for step, batch in enumerate(iterate(of, Cursor(of), 0, steps)):
            streams[step % lanes] += [key for key in batch.keys if key.startswith("real-")]
        for lane, stream in enumerate(streams):
            for turn, seen in passes.items():
                stretch = real.stretch(turn, rank * lanes + lane, readers, (of.seed, 0))
                length = sum(stop - start for _, start, stop in stretch)
                seen += stream[:length]
                del stream[:length]
    for seen in passes.values():
        assert sorted(seen) == sorted(source(root, "real", "train").keys.to_pylist())


@pytest.mark.parametrize("workers", [0, 2, 3])
def test_saved_anywhere_it_goes_on_exactly(root: Path, workers: int) -> None:
    of = batches(root, workers=workers)
    whole = [batch.keys for batch in iterate(of, Cursor(of), 0, 9)]
    for stop in (1, 4, 5):
        cursor = Cursor(of)
        head = [batch.keys for batch in iterate(of, cursor, 0, stop)]
        state = json.loads(json.dumps(cursor.state_dict()))
        fresh = batches(root, workers=workers)
        other = Cursor(fresh)
        other.load_state_dict(state)
        assert head + [batch.keys for batch in iterate(fresh, other, stop, 9)] == whole


def test_in_a_fresh_process(root: Path) -> None:
    of = batches(root, workers=2)
    cursor = Cursor(of)
    list(iterate(of, cursor, 0, 3))
    code = (
        "import json, sys; from pathlib import Path; from tests.test_stream import batches, iterate; "
        "from builder.mixing.stream import Cursor; of = batches(Path(sys.argv[1]), workers=2); cursor = Cursor(of); "
        "cursor.load_state_dict(json.loads(sys.argv[2])); "
        "print(json.dumps([batch.keys for batch in iterate(of, cursor, 3, 6)]))"
    )
    words = [sys.executable, "-c", code, str(root), json.dumps(cursor.state_dict())]
    found = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    assert json.loads(found) == [batch.keys for batch in iterate(of, cursor, 3, 6)]


def test_an_abandoned_iteration_loses_nothing_though_workers_read_ahead(root: Path) -> None:
    of = batches(root, workers=2)
    whole = [batch.keys for batch in iterate(of, Cursor(of), 0, 6)]
    cursor, requests = Cursor(of), []
    kept = DataLoader(of, batch_size=None, sampler=requests, collate_fn=lambda item: item, num_workers=2,
                      persistent_workers=True)  # fmt: skip
    requests += cursor.requests([(0, 8 * step, 8, None) for step in range(6)])
    for step, batch in enumerate(kept):
        cursor.seen(batch)
        assert batch.keys == whole[step]
        if step == 2:
            break
    requests[:] = cursor.requests([(0, 8 * step, 8, None) for step in range(3, 6)])
    assert requests[0] is None
    assert [batch.keys for batch in kept if batch is not None] == whole[3:]


def test_a_state_of_other_readers_is_refused(root: Path) -> None:
    state = Cursor(batches(root, workers=2)).state_dict()
    for options in ({"workers": 1}, {"world": 2}, {"world": 2, "rank": 1}, {"buffer": 7}, {"seed": 4}):
        with pytest.raises(BuilderError, match="the saved streams are of"):
            Cursor(batches(root, **({"workers": 2} | options))).load_state_dict(state)


def test_options_that_streams_cannot_keep(root: Path) -> None:
    for classes in ("balance", "match_real"):
        with pytest.raises(BuilderError, match=f"classes='{classes}'") as refused:
            batches(root, classes=classes)
        assert 'reading="indexed"' in refused.value.remedy
    with pytest.raises(BuilderError, match="buffer holds 0"):
        batches(root, buffer=0)
    error = batches(root)[Request(0, 0, 8, worker=1)]
    assert isinstance(error, BuilderError)
    assert "in_order" in error.remedy


def test_it_travels_to_a_worker_by_pickle(root: Path) -> None:
    of = batches(root)
    request = Request(0, 0, 8, 0, Cursor(of).positions[0])
    first = of[request]
    again = pickle.loads(pickle.dumps(of))[request]
    assert isinstance(first, StreamBatch)
    assert again.keys == first.keys
    assert of[None] is None


def test_sizes_and_the_same_dataset_twice(root: Path) -> None:
    twice = [None, source(root, "synth"), source(root, "synth")]
    of = StreamBatches(twice, Composed([0, 1, 1]), 5, stacked, seed=0)
    cursor = Cursor(of)
    found = list(iterate(of, cursor, 0, 3))
    assert found[0].images.shape == (8, 3, 5, 5)
    assert cursor.state_dict()["positions"] == [[None, [0, 12], [0, 12]]]
    streams = [Reader(layout, 0, 1, (0, number)) for number, layout in enumerate(of.layouts) if layout]
    assert a_pass(streams[0]) != a_pass(streams[1])


def test_a_pipeline_of_ones_own(root: Path) -> None:
    samples = StreamSamples(source(root, "real"), 4, seed=1, buffer=3)
    pipeline = wds.DataPipeline(
        samples, wds.map(lambda sample: (sample["__key__"], sample["image"].shape, sample["cls"]))
    )
    found = list(DataLoader(pipeline.with_epoch(13), batch_size=None, num_workers=2, collate_fn=lambda item: item))
    assert len(found) == 26  # of 25: a pass of the two, and one more
    assert len({key for key, _, _ in found}) == 25
    assert all(shape == (4, 4, 3) and label == int(key[-4:]) % 3 for key, shape, label in found)


def test_a_pipeline_goes_on_with_the_next_pass_in_the_next_epoch_and_shares_with_other_ranks(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = wds.DataPipeline(StreamSamples(source(root, "real", "train")), wds.map(lambda sample: sample["__key__"]))
    for workers in (0, 2):
        loader = DataLoader(
            pipeline.with_epoch(4), batch_size=None, num_workers=workers, persistent_workers=workers > 0,
            collate_fn=lambda item: item,
        )  # fmt: skip
        epochs = [list(loader) for _ in range(3)]
        assert epochs[0] != epochs[1] != epochs[2]
    twins = [next(iter(StreamSamples(source(root, "real"), number=number)))["__key__"] for number in range(6)]
    assert len(set(twins)) > 1
    passes = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
        samples = iter(StreamSamples(source(root, "real")))
        passes.append({next(samples)["__key__"] for _ in range(12)})
    assert not passes[0] & passes[1]


# -- where the tars are, and what is wrong with them ------------------------------------------------------------------


def test_of_an_object_store_and_of_indexed_tars(tmp_path: Path, root: Path) -> None:
    stored = make("memory://streamed", "real", [5, 3])
    names = [Path(path).name for path in fsspec.filesystem("memory").ls("/streamed/shards/real", detail=False)]
    foreign = Dataset("them", Storage(tmp_path))
    told = Description(HEALING_PHASES, "real", "train", lambda: pytest.fail("no patient"))
    index_tars([f"memory://streamed/shards/real/{name}" for name in names], foreign, told)
    for dataset in (stored, foreign):
        found = Source(dataset)
        of = StreamBatches([found], Composed([1]), None, stacked, seed=0)
        (batch,) = iterate(of, Cursor(of), 0, 1)
        assert sorted(batch.keys) == sorted(found.keys.to_pylist())


@pytest.mark.parametrize("workers", [0, 2])
def test_a_truncated_tar_is_an_error_that_names_shard_and_key_or_skipped(tmp_path: Path, workers: int) -> None:
    damaged = make(tmp_path, "real", [8, 8, 8], size=24)
    make(tmp_path, "synth", [9], size=24, origin="synthetic")
    make(tmp_path, "single", [1], size=24, origin="synthetic")
    path, rows = tmp_path / tar_path("real", 1), damaged.shard_table(1).to_pylist()
    path.write_bytes(path.read_bytes()[: rows[4]["offset"] + 10])
    lost = {row["key"] for row in rows[4:] if row["split"] == "train"}
    strict = batches(tmp_path, workers=workers)
    said = r"real-00\d\d in shards/real/shard-000001\.tar cannot be read: the file ends [\d,]+ bytes too early"
    with pytest.raises(BuilderError, match=said):
        list(iterate(strict, Cursor(strict), 0, 12))
    lenient = batches(tmp_path, workers=workers, skip=True)
    cursor, seen, skipped = Cursor(lenient), Counter(), Counter()
    for batch in iterate(lenient, cursor, 0, 8):
        assert Counter(key.split("-")[0] for key in batch.keys) == {"real": 4, "synth": 3, "single": 1}
        seen.update(key for key in batch.keys if key.startswith("real"))
        skipped.update(batch.skipped)
    assert set(skipped) == lost
    assert len(seen) == 16 - len(lost)
    for shard in range(3):
        (tmp_path / tar_path("real", shard)).write_bytes(b"")
    with pytest.raises(BuilderError, match="no image of 'real' can be read"):
        list(iterate(lenient, Cursor(lenient), 0, 1))


def test_other_pixels_and_lost_members_are_found(tmp_path: Path) -> None:
    dataset = make(tmp_path, "real", [5])
    found = Source(dataset)
    path = tmp_path / tar_path("real", 0)
    whole = path.read_bytes()
    of = StreamBatches([found], Composed([1]), None, stacked, seed=0, skip=True, buffer=1)

    def skipped() -> list[str]:
        item = of[Request(0, 0, 8, 0, Cursor(of).positions[0])]
        assert isinstance(item, StreamBatch)
        return item.skipped

    assert skipped() == []
    renamed = bytearray(whole)
    at = renamed.index(b"real-0002.png")
    renamed[at : at + 13] = b"rael-0002.png"  # the checksum is a sum
    path.write_bytes(renamed)
    assert skipped() == ["real-0002", "real-0002"]
    path.write_bytes(whole)
    found.hashes[3] += 1
    assert skipped() == ["real-0003", "real-0003"]

"""`builder index`: tars of others become a dataset where they lie, and every command reads it."""

import io
import json
import re
import tarfile
from functools import cache
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from PIL import Image

from builder.errors import BuilderError
from builder.identity import PatientKey
from builder.mixing import MixedLoader
from builder.mixing.sources import Source
from builder.phases import HEALING_PHASES, ClassTable, Phase
from builder.shards.compact import compact
from builder.shards.criteria import Criteria
from builder.shards.dataset import Dataset, find_dataset
from builder.shards.filter import filter_dataset, judge_dataset
from builder.shards.foreign import class_code
from builder.shards.inplace import Description, Summary, find_tars, index_tars
from builder.shards.remove import remove_dataset
from builder.shards.sequential import Sequential
from builder.shards.storage import Storage
from builder.shards.verify import check_dataset, verify_dataset
from builder.shards.writer import encode_png
from tests.conftest import textured

KEY = PatientKey(b"a secret of sixteen bytes", "test")


def tar_bytes(members: dict[str, bytes], form: int = tarfile.GNU_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for name, payload in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(payload)
            tar.addfile(info, io.BytesIO(payload))
    return buffer.getvalue()


def encoded(pixels: np.ndarray, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def sample(key: str, seed: int, phase: str = "P", **told: Any) -> dict[str, bytes]:
    """An image with its .json."""
    return {f"{key}.png": encode_png(textured(seed, 16)), f"{key}.json": json.dumps({"phase": phase, **told}).encode()}


def write(folder: Path, tars: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in tars.items():
        (folder / name).write_bytes(data)
    return folder


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    """Two tars, outside the root `out`: three codecs, three ways to say a class, members in any order."""
    first = {
        "x/0.cls": b"2\n",
        "readme.md": b"not a sample",
        "x/1.jpg": encoded(textured(1, 16), "JPEG", quality=90),
        "x/0.png": encode_png(textured(0, 16)),
        "x/1.txt": b"P",
        "x/0.mask.png": b"another member of the sample, not its image",
        f"{'long' * 40}.webp": encoded(textured(2, 20), "WEBP", lossless=True),
        f"{'long' * 40}.json": json.dumps({"split": "validation", "patient": "anna"}).encode(),
        f"{'long' * 40}.txt": b"0",
    }
    second = sample("b0", 3, split="train", patient_id=7) | sample("b1", 4, "I", split="test", group="g")
    return write(tmp_path / "theirs", {"a-0.tar": tar_bytes(first), "a-1.tar": tar_bytes(second)})


def index(out: Path, *urls: Path | str, name: str = "them", **description: Any) -> tuple[Dataset, Summary]:
    dataset = Dataset(name, Storage(out))
    told = {"origin": "real", "split": None, "find_key": lambda: KEY} | description
    return dataset, index_tars([str(url) for url in urls], dataset, Description(HEALING_PHASES, **told))


def test_tars_are_read_where_they_lie(tmp_path: Path, theirs: Path) -> None:
    dataset, summary = index(tmp_path / "out", theirs)
    assert (summary.images, summary.tars, summary.read, summary.turned) == (5, 2, 2, 0)
    assert summary.without == {"split": 2, "patient": 2}
    rows = dataset.table().to_pylist()
    assert [(row["key"], row["phase"], row["label"], row["split"]) for row in rows] == [
        ("x/1", "P", 1, None),
        ("x/0", "R", 2, None),
        ("long" * 40, "I", 0, "val"),
        ("b0", "P", 1, "train"),
        ("b1", "I", 0, "test"),
    ]
    assert [row["patient"] for row in rows] == [None, None, *(KEY.hash(said) for said in ("anna", "7", "g"))]
    assert {row["shard"] for row in rows} == {str(theirs / "a-0.tar"), str(theirs / "a-1.tar")}
    assert [(row["width"], row["origin"]) for row in rows] == [(16, "real"), (16, "real"), (20, "real")] + [
        (16, "real")
    ] * 2
    np.testing.assert_array_equal(dataset.pixels(rows[1]), textured(0, 16))
    np.testing.assert_array_equal(dataset.pixels(rows[2]), textured(2, 20))
    assert dataset.payload(rows[0]) == encoded(textured(1, 16), "JPEG", quality=90)
    assert not (tmp_path / "out/shards").exists()
    assert verify_dataset(dataset) == []
    assert check_dataset(dataset, fast=True).findings == []
    lineage = dataset.info["lineage"]
    assert (lineage["known"], lineage["key_fingerprint"], lineage["patients"]) == (False, KEY.fingerprint, [])
    assert lineage["patient_source"] == "index"
    said = [("patient", "anna"), ("patient", "7"), ("group", "g")]
    assert lineage["patient_forms"] == sorted(KEY.seal([by, KEY.form(text)]) for by, text in said)
    source = Source(dataset)
    assert source.shards == [str(theirs / "a-0.tar"), str(theirs / "a-1.tar")]
    for row in range(5):
        np.testing.assert_array_equal(source.pixels(row, None), dataset.pixels(rows[row]))
    assert len(Source(dataset, "train")) == 1


def test_lineage_is_known_where_every_sample_has_a_patient(tmp_path: Path) -> None:
    folder = write(tmp_path, {"a.tar": tar_bytes(sample("0", 0, patient="p", split="train"))})
    assert index(tmp_path / "out", folder)[0].info["lineage"]["known"] is True
    assert index(tmp_path / "out", folder, name="made", origin="synthetic")[0].info["lineage"]["known"] is False
    no_key = write(tmp_path / "none", {"a.tar": tar_bytes(sample("0", 0))})
    dataset, _ = index(tmp_path / "out", no_key, name="none", split="val", find_key=lambda: pytest.fail("no patient"))
    assert dataset.table()["split"].to_pylist() == ["val"]


def test_below_the_root_paths_are_relative_and_move_with_it(tmp_path: Path) -> None:
    root = tmp_path / "root"
    write(root / "data", {"a.tar": tar_bytes(sample("0", 0))})
    dataset, _ = index(root, root / "data/*.tar")
    assert dataset.table()["shard"].to_pylist() == ["data/a.tar"]
    root.rename(tmp_path / "moved")
    moved = find_dataset("them", str(tmp_path / "moved"))
    assert verify_dataset(moved) == []
    assert check_dataset(moved, fast=True).findings == []
    np.testing.assert_array_equal(Source(moved).pixels(0, None), textured(0, 16))


def test_urls_mean_tars(tmp_path: Path) -> None:
    folder = write(tmp_path / "t", {f"{name}.tar": b"" for name in ("a0", "a1", "a2", "b")})
    storage = Storage(tmp_path)

    def found(*urls: str) -> str:
        return " ".join(Path(tar).stem for tar in find_tars([f"{folder}/{url}" for url in urls], storage))

    assert found("") == found("*.tar") == "a0 a1 a2 b"
    assert found("b.tar", "a{0..1}.tar") == "b a0 a1"
    assert found("{a2,b}.tar", "a*.tar") == "a2 b a0 a1"
    for wrong, said in (("c.tar", "no tars at"), ("a{0..3}.tar", r"no tars at .*a3\.tar"), ("a{0..1.tar", "expanded")):
        with pytest.raises(BuilderError, match=said):
            found(wrong)
    with pytest.raises(BuilderError, match="nowhere:// is not supported"):
        find_tars(["nowhere://x.tar"], storage)


def test_of_an_object_store(tmp_path: Path, theirs: Path) -> None:
    store = fsspec.filesystem("memory")
    for name in ("a-0.tar", "a-1.tar"):
        store.pipe(f"/bucket/foreign/{name}", (theirs / name).read_bytes())
    here, _ = index(tmp_path / "out", "memory://bucket/foreign/a-{0..1}.tar")
    there, _ = index("memory://bucket/out", "memory://bucket/foreign/*.tar")  # type: ignore[arg-type]
    below, _ = index("memory://bucket", "memory://bucket/foreign")  # type: ignore[arg-type]
    local, _ = index("memory://bucket/local", theirs)  # type: ignore[arg-type]
    assert here.table()["shard"][0].as_py() == "memory:///bucket/foreign/a-0.tar"
    assert below.table()["shard"][0].as_py() == "foreign/a-0.tar"
    assert local.table()["shard"][0].as_py() == str(theirs / "a-0.tar")
    for dataset in (here, there, below, local):
        assert verify_dataset(dataset) == []
        assert check_dataset(dataset, fast=True).findings == []
        np.testing.assert_array_equal(Source(dataset).pixels(1, None), textured(0, 16))
    store.rm("/bucket", recursive=True)
    assert "missing" in check_dataset(here, fast=True).findings[0]
    assert "missing" in verify_dataset(here)[0]
    with pytest.raises(BuilderError, match=r"x/0 in memory:///bucket/foreign/a-0\.tar cannot be read"):
        Source(here).pixels(1, None)


def test_interrupted_it_goes_on_and_is_partial_until_then(tmp_path: Path, theirs: Path) -> None:
    good = (theirs / "a-1.tar").read_bytes()
    (theirs / "a-1.tar").write_bytes(good[:1500])
    with pytest.raises(BuilderError, match=r"a-1\.tar (cannot be read from|is cut short)"):
        index(tmp_path / "out", theirs)
    with pytest.raises(BuilderError, match="not complete"):
        find_dataset("them", str(tmp_path / "out"))
    partial = find_dataset("them", str(tmp_path / "out"), partial=True)
    assert partial.shard_numbers() == [0]
    before = (tmp_path / "out/manifests/them/shard-000000.parquet").stat()
    (theirs / "a-1.tar").write_bytes(good)
    dataset, summary = index(tmp_path / "out", theirs)
    assert (summary.read, summary.images, dataset.info["state"]) == (1, 5, "complete")
    assert (tmp_path / "out/manifests/them/shard-000000.parquet").stat() == before


def test_what_came_or_changed_since_is_read_and_the_rest_is_not(tmp_path: Path, theirs: Path) -> None:
    dataset, _ = index(tmp_path / "out", theirs)
    compact(dataset)
    dataset.write_info({**dataset.info, "scores": {"against": "clinic"}})
    assert index(tmp_path / "out", theirs)[1].read == 0
    assert dataset.info["scores"] == {"against": "clinic"}
    write(theirs, {"a-.tar": tar_bytes(sample("new", 9)), "a-1.tar": tar_bytes(sample("b0", 5))})
    again, summary = index(tmp_path / "out", theirs)
    assert (summary.read, summary.images) == (2, 5)
    assert [table["key"][0].as_py() for _, table in again.tables()] == ["x/1", "b0", "new"]
    np.testing.assert_array_equal(again.pixels(again.shard_table(1).to_pylist()[0]), textured(5, 16))
    assert verify_dataset(again) == []
    (theirs / "a-.tar").unlink()
    with pytest.raises(BuilderError, match=r"a-\.tar was indexed .* not among the tars any more"):
        index(tmp_path / "out", theirs)


def test_another_dataset_or_other_settings_are_refused(tmp_path: Path, theirs: Path, clinic: Dataset) -> None:
    index(tmp_path, theirs)
    with pytest.raises(BuilderError, match="was made with other"):
        index(tmp_path, theirs, origin="synthetic")
    with pytest.raises(BuilderError, match="was made with other"):
        index(tmp_path, theirs, name=clinic.name)
    assert clinic.info["count"] == 36


WHOLE = tar_bytes(sample("0", 0) | sample("1", 1))
PICTURE = encode_png(textured(0, 16))


@pytest.mark.parametrize(
    ("tars", "said"),
    [
        ({"a.tar": tar_bytes({"0.png": PICTURE})}, r"0\.png in .*a\.tar has no class"),
        ({"a.tar": tar_bytes({"0.png": PICTURE, "0.cls": b"3"})}, r"0\.png in .*a\.tar has the class '3'"),
        ({"a.tar": tar_bytes({"0.png": PICTURE, "0.cls": b"1", "0.json": b"{"})}, r"beside 0\.png in .*a\.tar is dam"),
        ({"a.tar": tar_bytes({"0.png": b"no png", "0.cls": b"0"})}, r"0\.png in .*a\.tar cannot be read"),
        ({"a.tar": tar_bytes({"0.txt": b"P", ".png": PICTURE})}, r"a\.tar holds no images"),
        ({"a.tar": WHOLE[:700]}, r"a\.tar cannot be read from 0\.png on: unexpected end"),
        ({"a.tar": WHOLE[: WHOLE.index(b"1.png")]}, r"a\.tar cannot be read from 0\.json on"),
        ({"a.tar": WHOLE.replace(b"1.png", b"2.png")}, r"a\.tar cannot be read from 0\.json on"),
        ({"a.tar": b"x" * 2000}, r"a\.tar cannot be read from its first member on"),
        ({"a.tar": b""}, r"a\.tar cannot be read from its first member on: empty file"),
        ({"a.tar": tar_bytes(sample("0", 0) | {"0.jpg": PICTURE})}, r"a\.tar has two images .*'0': 0\.png and 0\.jpg"),
        ({"a.tar": tar_bytes(sample("0", 0, split="holdout"))}, r"0\.png in .*a\.tar is of the split 'holdout'"),
        ({"a.tar": tar_bytes(sample("0", 0, origin="synthetic"))}, r"0\.png in .*a\.tar says that it is synthetic"),
        ({name: tar_bytes(sample("0", 0)) for name in ("a.tar", "b.tar")}, r"'0' stands in .*a\.tar and .*b\.tar"),
        (
            {
                "a.tar": tar_bytes(sample("0", 0, patient="p", split="train")),
                "b.tar": tar_bytes(sample("1", 0, patient="p", split="val")),
            },
            "1 patients stand in more than one split",
        ),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_and_nothing_is_usable(tmp_path: Path, tars: dict[str, bytes], said: str) -> None:
    folder = write(tmp_path / "in", tars)
    with pytest.raises(BuilderError, match=said):
        index(tmp_path / "out", folder)
    with pytest.raises(BuilderError, match="not complete"):
        find_dataset("them", str(tmp_path / "out"))
    write(folder, {name: tar_bytes(sample(name[0], 0)) for name in tars})
    assert index(tmp_path / "out", folder)[1].images == len(tars)  # mended, the same command goes on


def test_a_tar_that_changed_is_found_when_it_is_read(tmp_path: Path, theirs: Path) -> None:
    dataset, _ = index(tmp_path / "out", theirs)
    source, row = Source(dataset), dataset.shard_table(1).to_pylist()[0]
    other = bytearray((theirs / "a-1.tar").read_bytes())
    other[row["offset"] : row["offset"] + row["size"]] = encode_png(textured(8, 16))[: row["size"]].ljust(row["size"])
    (theirs / "a-1.tar").write_bytes(other)
    with pytest.raises(BuilderError, match=r"b0 in .*a-1\.tar cannot be read"):
        source.pixels(3, None)
    findings = verify_dataset(dataset)
    assert len(findings) == 2
    assert "SHA-256" in findings[0]
    assert "b0" in findings[1]
    (theirs / "a-1.tar").write_bytes(other[: row["offset"] + 5])
    assert re.search(r"a-1\.tar: .* bytes, where .* were written", check_dataset(dataset, fast=True).findings[0])
    with pytest.raises(BuilderError, match="too early"):
        Source(dataset).pixels(3, None)
    (theirs / "a-1.tar").unlink()
    with pytest.raises(BuilderError, match="No such file"):
        Source(dataset).pixels(3, None)


def test_filtered_as_a_view_and_repacked(tmp_path: Path, theirs: Path) -> None:
    dataset, _ = index(tmp_path / "out", theirs)
    criteria = Criteria(gates=(), where="phase = 'P' or width = 20")
    for name, view in (("view", True), ("packed", False)):
        target = Dataset(name, dataset.storage)
        filter_dataset(dataset, criteria, judge_dataset(dataset, criteria), target, view=view)
        assert sorted(target.table()["key"].to_pylist()) == ["b0", "long" * 40, "x/1"]
        assert verify_dataset(target) == []
        rows = {row["key"]: row for row in target.table().to_pylist()}
        np.testing.assert_array_equal(target.pixels(rows["long" * 40]), textured(2, 20))
        assert "indexed_from" not in target.info
        packed = not str(rows["x/1"]["shard"]).startswith("/")
        assert packed is not view
        assert (target.payload(rows["x/1"])[:4] == b"\x89PNG") is packed


@pytest.mark.filterwarnings("ignore:.*")
def test_mixed_with_synthetic_samples(tmp_path: Path) -> None:
    """Indexed tars are a source of the loader like any other, real or synthetic."""
    real = {f"r{i}": sample(f"r{i}", i, split="train", patient=str(i)) for i in range(6)}
    made = {f"s{i}": sample(f"s{i}", 10 + i) for i in range(4)}
    for name, samples in (("real", real), ("made", made)):
        write(tmp_path / "in", {f"{name}.tar": tar_bytes({k: v for each in samples.values() for k, v in each.items()})})
    index(tmp_path, tmp_path / "in/real.tar", name="real")
    index(tmp_path, tmp_path / "in/made.tar", name="made", origin="synthetic")
    with pytest.raises(BuilderError, match="lineage of 'made' is unknown"):
        MixedLoader("real", "made", out=str(tmp_path), batch_size=4)
    loader = MixedLoader("real", "made", ratio=0.5, out=str(tmp_path), batch_size=4, allow_leak="theirs")
    images, labels, origin = next(iter(loader))[:3]
    assert images.shape == (4, 3, 16, 16)
    assert origin.tolist().count(1) == 2
    assert labels.tolist() == [1] * 4


def test_removing_never_touches_their_tars(tmp_path: Path, theirs: Path) -> None:
    index(tmp_path / "out", theirs)
    remove_dataset(Storage(tmp_path / "out"), "them")
    assert sorted(path.name for path in theirs.iterdir()) == ["a-0.tar", "a-1.tar"]
    inside = write(tmp_path / "out/shards/lost", {"a.tar": WHOLE})
    with pytest.raises(BuilderError, match="choose another --name"):
        index(tmp_path / "out", inside, name="lost")
    index(tmp_path / "out", inside, name="found")
    with pytest.raises(BuilderError, match="the datasets found read the images of 'lost'"):
        remove_dataset(Storage(tmp_path / "out"), "lost")


def test_our_own_tars_keep_the_hashes_of_their_patients(tmp_path: Path, clinic: Dataset) -> None:
    dataset, summary = index(tmp_path / "elsewhere", tmp_path / "shards/clinic", find_key=lambda: pytest.fail("hashed"))
    columns = ["key", "label", "patient", "split", "offset", "size", "sha256"]
    assert dataset.table(columns).equals(clinic.table(columns))
    assert summary.without == {"split": 0, "patient": 0}
    nothing = {"patients": [], "patient_source": None, "patient_forms": []}
    assert dataset.info["lineage"] == {"known": False, "key_fingerprint": None, **nothing}


def test_patients_of_another_key_are_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "in", {"a.tar": tar_bytes(sample("0", 0, patient="p", split="train"))})
    index(tmp_path, folder)
    write(folder, {"b.tar": tar_bytes(sample("1", 1, patient="p", split="train"))})
    with pytest.raises(BuilderError, match="hashed with different keys"):
        index(tmp_path, folder, find_key=cache(lambda: PatientKey(b"another secret, as long", "test")))


def test_command_line(tmp_path: Path, theirs: Path, builder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BUILDER_PATIENT_KEY", KEY.secret.decode())
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = {"t.jpg": encoded(textured(5, 16), "JPEG", exif=exif), "t.cls": b"0", "t.json": b'{"patient": "anna"}'}
    write(theirs, {"a-2.tar": tar_bytes(turned)})
    done = builder("index", "theirs/a-{0..2}.tar", "--name", "them", "--split", "val")
    assert done.code == 0
    assert "dataset 'them': 6 images in 3 tars, of which 3 were read now" in done.output
    assert re.search("1 images are turned by their EXIF orientation", done.output)
    assert "2 images have no patient" in done.output
    assert "split" not in done.output
    assert Dataset("them", Storage(tmp_path)).table()["patient"].to_pylist()[2] == KEY.hash("anna")
    assert builder("verify", "them").code == 0
    assert "read now" in builder("index", "theirs", "--name", "them", "--split", "val").output
    assert builder("rm", "them").code == 0
    assert builder("index", "nowhere.tar", "--name", "them").code == 2
    assert len(list(theirs.glob("*.tar"))) == 3


def test_a_file_is_read_forwards_in_pieces(tmp_path: Path) -> None:
    data = bytes(range(256)) * 5
    (tmp_path / "f").write_bytes(data)
    fsspec.filesystem("memory").pipe("/sequential/f", data)
    for storage in (Storage(tmp_path), Storage("memory://sequential")):
        for start, stop in ((0, 1280), (100, 900), (1000, 1280), (7, 7)):
            with Sequential(storage, "f", start, stop, piece=100) as file:
                assert b"".join(iter(lambda file=file: file.read(30), b"")) == data[start:stop]
        for start, ends in ((1200, 20), (1180, 20), (1280, 20), (1290, 10)):
            with Sequential(storage, "f", start, 1300, piece=100) as file:
                assert b"".join(file.read(20) for _ in range(start, 1280, 20)) == data[start:]
                with pytest.raises(EOFError, match=f"ends {ends} bytes too early"):
                    file.read(1)


@pytest.mark.parametrize(("said", "code"), [
    ({".cls": b"1"}, "2"),  # an index
    ({".json": b'{"label": 1}'}, "2"),
    ({".json": b'{"phase": null, "label": 1}'}, "2"),
    ({".json": b'{"phase": "1", "label": 0}'}, "1"),  # a code
    ({".json": b"{}", ".txt": b"1"}, "1"),
    ({".cls": b"3"}, "3"),  # no index: then a code
    ({".txt": b"0"}, "1"),  # no code: then an index
])  # fmt: skip
def test_codes_that_are_numbers_are_not_taken_for_labels(said: dict[str, bytes], code: str) -> None:
    stages = ClassTable([Phase(number, number, number) for number in ("1", "2", "3")])
    assert class_code(said, stages, "here") == code


def test_a_patients_name_beside_members_that_look_like_ours_is_hashed(tmp_path: Path) -> None:
    told = {"key": "b0", "origin": "real", "sha256": "0", "split": None, "patient": "Anna Meier"}
    members = {"b0.png": encode_png(textured(3, 16)), "b0.json": json.dumps({"phase": "P", **told}).encode()}
    folder = write(tmp_path / "theirs", {"a.tar": tar_bytes(members)})
    dataset, _ = index(tmp_path / "out", folder, split="train")
    (row,) = dataset.table().to_pylist()
    assert row["patient"] == KEY.hash("Anna Meier")
    assert row["split"] == "train"  # null says nothing

"""What is on disk: reproducible, complete or invisible, verified."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from builder.errors import BuilderError
from builder.shards import received
from builder.shards.dataset import Dataset, find_dataset, resize
from builder.shards.lock import exclusive
from builder.shards.remove import remove_dataset
from builder.shards.schema import LIST_LENGTHS
from builder.shards.storage import TEMPORARY, Storage
from builder.shards.verify import stray_tars, verify_dataset
from builder.shards.writer import Sample, encode_png, image_row, tar_path, write_manifest, write_shard
from tests.conftest import textured, write_real


def read(dataset: Dataset, relative: str) -> bytes:
    return dataset.storage.read(relative)


def corrupt(dataset: Dataset, number: int, change) -> None:
    path = Path(dataset.storage.path(tar_path(dataset.name, number)))
    path.write_bytes(change(path.read_bytes()))


def test_equal_samples_give_equal_bytes(tmp_path: Path) -> None:
    one, two = write_real(tmp_path / "a"), write_real(tmp_path / "b")
    for number in one.shard_numbers():
        assert read(one, tar_path("clinic", number)) == read(two, tar_path("clinic", number))


def test_offset_and_size_are_the_payload_in_the_tar(clinic: Dataset) -> None:
    for row, pixels in clinic.images():
        assert np.array_equal(pixels, textured(1000 * ord(row["phase"]) + int(row["key"][-8:])))


def test_columns_say_what_they_mean(clinic: Dataset) -> None:
    schema = clinic.shard_schema(0)
    assert all(b"comment" in schema.field(name).metadata for name in schema.names)


def test_the_json_member_has_no_nulls_and_no_timing(clinic: Dataset) -> None:
    with tarfile.open(fileobj=io.BytesIO(read(clinic, tar_path("clinic", 0)))) as tar:
        names = tar.getnames()
        described = json.loads(tar.extractfile(names[2]).read())
        assert all(tar.getmember(name).mtime == 0 for name in names)
    assert [name.rpartition(".")[2] for name in names[:3]] == ["png", "cls", "json"]
    assert None not in described.values()
    assert not {"seconds", "device", "offset", "ssim"} & set(described)


def test_verify_beside_a_job_that_comes_to_its_end_finds_nothing(clinic: Dataset) -> None:
    """dataset.json gets its last count after the manifests were listed: no finding; of a dataset at rest it is one."""
    info, counted = clinic.info, {**clinic.info, "count": clinic.info["count"] + 8}
    clinic.write_info({**info, "state": "partial"})
    assert verify_dataset(clinic, lambda: clinic.write_info(counted)) == []
    assert verify_dataset(clinic) == [f"dataset.json counts {counted['count']} images, the manifests {info['count']}"]


def test_verify_passes_a_sound_dataset(clinic: Dataset) -> None:
    assert verify_dataset(clinic) == []
    assert stray_tars(clinic) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda data: data[: len(data) // 2], "SHA-256"),
        (lambda data: data[:600] + bytes([data[600] ^ 1]) + data[601:], "SHA-256"),
        (lambda data: b"not a tar at all" * 100, "not a readable tar"),
    ],
)
def test_verify_finds_a_damaged_tar(clinic: Dataset, change, said: str) -> None:
    corrupt(clinic, 1, change)
    findings = verify_dataset(clinic)
    assert any(said in finding for finding in findings)
    assert not any("shard-000000" in finding for finding in findings)


def test_verify_finds_a_missing_tar_a_wrong_count_and_a_doubled_key(clinic: Dataset) -> None:
    clinic.write_info(clinic.info | {"count": 7})
    os.unlink(clinic.storage.path(tar_path("clinic", 1)))
    write_manifest(clinic.storage, "manifests/clinic/shard-000002.parquet", clinic.shard_table(0))
    findings = "\n".join(verify_dataset(clinic))
    assert "missing" in findings
    assert "counts 7 images" in findings
    assert "stands in shard 0 and in shard 2" in findings


def test_verify_finds_a_wrong_label_and_wrong_pixels(clinic: Dataset) -> None:
    table = clinic.shard_table(0)
    rows = table.to_pylist()
    rows[0]["label"], rows[1]["sha256"] = 2 - rows[0]["label"], "0" * 64
    write_manifest(
        clinic.storage, "manifests/clinic/shard-000000.parquet", table.from_pylist(rows, schema=table.schema)
    )
    findings = "\n".join(verify_dataset(clinic))
    assert "is not in the class table" in findings
    assert "pixels" in findings


def test_verify_finds_a_missing_member(clinic: Dataset) -> None:
    """Repacked by a stranger without the label files, and the manifest's hash made to agree."""
    path = Path(clinic.storage.path(tar_path("clinic", 0)))
    table, buffer = clinic.shard_table(0), io.BytesIO()
    with tarfile.open(path) as old, tarfile.open(fileobj=buffer, mode="w") as new:
        for member in old.getmembers():
            if not member.name.endswith("I-00000001.cls"):
                new.addfile(member, old.extractfile(member))
    path.write_bytes(buffer.getvalue())
    sha = hashlib.sha256(buffer.getvalue()).hexdigest()
    write_manifest(
        clinic.storage, "manifests/clinic/shard-000000.parquet", table.replace_schema_metadata({"tar_sha256": sha})
    )
    assert any("member clinic-I-00000001.cls is missing" in finding for finding in verify_dataset(clinic))


def test_verify_reports_a_truncated_manifest(clinic: Dataset) -> None:
    path = Path(clinic.storage.path("manifests/clinic/shard-000001.parquet"))
    path.write_bytes(path.read_bytes()[:-20])
    assert any("cannot be read" in finding for finding in verify_dataset(clinic))


def test_a_tar_without_manifest_is_invisible_and_named_as_a_leftover(clinic: Dataset) -> None:
    clinic.storage.write("shards/clinic/shard-000009.tar", b"half")
    assert clinic.shard_numbers() == [0, 1]
    assert stray_tars(clinic) == ["shards/clinic/shard-000009.tar"]
    assert verify_dataset(clinic) == []


def test_a_failed_write_leaves_the_old_file_and_no_temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = Storage(tmp_path)
    storage.write("a/file", b"old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        storage.write("a/file", b"new")
    assert storage.read("a/file") == b"old"
    assert not [name for name in os.listdir(tmp_path / "a") if name.startswith(TEMPORARY)]


def test_a_full_disk_names_the_shard_and_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    pixels = textured(0)
    with pytest.raises(BuilderError, match=r"shard 3 of 'x'.*No space"):
        write_shard(
            Storage(tmp_path), "x", 3, [Sample(image_row("x-I-00000000", "I", 0, "real", pixels), encode_png(pixels))]
        )
    assert Dataset("x", Storage(tmp_path)).shard_numbers() == []


def test_a_dataset_that_is_being_written_is_not_removed(clinic: Dataset) -> None:
    with exclusive(clinic), pytest.raises(BuilderError, match="another job is writing"):
        remove_dataset(clinic.storage, "clinic")
    assert verify_dataset(clinic) == []


def test_the_newest_unfiltered_synthetic_dataset_is_meant_when_none_is_named(clinic: Dataset) -> None:
    with pytest.raises(BuilderError, match="no complete synthetic"):
        find_dataset(None, clinic.storage.root)
    info = clinic.info | {"origin": "synthetic"}
    for name, created, parent, state in (
        ("old", "2026-01-01", None, "complete"), ("new", "2026-02-01", None, "complete"),
        ("filtered", "2026-03-01", "new", "complete"), ("unfinished", "2026-04-01", None, "partial"),
    ):  # fmt: skip
        Dataset(name, clinic.storage).write_info(
            info | {"name": name, "created": created, "parent": parent, "state": state}
        )
    assert find_dataset(None, clinic.storage.root).name == "new"
    with pytest.raises(BuilderError, match="not complete"):
        find_dataset("unfinished", clinic.storage.root)
    assert find_dataset("unfinished", clinic.storage.root, partial=True).name == "unfinished"


def test_a_dataset_is_found_by_name_and_by_path(clinic: Dataset) -> None:
    root = clinic.storage.root
    for reference in (f"{root}/clinic", f"{root}/manifests/clinic", f"{root}/shards/clinic/"):
        assert find_dataset(reference).name == "clinic"
    with pytest.raises(BuilderError, match="did you mean 'clinic'"):
        find_dataset("clinik", root)


def test_rm_takes_all_leftovers(clinic: Dataset) -> None:
    clinic.storage.write("shards/clinic/shard-000077.tar", b"half")
    remove_dataset(clinic.storage, "clinic")
    assert not clinic.storage.exists("shards/clinic")
    assert not clinic.storage.exists("manifests/clinic")
    for wrong in ("clinic", "..", "a/b"):
        with pytest.raises(BuilderError):
            remove_dataset(clinic.storage, wrong)


def test_one_resize_is_antialiased_and_keeps_what_fits() -> None:
    pixels = textured(3, 64)
    assert resize(pixels, 64) is pixels
    assert resize(np.tile(np.array([0, 255], np.uint8)[None, :, None], (64, 32, 3)), 16).std() < 5


def test_strangers_read_the_shards(clinic: Dataset) -> None:
    import duckdb
    import webdataset as wds

    paths = [clinic.storage.path(tar_path("clinic", number)) for number in clinic.shard_numbers()]
    samples = list(wds.WebDataset(paths, shardshuffle=False).decode("pil"))
    assert len(samples) == 36
    assert {sample["cls"] for sample in samples} == {0, 1, 2}
    manifests = clinic.storage.path("manifests/clinic/*.parquet")
    counted = duckdb.sql(f"select phase, count(*) from '{manifests}' group by 1 order by 1").fetchall()
    assert counted == [("I", 12), ("P", 12), ("R", 12)]


def test_hugging_face_datasets_reads_the_shards(clinic: Dataset, tmp_path: Path) -> None:
    import datasets

    files = clinic.storage.path("shards/clinic/*.tar")
    loaded = datasets.load_dataset(
        "webdataset", data_files={"train": files}, split="train", streaming=True, cache_dir=str(tmp_path / "cache")
    )
    sample = next(iter(loaded))
    assert sample["png"].size == (64, 64)
    assert sample["json"]["key"] == sample["__key__"]


@pytest.mark.parametrize(
    ("name", "kind"), [("box", pa.float32()), ("original_size", pa.int32()), ("guidance_interval", pa.float32())]
)
def test_lists_of_numbers_have_their_length(name: str, kind: pa.DataType) -> None:
    length = LIST_LENGTHS[name]
    for good in ([None], [[1] * length], [[1] * length, None]):
        table = pa.table({name: pa.array(good, pa.list_(kind, length))})  # as manifests had them at first
        assert received.checked(table, [], (name,))[name].type == pa.list_(kind)
    for bad in ([[1] * (length - 1)], [[1] * length, []], [[1] * (length - 1) + [None]]):
        with pytest.raises(received.ManifestError, match=f"'{name}' has a list that is not of {length} numbers"):
            received.checked(pa.table({name: pa.array(bad, pa.list_(kind))}), [], (name,))

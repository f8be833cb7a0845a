"""Datasets on object stores: a real S3 server on the loopback, with requests that fail, and fsspec's memory store."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from builder.errors import BuilderError
from builder.mixing import MixedLoader
from builder.shards import stores
from builder.shards.dataset import Dataset, find_dataset
from builder.shards.storage import Storage
from builder.shards.verify import stray_tars, verify_dataset
from builder.shards.writer import Sample, encode_png, image_row, manifest_path, tar_path, write_shard
from tests.conftest import textured, write_real
from tests.test_job import run, spec_of

pytest.importorskip("s3fs", reason="the extra [s3] is not installed")
pytest.importorskip("moto.server", reason="moto[s3], flask and flask-cors are not installed")

from botocore.retries.standard import ExponentialBackoff

from tests.object_store import BUCKET, Flaky, s3_server

pytestmark = pytest.mark.usefixtures("references_once")

ROOT = f"s3://{BUCKET}"


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, Flaky]]:
    with s3_server() as started:
        yield started


@pytest.fixture
def s3(server: tuple[str, Flaky], monkeypatch: pytest.MonkeyPatch) -> Iterator[Flaky]:
    """The server, as the environment tells it to any client; reliable unless a test makes it fail."""
    address, flaky = server
    for name, value in (
        ("AWS_ENDPOINT_URL", address), ("AWS_ACCESS_KEY_ID", "test"), ("AWS_SECRET_ACCESS_KEY", "test"),
        ("AWS_DEFAULT_REGION", "us-east-1"), ("AWS_EC2_METADATA_DISABLED", "true"),
    ):  # fmt: skip
        monkeypatch.setenv(name, value)
    wait = ExponentialBackoff.delay_amount
    monkeypatch.setattr(ExponentialBackoff, "delay_amount", lambda self, context: wait(self, context) / 20)
    forget_clients()
    yield flaky
    flaky.share = 0.0
    forget_clients()


def forget_clients() -> None:
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()


def samples(seed: int) -> list[Sample]:
    pictures = [textured(seed + i, 24) for i in range(2)]
    return [Sample(image_row(f"x-I-{i:08d}", "I", 0, "synthetic", p), encode_png(p)) for i, p in enumerate(pictures)]


def shards_agree(storage: Storage, number: int = 0) -> bool:
    """Whether the manifest names the tar that is there."""
    tar = hashlib.sha256(storage.read(tar_path("x", number))).hexdigest()
    return Dataset("x", storage).shard_metadata(number)["tar_sha256"] == tar


# -- files ------------------------------------------------------------------------------------------------------------


def test_a_file_is_created_once_though_answers_get_lost(s3: Flaky) -> None:
    storage = Storage(f"{ROOT}/create")
    s3.share = 0.25
    for number in range(12):
        assert storage.create(f"claims/{number}", b"mine")
        assert not storage.create(f"claims/{number}", b"theirs")
        assert storage.read(f"claims/{number}") == b"mine"
    assert set(s3.failed) >= {"500", "503"}
    assert len(storage.list("claims")) == 12


@pytest.mark.parametrize("root", [f"{ROOT}/race", "memory://race", "local"])
def test_of_many_at_once_one_creates_a_file(s3: Flaky, root: str, tmp_path: Path) -> None:
    storage = Storage(tmp_path if root == "local" else root)
    if root.startswith("s3"):
        storage.exists("a")  # connects once
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda n: storage.create("claims/a", b"%d" % n), range(8)))
    if root.startswith("memory"):
        assert any(made)  # it looks first and then writes: the documented weaker way
    else:
        assert sum(made) == 1
        assert storage.read("claims/a") == b"%d" % made.index(True)


def test_whole_files_are_single_puts_and_what_a_killed_upload_left_is_swept(s3: Flaky, monkeypatch) -> None:
    storage = Storage(f"{ROOT}/sweep")
    sent, send = [], type(storage.fs)._call_s3

    async def call(self, method: str, *arguments: object, **keywords: object) -> object:
        sent.append(method)
        return await send(self, method, *arguments, **keywords)

    monkeypatch.setattr(type(storage.fs)._pipe_file, "__defaults__", (2**10, None, "overwrite"))  # a small chunk size
    monkeypatch.setattr(type(storage.fs), "_call_s3", call)
    storage.write("shards/x/a.tar", b"0" * 10 * 2**10)  # s3fs alone would send it in ten parts
    assert sent == ["put_object"]
    monkeypatch.undo()
    storage.fs.call_s3("create_multipart_upload", Bucket=BUCKET, Key="sweep/shards/x/b.tar")
    storage.fs.call_s3("create_multipart_upload", Bucket=BUCKET, Key="other/shards/x/b.tar")
    storage.sweep("shards/x")
    assert [upload["Key"] for upload in storage.fs.list_multipart_uploads(BUCKET)] == ["other/shards/x/b.tar"]
    storage.remove("shards")
    assert storage.list("shards/x") == []


# -- two jobs on one shard --------------------------------------------------------------------------------------------


class Interrupted(Storage):
    """A store on which something else happens just after a file was written, once."""

    def __init__(self, root: str, path: str, then) -> None:
        super().__init__(root)
        self.at, self.then = path, then

    def write(self, relative: str, data: bytes) -> None:
        super().write(relative, data)
        if relative == self.at and self.then:
            then, self.then = self.then, None
            then()


@pytest.mark.parametrize("theirs", ["whole", "tar before", "same bytes"])
def test_two_jobs_with_other_bytes_leave_a_shard_that_agrees(s3: Flaky, theirs: str) -> None:
    root = f"memory://two/{theirs}"
    plain, tar = Storage(root), tar_path("x", 0)
    if theirs == "tar before":  # they wrote their tar, then we ours, then they their manifest, then we
        ours = Interrupted(root, tar, None)

        def between() -> None:
            write_shard(ours, "x", 0, samples(50))

        assert write_shard(Interrupted(root, tar, between), "x", 0, samples(1)) is False
    else:  # between our tar and our manifest they make the whole shard: their tar is there, and their manifest
        seed = 1 if theirs == "same bytes" else 50
        made = []
        job = Interrupted(root, tar, lambda: made.append(write_shard(plain, "x", 0, samples(seed))))
        assert write_shard(job, "x", 0, samples(1)) is (theirs == "same bytes")  # then it is all one who did it
        assert made == [True]
    assert shards_agree(plain)


def test_who_overwrote_the_tar_of_a_committed_shard_commits_its_own(s3: Flaky) -> None:
    """They looked and saw no manifest, we committed, then their tar came over ours."""
    plain = Storage("memory://late")
    write_shard(plain, "x", 0, samples(1))
    late = Storage("memory://late")
    late.exists = lambda path: False  # type: ignore[method-assign]  # what it saw before we committed
    assert write_shard(late, "x", 0, samples(50)) is True
    assert shards_agree(plain)


# -- the whole job ----------------------------------------------------------------------------------------------------


def test_a_whole_job_with_a_fifth_of_the_requests_failing(
    s3: Flaky, tmp_path: Path, tiny_checkpoint: Path, builder
) -> None:
    write_real(tmp_path, per_phase=12, size=24)
    local = run(spec_of(tmp_path, tmp_path, tiny_checkpoint), 20).dataset
    s3.share, s3.failed = 0.2, type(s3.failed)()
    dataset = run(spec_of(f"{ROOT}/run", tmp_path, tiny_checkpoint), 20).dataset  # type: ignore[arg-type]
    again = run(spec_of(f"{ROOT}/run", tmp_path, tiny_checkpoint), 26).dataset  # type: ignore[arg-type]
    assert verify_dataset(again) == []
    assert s3.failed.total() > 20
    s3.share = 0.0
    keys = again.table(["key"])["key"].to_pylist()
    assert len(keys) == len(set(keys)) == again.info["count"] == 26
    assert stray_tars(again) == []
    assert dataset.storage.fs.list_multipart_uploads(BUCKET) == [] or not [
        upload for upload in dataset.storage.fs.list_multipart_uploads(BUCKET) if upload["Key"].startswith("run/")
    ]
    for number in local.shard_numbers():  # the same bytes as in a folder
        path = tar_path(local.name, number)
        assert again.storage.read(path) == local.storage.read(path)
    commands(builder, f"{ROOT}/run", tmp_path)


def test_the_memory_store_takes_the_same_way(s3: Flaky, tmp_path: Path, tiny_checkpoint: Path, builder) -> None:
    write_real(tmp_path, per_phase=12, size=24)
    run(spec_of("memory://all", tmp_path, tiny_checkpoint), 26)  # type: ignore[arg-type]
    commands(builder, "memory://all", tmp_path)


def commands(builder, root: str, real: Path) -> None:
    """What works in a folder works in a store: verify, list, compact, filter, loader, sheet, rm."""
    at = ["--out", root]
    assert "26 images in 4 shards" in builder("verify", "tiny-IPR", *at).output
    assert "26 images in 4 shards" in builder("verify", f"{root}/manifests/tiny-IPR", "--fast").output
    assert "26 rows" in builder("compact", "tiny-IPR", *at).output
    result = builder("filter", "tiny-IPR", "--no-gates", "--min-ssim", "-1", "--name", "kept", *at)
    assert "wrote dataset 'kept': 26 images" in result.output
    assert "26 images" in builder("filter", "--no-gates", "--max-ssim", "1", "--name", "seen", "--view", *at).output
    listed = builder("list", *at).output
    assert all(name in listed for name in ("tiny-IPR", "kept", "seen"))
    for workers in (0, 1):  # a forked worker needs connections of its own
        if workers and root.startswith("memory"):
            continue
        assert first_images(str(real / "shards/clinic"), f"{root}/manifests/seen", workers).shape == (4, 3, 16, 16)
    assert builder("sheet", "kept", "--to", "sheet.png", *at).code == 0
    assert builder("rm", "tiny-IPR", "--yes", *at).code == 2  # a view reads it
    for name in ("seen", "kept", "tiny-IPR"):
        assert builder("rm", name, "--yes", *at).code == 0
    assert "no datasets" in builder("list", *at).output


def first_images(real: str, synthetic: str, workers: int) -> Any:
    """Of a loader that is gone, with its workers, when this returns."""
    loader = MixedLoader(real, synthetic, ratio=0.5, batch_size=4, size=16, workers=workers, allow_leak="a test")
    return next(iter(loader))[0]


# -- what goes wrong --------------------------------------------------------------------------------------------------


def test_what_a_store_refuses_is_one_message_and_exit_2(s3: Flaky, builder, monkeypatch, tmp_path: Path) -> None:
    def refused(root: str, *said: str) -> None:
        forget_clients()
        write_real(tmp_path / "real")
        result = builder("score", "clinic", "--against", "clinic", "--out", root)
        assert result.code == 2, result.output
        assert result.output.count("error:") == 1
        assert "Traceback" not in result.output
        assert all(words in result.output for words in said), result.output

    refused("s3://nowhere/x", "no dataset 'clinic' in s3://nowhere/x")
    with pytest.raises(BuilderError, match="make the bucket first"):
        Storage("s3://nowhere/x").write("a", b"1")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("HOME", str(tmp_path))
    refused(f"{ROOT}/x", "redentials", "AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    few = {**stores.S3_OPTIONS, "config_kwargs": {"retries": {"mode": "standard", "max_attempts": 2}}}
    monkeypatch.setitem(stores.OPTIONS, "s3", few)
    refused(f"{ROOT}/x", "check the address and the network")
    refused("nonsense://x", "nonsense:// is not supported", "s3:// or gs://")
    assert not builder("list", "--out", "memory://nothing").code


def test_without_the_package_its_extra_is_named() -> None:
    script = "import sys; sys.modules['s3fs'] = None; sys.argv = ['builder', 'list', '--out', 's3://b/x']; "
    done = subprocess.run(
        [sys.executable, "-c", script + "from builder.cli import main; main()"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "s3fs is not installed" in done.stderr
    assert "pip install 'builder[s3]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_read_only_bucket_says_so(s3: Flaky, monkeypatch) -> None:
    storage = Storage(f"{ROOT}/readonly")

    def denied(*_: object, **__: object) -> None:
        raise PermissionError("Access Denied")

    monkeypatch.setattr(storage.fs, "pipe_file", denied)
    for write in (storage.write, storage.create):
        with pytest.raises(BuilderError, match=r"cannot write to .*Access Denied(.|\n)*allowed to list, read, write"):
            write("a", b"1")


def test_a_tar_of_another_run_never_passes(tmp_path: Path, clinic: Dataset) -> None:
    """The same keys in the same places: only the pixels differ."""
    table = clinic.shard_table(0)
    path = Path(clinic.storage.path(tar_path("clinic", 0)))
    rows, data = table.to_pylist(), bytearray(path.read_bytes())
    for row in rows:  # black images, padded to the length of those that were there
        black = encode_png(np.zeros((64, 64, 3), np.uint8))
        data[row["offset"] : row["offset"] + row["size"]] = black.ljust(row["size"], b"\0")
    path.write_bytes(bytes(data))
    assert any("SHA-256" in finding for finding in verify_dataset(clinic))
    with pytest.raises(BuilderError, match="not those of the manifest"):
        clinic.pixels(rows[0])
    with pytest.raises(BuilderError, match="not those of the manifest"):
        list(MixedLoader(clinic, batch_size=4))


def test_dataset_json_is_read_anew_on_a_store(s3: Flaky) -> None:
    """Nothing of a listing or a file is remembered: another machine may have written."""
    one, two = (Dataset("x", Storage(f"{ROOT}/anew")) for _ in range(2))
    assert not one.exists()
    info = {"state": "partial", "origin": "real", "classes": find_classes(), "name": "x"}
    two.write_info(info)
    assert one.exists()
    assert one.shard_numbers() == []
    two.storage.write(manifest_path("x", 0), json.dumps({}).encode())
    assert one.shard_numbers() == [0]
    with pytest.raises(BuilderError, match="not complete"):
        find_dataset("x", f"{ROOT}/anew")


def find_classes() -> object:
    from builder.phases import HEALING_PHASES

    return HEALING_PHASES.to_json()

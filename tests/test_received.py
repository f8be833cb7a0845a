"""What is received stays data: it runs no code, leads nowhere outside, and takes no more than it may."""

from __future__ import annotations

import gzip
import io
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from builder.cli import cli
from builder.cli.arguments import LARGEST
from builder.display import printable
from builder.documents import read_document, write_document
from builder.errors import BuilderError
from builder.job.regenerate import recorded_spec
from builder.mixing import MixedLoader
from builder.models.checkpoint import DEMO, read_checkpoint
from builder.models.load import load_pipeline
from builder.phases import HEALING_PHASES
from builder.safe_yaml import parse_yaml
from builder.shards import where
from builder.shards.compact import compact
from builder.shards.criteria import Criteria, judge
from builder.shards.dataset import Dataset
from builder.shards.filter import filter_dataset, judge_dataset
from builder.shards.inplace import Description, index_tars
from builder.shards.storage import Storage
from builder.shards.tars import TarError, read_members
from builder.shards.verify import verify_dataset
from builder.shards.writer import encode_png
from builder.trust import is_trusted, is_vouched, vouch
from tests.acceptance.hostile import YAML, header, padded, pax, sound_tar
from tests.conftest import textured, write_real

PICTURE = encode_png(textured(1, 16))
ONE = header(b"a.png", len(PICTURE)) + padded(PICTURE) + header(b"a.cls", 1) + padded(b"0")
END = bytes(1024)
TARS = Path(__file__).resolve().parent.parent.parent / "shared" / "cases" / "tars"


@pytest.fixture
def clinic(tmp_path: Path) -> Dataset:
    return write_real(tmp_path / "root", per_phase=2, size=16)


def lie(dataset: Dataset, column: str, value: Any) -> None:
    """Rewrite a column of the first manifest, as somebody with a text editor for Parquet would."""
    path = Path(dataset.storage.path(f"manifests/{dataset.name}/shard-000000.parquet"))
    table = pq.read_table(path)
    place, field = table.schema.get_field_index(column), table.schema.field(column)
    lied = pa.array([value] * table.num_rows, field.type)
    kept = {key: said for key, said in table.schema.metadata.items() if not key.startswith(b"builder.")}
    table = table.set_column(place, pa.field(column, field.type, True), lied).replace_schema_metadata(kept)
    pq.write_table(table, path)


# -- manifests --------------------------------------------------------------------------------------------------------

OUTSIDE = ["../secret.png", "/etc/hostname", "http://127.0.0.1:9/x.tar", "local:///etc/hostname",
"file:///etc/hostname",
           "shards/clinic/../../secret.tar", "patient.key", "shards\\clinic\\x.tar", "memory://x/y.tar", "s3://b/x.tar",
           "shards/clinic/x\0.tar", "shards/clinic/\x1b[2J.tar", "", "shards/clinic/shard-000000.tar\n"]  # fmt: skip


@pytest.mark.parametrize("shard", OUTSIDE)
def test_a_manifest_cannot_name_files_elsewhere(clinic: Dataset, shard: str) -> None:
    lie(clinic, "shard", shard)
    for read in (
        clinic.table,
        lambda: list(clinic.tables(["shard"])),
        lambda: MixedLoader("clinic", out=clinic.storage.root),
    ):
        with pytest.raises(BuilderError, match="not among the dataset's own tars") as refused:
            read()
        assert "--trust-root" in refused.value.remedy
        assert all(character.isprintable() for character in refused.value.what)
    with pytest.raises(BuilderError, match="not among the dataset's own tars"):
        filter_dataset(clinic, Criteria(), judge_dataset(clinic, Criteria()), Dataset("kept", clinic.storage))
    assert any("not among" in finding for finding in verify_dataset(clinic))


@pytest.mark.parametrize(
    ("column", "value", "said"),
    [
        ("size", 2**62, "must lie"), ("offset", -5, "must lie"), ("label", 64, "must lie"), ("width", 0, "must lie"),
        ("shard", None, "missing values"), ("key", None, "missing values"), ("key", "../x", "'key'"),
        ("key", "/x", "'key'"), ("key", "a\nb", "'key'"), ("key", "", "'key'"), ("key", "x" * 2000, "'key'"),
        ("sha256", "x" * 64, "'sha256'"), ("sha256", "ab", "'sha256'"), ("phase", "I P", "'phase'"),
        ("source", "y" * 30_000, "text of 30,000"),
    ],
)  # fmt: skip
def test_columns_are_held_against_the_schema(clinic: Dataset, column: str, value: Any, said: str) -> None:
    lie(clinic, column, value)
    with pytest.raises(BuilderError, match=rf"shard-000000\.parquet cannot be read: .*{said}"):
        clinic.table()


@pytest.mark.parametrize("stored", [True, False])
def test_few_bytes_cannot_stand_for_much_memory(clinic: Dataset, stored: bool) -> None:
    path = Path(clinic.storage.path("manifests/clinic/shard-000000.parquet"))
    count = 100_000
    text = pa.DictionaryArray.from_arrays(pa.array([0] * count, pa.int8()), pa.array(["y" * 50_000]))  # 5 GB
    columns = {field.name: pa.nulls(count, field.type) for field in pq.read_schema(path)}
    pq.write_table(pa.table({**columns, "key": text}), path, store_schema=stored)
    assert path.stat().st_size < 300_000
    with pytest.raises(BuilderError, match=r"text of 50,000"):
        clinic.table(["key"])


def test_an_index_that_lies_is_not_used(clinic: Dataset) -> None:
    compact(clinic)
    keys = clinic.table(["key"])["key"].to_pylist()
    path = Path(clinic.storage.path("manifests/clinic/index.parquet"))
    table = pq.read_table(path)
    metadata = pq.read_metadata(path).metadata
    place = table.schema.get_field_index("shard")
    lied = table.set_column(place, table.schema.field(place), pa.array(["/etc/hostname"] * len(table)))
    with pq.ParquetWriter(path, lied.schema) as writer:
        writer.write_table(lied)
        writer.add_key_value_metadata({b"builder.shards": metadata[b"builder.shards"]})
    assert clinic.table(["key", "shard"])["shard"].unique().to_pylist() == [
        "shards/clinic/shard-000000.tar", "shards/clinic/shard-000001.tar",
    ]  # fmt: skip
    assert clinic.table(["key"])["key"].to_pylist() == keys


# -- places -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "what", ["shards/clinic/shard-000000.tar", "shards/clinic", "manifests/clinic/shard-000000.parquet"]
)
def test_links_that_lead_out_are_not_followed(clinic: Dataset, tmp_path: Path, what: str, monkeypatch) -> None:
    inside = Path(clinic.storage.path(what))
    outside = tmp_path / "elsewhere" / inside.name
    outside.parent.mkdir()
    shutil.move(inside, outside)
    inside.symlink_to(outside)
    again = Dataset("clinic", Storage(clinic.storage.root))
    with pytest.raises(BuilderError, match="leads out of the output root"):
        list(again.images())
    monkeypatch.setenv("BUILDER_TRUST_ROOTS", str(outside.parent))
    assert len(list(Dataset("clinic", Storage(clinic.storage.root)).images())) == 6


@pytest.mark.parametrize("what", ["shards/clinic/shard-000000.tar", "manifests/clinic/shard-000000.parquet",
                                  "manifests/clinic/dataset.json", "manifests/clinic/.lock"])  # fmt: skip
def test_a_pipe_never_hangs(clinic: Dataset, builder, what: str) -> None:
    path = Path(clinic.storage.path(what))
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    for words in (["verify", "clinic"], ["filter", "clinic", "--no-gates"], ["compact", "clinic"]):
        result = builder(*words, "--out", clinic.storage.root)
        assert result.code in (0, 1, 2) and "Traceback" not in result.output
        assert result.code or words[0] == "compact" or path.name == ".lock", words


def test_a_link_is_removed_and_not_what_it_leads_to(clinic: Dataset, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    (Path(clinic.storage.path("shards")) / "link").symlink_to(tmp_path / "mine")
    clinic.storage.remove("shards/link")
    assert (tmp_path / "mine" / "file").exists()
    assert not os.path.lexists(clinic.storage.path("shards/link"))


def test_indexed_tars_are_read_by_who_indexed_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tar = tmp_path / "theirs" / "a.tar"
    tar.parent.mkdir()
    tar.write_bytes(sound_tar([PICTURE, encode_png(textured(2, 16))]))
    dataset = Dataset("them", Storage(tmp_path / "root"))
    told = Description(HEALING_PHASES, "real", "train", lambda: pytest.fail("no patient"))
    index_tars([str(tar)], dataset, told)
    assert len(list(dataset.images())) == 2
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "another user"))
    with pytest.raises(BuilderError, match="not among the dataset's own tars"):
        dataset.table()
    with monkeypatch.context() as context:
        context.setenv("BUILDER_TRUST_ROOTS", str(tar.parent))
        assert len(list(dataset.images())) == 2
    index_tars([str(tar)], dataset, told)  # this user names them now
    assert len(list(dataset.images())) == 2
    lie(dataset, "shard", "/etc/hostname")
    with pytest.raises(BuilderError, match="not among"):
        dataset.table()


def test_vouchers_and_roots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    assert not is_vouched("/a.tar", "0" * 64)
    voucher = vouch("/a.tar")
    assert is_vouched("/a.tar", voucher) and not is_vouched("/b.tar", voucher) and not is_vouched("/a.tar", None)
    assert (tmp_path / "state/builder/voucher.key").stat().st_mode & 0o777 == 0o600
    monkeypatch.setenv("BUILDER_TRUST_ROOTS", f"{tmp_path}/in s3://bucket/set")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "out").symlink_to("/etc")
    assert is_trusted(f"{tmp_path}/in/x.tar") and is_trusted("s3://bucket/set/x.tar")
    for other in (f"{tmp_path}/in/../x", f"{tmp_path}/inner", f"{tmp_path}/in/out/passwd", "s3://bucket/setting/x",
                  "s3://bucket/set/../x", "/etc/passwd", "\0"):  # fmt: skip
        assert not is_trusted(other), other
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    assert vouch("/a.tar") is None


# -- code and files that a record names -------------------------------------------------------------------------------


@pytest.mark.parametrize("features", ["canary_module:make", "dinov2:/etc"])
def test_recorded_features_run_no_code(clinic: Dataset, tmp_path: Path, monkeypatch, features: str) -> None:
    from builder.config import load_config

    (tmp_path / "canary_module.py").write_text("raise SystemError")
    monkeypatch.chdir(tmp_path)
    config = load_config(None, [f"score.features={features}"]).to_json()
    keys = {"checkpoint": read_checkpoint(DEMO).sha256, "dtype": "float32", "phases": ["I"], "weights": [1]}
    clinic.write_info({**clinic.info, "fingerprint_keys": keys, "checkpoint": "demo", "config": config})
    with pytest.raises(BuilderError, match="may not choose what code runs") as refused:
        recorded_spec(clinic)
    assert "--features" in refused.value.remedy
    assert recorded_spec(clinic, features="efficientnet-lite0")[0].config.score.features == "efficientnet-lite0"
    clinic.write_info({**clinic.info, "checkpoint": "/etc"})
    with pytest.raises(BuilderError, match="lies outside the working directory"):
        recorded_spec(clinic, features="efficientnet-lite0")


def test_a_received_adapter_does_not_choose_its_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "here" / "adapter"
    folder.mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    (folder / "pytorch_lora_weights.safetensors").touch()
    base = {"reference": str(tmp_path / "base"), "sha256": "0" * 64}
    for reference in (base["reference"], "../base", "/etc", "s3://x/y"):
        write_document(folder / "checkpoint.json", {"method": "lora", "base": {**base, "reference": reference}})
        with pytest.raises(BuilderError, match="outside the working directory"):
            load_pipeline(read_checkpoint(folder))
    write_document(
        folder / "checkpoint.json", {"method": "lora", "base": {**base, "voucher": vouch(base["reference"])}}
    )
    with pytest.raises(BuilderError, match="is not there"):
        load_pipeline(read_checkpoint(folder))


def test_links_and_pipes_in_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "models--a--b" / "snapshots" / "1"
    (folder / "unet").mkdir(parents=True)
    (tmp_path / "models--a--b" / "blob").touch()
    (folder / "unet" / "x.safetensors").symlink_to("../../../blob")  # as the hub's cache has it
    assert read_checkpoint(folder).family == "sdxl"
    (folder / "unet" / "config.json").symlink_to("/etc/passwd")
    with pytest.raises(BuilderError, match="leads out of the checkpoint"):
        read_checkpoint(folder)
    monkeypatch.setenv("BUILDER_TRUST_ROOTS", "/etc/passwd")
    assert read_checkpoint(folder).family == "sdxl"
    os.mkfifo(folder / "unet" / "y.json")
    with pytest.raises(BuilderError, match="is not a file"):
        read_checkpoint(folder)


def test_a_shard_of_weights_is_a_file_of_the_folder(tmp_path: Path) -> None:
    from builder.models.tensors import require_parts_inside

    index = tmp_path / "x.safetensors.index.json"
    assert require_parts_inside(index) == []
    for name in ("../x.safetensors", "/etc/x", "a/b", "", "..", "\0"):
        write_document(index, {"weight_map": {"a": name}})
        with pytest.raises(BuilderError, match="no file of its folder"):
            require_parts_inside(index)
    write_document(index, {"weight_map": {"a": "x-2.safetensors", "b": "x-1.safetensors"}})
    assert require_parts_inside(index) == ["x-1.safetensors", "x-2.safetensors"]


# -- tars -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "empty file"),
        (ONE, "end mark is missing"),
        (ONE[:700], "unexpected end"),
        (ONE + ONE + END, "stands twice"),
        (ONE + header(b"./a.png", 0) + END, "stands twice"),
        (ONE + header(b"b.png", 0, b"1", link=b"a.png") + END, "a hard link"),
        (ONE + header(b"b.png", 0, b"2", link=b"/etc/passwd") + END, "a symbolic link"),
        (ONE + header(b"b.png", 0, b"3") + END, "a device"),
        (ONE + header(b"b.png", 0, b"6") + END, "a named pipe"),
        (ONE + header(b"b.png", 512, b"S") + bytes(512) + END, "sparse"),
        (pax({b"GNU.sparse.major": b"1", b"GNU.sparse.minor": b"0",
        b"GNU.sparse.realsize": b"40000000000"}) + ONE + END, "sparse"),
        (pax({b"GNU.sparse.map": b"0,1,40000000000,1", b"GNU.sparse.size": b"40000000001"}) + ONE + END, "sparse"),
        (pax({b"size": b"40000000000"}) + ONE + END, "claims 40,000,000,000"),
        (pax({b"size": b"-1"}) + ONE + END, "claims -1"),
        (header(b"a.png", 0, claimed=b"\x80" + b"\xff" * 11) + END, "claims"),
        (header(b"a.png", 0, claimed=b"\xff" * 12) + END, "claims -1"),
        (header(b"L", 2**30, b"L") + ONE + END, "a header claims"),
        (header(b"x", 2**30, b"x") + ONE + END, "a header claims"),
        (pax({b"path": b"y"}) * 3000 + ONE + END, "nested without end"),
        (gzip.compress(ONE + END), "compressed"),
    ],
)  # fmt: skip
def test_hostile_tars(data: bytes, said: str) -> None:
    with pytest.raises(TarError, match=said):
        _ = [member.read() for member in read_members(io.BytesIO(data), len(data))]  # type: ignore[arg-type]


def test_a_sound_tar_is_read_where_its_members_lie() -> None:
    data = sound_tar([PICTURE, PICTURE])
    members = []
    for member in read_members(io.BytesIO(data), len(data)):  # type: ignore[arg-type]
        members.append(member.name)
        assert member.read() == data[member.offset : member.offset + member.size]
    assert members == ["0.png", "0.cls", "1.png", "1.cls"]


@pytest.mark.parametrize("name", ["a\nb", "\x1b[2J", "../x", "/etc/x", "a\\b"])
def test_odd_names_in_a_tar(tmp_path: Path, builder, name: str) -> None:
    (tmp_path / "t.tar").write_bytes(header(f"{name}.png".encode(), len(PICTURE)) + padded(PICTURE) + END)
    result = builder("index", str(tmp_path / "t.tar"), "--name", "t", "--out", str(tmp_path / "root"))
    assert result.code == 2
    assert "\x1b" not in result.output and "a\nb.png" not in result.output


@pytest.mark.skipif(not TARS.is_dir(), reason="the cases are not beside the repository")
@pytest.mark.parametrize("name", ["dup", "eps", "jsondeep", "newline", "paxsize2", "sparse40g"])
def test_tars_of_bug_reports(tmp_path: Path, builder, name: str) -> None:
    result = builder("index", str(TARS / f"{name}.tar"), "--name", "t", "--out", str(tmp_path))
    assert result.code == 2
    assert result.output.count("error: ") == 1


# -- conditions, YAML, arguments --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "condition", ["len(repeat('x', 4000000000)) > 0", "(select count(*) from range(100000000000)) > 0"]
)
def test_where_has_limits(clinic: Dataset, monkeypatch: pytest.MonkeyPatch, condition: str) -> None:
    monkeypatch.setattr(where, "SECONDS", 4.0)
    with pytest.raises(BuilderError, match="takes more than it may"):
        judge(clinic.table(), Criteria(where=condition))


@pytest.mark.parametrize(
    "text", [text for text in YAML if "!!" in text or "[*" in text or text[:5] in ("[[[[[", "- - -")]
)
def test_hostile_yaml(text: str) -> None:
    with pytest.raises(BuilderError, match="is not valid YAML"):
        parse_yaml(text, "c.yaml", "mend it")


def test_keys_that_stand_twice_and_anchors_in_measure() -> None:
    with pytest.raises(BuilderError, match="'steps' stands twice"):
        parse_yaml("sample:\n  steps: 1\n  steps: 2\n", "c.yaml", "mend it")
    assert parse_yaml("a: &a {x: 1}\nb: *a\nc: {<<: *a, y: 2}\n", "c.yaml", "") == {
        "a": {"x": 1}, "b": {"x": 1}, "c": {"x": 1, "y": 2},
    }  # fmt: skip


@pytest.mark.parametrize("scheme", ["http", "https", "ftp", "az", "zip", "simplecache::s3"])
def test_other_schemes_are_named(scheme: str) -> None:
    with pytest.raises(BuilderError, match="is not supported") as refused:
        Storage(f"{scheme}://x/y").exists("z")
    assert "s3://" in refused.value.remedy


@pytest.mark.parametrize("words", [["sheet", "x", "--per-phase", str(LARGEST)], ["sheet", "x", "--seed", "9" * 5000],
                                   ["list", "--out", "a\0b"], ["tune-filter", "x", "--tries", "1e999"],
                                   ["list", "--trust-root", ""]])  # fmt: skip
def test_odd_arguments(builder, words: list[str]) -> None:
    result = builder(*words)
    assert result.code == 2
    assert "Traceback" not in result.output


def test_numbers_of_all_commands_are_bounded() -> None:
    import click

    waiting: list[click.Command] = [cli]
    while waiting:
        command = waiting.pop()
        waiting += list(getattr(command, "commands", {}).values())
        for parameter in command.params:
            if isinstance(parameter.type, click.types.FloatParamType):
                for text in ("nan", "inf", "1e999"):
                    with pytest.raises(click.BadParameter):
                        parameter.type.convert(text, None, None)


def test_foreign_text_is_shown_and_does_nothing() -> None:
    assert printable("a\x1b[2J\n\u202e\udcff") == r"a\x1b[2J\n\u202e\udcff"
    assert printable("Füße 傷") == "Füße 傷"
    assert len(printable("x" * 10_000)) < 300


def test_names_that_are_no_text_are_printed(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"\xff")).mkdir()
    command = [sys.executable, "-m", "builder", "list", "--out", os.fsdecode(b"\xff")]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, env={**os.environ, "LANG": "C.UTF-8"}, check=False
    )
    assert b"Traceback" not in done.stderr and rb"\udcff" in done.stdout + done.stderr


def test_documents_of_a_copied_dataset(clinic: Dataset) -> None:
    """A dataset.json whose content was changed without its checksum is refused by every command that reads it."""
    path = Path(clinic.storage.path("manifests/clinic/dataset.json"))
    path.write_text(path.read_text().replace('"real"', '"synthetic"', 1))
    with pytest.raises(BuilderError, match="not what its checksum says"):
        read_document(path)
    with pytest.raises(BuilderError, match="not what its checksum says"):
        _ = clinic.info

"""Damage is found: every file of a dataset, a checkpoint and a run, flipped, cut, zeroed, emptied, deleted, swapped."""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from builder.config import fingerprint
from builder.errors import BuilderError
from builder.identity.key import new_secret, sound_secret
from builder.models.load import load_pipeline
from builder.models.verification import verify_checkpoint
from builder.quality.features.cache import save_features
from builder.quality.reference import copy_reference, save_reference
from builder.shards.compact import compact, in_step
from builder.shards.criteria import Criteria
from builder.shards.dataset import Dataset
from builder.shards.filter import filter_dataset, judge_dataset
from builder.shards.lock import LockedError, exclusive
from builder.shards.sealed import DamagedError, encode_parquet, open_parquet, require_trailer, with_trailer
from builder.shards.storage import Storage
from builder.shards.verify import verify_dataset
from builder.shards.writer import manifest_path, tar_path, write_manifest
from builder.training.states import States, state_damage, state_files
from tests.conftest import write_real
from tests.damages import damages, files_of, flip, of_one_kind, reads_the_same
from tests.test_filter import VERSION, made_up_reference, with_scores


class Extractor:
    """Stands in for a feature extractor where none is needed."""

    id, dimension, name = "made-up-1", 4, "made up"


def whole_dataset(root: Path) -> tuple[Dataset, Dataset]:
    """`clinic`, scored, with index and cached features; and `kept`, filtered from it, with rejects."""
    clinic = with_scores(write_real(root, per_phase=4, size=16), {"ssim": [i % 6 / 10 for i in range(12)]})
    reference = made_up_reference()
    save_reference(clinic, reference)
    clinic.write_info({**clinic.info, "scores": {"version": VERSION, "against": "clinic"}})
    for number in clinic.shard_numbers():
        hashes = clinic.shard_table(number, ["sha256"])["sha256"].to_pylist()
        features = np.arange(len(hashes) * 4, dtype=np.float32).reshape(-1, 4) + number
        save_features(clinic, number, Extractor(), None, hashes, features)  # type: ignore[arg-type]
    compact(clinic)
    kept, criteria = Dataset("kept", clinic.storage), Criteria(where="ssim > 0.2")
    judgement = judge_dataset(clinic, criteria)
    filter_dataset(clinic, criteria, judgement, kept, write_beside=lambda: copy_reference(clinic, kept))
    return clinic, kept


def noticed(root: Path, name: str) -> list[str]:
    try:
        return verify_dataset(Dataset(name, Storage(root)))
    except BuilderError as error:
        return [str(error)]


def test_every_damage_to_a_file_of_a_dataset_is_found(tmp_path: Path) -> None:
    whole_dataset(tmp_path)
    assert noticed(tmp_path, "clinic") == noticed(tmp_path, "kept") == []
    files = files_of(tmp_path)
    assert {path.suffix for path in files} == {".tar", ".parquet", ".json", ".npy"}
    missed = []
    for path in files:
        before = path.read_bytes()
        for what, damage in damages(path, of_one_kind(path, files), seed=1, flips=2):
            damage()
            if not reads_the_same(path, before) and not noticed(tmp_path, path.relative_to(tmp_path).parts[1]):
                missed.append(f"{path.relative_to(tmp_path)}: {what}")
            path.write_bytes(before)
    assert missed == []


def test_every_bit_of_a_manifest_is_covered(tmp_path: Path) -> None:
    """Of a small manifest each byte in turn: it is refused, or it says the same."""
    table = pa.table({"key": ["a", "b"], "label": [0, 1]}).replace_schema_metadata({"tar_sha256": "0" * 8})
    data = encode_parquet(table, "manifests/x/shard-000000.parquet")
    for place in range(len(data)):
        hurt = bytearray(data)
        hurt[place] ^= 1 << place % 8
        with pytest.raises((DamagedError, pa.ArrowException)):
            open_parquet(bytes(hurt)).read()


def test_a_sealed_file_in_anothers_place_is_refused() -> None:
    data = encode_parquet(pa.table({"a": [1]}), "manifests/x/shard-000000.parquet")
    assert open_parquet(data, name="shard-000000.parquet").read().num_rows == 1
    with pytest.raises(DamagedError, match="another's place"):
        open_parquet(data, name="shard-000001.parquet")


def test_files_without_a_seal_are_read_as_before(builder, clinic: Dataset) -> None:
    buffer = io.BytesIO()
    table = clinic.shard_table(0)
    pq.write_table(table, buffer, compression="zstd")
    clinic.storage.write(manifest_path("clinic", 0), buffer.getvalue())
    assert clinic.shard_table(0).equals(table)
    assert verify_dataset(clinic) == []
    result = builder("verify", "clinic")
    assert result.code == 0
    assert "shard-000000.parquet have no checksum: an older version wrote them" in result.output


def test_a_trailer_binds_a_cache_to_its_name() -> None:
    data = with_trailer(b"features", "one.npy")
    assert require_trailer(data, "one.npy") == (b"features", True)
    assert require_trailer(b"features of an older version, " * 9, "one.npy")[1] is False
    for hurt in (data[:3] + b"?" + data[4:], data[:-9] + b"?" + data[-8:], data.replace(b"sha256", b"sha257")):
        with pytest.raises(DamagedError):
            require_trailer(hurt, "one.npy")
    with pytest.raises(DamagedError):
        require_trailer(data, "two.npy")


def test_a_damaged_index_is_not_used_and_written_anew(builder, clinic: Dataset) -> None:
    plain = clinic.table()
    compact(clinic)
    path = Path(clinic.storage.path("manifests/clinic/index.parquet"))
    flip(path, 600, 3)
    assert clinic.table().equals(plain)
    assert [table.num_rows for _, table in clinic.tables(("key", "label"))] == [18, 18]
    assert "index.parquet is damaged" in builder("verify", "clinic").output
    assert builder("verify", "clinic", "--repair").code == 0
    assert in_step(clinic)
    assert verify_dataset(clinic) == []


# -- filter -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["", "key = 'clinic-I-00000003'"], ids=["all", "one"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "zero", "empty", "delete"])
def test_filter_does_not_copy_damage(clinic: Dataset, damage: str, where: str) -> None:
    tar = Path(clinic.storage.path(tar_path("clinic", 0)))
    row = next(row for row in clinic.shard_table(0).to_pylist() if row["key"] == "clinic-I-00000003")
    data = tar.read_bytes()
    if damage == "delete":
        tar.unlink()
    elif damage == "flip":
        flip(tar, row["offset"] + row["size"] // 2, 1)
    else:
        tar.write_bytes({"truncate": data[: row["offset"] + 9], "zero": bytes(len(data)), "empty": b""}[damage])
    criteria, target = Criteria(where=where), Dataset("kept", clinic.storage)
    with pytest.raises(BuilderError, match="verify clinic"):
        filter_dataset(clinic, criteria, judge_dataset(clinic, criteria), target)
    assert not target.exists()
    assert not target.storage.list("shards/kept")
    tar.write_bytes(data)
    assert filter_dataset(clinic, criteria, judge_dataset(clinic, criteria), target)
    assert verify_dataset(target) == []


def test_a_row_that_points_beside_its_image_is_not_copied(clinic: Dataset) -> None:
    table = clinic.shard_table(0)
    place = table.column_names.index("offset")
    moved = pa.array([value + 512 for value in table["offset"].to_pylist()])
    write_manifest(
        clinic.storage, manifest_path("clinic", 0), table.set_column(place, table.schema.field(place), moved)
    )
    criteria = Criteria()
    with pytest.raises(BuilderError, match="there is no image"):
        filter_dataset(clinic, criteria, judge_dataset(clinic, criteria), Dataset("kept", clinic.storage))


def test_filter_takes_the_lock_and_leaves_it_to_the_next(builder, clinic: Dataset) -> None:
    target = Dataset("kept", clinic.storage)
    with exclusive(target):
        criteria = Criteria()
        with pytest.raises(LockedError, match="another job is writing"):
            filter_dataset(clinic, criteria, judge_dataset(clinic, criteria), target)
        result = builder("filter", "clinic", "--name", "kept", "--no-gates")
        assert result.code == 2, result.output
    assert builder("filter", "clinic", "--name", "kept", "--no-gates").code == 0


def test_a_reference_that_an_earlier_kill_left_out_is_put_back(builder, clinic: Dataset) -> None:
    with_scores(clinic, {"ssim": [0.5] * 36})
    save_reference(clinic, made_up_reference())
    clinic.write_info({**clinic.info, "scores": {"version": VERSION}})
    line = ("filter", "clinic", "--name", "kept", "--no-gates")
    assert builder(*line).code == 0
    reference = Path(clinic.storage.path("manifests/kept/reference.json"))
    before = reference.read_bytes()
    reference.unlink()
    assert "reference.json is missing" in builder("verify", "kept").output
    assert "nothing to do" in builder(*line).output
    assert reference.read_bytes() == before
    flip(reference, len(before) // 2, 0)
    assert builder("verify", "kept").code != 0
    assert builder("verify", "kept", "--repair").code == 0
    assert reference.read_bytes() == before


# -- checkpoints and states -------------------------------------------------------------------------------------------


def test_every_damage_to_a_checkpoint_is_found(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    shutil.copytree(tiny_checkpoint, folder)
    assert verify_checkpoint(folder).findings == []
    files = files_of(folder)
    missed = []
    for path in files:
        before = path.read_bytes()
        for what, damage in damages(path, of_one_kind(path, files), seed=2, flips=2):
            damage()
            report = verify_checkpoint(folder)
            if not reads_the_same(path, before) and not report.findings and not report.notes:
                missed.append(f"{path.relative_to(folder)}: {what}")
            path.write_bytes(before)
    assert missed == []


def test_a_flipped_weight_is_refused_when_it_is_loaded(builder, tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    shutil.copytree(tiny_checkpoint, folder)
    weights = folder / "unet/diffusion_pytorch_model.safetensors"
    flip(weights, weights.stat().st_size - 5, 0)
    with pytest.raises(BuilderError, match="is damaged: its SHA-256"):
        load_pipeline(folder)
    assert "DAMAGED" in builder("checkpoint", "show", folder).output
    assert builder("checkpoint", "verify", folder).code == 1
    assert builder("checkpoint", "export", folder, "--to", tmp_path / "on").code == 2
    assert not (tmp_path / "on").exists()


@pytest.mark.parametrize("target", ["on", "on.safetensors"])
def test_a_checkpoint_is_exported_to_a_plain_name(builder, tiny_checkpoint: Path, tmp_path: Path, target: str) -> None:
    """Beside the working directory's other files: its lock has no folder in its path either."""
    result = builder("checkpoint", "export", tiny_checkpoint, "--to", target)
    assert result.code == 0, result.output
    assert [path.name for path in tmp_path.iterdir()] == [target]


def test_a_record_cannot_name_files_elsewhere(tiny_checkpoint: Path, tmp_path: Path) -> None:
    from builder.models.integrity import damaged_files

    recorded = {"../secret": {"bytes": 3, "sha256": "0" * 64}, "/etc/passwd": {"bytes": 3, "sha256": "0" * 64}}
    assert all("lies outside" in said for said in damaged_files(tmp_path, recorded))


class Counting:
    """What a resume state is loaded into."""

    name = "unet"

    def __init__(self) -> None:
        self.step = 0

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]


def test_a_damaged_state_is_told_by_its_name_and_the_one_before_is_taken(tmp_path: Path) -> None:
    states, stage = States(tmp_path, "me"), Counting()
    for step in (1, 2, 3):
        states.save("unet", step, {"step": step, "weights": torch.arange(100)})
    files = state_files(tmp_path, "unet")
    assert [path.name[:13] for path in files] == ["unet-00000002", "unet-00000003"]
    before = files[-1].read_bytes()
    for what, damage in damages(files[-1], [files[0]], seed=3, flips=8):
        damage()
        if files[-1].exists():
            assert state_damage(files[-1]), what
            with pytest.warns(UserWarning, match="going on from the state before"):
                assert states.restore(stage, torch.device("cpu"))
            assert stage.step == 2
        files[-1].write_bytes(before)
    for path in files:
        flip(path, 90, 1)
    with pytest.warns(UserWarning, match="going on"), pytest.raises(BuilderError, match="all states"):
        states.restore(stage, torch.device("cpu"))


def test_a_state_of_an_older_version_is_read(tmp_path: Path) -> None:
    identity = {"seed": 7}
    torch.save({"fingerprint": fingerprint(identity), "step": 7}, tmp_path / "unet-00000007.pt")
    stage = Counting()
    assert States(tmp_path, identity).restore(stage, torch.device("cpu"))
    assert stage.step == 7


# -- the patient key --------------------------------------------------------------------------------------------------


def test_every_flipped_bit_of_a_new_patient_key_is_found() -> None:
    secret = new_secret() + b"\n"
    assert sound_secret(secret, "here") == secret.strip()
    for place in range(len(secret)):
        for bit in range(8):
            hurt = bytearray(secret)
            hurt[place] ^= 1 << bit
            try:
                assert sound_secret(bytes(hurt), "here") == secret.strip()  # another white space at the end
            except BuilderError:
                continue

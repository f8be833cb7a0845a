"""Damaged shards are found, by every kind of damage, taken away and made again as they were."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

import pytest

from builder.job.pending import all_units
from builder.job.plan import Unit
from builder.shards.criteria import Criteria, Range
from builder.shards.dataset import Dataset, find_dataset
from builder.shards.filter import filter_dataset, judge_dataset
from builder.shards.storage import Storage
from builder.shards.verify import check_dataset, verify_dataset
from builder.shards.writer import manifest_path, tar_path, write_manifest
from tests.conftest import write_real
from tests.test_job import run, spec_of, tars

pytestmark = pytest.mark.usefixtures("references_once")


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[700] ^= 255
    path.write_bytes(bytes(data))


def of_another_run(path: Path) -> None:
    path.write_bytes(path.with_name("shard-000000.tar").read_bytes())


DAMAGES = {  # what, to the tar or the manifest, whether sizes and footers tell, what is said
    "truncated tar": (truncate, "tar", True, "bytes, where"),
    "flipped bytes": (flip, "tar", False, "SHA-256"),
    "missing tar": (Path.unlink, "tar", True, "missing, though manifest 1 names it"),
    "tar of another run": (of_another_run, "tar", True, "bytes, where"),
    "unreadable manifest": (truncate, "manifest", True, "cannot be read"),
    "missing manifest": (Path.unlink, "manifest", True, "images 8 to 10 of the plan are in no shard"),
}


@pytest.fixture(scope="module")
def job_once(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> Path:
    """A job of 11 images, then 20: its shards hold 8, 3, 8 and 1."""
    root = tmp_path_factory.mktemp("job")
    write_real(root, per_phase=12, size=24)
    for count in (11, 20):
        run(spec_of(root, root, tiny_checkpoint), count)
    return root


@pytest.fixture
def job(job_once: Path, tmp_path: Path) -> Dataset:
    shutil.copytree(job_once, tmp_path, dirs_exist_ok=True)
    return Dataset("tiny-IPR", Storage(tmp_path))


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found_and_by_repair_undone(builder, job: Dataset, damage: str) -> None:
    hurt, which, fast_sees, said = DAMAGES[damage]
    before = tars(job.storage.root)
    hurt(Path(job.storage.path((tar_path if which == "tar" else manifest_path)(job.name, 1))))
    fast = check_dataset(job, fast=True).findings
    assert bool(fast) == fast_sees
    whole = check_dataset(job)
    assert whole.findings
    assert any(said in finding for finding in (fast if fast_sees else whole.findings))
    assert set(whole.shards) <= {1}
    assert builder("verify", job.name).code == 1
    result = builder("verify", job.name, "--repair")
    assert result.code == 0, result.output
    assert "20 images in 4 shards, all as its manifests say" in result.output
    assert verify_dataset(job) == []
    assert job.info["state"] == "complete"
    assert tars(job.storage.root) == before  # the same bytes: same plan, same batches, same device


def test_several_shards_at_once_and_an_interrupted_repair(builder, job: Dataset, monkeypatch) -> None:
    before = tars(job.storage.root)
    for number in (0, 3):
        truncate(Path(job.storage.path(tar_path(job.name, number))))
    with monkeypatch.context() as patch:
        patch.setattr("builder.job.run.run_job", interrupted)
        assert builder("verify", job.name, "--repair").code == 130
    assert job.shard_numbers() == [1, 2]
    assert "not complete" in builder("verify", job.name).output
    assert builder("verify", job.name, "--repair").code == 0
    assert tars(job.storage.root) == before


def interrupted(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_without_its_checkpoint_nothing_is_removed(builder, job: Dataset) -> None:
    job.write_info(job.info | {"checkpoint": "gone"})
    flip(Path(job.storage.path(tar_path(job.name, 1))))
    assert builder("verify", job.name, "--repair").code == 2
    assert job.shard_numbers() == [0, 1, 2, 3]
    assert find_dataset(job.name, job.storage.root).name == job.name  # still complete


def test_what_no_job_made_is_left_alone_and_said_how_to_make_again(builder, clinic: Dataset) -> None:
    criteria = Criteria((Range("width", low=1),))
    for name, view in (("copied", False), ("seen", True)):
        filter_dataset(clinic, criteria, judge_dataset(clinic, criteria), Dataset(name, clinic.storage), view=view)
    truncate(Path(clinic.storage.path(tar_path("clinic", 1))))
    truncate(Path(clinic.storage.path(tar_path("copied", 0))))
    for name, remedy in (
        ("clinic", "`builder pack` with the options"), ("copied", "`builder filter clinic --name copied"),
        ("seen", "`builder verify clinic --repair`"),
    ):  # fmt: skip
        result = builder("verify", name, "--repair")
        assert result.code == 2, result.output
        assert remedy in result.output
        assert "Traceback" not in result.output
        assert find_dataset(name, clinic.storage.root).shard_numbers()


def test_a_doubled_key_is_named_once(clinic: Dataset) -> None:
    write_manifest(clinic.storage, manifest_path("clinic", 5), clinic.shard_table(0))
    report = check_dataset(clinic, fast=True)
    assert sum("stands in shard 0 and in shard 5" in line for line in report.findings) == 18
    assert set(report.shards) == {5}


def test_a_gap_is_filled_by_as_many_units_as_are_missing() -> None:
    def cut(units: list[Unit]) -> list[tuple[int, int]]:
        return [(unit.start, unit.stop) for unit in units]

    committed = [Unit(0, 0, 8), Unit(1, 8, 11), Unit(2, 11, 19), Unit(3, 19, 22), Unit(4, 22, 30)]
    for lost in range(1, 2**5):
        there = [unit for unit in committed if not lost >> unit.number & 1]
        units = all_units(there, 30, 8)
        assert all(unit in units for unit in there)
        assert [unit.number for unit in units] == list(range(len(units)))
        assert cut(units)[0][0] == 0
        assert all(one.stop == two.start for one, two in itertools.pairwise(units))
        assert units[-1].stop == 30
        assert all(0 < len(unit) <= 8 for unit in units)


def test_units_that_a_job_has_not_made_yet_are_no_damage(builder, job: Dataset) -> None:
    """Ranks make units in any order: until the dataset is complete, a gap says nothing."""
    Path(job.storage.path(manifest_path(job.name, 1))).unlink()
    assert any("in no shard" in finding for finding in verify_dataset(job))
    job.write_info(job.info | {"state": "partial"})
    assert verify_dataset(job) == []
    assert builder("verify", job.name, "--partial").code == 0

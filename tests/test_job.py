"""The batch job on a small model: same bytes however it is run, killed or extended; bad images never ship."""

from __future__ import annotations

import dataclasses
import hashlib
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from builder.config import Config, SampleConfig, ScoreConfig, ShardsConfig
from builder.errors import BuilderError
from builder.job.engines import local
from builder.job.pending import committed_units
from builder.job.plan import Plan, Unit
from builder.job.regenerate import Regenerator
from builder.job.run import Estimate, run_job
from builder.job.spec import JobSpec
from builder.models.checkpoint import read_checkpoint
from builder.sampling.sampler import Sampler
from builder.shards.dataset import Dataset
from builder.shards.lock import exclusive
from builder.shards.storage import Storage
from builder.shards.verify import verify_dataset
from builder.shards.writer import write_manifest

pytestmark = pytest.mark.usefixtures("references_once")

CONFIG = Config(
    name="tiny",
    sample=SampleConfig(size=16, steps=2, batch_size=4),
    score=ScoreConfig(ssim_size=64, panel=2),
    shards=ShardsConfig(images_per_shard=8),
)


@pytest.fixture
def spec(tmp_path: Path, real_root: Path, tiny_checkpoint: Path) -> JobSpec:
    return spec_of(tmp_path / "out", real_root, tiny_checkpoint)


def spec_of(out: Path, real_root: Path, checkpoint: Path, config: Config = CONFIG) -> JobSpec:
    return JobSpec(
        config=config, plan=Plan.of("IPR"), name="tiny-IPR", out=str(out), checkpoint=str(checkpoint),
        checkpoint_sha256=read_checkpoint(checkpoint).sha256, dtype="float32", real="clinic", real_out=str(real_root),
    )  # fmt: skip


def run(spec: JobSpec, count: int, engine: str = "inline", workers: int = 1) -> Any:
    lineage = dataclasses.asdict(read_checkpoint(Path(spec.checkpoint)).lineage)
    return run_job(
        spec, count, lineage=lineage, licence={"base": "none", "data": "CC0"},
        engine=engine, workers=workers, say=lambda _: None,
    )  # fmt: skip


def tars(out: str | Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(Path(out).glob("shards/*/*.tar"))
    }


def pixels(dataset: Dataset) -> dict[str, str]:
    table = dataset.table(["key", "sha256"])
    return dict(zip(table["key"].to_pylist(), table["sha256"].to_pylist(), strict=True))


def test_a_run_gives_a_complete_scored_verified_dataset(spec: JobSpec) -> None:
    outcome = run(spec, 20)
    dataset = outcome.dataset
    assert verify_dataset(dataset) == []
    table = dataset.table()
    assert table.num_rows == dataset.info["count"] == 20
    assert table["phase"].to_pylist() == list("IPR" * 7)[:20]
    assert all(-1 <= value <= 1 for name in ("ssim", "ssim_mean") for value in table[name].to_pylist())
    assert len(set(table["seed"].to_pylist())) == 20
    assert table["key"][3].as_py() == "tiny-IPR-I-00000001"
    assert dataset.info["lineage"]["patients"] == ["49" + f"{0:030x}"]
    assert {size[0] for size in table["original_size"].to_pylist()} <= {20, 30, 16, 40}


def test_two_runs_give_the_same_bytes_whatever_the_engine(spec: JobSpec, tmp_path: Path) -> None:
    run(spec, 20)
    other = dataclasses.replace(spec, out=str(tmp_path / "other"))
    run(other, 20, "local", 2)
    assert tars(spec.out) == tars(other.out)
    one, two = (Dataset("tiny-IPR", Storage(out)).table().drop_columns(["seconds"]) for out in (spec.out, other.out))
    assert one == two


def test_extension_keeps_the_first_shards_and_gives_the_pixels_of_one_run(spec: JobSpec, tmp_path: Path) -> None:
    run(spec, 11)
    before = {path: path.read_bytes() for path in Path(spec.out).rglob("shard-*")}
    outcome = run(spec, 30)
    assert all(path.read_bytes() == data for path, data in before.items())
    other = dataclasses.replace(spec, out=str(tmp_path / "other"))
    whole = run(other, 30)
    assert pixels(outcome.dataset) == pixels(whole.dataset)
    assert outcome.dataset.info["count"] == 30
    assert [len(unit) for unit in committed_units(outcome.dataset)] == [8, 3, 8, 8, 3]


def test_other_shard_sizes_give_the_same_seeds_keys_and_pixels(spec: JobSpec, tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, shards=ShardsConfig(images_per_shard=5))
    other = dataclasses.replace(spec, out=str(tmp_path / "other"), config=config)
    one, two = (run(s, 16).dataset.table(["key", "seed", "sha256"]) for s in (spec, other))
    assert one == two


def test_a_finished_run_again_does_nothing(spec: JobSpec) -> None:
    run(spec, 8)
    before = {path: path.stat().st_mtime_ns for path in Path(spec.out).rglob("*") if path.is_file()}
    assert run(spec, 8).made == 0
    assert run(spec, 5).made == 0
    after = {path: path.stat().st_mtime_ns for path in Path(spec.out).rglob("*") if path.is_file()}
    assert {p: t for p, t in after.items() if p.name != ".lock"} == {
        p: t for p, t in before.items() if p.name != ".lock"
    }


def test_a_changed_setting_is_refused_by_name(spec: JobSpec) -> None:
    run(spec, 4)
    sample = dataclasses.replace(CONFIG.sample, guidance=5.0)
    changed = dataclasses.replace(spec, config=dataclasses.replace(CONFIG, sample=sample))
    with pytest.raises(BuilderError, match=r"guidance: 3\.0 there, 5\.0 now"):
        run(changed, 4)
    with pytest.raises(BuilderError, match="weights"):
        run(dataclasses.replace(spec, plan=Plan.of("IPR", {"R": 2})), 4)


def test_a_missing_shard_in_the_middle_is_made_again(spec: JobSpec) -> None:
    run(spec, 20)
    whole = tars(spec.out)
    dataset = Dataset("tiny-IPR", Storage(spec.out))
    dataset.storage.remove("manifests/tiny-IPR/shard-000001.parquet")
    dataset.write_info(dataset.info | {"state": "partial"})
    run(spec, 20)
    assert tars(spec.out) == whole
    assert verify_dataset(dataset) == []


def test_regenerate_agrees_and_says_by_how_much_when_it_does_not(spec: JobSpec) -> None:
    dataset = run(spec, 10).dataset
    regenerator = Regenerator(dataset)
    for key in dataset.table(["key"])["key"].to_pylist():
        assert regenerator.compare(key).identical
    path = "manifests/tiny-IPR/shard-000000.parquet"
    table = dataset.shard_table(0)
    rows = table.to_pylist()
    rows[0]["reserve"], rows[0]["device"] = 1, "another machine"
    write_manifest(dataset.storage, path, table.from_pylist(rows, schema=table.schema))
    comparison = regenerator.compare(rows[0]["key"])
    assert not comparison.identical
    assert comparison.max_difference > 0
    assert "another machine" in comparison.differences[0]
    with pytest.raises(BuilderError, match="no image 'nothing'"):
        regenerator.compare("nothing")


def test_regenerate_refuses_other_weights(spec: JobSpec, tmp_path: Path) -> None:
    from builder.models.checkpoint import Checkpoint, save_checkpoint
    from builder.models.sdxl import build
    from tests.test_models import ARCHITECTURE

    dataset = run(spec, 4).dataset
    other = tmp_path / "other-weights"
    save_checkpoint(build(ARCHITECTURE, 16, 1), Checkpoint(other))
    with pytest.raises(BuilderError, match="not those that made"):
        Regenerator(dataset, str(other))


# -- bad images --------------------------------------------------------------------------------


def spoil(monkeypatch: pytest.MonkeyPatch, is_spoilt) -> list[tuple[int, bool]]:
    """Make the sampler call images bad (and black) where `is_spoilt(seed, precise)` says so."""
    generate = Sampler.generate
    calls: list[tuple[int, bool]] = []

    def spoilt(self: Sampler, requests, precise: bool = False, micro_batch: int | None = None):
        batch = generate(self, requests, precise, micro_batch)
        calls.extend((request.seed, precise) for request in requests)
        for i, request in enumerate(requests):
            if is_spoilt(request.seed, precise):
                batch.pixels[i] = 0
                batch.bad[i] = True
        return batch

    monkeypatch.setattr(Sampler, "generate", spoilt)
    return calls


def planned_seed(spec: JobSpec, position: int, reserve: int = 0) -> int:
    from builder.sampling.seeds import seed_of

    code, index = spec.plan.at(position, position + 1)[0]
    return seed_of(spec.config.seed, spec.config.classes.label(code), index, reserve)


def test_a_bad_image_is_tried_in_higher_precision(spec: JobSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = planned_seed(spec, 2)
    spoil(monkeypatch, lambda seed, precise: seed == bad and not precise)
    rows = run(spec, 4).dataset.table().to_pylist()
    assert [row["dtype"] for row in rows] == ["float32", "float32", "float64", "float32"]
    assert [row["reserve"] for row in rows] == [0, 0, 0, 0]


def test_an_image_that_stays_bad_is_replaced_counted_recorded_and_replayable(
    spec: JobSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = planned_seed(spec, 5)
    spoil(monkeypatch, lambda seed, precise: seed == bad)
    outcome = run(spec, 8)
    row = outcome.dataset.table().to_pylist()[5]
    assert outcome.replaced == 1
    assert row["reserve"] == 1
    assert row["seed"] == planned_seed(spec, 5, reserve=1)
    assert outcome.dataset.pixels(row).max() > 0
    assert Regenerator(outcome.dataset).compare(row["key"]).identical


def test_only_bad_images_end_the_run_with_a_reason_and_no_shard(spec: JobSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, lambda seed, precise: True)
    with pytest.raises(BuilderError, match=r"I-00000000 came out black or not finite"):
        run(spec, 4)
    assert Dataset("tiny-IPR", Storage(spec.out)).shard_numbers() == []


# -- faults --------------------------------------------------------------------------------


def test_a_shard_that_cannot_be_written_ends_the_run_and_the_next_continues(spec: JobSpec) -> None:
    """The tar of unit 1 cannot be renamed into place: a folder stands there."""
    (Path(spec.out) / "shards/tiny-IPR/shard-000001.tar").mkdir(parents=True)
    with pytest.raises(BuilderError, match="shard 1 of 'tiny-IPR' cannot be written"):
        run(spec, 24)
    assert committed_units(Dataset("tiny-IPR", Storage(spec.out)))[-1].number == 0
    (Path(spec.out) / "shards/tiny-IPR/shard-000001.tar").rmdir()
    assert run(spec, 24).images == 24


def test_a_killed_worker_is_replaced(spec: JobSpec, tmp_path: Path) -> None:
    """A worker is killed with signal 9 as soon as it lives; its unit is made by another, the bytes are the same."""
    killed = []

    def kill_one() -> None:
        for _ in range(600):
            time.sleep(0.05)
            children = multiprocessing.active_children()
            if children:
                killed.append(children[0].pid)
                os.kill(children[0].pid or 0, signal.SIGKILL)
                return

    import threading

    thread = threading.Thread(target=kill_one)
    thread.start()
    outcome = run(spec, 20, "local", 2)
    thread.join()
    assert len(killed) == 1
    assert outcome.failed == {}
    other = dataclasses.replace(spec, out=str(tmp_path / "other"))
    run(other, 20)
    assert tars(spec.out) == tars(other.out)


ORPHANS = """
import multiprocessing, pickle, sys, threading, time
from builder.job.engines import local
from builder.job.plan import Unit

def report():
    while len(children := multiprocessing.active_children()) < 2:
        time.sleep(0.01)
    print(*(child.pid for child in children), flush=True)

def for_ever(spec, device):
    time.sleep(3600)

if __name__ == "__main__":
    with open(sys.argv[1], "rb") as file:
        spec = pickle.load(file)
    threading.Thread(target=report, daemon=True).start()
    local.run(spec, [Unit(0, 0, 8), Unit(1, 8, 16)], 2, None, load=for_ever)
"""


def test_workers_leave_when_their_parent_is_killed(spec: JobSpec, tmp_path: Path) -> None:
    (tmp_path / "orphans.py").write_text(ORPHANS)
    (tmp_path / "spec.pickle").write_bytes(pickle.dumps(spec))
    job = subprocess.Popen(
        [sys.executable, str(tmp_path / "orphans.py"), str(tmp_path / "spec.pickle")],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    assert job.stdout
    workers = [int(word) for word in job.stdout.readline().split()]
    assert len(workers) == 2
    job.kill()
    job.wait()
    for _ in range(1200):
        if not any(alive(pid) for pid in workers):
            return
        time.sleep(0.05)
    for pid in workers:
        os.kill(pid, signal.SIGKILL)
    raise AssertionError("a worker outlived its parent")


def alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False


class Silent:
    """A report to nobody."""

    def batch(self, images: int) -> None: ...

    def done(self, unit: Unit, replaced: int) -> None: ...

    def failed(self, unit: Unit, reason: str) -> None: ...


def test_workers_that_cannot_load_end_the_run_and_the_log_says_why(spec: JobSpec, caplog) -> None:
    broken: Any = dataclasses.replace(spec, checkpoint=None)  # a fault that no BuilderError foresees
    with pytest.raises(BuilderError, match="workers die while loading"):
        local.run(broken, [Unit(0, 0, 4)], 1, Silent())
    assert caplog.text.count("worker 0 cannot load") == local.MAX_FAILURES
    assert "TypeError" in caplog.text


def test_what_a_killed_run_was_writing_is_swept_away(spec: JobSpec) -> None:
    half = Path(spec.out) / "shards/tiny-IPR/.tmp-half"
    half.parent.mkdir(parents=True)
    half.write_bytes(b"half a tar")
    run(spec, 4)
    assert not half.exists()


def test_a_manifest_that_is_damaged_or_no_jobs_is_refused_by_name(spec: JobSpec) -> None:
    dataset = run(spec, 16).dataset
    second = Path(dataset.storage.path("manifests/tiny-IPR/shard-000001.parquet"))
    whole = second.read_bytes()
    second.write_bytes(whole[:-30])
    with pytest.raises(BuilderError, match=r"shard-000001\.parquet cannot be read") as refused:
        run(spec, 24)
    assert "remove this file" in refused.value.remedy
    second.unlink()
    run(spec, 16)
    assert verify_dataset(dataset) == []
    write_manifest(
        dataset.storage, "manifests/tiny-IPR/shard-000002.parquet", dataset.shard_table(0).replace_schema_metadata({})
    )
    with pytest.raises(BuilderError, match="not written by a batch job"):
        run(spec, 24)


def test_two_jobs_on_one_dataset_are_refused(spec: JobSpec) -> None:
    with exclusive(Dataset(spec.name, Storage(spec.out))), pytest.raises(BuilderError, match="another job is writing"):
        run(spec, 4)


def test_zero_images_and_a_real_datasets_name_are_refused(spec: JobSpec, real_root: Path) -> None:
    with pytest.raises(BuilderError, match="COUNT is 0"):
        run(spec, 0)
    with pytest.raises(BuilderError, match="no batch job made"):
        run(dataclasses.replace(spec, name="clinic", out=str(real_root)), 4)
    with pytest.raises(BuilderError, match="unknown engine"):
        run(spec, 4, engine="locale")


def test_the_estimate_leaves_loading_out_and_is_said_once() -> None:
    estimate = Estimate(pending=7200, first=2)
    said = [estimate.batch(20, now) for now in (100.0, 110.0, 120.0, 130.0)]
    assert said[0] is said[1] is said[3] is None
    assert said[2] == "estimate: 7,200 images at 2.0 images/s take 1:00:00"

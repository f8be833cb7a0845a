"""The same bytes from every engine, on a small model: local, ranks, Ray; killed in one, continued in another."""

from __future__ import annotations

import dataclasses
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from builder.config import ShardsConfig
from builder.errors import BuilderError
from builder.job.engines import ray as ray_engine
from builder.job.plan import Unit
from builder.job.spec import JobSpec
from builder.job.status import job_status
from builder.shards.dataset import Dataset
from builder.shards.storage import Storage
from builder.shards.verify import verify_dataset
from tests import makers
from tests.conftest import write_real
from tests.launched import Launched
from tests.makers import actor_number, units_of
from tests.test_job import run, spec_of, tars
from tests.test_ranks import Heard

pytestmark = pytest.mark.usefixtures("references_once")

COUNT = 20  # images: three units


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> JobSpec:
    """A run in one process, whose bytes all others must have."""
    root = tmp_path_factory.mktemp("engines")
    write_real(root / "real", per_phase=6, size=24)
    spec = spec_of(root / "one", root / "real", tiny_checkpoint)
    run(spec, COUNT)
    return spec


@pytest.fixture
def spec(made: JobSpec, tmp_path: Path) -> JobSpec:
    return dataclasses.replace(made, out=str(tmp_path / "out"))


def start(
    spec: JobSpec, environ: dict[str, str], engine: str = "auto", count: int = COUNT, grace: float = 30, where: str = ""
) -> Launched:
    return Launched(spec, environ, engine, count, grace=grace, where=where)


def torchrun(rank: int, world: int) -> dict[str, str]:
    return {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}


def array(task: int, tasks: int) -> dict[str, str]:
    return {
        "SLURM_ARRAY_TASK_ID": str(task + 1), "SLURM_ARRAY_TASK_COUNT": str(tasks), "SLURM_ARRAY_TASK_MIN": "1",
        "SLURM_ARRAY_TASK_STEP": "1",
    }  # fmt: skip


def ended(jobs: list[Launched]) -> None:
    for job in jobs:
        assert job.exit_code() == 0, job.last_words()


def same(spec: JobSpec, made: JobSpec) -> None:
    """The dataset is whole and has the bytes, and but for the time spent the rows, of the run in one process."""
    assert tars(spec.out) == tars(made.out)
    dataset = spec.dataset
    assert dataset.info["state"] == "complete"
    assert verify_dataset(dataset) == []
    one, two = (each.table().drop_columns(["seconds"]) for each in (made.dataset, dataset))
    assert one == two
    assert "planned" not in dataset.info


@pytest.mark.parametrize("launcher", [torchrun, array], ids=["torchrun", "SLURM array"])
def test_launched_ranks_give_the_bytes_of_one_process(
    spec: JobSpec, made: JobSpec, launcher: Callable[[int, int], dict[str, str]]
) -> None:
    world = 2 if launcher is torchrun else 3
    ended([start(spec, launcher(rank, world)) for rank in range(world)])
    same(spec, made)
    assert spec.dataset.storage.list(f"manifests/{spec.name}/job/claims") == []
    assert spec.dataset.storage.list(f"manifests/{spec.name}/job/staged") == []


def test_ranks_go_through_the_rounds_of_until_accepted_together(spec: JobSpec, tmp_path: Path) -> None:
    """Which images are accepted, and how far the plan goes for them, is the same from ranks and from one process."""
    where = "index % 3 = 0 or (\"index\" % 2 = 0 and phase <> 'P')"
    spec = dataclasses.replace(spec, config=dataclasses.replace(spec.config, shards=ShardsConfig(images_per_shard=4)))
    alone = dataclasses.replace(spec, out=str(tmp_path / "alone"))
    ended([start(alone, {}, "inline", 12, where=where)])
    ended([start(spec, torchrun(rank, 2), count=12, where=where) for rank in range(2)])
    assert tars(spec.out) == tars(alone.out)
    one, two = (Dataset(f"{each.name}-accepted", Storage(each.out)) for each in (alone, spec))
    assert one.info["state"] == two.info["state"] == "complete" and verify_dataset(two) == []
    assert one.table(["key"]) == two.table(["key"]) and one.table(["key"]).num_rows == 12
    assert spec.dataset.info["state"] == "complete" and spec.dataset.info["count"] == alone.dataset.info["count"]


def test_killed_in_one_engine_and_continued_by_another(spec: JobSpec, made: JobSpec) -> None:
    """A rank of two is killed in the middle; its peer never comes; the same command continues with local workers."""
    job = start(spec, torchrun(0, 2))
    try:
        for _ in range(6000):
            if spec.dataset.shard_numbers() or not job.process.is_alive():
                break
            time.sleep(0.02)
    finally:
        job.process.kill()
    assert job.exit_code() == -signal.SIGKILL, job.last_words()
    status = job_status(spec.dataset)
    assert not status.complete
    assert (status.units, status.images, status.failed) == (3, COUNT, {})
    assert 1 <= status.done < 3
    assert [worker.alive for worker in status.workers] == [False]
    run(spec, COUNT, "local", 1)
    same(spec, made)
    assert job_status(spec.dataset).complete


def test_sigterm_ends_a_rank_after_its_unit_with_143(spec: JobSpec, made: JobSpec) -> None:
    job = start(spec, torchrun(0, 2), grace=600)
    while "images on" not in job.hear():  # the plan is said: the first unit comes next
        pass
    job.process.terminate()
    assert job.exit_code() == 143, job.last_words()
    assert spec.dataset.storage.list(f"manifests/{spec.name}/job/claims") == []
    assert all(sign.left for sign in _signs(spec))
    ended([start(spec, {}, "inline")])
    same(spec, made)


def _signs(spec: JobSpec) -> list[Any]:
    from builder.job.presence import signs

    return list(signs(spec.dataset).values())


def test_a_job_that_wants_the_dataset_alone_is_refused_while_ranks_are_at_it_and_the_reverse(spec: JobSpec) -> None:
    from builder.shards.lock import exclusive, shared

    with shared(spec.dataset), pytest.raises(BuilderError, match="another job is writing"):
        run(spec, COUNT)
    with exclusive(spec.dataset), pytest.raises(BuilderError, match="another job is writing"):
        run(spec, COUNT, "ranks")


# -- Ray --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_worker_register_timeout_seconds", "600")  # a busy machine takes its time
        patch.setattr(ray_engine, "LOOK", 0.25)
        ray = pytest.importorskip("ray")
        from ray.cluster_utils import Cluster

        before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        found = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        found.add_node(num_cpus=1)
        for number, handler in before.items():  # Ray puts its own there, which other tests would meet
            signal.signal(number, handler)
        yield found
        ray.shutdown()
        found.shutdown()
        for number, handler in before.items():
            signal.signal(number, handler)


def test_ray_gives_the_bytes_of_one_process(cluster: Any, spec: JobSpec, made: JobSpec) -> None:
    from builder.job.run import run_job

    outcome = run_job(
        spec, COUNT, lineage={}, licence={}, engine="ray", workers=0, say=lambda _: None, address=cluster.address
    )
    assert outcome.failed == {}
    same(spec, made)


def test_ray_survives_a_lost_node_and_takes_in_a_new_one(cluster: Any, spec: JobSpec) -> None:
    changes: list[str] = []

    class Disturbing(Heard):
        """Removes a node after the third unit, and adds one after the sixth."""

        def done(self, unit: Unit, replaced: int) -> None:
            super().done(unit, replaced)
            if len(self.made) == 3:
                changes.append("removed")
                cluster.remove_node(cluster.worker_nodes.copy().pop(), allow_graceful=False)
            if len(self.made) == 6:
                changes.append("added")
                cluster.add_node(num_cpus=1)

    report: Any = Disturbing()
    ray_engine.run(spec, units_of(24), 0, report, address=cluster.address, load=makers.waits_for_a_third)
    assert changes == ["removed", "added"]
    assert sorted(report.made) == spec.dataset.shard_numbers() == list(range(24))
    assert report.given_up == {}
    assert any(actor_number(sign.label) >= 2 and sign.units for sign in _signs(spec)), "the new node worked, too"


def test_ray_gives_up_what_fails_or_kills_three_times_and_goes_on(cluster: Any, spec: JobSpec) -> None:
    report: Any = Heard()
    ray_engine.run(spec, units_of(4), 1, report, address=cluster.address, load=makers.fails_or_dies)
    assert spec.dataset.shard_numbers() == [0, 3]
    assert "cursed" in report.given_up[1]
    assert sorted(report.given_up) == [1, 2]


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "nowhere.invalid:6379"])
def test_a_cluster_that_does_not_answer_is_named(spec: JobSpec, address: str) -> None:
    pytest.importorskip("ray")
    with pytest.raises(BuilderError, match="no Ray cluster answers") as refused:
        ray_engine.run(spec, [], 0, Heard(), address=address)  # type: ignore[arg-type]
    assert "ray start --head" in refused.value.remedy


def test_without_ray_the_remedy_is_named(spec: JobSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(BuilderError, match="Ray is not installed") as refused:
        run(spec, COUNT, "ray")
    assert "builder[ray]" in refused.value.remedy
    assert not Path(spec.out).exists(), "said before anything is made"


# -- status --------------------------------------------------------------------------------


def test_status_says_done_failed_pending_and_who_works(
    builder: Callable[..., Any], made: JobSpec, tmp_path: Path
) -> None:
    from builder.job.failures import Failures
    from builder.job.presence import Presence

    result = builder("status", made.name, "--out", made.out)
    assert result.code == 0
    assert f"complete: 3 of 3 units ({COUNT} of {COUNT} images), 0 failed, 0 in hand, 0 pending" in result.output
    dataset = Dataset(made.name, Storage(tmp_path))
    dataset.write_info(made.dataset.info | {"state": "partial", "planned": 80})
    result = builder("status", made.name)
    assert "0 of 10 units (0 of 80 images), 0 failed, 0 in hand, 10 pending" in result.output
    assert "nobody is at work" in result.output
    Failures(dataset).record(Unit(4, 32, 40), "Traceback:\nRuntimeError: cursed\n")
    with (
        Presence(dataset, "rank 1 of 2", "cpu", beat=0.05) as presence,
        presence.making(Unit(2, 16, 24), lambda images: None) as on_batch,
    ):
        on_batch(30)
        time.sleep(0.3)
        result = builder("status", made.name)
    assert "1 failed, 1 in hand, 8 pending" in result.output
    assert "unit 4 failed: RuntimeError: cursed" in result.output
    assert "rank 1 of 2" in result.output and "images/s together; about 0:00:" in result.output
    result = builder("status", made.name)
    assert "left" in result.output and "nobody is at work" in result.output
    result = builder("status", "nothing")
    assert result.code == 2 and "there is no dataset 'nothing'" in result.output

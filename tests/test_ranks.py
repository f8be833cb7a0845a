"""Ranks that share a dataset: place, claims, signs of life, who makes what, deaths and failures; without any model."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builder.config import Config
from builder.errors import BuilderError, Terminated
from builder.job import stopping
from builder.job.claims import Claims
from builder.job.crew import Together
from builder.job.engines import engine_name, inline, local, ranks
from builder.job.failures import MAX_FAILURES, Failures
from builder.job.launch import Place, place_of
from builder.job.plan import Plan, Unit
from builder.job.presence import Presence, Watch, died_here, process_name, read_sign, signs
from builder.job.spec import JobSpec
from builder.shards.writer import manifest_path
from tests import makers
from tests.makers import Maker, units_of

SILENCE = 0.3  # s after which a worker is taken for dead here
POLL = 0.02


@pytest.fixture
def spec(tmp_path: Path) -> JobSpec:
    return JobSpec(
        config=Config(), plan=Plan.of("IPR"), name="x", out=str(tmp_path), checkpoint="none", checkpoint_sha256="",
        dtype="float32", real=None, real_out="",
    )  # fmt: skip


class Heard:
    """A report that remembers."""

    def __init__(self) -> None:
        self.images = 0
        self.made: list[int] = []
        self.others: list[int] = []
        self.given_up: dict[int, str] = {}

    def batch(self, images: int) -> None:
        self.images += images

    def done(self, unit: Unit, replaced: int) -> None:
        self.made.append(unit.number)

    def failed(self, unit: Unit, reason: str) -> None:
        self.given_up[unit.number] = reason

    def elsewhere(self, unit: Unit) -> None:
        self.others.append(unit.number)


def nothing(unit: Unit) -> None: ...


def crew(spec: JobSpec, presence: Presence, rank: int = 0, world: int = 1, silence: float = SILENCE) -> Together:
    claims = Claims(spec.dataset, presence, silence)
    return Together(spec.dataset, Place(rank, world), presence, claims, POLL)


def run_rank(
    spec: JobSpec, count: int, rank: int = 0, world: int = 1, before: Callable[[Unit], None] = nothing
) -> Heard:  # fmt: skip
    report = Heard()
    with Presence(spec.dataset, f"rank {rank}", beat=SILENCE / 6) as presence:
        together = crew(spec, presence, rank, world)
        failures = Failures(spec.dataset)
        ranks.run(
            spec, units_of(count), Recorded(report, failures), together, failures,
            load=lambda spec, device: Maker(spec, before),
        )  # fmt: skip
    return report


class Recorded:
    """As the job's own report: failures are also recorded in the dataset."""

    def __init__(self, report: Heard, failures: Failures) -> None:
        self.batch, self.done, self.elsewhere = report.batch, report.done, report.elsewhere
        self._report, self._failures = report, failures

    def failed(self, unit: Unit, reason: str) -> None:
        self._report.failed(unit, reason)
        self._failures.record(unit, reason)


def there(spec: JobSpec) -> list[int]:
    return spec.dataset.shard_numbers()


# -- place --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environ", "place"),
    [
        ({}, (0, 1, 0)),
        ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, (3, 8, 1)),
        ({"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_COUNT": "3", "SLURM_ARRAY_TASK_MIN": "5"}, (2, 3, 0)),
        (
            {
                "SLURM_ARRAY_TASK_ID": "9", "SLURM_ARRAY_TASK_COUNT": "3", "SLURM_ARRAY_TASK_MIN": "1",
                "SLURM_ARRAY_TASK_STEP": "4",
            },
            (2, 3, 0),
        ),
        ({"SLURM_PROCID": "5", "SLURM_NTASKS": "16", "SLURM_LOCALID": "5"}, (5, 16, 5)),
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "16", "SLURM_STEP_NUM_TASKS": "2"}, (1, 2, 0)),
        (
            {
                "RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "SLURM_PROCID": "0", "SLURM_NTASKS": "1",
                "SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_TASK_COUNT": "3", "SLURM_ARRAY_TASK_MIN": "0",
            },
            (9, 12, 1),
        ),
    ],
    ids=["none", "torchrun", "array", "array in steps", "srun", "srun of a step", "torchrun in an array"],
)  # fmt: skip
def test_the_place_of_a_process_is_read_off_its_launcher(environ: dict[str, str], place: tuple[int, ...]) -> None:
    found = place_of(environ)
    assert (found.rank, found.world, found.local) == place


@pytest.mark.parametrize(
    "environ", [{"RANK": "x", "WORLD_SIZE": "2"}, {"RANK": "2", "WORLD_SIZE": "2"}, {"RANK": "-1", "WORLD_SIZE": "2"}]
)
def test_a_launcher_that_makes_no_sense_is_refused(environ: dict[str, str]) -> None:
    with pytest.raises(BuilderError, match=r"RANK is 'x'|rank (2|-1) of 2"):
        place_of(environ)


def test_the_launcher_chooses_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    assert engine_name("auto") == "local"
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert engine_name("auto") == "local"
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert engine_name("auto") == "ranks"
    assert engine_name("local") == "local"


@given(world=st.integers(1, 9), count=st.integers(0, 40), left=st.sets(st.integers(0, 39)))
def test_each_unit_is_owned_once_and_ownership_is_of_the_full_plan(world: int, count: int, left: set[int]) -> None:
    units = [unit for unit in units_of(count) if unit.number in left]
    owned = []
    for rank in range(world):
        order = ranks.in_order(units, rank, world)
        assert sorted(unit.number for unit in order) == [unit.number for unit in units]
        own = [unit.number for unit in order if unit.number % world == rank]
        assert [unit.number for unit in order][: len(own)] == own
        owned += own
    assert sorted(owned) == [unit.number for unit in units]


# -- signs of life and claims --------------------------------------------------------------


def test_a_claim_is_one_ranks_until_it_is_released(spec: JobSpec) -> None:
    with Presence(spec.dataset, "a") as a, Presence(spec.dataset, "b") as b:
        one, two = crew(spec, a).claims, crew(spec, b).claims
        assert one.take("u") is not None
        assert two.take("u") is None
        two.release("u")  # not its own
        assert two.take("u") is None
        one.release("u")
        assert two.take("u") is not None


@pytest.mark.parametrize("skew", [-1e6, 0, 1e6])
def test_a_silent_owner_loses_its_claim_whatever_the_clocks_say(
    spec: JobSpec, monkeypatch: pytest.MonkeyPatch, skew: float
) -> None:
    """The owner is on another machine: nothing is known of it but its file; wall clocks may be off by days."""
    with Presence(spec.dataset, "owner", beat=60) as owner, Presence(spec.dataset, "watcher") as watcher:
        owner.sign.process = "another-machine/1@1"
        owner._write()
        theirs = crew(spec, owner).claims
        assert theirs.take("u") is not None
        now = time.time()
        monkeypatch.setattr(time, "time", lambda: now + skew)
        path = spec.dataset.storage.path(f"manifests/x/job/workers/{owner.id}.json")
        os.utime(path, (now + skew, now + skew))
        claims = crew(spec, watcher).claims
        assert claims.take("u") is None
        time.sleep(SILENCE * 1.5)
        owner._write()  # a sign just in time
        assert claims.take("u") is None
        time.sleep(SILENCE * 1.5)
        taken = claims.take("u")
        assert taken is not None
        theirs.release("u")  # the owner wakes up: the claim is not its own any more
        assert json.loads(spec.dataset.storage.read("manifests/x/job/claims/u.json"))["owner"] == watcher.id


def test_a_worker_that_died_here_is_known_at_once(spec: JobSpec) -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    name = process_name(child.pid)
    assert name is not None
    assert not died_here(name)
    child.kill()
    child.wait()
    assert died_here(name)
    assert not died_here("another-machine/1@1")
    assert died_here(name.rpartition("/")[0] + f"/{os.getpid()}@1"), "the number of a dead process was given again"


def test_one_of_many_ranks_gets_an_expired_claim(spec: JobSpec) -> None:
    with Presence(spec.dataset, "dead") as dead:
        assert crew(spec, dead).claims.take("u") is not None
    presences = [Presence(spec.dataset, f"rank {i}") for i in range(4)]
    got = []
    for presence in presences:
        with presence:
            if (claim := crew(spec, presence).claims.take("u")) is not None:
                got.append(claim)
                break
    assert len(got) == 1


def test_a_worker_that_is_stuck_in_a_unit_loses_its_claim_though_its_process_lives(spec: JobSpec) -> None:
    with Presence(spec.dataset, "stuck", beat=0.02, stuck=0.1) as stuck, Presence(spec.dataset, "peer") as peer:
        theirs, claims = crew(spec, stuck).claims, crew(spec, peer).claims
        assert theirs.take("u") is not None
        with stuck.making(Unit(0, 0, 1), lambda images: None) as on_batch:
            for _ in range(10):  # slow, but it goes on
                on_batch(1)
                time.sleep(SILENCE / 6)
                assert claims.take("u") is None
            for _ in range(100):
                time.sleep(SILENCE / 6)
                if claims.take("u") is not None:
                    return
    raise AssertionError("the claim never expired")


def test_a_damaged_claim_or_sign_is_no_hindrance(spec: JobSpec) -> None:
    spec.dataset.storage.write("manifests/x/job/claims/u.json", b"{")
    spec.dataset.storage.write("manifests/x/job/workers/torn.json", b"[]")
    spec.dataset.storage.write("manifests/x/job/workers/other.json", b'{"what": 1}')
    with Presence(spec.dataset, "a") as presence:
        assert crew(spec, presence).claims.take("u") is not None
        assert list(signs(spec.dataset)) == [presence.id]
        assert Watch(spec.dataset).gone("torn")


def make_badly(presence: Presence) -> None:
    with presence.making(Unit(4, 1, 2), lambda images: None) as on_batch:
        on_batch(5)
        raise RuntimeError("cursed")


def test_a_sign_counts_what_was_committed_only(spec: JobSpec) -> None:
    with Presence(spec.dataset, "a", "cpu") as presence:
        with presence.making(Unit(3, 0, 1), lambda images: None) as on_batch:
            on_batch(5)
            assert presence.sign.unit == 3
        with pytest.raises(RuntimeError, match="cursed"):
            make_badly(presence)
    sign = read_sign(spec.dataset, presence.id)
    assert sign is not None
    assert (sign.units, sign.images, sign.unit, sign.left, sign.device) == (1, 5, None, True, "cpu")
    assert sign.seconds > 0


# -- ranks --------------------------------------------------------------------------------


def test_a_rank_alone_makes_all_of_the_plan_its_own_units_first(spec: JobSpec) -> None:
    report = run_rank(spec, 7, rank=1, world=3)
    assert report.made == [1, 4, 6, 5, 3, 2, 0]
    assert report.images == 7
    assert there(spec) == list(range(7))
    assert spec.dataset.storage.list("manifests/x/job/claims") == []


def test_ranks_at_once_make_each_unit_once(spec: JobSpec) -> None:
    made: Counter[int] = Counter()
    reports = at_once(spec, 12, 3, lambda unit: (made.update([unit.number]), time.sleep(0.02))[0])
    assert made == Counter(range(12))
    assert sorted(number for report in reports for number in report.made) == list(range(12))
    assert all(sorted(report.made + report.others) == list(range(12)) for report in reports)


def at_once(spec: JobSpec, count: int, world: int, before: Callable[[Unit], None]) -> list[Heard]:
    reports: dict[int, Heard] = {}

    def rank(number: int) -> None:
        reports[number] = run_rank(spec, count, number, world, before)

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "a rank hangs"
    return [reports[number] for number in sorted(reports)]


def test_a_unit_that_a_dead_rank_holds_is_made_by_another(spec: JobSpec) -> None:
    """The dead one is on another machine, so that only its silence tells."""
    with Presence(spec.dataset, "dead", beat=1e6) as dead:
        dead.sign.process = "another-machine/1@1"
        dead._write()
        assert crew(spec, dead).claims.take("shard-000002") is not None
        report = run_rank(spec, 4, rank=0, world=2)
    assert report.made == [0, 3, 1, 2], "the held one last, when its owner has been silent for long"
    assert there(spec) == [0, 1, 2, 3]


def test_a_unit_that_kills_worker_after_worker_is_given_up(spec: JobSpec) -> None:
    """Ranks that were all there from the start take the unit one after the other, and die holding it."""
    with Presence(spec.dataset, "last", beat=SILENCE / 6) as presence:
        last = crew(spec, presence)
        doomed = [Presence(spec.dataset, f"rank {number}") for number in range(MAX_FAILURES)]
        claims = [crew(spec, one).claims for one in doomed]
        for number in range(MAX_FAILURES):
            with doomed[number]:  # and it leaves without a release, as a death does
                taken = claims[number].take("shard-000001")
                assert taken is not None and taken.tries == number + 1
        report, failures = Heard(), Failures(spec.dataset)
        ranks.run(
            spec, units_of(3), Recorded(report, failures), last, failures,
            load=lambda spec, device: Maker(spec, nothing),
        )  # fmt: skip
    assert there(spec) == [0, 2]
    assert report.given_up == {1: "3 workers died while they made it"}
    assert run_rank(spec, 3).made == [1], "the next run tries it once more"


def test_a_unit_that_fails_three_times_is_given_up_recorded_and_tried_again_next_time(spec: JobSpec) -> None:
    tries: Counter[int] = Counter()

    def broken(unit: Unit) -> None:
        tries[unit.number] += 1
        if unit.number == 2:
            raise RuntimeError("this one is cursed")

    report = run_rank(spec, 5, before=broken)
    assert there(spec) == [0, 1, 3, 4]
    assert tries[2] == MAX_FAILURES
    assert "this one is cursed" in report.given_up[2]
    assert report.images == 4, "images of a failed unit are taken back"
    assert "cursed" in Failures(spec.dataset).all()[2]
    assert run_rank(spec, 5).made == [2]


def test_what_one_rank_gave_up_the_others_do_not_try(spec: JobSpec) -> None:
    tries: Counter[int] = Counter()

    def broken(unit: Unit) -> None:
        tries[unit.number] += 1
        if unit.number == 1:
            raise RuntimeError("cursed")
        time.sleep(0.02)

    reports = at_once(spec, 6, 2, broken)
    assert there(spec) == [0, 2, 3, 4, 5]
    assert all(list(report.given_up) == [1] for report in reports), "every rank ends with the failure"
    assert MAX_FAILURES <= tries[1] < 2 * MAX_FAILURES


def test_a_builder_error_ends_a_rank_and_its_claim(spec: JobSpec) -> None:
    def full(unit: Unit) -> None:
        raise BuilderError("the disk is full")

    with pytest.raises(BuilderError, match="disk is full"):
        run_rank(spec, 3, before=full)
    assert spec.dataset.storage.list("manifests/x/job/claims") == []


def test_once_is_run_by_one_and_taken_over_when_that_one_dies(spec: JobSpec) -> None:
    done: list[int] = []
    with Presence(spec.dataset, "dead", beat=1e6) as dead, Presence(spec.dataset, "a", beat=SILENCE / 6) as a:
        dead.sign.process = "another-machine/1@1"
        dead._write()
        assert crew(spec, dead).claims.take("finish") is not None
        crew(spec, a).once("finish", lambda: bool(done), lambda: done.append(1))
        crew(spec, a).once("finish", lambda: bool(done), lambda: done.append(2))
    assert done == [1]


def test_ranks_of_another_job_are_refused_while_they_live(spec: JobSpec) -> None:
    with (
        Presence(spec.dataset, "theirs", job="old", beat=0.05),
        Presence(spec.dataset, "peer", job="new", beat=0.05),
        Presence(spec.dataset, "mine", job="new") as mine,
        pytest.raises(BuilderError, match="theirs is at work"),
    ):
        crew(spec, mine).require_no_other_job("it was begun with another COUNT")
    with Presence(spec.dataset, "silent", job="old", beat=1e6) as silent, Presence(spec.dataset, "b", job="new") as b:
        silent.sign.process = "another-machine/1@1"
        silent._write()
        crew(spec, b).require_no_other_job("it was begun with another COUNT")


# -- told to end --------------------------------------------------------------------------------


def test_sigterm_lets_the_unit_in_hand_be_finished(spec: JobSpec) -> None:
    def told(unit: Unit) -> None:
        if unit.number == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with stopping.graceful(30):
        report = run_rank(spec, 5, before=told)
        assert stopping.asked()
        with pytest.raises(Terminated):
            stopping.leave_if_asked()
    assert not stopping.asked()
    assert report.made == [0, 1]
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def run_briefly(spec: JobSpec, engine: str, before: Callable[[Unit], None]) -> None:
    if engine == "ranks":
        run_rank(spec, 5, before=before)
    else:
        inline.run(spec, units_of(5), 1, Heard(), load=lambda spec, device: Maker(spec, before))


@pytest.mark.parametrize("engine", ["ranks", "inline"])
def test_a_unit_that_outlasts_the_grace_is_abandoned(spec: JobSpec, engine: str) -> None:
    def long(unit: Unit) -> None:
        if unit.number == 1:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)

    began = time.monotonic()
    with stopping.graceful(0.2), pytest.raises(Terminated):
        run_briefly(spec, engine, long)
    assert time.monotonic() - began < 30
    assert there(spec) == [0]
    assert spec.dataset.storage.list("manifests/x/job/claims") == []


def test_a_second_sigterm_is_not_waited_for(spec: JobSpec) -> None:
    with stopping.graceful(60):
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Terminated):
            os.kill(os.getpid(), signal.SIGTERM)


def test_local_workers_finish_their_units_after_sigterm(spec: JobSpec) -> None:
    report: Any = Heard()
    with stopping.graceful(60):
        local.run(spec, units_of(6), 1, report, load=makers.tells_all_to_end)
        assert stopping.asked()
    assert report.made == there(spec) == [0, 1]
    assert [sign.left for sign in signs(spec.dataset).values()] == [True]


def test_local_gives_up_what_fails_or_kills_three_times_and_goes_on(spec: JobSpec) -> None:
    report: Any = Heard()
    local.run(spec, units_of(4), 1, report, load=makers.fails_or_dies)
    assert there(spec) == [0, 3]
    assert "cursed" in report.given_up[1]
    assert "died (exit code -9)" in report.given_up[2]
    assert report.images == 2
    assert not spec.dataset.storage.exists(manifest_path("x", 1))

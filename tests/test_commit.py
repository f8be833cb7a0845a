"""Commits of one shard at the same time, step by step in every order: what is visible is always one attempt's."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from builder.errors import BuilderError
from builder.shards import commit as commits
from builder.shards.commit import STAGED, Pair, attempt_steps, commit
from builder.shards.dataset import Dataset
from builder.shards.lock import exclusive, shared
from builder.shards.storage import TEMPORARY, Storage

STEPS = {"ab": 7, "aa": 5}  # of an attempt that meets one other, which it revokes where that has other bytes


@pytest.fixture(autouse=True)
def _no_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def pair_of(root: Path, content: str) -> Pair:
    tar = content.encode() * 3
    digest = hashlib.sha256(tar).hexdigest()
    shards, manifests = root / "shards/x", root / "manifests/x"
    return Pair(shards / "shard-000000.tar", tar, manifests / "shard-000000.parquet", digest.encode(), digest)


def emptied(root: Path) -> None:
    """The folder as before any commit; quicker than a new one for each of thousands of orders."""
    for folder in (root / "shards/x", root / "manifests/x", root / "manifests/x" / STAGED):
        folder.mkdir(parents=True, exist_ok=True)
        for entry in os.scandir(folder):
            if entry.is_file():
                os.unlink(entry.path)


def visible(pair: Pair) -> str | None:
    """The digest that the manifest names, after checking that the tar beside it has it."""
    if not pair.manifest_path.exists():
        return None
    named = pair.manifest_path.read_text()
    assert hashlib.sha256(pair.tar_path.read_bytes()).hexdigest() == named, "the tar is not the manifest's"
    return named


class Process:
    """A process that commits a pair, one step a turn, anew when it was revoked; `committed` says how it ended."""

    def __init__(self, pair: Pair) -> None:
        self.pair = pair
        self.steps: Iterator[None] = attempt_steps(pair)
        self.committed: bool | None = None

    def turn(self) -> None:
        if self.committed is not None:
            return
        try:
            next(self.steps)
        except StopIteration as end:
            self.committed = end.value
            if self.committed is None:
                self.steps = attempt_steps(self.pair)

    def to_the_end(self) -> None:
        for _ in range(100):
            self.turn()
            if self.committed is not None:
                return
        raise AssertionError("a process alone does not come to an end")


def run_order(processes: Sequence[Process], order: Sequence[int]) -> None:
    """Let the processes take turns in this order, then each alone; what is visible is checked after every turn."""
    first = None
    for number in order:
        processes[number].turn()
        now = visible(processes[number].pair)
        assert first is None or now == first, "a committed shard changed"
        first = now
    for process in processes:
        process.to_the_end()
        now = visible(process.pair)
        assert now is not None and (first is None or now == first)
        first = now
    assert sum(bool(process.committed) for process in processes) == 1, "exactly one made the shard visible"


@pytest.mark.parametrize("contents", ["ab", "aa"], ids=["other hardware", "same machine type"])
def test_two_commits_in_every_order_of_their_steps(tmp_path: Path, contents: str) -> None:
    pairs = [pair_of(tmp_path, content) for content in contents]
    steps = STEPS[contents]
    for turns in itertools.combinations(range(2 * steps), steps):
        order = [0 if turn in turns else 1 for turn in range(2 * steps)]
        emptied(tmp_path)
        run_order([Process(pair) for pair in pairs], order)
    assert not list((tmp_path / "manifests/x" / STAGED).iterdir())
    assert not list((tmp_path / "shards/x").glob(f"{TEMPORARY}*"))


@pytest.mark.parametrize("contents", ["ab", "aa"], ids=["other hardware", "same machine type"])
def test_one_dies_or_sleeps_at_every_step_while_the_other_commits(tmp_path: Path, contents: str) -> None:
    """The first stops for ever after n turns, the second finishes; then the first wakes up after all."""
    for before, between in itertools.product(range(9), range(9)):
        emptied(tmp_path)
        sleeper, other = (Process(pair_of(tmp_path, content)) for content in contents)
        for process, turns in ((other, between), (sleeper, before)):
            for _ in range(turns):
                process.turn()
        other.to_the_end()
        kept = visible(other.pair)
        assert kept is not None
        sleeper.to_the_end()
        assert visible(other.pair) == kept


@settings(max_examples=300, deadline=None)
@given(
    contents=st.lists(st.sampled_from("abc"), min_size=3, max_size=4),
    order=st.lists(st.integers(0, 3), max_size=60),
)
def test_several_commits_in_any_order(tmp_path_factory, contents: list[str], order: list[int]) -> None:
    root = tmp_path_factory.getbasetemp() / "several"
    emptied(root)
    processes = [Process(pair_of(root, content)) for content in contents]
    run_order(processes, [number for number in order if number < len(processes)])


def test_what_a_dead_attempt_left_does_not_stop_the_next(tmp_path: Path) -> None:
    dead = attempt_steps(pair_of(tmp_path, "a"))
    for _ in range(4):
        next(dead)  # both staged, looked, about to rename; and then no more
    assert commit(pair_of(tmp_path, "b"))
    assert not commit(pair_of(tmp_path, "a"))
    assert visible(pair_of(tmp_path, "b")) == pair_of(tmp_path, "b").tar_sha256


def test_a_folder_swept_away_while_committing_is_staged_anew(tmp_path: Path) -> None:
    steps = attempt_steps(pair_of(tmp_path, "a"))
    next(steps)
    next(steps)
    Storage(tmp_path).sweep("shards/x")
    swept = Process(pair_of(tmp_path, "a"))
    swept.steps = steps
    while swept.steps is steps:
        swept.turn()
    assert swept.committed is None
    assert commit(pair_of(tmp_path, "a"))


def test_without_links_the_manifest_is_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(source: Path, target: Path) -> None:
        raise OSError(commits.NO_LINKS[0], "no links here")

    monkeypatch.setattr(os, "link", refused)
    assert commit(pair_of(tmp_path, "a"))
    assert visible(pair_of(tmp_path, "a"))
    assert not commit(pair_of(tmp_path, "b"))
    storage = Storage(tmp_path)
    assert storage.create("claims/one", b"1")
    assert not storage.create("claims/one", b"2")
    assert storage.read("claims/one") == b"1"


@pytest.mark.parametrize("root", ["{folder}", "memory://created-{name}"])
def test_create_is_heard_once(tmp_path: Path, root: str) -> None:
    storage = Storage(root.format(folder=tmp_path, name=tmp_path.name))
    assert storage.create("claims/one", b"mine")
    assert not storage.create("claims/one", b"yours")
    assert storage.read("claims/one") == b"mine"
    assert storage.list("claims") == ["one"]


def test_ranks_share_a_dataset_that_a_job_alone_does_not(tmp_path: Path) -> None:
    dataset = Dataset("x", Storage(tmp_path))
    with shared(dataset), shared(dataset), pytest.raises(BuilderError, match="another job"), exclusive(dataset):
        pass
    with exclusive(dataset), pytest.raises(BuilderError, match="another job"), shared(dataset):
        pass


def test_a_file_system_without_locks_is_no_hindrance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from builder.shards import lock

    def refused(file: object, kind: int) -> None:
        raise OSError(lock.NO_LOCKS[0], "no locks here")

    monkeypatch.setattr(lock.fcntl, "flock", refused)
    with exclusive(Dataset("x", Storage(tmp_path))):
        pass

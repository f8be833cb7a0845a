"""The plan: exact shares at every prefix, stable under extension, cut into units without gap or overlap."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from builder.errors import BuilderError
from builder.job.pending import all_units, committed_units
from builder.job.plan import Plan, Unit, batches

weights = st.lists(st.integers(1, 9), min_size=1, max_size=5)


def plan_of(shares: list[int]) -> Plan:
    codes = [chr(65 + i) for i in range(len(shares))]
    return Plan.of(codes, dict(zip(codes, map(float, shares), strict=True)))


@given(weights, st.integers(0, 500))
def test_every_prefix_keeps_the_shares_within_one_image_per_phase(shares: list[int], count: int) -> None:
    plan = plan_of(shares)
    found = Counter(code for code, _ in plan.at(0, count))
    for code, weight in zip(plan.codes, plan.weights, strict=True):
        assert abs(found[code] - count * weight / plan.period) < max(1, len(shares) - 1) + 1e-9
    assert plan.counts(count) == {code: found[code] for code in plan.codes}


@given(weights, st.integers(0, 10_000), st.integers(1, 60))
def test_any_window_agrees_with_the_whole_and_indices_count_up(shares: list[int], start: int, length: int) -> None:
    plan = plan_of(shares)
    assert plan.at(start, start + length) == [plan.at(p, p + 1)[0] for p in range(start, start + length)]
    seen: Counter[str] = Counter()
    for code, index in plan.at(0, 200):
        assert index == seen[code]
        seen[code] += 1


def test_equal_weights_take_turns() -> None:
    assert [code for code, _ in Plan.of("IPR").at(0, 6)] == list("IPRIPR")


def test_a_plan_of_ten_million_is_cheap_to_look_into() -> None:
    plan = Plan.of("IPR", {"I": 1, "P": 1, "R": 2})
    assert sorted(plan.at(10_000_000, 10_000_004))[:2] == [("I", 2_500_000), ("P", 2_500_000)]
    assert sum(plan.counts(10_000_001).values()) == 10_000_001


@pytest.mark.parametrize(
    "bad",
    [{"I": 0}, {"I": -1}, {"I": float("nan")}, {"I": float("inf")}, {"I": 1e-9}, {"X": 1}, {"I": 0.001, "P": 999.999}],
)
def test_bad_weights_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(BuilderError):
        Plan.of("IP", bad)


@settings(max_examples=200)
@given(st.lists(st.integers(1, 900), min_size=1, max_size=4), st.integers(1, 120), st.randoms(use_true_random=False))
def test_units_cover_the_count_without_gap_whatever_was_killed(counts: list[int], per_shard: int, random) -> None:
    """Runs of any COUNT, each killed after committing any of its units, then one that ends."""
    committed: list[Unit] = []
    for count in counts:
        units = all_units(committed, count, per_shard)
        done = {unit.number for unit in committed}
        new = [unit for unit in units if unit.number not in done]
        committed = sorted(committed + [unit for unit in new if random.random() < 0.5], key=lambda unit: unit.number)
    units = all_units(committed, counts[-1], per_shard)
    assert units[0].start == 0
    assert units[-1].stop >= counts[-1]
    assert all(a.stop == b.start and b.number == a.number + 1 for a, b in itertools.pairwise(units))
    assert all(0 < len(unit) <= per_shard for unit in units)
    assert set(committed) <= set(units)


def test_a_tail_stays_and_the_extension_starts_a_new_shard() -> None:
    assert all_units([Unit(0, 0, 200), Unit(1, 200, 300)], 500, 200)[2:] == [Unit(2, 300, 500)]
    assert all_units([Unit(0, 0, 200)], 500, 200)[1:] == [Unit(1, 200, 400), Unit(2, 400, 500)]


@given(st.integers(0, 500), st.integers(1, 200), st.integers(1, 32))
def test_batches_lie_on_the_fixed_grid_and_cover_the_unit(start: int, length: int, size: int) -> None:
    found = batches(Unit(0, start, start + length), size)
    assert found[0][0] <= start
    assert found[-1][1] >= start + length
    assert all(begin % size == 0 and end - begin == size for begin, end in found)
    assert found[0][1] > start
    assert found[-1][0] < start + length


class Shards:
    """A dataset as far as `committed_units` looks; counts the manifests read."""

    name = "x"

    def __init__(self, units: list[Unit], full: int) -> None:
        self.units = {unit.number: unit for unit in units}
        self.info = {"fingerprint_keys": {"images_per_shard": full}}
        self.read: Counter[int] = Counter()

    def exists(self) -> bool:
        return True

    def shard_numbers(self) -> list[int]:
        return sorted(self.units)

    def shard_metadata(self, number: int) -> dict[str, str]:
        self.read[number] += 1
        return {"start": str(self.units[number].start), "stop": str(self.units[number].stop)}


@given(
    full=st.integers(1, 9),
    runs=st.lists(st.integers(1, 60), min_size=1, max_size=5),
    missing=st.sets(st.integers(0, 60)),
)
def test_the_ranges_of_committed_units_need_few_manifests(full: int, runs: list[int], missing: set[int]) -> None:
    """Runs of growing COUNT, each with a tail that may be short; and some shards are not there."""
    units: list[Unit] = []
    for images in runs:
        units = all_units(units, (units[-1].stop if units else 0) + images, full)
    there = [unit for unit in units if unit.number not in missing]
    dataset: Any = Shards(there, full)
    assert committed_units(dataset) == there
    assert all(times == 1 for times in dataset.read.values())


def test_fifty_thousand_full_shards_need_two_manifests_and_each_short_one_some_more() -> None:
    units = all_units(all_units([], 7_000_000, 200), 10_000_000, 200)
    dataset: Any = Shards(units, 200)
    assert committed_units(dataset) == units
    assert sum(dataset.read.values()) == 2
    units = all_units(all_units([], 7_000_099, 200), 10_000_000, 200)
    dataset = Shards(units, 200)
    assert committed_units(dataset) == units
    assert sum(dataset.read.values()) < 40

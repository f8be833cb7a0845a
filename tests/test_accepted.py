"""Until accepted: how far to go, whatever was killed; the accepted set by index alone; early stop; wrong use.

Most of it runs the real loop over a made-up engine, which writes units of small pictures with known scores.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from builder.config import Config, SampleConfig, ShardsConfig
from builder.errors import BuilderError
from builder.job import run as run_module
from builder.job import until_accepted
from builder.job.acceptance import Share, accepted_shares, images_needed
from builder.job.pending import all_units, committed_units
from builder.job.plan import Plan, Unit
from builder.job.rounds import FIRST_UNITS, GROWTH, Rounds
from builder.job.run import run_job
from builder.job.spec import JobSpec
from builder.job.until_accepted import Accepted, require_decidable, run_until_accepted
from builder.quality.reference import save_reference
from builder.sampling.sampler import Sampler
from builder.shards.criteria import Criteria, Quantile, Range, judge
from builder.shards.dataset import Dataset
from builder.shards.filter import filter_dataset, judge_dataset
from builder.shards.schema import STAMP
from builder.shards.storage import Storage
from builder.shards.verify import verify_dataset
from builder.shards.writer import Sample, encode_png, image_row, write_shard
from tests import test_job
from tests.conftest import textured, write_real
from tests.test_filter import made_up_reference

pytestmark = pytest.mark.usefixtures("references_once")

PER_SHARD = 6
GOOD = Criteria((Range("ssim", low=0.5, reason="ssim < 0.5"),))
ALL_BUT_TWINS = Criteria(no_duplicates=True)

# -- the rounds -------------------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.integers(1, 5), min_size=1, max_size=4), st.integers(1, 400), st.integers(1, 40), st.integers(1, 8),
    st.lists(st.sampled_from([0.0, 0.05, 0.2, 0.5, 0.9, 1.0]), min_size=4, max_size=4), st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_rounds_end_with_what_is_wanted_or_with_a_phase_that_lacks_it(
    weights: list[int], count: int, per_shard: int, factor: int, rates: list[float], seed: int
) -> None:
    codes = "ABCD"[: len(weights)]
    plan = Plan.of(codes, dict(zip(codes, map(float, weights), strict=True)))
    rounds = Rounds(plan, count, [unit.stop for unit in all_units([], count * factor, per_shard)])
    generator = np.random.default_rng(seed)
    passing = {
        code: generator.random(made) < rate
        for (code, made), rate in zip(plan.counts(count * factor).items(), rates, strict=False)
    }
    end, last = rounds.first(), 0
    assert end <= max(min(FIRST_UNITS * per_shard, count + per_shard), 1)
    while True:
        assert last < end <= count * factor and end in rounds.stops
        shares = {code: Share(int(passing[code][:made].sum()), made) for code, made in plan.counts(end).items()}
        short = {code for code, number in plan.counts(count).items() if shares[code].passed < number}
        hopeless = rounds.hopeless(end, shares)
        assert set(hopeless) <= short
        if hopeless:
            assert all(f"phase {code}: " in rounds.why_hopeless(code, end, shares[code]) for code in hopeless)
            return
        further = rounds.after(end, shares)
        if further is None:
            assert not short
            return
        assert short
        last, end = end, further


def test_nothing_that_passes_ends_after_the_first_units_and_doubt_goes_on_slowly() -> None:
    plan = Plan.of("IPR")
    rounds = Rounds(plan, 5000, [unit.stop for unit in all_units([], 25_000, 200)])
    end = rounds.first()
    assert end == FIRST_UNITS * 200
    made = plan.counts(end)
    assert rounds.hopeless(end, {code: Share(0, made[code]) for code in "IPR"}) == ["I", "P", "R"]
    few = {"I": Share(200, made["I"]), "P": Share(200, made["P"]), "R": Share(45, made["R"])}  # 17 %; 20 % are needed
    assert not rounds.hopeless(end, few)
    assert rounds.after(end, few) == GROWTH * end
    said = rounds.why_hopeless("R", end, Share(0, made["R"]))
    assert "phase R: 0 of 266 (0.0%) pass, at most 2.6%" in said
    assert "1,666 are wanted" in said and "8,067 images" in said


def test_the_second_round_goes_nearly_all_the_way_and_not_beyond() -> None:
    plan = Plan.of("IPR")
    rounds = Rounds(plan, 5000, [unit.stop for unit in all_units([], 25_000, 200)])
    half = {code: Share(made // 2, made) for code, made in plan.counts(800).items()}
    assert 7000 <= (rounds.after(800, half) or 0) <= 10_000


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(1, 300))
def test_reach_is_the_least_count_with_so_many_of_a_phase(weights: list[int], images: int) -> None:
    codes = "ABCDE"[: len(weights)]
    plan = Plan.of(codes, dict(zip(codes, map(float, weights), strict=True)))
    for code in codes:
        reach = plan.reach(code, images)
        assert plan.counts(reach)[code] == images
        assert plan.counts(reach - 1)[code] == images - 1


# -- the loop, over a made-up engine ----------------------------------------------------------------------------------


def ssim_of(code: str, index: int) -> float:
    """Of I two thirds are good, of P half, of R a third: by a hash, so in no order."""
    value = zlib.crc32(f"{code}{index}".encode()) / 2**32
    return value ** {"I": 0.6, "P": 1.0, "R": 1.6}[code]


@functools.cache
def picture(code: str, index: int) -> np.ndarray:
    """Every fifth image repeats the one before."""
    return textured(1000 * ord(code) + index - (index % 5 == 4), 16)


def write_unit(spec: JobSpec, unit: Unit) -> None:
    samples = []
    for position, (code, index) in enumerate(spec.plan.at(unit.start, unit.stop), unit.start):
        pixels = picture(code, index)
        row = image_row(f"{spec.name}-{code}-{index:08d}", code, "IPR".index(code), "synthetic", pixels)
        row |= {"index": index, "position": position, "ssim": ssim_of(code, index)}
        samples.append(Sample(row, encode_png(pixels)))
    place = {"start": str(unit.start), "stop": str(unit.stop), STAMP: made_up_reference().version}
    write_shard(Storage(spec.out), spec.name, unit.number, samples, place)


class KilledError(Exception):
    """Stands for the death of the whole job."""


class MadeUp:
    """An engine that writes units in any order, and is killed after so many."""

    def __init__(self, order: Callable[[Sequence[Unit]], Sequence[Unit]] = lambda units: units) -> None:
        self.order, self.left, self.runs = order, math.inf, 0

    def __call__(self, spec: JobSpec, units: Sequence[Unit], workers: int, report: Any) -> None:
        self.runs += 1
        for unit in self.order(units):
            if self.left <= 0:
                raise KilledError
            self.left -= 1
            write_unit(spec, unit)
            report.batch(len(unit))
            report.done(unit, 0)


ORDERS: dict[str, Callable[[Sequence[Unit]], Sequence[Unit]]] = {
    "in order": lambda units: units,
    "backwards": lambda units: units[::-1],
    "every second first": lambda units: [*units[1::2], *units[::2]],
}


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> MadeUp:
    """The job with a made-up engine and reference; duplicates, which take long, where a test's name has them."""
    made_up = MadeUp()
    if "duplicates" not in request.node.name:
        monkeypatch.setattr(run_module, "mark_duplicates", lambda *_, **__: None)
    monkeypatch.setattr(run_module, "engine_of", lambda name, address: made_up)
    monkeypatch.setattr(
        run_module, "_build_reference", lambda spec, dataset, say: save_reference(dataset, made_up_reference())
    )
    return made_up


def spec_of(out: Path, weights: dict[str, float] | None = None) -> JobSpec:
    config = Config(
        name="made", sample=SampleConfig(size=16, batch_size=2), shards=ShardsConfig(images_per_shard=PER_SHARD)
    )
    return JobSpec(
        config=config, plan=Plan.of("IPR", weights), name="made", out=str(out), checkpoint="none",
        checkpoint_sha256="0", dtype="float32", real="clinic", real_out="",
    )  # fmt: skip


def accept(
    spec: JobSpec, count: int, criteria: Criteria = GOOD, factor: float = 5.0, say: Callable[[str], None] = str
) -> Accepted:
    return run_until_accepted(spec, count, lambda _: criteria, max_factor=factor, lineage={}, licence={}, say=say)


def expected(plan: Plan, count: int, is_good: Callable[[str, int], bool]) -> set[str]:
    """The keys of the first of each phase that are good: by index alone."""
    keys = set()
    for code, wanted in plan.counts(count).items():
        good = [index for index in range(1000) if is_good(code, index)]
        keys |= {f"made-{code}-{index:08d}" for index in good[:wanted]}
    return keys


def good(code: str, index: int) -> bool:
    return np.float32(ssim_of(code, index)) >= 0.5


def keys_of(dataset: Dataset) -> set[str]:
    return set(dataset.table(["key"])["key"].to_pylist())


def tars(out: str | Path) -> dict[str, str]:
    """All tars under an output root with their hashes."""
    return {
        str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in Path(out).rglob("*.tar")
    }


@pytest.mark.parametrize("weights", [None, {"I": 1.0, "P": 3.0, "R": 2.0}])
@pytest.mark.parametrize("order", ORDERS)
def test_the_first_that_pass_of_each_phase_are_accepted(tmp_path: Path, engine: MadeUp, order: str, weights) -> None:
    spec = spec_of(tmp_path, weights)
    engine.order = ORDERS[order]
    result = accept(spec, 40)
    assert result.hopeless == []
    assert keys_of(result.accepted) == expected(spec.plan, 40, good)
    assert result.accepted.info["count"] == 40
    assert verify_dataset(result.accepted) == verify_dataset(result.raw.dataset) == []
    assert result.raw.dataset.info["count"] == result.raw.images == result.end <= 200
    assert {len(unit) for unit in committed_units(result.raw.dataset)} == {PER_SHARD}
    assert engine.runs >= 2
    for code, share in result.shares.items():
        assert share.passed == sum(good(code, index) for index in range(share.made))


def test_a_run_killed_after_any_number_of_units_makes_the_same_shards(tmp_path: Path, engine: MadeUp) -> None:
    accept(spec_of(tmp_path / "whole"), 40)
    whole = tars(tmp_path / "whole")
    for step in (1, 3, 8):
        spec = spec_of(tmp_path / f"killed-{step}")
        kills = 0
        while True:
            engine.left = step
            engine.order = list(ORDERS.values())[kills % 3]  # continued by another engine each time
            try:
                result = accept(spec, 40)
                break
            except KilledError:
                kills += 1
        assert kills >= 2
        assert tars(spec.out) == whole
        assert result.raw.dataset.info["state"] == "complete"


@pytest.mark.parametrize("criteria", [GOOD, ALL_BUT_TWINS], ids=["good", "no duplicates"])
@pytest.mark.parametrize("where", ["duplicates", "accepted"])
def test_a_death_between_the_units_changes_nothing(
    tmp_path: Path, engine: MadeUp, monkeypatch: pytest.MonkeyPatch, where: str, criteria: Criteria
) -> None:
    """Before the duplicates of each round are marked, and when all shards of the accepted dataset are there."""
    accept(spec_of(tmp_path / "whole"), 40, criteria)
    spec = spec_of(tmp_path / "killed")
    module, name = {"duplicates": (run_module, "mark_duplicates"), "accepted": (until_accepted, "copy_reference")}[
        where
    ]
    whole, real, deaths = tars(tmp_path / "whole"), getattr(module, name), []

    def dies_every_other_time(*words: Any, **named: Any) -> None:
        deaths.append(1)
        if len(deaths) % 2:
            raise KilledError
        real(*words, **named)

    monkeypatch.setattr(module, name, dies_every_other_time)
    for _ in range(20):
        try:
            result = accept(spec, 40, criteria)
            break
        except KilledError:
            continue
    assert deaths
    assert tars(spec.out) == whole
    assert verify_dataset(result.accepted) == []


def test_duplicates_are_turned_away_whatever_the_rounds(tmp_path: Path, engine: MadeUp) -> None:
    criteria = dataclasses.replace(GOOD, no_duplicates=True)
    spec = spec_of(tmp_path)
    result = accept(spec, 40, criteria)
    assert keys_of(result.accepted) == expected(spec.plan, 40, lambda code, i: good(code, i) and i % 5 != 4)
    assert engine.runs >= 2
    assert result.judgement is not None
    assert any(reason == "duplicate" for _, reason in result.judgement.reason_counts())


def test_a_complete_dataset_never_searched_for_twins_is_refused(tmp_path: Path, engine: MadeUp) -> None:
    with pytest.raises(BuilderError, match="lacks units or duplicate scores before image 24") as refused:
        accept(spec_of(tmp_path), 40, ALL_BUT_TWINS)
    assert "builder score made" in refused.value.remedy


def test_again_does_nothing_more_extends_and_less_is_there_already(tmp_path: Path, engine: MadeUp) -> None:
    spec = spec_of(tmp_path)
    accept(spec, 20)
    runs, before = engine.runs, tars(tmp_path)
    again = accept(spec, 20)
    assert (again.raw.made, again.judgement, engine.runs) == (0, None, runs)
    more = accept(spec, 50)
    assert keys_of(more.accepted) == expected(spec.plan, 50, good)
    assert before.items() <= {name: tar for name, tar in tars(tmp_path).items() if "accepted" not in name}.items() | {
        name_tar for name_tar in before.items() if "accepted" in name_tar[0]
    }
    assert accept(spec, 20).judgement is None
    assert len(keys_of(more.accepted)) == 50


@pytest.mark.parametrize("plain", [4, 15, 150])
def test_a_plain_dataset_is_continued_behind_its_tail(tmp_path: Path, engine: MadeUp, plain: int) -> None:
    spec = spec_of(tmp_path)
    run_job(spec, plain, lineage={}, licence={}, say=str)
    before = tars(tmp_path)
    result = accept(spec, 30)
    assert keys_of(result.accepted) == expected(spec.plan, 30, good)
    assert before.items() <= tars(tmp_path).items()
    assert (engine.runs == 1) == (plain == 150)
    assert verify_dataset(result.raw.dataset) == []


def test_the_factor_bounds_the_images_and_a_larger_one_goes_on(tmp_path: Path, engine: MadeUp) -> None:
    """Nearly half pass, of R a third: twice COUNT is not enough, four times is."""
    spec = spec_of(tmp_path)
    result = accept(spec, 34, factor=2)
    assert [reason[:8] for reason in result.hopeless] == ["phase R:"]
    assert result.raw.images <= 68
    assert result.raw.dataset.info["state"] == "complete"
    assert not result.accepted.exists()
    said: list[str] = []
    again = accept(spec, 34, factor=2, say=said.append)
    assert (again.hopeless, again.raw.made) == (result.hopeless, 0)
    more = accept(spec, 34, factor=4.5)
    assert keys_of(more.accepted) == expected(spec.plan, 34, good)
    assert more.raw.images <= 153


def test_a_threshold_that_nothing_passes_stops_after_few_units(tmp_path: Path, engine: MadeUp) -> None:
    spec = spec_of(tmp_path)
    result = accept(spec, 1000, Criteria((Range("ssim", low=2, reason="ssim < 2"),)))
    assert result.raw.images <= 16 * PER_SHARD  # 0 of 32 of a phase: at most 19 %, and 20 % are needed
    assert {reason.split(" pass")[0] for reason in result.hopeless} == {
        f"phase {code}: 0 of {result.raw.images // 3} (0.0%)" for code in "IPR"
    }
    assert result.judgement is not None
    assert result.judgement.reason_counts()["R", "ssim < 2"] == result.raw.images // 3
    assert verify_dataset(result.raw.dataset) == []


def test_units_given_up_end_it_and_the_next_run_makes_them(tmp_path: Path, engine: MadeUp, monkeypatch) -> None:
    spec = spec_of(tmp_path)

    def gives_one_up(spec: JobSpec, units: Sequence[Unit], workers: int, report: Any) -> None:
        engine(spec, [unit for unit in units if unit.number != 2], workers, report)
        report.failed(Unit(2, 12, 18), "a fault")

    monkeypatch.setattr(run_module, "engine_of", lambda name, address: gives_one_up)
    failed = accept(spec, 40)
    assert failed.raw.failed == {2: "a fault"}
    assert not failed.accepted.exists()
    monkeypatch.setattr(run_module, "engine_of", lambda name, address: engine)
    assert keys_of(accept(spec, 40).accepted) == expected(spec.plan, 40, good)


def test_an_accepted_dataset_of_other_criteria_is_refused_before_anything_is_made(
    tmp_path: Path, engine: MadeUp
) -> None:
    spec = spec_of(tmp_path)
    accept(spec, 20)
    before = tars(tmp_path)
    for criteria in (Criteria(), dataclasses.replace(GOOD, where="phase = 'I'")):
        with pytest.raises(BuilderError, match="'made-accepted' exists and was made with other settings"):
            accept(spec, 60, criteria)
    dataset = Dataset("made", Storage(tmp_path))
    assert (tars(tmp_path), dataset.info["state"]) == (before, "complete")
    accepted = Dataset("made-accepted", Storage(tmp_path))
    accepted.clear()
    filter_dataset(dataset, GOOD, judge_dataset(dataset, GOOD), accepted)  # by hand, and not limited
    with pytest.raises(BuilderError, match="made with other settings"):
        accept(spec, 20)
    with pytest.raises(BuilderError, match="begun with other settings"):
        accept(spec_of(tmp_path, {"I": 2.0}), 20)


def test_the_progress_bar_and_the_rounds_say_the_rate(tmp_path: Path, engine: MadeUp, capsys) -> None:
    said: list[str] = []
    result = accept(spec_of(tmp_path), 40, say=said.append)
    bar = capsys.readouterr().err
    assert "I=" in bar and "/14 (" in bar
    assert said[0].startswith("until accepted: I 14, P 13, R 13 are wanted, of at most 200 images; the first 24 now")
    rounds = [line for line in said if line.startswith("round ")]
    assert len(rounds) == engine.runs - 1
    assert rounds[-1].endswith(f"on to {result.end:,} images")


# -- what can be decided, and what a filter's result says -------------------------------------------------------------


@pytest.mark.parametrize(
    ("criteria", "said"),
    [
        (
            Criteria(quantiles=(Quantile("ssim", 0.1, 1),)),
            "--quantile can't be decided image by image: a quantile moves",
        ),
        (Criteria(keep_hard=0.2), "--keep-hard can't be decided image by image"),
        (Criteria(balance=True), "--balance can't be decided image by image: each phase's share of COUNT is exact"),
        (Criteria(where="seconds < 1"), "seconds or device, which differ from run to run"),
        (Criteria(where="ssim > "), "is no condition over the manifest"),
    ],
)
def test_what_depends_on_other_images_or_on_the_machine_is_refused(criteria: Criteria, said: str) -> None:
    with pytest.raises(BuilderError, match="(.|\n)*".join(map(str, [said]))):
        require_decidable(criteria)


def test_the_first_of_a_phase_are_kept_and_the_rest_is_surplus(tmp_path: Path) -> None:
    table = write_real(tmp_path).table()
    judgement = judge(table, Criteria(where="index is null and label < 2", first=(("I", 3), ("P", 0))))
    assert judgement.kept == {"I": 3}
    assert np.flatnonzero(judgement.accepted).tolist() == [0, 1, 2]
    assert judgement.reason_counts()["I", "surplus"] == 9
    assert not Criteria(first=(("I", 3),)).per_image


def test_shares_of_a_former_run_and_what_they_imply(tmp_path: Path, engine: MadeUp) -> None:
    spec = spec_of(tmp_path)
    result = accept(spec, 40)
    shares = accepted_shares(result.accepted)
    assert shares == result.shares
    plain = Dataset("plain", Storage(tmp_path))
    filter_dataset(result.raw.dataset, GOOD, judge_dataset(result.raw.dataset, GOOD), plain)
    assert accepted_shares(plain) == shares
    needed = images_needed(spec.plan, 40, shares)
    worst = images_needed(spec.plan, 40, shares, lambda share: share.interval()[0])
    assert needed and worst and 40 < needed < worst
    assert needed == max(spec.plan.reach(c, math.ceil(n / shares[c].rate)) for c, n in spec.plan.counts(40).items())
    assert images_needed(spec.plan, 40, {code: Share(0, 9) for code in "IPR"}) is None
    with pytest.raises(BuilderError, match="was not filtered"):
        accepted_shares(result.raw.dataset)


def test_the_interval_is_clopper_and_pearsons() -> None:
    assert Share(0, 10).interval() == pytest.approx((0, 1 - 0.025 ** (1 / 10)))
    assert Share(10, 10).interval(0.9) == pytest.approx((0.05 ** (1 / 10), 1))
    assert Share(0, 0).interval() == (0, 1)
    assert str(Share(0, 0)) == "none made" and str(Share(1, 3)) == "1 of 3 (33.3%)"


# -- the command ------------------------------------------------------------------------------------------------------

TINY = "name: tiny\nreal: clinic\nsample: {size: 16, steps: 2, batch_size: 4}\nshards: {images_per_shard: 6}\n"


@pytest.fixture
def shards(builder, tmp_path: Path, tiny_checkpoint: Path, engine: MadeUp) -> Callable[..., Any]:
    """`builder shards --count 40 ...` over the made-up engine, whose gates ask for a sharpness that nobody computed."""
    write_real(tmp_path, size=24)
    (tmp_path / "tiny.yaml").write_text(TINY)
    words = ["shards", "--config", "tiny.yaml", "--checkpoint", tiny_checkpoint, "--engine", "inline", "--name", "made"]
    return lambda *more: builder(*words, *(["--count", "40"] if "--count" not in more else []), *more)


def test_the_command_writes_both_datasets_and_says_the_rates(shards, tmp_path: Path) -> None:
    asked = ["--accepted", "--min-ssim", "0.5", "--no-gates"]
    result = shards(*asked)
    assert result.code == 0, result.output
    made = Dataset("made", Storage(tmp_path)).info["count"]
    assert f"dataset 'made' is complete: {made} images" in result.output
    assert "flat images" in result.output  # the yardstick, before anything is made
    assert "dataset 'made-accepted' is written: the first that pass, I 14, P 13, R 13" in result.output
    assert "95 % interval" in result.output
    assert keys_of(Dataset("made-accepted", Storage(tmp_path))) == expected(Plan.of("IPR"), 40, good)
    again = shards(*asked)
    assert again.code == 0
    assert "'made-accepted' has them already; nothing to do" in again.output
    assert "'made-accepted' exists and was made with other settings" in shards("--accepted", "--no-gates").output


def test_the_command_stops_with_the_reason_and_exit_1(shards, tmp_path: Path) -> None:
    result = shards("--accepted", "--min-ssim", "0.5", "--where", "phase <> 'R'", "--no-gates", "--count", "600")
    assert result.code == 1, result.output
    assert "stopped: phase R: 0 of " in result.output
    assert "(0.0%) pass, at most" in result.output and "200 are wanted" in result.output
    assert "R: not phase <> 'R': " in result.output
    assert "no accepted dataset was written" in result.output
    assert "or --max-factor" not in result.output  # at a rate of 0 none helps
    assert not (tmp_path / "manifests/made-accepted").exists()
    few = shards("--accepted", "--min-ssim", "0.5", "--no-gates", "--count", "30", "--max-factor", "1.5")
    assert few.code == 1
    assert "or --max-factor " in few.output


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--min-ssim", "0.7"], ["options of --accepted without it", "add --accepted"]),
        (["--no-gates"], ["options of --accepted without it"]),
        (["--max-factor", "3"], ["options of --accepted without it"]),
        (["--accepted", "--max-factor", "0.5"], ["--max-factor: 0.5 is not between 1 and inf"]),
        (["--accepted", "--quantile", "ssim", "0.1", "1"], ["--quantile can't be decided image by image", "--band"]),
        (["--accepted", "--keep-hard", "0.2"], ["--keep-hard can't be decided image by image"]),
        (["--accepted", "--balance"], ["--balance can't be decided", "exact already"]),
        (["--accepted", "--where", "seconds < 9"], ["differ from run to run"]),
        (["--accepted", "--where", "sim > 0"], ["no condition over the manifest"]),
        (["--accepted", "--min-sim", "0.7"], ["no such option", "--min-ssim"]),
        (["--accepted", "--min-ssim", "high"], ["needs a number", "builder shards --help"]),
        (["--accepted", "--min-ssim", "0.9", "--max-ssim", "0.1"], ["0.9 is above 0.1"]),
        (["--accepted", "--name", "a" * 60], ["at most 64 characters"]),
        (["--accepted", "--min-lpips", "0.1"], ["'lpips' cannot be computed: its weights are not there"]),
        (["--accepted", "--min-lpips-real-pct", "5"], ["'lpips_real_pct' cannot be computed"]),
    ],
)
def test_wrong_use_is_refused_before_anything_is_made(shards, tmp_path: Path, monkeypatch, words, said) -> None:
    lacking = made_up_reference(missing={"lpips": "its weights are not there"})
    monkeypatch.setattr(run_module, "_build_reference", lambda spec, dataset, say: save_reference(dataset, lacking))
    result = shards(*words)
    assert result.code == 2, result.output
    assert result.output.count("error:") == 1
    assert "Traceback" not in result.output
    assert all(part in result.output for part in said), result.output
    assert not list(tmp_path.glob("shards/made*/*.tar"))


# -- the real worker and its engines ----------------------------------------------------------------------------------


@pytest.mark.no_cover
def test_every_engine_and_a_killed_run_accept_the_same(
    tmp_path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inline; one worker process; inline killed in the second round, then two worker processes."""
    write_real(tmp_path, per_phase=12, size=24)
    specs = {name: test_job.spec_of(tmp_path / name, tmp_path, tiny_checkpoint) for name in ("one", "two", "three")}
    run = functools.partial(run_until_accepted, lineage={}, licence={}, say=str)
    seen = sorted(test_job.run(specs["one"], 8).dataset.table(["ssim"])["ssim"].to_pylist())
    low = seen[3]  # about half pass
    criteria = Criteria((Range("ssim", low=low, reason=f"ssim < {low}"),), no_duplicates=True)
    whole = run(specs["one"], 15, lambda _: criteria, engine="inline")
    assert whole.hopeless == []
    assert whole.accepted.info["count"] == 15
    assert judge(whole.raw.dataset.table(), criteria).kept.total() >= 15

    run(specs["two"], 15, lambda _: criteria, engine="local", workers=1)

    generate, batches = Sampler.generate, []

    def dies(self: Sampler, *words: Any) -> Any:
        batches.append(1)
        if len(batches) > 5:  # the first round, and a batch of the second
            raise KilledError
        return generate(self, *words)

    monkeypatch.setattr(Sampler, "generate", dies)
    with pytest.raises(KilledError):
        run(specs["three"], 15, lambda _: criteria, engine="inline")
    monkeypatch.undo()
    assert len(committed_units(Dataset("tiny-IPR", Storage(tmp_path / "three")))) == 2
    run(specs["three"], 15, lambda _: criteria, engine="local", workers=2)

    assert tars(tmp_path / "one") == tars(tmp_path / "two") == tars(tmp_path / "three")
    assert verify_dataset(Dataset("tiny-IPR-accepted", Storage(tmp_path / "three"))) == []

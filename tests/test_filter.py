"""Filtering: what is kept and why, by every option; whole-dataset rules and their invariants; nothing half done."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from builder.errors import BuilderError
from builder.quality.reference import KINDS, Reference, save_reference
from builder.shards.criteria import Criteria, Quantile, Range, judge
from builder.shards.dataset import Dataset
from builder.shards.filter import filter_dataset, judge_dataset
from builder.shards.remove import remove_dataset
from builder.shards.schema import NUMERIC_SCORES, STAMP
from builder.shards.verify import verify_dataset
from builder.shards.writer import write_manifest

Scores = dict[str, Any]  # column -> its values over the 36 crops of `clinic`, in their order

COUNT = 36  # crops of `clinic`: 12 of I, then of P, then of R, in two shards of 18


def made_up_reference(**changes: Any) -> Reference:
    """Gates on sharpness (0.2 to 0.8), a copy alarm at 0.9, and five known images of each kind and phase."""
    score = {"real": 0.5, "flat": 0.0, "blurred": 0.1, "noisy": 0.9, "wrong phase": 0.5}
    yardstick = {
        code: {
            kind: [{"ssim": 0.6 + i / 20 + 0.3 * (kind == "flat"), "sharpness": score[kind], "copy_score": 0.3}
                   for i in range(5)]
            for kind in KINDS
        }
        for code in "IPR"
    }  # fmt: skip
    settings = {
        "against": "clinic", "ssim_size": 96, "ssim_stride": 7, "panel_seed": 0, "panel_size": 3, "features": "none",
        "lpips": None, "panel": {}, "panel_sha256": "0", "training_sha256": "0", "copy": {"threshold": 0.9},
        "gates": {code: {"sharpness": [0.2, 0.8]} for code in "IPR"}, "yardstick": yardstick,
    }  # fmt: skip
    return Reference(**(settings | changes))


VERSION = made_up_reference().version  # of the scores that with_scores writes


def with_scores(dataset: Dataset, scores: Scores, version: str | None = VERSION) -> Dataset:
    """Write made-up scores into the manifests."""
    start = 0
    for number in dataset.shard_numbers():
        table = dataset.shard_table(number)
        stop = start + table.num_rows
        for name, values in scores.items():
            place = table.column_names.index(name)
            column = pa.array(list(values)[start:stop], table.schema.field(name).type)
            table = table.set_column(place, table.schema.field(name), column)
        metadata = {**dataset.shard_metadata(number), **({STAMP: version} if version else {})}
        path = f"manifests/{dataset.name}/shard-{number:06d}.parquet"
        write_manifest(dataset.storage, path, table.replace_schema_metadata(metadata))
        start = stop
    return dataset


@pytest.fixture
def scored(clinic: Dataset) -> Dataset:
    """`clinic` with ssim 0, 0.1, ..., 1.7 over each shard."""
    return with_scores(clinic, {"ssim": [i % 18 / 10 for i in range(COUNT)]})


@pytest.fixture
def gated(scored: Dataset) -> Dataset:
    """`scored`, with all that a filter can ask for: image 3 is blurred, 7 a copy, 8 repeats 6."""
    just_below = float(np.nextafter(np.float32(0.9), np.float32(0)))
    scores = {
        "sharpness": [0.1 if i == 3 else 0.5 for i in range(COUNT)],
        "copy_score": [0.9 if i == 7 else just_below for i in range(COUNT)],  # 0.9 itself is an alarm
        "duplicate_score": [None if i % 12 == 0 else 0.99 if i == 8 else 0.2 for i in range(COUNT)],
        "duplicate_of": ["clinic-I-00000006" if i == 8 else None for i in range(COUNT)],
        "phase_margin": [0.1 + i % 12 / 100 for i in range(COUNT)],
        "phase_probability_real_pct": [10.0 if i % 3 == 0 else 60.0 for i in range(COUNT)],
    }
    save_reference(scored, made_up_reference())
    return with_scores(scored, scores)


def made(source: Dataset, criteria: Criteria, name: str, *, view: bool = False) -> Dataset:
    target = Dataset(name, source.storage)
    filter_dataset(source, criteria, judge_dataset(source, criteria), target, view=view)
    return target


# -- judging image by image -------------------------------------------------------------------------------------------


def test_where_is_sql_and_a_mistake_in_it_is_explained(clinic: Dataset) -> None:
    table = clinic.shard_table(0)
    judgement = judge(table, Criteria(where="phase = 'I' and split <> 'test'"))
    kept = table.filter(pa.array(judgement.accepted))
    assert set(kept["phase"].to_pylist()) == {"I"}
    assert "test" not in kept["split"].to_pylist()
    assert not judge(table, Criteria(where="ssim > 0")).accepted.any()  # unknown counts as not
    # A subquery would see one shard alone.
    subqueries = "1 = (select count(*) from read_parquet('/etc/passwd'))", "ssim > (select avg(ssim) from manifest)"
    for wrong in ("nonsense >", "ssim", *subqueries, "ssim > (select avg(ssim) from numbered)"):
        with pytest.raises(BuilderError, match="no condition over the manifest"):
            judge(table, Criteria(where=wrong))


def test_missing_and_nan_scores_never_pass(clinic: Dataset) -> None:
    table = clinic.shard_table(0)
    said = list(judge(table, Criteria((Range("ssim", low=-1.0, reason="ssim < -1"),))))
    assert said == [["no ssim: never scored"]] * table.num_rows
    nan = np.full(table.num_rows, np.nan, np.float32)
    table = table.set_column(table.column_names.index("ssim"), "ssim", [nan])
    assert not judge(table, Criteria((Range("ssim", high=9.0, reason="nan"),))).accepted.any()


def test_a_threshold_is_met_by_its_own_value_in_32_bits(clinic: Dataset) -> None:
    table = clinic.shard_table(0)
    table = table.set_column(table.column_names.index("ssim"), "ssim", [np.full(table.num_rows, 0.7, np.float32)])
    assert judge(table, Criteria((Range("ssim", low=0.7, high=0.7, reason="x"),))).accepted.all()


def test_an_unknown_column_and_too_many_reasons_are_explained() -> None:
    table = pa.table({"phase": ["I"], "ssim": [0.5]})
    with pytest.raises(BuilderError, match=r"no column 'sim'(.|\n)*did you mean 'ssim'"):
        judge(table, Criteria((Range("sim", low=0.1),)))
    with pytest.raises(BuilderError, match="64 reasons"):
        judge(table, Criteria(tuple(Range("ssim", low=0.6 + i, reason=str(i)) for i in range(65))))
    sixty_four = Criteria(tuple(Range("ssim", low=0.6 + i, reason=str(i)) for i in range(64)))
    assert list(judge(table, sixty_four)) == [[str(i) for i in range(64)]]


def test_criteria_survive_json_and_know_what_needs_the_whole_dataset() -> None:
    noise, middle = Range("noise", high=3.0, phase="I"), Quantile("ssim", 0.1, 0.9)
    criteria = Criteria((Range("ssim", 0.1, 0.9),), "1", (noise,), (middle,))
    assert json.loads(json.dumps(criteria.to_json())) == criteria.to_json()
    assert Criteria((Range("ssim", 0.1),), "phase = 'I'", (noise,), no_duplicates=True).per_image
    for whole in (Criteria(quantiles=(middle,)), Criteria(keep_hard=0.1), Criteria(balance=True)):
        assert not whole.per_image


# -- judging a whole dataset: invariants -------------------------------------------------------------------------------

score = st.sampled_from([None, 0.0, 0.25, 0.5, 0.75, 1.0])
row = st.tuples(st.sampled_from("IPR"), score, st.floats(-1, 1, width=32), st.floats(0, 100, width=32), st.booleans())
rows = st.lists(row, max_size=60)
share = st.sampled_from([0.0, 0.1, 0.2, 1 / 3, 0.5, 0.9, 1.0])


def table_of(rows: list[tuple]) -> pa.Table:
    """Phase, ssim, margin, percentile; `sharpness`, by which a gate judges, is 1 or 0."""
    names = ["phase", "ssim", "phase_margin", "phase_probability_real_pct", "sharpness"]
    types = [pa.string(), *[pa.float32()] * 4]
    columns = list(zip(*rows, strict=True)) or [()] * 5
    return pa.table({n: pa.array([float(v) if isinstance(v, bool) else v for v in c], t)
                     for n, c, t in zip(names, columns, types, strict=True)})  # fmt: skip


GATE = (Range("sharpness", low=0.5, reason="gate"),)


def above(low: float) -> tuple[Range, ...]:
    return (Range("ssim", low=low, reason=f"ssim < {low}"),)


@settings(max_examples=150, deadline=None)
@given(rows, st.sampled_from([0.0, 0.3, 0.6, 2.0]), share)
def test_keep_hard_reaches_its_share_or_takes_all_there_are(rows: list[tuple], low: float, share: float) -> None:
    table = table_of(rows)
    plain = judge(table, Criteria(above(low), gates=GATE))
    judgement = judge(table, Criteria(above(low), gates=GATE, keep_hard=share))
    hard = np.array([margin > 0 and percent <= 25 for _, _, margin, percent, _ in rows], bool)
    sound = np.array([gate for *_, gate in rows], bool)
    assert (judgement.accepted >= plain.accepted).all()
    back = judgement.accepted & ~plain.accepted
    assert (back <= (hard & sound)).all()  # nothing comes back that is not hard, or that a gate turned away
    for code in judgement.codes:
        of = judgement.of(code)
        kept, kept_hard, n_back = (int((of & r).sum()) for r in (judgement.accepted, judgement.accepted & hard, back))
        assert judgement.readmitted[code] == n_back
        left = of & hard & sound & ~judgement.accepted
        if share < 1:
            assert kept_hard >= share * kept - 1e-6 or not left.any()
        if n_back and share < 1:  # and not one more than needed
            assert kept_hard - 1 < share * (kept - 1) + 1e-6
        margins = np.array([margin for _, _, margin, *_ in rows])
        assert not n_back or not left.any() or margins[of & back].min() >= margins[left].max()


@settings(max_examples=150, deadline=None)
@given(rows, st.sampled_from([0.0, 0.3, 0.6]), share)
def test_balance_keeps_as_many_of_each_phase_and_the_hard_share(rows: list[tuple], low: float, share: float) -> None:
    table = table_of(rows)
    before = judge(table, Criteria(above(low), gates=GATE, keep_hard=share))
    after = judge(table, Criteria(above(low), gates=GATE, keep_hard=share, balance=True))
    fewest = min((before.kept[code] for code in before.codes), default=0)
    assert all(after.kept[code] == fewest for code in after.codes)
    assert (after.accepted <= before.accepted).all()
    for code in after.codes if share and fewest else ():
        possible = min(before.kept_hard[code], math.ceil(share * fewest - 1e-9))
        assert after.kept_hard[code] >= possible
    if not share:
        for code in after.codes:  # the first ones stay
            assert (
                np.flatnonzero(after.accepted & after.of(code)).tolist()
                == np.flatnonzero(before.accepted & before.of(code))[:fewest].tolist()
            )
    turned_away = [said for said, kept in zip(after, after.accepted, strict=True) if not kept]
    assert all(turned_away)


@settings(max_examples=100, deadline=None)
@given(rows, st.tuples(*[st.sampled_from([0.0, 0.2, 0.4, 0.6, 0.8])] * 2), st.booleans())
def test_stricter_thresholds_and_quantiles_keep_a_subset(rows: list[tuple], lows: tuple, gate: bool) -> None:
    loose, strict = sorted(lows)
    table, gates = table_of(rows), GATE if gate else ()
    by_range = [judge(table, Criteria(above(low), gates=gates)).accepted for low in (loose, strict)]
    by_quantile = [
        judge(table, Criteria(gates=gates, quantiles=(Quantile("ssim", low / 2, 1 - low / 2),))).accepted
        for low in (loose, strict)
    ]
    assert (by_range[1] <= by_range[0]).all()
    assert (by_quantile[1] <= by_quantile[0]).all()


@settings(max_examples=100, deadline=None)
@given(st.lists(row, min_size=1, max_size=40, unique_by=lambda r: r[2]), share, st.randoms(use_true_random=False))
def test_the_order_of_images_decides_nothing_without_balance(rows: list[tuple], share: float, random) -> None:
    criteria = Criteria(above(0.4), gates=GATE, quantiles=(Quantile("ssim", 0.1, 0.9),), keep_hard=share)
    order = list(range(len(rows)))
    random.shuffle(order)
    one = judge(table_of(rows), criteria)
    other = judge(table_of([rows[i] for i in order]), criteria)
    assert other.accepted.tolist() == one.accepted[order].tolist()
    assert list(other) == [list(one)[i] for i in order]


@settings(max_examples=60, deadline=None)
@given(rows)
def test_counts_agree_with_the_rows(rows: list[tuple]) -> None:
    judgement = judge(table_of(rows), Criteria(above(0.6), gates=GATE))
    phases = [phase for phase, *_ in rows]
    assert judgement.kept == Counter(p for p, kept in zip(phases, judgement.accepted, strict=True) if kept)
    assert judgement.rejected == Counter(p for p, kept in zip(phases, judgement.accepted, strict=True) if not kept)
    pairs = Counter((p, reason) for p, said in zip(phases, judgement, strict=True) for reason in said)
    assert judgement.reason_counts() == pairs


def test_quantiles_are_of_the_phase(scored: Dataset) -> None:
    values = np.array(scored.table(["ssim"])["ssim"].to_pylist())
    judgement = judge_dataset(scored, Criteria(quantiles=(Quantile("ssim", 0.25, 0.75),)))
    for start in (0, 12, 24):
        own, kept = values[start : start + 12], judgement.accepted[start : start + 12]
        low, high = np.quantile(own, [0.25, 0.75])
        assert kept.tolist() == ((own >= low) & (own <= high)).tolist()
        assert 4 <= kept.sum() <= 8


# -- writing ----------------------------------------------------------------------------------------------------------


def test_filter_keeps_what_passes_and_leaves_the_source_alone(scored: Dataset) -> None:
    before = {p: p.read_bytes() for p in Path(scored.storage.root).rglob("*") if p.is_file()}
    target = made(scored, Criteria((Range("ssim", low=0.7, reason="ssim < 0.7"),)), "good")
    assert target.info["count"] == target.table().num_rows == 2 * (18 - 7)
    assert min(target.table()["ssim"].to_pylist()) == pytest.approx(0.7)
    assert verify_dataset(target) == []
    assert all(path.read_bytes() == data for path, data in before.items())
    rejects = pq.read_table(scored.storage.path("manifests/good/rejects/shard-000000.parquet"))
    assert set(rejects["reason"].to_pylist()) == {"ssim < 0.7"}
    assert rejects.num_rows == 7
    originals = {row["key"]: pixels.tobytes() for row, pixels in scored.images()}
    assert all(originals[row["key"]] == pixels.tobytes() for row, pixels in target.images())
    assert target.shard_metadata(0)[STAMP] == VERSION  # its scores are still of this version


def test_reasons_of_the_rejects_stand_beside_their_image(gated: Dataset) -> None:
    criteria = Criteria((Range("ssim", low=0.65, reason="low"),), gates=(Range("sharpness", low=0.2, reason="soft"),),
                        no_duplicates=True, keep_hard=0.5, balance=True)  # fmt: skip
    target = made(gated, criteria, "good", view=True)
    judgement = judge_dataset(gated, criteria)
    rejects = pa.concat_tables(
        pq.read_table(gated.storage.path(f"manifests/good/rejects/shard-{n:06d}.parquet")).select(["key", "reason"])
        for n in gated.shard_numbers()
    ).to_pylist()
    keys = gated.table(["key"])["key"].to_pylist()
    said = {key: "; ".join(reasons) for key, reasons in zip(keys, judgement, strict=True)}
    assert {row["key"]: row["reason"] for row in rejects} == {
        key: said[key] for key, kept in zip(keys, judgement.accepted, strict=True) if not kept
    }
    assert {row["key"] for row in rejects}.isdisjoint(target.table(["key"])["key"].to_pylist())
    assert said["clinic-I-00000003"] == "soft; low"
    assert judgement.readmitted["I"]
    assert len(set(judgement.kept.values())) == 1


def test_a_view_copies_no_image_and_verifies(scored: Dataset) -> None:
    target = made(scored, Criteria((Range("ssim", low=0.7),)), "seen", view=True)
    assert not scored.storage.exists("shards/seen")
    assert len(list(target.images())) == 22
    assert verify_dataset(target) == []
    with pytest.raises(BuilderError, match="seen"):
        remove_dataset(scored.storage, "clinic")


def test_no_view_loses_its_images_and_a_view_of_a_view_neither(scored: Dataset) -> None:
    seen = made(scored, Criteria((Range("ssim", low=0.7),)), "seen", view=True)
    again = made(seen, Criteria((Range("ssim", low=0.9),)), "again", view=True)
    assert remove_dataset(scored.storage, "seen") == ["manifests/seen"]
    assert verify_dataset(again) == []
    with pytest.raises(BuilderError, match="again"):
        remove_dataset(scored.storage, "clinic")


def test_a_filter_overwrites_nothing_but_its_own_leftovers(scored: Dataset) -> None:
    """An unfinished dataset of the wanted name may be a job's, or the source itself."""
    scored.write_info(scored.info | {"state": "partial"})
    Dataset("job", scored.storage).write_info(scored.info | {"name": "job"})
    criteria = Criteria((Range("ssim", low=0.7),))
    for name, said in (("job", "'job' exists"), ("clinic", "'clinic' itself")):
        with pytest.raises(BuilderError, match=said):
            made(scored, criteria, name)
    good = made(scored, Criteria(), "good")
    good.write_info(good.info | {"state": "partial"})  # as an interrupted filter leaves it
    assert made(scored, criteria, "good").table().num_rows == 22
    assert scored.table().num_rows == COUNT


def test_equal_criteria_are_done_already_and_others_or_new_scores_are_refused(scored: Dataset) -> None:
    criteria = Criteria((Range("ssim", low=0.7),), keep_hard=0.0, quantiles=(Quantile("ssim", 0.1, 0.9),))
    created = made(scored, criteria, "good").info
    path = Path(scored.storage.path("manifests/good/shard-000000.parquet"))
    written = path.stat().st_mtime_ns
    assert made(scored, criteria, "good").info == created
    assert path.stat().st_mtime_ns == written
    with pytest.raises(BuilderError, match="made with other settings"):
        made(scored, Criteria(criteria.ranges), "good")
    scored.write_info(scored.info | {"scores": {"version": "two"}})
    with pytest.raises(BuilderError, match="made with other settings"):
        made(scored, criteria, "good")


def test_a_killed_filter_leaves_nothing_that_looks_whole_and_is_made_anew(builder, gated: Dataset) -> None:
    """Killed (SIGKILL) when the second of its shards is written."""
    script = (
        "import os, signal, builder.shards.filter as f\n"
        "from builder.shards.dataset import Dataset; from builder.shards.storage import Storage\n"
        "from builder.shards.criteria import Criteria\n"
        "write, n = f.write_manifest, []\n"
        "def killed(*a):\n"
        "    n.append(a); len(n) < 2 or os.kill(os.getpid(), signal.SIGKILL); write(*a)\n"
        "f.write_manifest = killed\n"
        "d = Dataset('clinic', Storage('.'))\n"
        "f.filter_dataset(d, Criteria(), f.judge_dataset(d, Criteria()), Dataset('good', Storage('.')), view=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=gated.storage.root)
    assert done.returncode == -signal.SIGKILL
    good = Dataset("good", gated.storage)
    assert good.info["state"] == "partial"
    assert "not complete" in builder("sheet", "good").output
    assert builder("filter", "clinic", "--name", "good", "--view").code == 0
    assert verify_dataset(good) == []
    assert good.info["state"] == "complete"


def test_a_dataset_that_grew_meanwhile_is_not_half_judged(scored: Dataset) -> None:
    judgement = judge_dataset(scored, Criteria())
    table = scored.shard_table(1)
    write_manifest(scored.storage, "manifests/clinic/shard-000002.parquet", table)
    with pytest.raises(BuilderError, match="grew while it was filtered"):
        filter_dataset(scored, Criteria(), judgement, Dataset("good", scored.storage))
    assert not Dataset("good", scored.storage).exists()


# -- the command ------------------------------------------------------------------------------------------------------


def keys_of(dataset: Dataset, name: str = "clinic-accepted") -> set[int]:
    """Which of the 36 crops a filtered dataset holds, counted through."""
    keys = Dataset(name, dataset.storage).table(["key"])["key"].to_pylist()
    return {"IPR".index(key[-10]) * 12 + int(key[-8:]) for key in keys}


EVERY = set(range(COUNT))
SSIM = [i % 18 / 10 for i in range(COUNT)]


@pytest.mark.parametrize(
    ("words", "lost"),
    [
        ([], {3, 7}),  # gates and copies
        (["--no-gates"], set()),
        (["--no-gates", "--max-copy-score", "auto"], {7}),
        (["--no-gates", "--max-copy-score", "0.99"], set()),
        (["--max-copy-score", "0.99"], {3}),
        (["--no-gates", "--no-duplicates"], {8}),
        (["--no-gates", "--min-ssim", "0.5"], {i for i in EVERY if SSIM[i] < 0.5}),
        (["--no-gates", "--min-ssim=0.5", "--max-ssim", "1.1"], {i for i in EVERY if not 0.5 <= SSIM[i] <= 1.1}),
        (["--no-gates", "--band", "ssim", "0.5", "1.1"], {i for i in EVERY if not 0.5 <= SSIM[i] <= 1.1}),
        (["--no-gates", "--band", "ssim", "0.5", "9", "--band", "phase_margin", "0", "0.15"],
         {i for i in EVERY if SSIM[i] < 0.5 or i % 12 > 5}),
        (["--no-gates", "--min-phase-margin", "0.155"], {i for i in EVERY if i % 12 < 6}),
        (["--no-gates", "--min-phase_margin", "0.155"], {i for i in EVERY if i % 12 < 6}),
        (["--no-gates", "--quantile", "phase-margin", "0.5", "1"], {i for i in EVERY if i % 12 < 6}),
        (["--no-gates", "--where", "phase <> 'P'"], set(range(12, 24))),
        (["--no-gates", "--where", "phase <> 'P' or ssim >= 0.5", "--balance"],
         {i for i in EVERY if 12 <= i < 24 and SSIM[i] < 0.5} | {7, 8, 9, 10, 11} | {31, 32, 33, 34, 35}),
        # hard is every third; of I, P, R pass 3, 6, 9, and 1, 2, 1 hard ones come back, the last (the surest) first
        (["--no-gates", "--min-ssim", "0.85", "--keep-hard", "0.5"],
         EVERY - {6, 9, 10, 11} - {*range(12, 19), 21} - {24, *range(27, 36)}),
        (["--no-gates", "--min-ssim", "0.85", "--keep-hard", "0.5", "--balance"],
         EVERY - {6, 9, 10, 11} - {*range(12, 16)} - {*range(27, 31)}),
        (["--min-ssim", "0.85", "--keep-hard", "0.9"],  # all hard ones but the blurred one
         EVERY - {0, 6, 9, 10, 11} - {*range(12, 19), 21} - {24, *range(27, 36)}),
    ],
)  # fmt: skip
def test_options(builder, gated: Dataset, words: list[str], lost: set[int]) -> None:
    result = builder("filter", "clinic", *words, "--view")
    assert result.code == 0, result.output
    assert keys_of(gated) == EVERY - lost
    assert f"{len(keys_of(gated)):,} images; rejects" in result.output
    assert "WARNING" in result.output or "--no-gates" not in words
    assert "nothing to do" in builder("filter", "clinic", *words, "--view").output


def test_keep_hard_prints_the_share_reached(builder, gated: Dataset) -> None:
    result = builder("filter", "clinic", "--min-ssim", "0.75", "--keep-hard", "0.3")
    assert result.code == 0, result.output
    assert result.output.count("hard images: ") == 3
    assert "re-admitted" in result.output
    assert "there are no more" not in result.output
    most = builder("filter", "clinic", "--min-ssim", "0.75", "--keep-hard", "0.9", "--dry-run")
    assert "90.0% was asked for, and there are no more" in most.output
    assert "nothing was written" in most.output


def test_the_yardstick_says_what_known_images_would_score(builder, gated: Dataset) -> None:
    output = builder("filter", "clinic", "--min-ssim", "0.7", "--no-gates", "--dry-run").output
    lines = {kind: next(line for line in output.splitlines() if words in line) for kind, words in KINDS.items()}
    assert lines["real"].split()[-9:] == ["60.0%", "60.0%", "15", "I", "60%,", "P", "60%,", "R", "60%"]
    assert lines["flat"].split()[-9:-6] == ["100.0%", "100.0%", "15"]
    warning = next(line for line in output.splitlines() if line.startswith("WARNING"))
    assert "flat images (mean colour) (100%)" in warning
    output = builder("filter", "clinic", "--min-ssim", "0.7", "--max-noise", "9", "--dry-run").output
    flat = next(line for line in output.splitlines() if KINDS["flat"] in line)
    assert flat.split()[-9:-6] == ["100.0%", "0.0%", "15"]
    assert "flat" not in next((line for line in output.splitlines() if line.startswith("WARNING")), "")
    assert "the score 'noise' of 'clinic' was not computed" in output


def test_balance_with_an_empty_phase_says_why_nothing_stays(builder, gated: Dataset) -> None:
    result = builder("filter", "clinic", "--where", "phase <> 'R'", "--balance")
    assert result.code == 1
    assert "no image of phase R passes: to balance, none of another phase stays" in result.output
    assert not Dataset("clinic-accepted", gated.storage).exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--band", "ssimm", "1", "2"], ["no such score: ssimm", "did you mean 'ssim'"]),
        (["--band", "copy_of", "1", "2"], ["no such score"]),
        (["--band", "ssim", "2", "1"], ["--band: 2 is above 1"]),
        (["--band", "ssim", "x", "1"], ["--band needs a number, not 'x'"]),
        (["--band", "ssim", "1"], ["--band", "3 arguments"]),
        (["--min-ssim", "0.8", "--max-ssim", "0.2"], ["0.8 is above 0.2"]),
        (["--min-ssim", "nan"], ["needs a number"]),
        (["--min-ssim", "auto"], ["needs a number"]),
        (["--min-ssim", "--no-gates"], ["needs a number, not '--no-gates'"]),
        (["--max-copy-score", "high"], ["needs a number or 'auto', not 'high'"]),
        (["--max-copy-scor", "auto"], ["no such option", "did you mean '--max-copy-score'"]),
        (["--quantile", "ssim", "0.9", "0.1"], ["--quantile: 0.9 is above 0.1"]),
        (["--quantile", "ssim", "0", "5"], ["5 is not between 0 and 1"]),
        (["--keep-hard", "20"], ["--keep-hard: 20 is not between 0 and 1"]),
        (["--keep-hard", "half"], ["--keep-hard needs a number"]),
        (["--min-lpips", "0.1"], ["'lpips' of 'clinic' was not computed: its weights are not there", "builder score"]),
        (["--band", "ssim_real_pct", "5", "95"], ["'ssim_real_pct' of 'clinic' was not computed", "builder score"]),
        (["--quantile", "realism", "0", "1"], ["'realism' of 'clinic' was not computed"]),
        (["more", "words"], ["unexpected extra argument"]),
        (["--where", "phase = 'I'; drop table x"], ["no condition over the manifest"]),
    ],
)  # fmt: skip
def test_wrong_use_is_one_message_and_exit_2(builder, gated: Dataset, words: list[str], said: list[str]) -> None:
    gated.write_info(gated.info | {"scores": {"missing": {"lpips": "its weights are not there"}}})
    result = builder("filter", "clinic", *words)
    assert result.code == 2, result.output
    assert result.output.count("error:") == 1
    assert "Traceback" not in result.output
    for part in said:
        assert part in result.output
    assert not Dataset("clinic-accepted", gated.storage).exists()


def test_what_was_never_scored_is_refused(builder, scored: Dataset) -> None:
    for words, said in (
        (["--no-gates", "--no-duplicates"], "duplicates were never looked for among the images of phase I"),
        (["--no-gates", "--keep-hard", "0.2"], "'phase_margin' of 'clinic' was not computed"),
        (["--no-gates", "--max-copy-score", "auto"], "no alarm of copies was calibrated"),
        (["--no-gates", "--max-copy-score", "0.9"], "'copy_score' of 'clinic' was not computed"),
        ([], "'clinic' has no gates: it was never scored"),
    ):
        result = builder("filter", "clinic", *words)
        assert result.code == 2, result.output
        assert said in result.output
        assert "builder score clinic" in result.output


def test_a_reference_without_a_copy_alarm_says_so(builder, gated: Dataset) -> None:
    save_reference(gated, made_up_reference(copy={}))
    assert "copies of training crops are not turned away" in builder("filter", "clinic", "--dry-run").output
    assert "no alarm of copies" in builder("filter", "clinic", "--max-copy-score", "auto").output


def test_the_first_of_a_phase_needs_no_duplicate_score(clinic: Dataset) -> None:
    one_each = [None if i % 12 == 5 else 0.1 for i in range(COUNT)]  # as after a filter or a shuffle
    with_scores(clinic, {"duplicate_score": one_each})
    assert judge_dataset(clinic, Criteria(no_duplicates=True)).accepted.all()
    with_scores(clinic, {"duplicate_score": [None, None, *one_each[2:]]})
    with pytest.raises(BuilderError, match="duplicates were never looked for among the images of phase I"):
        judge_dataset(clinic, Criteria(no_duplicates=True))


@pytest.mark.parametrize("other", ["two", None])
def test_scores_of_two_versions_are_refused(builder, clinic: Dataset, other: str | None) -> None:
    """A re-score that was killed after the first shard."""
    with_scores(clinic, {"ssim": [0.5] * COUNT}, version=other)
    first = clinic.shard_table(0)
    metadata = {**clinic.shard_metadata(0), STAMP: VERSION}
    write_manifest(clinic.storage, "manifests/clinic/shard-000000.parquet", first.replace_schema_metadata(metadata))
    result = builder("filter", "clinic", "--no-gates", "--min-ssim", "0.1")
    assert result.code == 2
    assert "of 2 versions" in result.output
    assert "builder score clinic --against REAL` again" in result.output


def test_older_manifests_without_a_column_are_refused(builder, gated: Dataset) -> None:
    for number in gated.shard_numbers():
        table = gated.shard_table(number).drop_columns(["ssim_real_pct"])
        write_manifest(gated.storage, f"manifests/clinic/shard-{number:06d}.parquet", table)
    result = builder("filter", "clinic", "--band", "ssim_real_pct", "5", "95")
    assert result.code == 2
    assert "there is no column 'ssim_real_pct'" in result.output
    assert "builder score" in result.output


def test_a_dataset_is_not_filtered_into_itself(builder, gated: Dataset) -> None:
    result = builder("filter", "clinic", "--name", "clinic")
    assert result.code == 2
    assert "cannot be 'clinic' itself" in result.output


def test_help_names_every_score_once_and_imports_no_torch(gated: Dataset) -> None:
    script = "import sys, builder.cli; sys.argv = {}\ntry: builder.cli.main()\nexcept SystemExit: pass\n"
    for words in (["builder", "filter", "--help"], ["builder", "filter", "clinic", "--keep-hard", "0.1", "--balance"]):
        done = subprocess.run(
            [sys.executable, "-c", script.format(words) + "print('torch' in sys.modules)"],
            capture_output=True, text=True, check=True, cwd=gated.storage.root,
        )  # fmt: skip
        assert done.stdout.strip().endswith("False"), done.stdout + done.stderr
        if "--help" in words:
            assert len(done.stdout.splitlines()) < 70
            assert all(name in done.stdout for name in NUMERIC_SCORES)

"""tune-filter: filters of a grid are compared at equal N; survivors are counted, figures are those of the modules."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from builder.errors import BuilderError
from builder.quality.features import load_extractor
from builder.quality.reference import save_reference
from builder.quality.sets.comparison import Naming, Side, compare
from builder.quality.sets.distances import frechet_distance
from builder.quality.sets.tune import ALL, NONE, draw, equal_sizes, make_cuts, plot_tuning, set_figures, tune
from builder.shards.criteria import Criteria, Range, judge
from builder.shards.dataset import Dataset
from tests.conftest import Result, write_real
from tests.lineages import ALIKE
from tests.test_filter import made_up_reference, with_scores

GATE = (Range("sharpness", low=0.2, reason="gate"),)


def toy_features() -> Any:
    """builder's own protocol `module:callable`: mean colour and contrast of the quarters of an image."""

    def features(images: Any) -> Any:
        halves = [part for half in images.float().chunk(2, 2) for part in half.chunk(2, 3)]
        import torch

        return torch.cat([torch.cat([part.mean((2, 3)), part.std((2, 3))], 1) for part in halves], 1)

    return features


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Dataset, Dataset]:
    """Synthetic `made` (24 of each phase, sharpness_real_pct 0, 4, ..., 92 over a phase) and real `clinic`."""
    real = write_real(tmp_path, per_phase=60)
    made = write_real(tmp_path, "made", per_phase=24)
    with_scores(
        made,
        {
            "sharpness_real_pct": [4.0 * (i % 24) for i in range(72)],
            "ssim_real_pct": [4.0 * (23 - i % 24) for i in range(72)],
            "sharpness": [0.1 if i % 24 == 23 else 0.5 for i in range(72)],
            "copy_score": [0.3] * 72,
        },
    )
    lineage = {"known": True, "key_fingerprint": "test", "patients": [], **ALIKE}
    made.write_info(made.info | {"origin": "synthetic", "lineage": lineage})
    save_reference(made, made_up_reference())
    return made, real


def run(pair: tuple[Dataset, Dataset], **options: Any) -> dict[str, Any]:
    extractor = load_extractor("tests.test_tune:toy_features")
    return tune(*pair, "val", extractor, GATE, least=10, progress=False, **options)


def test_cuts_are_what_filter_would_keep(pair: tuple[Dataset, Dataset]) -> None:
    table = pair[0].table()
    cuts = make_cuts(table, ["sharpness_real_pct", "ssim_real_pct"], [0, 20, 40], GATE)
    assert len(cuts) == 2 * (1 + 3 * 3)
    by = {(cut.series, cut.threshold, cut.gates): cut.accepted for cut in cuts}
    assert by[NONE, None, False].all()
    assert by[NONE, None, True].sum() == 69
    for low in (0, 20, 40):
        ranges = (Range("sharpness_real_pct", low=low), Range("ssim_real_pct", low=low))
        assert (by[ALL, low, True] == judge(table, Criteria(ranges, gates=GATE)).accepted).all()
        assert (by["ssim_real_pct", low, False] == judge(table, Criteria(ranges[1:])).accepted).all()


counts = st.fixed_dictionaries({code: st.integers(0, 60) for code in "IPR"})


@settings(max_examples=100, deadline=None)
@given(
    st.lists(counts, min_size=1, max_size=6), st.lists(st.integers(1, 9), min_size=3, max_size=3), st.integers(1, 20)
)
def test_equal_sizes_can_be_drawn_from_every_filter(survivors: list[dict], weights: tuple, least: int) -> None:
    shares = {code: weight / sum(weights) for code, weight in zip("IPR", weights, strict=True)}
    limits = dict.fromkeys("IPR", 30)
    enough = [each for each in survivors if min(each.values()) >= least]
    if not enough:
        with pytest.raises(BuilderError, match="no filter of the grid leaves"):
            equal_sizes(survivors, shares, limits, least)
        return
    sizes = equal_sizes(survivors, shares, limits, least)
    assert all(sizes[code] <= min(30, *(each[code] for each in enough)) for code in "IPR")
    total = min(min(30, *(each[code] for each in enough)) / shares[code] for code in "IPR")
    assert all(abs(sizes[code] - total * shares[code]) <= 1 for code in "IPR")


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("IP"), st.booleans(), st.booleans()), min_size=1, max_size=50), st.integers(0, 9)
)
def test_draws_are_of_accepted_rows_and_share_what_they_can(rows: list[tuple], seed: int) -> None:
    phases = np.array([phase for phase, *_ in rows])
    loose = np.array([a or b for _, a, b in rows])
    strict = np.array([a and b for _, a, b in rows])
    sizes = {code: int((strict & (phases == code)).sum()) for code in "IP"}
    drawn = draw(loose, phases, sizes, seed)
    assert len(set(drawn.tolist())) == len(drawn)
    assert loose[drawn].all()
    assert {code: int((phases[drawn] == code).sum()) for code in "IP"} == sizes
    assert sorted(draw(strict, phases, sizes, seed)) == np.flatnonzero(strict).tolist()
    everything = {code: int((loose & (phases == code)).sum()) for code in "IP"}
    assert set(drawn) <= set(draw(loose, phases, everything, seed))


def test_rows_have_equal_n_a_floor_and_the_modules_figures(pair: tuple[Dataset, Dataset]) -> None:
    result = run(pair, scores=["sharpness_real_pct", "ssim_real_pct"], grid=[0, 20, 50])
    # the strictest filter with at least 10 left of a phase: one score from 50 up, with the gates, 10 of each phase
    assert result["n_by_phase"] == {"I": 10, "P": 10, "R": 10}
    rows = {(row["filter"], row["threshold"], row["gates"]): row for row in result["rows"]}
    assert rows[NONE, None, False]["survivors"] == {"I": 24, "P": 24, "R": 24}
    assert rows["sharpness_real_pct", 50, True]["survivors"] == {"I": 10, "P": 10, "R": 10}
    assert rows[ALL, 50, True]["figures"] == {}  # no image is above the median by both
    assert rows[ALL, 50, True]["share"] == 0
    assert rows[NONE, None, False]["figures"] == rows["ssim_real_pct", 0, False]["figures"]
    assert all(math.isfinite(v) for row in result["rows"] for v in row["figures"].values())
    strict = rows["sharpness_real_pct", 50, True]
    assert max(strict["sd"].values()) == pytest.approx(0, abs=1e-9)  # all that survive were drawn, each time
    assert next(value for name, value in result["floor"].items() if name.startswith("fd[")) > 0
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert run(pair, scores=["sharpness_real_pct", "ssim_real_pct"], grid=[0, 20, 50]) == result


def test_figures_of_equal_sets_and_the_fd_of_the_module() -> None:
    x = np.random.default_rng(0).normal(size=(40, 6))
    figures = set_figures(x, x)
    assert figures["fd"] == pytest.approx(0, abs=1e-6)
    assert figures["precision"] == figures["recall"] == figures["coverage"] == 1
    assert figures["vendi_ratio"] == pytest.approx(1)
    # Neighbours are those of features of unit length, as `builder metrics` has them: images of weak features are apart.
    y = np.random.default_rng(1).normal(size=(40, 6))
    sides = (Side(z, [str(i) for i in range(40)]) for z in (x, 0.1 * y))
    table = compare(*sides, Naming("toy", standard=False))
    for name, value in set_figures(x, 0.1 * y).items():
        assert value == pytest.approx(table[f"{name}[toy]"].value)
    assert set_figures(x, x + 1)["fd"] == pytest.approx(frechet_distance(x, x + 1)) == pytest.approx(6)


def test_default_scores_are_those_that_were_computed(pair: tuple[Dataset, Dataset]) -> None:
    result = run(pair, grid=[0, 20])
    assert result["scores"] == ["sharpness_real_pct", "ssim_real_pct"]


def without_lineage(made: Dataset, _: Dataset) -> None:
    made.write_info(made.info | {"lineage": {"known": False}})


def leak(made: Dataset, _: Dataset) -> None:
    made.write_info(made.info | {"lineage": made.info["lineage"] | {"patients": ["49" + f"{4:030x}"]}})


@pytest.mark.parametrize(
    ("change", "options", "said"),
    [
        (without_lineage, {}, "unknown"),
        (leak, {}, "trained on 1 patients"),
        (None, {"scores": ["realism_real_pct"]}, "'realism_real_pct' of 'made' was not computed"),
        (None, {"grid": [99]}, None),
    ],
)
def test_what_cannot_be_compared_is_refused(pair, change, options: dict, said: str | None) -> None:
    if change:
        change(*pair)
    if said is None:  # no threshold leaves anything: the unfiltered set still has figures
        rows = run(pair, **options)["rows"]
        assert [bool(row["figures"]) for row in rows] == [row["threshold"] is None for row in rows]
        return
    with pytest.raises(BuilderError, match=said):
        run(pair, **options)
    if change:
        result = run(pair, grid=[0], allow_leak="a test")
        assert "a test" in result["lineage"]


def test_too_few_images_and_a_wrong_split_are_explained(pair: tuple[Dataset, Dataset]) -> None:
    extractor = load_extractor("tests.test_tune:toy_features")
    with pytest.raises(BuilderError, match="no filter of the grid leaves 25 images of each phase"):
        tune(*pair, "val", extractor, GATE, least=25, progress=False)
    with pytest.raises(BuilderError, match="train"):
        tune(*pair, "train", extractor, GATE, progress=False)


def said_and_refused(result: Result, words: str) -> None:
    assert result.code == 2, result.output
    assert words in result.output
    assert "Traceback" not in result.output


def test_the_command_prints_a_table_and_draws_a_plot(builder, pair: tuple[Dataset, Dataset]) -> None:
    words = [
        "tune-filter",
        "made",
        "--against",
        "clinic",
        "--features",
        "tests.test_tune:toy_features",
        "--least",
        "10",
    ]
    result = builder(*words, "--grid", "0,20,50", "--json", "out/tuning.json")
    assert result.code == 0, result.output
    assert "figures at N = 30 (10 I, 10 P, 10 R) of every filter" in result.output
    assert "floor" in result.output
    lines = [line.split() for line in result.output.splitlines() if line.startswith("sharpness_real_pct")]
    assert [line[:6] for line in lines[:2]] == [["sharpness_real_pct", "0", "no", "24", "24", "24"],
                                                ["sharpness_real_pct", "20", "no", "19", "19", "19"]]  # fmt: skip
    with Image.open("made-tuning.png") as picture:
        assert picture.width > 1000
        assert len(picture.convert("RGB").getcolors(10**6) or []) > 50
    saved = json.loads(Path("out/tuning.json").read_text())
    assert len(saved["rows"]) == 2 * (1 + 3 * 3)
    said_and_refused(builder(*words, "--score", "sharpnes"), "no such score: sharpnes")
    said_and_refused(builder(*words, "--grid", "0,x"), "--grid 0,x is not a list of numbers")
    said_and_refused(builder("tune-filter", "clinic", "--against", "clinic"), "never scored")


def test_a_plot_of_one_score_without_figures_of_some_filters(pair: tuple[Dataset, Dataset], tmp_path: Path) -> None:
    result = run(pair, scores=["ssim_real_pct"], grid=[0, 20, 90])
    plot_tuning(result, tmp_path / "new/plot.png")
    with Image.open(tmp_path / "new/plot.png") as picture:
        assert picture.size[0] > 600

"""What a filter says of phases: thresholds that are stricter for one than for another, and lopsided results."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from builder.cli.judgement import LOPSIDED, UNEVEN, lopsided, uneven_thresholds
from builder.phases import HEALING_PHASES
from builder.shards.criteria import Criteria, Range, judge


@dataclass
class Source:
    """As much of a dataset as the warnings ask of it."""

    classes: Any = HEALING_PHASES


def crops(**ssim: list[float]) -> pa.Table:
    """Rows of phases with these values of SSIM."""
    rows = [{"phase": code, "ssim": value} for code, values in ssim.items() for value in values]
    return pa.Table.from_pylist(rows, pa.schema([("phase", pa.string()), ("ssim", pa.float32())]))


def at_least(low: float, column: str = "ssim") -> Range:
    return Range(column, low=low, reason=f"{column} < {low:g}")


def test_a_threshold_that_real_crops_of_two_phases_pass_unequally_points_to_the_percentile() -> None:
    real = crops(I=[0.5, 0.8, 0.8, 0.8], P=[0.5, 0.8, 0.8, 0.8], R=[0.5, 0.5, 0.5, 0.8])
    (line,) = uneven_thresholds(real, (at_least(0.7),))
    assert "--min-ssim 0.7 keeps 75% of real I crops and 25% of R" in line
    assert line.endswith("--min-ssim-real-pct 42")  # 7 of 12 pass in all
    (line,) = uneven_thresholds(real, (Range("ssim", high=0.6, reason="ssim > 0.6"),))
    assert "--max-ssim 0.6 keeps 75% of real R crops and 25% of I" in line
    assert line.endswith("--max-ssim-real-pct 42")
    (line,) = uneven_thresholds(real, (Range("ssim", 0.6, 0.9),))
    assert line.endswith("--band ssim_real_pct 21 79")


@given(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=9), st.floats(0, 1))
def test_what_is_as_strict_for_every_phase_is_not_mentioned(values: list[float], low: float) -> None:
    assert uneven_thresholds(crops(I=values, P=values, R=values), (at_least(low),)) == []


@pytest.mark.parametrize("column", ["ssim_real_pct", "duplicate_score", "seed"])
def test_a_percentile_and_what_has_none_are_not_mentioned(column: str) -> None:
    real = crops(I=[0.0, 0.0], P=[1.0, 1.0]).rename_columns(["phase", column])
    assert uneven_thresholds(real, (at_least(0.5, column),)) == []
    assert UNEVEN < 1


def kept(made: dict[str, int], passing: dict[str, int]) -> list[str]:
    """What is said where so many of the images of each phase pass `ssim >= 0.7`."""
    values = {code: [0.8] * passing.get(code, 0) + [0.5] * (n - passing.get(code, 0)) for code, n in made.items()}
    judgement = judge(crops(**values), Criteria((at_least(0.7),)))
    return lopsided(judgement, Source())  # type: ignore[arg-type]


def test_an_empty_phase_is_said_with_the_reason_and_a_remedy() -> None:
    (warning,) = kept({"I": 20, "P": 20, "R": 20}, {"I": 5, "P": 9})
    assert "WARNING: no image of phase R is kept" in warning
    assert "20 of 20 were turned away by 'ssim < 0.7'" in warning
    assert "--min-ssim-real-pct" in warning and "--weights I=1,P=1,R=2" in warning


def test_what_a_condition_turned_away_is_said_of_the_condition() -> None:
    judgement = judge(crops(I=[0.8] * 9, P=[0.8] * 9, R=[0.8] * 9), Criteria(where="phase <> 'R'"))
    (warning,) = lopsided(judgement, Source())  # type: ignore[arg-type]
    assert "9 of 9 were turned away by 'not phase <> 'R''" in warning and "loosen --where" in warning


def test_a_phase_under_a_tenth_of_another_is_said() -> None:
    (warning,) = kept({"I": 50, "P": 50, "R": 50}, {"I": 50, "P": 40, "R": 4})
    assert "only 4 images of phase R are kept, less than a tenth of I's 50" in warning
    assert kept({"I": 50, "P": 50, "R": 50}, {"I": 50, "P": 40, "R": 5}) == []
    (made_so,) = kept({"I": 50, "R": 1}, {"I": 50, "R": 1})
    assert "there are no more of it" in made_so and "--balance" in made_so


@given(st.lists(st.integers(0, 60), min_size=3, max_size=3))
def test_exactly_the_phases_below_a_tenth_of_the_largest_are_said(counts: list[int]) -> None:
    passing = dict(zip("IPR", counts, strict=True))
    said = kept(dict.fromkeys("IPR", 60), passing)
    expected = [code for code in "IPR" if passing[code] * LOPSIDED < max(counts)]
    assert len(said) == len(expected)
    assert all(f"phase {code} " in warning for code, warning in zip(expected, said, strict=True))
    assert not np.any([f"phase {code} " in "".join(said) for code in set("IPR") - set(expected)])

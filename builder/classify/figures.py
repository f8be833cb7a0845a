"""What the answers on test patients say: macro-F1, kappa, recalls and gains, each with its interval.

The intervals (95 %) cover two kinds of chance: other test patients, and other seeds (weights, order, augmentation, and
the real training patients where these are limited). The two are crossed, for every training is judged on the same
patients, and both are drawn anew, independently, in each resample (pigeonhole bootstrap; Owen 2007, Ann. Appl. Stat.
1:386, who shows that it rather overstates the spread than understates it): as many test patients as there are, with
replacement, each with all crops; and n - 1 of the n seeds, with replacement, because n of so few would understate their
spread (Rao & Wu 1988, JASA 83:231). A figure is computed from the crops of the resampled patients for each resampled
seed, and averaged over these. A gain is the difference from ratio 0 with the same patients and the same seeds. With one
seed the intervals are of patients alone. They are not widened for the number of ratios that are looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import sklearn
from sklearn.metrics import cohen_kappa_score, precision_recall_fscore_support

from builder.quality.sets.bootstrap import interval, patient_counts

MACRO_F1, KAPPA = "macro_f1", "kappa"
BOUNDS = {MACRO_F1: (0.0, 1.0), KAPPA: (-1.0, 1.0)}  # of a figure; a recall's are (0, 1)
HELPS, HARMS, NEITHER = "helps", "harms", "does not help: the interval holds 0"


def names_of(codes: Sequence[str]) -> list[str]:
    return [MACRO_F1, KAPPA, *(f"recall_{code}" for code in codes)]


def figures_of(confusion: np.ndarray) -> np.ndarray:
    """Figures, in the order of `names_of`, of a table of counts [true, predicted]: float [2 + classes].

    Macro-F1 is over the classes that have crops (a resample may lack a rare one); the recall of another one is NaN.
    """
    true, predicted = (axis.ravel() for axis in np.indices(confusion.shape))
    weights = confusion.ravel()
    there = np.flatnonzero(confusion.sum(1))
    _, recall, f1, _ = precision_recall_fscore_support(
        true, predicted, labels=there, sample_weight=weights, zero_division=0
    )
    recalls = np.full(len(confusion), np.nan)
    recalls[there] = recall
    return np.array([f1.mean(), cohen_kappa_score(true, predicted, sample_weight=weights), *recalls])


def summarise(
    tables: Mapping[float, np.ndarray], codes: Sequence[str], replicates: int, seed: int = 0,
    tick: Callable[[], object] = lambda: None,
) -> dict[float, dict[str, Any]]:  # fmt: skip
    """Figures, gains and a verdict by ratio.

    tables: ratio -> counts [seeds, patients, true, predicted]; ratio 0 is what the others are compared with.
    Of each ratio: figures {name: [value, low, high]}; of each but 0 also gains, likewise, and the verdict on macro-F1.
    low and high are None where an interval cannot be told. `tick` is called at each resample.
    """
    names, ratios = names_of(codes), sorted(tables)
    seeds, patients = tables[0.0].shape[:2]
    chance = np.random.default_rng(seed)
    patient_weights = patient_counts([f"{number:09d}" for number in range(patients)], replicates, chance)
    seed_weights = chance.multinomial(max(1, seeds - 1), np.full(seeds, 1 / seeds), size=replicates)
    with sklearn.config_context(skip_parameter_validation=True, assume_finite=True):
        values = {ratio: _mean(tables[ratio], np.ones(patients), np.ones(seeds)) for ratio in ratios}
        drawn: dict[float, list[np.ndarray]] = {ratio: [] for ratio in ratios}
        for by_patient, by_seed in zip(patient_weights, seed_weights, strict=True):
            for ratio in ratios:
                drawn[ratio].append(_mean(tables[ratio], by_patient, by_seed))
            tick()
    resamples = {ratio: np.array(rows) for ratio, rows in drawn.items()}
    return {ratio: _described(ratio, names, values, resamples) for ratio in ratios}


def _mean(tables: np.ndarray, patients: np.ndarray, seeds: np.ndarray) -> np.ndarray:
    """Figures of the patients, each as often as it was drawn, averaged over the seeds, likewise."""
    there = np.flatnonzero(seeds)
    rows = [figures_of(np.tensordot(patients, tables[number], 1)) for number in there]
    return np.asarray(np.average(rows, axis=0, weights=seeds[there]))


def _described(
    ratio: float, names: Sequence[str], values: Mapping[float, np.ndarray], resamples: Mapping[float, np.ndarray]
) -> dict[str, Any]:
    figures = {
        name: _with_interval(values[ratio][i], resamples[ratio][:, i], BOUNDS.get(name, (0.0, 1.0)))
        for i, name in enumerate(names)
    }
    if ratio == 0:
        return {"figures": figures}
    gain, spread = values[ratio] - values[0.0], resamples[ratio] - resamples[0.0]
    gains = {name: _with_interval(gain[i], spread[:, i], (-np.inf, np.inf)) for i, name in enumerate(names)}
    return {"figures": figures, "gains": gains, "verdict": verdict(gains[MACRO_F1])}


def verdict(gain: Sequence[float | None]) -> str:
    """What [value, low, high] of a gain says."""
    _, low, high = gain
    if low is not None and low > 0:
        return HELPS
    if high is not None and high < 0:
        return HARMS
    return NEITHER


def _with_interval(value: float, resamples: np.ndarray, bounds: tuple[float, float]) -> list[float | None]:
    low, high = interval(float(value), resamples, bounds) or (None, None)
    return [float(value), low, high]

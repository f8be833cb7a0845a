"""What the answers on test patients say: macro-F1, kappa, recalls and gains, each with its interval.

The intervals (95 %) cover two kinds of chance: other test patients, and other seeds (weights, order, augmentation, and
the real training patients where these are limited). The two are crossed, for every training is judged on the same
patients, and both are drawn anew, independently, in each resample (pigeonhole bootstrap; Owen 2007, Ann. Appl. Stat.
1:386, who shows that it rather overstates the spread than understates it): as many test patients as there are, with
replacement, each with all crops; and n - 1 of the n seeds, with replacement, because n of so few would understate their
spread (Rao & Wu 1988, JASA 83:231). A figure is computed from the crops of the resampled patients for each resampled
seed, and averaged over these. A gain is the difference from ratio 0 with the same patients and the same seeds. With one
seed the intervals are of patients alone. They are not widened for the number of ratios that are looked at; and with
five seeds and 41 patients some 9 % of them, not 5 %, leave out 0 where there is no gain (answers simulated in a test).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from builder.quality.sets.bootstrap import LEVEL, patient_counts

MACRO_F1, KAPPA = "macro_f1", "kappa"
HELPS, HARMS, NEITHER = "helps", "harms", "does not help: the interval holds 0"


def names_of(codes: Sequence[str]) -> list[str]:
    return [MACRO_F1, KAPPA, *(f"recall_{code}" for code in codes)]


def figures_of(tables: np.ndarray) -> np.ndarray:
    """Figures, in the order of `names_of`, of tables of counts [..., true, predicted]: float [..., 2 + classes].

    What sklearn.metrics' f1_score, cohen_kappa_score and recall_score say of the same crops (a test compares them);
    those take one list of crops at a time, and thousands of resamples would take minutes. Macro-F1 is over the classes
    that have crops (a resample may lack a rare one); the recall of another one is NaN, and so is kappa where one class
    alone is there and seen.
    """
    right = np.diagonal(tables, axis1=-2, axis2=-1).astype(float)
    true, seen, total = tables.sum(-1), tables.sum(-2), tables.sum((-2, -1))
    with np.errstate(invalid="ignore"):
        recall, f1 = right / true, 2 * right / (true + seen)
        agreed, by_chance = right.sum(-1) / total, (true * seen).sum(-1) / total**2
        kappa = (agreed - by_chance) / (1 - by_chance)
    macro = np.nanmean(np.where(true > 0, f1, np.nan), -1)
    return np.concatenate([macro[..., None], kappa[..., None], recall], -1)


def summarise(
    tables: Mapping[float, np.ndarray], codes: Sequence[str], replicates: int, seed: int = 0
) -> dict[float, dict[str, Any]]:
    """Figures, gains and a verdict by ratio.

    tables: ratio -> counts [seeds, patients, true, predicted]; ratio 0 is what the others are compared with.
    Of each ratio: figures {name: [value, low, high]}; of each but 0 also gains, likewise, and the verdict on macro-F1.
    low and high are None where an interval cannot be told.
    """
    seeds, patients = tables[0.0].shape[:2]
    chance = np.random.default_rng(seed)
    by_patient = patient_counts([f"{number:09d}" for number in range(patients)], replicates, chance)
    by_seed = chance.multinomial(max(1, seeds - 1), np.full(seeds, 1 / seeds), size=replicates)
    values = {ratio: figures_of(table.sum(1)).mean(0) for ratio, table in tables.items()}
    resamples = {ratio: _resampled(table, by_patient, by_seed) for ratio, table in tables.items()}
    return {ratio: _described(ratio, names_of(codes), values, resamples) for ratio in sorted(tables)}


def _resampled(table: np.ndarray, by_patient: np.ndarray, by_seed: np.ndarray) -> np.ndarray:
    """Figures [R, 2 + classes] over how often each patient [R, P] and each seed [R, S] was drawn."""
    figures = figures_of(np.einsum("rp,sptq->rstq", by_patient, table))
    drawn = np.where(by_seed[..., None] > 0, figures * by_seed[..., None], 0)  # NaN of a seed not drawn is no matter
    return np.asarray(drawn.sum(1) / by_seed.sum(1)[:, None])


def _described(
    ratio: float, names: Sequence[str], values: Mapping[float, np.ndarray], resamples: Mapping[float, np.ndarray]
) -> dict[str, Any]:
    figures = {name: _with_interval(values[ratio][i], resamples[ratio][:, i]) for i, name in enumerate(names)}
    if ratio == 0:
        return {"figures": figures}
    gain, spread = values[ratio] - values[0.0], resamples[ratio] - resamples[0.0]
    gains = {name: _with_interval(gain[i], spread[:, i]) for i, name in enumerate(names)}
    return {"figures": figures, "gains": gains, "verdict": verdict(gains[MACRO_F1])}


def verdict(gain: Sequence[float | None]) -> str:
    """What [value, low, high] of a gain says."""
    _, low, high = gain
    if low is not None and low > 0:
        return HELPS
    if high is not None and high < 0:
        return HARMS
    return NEITHER


def _with_interval(value: float, resamples: np.ndarray) -> list[float | None]:
    """The value between the 2.5 % and 97.5 % quantiles of its resamples; these are None when half of them are NaN.

    Plain quantiles: shares are hardly biased by resampling, and where most resamples agree (a recall of 1), quantiles
    moved to the value (as those of quality.sets.bootstrap) would leave out 0 for one crop of one seed.
    """
    known = resamples[np.isfinite(resamples)]
    if 2 * len(known) <= len(resamples):
        return [float(value), None, None]
    low, high = np.quantile(known, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return [float(value), min(float(low), float(value)), max(float(high), float(value))]

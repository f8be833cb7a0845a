"""How many images survive a filter, and what becomes of the set's figures: over a grid of thresholds.

Figures of sets of different size cannot be compared (a Fréchet distance falls as N grows), so every filter of the grid
is judged by as many survivors of each phase, drawn at random, and so is the floor: real training crops in their place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from builder import plotting
from builder.errors import BuilderError
from builder.quality.feature_scores import unit_length
from builder.quality.sets.comparison import Naming
from builder.quality.sets.distances import frechet_distance, kernel_distance
from builder.quality.sets.diversity import VendiRatio
from builder.quality.sets.manifold import manifold_scores
from builder.quality.sets.scores import describe, held_out_and_training, require_comparable
from builder.shards.criteria import Criteria, Range, judge
from builder.shards.dataset import Dataset, one_size
from builder.shards.filter import judge_dataset

if TYPE_CHECKING:
    from builder.quality.features.extractor import Extractor

SCORES = tuple(f"{name}_real_pct" for name in ("phase_probability", "realism", "sharpness", "ssim"))
GRID = (0.0, 5.0, 10.0, 25.0, 50.0)
DRAWS = 3  # of the survivors; figures are their mean
LEAST = 50  # survivors of each phase, below which a filter gets no figures: N of all falls to its N
ALL, NONE = "all of them", "no threshold"

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Cut:
    """One filter of the grid: at least `threshold` of a score (or of all: ALL), with the gates or without."""

    series: str
    threshold: float | None
    gates: bool
    accepted: np.ndarray  # bool [N], over the images of the dataset

    def survivors(self, phases: np.ndarray, codes: Sequence[str]) -> dict[str, int]:
        return {code: int((self.accepted & (phases == code)).sum()) for code in codes}


def make_cuts(table: pa.Table, scores: Sequence[str], grid: Sequence[float], gates: Sequence[Range]) -> list[Cut]:
    """The filters of the grid over manifest rows: none at all, each score and all of them at each threshold; each
    once without the gates and once with them."""
    asked: list[tuple[str, float | None, tuple[str, ...]]] = [(NONE, None, ())]
    asked += [(score, low, (score,)) for score in scores for low in grid]
    asked += [(ALL, low, tuple(scores)) for low in grid] if len(scores) > 1 else []
    cuts = []
    for gated in (False, True):
        for series, low, columns in asked:
            ranges = tuple(Range(column, low=low, reason=column) for column in columns)
            judgement = judge(table, Criteria(ranges, gates=tuple(gates) if gated else ()))
            cuts.append(Cut(series, low, gated, judgement.accepted))
    return cuts


def equal_sizes(
    survivors: Sequence[Mapping[str, int]], shares: Mapping[str, float], limits: Mapping[str, int], least: int
) -> dict[str, int]:
    """How many of each phase every filter can give, in the proportions `shares` (sum 1) and within `limits`.

    Filters that leave fewer than `least` of a phase are left out of account. BuilderError when all of them do.
    """
    enough = [counts for counts in survivors if all(counts[code] >= least for code in shares)]
    if not enough:
        raise BuilderError(
            f"no filter of the grid leaves {least} images of each phase ({', '.join(shares)})",
            "generate more, or ask for fewer with --least",
        )
    smallest = {code: min(limits[code], *(counts[code] for counts in enough)) for code in shares}
    total = min(smallest[code] / share for code, share in shares.items())
    return {code: math.floor(total * share + 1e-9) for code, share in shares.items()}


def set_figures(real: np.ndarray, other: np.ndarray) -> dict[str, float]:
    """The figures that the grid is judged by, of features [N, D] against real ones [M, D], in random order; defined as
    in sets.comparison."""
    vendi = VendiRatio(real, other)
    return {
        "fd": frechet_distance(real, other),
        "kd": kernel_distance(real, other),
        **manifold_scores(unit_length(real), unit_length(other)),
        "vendi_ratio": vendi(np.ones(len(real), int), np.ones(len(other), int)),
    }


def mean_figures(
    reference: np.ndarray, features: Callable[[np.ndarray], np.ndarray], draws: Sequence[np.ndarray]
) -> tuple[dict[str, float], dict[str, float]]:
    """Mean and standard deviation of the figures over draws (indices that `features` takes) of a set."""
    found = [set_figures(reference, features(drawn)) for drawn in draws]
    values = {name: np.array([each[name] for each in found]) for name in found[0]}
    return {n: float(v.mean()) for n, v in values.items()}, {n: float(v.std()) for n, v in values.items()}


def draw(accepted: np.ndarray, phases: np.ndarray, sizes: Mapping[str, int], seed: int) -> np.ndarray:
    """As many accepted rows of each phase, in random order. Equal seeds take rows in one order, whatever is accepted,
    so that two filters share what they can."""
    order = np.random.default_rng(seed).permutation(len(accepted))
    order = order[accepted[order]]
    taken = np.zeros(len(accepted), bool)
    for code, n in sizes.items():
        taken[order[phases[order] == code][:n]] = True
    return order[taken[order]]


def tune(
    synthetic: Dataset,
    real: Dataset,
    split: str,
    extractor: Extractor,
    gates: Sequence[Range],
    *,
    scores: Sequence[str] = (),
    grid: Sequence[float] = GRID,
    least: int = LEAST,
    seed: int = 0,
    allow_leak: str | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Survivors and figures of every filter of the grid against a held-out `split` of `real`; plain data for JSON.

    `scores`: by default those of SCORES that were computed. The floor is what as many real training crops score.
    Raises BuilderError for scores that were never computed, a split that is empty or not held out, a possible leak
    without the reason `allow_leak`, and where no filter leaves `least` images of each phase.
    """
    lineage = require_comparable(synthetic, real, split, allow_leak)
    table = synthetic.table()
    scores = list(scores) or [score for score in SCORES if score in table.column_names and _computed(table, score)]
    # Says what is wrong with the scores, once for all filters.
    judge_dataset(synthetic, Criteria(tuple(Range(score) for score in scores), gates=tuple(gates)))
    reference, training = held_out_and_training(real, split)
    phases = np.array(table["phase"].to_pylist())
    there = set(phases) & {row["phase"] for row in reference} & {row["phase"] for row in training}
    codes = [code for code in synthetic.classes.codes if code in there]
    reference = [row for row in reference if row["phase"] in codes]
    if not codes:
        raise BuilderError(
            f"'{synthetic.name}' and the train and {split} splits of '{real.name}' have no phase in common",
            "name another --split, or pack more patients",
        )
    own, train = (np.array([row["phase"] for row in rows]) for rows in (reference, training))
    cuts = make_cuts(table, scores, grid, gates)
    survivors = [cut.survivors(phases, synthetic.classes.codes) for cut in cuts]
    shares = {code: float((own == code).mean()) for code in codes}
    limits = {code: int((train == code).sum()) for code in codes}
    sizes = equal_sizes(survivors, shares, limits, least)

    seeds = range(seed, seed + DRAWS)
    size = one_size(table)
    chosen = [
        [draw(cut.accepted, phases, sizes, s) for s in seeds] if all(left[code] >= least for code in codes) else []
        for cut, left in zip(cuts, survivors, strict=True)
    ]
    real_features = _features(real, [*reference, *training], extractor, size, progress)
    reference_features, train_features = np.split(real_features, [len(reference)])
    needed = np.unique(np.concatenate([drawn for draws in chosen for drawn in draws]))
    features = np.zeros((len(phases), extractor.dimension), np.float32)
    features[needed] = _features(synthetic, table.take(needed).to_pylist(), extractor, size, progress)
    order = np.random.default_rng(seed).permutation(len(reference))
    reference_features = reference_features[order]

    naming = Naming(extractor.name, extractor.standard)
    floor_draws = [draw(np.ones(len(train), bool), train, sizes, s) for s in seeds]
    floor, floor_sd = mean_figures(reference_features, lambda rows: train_features[rows], floor_draws)
    known: dict[bytes, tuple[dict[str, float], dict[str, float]]] = {}  # filters that turn nothing away are alike
    rows = []
    for cut, left, draws in tqdm(
        list(zip(cuts, survivors, chosen, strict=True)), "figures", unit="filter", disable=not progress
    ):
        key = cut.accepted.tobytes()
        if draws and key not in known:
            known[key] = mean_figures(reference_features, lambda rows: features[rows], draws)
        mean, sd = known[key] if draws else ({}, {})
        rows.append(
            {
                "filter": cut.series, "threshold": cut.threshold, "gates": cut.gates, "survivors": left,
                "share": float(cut.accepted.mean()), "figures": _named(mean, naming), "sd": _named(sd, naming),
            }
        )  # fmt: skip
    return {
        "dataset": synthetic.name, "against": real.name, "split": split, "seed": seed, "draws": DRAWS, "least": least,
        "image_size": size, "extractor": describe(extractor), "lineage": lineage, "allow_leak": allow_leak,
        "scores": scores, "n": sum(sizes.values()), "n_by_phase": sizes, "n_reference": len(reference),
        "floor": _named(floor, naming), "floor_sd": _named(floor_sd, naming), "rows": rows,
    }  # fmt: skip


def plot_tuning(result: Mapping[str, Any], path: Path) -> None:
    """Survivors and figures against the threshold (PNG): a line a filter, the floor dashed."""
    pyplot = plotting.pyplot()
    rows = [row for row in result["rows"] if row["threshold"] is not None]
    series = list(dict.fromkeys(row["filter"] for row in rows))
    panels = ["survivors", *result["floor"]]
    percent = all(score.endswith("_real_pct") for score in result["scores"])
    columns = min(4, len(panels))
    figure, axes = pyplot.subplots(
        -(-len(panels) // columns), columns, figsize=(4 * columns, 3.4 * -(-len(panels) // columns)), squeeze=False
    )
    for axis, panel in zip(axes.flat, panels, strict=False):
        for number, name in enumerate(series):
            for gates in (False, True):
                line = sorted(
                    (row["threshold"], row["share"] if panel == "survivors" else row["figures"][panel])
                    for row in rows
                    if row["filter"] == name and row["gates"] == gates and (panel == "survivors" or row["figures"])
                )
                label, colour = f"{name}{' and gates' if gates else ''}", f"C{number}"
                # Hollow and dotted without the gates: seen where both lie on each other.
                look = {"linestyle": "-", "markersize": 3} if gates else {
                    "linestyle": ":", "markersize": 7, "markerfacecolor": "none"
                }  # fmt: skip
                axis.plot([x for x, _ in line], [y for _, y in line], marker="o", color=colour, label=label, **look)
        if panel != "survivors":
            floor, sd = result["floor"][panel], result["floor_sd"][panel]
            axis.axhline(floor, color="black", linestyle="--", linewidth=1, label="floor: real training crops")
            axis.axhspan(floor - sd, floor + sd, color="black", alpha=0.08, linewidth=0)
        axis.set(xlabel=f"least value{' (percentile of real crops)' if percent else ''}", title=panel)
        axis.set_ylabel("share of all images" if panel == "survivors" else f"N = {result['n']}")
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    handles, labels = axes.flat[min(1, len(panels) - 1)].get_legend_handles_labels()
    figure.suptitle(
        f"{result['dataset']} against the {result['split']} split of {result['against']} "
        f"({result['n_reference']} crops); {result['n']} images of each filter"
    )
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8)
    figure.tight_layout(rect=(0, 0.03 + 0.025 * -(-len(labels) // 3), 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _computed(table: pa.Table, score: str) -> bool:
    return bool(table[score].null_count < table.num_rows)


def _features(dataset: Dataset, rows: Rows, extractor: Extractor, size: int | None, progress: bool) -> np.ndarray:
    from builder.quality.features.cache import dataset_features

    return dataset_features(dataset, extractor, image_size=size, rows=rows, progress=progress)


def _named(figures: Mapping[str, float], naming: Naming) -> dict[str, float]:
    return {naming(name): value for name, value in figures.items()}

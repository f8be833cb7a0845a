"""Do synthetic crops show the phase they were asked for, as variously as real ones, and are they no copies?

    python -m tests.acceptance.fidelity [--real phantom] [--synthetic demo-IPR] [--out ROOT] [--limit N] [--png FILE]

All of it in the features of the default extractor (quality.features), real and synthetic crops brought to one size
first, so that real crops show no more detail than synthetic ones can; they are kept in the datasets' caches.
Training, validation and test patients are the real dataset's own splits.

1. Truth: a logistic regression trained on real training crops (C chosen on validation patients) is tried on test
   patients. Its macro-F1 must lie between 0.75 and 0.97, else the real crops are too hard or too easy to judge by; a
   probe that sees the mean colour alone must stay at or below 0.75.
2. Fidelity: the same classifier's recall of each phase on synthetic crops, at most 5 points below that on test crops.
3. Diversity: the mean pairwise (Euclidean) distance within a phase, at least 0.8 of that among as many real training
   crops.
4. Copies: each synthetic crop's distance (cosine) to the nearest training crop of its phase; for scale, that of
   held-out (validation and test) crops. No criterion, but a PNG to judge by: 8 synthetic crops a phase, each left of
   its nearest.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from sklearn.base import ClassifierMixin
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score, recall_score
from sklearn.metrics.pairwise import cosine_distances, euclidean_distances
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from builder.quality.features import DEFAULT, load_extractor
from builder.quality.features.cache import dataset_features
from builder.quality.features.extractor import Extractor
from builder.shards.dataset import Dataset, find_dataset, resize
from tests.acceptance.report import Report

SIZE = 64  # px, to which crops of either origin are brought first
LOWEST_F1, HIGHEST_F1, HIGHEST_COLOUR_F1 = 0.75, 0.97, 0.75
RECALL_LOSS = 0.05
DIVERSITY = 0.8
STRENGTHS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)  # C: inverse of the L2 penalty
DRAWS = 10  # of as many real crops as there are synthetic ones
COPY_QUANTILE = 0.01
PAIRS, PAIRS_A_ROW, CELL, GAP, LINE = 8, 4, 112, 6, 16  # of the PNG; px


@dataclass(frozen=True)
class Crops:
    """Crops of one dataset or split: manifest rows, phase codes [N] and features [N, 1280]."""

    dataset: Dataset
    rows: list[dict[str, Any]]
    phases: np.ndarray
    features: np.ndarray

    @classmethod
    def of(cls, dataset: Dataset, extractor: Extractor, limit: int | None, seed: int) -> Crops:
        """All crops, or `limit` of each phase and split picked at random."""
        rows = dataset.table().to_pylist()
        if limit:
            rows = _picked(rows, limit, random.Random(seed))
        features = dataset_features(dataset, extractor, image_size=SIZE, rows=rows)
        return cls(dataset, rows, np.array([row["phase"] for row in rows]), features)

    def where(self, chosen: np.ndarray) -> Crops:
        rows = [row for row, wanted in zip(self.rows, chosen, strict=True) if wanted]
        return Crops(self.dataset, rows, self.phases[chosen], self.features[chosen])

    def split(self, *names: str) -> Crops:
        return self.where(np.array([row["split"] in names for row in self.rows]))

    def phase(self, code: str) -> Crops:
        return self.where(self.phases == code)

    def colours(self) -> np.ndarray:
        """Mean RGB [N, 3]."""
        return np.stack([pixels.reshape(-1, 3).mean(0) for _, pixels in self.dataset.images(self.rows)])

    def __len__(self) -> int:
        return len(self.rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real", default="phantom", help="name under --out, or path")
    parser.add_argument("--synthetic", default="demo-IPR", help="name under --out, or path")
    parser.add_argument("--out", default=".")
    parser.add_argument("--limit", type=int, help="crops of each phase and split; default: all")
    parser.add_argument("--png", type=Path, help="where to draw synthetic crops beside their nearest training crops")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    real, synthetic = (find_dataset(name, options.out) for name in (options.real, options.synthetic))
    synthetic.classes.require_same(real.classes, f"'{synthetic.name}'", f"'{real.name}'")
    torch.set_num_threads(1)
    extractor = load_extractor(DEFAULT)
    report = Report(f"fidelity of '{synthetic.name}' to '{real.name}'", size=f"{SIZE} px", features=extractor.id,
                    seed=options.seed, limit=options.limit or "none")  # fmt: skip
    crops, made = (Crops.of(dataset, extractor, options.limit, options.seed) for dataset in (real, synthetic))
    train, val, test = (crops.split(name) for name in ("train", "val", "test"))
    codes = [code for code in real.classes.codes if (made.phases == code).any()]
    held_out = {code: (len(val.phase(code)), len(test.phase(code))) for code in codes}
    rows = [(code, len(train.phase(code)), *held_out[code], len(made.phase(code))) for code in codes]
    report.table("crops", ["phase", "train", "val", "test", "synthetic"], rows)

    classifier = truth(report, train, val, test, codes, options.seed)
    fidelity(report, classifier, val, test, made, codes)
    diversity(report, train, made, codes, np.random.default_rng(options.seed))
    copies(report, train, crops.split("val", "test"), made, codes)
    if options.png:
        draw_pairs(options.png, train, made, codes, options.seed)
        print(f"\n{PAIRS} synthetic crops a phase, each left of its nearest training crop: {options.png}")
    report.end()


def truth(report: Report, train: Crops, val: Crops, test: Crops, codes: Sequence[str], seed: int) -> ClassifierMixin:
    """The classifier of real crops, and how well it and the mean colour tell the phases of test patients."""
    candidates = [
        make_pipeline(StandardScaler(), LogisticRegression(C=c, class_weight="balanced", max_iter=500)).fit(
            train.features, train.phases
        )
        for c in STRENGTHS
    ]
    on_val = [macro_f1(candidate.predict(val.features), val.phases) for candidate in candidates]
    best = int(np.argmax(on_val))
    classifier = candidates[best]
    found = macro_f1(classifier.predict(test.features), test.phases)
    colour = {
        "mean colour, logistic": make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced")),
        "mean colour, forest": RandomForestClassifier(
            300, min_samples_leaf=5, class_weight="balanced", random_state=seed
        ),
    }
    rows = [(f"features, logistic, C={STRENGTHS[best]:g}", on_val[best], found)]
    colours = {name: crops.colours() for name, crops in (("train", train), ("val", val), ("test", test))}
    for name, probe in colour.items():
        probe.fit(colours["train"], train.phases)
        on_split = [macro_f1(probe.predict(colours[s]), crops.phases) for s, crops in (("val", val), ("test", test))]
        rows.append((name, *on_split))
    report.table("macro-F1 on real patients not trained on", ["classifier", "val", "test"], rows)
    report.criterion(
        f"macro-F1 on test patients {found:.3f} (required {LOWEST_F1} to {HIGHEST_F1})",
        LOWEST_F1 <= found <= HIGHEST_F1,
    )
    worst = max(row[2] for row in rows[1:])
    report.criterion(
        f"macro-F1 of the better mean-colour probe {worst:.3f} (required <= {HIGHEST_COLOUR_F1})",
        worst <= HIGHEST_COLOUR_F1,
    )
    return classifier


def macro_f1(predicted: np.ndarray, true: np.ndarray) -> float:
    return float(f1_score(true, predicted, average="macro"))


def fidelity(report: Report, classifier: Any, val: Crops, test: Crops, made: Crops, codes: Sequence[str]) -> None:
    """Recall of each phase on synthetic crops beside that on real ones, and what was seen instead."""
    guesses = classifier.predict(made.features)
    on_val, on_test, on_made = (
        recall_score(crops.phases, classifier.predict(crops.features), labels=codes, average=None, zero_division=0)
        for crops in (val, test, made)
    )
    rows = []
    for i, code in enumerate(codes):
        seen = [float(np.mean(guesses[made.phases == code] == other)) for other in codes]
        rows.append((code, float(on_val[i]), float(on_test[i]), float(on_made[i]), *seen))
    columns = ["phase", "recall, real val", "real test", "synthetic", *(f"seen as {code}" for code in codes)]
    report.table("the classifier on crops asked to show a phase", columns, rows)
    for code, real, synthetic in zip(codes, on_test, on_made, strict=True):
        least = real - RECALL_LOSS
        report.criterion(
            f"recall of {code} on synthetic crops {synthetic:.3f} (required >= {least:.3f})", synthetic >= least
        )


def diversity(report: Report, train: Crops, made: Crops, codes: Sequence[str], chance: np.random.Generator) -> None:
    """Mean pairwise distance within a phase, of synthetic crops and of as many real training crops."""
    rows = []
    for code in codes:
        real, synthetic = train.phase(code).features, made.phase(code).features
        n = min(len(real), len(synthetic))
        spreads = [
            float(np.mean([mean_pairwise(chance.permutation(features)[:n]) for _ in range(DRAWS)]))
            for features in (synthetic, real)
        ]
        rows.append((code, n, *spreads, spreads[0] / spreads[1]))
    heading = f"mean pairwise feature distance within a phase, mean of {DRAWS} draws of N"
    report.table(heading, ["phase", "N", "synthetic", "real", "ratio"], rows)
    for code, *_, ratio in rows:
        report.criterion(f"diversity of {code} {ratio:.3f} of real's (required >= {DIVERSITY})", ratio >= DIVERSITY)


def mean_pairwise(features: np.ndarray) -> float:
    """Mean Euclidean distance over all pairs of different rows of [N, 1280]."""
    n = len(features)
    return float(euclidean_distances(features.astype(np.float64)).sum() / (n * (n - 1)))


def copies(report: Report, train: Crops, held_out: Crops, made: Crops, codes: Sequence[str]) -> None:
    """How near synthetic and held-out real crops come to their nearest training crop. No criterion: for the reader."""
    rows = []
    for code in codes:
        known = train.phase(code).features
        real, synthetic = (cosine_distances(crops.phase(code).features, known).min(1) for crops in (held_out, made))
        near = float(np.quantile(real, COPY_QUANTILE))
        distances = float(np.median(real)), near, float(np.median(synthetic)), float(synthetic.min())
        rows.append((code, len(known), *distances, f"{np.mean(synthetic < near):.1%}"))
    columns = [
        "phase", "training crops", "real: median", "real: 1 %", "synthetic: median", "synthetic: least",
        "nearer than real's 1 %",
    ]  # fmt: skip
    report.table("cosine distance to the nearest training crop of the phase; real: held-out patients", columns, rows)


def draw_pairs(png: Path, train: Crops, made: Crops, codes: Sequence[str], seed: int) -> None:
    """Synthetic crops picked at random, each left of its nearest training crop, with the distance."""
    font = ImageFont.load_default(12)
    bands = -(-PAIRS // PAIRS_A_ROW)
    pair_width, height = 2 * CELL + 3 * GAP, CELL + LINE + GAP
    sheet = Image.new("RGB", (PAIRS_A_ROW * pair_width, len(codes) * (bands * height + LINE) + GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for band, code in enumerate(codes):
        known, own = train.phase(code), made.phase(code)
        top = band * (bands * height + LINE) + GAP
        draw.text((GAP, top), f"{code}: synthetic | nearest training crop, cosine distance", "black", font)
        for place, number in enumerate(random.Random(f"{seed}/{code}").sample(range(len(own)), min(PAIRS, len(own)))):
            distances = cosine_distances(own.features[[number]], known.features)[0]
            nearest = int(distances.argmin())
            x, y = place % PAIRS_A_ROW * pair_width + GAP, top + LINE + place // PAIRS_A_ROW * height
            for side, (crops, row) in enumerate(((own, own.rows[number]), (known, known.rows[nearest]))):
                picture = Image.fromarray(resize(crops.dataset.pixels(row), SIZE))
                sheet.paste(picture.resize((CELL, CELL), Image.Resampling.BICUBIC), (x + side * (CELL + GAP // 2), y))
            label = f"{own.rows[number]['key'][-10:]}  |  {distances[nearest]:.3f}"
            draw.text((x, y + CELL), label, "black", font)
    png.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(png, optimize=True)


def _picked(rows: list[dict[str, Any]], limit: int, chance: random.Random) -> list[dict[str, Any]]:
    """At most `limit` rows of each phase and split, in the order given."""
    taken: dict[tuple[str, str | None], int] = {}
    keys = set()
    for row in chance.sample(rows, len(rows)):
        group = row["phase"], row["split"]
        if taken.setdefault(group, 0) < limit:
            taken[group] += 1
            keys.add(row["key"])
    return [row for row in rows if row["key"] in keys]


if __name__ == "__main__":
    main()

"""Is `phase_probability` what it says on patients that the probe has never seen?

    python -m tests.acceptance.probe [--real phantom] [--out ROOT] [--size 64] [--to reliability.png]

The probe is fitted on the training split, as for any reference, and judged on the held-out (validation and test) crops:
accuracy, macro-F1, and the expected calibration error with an interval from 1,000 resamples of patients. Required: an
error of at most 0.05, or an interval that includes 0.05. The plot shows accuracy against confidence.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

from builder import plotting
from builder.config import ScoreConfig
from builder.quality.feature_scores import unit_length
from builder.quality.features import load_extractor
from builder.quality.features.cache import dataset_features
from builder.quality.panel import patient_of, rows_by_phase
from builder.quality.probe import calibration_error, fit_probe, judge_probe, reliability
from builder.shards.dataset import find_dataset
from tests.acceptance.report import Report

LARGEST_ERROR = 0.05
REPLICATES = 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real", default="phantom", help="name under --out, or path")
    parser.add_argument("--out", default=".")
    parser.add_argument("--size", type=int, default=64, help="px that crops are brought to first")
    parser.add_argument("--features", default=ScoreConfig.features)
    parser.add_argument("--to", type=Path, default=Path("reliability.png"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    real = find_dataset(options.real, options.out)
    report = Report(f"phase probe of '{real.name}'", size=options.size, features=options.features)
    extractor = load_extractor(options.features)
    codes = real.classes.codes
    sides = {}
    for name, splits in (("train", ("train",)), ("held-out", ("val", "test"))):
        found = rows_by_phase(real, codes, splits)
        rows = [row for code in codes for row in found[code]]
        features = unit_length(dataset_features(real, extractor, image_size=options.size, rows=rows))
        sides[name] = features, [row["phase"] for row in rows], [patient_of(row) for row in rows]
    fitted = fit_probe(*sides["train"], codes)
    if isinstance(fitted, str):
        raise SystemExit(fitted)
    features, phases, patients = sides["held-out"]
    labels = np.array([codes.index(phase) for phase in phases])
    said = fitted[0].probabilities(features)
    left_out, held_out = fitted[0].record, judge_probe(said, labels, codes)
    rows = [
        (name, n, f"{judged['accuracy']:.3f}", f"{judged['macro_f1']:.3f}", f"{judged['ece']:.3f}",
         ", ".join(f"{code} {value:.2f}" for code, value in judged["recall"].items()))
        for name, n, judged in (("training, left out", left_out["n"], left_out), ("held-out", len(labels), held_out))
    ]  # fmt: skip
    report.table("", ["crops", "N", "accuracy", "macro-F1", "ECE", "recall"], rows)
    low, high = error_interval(said, labels, patients)
    met = held_out["ece"] <= LARGEST_ERROR or low <= LARGEST_ERROR
    report.criterion(
        f"ECE {held_out['ece']:.3f} [{low:.3f}, {high:.3f}] on {len(labels)} crops of {len(set(patients))} held-out "
        f"patients (required <= {LARGEST_ERROR}, or an interval that includes it)",
        met,
    )
    plot(said, labels, options.to, f"{real.name}, held-out patients (N = {len(labels)})")
    print(f"wrote {options.to}")
    report.end()


def error_interval(said: np.ndarray, labels: np.ndarray, patients: list[str]) -> tuple[float, float]:
    """95 % of the calibration errors of resamples by patient."""
    chance = np.random.default_rng(0)
    names = sorted(set(patients))
    own = {name: np.flatnonzero(np.array(patients) == name) for name in names}
    errors = []
    for _ in range(REPLICATES):
        drawn = np.concatenate([own[name] for name in chance.choice(names, len(names))])
        errors.append(calibration_error(said[drawn], labels[drawn]))
    low, high = np.quantile(errors, [0.025, 0.975])
    return float(low), float(high)


def plot(said: np.ndarray, labels: np.ndarray, file: Path, title: str) -> None:
    pyplot = plotting.pyplot()
    points = reliability(said, labels)
    figure, axis = pyplot.subplots(figsize=(5, 5))
    axis.plot([0, 1], [0, 1], "--", color="grey", linewidth=1, label="calibrated")
    spread = [1.96 * np.sqrt(max(right * (1 - right), 1e-4) / len(bin_)) for _, right, bin_ in points]
    axis.errorbar([p[0] for p in points], [p[1] for p in points], spread, fmt="o-", label="probe (95 %, by crop)")
    axis.set(
        xlabel="confidence (largest phase_probability)",
        ylabel="accuracy",
        title=title,
        xlim=(0.3, 1.02),
        ylim=(0, 1.05),
    )
    axis.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    main()

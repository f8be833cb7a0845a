"""Choosing the best checkpoint: figures of generated images against the validation patients, each with its floor."""

from __future__ import annotations

import hashlib
import math
from typing import TYPE_CHECKING, Any

import numpy as np

from builder.config import Config
from builder.errors import BuilderError
from builder.models.history import History, require_monitor
from builder.quality.features.cache import dataset_features
from builder.quality.panel import patient_of
from builder.quality.sets.comparison import Naming, Side, compare
from builder.sampling.seeds import seeds_of
from builder.shards.dataset import Dataset

if TYPE_CHECKING:
    from builder.quality.features.extractor import Extractor
    from builder.sampling.sampler import Sampler

LARGER_IS_BETTER = ("precision", "recall", "density", "coverage", "vendi_ratio", "is")


class Evaluation:
    """N images of each phase, always of the same seeds, against all validation crops of the phase; and pooled.

    N: `train.evaluate_images`, at most the training crops there are: the floor is what as many of these, of other
    patients, score in the place of the generated images. Pooled: phases in the proportions of the validation split.
    """

    def __init__(self, dataset: Dataset, config: Config, extractor: Extractor, *, progress: bool = True) -> None:
        """BuilderError when a dataset has no validation crops, and for a `train.monitor` that isn't measured."""
        self.config, self.extractor, size = config, extractor, config.train.size
        self.naming = Naming(extractor.name, extractor.standard)
        rows = dataset.table().to_pylist()
        held_out = [row for row in rows if row["split"] == "val"]
        if not held_out:
            raise BuilderError(
                f"dataset '{dataset.name}' has no crops in its split 'val' to choose the best checkpoint by",
                "pack it with a share for validation, or set train.evaluate_every to 0",
            )
        patients = {patient_of(row) for row in held_out}
        training = [row for row in rows if row["split"] == "train" and patient_of(row) not in patients]
        self.reference = {code: _shuffled(held_out, code) for code in dataset.classes.codes}
        self.reference = {code: rows for code, rows in self.reference.items() if rows}
        others = {code: _shuffled(training, code)[: config.train.evaluate_images] for code in self.reference}
        self.counts = {code: len(rows) for code, rows in others.items()}
        self.pooled = proportions({code: len(rows) for code, rows in self.reference.items()}, self.counts)

        def features(chosen: list[dict[str, Any]]) -> np.ndarray:
            found = dataset_features(dataset, extractor, image_size=size, rows=chosen, progress=progress)
            return found.astype(np.float64)

        self.real = {
            code: Side(features(rows), [patient_of(row) for row in rows]) for code, rows in self.reference.items()
        }
        self.floors = self.figures(
            {code: Side(features(rows), [patient_of(row) for row in rows]) for code, rows in others.items()}
        )
        self.monitor = self._figure_of(config.train.monitor)
        require_monitor(self.monitor, [name for name, value in self.floors.items() if value is not None])
        mode = config.train.monitor_mode
        larger = self.monitor.partition("[")[0].lower() in LARGER_IS_BETTER
        self.mode = mode if mode != "auto" else ("max" if larger else "min")

    def _figure_of(self, monitor: str) -> str:
        """The figure that `train.monitor` means: a name of `floors`, or one without its features (kd, kd_I)."""
        shorter = {name.replace(f"[{self.naming.features}]", ""): name for name in self.floors}
        return monitor if monitor in self.floors else shorter.get(monitor, self.naming(monitor))

    def measure(self, sampler: Sampler) -> dict[str, float | int | None]:
        """The figures of the sampler's images by name: FIGURE pooled, FIGURE_CODE of a phase, each also ..._floor."""
        figures = self.figures(self.generate(sampler))
        floors = {f"{name}_floor": value for name, value in self.floors.items()}
        numbers = {f"n_{code}": count for code, count in self.counts.items()}
        return {**figures, **floors, **numbers, "n": sum(self.pooled.values())}

    def generate(self, sampler: Sampler) -> dict[str, Side]:
        """The images of an evaluation, by phase."""
        return {code: self._generated(sampler, code, count) for code, count in self.counts.items()}

    def _generated(self, sampler: Sampler, code: str, count: int) -> Side:
        from builder.sampling.sampler import Request

        label, classes = self.config.classes.label(code), self.config.classes
        seeds = seeds_of(_seed(self.config.seed), label, np.arange(count)).tolist()
        requests = [Request(classes.codes[label], label, seed) for seed in seeds]
        size = self.config.sample.batch_size
        batches = [sampler.generate(requests[start : start + size]).pixels for start in range(0, count, size)]
        features = self.extractor.of([image for batch in batches for image in batch]).astype(np.float64)
        return Side(features, [f"{code}{number}" for number in range(count)])

    def figures(self, sides: dict[str, Side]) -> dict[str, float | None]:
        """Figures of sets by phase, in the place of generated images, against the validation crops."""
        real = _joined(self.real, {code: len(side) for code, side in self.real.items()})
        found = {n: e.value for n, e in compare(real, _joined(sides, self.pooled), self.naming).items()}
        for code, side in sides.items():
            of_phase = compare(self.real[code], side, self.naming)
            found |= {f"{name}_{code}": estimate.value for name, estimate in of_phase.items()}
        return found


def proportions(wanted: dict[str, int], available: dict[str, int]) -> dict[str, int]:
    """How many of each class to take, of those available, so that they stand as in `wanted`; at least one each."""
    total = sum(wanted.values())
    most = min(available[code] * total / count for code, count in wanted.items())
    return {code: max(1, min(available[code], round(most * count / total))) for code, count in wanted.items()}


def is_exhausted(history: History, patience: int) -> bool:
    """Whether `patience` evaluated checkpoints in a row were not better than the best before them."""
    scored = [entry.step for entry in history.entries if entry.metrics]
    if not patience or not scored or history.monitor not in history.metrics:
        return False
    return len(scored) - 1 - scored.index(history.best().step) >= patience


def _joined(sides: dict[str, Side], counts: dict[str, int]) -> Side:
    return Side(
        np.concatenate([sides[code].features[:count] for code, count in counts.items()]),
        [group for code, count in counts.items() for group in sides[code].groups[:count]],
    )


def _shuffled(rows: list[dict[str, Any]], code: str) -> list[dict[str, Any]]:
    """The rows of a phase in an order that depends on their keys alone."""
    own = [row for row in rows if row["phase"] == code]
    return sorted(own, key=lambda row: hashlib.sha256(f"evaluation/{row['key']}".encode()).digest())


def _seed(run_seed: int) -> int:
    """Of the images of an evaluation: none of them is an image of a dataset of the same run seed."""
    return int.from_bytes(hashlib.sha256(f"evaluation/{run_seed}".encode()).digest()[:8], "little")


def finite(metrics: dict[str, float | int | None]) -> dict[str, float]:
    """Those that are numbers."""
    return {name: float(value) for name, value in metrics.items() if value is not None and math.isfinite(value)}

"""Train and judge at every ratio and seed, keep each run, and sum up: run again, it goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from builder.classify.data import (
    IDENTITY,
    Rows,
    confusions,
    content_sha256,
    counts_of,
    held_out,
    limited,
    of_split,
    phases_of,
    require_classes,
    rows_of,
    unit_of,
)
from builder.classify.figures import summarise
from builder.classify.network import model_sha256
from builder.classify.training import Recipe, train_and_judge
from builder.config import fingerprint
from builder.errors import BuilderError
from builder.progress import progress
from builder.quality.panel import patient_of
from builder.quality.sets.bootstrap import LEVEL
from builder.shards.dataset import Dataset
from builder.shards.lineage import SPLITS, find_leak
from builder.shards.storage import Storage

Run = dict[str, Any]


@dataclass(frozen=True)
class Question:
    """What is asked: does `synthetic` help a classifier of `real` at these ratios?

    ratios: synthetic shares of a batch; 0, which the others are compared with, is among them always. seeds: trainings
    a ratio. real_limit: about so many real training crops, of whole patients, drawn anew for each seed; None: all.
    allow_leak: why synthetic data is used that test patients may have leaked into.
    """

    real: Dataset
    synthetic: Sequence[Dataset] = ()
    ratios: Sequence[float] = (0.0, 0.25, 0.5, 1.0)
    seeds: int = 5
    real_limit: int | None = None
    recipe: Recipe = field(default_factory=Recipe)
    allow_leak: str | None = None
    replicates: int = 2000


class Study:
    """The runs of a question in a folder, OUT/runs: a small file each, named by all that decides it.

    So runs of other settings lie beside each other, and those at ratio 0 serve every synthetic dataset.
    """

    def __init__(self, question: Question, out: Path, *, device: str = "cpu", workers: int = 0) -> None:
        """BuilderError when the question cannot be answered, before anything is trained."""
        self.asked, self.out, self.device, self.workers = question, out, device, workers
        self.ratios = sorted({0.0, *map(float, question.ratios)})
        self.codes = question.real.classes.codes
        self.rows = rows_of(question.real)
        self.made = question.synthetic if self.ratios[-1] > 0 else ()
        self._check()
        self._check_classes()
        self.leaks = self._leaks()
        limit = question.real_limit
        self.reals = [
            question.real if limit is None else limited(question.real, self.rows, limit, seed)
            for seed in range(question.seeds)
        ]
        self.training = [of_split(rows_of(real), "train") for real in self.reals]
        for rows in self.training:
            require_classes(
                phases_of(rows), self.codes, f"a training set of {limit} crops", "give a larger --real-limit"
            )
        self._real = content_sha256(question.real.table(IDENTITY))
        self._synthetic = [content_sha256(dataset.table(IDENTITY)) for dataset in self.made]
        self._model = model_sha256(question.recipe.model)

    def run(self) -> dict[str, Any]:
        """Train what is not there yet, and answer: plain JSON, which report.py shows."""
        cells = [(ratio, seed) for seed in range(self.asked.seeds) for ratio in self.ratios]
        identities = {cell: self._identity(*cell) for cell in cells}
        runs = {cell: self._read(identities[cell]) for cell in cells}
        missing = [cell for cell in cells if runs[cell] is None]
        if missing:
            size = self.asked.recipe.size
            val, test = held_out(self.asked.real, "val", size), held_out(self.asked.real, "test", size)
            with progress((), "training", "step", len(missing) * self.asked.recipe.steps) as bar:
                for ratio, seed in missing:
                    bar.set_postfix_str(f"ratio {ratio:g}, seed {seed}")
                    run = train_and_judge(
                        self.asked.recipe, self.reals[seed], self.asked.synthetic, ratio, seed, val, test,
                        device=self.device, workers=self.workers, allow_leak=self.asked.allow_leak, tick=bar.update,
                    )  # fmt: skip
                    self._write(ratio, seed, identities[ratio, seed], run)
                    runs[ratio, seed] = run
        return self._answer({cell: run for cell, run in runs.items() if run is not None})

    # -- what is refused ------------------------------------------------------------------------------------------

    def _check(self) -> None:
        """BuilderError for what was asked wrongly."""
        asked, shown = self.asked, ", ".join(f"{ratio:g}" for ratio in self.ratios)
        if not 0 <= self.ratios[0] <= self.ratios[-1] <= 1:
            raise BuilderError(f"the ratios are {shown}", "each is a synthetic share, from 0 to 1")
        if self.ratios[-1] > 0 and not asked.synthetic:
            raise BuilderError(
                f"the ratios are {shown}, but no synthetic dataset is given", "give --synthetic, or --ratios 0"
            )
        if not 1 <= asked.recipe.evaluations <= asked.recipe.steps:
            raise BuilderError(
                f"{asked.recipe.steps} steps are judged {asked.recipe.evaluations} times", "give more --steps"
            )
        for dataset, origin in ((asked.real, "real"), *((made, "synthetic") for made in asked.synthetic)):
            if dataset.info["origin"] != origin:
                raise BuilderError(
                    f"dataset '{dataset.name}' is {dataset.info['origin']}, and was given as {origin}",
                    f"give it as --{dataset.info['origin']}",
                )

    def _check_classes(self) -> None:
        """BuilderError where a class could be neither learned nor judged, or means something else."""
        real = self.asked.real
        if len(self.codes) < 2:
            raise BuilderError(f"'{real.name}' has one class alone", "there is nothing to tell apart")
        for split in SPLITS:
            require_classes(
                phases_of(of_split(self.rows, split)), self.codes, f"the {split} split of '{real.name}'",
                "pack more patients, or with other shares of the splits",
            )  # fmt: skip
        for synthetic in self.made:
            real.classes.require_same(synthetic.classes, f"'{real.name}'", f"'{synthetic.name}'")
        if self.ratios[-1] == 1:
            there = {code for made in self.made for code in made.table(("phase",))["phase"].unique().to_pylist()}
            require_classes(
                there, self.codes, "the synthetic data",
                "ratio 1 trains on nothing else: leave it out of --ratios, or make crops of every class",
            )  # fmt: skip

    def _leaks(self) -> list[str]:
        """The leaks that are allowed; BuilderError for one that is not."""
        found = [leak for synthetic in self.made if (leak := find_leak(synthetic, self.asked.real))]
        if found and not self.asked.allow_leak:
            raise BuilderError(
                found[0], "its gain would flatter it: use a generator that saw training patients alone, "
                "or give --allow-leak REASON",
            )  # fmt: skip
        return found

    # -- the files ------------------------------------------------------------------------------------------------

    def _identity(self, ratio: float, seed: int) -> dict[str, Any]:
        """All that decides a run but the versions of libraries; at ratio 0 the synthetic data is nothing to it."""
        recipe = {**asdict(self.asked.recipe), "model": self._model}
        mixed = {"synthetic": self._synthetic} if ratio else {}
        limit = self.asked.real_limit
        return {"recipe": recipe, "real": self._real, "limit": limit, "ratio": ratio, "seed": seed, **mixed}

    def _path(self, identity: dict[str, Any]) -> str:
        return f"runs/ratio-{identity['ratio']:g}-seed-{identity['seed']}-{fingerprint(identity)[:16]}.json"

    def _read(self, identity: dict[str, Any]) -> Run | None:
        storage, path = Storage(self.out), self._path(identity)
        if not storage.exists(path):
            return None
        try:
            kept = json.loads(storage.read(path))
            if kept["made_with"] != identity:
                raise ValueError("it was made with other settings")
            return dict(kept["run"])
        except (ValueError, KeyError, TypeError) as error:
            raise BuilderError(f"{self.out / path} is damaged: {error}", "remove it: it will be made again") from None

    def _write(self, ratio: float, seed: int, identity: dict[str, Any], run: Run) -> None:
        kept = {
            "made_with": identity, "torch": torch.__version__, "real": self.asked.real.name,
            "synthetic": [dataset.name for dataset in self.asked.synthetic] if ratio else [], "run": run,
        }  # fmt: skip
        Storage(self.out).write(self._path(identity), json.dumps(kept).encode() + b"\n")

    # -- the answer -----------------------------------------------------------------------------------------------

    def _answer(self, runs: dict[tuple[float, int], Run]) -> dict[str, Any]:
        asked, test = self.asked, of_split(self.rows, "test")
        found = summarise(self._confusions(runs, test), self.codes, asked.replicates)
        synthetic = [self._described(dataset) for dataset in self.made]
        by_ratio = [
            {"ratio": ratio, "passes": _passes([runs[ratio, seed] for seed in range(asked.seeds)]), **found[ratio]}
            for ratio in self.ratios
        ]
        return {
            "real": asked.real.name, "synthetic": synthetic, "classes": list(self.codes), "seeds": asked.seeds,
            "real_limit": asked.real_limit, "training": [counts_of(rows) for rows in self.training],
            "val": counts_of(of_split(self.rows, "val")), "test": counts_of(test),
            "test_classes": {code: counts_of([r for r in test if r["phase"] == code]) for code in self.codes},
            "unit": unit_of(asked.real, self.rows), "leaks": self.leaks,
            "allow_leak": asked.allow_leak if self.leaks else None, "recipe": asdict(asked.recipe),
            "replicates": asked.replicates, "level": LEVEL, "torch": torch.__version__, "ratios": by_ratio,
        }  # fmt: skip

    def _described(self, synthetic: Dataset) -> dict[str, Any]:
        """learned_from: how many of the real dataset's training patients, limited or not, its generator saw."""
        info = synthetic.info
        training = {row["patient"] for row in of_split(self.rows, "train")}
        seen = training.intersection((info.get("lineage") or {}).get("patients") or ())
        return {
            "name": synthetic.name, "crops": info["count"], "checkpoint": info.get("checkpoint"),
            "learned_from": len(seen),
        }  # fmt: skip

    def _confusions(self, runs: dict[tuple[float, int], Run], test: Rows) -> dict[float, np.ndarray]:
        """Ratio -> how often each class was taken for which, [seeds, patients, true, predicted]."""
        _, patient = np.unique([patient_of(row) for row in test], return_inverse=True)
        labels = np.array([row["label"] for row in test])
        return {
            ratio: np.stack(
                [
                    confusions(labels, np.array(runs[ratio, seed]["predictions"]), patient, len(self.codes))
                    for seed in range(self.asked.seeds)
                ]
            )
            for ratio in self.ratios
        }


def _passes(runs: Sequence[Run]) -> dict[str, float]:
    """How often a crop of either origin was seen in a training, on average over seeds and crops."""
    seen: dict[str, list[float]] = {}
    for run in runs:
        for origin in ("real", "synthetic"):
            own = [source for source in run["composition"] if source["origin"] == origin]
            if own:
                drawn, samples = (sum(source[what] for source in own) for what in ("drawn", "samples"))
                seen.setdefault(origin, []).append(drawn / samples)
    return {origin: float(np.mean(values)) for origin, values in seen.items()}

"""Run an ablation: train every setting of the grid, draw images at every guidance, measure, and keep what was found."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from builder.ablation.grid import Run, runs_of, with_prompts
from builder.ablation.probes import Pictures, Probes, fit_probes
from builder.config import Config, fingerprint
from builder.models.checkpoint import Checkpoint, read_checkpoint
from builder.models.load import load_pipeline
from builder.models.source import locate, weights_sha256
from builder.phases import ClassTable
from builder.quality.features import load_extractor
from builder.quality.features.cache import dataset_features
from builder.quality.panel import patient_of
from builder.quality.sets.comparison import Side
from builder.sampling.sampler import Sampler
from builder.shards.dataset import Dataset
from builder.shards.storage import Storage
from builder.training.data import original_size, size_quantiles, training_rows
from builder.training.evaluate import Evaluation
from builder.training.preview import write_samples
from builder.training.run import train

SET_FIGURES = ("kd", "fd", "precision", "recall", "vendi_ratio")  # of evaluation; their names tell the features
SHOWN = 4  # images a phase in the picture of a setting's samples

Figures = dict[str, float | None]


@dataclass(frozen=True)
class Row:
    """The figures of one setting's images."""

    style: str
    method: str
    perceptual_weight: float
    guidance: float
    figures: Figures
    samples: str  # the picture of some of them, in the study's folder


@dataclass(frozen=True)
class Study:
    """What came out.

    n: images of a setting by phase. real: what real crops score in their place (of set figures the floor: training
    crops; else validation crops). of_base: the base's own images, before any fine-tuning. pictures_look: the look of
    pretraining that its own pictures have.
    """

    name: str
    dataset: str
    base: str
    seed: int
    n: dict[str, int]
    real: Figures
    of_base: Figures
    pictures_look: float
    rows: list[Row]

    @property
    def figures(self) -> list[str]:
        """Names of the figures, in the order of the table."""
        return list(self.real)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class Ablation:
    """The grid of a config on one dataset, in a folder that keeps what is done: run again, it goes on.

    OUT/RUN is the training of a setting; OUT/cells/RUN-gN.json and .png are its figures and samples at guidance N.
    """

    def __init__(
        self, config: Config, dataset: Dataset, out: Path, *, pictures: Dataset | None = None, device: str = "cpu",
        download: bool = False,
    ) -> None:  # fmt: skip
        """`pictures`: what the base was pretrained on, where that is at hand; see builder.ablation.probes.

        BuilderError for a grid, a base or a dataset that won't do, before anything is trained.
        """
        self.runs = runs_of(config)
        config.classes.require_same(dataset.classes, "the config", f"dataset '{dataset.name}'")
        self.config, self.dataset, self.out, self.pictures = config, dataset, out, pictures
        self.device, self.download = device, download
        self.base = locate(config.model.base, download)
        self.base_sha256 = weights_sha256(self.base)  # once: of SDXL it reads 7 GB
        torch.set_num_threads(config.train.threads)
        self.extractor = load_extractor(config.score.features, device=device)
        self.evaluation = Evaluation(dataset, config, self.extractor)

    def run(self, say: Callable[[str], None] = print) -> Study:
        """Train, draw and measure what is not there yet. Raises TrainingInterrupted as `train` does."""
        say(f"the base '{self.base.name}' by itself, with the prompts of each style")
        by_style = self._images_of_base()
        rows, crops = self._training_crops(self.dataset)
        probes = fit_probes(self._of_pretraining(by_style), crops, rows, self.config.classes, self.config.seed)
        of_base = [self._figures(sides, probes) for sides in by_style]
        real = self._judged(self.evaluation.real, probes) | self._named(self.evaluation.floors)
        found = [row for run in self.runs for row in self._rows(run, probes, say)]
        return Study(
            self.config.name,
            self.dataset.name,
            self.base.name,
            self.config.seed,
            dict(self.evaluation.counts),
            real,
            means_of(of_base, list(real)),
            probes.pictures_look,
            found,
        )

    def _of_pretraining(self, by_style: list[dict[str, Side]]) -> Pictures:
        """The pretraining's own pictures, or the images that the base draws, by style and phase, in their place."""
        if self.pictures is not None:
            rows, features = self._training_crops(self.pictures)
            return Pictures(features, [patient_of(row) for row in rows])
        drawn = np.concatenate([side.features for sides in by_style for side in sides.values()])
        return Pictures(drawn, [f"image {number}" for number in range(len(drawn))])

    def _training_crops(self, dataset: Dataset) -> tuple[list[dict[str, Any]], np.ndarray]:
        """Rows and features [N, D] of a dataset's training split, at the size that is trained at."""
        rows, size = training_rows(dataset), self.config.train.size
        return rows, dataset_features(dataset, self.extractor, image_size=size, rows=rows).astype(np.float64)

    def _images_of_base(self) -> list[dict[str, Side]]:
        """What the base draws for the prompts of each style, at the sizes of the real crops, by phase."""
        rows, codes = training_rows(self.dataset), self.config.classes.codes
        native = torch.tensor([original_size(row)[::-1] for row in rows])
        sizes = size_quantiles(native, torch.tensor([row["label"] for row in rows]), codes)
        pipeline = load_pipeline(self.base, architecture=self.config.model.architecture or None)
        styles = [with_prompts(self.config.classes, prompts) for prompts in self.config.ablation.prompts.values()]
        return [
            self.evaluation.generate(self._sampler(pipeline, classes, sizes, self.config.sample.guidance))
            for classes in styles
        ]

    def _sampler(self, pipeline: Any, classes: ClassTable, sizes: dict[str, list[int]], guidance: float) -> Sampler:
        sample = replace(self.config.sample, size=self.config.train.size, guidance=guidance)
        return Sampler(pipeline, sample, {phase.code: phase.prompt for phase in classes}, sizes, self.device)

    def _rows(self, run: Run, probes: Probes, say: Callable[[str], None]) -> list[Row]:
        """A run at every guidance; it is trained where a figure is missing."""
        made_with = self._identity(run)
        kept = {guidance: self._read(run, guidance, made_with) for guidance in self.config.ablation.guidance}
        if None in kept.values():
            say(f"{run.name}: training ({self.runs.index(run) + 1} of {len(self.runs)})")
            last = train(run.config, self.dataset, self.out / run.name, device=self.device, download=self.download)
            checkpoint = read_checkpoint(last)
            pipeline = load_pipeline(checkpoint)
            for guidance, figures in kept.items():
                if figures is None:
                    say(f"{run.name}: images at guidance {guidance:g}")
                    measured = self._measure(run, checkpoint, pipeline, guidance, probes)
                    self._keep(run, guidance, measured, made_with)
                    kept[guidance] = measured
        return [
            Row(run.style, run.method, run.perceptual_weight, guidance, figures or {}, f"{_cell(run, guidance)}.png")
            for guidance, figures in kept.items()
        ]

    def _measure(self, run: Run, checkpoint: Checkpoint, pipeline: Any, guidance: float, probes: Probes) -> Figures:
        sampler = self._sampler(pipeline, run.config.classes, checkpoint.original_sizes, guidance)
        figures = self._figures(self.evaluation.generate(sampler), probes)
        write_samples(sampler, run.config.classes, self.out / f"{_cell(run, guidance)}.png", SHOWN)
        return figures

    def _keep(self, run: Run, guidance: float, figures: Figures, made_with: str) -> None:
        data = json.dumps({"made_with": made_with, "figures": figures}, indent=1).encode()
        Storage(self.out).write(f"{_cell(run, guidance)}.json", data)

    def _read(self, run: Run, guidance: float, made_with: str) -> Figures | None:
        """The figures that are kept of a cell, where they were made with the same settings."""
        file = self.out / f"{_cell(run, guidance)}.json"
        if not file.is_file():
            return None
        kept = json.loads(file.read_text(encoding="utf-8"))
        return dict(kept["figures"]) if kept["made_with"] == made_with else None

    def _identity(self, run: Run) -> str:
        """Told by all that decides a run's figures, but for the guidance, which stands in the file's name."""
        plain = run.config.to_json()
        del plain["ablation"]
        info = self.dataset.info
        data = [self.dataset.name, info.get("fingerprint"), info.get("count"), info.get("created")]
        shown = self.pictures.info.get("fingerprint") if self.pictures else list(self.config.ablation.prompts.values())
        grid = [shown, self.base_sha256, self.extractor.id]
        return fingerprint({"config": plain, "data": data, "grid": grid})

    def _figures(self, sides: dict[str, Side], probes: Probes) -> Figures:
        return self._judged(sides, probes) | self._named(self.evaluation.figures(sides))

    def _judged(self, sides: dict[str, Side], probes: Probes) -> Figures:
        return dict(probes.judge(sides, self.config.classes.codes))

    def _named(self, figures: dict[str, float | None]) -> Figures:
        """The set figures among these, by the names that tell the features."""
        return {name: figures.get(name) for name in map(self.evaluation.naming, SET_FIGURES)}


def _cell(run: Run, guidance: float) -> str:
    return f"cells/{run.name}-g{guidance:g}"


def means_of(rows: Sequence[Figures], names: Sequence[str]) -> Figures:
    """The mean of each figure over the rows that have it; None where none has."""
    known = {name: [value for row in rows if (value := row.get(name)) is not None] for name in names}
    return {name: float(np.mean(values)) if values else None for name, values in known.items()}

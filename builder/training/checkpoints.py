"""What happens at a checkpoint: measure, save, draw samples, keep the history, make room; and whether to go on."""

from __future__ import annotations

import dataclasses
import datetime
import shutil
import warnings
from pathlib import Path

from builder.config import Config
from builder.files import TEMPORARY
from builder.models.building import Pipeline
from builder.models.checkpoint import STEP, Checkpoint, save_adapter, save_checkpoint
from builder.models.history import Entry, History, plain
from builder.models.prune import REMOVED, remove_folder
from builder.sampling.sampler import Sampler
from builder.training.evaluate import Evaluation, finite, is_exhausted
from builder.training.log import Log
from builder.training.preview import write_samples
from builder.training.stage import Stage


def sweep_run(out: Path) -> None:
    """Remove what killed processes were writing or removing in the folder of a run; only for who holds its lock."""
    for folder in (out, out / "samples"):
        for left in [*folder.glob(f"{TEMPORARY}*"), *folder.glob(f"{REMOVED}*")]:
            shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)


class Checkpoints:
    """The checkpoints of a run: OUT/step-000100, samples/, history.json. `pipeline` shows the averaged weights.

    The best by `train.monitor` stays, and the `train.keep_checkpoints` newest.
    """

    def __init__(
        self, out: Path, config: Config, stage: Stage, pipeline: Pipeline, sampler: Sampler,
        evaluation: Evaluation | None, description: Checkpoint, log: Log, images_per_epoch: int,
    ) -> None:  # fmt: skip
        self.out, self.config, self.stage, self.pipeline, self.sampler = out, config, stage, pipeline, sampler
        self.evaluation, self.description, self.log = evaluation, description, log
        self.images_per_epoch = images_per_epoch
        history = History.read(out)
        if history.entries and history.last.step > stage.step:
            warnings.warn(
                f"{out} has a checkpoint of step {history.last.step}, but its newest state that is whole is of step "
                f"{stage.step}: the steps since are made again", stacklevel=2,
            )  # fmt: skip
        known = tuple(entry for entry in history.entries if entry.step <= stage.step)
        self.history = dataclasses.replace(history, entries=known)
        if evaluation:
            self.history = dataclasses.replace(self.history, monitor=evaluation.monitor, mode=evaluation.mode)

    @property
    def exhausted(self) -> bool:
        """Whether `train.patience` says that enough was tried."""
        return is_exhausted(self.history, self.config.train.patience)

    def folder(self, step: int) -> Path:
        return self.out / f"{STEP}{step:06d}"

    def make(self, step: int) -> bool:
        """Make the checkpoint of the pipeline as it is; whether training should end with it."""
        unet = self.pipeline.unet
        created = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        epoch = step * self.config.train.batch_size // self.images_per_epoch
        unet.eval()
        metrics = self._measure(step)
        description = dataclasses.replace(
            self.description, path=self.folder(step), step=step, epoch=epoch, metrics=metrics, created=created
        )
        if self.config.model.method == "lora":
            save_adapter(unet, description)
        else:
            save_checkpoint(self.pipeline, description)
        write_samples(self.sampler, self.config.classes, self.out / "samples" / f"{STEP}{step:06d}.png")
        unet.train()
        self.history = self.history.with_entry(Entry(step, epoch, self.folder(step).name, metrics, created))
        self.history.write(self.out)
        for entry in self.history.in_folders(self.out).superfluous(self.config.train.keep_checkpoints - 1):
            remove_folder(self.out / entry.path)
        return self.exhausted

    def _measure(self, step: int) -> dict[str, float | int | None]:
        """The figures of an evaluation, where it is time for one; else nothing."""
        every = self.config.train.evaluate_every
        if self.evaluation is None or (step % every and step != self.stage.steps):
            return {}
        metrics = {"train_loss": self.stage.since.means().get("loss"), **self.evaluation.measure(self.sampler)}
        self.log.show({f"evaluation/{name}": value for name, value in finite(metrics).items()}, step)
        found: dict[str, float | int | None] = plain(metrics)
        return found

"""Make one image again from its manifest row, by replaying the batch it was made in."""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np

from builder.config import config_from_json
from builder.display import printable
from builder.documents import RESTORE
from builder.errors import BuilderError
from builder.job.plan import Plan
from builder.job.run import VERSIONS
from builder.job.spec import JobSpec
from builder.quality.features import DEFAULT
from builder.shards.dataset import Dataset
from builder.shards.writer import pixel_sha256
from builder.trust import may_read

if TYPE_CHECKING:
    from builder.config import Config
    from builder.models.checkpoint import Checkpoint


@dataclass(frozen=True)
class Comparison:
    """The image made again beside the recorded one. `differences` names what differs in the surroundings."""

    key: str
    identical: bool
    max_difference: int  # of 255
    mean_difference: float
    differences: list[str]
    pixels: np.ndarray


def recorded_spec(
    dataset: Dataset, checkpoint: str | None = None, real: str | None = None, features: str | None = None
) -> tuple[JobSpec, Checkpoint]:
    """The job that made `dataset`, as dataset.json records it, and its checkpoint (default: where it was then).

    Args:
        dataset: A synthetic dataset.
        checkpoint: Where its checkpoint is now.
        real: The dataset that its scores are measured against; not needed to make images alone.
        features: The feature extractor of its scores, where it is one's own code or files.

    Raises:
        BuilderError: no job made the dataset; the checkpoint is not there or has other weights; what dataset.json
            records would run code or read files that the user didn't name.
    """
    from builder.models.checkpoint import resolve

    info = dataset.info
    if "fingerprint_keys" not in info or "checkpoint" not in info:
        raise BuilderError(
            f"dataset '{dataset.name}' was not made by a batch job", "only synthetic images can be made again"
        )
    keys = info["fingerprint_keys"]
    if missing := [key for key in ("checkpoint", "dtype", "phases", "weights") if not keys.get(key)]:
        raise BuilderError(f"{dataset.info_path} is damaged: 'fingerprint_keys.{missing[0]}' is missing", RESTORE)
    if not checkpoint and not may_read(info["checkpoint"], info.get("checkpoint_voucher")):
        raise BuilderError(
            f"'{dataset.name}' was made from the checkpoint {printable(info['checkpoint'])}, which lies outside the "
            "working directory, and this user didn't make the dataset",
            "give the checkpoint with --checkpoint",
        )
    found = resolve(checkpoint or info["checkpoint"], run=info["checkpoint"])
    if found.sha256 != keys["checkpoint"]:
        raise BuilderError(
            f"the weights in {found.path} are not those that made '{dataset.name}'", "give the right --checkpoint"
        )
    config = _named_by_user(config_from_json(info["config"]), dataset.name, features)
    spec = JobSpec(
        config=replace(config, sample=replace(config.sample, dtype=keys["dtype"])),  # 'auto' may mean another here
        plan=Plan(tuple(keys["phases"]), tuple(keys["weights"])),
        name=dataset.name,
        out=dataset.storage.root,
        checkpoint=str(found.path),
        checkpoint_sha256=found.sha256,
        dtype=keys["dtype"],
        real=real,
        real_out=dataset.storage.root,
    )
    return spec, found


def _named_by_user(config: Config, name: str, features: str | None) -> Config:
    """The recorded config, with the extractor that the user names. What is recorded never chooses code or files."""
    if features is not None:
        config = replace(config, score=replace(config.score, features=features))
    elif config.score.features.partition(":")[2]:
        raise BuilderError(
            f"the scores of '{name}' are of the features '{printable(config.score.features)}': a dataset may "
            "not choose what code runs or which files are read",
            "if you know them, name them yourself with --features",
        )
    if config.score.lpips not in ("auto", "off") and not may_read(config.score.lpips):
        raise BuilderError(
            f"the scores of '{name}' are of the weights {printable(config.score.lpips)}, outside the working directory",
            "if you know them, confirm their folder with --trust-root",
        )
    return config


class Regenerator:
    """Replays images of one synthetic dataset, from the recorded checkpoint or a given one with the same weights."""

    def __init__(self, dataset: Dataset, checkpoint: str | None = None) -> None:
        from builder.job.devices import prepare
        from builder.sampling.sampler import load_sampler

        self.dataset = dataset
        self.spec, found = recorded_spec(dataset, checkpoint, features=DEFAULT)  # images alone need none
        self.sampler = load_sampler(found, self.spec.config, prepare(0))
        self.versions = dataset.info["versions"]

    def row(self, key: str) -> dict[str, Any]:
        """The manifest row of a key; BuilderError when the dataset has none."""
        import pyarrow.compute as pc

        table = self.dataset.table()
        found = table.filter(pc.equal(table["key"], key)).to_pylist()
        if not found:
            raise BuilderError(
                f"there is no image '{key}' in dataset '{self.dataset.name}'", "keys stand in its manifests"
            )
        return dict(found[0])

    def compare(self, key: str) -> Comparison:
        """Make the image of `key` again and compare its pixels with the stored ones."""
        from builder.job.worker import replay_batch

        row = self.row(key)
        size = row["batch_size"]
        start = row["position"] // size * size
        images = replay_batch(
            self.spec, self.sampler, start, start + size, row["reserve"], row["dtype"] != self.spec.dtype,
            row.get("micro_batch"),
        )  # fmt: skip
        image = next(image for image, _ in images if image.position == row["position"])
        place = {name: row[name] for name in ("key", "shard", "offset", "size")}
        stored = self.dataset.pixels(place)  # whatever the manifest says of its pixels: that is what is compared
        differences = self._differences(row)
        at_once = row.get("micro_batch") or size
        if image.micro_batch != at_once:
            differences.append(f"images at once: {at_once} then, {image.micro_batch} now, for want of memory")
        difference = np.abs(image.pixels.astype(int) - stored.astype(int))
        return Comparison(
            key=key,
            identical=pixel_sha256(image.pixels) == row["sha256"],
            max_difference=int(difference.max()),
            mean_difference=float(difference.mean()),
            differences=differences,
            pixels=image.pixels,
        )

    def _differences(self, row: dict[str, Any]) -> list[str]:
        said = []
        if row["device"] != self.sampler.device_model:
            said.append(f"device: {row['device']} then, {self.sampler.device_model} now")
        for package in VERSIONS:
            then, now = self.versions.get(package), version(package)
            if then != now:
                said.append(f"{package}: {then} then, {now} now")
        return said

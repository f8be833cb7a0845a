"""What a job makes, in plain data that travels to every worker; its fingerprint decides whether a run continues it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from builder.config import Config, fingerprint
from builder.errors import BuilderError
from builder.job.plan import Plan
from builder.shards.dataset import Dataset
from builder.shards.storage import Storage

if TYPE_CHECKING:
    from builder.models.checkpoint import Checkpoint


@dataclass(frozen=True)
class JobSpec:
    """One batch job: dataset `name` under `out`, drawn from `checkpoint` (a folder), scored against `real`."""

    config: Config
    plan: Plan
    name: str
    out: str
    checkpoint: str
    checkpoint_sha256: str
    dtype: str
    real: str | None
    real_out: str

    @classmethod
    def of(cls, config: Config, plan: Plan, checkpoint: Checkpoint, *, name: str, out: str, real: str) -> JobSpec:
        """A job on this machine, whose devices decide what 'auto' means. `real` is found under `out`, or a path."""
        from builder.job.devices import device_kind
        from builder.sampling.device import dtype_name, resolve_dtype

        return cls(
            config, plan, name, out, str(checkpoint.path), checkpoint.sha256,
            dtype_name(resolve_dtype(config.sample.dtype, device_kind())), real, out,
        )  # fmt: skip

    @property
    def dataset(self) -> Dataset:
        return Dataset(self.name, Storage(self.out))

    def keys(self) -> dict[str, Any]:
        """What decides the images, by name. A change of any of them is another dataset."""
        sample = self.config.sample
        later = {  # keys younger than some datasets: at their default they say nothing, so old fingerprints stay
            "guidance_interval": [float(sigma) for sigma in sample.guidance_interval],
            "compile": sample.compile,
        }
        return {
            "classes": self.config.classes.to_json(),
            "checkpoint": self.checkpoint_sha256,
            "negative_prompt": sample.negative_prompt,
            "size": sample.size,
            "steps": sample.steps,
            "guidance": sample.guidance,
            "scheduler": sample.scheduler,
            "batch_size": sample.batch_size,
            "dtype": self.dtype,
            "seed": self.config.seed,
            "phases": list(self.plan.codes),
            "weights": list(self.plan.weights),
            "codec": self.config.shards.codec,
            "images_per_shard": self.config.shards.images_per_shard,
            **{key: value for key, value in later.items() if value},
        }

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.keys())

    def is_same(self, recorded: dict[str, Any]) -> bool:
        """Whether the recorded keys of a dataset are this job's."""
        return self._plain_keys() == recorded

    def require_same(self, recorded: dict[str, Any]) -> None:
        """Refuse to continue a dataset that other settings made, naming the keys that differ."""
        mine = self._plain_keys()
        changed = [key for key in {**mine, **recorded} if mine.get(key) != recorded.get(key)]
        if changed:
            said = "; ".join(
                f"{key}: {_short(recorded.get(key))} there, {_short(mine.get(key))} now" for key in changed
            )
            raise BuilderError(
                f"dataset '{self.name}' was begun with other settings: {said}",
                f"use the old settings to continue it, another --name, or `builder rm {self.name}` to start over",
            )

    def _plain_keys(self) -> dict[str, Any]:
        """The keys as JSON gives them back."""
        keys: dict[str, Any] = json.loads(json.dumps(self.keys()))
        return keys


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."

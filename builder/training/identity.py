"""What a resume state must agree with, stage by stage, and which keys of the config changed where it doesn't.

What a run is begun with stands beside its states, so that a changed key is refused before anything is rendered, loaded
or fetched. torch is not needed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from builder.config import Config, VaeTrainConfig, config_from_json
from builder.errors import BuilderError
from builder.shards.dataset import Dataset
from builder.shards.storage import Storage

FREE_KEYS = (  # of train: no state depends on them
    "steps", "checkpoint_every", "keep_checkpoints", "threads", "vae", "micro_batch", "gradient_checkpointing",
    "ema_device", "evaluate_every", "evaluate_images", "monitor", "monitor_mode", "patience", "perceptual_file",
)  # fmt: skip
ADVERSARIAL_KEYS = (  # of train.vae: the reconstruction does not depend on them
    "adversarial_steps", "adversarial_batch_size", "adversarial_learning_rate", "adversarial_weight",
    "critic_learning_rate", "grain_channels",
)  # fmt: skip
YOUNGER_KEYS = {"perceptual_weight", "views", *ADVERSARIAL_KEYS}  # of train.vae: than some states
SECTIONS = {  # of an identity -> the keys of the config that it stands for
    "size": "train.size",
    "vae": "train.vae",
    "negative_prompt": "sample.negative_prompt",
    "data": "the dataset",
    "base": "the weights of model.base",
}
UNKNOWN: Any = None  # in the place of what isn't known yet

Identity = dict[str, Any]


def data_of(dataset: Dataset) -> list[Any]:
    """What tells the crops that are trained on."""
    return [dataset.info.get("fingerprint"), dataset.info.get("count")]


def vae_identity(config: Config, data: list[Any] | None) -> Identity:
    """What a state of the autoencoder must agree with; its number of steps may still grow."""
    plain = config.to_json()
    return {
        "seed": config.seed,
        "model": {key: plain["model"][key] for key in ("family", "architecture")},
        "size": config.train.size,
        "data": data,
        "vae": {
            key: value for key, value in _vae_settings(config).items() if key != "steps" and key not in ADVERSARIAL_KEYS
        },
    }


def decoder_identity(config: Config, data: list[Any] | None) -> Identity:
    """What a state of the adversarial stage must agree with: it starts from one finished autoencoder."""
    settings = {key: value for key, value in _vae_settings(config).items() if key != "adversarial_steps"}
    return {**vae_identity(config, data), "vae": settings}


def unet_identity(config: Config, data: list[Any] | None, base_sha256: str | None) -> Identity:
    """What a state of the denoiser must agree with: its latents are those of one finished autoencoder."""
    plain = config.to_json()
    return {
        **vae_identity(config, data),
        "vae": _vae_settings(config),
        "train": {key: value for key, value in plain["train"].items() if key not in FREE_KEYS},
        "base": base_sha256,
        "method": [plain["model"]["method"], plain["model"]["lora"] if config.model.method == "lora" else None],
        "classes": plain["classes"],
        "negative_prompt": config.sample.negative_prompt,
    }


def _vae_settings(config: Config) -> dict[str, Any]:
    """`train.vae` without those of the younger keys that are at their defaults: states from before them go on."""
    settings = config.to_json()["train"]["vae"]
    if not settings["adversarial_steps"]:
        settings = {key: value for key, value in settings.items() if key not in ADVERSARIAL_KEYS}
    defaults = vars(VaeTrainConfig())
    return {key: value for key, value in settings.items() if key not in YOUNGER_KEYS or value != defaults[key]}


STAGES: dict[str, Callable[[Config, list[Any] | None], Identity]] = {
    "vae": vae_identity,
    "decoder": decoder_identity,
    "unet": lambda config, data: unet_identity(config, data, UNKNOWN),
}


def as_recorded(identity: Identity) -> Identity:
    """The identity as JSON gives it back."""
    plain: Identity = json.loads(json.dumps(identity))
    return plain


def settings_path(states: Path, stage: str) -> Path:
    """Where the identity stands that the states of a stage belong to."""
    return states / f"settings-{stage}.json"


def recorded_identity(states: Path, stage: str) -> Identity | None:
    """The identity beside the states of a stage; None where an older version wrote them, or the file is damaged."""
    try:
        found = json.loads(settings_path(states, stage).read_bytes())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def record_identity(states: Path, stage: str, identity: Identity) -> None:
    """Write down what the states of a stage belong to, unless it stands there."""
    if recorded_identity(states, stage) != as_recorded(identity):
        Storage(states).write(settings_path(states, stage).name, json.dumps(identity, indent=1).encode())


def require_same_run(config: Config, out: Path, data: list[Any] | None = None) -> None:
    """Refuse to continue the run in `out` with other settings, naming the keys.

    Args:
        config: what is asked for now.
        out: the run's folder; one without states is a new run.
        data: what tells the crops; None: not known yet.
    """
    states = out / "state"
    for stage, identity_of in STAGES.items():
        recorded = recorded_identity(states, stage) or (_of_last_checkpoint(out) if stage == "unet" else None)
        if recorded is None or not any(states.glob(f"{stage}-*.pt")):
            continue
        changed = changed_keys(recorded, identity_of(config, data))
        if changed:
            raise refusal(states, changed)


def _of_last_checkpoint(run: Path) -> Identity | None:
    """As far as the config in its checkpoint.json tells: of runs that an older version began."""
    for file in sorted(run.glob("step-*/checkpoint.json"), reverse=True)[:1]:
        try:
            return unet_identity(config_from_json(json.loads(file.read_bytes())["config"]), UNKNOWN, UNKNOWN)
        except (OSError, ValueError, KeyError, TypeError, BuilderError):
            return None
    return None


def refusal(states: Path, changed: list[str]) -> BuilderError:
    """What is said where keys changed."""
    return BuilderError(
        f"{states.parent} was trained with other settings: {'; '.join(changed)}",
        f"use the old settings to continue it, train into another folder (--to), or remove {states} to start anew",
    )


def changed_keys(recorded: Mapping[str, Any], now: Identity) -> list[str]:
    """The config's keys that differ, each with its values, leaving out what isn't known (None) on one side."""
    plain: Identity = as_recorded(now)
    found: list[str] = []
    for key in {**plain, **recorded}:
        there, here = recorded.get(key), plain.get(key)
        if there == here or (key in ("data", "base") and (there is None or here is None)):
            continue
        name = SECTIONS.get(key, key)
        if key in ("data", "base"):
            found.append(f"{name} is another")
        elif key == "method" and isinstance(there, list) and isinstance(here, list):
            method = [dict(zip(("method", "lora"), each, strict=False)) for each in (there, here)]
            found += _differences("model", *method)
        elif key == "vae" and isinstance(there, dict) and isinstance(here, dict):
            found += _differences(name, _with_defaults(there), _with_defaults(here))
        else:
            found += _differences(name, there, here)
    return found


def _with_defaults(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of the autoencoder with the younger keys that `_vae_settings` left out."""
    defaults = vars(VaeTrainConfig())
    return {**{key: defaults[key] for key in sorted(YOUNGER_KEYS)}, **settings}


def _differences(name: str, there: Any, here: Any) -> list[str]:
    if isinstance(there, dict) and isinstance(here, dict):
        return [
            said
            for key in {**there, **here}
            if there.get(key) != here.get(key)
            for said in _differences(f"{name}.{key}", there.get(key), here.get(key))
        ]
    return [f"{name}: {_short(there)} there, {_short(here)} now"]


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."

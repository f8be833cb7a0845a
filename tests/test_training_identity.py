"""A run that is continued with other settings: which keys changed is said, before anything is made."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from builder.config import Config, load_config
from builder.errors import BuilderError
from builder.training.identity import (
    changed_keys,
    decoder_identity,
    require_same_run,
    settings_path,
    unet_identity,
    vae_identity,
)
from builder.training.states import States

DATA = ["fingerprint", 7]


def begun(out: Path, config: Config, *stages: str) -> Path:
    """The states of a run, as training leaves them after some steps of these stages."""
    identities = {
        "vae": vae_identity(config, DATA),
        "decoder": decoder_identity(config, DATA),
        "unet": unet_identity(config, DATA, "base"),
    }
    for stage in stages:
        States(out / "state", identities[stage]).save(stage, 4, {"step": 4})
    return out


def refused(config: Config, out: Path) -> str:
    with pytest.raises(BuilderError) as raised:
        require_same_run(config, out, DATA)
    return raised.value.what


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["train.batch_size=5"], "train.batch_size: 64 there, 5 now"),
        (["train.learning_rate=1e-4"], "train.learning_rate: 0.0008 there, 0.0001 now"),
        (["train.vae.kl_weight=1"], "train.vae.kl_weight: 0.0005 there, 1.0 now"),
        (["train.size=32"], "train.size: 64 there, 32 now"),
        (["seed=1"], "seed: 0 there, 1 now"),
        (["model.family=sd15"], 'model.family: "sdxl" there, "sd15" now'),
        (["model.architecture.vae.latent_channels=4"], "model.architecture.vae.latent_channels: 16 there, 4 now"),
        (["model.method=lora"], 'model.method: "full" there, "lora" now'),
        (["sample.negative_prompt=blue"], "sample.negative_prompt: "),
    ],
)
def test_a_changed_key_is_named_with_both_values(tmp_path: Path, overrides: list[str], said: str) -> None:
    out = begun(tmp_path, load_config("demo"), "vae", "unet")
    assert said in refused(load_config("demo", overrides), out)


def test_all_changed_keys_are_named(tmp_path: Path) -> None:
    out = begun(tmp_path, load_config("demo"), "vae", "unet")
    what = refused(load_config("demo", ["train.batch_size=5", "train.flips=false", "train.min_snr_gamma=0"]), out)
    assert all(key in what for key in ("train.batch_size", "train.flips", "train.min_snr_gamma"))


@pytest.mark.parametrize(
    "override",
    ["train.steps=9000", "train.checkpoint_every=250", "sample.steps=3", "score.panel=4", "train.micro_batch=4",
     "allow_leak=why", "checkpoint=other", "train.monitor=fd"],
)  # fmt: skip
def test_what_no_state_depends_on_may_change(tmp_path: Path, override: str) -> None:
    require_same_run(load_config("demo", [override]), begun(tmp_path, load_config("demo"), "vae", "unet"), DATA)


def test_while_the_autoencoder_trains_only_its_own_keys_are_held(tmp_path: Path) -> None:
    out = begun(tmp_path, load_config("demo"), "vae")
    require_same_run(load_config("demo", ["train.batch_size=5", "train.vae.steps=9000"]), out, DATA)
    assert "train.vae.batch_size" in refused(load_config("demo", ["train.vae.batch_size=5"]), out)


def test_what_is_not_known_yet_is_not_held_against_a_run(tmp_path: Path) -> None:
    config = load_config("demo")
    out = begun(tmp_path, config, "vae", "unet")
    require_same_run(config, out)  # neither the dataset nor the base's weights
    with pytest.raises(BuilderError, match="the dataset is another"):
        require_same_run(config, out, ["fingerprint", 8])
    require_same_run(config, tmp_path / "new")


def test_a_run_of_an_older_version_is_told_by_its_last_checkpoint(tmp_path: Path) -> None:
    config = load_config("demo")
    out = begun(tmp_path, config, "unet")
    settings_path(out / "state", "unet").unlink()
    for step, overrides in ((100, ["train.batch_size=3"]), (200, [])):
        folder = out / f"step-{step:06d}"
        folder.mkdir()
        recorded = {"config": load_config("demo", overrides).to_json()}
        (folder / "checkpoint.json").write_text(json.dumps(recorded))
    require_same_run(config, out, DATA)
    assert "train.batch_size: 64 there, 5 now" in refused(load_config("demo", ["train.batch_size=5"]), out)
    (folder / "checkpoint.json").write_text('{"config": {"train": 3}}')  # says nothing
    require_same_run(load_config("demo", ["train.batch_size=5"]), out, DATA)


class Stage:
    name, step = "unet", 0

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]


def test_states_name_the_keys_too_and_those_of_before_still_go_on(tmp_path: Path) -> None:
    config = load_config("demo")
    begun(tmp_path, config, "unet")
    other = unet_identity(config, DATA, "another base")
    with pytest.raises(BuilderError, match=r"the weights of model\.base is another"):
        States(tmp_path / "state", other).restore(Stage(), torch.device("cpu"))
    settings_path(tmp_path / "state", "unet").unlink()  # as an older version left it
    with pytest.raises(BuilderError, match="another model, data, or training configuration"):
        States(tmp_path / "state", other).restore(Stage(), torch.device("cpu"))
    stage = Stage()
    assert States(tmp_path / "state", unet_identity(config, DATA, "base")).restore(stage, torch.device("cpu"))
    assert stage.step == 4


def test_a_younger_key_at_its_default_is_no_change() -> None:
    """Of states that an older version of this program wrote."""
    config = load_config("demo")
    recorded = json.loads(json.dumps(vae_identity(config, DATA)))
    assert not {"views", "perceptual_weight", "grain_channels"} & set(recorded["vae"])
    changed = dataclasses.replace(
        config, train=dataclasses.replace(config.train, vae=dataclasses.replace(config.train.vae, views=True))
    )
    assert changed_keys(recorded, vae_identity(changed, DATA)) == ["train.vae.views: false there, true now"]


def test_a_changed_key_is_refused_before_a_phantom_is_rendered(builder, tmp_path: Path) -> None:
    begun(tmp_path / "checkpoints/demo", load_config("demo"), "vae", "unet")
    result = builder("train", "--config", "demo", "--set", "train.batch_size=5")
    assert result.code == 2
    assert "train.batch_size: 64 there, 5 now" in result.output and "rendering" not in result.output
    assert not (tmp_path / "manifests").exists()

"""The configs that ship: each is valid, as advised, and trains in small; those of accelerate mean what they say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from builder.config import Config, load_config
from builder.models.checkpoint import Checkpoint, read_checkpoint, save_checkpoint
from builder.shards.dataset import find_dataset
from tests.conftest import Result, write_real
from tests.reduced import WIDTHS, narrow

FOLDER = Path(__file__).parents[1] / "configs"
CONFIGS = {path.stem: path for path in sorted(FOLDER.glob("*.yaml"))}
FINE_TUNING = ("sdxl-full", "sdxl-lora", "sd15-lora")
FROM_SCRATCH = ("demo", "wound-type", "stock", "base")
ABLATIONS = ("ablation", "ablation-demo")  # exercised in test_ablation
SMALL = [
    "train.steps=2", "train.batch_size=4", "train.micro_batch=2", "train.warmup_steps=1", "train.checkpoint_every=2",
    "sample.steps=2", "sample.batch_size=3", "score.ssim_size=64", "score.panel=2",
]  # fmt: skip


def test_every_config_is_exercised_here() -> None:
    assert set(CONFIGS) == {*FINE_TUNING, *FROM_SCRATCH, *ABLATIONS}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_is_valid_and_named_as_its_file(name: str) -> None:
    config = load_config(str(CONFIGS[name]))
    assert config.name == name
    assert config.sample.size == config.train.size
    if name not in ABLATIONS:
        assert config.checkpoint.partition(":")[0] == name  # what `builder train --config NAME` makes
    assert config.train.evaluate_every % config.train.checkpoint_every == 0


@pytest.mark.parametrize("name", FINE_TUNING)
def test_fine_tuning_is_as_the_prompt_study_found(name: str) -> None:
    config = load_config(name)
    assert config.train.perceptual_weight == 0
    assert 3 <= config.sample.guidance <= 5
    assert config.train.evaluate_every > 0 and config.train.patience > 0 and config.checkpoint == f"{name}:best"
    assert config.model.base_lineage == "public"
    assert config.model.method == ("full" if name.endswith("full") else "lora")


def test_loras_differ_from_the_full_recipe_in_what_they_say() -> None:
    full, lora, sd15 = (load_config(name) for name in FINE_TUNING)
    assert (full.train.batch_size, full.train.learning_rate, full.train.grad_norm) == (120, 3e-5, 0.5)
    assert lora.train.min_snr_gamma == sd15.train.min_snr_gamma == full.train.min_snr_gamma == 5
    assert (sd15.model.family, lora.model.family) == ("sd15", "sdxl")
    assert sd15.model.base != lora.model.base == full.model.base


# -- in small ------------------------------------------------------------------------------------------------------


def reduced(family: str) -> Any:
    """A pipeline of the published model's layout, narrow and with one layer where that has several; random weights."""
    from builder.models.families import FAMILIES

    architecture = narrow(FAMILIES[family].architecture, WIDTHS[family])
    for name, part in architecture.items():
        one = [key for key in ("layers_per_block", "transformer_layers_per_block", "num_hidden_layers") if key in part]
        part.update(
            dict.fromkeys(one, 2 if name.startswith("text") else 1)
        )  # of text encoders the last but one is read
    return FAMILIES[family].build(architecture, 64, 0)


def ran(result: Result) -> str:
    assert not result.code, result.output
    return result.output


def through(builder, config: Config, small: list[str], real: str) -> dict[str, Any]:
    """Train, then draw images, by the commands of the README; dataset.json of the images."""
    settings = [word for setting in small for word in ("--set", setting)]
    if config.name == "stock":  # its captions are what the guards warn of
        settings += ["--silence", "prompt-style", "--silence", "prompt-length"]
    trained = ran(builder("train", "--config", config.name, "--real", real, *settings))
    assert f"checkpoints/{config.name}/step-000002" in trained and "warning" not in trained
    words = [
        "--config",
        config.name,
        "--real",
        real,
        *settings,
        "--count",
        "4",
        "--engine",
        "inline",
        "--name",
        "drawn",
    ]
    drawn = ran(builder("shards", *words))
    assert "is complete: 4 images" in drawn and "warning" not in drawn
    info: dict[str, Any] = find_dataset("drawn").info
    return info


@pytest.mark.no_cover
@pytest.mark.parametrize("name", FINE_TUNING)
def test_a_fine_tuning_config_trains_and_draws_in_small(name: str, builder, tmp_path: Path) -> None:
    config = load_config(name)
    real = write_real(tmp_path, size=48)
    base = save_checkpoint(reduced(config.model.family), Checkpoint(tmp_path / "base", config.model.family)).path
    small = [
        *SMALL, f"model.base={base}", "model.lora.rank=2", "train.size=64", "sample.size=64",
        "train.evaluate_every=2", "train.evaluate_images=4",
    ]  # fmt: skip
    info = through(builder, config, small, real.name)
    trained = read_checkpoint(Path(info["checkpoint"]))
    assert (trained.family, trained.method) == (config.model.family, config.model.method)
    assert trained.base["reference"] == str(base)
    assert trained.metrics and trained.lineage.known
    assert info["config"]["sample"]["size"] == 64


@pytest.mark.no_cover
@pytest.mark.parametrize("name", FROM_SCRATCH)
def test_a_config_from_scratch_trains_and_draws_in_small(name: str, builder, tmp_path: Path) -> None:
    from tests.test_models import ARCHITECTURE

    config = load_config(name)
    real = write_real(tmp_path, per_phase=6, size=16, classes=config.classes)
    parts = {**ARCHITECTURE, "scheduler": config.model.architecture["scheduler"]}
    small = [*SMALL, *(f"model.architecture.{part}={json.dumps(value)}" for part, value in parts.items())]
    small += ["train.size=16", "sample.size=16", f"checkpoint=checkpoints/{name}"]  # the name 'demo' is the shipped one
    small += ["train.vae.steps=2", "train.vae.guided_steps=1", "train.vae.batch_size=4", "train.threads=1"]
    if config.train.vae.adversarial_steps:
        small += ["train.vae.adversarial_steps=2", "train.vae.adversarial_batch_size=4"]
    small += ["train.cached_views=2"] if config.train.augment else []
    info = through(builder, config, small, real.name)
    assert f"checkpoints/{name}/step-" in info["checkpoint"]


# -- accelerate ----------------------------------------------------------------------------------------------------


ACCELERATE = {path.stem: path for path in sorted((FOLDER / "accelerate").glob("*.yaml"))}
KINDS = {"ddp": "MULTI_GPU", "fsdp": "FSDP", "zero2": "DEEPSPEED"}


@pytest.mark.parametrize("name", KINDS)
def test_accelerate_reads_its_configs(name: str) -> None:
    """As `accelerate launch` does; tests/test_division.py trains with those that divide weights."""
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    assert set(ACCELERATE) == set(KINDS)
    found = load_config_from_file(str(ACCELERATE[name]))  # refuses unknown keys
    assert found.distributed_type.value == KINDS[name]
    assert found.num_processes == 2 and found.num_machines == 1
    assert found.mixed_precision == "no"
    flags = vars(launch_command_parser().parse_args(["train"]))  # of an inner section, unknown keys are not refused
    assert set(getattr(found, "fsdp_config", {})) | set(getattr(found, "deepspeed_config", {})) <= set(flags)
    assert "--config_file configs/accelerate/" + ACCELERATE[name].name in ACCELERATE[name].read_text()

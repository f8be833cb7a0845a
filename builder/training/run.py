"""Train a generator on the training split of a packed dataset: from scratch, or from a base folder."""

from __future__ import annotations

import dataclasses
import datetime
import shutil
from pathlib import Path
from typing import Any

import torch

from builder.config import Config, fingerprint
from builder.errors import BuilderError
from builder.models.checkpoint import Checkpoint, Lineage, resolve, save_checkpoint
from builder.models.load import load_pipeline
from builder.models.sdxl import Pipeline, build
from builder.sampling.sampler import Sampler
from builder.shards.dataset import Dataset
from builder.training.data import TrainingCrops, load_crops, size_quantiles
from builder.training.diffusion import DiffusionObjective, Latents, Prompts
from builder.training.preview import write_curve, write_reconstructions, write_samples
from builder.training.stage import Stage, States, run_stage
from builder.training.vae import AutoencoderObjective, encode, scaling_factor

SHOWN = 12  # crops in the picture of reconstructions
FREE_KEYS = ("steps", "checkpoint_every", "keep_checkpoints", "threads", "vae")  # of train: no state depends on them


def train(
    config: Config, dataset: Dataset, out: Path, *, resume: bool = True, device: str | torch.device | None = None
) -> Path:
    """Train as `config.model` and `config.train` say and return the last checkpoint's folder, OUT/step-XXXXXX.

    In OUT: checkpoints (diffusers folders of the averaged weights, with checkpoint.json), state/ (resume states),
    log.jsonl, samples/step-XXXXXX.png, reconstructions.png, loss.png. The same command again continues from the last
    state and gives the weights of an uninterrupted run; a larger `train.steps` extends it. `resume=False` starts anew.

    Raises BuilderError for a dataset that can't be trained on or a state of another configuration, and
    stage.TrainingInterrupted after SIGINT or SIGTERM, once the state is saved.
    """
    config.classes.require_same(dataset.classes, "the config", f"dataset '{dataset.name}'")
    if resume is False:
        shutil.rmtree(out / "state", ignore_errors=True)
        (out / "log.jsonl").unlink(missing_ok=True)
    torch.set_num_threads(config.train.threads)
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    out.mkdir(parents=True, exist_ok=True)

    crops = load_crops(dataset, config.train.size)
    pipeline, base = _start(config)
    if not config.model.base:
        _train_vae(pipeline, config, dataset, crops, out, where)
    return _train_unet(pipeline, config, dataset, crops, base, out, where)


def _start(config: Config) -> tuple[Pipeline, Checkpoint | None]:
    if config.model.family != "sdxl":
        raise BuilderError(f"unknown model family '{config.model.family}'", "the families are: sdxl")
    if config.model.base:
        base = resolve(config.model.base)
        pipeline = load_pipeline(base.path)
        shrink = 2 ** (len(pipeline.vae.config.block_out_channels) - 1)
        if config.train.size % shrink:
            raise BuilderError(
                f"train.size {config.train.size} is not a multiple of the autoencoder's {shrink}", "choose another size"
            )
        return pipeline, base
    if not config.model.architecture:
        raise BuilderError("the config has neither model.base nor model.architecture", "start from configs/demo.yaml")
    if config.train.vae.steps < 1:
        raise BuilderError("a model from scratch needs its autoencoder trained", "set train.vae.steps")
    return build(config.model.architecture, config.train.size, config.seed), None


def _vae_identity(config: Config, dataset: Dataset) -> dict[str, Any]:
    """What a resume state of the autoencoder must agree with; its number of steps may still grow."""
    plain = config.to_json()
    return {
        "seed": config.seed,
        "model": plain["model"],
        "size": config.train.size,
        "data": [dataset.info.get("fingerprint"), dataset.info.get("count")],
        "vae": {key: value for key, value in plain["train"]["vae"].items() if key != "steps"},
    }


def _unet_identity(config: Config, dataset: Dataset) -> dict[str, Any]:
    """What a resume state of the denoiser must agree with: its latents are those of one finished autoencoder."""
    plain = config.to_json()
    return {
        **_vae_identity(config, dataset),
        "vae": plain["train"]["vae"],
        "train": {key: value for key, value in plain["train"].items() if key not in FREE_KEYS},
        "classes": plain["classes"],
        "negative_prompt": config.sample.negative_prompt,
    }


def _train_vae(
    pipeline: Pipeline, config: Config, dataset: Dataset, crops: TrainingCrops, out: Path, device: torch.device
) -> None:
    settings = config.train.vae
    objective = AutoencoderObjective(pipeline.vae, crops, settings, seed=config.seed, device=device)
    stage = Stage(
        "vae", objective, steps=settings.steps, batch_size=settings.batch_size, learning_rate=settings.learning_rate,
        warmup_steps=settings.warmup_steps, weight_decay=0.0, grad_norm=1.0, ema_decay=settings.ema_decay,
    )  # fmt: skip
    states = States(out / "state", fingerprint(_vae_identity(config, dataset)))
    states.restore(stage, device)
    run_stage(stage, states, out / "log.jsonl", every=config.train.checkpoint_every)
    pipeline.vae.load_state_dict(stage.ema.model.state_dict())
    pipeline.vae.eval().requires_grad_(False)
    scale = scaling_factor(*encode(pipeline.vae, crops.pixels[:: max(1, len(crops) // 1024)], device))
    pipeline.vae.register_to_config(scaling_factor=scale)
    write_reconstructions(pipeline, crops.pixels[:: -(-len(crops) // SHOWN)], out / "reconstructions.png", device)


def _train_unet(
    pipeline: Pipeline, config: Config, dataset: Dataset, crops: TrainingCrops,
    base: Checkpoint | None, out: Path, device: torch.device,
) -> Path:  # fmt: skip
    settings = config.train
    codes = config.classes.codes
    sizes = size_quantiles(crops.native, crops.labels, codes)
    pipeline.to(device)
    prompts = Prompts(pipeline, [phase.prompt for phase in config.classes], config.sample.negative_prompt, device)
    latents = Latents(pipeline, crops, flips=settings.flips, device=device)
    objective = DiffusionObjective(pipeline, crops, latents, prompts, settings, seed=config.seed, device=device)
    stage = Stage(
        "unet", objective, steps=settings.steps, batch_size=settings.batch_size, learning_rate=settings.learning_rate,
        warmup_steps=settings.warmup_steps, weight_decay=settings.weight_decay, grad_norm=settings.grad_norm,
        ema_decay=settings.ema_decay,
    )  # fmt: skip
    states = States(out / "state", fingerprint(_unet_identity(config, dataset)))
    states.restore(stage, device)
    averaged = type(pipeline)(
        **{**pipeline.components, "unet": stage.ema.model}, force_zeros_for_empty_prompt=True, add_watermarker=False
    )
    # Made before the first step: prompts and sampling that cannot be are refused before hours of training.
    sampler = Sampler(
        averaged, dataclasses.replace(config.sample, size=settings.size),
        {phase.code: phase.prompt for phase in config.classes}, sizes, str(device), torch.float32,
    )  # fmt: skip
    info = dataset.info
    description = Checkpoint(
        out,
        family=config.model.family,
        classes=config.classes,
        prompts={phase.code: phase.prompt for phase in config.classes},
        original_sizes=sizes,
        lineage=_lineage(info.get("lineage", {}), crops.patients, base),
        config=config.to_json(),
        licence={
            "base": base.licence.get("base", "unknown") if base else "none (from scratch)",
            "data": info.get("licence", {}).get("data", ""),
        },
    )

    def save(step: int) -> None:
        target = out / f"step-{step:06d}"
        created = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        save_checkpoint(averaged, dataclasses.replace(description, path=target, step=step, created=created))
        write_samples(sampler, config.classes, out / "samples" / f"step-{step:06d}.png")
        for old in sorted(out.glob("step-??????"))[: -settings.keep_checkpoints]:
            shutil.rmtree(old)

    if stage.step == settings.steps and not (out / f"step-{stage.step:06d}").is_dir():
        save(stage.step)  # stopped between the last state and its checkpoint
    run_stage(stage, states, out / "log.jsonl", every=settings.checkpoint_every, on_checkpoint=save)
    write_curve(out / "log.jsonl", out / "loss.png")
    return out / f"step-{stage.step:06d}"


def _lineage(data: dict[str, Any], patients: list[str], base: Checkpoint | None) -> Lineage:
    """The patients of these crops and of the base; unknown when either's are, or when their keys differ."""
    key = data.get("key_fingerprint")
    known = bool(data.get("known") and patients)
    if base is not None:
        comparable = base.lineage.key_fingerprint == key or not base.lineage.patients
        known = known and base.lineage.known and comparable
        patients = sorted({*patients, *base.lineage.patients})
    return Lineage(known, key, patients)

"""Train a generator on the training split of a packed dataset: from scratch, or from a base, in full or as a LoRA."""

from __future__ import annotations

import copy
import dataclasses
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from builder.config import Config
from builder.models.building import Pipeline
from builder.models.checkpoint import Checkpoint
from builder.models.families import with_parts
from builder.sampling.sampler import Sampler
from builder.shards.dataset import LOCK, Dataset
from builder.shards.lock import held_file
from builder.training.adversarial import BETAS, GRAD_NORM, AdversarialObjective
from builder.training.checkpoints import Checkpoints, sweep_run
from builder.training.data import TrainingCrops, load_crops, size_quantiles
from builder.training.diffusion import Autocasting, DiffusionObjective, Prompts, precision_on
from builder.training.evaluate import Evaluation
from builder.training.identity import data_of, decoder_identity, require_same_run, unet_identity, vae_identity
from builder.training.log import Log
from builder.training.perceptual import perceptual_loss
from builder.training.preview import write_curve, write_reconstructions
from builder.training.processes import Processes
from builder.training.stage import Means, Stage, run_stage
from builder.training.start import Start, join_lineage, make_trainable, narrow_frozen, start
from builder.training.states import States
from builder.training.vae import AutoencoderObjective, encode, scaling_factor
from builder.training.views import AugmentedCrops, DrawnAhead, Views, WholeCrops

BUSY = ("another process is training into this folder", "wait for it, stop it, or choose another --to")
SHOWN = 12  # crops in the picture of reconstructions
DECODER_WARMUP = 100  # steps of the adversarial stage; of a short one a tenth


def train(
    config: Config, dataset: Dataset, out: Path, *, resume: bool = True, device: str | torch.device | None = None,
    download: bool = False,
) -> Path:  # fmt: skip
    """Train as `config.model` and `config.train` say and return the last checkpoint's folder, OUT/step-XXXXXX.

    In OUT: checkpoints (diffusers folders, or adapters, of the averaged weights, with checkpoint.json), history.json,
    state/ (resume states), log.jsonl, samples/step-XXXXXX.png, reconstructions.png, loss.png. The same command again
    continues from the last state and gives the weights of an uninterrupted run; a larger `train.steps` extends it.
    `resume=False` starts anew. Started by torchrun or accelerate launch, each process takes its share of every step's
    batch, and perhaps of the weights.
    `download`: fetch a base from the hub when it isn't here.

    Raises BuilderError for a dataset that can't be trained on or a state of another configuration, and
    stage.TrainingInterrupted after SIGINT or SIGTERM, once the state is saved.
    """
    config.classes.require_same(dataset.classes, "the config", f"dataset '{dataset.name}'")
    if resume:
        require_same_run(config, out, data_of(dataset))
    torch.set_num_threads(config.train.threads)
    processes = Processes(device)
    with held_file(out / LOCK, *BUSY) if processes.first else nullcontext():
        return _train(config, dataset, out, resume, processes, download)


def _train(
    config: Config, dataset: Dataset, out: Path, resume: bool, processes: Processes, download: bool
) -> Path:  # fmt: skip
    if processes.first:
        sweep_run(out)
        if resume is False:
            shutil.rmtree(out / "state", ignore_errors=True)
            (out / "log.jsonl").unlink(missing_ok=True)
            (out / "history.json").unlink(missing_ok=True)
        out.mkdir(parents=True, exist_ok=True)
    processes.wait()
    begin = start(config, download=download)
    log = Log(out / "log.jsonl" if processes.first else None)
    views = _train_vae_and_encode(begin, config, dataset, out, log, processes)
    final = _train_unet(begin, config, dataset, views, out, log, processes)
    log.close()
    if processes.first:
        write_curve(out / "log.jsonl", out / "loss.png")
    processes.wait()
    return final


def _train_vae_and_encode(
    begin: Start, config: Config, dataset: Dataset, out: Path, log: Log, processes: Processes
) -> Views:
    """What the denoiser is shown. Of a model from scratch the autoencoder is trained first, for views are its latents.

    It learns from whole crops, or (`train.vae.views`) from the views that were drawn ahead.
    """
    settings, pipeline = config.train, begin.pipeline
    from_scratch = begin.base is None
    augmented = AugmentedCrops(pipeline.vae, dataset, settings, processes.device) if settings.augment else None
    ahead = DrawnAhead(augmented, settings.cached_views, config.seed) if augmented and settings.cached_views else None
    drawn = ahead.crops() if ahead and from_scratch and settings.vae.views else None
    whole = load_crops(dataset, settings.size) if augmented is None or (from_scratch and drawn is None) else None
    if from_scratch and (crops := drawn or whole):
        _train_vae(pipeline, config, dataset, crops, out, log, processes)
    if ahead:
        return ahead.encode(drawn)
    if augmented:
        return augmented
    assert whole is not None
    return WholeCrops(pipeline.vae, whole, flips=settings.flips, device=processes.device)


def _train_vae(
    pipeline: Pipeline, config: Config, dataset: Dataset, crops: TrainingCrops, out: Path, log: Log,
    processes: Processes,
) -> None:  # fmt: skip
    """In every process alike; afterwards all have the first one's weights."""
    settings, device = config.train.vae, processes.device
    objective = AutoencoderObjective(pipeline.vae, crops, settings, seed=config.seed, device=device)
    stage = Stage(
        "vae", objective, steps=settings.steps, batch_size=settings.batch_size, learning_rate=settings.learning_rate,
        warmup_steps=settings.warmup_steps, weight_decay=0.0, grad_norm=1.0, ema_decay=settings.ema_decay,
    )  # fmt: skip
    states = States(out / "state", vae_identity(config, data_of(dataset)))
    states.restore(stage, device)
    processes.wait()
    run_stage(stage, states, log, every=config.train.checkpoint_every, writes=processes.first)
    stage.ema.copy_to_parameters()
    processes.share(pipeline.vae)
    pipeline.vae.eval().requires_grad_(False)
    scale = scaling_factor(*encode(pipeline.vae, crops.pixels[:: max(1, len(crops) // 1024)], device))
    pipeline.vae.register_to_config(scaling_factor=scale)
    if settings.adversarial_steps:
        train_decoder(pipeline.vae, config, decoder_identity(config, data_of(dataset)), crops, out, log, processes)
    if processes.first:
        write_reconstructions(pipeline, crops.pixels[:: -(-len(crops) // SHOWN)], out / "reconstructions.png", device)


def train_decoder(
    vae: Any, config: Config, identity: dict[str, Any], crops: TrainingCrops, out: Path, log: Log,
    processes: Processes,
) -> None:  # fmt: skip
    """The adversarial stage (`training.adversarial`) of an autoencoder, in place; its encoder stays as it is.

    identity: what a resume state must agree with. In every process alike, as the reconstruction.
    """
    settings, device = config.train.vae, processes.device
    objective = AdversarialObjective(vae, crops, settings, seed=config.seed, device=device)
    steps = settings.adversarial_steps
    stage = Stage(
        "decoder", objective, steps=steps, batch_size=settings.adversarial_batch_size,
        learning_rate=settings.adversarial_learning_rate, warmup_steps=min(DECODER_WARMUP, steps // 10),
        weight_decay=0.0, grad_norm=GRAD_NORM, ema_decay=settings.ema_decay, betas=BETAS, fused=device.type == "cuda",
    )  # fmt: skip
    states = States(out / "state", identity)
    states.restore(stage, device)
    processes.wait()
    run_stage(stage, states, log, every=config.train.checkpoint_every, writes=processes.first)
    stage.ema.copy_to_parameters()
    processes.share(objective.network)
    objective.network.eval().requires_grad_(False)


def _train_unet(
    begin: Start, config: Config, dataset: Dataset, views: Views, out: Path, log: Log, processes: Processes
) -> Path:
    settings, pipeline, device = config.train, begin.pipeline, processes.device
    prompts = {phase.code: phase.prompt for phase in config.classes}
    negative = config.sample.negative_prompt if begin.from_scratch else ""
    embedded = Prompts(pipeline, list(prompts.values()), negative, device)
    pipeline.vae.to(device)
    perceptual = perceptual_loss(settings, device)
    sizes = size_quantiles(views.native, views.labels, config.classes.codes)
    make_trainable(pipeline, config, torch.device("cpu") if processes.divided else device)
    shown = _to_show(pipeline, processes)
    # Made before the first step: prompts and sampling that cannot be are refused before hours of training.
    precision = precision_on(settings.precision, device)
    sampler = Sampler(
        with_parts(pipeline, unet=Autocasting(shown.unet, precision, device)),
        dataclasses.replace(config.sample, size=settings.size), prompts, sizes, str(device), torch.float32,
    )  # fmt: skip
    shown.unet.train()
    narrow_frozen(pipeline, config, device)
    if shown is not pipeline:
        narrow_frozen(shown, config, device)
        shown.unet.to("cpu")
    evaluation = _evaluation(config, dataset, device) if settings.evaluate_every and processes.first else None
    objective = DiffusionObjective(
        pipeline, views, embedded, settings, seed=config.seed, device=device, perceptual=perceptual
    )
    stage = Stage(
        "unet", objective, steps=settings.steps, batch_size=settings.batch_size, learning_rate=settings.learning_rate,
        warmup_steps=settings.warmup_steps, weight_decay=settings.weight_decay, grad_norm=settings.grad_norm,
        ema_decay=settings.ema_decay, ema_on_cpu=settings.ema_device == "cpu", optimizer=settings.optimizer,
        precision=precision, micro_batch=settings.micro_batch, processes=processes,
    )  # fmt: skip
    states = States(out / "state", unet_identity(config, data_of(dataset), begin.named.get("sha256")))
    states.restore(stage, device)
    description = _description(begin, config, dataset, views.patients, sizes, out)
    checkpoints = Checkpoints(
        out, config, stage, shown, sampler, evaluation, description, log, len(views.labels)
    )  # fmt: skip

    def save(step: int) -> bool:
        with stage.showing(shown.unet):
            enough = checkpoints.make(step) if processes.first else False
        processes.wait()
        return enough

    due = stage.step > 0 and (stage.step % settings.checkpoint_every == 0 or stage.step == settings.steps)
    if processes.any(due and processes.first and not checkpoints.folder(stage.step).is_dir()):
        save(stage.step)  # stopped between the last state and its checkpoint
    if due:
        stage.since = Means()
    if not processes.any(processes.first and checkpoints.exhausted):
        run_stage(stage, states, log, every=settings.checkpoint_every, on_checkpoint=save, writes=processes.first)
    return checkpoints.folder(stage.step)


def _to_show(pipeline: Pipeline, processes: Processes) -> Pipeline:
    """The pipeline that carries averaged weights at a checkpoint: itself, or one with a whole denoiser of its own where
    that of training is divided, in the process that draws and saves."""
    if not (processes.divided and processes.first):
        return pipeline
    return with_parts(pipeline, unet=copy.deepcopy(pipeline.unet))


def _evaluation(config: Config, dataset: Dataset, device: torch.device) -> Evaluation:
    from builder.quality.features import load_extractor

    return Evaluation(dataset, config, load_extractor(config.score.features, device=str(device)))


def _description(
    begin: Start, config: Config, dataset: Dataset, patients: list[str], sizes: dict[str, list[int]], out: Path
) -> Checkpoint:
    """What checkpoint.json says of every checkpoint of the run."""
    info = dataset.info
    return Checkpoint(
        out,
        family=config.model.family,
        method=config.model.method,
        base=begin.named,
        classes=config.classes,
        prompts={phase.code: phase.prompt for phase in config.classes},
        original_sizes=sizes,
        lineage=join_lineage(info.get("lineage", {}), patients, begin.lineage),
        config=config.to_json(),
        licence={
            "base": begin.base.licence.get("base", "unknown") if begin.base else "none (from scratch)",
            "data": info.get("licence", {}).get("data", ""),
        },
    )

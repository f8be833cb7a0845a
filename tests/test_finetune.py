"""Fine-tuning: families and methods, views of crops, exact resume, several processes, and the choice of the best."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from torch import nn

from builder.config import (
    Config,
    LoraConfig,
    ModelConfig,
    SampleConfig,
    ScoreConfig,
    TrainConfig,
    config_from_json,
    load_config,
)  # fmt: skip
from builder.errors import BuilderError
from builder.models.checkpoint import Checkpoint, Lineage, read_checkpoint, resolve, save_checkpoint
from builder.models.families import FAMILIES
from builder.models.history import Entry, History
from builder.models.load import load_pipeline
from builder.models.lora import add_lora
from builder.sampling.pixels import to_pixels
from builder.sampling.sampler import Request, Sampler, load_sampler
from builder.shards.dataset import Dataset, resize
from builder.shards.storage import Storage
from builder.training.data import CropSampler, load_crops, step_generator
from builder.training.diffusion import Autocasting, DiffusionObjective, Prompts
from builder.training.ema import Ema
from builder.training.evaluate import is_exhausted, proportions
from builder.training.perceptual import LAYERS, EfficientNetLoss, VggLoss, perceptual_loss
from builder.training.processes import chunks
from builder.training.run import train
from builder.training.stage import Stage, TrainingInterrupted, make_optimizer
from builder.training.start import DECLARED
from builder.training.vae import to_model
from builder.training.views import AugmentedCrops, DrawnAhead, View, WholeCrops, make_frame
from tests.conftest import textured, write_real
from tests.launched import torchrun
from tests.lineages import ALIKE
from tests.test_models import ARCHITECTURE

CPU = torch.device("cpu")
SIZE = 16
TINY = {
    "sdxl": ARCHITECTURE,
    "sd15": {
        **ARCHITECTURE,
        "unet": {key: value for key, value in ARCHITECTURE["unet"].items() if key != "addition_time_embed_dim"},
    },
}


class MeanColours(nn.Module):
    """Features that cost nothing: means and deviations of the channels over a grid."""

    input_size = 16

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        cells = nn.functional.adaptive_avg_pool2d(images, 2)
        return torch.cat([cells.flatten(1), images.std(dim=(2, 3))], dim=1)


FEATURES = "tests.test_finetune:MeanColours"


@pytest.fixture(scope="module")
def clinic(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write_real(tmp_path_factory.mktemp("data"), size=32)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small model of each family with random weights; nobody knows its lineage."""
    root = tmp_path_factory.mktemp("bases")
    for name, family in FAMILIES.items():
        save_checkpoint(family.build(TINY[name], SIZE, 0), Checkpoint(root / name, family=name))
        (root / name / "checkpoint.json").unlink()
    return {name: root / name for name in FAMILIES}


def config_of(bases: dict[str, Path], family: str = "sdxl", method: str = "full", **train_settings: Any) -> Config:
    model = ModelConfig(
        family=family, base=str(bases[family]), base_lineage="public", method=method,
        lora=LoraConfig(rank=2, alpha=4, dropout=0.2, targets=["attention", "feed-forward"]),
    )  # fmt: skip
    chosen = {
        "size": SIZE, "steps": 4, "batch_size": 4, "learning_rate": 1e-3, "warmup_steps": 1, "checkpoint_every": 2,
        **train_settings,
    }  # fmt: skip
    return Config(
        name="tiny", model=model, train=TrainConfig(**chosen), sample=SampleConfig(size=SIZE, steps=2, batch_size=4),
        score=ScoreConfig(features=FEATURES),
    )  # fmt: skip


def unet_weights(folder: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = load_pipeline(folder).unet.state_dict()
    return state


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


# -- families and methods ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_train_checkpoint_sample(
    bases: dict[str, Path], clinic: Dataset, tmp_path: Path, family: str, method: str
) -> None:
    config = config_of(bases, family, method, precision="bf16", gradient_checkpointing=True)
    found = read_checkpoint(train(config, clinic, tmp_path))
    assert (found.family, found.method, found.step, found.epoch) == (family, method, 4, 4 * 4 // 24)
    assert found.base["reference"] == str(bases[family])
    assert found.base["lineage"] == DECLARED
    assert found.lineage == Lineage(True, "test", load_crops(clinic, SIZE).patients, **ALIKE)
    before, after = unet_weights(bases[family]), unet_weights(found.path)
    changed = {key.rpartition(".")[0] for key in before if not torch.equal(before[key], after[key])}
    if method == "lora":
        assert changed and all(".attn" in key or ".ff." in key for key in changed)
        assert not (found.path / "unet").exists()  # the adapter alone
    else:
        assert len(changed) > 20
    sampler = load_sampler(found, config)
    pixels = sampler.generate([Request("I", 0, 1), Request("R", 2, 1)]).pixels
    assert pixels.shape == (2, SIZE, SIZE, 3)


def test_only_the_adapter_is_kept_in_a_state_and_trained_in_float32(
    bases: dict[str, Path], clinic: Dataset, tmp_path: Path
) -> None:
    train(config_of(bases, method="lora", precision="bf16", steps=2), clinic, tmp_path)
    state = torch.load(next((tmp_path / "state").glob("unet-00000002-*.pt")), weights_only=True)
    assert state["network"] and all(".lora_" in name for name in state["network"])
    assert {weight.dtype for weight in (*state["network"].values(), *state["ema"].values())} == {torch.float32}


def test_the_denoiser_is_asked_in_the_familys_way(bases: dict[str, Path], clinic: Dataset) -> None:
    for family in FAMILIES:
        objective = diffusion(bases, clinic, family)
        seen: dict[str, Any] = {}

        class Answer(nn.Module):
            def forward(self, noisy: torch.Tensor, time: torch.Tensor, **given: Any) -> Any:
                seen.update(given)  # noqa: B023
                return type("Output", (), {"sample": torch.zeros_like(noisy)})

        objective.network = Answer()
        objective.losses(0, range(4))
        assert set(seen["added_cond_kwargs"]) == ({"text_embeds", "time_ids"} if family == "sdxl" else set())
        pipeline = load_pipeline(bases[family])
        empty, _ = FAMILIES[family].unconditional(pipeline)
        assert torch.equal(objective.prompts.hidden[-1], empty)
        assert len(objective.prompts.hidden) == 4  # a base keeps the meaning that it knows of the negative prompt


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"family": "sd15"}, "of the family sdxl"),
        ({"base": "", "method": "lora", "architecture": ARCHITECTURE}, "a LoRA adapts a base"),
        ({"lora": LoraConfig(targets=["nothing"]), "method": "lora"}, "nothing"),
        ({"base": "nobody/nothing"}, "--download"),
    ],
)
def test_impossible_models(
    bases: dict[str, Path], clinic: Dataset, tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    config = config_of(bases)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, **change))
    with pytest.raises(BuilderError) as raised:
        train(config, clinic, tmp_path)
    assert said in f"{raised.value.what} {raised.value.remedy}"


def test_a_declared_lineage_cannot_contradict_the_base(bases: dict[str, Path], clinic: Dataset, tmp_path: Path) -> None:
    out = train(config_of(bases, steps=1), clinic, tmp_path / "first")
    config = config_of(bases, steps=1)
    model = dataclasses.replace(config.model, base=str(out))
    with pytest.raises(BuilderError, match="names 12"):
        train(dataclasses.replace(config, model=model), clinic, tmp_path / "second")
    undeclared = dataclasses.replace(config, model=dataclasses.replace(config.model, base_lineage=""))
    assert not read_checkpoint(train(undeclared, clinic, tmp_path / "third")).lineage.known


@pytest.mark.parametrize(
    "override",
    [
        "model.method=dora", "model.base_lineage=mine", "model.lora.rank=0", "train.margin=[0.2, 0.1]",
        "train.scale=[1]", "train.optimizer=sgd", "train.precision=int8", "train.evaluate_every=1500",
        "model.lora.ranks=3",
    ],
)  # fmt: skip
def test_settings_that_cannot_be_are_refused(override: str) -> None:
    with pytest.raises(BuilderError):
        load_config(None, [override])


# -- views --------------------------------------------------------------------------------


def boxed(tmp_path: Path, **train_settings: Any) -> tuple[AugmentedCrops, Dataset]:
    """Crops of 64 px with a box of 48 px: a margin of 1/6 is kept. The photographs were 3 times as fine."""
    dataset = write_real(tmp_path, size=64)
    config = TrainConfig(size=SIZE, **train_settings)
    return AugmentedCrops(FAMILIES["sdxl"].build(ARCHITECTURE, SIZE, 0).vae, dataset, config, CPU), dataset


def drawn(views: AugmentedCrops, step: int, count: int = 400) -> list[View]:
    return views.draw(torch.arange(count) % len(views.frames), step_generator(0, "unet", step))


def test_margins_and_scales_stay_within_their_bounds(tmp_path: Path) -> None:
    views, _ = boxed(tmp_path, scale=[1.0, 1.0])
    frame = views.frames[0]
    assert frame.pixels.shape[:2] == (63, 63)  # 48 px and a margin of 15 %, rounded up
    sides = np.array([view.side for view in drawn(views, 0)])
    assert sides.min() >= 48 * 1.10 and sides.max() <= np.ceil(48 * 1.30)
    assert len(set(sides.tolist())) >= 9  # drawn anew: every whole number of px between
    scaled, _ = boxed(tmp_path / "scaled")
    for view in drawn(scaled, 0):
        frame = scaled.frames[view.crop]
        xmin, ymin, xmax, ymax = frame.box
        assert view.left <= xmin and view.top <= ymin  # the whole box is there
        assert view.left + view.side >= xmax and view.top + view.side >= ymax
        assert view.left + view.side <= frame.pixels.shape[1] and view.top + view.side <= frame.pixels.shape[0]
    sides = np.array([view.side for view in drawn(scaled, 0)])
    assert sides.min() < 48 * 1.10 < 48 * 1.25 < sides.max()


def test_time_ids_say_what_was_cut(tmp_path: Path) -> None:
    """The view that the conditioning describes, cut from the stored crop, is the image that is shown."""
    views, _ = boxed(tmp_path, colour_jitter=0.0)
    views.frames = [dataclasses.replace(frame, scale=3.0) for frame in views.frames]
    chosen = drawn(views, 3, 40)
    sizes, offsets = views.framing(chosen)
    for view, size, offset, image in zip(chosen, sizes, offsets, views.pixels(chosen), strict=True):
        frame = views.frames[view.crop].pixels
        shown = frame[:, ::-1] if view.flip else frame
        (height, width), (top, left) = (np.array(pair) // 3 for pair in (size, offset))
        expected = resize(np.ascontiguousarray(shown[top : top + height, left : left + width]), SIZE)
        flipped = np.abs(image.permute(1, 2, 0).numpy().astype(int) - expected).max()
        assert flipped <= 1  # a mirrored resize rounds the other way
    assert {view.flip for view in chosen} == {True, False}
    assert any(offset != (0, 0) for offset in offsets)
    assert views.native.tolist()[0] == [63, 63]


def test_frames_follow_the_photographs_scale() -> None:
    row = {"box": [8.0, 8.0, 24.0, 24.0], "original_size": [96, 96], "width": 32, "height": 32}
    frame = make_frame(row, textured(0, 32), 0.15)
    assert frame.pixels.shape == (21, 21, 3) and frame.scale == 3.0
    whole = make_frame({**row, "box": None}, textured(0, 32), 0.15)
    assert whole.pixels.shape == (32, 32, 3) and whole.box == (0, 0, 32, 32)


def test_views_depend_on_the_step_alone_and_differ_between_steps(tmp_path: Path) -> None:
    views, _ = boxed(tmp_path)
    assert drawn(views, 5) == drawn(views, 5)
    assert drawn(views, 5) != drawn(views, 6)
    first = views.pixels(drawn(views, 5, 8))
    assert torch.equal(first, views.pixels(drawn(views, 5, 8)))


def test_nothing_is_rotated_and_colours_stay(tmp_path: Path) -> None:
    """A gradient from left to right is one in each view, perhaps mirrored, never from top to bottom."""
    views, _ = boxed(tmp_path)
    ramp = np.broadcast_to(np.linspace(60, 180, 63).astype(np.uint8)[None, :, None], (63, 63, 3)).copy()
    views.frames = [dataclasses.replace(frame, pixels=ramp) for frame in views.frames]
    chosen = drawn(views, 0, 100)
    images = views.pixels(chosen).float()
    rising = images.mean(2)[:, 0].diff(dim=-1).sum(-1)
    assert (images.mean(3).std(dim=2) < 1).all()
    assert all((slope < 0) == view.flip for slope, view in zip(rising, chosen, strict=True))
    factors = np.array([(view.brightness, view.contrast) for view in chosen])
    assert 0.98 <= factors.min() < 0.985 and 1.015 < factors.max() <= 1.02
    still, _ = boxed(tmp_path / "still", flips=False, colour_jitter=0.0)
    assert not any(view.flip or view.brightness != 1 or view.contrast != 1 for view in drawn(still, 0))


def test_views_drawn_ahead_keep_their_latents_and_framing_together(tmp_path: Path) -> None:
    """What is cached for a view is what the autoencoder makes of that very view; and it is drawn as often as others."""
    views, _ = boxed(tmp_path)
    ahead = DrawnAhead(views, 3, seed=0).encode()
    chosen = [
        view
        for step in range(20)
        for view in ahead.draw(torch.arange(len(views.frames)), step_generator(0, "unet", step))
    ]
    of_first = {view for view in chosen if view.crop == 0}
    assert len(of_first) == 3  # of each crop three views, all of which are met
    assert len({view.side for view in of_first} | {(view.left, view.top) for view in of_first}) > 1
    few = chosen[:12]
    for cached, fresh in zip(ahead.latents(few), views.latents(few), strict=True):
        assert torch.allclose(cached, fresh, atol=1e-5)
    assert ahead.framing(few) == views.framing(few) and torch.equal(ahead.pixels(few), views.pixels(few))
    again = DrawnAhead(views, 3, seed=0).encode()
    assert again.drawn == ahead.drawn and DrawnAhead(views, 3, seed=1).drawn != ahead.drawn


def test_balanced_classes_by_chi_square(tmp_path: Path) -> None:
    labels = torch.repeat_interleave(torch.arange(3), torch.tensor([29, 60, 11]))
    counts = torch.bincount(labels[CropSampler(labels, balanced=True, seed=0).batch(0, 3000)], minlength=3)
    assert chisquare(counts.numpy()).pvalue > 0.99
    natural = torch.bincount(labels[CropSampler(labels, balanced=False, seed=0).batch(0, 3000)], minlength=3)
    assert chisquare(natural.numpy()).pvalue < 1e-6
    assert chisquare(natural.numpy(), 3000 * np.array([0.29, 0.60, 0.11])).pvalue > 0.99


# -- the objective ----------------------------------------------------------------------------------------------------


def diffusion(
    bases: dict[str, Path], clinic: Dataset, family: str = "sdxl", perceptual: Any = None, **train_settings: Any
) -> DiffusionObjective:
    config = config_of(bases, family, **train_settings)
    pipeline = load_pipeline(bases[family])
    pipeline.unet.requires_grad_(True)
    prompts = Prompts(pipeline, [phase.prompt for phase in config.classes], "", CPU)
    views = WholeCrops(pipeline.vae, load_crops(clinic, SIZE), flips=True, device=CPU)
    return DiffusionObjective(pipeline, views, prompts, config.train, seed=0, device=CPU, perceptual=perceptual)


def test_parts_of_a_batch_make_the_whole(bases: dict[str, Path], clinic: Dataset) -> None:
    objective = diffusion(bases, clinic, batch_size=6)
    whole = objective.losses(3, range(6))["loss"].item()
    parts = [objective.losses(3, part)["loss"].item() * len(part) / 6 for part in (range(0, 1), range(1, 6))]
    assert sum(parts) == pytest.approx(whole, rel=1e-6)


def test_noise_offset_shifts_whole_channels(bases: dict[str, Path], clinic: Dataset) -> None:
    plain = diffusion(bases, clinic, batch_size=200)._drawn(0).noise
    shifted = diffusion(bases, clinic, batch_size=200, noise_offset=0.5)._drawn(0).noise
    shift = shifted - plain
    assert torch.allclose(shift, shift.mean(dim=(2, 3), keepdim=True).expand_as(shift), atol=1e-5)
    assert float(shift.std()) == pytest.approx(0.5, rel=0.1)


def vgg_file(folder: Path) -> str:
    from safetensors.torch import save_file

    random = torch.Generator().manual_seed(0)
    weights = {f"features.{n}.weight": 0.05 * torch.randn(shape, generator=random) for n, shape in LAYERS.items()}
    weights |= {f"features.{n}.bias": torch.zeros(shape[0]) for n, shape in LAYERS.items()}
    save_file(weights, folder / "vgg.safetensors")
    return str(folder / "vgg.safetensors")


def test_perceptual_loss(bases: dict[str, Path], clinic: Dataset, tmp_path: Path) -> None:
    loss = VggLoss(vgg_file(tmp_path), CPU)
    true = to_model(load_crops(clinic, SIZE).pixels[:3])
    assert torch.equal(loss(true, true), torch.zeros(3))
    assert (loss(true.roll(1, 0), true) > 0).all()
    objective = diffusion(bases, clinic, perceptual=loss, perceptual_weight=0.5)
    losses = objective.losses(0, range(4))
    without = diffusion(bases, clinic).losses(0, range(4))["loss"]
    assert losses["loss"].item() == pytest.approx(without.item() + 0.5 * losses["perceptual"].item(), rel=1e-5)
    losses["loss"].backward()
    assert all(torch.isfinite(p.grad).all() for p in objective.network.parameters() if p.grad is not None)


def test_the_perceptual_loss_of_an_installed_network(clinic: Dataset) -> None:
    assert perceptual_loss(TrainConfig(perceptual_network="efficientnet-lite0"), CPU) is None  # off
    loss = perceptual_loss(TrainConfig(perceptual_weight=0.1, perceptual_network="efficientnet-lite0"), CPU)
    assert isinstance(loss, EfficientNetLoss)
    true = to_model(load_crops(clinic, 32).pixels[:3])
    assert torch.equal(loss(true, true), torch.zeros(3))
    near, far = (true + step * torch.randn(true.shape, generator=step_generator(0)) for step in (0.05, 0.5))
    near.requires_grad_(True)
    assert (loss(near, true) < loss(far, true)).all()
    loss(near, true).sum().backward()
    assert near.grad is not None and near.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"perceptual_weight": 0.01}, "no VGG weights"),
        ({"perceptual_weight": 0.01, "perceptual_file": __file__}, "cannot be read as VGG"),
        ({"optimizer": "adamw8bit"}, "bitsandbytes"),
        ({"batch_size": 3, "micro_batch": 2, "evaluate_every": 2, "monitor": "val_fid"}, "val_fid"),
    ],
)
def test_what_is_missing_is_said_before_training(
    bases: dict[str, Path], clinic: Dataset, tmp_path: Path, change: dict[str, Any], said: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(BuilderError, match=said):
        train(config_of(bases, **change), clinic, tmp_path)
    assert not (tmp_path / "state").exists()


def test_optional_packages_are_used_where_they_are(
    bases: dict[str, Path], clinic: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bitsandbytes' optimizer and TensorBoard's writer, stood in for by what they are called with."""
    shown: list[tuple[str, int]] = []

    class Writer:
        def __init__(self, folder: str) -> None:
            assert Path(folder) == tmp_path / "tensorboard"

        def add_scalar(self, name: str, value: float, step: int) -> None:
            assert np.isfinite(value)
            shown.append((name, step))

        def flush(self) -> None: ...

        def close(self) -> None: ...

    monkeypatch.setitem(sys.modules, "bitsandbytes", types.ModuleType("bitsandbytes"))
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", types.SimpleNamespace(AdamW8bit=torch.optim.AdamW))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=Writer))
    train(config_of(bases, optimizer="adamw8bit", evaluate_every=2, evaluate_images=2), clinic, tmp_path)
    assert ("unet/loss", 4) in shown and ("unet/rate", 4) in shown
    assert ("evaluation/kd[tests.test_finetune.MeanColours]", 2) in shown


def test_moments_in_eight_bits_resume_exactly(tmp_path: Path) -> None:
    """With bitsandbytes itself, where it is installed: its states pass through a file that runs no code."""
    pytest.importorskip("bitsandbytes", reason="an extra: pip install bitsandbytes")

    def trained(weight: torch.Tensor, steps: int, state: dict[str, Any] | None = None) -> tuple[torch.Tensor, Any]:
        parameter = nn.Parameter(weight.clone())  # large enough for moments of 8 bits
        optimizer = make_optimizer("adamw8bit", [parameter], 1e-2, 0.0)
        if state:
            optimizer.load_state_dict(state)
        for _ in range(steps):
            parameter.square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return parameter.detach(), optimizer.state_dict()

    start = torch.randn(128, 128, generator=step_generator(0))
    half, state = trained(start, 4)
    torch.save(state, tmp_path / "state.pt")
    resumed, _ = trained(half, 4, torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(resumed, trained(start, 8)[0])


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_mixed_precision_trains(bases: dict[str, Path], clinic: Dataset, tmp_path: Path, precision: str) -> None:
    out = train(config_of(bases, precision=precision, steps=3, ema_device="cpu"), clinic, tmp_path)
    assert all(torch.isfinite(weight).all() for weight in unet_weights(out).values())
    state = torch.load(next((tmp_path / "state").glob("unet-00000003-*.pt")), weights_only=True)
    assert {weight.dtype for weight in state["network"].values()} == {torch.float32}
    assert bool(state["scaler"]) == (precision == "fp16")


# -- overfit ----------------------------------------------------------------------------------------------------------


@pytest.mark.no_cover
def test_eight_crops_are_learned(tmp_path: Path) -> None:
    """The loss falls, and samples come to lie near the crops they were learned from."""
    steps, dataset = 180, write_real(tmp_path, per_phase=4, size=32)
    unet = {**ARCHITECTURE["unet"], "block_out_channels": [32, 64], "norm_num_groups": 8}
    pipeline = FAMILIES["sdxl"].build({**ARCHITECTURE, "unet": unet}, SIZE, 0)
    with torch.no_grad():  # an untrained encoder is otherwise unsure of everything
        pipeline.vae.quant_conv.bias[4:] = -8.0
    config = TrainConfig(size=SIZE, batch_size=16, flips=False, prompt_dropout=0.0)
    crops = load_crops(dataset, SIZE)
    crops = dataclasses.replace(crops, pixels=crops.pixels[:8], labels=crops.labels[:8], native=crops.native[:8])
    views = WholeCrops(pipeline.vae, crops, flips=False, device=CPU)
    pipeline.vae.register_to_config(scaling_factor=float(1 / views.mean.std()))
    prompts = {phase.code: phase.prompt for phase in dataset.classes}
    embedded = Prompts(pipeline, list(prompts.values()), "", CPU)
    objective = DiffusionObjective(pipeline, views, embedded, config, seed=0, device=CPU)
    stage = Stage(
        "unet", objective, steps=steps, batch_size=16, learning_rate=4e-3, warmup_steps=10, weight_decay=0.0,
        grad_norm=1.0, ema_decay=0.95,
    )  # fmt: skip

    with torch.no_grad():  # the crops as the autoencoder draws them
        known = torch.from_numpy(to_pixels(pipeline.vae.decode(views.mean).sample).astype(np.float32)).flatten(1)

    def distance() -> float:
        """Mean, over samples, of the distance in px values to the nearest crop."""
        pipeline.unet.eval()
        sampling = SampleConfig(size=SIZE, steps=10, guidance=1.0, batch_size=16)
        sampler = Sampler(pipeline, sampling, prompts, {"I": [32], "P": [32]}, "cpu", torch.float32)
        requests = [Request("IPR"[label], label, seed) for seed in range(8) for label in (0, 1)]
        made = torch.from_numpy(sampler.generate(requests).pixels.astype(np.float32)).flatten(1)
        pipeline.unet.train()
        return float(torch.cdist(made, known).min(dim=1).values.mean())

    def loss() -> float:
        with torch.no_grad():
            found = [objective.losses(10_000 + step, range(8))["loss"].item() for step in range(10)]
        return float(np.mean(found))

    before = loss(), distance()
    for _ in range(steps):
        stage.train_step()
    stage.ema.copy_to_parameters()
    after = loss(), distance()
    assert after[0] < 0.5 * before[0], (before, after)
    between = torch.cdist(known, known)[~torch.eye(8, dtype=torch.bool)].min()
    assert after[1] < 0.75 * before[1], (before, after)
    assert after[1] < 0.9 * between, (after, between)  # nearer to a crop than any two crops are to each other


# -- exactness --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["full", "lora"])
def test_interrupted_and_resumed_equals_uninterrupted(
    bases: dict[str, Path], clinic: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """With augmentation, adapters' dropout, accumulation and evaluation: losses and weights are equal bit for bit."""
    config = config_of(
        bases, method=method, steps=6, checkpoint_every=3, micro_batch=3, evaluate_every=3, evaluate_images=2,
        keep_checkpoints=9,
    )  # fmt: skip
    at = int(np.random.default_rng().integers(1, 6))
    step, logged = Stage.train_step, {"straight": {}, "resumed": {}}
    name = "straight"

    def recorded(self: Stage) -> dict[str, float]:
        number = self.step
        if name == "resumed" and number == at and not stopped:
            stopped.append(True)
            os.kill(os.getpid(), signal.SIGTERM)
        losses = step(self)
        logged[name][number] = losses
        return losses

    stopped: list[bool] = []
    monkeypatch.setattr(Stage, "train_step", recorded)
    straight = train(config, clinic, tmp_path / "straight")
    name = "resumed"
    if at < 5:
        with pytest.raises(TrainingInterrupted):
            train(config, clinic, tmp_path / "resumed")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(99)  # another process: nothing may hang on the state of its generators
        resumed = train(config, clinic, tmp_path / "resumed")
    assert logged["straight"] == logged["resumed"], at
    assert equal(unet_weights(straight), unet_weights(resumed)), at
    for folder in ("step-000003", "step-000006"):
        metrics = [read_checkpoint(tmp_path / run / folder).metrics for run in ("straight", "resumed")]
        assert metrics[0] == metrics[1] and metrics[0]["train_loss"] > 0


def test_accumulation_gives_the_gradients_of_the_whole_batch(
    bases: dict[str, Path], clinic: Dataset, tmp_path: Path
) -> None:
    whole = train(config_of(bases, steps=3, batch_size=7), clinic, tmp_path / "whole")
    parts = train(config_of(bases, steps=3, batch_size=7, micro_batch=3), clinic, tmp_path / "parts")
    first, second = unet_weights(whole), unet_weights(parts)
    assert max(float((first[key] - second[key]).abs().max()) for key in first) < 2e-3  # float16; steps of 1e-3


@settings(max_examples=200, deadline=None)
@given(batch=st.integers(1, 130), micro=st.integers(0, 12), count=st.integers(1, 9))
def test_processes_share_a_batch(batch: int, micro: int, count: int) -> None:
    try:
        shares = [chunks(batch, micro, rank, count) for rank in range(count)]
    except BuilderError:
        assert batch < count * max(1, -(-batch // (count * micro)) if micro else 1)
        return
    parts = [part for share in shares for part in share]
    assert [image for part in parts for image in part] == list(range(batch))
    assert len({len(share) for share in shares}) == 1
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert min(map(len, parts)) >= 1 and (not micro or max(map(len, parts)) <= micro)


def losses_of(config: Config, dataset: Dataset, out: Path) -> list[dict[str, float]]:
    """What each step of a training said."""
    step, losses = Stage.train_step, []

    def recorded(self: Stage) -> dict[str, float]:
        losses.append(step(self))
        return losses[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stage, "train_step", recorded)
        train(config, dataset, out, device="cpu")
    return losses


def both_methods(root: str, out: Path) -> None:
    """In each of the processes: what the steps of each method's training said, into a file of its own."""
    for method in ("full", "lora"):
        config = config_from_json(json.loads((out / f"{method}.json").read_text()))
        losses = losses_of(config, Dataset("clinic", Storage(root)), out / f"two-{method}")
        (out / f"{method}-{os.environ['RANK']}.json").write_text(json.dumps(losses))


def test_two_processes_are_one_with_twice_the_accumulation(
    bases: dict[str, Path], clinic: Dataset, tmp_path: Path
) -> None:
    """Losses and gradient norms agree to 1e-5 of their value: sums are rounded in another order."""
    methods = ("full", "lora")
    configs = {
        method: config_of(bases, method=method, steps=4, batch_size=8, micro_batch=4, checkpoint_every=4)
        for method in methods
    }
    for method, config in configs.items():
        (tmp_path / f"{method}.json").write_text(json.dumps(config.to_json()))
    torchrun(both_methods, clinic.storage.root, tmp_path)
    for method, config in configs.items():
        one = losses_of(config, clinic, tmp_path / f"one-{method}")
        two, other = (json.loads((tmp_path / f"{method}-{rank}.json").read_text()) for rank in (0, 1))
        assert two == other  # both processes know the losses of all
        assert one[0]["loss"] != one[1]["loss"]
        for first, second in zip(one, two, strict=True):
            assert first == pytest.approx(second, rel=1e-5)
        weights = [unet_weights(tmp_path / f"{name}-{method}" / "step-000004") for name in ("one", "two")]
        assert max(float((weights[0][key] - weights[1][key]).abs().max()) for key in weights[0]) < 2e-3


# -- choosing the best ------------------------------------------------------------------------------------------------


def test_the_best_is_measured_kept_and_found(bases: dict[str, Path], clinic: Dataset, tmp_path: Path) -> None:
    config = config_of(
        bases, steps=6, checkpoint_every=1, evaluate_every=2, evaluate_images=3, keep_checkpoints=1, learning_rate=0.02
    )
    out = tmp_path / "run"
    train(config, clinic, out)
    history = History.read(out)
    json.loads((out / "history.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert [entry.step for entry in history.entries] == [1, 2, 3, 4, 5, 6]
    scored = [entry for entry in history.entries if entry.metrics]
    assert [entry.step for entry in scored] == [2, 4, 6]
    metrics = scored[-1].metrics
    monitor = history.monitor
    assert monitor == "kd[tests.test_finetune.MeanColours]" and history.mode == "min"
    for name in (monitor, f"{monitor}_I", f"{monitor}_floor", f"{monitor}_R_floor"):
        assert isinstance(metrics[name], float)
    assert metrics["n_I"] == 3 and metrics["n"] == 9
    assert metrics[f"{monitor}_floor"] == scored[0].metrics[f"{monitor}_floor"]
    best = min(scored, key=lambda entry: entry.metrics[monitor])
    assert resolve(f"{out}:best").step == best.step
    assert resolve(f"{out}:latest").step == 6
    assert {path.name for path in out.glob("step-*")} == {best.path, "step-000006"}
    assert read_checkpoint(out / "step-000006").metrics == metrics


def test_patience_ends_training(bases: dict[str, Path], clinic: Dataset, tmp_path: Path) -> None:
    config = config_of(
        bases, steps=50, checkpoint_every=1, evaluate_every=1, evaluate_images=3, learning_rate=0.0, patience=2,
        ema_decay=0.0, batch_size=3,
    )  # fmt: skip
    final = train(config, clinic, tmp_path)
    assert final.name == "step-000003"  # nothing is learned, so nothing is better than the first
    assert train(config, clinic, tmp_path) == final
    assert History.read(tmp_path).best().step == 1


def test_exhausted_counts_evaluations() -> None:
    scores = {1: 5.0, 2: None, 3: 4.0, 4: 4.5, 5: 6.0}
    entries = tuple(Entry(step, 0, "", {} if score is None else {"kd": score}) for step, score in scores.items())
    history = History(entries, "kd")
    assert is_exhausted(history, 2)
    assert not is_exhausted(history, 3)
    assert not is_exhausted(history, 0)
    assert not is_exhausted(History((), "kd"), 1)


def test_pooled_images_stand_as_in_the_validation_split() -> None:
    assert proportions({"I": 29, "P": 60, "R": 11}, {"I": 50, "P": 50, "R": 50}) == {"I": 24, "P": 50, "R": 9}
    assert proportions({"I": 100, "P": 1}, {"I": 10, "P": 10}) == {"I": 10, "P": 1}


def test_a_split_without_validation_cannot_choose(bases: dict[str, Path], tmp_path: Path) -> None:
    dataset = write_real(tmp_path, per_phase=4, size=24)  # four patients: all train
    with pytest.raises(BuilderError, match="'val'"):
        train(config_of(bases, evaluate_every=2), dataset, tmp_path / "run")


def test_samples_while_training_compute_in_its_precision(bases: dict[str, Path]) -> None:
    unet = load_pipeline(bases["sdxl"]).unet
    seen = []
    unet.conv_in.register_forward_hook(lambda module, given, output: seen.append(output.dtype))
    given = {"text_embeds": torch.zeros(1, 16), "time_ids": torch.zeros(1, 6)}
    for precision in ("bf16", "fp32"):
        Autocasting(unet, precision, CPU)(
            torch.zeros(1, 4, 8, 8), torch.tensor(1), encoder_hidden_states=torch.zeros(1, 77, 32),
            added_cond_kwargs=given,
        )  # fmt: skip
    assert seen == [torch.bfloat16, torch.float32]


def test_an_adapters_average_follows_its_formula(bases: dict[str, Path]) -> None:
    parameters = add_lora(load_pipeline(bases["sdxl"]).unet, 2, 4)
    ema = Ema(parameters, 0.9)
    start = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(1.0)
    ema.update(0)  # decay (1 + 0) / (10 + 0)
    for average, before in zip(ema.average, start, strict=True):
        assert torch.allclose(average, before + 0.9, atol=1e-6)

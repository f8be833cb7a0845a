"""Training on packed crops: data order, objectives, exact resume, checkpoints."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from builder.config import Config, ModelConfig, SampleConfig, TrainConfig, VaeTrainConfig
from builder.demo.phantom_dataset import KEY
from builder.errors import BuilderError
from builder.identity import PatientKey
from builder.models.checkpoint import Lineage, read_checkpoint, resolve
from builder.models.load import load_pipeline
from builder.models.sdxl import build
from builder.shards.dataset import Dataset
from builder.shards.lineage import INVENTED
from builder.shards.writer import manifest_path, write_manifest
from builder.training import checkpoints as checkpoints_module
from builder.training import stage as stage_module
from builder.training.data import CropSampler, load_crops, size_quantiles, step_generator
from builder.training.diffusion import DiffusionObjective, Prompts, snr_weights
from builder.training.ema import Ema, ema_decay
from builder.training.run import train
from builder.training.stage import Stage, TrainingInterrupted
from builder.training.start import join_lineage
from builder.training.vae import (
    AutoencoderObjective,
    PrincipalComponents,
    encode,
    gradient_difference,
    scaling_factor,
    to_model,
)
from builder.training.views import View, WholeCrops
from tests.conftest import write_real
from tests.lineages import ALIKE
from tests.test_models import ARCHITECTURE

CPU = torch.device("cpu")
CONFIG = Config(
    name="tiny",
    model=ModelConfig(architecture=ARCHITECTURE),
    train=TrainConfig(
        size=16, steps=6, batch_size=4, augment=False, learning_rate=1e-3, warmup_steps=2, grad_norm=1.0,
        min_snr_gamma=5.0, checkpoint_every=3,
        vae=VaeTrainConfig(steps=4, batch_size=4, learning_rate=1e-3, warmup_steps=1),
    ),
    sample=SampleConfig(size=16, steps=2),
)  # fmt: skip


@pytest.fixture(scope="module")
def clinic(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write_real(tmp_path_factory.mktemp("data"), size=24)


def changed(config: Config = CONFIG, **train_settings: Any) -> Config:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **train_settings))


# -- data --------------------------------------------------------------------------------


def test_only_the_training_split_is_read(clinic: Dataset) -> None:
    crops = load_crops(clinic, 16)
    rows = [row for row in clinic.table().to_pylist() if row["split"] == "train"]
    assert len(crops) == len(rows) < clinic.info["count"]
    assert crops.pixels.shape == (len(rows), 3, 16, 16)
    assert crops.pixels.dtype == torch.uint8
    assert crops.labels.tolist() == [row["label"] for row in rows]
    assert crops.native.tolist() == [[24, 24]] * len(rows)
    assert crops.patients == sorted({row["patient"] for row in rows})


def test_a_class_without_training_crops_is_named(tmp_path: Path) -> None:
    with pytest.raises(BuilderError, match="R"):
        load_crops(write_real(tmp_path, codes="IP"), 16)


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    batch=st.integers(1, 13),
    steps=st.integers(1, 12),
    balanced=st.booleans(),
)
def test_every_prefix_is_balanced(counts: list[int], batch: int, steps: int, balanced: bool) -> None:
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    sampler = CropSampler(labels, balanced=balanced, seed=3)
    drawn = torch.cat([sampler.batch(step, batch) for step in range(steps)])
    for group in (
        [torch.nonzero(labels == label).flatten() for label in labels.unique()]
        if balanced
        else [torch.arange(len(labels))]
    ):
        times = [int((drawn == crop).sum()) for crop in group]
        assert max(times) - min(times) <= 1
    if balanced:
        per_class = torch.bincount(labels[drawn], minlength=len(counts))
        assert per_class.max() - per_class.min() <= 1


def test_a_batch_depends_on_its_step_alone() -> None:
    labels = torch.tensor([0] * 7 + [1] * 30)
    through = CropSampler(labels, balanced=True, seed=0)
    batches = [through.batch(step, 8) for step in range(20)]
    assert torch.equal(CropSampler(labels, balanced=True, seed=0).batch(17, 8), batches[17])
    assert not torch.equal(CropSampler(labels, balanced=True, seed=1).batch(17, 8), batches[17])


def test_generators_of_steps_differ() -> None:
    firsts = {torch.rand(1, generator=step_generator(0, "unet", step)).item() for step in range(500)}
    assert len(firsts) > 490


def test_size_quantiles() -> None:
    sides = torch.arange(1, 101)
    native = torch.stack([sides, sides // 2], dim=1)
    found = size_quantiles(native, torch.zeros(100, dtype=torch.int64), "IP", most=4)
    assert found == {"I": [13, 38, 63, 88], "P": []}
    few = size_quantiles(native[:2], torch.zeros(2, dtype=torch.int64), "I")
    assert few == {"I": [1, 2]}


# -- averages, weights, schedule --------------------------------------------------------------------------------------


@pytest.mark.parametrize("on_cpu", [False, True])
def test_ema_follows_its_formula(on_cpu: bool) -> None:
    model = torch.nn.Linear(1, 1, bias=False)
    average = Ema(list(model.parameters()), decay=0.5, on_cpu=on_cpu)
    expected = model.weight.item()
    for step in range(12):
        with torch.no_grad():
            model.weight.add_(1.0)
        average.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * model.weight.item()
    assert average.average[0].item() == pytest.approx(expected, rel=1e-6)
    assert ema_decay(10**6, 0.999) == 0.999
    before = model.weight.clone()
    with average.swapped_in():
        assert torch.equal(model.weight, average.average[0])
        assert not torch.equal(model.weight, before)
    assert torch.equal(model.weight, before)


def test_min_snr_weights() -> None:
    alpha_bar = torch.tensor([0.99, 0.9, 0.5, 0.01])
    snr = alpha_bar / (1 - alpha_bar)  # 99, 9, 1, 0.0101
    assert torch.allclose(snr_weights(alpha_bar, "epsilon", 5.0), torch.tensor([5 / 99, 5 / 9, 1.0, 1.0]), rtol=1e-4)
    expected = torch.tensor([5 / 100, 5 / 10, 1 / 2, snr[3].item() / (snr[3].item() + 1)])
    assert torch.allclose(snr_weights(alpha_bar, "v_prediction", 5.0), expected, rtol=1e-4)
    assert torch.equal(snr_weights(alpha_bar, "epsilon", 0.0), torch.ones(4))


def _stage(clinic: Dataset, config: Config = CONFIG) -> Stage:
    crops = load_crops(clinic, 16)
    pipeline = build(ARCHITECTURE, 16, 0)
    objective = AutoencoderObjective(pipeline.vae, crops, config.train.vae, seed=0, device=CPU)
    return Stage(
        "vae", objective, steps=100, batch_size=4, learning_rate=2e-3, warmup_steps=10, weight_decay=0.0,
        grad_norm=1.0, ema_decay=0.9,
    )  # fmt: skip


def test_rate_warms_up_and_falls_to_zero(clinic: Dataset) -> None:
    stage = _stage(clinic)
    rates = [stage.rate(step) for step in range(101)]
    assert rates[0] == pytest.approx(2e-4)
    assert max(rates) == pytest.approx(2e-3)
    assert rates[100] == pytest.approx(0)
    assert all(later >= earlier for earlier, later in itertools.pairwise(rates[:11]))
    assert all(later <= earlier for earlier, later in itertools.pairwise(rates[10:]))


# -- objectives --------------------------------------------------------------------------------


def test_autoencoder_learns(clinic: Dataset) -> None:
    stage = _stage(clinic)
    losses = [stage.train_step()["loss"] for _ in range(60)]
    assert np.mean(losses[-5:]) < 0.85 * losses[0]
    assert all(torch.isfinite(p).all() for p in stage.ema.average)


def test_losses_see_what_they_are_for() -> None:
    image = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    redder = image + torch.tensor([0.3, 0.0, 0.0])[:, None, None]
    assert gradient_difference(redder, image).item() == pytest.approx(0, abs=1e-6)  # as sharp
    assert gradient_difference(image.mean(dim=(2, 3), keepdim=True).expand_as(image), image) > 0.1


def test_principal_components_are_the_best_linear_code(clinic: Dataset) -> None:
    """As many components as numbers in a patch lose nothing; fewer keep the most variance; the scale is one."""
    pixels = load_crops(clinic, 16).pixels
    components = PrincipalComponents(pixels, 12, 2)
    codes = components(to_model(pixels))
    assert codes.shape == (len(pixels), 12, 8, 8)
    assert float(codes.std()) == pytest.approx(1, abs=0.1)
    spread = codes.permute(1, 0, 2, 3).flatten(1)
    assert torch.allclose(torch.corrcoef(spread), torch.eye(12), atol=0.06)
    assert bool((spread.std(1).diff() >= 0).all())  # ascending, half way to white
    few = PrincipalComponents(pixels, 4, 2)(to_model(pixels)).permute(1, 0, 2, 3).flatten(1)
    assert torch.allclose(few / few.std(1, keepdim=True), spread[-4:] / spread[-4:].std(1, keepdim=True), atol=1e-3)


def test_the_guide_fades_out(clinic: Dataset) -> None:
    config = VaeTrainConfig(steps=100, batch_size=4, guided_steps=40)
    objective = AutoencoderObjective(build(ARCHITECTURE, 16, 0).vae, load_crops(clinic, 16), config, seed=0, device=CPU)
    assert [objective.guidance(step) for step in (0, 20, 30, 40, 99)] == [1, 1, 0.5, 0, 0]
    unguided = AutoencoderObjective(
        build(ARCHITECTURE, 16, 0).vae, load_crops(clinic, 16), VaeTrainConfig(), seed=0, device=CPU
    )
    assert unguided.guidance(0) == 0


def test_scaling_factor_brings_latents_to_unit_scale(clinic: Dataset) -> None:
    vae = build(ARCHITECTURE, 16, 0).vae
    mean, std = encode(vae, load_crops(clinic, 16).pixels, CPU)
    sampled = mean + std * torch.randn(mean.shape, generator=torch.Generator().manual_seed(0))
    assert float((sampled * scaling_factor(mean, std)).std()) == pytest.approx(1, abs=0.05)


def _diffusion(clinic: Dataset, **train_settings: Any) -> DiffusionObjective:
    config = changed(**train_settings)
    crops = load_crops(clinic, 16)
    pipeline = build(ARCHITECTURE, 16, 0)
    prompts = Prompts(pipeline, [phase.prompt for phase in config.classes], "blurry", CPU)
    views = WholeCrops(pipeline.vae, crops, flips=config.train.flips, device=CPU)
    return DiffusionObjective(pipeline, views, prompts, config.train, seed=0, device=CPU)


def test_latents_hold_each_crop_and_its_mirror_image(clinic: Dataset) -> None:
    views = _diffusion(clinic).views
    assert isinstance(views, WholeCrops)
    assert len(views.mean) == 2 * len(views.crops)
    mirrored = View(3, 0, 0, 16, flip=True)
    assert torch.equal(views.pixels([mirrored])[0], views.crops.pixels[3].flip(-1))
    mean, _ = encode(build(ARCHITECTURE, 16, 0).vae, views.crops.pixels[3:4].flip(-1), CPU)
    assert torch.allclose(views.latents([mirrored])[0], mean, atol=1e-4)
    unflipped = _diffusion(clinic, flips=False).views
    assert isinstance(unflipped, WholeCrops)
    assert len(unflipped.mean) == len(views.crops)
    assert not any(view.flip for view in unflipped.draw(torch.arange(20), torch.Generator()))


def test_dropped_prompts_become_unconditional(clinic: Dataset) -> None:
    prompts = _diffusion(clinic).prompts
    labels = torch.arange(3).repeat(2000)
    rows = prompts.drop(labels, 0.2, torch.Generator().manual_seed(0))
    share = torch.bincount(rows[rows >= 3] - 3).double() / len(labels)
    assert torch.allclose(share, torch.tensor([0.1, 0.1], dtype=torch.double), atol=0.02)
    assert torch.equal(rows[rows < 3], labels[rows < 3])
    assert torch.equal(prompts.drop(labels, 0.0, torch.Generator()), labels)
    assert prompts.hidden[-1].abs().max() == 0
    assert prompts.hidden[-2].abs().max() > 0


def test_micro_conditioning_carries_the_native_size(clinic: Dataset) -> None:
    objective = _diffusion(clinic)
    added = objective._added(objective._drawn(0).part(range(1)))
    assert added["time_ids"].tolist() == [[24, 24, 0, 0, 16, 16]]


class _Answer(torch.nn.Module):
    """Predicts nothing: the loss is then the mean square of the target."""

    def forward(self, noisy: torch.Tensor, time: torch.Tensor, **_: Any) -> Any:
        self.noisy, self.time = noisy, time
        return type("Output", (), {"sample": torch.zeros_like(noisy)})


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_targets_agree_with_diffusers(clinic: Dataset, prediction: str) -> None:
    from diffusers import DDPMScheduler

    objective = _diffusion(clinic, min_snr_gamma=0.0)
    objective.prediction = prediction
    objective.network = answer = _Answer()
    loss = objective.losses(5, range(4))["loss"]

    random = step_generator(0, "unet", 5)
    crop = objective.sampler.batch(5, 4)
    views = objective.views
    assert isinstance(views, WholeCrops)
    place = crop + torch.randint(0, 2, (4,), generator=random) * len(views.crops)
    mean, std = views.mean[place], views.std[place]
    clean = (mean + std * torch.randn(mean.shape, generator=random)) * objective.scale
    noise = torch.randn(mean.shape, generator=random)
    scheduler = DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=prediction
    )
    assert torch.allclose(answer.noisy, scheduler.add_noise(clean, noise, answer.time), atol=1e-5)
    target = noise if prediction == "epsilon" else scheduler.get_velocity(clean, noise, answer.time)
    assert loss.item() == pytest.approx(target.square().mean().item(), rel=1e-4)


# -- the run --------------------------------------------------------------------------------


def weights(folder: Path) -> dict[str, torch.Tensor]:
    pipeline = load_pipeline(folder)
    parts = {"unet": pipeline.unet, "vae": pipeline.vae}
    return {f"{name}.{key}": value for name, part in parts.items() for key, value in part.state_dict().items()}


def losses(log: Path) -> dict[tuple[str, int], float]:
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    return {(line["stage"], line["step"]): line["loss"] for line in lines}


@pytest.fixture(scope="module")
def finished(clinic: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run")
    assert train(CONFIG, clinic, out) == out / "step-000006"
    return out


def test_what_a_run_leaves(finished: Path, clinic: Dataset) -> None:
    names = {path.name for path in finished.iterdir()}
    assert names >= {"step-000003", "step-000006", "state", "samples", "log.jsonl", "reconstructions.png", "loss.png"}
    assert {path.name for path in (finished / "samples").iterdir()} == {"step-000003.png", "step-000006.png"}
    states = sorted(path.name for path in (finished / "state").iterdir())
    assert [name.rpartition("-")[0] for name in states if name.endswith(".pt")] == [
        "unet-00000003", "unet-00000006", "vae-00000003", "vae-00000004",
    ]  # fmt: skip
    assert [name for name in states if not name.endswith(".pt")] == ["settings-unet.json", "settings-vae.json"]
    checkpoint = read_checkpoint(finished / "step-000006")
    assert checkpoint.classes == clinic.classes
    assert checkpoint.step == 6
    assert checkpoint.lineage.known
    assert checkpoint.lineage.key_fingerprint == "test"
    assert checkpoint.lineage.patients == load_crops(clinic, 16).patients
    assert checkpoint.prompts["I"].startswith("PHASE_I")
    assert set(checkpoint.original_sizes["R"]) == {24}
    assert checkpoint.licence == {"base": "none (from scratch)", "data": "CC0"}
    assert load_pipeline(checkpoint).vae.config.scaling_factor != 0.18215


def test_the_same_command_again_changes_nothing(finished: Path, clinic: Dataset) -> None:
    before = (finished / "step-000006/unet/diffusion_pytorch_model.safetensors").read_bytes()
    train(CONFIG, clinic, finished)
    assert (finished / "step-000006/unet/diffusion_pytorch_model.safetensors").read_bytes() == before


@pytest.mark.parametrize(("at_stage", "at_step"), [("vae", 2), ("unet", 0), ("unet", 4)])
def test_interrupted_and_resumed_equals_uninterrupted(
    finished: Path, clinic: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_stage: str, at_step: int
) -> None:
    step = Stage.train_step

    def interrupted(self: Stage) -> dict[str, float]:
        if (self.name, self.step) == (at_stage, at_step):
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self)

    monkeypatch.setattr(Stage, "train_step", interrupted)
    with pytest.raises(TrainingInterrupted, match=at_stage):
        train(CONFIG, clinic, tmp_path)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    monkeypatch.setattr(Stage, "train_step", step)
    resumed, straight = weights(train(CONFIG, clinic, tmp_path)), weights(finished / "step-000006")
    assert all(torch.equal(resumed[key], straight[key]) for key in straight)


def test_killed_between_state_and_checkpoint(
    finished: Path, clinic: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A crash that saves nothing: training goes on from the last state and ends with the same weights."""

    def crash(*_: Any) -> None:
        raise OSError("power cut")

    monkeypatch.setattr(checkpoints_module, "save_checkpoint", crash)
    with pytest.raises(OSError, match="power cut"):
        train(CONFIG, clinic, tmp_path)
    monkeypatch.undo()
    resumed, straight = weights(train(CONFIG, clinic, tmp_path)), weights(finished / "step-000006")
    assert all(torch.equal(resumed[key], straight[key]) for key in straight)


def test_extended_run_keeps_the_autoencoder(finished: Path, clinic: Dataset, tmp_path: Path) -> None:
    import shutil

    out = Path(shutil.copytree(finished, tmp_path / "run"))
    longer = weights(train(changed(steps=8), clinic, out))
    before = weights(finished / "step-000006")
    assert all(torch.equal(longer[key], before[key]) for key in before if key.startswith("vae."))
    assert any(not torch.equal(longer[key], before[key]) for key in before if key.startswith("unet."))


@pytest.mark.parametrize(
    "change", [{"batch_size": 5}, {"learning_rate": 2e-3}, {"vae": VaeTrainConfig(steps=4, kl_weight=1.0)}]
)
def test_a_state_of_another_configuration_is_refused(
    finished: Path, clinic: Dataset, tmp_path: Path, change: dict[str, Any]
) -> None:
    import shutil

    out = Path(shutil.copytree(finished, tmp_path / "run"))
    with pytest.raises(BuilderError, match="another"):
        train(changed(**change), clinic, out)


def test_the_denoiser_may_change_while_the_autoencoder_trains(
    clinic: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Stage.train_step

    def crash_in_unet(self: Stage) -> dict[str, float]:
        if self.name == "unet":
            raise OSError("power cut")
        return step(self)

    monkeypatch.setattr(Stage, "train_step", crash_in_unet)
    with pytest.raises(OSError, match="power cut"):
        train(CONFIG, clinic, tmp_path)
    monkeypatch.undo()
    (tmp_path / "log.jsonl").unlink()
    train(changed(learning_rate=2e-3, batch_size=5), clinic, tmp_path)
    assert {stage for stage, _ in losses(tmp_path / "log.jsonl")} == {"unet"}


def test_old_checkpoints_make_room(clinic: Dataset, tmp_path: Path) -> None:
    train(changed(checkpoint_every=2, keep_checkpoints=1), clinic, tmp_path)
    assert [path.name for path in tmp_path.glob("step-*")] == ["step-000006"]


def test_training_goes_on_from_a_base(finished: Path, clinic: Dataset, tmp_path: Path) -> None:
    base = finished / "step-000006"
    config = dataclasses.replace(changed(steps=2), model=ModelConfig(base=str(base)))
    tuned = train(config, clinic, tmp_path)
    before, after = weights(base), weights(tuned)
    assert all(torch.equal(after[key], before[key]) for key in before if key.startswith("vae."))
    assert any(not torch.equal(after[key], before[key]) for key in before if key.startswith("unet."))
    assert read_checkpoint(tuned).lineage.known
    (base / "checkpoint.json").rename(base / "away.json")
    try:
        assert not read_checkpoint(train(config, clinic, tmp_path / "foreign")).lineage.known
    finally:
        (base / "away.json").rename(base / "checkpoint.json")


def test_from_scratch_with_views_drawn_anew(clinic: Dataset, tmp_path: Path) -> None:
    out = train(changed(augment=True, steps=2, margin=[0.0, 0.1]), clinic, tmp_path)
    checkpoint = read_checkpoint(out)
    assert set(checkpoint.original_sizes["R"]) == {22}  # frames: boxes of 18 px, and a margin of 10 %
    assert checkpoint.base == {} and checkpoint.method == "full"


def _with_architecture(part: str, **changes: Any) -> Config:
    architecture = {**ARCHITECTURE, part: {**ARCHITECTURE.get(part, {}), **changes}}
    return dataclasses.replace(CONFIG, model=ModelConfig(architecture=architecture))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (dataclasses.replace(CONFIG, model=ModelConfig()), "architecture"),
        (dataclasses.replace(CONFIG, model=ModelConfig(base="/nowhere")), "/nowhere"),
        (changed(vae=VaeTrainConfig()), "autoencoder"),
        (_with_architecture("scheduler", prediction_type="sample"), "predicts 'sample'"),
        (_with_architecture("vae", latent_channels=16), "16 channels for patches of 2 x 2 px"),
    ],
)
def test_impossible_configurations(clinic: Dataset, tmp_path: Path, config: Config, said: str) -> None:
    with pytest.raises(BuilderError, match=said):
        train(config, clinic, tmp_path)


def test_a_size_that_the_base_cannot_make_is_refused(finished: Path, clinic: Dataset, tmp_path: Path) -> None:
    config = dataclasses.replace(changed(size=17), model=ModelConfig(base=str(finished / "step-000006")))
    with pytest.raises(BuilderError, match=r"train.size 17 is not a multiple"):
        train(config, clinic, tmp_path)


@pytest.mark.parametrize(
    ("data", "patients", "base", "known"),
    [
        ({"known": True, "key_fingerprint": "k", **ALIKE}, ["a"], None, True),
        ({"known": False, "key_fingerprint": "k"}, ["a"], None, False),
        ({"known": True, "key_fingerprint": "k", **ALIKE}, [], None, False),  # a crop without a patient
        ({"known": True, "key_fingerprint": "k", **ALIKE}, ["a"], Lineage(True, "k", ["b"], **ALIKE), True),
        (
            {"known": True, "key_fingerprint": "k", **ALIKE},
            ["a"],
            Lineage(True, None, []),
            True,
        ),  # of no patients at all
        ({"known": True, "key_fingerprint": "k", **ALIKE}, ["a"], Lineage(True, None, ["b"]), False),
        ({"known": True, "key_fingerprint": "k", **ALIKE}, ["a"], Lineage(True, "other", ["b"]), False),
        ({"known": True, "key_fingerprint": "k", **ALIKE}, ["a"], Lineage(), False),
    ],
)
def test_lineage_is_known_when_everything_is(
    data: dict[str, Any], patients: list[str], base: Lineage | None, known: bool
) -> None:
    found = join_lineage(data, patients, base)
    assert found.known is known
    assert found.key_fingerprint == "k"
    assert found.patients == sorted({*patients, *(base.patients if base else [])})


def test_rendered_patients_of_a_base_are_nobodys() -> None:
    """Fine-tuning the shipped checkpoint on a site's own crops leaves the site's lineage."""
    base = Lineage(True, INVENTED, ["rendered"])
    own = join_lineage({"known": True, "key_fingerprint": "k", **ALIKE}, ["a"], base)
    assert own == Lineage(True, "k", ["a"], **ALIKE)
    phantom = join_lineage({"known": True, "key_fingerprint": INVENTED}, ["a"], base)
    assert phantom.patients == ["a", "rendered"]  # beside other phantoms they may well be held out
    assert PatientKey(KEY, "").fingerprint == INVENTED
    assert resolve("demo").lineage.key_fingerprint == INVENTED


def test_crops_of_unknown_patients_have_no_lineage(tmp_path: Path) -> None:
    dataset = write_real(tmp_path, size=24)
    table = dataset.shard_table(0)
    rows = [{**row, "patient": None if place == 0 else row["patient"]} for place, row in enumerate(table.to_pylist())]
    write_manifest(dataset.storage, manifest_path(dataset.name, 0), pa.Table.from_pylist(rows, schema=table.schema))
    assert load_crops(dataset, 16).patients == []


def test_a_loss_that_is_not_finite_stops(clinic: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = changed(vae=dataclasses.replace(CONFIG.train.vae, steps=20))
    monkeypatch.setattr(Stage, "rate", lambda self, step: 1e30)  # more than a config may ask for
    with pytest.raises(BuilderError, match="not finite"):
        train(config, clinic, tmp_path)


def test_log_lines_are_frequent_enough_to_plot(finished: Path) -> None:
    logged = losses(finished / "log.jsonl")
    assert {stage for stage, _ in logged} == {"vae", "unet"}
    assert logged["unet", 6] > 0
    assert stage_module.LOG_EVERY <= 50

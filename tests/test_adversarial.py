"""The adversarial stage of the autoencoder, and the grain head: what they learn, how they resume, what is on disk."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

from builder.config import Config, SampleConfig, VaeTrainConfig
from builder.errors import BuilderError
from builder.models.checkpoint import Checkpoint, read_checkpoint, save_checkpoint
from builder.models.exporting import export
from builder.models.grain import SIZES, WEIGHTS, GrainHead, attach, head_of, load_grain, new_head, save_grain
from builder.models.load import load_pipeline
from builder.models.sdxl import build
from builder.sampling.grain import grain_noise, with_grain
from builder.sampling.sampler import Request, Sampler
from builder.sampling.seeds import grain_seed
from builder.shards.dataset import Dataset
from builder.training import run as run_module
from builder.training.adversarial import BETAS, GRAD_NORM, AdversarialObjective, Critics, DetailFilter
from builder.training.data import TrainingCrops
from builder.training.run import train
from builder.training.stage import Stage
from builder.training.vae import to_model
from tests.conftest import write_real
from tests.test_models import ARCHITECTURE
from tests.test_training import CONFIG

CPU = torch.device("cpu")
SETTINGS = VaeTrainConfig(
    steps=1, adversarial_steps=30, adversarial_batch_size=4, grain_channels=2, ema_decay=0.9,
    adversarial_learning_rate=4e-3, critic_learning_rate=2e-3, adversarial_weight=1.0,
)  # fmt: skip
KNOWN_GRAIN_SEEDS = [3423200465, 2316446641, 1294645301]
PROMPTS = {"I": "PHASE_I", "P": "PHASE_P"}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def noisy() -> TrainingCrops:
    """Twelve grey gradients, 16 px, with grain of a deviation of 30 levels."""
    random = torch.Generator().manual_seed(0)
    ramp = torch.linspace(60, 190, 16).expand(12, 3, 16, 16)
    pixels = (ramp + 30 * torch.randn(12, 3, 16, 16, generator=random)).clamp(0, 255).to(torch.uint8)
    return TrainingCrops(pixels, torch.arange(12) % 2, torch.full((12, 2), 16), [])


def stage_of(crops: TrainingCrops, settings: VaeTrainConfig = SETTINGS) -> Stage:
    objective = AdversarialObjective(build(ARCHITECTURE, 16, 0).vae, crops, settings, seed=0, device=CPU)
    return Stage(
        "decoder", objective, steps=settings.adversarial_steps, batch_size=settings.adversarial_batch_size,
        learning_rate=settings.adversarial_learning_rate, warmup_steps=2, weight_decay=0.0, grad_norm=GRAD_NORM,
        ema_decay=settings.ema_decay, betas=BETAS,
    )  # fmt: skip


def headed(seed: int = 5) -> Any:
    """A pipeline of which the head does something."""
    pipeline = build(ARCHITECTURE, 16, 3)
    head = new_head(2, seed)
    with torch.no_grad():
        head.last.weight.normal_(std=0.2, generator=torch.Generator().manual_seed(seed))
    attach(pipeline.vae, head)
    return pipeline


def detail_of(images: Tensor) -> float:
    """Deviation of the second difference, in units of -1..1."""
    return float((images[..., 1:-1] - (images[..., 2:] + images[..., :-2]) / 2).std())


# -- the head ----------------------------------------------------------------------------


def test_a_new_head_changes_nothing() -> None:
    picture = torch.rand(2, 3, 8, 12, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert torch.equal(GrainHead(3)(picture, torch.randn(2, 3, 8, 12)), picture)


def test_a_head_is_drawn_from_its_seed_alone() -> None:
    before = torch.get_rng_state()
    assert torch.equal(new_head(2, 7).first.weight, new_head(2, 7).first.weight)
    assert not torch.equal(new_head(2, 7).first.weight, new_head(2, 8).first.weight)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_noise_is_of_its_seed_and_not_that_of_the_latents() -> None:
    alone, beside = grain_noise([11], 2, 4, 4), grain_noise([3, 11, 4], 2, 4, 4)
    assert torch.equal(alone[0], beside[1])
    assert not torch.equal(beside[0], beside[2])
    assert not torch.equal(alone, torch.randn((1, 2, 4, 4), generator=torch.Generator().manual_seed(11)))
    # Known numbers: images that were drawn long ago are drawn again with the same grain.
    assert [grain_seed(seed) for seed in (0, 1, 2**32 - 1)] == KNOWN_GRAIN_SEEDS


def test_the_head_goes_with_its_autoencoder_and_is_none_of_its_weights() -> None:
    vae = headed().vae
    copied = copy.deepcopy(vae)
    assert head_of(copied) is not head_of(vae)
    assert torch.equal(head_of(copied).last.weight, head_of(vae).last.weight)  # type: ignore[union-attr]
    assert not any("grain" in name or "last." in name for name in vae.state_dict())
    attach(vae, None)
    picture = torch.zeros(1, 3, 16, 16)
    assert with_grain(vae, picture, [1]) is picture


# -- on disk ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("grain") / "checkpoint"
    save_checkpoint(headed(), Checkpoint(folder))
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved, tmp_path / "checkpoint")


def test_saved_and_loaded_it_is_the_same_head(saved: Path, tmp_path: Path) -> None:
    expected = {name: weight.half().float() for name, weight in head_of(headed().vae).state_dict().items()}  # type: ignore[union-attr]
    loaded = head_of(load_pipeline(saved).vae)
    assert loaded is not None and not loaded.training
    assert all(torch.equal(weight, expected[name]) for name, weight in loaded.state_dict().items())
    assert load_file(saved / "vae" / WEIGHTS)["last.weight"].dtype == torch.float16
    assert next(head_of(load_pipeline(saved, dtype=torch.float16).vae).parameters()).dtype == torch.float32  # type: ignore[union-attr]
    export(read_checkpoint(saved), tmp_path / "copy")
    assert read_checkpoint(tmp_path / "copy").sha256 == read_checkpoint(saved).sha256
    assert head_of(load_pipeline(tmp_path / "copy").vae) is not None


def test_plain_diffusers_loads_the_folder_without_it(saved: Path) -> None:
    vae, report = AutoencoderKL.from_pretrained(saved / "vae", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert vae.config.block_out_channels == list(ARCHITECTURE["vae"]["block_out_channels"])
    StableDiffusionXLPipeline.from_pretrained(saved, local_files_only=True)


def test_the_head_is_part_of_the_checkpoints_hash(folder: Path) -> None:
    before = read_checkpoint(folder).sha256
    weights = load_file(folder / "vae" / WEIGHTS)
    save_file(weights | {"last.bias": weights["last.bias"] + 1}, folder / "vae" / WEIGHTS)
    assert read_checkpoint(folder).sha256 != before


def test_without_a_head_nothing_is_written(tmp_path: Path) -> None:
    save_grain(build(ARCHITECTURE, 16, 3).vae, tmp_path)
    assert not list(tmp_path.iterdir())
    assert load_grain(tmp_path) is None


def _drop(vae: Path, name: str) -> None:
    weights = load_file(vae / WEIGHTS)
    del weights[name]
    save_file(weights, vae / WEIGHTS)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda vae: (vae / SIZES).unlink(), "no grain.json"),
        (lambda vae: (vae / WEIGHTS).unlink(), "no grain.safetensors"),
        (lambda vae: (vae / SIZES).write_text("{"), "cannot be read"),
        (lambda vae: (vae / SIZES).write_text('{"noise_channels": 2}'), "noise_channels and width"),
        (lambda vae: (vae / SIZES).write_text('{"noise_channels": 0, "width": 32}'), "noise_channels is 0"),
        (lambda vae: (vae / SIZES).write_text('{"noise_channels": 3, "width": 32}'), "another shape: first.weight"),
        (lambda vae: (vae / WEIGHTS).write_bytes(b"no tensors"), "cannot be read"),
        (lambda vae: _drop(vae, "last.bias"), "missing: last.bias"),
        (lambda vae: save_file({**load_file(vae / WEIGHTS), "more": torch.zeros(1)}, vae / WEIGHTS), "left over: more"),
    ],
)
def test_a_head_that_does_not_fit_is_an_error(folder: Path, damage: Any, said: str) -> None:
    damage(folder / "vae")
    with pytest.raises(BuilderError, match=said):
        load_grain(folder / "vae")
    with pytest.raises(BuilderError, match=r"grain\.(json|safetensors)"):  # its bytes are not those of the record
        load_pipeline(folder)


def test_a_head_that_is_not_finite_is_not_saved(tmp_path: Path) -> None:
    pipeline = headed()
    head_of(pipeline.vae).last.bias.data[0] = float("nan")  # type: ignore[union-attr]
    with pytest.raises(BuilderError, match="not finite"):
        save_checkpoint(pipeline, Checkpoint(tmp_path / "out"))
    assert not list(tmp_path.iterdir())


# -- sampling ----------------------------------------------------------------------------


def sampler(pipeline: Any) -> Sampler:
    return Sampler(pipeline, SampleConfig(size=16, steps=2, guidance=1.0), PROMPTS, {})


def test_grain_is_added_to_what_is_decoded() -> None:
    requests = [Request("I", 0, 11), Request("P", 1, 2**32 - 1)]
    drawn = sampler(headed()).generate(requests)
    plain = headed()
    head = head_of(plain.vae)
    attach(plain.vae, None)
    smooth = sampler(plain)
    assert (smooth.generate(requests).pixels != drawn.pixels).mean() > 0.5
    decoded: list[Tensor] = []
    decode = smooth._decode
    smooth._decode = lambda latents: decoded.append(decode(latents)) or decoded[-1]  # type: ignore[func-returns-value, method-assign]
    smooth.generate(requests)
    with torch.inference_mode():
        expected = head(decoded[0], grain_noise([11, 2**32 - 1], 2, 16, 16))  # type: ignore[misc]
    levels = ((expected * 0.5 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
    assert torch.equal(torch.from_numpy(drawn.pixels), levels)
    assert drawn.bad == [False, False]


def test_a_second_try_in_higher_precision_has_the_same_grain() -> None:
    drawing = sampler(headed())
    first, second = (drawing.generate([Request("I", 0, 5)], precise=precise).pixels for precise in (False, True))
    assert abs(first.astype(int) - second).max() <= 1
    assert next(head_of(drawing._vae).parameters()).dtype == torch.float32  # type: ignore[union-attr]


def test_grain_does_not_hide_an_image_of_one_colour() -> None:
    pipeline = headed()
    pipeline.vae.decoder.conv_out.weight.data.zero_()
    drawn = sampler(pipeline).generate([Request("I", 0, 5)])
    assert drawn.pixels.std() > 2
    assert drawn.bad == [True]


# -- training ----------------------------------------------------------------------------


def test_detail_is_of_unit_strength_in_the_crops(noisy: TrainingCrops) -> None:
    split = DetailFilter(noisy.pixels)
    image = to_model(noisy.pixels)
    smooth, detail = split(image)
    assert smooth.shape == detail.shape == image.shape
    assert torch.allclose(detail.square().mean(dim=(0, 2, 3)).sqrt(), torch.ones(3), atol=1e-4)
    flat_smooth, flat_detail = split(torch.full((1, 3, 16, 16), 0.25))
    assert torch.allclose(flat_smooth, torch.full_like(flat_smooth, 0.25), atol=1e-5)
    assert flat_detail.abs().max() < 1e-3


def test_critics_learn_to_tell_blurred_from_sharp(noisy: TrainingCrops) -> None:
    stage = stage_of(noisy)
    objective: Any = stage.objective
    real = to_model(noisy.pixels)
    blurred = objective.split(real)[0]
    pairs = [(image, objective.split(image)[1]) for image in (real, blurred)]
    losses = [objective._train_critics(*pairs, step=0) for _ in range(25)]
    for name in ("critic_picture", "critic_detail"):
        assert losses[0][name] == pytest.approx(2, abs=0.35)  # knows nothing
        assert losses[-1][name] < 0.75 * losses[0][name]


def test_the_adversarial_stage_brings_the_grain_back(noisy: TrainingCrops) -> None:
    stage = stage_of(noisy)
    vae = stage.objective.vae  # type: ignore[attr-defined]
    vae.decoder.conv_out.weight.data *= 0.1  # smooth: a random decoder gives noise
    real = to_model(noisy.pixels)

    @torch.no_grad()
    def made() -> Tensor:
        return with_grain(vae, vae.decode(vae.encode(real).latent_dist.mean).sample, range(len(real)))

    encoder = {name: value.clone() for name, value in vae.state_dict().items() if name.startswith(("encoder", "quant"))}
    before = detail_of(made())
    losses = [stage.train_step() for _ in range(25)]
    stage.ema.copy_to_parameters()
    assert before < 0.2 * detail_of(real)
    assert 0.4 * detail_of(real) < detail_of(made()) < 1.5 * detail_of(real)
    assert losses[-1]["energy"] < 0.9 * losses[0]["energy"]
    assert all(torch.equal(vae.state_dict()[name], value) for name, value in encoder.items())
    same = made()
    assert not torch.equal(same, with_grain(vae, vae.decode(vae.encode(real).latent_dist.mean).sample, range(1, 13)))


def test_a_stage_goes_on_bit_for_bit(noisy: TrainingCrops, tmp_path: Path) -> None:
    through, first, second = (stage_of(noisy) for _ in range(3))
    expected = [through.train_step() for _ in range(6)]
    for _ in range(3):
        first.train_step()
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert [second.train_step() for _ in range(3)] == expected[3:]
    assert _flat(second.state_dict()) == _flat(through.state_dict())
    assert "critics.picture.0.parametrizations.weight.0._u" in _flat(through.state_dict()["objective"])


def _flat(state: Any, prefix: str = "") -> dict[str, Any]:
    """The tensors of a nested state as bytes, by their path."""
    if isinstance(state, Tensor):
        return {prefix.rstrip("."): state.numpy().tobytes()}
    items = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, (list, tuple)) else ()
    return {key: value for name, part in items for key, value in _flat(part, f"{prefix}{name}.").items()}


def test_the_perceptual_part(noisy: TrainingCrops) -> None:
    settings = dataclasses.replace(SETTINGS, perceptual_weight=0.5, grain_channels=0)
    losses = stage_of(noisy, settings).train_step()
    weighted = 4 * losses["smooth"] + 8 * losses["means"] + 0.25 * losses["energy"] + losses["adversarial"]
    assert 0 < losses["perceptual"] < 4
    assert losses["loss"] == pytest.approx(weighted + 0.5 * losses["perceptual"], rel=1e-5)


def test_critics_see_patches_of_26_and_12_px() -> None:
    critics = Critics(0).eval()
    for critic, patch in ((critics.picture, 26), (critics.detail, 12)):
        image = torch.zeros(1, 3, 64, 64, requires_grad=True)
        scores = critic(image)
        scores[0, 0, scores.shape[2] // 2, scores.shape[3] // 2].backward()
        assert image.grad is not None
        seen = image.grad.abs().sum(dim=(0, 1)).nonzero()
        assert (seen.amax(0) - seen.amin(0) + 1).tolist() == [patch, patch]


# -- a whole run -------------------------------------------------------------------------


RUN = dataclasses.replace(
    CONFIG,
    train=dataclasses.replace(
        CONFIG.train, steps=2, checkpoint_every=2,
        vae=dataclasses.replace(CONFIG.train.vae, steps=2, adversarial_steps=4, adversarial_batch_size=4,
                                adversarial_learning_rate=1e-2, grain_channels=2),
    ),
)  # fmt: skip


@pytest.fixture(scope="module")
def clinic(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write_real(tmp_path_factory.mktemp("data"), size=24)


def test_a_killed_run_goes_on_and_its_checkpoint_has_the_head(
    clinic: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Stage.train_step

    def killed(stage: Stage) -> dict[str, float]:
        if stage.name == "decoder" and stage.step == 3:
            raise KeyboardInterrupt  # nothing is saved
        return step(stage)

    with monkeypatch.context() as patch:
        patch.setattr(Stage, "train_step", killed)
        with pytest.raises(KeyboardInterrupt):
            train(RUN, clinic, tmp_path / "killed", device="cpu")
    assert [path.name[:16] for path in (tmp_path / "killed/state").glob("decoder*.pt")] == ["decoder-00000002"]
    resumed = train(RUN, clinic, tmp_path / "killed", device="cpu")
    head = head_of(load_pipeline(resumed).vae)
    assert head is not None and bool(head.last.weight.abs().sum() > 0)
    logged = [json.loads(line) for line in (tmp_path / "killed" / "log.jsonl").read_text().splitlines()]
    decoder = [line for line in logged if line["stage"] == "decoder"]
    assert decoder[-1]["step"] == 4
    assert {"smooth", "means", "energy", "adversarial", "critic_picture", "critic_detail"} <= decoder[-1].keys()

    monkeypatch.setattr(run_module, "_train_unet", lambda *given: tmp_path)
    train(RUN, clinic, tmp_path / "whole", device="cpu")
    states = [
        _flat(torch.load(next((tmp_path / name / "state").glob("decoder-00000004*.pt")), weights_only=True))
        for name in ("whole", "killed")
    ]
    assert states[0] == states[1]
    assert any(key.startswith("network.grain.") for key in states[0])

    other = dataclasses.replace(RUN, train=dataclasses.replace(RUN.train, vae=_changed(adversarial_weight=0.5)))
    with pytest.raises(BuilderError, match=r"train\.vae\.adversarial_weight: 0\.25 there, 0\.5 now"):
        train(other, clinic, tmp_path / "killed", device="cpu")


def _changed(**settings: Any) -> VaeTrainConfig:
    return dataclasses.replace(RUN.train.vae, **settings)


def test_the_new_keys_at_their_defaults_leave_old_states_usable() -> None:
    """A state from before them was made with a fingerprint of the old keys."""
    from builder.training.identity import _vae_settings

    old = {
        "steps": 4, "batch_size": 4, "learning_rate": 1e-3, "kl_weight": 1e-4, "gradient_weight": 1.0,
        "guided_steps": 0, "warmup_steps": 1, "ema_decay": 0.995, "autocast": False,
    }  # fmt: skip
    assert _vae_settings(CONFIG) == old
    grain_without_steps = dataclasses.replace(CONFIG.train.vae, grain_channels=4)
    config: Config = dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, vae=grain_without_steps))
    assert _vae_settings(config) == old

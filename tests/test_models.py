"""Models from scratch, checkpoints and strict loading."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from builder.documents import read_document, write_document
from builder.errors import BuilderError
from builder.models.building import clip_tokenizer
from builder.models.checkpoint import Checkpoint, Lineage, read_checkpoint, resolve, save_checkpoint
from builder.models.load import load_pipeline
from builder.models.sdxl import build
from builder.phases import HEALING_PHASES

ARCHITECTURE = {
    "text_encoder": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2},
    "vae": {
        "block_out_channels": [8, 8],
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
        "layers_per_block": 1,
        "latent_channels": 4,
        "norm_num_groups": 4,
    },
    "unet": {
        "block_out_channels": [8, 16],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
        "layers_per_block": 1,
        "transformer_layers_per_block": 1,
        "attention_head_dim": 8,
        "norm_num_groups": 4,
        "addition_time_embed_dim": 8,
    },
}
PROMPTS = {phase.code: phase.prompt for phase in HEALING_PHASES}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    lineage = Lineage(True, "key", ["a" * 32, "b" * 32])
    description = Checkpoint(
        folder, classes=HEALING_PHASES, prompts=PROMPTS, original_sizes={"I": [50, 60]}, lineage=lineage, step=7
    )
    return save_checkpoint(build(ARCHITECTURE, 16, seed=0), description)


@pytest.fixture
def copied(saved: Checkpoint, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved.path, tmp_path / "copy"))


@pytest.fixture
def unrecorded(copied: Path) -> Path:
    """As from elsewhere: without the record of its files, which would speak first of one that was changed."""
    (copied / "checkpoint.json").unlink()
    return copied


def test_same_seed_same_weights() -> None:
    def weights(seed: int) -> torch.Tensor:
        pipeline = build(ARCHITECTURE, 16, seed)
        modules = (pipeline.unet, pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2)
        return torch.cat([p.flatten() for module in modules for p in module.parameters()])

    before = torch.get_rng_state()
    first = weights(0)
    assert torch.equal(before, torch.get_rng_state())  # the caller's random state is left alone
    assert torch.equal(first, weights(0))
    assert not torch.equal(first, weights(1))


def test_plain_diffusers_call_makes_an_image() -> None:
    pipeline = build(ARCHITECTURE, 16, seed=0)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(PROMPTS["I"], negative_prompt="blurry", num_inference_steps=2, output_type="np").images
    assert images.shape == (1, 16, 16, 3)


def test_prompts_of_the_phases_differ_for_both_encoders() -> None:
    pipeline = build(ARCHITECTURE, 16, seed=0)
    hidden, _, pooled, _ = pipeline.encode_prompt(list(PROMPTS.values()), do_classifier_free_guidance=False)
    assert hidden.shape == (3, 77, 32)
    assert pooled.shape == (3, 16)
    for embedding in (hidden[..., :16].flatten(1), hidden[..., 16:].flatten(1), pooled):
        distances = torch.cdist(embedding, embedding) / embedding.norm(dim=1).mean()
        assert distances[~torch.eye(3, dtype=torch.bool)].min() > 0.01


def test_tokenizer_is_clips_on_its_merges() -> None:
    tokenizer = clip_tokenizer("<|endoftext|>")
    assert len(tokenizer) == 512 + 1500 + 2
    ids = tokenizer("Wound", padding="max_length", truncation=True).input_ids
    assert len(ids) == 77
    assert tokenizer.convert_ids_to_tokens(ids[:4]) == ["<|startoftext|>", "w", "ound</w>", "<|endoftext|>"]
    assert set(ids[4:]) == {tokenizer.eos_token_id}
    odd = "Ulcère – 5 °C"  # every byte has a token: nothing is unknown
    assert tokenizer.decode(tokenizer(odd).input_ids, skip_special_tokens=True).replace(" ", "") == "ulcère–5°c"


@pytest.mark.parametrize(
    ("part", "change", "said"),
    [
        ("unet", {"block_out_chanels": [8]}, "block_out_channels"),
        ("vae", {"latent_channels": 4, "block_out_channels": [8, 10]}, "vae"),
        ("uned", {}, "unet"),
    ],
)
def test_wrong_architecture_is_named(part: str, change: dict, said: str) -> None:
    with pytest.raises(BuilderError, match=said):
        build({**ARCHITECTURE, part: {**ARCHITECTURE.get(part, {}), **change}}, 16, seed=0)


def test_size_must_fit_the_autoencoder() -> None:
    with pytest.raises(BuilderError, match="multiple"):
        build(ARCHITECTURE, 17, seed=0)


def test_round_trip(saved: Checkpoint) -> None:
    source = build(ARCHITECTURE, 16, seed=0)
    loaded = load_pipeline(saved.path)
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        weights = getattr(loaded, name).state_dict()
        for key, value in getattr(source, name).state_dict().items():
            assert weights[key].dtype == torch.float32
            assert torch.equal(weights[key], value.half().float()), (name, key)
    assert loaded.scheduler.config.prediction_type == "v_prediction"
    assert loaded.watermark is None
    prompt = PROMPTS["P"]
    assert (
        loaded.tokenizer_2(prompt, padding="max_length").input_ids
        == source.tokenizer_2(prompt, padding="max_length").input_ids
    )
    assert read_checkpoint(saved.path) == saved
    assert source.unet.dtype == torch.float32  # saving in half precision leaves the pipeline alone


def test_hash_is_of_what_decides_the_images(saved: Checkpoint, copied: Path) -> None:
    description = read_document(copied / "checkpoint.json")
    write_document(copied / "checkpoint.json", {**description, "metrics": {"fid": 1.0}, "created": "later"})
    assert read_checkpoint(copied).sha256 == saved.sha256
    write_document(copied / "checkpoint.json", {**description, "original_sizes": {"I": [9]}})
    assert read_checkpoint(copied).sha256 != saved.sha256
    write_document(copied / "checkpoint.json", description)
    _edit(copied / "unet", lambda weights: weights["conv_in.bias"].add_(1))
    assert read_checkpoint(copied).sha256 != saved.sha256


def test_hash_sees_the_settings_beside_the_weights(saved: Checkpoint, copied: Path) -> None:
    scheduler = copied / "scheduler" / "scheduler_config.json"
    scheduler.write_text(scheduler.read_text().replace("v_prediction", "epsilon"))
    assert read_checkpoint(copied).sha256 != saved.sha256


def test_foreign_folder_has_unknown_lineage(copied: Path) -> None:
    (copied / "checkpoint.json").unlink()
    foreign = resolve(copied)
    assert not foreign.lineage.known
    assert foreign.classes is None


def test_saving_replaces_whole(saved: Checkpoint, copied: Path) -> None:
    (copied / "leftover").touch()
    save_checkpoint(build(ARCHITECTURE, 16, seed=1), dataclasses.replace(saved, path=copied, step=8))
    assert read_checkpoint(copied).step == 8
    assert not (copied / "leftover").exists()
    assert [path.name for path in copied.parent.iterdir()] == [copied.name]


def _edit(folder: Path, change) -> None:
    file = next(folder.glob("*.safetensors"))
    weights = load_file(file)
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "text_encoder_2"])
@pytest.mark.parametrize("wrong", ["missing", "left over", "of another shape"])
def test_wrong_weights_are_named(unrecorded: Path, part: str, wrong: str) -> None:
    key = sorted(load_file(next((unrecorded / part).glob("*.safetensors"))))[0]

    def change(weights: dict[str, torch.Tensor]) -> None:
        if wrong == "missing":
            del weights[key]
        elif wrong == "left over":
            weights["stray.weight"] = torch.zeros(2)
        else:
            weights[key] = torch.zeros(*weights[key].shape, 2)

    _edit(unrecorded / part, change)
    named = "stray" if wrong == "left over" else key.removeprefix("text_model.")
    with pytest.raises(BuilderError) as caught:
        load_pipeline(unrecorded)
    assert wrong in caught.value.what
    assert named in caught.value.what
    assert part in caught.value.what


@pytest.mark.parametrize(
    "lost",
    [
        "model_index.json", "unet/config.json", "vae/diffusion_pytorch_model.safetensors",
        "scheduler/scheduler_config.json", "text_encoder/model.safetensors", "tokenizer",
    ],
)  # fmt: skip
def test_missing_files_are_named(copied: Path, lost: str) -> None:
    shutil.rmtree(copied / lost) if (copied / lost).is_dir() else (copied / lost).unlink()
    with pytest.raises(BuilderError, match=lost.split("/")[0]):
        load_pipeline(copied)


def test_truncated_weights(copied: Path) -> None:
    file = copied / "unet/diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(BuilderError, match="unet"):
        load_pipeline(copied)


def test_pickled_weights_are_not_read(copied: Path) -> None:
    file = copied / "unet/diffusion_pytorch_model.safetensors"
    torch.save(load_file(file), file.with_suffix(".bin"))
    file.unlink()
    with pytest.raises(BuilderError, match="safetensors"):
        load_pipeline(copied)


@pytest.mark.parametrize(
    "name, said", [("FluxPipeline", "no known family"), ("StableDiffusionPipeline", "conditioned on text_time")]
)
def test_pipelines_of_no_known_or_another_family_are_refused(unrecorded: Path, name: str, said: str) -> None:
    index = json.loads((unrecorded / "model_index.json").read_text())
    (unrecorded / "model_index.json").write_text(json.dumps({**index, "_class_name": name}))
    with pytest.raises(BuilderError, match=said):
        load_pipeline(unrecorded)


def test_parts_of_several_models_are_refused(unrecorded: Path, tmp_path: Path) -> None:
    wider = {**ARCHITECTURE, "text_encoder": {**ARCHITECTURE["text_encoder"], "hidden_size": 32}}
    build(wider, 16, seed=0).text_encoder.save_pretrained(unrecorded / "text_encoder")
    with pytest.raises(BuilderError, match="width 32, not 48"):
        load_pipeline(unrecorded)


def test_loading_and_saving_say_nothing(saved: Checkpoint, tmp_path: Path) -> None:
    """In a fresh process: importing a pipeline advises torchvision, and every file of weights has a progress bar."""
    code = (
        "from dataclasses import replace; from pathlib import Path; import sys; "
        "from builder.models.checkpoint import read_checkpoint, save_checkpoint; "
        "from builder.models.load import load_pipeline; "
        "found = read_checkpoint(Path(sys.argv[1])); "
        "save_checkpoint(load_pipeline(found), replace(found, path=Path(sys.argv[2])))"
    )
    command = [sys.executable, "-c", code, str(saved.path), str(tmp_path / "again")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")
    assert (tmp_path / "again/checkpoint.json").is_file()


def test_a_checkpoint_of_a_run_is_named_with_it(saved: Checkpoint) -> None:
    assert saved.name == "tiny"
    assert Checkpoint(Path("checkpoints/clinic/step-000100")).name == "clinic/step-000100"


def test_missing_checkpoint_lists_what_is_there(saved: Checkpoint, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BuilderError, match="there is no checkpoint 'nowhere'"):
        resolve("nowhere")
    shutil.copytree(saved.path, tmp_path / "checkpoints/clinic/step-000007")
    shutil.copytree(saved.path, tmp_path / "checkpoints/clinic/step-000100")
    with pytest.raises(BuilderError, match="checkpoints/clinic/step-000100"):
        resolve("nowhere")
    assert resolve("clinic").path == Path("checkpoints/clinic/step-000100")
    assert resolve("checkpoints/clinic/step-000007").path.name == "step-000007"


@pytest.mark.parametrize("text", ["{", "[1]", '{"classes": [{"code": "I"}]}', '{"lineage": {"unheard": 1}}'])
def test_broken_description(copied: Path, text: str) -> None:
    (copied / "checkpoint.json").write_text(text)
    with pytest.raises(BuilderError, match=r"checkpoint\.json"):
        read_checkpoint(copied)

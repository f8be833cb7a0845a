"""Families: the published layouts, Stable Diffusion 1.5 against plain diffusers, and where base weights come from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from builder.config import SampleConfig
from builder.errors import BuilderError
from builder.models import sd15, sdxl
from builder.models.architectures import SD15
from builder.models.building import clip_tokenizer
from builder.models.checkpoint import Checkpoint
from builder.models.families import FAMILIES, family_named, family_of, with_parts
from builder.models.load import load_pipeline
from builder.models.single_file import family_of_file
from builder.models.source import base_of, locate, weights_sha256
from builder.sampling.prompts import encode_prompts
from builder.sampling.sampler import Request, Sampler
from builder.sampling.schedulers import make_scheduler
from builder.trust import is_vouched
from tests.reduced import WIDTHS, narrow
from tests.test_sampling import ARCHITECTURE as SDXL_TINY
from tests.test_sampling import PROMPTS, REQUESTS, SIZE, stirred

TINY = {
    **SDXL_TINY,
    "unet": {key: value for key, value in SDXL_TINY["unet"].items() if key != "addition_time_embed_dim"},
}
NAMES = list(FAMILIES)


pytestmark = pytest.mark.usefixtures("one_thread")


def tiny(name: str):
    return stirred(FAMILIES[name].build(TINY if name == "sd15" else SDXL_TINY, SIZE, 3))


def weights_of(pipeline) -> dict[str, torch.Tensor]:
    return {
        f"{part}.{key}": value
        for part in family_of(pipeline).weights
        for key, value in getattr(pipeline, part).state_dict().items()
    }


def assert_same_weights(first, second) -> None:
    ours, theirs = weights_of(first), weights_of(second)
    assert ours.keys() == theirs.keys()
    assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Each published layout at reduced width, as plain diffusers saves it."""
    root = tmp_path_factory.mktemp("layouts")
    for name, found in FAMILIES.items():
        pipeline = found.build(narrow(found.architecture, WIDTHS[name]), 64, seed=1)
        pipeline.save_pretrained(root / name)
    return {name: root / name for name in FAMILIES}


class TestPublishedLayouts:
    @pytest.mark.parametrize("name, parameters", [("sdxl", 2_567_463_684), ("sd15", 859_520_964)])
    def test_the_denoiser_has_the_published_number_of_parameters(self, name, parameters):
        found = FAMILIES[name]
        with torch.device("meta"):
            pipeline = found.build(found.architecture, found.size, 0)
        assert sum(parameter.numel() for parameter in pipeline.unet.parameters()) == parameters
        assert sum(parameter.numel() for parameter in pipeline.vae.parameters()) == 83_653_863
        assert sum(parameter.numel() for parameter in pipeline.text_encoder.parameters()) == 123_060_480
        if name == "sdxl":
            assert sum(parameter.numel() for parameter in pipeline.text_encoder_2.parameters()) == 694_659_840

    def test_the_whole_vocabulary_is_clips(self):
        tokenizer = clip_tokenizer("<|endoftext|>", merges=48_894)
        assert len(tokenizer) == 49_408
        assert tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]  # as CLIP's own

    @pytest.mark.parametrize("name", NAMES)
    def test_a_folder_of_the_full_layout_loads_draws_and_matches_diffusers(self, folders, name):
        loaded = load_pipeline(folders[name])
        plain = getattr(diffusers, FAMILIES[name].pipeline_class).from_pretrained(
            folders[name], local_files_only=True, **({"add_watermarker": False} if name == "sdxl" else {})
        )
        assert_same_weights(loaded, plain)
        assert loaded.scheduler.config.prediction_type == "epsilon"
        batch = Sampler(loaded, SampleConfig(size=64, steps=1), PROMPTS, {}).generate(REQUESTS[:1])
        assert batch.pixels.shape == (1, 64, 64, 3) and batch.bad == [False]


class TestFamilies:
    @pytest.mark.parametrize("name", NAMES)
    def test_of_a_pipeline_and_of_a_class_name(self, name):
        assert family_of(tiny(name)).name == name
        assert family_of(FAMILIES[name].pipeline_class) is family_named(name)

    def test_unknown(self):
        with pytest.raises(BuilderError, match="did you mean 'sdxl'"):
            family_named("sdxll")
        with pytest.raises(BuilderError, match="FluxPipeline"):
            family_of("FluxPipeline")

    @pytest.mark.parametrize("name", NAMES)
    def test_exchanging_a_part_keeps_the_others_and_the_settings(self, name):
        pipeline, other = tiny(name), tiny(name).unet
        if name == "sdxl":
            pipeline.register_to_config(force_zeros_for_empty_prompt=False)
        changed = with_parts(pipeline, unet=other)
        assert changed.unet is other and changed.vae is pipeline.vae and changed.tokenizer is pipeline.tokenizer
        assert type(changed) is type(pipeline)
        assert changed.config.get("force_zeros_for_empty_prompt") == pipeline.config.get("force_zeros_for_empty_prompt")

    def test_true_sizes_and_offsets_condition_sdxl_and_nothing_conditions_sd15(self):
        pooled = torch.ones(2, 3)
        added = sdxl.conditioning(pooled, [(50, 60), (170, 32)], [(1, 2), (0, 9)], (512, 256))
        assert added["time_ids"].tolist() == [[50, 60, 1, 2, 512, 256], [170, 32, 0, 9, 512, 256]]
        assert added["time_ids"].dtype == torch.float32 and added["text_embeds"] is pooled
        assert sd15.conditioning(pooled, [(50, 60)], [(0, 0)], (512, 512)) == {}
        with pytest.raises(ValueError, match="shorter"):
            sdxl.conditioning(pooled, [(50, 60), (170, 32)], [(1, 2)], (512, 512))

    def test_unknown_key_of_an_encoder_is_named(self):
        with pytest.raises(BuilderError, match="hidden_size"):
            sd15.build({**TINY, "text_encoder": {"hiden_size": 32}}, SIZE, 0)
        with pytest.raises(BuilderError, match="text_encoder_2"):
            sd15.build({**TINY, "text_encoder_2": {}}, SIZE, 0)


class TestStableDiffusion15AgainstPlainDiffusers:
    """Bit for bit from the same embeddings, as tests/test_sampling.py says for SDXL."""

    def plain_pixels(self, config, requests, embeddings=None):
        pipeline = tiny("sd15")
        pipeline.scheduler = make_scheduler(config.scheduler, pipeline.scheduler.config)
        if embeddings is None:
            prompts = {"prompt": [PROMPTS[request.code] for request in requests]}
            if config.negative_prompt:
                prompts["negative_prompt"] = [config.negative_prompt] * len(requests)
        else:
            prompts = {
                "prompt_embeds": torch.stack([embeddings.positive[request.code].hidden for request in requests]),
                "negative_prompt_embeds": torch.stack([embeddings.negative.hidden] * len(requests)),
            }
        images = pipeline(
            **prompts, height=SIZE, width=SIZE, num_inference_steps=config.steps, guidance_scale=config.guidance,
            generator=[torch.Generator("cpu").manual_seed(request.seed) for request in requests], output_type="np",
        ).images  # fmt: skip
        return (images * 255).round().astype(np.uint8)

    @pytest.mark.parametrize(
        "changes",
        [
            *({"scheduler": name} for name in ("dpmpp_2m_karras", "ddim", "euler", "unipc")),
            {"guidance": 1.0},
            {"negative_prompt": ""},
            {"guidance": 7.5, "steps": 9},
        ],
        ids=str,
    )
    def test_same_pixels(self, changes):
        config = SampleConfig(**{"size": SIZE, "steps": 4, "negative_prompt": "blurry", **changes})
        pixels = Sampler(tiny("sd15"), config, PROMPTS, {"I": [55]}).generate(REQUESTS).pixels
        assert pixels.std() > 10  # else equality says little
        embeddings = encode_prompts(tiny("sd15"), PROMPTS, config.negative_prompt)
        assert np.array_equal(pixels, self.plain_pixels(config, REQUESTS, embeddings))
        # Diffusers encodes the prompts of a batch together, which may move a last bit.
        assert np.abs(pixels.astype(int) - self.plain_pixels(config, REQUESTS)).max() <= 1

    def test_one_image_at_a_time_is_bit_equal_from_the_text_itself(self):
        config = SampleConfig(size=SIZE, steps=4, negative_prompt="blurry")
        sampler = Sampler(tiny("sd15"), config, PROMPTS, {})
        for request in REQUESTS:
            assert np.array_equal(sampler.generate([request]).pixels, self.plain_pixels(config, [request]))

    def test_no_prompt_is_the_embedding_of_the_empty_one(self):
        embeddings = encode_prompts(tiny("sd15"), {**PROMPTS, "E": ""}, "")
        assert torch.equal(embeddings.negative.hidden, embeddings.positive["E"].hidden)
        assert embeddings.negative.hidden.any()
        assert embeddings.negative.hidden.shape == (77, 32) and embeddings.negative.pooled.shape == (0,)

    def test_sizes_leave_the_pixels_alone(self):
        config = SampleConfig(size=SIZE, steps=2)
        draws = [Sampler(tiny("sd15"), config, PROMPTS, sizes).generate(REQUESTS) for sizes in ({}, {"I": [20]})]
        assert np.array_equal(draws[0].pixels, draws[1].pixels)


class TestFolders:
    def test_a_downloaded_folders_safety_checker_is_left_out(self, folders, tmp_path, caplog):
        folder = shutil.copytree(folders["sd15"], tmp_path / "downloaded")
        index = json.loads((folder / "model_index.json").read_text())
        index |= {
            "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
            "feature_extractor": ["transformers", "CLIPImageProcessor"],
            "requires_safety_checker": True,
        }
        (folder / "model_index.json").write_text(json.dumps(index))
        for part in ("safety_checker", "feature_extractor"):
            (folder / part).mkdir()
            (folder / part / "config.json").write_text("{}")
        loaded = load_pipeline(folder)
        assert loaded.safety_checker is None and loaded.feature_extractor is None and not caplog.records
        loaded.save_pretrained(tmp_path / "again")
        saved = json.loads((tmp_path / "again" / "model_index.json").read_text())
        assert saved["safety_checker"] == [None, None] and saved["feature_extractor"] == [None, None]
        assert saved["requires_safety_checker"] is False

    @pytest.mark.parametrize("name", NAMES)
    def test_the_decoder_never_runs_in_half_precision(self, folders, name):
        loaded = load_pipeline(folders[name], dtype=torch.float16)
        assert (loaded.unet.dtype, loaded.text_encoder.dtype) == (torch.float16, torch.float16)
        assert loaded.vae.dtype == torch.float32
        sampler = Sampler(loaded, SampleConfig(size=64, steps=1), PROMPTS, {}, "cpu", torch.float16)
        assert sampler._vae.dtype == torch.float32

    def test_weights_of_the_other_family(self, folders, tmp_path):
        folder = shutil.copytree(folders["sd15"], tmp_path / "mixed")
        shutil.rmtree(folder / "unet")
        shutil.copytree(folders["sdxl"] / "unet", folder / "unet")
        (folder / "unet" / "config.json").write_bytes((folders["sd15"] / "unet" / "config.json").read_bytes())
        with pytest.raises(BuilderError, match=r"of another shape.* and [0-9]+ more"):
            load_pipeline(folder)


def single_file(pipeline, file: Path) -> Path:
    """Write a pipeline as its first authors would have, by the published layout: the converse of loading it."""
    from builder.models.single_file import OPEN_CLIP, source

    state: dict[str, torch.Tensor] = {}
    stacked: dict[str, dict[str, torch.Tensor]] = {}
    for part in family_of(pipeline).weights:
        for name, weight in getattr(pipeline, part).state_dict().items():
            theirs, _ = source(pipeline, part, name)
            if ".in_proj_" in theirs:
                stacked.setdefault(theirs, {})[name.split("_proj")[0][-1]] = weight
            elif theirs == f"{OPEN_CLIP}text_projection":
                state[theirs] = weight.T.contiguous()
            elif part == "vae" and "attentions" in name and weight.ndim == 2:
                state[theirs] = weight[:, :, None, None]
            else:
                state[theirs] = weight
    state |= {theirs: torch.cat([parts[letter] for letter in "qkv"]) for theirs, parts in stacked.items()}
    save_file({name: weight.contiguous() for name, weight in state.items()}, file)
    return file


@pytest.fixture(scope="module")
def files(folders, tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("single")
    return {name: single_file(load_pipeline(folders[name]), root / f"{name}.safetensors") for name in FAMILIES}


class TestSingleFile:
    @pytest.mark.parametrize("name", NAMES)
    def test_every_weight_is_found(self, folders, files, name):
        architecture = narrow(FAMILIES[name].architecture, WIDTHS[name])
        loaded = load_pipeline(files[name], architecture=architecture)
        expected = load_pipeline(folders[name])
        assert_same_weights(loaded, expected)
        config = SampleConfig(size=64, steps=1)
        pixels = [
            Sampler(pipeline, config, PROMPTS, {}).generate(REQUESTS[:1]).pixels for pipeline in (loaded, expected)
        ]
        assert np.array_equal(*pixels)

    @pytest.mark.parametrize("name", NAMES)
    def test_diffusers_reads_the_same_out_of_the_file(self, folders, files, name):
        """Our names of the weights against diffusers' own conversion, offline, with the folder's settings."""
        file = files[name]
        pipeline_class = getattr(diffusers, FAMILIES[name].pipeline_class)
        plain = pipeline_class.from_single_file(file, config=str(folders[name]), local_files_only=True)
        assert_same_weights(plain, load_pipeline(folders[name]))

    def test_the_published_layouts_names(self):
        """A few names as they stand in sd_xl_base_1.0.safetensors and v1-5-pruned-emaonly.safetensors."""
        from builder.models.single_file import source

        with torch.device("meta"):
            pipelines = {name: found.build(found.architecture, found.size, 0) for name, found in FAMILIES.items()}
        unet, vae = "model.diffusion_model.", "first_stage_model."
        clip, open_clip = "cond_stage_model.transformer.", "conditioner.embedders.1.model."
        resblock = f"{open_clip}transformer.resblocks.9."
        layer = "text_model.encoder.layers.9."
        for name, part, ours, theirs in [
            (
                "sd15",
                "unet",
                "up_blocks.3.resnets.2.conv_shortcut.weight",
                f"{unet}output_blocks.11.0.skip_connection.weight",
            ),
            ("sd15", "unet", "up_blocks.1.upsamplers.0.conv.weight", f"{unet}output_blocks.5.2.conv.weight"),
            ("sd15", "unet", "up_blocks.0.upsamplers.0.conv.weight", f"{unet}output_blocks.2.1.conv.weight"),
            ("sd15", "text_encoder", "final_layer_norm.bias", f"{clip}text_model.final_layer_norm.bias"),
            ("sdxl", "text_encoder_2", f"{layer}mlp.fc2.bias", f"{resblock}mlp.c_proj.bias"),
            ("sdxl", "text_encoder_2", f"{layer}self_attn.k_proj.bias", f"{resblock}attn.in_proj_bias"),
            ("sdxl", "unet", "add_embedding.linear_1.weight", f"{unet}label_emb.0.0.weight"),
            ("sdxl", "vae", "decoder.up_blocks.0.upsamplers.0.conv.weight", f"{vae}decoder.up.3.upsample.conv.weight"),
            ("sdxl", "vae", "encoder.mid_block.attentions.0.to_out.0.bias", f"{vae}encoder.mid.attn_1.proj_out.bias"),
        ]:
            assert source(pipelines[name], part, ours)[0] == theirs

    @pytest.mark.parametrize("wrong", ["missing", "left over", "of another shape"])
    @pytest.mark.parametrize("name, key", [("sdxl", "conditioner.embedders.1.model.ln_final.weight"),
                                           ("sd15", "model.diffusion_model.out.2.bias")])  # fmt: skip
    def test_wrong_weights_are_named(self, files, tmp_path, name, key, wrong):
        state = load_file(files[name])
        if wrong == "missing":
            del state[key]
        elif wrong == "left over":
            state["lora_te_stray.weight"] = torch.zeros(2)
        else:
            state[key] = torch.zeros(3)
        save_file(state, tmp_path / "wrong.safetensors")
        architecture = narrow(FAMILIES[name].architecture, WIDTHS[name])
        with pytest.raises(BuilderError) as caught:
            load_pipeline(tmp_path / "wrong.safetensors", architecture=architecture)
        assert wrong in caught.value.what
        named = {"left over": "lora_te_stray", "missing": key, "of another shape": "(3,)"}[wrong]
        assert named in caught.value.what

    def test_what_training_leaves_in_such_files_is_no_weight(self, folders, files, tmp_path):
        extra = {"betas": torch.zeros(4), "model_ema.decay": torch.zeros(1), "sqrt_alphas_cumprod": torch.zeros(4)}
        ids = {"cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None]}
        save_file({**load_file(files["sd15"]), **extra, **ids}, tmp_path / "full.safetensors")
        loaded = load_pipeline(tmp_path / "full.safetensors", architecture=narrow(SD15, WIDTHS["sd15"]))
        assert_same_weights(loaded, load_pipeline(folders["sd15"]))

    def test_a_file_of_another_width_or_kind_is_refused(self, files, tmp_path):
        with pytest.raises(BuilderError, match="of another shape"):
            load_pipeline(files["sd15"])  # a reduced one is not the published model
        save_file({"some.weight": torch.zeros(1)}, tmp_path / "other.safetensors")
        with pytest.raises(BuilderError, match="no model of a known family"):
            load_pipeline(tmp_path / "other.safetensors")
        (tmp_path / "cut.safetensors").write_bytes(files["sd15"].read_bytes()[:-100])
        with pytest.raises(BuilderError, match="cannot be read"):
            family_of_file(tmp_path / "cut.safetensors")


class TestSource:
    def test_folder_file_and_name(self, folders, files, tmp_path, monkeypatch):
        assert locate(folders["sd15"]) == Checkpoint(folders["sd15"], family="sd15")
        assert locate(files["sdxl"]).family == "sdxl"
        assert locate("demo").name == "demo"

    def test_hash_of_a_file_is_of_its_bytes(self, files):
        assert weights_sha256(locate(files["sdxl"])) != weights_sha256(locate(files["sd15"]))
        checkpoint = locate("demo")
        named = base_of(checkpoint, "demo")
        assert is_vouched("demo", named.pop("voucher"))
        assert named == {"reference": "demo", "sha256": checkpoint.sha256}

    @pytest.mark.parametrize("suffix", ["ckpt", "pt", "bin"])
    def test_pickles_are_refused_unopened(self, tmp_path, suffix):
        with pytest.raises(BuilderError, match="checkpoint import"):
            locate(tmp_path / f"model.{suffix}")

    def test_missing_file_folder_and_name(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(BuilderError, match="no file"):
            locate("models/sdxl.safetensors")
        with pytest.raises(BuilderError, match="there is no checkpoint 'nowhere'"):
            locate("nowhere")
        (tmp_path / "some" / "folder").mkdir(parents=True)
        with pytest.raises(BuilderError, match="there is no checkpoint 'some/folder'"):
            locate("some/folder")  # it is there, so it isn't a hub's

    def test_a_hub_id_is_not_fetched_unasked(self, tmp_path, monkeypatch):
        import huggingface_hub

        asked = []

        def snapshot_download(name, **options):
            asked.append((name, options))
            raise huggingface_hub.errors.LocalEntryNotFoundError("not in the cache")

        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
        with pytest.raises(BuilderError, match="--download"):
            locate("stabilityai/stable-diffusion-xl-base-1.0")
        assert asked[0][1]["local_files_only"] is True
        with pytest.raises(BuilderError, match="cannot be fetched"):
            locate("stabilityai/stable-diffusion-xl-base-1.0@462165984030", download=True)
        name, options = asked[1]
        assert name == "stabilityai/stable-diffusion-xl-base-1.0"
        assert options["local_files_only"] is False and options["revision"] == "462165984030"
        patterns = options["allow_patterns"]
        assert "unet/diffusion_pytorch_model.safetensors" in patterns  # not .bin, not .fp16., not ONNX
        assert not [pattern for pattern in patterns if pattern.endswith(("bin", "*", "msgpack"))]

    def test_what_was_fetched_once_is_found_again(self, folders, tmp_path, monkeypatch):
        from huggingface_hub import constants

        cache = tmp_path / "hub" / "models--someone--wounds"
        (cache / "refs").mkdir(parents=True)
        (cache / "refs" / "main").write_text("0123456789abcdef")
        shutil.copytree(folders["sd15"], cache / "snapshots" / "0123456789abcdef")
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        found = locate("someone/wounds")
        assert found.family == "sd15"
        assert_same_weights(load_pipeline(found), load_pipeline(folders["sd15"]))


def test_request_needs_no_label_of_the_family():
    """One job's units draw from either family: the request is the same."""
    for name in NAMES:
        batch = Sampler(tiny(name), SampleConfig(size=SIZE, steps=1), PROMPTS, {}).generate([Request("I", 0, 1)])
        assert batch.pixels.shape == (1, SIZE, SIZE, 3)

"""LoRA: what is adapted, the file that diffusers shares, fusing, strict loading, and checkpoints made of an adapter."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from builder.config import SampleConfig
from builder.errors import BuilderError
from builder.models.load import load_pipeline
from builder.models.lora import (
    ADAPTER,
    TARGETS,
    adapted,
    add_lora,
    fuse_lora,
    load_lora,
    load_lora_state,
    lora_state,
    save_lora,
)
from builder.models.source import base_of, locate
from builder.sampling.sampler import Sampler
from tests.test_families import NAMES, tiny
from tests.test_sampling import PROMPTS, REQUESTS, SIZE

ALL = list(TARGETS)


def inputs(pipeline):
    generator = torch.Generator().manual_seed(0)
    width = pipeline.unet.config.cross_attention_dim
    added = {}
    if pipeline.unet.config.addition_embed_type:
        added = {"text_embeds": torch.ones(2, 32), "time_ids": torch.full((2, 6), 32.0)}
    return {
        "sample": torch.randn(2, 4, 16, 16, generator=generator),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": torch.randn(2, 77, width, generator=generator),
        "added_cond_kwargs": added,
    }


@torch.no_grad()
def output(pipeline) -> torch.Tensor:
    return pipeline.unet.eval()(**inputs(pipeline)).sample


def trained(name: str, targets=ALL, rank=3, alpha=6.0, **options):
    """A pipeline with an adapter whose weights are no longer those it was drawn with."""
    pipeline = tiny(name)
    generator = torch.Generator().manual_seed(5)
    for parameter in add_lora(pipeline.unet, rank, alpha, targets=targets, **options):
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return pipeline


@pytest.mark.parametrize("name", NAMES)
class TestAdapter:
    def test_at_first_nothing_changes_and_only_the_adapter_is_trained(self, name):
        pipeline, plain = tiny(name), tiny(name)
        before = torch.get_rng_state()
        parameters = add_lora(pipeline.unet, 4, 8, 0.1, ALL, seed=7)
        assert torch.equal(before, torch.get_rng_state())
        assert torch.equal(output(pipeline), output(plain))
        assert parameters and {id(p) for p in parameters} == {
            id(parameter) for key, parameter in pipeline.unet.named_parameters() if ".lora_" in key
        }
        assert all(parameter.requires_grad == (".lora_" in key) for key, parameter in pipeline.unet.named_parameters())
        again = tiny(name)
        for one, other in zip(parameters, add_lora(again.unet, 4, 8, 0.1, ALL, seed=7), strict=True):
            assert torch.equal(one, other)

    def test_groups_name_every_layer_of_their_kind(self, name):
        pipeline = trained(name)
        layers = {key.removeprefix("unet.").rpartition(".lora_")[0] for key in lora_state(pipeline.unet)}
        blocks = [key for key, _ in tiny(name).unet.named_modules() if key.endswith("transformer_blocks.0")]
        assert len(layers) == len(blocks) * (4 * 2 + 2 + 2)  # self and cross attention, feed-forward, in and out
        for end in ("attn2.to_out.0", "ff.net.0.proj", "ff.net.2"):
            assert f"{blocks[0]}.{end}" in layers

    def test_gradients_reach_the_adapter_alone(self, name):
        pipeline = trained(name)
        pipeline.unet(**inputs(pipeline)).sample.square().mean().backward()
        for key, parameter in pipeline.unet.named_parameters():
            assert (parameter.grad is not None and bool(parameter.grad.any())) == (".lora_" in key), key

    def test_merged_is_unmerged(self, name):
        pipeline, plain = trained(name), tiny(name)
        unmerged = output(pipeline)
        assert (unmerged - output(plain)).abs().max() > 0.01
        fuse_lora(pipeline.unet)
        assert torch.allclose(output(pipeline), unmerged, rtol=0, atol=1e-5)
        assert list(pipeline.unet.state_dict()) == list(plain.unet.state_dict())
        assert not adapted(pipeline.unet)

    def test_merging_adds_alpha_over_rank_times_b_times_a(self, name):
        pipeline, plain = trained(name, ["attention"], rank=3, alpha=6.0), tiny(name)
        state = {key: value.clone() for key, value in lora_state(pipeline.unet).items()}
        fuse_lora(pipeline.unet)
        changed = 0
        for key, before in plain.unet.state_dict().items():
            after, layer = pipeline.unet.state_dict()[key], f"unet.{key.removesuffix('.weight')}"
            if f"{layer}.lora_A.weight" in state:
                change = 6.0 / 3 * state[f"{layer}.lora_B.weight"] @ state[f"{layer}.lora_A.weight"]
                assert torch.allclose(after, before + change, atol=1e-6)
                changed += 1
            else:
                assert torch.equal(after, before)
        assert changed == len(state) / 2

    def test_round_trip(self, name, tmp_path):
        pipeline, again = trained(name), tiny(name)
        file = save_lora(pipeline.unet, tmp_path)
        load_lora(again.unet, file)
        assert torch.equal(output(again), output(pipeline))
        assert file.name == ADAPTER
        ours, theirs = lora_state(again.unet), load_file(file)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)

    def test_plain_diffusers_takes_the_file(self, name, tmp_path):
        pipeline, plain = trained(name), tiny(name)
        save_lora(pipeline.unet, tmp_path)
        plain.load_lora_weights(tmp_path, weight_name=ADAPTER)
        assert torch.allclose(output(plain), output(pipeline), rtol=0, atol=1e-6)

    def test_diffusers_own_file_is_taken(self, name, tmp_path):
        from peft import get_peft_model_state_dict

        pipeline, again = trained(name), tiny(name)
        type(pipeline).save_lora_weights(
            tmp_path,
            unet_lora_layers=get_peft_model_state_dict(pipeline.unet),
            unet_lora_adapter_metadata=pipeline.unet.peft_config["default"].to_dict(),
        )
        load_lora(again.unet, tmp_path / ADAPTER)
        assert torch.equal(output(again), output(pipeline))

    def test_layers_may_have_ranks_of_their_own(self, name, tmp_path):
        layer = next(key for key, _ in tiny(name).unet.named_modules() if key.endswith("attn2.to_k"))
        pipeline, again = trained(name, ["attention"], ranks={layer: 7}, alphas={layer: 2.5}), tiny(name)
        assert lora_state(pipeline.unet)[f"unet.{layer}.lora_A.weight"].shape[0] == 7
        load_lora(again.unet, save_lora(pipeline.unet, tmp_path))
        assert torch.equal(output(again), output(pipeline))


class TestStrict:
    @pytest.mark.parametrize("wrong", ["missing", "left over", "of another shape"])
    def test_wrong_weights_are_named(self, tmp_path, wrong):
        file = save_lora(trained("sd15").unet, tmp_path)
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata()
        state = load_file(file)
        key = sorted(state)[0]
        if wrong == "missing":
            del state[key]
        elif wrong == "left over":
            state["unet.stray.lora_A.weight"] = torch.zeros(2)
        else:
            state[key] = torch.zeros(9, *state[key].shape[1:])
        save_file(state, file, metadata=metadata)
        with pytest.raises(BuilderError) as caught:
            load_lora(tiny("sd15").unet, file)
        assert wrong in caught.value.what
        assert ("stray" if wrong == "left over" else key) in caught.value.what

    def test_adapter_of_another_family_rank_or_other_layers(self, tmp_path):
        file = save_lora(trained("sdxl").unet, tmp_path)
        with pytest.raises(BuilderError, match=r"of another shape.*to_k"):
            load_lora(tiny("sd15").unet, file)  # cross-attention is wider in SDXL
        state = load_file(file)
        with pytest.raises(BuilderError, match=r"of another shape.*and [0-9]+ more"):
            load_lora_state(trained("sdxl", rank=2).unet, state, "state")
        with pytest.raises(BuilderError, match="left over"):
            load_lora_state(trained("sdxl", ["attention"]).unet, state, "state")

    def test_file_without_rank_and_layers_broken_or_missing(self, tmp_path):
        file = save_lora(trained("sd15").unet, tmp_path)
        weights = file.read_bytes()
        save_file(load_file(file), file)
        with pytest.raises(BuilderError, match="metadata"):
            load_lora(tiny("sd15").unet, file)
        file.write_bytes(weights[:-50])
        with pytest.raises(BuilderError, match="cannot be read as a LoRA"):
            load_lora(tiny("sd15").unet, file)
        with pytest.raises(BuilderError, match="cannot be read as a LoRA"):
            load_lora(tiny("sd15").unet, tmp_path / "none.safetensors")

    @pytest.mark.parametrize(
        "settings, message",
        [
            ({"rank": 0}, "rank 0"),
            ({"alpha": 0}, "alpha 0"),
            ({"dropout": 1.0}, "dropout 1.0"),
            ({"targets": ["attention", "to_w"]}, "'to_w'"),
            ({"targets": ["o_q"]}, "'o_q'"),
            ({"targets": []}, "of no layers"),
        ],
    )
    def test_impossible_settings(self, settings, message):
        with pytest.raises(BuilderError, match=message):
            add_lora(tiny("sd15").unet, **{"rank": 4, "alpha": 4.0, **settings})

    def test_two_adapters_or_none(self):
        pipeline = trained("sd15")
        with pytest.raises(BuilderError, match="already"):
            add_lora(pipeline.unet, 4, 4.0)
        fuse_lora(pipeline.unet)
        with pytest.raises(BuilderError, match="has no LoRA"):
            fuse_lora(pipeline.unet)

    def test_diverged_adapter_is_not_fused(self):
        pipeline = trained("sd15")
        next(value for key, value in pipeline.unet.named_parameters() if "lora_B" in key).data.fill_(float("nan"))
        with pytest.raises(BuilderError, match="cannot be fused"):
            fuse_lora(pipeline.unet)


@pytest.fixture
def base(tmp_path, request) -> Path:
    tiny(request.param).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def adapter_folder(folder: Path, pipeline, named: dict[str, str]) -> Path:
    folder.mkdir()
    save_lora(pipeline.unet, folder)
    (folder / "checkpoint.json").write_text(json.dumps({"method": "lora", "base": named, "config": {}}))
    return folder


class TestAdapterFolder:
    @pytest.mark.parametrize("base", NAMES, indirect=True)
    def test_loads_like_any_other_checkpoint(self, base, tmp_path):
        pipeline = load_pipeline(base)
        add_lora(pipeline.unet, 3, 6.0, targets=ALL)
        for parameter in pipeline.unet.parameters():
            if parameter.requires_grad:
                parameter.data.add_(0.05)
        folder = adapter_folder(tmp_path / "adapter", pipeline, base_of(locate(base), base))
        loaded = load_pipeline(folder)
        config = SampleConfig(size=SIZE, steps=3)
        pixels = [Sampler(one, config, PROMPTS, {}).generate(REQUESTS).pixels for one in (loaded, pipeline)]
        assert np.abs(pixels[0].astype(int) - pixels[1]).max() <= 1
        assert not np.array_equal(
            pixels[0], Sampler(load_pipeline(base), config, PROMPTS, {}).generate(REQUESTS).pixels
        )
        assert not any(parameter.requires_grad for parameter in loaded.unet.parameters())

    @pytest.mark.parametrize("base", ["sd15"], indirect=True)
    def test_another_or_a_missing_base_is_refused(self, base, tmp_path):
        named = base_of(locate(base), base)
        folder = adapter_folder(tmp_path / "adapter", trained("sd15"), named)
        other = tiny("sd15")
        other.unet.conv_in.bias.data += 1
        other.save_pretrained(base)
        with pytest.raises(BuilderError, match="trained on another base"):
            load_pipeline(folder)
        base.rename(tmp_path / "elsewhere")
        with pytest.raises(BuilderError, match=r"base of the LoRA .* is not there"):
            load_pipeline(folder)
        (folder / "checkpoint.json").write_text(json.dumps({"method": "lora"}))
        with pytest.raises(BuilderError, match="names no base"):
            load_pipeline(folder)

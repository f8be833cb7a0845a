"""The Stable Diffusion 1.5 family (Rombach 2022): a StableDiffusionPipeline without its safety checker.

One CLIP text encoder, its last hidden states; no pooled embedding, no micro-conditioning.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel

from builder.models.building import (
    SMALL_VOCABULARY,
    Architecture,
    Pipeline,
    clip_tokenizer,
    described,
    networks,
    spread,
    text_config,
)

PARTS = ("tokenizer", "text_encoder", "vae", "unet", "scheduler")
TOKENIZERS = ("tokenizer",)
WEIGHTS: dict[str, tuple[Any, str]] = {
    "text_encoder": (CLIPTextModel, "model"),
    "vae": (AutoencoderKL, "diffusion_pytorch_model"),
    "unet": (UNet2DConditionModel, "diffusion_pytorch_model"),
}


def build(architecture: Architecture, size: int, seed: int) -> Pipeline:
    """A pipeline with random weights, the same for the same seed, for images of `size` px; float32 on the CPU.

    Raises BuilderError for a key that the architecture doesn't know or values that don't fit together.
    """
    with described(architecture, PARTS, seed) as parts:
        tokenizer = clip_tokenizer("<|endoftext|>", parts["tokenizer"].get("merges", SMALL_VOCABULARY))
        config = text_config(parts["text_encoder"], tokenizer)
        return assemble(
            {
                "tokenizer": tokenizer,
                "text_encoder": spread(CLIPTextModel(config)),
                **networks(
                    parts,
                    size,
                    # The pipeline insists on an offset of 1: the schedule that Stable Diffusion was trained with.
                    scheduler={"prediction_type": "epsilon", "steps_offset": 1},
                    unet={},
                    derived={"cross_attention_dim": config.hidden_size},
                ),
            },
            {},
        )


def assemble(parts: Mapping[str, Any], settings: Mapping[str, Any]) -> Pipeline:
    """A pipeline of these parts; no setting of model_index.json matters without a safety checker."""
    return StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)


def encode(pipeline: Pipeline, prompt: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Token states [77, width] of one prompt, and a pooled embedding of width 0: the denoiser takes none."""
    device = pipeline.text_encoder.device
    hidden, _ = pipeline.encode_prompt(prompt, device, num_images_per_prompt=1, do_classifier_free_guidance=False)
    return hidden[0], hidden.new_zeros(0)


def unconditional(pipeline: Pipeline) -> tuple[torch.Tensor, torch.Tensor]:
    """What stands for no prompt: the embedding of ""."""
    return encode(pipeline, "")


def conditioning(
    pooled: torch.Tensor,
    original_sizes: Sequence[tuple[int, int]],
    offsets: Sequence[tuple[int, int]],
    target: tuple[int, int],
) -> dict[str, torch.Tensor]:
    """Nothing: the denoiser knows neither a pooled embedding nor sizes."""
    return {}

"""The SDXL family (Podell 2023): a StableDiffusionXLPipeline in every respect, built at any size.

Two CLIP text encoders (penultimate hidden states side by side, the second one's projection as pooled embedding) and
text_time micro-conditioning. `text_encoder_2` of an architecture is that of the first where it isn't given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTextModelWithProjection

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

PARTS = ("tokenizer", "text_encoder", "text_encoder_2", "vae", "unet", "scheduler")
TOKENIZERS = ("tokenizer", "tokenizer_2")
WEIGHTS: dict[str, tuple[Any, str]] = {
    "text_encoder": (CLIPTextModel, "model"),
    "text_encoder_2": (CLIPTextModelWithProjection, "model"),
    "vae": (AutoencoderKL, "diffusion_pytorch_model"),
    "unet": (UNet2DConditionModel, "diffusion_pytorch_model"),
}
TIME_IDS = 6  # original height and width, crop top and left, target height and width
TIME_EMBED = 256  # width of the embedding of each


def build(architecture: Architecture, size: int, seed: int) -> Pipeline:
    """A pipeline with random weights, the same for the same seed, for images of `size` px; float32 on the CPU.

    Raises BuilderError for a key that the architecture doesn't know or values that don't fit together.
    """
    with described(architecture, PARTS, seed) as parts:
        merges = parts["tokenizer"].get("merges", SMALL_VOCABULARY)
        tokenizers = [clip_tokenizer("<|endoftext|>", merges), clip_tokenizer("!", merges)]  # the second pads with "!"
        first = text_config(parts["text_encoder"], tokenizers[0])
        second = first
        if parts["text_encoder_2"]:
            second = text_config(parts["text_encoder_2"], tokenizers[1], "text_encoder_2")
        return assemble(
            {
                "tokenizer": tokenizers[0],
                "tokenizer_2": tokenizers[1],
                "text_encoder": spread(CLIPTextModel(first)),
                "text_encoder_2": spread(CLIPTextModelWithProjection(second)),
                **networks(
                    parts,
                    size,
                    scheduler={"prediction_type": "v_prediction"},
                    unet={"addition_time_embed_dim": TIME_EMBED, "use_linear_projection": True},
                    derived={
                        "cross_attention_dim": first.hidden_size + second.hidden_size,
                        "addition_embed_type": "text_time",
                        "projection_class_embeddings_input_dim": second.projection_dim
                        + TIME_IDS * parts["unet"].get("addition_time_embed_dim", TIME_EMBED),
                    },
                ),
            },
            {},
        )


def assemble(parts: Mapping[str, Any], settings: Mapping[str, Any]) -> Pipeline:
    """A pipeline of these parts; of the settings in model_index.json only the empty prompt's counts."""
    return StableDiffusionXLPipeline(
        **parts,
        force_zeros_for_empty_prompt=bool(settings.get("force_zeros_for_empty_prompt", True)),
        add_watermarker=False,  # else the pixels depend on whether an optional package is installed
    )


def encode(pipeline: Pipeline, prompt: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Token states [77, width of both encoders] and pooled embedding [projection] of one prompt."""
    device = pipeline.text_encoder.device
    hidden, _, pooled, _ = pipeline.encode_prompt(prompt, device=device, do_classifier_free_guidance=False)
    return hidden[0], pooled[0]


def unconditional(pipeline: Pipeline) -> tuple[torch.Tensor, torch.Tensor]:
    """What stands for no prompt: zeros where `force_zeros_for_empty_prompt` says so (SDXL's does), else ""."""
    hidden, pooled = encode(pipeline, "")
    if pipeline.config.force_zeros_for_empty_prompt:
        return torch.zeros_like(hidden), torch.zeros_like(pooled)
    return hidden, pooled


def conditioning(
    pooled: torch.Tensor,
    original_sizes: Sequence[tuple[int, int]],
    offsets: Sequence[tuple[int, int]],
    target: tuple[int, int],
) -> dict[str, torch.Tensor]:
    """Pooled embeddings [N, P] and micro-conditioning [N, 6]: original size, crop offset, target size, in px."""
    rows = [[*size, *offset, *target] for size, offset in zip(original_sizes, offsets, strict=True)]
    return {"text_embeds": pooled, "time_ids": torch.tensor(rows, dtype=torch.float32, device=pooled.device)}

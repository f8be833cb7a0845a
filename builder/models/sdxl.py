"""The SDXL family, built from scratch at any size: a StableDiffusionXLPipeline in every respect (Podell 2023).

Two CLIP text encoders (penultimate hidden states, the second one's projection as pooled embedding), text_time
micro-conditioning, AutoencoderKL, UNet2DConditionModel. All sizes come from `model.architecture` of the config:

    architecture:
      text_encoder: {hidden_size: 32, num_hidden_layers: 2, ...}   # CLIPTextConfig, for both encoders
      vae: {block_out_channels: [...], latent_channels: 16, ...}   # AutoencoderKL
      unet: {block_out_channels: [...], ...}                       # UNet2DConditionModel
      scheduler: {prediction_type: v_prediction, ...}              # of training; the sampler takes its betas from it

What follows from these (conditioning widths, sample size, vocabulary) is filled in.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from builder.errors import BuilderError, did_you_mean

# A StableDiffusionXLPipeline; diffusers imports lazily, so type checkers do not see what it has.
Pipeline = Any

TOKENIZER = Path(__file__).parent / "tokenizer"
MAX_TOKENS = 77
TIME_IDS = 6  # original height and width, crop top and left, target height and width

SCHEDULER: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
}


def build(architecture: dict[str, Any], size: int, seed: int) -> Pipeline:
    """A pipeline with random weights, the same for the same seed, for images of `size` px; float32 on the CPU.

    Raises BuilderError for a key that the architecture doesn't know or values that don't fit together.
    """
    parts = {"text_encoder": {}, "vae": {}, "unet": {}, "scheduler": {}, **architecture}
    for part in parts:
        if part not in ("text_encoder", "vae", "unet", "scheduler"):
            known = ("text_encoder", "vae", "unet", "scheduler")
            raise BuilderError(f"unknown key 'model.architecture.{part}'", did_you_mean(part, known))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _build(parts, size)


def _build(parts: dict[str, Any], size: int) -> Pipeline:
    tokenizers = [clip_tokenizer("<|endoftext|>"), clip_tokenizer("!")]  # SDXL's second tokenizer pads with "!"
    text = _text_config(parts["text_encoder"], tokenizers[0])
    text_encoder = _spread(CLIPTextModel(CLIPTextConfig(**text)))
    text_encoder_2 = _spread(CLIPTextModelWithProjection(CLIPTextConfig(**text)))
    vae = _from_config(AutoencoderKL, parts["vae"], "vae", sample_size=size)
    scheduler = _from_config(DPMSolverMultistepScheduler, {**SCHEDULER, **parts["scheduler"]}, "scheduler",
                             algorithm_type="dpmsolver++", solver_order=2, use_karras_sigmas=True)  # fmt: skip
    channels = vae.config.latent_channels
    shrink = 2 ** (len(vae.config.block_out_channels) - 1)
    if size % shrink:
        raise BuilderError(f"train.size {size} is not a multiple of the autoencoder's {shrink}", "choose another size")
    time_embed = parts["unet"].get("addition_time_embed_dim", 256)
    unet = _from_config(
        UNet2DConditionModel,
        {"addition_time_embed_dim": 256, "use_linear_projection": True, **parts["unet"]},
        "unet",
        sample_size=size // shrink,
        in_channels=channels,
        out_channels=channels,
        cross_attention_dim=2 * text["hidden_size"],
        addition_embed_type="text_time",
        projection_class_embeddings_input_dim=text["projection_dim"] + TIME_IDS * time_embed,
    )
    return StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=text_encoder,
        text_encoder_2=text_encoder_2,
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1],
        unet=unet,
        scheduler=scheduler,
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,  # else the pixels depend on whether an optional package is installed
    )


def clip_tokenizer(pad_token: str) -> CLIPTokenizer:
    """CLIP's tokenizer cut after the first 1,500 merges: a prefix of a BPE's merges is a BPE."""
    return CLIPTokenizer(
        str(TOKENIZER / "vocab.json"), str(TOKENIZER / "merges.txt"), pad_token=pad_token, model_max_length=MAX_TOKENS
    )


def _text_config(given: dict[str, Any], tokenizer: CLIPTokenizer) -> dict[str, Any]:
    hidden = given.get("hidden_size", 768)
    return {
        "intermediate_size": 4 * hidden,
        "projection_dim": hidden,
        **given,
        "hidden_size": hidden,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": MAX_TOKENS,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,  # the pooled embedding is read at this token
        "pad_token_id": tokenizer.pad_token_id,
    }


def _spread(encoder: nn.Module) -> nn.Module:
    """Embeddings of unit scale: CLIP's 0.02 is meant for training, and these encoders stay as they are drawn."""
    for name, parameter in encoder.named_parameters():
        if name.endswith(("token_embedding.weight", "position_embedding.weight")):
            nn.init.normal_(parameter, std=1.0 if "token" in name else 0.3)
        elif parameter.ndim == 2:
            nn.init.xavier_normal_(parameter)
    return encoder.eval().requires_grad_(False)


def _from_config(kind: Any, given: dict[str, Any], part: str, **derived: Any) -> Any:
    known = [name for name in inspect.signature(kind.__init__).parameters if name not in ("self", *derived)]
    for key in given:
        if key not in known:
            raise BuilderError(f"unknown key 'model.architecture.{part}.{key}'", did_you_mean(key, known))
    try:
        return kind(**{key: tuple(v) if isinstance(v, list) else v for key, v in given.items()}, **derived)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise BuilderError(
            f"model.architecture.{part} does not fit together: {error}", "see configs/demo.yaml"
        ) from None

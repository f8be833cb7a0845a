"""SDXL at its full width with random weights, made where they are needed: no file, and nothing drawn on the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from builder.models import architectures
from builder.models.families import family_named
from tests.acceptance.gpu.setting import Setting
from tests.reduced import WIDTHS, narrow


def random_sdxl(setting: Setting, size: int) -> Any:
    """An SDXL pipeline for images of `size` px in float32 on the device, in evaluation mode."""
    architecture = architectures.SDXL
    if setting.miniature:
        architecture = _shallow(narrow(architecture, WIDTHS["sdxl"], merges=100))
    with torch.device(setting.device):
        pipeline = family_named("sdxl").build(architecture, size, 0)
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        getattr(pipeline, name).to(setting.device).eval().requires_grad_(False)
    return pipeline


def _shallow(architecture: dict[str, Any]) -> dict[str, Any]:
    """The same kinds of layers, one of each."""
    changes: dict[str, dict[str, Any]] = {
        "text_encoder": {"num_hidden_layers": 2},
        "text_encoder_2": {"num_hidden_layers": 2},
        "vae": {"layers_per_block": 1},
        "unet": {"layers_per_block": 1, "transformer_layers_per_block": 1},
    }
    return {name: {**part, **changes.get(name, {})} for name, part in architecture.items()}


def parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@torch.no_grad()
def denoiser_flops(unet: Any, side: int) -> int:
    """Floating-point operations of one pass over one image's latents of `side` x `side`; an addition counts as one."""
    weight = next(unet.parameters())
    inputs = denoiser_inputs(unet, 1, side, weight.device, weight.dtype)
    with FlopCounterMode(display=False) as counter:
        unet(**inputs)
    return int(counter.get_total_flops())


@torch.no_grad()
def decoder_flops(vae: Any, side: int) -> int:
    """The same of decoding one image."""
    weight = next(vae.parameters())
    latents = torch.randn(1, vae.config.latent_channels, side, side, device=weight.device, dtype=weight.dtype)
    with FlopCounterMode(display=False) as counter:
        vae.decode(latents)
    return int(counter.get_total_flops())


def denoiser_inputs(unet: Any, batch: int, side: int, device: Any, dtype: torch.dtype) -> dict[str, Any]:
    """Random inputs of SDXL's denoiser for a batch, all on the device."""
    pooled = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
    return {
        "sample": torch.randn(batch, unet.config.in_channels, side, side, device=device, dtype=dtype),
        "timestep": torch.full((batch,), 500, device=device),
        "encoder_hidden_states": torch.randn(batch, 77, unet.config.cross_attention_dim, device=device, dtype=dtype),
        "added_cond_kwargs": {
            "text_embeds": torch.randn(batch, pooled, device=device, dtype=dtype),
            "time_ids": torch.full((batch, 6), 512.0, device=device),
        },
    }

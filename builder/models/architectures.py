"""The published models as data: SDXL 1.0 base and Stable Diffusion 1.5, as their config.json files say."""

from __future__ import annotations

from typing import Any

CLIP: dict[str, Any] = {"merges": 48_894}  # CLIP's whole vocabulary: 49,408 tokens
CLIP_L: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "hidden_act": "quick_gelu",
    "projection_dim": 768,
}
OPEN_CLIP_BIG_G: dict[str, Any] = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "hidden_act": "gelu",
    "projection_dim": 1280,
}
AUTOENCODER: dict[str, Any] = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "norm_num_groups": 32,
}
SCHEDULE: dict[str, Any] = {"prediction_type": "epsilon", "steps_offset": 1, "timestep_spacing": "leading"}

SDXL: dict[str, Any] = {  # UNet: 2,567,463,684 parameters
    "tokenizer": CLIP,
    "text_encoder": CLIP_L,
    "text_encoder_2": OPEN_CLIP_BIG_G,
    "vae": {**AUTOENCODER, "scaling_factor": 0.13025},
    "unet": {
        "block_out_channels": [320, 640, 1280],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "layers_per_block": 2,
        "transformer_layers_per_block": [1, 2, 10],
        "attention_head_dim": [5, 10, 20],  # heads, whatever its name says
        "use_linear_projection": True,
        "addition_time_embed_dim": 256,
    },
    "scheduler": SCHEDULE,
}
SD15: dict[str, Any] = {  # UNet: 859,520,964 parameters
    "tokenizer": CLIP,
    "text_encoder": CLIP_L,
    "vae": {**AUTOENCODER, "scaling_factor": 0.18215},
    "unet": {
        "block_out_channels": [320, 640, 1280, 1280],
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
        "layers_per_block": 2,
        "attention_head_dim": 8,
    },
    "scheduler": SCHEDULE,
}

"""What an image costs in arithmetic, and how much of the device's is used: utilisation in executed FLOPs.

A FLOP is one multiplication or one addition; counted are matrix products, convolutions and attention, as
torch.utils.flop_counter does, on the meta device: nothing is computed. SDXL at 512 px: 1.589 TFLOP a pass of the
denoiser, 2.515 TFLOP a decoding.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from builder.sampling.guidance import evaluations
from builder.sampling.sampler import Sampler

REPEATS = 5
SIDE = {"cpu": 1024, "cuda": 8192}  # of the square matrices: large enough for the peak, small enough for a moment


@dataclass(frozen=True)
class Cost:
    """FLOPs of one image: a pass of the denoiser, a decoding, and how many passes are made."""

    denoise: float
    decode: float
    passes: int

    @property
    def image(self) -> float:
        return self.passes * self.denoise + self.decode


def cost_of(unet: Any, vae: Any, size: int, passes: int) -> Cost:
    """The cost of an image of `size` px. unet, vae: the networks, of which only the configurations are read."""
    with torch.device("meta"):
        denoiser, decoder = type(unet).from_config(unet.config), type(vae).from_config(vae.config)
        side = size // 2 ** (len(vae.config.block_out_channels) - 1)
        latents = torch.empty(1, unet.config.in_channels, side, side)
        hidden = torch.empty(1, 77, unet.config.cross_attention_dim)
        added = _added(unet.config)
        with FlopCounterMode(display=False) as counted:
            denoiser(latents, torch.empty(1), encoder_hidden_states=hidden, added_cond_kwargs=added)
        denoise = float(counted.get_total_flops())
        with FlopCounterMode(display=False) as counted:
            decoder.decode(latents)
    return Cost(denoise, float(counted.get_total_flops()), passes)


def sampler_cost(sampler: Sampler) -> Cost:
    """What an image of this sampler costs."""
    passes = evaluations(sampler.config, sampler.scheduler_config)
    return cost_of(sampler._unet, sampler._vae, sampler.config.size, passes)


def _added(config: Any) -> dict[str, torch.Tensor]:
    """Stand-ins of a text_time denoiser's added conditioning: six sizes, and the pooled embedding."""
    if config.addition_embed_type is None:
        return {}
    times = 6
    pooled = config.projection_class_embeddings_input_dim - times * config.addition_time_embed_dim
    return {"text_embeds": torch.empty(1, pooled), "time_ids": torch.empty(1, times)}


def matrix_peak(device: str | torch.device, dtype: torch.dtype, side: int | None = None) -> float:
    """FLOPs a second of a large square matrix product on this device in this dtype: the best of several.

    On a CPU of one thread, a second of its own (see `seconds`).
    """
    device = torch.device(device)
    side = side or SIDE.get(device.type, SIDE["cuda"])
    one, other = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    best = 0.0
    for _ in range(REPEATS):
        started = seconds(device)
        one @ other
        best = max(best, 2 * side**3 / (seconds(device) - started))
    return best


def seconds(device: torch.device) -> float:
    """A clock for utilisation: of a GPU, once it is through with its work; of a CPU, what this process had of it.

    Where others share the cores, wall time would say nothing of either the peak or the job.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()

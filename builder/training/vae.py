"""The autoencoder from scratch: sharp reconstructions, and latents smooth enough to diffuse (Rombach 2022)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from builder.config import VaeTrainConfig
from builder.training.data import CropSampler, TrainingCrops, step_generator


def to_model(pixels: Tensor) -> Tensor:
    """uint8 [B, 3, H, W] -> float32 in [-1, 1]."""
    return pixels.float() / 127.5 - 1


def gradient_difference(image: Tensor, target: Tensor) -> Tensor:
    """Mean absolute difference of horizontal and vertical finite differences (Mathieu 2016): penalises blur."""
    error = image - target
    return (error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()) / 2


class AutoencoderObjective:
    """For an AutoencoderKL: L1 + gradient-difference L1 + kl_weight * KL per latent number; mirrors half the crops."""

    def __init__(
        self,
        vae: Any,
        crops: TrainingCrops,
        config: VaeTrainConfig,
        *,
        seed: int,
        device: torch.device,
    ) -> None:
        self.network = vae.to(device).train().requires_grad_(True)
        self.crops, self.config, self.seed, self.device = crops, config, seed, device
        self.autocast = config.autocast or device.type == "cuda"
        self.sampler = CropSampler(crops.labels, balanced=True, seed=seed)

    def losses(self, step: int) -> dict[str, Tensor]:
        random = step_generator(self.seed, "vae", step)
        pixels = self.crops.pixels[self.sampler.batch(step, self.config.batch_size)]
        flip = torch.rand(len(pixels), generator=random) < 0.5
        image = to_model(torch.where(flip[:, None, None, None], pixels.flip(-1), pixels)).to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            posterior = self.network.encode(image).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=random).to(self.device)
            decoded = self.network.decode(posterior.mean + posterior.std * noise).sample.float()
        l1 = functional.l1_loss(decoded, image)
        gradient = gradient_difference(decoded, image)
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        loss = l1 + self.config.gradient_weight * gradient + self.config.kl_weight * kl
        return {"loss": loss, "l1": l1.detach(), "gradient": gradient.detach(), "kl": kl.detach()}


@torch.no_grad()
def encode(vae: Any, pixels: Tensor, device: torch.device, batch: int = 64) -> tuple[Tensor, Tensor]:
    """Posterior mean and standard deviation of uint8 [N, 3, S, S]: two float32 [N, C, s, s], unscaled, on the CPU."""
    posteriors = [vae.encode(to_model(part).to(device)).latent_dist for part in pixels.split(batch)]
    return torch.cat([p.mean.cpu() for p in posteriors]), torch.cat([p.std.cpu() for p in posteriors])


def scaling_factor(mean: Tensor, std: Tensor) -> float:
    """1 / standard deviation of the sampled latents: what brings them to the unit scale of the diffusion's noise."""
    variance = mean.double().var() + std.double().square().mean()
    return float(variance.rsqrt())

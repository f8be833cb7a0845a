"""The autoencoder from scratch: sharp reconstructions, and latents smooth enough to diffuse (Rombach 2022)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from builder.config import VaeTrainConfig
from builder.errors import BuilderError
from builder.training.data import CropSampler, TrainingCrops, step_generator
from builder.training.perceptual import NormalisedDistance

PCA_CROPS = 1000  # crops that the principal components are taken from
FIRST_LOG_VARIANCE = -4.0  # of the posterior: a deviation of 0.14


def to_model(pixels: Tensor) -> Tensor:
    """uint8 [B, 3, H, W] -> float32 in [-1, 1]."""
    return pixels.float() / 127.5 - 1


def gradient_difference(image: Tensor, target: Tensor) -> Tensor:
    """Mean absolute difference of horizontal and vertical finite differences (Mathieu 2016): penalises blur."""
    error = image - target
    return (error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()) / 2


class PrincipalComponents:
    """Where the latents begin: the leading principal components of the image's patches, one patch a latent position.

    Left alone, an autoencoder learns brightness first and colour thousands of steps later, stuck on a plateau; but
    slough, granulation and epithelium differ by their colour. The components are the best linear code (Eckart & Young
    1936), so they hold every colour from the first step on. Each is scaled by its deviation to the power -1/2: half
    way to white, so that fine detail keeps a smaller voice, as in pixels.
    """

    def __init__(self, pixels: Tensor, channels: int, patch: int) -> None:
        """pixels: uint8 [N, 3, S, S]; channels: of the latents; patch: px that a latent position covers.

        BuilderError when a patch has fewer numbers than the latents have channels.
        """
        if channels > 3 * patch * patch:
            raise BuilderError(
                f"latents of {channels} channels for patches of {patch} x {patch} px compress nothing",
                f"set model.architecture.vae.latent_channels to {3 * patch * patch} or less",
            )
        sample = to_model(pixels[:: -(-len(pixels) // PCA_CROPS)])
        patches = functional.unfold(sample, patch, stride=patch).transpose(1, 2).reshape(-1, 3 * patch * patch).double()
        mean = patches.mean(0)
        variance, vectors = torch.linalg.eigh(torch.cov((patches - mean).T))  # ascending
        variance, vectors = variance[-channels:].clamp_min(1e-8), vectors[:, -channels:]
        scale = variance**-0.25
        scale = scale / (scale.square() * variance).mean().sqrt()  # unit variance over all channels
        weight = (vectors * scale).T
        self.weight = weight.reshape(channels, 3, patch, patch).float()
        self.bias = -(weight @ mean).float()
        self.patch = patch

    def __call__(self, image: Tensor) -> Tensor:
        """Images [B, 3, S, S], -1..1, as latents [B, channels, S / patch, S / patch]."""
        return functional.conv2d(image, self.weight.to(image.device), self.bias.to(image.device), stride=self.patch)


class AutoencoderObjective:
    """L1 + gradient difference + KL per latent number, on crops and their mirror images; and the perceptual distance
    where it has a weight.

    In the first `guided_steps` the encoder also learns to give the principal components, and the decoder is fed
    with them instead of the encoder's latents; both fade out over the second half of these steps.
    """

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
        channels = vae.config.latent_channels
        self.components = PrincipalComponents(crops.pixels, channels, 2 ** (len(vae.config.block_out_channels) - 1))
        self.perceptual = NormalisedDistance(device) if config.perceptual_weight else None
        with torch.no_grad():  # begin with little noise: the small components would drown in it
            vae.quant_conv.bias[channels:] = FIRST_LOG_VARIANCE

    def guidance(self, step: int) -> float:
        """Weight of the principal components at a step: 1, and over the second half of the guided steps down to 0."""
        share = step / self.config.guided_steps if self.config.guided_steps else 1.0
        return min(1.0, max(0.0, 2 * (1 - share)))

    def losses(self, step: int, part: range) -> dict[str, Tensor]:
        """Of the whole batch: `part` is all of it."""
        random = step_generator(self.seed, "vae", step)
        pixels = self.crops.pixels[self.sampler.batch(step, self.config.batch_size)]
        flip = torch.rand(len(pixels), generator=random) < 0.5
        image = to_model(torch.where(flip[:, None, None, None], pixels.flip(-1), pixels)).to(self.device)
        target, guided = self.components(image), self.guidance(step)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            posterior = self.network.encode(image).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=random).to(self.device)
            latents = guided * target + (1 - guided) * posterior.mean + posterior.std * noise
            decoded = self.network.decode(latents).sample.float()
        l1 = functional.l1_loss(decoded, image)
        gradient = gradient_difference(decoded, image)
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        guide = functional.l1_loss(posterior.mean.float(), target)
        loss = l1 + self.config.gradient_weight * gradient + self.config.kl_weight * kl + guided * guide
        parts = {"l1": l1, "gradient": gradient, "kl": kl, "guide": guide}
        if self.perceptual:
            parts["perceptual"] = self.perceptual(decoded, image).mean()
            loss = loss + self.config.perceptual_weight * parts["perceptual"]
        return {"loss": loss, **{name: part.detach() for name, part in parts.items()}}


@torch.no_grad()
def encode(vae: Any, pixels: Tensor, device: torch.device, batch: int = 64) -> tuple[Tensor, Tensor]:
    """Posterior mean and standard deviation of uint8 [N, 3, S, S]: two float32 [N, C, s, s], unscaled, on the CPU."""
    posteriors = [vae.encode(to_model(part).to(device)).latent_dist for part in pixels.split(batch)]
    return torch.cat([p.mean.cpu() for p in posteriors]), torch.cat([p.std.cpu() for p in posteriors])


def scaling_factor(mean: Tensor, std: Tensor) -> float:
    """1 / standard deviation of the sampled latents: what brings them to the unit scale of the diffusion's noise."""
    variance = mean.double().var() + std.double().square().mean()
    return float(variance.rsqrt())

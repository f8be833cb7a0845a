"""The adversarial stage of the autoencoder: a decoder, and a grain head, that give back grain and edges (Esser 2021).

Distances of pixels are least for the mean of all pictures that a latent may stand for, and that mean is smooth. Here
two critics judge patches instead: one the picture, one its fine detail at full resolution. What the decoder may not
lose meanwhile, colour and shapes, is held by distances of the smoothed picture.

The encoder is frozen: latents, and the scaling factor of a denoiser trained on them, stay as they are. The decoder
reads samples of the posterior, as the denoiser learns to give them. Pixels stay on the device as bytes, and noise is
drawn there, from a generator of (seed, step): a step is a function of its number and of the weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import spectral_norm

from builder.config import VaeTrainConfig
from builder.models.grain import GrainHead, attach, head_of, new_head
from builder.training.data import CropSampler, TrainingCrops, step_seed
from builder.training.perceptual import NormalisedDistance
from builder.training.vae import to_model

BETAS = (0.5, 0.99)  # of Adam, for both sides
GRAD_NORM = 10.0  # of the decoder's gradients; far above what they are, but for a bad batch
SMOOTH_WEIGHT, MEANS_WEIGHT, ENERGY_WEIGHT = 4.0, 8.0, 0.25
MEANS_SIDE, ENERGY_SIDE = 4, 8  # px of the squares over which colour, and the strength of detail, are averaged
SIGMA, TAPS = 1.0, 7  # of the Gaussian between the smoothed picture and its detail, px
MEASURED_CROPS = 512  # of which the strength of detail is measured
# Rows: luma (ITU-R BT.601), red less green, yellow less blue. The last two hold no grey.
OPPONENT = ((0.299, 0.587, 0.114), (0.7071, -0.7071, 0.0), (0.5, 0.5, -1.0))


class DetailFilter(nn.Module):
    """Splits pictures into a smooth part and fine detail: the latter in opponent colours, of unit strength in crops.

    Without the division a critic would hardly see the fine chroma, which in photographs is a fraction of the luma's.
    """

    def __init__(self, crops: Tensor) -> None:
        """crops: uint8 [N, 3, S, S], of which the deviation of each colour's detail is measured."""
        super().__init__()
        ticks = torch.arange(TAPS, dtype=torch.float64) - TAPS // 2
        row = torch.exp(-(ticks**2) / (2 * SIGMA**2))
        gaussian = torch.outer(row, row) / row.sum() ** 2
        identity = torch.zeros_like(gaussian)
        identity[TAPS // 2, TAPS // 2] = 1
        smooth = torch.eye(3, dtype=torch.float64)[:, :, None, None] * gaussian
        detail = torch.tensor(OPPONENT, dtype=torch.float64)[:, :, None, None] * (identity - gaussian)
        self.register_buffer("kernel", torch.cat([smooth, detail]).float().to(crops.device), persistent=False)
        with torch.no_grad():
            measured = self(to_model(crops[:: -(-len(crops) // MEASURED_CROPS)]))[1]
        deviation = measured.square().mean(dim=(0, 2, 3)).sqrt().clamp_min(1e-3)
        self.kernel: Tensor
        self.kernel[3:] /= deviation[:, None, None, None]

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Images [B, 3, S, S], -1..1, as (smooth, detail), each [B, 3, S, S]; edges are mirrored."""
        padded = functional.pad(image, (TAPS // 2,) * 4, mode="reflect")
        both = functional.conv2d(padded, self.kernel)
        return both[:, :3], both[:, 3:]


def patch_critic(widths: Sequence[int], strides: Sequence[int]) -> nn.Sequential:
    """A spectrally normalised critic of patches (Isola 2017, Miyato 2018): [B, 3, S, S] -> scores [B, 1, s, s].

    widths, strides: of its hidden layers; a layer that halves the side has a kernel of 4 px, another of 3.
    """
    layers: list[nn.Module] = []
    before = 3
    for width, stride in zip(widths, strides, strict=True):
        layers += [spectral_norm(nn.Conv2d(before, width, 2 + stride, stride, 1)), nn.LeakyReLU(0.2)]
        before = width
    return nn.Sequential(*layers, spectral_norm(nn.Conv2d(before, 1, 3, padding=1)))


class Critics(nn.Module):
    """One critic of the picture (patches of 26 px), one of its detail at full resolution (patches of 12 px)."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.picture = patch_critic((32, 64, 128), (2, 2, 1))
            self.detail = patch_critic((32, 32, 64), (1, 1, 2))

    def forward(self, picture: Tensor, detail: Tensor) -> tuple[Tensor, Tensor]:
        """Scores of patches, by the critic of the picture and by that of its detail: high for a photograph's."""
        return self.picture(picture), self.detail(detail)


class DecoderWithGrain(nn.Module):
    """What this stage trains, of an autoencoder: its decoder, and its grain head where it has one."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.post_quant_conv, self.decoder, self.grain = vae.post_quant_conv, vae.decoder, head_of(vae)

    def forward(self, latents: Tensor, noise: Tensor | None) -> Tensor:
        """Images float32 [B, 3, S, S] of unscaled latents; noise [B, channels, S, S] for the grain head."""
        if self.post_quant_conv is not None:
            latents = self.post_quant_conv(latents)
        picture = self.decoder(latents).float()
        return picture if self.grain is None or noise is None else self.grain(picture, noise)


class AdversarialObjective:
    """Decoder and grain head against two critics, which take their own step within each call.

    The decoder's loss is the sum of: 4 x L1 of the smoothed pictures; 8 x L1 of the means of 4 x 4 px; 0.25 x L1 of
    the detail's strength, averaged over 8 x 8 px, so that grain stands where the crop has it; `perceptual_weight` x
    the perceptual distance; `adversarial_weight` x what the critics hold against it. The critics' is the hinge loss.
    """

    def __init__(
        self, vae: Any, crops: TrainingCrops, config: VaeTrainConfig, *, seed: int, device: torch.device
    ) -> None:
        """Freezes the encoder, and attaches a grain head to the autoencoder where the config asks for one and it has
        none."""
        self.vae, self.config, self.seed, self.device = vae.to(device).eval(), config, seed, device
        vae.requires_grad_(False)
        head: GrainHead | None = head_of(vae)
        if head is None and config.grain_channels:
            head = new_head(config.grain_channels, step_seed(seed, "grain"))
            attach(vae, head)
        layout = torch.channels_last if device.type == "cuda" else torch.contiguous_format
        network = DecoderWithGrain(vae).to(device, memory_format=layout)  # type: ignore[call-overload]
        self.network: nn.Module = network.train().requires_grad_(True)
        self.layout, self.grain_channels = layout, head.noise_channels if head else 0
        self.pixels = crops.pixels.to(device)
        self.sampler = CropSampler(crops.labels, balanced=True, seed=seed)
        self.split = DetailFilter(self.pixels)
        self.critics = Critics(step_seed(seed, "critics")).to(device, memory_format=layout)  # type: ignore[call-overload]
        self.optimizer = torch.optim.Adam(
            self.critics.parameters(), lr=config.critic_learning_rate, betas=BETAS, fused=device.type == "cuda"
        )
        self.perceptual = NormalisedDistance(device) if config.perceptual_weight else None
        # On a GPU float32 (TF32) instead: so small a network waits for its launches, and casts would be more of them.
        self.autocast = config.autocast and device.type == "cpu"

    def state_dict(self) -> dict[str, Any]:
        """The critics and their optimizer: what a resume state holds beside the network that is trained."""
        return {"critics": self.critics.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.critics.load_state_dict(state["critics"])
        self.optimizer.load_state_dict(state["optimizer"])

    def losses(self, step: int, part: range) -> dict[str, Tensor]:
        """Of the whole batch: `part` is all of it. The critics have taken their step when this returns."""
        random = torch.Generator(self.device).manual_seed(step_seed(self.seed, "adversarial", step))
        real = self._crops(step, random)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            made = self.network(self._latents(real, random), self._noise(real, random))
        (smooth, detail), (true_smooth, true_detail) = self.split(made), self.split(real)
        critic_losses = self._train_critics((real, true_detail), (made.detach(), detail.detach()), step)
        parts = {
            "smooth": functional.l1_loss(smooth, true_smooth),
            "means": functional.l1_loss(_means(made, MEANS_SIDE), _means(real, MEANS_SIDE)),
            "energy": functional.l1_loss(_means(detail.abs(), ENERGY_SIDE), _means(true_detail.abs(), ENERGY_SIDE)),
            "adversarial": self._held_against(made, detail),
        }
        weights = {
            "smooth": SMOOTH_WEIGHT, "means": MEANS_WEIGHT, "energy": ENERGY_WEIGHT,
            "adversarial": self.config.adversarial_weight,
        }  # fmt: skip
        if self.perceptual:
            parts["perceptual"] = self.perceptual(made, real).mean()
            weights["perceptual"] = self.config.perceptual_weight
        loss = torch.stack([weights[name] * value for name, value in parts.items()]).sum()
        return {"loss": loss, **{name: value.detach() for name, value in (parts | critic_losses).items()}}

    def _crops(self, step: int, random: torch.Generator) -> Tensor:
        """The crops of a step, float32 [B, 3, S, S], some of them mirrored."""
        chosen = self.sampler.batch(step, self.config.adversarial_batch_size).to(self.device)
        pixels = self.pixels[chosen]
        mirrored = torch.rand(len(pixels), generator=random, device=self.device) < 0.5
        pixels = torch.where(mirrored[:, None, None, None], pixels.flip(-1), pixels)
        return to_model(pixels).contiguous(memory_format=self.layout)

    @torch.no_grad()
    def _latents(self, image: Tensor, random: torch.Generator) -> Tensor:
        """Samples of the posterior."""
        posterior = self.vae.encode(image).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=random, device=self.device)
        return posterior.mean + posterior.std * noise

    def _noise(self, image: Tensor, random: torch.Generator) -> Tensor | None:
        if not self.grain_channels:
            return None
        shape = (len(image), self.grain_channels, *image.shape[2:])
        return torch.randn(shape, generator=random, device=self.device)

    def _train_critics(self, real: tuple[Tensor, Tensor], made: tuple[Tensor, Tensor], step: int) -> dict[str, Tensor]:
        """One step of the critics on (picture, detail) of crops and of reconstructions: their hinge losses.

        2 is the loss of a critic that knows nothing; 0 of one that tells every patch.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.critic_learning_rate * self._fading(step)
        self.critics.train().requires_grad_(True)
        # Each in one pass for both: the power iteration of the spectral norm runs once.
        scores = self.critics(*(torch.cat(pair) for pair in zip(real, made, strict=True)))
        losses = {}
        for name, score in zip(("critic_picture", "critic_detail"), scores, strict=True):
            theirs, ours = score.float().chunk(2)
            losses[name] = functional.relu(1 - theirs).mean() + functional.relu(1 + ours).mean()
        torch.stack(list(losses.values())).sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return {name: loss.detach() for name, loss in losses.items()}

    def _held_against(self, made: Tensor, detail: Tensor) -> Tensor:
        """Minus the mean score of the reconstructions, over both critics, which stay as they are."""
        self.critics.eval().requires_grad_(False)
        picture, fine = self.critics(made, detail)
        return -(picture.mean() + fine.mean()) / 2

    def _fading(self, step: int) -> float:
        """Share of the critics' learning rate at a step: the cosine that the decoder's follows."""
        done = min(1.0, step / max(1, self.config.adversarial_steps))
        return 0.5 * (1 + math.cos(math.pi * done))


def _means(image: Tensor, side: int) -> Tensor:
    return functional.avg_pool2d(image, side, ceil_mode=True, count_include_pad=False)

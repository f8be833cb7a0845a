"""The latent-diffusion objective (Rombach 2022) with SDXL's text and size conditioning (Podell 2023)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from builder.config import TrainConfig
from builder.errors import BuilderError
from builder.models.sdxl import Pipeline
from builder.training.data import CropSampler, TrainingCrops, step_generator
from builder.training.vae import encode


class Latents:
    """Crops and their mirror images, encoded once: posterior mean and deviation [2N, C, s, s], unscaled."""

    def __init__(self, pipeline: Pipeline, crops: TrainingCrops, *, flips: bool, device: torch.device) -> None:
        vae = pipeline.vae.to(device).eval()
        parts = [encode(vae, crops.pixels, device)]
        if flips:
            parts.append(encode(vae, crops.pixels.flip(-1), device))
        self.mean = torch.cat([mean for mean, _ in parts])
        self.std = torch.cat([std for _, std in parts])
        self.flips = flips


class Prompts:
    """Text embeddings, each prompt encoded once: one row per class, then the unconditional ones.

    A dropped caption becomes zeros half the time (what SDXL takes for an empty negative prompt), and half the time the
    negative prompt: a model from scratch has no pretraining to know that prompt from, so it learns it as
    'unconditional', and guidance at sampling pushes away from what it really stands for.
    """

    def __init__(self, pipeline: Pipeline, prompts: Sequence[str], negative: str, device: torch.device) -> None:
        with torch.no_grad():
            hidden, _, pooled, _ = pipeline.encode_prompt(
                [*prompts, negative], device=device, do_classifier_free_guidance=False
            )
        self.hidden = torch.cat([hidden, torch.zeros_like(hidden[:1])])  # [classes + 2, 77, D]
        self.pooled = torch.cat([pooled, torch.zeros_like(pooled[:1])])  # [classes + 2, P]
        self.classes = len(prompts)

    def drop(self, labels: Tensor, share: float, random: torch.Generator) -> Tensor:
        """Rows of the tables for labels [B], a `share` of them replaced by one of the two unconditional rows."""
        dropped = torch.rand(len(labels), generator=random) < share
        which = self.classes + torch.randint(0, 2, (len(labels),), generator=random)
        return torch.where(dropped, which, labels)


class DiffusionObjective:
    """Noise (or velocity, Salimans & Ho 2022) is predicted at a random time; min-SNR weights (Hang 2023) if asked."""

    def __init__(
        self, pipeline: Pipeline, crops: TrainingCrops, latents: Latents, prompts: Prompts,
        config: TrainConfig, *, seed: int, device: torch.device,
    ) -> None:  # fmt: skip
        self.network = pipeline.unet.to(device).train().requires_grad_(True)
        self.crops, self.latents, self.prompts, self.config = crops, latents, prompts, config
        self.seed, self.device = seed, device
        self.scale = pipeline.vae.config.scaling_factor
        self.prediction = pipeline.scheduler.config.prediction_type
        if self.prediction not in ("epsilon", "v_prediction"):
            raise BuilderError(
                f"the model predicts '{self.prediction}'", "training knows prediction_type epsilon and v_prediction"
            )
        self.alpha_bar = pipeline.scheduler.alphas_cumprod.to(torch.float32).cpu()
        self.weights = snr_weights(self.alpha_bar, self.prediction, config.min_snr_gamma)
        self.sampler = CropSampler(crops.labels, balanced=config.class_balanced, seed=seed)

    def losses(self, step: int) -> dict[str, Tensor]:
        random = step_generator(self.seed, "unet", step)
        crop = self.sampler.batch(step, self.config.batch_size)
        flip = torch.randint(0, 2, (len(crop),), generator=random) if self.latents.flips else torch.zeros_like(crop)
        place = crop + flip * len(self.crops)
        mean, std = self.latents.mean[place], self.latents.std[place]
        clean = (mean + std * torch.randn(mean.shape, generator=random)) * self.scale
        noise = torch.randn(clean.shape, generator=random)
        time = torch.randint(0, len(self.alpha_bar), (len(crop),), generator=random)
        text = self.prompts.drop(self.crops.labels[crop], self.config.prompt_dropout, random).to(self.device)

        signal = self.alpha_bar[time].sqrt()[:, None, None, None]
        sigma = (1 - self.alpha_bar[time]).sqrt()[:, None, None, None]
        noisy = (signal * clean + sigma * noise).to(self.device)
        target = (noise if self.prediction == "epsilon" else signal * noise - sigma * clean).to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            predicted = self.network(
                noisy,
                time.to(self.device),
                encoder_hidden_states=self.prompts.hidden[text],
                added_cond_kwargs={"text_embeds": self.prompts.pooled[text], "time_ids": self._time_ids(crop)},
            ).sample
        error = functional.mse_loss(predicted.float(), target, reduction="none").mean(dim=(1, 2, 3))
        return {"loss": (error * self.weights[time].to(self.device)).mean(), "mse": error.mean().detach()}

    def _time_ids(self, crop: Tensor) -> Tensor:
        """SDXL's micro-conditioning [B, 6]: native height and width, crop top and left (0), target height and width."""
        native = self.crops.native[crop].float()
        target = torch.full_like(native, self.config.size)
        return torch.cat([native, torch.zeros_like(native), target], dim=1).to(self.device)


def snr_weights(alpha_bar: Tensor, prediction: str, gamma: float) -> Tensor:
    """Loss weights by time, float32 [T]: min(SNR, gamma) / SNR for noise, / (SNR + 1) for velocity; ones at gamma 0."""
    if not gamma:
        return torch.ones_like(alpha_bar)
    snr = alpha_bar / (1 - alpha_bar)
    return snr.clamp(max=gamma) / (snr if prediction == "epsilon" else snr + 1)

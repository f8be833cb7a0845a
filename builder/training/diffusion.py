"""The latent-diffusion objective (Rombach 2022) with the family's text and size conditioning (SDXL: Podell 2023)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from builder.config import TrainConfig
from builder.errors import BuilderError
from builder.models.building import Pipeline
from builder.models.families import family_of
from builder.training.data import CropSampler, step_generator, step_seed
from builder.training.vae import to_model
from builder.training.views import View, Views

Perceptual = Callable[[Tensor, Tensor], Tensor]  # images of the model and true ones [B, 3, S, S], -1..1 -> [B]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Prompts:
    """Text embeddings, each prompt encoded once: one row per class, then the unconditional ones.

    A dropped caption becomes what the family takes for no prompt (SDXL: zeros; Stable Diffusion 1.5: ""). With a
    `negative` prompt half of them become that one: a model from scratch has no pretraining to know it from, so it
    learns it as 'unconditional', and guidance at sampling pushes away from what it really stands for.
    """

    def __init__(self, pipeline: Pipeline, prompts: Sequence[str], negative: str, device: torch.device) -> None:
        family = family_of(pipeline)
        with torch.no_grad():
            rows = [family.encode(pipeline, prompt) for prompt in (*prompts, *([negative] if negative else []))]
            rows.append(family.unconditional(pipeline))
        self.hidden = torch.stack([hidden for hidden, _ in rows]).to(device)  # [classes + 1 or 2, 77, D]
        self.pooled = torch.stack([pooled for _, pooled in rows]).to(device)  # [classes + 1 or 2, P]
        self.classes = len(prompts)

    def drop(self, labels: Tensor, share: float, random: torch.Generator) -> Tensor:
        """Rows of the tables for labels [B], a `share` of them replaced by one of the unconditional rows."""
        dropped = torch.rand(len(labels), generator=random) < share
        which = torch.randint(self.classes, len(self.hidden), (len(labels),), generator=random)
        return torch.where(dropped, which, labels)


@dataclasses.dataclass(frozen=True)
class _Drawn:
    """All that chance decides about a step's whole batch."""

    views: list[View]
    posterior: Tensor  # [B, C, s, s], standard normal: the place within the latents' distribution
    noise: Tensor  # [B, C, s, s]
    time: Tensor  # int64 [B]
    text: Tensor  # int64 [B], rows of Prompts

    def part(self, chosen: range) -> _Drawn:
        cut = slice(chosen.start, chosen.stop)
        return _Drawn(*(getattr(self, field.name)[cut] for field in dataclasses.fields(self)))


class DiffusionObjective:
    """Noise (or velocity, Salimans & Ho 2022) is predicted at a random time; min-SNR weights (Hang 2023) if asked.

    Chance is drawn for the whole batch of a step from (seed, step), whatever share of it a process computes.
    """

    def __init__(
        self, pipeline: Pipeline, views: Views, prompts: Prompts, config: TrainConfig, *, seed: int,
        device: torch.device, perceptual: Perceptual | None = None,
    ) -> None:  # fmt: skip
        self.network: nn.Module = pipeline.unet.to(device)
        self.views, self.prompts, self.config, self.perceptual = views, prompts, config, perceptual
        self.seed, self.device, self.precision = seed, device, precision_on(config.precision, device)
        self.family, self.vae = family_of(pipeline), pipeline.vae
        self.scale = pipeline.vae.config.scaling_factor
        side = config.size // 2 ** (len(pipeline.vae.config.block_out_channels) - 1)
        self.shape = (pipeline.vae.config.latent_channels, side, side)
        self.prediction = pipeline.scheduler.config.prediction_type
        if self.prediction not in ("epsilon", "v_prediction"):
            raise BuilderError(
                f"the model predicts '{self.prediction}'", "training knows prediction_type epsilon and v_prediction"
            )
        self.alpha_bar = pipeline.scheduler.alphas_cumprod.to(torch.float32).cpu()
        self.weights = snr_weights(self.alpha_bar, self.prediction, config.min_snr_gamma)
        self.sampler = CropSampler(views.labels, balanced=config.class_balanced, seed=seed)
        self._last: tuple[int, _Drawn] | None = None

    def losses(self, step: int, part: range) -> dict[str, Tensor]:
        drawn = self._drawn(step).part(part)
        mean, std = (tensor.to(self.device) for tensor in self.views.latents(drawn.views))
        posterior, noise = drawn.posterior.to(self.device), drawn.noise.to(self.device)
        clean = (mean + std * posterior) * self.scale
        signal = self.alpha_bar[drawn.time].sqrt()[:, None, None, None].to(self.device)
        sigma = (1 - self.alpha_bar[drawn.time]).sqrt()[:, None, None, None].to(self.device)
        noisy = signal * clean + sigma * noise
        target = noise if self.prediction == "epsilon" else signal * noise - sigma * clean
        with self._chance_of_its_own(step, part), autocast(self.precision, self.device):
            predicted = self.network(
                noisy,
                drawn.time.to(self.device),
                encoder_hidden_states=self.prompts.hidden[drawn.text.to(self.device)],
                added_cond_kwargs=self._added(drawn),
            ).sample.float()
        error = functional.mse_loss(predicted, target, reduction="none").mean(dim=(1, 2, 3))
        losses = {"loss": (error * self.weights[drawn.time].to(self.device)).mean(), "mse": error.mean().detach()}
        if self.perceptual is not None:
            looks = self._looks(drawn, predicted, noisy, signal, sigma)
            losses["loss"] = losses["loss"] + self.config.perceptual_weight * looks
            losses["perceptual"] = looks.detach()
        return losses

    def _drawn(self, step: int) -> _Drawn:
        if self._last is None or self._last[0] != step:
            random = step_generator(self.seed, "unet", step)
            crops = self.sampler.batch(step, self.config.batch_size)
            shape = (len(crops), *self.shape)
            views = self.views.draw(crops, random)
            large = self._large_numbers(step, random)
            posterior = torch.randn(shape, generator=large, device=large.device)
            noise = torch.randn(shape, generator=large, device=large.device)
            time = torch.randint(0, len(self.alpha_bar), (len(crops),), generator=random)
            text = self.prompts.drop(self.views.labels[crops], self.config.prompt_dropout, random)
            if self.config.noise_offset:  # Guttenberg 2023: whole channels are shifted too, so brightness is learned
                offset = torch.randn((*shape[:2], 1, 1), generator=large, device=large.device)
                noise = noise + self.config.noise_offset * offset
            self._last = step, _Drawn(views, posterior, noise, time, text)
        return self._last[1]

    def _large_numbers(self, step: int, random: torch.Generator) -> torch.Generator:
        """What noise is drawn with: on a GPU a generator there, keyed alike; a CPU would need longer than the step."""
        if self.device.type == "cpu":
            return random
        return torch.Generator(self.device).manual_seed(step_seed(self.seed, "noise", step))

    def _added(self, drawn: _Drawn) -> dict[str, Tensor]:
        """What the family's denoiser wants besides the text: SDXL the pooled embedding and the micro-conditioning."""
        sizes, offsets = self.views.framing(drawn.views)
        pooled = self.prompts.pooled[drawn.text.to(self.device)]
        return self.family.conditioning(pooled, sizes, offsets, (self.config.size, self.config.size))

    def _looks(self, drawn: _Drawn, predicted: Tensor, noisy: Tensor, signal: Tensor, sigma: Tensor) -> Tensor:
        """Perceptual loss of the image that the prediction means, weighted by how much of it was still to be seen
        (alpha_bar): at high noise a small error of the prediction is a large one of the image."""
        if self.prediction == "epsilon":
            clean = (noisy - sigma * predicted) / signal
        else:
            clean = signal * noisy - sigma * predicted
        decoded = self.vae.decode(clean / self.scale).sample.float()
        true = to_model(self.views.pixels(drawn.views)).to(self.device)
        assert self.perceptual is not None
        return (self.perceptual(decoded, true) * signal.flatten().square()).mean()

    @contextmanager
    def _chance_of_its_own(self, step: int, part: range) -> Iterator[None]:
        """Dropout (LoRA's) within the block is a function of the step and the part; outside no chance is used up."""
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(step_seed(self.seed, "dropout", step, part.start))
            yield


def precision_on(precision: str, device: torch.device) -> str:
    """bf16, fp16 or fp32, for `train.precision`."""
    if precision != "auto":
        return precision
    return "bf16" if device.type == "cuda" else "fp32"


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """Arithmetic in this precision within the block."""
    dtype = DTYPES.get(precision, torch.bfloat16)
    return torch.autocast(device.type, dtype, enabled=precision in DTYPES)


def snr_weights(alpha_bar: Tensor, prediction: str, gamma: float) -> Tensor:
    """Loss weights by time, float32 [T]: min(SNR, gamma) / SNR for noise, / (SNR + 1) for velocity; ones at gamma 0."""
    if not gamma:
        return torch.ones_like(alpha_bar)
    snr = alpha_bar / (1 - alpha_bar)
    return snr.clamp(max=gamma) / (snr if prediction == "epsilon" else snr + 1)


class Autocasting(nn.Module):
    """A denoiser of which every call computes in a precision, whatever its weights are: samples while training."""

    def __init__(self, unet: Any, precision: str, device: torch.device) -> None:
        super().__init__()
        self.unet, self.precision, self.on = unet, precision, device

    @property
    def config(self) -> Any:
        return self.unet.config

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with autocast(self.precision, self.on):
            return self.unet(*args, **kwargs)

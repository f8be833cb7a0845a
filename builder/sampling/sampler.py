"""From seeds to pixels: diffusers' sampling, batch after batch, with the prompts encoded once.

In float32 the pixels are those of the family's plain diffusers pipeline called with the same prompts, negative prompt,
scheduler, guidance scale, steps, original and target size (SDXL), and with a list of generators, one per image:
`torch.Generator("cpu").manual_seed(seed)`.
In a lower precision only the denoiser runs in it: the solver's state, the micro-conditioning and the decoder stay in
float32 (the decoder's convolutions then in TF32, on GPUs that have it), so nothing overflows (SDXL's decoder does in
float16) and no step rounds the image.
Where the autoencoder has a grain head (`models.grain`), its grain is added to what plain diffusers decodes, from noise
of the image's own seed (`sampling.grain`).

Attention is torch's scaled_dot_product_attention, which diffusers calls by default; on a GPU weights are channels_last;
the text encoders are let go once the prompts are encoded.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from builder.arithmetic import convolutions
from builder.config import Config, SampleConfig
from builder.errors import BuilderError
from builder.models.families import family_of
from builder.models.grain import head_of
from builder.sampling.class_words import require_class_words
from builder.sampling.device import device_model, dtype_name, is_out_of_memory, resolve_dtype
from builder.sampling.grain import with_grain
from builder.sampling.guidance import guided_steps
from builder.sampling.pixels import blank, to_levels
from builder.sampling.prompts import PromptEmbedding, encode_prompts
from builder.sampling.schedulers import make_scheduler

if TYPE_CHECKING:
    from builder.models.checkpoint import Checkpoint

log = logging.getLogger(__name__)

HIGHER_PRECISION = {
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float32: torch.float64,
}


@dataclass(frozen=True)
class Request:
    """One image to draw: phase code, label in the full class table, seed 0..2^32-1 (see `sampling.seeds`)."""

    code: str
    label: int
    seed: int


@dataclass(frozen=True)
class Batch:
    """Images in the order of their requests.

    pixels: uint8 RGB [N, H, W, 3]. bad: True where latents or pixels were not finite, or the image is black or of one
    colour. original_sizes: side in px that each image was conditioned on. seconds: wall time of the whole batch.
    micro_batch: images that went through the networks at once, all of them but for want of memory.
    """

    pixels: np.ndarray
    bad: list[bool]
    original_sizes: list[int]
    seconds: float
    micro_batch: int


@dataclass(frozen=True)
class _Condition:
    """The denoiser's conditioning of N images: token states [N, tokens, width] and the family's added inputs."""

    hidden: torch.Tensor
    added: dict[str, torch.Tensor]

    @classmethod
    def joined(cls, first: _Condition, second: _Condition) -> _Condition:
        added = {key: torch.cat([first.added[key], second.added[key]]) for key in first.added}
        return cls(torch.cat([first.hidden, second.hidden]), added)


class Sampler:
    """Draws images of given seeds from a pipeline.

    pipeline: of any family. prompts: prompt by phase code. original_sizes: sides (px) of the training
    crops by phase code, e.g. quantiles; an image is conditioned on entry `seed % len` of its phase's, or on its own
    size where there are none. device: a torch device. dtype: of the denoiser; None resolves `config.dtype`.

    The pipeline's UNet and VAE are moved to the device, and into evaluation mode, in place; its text encoders are used
    where they are, and no longer once this returns. BuilderError for an unknown scheduler or dtype, and for a size that
    the autoencoder cannot make.
    """

    def __init__(
        self,
        pipeline: Any,
        config: SampleConfig,
        prompts: dict[str, str],
        original_sizes: dict[str, list[int]],
        device: str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> None:
        self.config = config
        self.prompts = prompts
        self.original_sizes = original_sizes
        self.device = torch.device(device)
        self.dtype = dtype or resolve_dtype(config.dtype, device)
        self._family = family_of(pipeline)
        self.scheduler_config = dict(pipeline.scheduler.config)
        make_scheduler(config.scheduler, self.scheduler_config)  # refuse an unknown name now, not at the first batch
        self._shrink = 2 ** (len(pipeline.vae.config.block_out_channels) - 1)
        _require_multiple(config.size, self._shrink)
        embeddings = encode_prompts(pipeline, prompts, config.negative_prompt)
        self._embeddings = embeddings.to(self.device)
        layout = torch.channels_last if self.device.type == "cuda" else torch.preserve_format
        self._unet: Any = _move(pipeline.unet.eval(), self.device, self.dtype, memory_format=layout)
        self._vae: Any = _move(pipeline.vae.eval(), self.device, torch.float32, memory_format=layout)
        if (head := head_of(self._vae)) is not None:
            _move(head.eval(), self.device, torch.float32, memory_format=layout)
        self._fits: dict[bool, int] = {}  # the largest micro-batch since memory ran out, by `precise`
        if config.compile:
            compile_blocks(self._unet)

    @property
    def dtype_name(self) -> str:
        """The denoiser's dtype, as the manifest records it."""
        return dtype_name(self.dtype)

    @property
    def device_model(self) -> str:
        """The device's model, as the manifest records it."""
        return device_model(str(self.device))

    def original_size(self, code: str, seed: int) -> int:
        """Side in px that an image of a phase is conditioned on."""
        sizes = self.original_sizes.get(code)
        return sizes[seed % len(sizes)] if sizes else self.config.size

    def generate(self, requests: Sequence[Request], precise: bool = False, micro_batch: int | None = None) -> Batch:
        """Draw one batch. Pixels are the same whenever the same batch is drawn on the same kind of machine.

        The batch is denoised as it is given; pass whole batches of the plan, as pixels depend on batch membership.
        `precise` runs denoiser and decoder in the next higher precision: the second try of a batch with bad images.
        Where the device's memory runs out, the batch is drawn in parts of half as many images, and so are those after
        it: the result says so, because pixels depend on that too. `micro_batch` replays such a batch.
        BuilderError where not even this, or a single image, fits.
        """
        self._require_known(requests)
        started = time.perf_counter()
        size = micro_batch or min(self._fits.get(precise, len(requests)), len(requests))
        while (drawn := self._tried(requests, precise, size)) is None:
            if micro_batch or size == 1:
                raise BuilderError(
                    f"the memory of {self.device_model} is too small for {size} image{'s' * (size > 1)} of "
                    f"{self.config.size} px at once",
                    "free it of other programs, take a smaller sample.size, or a device with more (`builder doctor`)",
                )
            fewer = -(-size // 2)
            log.warning(
                "out of memory with %d images at once on %s: on with %d, which the manifest records as micro_batch; "
                "sample.batch_size=%d would be as fast and give the same pixels everywhere",
                size, self.device_model, fewer, fewer,
            )  # fmt: skip
            size = self._fits[precise] = fewer
        pixels, bad = drawn
        sizes = [self.original_size(request.code, request.seed) for request in requests]
        return Batch(pixels.cpu().numpy(), bad.tolist(), sizes, time.perf_counter() - started, size)

    def _require_known(self, requests: Sequence[Request]) -> None:
        for request in requests:
            if request.code not in self._embeddings.positive:
                known = ", ".join(self._embeddings.positive)
                raise BuilderError(f"no prompt was given for phase '{request.code}'", f"the sampler knows {known}")

    @torch.inference_mode()
    def _tried(self, requests: Sequence[Request], precise: bool, size: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """(uint8 [N, H, W, 3], bad [N]) on the device, drawn `size` images at a time; None when memory runs out."""
        try:
            with self._precision(precise) as dtypes:
                parts = [self._draw(requests[at : at + size], *dtypes) for at in range(0, len(requests), size)]
                pixels, bad = (torch.cat(part) for part in zip(*parts, strict=True))
                return pixels, bad
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            # Its traceback holds the tensors that took the memory; it is gone once this block is left.
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return None

    def _draw(
        self, requests: Sequence[Request], dtype: torch.dtype, vae_dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        latents = self._denoise(self._noise(requests), self._conditions(requests, dtype), dtype)
        smooth = self._decode(latents.to(vae_dtype))
        decoded = self._with_grain(smooth, requests)
        finite = torch.isfinite(latents).flatten(1).all(1) & torch.isfinite(decoded).flatten(1).all(1)
        levels = to_levels(decoded)
        bad = ~finite | blank(levels)
        if decoded is not smooth:  # grain upon a failed image would hide that it has one colour
            bad |= blank(to_levels(smooth))
        return levels, bad

    @contextmanager
    def _precision(self, higher: bool) -> Iterator[tuple[torch.dtype, torch.dtype]]:
        """Dtypes of denoiser and decoder. Widening and narrowing again leaves every weight as it was."""
        if not higher:
            yield self.dtype, torch.float32
            return
        dtype, vae_dtype = HIGHER_PRECISION[self.dtype], torch.float64
        try:
            _move(self._unet, dtype)
            self._move_decoder(vae_dtype)
            yield dtype, vae_dtype
        finally:
            _move(self._unet, self.dtype)
            self._move_decoder(torch.float32)

    def _move_decoder(self, dtype: torch.dtype) -> None:
        """The autoencoder, and its grain head where it has one."""
        for part in (self._vae, head_of(self._vae)):
            if part is not None:
                _move(part, dtype)

    def _with_grain(self, decoded: torch.Tensor, requests: Sequence[Request]) -> torch.Tensor:
        """The images with the grain of their seeds; the very same tensor where the autoencoder has no grain head."""
        with convolutions(tf32=self.dtype != torch.float32):
            return with_grain(self._vae, decoded, [request.seed for request in requests])

    def _noise(self, requests: Sequence[Request]) -> torch.Tensor:
        """Standard normal latents [N, C, h, w], float32, each from the CPU generator of its seed."""
        side = self.config.size // self._shrink
        shape = (1, self._unet.config.in_channels, side, side)
        noise = [torch.randn(shape, generator=torch.Generator("cpu").manual_seed(request.seed)) for request in requests]
        return torch.cat(noise).to(self.device)

    def _conditions(self, requests: Sequence[Request], dtype: torch.dtype) -> tuple[_Condition, _Condition]:
        """(negative, positive) conditioning of a batch."""
        sizes = [self.original_size(request.code, request.seed) for request in requests]
        positive = [self._embeddings.positive[request.code] for request in requests]
        negative = [self._embeddings.negative] * len(requests)
        return self._condition(negative, sizes, dtype), self._condition(positive, sizes, dtype)

    def _condition(self, embeddings: Sequence[PromptEmbedding], sizes: Sequence[int], dtype: torch.dtype) -> _Condition:
        hidden = torch.stack([embedding.hidden for embedding in embeddings]).to(dtype)
        pooled = torch.stack([embedding.pooled for embedding in embeddings]).to(dtype)
        # A phase's crops are squares cut whole: their top and left are 0.
        squares, target = [(side, side) for side in sizes], (self.config.size, self.config.size)
        return _Condition(hidden, self._family.conditioning(pooled, squares, [(0, 0)] * len(sizes), target))

    def _denoise(
        self, noise: torch.Tensor, conditions: tuple[_Condition, _Condition], dtype: torch.dtype
    ) -> torch.Tensor:
        """Solve the probability-flow ODE from noise to clean latents [N, C, h, w] in float32."""
        scheduler = make_scheduler(self.config.scheduler, self.scheduler_config)
        scheduler.set_timesteps(self.config.steps, device=self.device)
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(0)  # else the solver looks its first step up on the device, and waits for it
        negative, positive = conditions
        both = _Condition.joined(negative, positive)
        latents = noise * scheduler.init_noise_sigma
        guided = guided_steps(scheduler, self.config.guidance, self.config.guidance_interval)
        for timestep, both_halves in zip(scheduler.timesteps, guided, strict=True):
            model_input = scheduler.scale_model_input(latents, timestep).to(dtype)
            if both_halves:
                prediction = self._unet_output(torch.cat([model_input] * 2), timestep, both)
                without, prompted = prediction.chunk(2)
                prediction = without + self.config.guidance * (prompted - without)  # Ho & Salimans 2022
            else:
                prediction = self._unet_output(model_input, timestep, positive)
            latents = scheduler.step(prediction, timestep, latents, return_dict=False)[0]
        return latents

    def _unet_output(self, model_input: torch.Tensor, timestep: torch.Tensor, condition: _Condition) -> torch.Tensor:
        output = self._unet(
            model_input,
            timestep,
            encoder_hidden_states=condition.hidden,
            added_cond_kwargs=condition.added,
            return_dict=False,
        )
        return output[0].float()

    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Images [N, 3, H, W] around -1..1."""
        config = self._vae.config
        if config.latents_mean is not None and config.latents_std is not None:
            mean, deviation = latents.new_tensor([config.latents_mean, config.latents_std])[:, None, :, None, None]
            latents = latents * deviation / config.scaling_factor + mean
        else:
            latents = latents / config.scaling_factor
        with convolutions(tf32=self.dtype != torch.float32):
            return self._vae.decode(latents, return_dict=False)[0]


def load_sampler(checkpoint: Checkpoint, config: Config, device: str = "cpu") -> Sampler:
    """A sampler of a checkpoint, set up by `config.sample`, asked with the prompts of `config.classes`.

    BuilderError when the checkpoint's tokenizer cuts a class word off.
    """
    from builder.models.load import load_pipeline

    pipeline = load_pipeline(checkpoint, "cpu", torch.float32)  # text encoders and decoder: exact, and off the GPU
    require_class_words([pipeline.components[name] for name in family_of(pipeline).tokenizers], config.classes)
    prompts = {phase.code: phase.prompt for phase in config.classes}
    return Sampler(pipeline, config.sample, prompts, checkpoint.original_sizes, device)


def compile_blocks(unet: Any) -> None:
    """Compile the denoiser's repeated blocks, for each shape they meet and without autotuning.

    Autotuning would choose kernels by the clock, and kernels of any shape by which came first: bits would follow.
    BuilderError for a denoiser that has no such blocks.
    """
    torch._dynamo.config.recompile_limit = 64  # widths x resolutions x guided or not x precision; the default is 8
    try:
        unet.compile_repeated_blocks(fullgraph=True, dynamic=False)
    except ValueError as error:  # a denoiser without transformer blocks
        raise BuilderError(f"sample.compile: {error}", "set it to false") from None


def _move(module: torch.nn.Module, *to: Any, **keywords: Any) -> torch.nn.Module:
    """`module.to(...)` without the warning that diffusers' own logs at every cast."""
    return torch.nn.Module.to(module, *to, **keywords)


def _require_multiple(size: int, shrink: int) -> None:
    if size < shrink or size % shrink:
        raise BuilderError(
            f"sample.size {size} is not a multiple of the autoencoder's {shrink}",
            f"choose a multiple of {shrink}, best the size that the checkpoint was trained at",
        )

"""Part b: images a second of SDXL at its full width, beside plain diffusers with the same weights."""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import numpy as np
import torch

from builder.config import PRESETS, SampleConfig, load_config
from builder.job.devices import prepare
from builder.models.families import with_parts
from builder.sampling.guidance import evaluations
from builder.sampling.sampler import Sampler, compile_blocks
from builder.sampling.schedulers import make_scheduler
from tests.acceptance.gpu.faults import requests
from tests.acceptance.gpu.measure import free, measured
from tests.acceptance.gpu.models import decoder_flops, denoiser_flops, parameters, random_sdxl
from tests.acceptance.gpu.setting import Result, Setting, Step

TABLE = "images a second"
BATCHES = (8, 32, 64, 1, 16, 4, 2)  # most telling first
PLAIN = (8, 32)
FEW = 4  # steps, without guidance
PROMPTS = {"I": "inflammatory wound", "P": "proliferative wound", "R": "remodeling wound"}
SIZES = [300, 512, 800]  # px that images are conditioned on


def steps(setting: Setting) -> list[Step]:
    drawing = Generation(setting)
    batches, plain = setting.pick((BATCHES, PLAIN), ((2,), (2,)))
    big = setting.pick(32, 2)
    found = [Step("peak", "the device", drawing.peak, 60), Step("model", "the device", drawing.model, 60)]
    for batch in batches:
        found.append(
            Step(f"ours {batch}", TABLE, lambda batch=batch: drawing.ours(f"{drawing.draws} steps", batch), 60)
        )
        if batch in plain:
            found.append(Step(f"plain {batch}", TABLE, lambda batch=batch: drawing.plain(batch), 45))
    found += [
        Step(f"{FEW} steps", TABLE, lambda: drawing.ours(f"{FEW} steps, not guided", big, steps=FEW, guidance=1.0), 30),
        *(Step(name, TABLE, lambda name=name: drawing.preset(name, big), 45) for name in PRESETS),
        Step("higher precision", "an image that is not finite", drawing.precise, 60),
        Step("higher precision without room", "an image that is not finite", drawing.precise_without_room, 60),
        Step("compiled", TABLE, lambda: drawing.compiled(setting.pick(8, 2)), 120),
    ]
    return found


class Generation:
    """The model is made once, by the first step that needs it; each method is a step."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.size = setting.pick(512, 64)
        self.draws = setting.pick(25, 2)
        self.peak_flops: float | None = None

    @cached_property
    def device(self) -> str:
        if self.setting.cuda:
            return prepare(0)
        torch.set_num_threads(1)
        return "cpu"

    @cached_property
    def pipeline(self) -> Any:
        _ = self.device
        return random_sdxl(self.setting, self.size)

    @cached_property
    def flops(self) -> tuple[int, int]:
        """Of one pass of the denoiser over one image, and of decoding one."""
        side = self.size // 8
        return denoiser_flops(self.pipeline.unet, side), decoder_flops(self.pipeline.vae, side)

    def peak(self) -> Result:
        """The rate of large products of matrices, which is what shares of the peak below refer to."""
        _ = self.device
        side = self.setting.pick(8192, 128)
        factors = [torch.randn(side, side, device=self.setting.device, dtype=torch.bfloat16) for _ in range(2)]
        copies = torch.empty(self.setting.pick(2**31, 2**20), dtype=torch.uint8, device=self.setting.device)

        def products(times: int) -> None:
            for _ in range(times):
                torch.matmul(*factors)

        products(3)
        times = self.setting.pick(30, 2)
        _, seen = measured(self.setting.device, lambda: products(times))
        self.peak_flops = 2 * side**3 * times / seen["seconds"]
        half = len(copies) // 2
        _, moved = measured(self.setting.device, lambda: [copies[:half].copy_(copies[half:]) for _ in range(20)])
        return {
            "bf16 TFLOP/s": self.peak_flops / 1e12,
            "N products": times,
            "of matrices": f"{side} x {side}",
            "copies GB/s": 20 * 2 * half / moved["seconds"] / 1e9,
        }

    def model(self) -> Result:
        """How long the random weights take, how many they are, and what a pass costs."""
        pipeline, seen = measured(self.setting.device, lambda: self.pipeline)
        denoiser, decoder = self.flops
        return {
            "seconds to make": seen["seconds"],
            "parameters of the denoiser": parameters(pipeline.unet),
            "of the decoder and encoder": parameters(pipeline.vae),
            "of the text encoders": parameters(pipeline.text_encoder) + parameters(pipeline.text_encoder_2),
            "GFLOP a pass": denoiser / 1e9,
            "GFLOP to decode": decoder / 1e9,
            "px": self.size,
        }

    @cached_property
    def _first(self) -> Sampler:
        """The sampler that all others share their networks with; the text encoders are let go of, as in a job."""
        config = SampleConfig(size=self.size, steps=self.draws)
        sampler = Sampler(self.pipeline, config, PROMPTS, dict.fromkeys(PROMPTS, SIZES), self.device)
        self.pipeline.text_encoder = self.pipeline.text_encoder_2 = None
        free(self.setting.device)
        return sampler

    def sampler(self, **changes: Any) -> Sampler:
        """A sampler of the model with these settings."""
        sampler = copy.copy(self._first)
        sampler.config = dataclasses.replace(sampler.config, **changes)
        sampler._fits = {}
        return sampler

    def ours(self, what: str, batch: int, **changes: Any) -> Result:
        """One batch after a warm one of two steps."""
        sampler = self.sampler(**{**changes, "batch_size": batch})
        asked = requests(batch)
        self._warm(sampler, batch)
        times = 1 if self.setting.miniature else max(1, min(4, 8 // batch))
        drawn, seen = measured(self.setting.device, lambda: [sampler.generate(asked) for _ in range(times)][-1])
        passes = evaluations(sampler.config, sampler.scheduler_config)
        side = self.size // 8
        with torch.inference_mode():
            few = min(8, drawn.micro_batch)
            latents = torch.randn(few, 4, side, side, device=self.setting.device)
            _, decoding = measured(self.setting.device, lambda: sampler._decode(latents))
        row = {
            **self._row(f"ours, {what}", batch, batch * times, seen, passes),
            "micro_batch": drawn.micro_batch,
            "decoding s/batch": decoding["seconds"] * batch / few,
            "bad": sum(drawn.bad),
        }
        free(self.setting.device)
        return {"rows": [row]}

    def _warm(self, sampler: Sampler, batch: int) -> None:
        config = sampler.config
        sampler.config = dataclasses.replace(config, steps=2)
        sampler.generate(requests(batch))
        sampler.config = config

    def _row(self, what: str, batch: int, images: int, seen: dict[str, Any], passes: int) -> dict[str, Any]:
        denoiser, decoder = self.flops
        done = images * (passes * denoiser + decoder)
        return {
            "what": what, "batch": batch, "N": images, "images/s": images / seen["seconds"], "passes/image": passes,
            "TFLOP/s": done / seen["seconds"] / 1e12,
            "share of peak": done / seen["seconds"] / self.peak_flops if self.peak_flops else None, **seen,
        }  # fmt: skip

    def plain(self, batch: int) -> Result:
        """diffusers' own pipeline, weights and decoder in bf16, with torch's default settings; and how far apart."""
        sampler = self.sampler()
        dtype = sampler.dtype
        decoder = copy.deepcopy(sampler._vae).to(dtype)
        pipeline = with_parts(
            self.pipeline, vae=decoder, scheduler=make_scheduler(sampler.config.scheduler, sampler.scheduler_config)
        )
        pipeline.set_progress_bar_config(disable=True)
        asked = requests(batch)
        embedded = sampler._embeddings
        positive = [embedded.positive[request.code] for request in asked]
        negative = [embedded.negative] * batch

        def call(draws: int) -> Any:
            return pipeline(
                prompt_embeds=torch.stack([one.hidden for one in positive]).to(dtype),
                pooled_prompt_embeds=torch.stack([one.pooled for one in positive]).to(dtype),
                negative_prompt_embeds=torch.stack([one.hidden for one in negative]).to(dtype),
                negative_pooled_prompt_embeds=torch.stack([one.pooled for one in negative]).to(dtype),
                num_inference_steps=draws, guidance_scale=sampler.config.guidance, height=self.size, width=self.size,
                generator=[torch.Generator("cpu").manual_seed(request.seed) for request in asked], output_type="np",
                original_size=(SIZES[0], SIZES[0]), target_size=(self.size, self.size),
            ).images  # fmt: skip

        with _default_arithmetic():
            call(2)
            images, seen = measured(self.setting.device, lambda: call(self.draws))
        passes = 2 * self.draws
        row = self._row(f"plain diffusers, {self.draws} steps", batch, batch, seen, passes)
        same = self.sampler()
        same.original_sizes = dict.fromkeys(PROMPTS, SIZES[:1])
        few = asked[: min(4, batch)]
        apart = np.abs(same.generate(few).pixels.astype(float) - (images[: len(few)] * 255).round())
        free(self.setting.device)
        return {"rows": [row], f"mean difference to ours at the same seeds, levels, N {len(few)}": float(apart.mean())}

    def preset(self, name: str, batch: int) -> Result:
        """One of configs/presets, at SDXL's guidance."""
        chosen = load_config(None, [], name).sample
        changes = {"steps": chosen.steps, "guidance_interval": chosen.guidance_interval}
        if self.setting.miniature:
            changes["steps"] = 2
        return self.ours(f"preset {name} ({changes['steps']} steps)", batch, **changes)

    def compiled(self, batch: int) -> Result:
        """`sample.compile`: the repeated blocks. The first batch compiles."""
        plain = self.sampler(batch_size=batch).generate(requests(batch)).pixels
        started = time.perf_counter()
        sampler = self.sampler(batch_size=batch, compile=True)
        if not self.setting.miniature:  # where it takes longer than all the rest
            compile_blocks(sampler._unet)
        self._warm(sampler, batch)
        seconds = time.perf_counter() - started
        drawn, seen = measured(self.setting.device, lambda: sampler.generate(requests(batch)))
        passes = evaluations(sampler.config, sampler.scheduler_config)
        row = self._row(f"ours, compiled, {self.draws} steps", batch, batch, seen, passes)
        apart = np.abs(drawn.pixels.astype(int) - plain)
        return {"rows": [row], "seconds to compile": seconds, "mean difference to not compiled": float(apart.mean()),
                "played": self.setting.miniature}  # fmt: skip

    def precise(self) -> Result:
        """Two steps of a batch in the next higher precision: memory, seconds."""
        batch = self.setting.pick(8, 2)
        sampler = self.sampler(batch_size=batch, steps=2)
        usual, before = measured(self.setting.device, lambda: sampler.generate(requests(batch)))
        drawn, seen = measured(self.setting.device, lambda: sampler.generate(requests(batch), precise=True))
        return {"images": batch, "usual s": before["seconds"], "usual peak GB": before["peak allocated GB"], **seen,
                "bad": sum(drawn.bad), "usual bad": sum(usual.bad), "micro_batch": drawn.micro_batch}  # fmt: skip

    def precise_without_room(self) -> Result:
        """What a batch that is not finite ends in on a device that has no room for higher precision."""
        if not self.setting.cuda:
            return {"skipped": "needs a GPU"}
        sampler = self.sampler(batch_size=4, steps=2)
        sampler.generate(requests(4))
        free("cuda")
        total = torch.cuda.get_device_properties(0).total_memory
        limit = torch.cuda.memory_reserved() + 4e9
        try:
            torch.cuda.set_per_process_memory_fraction(limit / total)
            said = _outcome(lambda: sampler.generate(requests(4), precise=True))
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        dtypes = sorted({str(parameter.dtype) for parameter in sampler._unet.parameters()})
        afterwards = _outcome(lambda: sampler.generate(requests(4)))
        return {"limit GB": limit / 1e9, "outcome": said, "dtypes of the denoiser afterwards": dtypes,
                "dtypes of the decoder": sorted({str(p.dtype) for p in sampler._vae.parameters()}),
                "the next batch": afterwards}  # fmt: skip


def _outcome(call: Callable[[], Any]) -> str:
    try:
        batch = call()
        return f"drawn, micro_batch {batch.micro_batch}, {sum(batch.bad)} bad"
    except Exception as error:  # whatever it is: that is the finding
        return f"{type(error).__name__}: {str(error).splitlines()[0][:300]}"


@contextmanager
def _default_arithmetic() -> Iterator[None]:
    """Within the block torch computes as it does where nobody asks for anything."""
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.allow_tf32
    cudnn.deterministic, cudnn.allow_tf32 = False, True
    try:
        yield
    finally:
        cudnn.deterministic, cudnn.allow_tf32 = before

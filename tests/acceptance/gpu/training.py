"""Part c: steps of training at SDXL's full width, through the product's own loop and as a bare forward and backward."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from builder.config import Config, LoraConfig, ModelConfig, TrainConfig
from builder.models.checkpoint import Checkpoint, save_checkpoint
from builder.training.diffusion import DiffusionObjective, Prompts, autocast, precision_on
from builder.training.processes import Processes
from builder.training.stage import Stage
from builder.training.start import make_trainable, narrow_frozen
from builder.training.states import States
from builder.training.views import View
from tests.acceptance.gpu.measure import free, measured, peak_resident_gb, synchronize
from tests.acceptance.gpu.models import denoiser_flops, denoiser_inputs, parameters, random_sdxl
from tests.acceptance.gpu.setting import Result, Setting, Step

TABLE = "images a second of training"
BATCHES = (8, 16, 4, 1)
CROPS = 64
WARM, STEPS = 2, 6
PROMPTS = ("inflammatory wound", "proliferative wound", "remodeling wound")


def steps(setting: Setting) -> list[Step]:
    training = Training(setting)
    found = []
    for method in ("lora", "full"):
        for batch in setting.pick(BATCHES, (2,)):
            for recomputed in setting.pick((True, False), (method == "lora",)):
                name = f"{method} {batch}" + (" recomputed" if recomputed else "")
                run = training.step(method, batch, recomputed)
                found.append(Step(name, TABLE, run, 60))
        found.append(Step(f"{method} state", "on disk", lambda method=method: training.state(method), 60))
    return found


class RandomViews:
    """Latents of crops that nobody cut: `builder.training.views.Views` without images."""

    def __init__(self, channels: int, side: int, size: int) -> None:
        random = torch.Generator().manual_seed(0)
        self.labels = torch.arange(CROPS) % len(PROMPTS)
        self.native = torch.full((CROPS, 2), size)
        self.patients: list[str] = []
        self.mean = torch.randn(CROPS, channels, side, side, generator=random)
        self.std = torch.full_like(self.mean, 0.1)
        self.size = size

    def draw(self, crops: Tensor, random: torch.Generator) -> list[View]:
        return [View(crop, 0, 0, self.size) for crop in crops.tolist()]

    def pixels(self, views: Sequence[View]) -> Tensor:
        raise NotImplementedError("nothing here has pixels: train without a perceptual loss")

    def latents(self, views: Sequence[View]) -> tuple[Tensor, Tensor]:
        places = torch.tensor([view.crop for view in views])
        return self.mean[places], self.std[places]

    def framing(self, views: Sequence[View]) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        return [(self.size, self.size)] * len(views), [(0, 0)] * len(views)


class Training:
    """One model at a time: the LoRA's frozen weights are in bf16, those of full training in float32."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.size = setting.pick(512, 64)
        self.warm, self.steps = setting.pick((WARM, STEPS), (0, 1))
        self.method = ""
        self.stage: Stage | None = None
        self.pipeline: Any = None
        self.unet: Any = None

    @cached_property
    def processes(self) -> Processes:
        return Processes(self.setting.device)

    def _config(self, method: str, batch: int) -> Config:
        train = TrainConfig(size=self.size, batch_size=batch, steps=10_000, warmup_steps=100)
        return Config(model=ModelConfig(method=method, lora=LoraConfig(rank=16, alpha=16)), train=train)

    def _prepared(self, method: str) -> None:
        """The pipeline of a method, as `builder train` prepares it."""
        if self.method == method:
            return
        self.stage = self.pipeline = self.unet = None
        self.processes.accelerator.free_memory()  # it keeps what it has prepared
        free(self.setting.device)
        if not self.setting.cuda:
            torch.set_num_threads(1)
        pipeline = random_sdxl(self.setting, self.size)
        device = self.processes.device
        self.prompts = Prompts(pipeline, PROMPTS, "", device)
        for name in ("text_encoder", "text_encoder_2"):  # as in training, where they never leave the CPU
            getattr(pipeline, name).to("cpu")
        self.flops = denoiser_flops(pipeline.unet, self.size // 8)
        config = self._config(method, 1)
        make_trainable(pipeline, config, device)
        narrow_frozen(pipeline, config, device)
        self.unet = pipeline.unet
        self.views = RandomViews(pipeline.vae.config.latent_channels, self.size // 8, self.size)
        self.pipeline, self.method = pipeline, method
        free(self.setting.device)

    def _stage(self, method: str, batch: int) -> Stage:
        """Optimizer and average are made once a method; batch and objective change."""
        config = self._config(method, batch)
        device = self.processes.device
        objective = DiffusionObjective(
            self.pipeline, self.views, self.prompts, config.train, seed=0, device=device
        )  # fmt: skip
        train = config.train
        if self.stage is None:
            self.stage = Stage(
                "unet", objective, steps=train.steps, batch_size=batch, learning_rate=train.learning_rate,
                warmup_steps=train.warmup_steps, weight_decay=train.weight_decay, grad_norm=train.grad_norm,
                ema_decay=train.ema_decay, precision=precision_on(train.precision, device), processes=self.processes,
            )  # fmt: skip
        else:
            objective.network = self.stage.division.network
            self.stage.objective, self.stage.batch_size, self.stage.parts = objective, batch, [range(batch)]
        return self.stage

    def step(self, method: str, batch: int, recomputed: bool) -> Any:
        return lambda: self._measured(method, batch, recomputed)

    def _measured(self, method: str, batch: int, recomputed: bool) -> Result:
        self._prepared(method)
        switch = "enable_gradient_checkpointing" if recomputed else "disable_gradient_checkpointing"
        getattr(self.unet, switch)()
        for parameter in self.unet.parameters():  # of a step that found no memory
            parameter.grad = None
        free(self.setting.device)
        bare_seconds, bare = self._bare(batch)
        stage = self._stage(method, batch)
        for _ in range(self.warm):
            stage.train_step()
        seconds: list[float] = []
        losses: list[float] = []

        def loop() -> None:
            for _ in range(self.steps):
                began = time.perf_counter()
                losses.append(stage.train_step()["loss"])
                synchronize(self.setting.device)
                seconds.append(time.perf_counter() - began)

        _, seen = measured(self.setting.device, loop)
        median = statistics.median(seconds)
        done = batch * self.flops * (4 if recomputed else 3)
        row = {
            "method": "LoRA, rank 16" if method == "lora" else "all weights",
            "batch": batch,
            "recomputed": recomputed,
            "N steps": self.steps,
            "s/step": median,
            "images/s": batch / median,
            "bare s/step": bare_seconds,
            "ratio": median / bare_seconds,
            "TFLOP/s": done / median / 1e12,
            **{key: value for key, value in seen.items() if key != "seconds"},
            "bare peak GB": bare["peak allocated GB"],
            "loss": losses[-1],
        }
        free(self.setting.device)
        trained = sum(p.numel() for p in self.unet.parameters() if p.requires_grad)
        return {"rows": [row], "parameters": parameters(self.unet), "trained": trained}

    def _bare(self, batch: int) -> tuple[float, dict[str, Any]]:
        """Forward and backward of the same denoiser on inputs that lie on the device: no optimizer, no average."""
        device = self.processes.device
        inputs = denoiser_inputs(self.unet, batch, self.size // 8, device, torch.float32)
        target = torch.randn_like(inputs["sample"])
        precision = precision_on("auto", device)

        def once() -> None:
            with autocast(precision, device):
                predicted = self.unet(**inputs).sample
            functional.mse_loss(predicted.float(), target).backward()
            for parameter in self.unet.parameters():
                parameter.grad = None

        for _ in range(self.warm):
            once()
        seconds: list[float] = []

        def loop() -> None:
            for _ in range(self.steps):
                began = time.perf_counter()
                once()
                synchronize(self.setting.device)
                seconds.append(time.perf_counter() - began)

        _, seen = measured(self.setting.device, loop)
        return statistics.median(seconds), seen

    def state(self, method: str) -> Result:
        """A state to resume from and a checkpoint, written once; of all weights no state, which is 41 GB."""
        self._prepared(method)
        stage = self._stage(method, 1)
        folder = self.setting.scratch / f"state-{method}"
        found: Result = {}
        if method == "lora" or self.setting.miniature:
            _, seen = measured(
                self.setting.device, lambda: States(folder / "state", "gpu").save("unet", 1, stage.state_dict())
            )
            found |= {"state s": seen["seconds"], "state GB": _gigabytes(folder / "state")}
        if self.setting.seconds_left < 30 and not self.setting.miniature:
            return {**found, "checkpoint": "no time was left"}
        before = torch.cuda.memory_allocated() / 1e9 if self.setting.cuda else None
        description = dataclasses.replace(
            Checkpoint(folder / "checkpoint"), method=method, prompts=dict(zip("IPR", PROMPTS, strict=True))
        )
        _, seen = measured(self.setting.device, lambda: save_checkpoint(self.pipeline, description))
        return {
            **found,
            "checkpoint s": seen["seconds"],
            "checkpoint GB": _gigabytes(folder / "checkpoint"),
            "GPU GB before": before,
            "GPU GB at the peak": seen["peak allocated GB"],
            "host peak GB": peak_resident_gb(),
        }


def _gigabytes(folder: Path) -> float:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e9

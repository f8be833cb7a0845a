"""Gradients, optimizer states and float32 weights divided over the processes, and kept on the CPU: DeepSpeed's ZeRO-2
(Rajbhandari 2020) with offload (Ren 2021).

Each process computes with all weights, in bf16 where `train.precision` says so: they are the rounded ones of the
float32 weights that are trained. The optimizer is torch's fused AdamW on the CPU, not DeepSpeedCPUAdam: it is compiled
already, and it counts the bias correction from the number of the step, so that a resumed run is bit for bit the same.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from builder.errors import BuilderError
from builder.training.diffusion import Autocasting
from builder.training.division import Divided, MakeOptimizer, moved, require_adamw, trained_of
from builder.training.processes import Processes

OWN_KEYS = ("optimizer", "scheduler")  # of DeepSpeed's config: train.* says them


class Zero(Divided):
    """A network in DeepSpeed's engine. `pieces`: one flat tensor, this process's part of all trained weights in a row,
    which does not end where a weight ends."""

    def __init__(
        self, network: nn.Module, make: MakeOptimizer, *, grad_norm: float, precision: str, passes: int,
        processes: Processes,
    ) -> None:  # fmt: skip
        import deepspeed

        deepspeed.utils.logger.setLevel(logging.WARNING)
        trained = trained_of(moved(network, processes.device))
        self.names, self.parameters = list(trained), list(trained.values())
        weights = {name: parameter.detach().to("cpu", copy=True) for name, parameter in trained.items()}
        optimizer = make(self.parameters)
        require_adamw(optimizer, "DeepSpeed")
        for group in optimizer.param_groups:
            group["fused"] = True
        self.engine, _, _, _ = deepspeed.initialize(
            # The engine takes autocasting off around it; on top of bf16 weights it keeps norms and sums in float32.
            model=Autocasting(network, precision, processes.device), optimizer=optimizer,
            config=engine_config(passes, grad_norm, precision), dist_init_required=False,
        )  # fmt: skip
        self.network: nn.Module = _Engine(self.engine, processes.device.type)
        self.optimizer = optimizer
        self.pieces = list(self.engine.optimizer.single_partition_of_fp32_groups)
        self.step_device = self.pieces[0].device
        self.scaler = torch.amp.GradScaler(processes.device.type, enabled=False)
        self.processes = processes
        self.load(weights)  # the engine rounded them before it took its float32 copy

    def backward(self, loss: Tensor) -> None:
        """Of each pass; the engine counts them, and takes the step after the last one."""
        self.engine.backward(loss)
        self.engine.step()

    def step(self) -> float:
        """The norm; the engine has clipped and stepped by itself, or left the step out where the norm is not finite."""
        norm = float(self.engine.get_global_grad_norm())
        return norm if norm >= 0 else math.nan  # -1 is its word for it

    @torch.no_grad()
    def whole(self, pieces: list[Tensor]) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_fp32_param

        found = {}
        with self._held(pieces):
            for name, parameter in zip(self.names, self.parameters, strict=True):
                value = safe_get_full_fp32_param(parameter)
                if self.processes.first:
                    found[name] = value.to("cpu", copy=True)
        return found

    @torch.no_grad()
    def own(self, whole: Mapping[str, Tensor]) -> list[Tensor]:
        with self._held(self.pieces):
            self._set(whole)
            return [piece.detach().clone() for piece in self.pieces]

    @torch.no_grad()
    def load(self, weights: Mapping[str, Tensor]) -> None:
        self._set(weights)
        for name, parameter in zip(self.names, self.parameters, strict=True):
            parameter.copy_(weights[name])

    def _set(self, weights: Mapping[str, Tensor]) -> None:
        from deepspeed.utils import safe_set_full_fp32_param

        for name, parameter in zip(self.names, self.parameters, strict=True):
            safe_set_full_fp32_param(parameter, weights[name])

    @contextmanager
    def _held(self, pieces: list[Tensor]) -> Iterator[None]:
        """Within the block the float32 weights are `pieces`: DeepSpeed knows how these lie among all processes."""
        before = [piece.detach().clone() for piece in self.pieces]
        try:
            for own, piece in zip(self.pieces, pieces, strict=True):
                own.copy_(piece)
            yield
        finally:
            for own, saved in zip(self.pieces, before, strict=True):
                own.copy_(saved)


class _Engine(nn.Module):
    """The engine, called outside of any autocasting: it would take that off by itself, with a warning."""

    def __init__(self, engine: Any, device: str) -> None:
        super().__init__()
        self.engine, self.on = engine, device

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast(self.on, enabled=False):
            return self.engine(*args, **kwargs)


def engine_config(passes: int, grad_norm: float, precision: str) -> dict[str, Any]:
    """DeepSpeed's config: what accelerate's config file says, and for the rest `train`.

    BuilderError for another stage than 2, and for what would contradict `train`.
    """
    from accelerate import DeepSpeedPlugin

    config: dict[str, Any] = copy.deepcopy(DeepSpeedPlugin().deepspeed_config)
    zero = config["zero_optimization"]
    if zero["stage"] != 2:
        raise BuilderError(
            f"DeepSpeed's ZeRO stage {zero['stage']} is not used for training",
            "set zero_stage: 2, as configs/accelerate/zero2.yaml does, or launch with configs/accelerate/fsdp.yaml",
        )
    if zero.get("offload_optimizer", {}).get("device") == "nvme":
        raise BuilderError("offload_optimizer_device: nvme is not used for training", "set it to cpu or none")
    if own := [key for key in OWN_KEYS if key in config]:
        raise BuilderError(f"DeepSpeed's config has a section {own[0]}", "take it out: train.* says it")
    if precision == "fp16":
        raise BuilderError(
            "train.precision fp16 is not used with DeepSpeed: the scale of its loss is not in our states",
            "set it to bf16 or fp32, or launch with configs/accelerate/fsdp.yaml",
        )
    for key in ("train_batch_size", "fp16"):
        config.pop(key, None)
    return {
        **config,
        "train_micro_batch_size_per_gpu": 1,  # it only counts with it
        "gradient_accumulation_steps": passes,
        "gradient_clipping": grad_norm,
        "bf16": {"enabled": precision == "bf16", "check_grad_overflow": True},
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
    }

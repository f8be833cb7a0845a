"""Weights, gradients and optimizer states in equal shares over the processes (FSDP, Zhao 2023), by torch's fully_shard.

Accelerate's own wrapper runs on GPUs only; its config file is read all the same. A unit of the network (a residual or
a transformer block) is put together when it is computed, and taken apart again after. The gradients of each pass travel
at once, in float32: kept back until the last one they would be whole in each process, as large as the weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from builder.errors import BuilderError
from builder.training.division import Divided, MakeOptimizer, is_divided, local, moved, require_adamw, step, trained_of
from builder.training.processes import Processes

UNITS = ("BasicTransformerBlock", "ResnetBlock2D")  # diffusers' names; what is in none is a unit of its own


class FullySharded(Divided):
    """A network of which each process holds a share: the same rows (first dimension) of all trained weights."""

    def __init__(
        self, network: nn.Module, make: MakeOptimizer, *, grad_norm: float, loss_scaling: bool, passes: int,
        processes: Processes,
    ) -> None:  # fmt: skip
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        settings, units = _settings(), units_of(network)
        self.mesh = init_device_mesh(processes.device.type, (processes.count,))
        self.network: nn.Module = moved(network, processes.device)
        for unit in units:
            fully_shard(unit, mesh=self.mesh, reshard_after_forward=settings.reshard_after_forward)
        fully_shard(network, mesh=self.mesh)
        trained = trained_of(network)
        self.names, self.parameters = list(trained), list(trained.values())
        self.optimizer = make(self.parameters)
        require_adamw(self.optimizer, "FSDP")
        with torch.no_grad():
            self.pieces = [local(parameter) for parameter in self.parameters]
        self.scaler = torch.amp.GradScaler(processes.device.type, enabled=loss_scaling)
        self.grad_norm, self.passes, self.processes = grad_norm, passes, processes

    def backward(self, loss: Tensor) -> None:
        self.scaler.scale(loss / self.passes).backward()  # torch takes the mean over processes

    def step(self) -> float:
        return step(self.optimizer, self.scaler, self.parameters, self.grad_norm)

    @torch.no_grad()
    def whole(self, pieces: list[Tensor]) -> dict[str, Tensor]:
        from torch.distributed.tensor import DTensor

        found = {}
        for name, like, piece in zip(self.names, self.parameters, pieces, strict=True):
            assert is_divided(like)
            divided = DTensor.from_local(
                piece.to(self.processes.device), self.mesh, like.placements, run_check=False, shape=like.shape,
                stride=like.stride(),
            )  # fmt: skip
            value = divided.full_tensor()
            if self.processes.first:
                found[name] = value.to("cpu", copy=True)
        return found

    @torch.no_grad()
    def own(self, whole: Mapping[str, Tensor]) -> list[Tensor]:
        from torch.distributed.tensor import distribute_tensor

        found = []
        for name, like in zip(self.names, self.parameters, strict=True):
            assert is_divided(like)
            value = whole[name].to(self.processes.device)
            divided = distribute_tensor(value, self.mesh, like.placements, src_data_rank=None)  # all have the value
            found.append(divided.to_local().clone())  # not the whole tensor's memory
        return found

    @torch.no_grad()
    def load(self, weights: Mapping[str, Tensor]) -> None:
        for piece, own in zip(self.pieces, self.own(weights), strict=True):
            piece.copy_(own)


def _settings() -> Any:
    """What accelerate's config file says of FSDP; BuilderError for what is not done, or train.* says."""
    from accelerate import FullyShardedDataParallelPlugin
    from torch.distributed.fsdp import CPUOffloadPolicy

    settings = FullyShardedDataParallelPlugin()
    if settings.fsdp_version != 2:
        raise BuilderError(
            f"FSDP of version {settings.fsdp_version} is not used for training",
            "set fsdp_version: 2, as configs/accelerate/fsdp.yaml does",
        )
    if settings.min_num_params:
        raise BuilderError(
            "fsdp_auto_wrap_policy: SIZE_BASED_WRAP is not used", "set it to TRANSFORMER_BASED_WRAP, which names units"
        )
    if settings.activation_checkpointing:
        raise BuilderError("fsdp_activation_checkpointing is not used", "set train.gradient_checkpointing instead")
    if isinstance(settings.cpu_offload, CPUOffloadPolicy):
        raise BuilderError(
            "fsdp_offload_params is not used", "launch with configs/accelerate/zero2.yaml: it keeps states on the CPU"
        )
    return settings


def units_of(network: nn.Module) -> list[nn.Module]:
    """The modules that are units, inner ones first. BuilderError for names that the network's classes don't have."""
    wanted = _settings().transformer_cls_names_to_wrap or UNITS
    found = [module for module in network.modules() if type(module).__name__ in wanted]
    missing = set(wanted) - {type(module).__name__ for module in found}
    if missing:
        raise BuilderError(
            f"the denoiser has no modules {', '.join(sorted(missing))} (fsdp_transformer_layer_cls_to_wrap)",
            f"give {','.join(UNITS)}",
        )
    return found[::-1]

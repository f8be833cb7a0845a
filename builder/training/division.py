"""How the processes of a run keep the trained weights, with their gradients and optimizer states: whole, or divided.

`Whole` keeps all of it in each process. Divided (`fsdp`, `zero`) each process holds pieces: float32 tensors that are
trained and averaged where they lie. What leaves training is put together first, so states and checkpoints do not tell
how they were made: a run goes on with another number of processes, or divided in another way.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol, TypeGuard

import torch
from torch import Tensor, nn

from builder.errors import BuilderError
from builder.training.ema import Ema
from builder.training.processes import Processes

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

MakeOptimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
MOMENTS = ("exp_avg", "exp_avg_sq")  # of Adam, by its name for them; float32, one number for each weight


class Division(Protocol):
    """A network under training, and how a step of it is taken."""

    network: nn.Module  # what is called
    optimizer: Any  # its param_groups carry the learning rate
    scaler: torch.amp.GradScaler
    pieces: list[Tensor]  # what this process holds of the trained weights, float32; updated in place

    def passing(self) -> AbstractContextManager[None]:
        """One of the passes of a step: forward and backward."""

    def backward(self, loss: Tensor) -> None:
        """Gradients become means over passes and processes."""

    def step(self) -> float:
        """Clip the gradients to the norm given, step, and forget them: the norm that they had, over all processes.

        Where it is not finite the weights stay as they are.
        """

    def whole(self, pieces: list[Tensor]) -> dict[str, Tensor]:
        """Tensors like `pieces`, of all processes, put together by the weights' names: in the first process, else {}.

        All processes take part.
        """

    def own(self, whole: Mapping[str, Tensor]) -> list[Tensor]:
        """The contrary: the pieces that this process holds of whole tensors."""

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Set the trained weights, given whole."""

    def optimizer_state(self) -> dict[str, Any]:
        """As torch.optim.AdamW's over whole weights; in the first process. All processes take part."""

    def load_optimizer_state(self, state: dict[str, Any]) -> None: ...

    def showing(self, shown: nn.Module, average: Ema) -> AbstractContextManager[None]:
        """Within the block `shown` has the averaged weights and can be called: in the first process alone.

        All processes take part. `shown` is what `to_show` gave.
        """


class Whole:
    """Everything in each process; of several, the gradients are averaged (DistributedDataParallel)."""

    def __init__(
        self, network: nn.Module, make: MakeOptimizer, *, grad_norm: float, loss_scaling: bool, passes: int = 1,
        processes: Processes | None = None,
    ) -> None:  # fmt: skip
        trained = trained_of(network)
        self.names, self.parameters = list(trained), list(trained.values())
        self.pieces: list[Tensor] = list(self.parameters)
        self.network, self.optimizer, self.grad_norm = network, make(self.parameters), grad_norm
        self.scaler = torch.amp.GradScaler(self.parameters[0].device.type, enabled=loss_scaling)
        self.processes = processes
        if processes:
            self.network, self.optimizer = processes.prepare(network, self.optimizer, passes)

    def passing(self) -> AbstractContextManager[None]:
        return self.processes.accumulating(self.network) if self.processes else nullcontext()

    def backward(self, loss: Tensor) -> None:
        scaled = self.scaler.scale(loss)
        if self.processes:
            self.processes.backward(scaled)
        else:
            scaled.backward()

    def step(self) -> float:
        return step(self.optimizer, self.scaler, self.parameters, self.grad_norm)

    def whole(self, pieces: list[Tensor]) -> dict[str, Tensor]:
        return dict(zip(self.names, [piece.detach() for piece in pieces], strict=True))

    def own(self, whole: Mapping[str, Tensor]) -> list[Tensor]:
        return [whole[name] for name in self.names]

    @torch.no_grad()
    def load(self, weights: Mapping[str, Tensor]) -> None:
        for piece, own in zip(self.pieces, self.own(weights), strict=True):
            piece.copy_(own)

    def optimizer_state(self) -> dict[str, Any]:
        state: dict[str, Any] = self.optimizer.state_dict()
        return state

    def load_optimizer_state(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state)

    @contextmanager
    def showing(self, shown: nn.Module, average: Ema) -> Iterator[None]:
        """`shown` is the network itself."""
        with average.swapped_in() if self.processes is None or self.processes.first else nullcontext():
            yield


class Divided(ABC):
    """What FSDP and ZeRO have in common: states by AdamW's layout, and a whole copy in the first process to show."""

    names: list[str]
    pieces: list[Tensor]
    optimizer: Any
    processes: Processes
    step_device: torch.device | None = None  # where the optimizer counts its steps; None: on the CPU

    def passing(self) -> AbstractContextManager[None]:
        return nullcontext()

    @abstractmethod
    def whole(self, pieces: list[Tensor]) -> dict[str, Tensor]: ...

    @abstractmethod
    def own(self, whole: Mapping[str, Tensor]) -> list[Tensor]: ...

    def optimized(self) -> list[Tensor]:
        """What the optimizer steps, one for each piece."""
        held: list[Tensor] = [tensor for group in self.optimizer.param_groups for tensor in group["params"]]
        return held

    @torch.no_grad()
    def optimizer_state(self) -> dict[str, Any]:
        group = {key: value for key, value in self.optimizer.param_groups[0].items() if key not in ("params", "fused")}
        groups = [{**group, "fused": None, "params": list(range(len(self.names)))}]
        states = [self.optimizer.state.get(tensor) for tensor in self.optimized()]
        if not states[0]:
            return {"state": {}, "param_groups": groups}
        moments = {moment: self.whole([local(state[moment]) for state in states]) for moment in MOMENTS}
        step = states[0]["step"].cpu()
        state = {
            place: {"step": step.clone(), **{moment: moments[moment][name] for moment in MOMENTS}}
            for place, name in enumerate(self.names if self.processes.first else [])
        }
        return {"state": state, "param_groups": groups}

    @torch.no_grad()
    def load_optimizer_state(self, state: dict[str, Any]) -> None:
        """Steps and moments; the settings are this run's own, and the rate is set at each step."""
        self.optimizer.state.clear()
        if not state["state"]:
            return
        by_name = {name: state["state"][place] for place, name in enumerate(self.names)}
        step = next(iter(by_name.values()))["step"]
        own = {moment: self.own({name: by_name[name][moment] for name in self.names}) for moment in MOMENTS}
        for place, tensor in enumerate(self.optimized()):
            held = self.optimizer.state[tensor]
            held["step"] = step.to(self.step_device or "cpu", copy=True)
            for moment in MOMENTS:
                held[moment] = torch.zeros_like(tensor)
                local(held[moment]).copy_(own[moment][place])

    @contextmanager
    def showing(self, shown: nn.Module, average: Ema) -> Iterator[None]:
        """`shown` is a whole network on the CPU beside the divided one; for the block it goes to the device."""
        weights = self.whole(average.average)
        if not self.processes.first:
            yield
            return
        with torch.no_grad():
            for name, parameter in shown.named_parameters():
                if name in weights:
                    parameter.copy_(weights.pop(name))
        shown.to(self.processes.device)
        try:
            yield
        finally:
            shown.to("cpu")


def divide(
    network: nn.Module, make: MakeOptimizer, *, grad_norm: float, precision: str, passes: int, processes: Processes
) -> Division:
    """Divide a network over processes as `accelerate launch` was told to.

    grad_norm: what gradients are clipped to. precision: bf16, fp16 or fp32. passes: of a step, in each process.
    BuilderError for what cannot be divided, or not so.
    """
    if processes.divided is None:
        return Whole(
            network, make, grad_norm=grad_norm, loss_scaling=precision == "fp16", passes=passes, processes=processes
        )
    if processes.divided == "FSDP":
        from builder.training.fsdp import FullySharded

        return FullySharded(
            network, make, grad_norm=grad_norm, loss_scaling=precision == "fp16", passes=passes, processes=processes
        )
    from builder.training.zero import Zero

    return Zero(network, make, grad_norm=grad_norm, precision=precision, passes=passes, processes=processes)


def step(optimizer: Any, scaler: torch.amp.GradScaler, parameters: list[nn.Parameter], grad_norm: float) -> float:
    """Clip the gradients to `grad_norm`, step, and forget them: the norm that they had, over all processes."""
    scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(parameters, grad_norm)
    if is_divided(norm):
        norm = norm.full_tensor()
    found = norm.item()
    if math.isfinite(found) or scaler.is_enabled():  # the scaler itself leaves out a step that overflowed
        scaler.step(optimizer)
        scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return found


def trained_of(network: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that take gradients, by name."""
    return {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}


def moved(network: Any, device: torch.device) -> nn.Module:
    """The network on a device, each weight contiguous: what is laid in a row, or cut into rows."""
    found: nn.Module = network.to(device).to(memory_format=torch.contiguous_format)
    return found


def require_adamw(optimizer: torch.optim.Optimizer, kind: str) -> None:
    """Refuse an optimizer whose states do not have one number for each weight: they could not be put together."""
    if type(optimizer) is not torch.optim.AdamW:
        raise BuilderError(
            f"{kind} cannot divide the states of {type(optimizer).__name__}", "set train.optimizer to adamw"
        )


def is_divided(tensor: Any) -> TypeGuard[DTensor]:
    """Whether this is a tensor of which each process holds a part: FSDP's weights, and what is computed of them."""
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    return tensor.to_local() if is_divided(tensor) else tensor

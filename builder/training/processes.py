"""The processes of a run: one, or those that torchrun or `accelerate launch` started, joined by accelerate.

All of them take part in every step, each with its share of the step's batch; the first one alone writes files and
draws samples, while the others wait. They hold the same weights, or divide them as accelerate's config file says.
"""

from __future__ import annotations

import atexit
import datetime
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from builder.errors import BuilderError

WAITING = datetime.timedelta(hours=6)  # the longest that the others wait for the first: it evaluates meanwhile
DIVIDING = {"DeepSpeed": "ACCELERATE_USE_DEEPSPEED", "FSDP": "ACCELERATE_USE_FSDP"}  # what `accelerate launch` sets
MEGATRON = "ACCELERATE_USE_MEGATRON_LM"


class Processes:
    """This process among its like. `rank` 0 is the first; `count` of all; `device` of this one.

    `divided`: None, DeepSpeed or FSDP: by what they divide the weights that are trained.
    """

    def __init__(self, device: str | torch.device | None = None) -> None:
        """`device`: None takes the GPU there is (of several processes, each its own), else the CPU.

        BuilderError for a way of dividing that is unknown, not installed, or for which the processes were not started.
        """
        from accelerate import Accelerator, InitProcessGroupKwargs

        self.divided = _divided()
        kind = torch.device(device).type if device else ("cuda" if torch.cuda.is_available() else "cpu")
        # Precision is the objective's own affair (autocast); weights and gradients stay in float32.
        self.accelerator = Accelerator(
            cpu=kind == "cpu", mixed_precision="no", kwargs_handlers=[InitProcessGroupKwargs(timeout=WAITING)]
        )
        self.rank, self.count = self.accelerator.process_index, self.accelerator.num_processes
        self.device = self.accelerator.device
        if self.count > 1:
            atexit.register(_leave)

    @property
    def first(self) -> bool:
        return self.rank == 0

    def prepare(self, network: nn.Module, optimizer: torch.optim.Optimizer, passes: int) -> tuple[nn.Module, Any]:
        """Network and optimizer of which the gradients are averaged over processes, after `passes` backward passes."""
        self.accelerator.gradient_accumulation_steps = passes
        self.accelerator.step = 0
        prepared: tuple[nn.Module, Any] = self.accelerator.prepare(network, optimizer)
        return prepared

    @contextmanager
    def accumulating(self, network: nn.Module) -> Iterator[None]:
        """One of the passes of a step; gradients travel in the last one."""
        with self.accelerator.accumulate(network):
            yield

    def backward(self, loss: Tensor) -> None:
        """Divides by the number of passes first: gradients are means over passes and processes."""
        self.accelerator.backward(loss)

    def sums(self, values: list[float]) -> list[float]:
        """Each number added up over all processes, the same everywhere."""
        if self.count == 1:
            return values
        total = self.accelerator.reduce(torch.tensor(values, dtype=torch.float64, device=self.device), "sum")
        return [float(value) for value in total]

    def any(self, flag: bool) -> bool:
        """Whether any process says so."""
        return bool(self.sums([float(flag)])[0])

    def share(self, module: nn.Module) -> None:
        """Give all processes the first one's weights."""
        from accelerate.utils import broadcast

        if self.count > 1:
            with torch.no_grad():
                for weight in (*module.parameters(), *module.buffers()):
                    weight.copy_(broadcast(weight.detach(), from_process=0))

    def wait(self) -> None:
        """For all processes to come here."""
        self.accelerator.wait_for_everyone()


def chunks(batch_size: int, micro_batch: int, rank: int, count: int) -> list[range]:
    """The parts of a step's batch that process `rank` of `count` passes through its network, one after the other.

    At most `micro_batch` images each (0: no limit), as many passes in every process, sizes that differ by one at most.
    BuilderError when there are more passes than images.
    """
    passes = -(-batch_size // (count * micro_batch)) if micro_batch else 1
    total = passes * count
    if total > batch_size:
        raise BuilderError(
            f"train.batch_size {batch_size} cannot be shared by {count} processes in passes of {micro_batch or 'any'}",
            "it is the number of images over all processes: give at least one for each pass of each",
        )
    edges = [batch_size * part // total for part in range(total + 1)]
    mine = range(rank * passes, (rank + 1) * passes)
    return [range(edges[part], edges[part + 1]) for part in mine]


def _divided() -> str | None:
    """By what the weights are divided, of what was asked for."""
    if _is_set(MEGATRON):
        raise BuilderError(
            "training does not run on Megatron-LM", "launch with a config of configs/accelerate/, or with torchrun"
        )
    kind = next((kind for kind, variable in DIVIDING.items() if _is_set(variable)), None)
    if kind and "LOCAL_RANK" not in os.environ:
        raise BuilderError(
            f"{DIVIDING[kind]} asks for {kind}, but no processes were started for it",
            "start them with `accelerate launch --config_file configs/accelerate/... -m builder train`",
        )
    if kind == "DeepSpeed":
        try:
            import deepspeed  # noqa: F401 - whether it is there
        except ImportError as error:
            raise BuilderError(
                f"training on DeepSpeed needs its package: {error}",
                "pip install 'builder[deepspeed]', or launch with configs/accelerate/fsdp.yaml",
            ) from None
    return kind


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("true", "1")


def _leave() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()

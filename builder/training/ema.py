"""Exponential moving average of weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


def ema_decay(step: int, most: float) -> float:
    """The decay at step `step` (from 0): (1 + step) / (10 + step), at most `most`: early weights are soon forgotten."""
    return min(most, (1 + step) / (10 + step))


class Ema:
    """The average of parameters: average = decay * average + (1 - decay) * parameter, after each step.

    Kept on the CPU where `on_cpu` is set, else where the parameters are.
    """

    def __init__(self, parameters: Sequence[Tensor], decay: float, *, on_cpu: bool = False) -> None:
        self.parameters: list[Tensor] = list(parameters)
        self.average: list[Tensor] = [p.detach().to("cpu" if on_cpu else p.device, copy=True) for p in parameters]
        self.decay, self.on_cpu = decay, on_cpu

    @torch.no_grad()
    def update(self, step: int) -> None:
        weight = 1 - ema_decay(step, self.decay)
        if self.on_cpu:  # one parameter at a time: all of them would need the memory that is to be spared
            for average, parameter in zip(self.average, self.parameters, strict=True):
                average.lerp_(parameter.to(average.device), weight)
        else:
            torch._foreach_lerp_(self.average, self.parameters, weight)

    @torch.no_grad()
    def copy_to_parameters(self) -> None:
        for average, parameter in zip(self.average, self.parameters, strict=True):
            parameter.copy_(average)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Within the block the parameters are the average; afterwards they are bit for bit as before."""
        before = [p.detach().to("cpu", copy=True) for p in self.parameters]
        self.copy_to_parameters()
        try:
            yield
        finally:
            with torch.no_grad():
                for saved, parameter in zip(before, self.parameters, strict=True):
                    parameter.copy_(saved)

    @torch.no_grad()
    def load(self, average: Sequence[Tensor]) -> None:
        for own, saved in zip(self.average, average, strict=True):
            own.copy_(saved)

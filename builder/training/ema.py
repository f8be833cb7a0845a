"""Exponential moving average of weights."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


def ema_decay(step: int, most: float) -> float:
    """The decay at step `step` (from 0): (1 + step) / (10 + step), at most `most`: early weights are soon forgotten."""
    return min(most, (1 + step) / (10 + step))


class Ema:
    """The average of a model's weights; `model` is a copy of the model that holds it."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        average: list[Tensor] = list(self.model.parameters())
        torch._foreach_lerp_(average, list(model.parameters()), 1 - ema_decay(step, self.decay))

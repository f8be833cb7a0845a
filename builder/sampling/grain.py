"""The grain of an image: noise of its own seed, and what the autoencoder's grain head makes of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from builder.models.grain import head_of
from builder.sampling.seeds import grain_seed


def grain_noise(seeds: Sequence[int], channels: int, height: int, width: int) -> Tensor:
    """Standard normal noise [N, channels, height, width], float32 on the CPU, for images of these seeds, 0..2^32-1.

    An image's is `torch.randn((1, channels, height, width), generator=torch.Generator("cpu").manual_seed(grain_seed(
    seed)))`, whatever images are drawn beside it.
    """
    shape = (1, channels, height, width)
    drawn = [torch.randn(shape, generator=torch.Generator("cpu").manual_seed(grain_seed(seed))) for seed in seeds]
    return torch.cat(drawn)


def with_grain(vae: Any, picture: Tensor, seeds: Sequence[int]) -> Tensor:
    """Decoded images [N, 3, H, W], around -1..1, with the grain of their seeds.

    The very same tensor where the autoencoder has no grain head.
    """
    head = head_of(vae)
    if head is None:
        return picture
    grained: Tensor = head(picture, grain_noise(seeds, head.noise_channels, *picture.shape[2:]).to(picture))
    return grained

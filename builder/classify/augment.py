"""Geometric augmentation, the same for both origins and every ratio. Colour stays as it is: it is the signal."""

from __future__ import annotations

import torch
from torch.nn.functional import interpolate

SMALLEST = 0.85  # side of a view, as a share of the crop's


def view(image: torch.Tensor) -> torch.Tensor:
    """A random view of a square crop, uint8 [3, S, S]: mirrored or not in both directions, shifted, enlarged to 1/0.85.

    Drawn with torch's global random numbers, which the loader seeds.
    """
    size = image.shape[-1]
    side = round(size * (SMALLEST + (1 - SMALLEST) * float(torch.rand(()))))
    top, left = (int(torch.randint(size - side + 1, ())) for _ in range(2))
    mirrored = [axis for axis in (1, 2) if float(torch.rand(())) < 0.5]
    window = image[:, top : top + side, left : left + side].flip(mirrored)
    if side == size:
        return window
    return interpolate(window[None], size=(size, size), mode="bilinear", antialias=True)[0]

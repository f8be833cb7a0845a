"""From what the decoder gives to 8-bit pixels, and which of these are no image: computed where the images are."""

from __future__ import annotations

import numpy as np
import torch

BLACK_LEVEL = 4.0  # an image with a mean below it, of 255, is black
FLAT_DEVIATION = 2.0  # an image whose every channel deviates less, in levels, has one colour


def to_levels(decoded: torch.Tensor) -> torch.Tensor:
    """Decoded images [N, 3, H, W], -1..1, as uint8 RGB [N, H, W, 3], rounded as diffusers does; NaN becomes black."""
    unit = (decoded.float() * 0.5 + 0.5).clamp(0, 1).nan_to_num(0.0)
    return (unit * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def to_pixels(decoded: torch.Tensor) -> np.ndarray:
    """Decoded images [N, 3, H, W], -1..1, as uint8 RGB [N, H, W, 3] in the host's memory."""
    pixels: np.ndarray = to_levels(decoded).cpu().numpy()
    return pixels


def blank(levels: torch.Tensor) -> torch.Tensor:
    """Which images, uint8 [N, H, W, 3], are (nearly) black or (nearly) of one colour: bool [N].

    Sums of whole numbers are exact, so every device says the same.
    """
    values = levels.flatten(1, 2).to(torch.int64)  # [N, pixels, channels]
    count = values.shape[1]
    total, squares = values.sum(1), values.square().sum(1)
    black = total.sum(1) < BLACK_LEVEL * count * values.shape[2]
    plain = (count * squares - total.square()).amax(1) < FLAT_DEVIATION**2 * count**2
    return black | plain

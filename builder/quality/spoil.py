"""Images that are no wound crops any more, made from real ones: what gates must turn away, and yardsticks show."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageFilter

BLUR = 0.05  # Gaussian sigma as a share of the image's width; such an image shows no wound any more
NOISE = 0.10  # Gaussian sigma as a share of the grey scale


def blurred(pixels: np.ndarray, share: float = BLUR) -> np.ndarray:
    """uint8 RGB [H, W, 3] blurred with a Gaussian whose sigma is this share of its width."""
    return np.asarray(Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(share * pixels.shape[1])))


def flat(pixels: np.ndarray) -> np.ndarray:
    """A flat image of the size and mean colour of uint8 RGB [H, W, 3]."""
    mean = pixels.reshape(-1, 3).mean(0).round().astype(np.uint8)
    return np.broadcast_to(mean, pixels.shape).copy()


def noisy(pixels: np.ndarray, share: float = NOISE) -> np.ndarray:
    """uint8 RGB [H, W, 3] with white noise on every channel; the same noise for images of the same size."""
    noise = np.random.default_rng(0).normal(0, 255 * share, pixels.shape)
    return np.clip(pixels + noise, 0, 255).round().astype(np.uint8)


def black(pixels: np.ndarray) -> np.ndarray:
    """A black image of the size of uint8 RGB [H, W, 3]."""
    return np.zeros_like(pixels)

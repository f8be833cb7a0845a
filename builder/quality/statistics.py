"""Statistics of one image, without a reference: sharpness, contrast, clipping, noise, colour. numpy and PIL only."""

from __future__ import annotations

from functools import cache

import numpy as np

from builder.shards.dataset import resize

SIZE = 64  # px; the one size at which sharpness and contrast are measured, whatever the image's own
FINE, COARSE = 1.0, 0.05 * SIZE  # px; Gaussian sigmas between which sharpness compares
FLOOR = 1.0  # grey level; keeps the rounding noise of a flat image from counting as detail
LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601


def image_statistics(pixels: np.ndarray) -> dict[str, float]:
    """The statistics of a uint8 RGB image [H, W, 3]; names, units and ranges as in shards.schema.SCORES.

    sharpness: with x the luma at 64 px and G_s the Gaussian blur of sigma s (mirrored edges),
        rms(x - G_1 x) / (rms(x - G_3.2 x) + 1 grey level),
    the share of fine detail in all detail: 0 for a flat image, at most 1. Like the re-blur measures (Crete et al.,
    SPIE 6492, 2007) it asks how much an image loses to a blur, but compares two blurs, so that neither contrast nor
    large shapes count. An image that was blurred with a sigma of 5 % of its width (3.2 px of 64) has lost what the
    small blur would take, and little of what the large one does.

    noise, chroma_noise: the standard deviation of white noise as Immerkaer estimates it (Computer Vision and Image
    Understanding 64(2), 1996), of the luma and of (R - G) / sqrt 2. Texture counts too, so that it is no measure of a
    camera, but a scale on which noisy images lie beyond the real ones; photographs hold next to no fine chroma.
    """
    luma = resize(pixels, SIZE) @ LUMA
    fine, coarse = (_rms(luma - _blur(luma, sigma)) for sigma in (FINE, COARSE))
    mean = pixels.reshape(-1, 3).mean(0)
    return {
        "sharpness": fine / (coarse + FLOOR),
        "contrast": float(luma.std()),
        "noise": _noise(pixels @ LUMA),
        "chroma_noise": _noise((pixels[..., 0].astype(np.float64) - pixels[..., 1]) / np.sqrt(2)),
        "clipped": float(((pixels == 0) | (pixels == 255)).any(2).mean()),
        **{f"mean_{channel}": float(value) for channel, value in zip("rgb", mean, strict=True)},
    }


def _noise(plane: np.ndarray) -> float:
    """sqrt(pi / 2) / 6 times the mean of |[1 -2 1; -2 4 -2; 1 -2 1] * plane|: the standard deviation of white noise."""
    if min(plane.shape) < 3:
        return 0.0
    rows = plane[:-2] - 2 * plane[1:-1] + plane[2:]
    both = rows[:, :-2] - 2 * rows[:, 1:-1] + rows[:, 2:]
    return float(np.sqrt(np.pi / 2) / 6 * np.abs(both).mean())


def _rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(values**2)))


def _blur(image: np.ndarray, sigma: float) -> np.ndarray:
    matrix = _blur_matrix(len(image), sigma)
    return np.asarray(matrix @ image @ matrix.T)


@cache
def _blur_matrix(size: int, sigma: float) -> np.ndarray:
    """The blur of a column of `size` pixels as a matrix: Gaussian cut at 4 sigma, edges mirrored (half-sample)."""
    radius = int(np.ceil(4 * sigma))
    offsets = np.arange(-radius, radius + 1)
    weights = np.exp(-(offsets**2) / (2 * sigma**2))
    sources = np.pad(np.arange(size), radius, mode="symmetric")
    matrix = np.zeros((size, size))
    for row in range(size):
        np.add.at(matrix[row], sources[row + offsets + radius], weights / weights.sum())
    return matrix

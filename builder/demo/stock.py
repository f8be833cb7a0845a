"""Stock photographs: the phantom's wounds in looks that no clinic has, for a model to be pretrained on.

They stand for what a generator knows before it sees a clinic's crops: wounds and the words for them, in the styles of
picture libraries. What of it still shows after fine-tuning can then be measured; see builder.ablation.
"""

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from builder.demo.noise import Field, generator

Pixels = NDArray[np.uint8]

SCENES = ("studio", "cinematic", "cold", "drawn")
"""The styles; photographs of a patient run through them in turn."""

SATURATION = {"studio": 1.4, "cinematic": 1.0, "cold": 1.1, "drawn": 2.0}
TINT = {
    "studio": (1.22, 1.26, 1.30),
    "cinematic": (1.25, 0.96, 0.62),
    "cold": (0.78, 0.98, 1.24),
    "drawn": (1.06, 1.02, 0.94),
}
LEVELS = 5  # of a drawn colour channel
_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # Rec. 601


def scene_of(number: int, visit: int, angle: int) -> str:
    """The style of a photograph: patient `number`, `visit` and `angle` counted from 0."""
    return SCENES[(number + visit + angle) % len(SCENES)]


def restyle(pixels: Pixels, box: tuple[int, int, int, int], scene: str, seed: tuple[int, ...]) -> Pixels:
    """A photograph (H, W, 3) as a picture library would show it: smooth, saturated, graded; `box` is what it is of."""
    rng = generator(*seed)
    smooth = Image.fromarray(pixels).filter(ImageFilter.MedianFilter(5))  # skin without pores, as if retouched
    colour: Field = np.asarray(smooth).astype(np.float32) / 255
    luma = (colour @ _LUMA)[..., None]
    colour = luma + np.float32(SATURATION[scene] * rng.uniform(0.92, 1.08)) * (colour - luma)
    colour = np.clip(colour * np.array(TINT[scene], dtype=np.float32), 0, 1)
    colour = colour * colour * (3 - 2 * colour)  # contrast: an S-shaped curve
    if scene == "cinematic":
        colour *= _vignette(pixels.shape[:2], box)
    if scene == "drawn":
        colour = _drawn(colour)
    return (np.clip(colour, 0, 1) * 255 + 0.5).astype(np.uint8)


def _vignette(shape: tuple[int, ...], box: tuple[int, int, int, int]) -> Field:
    """Light on the middle of the box, and little around it."""
    xmin, ymin, xmax, ymax = box
    y, x = np.mgrid[: shape[0], : shape[1]].astype(np.float32)
    away = np.hypot(x - np.float32((xmin + xmax) / 2), y - np.float32((ymin + ymax) / 2))
    width = np.float32(0.42 * max(xmax - xmin, ymax - ymin))
    return (0.1 + 1.1 * np.exp(-0.5 * (away / width) ** 2))[..., None]


def _drawn(colour: Field) -> Field:
    """Few flat colours within dark outlines."""
    flat = np.round(colour * (LEVELS - 1)) / (LEVELS - 1)
    step_y, step_x = np.gradient(colour @ _LUMA)
    ink = np.clip(np.hypot(step_x, step_y) * 9 - 0.35, 0, 1)[..., None]
    return flat * (1 - ink)

"""Cut a square crop around a box: decode and orient the photograph, choose the square, scale only downwards."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from builder.errors import BuilderError
from builder.images import DEFAULT_MAX_PIXELS, ImageError, part, read_header, read_picture
from builder.shards.dataset import resize

Edges = tuple[float, float, float, float]


class BadPhotographError(BuilderError):
    """A photograph that cannot be read; `--skip-bad` packs the others."""

    def __init__(self, path: Path, reason: object, remedy: str = "replace it") -> None:
        super().__init__(
            f"the photograph {path} cannot be read: {reason}",
            f"{remedy}; or leave out what cannot be used with --skip-bad",
        )
        self.path, self.reason, self.advice = path, reason, remedy

    def __reduce__(self):  # type: ignore[no-untyped-def]
        return type(self), (self.path, self.reason, self.advice)


@dataclass(frozen=True)
class Crop:
    """A square crop.

    pixels: uint8 RGB [side, side, 3]; box: xmin, ymin, xmax, ymax in it, px (None: the photograph has none);
    original_size: width, height of the crop at the photograph's resolution, px.
    """

    pixels: np.ndarray
    box: Edges | None
    original_size: tuple[int, int]


def photograph_size(path: Path, *, max_pixels: int = DEFAULT_MAX_PIXELS) -> tuple[int, int]:
    """Width and height (px) as people see it, from the header alone. Raises BadPhotographError."""
    try:
        return read_header(path, max_pixels=max_pixels).size
    except ImageError as error:
        raise BadPhotographError(path, error.reason, error.remedy) from None


def decode(path: Path, *, max_pixels: int = DEFAULT_MAX_PIXELS) -> Image.Image:
    """The photograph as builder.images reads it: 8-bit sRGB, upright, without metadata. Raises BadPhotographError."""
    try:
        return read_picture(path, max_pixels=max_pixels)
    except ImageError as error:
        raise BadPhotographError(path, error.reason, error.remedy) from None


def box_fault(box: Edges, width: int, height: int) -> str | None:
    """What is wrong with a box on a photograph of this size, or None. Up to 1 px outside is rounding, and clipped."""
    xmin, ymin, xmax, ymax = box
    described = f"the box ({xmin:g}, {ymin:g}, {xmax:g}, {ymax:g})"
    if xmax <= xmin or ymax <= ymin:
        return f"{described} has no area"
    if min(xmin, ymin) < -1 or xmax > width + 1 or ymax > height + 1:
        return f"{described} reaches outside the photograph of {width} x {height} px"
    if min(xmax, width) <= max(xmin, 0) or min(ymax, height) <= max(ymin, 0):
        return f"{described} lies outside the photograph of {width} x {height} px"
    return None


def clip(box: Edges, width: int, height: int) -> Edges:
    """The part of a box that lies on the photograph."""
    xmin, ymin, xmax, ymax = box
    return max(xmin, 0.0), max(ymin, 0.0), min(xmax, float(width)), min(ymax, float(height))


def square_around(box: Edges, width: int, height: int, margin: float) -> tuple[int, int, int]:
    """Left, top and side (px) of the square crop of a box on a photograph of `width` x `height`.

    The side is the box's longer side times (1 + 2 margin), centred on the box. At the photograph's edge the square is
    shifted, then shrunk to the photograph's shorter side; it never reaches outside, so nothing is ever padded. It
    holds the whole box unless the box is longer than the photograph's shorter side: then it is centred on the box.
    """
    left, top, right, bottom = math.floor(box[0]), math.floor(box[1]), math.ceil(box[2]), math.ceil(box[3])
    longer = max(box[2] - box[0], box[3] - box[1])
    wanted = max(math.ceil(longer * (1 + 2 * margin) - 1e-6), right - left, bottom - top)
    side = min(wanted, width, height)
    return (
        _start(left, right, (box[0] + box[2]) / 2, side, width),
        _start(top, bottom, (box[1] + box[3]) / 2, side, height),
        side,
    )


def _start(low: int, high: int, centre: float, side: int, extent: int) -> int:
    start = math.floor(centre - side / 2 + 0.5)
    if side >= high - low:  # rounding must not cut the box
        start = min(max(start, high - side), low)
    return min(max(start, 0), extent - side)


def cut(
    photograph: Image.Image, box: Edges | None, *, margin: float, max_size: int, freeze_size: int | None = None
) -> Crop:
    """Cut the crop of `box` (px) from a decoded photograph; without a box, the largest square in its middle.

    The crop keeps its native resolution, but a side above `max_size` px is scaled down to it (antialiased).
    `freeze_size` scales every crop to that side instead. Pixels and box go through the same scale.
    """
    width, height = photograph.size
    if box is None:
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
    else:
        left, top, side = square_around(box, width, height, margin)
    size = freeze_size or min(side, max_size)
    pixels = resize(part(photograph, (left, top, left + side, top + side)), size)
    return Crop(pixels, _inside(box, left, top, side, size / side) if box is not None else None, (side, side))


def _inside(box: Edges, left: int, top: int, side: int, scale: float) -> Edges:
    xmin, ymin, xmax, ymax = (
        min(max(edge - start, 0.0), float(side)) * scale
        for edge, start in zip(box, (left, top, left, top), strict=True)
    )
    return xmin, ymin, xmax, ymax

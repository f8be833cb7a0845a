"""Whether a box on a photograph can be a wound's."""

from __future__ import annotations

from builder.crops.boxes import Box
from builder.crops.cut import box_fault, clip

MIN_SIDE = 4  # px; a smaller crop shows nothing, and comes of wrong units or a slip of the mouse
ASPECT = 0.02  # relative difference of two shapes that is more than rounding


def fault_of(box: Box, size: tuple[int, int], *, in_pixels: bool = True) -> str | None:
    """What is wrong with a box, or None.

    Args:
        box: its edges in px.
        size: width and height of the photograph, px, EXIF orientation applied.
        in_pixels: its source has pixels, so that it must have been drawn on a picture of this size; for fractions a
            picture of the same shape will do.
    """
    width, height = size
    fault = box_fault(box.edges, width, height)
    if fault is not None:
        return fault
    if box.extent is not None and not _same_picture(box.extent, size, in_pixels):
        drawn_on = " x ".join(str(side) for side in box.extent)
        return f"the box was drawn on {drawn_on} px, the photograph has {width} x {height} (EXIF orientation applied)"
    xmin, ymin, xmax, ymax = clip(box.edges, width, height)
    if min(xmax - xmin, ymax - ymin) < MIN_SIDE:
        fraction = ": is it in fractions of the photograph, beside others in pixels?" if max(box.edges) <= 1 else ""
        return f"the box is {xmax - xmin:.3g} x {ymax - ymin:.3g} px, less than {MIN_SIDE} px{fraction}"
    return None


def covers_all(box: Box, size: tuple[int, int]) -> bool:
    """Whether a box (px) is as large as its photograph, up to ASPECT of each side."""
    xmin, ymin, xmax, ymax = clip(box.edges, *size)
    return xmax - xmin >= size[0] * (1 - ASPECT) and ymax - ymin >= size[1] * (1 - ASPECT)


def _same_picture(drawn_on: tuple[int, int], size: tuple[int, int], in_pixels: bool) -> bool:
    if in_pixels:
        return drawn_on == size
    return abs(drawn_on[0] * size[1] / (drawn_on[1] * size[0]) - 1) <= ASPECT

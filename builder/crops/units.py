"""The units of boxes: pixels, fractions of the photograph (0-1) or percents (0-100), and how they are told apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from builder.crops.columns import CENTRE_AND_SIZE, CORNER_AND_SIZE, CORNERS
from builder.crops.layouts import likelier_layout
from builder.crops.problems import Problems
from builder.errors import BuilderError

if TYPE_CHECKING:
    from builder.crops.boxes import Box, BoxSource

Unit = Literal["pixel", "fraction", "percent"]
Sizes = Mapping[str, tuple[int, int]]
UNITS: Mapping[Unit, float] = {"pixel": 0.0, "fraction": 1.0, "percent": 100.0}  # the photograph's whole side
TOLERANCE = 0.01  # of the whole side: rounding in the tools that write fractions
CHANCE = 0.05  # below it, boxes of pixels would not all lie in the upper left corner by chance
CERTAIN = 1e-4  # below it, that is believed wherever in their photographs the boxes are
LARGE = 200  # px; in smaller photographs the middle is near the corner
_LOOK = {"fraction": "fractions of the photograph (0-1)", "percent": "percents of the photograph (0-100)"}
_NUMBERS = {
    CORNERS: "xmin, ymin, xmax, ymax",
    CORNER_AND_SIZE: "x, y, width, height",
    CENTRE_AND_SIZE: "x_center, y_center, width, height",
}


def boxes_in_pixels(source: BoxSource, sizes: Sizes, asked: Unit | None, path: object, problems: Problems) -> list[Box]:
    """The boxes in pixels.

    Args:
        source: boxes as they were read.
        sizes: photograph -> width and height, px; boxes of other photographs are left as they are.
        asked: the unit that the user said; None for pixels that are checked.
        path: the source's path, for messages.
        problems: a unit or a layout that cannot be right is noted there, and the result is then empty.
    """
    boxes = source.boxes
    if source.in_pixels or not boxes:
        return boxes
    known = [box for box in boxes if box.photograph in sizes]
    unit = asked or "pixel"
    with problems.collected():
        _require_unit(known, sizes, asked, source, path)
        pixels = [_in_pixels(box, sizes, UNITS[unit]) if box.photograph in sizes else box for box in boxes]
        sized = [(box.edges, sizes[box.photograph]) for box in pixels if box.photograph in sizes]
        if other := likelier_layout(sized, source.layout):
            raise BuilderError(
                f"{path}: {other[1]} of {len(sized)} boxes are impossible as {_NUMBERS[source.layout]}, "
                f"and all are possible as {_NUMBERS[other[0]]}",
                "write them as what they are: in a CSV, name their columns so; COCO's bbox is [x, y, width, height]",
            )
        return pixels
    return []


def look_like(boxes: Sequence[Box], sizes: Sizes) -> Unit:
    """The unit that the numbers of all boxes of a source look like.

    Fractions lie within the first pixel. Percents, taken for pixels, would all lie in the upper left corner of 100 px:
    it is believed that they are percents where that has a chance (product over the photographs of 100 / width x
    100 / height) below CHANCE, and as percents they are nearer to the middle of their photographs; or where it has a
    chance below CERTAIN, and no photograph is small.
    """
    if not boxes:
        return "pixel"
    if all(_within(box, 1.0) for box in boxes):
        return "fraction"
    if not all(_within(box, 100.0) for box in boxes):
        return "pixel"
    chance = 1.0
    for name in {box.photograph for box in boxes}:
        width, height = sizes[name]
        chance *= min(1.0, 100 / width) * min(1.0, 100 / height)
    as_percent = _off_middle([(*_middle(box), 100.0, 100.0) for box in boxes])
    as_pixels = _off_middle([(*_middle(box), *sizes[box.photograph]) for box in boxes])
    central = chance < CHANCE and as_percent < as_pixels
    certain = chance < CERTAIN and min(min(sizes[box.photograph]) for box in boxes) >= LARGE
    return "percent" if central or certain else "pixel"


def _require_unit(boxes: Sequence[Box], sizes: Sizes, asked: Unit | None, source: BoxSource, path: object) -> None:
    """Raise BuilderError when the numbers cannot be, or hardly are, in the unit that they would be read in."""
    look = look_like(boxes, sizes)
    if source.percent_signs and asked != "percent":
        raise BuilderError(f"{path}: the boxes are written with percent signs", "say --box-units percent")
    if asked is None and look != "pixel":
        raise BuilderError(
            f"{path}: the {len(boxes)} boxes look like {_LOOK[look]}, not like pixels",
            f"say --box-units {look}, or --box-units pixel if they are pixels",
        )
    if asked in (None, "pixel"):
        return
    whole = UNITS[asked or "pixel"]
    above = sum(not _within(box, whole, 0.5) for box in boxes)
    if above:
        raise BuilderError(
            f"{path}: {above} of {len(boxes)} boxes reach far above {whole:g}: they are no {_LOOK[asked or 'pixel']}",
            "say the unit that they have: --box-units pixel, fraction or percent",
        )
    if asked == "percent" and look == "fraction":
        raise BuilderError(f"{path}: the {len(boxes)} boxes look like {_LOOK[look]}", "say --box-units fraction")


def _in_pixels(box: Box, sizes: Sizes, whole: float) -> Box:
    if not whole:
        return box
    width, height = sizes[box.photograph]
    xmin, ymin, xmax, ymax = (_rounded(edge, whole) / whole for edge in box.edges)
    return replace(box, xmin=xmin * width, ymin=ymin * height, xmax=xmax * width, ymax=ymax * height)


def _rounded(edge: float, whole: float) -> float:
    """The edge; on the photograph's own where it lies beyond that by no more than rounding."""
    inside = min(max(edge, 0.0), whole)
    return inside if abs(edge - inside) <= TOLERANCE * whole else edge


def _within(box: Box, whole: float, tolerance: float = TOLERANCE) -> bool:
    return min(box.edges) >= -tolerance * whole and max(box.edges) <= whole * (1 + tolerance)


def _middle(box: Box) -> tuple[float, float]:
    return (box.xmin + box.xmax) / 2, (box.ymin + box.ymax) / 2


def _off_middle(boxes: Sequence[tuple[float, float, float, float]]) -> float:
    """Distance of the boxes' mean middle from the photographs' middle, in sides; each (x, y, width, height)."""
    across = sum(x / width for x, _, width, _ in boxes) / len(boxes) - 0.5
    down = sum(y / height for _, y, _, height in boxes) / len(boxes) - 0.5
    return across**2 + down**2

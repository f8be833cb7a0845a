"""The ways in which four numbers say a box, and what shows that they were taken for another way."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from builder.crops.columns import CENTRE_AND_SIZE, CORNER_AND_SIZE, CORNERS
from builder.crops.cut import Edges
from builder.crops.numbers import clean, number
from builder.errors import BuilderError

__all__ = ["TO_EDGES", "Edges", "edges_of", "likelier_layout", "written_as"]

# layout -> its four numbers to xmin, ymin, xmax, ymax, and back
TO_EDGES: Mapping[str, Callable[[float, float, float, float], Edges]] = {
    CORNERS: lambda a, b, c, d: (a, b, c, d),
    CORNER_AND_SIZE: lambda x, y, width, height: (x, y, x + width, y + height),
    CENTRE_AND_SIZE: lambda x, y, width, height: (x - width / 2, y - height / 2, x + width / 2, y + height / 2),
}
_WRITTEN: Mapping[str, Callable[[float, float, float, float], Edges]] = {
    CORNERS: lambda a, b, c, d: (a, b, c, d),
    CORNER_AND_SIZE: lambda a, b, c, d: (a, b, c - a, d - b),
    CENTRE_AND_SIZE: lambda a, b, c, d: ((a + c) / 2, (b + d) / 2, c - a, d - b),
}
SUSPICIOUS = 0.1  # share of impossible boxes from which another layout is thought of


def edges_of(values: Sequence[Any], layout: str, where: str) -> Edges:
    """xmin, ymin, xmax, ymax of four numbers or texts as they are written; BuilderError when one is no number."""
    read = [_number(value) for value in values]
    if not all(math.isfinite(value) for value in read):
        raise BuilderError(
            f"{where}: a box of {', '.join(repr(value) for value in values)}", "its four values must be numbers"
        )
    edges = TO_EDGES[layout](*read)
    if not all(math.isfinite(edge) for edge in edges):
        raise BuilderError(f"{where}: a box of {', '.join(repr(value) for value in values)}", "mend the box")
    return edges


def _number(value: Any) -> float:
    if isinstance(value, bool):
        return math.nan
    if isinstance(value, str):
        return number(clean(value))
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def written_as(edges: Edges, layout: str) -> Edges:
    """The four numbers that say these edges in a layout."""
    return _WRITTEN[layout](*edges)


def likelier_layout(boxes: Iterable[tuple[Edges, tuple[int, int]]], layout: str) -> tuple[str, int] | None:
    """Another layout in which every box is possible, where many are impossible in their own.

    Args:
        boxes: edges (px) as read in `layout`, and width and height of the photograph, px.
        layout: as which they were read.

    Returns:
        That layout and the number of boxes that are impossible in `layout`; None where nothing suggests another.
    """
    known = list(boxes)
    impossible = sum(not _possible(edges, size) for edges, size in known)
    if not known or impossible < max(1.0, SUSPICIOUS * len(known)):
        return None
    numbers_of = [(written_as(edges, layout), size) for edges, size in known]
    for other in TO_EDGES:
        if other != layout and all(_possible(TO_EDGES[other](*four), size) for four, size in numbers_of):
            return other, impossible
    return None


def _possible(edges: Edges, size: tuple[int, int]) -> bool:
    """Whether a box has an area and lies on the photograph, up to a px of rounding."""
    xmin, ymin, xmax, ymax = edges
    return xmin < xmax <= size[0] + 1 and ymin < ymax <= size[1] + 1 and min(xmin, ymin) >= -1

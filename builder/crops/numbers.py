"""Numbers as spreadsheets of several countries write them: decimal points and decimal commas.

Thousand separators are refused: `1.234` and `1,234` mean different numbers to different people.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from builder.errors import BuilderError

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.IGNORECASE | re.ASCII)
_COMMA = re.compile(r"[+-]?\d*,\d+", re.ASCII)
_GROUPED = re.compile(r"[+-]?\d{1,3}([.,'\u2019\s_]\d{3})+([.,]\d+)?", re.ASCII)  # 1.234,5 1,234.5 1 234 1'234
_COMMA_OR_GROUP = re.compile(r"[+-]?[1-9]\d{0,2},\d{3}", re.ASCII)
_POINT_OR_GROUP = re.compile(r"[+-]?[1-9]\d?\.\d{3}", re.ASCII)
REMEDY = "write numbers without thousand separators, e.g. 1234.5"


def clean(cell: str) -> str:
    """A cell without spaces around it, its minus sign ASCII's, its percent sign left out."""
    return cell.strip().replace("\u2212", "-").removesuffix("%").rstrip()


def number(text: str) -> float:
    """The number in a cleaned cell, with a decimal point or a decimal comma; NaN for anything else."""
    if _COMMA.fullmatch(text):
        text = text.replace(",", ".")
    value = float(text) if _NUMBER.fullmatch(text) else math.nan
    return value if math.isfinite(value) else math.nan


def require_no_groups(cells: Sequence[str], table: str, pixels: bool = True) -> None:
    """Refuse thousand separators, and cells that can be read with or without them.

    Args:
        cells: all cleaned cells of a table's boxes.
        table: its name, for the message.
        pixels: the numbers may be pixels, which reach above 1000; fractions and percents never do.

    A comma with three digits behind it is a decimal comma where another cell shows that (12,5), where every cell has
    one, or where the number would be above 100000 px; otherwise it cannot be known. A point is a decimal point,
    unless no whole number of the table is 1000 or more while some are above 100: then points stand where thousands do.
    """
    grouped = [cell for cell in cells if _is_grouped(cell)]
    if grouped:
        raise BuilderError(f"{table} has numbers with thousand separators: {_some(grouped)}", REMEDY)
    if not pixels:
        return
    with_comma = [cell for cell in cells if "," in cell]
    if with_comma and all(_COMMA_OR_GROUP.fullmatch(cell) for cell in with_comma):
        above = any(len(cell.lstrip("+-").partition(",")[0]) == 3 for cell in with_comma)
        if len(with_comma) < len(cells) and not above:
            raise BuilderError(f"{table} has numbers with thousand separators or decimal commas: "
                               f"{_some(with_comma)}", REMEDY)  # fmt: skip
    with_point = [cell for cell in cells if "." in cell]
    whole = [int(cell) for cell in cells if re.fullmatch(r"\d{1,9}", cell, re.ASCII)]
    if (
        with_point
        and all(_POINT_OR_GROUP.fullmatch(cell) for cell in with_point)
        and 100 < max(whole, default=0) < 1000
    ):
        raise BuilderError(
            f"{table} has numbers in which the point seems to separate thousands: {_some(with_point)}",
            f"{REMEDY}; write decimals with another number of digits, e.g. 1.20 for 1.200",
        )


def _is_grouped(cell: str) -> bool:
    if not _GROUPED.fullmatch(cell):
        return False
    marks = re.findall(r"[^\d+-]", cell)
    return len(marks) > 1 or marks[0] not in ".,"


def _some(cells: Sequence[str]) -> str:
    return ", ".join(f"'{cell}'" for cell in cells[:3]) + (f" and {len(cells) - 3} more" if len(cells) > 3 else "")

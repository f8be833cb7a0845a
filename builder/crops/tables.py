"""Read the tables that people have: CSV with columns of several spellings, comma or semicolon, any case."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from builder.errors import BuilderError

FILE = ("filename", "file", "image")
NUMBER = ("bounding box number", "box")
PATIENT = ("patient#", "patient")
LABEL = ("phase", "label", "class")


def read_csv(
    path: Path, columns: Mapping[str, Sequence[str]], required: Sequence[str]
) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield (`<file> line <n>`, cells by role) of each row that isn't empty.

    Args:
        path: UTF-8 CSV with a header, separated by commas or semicolons.
        columns: role -> the spellings of its column, lower case; the first one present counts.
        required: roles without which the table is refused.

    A role whose column is missing has no key in the cells. Raises BuilderError for a missing file, another encoding,
    a missing column or a row with more cells than the header.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise BuilderError(f"there is no file {path}", "check the path") from None
    except (UnicodeDecodeError, OSError) as error:
        raise BuilderError(f"{path} cannot be read: {error}", "save it as CSV in UTF-8") from None
    lines = text.splitlines()
    header_line = lines[0] if lines else ""
    reader = csv.reader(lines, delimiter=";" if header_line.count(";") > header_line.count(",") else ",")
    header = [name.strip().lower() for name in next(reader, [])]
    place = {role: header.index(name) for role, names in columns.items() if (name := _first(names, header))}
    missing = [" or ".join(f"'{name}'" for name in columns[role]) for role in required if role not in place]
    if missing:
        raise BuilderError(
            f"{path} has no column {'; no column '.join(missing)}", f"its columns are: {', '.join(header)}"
        )
    for cells in reader:
        where = f"{path} line {reader.line_num}"
        if not any(cell.strip() for cell in cells):
            continue
        if len(cells) > len(header):
            raise BuilderError(
                f"{where} has {len(cells)} cells, the header {len(header)}", "quote cells that hold a separator"
            )
        cells += [""] * (len(header) - len(cells))
        yield where, {role: cells[column].strip() for role, column in place.items()}


def box_number(text: str) -> str:
    """One spelling for the number of a box: '1', '01' and '1.0' are the same."""
    try:
        return str(int(float(text)))
    except (ValueError, OverflowError):
        return text


def patient_id(text: str) -> str:
    """One spelling for a patient's number, as spreadsheets change it: '7', '07' and '7.0' are the same patient."""
    number = re.fullmatch(r"0*(\d+)(\.0+)?", text)
    return number.group(1) if number else text


def _first(names: Sequence[str], header: Sequence[str]) -> str | None:
    return next((name for name in names if name in header), None)

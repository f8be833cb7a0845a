"""Read the tables that people have: CSV as spreadsheets of several systems and countries write it."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from builder.crops.columns import ROLES, Columns, plain, spelled
from builder.crops.problems import Problems
from builder.crops.table_text import read_text
from builder.errors import BuilderError

SEPARATORS = (",", ";", "\t", "|")
HEADER_WITHIN = 20  # rows; titles and remarks may stand above the header
_NAMES = frozenset().union(*(role.names | role.weaker for role in ROLES.values()))


@dataclass
class Table:
    """A CSV as it lies there: its header, where each role's column stands, and its rows.

    notes: what the user should know of how it was read.
    """

    path: Path
    header: list[str]
    columns: Columns
    notes: list[str] = field(default_factory=list)
    text: str = ""
    separator: str = ","
    above: int = 0  # records above the header

    def require(self, role: str) -> int:
        """The position of a role's column; BuilderError when the table has none."""
        position = self.columns.find(role)
        if position is None:
            raise self.lacks(role)
        return position

    def lacks(self, role: str) -> BuilderError:
        """The mistake of a table without this column."""
        known = ", ".join(name for name in self.header if name) or "none"
        return BuilderError(f"{self.path} has no column {spelled(role)}", f"its columns are: {known}")

    def rows(self, places: Mapping[str, int], problems: Problems) -> Iterator[tuple[str, dict[str, str]]]:
        """Yield (`<file> line <n>`, cells by role) of each row that isn't empty.

        Args:
            places: role -> position of its column, or of any other column that is wanted.
            problems: rows that cannot be read are noted there and left out.
        """
        reader = csv.reader(io.StringIO(self.text, newline=""), delimiter=self.separator, strict=True)
        line, records = 0, 0
        while True:
            where = f"{self.path} line {line + 1}"
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                problems.add(
                    f"{where}: {error}", "close every quotation mark, and double those inside a cell; save it as CSV"
                )
                return
            line = reader.line_num
            records += 1
            if records <= self.above + 1 or not any(cell.strip() for cell in cells):
                continue
            if any(cell.strip() for cell in cells[len(self.header) :]):
                problems.add(
                    f"{where} has {len(cells)} cells, the header {len(self.header)}",
                    "quote cells that hold a separator",
                )
                continue
            cells += [""] * (len(self.header) - len(cells))
            found = {role: cells[position].strip() for role, position in places.items()}
            if torn := [role for role, cell in found.items() if "\n" in cell]:
                problems.add(
                    f"{where}: the cell of '{self.header[places[torn[0]]]}' goes on over several lines",
                    "close every quotation mark, and double those inside a cell; save it as CSV",
                )
                continue
            yield where, found


def read_table(path: Path, chosen: Mapping[str, str] | None = None) -> Table:
    """Open a CSV: its encoding, its separator and its header are found from its content.

    The separator is the one with which the most columns have a known name; a first line `sep=;` (Excel's) decides.
    The header is the first row with the most known names, so titles may stand above it.

    Args:
        path: a CSV in UTF-8, UTF-16 or an older encoding.
        chosen: role -> column name, as the user said it.

    Raises:
        BuilderError: a file that is missing, empty or no text.
    """
    text, encoding = read_text(path)
    notes = [] if encoding is None else [f"{path} is not UTF-8; it was read as {encoding}"]
    separators: Sequence[str] = SEPARATORS
    told = re.match(r'"?sep=(.)"?[ ,;\t|]*(\n|$)', text, re.IGNORECASE)
    if told:
        separators = (told.group(1),)
        text = "\n" + text[told.end() :]  # an empty line in its place: the numbers of the others stay
    wanted = {plain(name) for name in (chosen or {}).values()}
    best = max(
        (
            (_known(cells, wanted), -position, -order, len(cells), position, separator, cells)
            for order, separator in enumerate(separators)
            for position, cells in enumerate(_first_rows(text, separator))
            if any(cell.strip() for cell in cells)
        ),
        default=None,
    )
    if best is None:
        raise BuilderError(f"{path} is empty", "write a header and a row for every box or photograph")
    *_, above, separator, header = best
    if best[0] == 0:  # no known name anywhere: the message shows the columns of the likeliest separator
        above, separator, header = (
            0,
            *max(((mark, next(_first_rows(text, mark))) for mark in separators), key=lambda found: len(found[1])),
        )
    passed = sum(any(cell.strip() for cell in cells) for cells in list(_first_rows(text, separator))[:above])
    if passed:
        notes.append(f"{path}: lines above the header, passed over: {passed}")
    header = [name.strip() for name in header]
    return Table(path, header, Columns(header, chosen or {}, str(path)), notes, text, separator, above)


def read_column(path: Path, role: str) -> list[str]:
    """The cells of one role's column that aren't empty.

    Raises:
        BuilderError: the table cannot be read or has no such column; all mistakes of its rows, together.
    """
    table, problems = read_table(path), Problems()
    places = find_places(table, (role,), (), problems)
    problems.raise_if_any()
    cells = [cells[role] for _, cells in table.rows(places.found, problems) if cells[role]]
    problems.raise_if_any()
    return cells


@dataclass(frozen=True)
class Places:
    """Where the roles stand in a table: role -> position; `unclear` are roles of which that could not be said."""

    found: dict[str, int]
    unclear: frozenset[str]


def find_places(table: Table, required: Sequence[str], optional: Sequence[str], problems: Problems) -> Places:
    """Look for the columns of the roles; every mistake is noted in `problems`, and makes its role unclear."""
    found: dict[str, int] = {}
    unclear: set[str] = set()
    for role in (*required, *optional):
        before = len(problems)
        with problems.collected():
            position = table.require(role) if role in required else table.columns.find(role)
            if position is not None:
                found[role] = position
        if len(problems) > before:
            unclear.add(role)
    unusual = [
        f"{role} from '{table.header[position]}'"
        for role, position in found.items()
        if plain(table.header[position]) not in (role, *_PLAIN)
    ]
    if unusual:
        table.notes.append(f"{table.path}: read {', '.join(unusual)}")
    return Places(found, frozenset(unclear))


_PLAIN = frozenset(
    {"filename", "image", "boundingboxnumber", "phase", "class"}
)  # the usual names, of which nothing needs to be said


def box_number(text: str) -> str:
    """One spelling for the number of a box: '1', '01' and '1.0' are the same."""
    try:
        return str(int(float(text)))
    except (ValueError, OverflowError):
        return text


def _first_rows(text: str, separator: str) -> Iterator[list[str]]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator)
    for _ in range(HEADER_WITHIN):
        try:
            yield next(reader)
        except (StopIteration, csv.Error):  # a cell without an end: said when the rows are read
            return


def _known(cells: Sequence[str], wanted: set[str]) -> int:
    return sum(plain(cell) in _NAMES or plain(cell) in wanted for cell in cells if cell.strip())

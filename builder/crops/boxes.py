"""Boxes around wounds, from a CSV, a COCO JSON file or a folder of masks. Every box becomes a crop."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from builder.crops import numbers, tables
from builder.crops.columns import CORNERS
from builder.crops.layouts import Edges, edges_of
from builder.crops.listing import Listing
from builder.crops.photographs import Photographs, is_folder
from builder.crops.problems import Problems
from builder.errors import BuilderError
from builder.images import DEFAULT_MAX_PIXELS


@dataclass(frozen=True)
class Box:
    """One box on a photograph as people see it (EXIF orientation applied); maximum exclusive.

    The edges are in the units of their source until `units.to_pixels` has made them pixels. `label` and `patient` are
    the text beside the box, if there is any; `where` names its place in the source; `extent` is the width and height
    (px) of the picture the box was drawn on, where the source says so.
    """

    photograph: str
    xmin: float
    ymin: float
    xmax: float
    ymax: float
    where: str
    number: str = ""
    label: str = ""
    patient: str = ""
    extent: tuple[int, int] | None = None

    @property
    def edges(self) -> Edges:
        return self.xmin, self.ymin, self.xmax, self.ymax


@dataclass
class BoxSource:
    """The boxes of a source, and what is known of them.

    has_labels: the boxes say their phase. layout: how their four numbers are written (columns.LAYOUTS). in_pixels:
    their numbers are certainly pixels, as those of masks. usable: False when the source could not be read so far that
    a photograph without a box means anything. unclear: roles whose column could not be told.
    missing: references to photographs that aren't there. left_out: what was left out, and how often. header: the
    names of its columns or keys. empty: photographs whose mask says no wound. faulty: photographs with a box or mask
    that is a mistake, and was noted. torn: rows could not be read, so that a missing box means nothing. passed_over:
    what else lies in a folder of masks.
    """

    boxes: list[Box] = field(default_factory=list)
    has_labels: bool = False
    layout: str = CORNERS
    in_pixels: bool = False
    percent_signs: bool = False
    usable: bool = True
    names_patients: bool = False
    unclear: frozenset[str] = frozenset()
    missing: list[str] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)
    header: list[str] = field(default_factory=list)
    empty: set[str] = field(default_factory=set)
    faulty: set[str] = field(default_factory=set)
    torn: bool = False
    passed_over: Listing | None = None


def read_boxes(
    path: Path,
    photographs: Photographs,
    is_label: Callable[[str], bool] = lambda text: False,
    *,
    problems: Problems | None = None,
    chosen: Mapping[str, str] | None = None,
    categories: Sequence[str] = (),
    has_label_file: bool = False,
    inverted_masks: bool = False,
    max_pixels: int = DEFAULT_MAX_PIXELS,
) -> BoxSource:
    """Read boxes: a folder holds masks, a `.json` file is COCO, anything else a CSV.

    Args:
        path: the source.
        photographs: what its references are looked up in.
        is_label: tells whether the name of a COCO category is a class: categories like 'ulcer' say nothing about it.
        problems: mistakes are noted there; None raises them at the end, together.
        chosen: role -> column name, as the user said it.
        categories: names of the COCO categories that are wounds; empty for all.
        has_label_file: phases come from another table, so the box source needs none.
        inverted_masks: in masks, wounds are black.
        max_pixels: masks of more pixels are refused.
    """
    from builder.crops.coco import read_coco
    from builder.crops.masks import read_masks

    found = Problems() if problems is None else problems
    source = BoxSource(usable=False)
    with found.collected():
        if not exists(path):
            raise BuilderError(
                f"the box source {path} is missing",
                "check the path; crops are never cut from whole photographs silently",
            )
        if is_folder(path):
            source = read_masks(path, photographs, found, inverted=inverted_masks, max_pixels=max_pixels)
        elif path.suffix.lower() == ".json":
            source = read_coco(path, photographs, is_label, found, chosen, categories, has_label_file)
        else:
            source = read_box_csv(path, photographs, found, chosen)
    if problems is None:
        found.raise_if_any()
    return source


def exists(path: Path) -> bool:
    """Whether there is such a file or folder. A name that no file system takes is none."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def read_box_csv(
    path: Path, photographs: Photographs, problems: Problems, chosen: Mapping[str, str] | None = None
) -> BoxSource:
    """A CSV with a file name and the four numbers of a box; optional box number, label (phase) and patient.

    The numbers are xmin, ymin, xmax, ymax, or x, y, width, height, or the centre with width and height, by the names
    of their columns.
    """
    table = tables.read_table(path, chosen)
    source = BoxSource(notes=table.notes, header=table.header)
    layout = None
    with problems.collected():
        layout = table.columns.layout()
        if layout is None:
            raise table.lacks("box")
    optional = ["number", "label", "patient", "photowidth", "photoheight"]
    places = tables.find_places(table, ["file", *(layout[1] if layout else ())], optional, problems)
    source.unclear = places.unclear
    source.names_patients = "patient" in places.found
    if layout is None or "file" not in places.found:
        source.usable = False
        return source
    source.layout = layout[0]
    before = len(problems)
    rows = list(table.rows(places.found, problems))
    source.torn = len(problems) > before
    written = [[cells[role] for role in layout[1]] for _, cells in rows]
    source.percent_signs = any(cell.endswith("%") for cells in written for cell in cells)
    values = [[numbers.clean(cell) for cell in cells] for cells in written]
    before = len(problems)
    with problems.collected():
        numbers.require_no_groups([cell for cells in values for cell in cells if cell], str(path))
    if len(problems) > before:  # what the numbers mean is unknown, so nothing more can be said of them
        source.usable = False
        return source
    for (where, cells), four in zip(rows, values, strict=True):
        if not any(four):
            source.left_out["rows without a box, passed over"] += 1
            continue
        with problems.collected():
            name = photographs.find(cells["file"], where) if cells["file"] else None
            if name is None:
                source.missing.append(f"{where}: {cells['file'] or 'no file name'}")
                continue
            source.faulty.add(name)
            edges = edges_of(four, layout[0], where)
            source.faulty.discard(name)
            patient = cells.get("patient", "")
            number = tables.box_number(cells.get("number", ""))
            extent = extent_of(cells.get("photowidth"), cells.get("photoheight"))
            source.has_labels |= bool(cells.get("label"))
            source.boxes.append(Box(name, *edges, where, number, cells.get("label", ""), patient, extent))
    return source


def extent_of(width: Any, height: Any) -> tuple[int, int] | None:
    """The size of the picture that a box was drawn on, px; None where the source doesn't say it."""
    sides = [numbers.number(numbers.clean(str(side))) for side in (width, height)]
    return (round(sides[0]), round(sides[1])) if all(side >= 1 for side in sides) else None

"""Boxes around wounds, from a CSV, a COCO JSON file or a folder of masks. Every box becomes a crop."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from builder.crops import tables
from builder.crops.cut import Edges
from builder.crops.photographs import Photographs, without_suffix
from builder.errors import BuilderError
from builder.images import ImageError, open_mask

SPECK = 16  # px; smaller components of a mask are slips of the pen


@dataclass(frozen=True)
class Box:
    """One box on a photograph as people see it (EXIF orientation applied): pixels, maximum exclusive.

    `label` and `patient` are the text beside the box, if there is any; `where` names its place in the source;
    `extent` is the width and height of the picture the box was drawn on, where the source says so.
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


@dataclass
class BoxSource:
    """The boxes of a source, with what was left out: specks of masks, and references to photographs not there."""

    boxes: list[Box] = field(default_factory=list)
    has_labels: bool = False
    specks: int = 0
    missing: list[str] = field(default_factory=list)


def read_boxes(path: Path, photographs: Photographs, is_label: Callable[[str], bool] = lambda text: False) -> BoxSource:
    """Read boxes: a folder holds masks, a `.json` file is COCO, anything else a CSV.

    `is_label` tells whether the name of a COCO category is a class: categories like 'ulcer' say nothing about it.
    """
    if not path.exists():
        raise BuilderError(
            f"the box source {path} is missing", "check the path; crops are never cut from whole photographs silently"
        )
    if path.is_dir():
        return read_masks(path, photographs)
    if path.suffix.lower() == ".json":
        return read_coco(path, photographs, is_label)
    return read_box_csv(path, photographs)


# -- CSV --------------------------------------------------------------------------------------------------------------

EDGES = ("xmin", "ymin", "xmax", "ymax")


def read_box_csv(path: Path, photographs: Photographs) -> BoxSource:
    """A CSV with a file name and xmin, ymin, xmax, ymax; optional box number, label (phase) and patient."""
    columns = {
        "file": tables.FILE, "number": tables.NUMBER, "label": tables.LABEL, "patient": tables.PATIENT,
        **{edge: (edge,) for edge in EDGES},
    }  # fmt: skip
    source = BoxSource()
    for where, cells in tables.read_csv(path, columns, ("file", *EDGES)):
        name = photographs.find(cells["file"], where)
        if name is None:
            source.missing.append(f"{where}: {cells['file']}")
            continue
        number = tables.box_number(cells.get("number", ""))
        label, patient = cells.get("label", ""), tables.patient_id(cells.get("patient", ""))
        source.has_labels |= bool(label)
        source.boxes.append(Box(name, *_edges([cells[edge] for edge in EDGES], where), where, number, label, patient))
    return source


# -- COCO -------------------------------------------------------------------------------------------------------------


def read_coco(path: Path, photographs: Photographs, is_label: Callable[[str], bool]) -> BoxSource:
    """COCO object detection: `images`, `annotations` with bbox [x, y, width, height], `categories`."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        files = {image["id"]: image for image in data["images"]}
        categories = {category["id"]: str(category["name"]) for category in data.get("categories", [])}
        annotations = [(a["image_id"], a["bbox"], a.get("category_id")) for a in data["annotations"]]
    except (OSError, ValueError) as error:
        raise BuilderError(f"{path} is not valid JSON: {error}", "mend the file") from None
    except (KeyError, TypeError, AttributeError) as error:
        raise BuilderError(
            f"{path} is not COCO: {error!r}", "it needs images (id, file_name) and annotations (image_id, bbox)"
        ) from None
    source = BoxSource(has_labels=any(is_label(name) for name in categories.values()))
    seen: dict[str, int] = {}
    for position, (image_id, bbox, category) in enumerate(annotations):
        where = f"{path} annotation {position}"
        image = files.get(image_id)
        if not isinstance(image, Mapping) or "file_name" not in image:
            raise BuilderError(f"{where} is of image {image_id}, which has no file name", "mend the file")
        name = photographs.find(str(image["file_name"]), where)
        if name is None:
            source.missing.append(f"{where}: {image['file_name']}")
            continue
        if not isinstance(bbox, list) or len(bbox) != 4:
            raise BuilderError(f"{where} has the bbox {bbox!r}", "it must be [x, y, width, height]")
        x, y, width, height = _edges(bbox, where)
        seen[name] = seen.get(name, 0) + 1
        label = categories.get(category, "") if source.has_labels else ""
        patient = tables.patient_id(str(image.get("patient", "")))
        extent = (int(image["width"]), int(image["height"])) if image.get("width") and image.get("height") else None
        source.boxes.append(Box(name, x, y, x + width, y + height, where, str(seen[name]), label, patient, extent))
    return source


# -- masks ------------------------------------------------------------------------------------------------------------


def read_masks(folder: Path, photographs: Photographs) -> BoxSource:
    """Masks named like their photographs: a box around each connected component (8 neighbours) of SPECK px or more.

    A lossless mask is wound wherever it isn't 0; a JPEG, whose edges ring, where it is above 127.
    """
    masks = Photographs(folder)
    source = BoxSource()
    for mask_name in masks.names:
        name = photographs.find(without_suffix(mask_name), f"mask {mask_name}")
        if name is None:
            source.missing.append(f"mask {folder / mask_name}")
            continue
        boxes, specks, extent = _components(masks.path(mask_name))
        source.specks += specks
        for number, edges in enumerate(boxes, start=1):
            where = f"mask {folder / mask_name} component {number}"
            source.boxes.append(Box(name, *edges, where, str(number), extent=extent))
    return source


def _components(path: Path) -> tuple[list[Edges], int, tuple[int, int]]:
    """The boxes of a mask's components, the number of specks, and the mask's width and height."""
    from scipy import ndimage

    try:
        mask = open_mask(path)
    except ImageError as bad:
        raise BuilderError(f"the mask {path} cannot be read: {bad.reason}", bad.remedy) from None
    wound = mask.labels > (127 if mask.lossy else 0)
    labelled, count = ndimage.label(wound, structure=np.ones((3, 3)))
    areas = np.bincount(labelled.ravel(), minlength=count + 1)[1:]
    boxes = [
        (float(columns.start), float(rows.start), float(columns.stop), float(rows.stop))
        for (rows, columns), area in zip(ndimage.find_objects(labelled), areas, strict=True)
        if area >= SPECK
    ]
    return boxes, count - len(boxes), (wound.shape[1], wound.shape[0])


def _edges(values: list[Any], where: str) -> Edges:
    try:
        numbers = [float(value) for value in values]
    except (TypeError, ValueError):
        numbers = [math.nan]
    if not all(math.isfinite(number) for number in numbers):
        raise BuilderError(
            f"{where}: a box of {', '.join(repr(value) for value in values)}", "its four values must be numbers"
        )
    return numbers[0], numbers[1], numbers[2], numbers[3]

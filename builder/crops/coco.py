"""Boxes from a COCO object detection file, as several annotation tools write it.

Source: Lin et al. 2014, https://cocodataset.org/#format-data: `images`, `annotations` with bbox
[x, y, width, height], `categories`; `iscrowd` 1 marks a region of many objects that no box separates.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from builder.crops.boxes import Box, BoxSource, extent_of
from builder.crops.columns import CORNER_AND_SIZE, ROLES, looks_like_patient, plain
from builder.crops.layouts import edges_of
from builder.crops.photographs import Photographs
from builder.crops.problems import Problems
from builder.errors import BuilderError

NESTED = ("attributes", "extra", "meta", "metadata")  # where tools keep what COCO has no key for


def read_coco(
    path: Path,
    photographs: Photographs,
    is_label: Callable[[str], bool],
    problems: Problems,
    chosen: Mapping[str, str] | None = None,
    categories: Sequence[str] = (),
    has_label_file: bool = False,
) -> BoxSource:
    """Read the boxes of a COCO file; `iscrowd` annotations and those of other categories are left out and counted.

    Args:
        path: the file.
        photographs: what its file names are looked up in.
        is_label: tells whether the name of a category is a class of the data set.
        problems: mistakes are noted there, and what they concern is left out.
        chosen: role -> key, as the user said it; only `patient` matters here.
        categories: names of the categories that are wounds; empty for all. Several that name no class are refused
            then: one of them may be a ruler.
        has_label_file: phases come from another table, whatever the categories are called.

    Raises:
        BuilderError: the file is no COCO.
    """
    data = _load(path)
    named = {_key(category["id"]): str(category["name"]) for category in data["categories"]}
    source = BoxSource(layout=CORNER_AND_SIZE)
    images = _images(path, data["images"], problems)
    kept = [
        (f"{path} annotation {position}", annotation)
        for position, annotation in enumerate(data["annotations"])
        if not _is_crowd(annotation, source)
    ]
    used = Counter(named.get(_key(annotation.get("category_id")), "") for _, annotation in kept)
    source.has_labels = any(is_label(name) for name in used)
    wanted = _wanted(path, used, source.has_labels and not has_label_file, is_label, categories, problems)
    keys = _PatientKeys(path, chosen or {}, problems)
    seen: Counter[str] = Counter()
    for where, annotation in kept:
        category = named.get(_key(annotation.get("category_id")), "")
        if wanted is not None and category.casefold() not in wanted:
            source.left_out[f"annotations of the category '{category}', left out"] += 1
            continue
        with problems.collected():
            image = images.get(_key(annotation["image_id"]))
            if image is None:
                image_id = annotation["image_id"]
                raise BuilderError(f"{where} is of image {image_id}, which has no file name", "mend the file")
            name = photographs.find(str(image["file_name"]), where)
            if name is None:
                source.missing.append(f"{where}: {image['file_name']}")
                continue
            source.faulty.add(name)
            edges = edges_of(_bbox(annotation, where), CORNER_AND_SIZE, where)
            source.faulty.discard(name)
            seen[name] += 1
            label = category if source.has_labels else ""
            patient = keys.patient(image) or keys.patient(annotation)
            extent = extent_of(image.get("width"), image.get("height"))
            source.boxes.append(Box(name, *edges, where, str(seen[name]), label, patient, extent))
    source.names_patients, source.unclear = keys.found, keys.unclear
    source.header = sorted(keys.seen)
    return source


def _load(path: Path) -> dict[str, list[dict[str, Any]]]:
    """The three lists of a COCO file, each of objects with the keys that are always needed."""
    try:
        data = json.loads(path.read_bytes())
    except OSError as error:
        raise BuilderError(f"{path} cannot be read: {error.strerror}", "check the path") from None
    except (ValueError, RecursionError) as error:
        raise BuilderError(f"{path} is not valid JSON: {error}", "mend the file") from None
    needed = {"images": ("id",), "annotations": ("image_id",), "categories": ("id", "name")}
    data = {"categories": [], **data} if isinstance(data, dict) else {}
    for part, keys in needed.items():
        items = data.get(part)
        whole = isinstance(items, list) and all(
            isinstance(item, dict) and all(isinstance(item.get(key), (int, float, str)) for key in keys)
            for item in items
        )
        if not whole:
            raise BuilderError(
                f"{path} is not COCO: {part} is no list of objects with {' and '.join(keys)}",
                "it needs images (id, file_name) and annotations (image_id, bbox)",
            )
    return {part: data[part] for part in needed}


def _key(value: Any) -> str:
    """One spelling of an id: tools write 7, "7" and 7.0."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).strip()


def _images(path: Path, listed: list[dict[str, Any]], problems: Problems) -> dict[str, dict[str, Any]]:
    """The images that have a file name, by id; an id of several images is noted as a mistake."""
    images: dict[str, dict[str, Any]] = {}
    for image in listed:
        other = images.get(_key(image["id"]))
        if other is not None and other.get("file_name") != image.get("file_name"):
            problems.add(
                f"{path}: the image id {image['id']} stands for {other.get('file_name')} and {image.get('file_name')}",
                "give every image an id of its own: annotations name their image by it",
            )
        elif other is not None:
            problems.add(f"{path}: the image id {image['id']} stands twice", "leave one entry of each image")
        if isinstance(image.get("file_name"), str):
            images.setdefault(_key(image["id"]), image)
    return images


def _is_crowd(annotation: dict[str, Any], source: BoxSource) -> bool:
    crowd = _key(annotation.get("iscrowd", 0)).casefold() in ("1", "true")
    source.left_out["annotations of crowds (iscrowd), left out"] += crowd
    return crowd


def _wanted(
    path: Path,
    used: Counter[str],
    has_labels: bool,
    is_label: Callable[[str], bool],
    categories: Sequence[str],
    problems: Problems,
) -> set[str] | None:
    """The categories whose boxes are taken, case folded; None for all."""
    listed = ", ".join(f"'{name}' ({count} boxes)" for name, count in used.most_common())
    if categories:
        known = {name.casefold() for name in used}
        for unknown in (name for name in categories if name.casefold() not in known):
            problems.add(f"{path}: no box has the category '{unknown}' (--category)", f"its categories are {listed}")
        return {name.casefold() for name in categories}
    others = [name for name in used if not is_label(name)]
    if has_labels and others:
        problems.add(
            f"{path}: some categories are classes and some are none: {listed}",
            "say which are wounds: --category NAME, once for each",
        )
    elif not has_labels and len(used) > 1:
        problems.add(
            f"{path} has several categories, none of which names a class: {listed}",
            "say which are wounds: --category NAME, once for each",
        )
    return None


def _bbox(annotation: dict[str, Any], where: str) -> list[Any]:
    """[x, y, width, height]; of an annotation with a polygon only, the box around that."""
    bbox = annotation.get("bbox")
    if isinstance(bbox, list) and len(bbox) == 4:
        return bbox
    outline = list(_points(annotation.get("segmentation"))) if not bbox else []
    if not outline:
        raise BuilderError(f"{where} has the bbox {bbox!r}", "it must be [x, y, width, height]")
    xs, ys = zip(*outline, strict=True)
    return [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]


def _points(segmentation: Any) -> Iterator[tuple[float, float]]:
    """The corners of polygons [[x, y, x, y, ...], ...]; none of a run-length encoded mask."""
    for polygon in segmentation if isinstance(segmentation, list) else ():
        numbers = polygon if isinstance(polygon, list) else []
        if len(numbers) >= 6 and len(numbers) % 2 == 0 and all(isinstance(number, (int, float)) for number in numbers):
            yield from zip(numbers[0::2], numbers[1::2], strict=True)


class _PatientKeys:
    """The patient beside an image or annotation, whatever its key is called."""

    def __init__(self, path: Path, chosen: Mapping[str, str], problems: Problems) -> None:
        self.path, self.problems = path, problems
        self.chosen = plain(chosen.get("patient", ""))
        self.found = False
        self.seen: set[str] = set()
        self.unclear: frozenset[str] = frozenset()

    def patient(self, entry: Mapping[str, Any]) -> str:
        """What the entry says of the patient; '' for nothing."""
        values = {
            **entry,
            **{k: v for part in NESTED if isinstance(entry.get(part), dict) for k, v in entry[part].items()},
        }
        self.seen.update(values)
        if self.chosen == "none":
            return ""
        known = ROLES["patient"]
        for fits in (
            lambda name: plain(name) == self.chosen,
            lambda name: plain(name) in known.names,
            lambda name: plain(name) in known.weaker,
        ):
            told = {str(value).strip() for name, value in values.items() if fits(name) and value not in (None, "")}
            if len(told) > 1:
                names = ", ".join(f"'{name}'" for name in values if fits(name))
                self._unclear(f"{self.path}: {names} say different patients", "choose one: --column patient=NAME")
            if told:
                self.found = True
                return told.pop()
        if like := next((name for name in values if looks_like_patient(name)), None):
            self._unclear(
                f"{self.path}: the key '{like}' looks like the patient's",
                f"say which key names the patient: --column patient='{like}', or --column patient=none where none does",
            )
        return ""

    def _unclear(self, what: str, remedy: str) -> None:
        if not self.unclear:
            self.problems.add(what, remedy)
        self.unclear = frozenset({"patient"})

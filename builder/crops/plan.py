"""What to cut: photographs, boxes, labels and patients brought together and checked before a pixel is decoded."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from tqdm import tqdm

from builder.config import CropsConfig
from builder.crops.boxes import Box, BoxSource, read_boxes
from builder.crops.cut import BadPhotographError, Edges, box_fault, clip, photograph_size
from builder.crops.labels import Codes, LabelFile, read_labels
from builder.crops.patients import photograph_group
from builder.crops.photographs import Photographs
from builder.errors import BuilderError
from builder.images import DEFAULT_MAX_PIXELS
from builder.phases import HEALING_PHASES, ClassTable


@dataclass(frozen=True)
class PackRequest:
    """Everything that decides a packed dataset.

    photographs: folder, searched with its subfolders.
    boxes: CSV, COCO JSON or folder of masks; None only together with `without_box`.
    labels: CSV of phases; None: the box file's labels, else the folders that the photographs lie in, else (a table
        of one class) that class.
    without_box: what to do with a photograph without a box: None is an error, 'skip' leaves it out, 'whole' takes
        the largest square in its middle.
    skip_bad: leave out and count unreadable photographs and unusable boxes, rather than stop at the first.
    freeze_size: scale every crop to this side, px; None keeps native resolution up to crops.max_size.
    group_by: stands in for unknown patients: 'photograph', or a regular expression on the file name.
    key, key_file: the secret of the patients' hashes; see patients.find_key.
    licence: under which the data may be used; recorded.
    max_pixels: photographs and masks of more pixels are refused.
    """

    photographs: Path
    boxes: Path | None = None
    labels: Path | None = None
    classes: ClassTable = HEALING_PHASES
    crops: CropsConfig = field(default_factory=CropsConfig)
    without_box: Literal["skip", "whole"] | None = None
    skip_bad: bool = False
    freeze_size: int | None = None
    group_by: str | None = None
    key: bytes | None = None
    key_file: Path | None = None
    images_per_shard: int = 200
    config_name: str = "default"
    licence: str = "not stated"
    max_pixels: int = DEFAULT_MAX_PIXELS

    def __post_init__(self) -> None:
        if self.without_box not in (None, "skip", "whole"):
            raise BuilderError(f"--without-box {self.without_box} is unknown", "write skip or whole")
        for name, value in (
            ("--size", self.freeze_size),
            ("shards.images_per_shard", self.images_per_shard),
        ):
            if value is not None and value < 1:
                raise BuilderError(f"{name} is {value}", "it must be 1 or more")


@dataclass(frozen=True)
class PlannedCrop:
    """One crop to cut: its box (None: the photograph's middle) and its phase."""

    box: Edges | None
    phase: str


@dataclass
class Plan:
    """Crops by photograph, the patient (as written, not yet hashed) of each photograph, and what was left out."""

    photographs: Photographs
    crops: dict[str, list[PlannedCrop]] = field(default_factory=dict)
    patients: dict[str, str] = field(default_factory=dict)
    skipped: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)


def make_plan(request: PackRequest, progress: bool = True) -> Plan:
    """Check all input and decide what is cut; only the headers of the photographs are read.

    Raises BuilderError at the first thing that is wrong, naming the photograph or the line.
    """
    masks = request.boxes if request.boxes is not None and request.boxes.is_dir() else None
    photographs = Photographs(request.photographs, exclude=masks)
    codes = Codes(request.classes)
    labels = read_labels(request.labels, photographs, codes) if request.labels is not None else None
    source = BoxSource()
    if request.boxes is not None:
        source = read_boxes(request.boxes, photographs, lambda text: codes.get(text) is not None)
    elif request.without_box != "whole":
        raise BuilderError(
            "no boxes are given",
            "give --boxes (a CSV, a COCO JSON file or a folder of masks), or say --without-box whole",
        )
    plan = Plan(photographs)
    _count_unused(plan, request, source, labels)
    boxes: dict[str, list[Box]] = defaultdict(list)
    for box in source.boxes:
        boxes[box.photograph].append(box)
    stand_ins = 0
    for name in tqdm(photographs.names, desc="checking", unit="photograph", disable=not progress, leave=False):
        try:
            width, height = photograph_size(photographs.path(name), max_pixels=request.max_pixels)
        except BadPhotographError:
            if not request.skip_bad:
                raise
            plan.skipped["unreadable photographs, left out"] += 1
            continue
        chosen = _choose(plan, request, name, boxes[name], width, height)
        if chosen:
            plan.crops[name] = [
                PlannedCrop(
                    clip((box.xmin, box.ymin, box.xmax, box.ymax), width, height) if box else None,
                    _phase(request, photographs, codes, labels, source, name, box),
                )
                for box in chosen
            ]
            known = _patient(photographs, name, boxes[name], labels)
            plan.patients[name] = known or _stand_in(request, photographs, name)
            stand_ins += known is None
    if stand_ins:
        plan.notes.append(
            f"patients unknown: {stand_ins} photographs are grouped by {request.group_by}; "
            "near-copies may be in two splits"
        )
    elif request.group_by is not None:
        plan.notes.append("--group-by was not needed: the patients stand in the tables")
    require_all_phases(request.classes, Counter(crop.phase for crops in plan.crops.values() for crop in crops))
    return plan


def require_all_phases(classes: ClassTable, counts: Counter[str]) -> None:
    """BuilderError naming the phases without a crop: nothing could be trained for them, or measured against."""
    empty = [f"{phase.code} ({phase.name})" for phase in classes if not counts[phase.code]]
    if empty:
        found = ", ".join(f"{code} {count}" for code, count in sorted(counts.items())) or "none"
        raise BuilderError(
            f"empty phase: no crop of {', '.join(empty)} (crops found: {found})",
            "add photographs of it, or declare only the classes you have in a config (--config)",
        )


def _count_unused(plan: Plan, request: PackRequest, source: BoxSource, labels: LabelFile | None) -> None:
    if source.missing and not request.skip_bad:
        more = f" and {len(source.missing) - 1} more" if len(source.missing) > 1 else ""
        raise BuilderError(
            f"a box belongs to a photograph that is not in {request.photographs}: {source.missing[0]}{more}",
            "add the photographs, or leave such boxes out with --skip-bad",
        )
    plan.skipped["boxes without a photograph, left out"] = len(source.missing)
    plan.skipped["specks in masks, left out"] = source.specks
    plan.skipped["labels without a photograph, not used"] = labels.unused if labels else 0


def _choose(plan: Plan, request: PackRequest, name: str, boxes: list[Box], width: int, height: int) -> list[Box | None]:
    """The boxes of a photograph that can be cut; [None] stands for its middle."""
    if not boxes:
        if request.without_box is None:
            raise BuilderError(
                f"the photograph {plan.photographs.path(name)} has no box",
                "add one, or say --without-box skip (leave such photographs out) or --without-box whole (their middle)",
            )
        if request.without_box == "skip":
            plan.skipped["photographs without a box, left out"] += 1
            return []
        plan.skipped["photographs without a box, taken whole"] += 1
        return [None]
    chosen: list[Box | None] = []
    for box in boxes:
        fault = box_fault((box.xmin, box.ymin, box.xmax, box.ymax), width, height)
        if fault is None and box.extent not in (None, (width, height)):
            drawn_on = " x ".join(str(side) for side in box.extent or ())
            fault = (
                f"the box was drawn on {drawn_on} px, the photograph has {width} x {height} (EXIF orientation applied)"
            )
        if fault is None:
            chosen.append(box)
        elif request.skip_bad:
            plan.skipped["unusable boxes, left out"] += 1
        else:
            raise BuilderError(
                f"{box.where}: {fault} ({name})", "mend the box, or leave such boxes out with --skip-bad"
            )
    return chosen


def _phase(
    request: PackRequest,
    photographs: Photographs,
    codes: Codes,
    labels: LabelFile | None,
    source: BoxSource,
    name: str,
    box: Box | None,
) -> str:
    described = f"{photographs.path(name)}" + (f" ({box.where})" if box else "")
    if labels is not None:
        code = labels.code(name, box.number if box else "")
        if code is None:
            raise BuilderError(f"no label for {described} in {request.labels}", "add a row for it")
        return code
    if source.has_labels and box is not None:
        if not box.label:
            raise BuilderError(f"no label for {described}", "fill its cell, or give the labels with --labels")
        return codes.require(box.label, box.where)
    code = codes.of_folder(name)
    if code is not None:
        return code
    if len(request.classes) == 1:
        return request.classes.codes[0]
    if "/" in name:
        return codes.require(name.split("/")[-2], f"the folder of {photographs.path(name)}")
    raise BuilderError(
        f"no label for {described}", "sort the photographs into folders named by phase, or give --labels"
    )


def _patient(photographs: Photographs, name: str, boxes: list[Box], labels: LabelFile | None) -> str | None:
    """The patient that the box file or the label file names, or None."""
    known = {box.patient for box in boxes if box.patient}
    if labels is not None and name in labels.patients:
        known.add(labels.patients[name])
    if len(known) > 1:
        listed = ", ".join(sorted(known))
        raise BuilderError(
            f"the photograph {photographs.path(name)} belongs to several patients: {listed}", "mend the tables"
        )
    return known.pop() if known else None


def _stand_in(request: PackRequest, photographs: Photographs, name: str) -> str:
    if request.group_by is None:
        raise BuilderError(
            f"the patient of {photographs.path(name)} is unknown",
            "add a patient column, or say what stands in for patients: --group-by photograph, "
            "or --group-by REGEX on the file name",
        )
    return photograph_group(name, request.group_by)

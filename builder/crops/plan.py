"""What to cut: photographs, boxes, labels and patients brought together and checked before a pixel is decoded."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Literal

from tqdm import tqdm

from builder.config import CropsConfig
from builder.crops.boxes import Box, BoxSource, exists, read_boxes
from builder.crops.columns import require_known_columns
from builder.crops.cut import BadPhotographError, Edges, clip, photograph_size
from builder.crops.duplicates import drop_repeated_boxes, identical_files, join_copies
from builder.crops.labels import Codes, LabelFile, read_labels
from builder.crops.photographs import Photographs, heif_remedy, is_folder
from builder.crops.plausibility import covers_all, fault_of
from builder.crops.problems import Problems
from builder.crops.units import Unit, boxes_in_pixels
from builder.errors import BuilderError
from builder.identity import COLUMN, Patient, from_photograph, normalise
from builder.images import DEFAULT_MAX_PIXELS
from builder.phases import HEALING_PHASES, ClassTable


@dataclass(frozen=True)
class PackRequest:
    """Everything that decides a packed dataset.

    photographs: folder, searched with its subfolders.
    boxes: CSV, COCO JSON or folder of masks; None only together with `without_box`.
    labels: CSV of phases; None: the box file's labels, else the folders that the photographs lie in, else (a table
        of one class) that class.
    box_units: of the boxes' numbers; None for pixels, with a refusal where they look like something else.
    columns: role (see columns.ROLES) -> the name of its column, or 'none'; where names alone don't tell.
    categories: names of the COCO categories that are wounds; empty for all.
    inverted_masks: in masks, wounds are black.
    without_box: what to do with a photograph without a box: None is an error, 'skip' leaves it out, 'whole' takes
        the largest square in its middle.
    skip_bad: leave out and count unreadable photographs and unusable boxes, rather than stop at the first.
    freeze_size: scale every crop to this side, px; None keeps native resolution up to crops.max_size.
    group_by: stands in for unknown patients: 'photograph', or a regular expression on the file name.
    key, key_file: the secret of the patients' hashes; see identity.find_key.
    model_size: px of the model that the crops are meant for; crops under half of it are counted. None counts none.
    licence: under which the data may be used; recorded.
    max_pixels: photographs and masks of more pixels are refused.
    """

    photographs: Path
    boxes: Path | None = None
    labels: Path | None = None
    classes: ClassTable = HEALING_PHASES
    crops: CropsConfig = field(default_factory=CropsConfig)
    box_units: Unit | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    categories: tuple[str, ...] = ()
    inverted_masks: bool = False
    without_box: Literal["skip", "whole"] | None = None
    skip_bad: bool = False
    freeze_size: int | None = None
    group_by: str | None = None
    key: bytes | None = None
    key_file: Path | None = None
    images_per_shard: int = 200
    model_size: int | None = None
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
    """Crops by photograph, the patient (as written, not yet hashed) of each photograph, and what was left out.

    notes, skipped: go into dataset.json, so no name of a photograph or patient may stand in them.
    details: what the user should see and check, with names of files and folders; only printed, never stored.
    """

    photographs: Photographs
    crops: dict[str, list[PlannedCrop]] = field(default_factory=dict)
    patients: dict[str, Patient] = field(default_factory=dict)
    skipped: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)
    details: list[str] = field(default_factory=list)


def make_plan(request: PackRequest, progress: bool = True) -> Plan:
    """Check all input and decide what is cut; only the headers of the photographs are read.

    Raises:
        BuilderError: the input has mistakes; all that were found, each with its photograph or line.
    """
    problems = Problems()
    photographs = _photographs(request, problems)
    codes = Codes(request.classes)
    labels = None
    if request.labels is not None:
        labels = read_labels(request.labels, photographs, codes, problems, request.columns)
    source = _source(request, photographs, codes, problems)
    require_known_columns(request.columns, [source.header, labels.header if labels else []], problems)
    plan = Plan(photographs)
    _note_passed_over(plan, source, labels)
    sizes = _sizes(plan, request, problems, progress)
    _count_unused(plan, request, source, labels, problems)
    copies = identical_files({name: photographs.path(name) for name in sizes})
    boxes: dict[str, list[Box]] = defaultdict(list)
    for box in boxes_in_pixels(source, sizes, request.box_units, request.boxes, problems):
        boxes[box.photograph].append(box)
    judged = len(problems)  # mistakes so far: of the input as a whole, or of single rows
    usable = source.usable and (bool(boxes) or not source.boxes)
    ask = _Asked(request, photographs, codes, labels, source)
    stand_ins: set[str] = set()
    for name, size in sizes.items() if usable else ():
        crops = []
        for chosen in _choose(plan, request, source, name, boxes[name], size, problems):
            with problems.collected():
                if (phase := ask.phase(name, chosen)) is not None:
                    crops.append(PlannedCrop(clip(chosen.edges, *size) if chosen else None, phase))
        with problems.collected():
            if crops:
                plan.crops[name] = crops
                known = ask.patient(name, boxes[name])
                if known is None:
                    stand_ins.add(name)
                plan.patients[name] = known or ask.stand_in(name)
    drop_repeated_boxes(plan, copies, problems)
    join_copies(plan, copies, stand_ins, request.group_by, problems)
    _note_patients(plan, request, stand_ins)
    if not judged and not problems:
        require_all_phases(request.classes, Counter(crop.phase for crops in plan.crops.values() for crop in crops))
    problems.raise_if_any()
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


# -- reading ----------------------------------------------------------------------------------------------------------


def _photographs(request: PackRequest, problems: Problems) -> Photographs:
    """The photographs; without any, nothing else can be judged but whether the other files are there."""
    masks = request.boxes if request.boxes is not None and is_folder(request.boxes) else None
    try:
        return Photographs(request.photographs, exclude=masks)
    except BuilderError as error:
        problems.add_error(error)
        for path in (request.boxes, request.labels):
            if path is not None and not exists(path):
                problems.add(f"there is no file {path}", "check the path")
        problems.raise_if_any()
        raise


def _source(request: PackRequest, photographs: Photographs, codes: Codes, problems: Problems) -> BoxSource:
    if request.boxes is not None:
        return read_boxes(
            request.boxes,
            photographs,
            lambda text: codes.get(text) is not None,
            problems=problems,
            chosen=request.columns,
            categories=request.categories,
            has_label_file=request.labels is not None,
            inverted_masks=request.inverted_masks,
            max_pixels=request.max_pixels,
        )
    if request.without_box != "whole":
        problems.add(
            "no boxes are given",
            "give --boxes (a CSV, a COCO JSON file or a folder of masks), or say --without-box whole",
        )
        return BoxSource(usable=False)
    return BoxSource()


def _sizes(plan: Plan, request: PackRequest, problems: Problems, progress: bool) -> dict[str, tuple[int, int]]:
    """Width and height (px) of every photograph that can be read."""
    sizes: dict[str, tuple[int, int]] = {}
    names = plan.photographs.names
    for name in tqdm(names, desc="checking", unit="photograph", disable=not progress, leave=False):
        try:
            sizes[name] = photograph_size(plan.photographs.path(name), max_pixels=request.max_pixels)
        except BadPhotographError as error:
            if request.skip_bad:
                plan.skipped["unreadable photographs, left out"] += 1
            else:
                problems.add_error(error)
    return sizes


# -- what is said -----------------------------------------------------------------------------------------------------


def _note_passed_over(plan: Plan, source: BoxSource, labels: LabelFile | None) -> None:
    plan.details += [*source.notes, *(labels.notes if labels else [])]
    for listing, kind in ((plan.photographs.listing, "photographs"), (source.passed_over, "masks")):
        for what, (count, names) in listing.passed_over(kind).items() if listing else ():
            if count:
                plan.skipped[what] += count
                plan.details.append(f"{what}: {names}")
        if listing and (remedy := heif_remedy(listing.unread)):
            plan.details.append(remedy)


def _count_unused(
    plan: Plan, request: PackRequest, source: BoxSource, labels: LabelFile | None, problems: Problems
) -> None:
    if not request.skip_bad:
        heif = heif_remedy(PurePosixPath(missing).suffix for missing in source.missing)
        for missing in source.missing:
            problems.add(
                f"a box belongs to a photograph that is not in {request.photographs}: {missing}",
                "add the photographs, or leave such boxes out with --skip-bad" + (f"; {heif}" if heif else ""),
            )
    plan.skipped["boxes without a photograph, left out"] = len(source.missing)
    plan.skipped.update(source.left_out)
    plan.skipped["labels without a photograph, not used"] = labels.unused if labels else 0
    plan.skipped["rows of labels that repeat another row"] = labels.repeated if labels else 0


def _note_patients(plan: Plan, request: PackRequest, stand_ins: set[str]) -> None:
    if stand_ins:
        plan.notes.append(
            f"patients unknown: {len(stand_ins)} photographs are grouped by "
            f"{'photograph' if request.group_by == 'photograph' else 'a pattern of their names'}; "
            "near-copies may be in two splits"
        )
        if len(stand_ins) < len(plan.patients):
            plan.notes.append(
                "some patients stand in the tables and some are grouped: one may be in two splits, so that no training "
                "on this dataset can be known not to leak; fill the patient column"
            )
    elif request.group_by is not None:
        plan.notes.append("--group-by was not needed: the patients stand in the tables")


# -- one photograph ---------------------------------------------------------------------------------------------------


def _choose(
    plan: Plan,
    request: PackRequest,
    source: BoxSource,
    name: str,
    boxes: list[Box],
    size: tuple[int, int],
    problems: Problems,
) -> list[Box | None]:
    """The boxes of a photograph that can be cut; [None] stands for its middle."""
    if not boxes and (source.torn or name in source.faulty):
        return []
    if not boxes:
        if request.without_box is None:
            mask = "; its mask marks no wound" if name in source.empty else ""
            problems.add(
                f"the photograph {plan.photographs.path(name)} has no box{mask}",
                "add one, or say --without-box skip (leave such photographs out) or --without-box whole (their middle)",
            )
            return []
        if request.without_box == "skip":
            plan.skipped["photographs without a box, left out"] += 1
            return []
        plan.skipped["photographs without a box, taken whole"] += 1
        return [None]
    chosen: list[Box | None] = []
    for box in boxes:
        fault = fault_of(box, size, in_pixels=request.box_units in (None, "pixel"))
        if fault is None:
            plan.skipped["boxes that cover their whole photograph, taken"] += covers_all(box, size)
            chosen.append(box)
        elif request.skip_bad:
            plan.skipped["unusable boxes, left out"] += 1
        else:
            problems.add(f"{box.where}: {fault} ({name})", "mend the box, or leave such boxes out with --skip-bad")
    return chosen


@dataclass(frozen=True)
class _Asked:
    """What the tables and folders say of a photograph."""

    request: PackRequest
    photographs: Photographs
    codes: Codes
    labels: LabelFile | None
    source: BoxSource

    def phase(self, name: str, box: Box | None) -> str | None:
        """The phase of a box (None: of the photograph); None where its lack was noted as another mistake."""
        labels, codes = self.labels, self.codes
        described = f"{self.photographs.path(name)}" + (f" ({box.where})" if box else "")
        if labels is not None:
            number = box.number if box else ""
            code = labels.code(name, number)
            if code is None and labels.usable and not labels.is_refused(name, number):
                raise BuilderError(f"no label for {described} in {self.request.labels}", "add a row for it")
            return code
        if "label" in self.source.unclear:
            return None
        if self.source.has_labels and box is not None:
            if not box.label:
                raise BuilderError(f"no label for {described}", "fill its cell, or give the labels with --labels")
            return codes.require(box.label, box.where)
        code = codes.of_folder(name)
        if code is not None:
            return code
        if len(self.request.classes) == 1:
            return self.request.classes.codes[0]
        if "/" in name:
            return codes.require(name.split("/")[-2], f"the folder of {self.photographs.path(name)}")
        raise BuilderError(
            f"no label for {described}", "sort the photographs into folders named by phase, or give --labels"
        )

    def patient(self, name: str, boxes: list[Box]) -> Patient | None:
        """The patient that the box file or the label file names, or None."""
        written = [box.patient for box in boxes]
        if self.labels is not None and name in self.labels.patients:
            written.append(self.labels.patients[name])
        known = {normalise(text): text for text in reversed(written) if normalise(text)}
        if len(known) > 1:
            listed = ", ".join(sorted(known.values()))
            raise BuilderError(
                f"the photograph {self.photographs.path(name)} belongs to several patients: {listed}", "mend the tables"
            )
        return Patient(known.popitem()[1], COLUMN) if known else None

    def stand_in(self, name: str) -> Patient:
        """What stands for the unknown patient of a photograph."""
        request = self.request
        if request.group_by is not None:
            return from_photograph(name, request.group_by)
        if "patient" in self.source.unclear or (self.labels is not None and "patient" in self.labels.unclear):
            return Patient("", COLUMN)  # which column it is was noted as a mistake already
        if self.source.names_patients or (self.labels is not None and self.labels.names_patients):
            raise BuilderError(
                f"the patient of {self.photographs.path(name)} is unknown: no row of it names one",
                "fill the patient's column; or say what stands in where it is empty: --group-by REGEX on the file name",
            )
        raise BuilderError(
            f"the patient of {self.photographs.path(name)} is unknown",
            "add a patient column, or say what stands in for patients: --group-by photograph, "
            "or --group-by REGEX on the file name",
        )

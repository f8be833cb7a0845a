"""The phase of a crop: from a label CSV, from the box file, or from the folder its photograph lies in."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath

from builder.crops import tables
from builder.crops.photographs import Photographs
from builder.errors import BuilderError
from builder.phases import ClassTable


class Codes:
    """Class codes by what people write: the code or the name, in any case."""

    def __init__(self, classes: ClassTable) -> None:
        self.classes = classes
        self._by_text: dict[str, str] = {}
        for phase in reversed(classes.phases):
            self._by_text[phase.name.lower()] = phase.code
        for phase in reversed(classes.phases):
            self._by_text[phase.code.lower()] = phase.code

    def get(self, text: str) -> str | None:
        """The code that `text` means, or None."""
        text = text.strip()
        return text if text in self.classes.codes else self._by_text.get(text.lower())

    def require(self, text: str, where: str) -> str:
        """The code that `text` means; BuilderError, naming `where`, when it is no class."""
        code = self.get(text)
        if code is None:
            known = ", ".join(f"{phase.code} ({phase.name})" for phase in self.classes)
            raise BuilderError(
                f"{where}: label '{text}' is not among the classes",
                f"the classes are {known}; others are declared in a config (--config)",
            )
        return code

    def of_folder(self, photograph: str) -> str | None:
        """The code that the nearest folder above a photograph names, or None."""
        folders = PurePosixPath(photograph).parts[:-1]
        return next((code for folder in reversed(folders) if (code := self.get(folder))), None)


@dataclass
class LabelFile:
    """What a label CSV says: code by (photograph, box number; '' for all its boxes), and the patients it names."""

    codes: dict[tuple[str, str], str] = field(default_factory=dict)
    patients: dict[str, str] = field(default_factory=dict)
    unused: int = 0

    def code(self, photograph: str, number: str) -> str | None:
        """The code of a box; of a box without a number, what all labels of its photograph agree on. None if unknown."""
        if code := self.codes.get((photograph, number)) or self.codes.get((photograph, "")):
            return code
        agreed = self._by_photograph.get(photograph, set()) if not number else set()
        return next(iter(agreed)) if len(agreed) == 1 else None

    @cached_property
    def _by_photograph(self) -> dict[str, set[str]]:
        found: dict[str, set[str]] = {}
        for (photograph, _), code in self.codes.items():
            found.setdefault(photograph, set()).add(code)
        return found


def read_labels(path: Path, photographs: Photographs, codes: Codes) -> LabelFile:
    """Read a CSV of file name and phase, with an optional box number and patient.

    Rows of photographs that aren't there are counted in `unused`. BuilderError for a label that is no class, and for
    two labels of one box.
    """
    columns = {"file": tables.FILE, "number": tables.NUMBER, "label": tables.LABEL, "patient": tables.PATIENT}
    labels = LabelFile()
    for where, cells in tables.read_csv(path, columns, ("file", "label")):
        photograph = photographs.find(cells["file"], where)
        if photograph is None:
            labels.unused += 1
            continue
        if cells["label"]:
            code = codes.require(cells["label"], where)
            place = (photograph, tables.box_number(cells.get("number", "")))
            if labels.codes.setdefault(place, code) != code:
                raise BuilderError(
                    f"{where}: {cells['file']} has the labels {labels.codes[place]} and {code}", "keep one of them"
                )
        patient = tables.patient_id(cells.get("patient", ""))
        if patient and labels.patients.setdefault(photograph, patient) != patient:
            raise BuilderError(
                f"{where}: {cells['file']} belongs to two patients", "a photograph is of one; mend the table"
            )
    return labels

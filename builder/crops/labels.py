"""The phase of a crop: from a label CSV, from the box file, or from the folder its photograph lies in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath

from builder.crops import tables
from builder.crops.photographs import Photographs
from builder.crops.problems import Problems
from builder.errors import BuilderError
from builder.identity import normalise
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
    """What a label CSV says: code by (photograph, box number; '' for all its boxes), and the patients it names.

    usable: False when the table could not be read so far that a missing label means anything. names_patients: it has
    a patient's column. unclear: roles whose column could not be told. unused: rows of photographs that aren't there.
    repeated: rows that say what a row above says. refused: places whose label is a mistake that was noted.
    """

    codes: dict[tuple[str, str], str] = field(default_factory=dict)
    patients: dict[str, str] = field(default_factory=dict)
    unused: int = 0
    repeated: int = 0
    usable: bool = True
    names_patients: bool = False
    unclear: frozenset[str] = frozenset()
    notes: list[str] = field(default_factory=list)
    header: list[str] = field(default_factory=list)
    refused: set[tuple[str, str]] = field(default_factory=set)

    def code(self, photograph: str, number: str) -> str | None:
        """The code of a box; of a box without a number, what all labels of its photograph agree on. None if unknown."""
        if code := self.codes.get((photograph, number)) or self.codes.get((photograph, "")):
            return code
        agreed = self._by_photograph.get(photograph, set()) if not number else set()
        return next(iter(agreed)) if len(agreed) == 1 else None

    def is_refused(self, photograph: str, number: str) -> bool:
        """Whether the missing code of a box was noted as another mistake."""
        return bool({(photograph, number), (photograph, "")} & self.refused) or (
            not number and any(place[0] == photograph for place in self.refused)
        )

    @cached_property
    def _by_photograph(self) -> dict[str, set[str]]:
        found: dict[str, set[str]] = {}
        for (photograph, _), code in self.codes.items():
            found.setdefault(photograph, set()).add(code)
        return found


def read_labels(
    path: Path,
    photographs: Photographs,
    codes: Codes,
    problems: Problems | None = None,
    chosen: Mapping[str, str] | None = None,
) -> LabelFile:
    """Read a CSV of file name and phase, with an optional box number and patient.

    Args:
        path: the table.
        photographs: what its file names are looked up in; rows of others are counted in `unused`.
        codes: what labels may be.
        problems: a label that is no class, two labels of one box, two patients of one photograph, and rows that
            cannot be read are noted there; None raises them at the end, together.
        chosen: role -> column name, as the user said it.
    """
    found = Problems() if problems is None else problems
    labels = LabelFile(usable=False)
    with found.collected():
        table = tables.read_table(path, chosen)
        places = tables.find_places(table, ("file", "label"), ("number", "patient"), found)
        labels = LabelFile(
            usable={"file", "label"} <= places.found.keys(),
            names_patients="patient" in places.found,
            unclear=places.unclear,
            notes=table.notes,
            header=table.header,
        )
        for where, cells in table.rows(places.found, found) if labels.usable else ():
            with found.collected():
                _add(labels, where, cells, photographs, codes, found)
    if problems is None:
        found.raise_if_any()
    return labels


def _add(
    labels: LabelFile,
    where: str,
    cells: dict[str, str],
    photographs: Photographs,
    codes: Codes,
    problems: Problems,
) -> None:
    """Take in a row."""
    photograph = photographs.find(cells["file"], where) if cells["file"] else None
    if photograph is None:
        labels.unused += 1
        return
    patient = cells.get("patient", "")
    if normalise(patient) and normalise(labels.patients.setdefault(photograph, patient)) != normalise(patient):
        problems.add(f"{where}: {cells['file']} belongs to two patients", "a photograph is of one; mend the table")
    if cells["label"]:
        place = (photograph, tables.box_number(cells.get("number", "")))
        labels.refused.add(place)
        code = codes.require(cells["label"], where)
        labels.refused.discard(place)
        if place in labels.codes and labels.codes[place] != code:
            raise BuilderError(
                f"{where}: {cells['file']} has the labels {labels.codes[place]} and {code}", "keep one of them"
            )
        labels.repeated += place in labels.codes
        labels.codes[place] = code

"""What stands for a patient (a column, a pattern, the photograph, an index), and the record of it in a lineage."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from builder.errors import BuilderError
from builder.identity.comparison import MIXED
from builder.identity.key import PatientKey
from builder.identity.spelling import form_of, normalise

COLUMN, PATTERN, PHOTOGRAPH, INDEX = "column", "pattern", "photograph", "index"


@dataclass(frozen=True)
class Patient:
    """Whose a photograph is.

    text: the id as it was written; of a photograph that stands for its patient, the photograph's name.
    source: where that came from: 'column' (a table or COCO), 'pattern' (a part of the file name), 'photograph' (nobody
        knows; the photograph stands for its patient) or 'index' (members of foreign tars).
    said_by: more of where it came from, which must agree for two ids to be compared: the regular expression of a
        'pattern', and the key in the member of an 'index'.
    """

    text: str
    source: str
    said_by: str = ""

    @property
    def spelling(self) -> str:
        """The text by which two of one source are one patient."""
        return self.text if self.source == PHOTOGRAPH else normalise(self.text)

    def hash(self, key: PatientKey) -> str:
        """The keyed hash that the manifests hold, 32 hex digits."""
        return key.photograph(self.text) if self.source == PHOTOGRAPH else key.hash(self.text)


def from_photograph(name: str, group_by: str) -> Patient:
    """A stand-in for an unknown patient: the photograph itself ('photograph'), or a part of its file name.

    Args:
        name: the photograph's path within its folder, with '/'.
        group_by: 'photograph', or a regular expression on the file name; its first group (or the whole match) is the
            patient.

    Raises:
        BuilderError: no regular expression, or one that does not match or matches nothing that names a patient.
    """
    if group_by == PHOTOGRAPH:
        return Patient(name, PHOTOGRAPH)
    try:
        found = re.search(group_by, PurePosixPath(name).name)
    except re.error as error:
        raise BuilderError(
            f"--group-by '{group_by}' is not a regular expression: {error}", "write photograph, or e.g. '^(P[0-9]+)_'"
        ) from None
    matched = found and (found.group(1) if found.re.groups else found.group())
    if not matched or not normalise(matched):
        raise BuilderError(
            f"--group-by '{group_by}' does not match {name}, or finds no letter or digit in it",
            "write a pattern that matches every file name",
        )
    return Patient(matched, PATTERN, group_by)


def lineage_of(key: PatientKey, patients: Collection[Patient]) -> dict[str, Any]:
    """The lineage of a real dataset, as dataset.json has it, of all its patients (a crop's own is in its row).

    `patient_source` says what stands for the patients, `patient_forms` (keyed hashes, 16 hex digits) how their ids are
    built: the forms of the ids, each together with what it was said by (the pattern), and of photographs, and of ids
    that are names, the whole collection of them.
    """
    sources = sorted({patient.source for patient in patients})
    return {
        "known": True,
        "key_fingerprint": key.fingerprint,
        "patients": [],
        "patient_source": MIXED.join(sources) or None,
        "patient_forms": sorted(_forms(key, patients)),
    }


def _forms(key: PatientKey, patients: Iterable[Patient]) -> set[str]:
    forms: set[str] = set()
    photographs, names = [], []
    for patient in patients:
        if patient.source == PHOTOGRAPH:
            photographs.append(patient.text)
        elif form_of(patient.spelling) == "name":
            names.append(patient.hash(key))
        elif patient.said_by:
            forms.add(key.seal([patient.said_by, key.form(patient.text)]))
        else:
            forms.add(key.form(patient.text))
    for whole in (sorted(key.photograph(name) for name in photographs), sorted(names)):
        if whole:
            forms.add(key.seal(whole))
    return forms

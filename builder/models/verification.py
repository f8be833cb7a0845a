"""Check everything on disk of a checkpoint: `builder checkpoint verify`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from builder.documents import has_checksum
from builder.errors import BuilderError
from builder.files import read_file
from builder.models.checkpoint import DESCRIPTION, read_checkpoint
from builder.models.integrity import damaged_files


@dataclass
class CheckpointReport:
    """What a check came to: files that were compared, what is damaged, and what has no checksum to compare with."""

    files: int = 0
    findings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def verify_checkpoint(folder: Path) -> CheckpointReport:
    """Compare the files of a checkpoint with the record in its checkpoint.json, and its base with the one it names.

    Nothing is raised for damage: it is in the report, one line each, with what to do.
    """
    report = CheckpointReport()
    description = folder / DESCRIPTION
    if not description.is_file():
        report.notes.append(f"{folder} has no {DESCRIPTION}: nothing is recorded that its files could be compared with")
        return report
    try:
        found = read_checkpoint(folder)
    except BuilderError as error:
        report.findings.append(f"{error.what}: {error.remedy}")
        return report
    if not has_checksum(read_file(description)):
        report.notes.append(f"{description} has no checksum: an older version wrote it")
    if not found.files:
        report.notes.append(f"{description} records no files: an older version wrote it")
    report.files += 1 + len(found.files)
    report.findings += [f"{said}: copy the checkpoint again" for said in damaged_files(folder, found.files)]
    if found.method == "lora":
        report.findings += _check_base(found.base, folder)
    return report


def _check_base(base: dict[str, str], folder: Path) -> list[str]:
    from builder.models.source import locate, weights_sha256

    try:
        same = weights_sha256(locate(base.get("reference", ""))) == base.get("sha256")
    except BuilderError as error:
        return [f"the base of the adapter in {folder} is not there: {error.what}"]
    return [] if same else [f"the base of the adapter in {folder}, '{base.get('reference')}', has other weights now"]

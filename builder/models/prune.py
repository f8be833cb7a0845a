"""Remove the checkpoints that a training run can spare."""

from __future__ import annotations

import shutil
from pathlib import Path

from builder.models.checkpoint import run_history

REMOVED = ".removed-"


def prune(run: Path, keep: int, monitor: str = "", mode: str = "", dry_run: bool = False) -> list[tuple[Path, int]]:
    """Remove the checkpoints of a run but the best, the last and the `keep` newest others; those removed, with bytes.

    Where checkpoints have scores the best must be known: BuilderError without a monitor.
    """
    entries = run_history(run).superfluous(keep, monitor, mode)
    removed = [(run / entry.path, folder_size(run / entry.path)) for entry in entries]
    for folder, _ in [] if dry_run else removed:
        remove_folder(folder)
    return removed


def remove_folder(folder: Path) -> None:
    """Remove a checkpoint. It loses its name first: a kill leaves no half of it there, and the next one goes on."""
    hidden = folder.with_name(REMOVED + folder.name)
    shutil.rmtree(hidden, ignore_errors=True)
    folder.rename(hidden)
    shutil.rmtree(hidden)


def folder_size(folder: Path) -> int:
    """Bytes of the files in a folder, at all depths."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())

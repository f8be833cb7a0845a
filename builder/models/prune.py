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
        hidden = folder.with_name(REMOVED + folder.name)
        folder.rename(hidden)  # at once: a kill leaves no half of a checkpoint under its name
        shutil.rmtree(hidden)
    return removed


def folder_size(folder: Path) -> int:
    """Bytes of the files in a folder, at all depths."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())

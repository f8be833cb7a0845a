"""Check everything on disk of a training run: its checkpoints, its history and its resume states."""

from __future__ import annotations

from pathlib import Path

from builder.errors import BuilderError
from builder.models.checkpoint import DESCRIPTION, STEP, is_checkpoint
from builder.models.history import FILE as HISTORY
from builder.models.history import History
from builder.models.verification import CheckpointReport, verify_checkpoint
from builder.training.states import state_damage, state_files, step_of


def verify_run(run: Path) -> CheckpointReport:
    """As `verify_checkpoint`, of every checkpoint of a training run, its history and its resume states."""
    report = CheckpointReport()
    try:
        history = History.read(run)
        report.files += (run / HISTORY).is_file()
    except BuilderError as error:
        report.findings.append(f"{error.what}: {error.remedy}")
        history = History()
    folders = {path.name: path for path in run.glob(f"{STEP}*") if path.is_dir()}
    for name, folder in sorted(folders.items()):
        if not is_checkpoint(folder):
            report.findings.append(f"{folder} lacks {DESCRIPTION} or model_index.json: run the training again")
            continue
        one = verify_checkpoint(folder)
        report.files += one.files
        report.findings += one.findings
        report.notes += one.notes
        if not (folder / DESCRIPTION).is_file() and name in {entry.path for entry in history.entries}:
            report.findings.append(f"{folder / DESCRIPTION} is missing: restore it from a copy")
    last = history.entries[-1].path if history.entries else None
    if last is not None and last not in folders:
        report.findings.append(f"{run / last} is missing, though {HISTORY} names it last: run the training again")
    if not history.entries and folders and not (run / HISTORY).is_file():
        report.findings.append(f"{run / HISTORY} is missing: restore it from a copy")
    steps = [step_of(state) for state in state_files(run / "state", "unet")]
    if history.entries and max(steps, default=0) < history.last.step:
        report.findings.append(
            f"{run / 'state'} lacks the state of step {history.last.step}: training makes the steps since "
            f"{max(steps, default=0)} again"
        )
    for state in state_files(run / "state"):
        report.files += 1
        if said := state_damage(state):
            report.findings.append(f"{state} is damaged ({said}): training goes on from the state before it")
    return report

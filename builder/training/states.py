"""The resume states of a run: OUT/state/STAGE-00001000-SHA256.pt, written whole, the last two of each stage kept.

A state's name ends in the SHA-256 of its bytes (its first 32 hex digits): so there is no second file that could be
missing, one renaming commits both, and a state that is damaged, cut short, or another's is told by its name. States of
older versions have no digest in their name; they are read as they are.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import re
import warnings
from pathlib import Path
from typing import Any, Protocol

import torch

from builder.config import fingerprint
from builder.errors import BuilderError
from builder.files import TEMPORARY, fsync_folder, full_disk_as_oserror
from builder.training.identity import Identity, changed_keys, record_identity, recorded_identity, refusal

KEPT_STATES = 2
DIGEST = 32  # hex digits of the SHA-256 in a name


class Resumable(Protocol):
    """What a state is loaded into."""

    name: str
    step: int

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class States:
    """The states in a folder that belong to one configuration; `identity` is what they must agree with."""

    def __init__(self, folder: Path, identity: Identity) -> None:
        self.folder, self.identity, self.fingerprint = folder, identity, fingerprint(identity)

    def save(self, stage: str, step: int, state: dict[str, Any]) -> None:
        """Write a state, then remove the oldest beyond two; OSError on a full disk, which leaves nothing partial."""
        self.folder.mkdir(parents=True, exist_ok=True)
        record_identity(self.folder, stage, self.identity)
        for left in self.folder.glob(f"{TEMPORARY}*"):  # of a killed process; the run is locked
            left.unlink(missing_ok=True)
        part = self.folder / f"{TEMPORARY}{stage}-{step:08d}"
        try:
            with full_disk_as_oserror(part), part.open("wb") as file:
                torch.save({"fingerprint": self.fingerprint, **state}, file)
                file.flush()
                os.fsync(file.fileno())
            target = self.folder / f"{stage}-{step:08d}-{_digest(part)}.pt"
            part.replace(target)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
        fsync_folder(self.folder)
        for old in state_files(self.folder, stage):
            if step_of(old) == step and old != target:  # the same step once more
                old.unlink()
        for old in state_files(self.folder, stage)[:-KEPT_STATES]:
            old.unlink()

    def restore(self, stage: Resumable, device: torch.device) -> bool:
        """Continue from the newest state that is whole, if there is one.

        A damaged one is passed over with a warning: the steps since the one before are made again, and come out the
        same. BuilderError when a state is of another configuration, or all are damaged.
        """
        files = state_files(self.folder, stage.name)
        for file in reversed(files):
            why = state_damage(file)
            state = None if why else _read(file, device)
            if state is None:
                warnings.warn(
                    f"{file} is damaged ({why or 'it cannot be read'}): going on from the state before it", stacklevel=2
                )
                continue
            if state.get("fingerprint") != self.fingerprint:
                changed = changed_keys(recorded_identity(self.folder, stage.name) or self.identity, self.identity)
                if changed:
                    raise refusal(self.folder, changed)
                raise BuilderError(
                    f"{file} was made with another model, data, or training configuration",
                    "train into another folder, or remove this one to start anew",
                )
            stage.load_state_dict(state)
            return True
        if files:
            raise BuilderError(
                f"all states of '{stage.name}' in {self.folder} are damaged",
                "restore them from a copy, or remove that folder: training then begins anew, the checkpoints stay",
            )
        return False


def state_files(folder: Path, stage: str = "") -> list[Path]:
    """The states of a stage (default: of all stages), oldest first."""
    name = re.compile(rf"{re.escape(stage) or '[a-z]+'}-\d{{8}}(-[0-9a-f]{{{DIGEST}}})?\.pt")
    return sorted(path for path in folder.glob("*.pt") if name.fullmatch(path.name))


def state_damage(file: Path) -> str | None:
    """What is off with the bytes of a state; None when they are as they were written, or an older version wrote it."""
    recorded = re.search(rf"-([0-9a-f]{{{DIGEST}}})\.pt\Z", file.name)
    try:
        if recorded is not None and _digest(file) != recorded[1]:
            return "its SHA-256 is not that of its name"
    except OSError as error:
        return error.strerror or str(error)
    return None


def step_of(file: Path) -> int:
    """The step of a state, of its name."""
    return int(re.search(r"-(\d{8})", file.name)[1])  # type: ignore[index]


def _read(file: Path, device: torch.device) -> dict[str, Any] | None:
    """None when it is no state: one of an older version, cut short."""
    try:
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=device.type != "cpu")
    except (OSError, RuntimeError, ValueError, KeyError, EOFError, pickle.UnpicklingError):
        return None
    return state if isinstance(state, dict) else None


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()[:DIGEST]

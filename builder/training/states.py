"""The resume states of a run: OUT/state/STAGE-00001000.pt, written whole, the last two of each stage kept."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, Protocol

import torch

from builder.errors import BuilderError

KEPT_STATES = 2


class Resumable(Protocol):
    """What a state is loaded into."""

    name: str
    step: int

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class States:
    """The states in a folder that belong to one configuration, told by its fingerprint."""

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self.folder, self.fingerprint = folder, fingerprint

    def _files(self, stage: str) -> list[Path]:
        return sorted(
            path for path in self.folder.glob(f"{stage}-*.pt") if re.fullmatch(rf"{stage}-\d{{8}}\.pt", path.name)
        )

    def save(self, stage: str, step: int, state: dict[str, Any]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        target = self.folder / f"{stage}-{step:08d}.pt"
        part = target.with_suffix(".part")
        with part.open("wb") as file:
            torch.save({"fingerprint": self.fingerprint, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(target)
        for old in self._files(stage)[:-KEPT_STATES]:
            old.unlink()

    def restore(self, stage: Resumable, device: torch.device) -> bool:
        """Continue from the newest state, if there is one. BuilderError when it is of another configuration."""
        files = self._files(stage.name)
        if not files:
            return False
        state = torch.load(files[-1], map_location="cpu", weights_only=True, mmap=device.type != "cpu")
        if state["fingerprint"] != self.fingerprint:
            raise BuilderError(
                f"{files[-1]} was made with another model, data, or training configuration",
                "train into another folder, or remove this one to start anew",
            )
        stage.load_state_dict(state)
        return True

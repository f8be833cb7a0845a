"""The log of a run: log.jsonl, and the same numbers for TensorBoard where that package is installed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


class Log:
    """One line of JSON per entry. Only the first process writes; in the others (`file` None) nothing happens."""

    def __init__(self, file: Path | None) -> None:
        self.file = file
        if file is not None and file.is_file():
            _cut_torn_line(file)
        self._board = _board(file.parent / "tensorboard") if file else None

    def write(self, stage: str, step: int, values: dict[str, float]) -> None:
        if self.file is None:
            return
        line = {"stage": stage, "step": step, **{name: float(f"{value:.6g}") for name, value in values.items()}}
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self.show({f"{stage}/{name}": value for name, value in values.items()}, step)

    def show(self, values: dict[str, float], step: int) -> None:
        """For TensorBoard alone."""
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
            self._board.flush()

    def close(self) -> None:
        if self._board is not None:
            self._board.close()


def _cut_torn_line(file: Path) -> None:
    """Take away the piece of a last line that a killed process, or a full disk, left."""
    data = file.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        os.truncate(file, whole)


def _board(folder: Path) -> Any:
    """TensorBoard's writer; None without the package."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder))

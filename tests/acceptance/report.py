"""What all measurements print: where and when they were taken, plain tables, and which criteria were missed."""

from __future__ import annotations

import datetime
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from builder.job.devices import cores
from builder.sampling.device import device_model


class Report:
    """Prints a measurement as it goes and remembers the criteria that were missed."""

    def __init__(self, title: str, **settings: object) -> None:
        import torch

        self._missed: list[str] = []
        now = datetime.datetime.now().astimezone().isoformat(sep=" ", timespec="minutes")
        print(f"{title}, {now}")
        print(f"machine: {device_model('cpu')}, {cores()} cores, load {os.getloadavg()[0]:.1f} at the start; "
              f"torch {torch.__version__}, {torch.get_num_threads()} threads")  # fmt: skip
        print(", ".join(f"{name}: {value}" for name, value in settings.items()))

    def table(self, heading: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """A table under a heading; floats with three decimals."""
        cells = [columns, *([f"{c:.3f}" if isinstance(c, float) else str(c) for c in row] for row in rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        print(f"\n{heading}")
        for row in cells:
            first, *rest = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
            print("  " + "  ".join([first.strip().ljust(widths[0]), *rest]), flush=True)

    def criterion(self, what: str, met: bool) -> None:
        """Record whether a required figure was reached; `what` names figure and requirement."""
        print(f"{'ok    ' if met else 'MISSED'} {what}", flush=True)
        if not met:
            self._missed.append(what)

    def end(self) -> NoReturn:
        """Exit: 0 when every criterion was met, 1 when one was missed."""
        print(f"\n{len(self._missed)} criteria missed" if self._missed else "\nall criteria met")
        sys.exit(1 if self._missed else 0)

"""What a step is, and what it knows of the run that it belongs to."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Result = dict[str, Any]  # plain data; `rows`: a list of dicts, shown as a table, joined over a group's steps


@dataclass(frozen=True)
class Setting:
    """device: cuda or cpu. miniature: tiny widths and counts. out: where results go. scratch: a folder for one run.

    ends: when the part has to be over, in seconds of `time.time`.
    """

    device: str
    miniature: bool
    out: Path
    scratch: Path
    ends: float

    @property
    def cuda(self) -> bool:
        return self.device == "cuda"

    @property
    def seconds_left(self) -> float:
        return self.ends - time.time()

    def pick(self, full: Any, miniature: Any) -> Any:
        """The first at full size, the second in miniature."""
        return miniature if self.miniature else full


@dataclass(frozen=True)
class Step:
    """One measurement. name: unique in its part. group: heading of its table. limit: seconds, then it is killed."""

    name: str
    group: str
    run: Callable[[], Result]
    limit: float

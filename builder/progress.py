"""Progress bars, of one process where several run the same command."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm


def is_first_process() -> bool:
    """Whether this is the one process, of those that torchrun or accelerate launch started, that speaks for all."""
    return os.environ.get("RANK", "0") == "0"


def progress(items: Iterable[Any], description: str, unit: str, total: int | None = None) -> tqdm[Any]:
    """`items`, with a bar that is gone at the end; of several processes the first one shows it."""
    return tqdm(items, total=total, desc=description, unit=unit, leave=False, disable=not is_first_process())

"""What a worker's log holds that its user must see at once, beside the progress bar."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SHOWN = "builder.sampling"  # its warnings: memory that ran out, which changes pixels


@contextmanager
def notices(write: Callable[[str], object]) -> Iterator[None]:
    """Within the block, warnings of the sampler go to `write`, too; workers hand their records to the parent's log."""
    handler = _Handler(write)
    logging.getLogger(SHOWN).addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger(SHOWN).removeHandler(handler)


class _Handler(logging.Handler):
    """Says each message once: every worker of a machine meets the same limits."""

    def __init__(self, write: Callable[[str], object]) -> None:
        super().__init__(logging.WARNING)
        self._write = write
        self._said: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        said = record.getMessage()
        if said not in self._said:
            self._said.add(said)
            self._write(f"warning: {said}")

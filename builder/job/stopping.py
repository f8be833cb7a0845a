"""SIGTERM, as a spot machine or SLURM sends it before it takes the machine away: the units in hand may be finished.

Engines ask `asked()` before they begin another unit. When the grace is over what is in hand is abandoned, wherever it
is; the commit allows that. Signals belong to the process, and so does the state here.
"""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from builder.errors import Terminated

log = logging.getLogger(__name__)
_asked = False


def asked() -> bool:
    """Whether this process was told to end."""
    return _asked


def leave_if_asked() -> None:
    """Terminated when this process was told to end: what comes next belongs to who continues."""
    if _asked:
        raise Terminated


@contextmanager
def graceful(grace: float) -> Iterator[None]:
    """Within the block SIGTERM lets `grace` seconds pass before it raises Terminated; a second one raises at once.

    What ends in time sees `asked()` and leaves. Only the main thread hears signals: in another one nothing changes.
    """
    global _asked
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ask(signum: int, frame: FrameType | None) -> None:
        global _asked
        if _asked or grace <= 0:
            raise Terminated
        _asked = True
        log.warning("told to end: units in hand have %g s", grace)
        signal.setitimer(signal.ITIMER_REAL, grace)

    def give_up(signum: int, frame: FrameType | None) -> None:
        raise Terminated

    _asked = False
    before = signal.signal(signal.SIGALRM, give_up), signal.signal(signal.SIGTERM, ask)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before[0])
        signal.signal(signal.SIGTERM, before[1])
        _asked = False

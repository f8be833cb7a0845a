"""The one error a user's mistake raises; the command line turns it into a message and exit code 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class BuilderError(Exception):
    """A mistake in the input. `what` says what is wrong and where, `remedy` what to do about it."""

    def __init__(self, what: str, remedy: str = "") -> None:
        self.what = what
        self.remedy = remedy
        super().__init__(f"{what}\n  {remedy}" if remedy else what)

    def __reduce__(self) -> tuple[type[BuilderError], tuple[str, str]]:
        """A worker process hands its error to the parent by pickle."""
        return BuilderError, (self.what, self.remedy)


class Terminated(KeyboardInterrupt):
    """SIGTERM ended the command; the exit code says so, as a shell would."""

    exit_code = 143


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A remedy that names the nearest known word, or all of them when none is near."""
    known = sorted(known)
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"did you mean '{near[0]}'?" if near else f"known: {', '.join(known)}"

"""All mistakes of an input, collected while it is read and reported together."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from builder.errors import BuilderError

SHOWN = 5  # mistakes that are written out, of each kind
KINDS = 12  # kinds that are written out


class Problems:
    """Mistakes found so far. Mistakes with the same remedy are of one kind.

    A reader that meets a mistake adds it and goes on, so that one run shows them all.
    """

    def __init__(self) -> None:
        self._by_remedy: dict[str, list[str]] = {}
        self._errors: list[BuilderError] = []

    def __len__(self) -> int:
        return sum(len(found) for found in self._by_remedy.values())

    def add(self, what: str, remedy: str) -> None:
        """Note a mistake: what is wrong and where, and what to do about it."""
        self.add_error(BuilderError(what, remedy))

    def add_error(self, error: BuilderError) -> None:
        """Note a mistake that was raised."""
        found = self._by_remedy.setdefault(error.remedy, [])
        if error.what not in found[-SHOWN:]:  # several columns of one line may fail alike
            found.append(error.what)
            self._errors.append(error)

    @contextmanager
    def collected(self) -> Iterator[None]:
        """Note the mistake that ends the block, and go on after it."""
        try:
            yield
        except BuilderError as error:
            self.add_error(error)

    def raise_if_any(self) -> None:
        """Raise one BuilderError with all mistakes: a single one as it is; of many, SHOWN of each kind, and counts."""
        if not self._errors:
            return
        if len(self) == 1:
            raise self._errors[0]
        raise BuilderError("\n".join([f"{len(self)} mistakes in the input", *self._lines()]))

    def _lines(self) -> Iterator[str]:
        kinds = list(self._by_remedy.items())
        for remedy, found in kinds[:KINDS]:
            yield from (f"  - {what}" for what in found[:SHOWN])
            if len(found) > SHOWN:
                yield f"  - … and {len(found) - SHOWN} more of this kind"
            if remedy:
                yield f"    {remedy}"
        if rest := sum(len(found) for _, found in kinds[KINDS:]):
            yield f"  - … and {rest} more of {len(kinds) - KINDS} other kinds"

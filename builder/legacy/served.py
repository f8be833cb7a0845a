"""How many images of each phase were served, and what is printed of it."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping

EVERY = 100  # images


class ServedImages:
    """Counts by phase; thread-safe. A line is printed whenever another hundred is full."""

    def __init__(self, names: Mapping[str, str]) -> None:
        """`names`: code of each phase -> its name, in the order of the printed lines."""
        self._names = dict(names)
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()

    def add(self, code: str, count: int) -> None:
        """`count` images of a phase were served."""
        with self._lock:
            before = self._counts.total()
            self._counts[code] += count
            line = self._line() if before // EVERY < self._counts.total() // EVERY else ""
        if line:
            print(line, flush=True)

    def reset(self) -> None:
        """Begin at 0 again."""
        with self._lock:
            self._counts.clear()

    @property
    def counts(self) -> dict[str, int]:
        """Images served, by code of the phase; also of those that none was served of."""
        with self._lock:
            return {code: self._counts[code] for code in self._names}

    def summary(self) -> str:
        """Counts and shares by phase, a line each; empty where nothing was served."""
        counts = self.counts
        total = sum(counts.values())
        if not total:
            return ""
        lines = [
            f"  phase {code} ({self._names[code]}): {count:,} ({count / total:.1%})" for code, count in counts.items()
        ]
        return "\n".join([f"synthetic images served: {total:,}", *lines])

    def _line(self) -> str:
        by_phase = ", ".join(f"{code}:{self._counts[code]}" for code in self._names)
        return f"  synthetic images served: {self._counts.total():,} | by phase: {by_phase}"

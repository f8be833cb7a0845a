"""How fast a loader is here: until the first batch, and samples/s after it."""

from __future__ import annotations

import time
from dataclasses import dataclass

from builder.mixing.loader import MixedLoader


@dataclass(frozen=True)
class Speed:
    """Seconds until the first batch (workers start), then seconds for `samples` in `batches`."""

    first: float
    seconds: float
    batches: int
    samples: int

    @property
    def rate(self) -> float:
        """Samples/s of this rank, after the first batch."""
        return self.samples / self.seconds if self.seconds else float("nan")


def measure(loader: MixedLoader, batches: int) -> Speed:
    """Read up to `batches` batches after the first one, over as many epochs as that takes."""
    begin = time.perf_counter()
    first = then = 0.0
    read = samples = 0
    while read <= batches:
        for batch in loader:
            read += 1
            if read == 1:
                then = time.perf_counter()
                first = then - begin
                continue
            samples += len(batch[1])
            if read > batches:
                break
    return Speed(first, time.perf_counter() - then, batches, samples)

"""One writer at a time on a local dataset. The lock is the kernel's, so it falls with the process that holds it."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager

from builder.errors import BuilderError
from builder.shards.dataset import Dataset

LOCK = ".lock"  # in the folder of the dataset's manifests


@contextmanager
def exclusive(dataset: Dataset) -> Iterator[None]:
    """Hold the dataset for this process; BuilderError when another one has it. Object stores have no such lock."""
    if not dataset.storage.is_local:
        yield
        return
    path = dataset.storage.path(f"manifests/{dataset.name}/{LOCK}")
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w", encoding="ascii") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BuilderError(
                f"another job is writing dataset '{dataset.name}'", "wait for it, stop it, or choose another --name"
            ) from None
        yield

"""Who may write a local dataset: one job, or many ranks. The lock is the kernel's, so it falls with who holds it.

It keeps mistakes apart, no more: across machines not every file system has it, object stores never. That nothing is
corrupted without it is the commit's own doing (shards.commit).
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager

from builder.errors import BuilderError
from builder.shards.dataset import Dataset

LOCK = ".lock"  # in the folder of the dataset's manifests
NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK)  # e.g. Lustre mounted without flock


@contextmanager
def exclusive(dataset: Dataset) -> Iterator[None]:
    """Hold the dataset for this process; BuilderError when another one has it."""
    with _locked(dataset, fcntl.LOCK_EX):
        yield


@contextmanager
def shared(dataset: Dataset) -> Iterator[None]:
    """Hold the dataset together with other ranks; BuilderError when a process has it for itself."""
    with _locked(dataset, fcntl.LOCK_SH):
        yield


@contextmanager
def _locked(dataset: Dataset, kind: int) -> Iterator[None]:
    if not dataset.storage.is_local:
        yield
        return
    path = dataset.storage.path(f"manifests/{dataset.name}/{LOCK}")
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "a", encoding="ascii") as file:
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BuilderError(
                f"another job is writing dataset '{dataset.name}'", "wait for it, stop it, or choose another --name"
            ) from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
        yield

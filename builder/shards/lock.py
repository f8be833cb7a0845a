"""Who may write a local dataset: one job, or many ranks. The lock is the kernel's, so it falls with who holds it.

It keeps mistakes apart, no more: across machines not every file system has it, object stores never. That nothing is
corrupted without it is the commit's own doing (shards.commit).
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from builder.errors import BuilderError
from builder.shards.dataset import LOCK, Dataset

NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK)  # e.g. Lustre mounted without flock


class LockedError(BuilderError):
    """Another process holds the lock."""


@contextmanager
def exclusive(dataset: Dataset) -> Iterator[None]:
    """Hold the dataset for this process; LockedError when another one has it."""
    with _locked(dataset, fcntl.LOCK_EX):
        yield


@contextmanager
def shared(dataset: Dataset) -> Iterator[None]:
    """Hold the dataset together with other ranks; LockedError when a process has it for itself."""
    with _locked(dataset, fcntl.LOCK_SH):
        yield


@contextmanager
def held_file(path: Path, what: str, remedy: str) -> Iterator[None]:
    """Hold a lock file, which is made and stays, for this process.

    Raises:
        LockedError: another process holds it; `what` says what that one does, `remedy` what to do.
    """
    with _flocked(str(path), fcntl.LOCK_EX, LockedError(what, remedy)):
        yield


def discard(dataset: Dataset) -> None:
    """Remove the lock of a dataset of which nothing else is left, and its folder; only for who holds it."""
    if dataset.storage.is_local:
        folder = Path(dataset.storage.path(f"manifests/{dataset.name}"))
        with suppress(OSError):  # somebody began it anew: then folder and lock are theirs
            if os.listdir(folder) == [LOCK]:
                (folder / LOCK).unlink()
                folder.rmdir()


@contextmanager
def _locked(dataset: Dataset, kind: int) -> Iterator[None]:
    if not dataset.storage.is_local:
        yield
        return
    dataset.storage.require_inside(f"manifests/{dataset.name}/{LOCK}")
    path = dataset.storage.path(f"manifests/{dataset.name}/{LOCK}")
    busy = LockedError(
        f"another job is writing dataset '{dataset.name}'", "wait for it, stop it, or choose another --name"
    )
    with _flocked(path, kind, busy):
        yield


@contextmanager
def _flocked(path: str, kind: int, busy: LockedError) -> Iterator[None]:
    while True:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        try:
            file = os.fdopen(_opened(path), "a", encoding="ascii")
        except FileNotFoundError:  # its folder was removed in between
            continue
        with file:
            try:
                fcntl.flock(file, kind | fcntl.LOCK_NB)
            except BlockingIOError:
                raise busy from None
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
            if not _is_at(file, path):  # who held it removed it with the dataset: this is nobody's lock any more
                continue
            yield
            return


def _is_at(file: IO[str], path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def _opened(path: str) -> int:
    """The lock file, made where there is none. A received folder may have a pipe or a link in its place."""
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENXIO, errno.EISDIR):
            raise
    else:
        if stat.S_ISREG(os.fstat(handle).st_mode):
            return handle
        os.close(handle)
    raise BuilderError(f"{path} is not a file", "remove it")

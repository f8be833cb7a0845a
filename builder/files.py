"""Local files: only regular ones are read, and a file is written whole or not at all.

A pipe, a device or a socket in the place of a file would hang its reader for ever, or never end.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
LITTLE = 16 << 20  # bytes left on a disk that a file of weights could not be written to
TEMPORARY = ".tmp-"  # the name of a file that is being written begins so


class NotRegularError(OSError):
    """Something else than a file lies where a file was looked for."""

    def __init__(self, path: str | Path, mode: int) -> None:
        kinds = {
            stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device",
            stat.S_IFBLK: "a device", stat.S_IFDIR: "a folder",
        }  # fmt: skip
        super().__init__(errno.EINVAL, f"it is {kinds.get(stat.S_IFMT(mode), 'no file')}, not a file", str(path))


def open_regular(path: str | Path, *, follow: bool = True) -> int:
    """Open a regular file for reading; returns its descriptor.

    Args:
        path: Where it lies.
        follow: Whether a symbolic link as the last part of the path is followed.

    Raises:
        NotRegularError: a pipe, device, socket or folder lies there.
        OSError: as `os.open`; ELOOP for a link that is not to be followed.
    """
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | (0 if follow else os.O_NOFOLLOW)
    try:
        handle = os.open(path, flags)  # O_NONBLOCK: a pipe without a writer would keep us waiting
    except OSError as error:
        if error.errno == errno.ENXIO:  # a socket
            raise NotRegularError(path, stat.S_IFSOCK) from None
        raise
    mode = os.fstat(handle).st_mode
    if not stat.S_ISREG(mode):
        os.close(handle)
        raise NotRegularError(path, mode)
    return handle


def open_file(path: str | Path) -> BinaryIO:
    """A regular file, opened for reading bytes. Raises as `open_regular`."""
    return cast(BinaryIO, os.fdopen(open_regular(path), "rb"))


def read_file(path: str | Path, limit: int | None = None) -> bytes:
    """The bytes of a regular file, of a longer one the first `limit`. Raises as `open_regular`."""
    with open_file(path) as file:
        return file.read() if limit is None else file.read(limit)


def replace_file(target: str | Path, fill: Callable[[BinaryIO], object], mode: int = 0o644) -> None:
    """Write a file through a temporary name, fsync and rename: what is visible is the old one or the new one, whole.

    Args:
        target: The file; its folder is made when it is not there.
        fill: Writes the content.
        mode: Permissions of the new file.
    """
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=TEMPORARY, dir=target.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            fill(cast(BinaryIO, file))
            file.flush()
            os.fchmod(file.fileno(), mode)
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    fsync_folder(target.parent)


@contextmanager
def full_disk_as_oserror(target: str | Path) -> Iterator[None]:
    """Within the block a full disk is the OSError that it is.

    torch, safetensors and shutil raise errors of their own, which only say in words what the system said.

    Args:
        target: What is being written; the error names it.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        said = str(error)
        for number in FULL:
            if f"os error {number}" in said or f"[Errno {number}]" in said or os.strerror(number) in said:
                raise OSError(number, os.strerror(number), str(target)) from error
        free = shutil.disk_usage(Path(target).parent).free if Path(target).parent.is_dir() else 1
        if isinstance(error, RuntimeError) and "PytorchStreamWriter" in said and free < LITTLE:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target)) from error
        raise


def fsync_tree(folder: Path) -> None:
    """Make the files in a folder last through a power cut, and their names."""
    for place, _, names in os.walk(folder):
        for name in names:
            handle = os.open(os.path.join(place, name), os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
        fsync_folder(Path(place))


def fsync_folder(folder: Path) -> None:
    """Make the names in a folder last through a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

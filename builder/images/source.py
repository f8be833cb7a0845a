"""Where the bytes of a picture come from: memory, or a regular file that is read only where it is looked at."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from builder.images.errors import ImageError

_KINDS = {
    stat.S_ISDIR: "a folder",
    stat.S_ISFIFO: "a pipe",
    stat.S_ISSOCK: "a socket",
    stat.S_ISCHR: "a device",
    stat.S_ISBLK: "a device",
}


class ByteSource:
    """Bytes in memory."""

    def __init__(self, data: bytes) -> None:
        self._data, self.size = data, len(data)

    def at(self, offset: int, count: int) -> bytes:
        """Up to `count` bytes from `offset`; fewer where the picture ends."""
        return self._data[offset : offset + count]

    def all(self) -> bytes:
        return self._data


class FileSource(ByteSource):
    """Bytes of an open file."""

    def __init__(self, file: int, size: int) -> None:
        self._file, self.size = file, size

    def at(self, offset: int, count: int) -> bytes:
        return os.pread(self._file, max(0, min(count, self.size - offset)), offset)

    def all(self) -> bytes:
        parts, offset = [], 0
        while part := os.pread(self._file, min(self.size - offset, 1 << 30), offset):
            parts.append(part)
            offset += len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)


@contextmanager
def opened(picture: bytes | Path) -> Iterator[ByteSource]:
    """The bytes of `picture`; ImageError when it is no regular file (which could hang), or the system can't read it."""
    if not isinstance(picture, Path):
        yield ByteSource(picture)
        return
    try:
        _require_regular(os.stat(picture).st_mode)
        file = os.open(picture, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
        try:
            status = os.fstat(file)
            _require_regular(status.st_mode)  # it may have been exchanged since
            yield FileSource(file, status.st_size)
        finally:
            os.close(file)
    except OSError as error:
        raise ImageError(error.strerror or str(error), "check that the file is there and may be read") from None


def _require_regular(mode: int) -> None:
    for is_kind, name in _KINDS.items():
        if is_kind(mode):
            raise ImageError(f"it is {name}, not a file", "put the picture itself there")

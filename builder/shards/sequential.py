"""A file read from a place on, forwards, in large pieces: what reads a tar sequentially reads it through this.

tarfile asks for ten kilobytes at a time, which of an object store would be a request each. Here a piece is one range
request, and of an object store the next one is fetched while the last one is used.
"""

from __future__ import annotations

import hashlib
import io
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from builder.shards.storage import Storage

PIECE = 4 << 20  # bytes; at 100 MB/s some 40 ms, so that a request's latency hardly counts


class Sequential(io.RawIOBase):
    """The bytes [start, stop) of a file. EOFError where it ends before `stop`. To be closed after use."""

    def __init__(self, storage: Storage, path: str, start: int, stop: int, piece: int = PIECE) -> None:
        self._holder, self._path = storage.holder(path)
        self._next, self._stop, self._piece, self._short = start, stop, piece, 0
        self._left = memoryview(b"")
        self._thread = None if self._holder.is_local else ThreadPoolExecutor(1)
        self._coming: Future[bytes] | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._left:
            self._left = memoryview(self._fetched())
        count = min(len(buffer), len(self._left))
        buffer[:count] = self._left[:count]
        self._left = self._left[count:]
        return count

    def _fetched(self) -> bytes:
        """The next piece; empty at the end."""
        if self._short:
            raise EOFError(f"the file ends {self._short:,} bytes too early")
        asked = min(self._piece, self._stop - self._next)
        if asked <= 0:
            return b""
        data = self._coming.result() if self._coming is not None else self._read(self._next, asked)
        self._next += len(data)
        if len(data) < asked:
            self._short = self._stop - self._next
            return data or self._fetched()
        ahead = min(self._piece, self._stop - self._next)
        self._coming = self._thread.submit(self._read, self._next, ahead) if self._thread and ahead > 0 else None
        return data

    def _read(self, start: int, size: int) -> bytes:
        return self._holder.read(self._path, start, size)

    def close(self) -> None:
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)
        super().close()


class Hashing(io.RawIOBase):
    """A stream that is hashed as it is read."""

    def __init__(self, stream: io.RawIOBase) -> None:
        self._stream, self._digest = stream, hashlib.sha256()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._stream.readinto(buffer) or 0
        self._digest.update(memoryview(buffer)[:count])
        return count

    def finish(self) -> str:
        """SHA-256 of the whole, of which the rest is read."""
        while self.read(1 << 20):
            pass
        return self._digest.hexdigest()

    def close(self) -> None:
        self._stream.close()
        super().close()

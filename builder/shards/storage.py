"""Files under an output root: a local folder or an fsspec URL (s3://bucket/prefix). Writing is all or nothing."""

from __future__ import annotations

import os
import tempfile
from functools import cached_property
from pathlib import Path, PurePosixPath

import fsspec
from fsspec.implementations.local import LocalFileSystem

from builder.errors import BuilderError
from builder.shards.commit import TEMPORARY, create_by_link, fsync_folder


class Storage:
    """One output root. Paths are relative to it, with '/'; a Storage travels to worker processes by its root."""

    def __init__(self, root: str | Path = ".") -> None:
        self.root = str(root)

    @cached_property
    def _located(self) -> tuple[fsspec.AbstractFileSystem, str]:
        try:
            return fsspec.core.url_to_fs(self.root)
        except (ImportError, ValueError) as error:
            raise BuilderError(
                f"cannot open '{self.root}': {error}", "install the extra for it, e.g. pip install builder[s3]"
            ) from None

    @property
    def fs(self) -> fsspec.AbstractFileSystem:
        return self._located[0]

    @property
    def is_local(self) -> bool:
        return isinstance(self.fs, LocalFileSystem)

    def path(self, relative: str) -> str:
        """The full path of a file, as the file system (local: the operating system) knows it."""
        return str(PurePosixPath(self._located[1]) / relative)

    def exists(self, relative: str) -> bool:
        return bool(self.fs.exists(self.path(relative)))

    def list(self, folder: str, suffix: str = "") -> list[str]:
        """Names in a folder that end in `suffix`, sorted; files being written are left out."""
        try:
            entries = self.fs.ls(self.path(folder), detail=False, refresh=True) if not self.is_local else None
            names = [PurePosixPath(e).name for e in entries] if entries is not None else os.listdir(self.path(folder))
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted(name for name in names if name.endswith(suffix) and not name.startswith(TEMPORARY))

    def read(self, relative: str, offset: int = 0, size: int | None = None) -> bytes:
        """The bytes of a file, or of the range [offset, offset + size)."""
        with self.fs.open(self.path(relative), "rb") as file:
            file.seek(offset)
            return bytes(file.read() if size is None else file.read(size))

    def write(self, relative: str, data: bytes) -> None:
        """Write a whole file: local through a temporary name, fsync, rename and fsync of the folder; else one PUT."""
        if not self.is_local:
            self.fs.pipe_file(self.path(relative), data)
            return
        target = Path(self.path(relative))
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=TEMPORARY, dir=target.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fchmod(file.fileno(), 0o644)
                os.fsync(file.fileno())
            os.replace(temporary, target)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        fsync_folder(target.parent)

    def create(self, relative: str, data: bytes) -> bool:
        """Write a whole file unless it is there; True when this call made it: of many at once, one hears True.

        Not synced to disk: made for claims, which a power cut may take back.
        """
        if not self.is_local:
            try:
                self.fs.pipe_file(self.path(relative), data, mode="create")
            except FileExistsError:
                return False
            return True
        target = Path(self.path(relative))
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=TEMPORARY, dir=target.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            create_by_link(Path(temporary), target)
        except FileExistsError:
            return False
        finally:
            Path(temporary).unlink(missing_ok=True)
        return True

    def sweep(self, folder: str) -> None:
        """Remove what killed processes were writing in a folder; only for who holds the dataset (see shards.lock)."""
        if self.is_local and self.exists(folder):
            for file in Path(self.path(folder)).glob(f"{TEMPORARY}*"):
                file.unlink(missing_ok=True)

    def remove(self, relative: str) -> None:
        """Remove a file or a folder with all in it; nothing when it is not there."""
        if self.exists(relative):
            self.fs.rm(self.path(relative), recursive=True)

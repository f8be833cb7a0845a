"""Files under an output root: a local folder or an fsspec URL (s3://bucket/prefix). Writing is all or nothing."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

import fsspec
from fsspec.implementations.local import LocalFileSystem

from builder.display import printable
from builder.errors import BuilderError
from builder.files import TEMPORARY, open_regular, replace_file
from builder.shards.commit import create_by_link
from builder.shards.stores import connect, explained
from builder.trust import is_below, is_trusted

READERS = 16  # files read at once from an object store


class Storage:
    """One output root. Paths are relative to it, with '/'; a Storage travels to worker processes by its root.

    What lies elsewhere (the tars of an indexed dataset) has a full path or URL, and can only be read: `read`, `stamp`
    and `holder` understand it.
    """

    def __init__(self, root: str | Path = ".", *, confined: bool = True) -> None:
        """An output root. `confined`: symbolic links that lead out of it are not followed (local roots only)."""
        self.root = str(root)
        self.confined = confined
        self._opened: tuple[int, fsspec.AbstractFileSystem, str] | None = None
        self._elsewhere: dict[str, Storage] = {}
        self._inside: dict[str, bool] = {}  # folders that were looked at

    def __getstate__(self) -> dict[str, Any]:
        return {
            "root": self.root, "confined": self.confined, "_opened": None, "_elsewhere": {}, "_inside": {},
        }  # fmt: skip

    def _located(self) -> tuple[fsspec.AbstractFileSystem, str]:
        if self._opened is None or self._opened[0] != os.getpid():  # connections do not survive a fork
            self._opened = (os.getpid(), *connect(self.root))
        return self._opened[1:]

    @property
    def fs(self) -> fsspec.AbstractFileSystem:
        return self._located()[0]

    @property
    def is_local(self) -> bool:
        return isinstance(self.fs, LocalFileSystem)

    def path(self, relative: str) -> str:
        """The full path of a file, as the file system (local: the operating system) knows it."""
        root = self._located()[1]
        return f"{root.rstrip('/')}/{relative}" if "://" in root else str(PurePosixPath(root) / relative)

    def holder(self, path: str) -> tuple[Storage, str]:
        """Who holds a file, and its path there: this root, or of a full path or URL the folder that it lies in."""
        if not (path.startswith("/") or "://" in path):
            return self, path
        folder, _, name = path.rpartition("/")
        if folder not in self._elsewhere:
            place = f"{folder}/" if folder.endswith((":/", ":")) else folder or "/"
            self._elsewhere[folder] = Storage(place, confined=False)  # who may name it, shards.received decides
        return self._elsewhere[folder], name

    def open_local(self, relative: str) -> int:
        """Open a regular file of a local root for reading; returns its descriptor.

        OSError when it can't be opened; BuilderError when a symbolic link leads out of the root.
        """
        self.require_inside(relative)
        path = self.path(relative)
        if not self.confined:
            return open_regular(path)
        try:
            return open_regular(path, follow=False)
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise
        real = os.path.realpath(path)
        if not (is_below(real, os.path.realpath(self.path(""))) or is_trusted(real)):
            raise _outside(path, real)
        return open_regular(real)

    def require_inside(self, relative: str) -> None:
        """Refuse a file whose folder is reached through a symbolic link that leads out of the root."""
        if not self.confined:
            return
        folder = relative.rpartition("/")[0]
        if folder not in self._inside:
            path = self.path(folder)
            real = os.path.realpath(path)
            if not (is_below(real, os.path.realpath(self.path(""))) or is_trusted(real)):
                raise _outside(path, real)
            self._inside[folder] = True

    def address(self, fs: fsspec.AbstractFileSystem, path: str) -> str:
        """How a manifest names a file that `fs` knows as `path`: relative to this root, or in full if elsewhere."""
        root = self._located()[1].rstrip("/")
        if fs == self.fs and path.startswith(f"{root}/"):
            return path[len(root) + 1 :]
        return path if isinstance(fs, LocalFileSystem) else str(fs.unstrip_protocol(path))

    def shown(self, relative: str) -> str:
        """A path as a user would write it: under the root, as that was given."""
        return f"{self.root.rstrip('/')}/{relative}" if "://" in self.root else str(Path(self.root) / relative)

    def exists(self, relative: str) -> bool:
        if self.is_local:
            return os.path.exists(self.path(relative))
        with explained(self.root):
            return bool(self.fs.exists(self.path(relative)))

    def list(self, folder: str, suffix: str = "") -> list[str]:
        """Names in a folder that end in `suffix`, sorted; files being written are left out."""
        return sorted(name for name in self._names(folder) if name.endswith(suffix) and not name.startswith(TEMPORARY))

    def stamps(self, folder: str, suffix: str) -> dict[str, tuple[int, str]]:
        """Of the files in a folder: name -> size in bytes, and what changes whenever the file is written anew.

        The second is an object store's checksum or version, or else the time of writing; one listing, nothing is read.
        """
        if self.is_local:
            place = self.path(folder)
            return {name: _file_stamp(f"{place}/{name}") for name in self.list(folder, suffix)}
        entries = {PurePosixPath(entry["name"]).name: entry for entry in self._entries(folder)}
        return {
            name: (int(entry["size"]), _stamp(entry))
            for name, entry in sorted(entries.items())
            if name.endswith(suffix) and entry["type"] == "file" and not name.startswith(TEMPORARY)
        }

    def stamp(self, path: str) -> tuple[int, str] | None:
        """Of one file, here or elsewhere, as `stamps` has it; None when it is not there."""
        holder, name = self.holder(path)
        try:
            if holder.is_local:
                return _file_stamp(holder.path(name))
            with explained(holder.root):
                entry = holder.fs.info(holder.path(name))
            return int(entry["size"]), _stamp(entry)
        except (FileNotFoundError, NotADirectoryError):
            return None

    def _names(self, folder: str) -> Sequence[str]:
        if not self.is_local:
            return [PurePosixPath(entry["name"]).name for entry in self._entries(folder)]
        try:
            return os.listdir(self.path(folder))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def _entries(self, folder: str) -> Sequence[dict[str, Any]]:
        try:
            with explained(self.root):
                entries: Sequence[dict[str, Any]] = self.fs.ls(self.path(folder), detail=True, refresh=True)
                return entries
        except (FileNotFoundError, NotADirectoryError):
            return []

    def read(self, relative: str, offset: int = 0, size: int | None = None) -> bytes:
        """The bytes of a file, or of the range [offset, offset + size)."""
        holder, relative = self.holder(relative)
        if holder is not self:
            return holder.read(relative, offset, size)
        if not self.is_local:
            with explained(self.root):
                end = None if size is None else offset + size
                return bytes(self.fs.cat_file(self.path(relative), start=offset, end=end))
        with os.fdopen(self.open_local(relative), "rb") as file:
            file.seek(offset)
            return file.read() if size is None else file.read(size)

    def read_many(self, relatives: Sequence[str]) -> Iterator[bytes | OSError]:
        """The bytes of files, in order, or why one cannot be read; on object stores several are read at once, ahead."""
        if self.is_local:
            yield from map(self._read_or_error, relatives)
            return
        with ThreadPoolExecutor(READERS) as pool:
            waiting: deque[Future[bytes | OSError]] = deque()
            for relative in relatives:
                waiting.append(pool.submit(self._read_or_error, relative))
                if len(waiting) > READERS:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()

    def _read_or_error(self, relative: str) -> bytes | OSError:
        try:
            return self.read(relative)
        except OSError as error:
            return error

    def open(self, relative: str) -> BinaryIO:
        """A file to read here and there, as Parquet is read."""
        if self.is_local:
            return cast(BinaryIO, os.fdopen(self.open_local(relative), "rb"))
        with explained(self.root):
            return cast(BinaryIO, self.fs.open(self.path(relative), "rb"))

    def write(self, relative: str, data: bytes) -> None:
        """Write a whole file: local through a temporary name, fsync, rename and fsync of the folder; else one PUT."""
        if not self.is_local:
            with explained(self.root, writing=True):
                self.fs.pipe_file(self.path(relative), data, **self._whole(data))
            return
        self._replace(relative, lambda file: file.write(data))

    def write_file(self, relative: str, source: Path) -> None:
        """As `write`, from a file, however large; on object stores in parts, which a failure takes away again."""
        if not self.is_local:
            with explained(self.root, writing=True):
                self.fs.put_file(str(source), self.path(relative))
            return
        with open(source, "rb") as whole:
            self._replace(relative, lambda file: shutil.copyfileobj(whole, file))

    def _replace(self, relative: str, fill: Callable[[BinaryIO], object]) -> None:
        """A local file, through a temporary name: what is visible is the old one or, whole and on disk, the new one."""
        self.require_inside(relative)
        replace_file(self.path(relative), fill)

    def create(self, relative: str, data: bytes) -> bool:
        """Write a whole file unless it is there; True when this call made it: of many at once, one hears True.

        On object stores a conditional PUT (S3: If-None-Match; Google: generation 0). A store or fsspec file system
        without it looks first and then writes, so that two at the same moment may both hear True. An answer that was
        lost on the way is found again by the bytes, so callers who mean to exclude each other write different ones.
        Locally not synced to disk: made for claims, which a power cut may take back.
        """
        if not self.is_local:
            try:
                with explained(self.root, writing=True):
                    self._create_object(self.path(relative), data)
                return True
            except FileExistsError:
                with suppress(FileNotFoundError):
                    return self.read(relative) == data
                return False
        self.require_inside(relative)
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

    def _create_object(self, path: str, data: bytes) -> None:
        try:
            self.fs.pipe_file(path, data, mode="create", **self._whole(data))
        except (NotImplementedError, OSError) as error:
            if not isinstance(error, NotImplementedError) and error.errno != errno.ENOSYS:
                raise
            if self.fs.exists(path):  # the store knows no conditional PUT
                raise FileExistsError(errno.EEXIST, "is there already", path) from None
            self.fs.pipe_file(path, data, **self._whole(data))

    def _whole(self, data: bytes) -> dict[str, int]:
        """Arguments that make an upload a single PUT: of one in parts, a killed process would leave parts behind."""
        return {"chunksize": len(data) + 1} if self._is("s3") or self._is("gs") else {}

    def _is(self, protocol: str) -> bool:
        names = self.fs.protocol
        return protocol in ((names,) if isinstance(names, str) else names)

    def sweep(self, folder: str) -> None:
        """Remove what killed processes were writing in a folder; only for who holds the dataset (see shards.lock)."""
        if self.is_local and self.exists(folder):
            for file in Path(self.path(folder)).glob(f"{TEMPORARY}*"):
                file.unlink(missing_ok=True)
        elif self._is("s3"):
            bucket, _, prefix = self.path(folder).partition("/")
            with explained(self.root, writing=True):
                found = self.fs.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=f"{prefix}/")
                for upload in found.get("Uploads", []):
                    place = {"Bucket": bucket, "Key": upload["Key"], "UploadId": upload["UploadId"]}
                    with suppress(FileNotFoundError):
                        self.fs.call_s3("abort_multipart_upload", **place)

    def require_writable(self) -> None:
        """BuilderError when nothing can be written under the root: to be asked before long work, not after it."""
        probe = f"manifests/{TEMPORARY}{os.getpid()}"
        try:
            self.write(probe, b"?")
            self.remove(probe)
        except OSError as error:
            raise BuilderError(
                f"{self.root} cannot be written to: {error.strerror or error}",
                "make room, mend the permissions, or choose another --out",
            ) from None

    def move(self, relative: str, target: str) -> None:
        """Give a file another name under the root, in place of what is there; on object stores a copy first."""
        if self.is_local:
            os.makedirs(os.path.dirname(self.path(target)), exist_ok=True)
            os.replace(self.path(relative), self.path(target))
            return
        with explained(self.root, writing=True):
            self.fs.mv(self.path(relative), self.path(target))

    def remove(self, relative: str) -> None:
        """Remove a file or a folder with all in it; nothing when it is not there."""
        if self.is_local:
            self.require_inside(relative)
            path = Path(self.path(relative))
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:  # of a link only itself goes
                path.unlink(missing_ok=True)
            return
        if not self.exists(relative):
            return
        with suppress(FileNotFoundError), explained(self.root):
            self.fs.rm(self.path(relative), recursive=True)
        if self.exists(relative):  # s3fs passes over objects that were not deleted
            raise BuilderError(f"{self.shown(relative)} was not removed", "check that you may delete there; try again")


def _outside(path: str, real: str) -> BuilderError:
    return BuilderError(
        f"{printable(path)} leads out of the output root, to {printable(real)}",
        "put what it should be in its place; if you made this link yourself, confirm where it leads: "
        f"--trust-root {printable(os.path.dirname(real))}",
    )


def _file_stamp(path: str) -> tuple[int, str]:
    at = os.stat(path)
    return at.st_size, f"{at.st_mtime_ns}-{at.st_ino}"  # the clock may stand between two writes


def _stamp(entry: dict[str, Any]) -> str:
    """What tells two writings of an object apart, of fsspec's listing (s3fs, gcsfs, memory, others)."""
    for key in ("ETag", "md5Hash", "etag", "generation", "LastModified", "mtime", "updated", "created"):
        if entry.get(key):
            return str(entry[key]).strip('"')
    return ""

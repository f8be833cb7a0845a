"""The one reader of tars: forwards, member by member, with every claim checked before memory is taken.

A tar may come from elsewhere. Its headers may claim sizes that the file does not have, hide gigabytes in sparse or
compressed data, name a member twice, or name links, pipes and devices; their names may hold anything. Whatever is not
a plain list of regular files gives one error that names tar and member.
"""

from __future__ import annotations

import io
import posixpath
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from builder.display import printable

BLOCK = tarfile.BLOCKSIZE  # bytes; members begin at multiples of it
MAX_HEADER = 1 << 20  # bytes of an extended header: a name, or pax records
MAX_TEXT = 16 << 20  # bytes of a member that is read as text: .cls, .json, .txt


class TarError(ValueError):
    """A tar can't be read, or is none that we read; `member` is the last one before it, or ''."""

    def __init__(self, message: str, member: str = "") -> None:
        self.member = member
        super().__init__(message)


@dataclass(frozen=True)
class Member:
    """A regular file in a tar: its name, and the place of its payload in bytes."""

    name: str
    offset: int
    size: int
    _stream: Any

    def read(self, limit: int | None = None) -> bytes:
        """Its payload, before the next member is asked for. TarError when it has more than `limit` bytes."""
        if limit is not None and self.size > limit:
            raise TarError(f"'{printable(self.name)}' has {self.size:,} bytes, more than {limit:,}", self.name)
        try:
            payload: bytes = self._stream.read(self.size)
        except (tarfile.TarError, EOFError) as error:
            raise TarError(str(error), self.name) from None
        if len(payload) != self.size:
            raise TarError("unexpected end of data", self.name)
        return payload


def read_members(stream: io.RawIOBase, size: int, *, start: int = 0, unique: bool = True) -> Iterator[Member]:
    """The regular files of a tar in order; folders are passed over.

    Args:
        stream: The tar from a header on, read forwards only.
        size: Bytes of the whole tar.
        start: Where in it the stream begins: a multiple of 512.
        unique: Whether the tar is read to its end: then no name may stand twice and the end mark must be there.

    Raises:
        TarError: it is cut short, compressed, or damaged; a member is a link, sparse, a device or a pipe, claims more
            bytes than the tar has, or has the name of another.
    """
    seen: set[int] = set()
    last = ""
    try:
        with tarfile.open(fileobj=stream, mode="r|", tarinfo=_BoundedInfo) as archive:
            while (found := archive.next()) is not None:
                archive.members = []  # type: ignore[attr-defined]  # tarfile would keep them all
                place = start + found.offset_data
                if not 0 <= found.size <= size - place:
                    raise TarError(
                        f"unexpected end: it claims {found.size:,} bytes, and the tar has {size:,}", found.name
                    )
                last = found.name
                if found.isdir():
                    continue
                if not found.isreg() or found.sparse is not None:
                    raise TarError(f"'{printable(found.name)}' is {_kind(found)}, not a file")
                if unique:
                    name = hash(posixpath.normpath(found.name))
                    if name in seen:
                        raise TarError(f"'{printable(found.name)}' stands twice in it")
                    seen.add(name)
                yield Member(found.name, place, found.size, archive.fileobj)
    except TarError as error:
        raise TarError(str(error), error.member or last) from None
    except (tarfile.TarError, EOFError, ValueError, OverflowError, IndexError) as error:  # what tarfile lets through
        raise TarError(printable(str(error)), last) from None
    except RecursionError:
        raise TarError("its headers are nested without end", last) from None


def _kind(found: tarfile.TarInfo) -> str:
    kinds = {
        tarfile.LNKTYPE: "a hard link", tarfile.SYMTYPE: "a symbolic link", tarfile.CHRTYPE: "a device",
        tarfile.BLKTYPE: "a device", tarfile.FIFOTYPE: "a named pipe",
    }  # fmt: skip
    return kinds.get(found.type, "sparse")


class _BoundedInfo(tarfile.TarInfo):
    """A header that takes no more memory than a name needs; tarfile itself reads as much as one claims.

    It also says of a bad header what is wrong, where tarfile takes it for the end of the tar.
    """

    @classmethod
    def fromtarfile(cls, archive: Any) -> Any:
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # a block of zeros: the end
            raise
        except tarfile.EmptyHeaderError:  # type: ignore[attr-defined]
            raise TarError(
                "empty file" if archive.offset == 0 else "its end mark is missing: it is cut short"
            ) from None
        except tarfile.HeaderError as error:
            raise TarError(f"{error}; is it compressed? Then unpack it to .tar") from None

    def _require_short(self) -> None:
        if not 0 <= self.size <= MAX_HEADER:
            raise TarError(f"a header claims {self.size:,} bytes")

    def _proc_pax(self, archive: Any) -> Any:
        self._require_short()
        return super()._proc_pax(archive)  # type: ignore[misc]

    def _proc_gnulong(self, archive: Any) -> Any:
        self._require_short()
        return super()._proc_gnulong(archive)  # type: ignore[misc]

    def _proc_sparse(self, archive: Any) -> Any:
        raise TarError(f"'{printable(self.name)}' is sparse, not a file")

    def _proc_gnusparse_00(self, following: Any, *rest: Any) -> Any:
        return self._proc_sparse(None)

    _proc_gnusparse_01 = _proc_gnusparse_10 = _proc_gnusparse_00

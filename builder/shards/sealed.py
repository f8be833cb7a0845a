"""Files that carry a SHA-256 of their own bytes, so that a single flipped bit in them is found when they are read.

A Parquet file's own page checksums cover the pages' data, and neither the headers of the pages nor the footer; of 150
single flipped bits 41 changed the content and were not noticed. So a file of ours has a seal in its footer: two
entries of key-value metadata, `builder.file` (what the file is called under the output root) and `builder.sha256`.
The digest is that of the file with 64 zeros in its own place. The page checksums are written all the same, for readers
other than ours, who can't know the seal.

Files of older versions have no seal. They are read as before, and `builder verify` says that they lack one.

The rule of what may pass unnoticed: a change after which everything that is read is the same. That is the case for
white space in a JSON document and for the name of a lock; there is no other.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping

import pyarrow as pa
import pyarrow.parquet as pq

FILE_KEY, SEAL_KEY = b"builder.file", b"builder.sha256"  # in the footer's key-value metadata
DIGEST_LENGTH = 64  # hex digits of a SHA-256
UNSET = b"0" * DIGEST_LENGTH
# How Thrift's compact protocol writes the entry: the key, a field header, the length of the value, the value.
MARK = SEAL_KEY + b"\x18" + bytes([DIGEST_LENGTH])
TRAILER = b"builder.sha256 "  # of other files: at the very end, before the digest and a line feed


class DamagedError(ValueError):
    """The bytes of a file are not those that were written."""


def encode_parquet(table: pa.Table, file: str) -> bytes:
    """A table as the bytes of a sealed Parquet file.

    Args:
        table: What to write; its schema metadata rides along.
        file: What the file will be called, relative to the output root. It is part of what is sealed, so that a file
            that took another's place is found.
    """
    buffer = io.BytesIO()
    with pq.ParquetWriter(buffer, table.schema, compression="zstd", write_page_checksum=True) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata({FILE_KEY: file.encode(), SEAL_KEY: UNSET})
    data = bytearray(buffer.getbuffer())
    start = data.rindex(MARK) + len(MARK)
    data[start : start + DIGEST_LENGTH] = hashlib.sha256(data).hexdigest().encode()
    return bytes(data)


def open_parquet(data: bytes, *, name: str | None = None) -> pq.ParquetFile:
    """A Parquet file of its bytes, with the seal checked where there is one.

    Args:
        data: The whole file.
        name: Its name, without folders; None: whatever it is called.

    Raises:
        DamagedError: the bytes are not those that were sealed, or the file was sealed under another name.
        pyarrow.ArrowException: they are no Parquet file.
    """
    require_seal(data)
    file = pq.ParquetFile(io.BytesIO(data), page_checksum_verification=True)
    sealed = _file_of(file)
    if name is not None and sealed is not None and sealed.rpartition("/")[2] != name:
        raise DamagedError(f"it is the file {sealed}, in another's place")
    return file


def require_seal(data: bytes) -> bool:
    """Whether the bytes of a Parquet file are sealed. DamagedError when they are, and are not those that were."""
    at = data.rfind(MARK)
    if at < 0:
        if FILE_KEY in data:  # the other entry of the two was hit
            raise DamagedError("its seal is damaged")
        return False
    start = at + len(MARK)
    digest = hashlib.sha256(memoryview(data)[:start])
    digest.update(UNSET)
    digest.update(memoryview(data)[start + DIGEST_LENGTH :])
    if digest.hexdigest().encode() != data[start : start + DIGEST_LENGTH]:
        raise DamagedError("its bytes are not those that its seal (SHA-256) says")
    return True


def sealed_file(data: bytes) -> str | None:
    """What a Parquet file, whose seal is checked, was called when it was sealed; None without a seal."""
    return _file_of(pq.ParquetFile(io.BytesIO(data)))


def _file_of(file: pq.ParquetFile) -> str | None:
    name = (file.metadata.metadata or {}).get(FILE_KEY)
    return None if name is None else name.decode(errors="replace")


def without_seal(metadata: Mapping[bytes, bytes] | None) -> dict[bytes, bytes]:
    """Schema metadata without the entries of the seal, which belong to a file and not to its rows."""
    return {key: value for key, value in (metadata or {}).items() if key not in (FILE_KEY, SEAL_KEY)}


def with_trailer(payload: bytes, file: str) -> bytes:
    """The bytes of another kind of file (a cache of features), whose reader ignores what follows, with a seal.

    Args:
        payload: What its reader needs.
        file: What the file will be called, relative to the output root; part of what is sealed.
    """
    return payload + TRAILER + _digest(payload, file) + b"\n"


def require_trailer(data: bytes, file: str) -> tuple[bytes, bool]:
    """The payload of bytes that `with_trailer` made, and whether they have a seal.

    DamagedError when they have one that does not fit the payload and the name.
    """
    at = len(data) - len(TRAILER) - DIGEST_LENGTH - 1
    payload = data[: max(0, at)]
    if at >= 0 and data[at:] == TRAILER + _digest(payload, file) + b"\n":
        return payload, True
    if (at >= 0 and _resembles(data[at : at + len(TRAILER)])) or TRAILER in data[-200:]:
        raise DamagedError("its bytes are not those that its seal (SHA-256) says, or it is another's file")
    return data, False


def _digest(payload: bytes, file: str) -> bytes:
    digest = hashlib.sha256(file.encode() + b"\0")
    digest.update(payload)
    return digest.hexdigest().encode()


def _resembles(mark: bytes) -> bool:
    """Whether a trailer's mark is there but for a few of its letters."""
    return sum(one == other for one, other in zip(mark, TRAILER, strict=True)) > len(TRAILER) // 2

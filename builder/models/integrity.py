"""Whether the files of a checkpoint are those that were written: checkpoint.json records size and SHA-256 of each.

They are checked whenever a checkpoint is loaded: a flipped bit in a weight makes other images, and nothing else would
tell. Size and time of a file say nothing of a flipped bit, so nothing is remembered between two loads. Hashing reads
what loading reads again, now from memory, and takes one second a gigabyte and core; files are hashed side by side. So
a model of 10 GB loads some five seconds later.

Folders of others, and those of older versions, record nothing; they are loaded as they are.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any, cast

from builder.display import printable
from builder.errors import BuilderError
from builder.files import open_file

CHECKED_SUFFIXES = (".safetensors", ".json", ".txt", ".model")  # what a pipeline is loaded from
NAMED = 3  # damaged files that a message names
REMEDY = "copy the whole checkpoint folder again; `builder checkpoint verify` checks it"

Record = Mapping[str, Mapping[str, Any]]  # path in the folder -> bytes, sha256


def record_files(folder: Path, description: str) -> dict[str, dict[str, Any]]:
    """Size in bytes and SHA-256 of every file in a folder that images depend on, by its path there.

    Args:
        folder: Of a whole checkpoint.
        description: The name of the file that the record is written to, which carries a checksum of its own.
    """
    names = sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and path.suffix in CHECKED_SUFFIXES and path.name != description
    )
    digests = _digests([folder / name for name in names])
    return {
        name: {"bytes": (folder / name).stat().st_size, "sha256": digest}
        for name, digest in zip(names, digests, strict=True)
    }


def damaged_files(folder: Path, recorded: Record) -> list[str]:
    """What is off with the recorded files of a folder, one line each; empty when all are as they were written."""
    found: list[str] = []
    to_hash: list[str] = []
    for name, entry in recorded.items():
        path = folder / name
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            found.append(f"the record names {printable(name)}, which lies outside {folder}")
            continue
        try:
            size = path.stat().st_size if path.is_file() else None
        except OSError as error:
            found.append(f"{path} cannot be read: {error.strerror}")
            continue
        if size is None:
            found.append(f"{path} is missing")
        elif size != entry["bytes"]:
            found.append(f"{path} has {size:,} bytes, where {entry['bytes']:,} were written")
        else:
            to_hash.append(name)
    for name, digest in zip(to_hash, _digests([folder / name for name in to_hash]), strict=True):
        if digest != recorded[name]["sha256"]:
            found.append(f"{folder / name} is damaged: its SHA-256 is not the one that was recorded")
    return found


def require_undamaged(folder: Path, recorded: Record) -> None:
    """BuilderError when a recorded file of a folder is not as it was written; it names the first few."""
    found = damaged_files(folder, recorded)
    if found:
        more = f"; and {len(found) - NAMED} more" if len(found) > NAMED else ""
        raise BuilderError("; ".join(found[:NAMED]) + more, REMEDY)


def _digests(paths: Sequence[Path]) -> list[str]:
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(_sha256, paths))


def _sha256(path: Path) -> str:
    with open_file(path) as stream:
        return hashlib.file_digest(cast(io.BufferedReader, stream), "sha256").hexdigest()

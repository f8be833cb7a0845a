"""Commit a tar and its manifest as one, whoever else commits the same shard at the same time, with whatever bytes.

Two processes may make one unit at once: a claim that expired too early, two jobs started by mistake. On one type of
machine their tars are equal; on different hardware they are not, and a tar of one must never be visible with the
manifest of the other. No clock, lock or lease is relied on; a process may sleep anywhere for any time, or die.

An attempt X stages its tar TX and its manifest MX under names of its own, then
  1. looks for staged manifests of other attempts at the shard that bear other bytes, and revokes each of them: removes
     its staged tar, then its staged manifest;
  2. gives up when the shard's manifest M is there: the shard is committed;
  3. renames TX to the tar's name T;
  4. links MX to M, which fails when M is there.
Steps 3 and 4 fail when X was revoked (their source is gone); X then stages anew.

Why M always finds its own tar: take attempts X and Y with different bytes, where X has linked MX. Both stage before
they look, so one of them looks after the other has staged.
- X saw Y staged: it removed TY before it renamed TX, so if Y renamed TY at all, it did so before, and T is X's.
- Y saw X staged: it removed MX, so X did not link it; or M was there already, so Y gave up at 2 before it touched T.
- Y looked when MX was gone again: X had linked it or was revoked by another, and Y gave up at 2, or X has no M.
So whoever puts a tar at T after X did is revoked before, or does not get so far; and M, once there, stays.
Attempts with the same bytes leave each other alone: T gets the same bytes again, and the first to link wins.
Two attempts may revoke each other. Then both begin again, after a random pause, and one of them is first.
"""

from __future__ import annotations

import errno
import os
import secrets
import time
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path

from builder.files import TEMPORARY, fsync_folder  # a staged tar is named so: sweeping it away is to revoke it

STAGED = "job/staged"  # beside the manifests: a folder that stays small, because every attempt reads it
ATTEMPTS = 20
PAUSE = 0.01  # s; the longest pause after the first attempt, doubled after each
NO_LINKS = (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EMLINK)

Steps = Generator[None, None, bool | None]


@dataclass(frozen=True)
class Pair:
    """A tar and its manifest: where they belong, their bytes, and the SHA-256 of the tar, which names what is in it."""

    tar_path: Path
    tar: bytes
    manifest_path: Path
    manifest: bytes
    tar_sha256: str


def commit(pair: Pair) -> bool:
    """Make the pair visible unless the shard is there already; whether this call did. OSError as of writing files."""
    for attempt in range(ATTEMPTS):
        committed = _run(attempt_steps(pair))
        if committed is not None:
            return committed
        time.sleep(PAUSE * 2 ** min(attempt, 8) * secrets.randbelow(1000) / 1000)
    raise OSError(errno.EBUSY, "another process with other hardware makes this shard again and again")


def attempt_steps(pair: Pair) -> Steps:
    """One attempt, stopping before every step that others can see, so that a test can interleave or end it anywhere.

    Returns True: committed by this attempt; False: there already; None: another attempt revoked this one.
    """
    folder = pair.manifest_path.parent / STAGED
    own = f"{pair.manifest_path.stem}.{pair.tar_sha256}.{secrets.token_hex(8)}"
    staged_tar, staged_manifest = pair.tar_path.parent / f"{TEMPORARY}{own}", folder / own
    if pair.manifest_path.exists():
        return False
    try:
        for path in (staged_tar, staged_manifest):
            path.parent.mkdir(parents=True, exist_ok=True)
        _write(staged_tar, pair.tar)
        yield
        _write(staged_manifest, pair.manifest)
        yield
        for other in _others(folder, pair):
            (pair.tar_path.parent / f"{TEMPORARY}{other}").unlink(missing_ok=True)
            yield
            (folder / other).unlink(missing_ok=True)
            yield
        if pair.manifest_path.exists():
            return False
        yield
        os.replace(staged_tar, pair.tar_path)
        fsync_folder(pair.tar_path.parent)  # before the manifest: after a power cut, too, it must not stand alone
        yield
        create_by_link(staged_manifest, pair.manifest_path)
        fsync_folder(pair.manifest_path.parent)
        return True
    except FileExistsError:
        return False
    except FileNotFoundError:  # a staged file, or the folder of a dataset that was begun anew
        return None
    finally:
        staged_tar.unlink(missing_ok=True)
        staged_manifest.unlink(missing_ok=True)


def _others(folder: Path, pair: Pair) -> list[str]:
    """Staged attempts at the same shard with other bytes."""
    mine = f"{pair.manifest_path.stem}.{pair.tar_sha256}."
    names = os.listdir(folder)
    return [name for name in names if name.startswith(f"{pair.manifest_path.stem}.") and not name.startswith(mine)]


def create_by_link(source: Path, target: Path) -> None:
    """Give a whole file the name `target`, unless it is there: FileExistsError. `source` may stay."""
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        if target.exists():  # a file system without links: between this look and the rename another could come
            raise FileExistsError(errno.EEXIST, "is there already", str(target)) from None
        os.rename(source, target)


def _write(path: Path, data: bytes) -> None:
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _run(steps: Steps) -> bool | None:
    while True:
        try:
            next(steps)
        except StopIteration as end:
            committed: bool | None = end.value
            return committed

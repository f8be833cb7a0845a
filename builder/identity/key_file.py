"""Where the secret of a site comes from, and how it is made: whole or not at all, once, for its owner's eyes."""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import stat
import warnings
from pathlib import Path
from typing import Protocol

from builder.errors import BuilderError
from builder.files import fsync_folder, read_file
from builder.identity.key import PatientKey, new_secret, sound_secret

KEY_VARIABLE = "BUILDER_PATIENT_KEY"
KEY_FILE = "patient.key"
PRIVATE = 0o600
LARGEST = 4096  # bytes of a key file
_NO_LINKS = (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EMLINK)  # e.g. FAT, many FUSE mounts
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK, errno.EBADF, errno.EINVAL)


class OutputRoot(Protocol):
    """What of shards.storage.Storage is asked here."""

    root: str

    @property
    def is_local(self) -> bool: ...

    def path(self, relative: str) -> str: ...


def find_key(root: OutputRoot, key_file: Path | None = None) -> PatientKey:
    """The site's key: `key_file`, else the environment, else `patient.key` in the output root, made once (mode 0600).

    Of many that need the first key of a root at once, one makes it and all get that one. A key file that others may
    read is made private again, or, where that is not allowed, named in a warning.

    Raises:
        BuilderError: the key is empty, too short or malformed, cannot be read or written, or would have to be made in
            an object store.
    """
    if key_file is not None:
        return PatientKey(_read(key_file), f"key file {key_file}")
    if KEY_VARIABLE in os.environ:
        secret = os.environb[KEY_VARIABLE.encode()]
        return PatientKey(
            sound_secret(secret, f"the environment variable {KEY_VARIABLE}"), f"environment {KEY_VARIABLE}"
        )
    if not root.is_local:
        raise BuilderError(
            "no patient key is given", f"use --key-file or {KEY_VARIABLE}: a secret is not written to {root.root}"
        )
    path = Path(root.path(KEY_FILE))
    if os.path.lexists(path) or not _made(path):
        return PatientKey(_read(path), f"key file {path}")
    return PatientKey(_read(path), f"key file {path}, newly made; keep it, and keep it secret")


def _made(path: Path) -> bool:
    """Make a new key at `path`, whole and on the disk before it has that name; False if another one came first."""
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with os.fdopen(os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY, PRIVATE), "wb") as file:
                file.write(new_secret() + b"\n")
                file.flush()
                os.fsync(file.fileno())
            _give_name(draft, path)
        except FileExistsError:
            return False
        finally:
            draft.unlink(missing_ok=True)
        fsync_folder(path.parent)
    except OSError as error:
        raise BuilderError(
            f"the patient key {path} cannot be written: {error.strerror or error}",
            f"make room or choose another --out, or use --key-file or {KEY_VARIABLE}",
        ) from None
    return True


def _give_name(draft: Path, path: Path) -> None:
    """Name the draft `path`, never over another file. Raises FileExistsError when there is one."""
    try:
        os.link(draft, path)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        _rename_alone(draft, path)


def _rename_alone(draft: Path, path: Path) -> None:
    """As `_give_name`, where the file system has no hard links: one process at a time, if it has locks."""
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        if os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
        draft.rename(path)
    finally:
        os.close(folder)


def _read(path: Path) -> bytes:
    try:
        secret = read_file(path, LARGEST + 1)
        _keep_private(path)
    except OSError as error:
        raise BuilderError(f"the key file {path} cannot be read: {error.strerror or error}", "check the path") from None
    if len(secret) > LARGEST:
        raise BuilderError(f"the key file {path} is larger than {LARGEST} bytes", "give a file that holds one key")
    return sound_secret(secret, str(path))


def _keep_private(path: Path) -> None:
    mode = stat.S_IMODE(os.stat(path).st_mode)
    if not mode & 0o077:
        return
    try:
        os.chmod(path, mode & 0o700)
        private = not stat.S_IMODE(os.stat(path).st_mode) & 0o077  # some mounts take the call and change nothing
    except OSError:
        private = False
    done = "now it is of mode 600" if private else "its mode cannot be changed: keep it where only you can read"
    warnings.warn(f"others could read the patient key {path} (mode {mode:03o}); {done}", stacklevel=4)

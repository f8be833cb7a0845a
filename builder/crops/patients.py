"""Patients leave the site only as keyed hashes: HMAC-SHA256 (RFC 2104) under a secret that stays there."""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from builder.errors import BuilderError
from builder.shards.storage import Storage

KEY_VARIABLE = "BUILDER_PATIENT_KEY"
KEY_FILE = "patient.key"
MIN_KEY = 16  # bytes; patient numbers are few, so a short key would be found by trying


@dataclass(frozen=True)
class PatientKey:
    """The secret of a site, and where it came from (for the summary; never the secret itself)."""

    secret: bytes
    origin: str

    @property
    def fingerprint(self) -> str:
        """16 hex digits that name the key without revealing it; hashes of other keys can't be compared."""
        return hashlib.sha256(b"builder patient key" + self.secret).hexdigest()[:16]

    def hash(self, patient: str) -> str:
        """The keyed hash of a patient id: 32 hex digits."""
        return hmac.new(self.secret, patient.encode(), hashlib.sha256).hexdigest()[:32]

    def __repr__(self) -> str:
        return f"PatientKey({self.fingerprint})"


def find_key(storage: Storage, key_file: Path | None = None) -> PatientKey:
    """The site's key: `key_file`, else the environment, else `patient.key` in the output root, made once (mode 0600).

    BuilderError when the key is too short, cannot be read, or would have to be made in an object store.
    """
    if key_file is not None:
        return PatientKey(_read(key_file), f"key file {key_file}")
    if KEY_VARIABLE in os.environ:
        return PatientKey(
            _long_enough(os.environ[KEY_VARIABLE].strip().encode(), KEY_VARIABLE), f"environment {KEY_VARIABLE}"
        )
    if not storage.is_local:
        raise BuilderError(
            "no patient key is given", f"use --key-file or {KEY_VARIABLE}: a secret is not written to {storage.root}"
        )
    path = Path(storage.path(KEY_FILE))
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    except FileExistsError:
        return PatientKey(_read(path), f"key file {path}")
    except OSError as error:
        raise BuilderError(
            f"the patient key {path} cannot be written: {error}", f"use --key-file or {KEY_VARIABLE}"
        ) from None
    with os.fdopen(handle, "wb") as file:
        file.write(secrets.token_hex(32).encode() + b"\n")
    return PatientKey(_read(path), f"key file {path}, newly made; keep it, and keep it secret")


def photograph_group(photograph: str, group_by: str) -> str:
    """A stand-in for an unknown patient: the photograph itself ('photograph'), or a part of its file name.

    `group_by` other than 'photograph' is a regular expression on the file name; its first group (or the whole match)
    is the patient.
    """
    if group_by == "photograph":
        return f"photograph {photograph}"
    try:
        found = re.search(group_by, PurePosixPath(photograph).name)
    except re.error as error:
        raise BuilderError(
            f"--group-by '{group_by}' is not a regular expression: {error}", "write photograph, or e.g. '^(P[0-9]+)_'"
        ) from None
    if found is None:
        raise BuilderError(
            f"--group-by '{group_by}' does not match {photograph}", "write a pattern that matches every file name"
        )
    return f"group {found.group(1) if found.re.groups else found.group()}"


def _read(path: Path) -> bytes:
    try:
        return _long_enough(path.read_bytes().strip(), str(path))
    except OSError as error:
        raise BuilderError(f"the key file {path} cannot be read: {error}", "check the path") from None


def _long_enough(secret: bytes, where: str) -> bytes:
    if len(secret) < MIN_KEY:
        raise BuilderError(
            f"the patient key in {where} has {len(secret)} bytes",
            f"use {MIN_KEY} or more, e.g. from `openssl rand -hex 32`",
        )
    return secret

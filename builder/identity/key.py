"""Patients leave the site only as keyed hashes: HMAC-SHA256 (RFC 2104) under a secret that stays there."""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
import unicodedata
from dataclasses import dataclass
from typing import Any

from builder.errors import BuilderError
from builder.identity.comparison import PUBLIC_KEY
from builder.identity.spelling import form_of, normalise

MADE = b"builder-"  # so begin the keys that are made here
MIN_KEY = 16  # bytes; patient numbers are few, so a short key would be found by trying
GOOD_KEY = "by `openssl rand -hex 32`"


@dataclass(frozen=True)
class PatientKey:
    """The secret of a site, and where it came from (for the screen; never the secret itself).

    Everything that comes of a name or a patient and is written into a dataset goes through one of these methods. Each
    hashes under a prefix of its own; a normalised id holds no space, so no two of them ever hash the same text.
    """

    secret: bytes
    origin: str

    @property
    def fingerprint(self) -> str:
        """16 hex digits that name the key without revealing it; hashes of other keys can't be compared."""
        return hashlib.sha256(b"builder patient key" + self.secret).hexdigest()[:16]

    @property
    def is_public(self) -> bool:
        """Whether it is the phantom's key, which everybody knows."""
        return self.fingerprint == PUBLIC_KEY

    def hash(self, patient: str) -> str:
        """The keyed hash of a patient's id in any spelling: 32 hex digits.

        Raises:
            BuilderError: the id names nobody (see spelling.normalise).
        """
        spelling = normalise(patient)
        if not spelling:
            raise BuilderError(f"the patient id {patient!r} names nobody", "write an id with a letter or a digit")
        return self._hmac(spelling).hex()[:32]

    def photograph(self, name: str) -> str:
        """The keyed hash of a photograph's name, 32 hex digits: its name often tells the patient."""
        return self._hmac(f"photograph {unicodedata.normalize('NFC', name)}").hex()[:32]

    def form(self, patient: str) -> str:
        """The keyed hash of how an id is built (see spelling.form_of), 16 hex digits."""
        return self._hmac(f"form {form_of(normalise(patient))}").hex()[:16]

    def seal(self, value: Any) -> str:
        """A keyed fingerprint of anything that JSON can hold, 16 hex digits: it says whether something changed."""
        return self._hmac(f"seal {json.dumps(value, sort_keys=True)}").hex()[:16]

    def order(self, name: str) -> bytes:
        """What to sort names by, so that their order tells nobody without the key which is which.

        Under the phantom's key, which is no secret, it is the plain hash that the phantom's crops always lay in: other
        rows would give its crops other keys, and its panel other crops.
        """
        if self.is_public:
            return hashlib.sha256(f"order {name}".encode()).digest()
        return self._hmac(f"order {name}")

    def __repr__(self) -> str:
        return f"PatientKey({self.fingerprint})"

    def _hmac(self, text: str) -> bytes:
        return hmac.new(self.secret, text.encode("utf-8", "surrogatepass"), hashlib.sha256).digest()


def given_key(secret: bytes) -> PatientKey:
    """The key that a program hands over, every byte of it: a sound secret, or the phantom's.

    Raises:
        BuilderError: see `sound_secret`.
    """
    key = PatientKey(secret, "given by the program")
    if not key.is_public:
        sound_secret(secret, "the call")
    return key


def sound_secret(secret: bytes, where: str) -> bytes:
    """The secret without white space around it.

    Raises:
        BuilderError: it is empty, too short, of several lines, with zero bytes, or text in another encoding; `where`
            names it.
    """
    stripped = secret.strip()
    if not stripped:
        raise BuilderError(
            f"the patient key in {where} is empty",
            "restore it from a backup; if nothing was hashed with it yet, remove it, and a new one is made",
        )
    if secret.startswith((b"\xff\xfe", b"\xfe\xff", b"\xef\xbb\xbf")):
        raise BuilderError(f"the patient key in {where} begins with a byte order mark", "save it as plain ASCII")
    if len(stripped) < MIN_KEY:
        raise BuilderError(
            f"the patient key in {where} has {len(stripped)} bytes", f"use {MIN_KEY} or more, e.g. one made {GOOD_KEY}"
        )
    if b"\0" in stripped and stripped.isascii():
        raise BuilderError(
            f"the patient key in {where} is malformed: there are zero bytes in its text",
            f"restore it from a backup, or save it as plain ASCII; a new one is best made {GOOD_KEY}",
        )
    if stripped.isascii() and len(stripped.splitlines()) > 1:
        raise BuilderError(
            f"the patient key in {where} is malformed: it has {len(stripped.splitlines())} lines",
            f"a key is one line, e.g. one made {GOOD_KEY}",
        )
    _require_undamaged(stripped, where)
    return stripped


def new_secret() -> bytes:
    """A new key as a line of text: `builder-`, 64 hex digits, and a check of them, so that a flipped bit is found.

    All of the line is the secret; keys of other makes have no check.
    """
    body = MADE + secrets.token_hex(32).encode()
    return body + b"-" + _check(body)


def _require_undamaged(secret: bytes, where: str) -> None:
    """BuilderError for a key that `new_secret` made and that is not as it was: all hashes would be others."""
    body, check = secret[: len(MADE) + 64], secret[len(MADE) + 64 :]
    # A single damaged byte leaves one of the two marks.
    ours = secret.startswith(MADE) or (len(secret) == len(MADE) + 73 and check.startswith(b"-"))
    if ours and check != b"-" + _check(body):
        raise BuilderError(f"the patient key in {where} is damaged: its check does not fit", "restore it from a backup")


def _check(body: bytes) -> bytes:
    return hashlib.sha256(b"check " + body).hexdigest()[:8].encode()

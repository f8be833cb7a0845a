"""What this user vouched for or confirmed: the only way in which a received file may lead outside its own folder.

A dataset or checkpoint is data. It may name files elsewhere (the tars of an indexed dataset, the base of a LoRA), and
somebody else may have written that name. So a name that leads outside counts only when
- this user's own command wrote it: it then carries a voucher, an HMAC-SHA256 of the name with a secret that never
  leaves the user's state folder ($XDG_STATE_HOME or ~/.local/state), or
- the user confirms the place: `--trust-root PLACE`, or BUILDER_TRUST_ROOTS, several places separated by spaces.
A voucher travels with a dataset, and holds wherever the same user's state folder is.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from pathlib import Path, PurePosixPath

from builder.display import printable
from builder.errors import BuilderError
from builder.files import read_file, replace_file

VARIABLE = "BUILDER_TRUST_ROOTS"
SECRET = "builder/voucher.key"  # below the state folder
BYTES = 32  # of the secret


def vouch(name: str) -> str | None:
    """The voucher of a name that this user's own command writes; None where no secret can be kept."""
    secret = _secret(make=True)
    return None if secret is None else _sign(secret, name)


def is_vouched(name: str, voucher: str | None) -> bool:
    """Whether the voucher of a name is this user's."""
    secret = _secret(make=False) if voucher else None
    return secret is not None and hmac.compare_digest(_sign(secret, name), str(voucher))


def trust_roots(places: list[str]) -> None:
    """Confirm places for this process and those that it starts. BuilderError for one that can't be written down."""
    for place in places:
        if not place or any(character.isspace() for character in place):
            raise BuilderError(f"--trust-root '{printable(place)}' is empty or has a space", "name it through a link")
    os.environ[VARIABLE] = " ".join([*trusted_roots(), *places])


def trusted_roots() -> list[str]:
    """The places that the user confirmed: folders, files, or prefixes of URLs."""
    return os.environ.get(VARIABLE, "").split()


def is_trusted(name: str) -> bool:
    """Whether a full local path or URL lies in a place that the user confirmed. Symbolic links are resolved."""
    if "\0" in name:
        return False
    if "://" in name:
        parts = PurePosixPath(name).parts
        return ".." not in parts and any(parts[: len(own)] == own for own in _urls())
    real = os.path.realpath(name)
    return any(is_below(real, os.path.realpath(place)) for place in trusted_roots() if "://" not in place)


def _urls() -> list[tuple[str, ...]]:
    return [PurePosixPath(place).parts for place in trusted_roots() if "://" in place]


def may_read(reference: str, voucher: str | None = None) -> bool:
    """Whether a received file may lead to `reference`: a place below the working directory, vouched for, or confirmed.

    A name of the hub (OWNER/NAME) is looked up in the user's own cache, and counts as below the working directory.
    """
    if "\0" in reference or "\\" in reference:
        return False
    if "://" not in reference and is_below(os.path.realpath(reference), os.path.realpath(".")):
        return True
    return is_vouched(reference, voucher) or is_trusted(reference)


def is_below(path: str, folder: str) -> bool:
    """Whether a real local path is that of a folder, or of something in it."""
    return path == folder or path.startswith(folder.rstrip("/") + "/")


def _sign(secret: bytes, name: str) -> str:
    return hmac.new(secret, name.encode("utf-8", "surrogateescape"), hashlib.sha256).hexdigest()


def _secret(*, make: bool) -> bytes | None:
    """The user's secret; None where there is none and none can be made."""
    base = os.environ.get("XDG_STATE_HOME") or ""
    folder = Path(base) if base.startswith("/") else Path(os.path.expanduser("~")) / ".local" / "state"
    path = folder / SECRET
    try:
        found = read_file(path, BYTES)
        if len(found) == BYTES:
            return found
    except FileNotFoundError:
        pass
    except OSError:
        return None
    if not make:
        return None
    try:
        replace_file(path, lambda file: file.write(secrets.token_bytes(BYTES)), mode=0o600)
        return read_file(path, BYTES)  # of two that made one at once, the last stays
    except OSError:
        return None

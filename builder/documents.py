"""Our JSON documents (dataset.json, reference.json, checkpoint.json ...): written with a checksum, read strictly.

A document may come from elsewhere, or have rotted on a disk. So it is read within bounds (size, nesting, numbers,
text), compared with the checksum that it carries, and held against a pydantic model of what it must say. Whatever is
wrong gives one BuilderError that names the document, the place in it and the remedy.

The checksum is the SHA-256 of the rest in canonical form; it shows damage, not who wrote the document. `checked` says
that a document has one, so that damage to the name `sha256` itself is found as well. Documents older than the checksum
have neither and are accepted; `has_checksum` tells, and `builder verify` says so.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from builder.display import printable
from builder.errors import BuilderError
from builder.files import NotRegularError, read_file, replace_file

if TYPE_CHECKING:
    from pydantic import BaseModel

MAX_BYTES = 256 << 20  # of a document; reference.json of 100,000 training crops takes some 50 MB
MAX_DEPTH = 64  # lists and tables within each other
LARGEST = 2**64  # integers lie below, on both sides: more than any column holds
CHECKSUM, CHECKED = "sha256", "checked"  # keys of a document
RESTORE = "restore it from a copy"
EDITED = f"if it was edited by hand, take its '{CHECKSUM}' and '{CHECKED}' out"
SHOWN = 3  # problems that one message names


class Files(Protocol):
    """What documents need of a `shards.storage.Storage`."""

    def read(self, relative: str, offset: int = 0, size: int | None = None) -> bytes: ...

    def write(self, relative: str, data: bytes) -> None: ...


def write_document(path: str | Path, data: Mapping[str, Any], storage: Files | None = None) -> None:
    """Write a document with its checksum, whole or not at all.

    Args:
        path: Where: a local path, or relative to `storage`.
        data: Plain JSON data with text as keys; finite numbers.
        storage: The output root that `path` is relative to; None for a local path.
    """
    encoded = encode_document(data)
    if storage is None:
        replace_file(path, lambda file: file.write(encoded))
    else:
        storage.write(str(path), encoded)


def read_document(
    path: str | Path, schema: type[BaseModel] | None = None, storage: Files | None = None, *, remedy: str = RESTORE
) -> dict[str, Any]:
    """Read a document of ours, without the keys of its checksum.

    Args:
        path: Where: a local path, or relative to `storage`.
        schema: What it must say; None for any table.
        storage: The output root that `path` is relative to; None for a local path.
        remedy: What to do when it is damaged.

    Raises:
        FileNotFoundError: there is none.
        BuilderError: it is damaged, too large, or not what `schema` says.
    """
    try:
        raw = read_file(path, MAX_BYTES + 1) if storage is None else storage.read(str(path))
    except (NotRegularError, IsADirectoryError) as error:
        raise BuilderError(f"{printable(str(path))} cannot be read: {error.strerror}", remedy) from None
    return parse_document(raw, str(path), schema, remedy=remedy)


def parse_document(
    raw: bytes, where: str, schema: type[BaseModel] | None = None, *, remedy: str = RESTORE
) -> dict[str, Any]:
    """As `read_document`, of its bytes. `where` names the document in messages."""
    shown = printable(where)
    data = parse_json(raw, where, remedy=remedy)
    if not isinstance(data, dict):
        raise BuilderError(f"{shown} is damaged: it holds a {type(data).__name__}, not keys and values", remedy)
    recorded, checked = data.pop(CHECKSUM, None), data.pop(CHECKED, None)
    if (recorded, checked) != (None, None) and (checked is not True or recorded != checksum(data)):
        raise BuilderError(f"{shown} is damaged: it is not what its checksum says", f"{remedy}; {EDITED}")
    if schema is not None:
        validate(data, schema, where, remedy=remedy)
    return data


def has_checksum(raw: bytes) -> bool:
    """Whether the bytes of a document that can be read carry a checksum: those of older versions do not."""
    data = parse_json(raw, "the document")
    return isinstance(data, dict) and CHECKSUM in data


def encode_document(data: Mapping[str, Any]) -> bytes:
    """The bytes of a document: indented JSON with its checksum. Equal data gives equal bytes."""
    plain = {key: value for key, value in data.items() if key not in (CHECKSUM, CHECKED)}
    whole = {**plain, CHECKED: True, CHECKSUM: checksum(plain)}
    return json.dumps(whole, indent=1, sort_keys=True, allow_nan=False).encode() + b"\n"


def checksum(data: Mapping[str, Any]) -> str:
    """SHA-256 (hex) of plain data in canonical JSON: sorted keys, no spaces, ASCII."""
    return hashlib.sha256(json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()).hexdigest()


def parse_json(
    raw: bytes, where: str, *, remedy: str = RESTORE, max_bytes: int = MAX_BYTES, constants: bool = False
) -> Any:
    """Strict JSON within bounds: UTF-8, no key twice, no NaN or infinity, no lone surrogates, no huge integers.

    Args:
        raw: The bytes.
        where: What they are, for the message.
        remedy: What to do when they are no such JSON.
        max_bytes: Their number at most.
        constants: Whether NaN and Infinity, which Python writes though they are no JSON, are read as such.

    Raises:
        BuilderError: they are not; it says why.
    """
    shown = printable(where)
    if len(raw) > max_bytes:
        raise BuilderError(f"{shown} has more than {max_bytes:,} bytes", remedy)
    try:
        data = json.loads(
            raw.decode("utf-8-sig"),
            object_pairs_hook=_table,
            parse_constant=float if constants else _no_constant,
            parse_float=_float,
            parse_int=_integer,
        )
        _require_bounded(data)
    except RecursionError:
        raise BuilderError(f"{shown} is nested more than {MAX_DEPTH} levels deep", remedy) from None
    except ValueError as error:  # also UnicodeDecodeError and JSONDecodeError
        raise BuilderError(f"{shown} is damaged: {printable(str(error))}", remedy) from None
    return data


def validate(data: Mapping[str, Any], schema: type[BaseModel], where: str, *, remedy: str = RESTORE) -> None:
    """Hold plain data against a pydantic model. BuilderError names the first places where it is something else."""
    from pydantic import ValidationError

    try:
        schema.model_validate(data, strict=True)
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False)
        said = "; ".join(_problem(problem) for problem in found[:SHOWN])
        more = f", and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        raise BuilderError(f"{printable(where)} is damaged: {said}{more}", remedy) from None


def _problem(problem: Mapping[str, Any]) -> str:
    place = ".".join(printable(str(part), 40) for part in problem["loc"]) or "it"
    message = str(problem["msg"])
    if problem["type"] == "missing":
        return f"'{place}' is missing"
    return f"'{place}' is {printable(problem['input'], 60)}: {message[:1].lower()}{message[1:]}"


def _table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key '{twice}' stands twice")
    return table


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is no JSON")


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:40]} is too large")
    return value


def _integer(text: str) -> int:
    if len(text) > 20 or not -LARGEST < int(text) < LARGEST:
        raise ValueError(f"the number {text[:40]} is too large")
    return int(text)


def _require_bounded(data: Any) -> None:
    """Refuse what is nested too deeply, and text that is none (lone surrogates); without recursion."""
    level = [data]
    for _ in range(MAX_DEPTH + 1):
        inner: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                inner += value.keys()
                inner += value.values()
            elif isinstance(value, list):
                inner += value
            elif isinstance(value, str):
                value.encode()  # UnicodeEncodeError, a ValueError
        if not inner:
            return
        level = inner
    raise RecursionError

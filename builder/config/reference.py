"""Every key of the config described: its type and range, default, and what it is for. A page of them is generated."""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import TypeAdapter
from pydantic.json_schema import GenerateJsonSchema

KINDS = {"boolean": "true or false", "string": "text", "object": "keys and values", "array": "a list"}


@dataclasses.dataclass(frozen=True)
class Key:
    """One key of the config, e.g. `train.prompt_dropout`.

    Attributes:
        name: with its sections, joined by dots.
        kind: what its value must be, in words: "a number from 0 to 1".
        default: as JSON has it.
        description: what it is for.
    """

    name: str
    kind: str
    default: Any
    description: str


def keys() -> list[Key]:
    """All keys, in the order of the config's sections."""
    from builder.config.models import Config

    return list(_keys(Config, Config().to_json(), ""))


def _keys(kind: Any, defaults: Mapping[str, Any], prefix: str) -> Sequence[Key]:
    found: list[Key] = []
    schema = _schema(kind)
    for name, found_schema in schema["properties"].items():
        described = _resolved(found_schema, schema)
        default = defaults[name]
        if described.get("properties"):
            found += _keys(typing.get_type_hints(kind)[name], default, f"{prefix}{name}.")
        else:
            found.append(Key(prefix + name, described_kind(described), default, found_schema.get("description", "")))
    return found


class _Schema(GenerateJsonSchema):
    def emit_warning(self, kind: Any, detail: str) -> None:
        """Not that a ClassTable, a default, is no JSON."""


@functools.lru_cache
def _schema(kind: Any) -> dict[str, Any]:
    return TypeAdapter(kind).json_schema(schema_generator=_Schema)


def _resolved(schema: Mapping[str, Any], root: Mapping[str, Any]) -> Mapping[str, Any]:
    reference = schema.get("$ref")
    return root["$defs"][reference.rpartition("/")[2]] if reference else schema


def schema_at(kind: Any, path: Sequence[str | int]) -> Mapping[str, Any]:
    """The JSON schema of what stands at `path` within a section; empty where nothing is known of it."""
    root = _schema(kind)
    found: Mapping[str, Any] = root
    for part in path:
        found = _resolved(found, root)
        inner = found.get("items") if isinstance(part, int) else (found.get("properties") or {}).get(part)
        if inner is None and isinstance(part, str):
            inner = found.get("additionalProperties")
        if not isinstance(inner, Mapping):
            return {}
        found = inner
    return _resolved(found, root)


def described_kind(schema: Mapping[str, Any]) -> str:
    """What a value must be, in words, from its JSON schema: "a whole number from 1 to 1000"."""
    if "x-described" in schema:
        return str(schema["x-described"])
    choices = schema.get("enum", [schema["const"]] if "const" in schema else None)
    if choices is not None:
        named = [str(choice) or '""' for choice in choices]
        return named[0] if len(named) == 1 else f"{', '.join(named[:-1])} or {named[-1]}"
    kind = schema.get("type", "")
    if kind in ("integer", "number"):
        return ("a whole number" if kind == "integer" else "a number") + _span(schema)
    if kind == "array":
        return f"a list of {described_kind(schema.get('items', {}))}" if schema.get("items") else KINDS[kind]
    return KINDS.get(kind, "")


def _span(schema: Mapping[str, Any]) -> str:
    low, high = schema.get("minimum"), schema.get("maximum")
    above, below = schema.get("exclusiveMinimum"), schema.get("exclusiveMaximum")
    begin = f" from {low:g}" if low is not None else f" above {above:g}" if above is not None else ""
    if high is not None:
        return f"{begin}{' to' if low is not None else ', at most'} {_plain(high)}"
    return f"{begin}{' to' if low is not None else ','} less than {below:g}" if below is not None else begin


def _plain(number: float) -> str:
    return f"{number:,}" if isinstance(number, int) else f"{number:g}"

"""What pydantic found wrong, as one message for the user: each key, what it is, and what it must be."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from builder.config.reference import described_kind, schema_at
from builder.errors import BuilderError, did_you_mean

LONGEST = 80  # characters of a value that are shown
UNKNOWN = ("unexpected_keyword_argument", "extra_forbidden")


@dataclasses.dataclass(frozen=True)
class Problem:
    """One thing that is wrong: at which key, what, and the remedy."""

    key: str
    what: str
    remedy: str


def as_builder_error(
    error: ValidationError, kind: Any, prefix: str, where: str = "", sources: Mapping[str, str] | None = None
) -> BuilderError:
    """All problems in one error.

    Args:
        error: what pydantic raised for `kind`, a section of the config.
        prefix: of the section's keys, e.g. "train.".
        where: what was read, e.g. the file's path; "" where a program made the section.
        sources: key -> what gave it instead, e.g. "--set train.steps=0".
    """
    problems = [_problem(each, kind, prefix) for each in error.errors(include_url=False)]
    lines = [f"{_source(each, where, sources or {})}{each.what}" for each in problems]
    if len(problems) == 1:
        return BuilderError(lines[0], problems[0].remedy)
    listed = "".join(f"\n  {line}: {each.remedy}" for line, each in zip(lines, problems, strict=True))
    return BuilderError(f"{len(problems)} things in the configuration can't be:{listed}", "mend them all")


def _source(problem: Problem, where: str, sources: Mapping[str, str]) -> str:
    for key, source in sources.items():
        if problem.key == key or problem.key.startswith(f"{key}."):
            return f"{source}: "
    return f"{where}: " if where else ""


def _problem(error: Mapping[str, Any], kind: Any, prefix: str) -> Problem:
    path: Sequence[str | int] = [part for part in error["loc"] if part != "[key]"]
    key = _dotted(prefix, path)
    if error["type"] in UNKNOWN or "[key]" in error["loc"]:
        return Problem(key, f"unknown key '{key}'", did_you_mean(str(path[-1]), _known(kind, path[:-1])))
    if error["type"] == "config":
        context = error["ctx"]
        return Problem(key, context["what"] or f"{key} is {_shown(error['input'])}", context["remedy"])
    schema = schema_at(kind, path)
    if error["type"] in ("missing", "missing_argument"):
        return Problem(key, f"{key} is missing", f"it must be {described_kind(schema)}")
    if schema.get("properties") or error["type"].startswith("dataclass"):
        return Problem(key, f"{key} is {_shown(error['input'])}", "write `key: value` lines below it")
    described = described_kind(schema)
    remedy = f"it must be {described}" if described else error["msg"]
    if error["type"] == "too_short" and error["ctx"].get("min_length") == 1:
        remedy = f"{remedy}, of at least one"
    if isinstance(error["input"], str) and (choices := schema.get("enum")):
        near = did_you_mean(error["input"], [str(choice) for choice in choices if choice])
        remedy += f"; {near}" if near.startswith("did") else ""
    return Problem(key, f"{key} is {_shown(error['input'])}", remedy)


def _dotted(prefix: str, path: Sequence[str | int]) -> str:
    text = prefix
    for place, part in enumerate(path):
        text += f"[{part}]" if isinstance(part, int) else f"{'.' if place else ''}{part}"
    return text if path else prefix.rstrip(".")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."


def _known(kind: Any, path: Sequence[str | int]) -> list[str]:
    """The keys that the section at `path` has, or that are allowed in the dict there."""
    found = schema_at(kind, path)
    return list(found.get("properties") or found.get("propertyNames", {}).get("enum") or ())

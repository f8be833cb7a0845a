"""The types of config keys. They are strict: `true` is no number, `3.5` no whole number, `5` no text.

YAML reads `1e-3` as text, so numbers may come as text. A whole number in a list stays one: lists enter fingerprints.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, GetCoreSchemaHandler, Strict
from pydantic.dataclasses import dataclass as validated_dataclass
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from builder.errors import BuilderError, did_you_mean
from builder.phases import ClassTable, Phase

MOST = 1_000_000_000  # of what is counted, where nothing smaller is known to be too much


def as_number(value: Any) -> Any:
    """Text that is a number, as that number; all else as it is."""
    if not isinstance(value, str):
        return value
    try:
        return float(value)
    except ValueError:
        return value


def problem(remedy: str, what: str = "") -> PydanticCustomError:
    """An error of a validator: `remedy` says what the key must be; `what`, if the value alone doesn't tell, is wrong.

    builder.config.errors makes the message of it.
    """
    return PydanticCustomError("config", "{remedy}", {"remedy": remedy, "what": what})


Method = Literal["full", "lora"]
Flag = Annotated[bool, Strict()]
Whole = Annotated[int, Strict()]
Text = Annotated[str, Strict()]
Real = Annotated[float, Strict(), BeforeValidator(as_number)]
Rate = Annotated[float, Strict(), Field(ge=0, le=1), BeforeValidator(as_number)]


@dataclass(frozen=True)
class Numbers:
    """Metadata of a `list[float]`: its numbers lie within low..high, and there are `count` of them, in order.

    count None: any number of them, in any order. `or_empty`: none is right, too.
    """

    low: float
    high: float
    count: int | None = None
    or_empty: bool = False

    @property
    def described(self) -> str:
        span = f"from {self.low:g} to {self.high:g}"
        if self.count is None:
            return f"a list of numbers {span}"
        return f"two numbers {span}, the lower one first" + (", or none ([])" if self.or_empty else "")

    def check(self, value: Any) -> list[float]:
        numbers = [as_number(each) for each in value] if isinstance(value, (list, tuple)) else [math.nan]
        fine = all(
            isinstance(each, (int, float)) and not isinstance(each, bool) and self.low <= each <= self.high
            for each in numbers
        )
        if fine and self.count is not None:
            fine = (len(numbers) == self.count and numbers == sorted(numbers)) or (self.or_empty and not numbers)
        if not fine:
            raise problem(f"it must be {self.described}")
        return numbers

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self.check)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: Any) -> dict[str, Any]:
        items = {"type": "number", "minimum": self.low, "maximum": self.high}
        length = {} if self.count is None else {"maxItems": self.count, "minItems": 0 if self.or_empty else self.count}
        return {"type": "array", "items": items, "x-described": self.described, **length}


@dataclass(frozen=True)
class Checked:
    """Metadata of a text: `check` raises `problem(...)` for one that can't be; `described` says what it must be."""

    check: Callable[[str], None]
    described: str

    def _run(self, value: str) -> str:
        self.check(value)
        return value

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._run, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: Any) -> dict[str, Any]:
        return {"type": "string", "x-described": self.described}


def _check_name(text: str) -> None:
    if not text.strip() or any(mark in text for mark in "/\\\0\n") or text in (".", ".."):
        raise problem(f"it must be {NAME_DESCRIBED}")


NAME_DESCRIBED = "a name without / and \\: it becomes part of folders' names"
Name = Annotated[str, Strict(), Checked(_check_name, NAME_DESCRIBED)]

EXTRACTORS = ("efficientnet-lite0", "inception", "dinov2")
FEATURES_DESCRIBED = "efficientnet-lite0, inception, dinov2:FOLDER or module:callable"


def _check_features(text: str) -> None:
    name, colon, argument = text.partition(":")
    fine = bool(argument) if colon else name in EXTRACTORS[:2]
    if name in EXTRACTORS[:2] and colon:
        fine = False
    if not fine:
        near = did_you_mean(name, EXTRACTORS)
        raise problem(f"it must be {FEATURES_DESCRIBED}" + (f"; {near}" if near.startswith("did") else ""))


Features = Annotated[str, Strict(), Checked(_check_features, FEATURES_DESCRIBED)]

FIGURES = ("fd", "kd", "is", "precision", "recall", "density", "coverage", "vendi_ratio", "auc")
STANDARD = {"FID": "fd", "KID": "kd", "IS": "is"}  # their names with the standard network
MONITOR_DESCRIBED = (
    f"a figure of an evaluation: {', '.join(FIGURES)}, or {', '.join(STANDARD)} with score.features=inception; "
    "FIGURE_CODE is that of one class"
)


MONITOR = re.compile(
    rf"(?P<figure>{'|'.join([*FIGURES, *STANDARD])})(?:\[(?P<features>[^\]]+)\])?(?:_(?P<code>[A-Za-z0-9_]{{1,16}}))?"
)


def _check_monitor(text: str) -> None:
    if MONITOR.fullmatch(text):
        return
    bare = text.removeprefix("val_")  # the old system monitored val_fid, and wrote fid
    near = did_you_mean(bare.upper() if bare.upper() in STANDARD else bare, [*FIGURES, *STANDARD])
    raise problem(f"it must be {MONITOR_DESCRIBED}" + (f"; {near}" if near.startswith("did") else ""))


Monitor = Annotated[str, Strict(), Checked(_check_monitor, MONITOR_DESCRIBED)]


@validated_dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class ClassEntry:
    """One class as a config declares it."""

    code: Text
    name: Text
    prompt: Text


def _table(entries: list[ClassEntry]) -> ClassTable:
    try:
        return ClassTable([Phase(each.code, each.name, each.prompt) for each in entries])
    except BuilderError as error:
        raise problem(error.remedy, error.what) from None


class _ClassList:
    """Metadata of a `ClassTable`: it is one already, or a list of entries."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        made = core_schema.no_info_after_validator_function(_table, handler.generate_schema(list[ClassEntry]))
        return core_schema.no_info_wrap_validator_function(
            lambda value, read: value if isinstance(value, ClassTable) else read(value), made
        )

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: Any) -> dict[str, Any]:
        return {**handler(schema), "x-described": "a list of classes, each with code, name and prompt"}


Classes = Annotated[ClassTable, _ClassList()]

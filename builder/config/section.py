"""What makes a class a section of the config: a frozen dataclass that pydantic checks whenever it is made."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, dataclass_transform

from pydantic import ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass as validated_dataclass

from builder.config.errors import as_builder_error

T = TypeVar("T")


@dataclass_transform(frozen_default=True, field_specifiers=(Field,))
def section(prefix: str) -> Callable[[type[T]], type[T]]:
    """Make a class a section of the config whose keys are called `prefix` + name in messages.

    The class becomes a frozen dataclass that pydantic checks: unknown keys and values out of range are refused.
    """

    def decorate(kind: type[T]) -> type[T]:
        made: Any = validated_dataclass(frozen=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))(kind)
        plain = made.__init__

        @functools.wraps(plain)
        def checked(self: T, *args: Any, **keys: Any) -> None:
            try:
                plain(self, *args, **keys)
            except ValidationError as error:
                raise as_builder_error(error, made, prefix) from None

        made.__init__ = checked
        return made

    return decorate

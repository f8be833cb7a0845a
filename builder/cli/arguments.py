"""What holds for the arguments of every command: numbers are finite and of a size that fits, text holds no NUL."""

from __future__ import annotations

import copy
import functools
import math
import os
import sys
from collections.abc import Sequence
from typing import Any

import click

from builder.display import printable

LARGEST = 2**63  # whole numbers lie below, on both sides


class BoundedGroup(click.Group):
    """A group whose commands, at any depth, take no number and no text that no command can do anything with."""

    def add_command(self, cmd: click.Command, name: str | None = None) -> None:
        """Add a command after its numbers were bounded."""
        bound(cmd)
        super().add_command(cmd, name)

    def main(self, args: Sequence[str] | None = None, *rest: Any, **options: Any) -> Any:
        """Run; what no operating system could pass on as an argument or path is a mistake of the user's."""
        for argument in sys.argv[1:] if args is None else args:
            try:
                sound = b"\0" not in os.fsencode(argument)
            except UnicodeEncodeError:
                sound = False
            if not sound:
                raise click.UsageError(f"the argument '{printable(argument)}' is no text and no path")
        return super().main(args, *rest, **options)


def bound(command: click.Command) -> None:
    """Have the numbers of a command, and of those below it, refuse what is not finite or too large."""
    for parameter in command.params:
        if isinstance(parameter.type, (click.types.IntParamType, click.types.FloatParamType)):
            kind = copy.copy(parameter.type)
            kind.convert = functools.partial(_number, parameter.type)  # type: ignore[method-assign]
            parameter.type = kind
    if isinstance(command, click.Group):
        for below in command.commands.values():
            bound(below)


def _number(
    kind: click.ParamType, value: Any, parameter: click.Parameter | None = None, context: click.Context | None = None
) -> Any:
    try:
        number = kind.convert(value, parameter, context)
    except ValueError:  # more digits than Python reads
        kind.fail(f"{printable(str(value), 60)} is too large.", parameter, context)
    if isinstance(number, float) and not math.isfinite(number):
        kind.fail(f"{printable(str(value), 60)} is not a finite number.", parameter, context)
    if not -LARGEST < number < LARGEST:
        kind.fail(f"{printable(str(value), 60)} is too large.", parameter, context)
    return number

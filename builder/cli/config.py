"""`builder config`: what a config file says once it is read, and whether it can be."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from builder.cli.options import preset_option

if TYPE_CHECKING:
    from builder.config.reference import Key

source_argument = click.argument("source", metavar="[FILE|NAME]", required=False)
overrides_option = click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a config key.")


@click.group()
def config() -> None:
    """Look at a config, or check it, before anything is begun."""


@config.command()
@source_argument
@overrides_option
@preset_option
@click.option("--describe", is_flag=True, help="Say of each key what it is for, and what it may be.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, as datasets record it.")
def show(source: str | None, overrides: tuple[str, ...], preset: str | None, describe: bool, as_json: bool) -> None:
    """Print every key of a config with its value.

    FILE is YAML, or the name of one in configs/; without it the defaults are shown. `*` marks what is not the default.
    """
    from builder.config import load_config

    values = load_config(source, overrides, preset).to_json()
    click.echo(json.dumps(values, indent=1) if as_json else "\n".join(_lines(values, describe)))


@config.command()
@click.argument("source", metavar="FILE|NAME")
@overrides_option
@preset_option
def check(source: str, overrides: tuple[str, ...], preset: str | None) -> None:
    """Check a config: exit 0 where it can be, else 2 and every key that can't, with what it must be.

    What a config names (checkpoint, real dataset, base) is not looked for.
    """
    from builder.config import find_config, load_config

    read = load_config(source, overrides, preset)
    changed = [key.name for key, value in _values(read.to_json()) if value != key.default]
    click.echo(f"{find_config(source)} is a valid config; other than the defaults: {', '.join(changed) or 'nothing'}")


def _values(values: dict[str, Any]) -> list[tuple[Key, Any]]:
    """Every key of the config with its value."""
    from builder.config.reference import keys

    found = []
    for key in keys():
        value: Any = values
        for part in key.name.split("."):
            value = value[part]
        found.append((key, value))
    return found


def _lines(values: dict[str, Any], describe: bool) -> list[str]:
    """The config as YAML flow values, a key a line: what is printed can be pasted behind --set."""
    lines = []
    for key, value in _values(values):
        if describe:
            lines += ["", f"# {key.description}", f"# It must be {key.kind}. Default: {json.dumps(key.default)}"]
        mark = " " if value == key.default else "*"
        lines.append(f"{mark} {key.name}={json.dumps(value, ensure_ascii=False)}")
    return lines[1:] if describe else lines

"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])

out_option = click.option(
    "--out", default=".", show_default=True, metavar="ROOT",
    help="Output root: datasets are ROOT/shards/NAME and ROOT/manifests/NAME.",
)  # fmt: skip
partial_option = click.option("--partial", is_flag=True, help="Use a dataset that is not complete.")
dataset_argument = click.argument("dataset", required=False)


def config_options(function: F) -> F:
    """--config and --set."""
    function = click.option(
        "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a config key, e.g. sample.steps=12."
    )(function)
    return click.option("--config", "source", metavar="FILE|NAME", help="A YAML file, or the name of one in configs/.")(
        function
    )

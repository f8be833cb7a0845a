"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import click

from builder.config import PRESETS
from builder.errors import BuilderError
from builder.models.guards import GUARDS, Finding
from builder.progress import is_first_process
from builder.trust import trust_roots

if TYPE_CHECKING:
    from builder.config import Config

F = TypeVar("F", bound=Callable[..., Any])


def out_option(function: F) -> F:
    """--out, and --trust-root for what lies outside of it."""
    function = click.option(
        "--trust-root", "trusted", multiple=True, metavar="PLACE", expose_value=False, callback=_trust,
        help="Read what a received dataset or checkpoint names below this folder or URL, outside ROOT. "
        "[also: $BUILDER_TRUST_ROOTS]",
    )(function)  # fmt: skip
    return click.option(
        "--out", default=".", show_default=True, metavar="ROOT",
        help="Output root: datasets are ROOT/shards/NAME and ROOT/manifests/NAME.",
    )(function)  # fmt: skip


def _trust(context: click.Context, parameter: click.Parameter, places: tuple[str, ...]) -> None:
    if places:
        trust_roots(list(places))


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


def max_pixels_option(function: F) -> F:
    """--max-pixels, of images from outside: a valid limit, or the default; see builder.images.limits."""

    def checked(context: click.Context, parameter: click.Parameter, value: int | None) -> int:
        from builder.images import DEFAULT_MAX_PIXELS, valid_max_pixels

        return DEFAULT_MAX_PIXELS if value is None else valid_max_pixels(value)

    return click.option(
        "--max-pixels", type=int, callback=checked, metavar="N",
        help="Refuse images of more than N pixels, up to 268 million. [default: 150 million]",
    )(function)  # fmt: skip


def preset_option(function: F) -> F:
    """--preset: values of sample.*, between the config and --set."""
    return click.option(
        "--preset", metavar="|".join(PRESETS), help="Sample as configs/presets/ says: what each costs stands there. "
        "[default: the config as it is]",
    )(function)  # fmt: skip


def guard_options(function: F) -> F:
    """--silence and --allow-leak: see builder.models.guards."""
    function = click.option(
        "--allow-leak", metavar="REASON", help="Go on where held-out patients may have been seen; recorded."
    )(function)
    return click.option(
        "--silence", "silenced", multiple=True, type=click.Choice(list(GUARDS)), metavar="NAME",
        help=f"Leave out a warning: {', '.join(GUARDS)}.",
    )(function)  # fmt: skip


def warn(findings: Iterable[Finding], silenced: Iterable[str]) -> None:
    """Say what was found, but for what is silenced; once, where several processes run the same command."""
    told: set[str] = set()
    for finding in findings:
        if finding.name in silenced or not is_first_process():
            continue
        click.echo(f"warning: {finding.what}", err=True)
        if finding.name not in told:
            click.echo(f"         {finding.why} (--silence {finding.name})", err=True)
        told.add(finding.name)


def require_no_leak(config: Config, leak: str | None, reason: str | None, remedy: str) -> Config:
    """Refuse a leak without a reason (here or in the config); the config with the reason that it needs, or with none.

    What is made keeps the config, and with it the reason.
    """
    if reason is not None and not reason.strip():
        raise BuilderError("--allow-leak has no reason", "say why, in words: they are recorded")
    if leak is None:
        return replace(config, allow_leak="")
    reason = reason or config.allow_leak
    if not reason:
        raise BuilderError(leak, f"its figures would flatter it: {remedy}, or give --allow-leak REASON")
    if is_first_process():
        click.echo(f"LEAK: {leak}; allowed, because: {reason}", err=True)
    return replace(config, allow_leak=reason)

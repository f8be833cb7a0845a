"""`builder train`: fit the generator to packed real crops."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from builder.cli.options import config_options, out_option


@click.command()
@click.option(
    "--real", metavar="NAME|PATH", help="Packed real dataset; its training split is learned. [default: the config's]"
)
@config_options
@click.option(
    "--to", "target", type=click.Path(file_okay=False), help="Where checkpoints go. [default: checkpoints/<config>]"
)
@out_option
def train(real: str | None, source: str | None, overrides: tuple[str, ...], target: str | None, out: str) -> None:
    """Train a generator on packed real crops. Run again, it continues where it was."""
    from builder.config import load_config
    from builder.demo.phantom_dataset import PHANTOM, ensure_phantom
    from builder.shards.dataset import find_dataset

    config = load_config(source or "demo", overrides)
    reference = real or config.real
    dataset = ensure_phantom(out) if reference == PHANTOM else find_dataset(reference, out)

    from builder.training.run import train as run
    from builder.training.stage import TrainingInterrupted

    try:
        final = run(config, dataset, Path(target or f"checkpoints/{config.name}"))
    except TrainingInterrupted as stop:
        click.echo(stop, err=True)
        sys.exit(130)
    click.echo(f"checkpoint: {final}")

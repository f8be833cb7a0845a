"""`builder train`: fit the generator to packed real crops."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from builder.cli.options import config_options, guard_options, out_option, require_no_leak, warn
from builder.progress import is_first_process


@click.command()
@click.option(
    "--real", metavar="NAME|PATH", help="Packed real dataset; its training split is learned. [default: the config's]"
)
@config_options
@click.option(
    "--to", "target", type=click.Path(file_okay=False), help="Where checkpoints go. [default: checkpoints/<config>]"
)
@click.option("--download", is_flag=True, help="Fetch the base's weights from the hub when they are missing.")
@guard_options
@out_option
def train(
    real: str | None, source: str | None, overrides: tuple[str, ...], target: str | None, download: bool,
    silenced: tuple[str, ...], allow_leak: str | None, out: str,
) -> None:  # fmt: skip
    """Train a generator on packed real crops. Run again, it continues where it was."""
    from builder.config import load_config
    from builder.demo.phantom_dataset import ensure_demo
    from builder.models.guards import before_training, leak_of_training
    from builder.shards.dataset import find_dataset
    from builder.training.identity import require_same_run

    config = load_config(source or "demo", overrides)
    folder = Path(target or f"checkpoints/{config.name}")
    require_same_run(config, folder)  # before a phantom is rendered, or weights are fetched
    reference = real or config.real
    dataset = ensure_demo(reference, out) or find_dataset(reference, out)
    warn(before_training(config, dataset), silenced)

    from builder.models.source import locate

    base = locate(config.model.base, download) if config.model.base else None  # what is fetched here is found below
    config = require_no_leak(
        config, leak_of_training(config, dataset, base), allow_leak,
        "split by patient, and start from a base that saw no other of them (model.base_lineage=public declares that)",
    )  # fmt: skip

    from builder.training.run import train as run
    from builder.training.stage import TrainingInterrupted

    try:
        final = run(config, dataset, folder)
    except TrainingInterrupted as stop:
        click.echo(stop, err=True)
        sys.exit(130)
    if is_first_process():
        click.echo(f"checkpoint: {final}")

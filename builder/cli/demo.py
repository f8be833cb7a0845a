"""`builder demo`: the phantom wounds that ship with the package."""

from __future__ import annotations

from pathlib import Path

import click

from builder.cli.options import out_option

LAST_SEED = 999_999  # those from a million on are the base's (builder.demo.base_dataset)


@click.group()
def demo() -> None:
    """Phantom wounds: rendered photographs whose truth is known. Phantoms are not patients."""


@demo.command()
@click.argument("out", type=click.Path(file_okay=False))
@click.option("--patients", type=click.IntRange(1), default=233, show_default=True)
@click.option("--seed", type=click.IntRange(0, LAST_SEED), default=0, show_default=True)
@click.option("--workers", type=click.IntRange(1), default=2, show_default=True, help="Processes that render.")
@click.option("--stock", is_flag=True, help="In the styles of picture libraries; see configs/stock.yaml.")
def photographs(out: str, patients: int, seed: int, workers: int, stock: bool) -> None:
    """Render photographs, boxes.csv and labels.csv into OUT: what a user of `builder pack` has."""
    from builder.demo.phantom import write_photographs

    click.echo(write_photographs(Path(out), patients=patients, seed=seed, workers=workers, stock=stock))


@demo.command()
@click.option("--patients", type=click.IntRange(1), default=233, show_default=True)
@click.option("--seed", type=click.IntRange(0, LAST_SEED), default=0, show_default=True)
@click.option("--name", default="phantom", show_default=True)
@click.option("--workers", type=click.IntRange(1), default=2, show_default=True, help="Processes that render.")
@out_option
def phantom(patients: int, seed: int, name: str, workers: int, out: str) -> None:
    """Render phantom photographs and pack them as a real dataset."""
    from builder.demo.phantom_dataset import ensure_phantom

    dataset = ensure_phantom(out, name, patients=patients, seed=seed, workers=workers)
    click.echo(f"dataset '{dataset.name}' is complete: {dataset.info['count']:,} crops")


@demo.command()
@click.option("--workers", type=click.IntRange(1), default=2, show_default=True, help="Processes that render.")
@out_option
def stock(workers: int, out: str) -> None:
    """Render stock photographs and pack them: what a demo generator is pretrained on (configs/stock.yaml)."""
    from builder.demo.phantom_dataset import ensure_stock

    dataset = ensure_stock(out, workers=workers)
    click.echo(f"dataset '{dataset.name}' is complete: {dataset.info['count']:,} crops")


@demo.command()
@click.option("--patients", type=click.IntRange(2), default=3000, show_default=True)
@click.option("--name", default="base", show_default=True)
@click.option("--workers", type=click.IntRange(1), default=2, show_default=True, help="Processes that render.")
@out_option
def base(patients: int, name: str, workers: int, out: str) -> None:
    """Render crops without phases: what the base is pretrained on (configs/base.yaml)."""
    from builder.demo.base_dataset import ensure_base

    dataset = ensure_base(out, name, patients=patients, workers=workers)
    click.echo(f"dataset '{dataset.name}' is complete: {dataset.info['count']:,} crops")

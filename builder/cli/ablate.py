"""`builder ablate`: the prompt study, repeatable."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from builder.cli.options import out_option, require_no_leak

if TYPE_CHECKING:
    from builder.config import Config
    from builder.shards.dataset import Dataset


@click.command()
@click.argument("source", metavar="CONFIG")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a config key.")
@click.option("--real", metavar="NAME|PATH", help="Packed real dataset. [default: the config's]")
@click.option(
    "--to", "target", type=click.Path(file_okay=False), help="Where all of it goes. [default: checkpoints/<config>]"
)
@click.option("--download", is_flag=True, help="Fetch the base's weights from the hub when they are missing.")
@click.option("--allow-leak", metavar="REASON", help="Go on where held-out patients may have been seen; recorded.")
@out_option
def ablate(
    source: str, overrides: tuple[str, ...], real: str | None, target: str | None, download: bool,
    allow_leak: str | None, out: str,
) -> None:  # fmt: skip
    """Train and score the grid of CONFIG (prompts x method x perceptual loss, at several guidance scales).

    Prints one table, draws one plot and one sheet of samples. Run again, it continues where it was.
    """
    from builder.ablation.grid import runs_of
    from builder.config import load_config
    from builder.demo.phantom_dataset import ensure_demo
    from builder.shards.dataset import find_dataset
    from builder.training.identity import require_same_run

    config = load_config(source, overrides)
    folder = Path(target or f"checkpoints/{config.name}")
    for each in runs_of(config):  # refuse an impossible grid, and a changed run, before a base is trained
        require_same_run(each.config, folder / each.name)
    reference = real or config.real
    dataset = ensure_demo(reference, out) or find_dataset(reference, out)

    from builder.ablation.report import as_text, table_of, write_report
    from builder.ablation.study import Ablation
    from builder.job.devices import prepare
    from builder.models.guards import leak_of_training
    from builder.models.source import locate
    from builder.training.stage import TrainingInterrupted

    pictures = None
    try:
        if config.ablation.pretrain:
            pictures = _pretrain(load_config(config.ablation.pretrain), out)
        base = locate(config.model.base, download)
        config = require_no_leak(
            config, leak_of_training(config, dataset, base), allow_leak,
            "split by patient, and start from a base that saw no other of them",
        )  # fmt: skip
        ablation = Ablation(config, dataset, folder, pictures=pictures, device=prepare(0), download=download)
        study = ablation.run(click.echo)
    except TrainingInterrupted as stop:
        click.echo(stop, err=True)
        sys.exit(130)
    files = write_report(study, folder)
    images = ", ".join(f"{code} {count}" for code, count in study.n.items())
    click.echo(f"\n{as_text(table_of(study))}\n")
    click.echo(
        f"images of a setting: {images}; against the validation patients of '{study.dataset}'; seed {study.seed}"
    )
    click.echo(f"wrote {', '.join(map(str, files))}")


def _pretrain(config: Config, out: str) -> Dataset:
    """Train the base into checkpoints/<config>, unless its last step is there; what it was trained on."""
    from builder.demo.phantom_dataset import ensure_demo
    from builder.models.checkpoint import find_run, run_history
    from builder.shards.dataset import find_dataset
    from builder.training.run import train

    dataset = ensure_demo(config.real, out) or find_dataset(config.real, out)
    run = find_run(config.name)
    if run is None or run_history(run).last.step < config.train.steps:
        click.echo(f"the base: training '{config.name}'")
        train(replace(config, allow_leak=""), dataset, Path("checkpoints") / config.name)
    return dataset

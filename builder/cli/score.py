"""`builder score`: scores for any dataset, also foreign ones."""

from __future__ import annotations

import click

from builder.cli.options import config_options, max_pixels_option, out_option, partial_option


@click.command()
@click.argument("dataset")
@click.option(
    "--against", metavar="REAL", required=True, help="Real dataset: panel and gates come from its training split."
)
@click.option("--name", help="Name to give to foreign tars or folders. [default: their folder's name]")
@max_pixels_option
@config_options
@out_option
@partial_option
def score(
    dataset: str,
    against: str,
    name: str | None,
    max_pixels: int,
    source: str | None,
    overrides: tuple[str, ...],
    out: str,
    partial: bool,
) -> None:
    """Score a dataset against real crops and write the scores into its manifests.

    DATASET is a name, a path, or foreign data: WebDataset tars (a folder, a file or a glob), or a folder of images
    in one folder per phase.
    """
    from builder.config import load_config
    from builder.job.devices import prepare
    from builder.quality.score_dataset import score_dataset
    from builder.shards.compact import keep_in_step
    from builder.shards.dataset import find_dataset
    from builder.shards.foreign import adopt, is_foreign
    from builder.shards.storage import Storage

    config = load_config(source, overrides)
    real = find_dataset(against, out)
    if is_foreign(dataset, out):
        found = adopt(dataset, name, Storage(out), real.classes, max_pixels=max_pixels)
        click.echo(f"adopted {dataset} as dataset '{found.name}'")
    else:
        found = find_dataset(dataset, out, partial=partial)
    score_dataset(found, real, config.score, device=prepare(0))
    keep_in_step(found)
    click.echo(f"dataset '{found.name}' is scored against '{real.name}'")

"""`builder index`: WebDataset tars of others become a dataset, where they lie."""

from __future__ import annotations

from pathlib import Path

import click

from builder.cli.options import config_options, max_pixels_option, out_option


@click.command()
@click.argument("urls", nargs=-1, required=True)
@click.option("--name", required=True, help="Name of the dataset.")
@click.option("--origin", type=click.Choice(["real", "synthetic"]), default="real", show_default=True)
@click.option(
    "--split", type=click.Choice(["train", "val", "test"]), help="Of samples whose .json names none. [default: none]"
)
@click.option(
    "--key-file", type=click.Path(path_type=Path),
    help="Secret of the patient hashes. [default: $BUILDER_PATIENT_KEY, else ROOT/patient.key]",
)  # fmt: skip
@click.option("--licence", default="not stated", show_default=True, help="Licence of the images; recorded.")
@max_pixels_option
@config_options
@out_option
def index(
    urls: tuple[str, ...], name: str, origin: str, split: str | None, key_file: Path | None, licence: str,
    max_pixels: int, source: str | None, overrides: tuple[str, ...], out: str,
) -> None:  # fmt: skip
    """Index WebDataset tars as the dataset NAME, without copying them.

    URLS are paths, globs, braces (s3://bucket/set-{000..099}.tar) or folders. Each sample holds an image
    and its class: .cls (label), .json (`label` or `phase`) or .txt (phase code or label); the .json may name
    `split` and `patient`. Run again, it goes on, and adds tars that came since. The tars must stay where they are.
    """
    from functools import cache

    from builder.config import load_config
    from builder.identity import find_key
    from builder.progress import progress
    from builder.shards.compact import keep_in_step
    from builder.shards.dataset import Dataset
    from builder.shards.inplace import Description, index_tars
    from builder.shards.storage import Storage

    dataset = Dataset(name, Storage(out))
    key = cache(lambda: find_key(dataset.storage, key_file))
    description = Description(load_config(source, overrides).classes, origin, split, key, licence, max_pixels)
    done = index_tars(urls, dataset, description, lambda tars: progress(tars, f"index {name}", "tar"))
    keep_in_step(dataset)
    if done.turned:
        click.echo(f"note: {done.turned:,} images are turned by their EXIF orientation, which other readers may not do")
    for column, count in done.without.items():
        if count and origin == "real":
            click.echo(f"note: {count:,} images have no {column}")
    click.echo(f"dataset '{name}': {done.images:,} images in {done.tars:,} tars, of which {done.read:,} were read now")

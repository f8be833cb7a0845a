"""`builder pack`: photographs, boxes and labels become a real dataset."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from builder.cli.options import config_options, max_pixels_option, out_option

FILE = click.Path(path_type=Path)


@click.command()
@click.argument("photographs", type=FILE)
@click.option(
    "--boxes", type=FILE, help="CSV (the old columns, or file,xmin,ymin,xmax,ymax), COCO JSON, or a folder of masks."
)
@click.option(
    "--box-units",
    type=click.Choice(["pixel", "fraction", "percent"]),
    help="Units of the boxes' numbers. [default: pixel; refused where they look like another]",
)
@click.option(
    "--column",
    "columns",
    multiple=True,
    metavar="ROLE=NAME",
    help="Column of a table that is the file, number, label, patient, xmin, ...; NAME 'none' for none. Repeatable.",
)
@click.option("--category", "categories", multiple=True, help="COCO category of wounds. Repeatable. [default: all]")
@click.option("--inverted-masks", is_flag=True, help="In the masks, wounds are black and everything else is not.")
@click.option("--labels", type=FILE, help="CSV of phases by file. [default: the boxes' labels, else the phase folders]")
@click.option("--name", required=True, help="Name of the dataset.")
@config_options
@out_option
@click.option(
    "--margin", type=float, help="Margin kept around a box, share of its longer side. [default: the config's]"
)
@click.option("--max-size", type=int, help="Cap of a crop's side in px. [default: the config's]")
@click.option("--size", type=int, help="Freeze every crop at this side in px, for other people's readers.")
@click.option("--without-box", type=click.Choice(["skip", "whole"]), help="What to do with a photograph without a box.")
@click.option("--skip-bad", is_flag=True, help="Leave out what cannot be read or used, and count it.")
@click.option("--group-by", metavar="photograph|REGEX", help="Stands in for unknown patients.")
@click.option(
    "--key-file", type=FILE, help="Secret of the patient hashes. [default: $BUILDER_PATIENT_KEY, else ROOT/patient.key]"
)
@click.option("--licence", default="not stated", show_default=True, help="Licence of the photographs; recorded.")
@max_pixels_option
def pack(
    photographs: Path, boxes: Path | None, box_units: str | None, columns: tuple[str, ...],
    categories: tuple[str, ...], inverted_masks: bool, labels: Path | None, name: str, source: str | None,
    overrides: tuple[str, ...], out: str, margin: float | None, max_size: int | None, size: int | None,
    without_box: str | None, skip_bad: bool, group_by: str | None, key_file: Path | None, licence: str, max_pixels: int,
) -> None:  # fmt: skip
    """Cut every box of PHOTOGRAPHS (a folder) into a crop, split by patient, and write a real dataset."""
    from dataclasses import replace

    from builder.config import load_config
    from builder.crops.pack import PackRequest
    from builder.crops.pack import pack as run
    from builder.display import printable_lines
    from builder.shards.dataset import Dataset
    from builder.shards.storage import Storage

    config = load_config(source, overrides)
    given: dict[str, Any] = {"margin": margin, "max_size": max_size}
    request = PackRequest(
        photographs=photographs,
        boxes=boxes,
        labels=labels,
        box_units=box_units,  # type: ignore[arg-type]
        columns=_by_role(columns),
        categories=categories,
        inverted_masks=inverted_masks,
        classes=config.classes,
        crops=replace(config.crops, **{key: value for key, value in given.items() if value is not None}),
        without_box=without_box,  # type: ignore[arg-type]
        skip_bad=skip_bad,
        freeze_size=size,
        group_by=group_by,
        key_file=key_file,
        images_per_shard=config.shards.images_per_shard,
        model_size=config.train.size,
        config_name=config.name,
        licence=licence,
        max_pixels=max_pixels,
    )
    click.echo(printable_lines(str(run(request, Dataset(name, Storage(out))))))


def _by_role(columns: tuple[str, ...]) -> dict[str, str]:
    """role -> column name, of options ROLE=NAME."""
    from builder.errors import BuilderError

    chosen: dict[str, str] = {}
    for text in columns:
        role, equals, name = text.partition("=")
        role, name = role.strip().lower(), name.strip()
        if not equals or not role or not name:
            raise BuilderError(f"--column {text} is no ROLE=NAME", "write e.g. --column patient='Patient code'")
        if chosen.setdefault(role, name) != name:
            raise BuilderError(f"--column names two columns for {role}: {chosen[role]} and {name}", "keep one of them")
    return chosen

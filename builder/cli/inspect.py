"""`builder list`, `verify`, `sheet` and `rm`: look at datasets and remove them."""

from __future__ import annotations

import sys

import click

from builder.cli.options import dataset_argument, out_option, partial_option
from builder.errors import BuilderError


@click.command("list")
@out_option
def list_(out: str) -> None:
    """List the datasets under the output root."""
    from builder.shards.dataset import all_datasets
    from builder.shards.storage import Storage

    datasets = all_datasets(Storage(out))
    if not datasets:
        click.echo(f"no datasets in {out}")
        return
    click.echo(
        f"{'name':<32}{'origin':<11}{'state':<10}{'images':>9}{'shards':>8}  {'classes':<10}{'created':<27}parent"
    )
    for dataset in datasets:
        try:
            info = dataset.info
        except BuilderError as error:
            click.echo(f"{dataset.name:<32}damaged: {error.what}")
            continue
        click.echo(
            f"{dataset.name:<32}{info['origin']:<11}{info['state']:<10}"
            f"{info.get('count', '-'):>9}{len(dataset.shard_numbers()):>8}  {','.join(dataset.classes.codes):<10}"
            f"{info.get('created', '?'):<27}{info.get('parent') or '-'}"
        )


@click.command()
@dataset_argument
@out_option
@partial_option
def verify(dataset: str | None, out: str, partial: bool) -> None:
    """Check every shard against its manifest; exit 1 and a list when anything is off."""
    from tqdm import tqdm

    from builder.shards.dataset import find_dataset
    from builder.shards.verify import stray_tars, verify_dataset

    found = find_dataset(dataset, out, partial=partial)
    numbers = found.shard_numbers()
    with tqdm(total=len(numbers), unit=" shards", desc=f"verify {found.name}") as bar:
        findings = verify_dataset(found, bar.update)
    for path in stray_tars(found):
        click.echo(f"note: {path} has no manifest: a killed run's leftover, replaced when the run continues")
    for finding in findings:
        click.echo(finding)
    if findings:
        click.echo(f"dataset '{found.name}': {len(findings)} findings", err=True)
        sys.exit(1)
    images = sum(found.shard_table(number, ["key"]).num_rows for number in numbers)
    click.echo(f"dataset '{found.name}': {images:,} images in {len(numbers)} shards, all as its manifests say")


@click.command()
@dataset_argument
@click.option("--by", metavar="SCORE", help="Best, median and worst by this score. [default: a random choice]")
@click.option("--against", metavar="REAL", help="Put real crops of the same phases beside.")
@click.option("--per-phase", type=int, default=8, show_default=True, help="Images of each phase.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the random choice.")
@click.option("--to", "target", type=click.Path(dir_okay=False), help="PNG to write. [default: NAME-sheet.png]")
@out_option
@partial_option
def sheet(
    dataset: str | None, by: str | None, against: str | None, per_phase: int, seed: int, target: str | None,
    out: str, partial: bool,
) -> None:  # fmt: skip
    """Draw a contact sheet (PNG), rows by phase, with key and scores."""
    from pathlib import Path

    from builder.quality.sheet import contact_sheet
    from builder.shards.dataset import find_dataset

    found = find_dataset(dataset, out, partial=partial)
    beside = find_dataset(against, out) if against else None
    path = Path(target or f"{found.name}-sheet.png")
    contact_sheet(found, path, by=by, per_phase=per_phase, against=beside, seed=seed)
    click.echo(f"wrote {path} from dataset '{found.name}'")


@click.command()
@click.argument("name")
@click.option("--force", is_flag=True, help="Even when a view reads its images.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@out_option
def rm(name: str, force: bool, yes: bool, out: str) -> None:
    """Remove a dataset with all its leftovers."""
    from builder.shards.remove import remove_dataset
    from builder.shards.storage import Storage

    if not yes and sys.stdin.isatty():
        click.confirm(f"remove dataset '{name}' from {out}?", abort=True)
    for folder in remove_dataset(Storage(out), name, force=force):
        click.echo(f"removed {folder}")

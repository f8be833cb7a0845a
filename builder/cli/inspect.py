"""`builder list`, `verify`, `sheet` and `rm`: look at datasets and remove them."""

from __future__ import annotations

import posixpath
import sys
from typing import TYPE_CHECKING

import click

from builder.cli.options import dataset_argument, out_option, partial_option
from builder.errors import BuilderError

if TYPE_CHECKING:
    from builder.shards.dataset import Dataset
    from builder.shards.verify import Report


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
@click.option("--fast", is_flag=True, help="Read manifests only: of tars no more than their sizes.")
@click.option("--repair", is_flag=True, help="Make damaged shards again as they were; mend what else can be.")
@click.option("--checkpoint", metavar="NAME|DIR", help="With --repair: where the checkpoint is now.")
@click.option("--real", metavar="NAME|PATH", help="With --repair: where the real dataset of its scores is now.")
@click.option("--features", metavar="SPEC", help="With --repair: the feature extractor, where it is code of your own.")
@out_option
@partial_option
def verify(
    dataset: str | None, fast: bool, repair: bool, checkpoint: str | None, real: str | None, features: str | None,
    out: str, partial: bool,
) -> None:  # fmt: skip
    """Check every shard against its manifest; exit 1 and a list when anything is off."""
    from builder.shards.compact import in_step
    from builder.shards.dataset import find_dataset
    from builder.shards.repair import is_unfinished
    from builder.shards.verify import stray_tars

    found = find_dataset(dataset, out, partial=partial or repair)
    report = _check(found, fast)
    for path in stray_tars(found):
        click.echo(f"note: {path} has no manifest: a killed run's leftover, replaced when the run continues")
    if report.unsealed:
        more = f" and {len(report.unsealed) - 1:,} others" if len(report.unsealed) > 1 else ""
        click.echo(f"note: {report.unsealed[0]}{more} have no checksum: an older version wrote them, and a flipped bit "
                   "in them may not be found")  # fmt: skip
    if in_step(found) is False:
        click.echo(f"note: the index is not used for all shards: `builder compact {found.name}` brings it in step")
    if repair and (report.findings or is_unfinished(found)):
        _repair(found, report, checkpoint, real, features)
        report = _check(found, fast)
    if report.findings:
        click.echo(f"dataset '{found.name}': {len(report.findings)} findings", err=True)
        sys.exit(1)
    said = "all of the sizes that its manifests say" if fast else "all as its manifests say"
    click.echo(f"dataset '{found.name}': {report.images:,} images in {len(found.shard_numbers())} shards, {said}")


def _check(dataset: Dataset, fast: bool) -> Report:
    from tqdm import tqdm

    from builder.shards.verify import check_dataset

    with tqdm(total=len(dataset.shard_numbers()), unit=" shards", desc=f"verify {dataset.name}") as bar:
        report = check_dataset(dataset, bar.update, fast=fast)
    for finding in report.findings:
        click.echo(finding)
    return report


def _repair(dataset: Dataset, report: Report, checkpoint: str | None, real: str | None, features: str | None) -> None:
    """Mend what can be mended: caches and index, the reference of the scores, and the shards of a batch job."""
    from builder.quality.repair import mend_reference
    from builder.shards.beside import damaged_features
    from builder.shards.compact import compact as write_index
    from builder.shards.repair import is_unfinished

    for path, _ in list(damaged_features(dataset)):
        dataset.storage.remove(path)
        click.echo(f"removed {path}: who needs it computes it again")
    if "reference" in report.beside and mend_reference(dataset):
        click.echo(f"took the reference of the scores again from '{dataset.info['parent']}'")
        del report.beside["reference"]
    if report.general or report.shards or report.beside.keys() - {"features", "index"} or is_unfinished(dataset):
        _remake(dataset, report, checkpoint, real, features)
    if "index" in report.beside:
        write_index(dataset)
        click.echo("wrote the index anew")


def _remake(dataset: Dataset, report: Report, checkpoint: str | None, real: str | None, features: str | None) -> None:
    """Have the job that made a dataset make its damaged shards again, and those that are missing."""
    from builder.shards.repair import aside, how_to_remake, is_of_a_job, set_aside

    if not is_of_a_job(dataset):
        raise BuilderError(
            f"the shards of '{dataset.name}' can't be made again one by one: nothing was removed",
            f"make it again: {how_to_remake(dataset)}",
        )
    from builder.job.devices import default_workers
    from builder.job.regenerate import recorded_spec
    from builder.job.run import remake_reference, run_job
    from builder.shards.compact import keep_in_step
    from builder.shards.dataset import find_dataset

    numbers, info = sorted(report.shards), dataset.info
    if "count" not in info:  # never finished: how far it was to go, only its command knows
        set_aside(dataset, numbers)
        raise BuilderError(
            f"the damaged shards {', '.join(map(str, numbers))} of '{dataset.name}' were moved aside",
            "run its `builder shards` command again: it makes them, and the rest",
        )
    against = find_dataset(real or _against(dataset), dataset.storage.root)
    spec, _ = recorded_spec(dataset, checkpoint, posixpath.join(against.storage.root, against.name), features)
    if "reference" in report.beside:
        remake_reference(spec)
        click.echo("made the reference of the scores again")
    click.echo(f"making {len(numbers)} damaged shards again: {', '.join(map(str, numbers)) or 'none'}")
    with aside(dataset, numbers):
        outcome = run_job(
            spec, info["count"], lineage=info["lineage"], licence=info["licence"],
            engine="inline" if len(numbers) == 1 else "local", workers=default_workers(), say=click.echo,
        )  # fmt: skip
        if outcome.failed:
            raise BuilderError(f"units {', '.join(map(str, outcome.failed))} were given up", "try again")
    keep_in_step(dataset)


def _against(dataset: Dataset) -> str:
    """The name of the real dataset that the scores are measured against."""
    from builder.quality.reference import load_reference

    recorded = dataset.info.get("scores", {}).get("against")
    return str(recorded) if recorded else load_reference(dataset).against


@click.command()
@dataset_argument
@out_option
@partial_option
def compact(dataset: str | None, out: str, partial: bool) -> None:
    """Write one index over the many small manifests of a dataset: commands then read it instead.

    What changes later is noticed and read from its own manifest; `builder shards` and `score` bring the index in step.
    """
    from tqdm import tqdm

    from builder.shards.compact import compact as write
    from builder.shards.dataset import find_dataset
    from builder.shards.index import INDEX

    found = find_dataset(dataset, out, partial=partial)
    with tqdm(total=len(found.shard_numbers()), unit=" shards", desc=f"compact {found.name}") as bar:
        rows = write(found, bar.update)
    click.echo(f"wrote {found.storage.shown(f'manifests/{found.name}/{INDEX}')}: {rows:,} rows")


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

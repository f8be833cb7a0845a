"""`builder status`: how far a batch job is."""

from __future__ import annotations

import click

from builder.cli.options import out_option

REASONS_SHOWN = 10


@click.command()
@click.argument("dataset", metavar="NAME")
@out_option
def status(dataset: str, out: str) -> None:
    """Show how far a batch job is: units, failures, images/s by worker, time left; from any machine."""
    from builder.job.status import job_status
    from builder.shards.dataset import find_dataset

    found = find_dataset(dataset, out, partial=True)
    job = job_status(found)
    click.echo(
        f"dataset '{found.name}' is {'complete' if job.complete else 'partial'}: {job.done:,} of {job.units:,} units "
        f"({job.images_done:,} of {job.images:,} images), {len(job.failed):,} failed, {job.in_hand:,} in hand, "
        f"{job.pending:,} pending"
    )
    if job.workers:
        width = max(len(worker.sign.label) for worker in job.workers)
        click.echo(
            f"{'worker':<{width}}  {'device':<8}{'unit':>7}{'units':>8}{'images':>10}{'images/s':>10}  last sign"
        )
    for worker in job.workers:
        sign = worker.sign
        seen = "left" if sign.left else f"{_ago(worker.age)}{'' if worker.alive else ', gone'}"
        unit = sign.unit if worker.alive and sign.unit is not None else "-"
        click.echo(
            f"{sign.label:<{width}}  {sign.device:<8}{unit:>7}{sign.units:>8,}{sign.images:>10,}{worker.rate:>10.2f}"
            f"  {seen}"
        )
    for number, reason in sorted(job.failed.items())[:REASONS_SHOWN]:
        click.echo(f"unit {number} failed: {(reason.strip() or 'no reason given').splitlines()[-1]}")
    if len(job.failed) > REASONS_SHOWN:
        click.echo(f"... and {len(job.failed) - REASONS_SHOWN:,} more")
    if job.complete:
        return
    if job.seconds_left is not None:
        click.echo(f"{job.rate:.2f} images/s together; about {_duration(job.seconds_left)} to go")
    elif any(worker.alive for worker in job.workers):
        click.echo("no batch is finished yet: the time left is not known")
    else:
        click.echo("nobody is at work on it: run its command again, it continues")


def _ago(seconds: float | None) -> str:
    return "at an unknown time" if seconds is None else f"{_duration(seconds)} ago"


def _duration(seconds: float) -> str:
    """1:02:03, with days where there are any."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return f"{f'{days} d ' if days else ''}{hours}:{minutes:02d}:{rest:02d}"

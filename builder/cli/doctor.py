"""`builder doctor`: is this machine, and this model, fit for the job?"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from builder.cli.options import config_options, out_option, preset_option
from builder.errors import BuilderError

if TYPE_CHECKING:
    from builder.bench.findings import Finding
    from builder.config import Config
    from builder.models.checkpoint import Checkpoint


@click.command()
@config_options
@preset_option
@click.option("--checkpoint", metavar="NAME|DIR", help="[default: the config's]")
@click.option("--real", metavar="NAME|PATH", help="Real dataset for panel and gates. [default: the config's]")
@click.option("--reference", metavar="NAME", help="Take the scores' reference of this dataset instead of making one.")
@click.option("--count", type=click.IntRange(1), default=5000, show_default=True, help="Images to have room for.")
@click.option("--workers", type=click.IntRange(1), help="Workers to have memory for. [default: one a GPU or core]")
@click.option("--quick", "trial", flag_value="quick", help="Also draw a few images of every phase: minutes.")
@click.option("--full", "trial", flag_value="full", help="Draw 100 a phase; then verify, filter and mix them.")
@out_option
def doctor(
    source: str | None, overrides: tuple[str, ...], preset: str | None, checkpoint: str | None, real: str | None,
    reference: str | None, count: int, workers: int | None, trial: str | None, out: str,
) -> None:  # fmt: skip
    """Look for what would stop a job, or spoil it; exit 1 when something is found, each with its remedy."""
    from builder.bench import findings as look
    from builder.config import load_config
    from builder.job.devices import default_workers, prepare

    config = load_config(source or "demo", overrides, preset)
    device = prepare(0)
    told = _Told()
    for finding in (look.torch_build(), look.devices(), look.precision(config, device), look.caches()):
        told.say(finding)
    told.say(look.disk(out, count, config.sample.size))
    finding, found = look.checkpoint(checkpoint or config.checkpoint, config.checkpoint, config)
    told.say(finding)
    if found is not None:
        told.say(look.memory(look.weight_bytes(found), workers or default_workers(), device))
        told.say(look.loads(found))
    if trial and found is not None and told.loads:
        _trial(told, config, found, checkpoint, real, reference, out, full=trial == "full")
    troubles = sum(not finding.fine for finding in told.findings)
    click.echo(f"{troubles} findings" if troubles else "all fine")
    sys.exit(1 if troubles else 0)


class _Told:
    """The findings, said as they come."""

    def __init__(self) -> None:
        self.findings: list[Finding] = []

    def say(self, finding: Finding) -> None:
        self.findings.append(finding)
        click.echo(f"{'ok     ' if finding.fine else 'FINDING'} {finding.name}: {finding.what}")
        if not finding.fine:
            click.echo(f"        -> {finding.remedy}")

    @property
    def loads(self) -> bool:
        return any(finding.name == "loads" and finding.fine for finding in self.findings)


def _trial(
    told: _Told, config: Config, found: Checkpoint, checkpoint: str | None, real: str | None, reference: str | None,
    out: str, *, full: bool,
) -> None:  # fmt: skip
    from builder.bench import trial
    from builder.bench.findings import Finding
    from builder.cli.bench import job_to_measure
    from builder.job.devices import prepare

    device = prepare(0)
    try:
        job, made = job_to_measure(config, checkpoint, real, reference, out)
    except BuilderError as error:
        told.say(Finding("reference", error.what, error.remedy or "give --real, a dataset made by `builder pack`"))
        return
    with tempfile.TemporaryDirectory(prefix="builder-doctor-") as folder:
        spec = trial.placed(job, Path(folder))
        rows, finding = trial.draw(spec, made, trial.FULL if full else trial.QUICK, device)
        told.say(finding)
        if not rows:
            return
        for finding in trial.of_trial(rows, made, spec, device):
            told.say(finding)
        if full:
            for finding in trial.goes_on(spec, made, asdict(found.lineage)):
                told.say(finding)

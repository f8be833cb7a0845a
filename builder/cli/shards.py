"""`builder shards` and `builder regenerate`: the batch job, and one of its images again."""

from __future__ import annotations

import math
import random
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from builder.cli.criteria import Asked, CriteriaCommand, Number, criteria_options
from builder.cli.judgement import print_judgement
from builder.cli.options import (
    config_options,
    guard_options,
    out_option,
    partial_option,
    preset_option,
    require_no_leak,
    warn,
)
from builder.errors import BuilderError
from builder.phases import ClassTable

if TYPE_CHECKING:
    from builder.job.run import Outcome
    from builder.job.spec import JobSpec
    from builder.job.until_accepted import Accepted
    from builder.shards.dataset import Dataset


@click.command(cls=CriteriaCommand, options_metavar="[OPTIONS] [--accepted --min-SCORE X]")
@click.option("--phases", default="", help="Which phases, e.g. IPR or I,P,R. [default: all of the config]")
@click.option("--count", type=int, required=True, help="Images in all, over the phases. A larger COUNT extends.")
@click.option("--weights", default="", metavar="I=1,P=2", help="Shares of the phases. [default: equal]")
@config_options
@preset_option
@click.option("--name", help="Name of the dataset. [default: <config>-<PHASES>]")
@click.option("--checkpoint", metavar="NAME|DIR", help="Checkpoint to draw from; of the config's run also best, "
              "latest, epoch=30, step=1200. [default: the config's]")  # fmt: skip
@click.option("--real", metavar="NAME|PATH", help="Real dataset for panel and gates. [default: the config's]")
@out_option
@click.option("--engine", default="auto", show_default=True, help="Who runs the units: local (processes), ranks (this "
              "process is one of many), ray, inline; auto: ranks where a launcher says so, else local.")  # fmt: skip
@click.option("--workers", type=int, help="Worker processes. [default: one a GPU, else one a core]")
@click.option("--address", default="auto", show_default=True, metavar="HOST:PORT", help="Of the Ray cluster.")
@click.option("--grace", type=click.FloatRange(0), default=30, show_default=True, metavar="SECONDS",
              help="After SIGTERM, for the units in hand.")  # fmt: skip
@click.option("--seed", type=int, help="Run seed. [default: the config's]")
@click.option("--guidance", type=float, help="Guidance scale. [default: the config's]")
@click.option("--steps", type=int, help="Denoising steps. [default: the config's]")
@click.option("--size", type=int, help="Image size in px. [default: the config's]")
@click.option("--accepted", is_flag=True, help="Go on until COUNT images pass the options below; they become the "
              "dataset NAME-accepted.")  # fmt: skip
@click.option("--max-factor", type=Number(1), metavar="X",
              help="With --accepted, make at most COUNT times X images. [default: 5]")  # fmt: skip
@criteria_options(of_sets=False)
@guard_options
def shards(
    phases: str, count: int, weights: str, source: str | None, overrides: tuple[str, ...], preset: str | None,
    name: str | None, checkpoint: str | None, real: str | None, out: str, engine: str, workers: int | None,
    address: str, grace: float,
    seed: int | None, guidance: float | None, steps: int | None, size: int | None,
    accepted: bool, max_factor: float | None, silenced: tuple[str, ...], allow_leak: str | None, **options: Any,
) -> None:  # fmt: skip
    """Make COUNT synthetic crops: generate, score, write shards. Run again, it continues.

    With --accepted (and --min-ssim 0.7, say) it goes on along the plan until each phase's share of COUNT passes the
    gates and every --min-SCORE, --max-SCORE, --band and --where, as of `builder filter`; the first of each phase that
    pass are the accepted. It stops early when a phase can't get there within --max-factor (exit 1).
    """
    from builder.config import load_config

    asked = Asked.of(**options)
    if not accepted and (max_factor or asked != Asked()):
        raise BuilderError(
            "there are options of --accepted without it: nothing would be filtered",
            "add --accepted to go on until COUNT images pass, or run `builder filter` on the finished dataset",
        )
    config = load_config(source or "demo", overrides, preset)
    given: dict[str, Any] = {"guidance": guidance, "steps": steps, "size": size}
    sample = replace(config.sample, **{key: value for key, value in given.items() if value is not None})
    config = replace(config, sample=sample, seed=config.seed if seed is None else seed)
    codes = config.classes.select(phases)
    if count < 1:  # as the job says, but before a phantom is made
        raise BuilderError(f"COUNT is {count}", "ask for at least one image")
    if workers is not None and workers < 1:
        raise BuilderError(f"--workers is {workers}", "at least one worker is needed")

    from builder.job.devices import default_workers
    from builder.job.engines import engine_name
    from builder.job.plan import Plan
    from builder.job.run import log_to_file, run_job
    from builder.job.spec import JobSpec
    from builder.job.until_accepted import MAX_FACTOR, accepted_dataset, require_decidable, run_until_accepted
    from builder.models.checkpoint import resolve
    from builder.models.guards import before_job, leak_of_job
    from builder.sampling.class_words import require_class_words_before_job
    from builder.shards.compact import keep_in_step
    from builder.shards.dataset import Dataset
    from builder.shards.storage import Storage

    plan = Plan.of(codes, _weights(weights))
    found = resolve(checkpoint or config.checkpoint, run=config.checkpoint)
    if found.classes is not None:
        config.classes.require_same(found.classes, "the config", f"checkpoint '{found.name}'")
    joined = ("" if all(len(code) == 1 for code in codes) else "-").join(codes)
    dataset = Dataset(name or f"{config.name}-{joined}", Storage(out))  # refuses a bad name before anything is written
    engine = engine_name(engine)
    if accepted:
        require_decidable(asked.criteria())
        accepted_dataset(dataset)
    against = real_dataset(real or config.real, out, config.classes)
    config = require_no_leak(
        config, leak_of_job(found, against), allow_leak, "draw from a checkpoint that saw its training split only"
    )
    warn(before_job(config, found, against), silenced)
    require_class_words_before_job(found.path, config.classes)
    spec = JobSpec.of(config, plan, found, name=dataset.name, out=out, real=real or config.real)
    log = log_to_file(spec)
    how: dict[str, Any] = {
        "lineage": asdict(found.lineage), "licence": found.licence, "engine": engine,
        "workers": workers or (default_workers() if engine == "local" else 0), "say": click.echo,
        "address": address, "grace": grace,
    }  # fmt: skip
    if accepted:
        result = run_until_accepted(spec, count, asked.criteria_for, max_factor=max_factor or MAX_FACTOR, **how)
        keep_in_step(dataset)
        _print_outcome(spec, result.raw, log)
        _print_accepted(spec, count, result, asked)
    else:
        outcome = run_job(spec, count, **how)
        keep_in_step(dataset)
        _print_outcome(spec, outcome, log)


def _print_outcome(spec: JobSpec, outcome: Outcome, log: Path) -> None:
    """What the job did; exits with 1 when units were given up."""
    if outcome.failed:
        click.echo(f"given up: units {', '.join(map(str, outcome.failed))}; reasons in {log}", err=True)
        click.echo("run the same command again to try them once more", err=True)
        sys.exit(1)
    if outcome.made:
        rate = outcome.made / outcome.seconds
        click.echo(
            f"made {outcome.made:,} images in {outcome.seconds:,.0f} s ({rate:.1f} images/s), "
            f"{outcome.replaced} replaced from reserve seeds; log: {log}"
        )
    where = outcome.dataset.storage.shown(f"shards/{spec.name}")
    click.echo(f"dataset '{spec.name}' is complete: {outcome.images:,} images in {where}")


def _print_accepted(spec: JobSpec, count: int, result: Accepted, asked: Asked) -> None:
    """How many of each phase pass, and what became of it; exits with 1 when a phase can't get there."""
    from builder.job.acceptance import images_needed

    if result.judgement is not None and result.hopeless:
        print_judgement(result.judgement, asked.criteria(), result.raw.dataset)
    click.echo(f"\nof the first {result.end:,} images of the plan")
    click.echo(f"{'phase':<8}{'wanted':>8}{'pass':>8}{'made':>8}{'rate':>8}   95 % interval")
    for code, share in result.shares.items():
        low, high = share.interval()
        row = f"{code:<8}{result.wanted[code]:>8,}{share.passed:>8,}{share.made:>8,}{share.rate:>8.1%}"
        click.echo(f"{row}   {low:.1%} to {high:.1%}")
    if result.hopeless:
        for reason in result.hopeless:
            click.echo(f"stopped: {reason}", err=True)
        needed = images_needed(spec.plan, count, result.shares)
        more = f", or --max-factor {math.ceil(needed / count)} or more" if needed else ""
        click.echo(f"loosen what is asked (the reasons above say what turns images away){more}; "
                   f"no accepted dataset was written", err=True)  # fmt: skip
        sys.exit(1)
    done = "has them already; nothing to do" if result.judgement is None else "is written"
    each = ", ".join(f"{code} {number:,}" for code, number in result.wanted.items())
    click.echo(f"dataset '{result.accepted.name}' {done}: the first that pass, {each}; "
               f"the others in manifests/{result.accepted.name}/rejects")  # fmt: skip


@click.command()
@click.argument("dataset")
@click.argument("keys", nargs=-1, metavar="[KEY]...")
@click.option(
    "--random", "sample", type=click.IntRange(0), default=0, metavar="N", help="Also N keys picked at random."
)
@click.option("--checkpoint", metavar="NAME|DIR", help="Where the checkpoint is now. [default: as recorded]")
@click.option("--save", type=click.Path(file_okay=False), metavar="DIR", help="Write the images made again as PNG.")
@out_option
@partial_option
def regenerate(
    dataset: str, keys: tuple[str, ...], sample: int, checkpoint: str | None, save: str | None, out: str, partial: bool
) -> None:
    """Make images again from their manifest rows and say whether the pixels agree (exit 1 if not)."""
    from builder.shards.dataset import find_dataset
    from builder.shards.writer import encode_png

    found = find_dataset(dataset, out, partial=partial)
    wanted = list(keys)
    if sample:
        there = found.table(["key"])["key"].to_pylist()
        wanted += random.Random(0).sample(there, min(sample, len(there)))
    if not wanted:
        raise BuilderError("no key is given", "name a KEY of the manifest, or --random N")

    from builder.job.regenerate import Regenerator

    regenerator = Regenerator(found, checkpoint)
    disagree = 0
    for key in wanted:
        result = regenerator.compare(key)
        if result.identical:
            click.echo(f"{key}: identical")
        else:
            disagree += 1
            because = "; ".join(result.differences) or "nothing that is recorded differs"
            click.echo(
                f"{key}: differs by at most {result.max_difference} of 255 "
                f"(mean {result.mean_difference:.3f}); {because}"
            )
        if save:
            Path(save).mkdir(parents=True, exist_ok=True)
            (Path(save) / f"{key}.png").write_bytes(encode_png(result.pixels))
    click.echo(f"{len(wanted) - disagree} of {len(wanted)} identical")
    sys.exit(1 if disagree else 0)


def _weights(text: str) -> dict[str, float]:
    """'I=1,P=2.5' -> {'I': 1.0, 'P': 2.5}."""
    weights = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        code, _, value = part.partition("=")
        try:
            weights[code.strip()] = float(value)
        except ValueError:
            raise BuilderError(f"--weights '{part}' is not CODE=NUMBER", "write --weights I=1,P=1,R=2") from None
    return weights


def real_dataset(reference: str, out: str, classes: ClassTable) -> Dataset:
    """The real dataset, checked; the phantom, which ships with the package, is made when it isn't there."""
    from builder.demo.phantom_dataset import ensure_demo
    from builder.shards.dataset import find_dataset

    found = ensure_demo(reference, out) or find_dataset(reference, out)
    if found.info["origin"] != "real":
        raise BuilderError(
            f"dataset '{found.name}' is not of real crops", "give --real a dataset made by `builder pack`"
        )
    classes.require_same(found.classes, "the config", f"dataset '{found.name}'")
    return found

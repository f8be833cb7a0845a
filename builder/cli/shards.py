"""`builder shards` and `builder regenerate`: the batch job, and one of its images again."""

from __future__ import annotations

import random
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

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
    from builder.shards.dataset import Dataset


@click.command()
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
@click.option("--engine", default="local", show_default=True, help="Who runs the units: local (processes), inline.")
@click.option("--workers", type=int, help="Worker processes. [default: one a GPU, else one a core]")
@click.option("--seed", type=int, help="Run seed. [default: the config's]")
@click.option("--guidance", type=float, help="Guidance scale. [default: the config's]")
@click.option("--steps", type=int, help="Denoising steps. [default: the config's]")
@click.option("--size", type=int, help="Image size in px. [default: the config's]")
@guard_options
def shards(
    phases: str, count: int, weights: str, source: str | None, overrides: tuple[str, ...], preset: str | None,
    name: str | None, checkpoint: str | None, real: str | None, out: str, engine: str, workers: int | None,
    seed: int | None, guidance: float | None, steps: int | None, size: int | None,
    silenced: tuple[str, ...], allow_leak: str | None,
) -> None:  # fmt: skip
    """Make COUNT synthetic crops: generate, score, write shards. Run again, it continues."""
    from builder.config import load_config

    config = load_config(source or "demo", overrides, preset)
    given: dict[str, Any] = {"guidance": guidance, "steps": steps, "size": size}
    sample = replace(config.sample, **{key: value for key, value in given.items() if value is not None})
    config = replace(config, sample=sample, seed=config.seed if seed is None else seed)
    codes = config.classes.select(phases)
    if count < 1:  # as the job says, but before a phantom is made
        raise BuilderError(f"COUNT is {count}", "ask for at least one image")
    if workers is not None and workers < 1:
        raise BuilderError(f"--workers is {workers}", "at least one worker is needed")

    from builder.job.devices import default_workers, device_kind
    from builder.job.engines import engine_of
    from builder.job.plan import Plan
    from builder.job.run import log_to_file, run_job
    from builder.job.spec import JobSpec
    from builder.models.checkpoint import resolve
    from builder.models.guards import before_job, leak_of_job
    from builder.sampling.device import dtype_name, resolve_dtype
    from builder.sampling.schedulers import require_scheduler
    from builder.shards.dataset import Dataset
    from builder.shards.storage import Storage

    plan = Plan.of(codes, _weights(weights))
    found = resolve(checkpoint or config.checkpoint, run=config.checkpoint)
    if found.classes is not None:
        config.classes.require_same(found.classes, "the config", f"checkpoint '{found.name}'")
    joined = ("" if all(len(code) == 1 for code in codes) else "-").join(codes)
    dataset = Dataset(name or f"{config.name}-{joined}", Storage(out))  # refuses a bad name before anything is written
    engine_of(engine)
    require_scheduler(config.sample.scheduler)
    against = real_dataset(real or config.real, out, config.classes)
    config = require_no_leak(
        config, leak_of_job(found, against), allow_leak, "draw from a checkpoint that saw its training split only"
    )
    warn(before_job(config, found, against), silenced)
    spec = JobSpec(
        config=config,
        plan=plan,
        name=dataset.name,
        out=out,
        checkpoint=str(found.path),
        checkpoint_sha256=found.sha256,
        dtype=dtype_name(resolve_dtype(config.sample.dtype, device_kind())),
        real=real or config.real,
        real_out=out,
    )
    log = log_to_file(spec)
    outcome = run_job(
        spec, count, lineage=asdict(found.lineage), licence=found.licence,
        engine=engine, workers=workers or default_workers(), say=click.echo,
    )  # fmt: skip
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
    click.echo(f"dataset '{spec.name}' is complete: {outcome.images:,} images in {Path(out) / 'shards' / spec.name}")


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
    """The real dataset, checked; the phantom that ships with the package is made when it is asked for and not there."""
    from builder.demo.phantom_dataset import PHANTOM, ensure_phantom
    from builder.shards.dataset import find_dataset

    if reference == PHANTOM:
        ensure_phantom(out)
    found = find_dataset(reference, out)
    if found.info["origin"] != "real":
        raise BuilderError(
            f"dataset '{found.name}' is not of real crops", "give --real a dataset made by `builder pack`"
        )
    classes.require_same(found.classes, "the config", f"dataset '{found.name}'")
    return found

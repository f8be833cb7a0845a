"""`builder bench generate`: how fast the job is, against the plain loop and against the machine."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from builder.cli.options import config_options, out_option, preset_option
from builder.errors import BuilderError

if TYPE_CHECKING:
    from builder.config import Config
    from builder.job.spec import JobSpec
    from builder.quality.reference import Reference

LEAST = {  # what `--require` demands of the median, on 2 cores with the demo model
    "job / plain loop, same steps": 3.0,
    "job / old way (50 steps, one by one)": 8.0,
    "all workers / one worker": 1.8,
}


@click.group()
def bench() -> None:
    """Measure this machine: the job's speed, and where its time goes."""


@bench.command()
@config_options
@preset_option
@click.option("--checkpoint", metavar="NAME|DIR", help="[default: the config's]")
@click.option("--real", metavar="NAME|PATH", help="Real dataset for panel and gates. [default: the config's]")
@click.option("--reference", metavar="NAME", help="Take the scores' reference of this dataset, scored by the same "
              "protocol, instead of making one, which takes minutes.")  # fmt: skip
@click.option("--workers", type=click.IntRange(1), help="[default: one a GPU, else one a core]")
@click.option("--units", type=click.IntRange(1), default=4, show_default=True, help="Shards of a run of the job.")
@click.option("--images-per-unit", type=click.IntRange(1), help="[default: the config's images_per_shard]")
@click.option("--repeats", type=click.IntRange(1), default=3, show_default=True, help="Interleaved; for the spread.")
@click.option("--plain-images", type=click.IntRange(1), default=12, show_default=True, help="Of the plain loop.")
@click.option("--plain-batch", type=click.IntRange(1), default=1, show_default=True, help="Prompts of one call of it.")
@click.option("--old-images", type=click.IntRange(1), default=6, show_default=True, help="Of the loop at 50 steps.")
@click.option("--architecture", metavar="FAMILY", help="Instead of the job: a full-size model with random weights "
              "(sdxl, sd15), drawn from at growing batch sizes. For a GPU.")  # fmt: skip
@click.option("--batch-sizes", default="1,2,4,8,16,32,64", show_default=True, help="With --architecture.")
@click.option("--require", is_flag=True, help="Exit 1 unless the ratios reach 3, 8 and 1.8.")
@click.option("--json", "target", type=click.Path(dir_okay=False), metavar="FILE", help="Also write the figures there.")
@out_option
def generate(
    source: str | None, overrides: tuple[str, ...], preset: str | None, checkpoint: str | None, real: str | None,
    reference: str | None, workers: int | None, units: int, images_per_unit: int | None, repeats: int,
    plain_images: int, plain_batch: int, old_images: int, architecture: str | None, batch_sizes: str,
    require: bool, target: str | None, out: str,
) -> None:  # fmt: skip
    """The job against the plain loop: stages, utilisation, and ratios with their spread.

    Plain loop: the diffusers pipeline, a prompt at a time, PIL, and torchmetrics' SSIM pair by pair; it has all cores.
    """
    from builder.config import load_config

    config = load_config(source or "demo", overrides, preset)
    if images_per_unit:
        config = replace(config, shards=replace(config.shards, images_per_shard=images_per_unit))
    if architecture:
        figures = _by_batch_size(config, architecture, _sizes(batch_sizes))
    else:
        spec, found = job_to_measure(config, checkpoint, real, reference, out)
        figures = _against_the_loop(
            spec, found, workers, units, repeats, (plain_images, plain_batch, old_images)
        )  # fmt: skip
    if target:
        Path(target).write_text(json.dumps(figures, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        click.echo(f"wrote {target}")
    missed = [f"{name}: {figures['ratios'][name]['median']:.2f} of {least}" for name, least in LEAST.items()
              if not architecture and figures["ratios"][name]["median"] < least]  # fmt: skip
    if require and missed:
        click.echo(f"missed: {'; '.join(missed)}", err=True)
        sys.exit(1)


def _against_the_loop(
    spec: JobSpec, reference: Reference, workers: int | None, units: int, repeats: int, plain: tuple[int, int, int]
) -> dict[str, Any]:
    from builder.bench.flops import matrix_peak
    from builder.bench.generate import Bench, repeat, spread
    from builder.bench.stages import COLUMNS
    from builder.job.devices import default_workers
    from builder.sampling.device import device_model, resolve_dtype

    workers = workers or default_workers()
    measured = Bench(spec, reference)
    sample, length = spec.config.sample, spec.config.shards.images_per_shard
    try:
        click.echo(
            f"{device_model(measured.device)}, {sample.size} px, {sample.steps} steps of {sample.scheduler}, guidance "
            f"{sample.guidance:g}, batches of {sample.batch_size}, {spec.dtype}; {units} units of {length} images"
        )
        peak = matrix_peak(measured.device, resolve_dtype(sample.dtype, measured.device))
        stages, cost = measured.stages(length)
        seconds = stages.seconds if measured.device.startswith("cuda") else stages.cpu_seconds
        used = stages.images * cost.image / seconds / peak
        _table(COLUMNS, stages.table())
        click.echo(
            f"one worker: {stages.images / stages.seconds:.2f} images/s; {cost.passes} passes of "
            f"{_engineering(cost.denoise)}FLOP and a decoding of {_engineering(cost.decode)}FLOP an image; "
            f"{used:.0%} of the measured peak of {_engineering(peak)}FLOP/s"
        )
        one = lambda: measured.round(units, workers, plain[0], plain[1], plain[2])  # noqa: E731
        rounds = repeat(repeats, one, click.echo)
    finally:
        measured.close()
    ratios = spread(rounds)
    _table(
        ("ratio", "median", "least", "largest"),
        [(name, f"{median:.2f}", f"{low:.2f}", f"{high:.2f}") for name, median, low, high in ratios],
    )
    return {
        "workers": workers, "units": units, "images_per_unit": length, "utilisation": used, "peak": peak,
        "stages": stages.wall, "seconds": stages.seconds,
        "ratios": {name: {"median": median, "least": low, "largest": high} for name, median, low, high in ratios},
    }  # fmt: skip


def _by_batch_size(config: Config, architecture: str, sizes: list[int]) -> dict[str, Any]:
    """A full-size model with random weights (speed does not depend on them), and the plain pipeline beside it."""
    import tempfile

    from builder.bench.batch import proposed, random_pipeline, try_sizes
    from builder.bench.flops import matrix_peak, sampler_cost
    from builder.bench.plain import PlainLoop
    from builder.job.devices import prepare
    from builder.sampling.device import device_model
    from builder.sampling.sampler import Sampler

    device, codes = prepare(0), config.classes.codes
    prompts = {phase.code: phase.prompt for phase in config.classes}
    pipeline = random_pipeline(architecture, config.sample.size, device)
    sampler = Sampler(pipeline, config.sample, prompts, {}, device)
    cost, peak = sampler_cost(sampler), matrix_peak(device, sampler.dtype)
    click.echo(
        f"{device_model(device)}: {architecture} with random weights, {config.sample.size} px, {config.sample.steps} "
        f"steps, {sampler.dtype_name}; {_engineering(cost.image)}FLOP an image, peak {_engineering(peak)}FLOP/s"
    )
    trials = try_sizes(sampler, codes, cost, peak, sizes, on_trial=click.echo)
    plain = PlainLoop(pipeline.to(device, sampler.dtype), config.sample, prompts, {}, config.sample.size)
    with tempfile.TemporaryDirectory(prefix="builder-bench-") as folder:
        plain.run(codes[:1], config.sample.steps, 1, Path(folder))  # to warm up
        loop = plain.run([*codes, *codes], config.sample.steps, 1, Path(folder))
    click.echo(f"the plain pipeline, a prompt at a time: {1 / loop.unscored:.2f} images/s, saving included")
    if (best := proposed(trials)) is not None:
        click.echo(
            f"proposed: sample.batch_size={best.batch_size}, {best.rate * loop.unscored:.2f} times the plain pipeline"
        )
    return {
        "peak": peak, "flops": cost.image, "plain": 1 / loop.unscored, "trials": [vars(trial) for trial in trials],
    }  # fmt: skip


def job_to_measure(
    config: Config, checkpoint: str | None, real: str | None, reference: str | None, out: str
) -> tuple[JobSpec, Reference]:
    """The job that a config means, and the reference of its scores: that of dataset `reference`, or a new one."""
    from builder.cli.shards import real_dataset
    from builder.job.devices import prepare
    from builder.job.plan import Plan
    from builder.job.spec import JobSpec
    from builder.models.checkpoint import resolve
    from builder.quality.build import build_reference
    from builder.quality.reference import load_reference
    from builder.shards.dataset import Dataset
    from builder.shards.storage import Storage

    against = real_dataset(real or config.real, out, config.classes)
    found = resolve(checkpoint or config.checkpoint, run=config.checkpoint)
    device = prepare(0)
    if reference:
        made = load_reference(Dataset(reference, Storage(out)))
        if made.image_size != config.sample.size:
            raise BuilderError(
                f"the reference of '{reference}' is for images of {made.image_size} px, not {config.sample.size}",
                "name another dataset, or leave --reference out",
            )
    else:
        made = build_reference(
            against, config.score, config.classes.codes, image_size=config.sample.size, device=device
        )
    plan = Plan.of(config.classes.codes)
    spec = JobSpec.of(config, plan, found, name="bench", out=out, real=real or config.real)
    return spec, made


def _sizes(text: str) -> list[int]:
    """'1,2,4' -> [1, 2, 4]."""
    try:
        sizes = [int(part) for part in text.split(",")]
    except ValueError:
        sizes = []
    if not sizes or min(sizes) < 1 or sizes != sorted(sizes):
        raise BuilderError(f"--batch-sizes {text} is not a list of growing numbers", "write --batch-sizes 1,2,4")
    return sizes


def _engineering(value: float) -> str:
    """1.589e12 -> '1.589 T'."""
    for power, prefix in ((12, "T"), (9, "G"), (6, "M")):
        if value >= 10**power:
            return f"{value / 10**power:.4g} {prefix}"
    return f"{value:.4g} "


def _table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    """The first column flush left, the others flush right."""
    cells = [columns, *rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        click.echo(
            "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        )

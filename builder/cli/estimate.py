"""`builder estimate`: hours, gigabytes and images of a run, before it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from builder.cli.options import config_options, out_option, preset_option
from builder.errors import BuilderError

if TYPE_CHECKING:
    from builder.config import Config
    from builder.job.acceptance import Share
    from builder.job.plan import Plan
    from builder.shards.dataset import Dataset


@click.command()
@click.option("--count", type=click.IntRange(1), required=True, help="Images in all; with a share: accepted ones.")
@click.option("--phases", default="", help="[default: all of the config]")
@config_options
@preset_option
@click.option("--checkpoint", metavar="NAME|DIR", help="[default: the config's]")
@click.option("--from", "former", metavar="NAME", help="A former dataset: its scores' reference, bytes an image, and "
              "what a filter kept of it.")  # fmt: skip
@click.option("--accepted-share", type=click.FloatRange(0, 1, min_open=True), metavar="0-1",
              help="Share that the filter keeps. [default: of the former dataset]")  # fmt: skip
@click.option("--devices", type=click.IntRange(1), help="Devices like this one. [default: those here]")
@click.option("--probe-images", type=click.IntRange(1), default=40, show_default=True, help="Drawn to measure.")
@click.option("--probe-batch", is_flag=True, help="Also try batch sizes, and propose one.")
@click.option("--flops", is_flag=True, help="Draw nothing: from the model's FLOPs and the device's measured peak.")
@click.option("--architecture", metavar="FAMILY", help="With --flops: of a published model (sdxl, sd15).")
@click.option("--peak-tflops", type=click.FloatRange(0, min_open=True), help="With --flops: of another device.")
@click.option("--utilisation", type=click.FloatRange(0, 1, min_open=True), default=0.5, show_default=True,
              help="With --flops: share of the peak that is reached; `builder bench` measures it.")  # fmt: skip
@out_option
def estimate(
    count: int, phases: str, source: str | None, overrides: tuple[str, ...], preset: str | None,
    checkpoint: str | None, former: str | None, accepted_share: float | None, devices: int | None, probe_images: int,
    probe_batch: bool, flops: bool, architecture: str | None, peak_tflops: float | None, utilisation: float, out: str,
) -> None:  # fmt: skip
    """How long a run of `builder shards` takes, how large it gets, and what COUNT a filter asks for."""
    from builder.bench.estimate import SAMPLE_OVERHEAD, Forecast, bytes_per_image
    from builder.config import load_config
    from builder.job.devices import default_workers
    from builder.job.plan import Plan
    from builder.shards.dataset import find_dataset

    if not flops and (architecture or peak_tflops):
        raise BuilderError("--architecture and --peak-tflops say what FLOPs are counted from", "add --flops")
    config = load_config(source or "demo", overrides, preset)
    plan = Plan.of(config.classes.select(phases))
    before = find_dataset(former, out) if former else None
    size = bytes_per_image(before) if before else None
    if flops:
        rate, payload = _from_flops(config, checkpoint, architecture, peak_tflops, utilisation), None
    else:
        rate, payload = _from_probe(config, plan, checkpoint, before, probe_images, probe_batch)
    if size is None:
        size = SAMPLE_OVERHEAD + (payload or PNG_BYTES_PER_PIXEL * config.sample.size**2)
    shares = _shares(plan, accepted_share, before)
    images = _images(plan, count, shares) if shares else count
    forecast = Forecast(images, rate, devices or default_workers(), size)
    unit = "device" if forecast.devices == 1 else "devices"
    click.echo(
        f"{images:,} images of {config.sample.size} px on {forecast.devices} {unit} at {rate:.2f} images/s each: "
        f"{_hours(forecast.hours)}, {forecast.device_hours:,.2f} device-hours, {forecast.gigabytes:,.2f} GB "
        f"({size / 1000:.1f} kB an image)"
    )


PNG_BYTES_PER_PIXEL = 2.0  # of a photograph
MANY = 10**9  # images that a share which was told, not counted, is a share of: it is taken as certain


def _shares(plan: Plan, told: float | None, before: Dataset | None) -> dict[str, Share]:
    """Of each phase, what passes: as told, or as the newest filter of a former dataset kept; else empty."""
    from builder.bench.estimate import newest_filtered
    from builder.job.acceptance import Share, accepted_shares

    if told:
        return {code: Share(round(told * MANY), MANY) for code in plan.codes}
    filtered = newest_filtered(before) if before is not None else None
    if filtered is None:
        return {}
    shares = accepted_shares(filtered)
    if missing := [code for code in plan.codes if code not in shares]:
        raise BuilderError(f"'{filtered.name}' has no image of phase {', '.join(missing)}", "give --accepted-share")
    return shares


def _images(plan: Plan, count: int, shares: dict[str, Share]) -> int:
    """How far the plan goes for `count` accepted images; says so, and how far it may be at the rates' lower bounds."""
    from builder.job.acceptance import images_needed

    images = images_needed(plan, count, shares)
    if images is None:
        none = ", ".join(code for code in plan.codes if not shares[code].passed)
        raise BuilderError(
            f"no image of phase {none} passed: no COUNT gives accepted ones",
            "look at its rejects, loosen the filter, or train on",
        )
    worst = images_needed(plan, count, shares, lambda share: share.interval()[0])
    passing = ", ".join(f"{code} {shares[code].rate:.1%}" for code in plan.codes)
    doubt = f"; up to {worst:,} within the rates' 95 % intervals" if worst and worst > 1.01 * images else ""
    click.echo(f"accepted: {passing}; {count:,} accepted ones take COUNT={images:,}{doubt}")
    return images


def _from_flops(
    config: Config, checkpoint: str | None, architecture: str | None, peak_tflops: float | None, utilisation: float
) -> float:
    """Images/s of one device from the arithmetic alone."""
    import torch

    from builder.bench.flops import cost_of, matrix_peak
    from builder.job.devices import prepare
    from builder.models.checkpoint import resolve
    from builder.models.families import family_named
    from builder.models.load import load_pipeline
    from builder.sampling.device import resolve_dtype
    from builder.sampling.guidance import evaluations

    if architecture:
        family = family_named(architecture)
        with torch.device("meta"):
            pipeline = family.build(family.architecture, config.sample.size, 0)
    else:
        pipeline = load_pipeline(resolve(checkpoint or config.checkpoint, run=config.checkpoint))
    passes = evaluations(config.sample, pipeline.scheduler.config)
    cost = cost_of(pipeline.unet, pipeline.vae, config.sample.size, passes)
    device = prepare(0)
    peak = peak_tflops * 1e12 if peak_tflops else matrix_peak(device, resolve_dtype(config.sample.dtype, device))
    click.echo(
        f"{cost.passes} passes of {cost.denoise / 1e12:.4g} TFLOP and a decoding of {cost.decode / 1e12:.4g} are "
        f"{cost.image / 1e12:.4g} TFLOP an image; assumed: {utilisation:.0%} of a peak of {peak / 1e12:.4g} TFLOP/s"
    )
    return utilisation * peak / cost.image


def _from_probe(
    config: Config, plan: Plan, checkpoint: str | None, before: Dataset | None, images: int, batches: bool
) -> tuple[float, float]:
    """(images/s of one worker, bytes of a PNG), and, where asked for, a batch size proposed."""
    from builder.bench.estimate import probe
    from builder.job.devices import prepare
    from builder.models.checkpoint import resolve
    from builder.sampling.sampler import Request, load_sampler
    from builder.sampling.seeds import seed_of

    found = resolve(checkpoint or config.checkpoint, run=config.checkpoint)
    sampler = load_sampler(found, config, prepare(0))
    if batches:
        _propose(sampler, config)
    labels = {code: config.classes.label(code) for code in plan.codes}
    places = plan.at(0, -(-images // config.sample.batch_size) * config.sample.batch_size)
    drawn = probe(
        sampler, [Request(code, labels[code], seed_of(config.seed, labels[code], i)) for code, i in places]
    )  # fmt: skip
    on = f"{sampler.device_model}, {sampler.dtype_name}"
    if before is None:
        click.echo(f"drawing alone, on {on}: {drawn.rate:.2f} images/s a worker; scores come on top on a CPU (--from)")
        return drawn.rate, drawn.payload
    seconds = _scoring(before, config, len(places))
    rate = drawn.rate if sampler.device.type == "cuda" else 1 / (1 / drawn.rate + seconds)
    click.echo(
        f"on {on}: {drawn.rate:.2f} images/s drawn; scored in {1000 * seconds:.0f} ms an image"
        + (", beside the next batch" if sampler.device.type == "cuda" else f": {rate:.2f} images/s a worker")
    )
    return min(rate, 1 / seconds), drawn.payload


def _scoring(before: Dataset, config: Config, images: int) -> float:
    """Seconds to score one image by the former dataset's reference, on its own first images."""
    import time

    from builder.job.devices import prepare
    from builder.quality.reference import load_reference
    from builder.quality.scorer import Scorer
    from builder.shards.dataset import find_dataset

    reference = load_reference(before)
    scorer = Scorer(reference, find_dataset(reference.against, before.storage.root), config.score, prepare(0))
    rows = before.shard_table(before.shard_numbers()[0]).to_pylist()[:images]
    pixels, codes = [before.pixels(row) for row in rows], [row["phase"] for row in rows]
    scorer.score(pixels[:1], codes[:1])
    started = time.perf_counter()
    scorer.score(pixels, codes)
    return (time.perf_counter() - started) / len(rows)


def _propose(sampler: Any, config: Config) -> None:
    from builder.bench.batch import proposed, try_sizes
    from builder.bench.flops import matrix_peak, sampler_cost

    peak = matrix_peak(sampler.device, sampler.dtype)
    trials = try_sizes(sampler, config.classes.codes, sampler_cost(sampler), peak)
    for trial in trials:
        click.echo(str(trial))
    best = proposed(trials)
    if best is None:
        raise BuilderError("not even one image fits into the device's memory", "take a smaller sample.size")
    click.echo(
        f"proposed: --set sample.batch_size={best.batch_size}; it is part of the fingerprint, so choose it before the "
        f"first shard (now {config.sample.batch_size})"
    )


def _hours(hours: float) -> str:
    if hours >= 1:
        return f"{hours:,.1f} hours"
    return f"{60 * hours:.1f} minutes" if hours >= 1 / 60 else f"{3600 * hours:.0f} seconds"

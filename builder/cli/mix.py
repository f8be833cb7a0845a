"""`builder mix`: what a mixing loader would give, and how fast."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

import click

from builder.cli.options import out_option
from builder.errors import BuilderError

if TYPE_CHECKING:
    from builder.mixing import MixedLoader


def numbers(text: str, kind: type, what: str) -> list[Any]:
    """Of "24,8"; BuilderError says what it was for."""
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise BuilderError(f"{what} is '{text}'", "give numbers with commas between, e.g. 3,1") from None


def ratio_table(text: str) -> float | dict[int, float]:
    """Of "0.25", or of "0:1,10:0.25": from epoch (or step) 0 on 1, from 10 on 0.25."""
    try:
        if ":" not in text:
            return float(text)
        return {int(start): float(share) for start, share in (part.split(":") for part in text.split(","))}
    except ValueError:
        raise BuilderError(
            f"--ratio is '{text}'", "give the synthetic share, e.g. 0.25, or a schedule, e.g. 0:1,10:0.25"
        ) from None


@click.command()
@click.option("--real", metavar="NAME", help="Real dataset.")
@click.option("--synthetic", metavar="NAME", multiple=True, help="Synthetic dataset; may be given again.")
@click.option("--ratio", metavar="0-1|SCHEDULE", help="Synthetic share of a batch [default: 0.25]; or 0:1,10:0.25: "
              "from epoch 10 on a quarter.")  # fmt: skip
@click.option("--ratio-unit", type=click.Choice(["epoch", "step"]), default="epoch", show_default=True,
              help="What a schedule counts in.")  # fmt: skip
@click.option("--counts", metavar="N,N...", help="Samples of each source in a batch, real first, instead of a ratio.")
@click.option("--weights", metavar="W,W...", help="Of the synthetic datasets. [default: their sizes]")
@click.option("--batch-size", type=click.IntRange(1), default=32, show_default=True)
@click.option("--size", type=click.IntRange(1), help="Side in px. [default: as stored]")
@click.option("--split", type=click.Choice(["train", "val", "test"]), default="train", show_default=True)
@click.option("--classes", type=click.Choice(["natural", "match_real", "balance"]), default="natural",
              show_default=True, help="Share of the classes within each source.")  # fmt: skip
@click.option("--epoch", "length", metavar="real|N", default="real", show_default=True,
              help="An epoch: one pass over the real data, or so many samples.")  # fmt: skip
@click.option("--exhausted", type=click.Choice(["cycle", "stop"]), default="cycle", show_default=True,
              help="When a source runs out: again in another order, or the epoch ends.")  # fmt: skip
@click.option("--reading", type=click.Choice(["indexed", "stream"]), default="indexed", show_default=True,
              help="Random access into the tars, or forwards through them.")  # fmt: skip
@click.option("--world", type=click.IntRange(1), default=1, show_default=True, help="Ranks of the training.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--epochs", type=click.IntRange(1), default=1, show_default=True, help="How many are shown.")
@click.option("--allow-leak", metavar="REASON", help="Take synthetic data that held-out patients may have leaked into.")
@click.option("--partial", is_flag=True, help="Take datasets that are not complete.")
@click.option("--bench", is_flag=True, help="Also read batches, and say how fast.")
@click.option("--workers", type=click.IntRange(0), default=0, show_default=True, help="With --bench: reading ahead.")
@click.option("--batches", type=click.IntRange(1), default=200, show_default=True, help="With --bench: read.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead.")
@out_option
def mix(
    real: str | None, synthetic: tuple[str, ...], ratio: str | None, ratio_unit: str, counts: str | None,
    weights: str | None, batch_size: int, size: int | None, split: str, classes: str, length: str, exhausted: str,
    reading: str,
    world: int, seed: int, epochs: int, allow_leak: str | None, partial: bool, bench: bool, workers: int, batches: int,
    as_json: bool, out: str,
) -> None:  # fmt: skip
    """Print what `builder.mixing.MixedLoader` would give: by epoch, of each source and class, and how often again.

    Its arguments have the same names. With --bench also how fast.
    """
    from builder.mixing import MixedLoader

    if length != "real" and not length.isdecimal():
        raise BuilderError(f"--epoch is '{length}'", "give real, or a number of samples")
    begin = time.perf_counter()
    loader = MixedLoader(
        real,
        list(synthetic),
        ratio=None if ratio is None else ratio_table(ratio),
        ratio_unit=ratio_unit,
        counts=None if counts is None else numbers(counts, int, "--counts"),
        weights=None if weights is None else numbers(weights, float, "--weights"),
        batch_size=batch_size, size=size, split=split, classes=classes,
        epoch="real" if length == "real" else int(length),
        exhausted=exhausted, reading=reading, seed=seed, workers=workers if bench else 0, out=out, rank=0, world=world,
        allow_leak=allow_leak, partial=partial,
    )  # fmt: skip
    opened = time.perf_counter() - begin
    described = [_describe(loader, epoch) for epoch in range(epochs)]
    speed = _speed(loader, batches, opened) if bench else None
    if as_json:
        click.echo(json.dumps({"epochs": described, **({"speed": speed} if speed else {})}, indent=1))
        return
    for epoch in described:
        _print_epoch(epoch)
    if speed:
        click.echo(
            f"{speed['samples_per_second']:,.0f} samples/s over {speed['samples']:,} samples with {workers} workers; "
            f"opened in {speed['opened_seconds']:.2f} s, first batch after {speed['first_batch_seconds']:.2f} s; index "
            f"{speed['index_bytes_per_sample']:.0f} bytes a sample"
        )


def _describe(loader: MixedLoader, epoch: int) -> dict[str, Any]:
    loader.set_epoch(epoch)
    return {
        "epoch": epoch,
        "steps": len(loader),
        "batch_size": loader.batch_size,
        "world": loader.world,
        "filled": loader.filled,
        "sources": loader.composition(),
    }


def _print_epoch(epoch: dict[str, Any]) -> None:
    sources = epoch["sources"]
    drawn = sum(source["drawn"] for source in sources)
    synthetic = sum(source["drawn"] for source in sources if source["origin"] == "synthetic")
    ranks = f" on each of {epoch['world']} ranks" if epoch["world"] > 1 else ""
    fill = f"; {epoch['filled']:,} more fill the last step" if epoch["filled"] else ""
    click.echo(
        f"epoch {epoch['epoch']}: {epoch['steps']:,} steps of {epoch['batch_size']}{ranks}, {drawn:,} samples, "
        f"synthetic {synthetic / drawn:.2%}{fill}"
    )
    codes = list(sources[0]["classes"])
    width = max(len("source"), *(len(source["name"]) for source in sources))
    click.echo(
        f"  {'source':<{width}}  {'origin':<9}{'samples':>10}{'drawn':>10}{'passes':>8}{'most often':>12}"
        + "".join(f"{code:>10}" for code in codes)
    )
    for source in sources:
        click.echo(
            f"  {source['name']:<{width}}  {source['origin']:<9}{source['samples']:>10,}{source['drawn']:>10,}"
            f"{source['passes']:>8.2f}{'-' if source['repeats'] is None else source['repeats']:>12}"
            + "".join(f"{source['classes'][code]:>10,}" for code in codes)
        )


def _speed(loader: MixedLoader, batches: int, opened: float) -> dict[str, float]:
    from builder.mixing.speed import measure

    loader.set_epoch(0)
    speed = measure(loader, batches)
    sources = [source for source in loader.sources if source]
    return {
        "opened_seconds": opened,
        "first_batch_seconds": speed.first,
        "seconds": speed.seconds,
        "samples": speed.samples,
        "samples_per_second": speed.rate,
        "index_bytes_per_sample": sum(source.nbytes for source in sources) / sum(map(len, sources)),
    }

"""`builder tune-filter`: what a threshold costs in images and does to the set's figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from builder.cli.criteria import Score, gates_in_use
from builder.cli.metrics import download_option, features_option, seed_option
from builder.cli.options import dataset_argument, out_option, partial_option
from builder.errors import BuilderError


@click.command("tune-filter")
@dataset_argument
@click.option("--against", metavar="REAL", required=True, help="Real dataset that holds the reference patients.")
@click.option("--split", default="val", show_default=True, help="Its split that the figures are taken against.")
@click.option(
    "--score", "scores", type=Score(), multiple=True,
    help="Score to set a least value of; may be repeated. [default: phase_probability_real_pct, realism_real_pct, "
    "sharpness_real_pct, ssim_real_pct, as far as they are there]",
)  # fmt: skip
@click.option("--grid", default="0,5,10,25,50", show_default=True, help="The least values, by comma.")
@click.option("--least", type=click.IntRange(10), default=50, show_default=True,
              help="Filters that leave fewer images of a phase get no figures.")  # fmt: skip
@features_option
@seed_option
@click.option("--allow-leak", metavar="REASON", help="Compare even where the generator may have seen these patients.")
@click.option("--to", "picture", type=click.Path(dir_okay=False), help="PNG to write. [default: NAME-tuning.png]")
@click.option("--json", "target", type=click.Path(dir_okay=False), help="Also write the figures there.")
@download_option
@out_option
@partial_option
def tune_filter(
    dataset: str | None, against: str, split: str, scores: tuple[str, ...], grid: str, least: int, features: str,
    seed: int, allow_leak: str | None, picture: str | None, target: str | None, download: bool, out: str, partial: bool,
) -> None:  # fmt: skip
    """Over a grid of thresholds: how many images survive, and how the set's figures move (table and plot).

    Each score by itself and all together, without the gates and with them. Figures are taken at the same N of all
    filters, for they depend on N; the floor is what as many real training crops score.
    """
    import json

    from builder.job.devices import prepare
    from builder.quality.features import load_extractor
    from builder.quality.reference import has_reference, load_reference
    from builder.quality.sets.tune import plot_tuning, tune
    from builder.shards.dataset import find_dataset

    values = _numbers(grid)
    found, real = find_dataset(dataset, out, partial=partial), find_dataset(against, out)
    gates = gates_in_use(found, load_reference(found) if has_reference(found) else None)
    result = tune(
        found, real, split, load_extractor(features, device=prepare(0), download=download), gates,
        scores=scores, grid=values, least=least, seed=seed, allow_leak=allow_leak,
    )  # fmt: skip
    _print(result)
    path = Path(picture or f"{found.name}-tuning.png")
    plot_tuning(result, path)
    click.echo(f"\nwrote {path}")
    if target:
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        Path(target).write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        click.echo(f"wrote {target}")


def _numbers(text: str) -> list[float]:
    import math

    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = []
    if not values or not all(map(math.isfinite, values)):
        raise BuilderError(f"--grid {text} is not a list of numbers", "write --grid 0,5,10,25,50")
    return sorted(set(values))


def _print(result: dict[str, Any]) -> None:
    by_phase = ", ".join(f"{n} {code}" for code, n in result["n_by_phase"].items())
    click.echo(f"dataset '{result['dataset']}' against the {result['split']} split of '{result['against']}' "
               f"({result['n_reference']} crops)")  # fmt: skip
    click.echo(f"figures at N = {result['n']} ({by_phase}) of every filter, mean of {result['draws']} draws, seed "
               f"{result['seed']}; features: {result['extractor']['id']}")  # fmt: skip
    click.echo(f"lineage: {result['lineage']}")
    codes, names = list(result["rows"][0]["survivors"]), list(result["floor"])
    short = [name.split("[")[0] for name in names]
    width = max(len(row["filter"]) for row in result["rows"])
    click.echo("")
    click.echo(f"{'filter':<{width}}{'least':>8}{'gates':>7}" + "".join(f"{code:>8}" for code in codes)
               + f"{'share':>8}" + "".join(f"{name:>12}" for name in short))  # fmt: skip
    for row in result["rows"]:
        least = "-" if row["threshold"] is None else f"{row['threshold']:g}"
        counts = "".join(f"{row['survivors'][code]:>8,}" for code in codes)
        figures = "".join(f"{row['figures'][name]:>12.4g}" if row["figures"] else f"{'-':>12}" for name in names)
        gates = "yes" if row["gates"] else "no"
        click.echo(f"{row['filter']:<{width}}{least:>8}{gates:>7}{counts}{row['share']:>8.1%}{figures}")
    blank = " " * (width + 15 + 8 * len(codes) + 8)
    click.echo(f"{'floor':<{len(blank)}}" + "".join(f"{result['floor'][name]:>12.4g}" for name in names))
    click.echo(f"{'  ±':<{len(blank)}}" + "".join(f"{result['floor_sd'][name]:>12.2g}" for name in names))
    click.echo("floor: as many real training crops of other patients in the place of the survivors")
    if any(not row["figures"] for row in result["rows"]):
        click.echo(f"-: fewer than {result['least']} images of a phase survive")

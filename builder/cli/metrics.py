"""`builder metrics` and `builder floors`: figures of a set, each with its N, its interval and its floor."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from builder.cli.options import dataset_argument, out_option, partial_option
from builder.errors import BuilderError

features_option = click.option(
    "--features", default="efficientnet-lite0", show_default=True, metavar="SPEC",
    help="Feature extractor: efficientnet-lite0, inception, dinov2:FOLDER or module:callable.",
)  # fmt: skip
download_option = click.option("--download", is_flag=True, help="Fetch the extractor's weights when they are missing.")
seed_option = click.option("--seed", type=int, default=0, show_default=True, help="Of the draws.")


@click.command()
@dataset_argument
@click.option("--against", metavar="REAL", required=True, help="Real dataset that holds the reference patients.")
@click.option("--split", default="val", show_default=True, help="Its split that the figures are taken against.")
@features_option
@click.option(
    "--bootstrap", type=click.IntRange(0), default=200, show_default=True, help="Resamples behind an interval."
)
@click.option("--max-n", type=click.IntRange(1), default=1000, show_default=True, help="Most synthetic images drawn.")
@seed_option
@click.option("--allow-leak", metavar="REASON", help="Compare even where the generator may have seen these patients.")
@click.option("--json", "target", metavar="FILE", help="[default: manifests/NAME/metrics-SPLIT.json]")
@download_option
@out_option
@partial_option
def metrics(
    dataset: str | None, against: str, split: str, features: str, bootstrap: int, max_n: int, seed: int,
    allow_leak: str | None, target: str | None, download: bool, out: str, partial: bool,
) -> None:  # fmt: skip
    """Figures of a synthetic dataset against held-out real patients, pooled and by phase.

    Each with its 95 % interval (real images resampled by patient), and its floor: what as many real training crops
    score in the place of the synthetic ones.
    """
    from builder.job.devices import prepare
    from builder.quality.features import load_extractor
    from builder.quality.sets.scores import set_scores
    from builder.shards.dataset import find_dataset

    found, real = find_dataset(dataset, out, partial=partial), find_dataset(against, out)
    result = set_scores(
        found, real, split, load_extractor(features, device=prepare(0), download=download),
        replicates=bootstrap, max_n=max_n, seed=seed, allow_leak=allow_leak,
    )  # fmt: skip
    extractor = result["extractor"]
    click.echo(f"dataset '{found.name}' against the {split} split of '{real.name}', seed {seed}")
    click.echo(f"features: {extractor['id']}, {extractor['dimension']} dimensions; {_ways(result)}")
    click.echo(f"lineage: {result['lineage']}")
    click.echo(f"interval: 95 %, {bootstrap} resamples, by patient and by image; floor: as many real training crops")
    click.echo(
        "'only N' in a note: too few for the figure to mean much; 'N <= dimensions': its covariances are singular,"
    )
    click.echo("so that its height says little, and only the distance from its floor counts")
    for group, figures in result["groups"].items():
        shown = [row for row in figures if not _is_trait(row["name"]) or row["gives_away"]]
        heading = [_heading(group), "value", "interval", "floor", "N real", "N synth."]
        click.echo("")
        _table([*heading, "note"], [_cells(row) for row in shown])
        traits = [row for row in figures if _is_trait(row["name"])]
        measured = [row for row in traits if row["value"] is not None]
        if measured and not any(row["gives_away"] for row in traits):
            widest = max(measured, key=lambda row: row["value"])
            said = f"the most telling is {widest['name']} {_number(widest['value'])}, floor {_number(widest['floor'])}"
            sure = any(row["low"] is not None for row in measured)
            verdict = "no plain trait alone gives an image away" if sure else "without intervals no trait can be judged"
            click.echo(f"  {verdict}: {said}")
    data = json.dumps(result, indent=1, allow_nan=False).encode() + b"\n"
    path = f"manifests/{found.name}/metrics-{split}.json"
    if target:
        _write(Path(target), data)
    else:
        found.storage.write(path, data)
    click.echo(f"\nwrote {target or path}")


@click.command()
@click.argument("real")
@click.option("--n", "sizes", default="48,200,1000", show_default=True, help="Crops on either side; several by comma.")
@click.option("--repeats", type=click.IntRange(1), default=5, show_default=True, help="Random halves.")
@click.option("--size", "image_size", type=click.IntRange(1), help="Bring crops to this size in px first, as a "
              "synthetic dataset's have it. [default: as they are stored]")  # fmt: skip
@features_option
@seed_option
@click.option("--json", "target", metavar="FILE", help="Also write the figures there.")
@download_option
@out_option
def floors(
    real: str, sizes: str, repeats: int, image_size: int | None, features: str, seed: int, target: str | None,
    download: bool, out: str,
) -> None:  # fmt: skip
    """What real images score against real images of other patients, at N on either side.

    No synthetic dataset can be expected to score better: read its figures beside these. Patients of all splits are
    cut into random halves; mean and standard deviation over them.
    """
    from builder.job.devices import prepare
    from builder.quality.features import load_extractor
    from builder.quality.sets.floors import real_floors
    from builder.shards.dataset import find_dataset

    try:
        numbers = [int(part) for part in sizes.split(",")]
    except ValueError:
        raise BuilderError(f"--n {sizes} is not a list of numbers", "write --n 48,200,1000") from None
    found = find_dataset(real, out)
    extractor = load_extractor(features, device=prepare(0), download=download)
    result = real_floors(found, extractor, numbers, repeats=repeats, seed=seed, image_size=image_size)
    click.echo(f"dataset '{found.name}', real against real of other patients, {repeats} random halves, seed {seed}")
    click.echo(f"features: {extractor.id}, {extractor.dimension} dimensions; {_ways(result)}")
    if result["without_patient"]:
        click.echo(
            f"NOTE: {result['without_patient']} crops have no patient; each photograph is taken for one, so that "
            "photographs of one patient may lie in both halves, which makes the floor too low"
        )
    for group, by_n in result["groups"].items():
        tried = {n: at["figures"] for n, at in by_n.items() if at["figures"]}
        names = dict.fromkeys(name for figures in tried.values() for name in figures)
        rows = [[name, *(_spread(figures.get(name)) for figures in tried.values())] for name in names]
        click.echo("")
        _table([_heading(group), *(f"N = {n}" for n in tried)], rows)
        for n, at in by_n.items():
            if at["note"]:
                click.echo(f"  N = {n} is too large: {at['note']}")
    if target:
        _write(Path(target), json.dumps(result, indent=1, allow_nan=False).encode() + b"\n")
        click.echo(f"\nwrote {target}")


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def _ways(result: dict[str, Any]) -> str:
    size, extractor = result["image_size"], result["extractor"]
    first = f"images brought to {size} px" if size else "images of several sizes, as they are stored"
    return f"{first}, then by the extractor to {extractor['size'] or 'no other'} px ({extractor['resize']})"


def _heading(group: str) -> str:
    return group if group == "pooled" else f"phase {group}"


def _is_trait(name: str) -> bool:
    from builder.quality.sets.detect import TRAITS

    return name.removeprefix("auc[").removesuffix("]") in TRAITS


def _cells(row: dict[str, Any]) -> list[str]:
    ends = "" if row["low"] is None else f"[{_number(row['low'])}, {_number(row['high'])}]"
    alone = "this alone gives it away" if row["gives_away"] else ""
    note = "; ".join(filter(None, [alone, row["note"]]))
    counts = str(row["n_real"]), str(row["n_synthetic"])
    return [row["name"], _number(row["value"]), ends, _number(row["floor"]), *counts, note]


def _spread(figure: dict[str, Any] | None) -> str:
    if figure is None or figure["mean"] is None:
        return "-"
    return _number(figure["mean"]) + ("" if figure["sd"] is None else f" ± {_number(figure['sd'])}")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns: the first flush left, the numbers flush right; the last, if it holds notes, flush left as well."""
    cells = [list(heading), *map(list, rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    notes = heading[-1] == "note"
    for row in cells:
        middle = row[1:-1] if notes else row[1:]
        line = "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(middle, widths[1:], strict=False))])
        click.echo((line + (f"  {row[-1]}" if notes else "")).rstrip())

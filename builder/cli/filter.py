"""`builder filter`: turn away images by score, and say what real, flat and blurred ones would have scored."""

from __future__ import annotations

import math
import re
import sys
from typing import TYPE_CHECKING

import click

from builder.cli.options import out_option, partial_option
from builder.errors import BuilderError, did_you_mean

if TYPE_CHECKING:
    from builder.quality.reference import Reference
    from builder.shards.dataset import Dataset
    from builder.shards.filter import Criteria, Range, Tally


@click.command("filter", context_settings={"ignore_unknown_options": True, "allow_extra_args": False})
@click.argument("words", nargs=-1, type=click.UNPROCESSED, metavar="[DATASET] [--min-SCORE X] [--max-SCORE X]")
@click.option(
    "--where", default="", metavar="SQL", help="A condition over the manifest, e.g. \"phase = 'I'\" (duckdb)."
)
@click.option("--no-gates", is_flag=True, help="Without the sanity gates (flat, blurred, black images may pass).")
@click.option("--dry-run", is_flag=True, help="Only print what would happen.")
@click.option("--name", help="Name of the new dataset. [default: <dataset>-accepted]")
@click.option("--view", is_flag=True, help="Write manifests alone; the images stay in the source's tars.")
@out_option
@partial_option
def filter_(
    words: tuple[str, ...], where: str, no_gates: bool, dry_run: bool,
    name: str | None, view: bool, out: str, partial: bool,
) -> None:  # fmt: skip
    """Keep the images that pass, as a new dataset; the source is never touched.

    Any score column takes --min-SCORE and --max-SCORE (e.g. --min-ssim 0.7 --max-clipped 0.1). Sanity gates are on:
    each statistic must lie within what real training crops of the phase show.
    """
    from builder.quality.gates import gate_ranges
    from builder.quality.reference import has_reference, load_reference, save_reference
    from builder.shards.dataset import Dataset, find_dataset
    from builder.shards.filter import Criteria, already_filtered, filter_dataset

    named, ranges = _parse(words)
    source = find_dataset(named, out, partial=partial)
    click.echo(f"dataset: {source.name} ({source.info.get('count', 'partial')} images)")
    reference = load_reference(source) if has_reference(source) else None
    if not no_gates:
        if reference is None:
            raise BuilderError(
                f"'{source.name}' has no gates: it was never scored against real crops",
                f"run `builder score {source.name} --against REAL`, or filter with --no-gates",
            )
        ranges += gate_ranges(reference.gates)
    criteria = Criteria(tuple(ranges), where)
    if reference is not None:
        _print_yardstick(reference, criteria)

    target = Dataset(name or f"{source.name}-accepted", source.storage)
    if not dry_run and already_filtered(source, criteria, target, view=view):
        click.echo(f"dataset '{target.name}' is just this already; nothing to do")
        return
    tally = filter_dataset(source, criteria, None)
    _print_tally(tally, source)
    if dry_run:
        click.echo("dry run: nothing was written")
        return
    if not sum(tally.kept.values()):
        click.echo("no image passes: nothing was written", err=True)
        sys.exit(1)
    filter_dataset(source, criteria, target, view=view)
    if reference is not None:
        save_reference(target, reference)  # it can be filtered again when its source is gone
    click.echo(f"wrote {'view' if view else 'dataset'} '{target.name}': {sum(tally.kept.values()):,} images; "
               f"rejects with reasons in manifests/{target.name}/rejects")  # fmt: skip


def _parse(words: tuple[str, ...]) -> tuple[str | None, list[Range]]:
    """The dataset, if one is named, and the ranges of --min-ssim 0.7 --max-clipped=0.1, in any order."""
    from builder.shards.filter import Range
    from builder.shards.schema import SCORE_NAMES

    named, ranges = None, []
    rest = [part for word in words for part in (word.split("=", 1) if word.startswith("--") else [word])]
    while rest:
        word = rest.pop(0)
        if not word.startswith("-") and named is None:
            named = word
            continue
        match = re.fullmatch(r"--(min|max)-([\w-]+)", word)
        if not match:
            known = ["--where", "--no-gates", "--dry-run", "--name", "--view", "--out", "--partial"]
            raise BuilderError(
                f"no such option: {word}", did_you_mean(word, [*known, *(f"--min-{s}" for s in SCORE_NAMES)])
            )
        bound, score = match.group(1), match.group(2).replace("-", "_")
        if score not in SCORE_NAMES:
            raise BuilderError(f"no such score: {score}", did_you_mean(score, SCORE_NAMES))
        try:
            value = float(rest.pop(0))
        except (IndexError, ValueError):
            value = math.nan
        if not math.isfinite(value):
            raise BuilderError(f"{word} needs a number", f"write {word} 0.7")
        if bound == "min":
            ranges.append(Range(score, low=value, reason=f"{score} < {value:g}"))
        else:
            ranges.append(Range(score, high=value, reason=f"{score} > {value:g}"))
    return named, ranges


def _print_yardstick(reference: Reference, criteria: Criteria) -> None:
    """What share of real, flat and blurred images would pass: the honest scale of a threshold.

    A range of one phase is a gate, one of all phases a threshold. --where is left out: known images have no row.
    """
    from builder.quality.reference import yardstick_table
    from builder.shards.filter import Criteria, judge

    thresholds = Criteria(tuple(limit for limit in criteria.ranges if limit.phase is None))
    click.echo("\nknown images (the reference's yardsticks) that would pass:")
    click.echo(f"  {'':<28}{'thresholds alone':>18}{'with the gates':>18}{'N':>6}")
    for kind, table in yardstick_table(reference).items():
        shares = [_share_passing(judge(table, asked)) for asked in (thresholds, Criteria(criteria.ranges))]
        click.echo(f"  {kind:<28}{shares[0]:>18.1%}{shares[1]:>18.1%}{table.num_rows:>6}")
    click.echo("")


def _share_passing(reasons: list[list[str]]) -> float:
    return sum(not said for said in reasons) / max(1, len(reasons))


def _print_tally(tally: Tally, source: Dataset) -> None:
    click.echo(f"{'phase':<8}{'kept':>8}{'rejected':>10}{'share kept':>12}")
    for code in source.classes.codes:
        kept, rejected = tally.kept[code], tally.rejected[code]
        if kept + rejected:
            click.echo(f"{code:<8}{kept:>8,}{rejected:>10,}{kept / (kept + rejected):>12.1%}")
    kept, total = sum(tally.kept.values()), sum(tally.kept.values()) + sum(tally.rejected.values())
    click.echo(f"{'all':<8}{kept:>8,}{total - kept:>10,}{kept / max(1, total):>12.1%}")
    for (code, reason), times in sorted(tally.reasons.items(), key=lambda item: (item[0][0], -item[1])):
        click.echo(f"  {code}: {reason}: {times:,}")

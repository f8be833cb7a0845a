"""`builder filter`: turn away images by score, and say what real, flat and blurred ones would have scored."""

from __future__ import annotations

import functools
import sys
from typing import Any

import click

from builder.cli.criteria import Asked, CriteriaCommand, criteria_options
from builder.cli.judgement import lopsided, print_judgement
from builder.cli.options import dataset_argument, out_option, partial_option


@click.command("filter", cls=CriteriaCommand, options_metavar="[OPTIONS] [--min-SCORE X] [--max-SCORE X]")
@dataset_argument
@criteria_options(of_sets=True)
@click.option("--dry-run", is_flag=True, help="Only print what would happen.")
@click.option("--name", help="Name of the new dataset. [default: <dataset>-accepted]")
@click.option("--view", is_flag=True, help="Write manifests alone; the images stay in the source's tars.")
@out_option
@partial_option
def filter_(
    dataset: str | None, dry_run: bool, name: str | None, view: bool, out: str, partial: bool, **options: Any
) -> None:
    """Keep the images that pass, as a new dataset; the source is never touched.

    Any score takes --min-SCORE and --max-SCORE (e.g. --min-ssim 0.7 --max-clipped 0.1); --max-copy-score also takes
    auto, the alarm calibrated on real crops of other patients. Gates are on: sharpness, contrast, clipping, noise,
    realism and phase probability must be such as real training crops of the phase have, and copies of training
    crops are turned away.

    Hard is an image whose label the probe confirms (phase_margin > 0), though three quarters of real crops are easier
    for it (phase_probability_real_pct <= 25). --keep-hard re-admits those that thresholds alone turned away, the ones
    with the largest margin first; never what gates, --where or --no-duplicates turned away. --balance keeps the first
    images of each phase in the order of the plan, and the share of hard ones.
    """
    from builder.quality.reference import copy_reference
    from builder.shards.dataset import Dataset, find_dataset
    from builder.shards.filter import already_filtered, filter_dataset, judge_dataset

    asked = Asked.of(**options)
    source = find_dataset(dataset, out, partial=partial)
    click.echo(f"dataset: {source.name} ({source.info.get('count', 'partial')} images)")
    criteria = asked.criteria_for(source)

    target = Dataset(name or f"{source.name}-accepted", source.storage)
    if not dry_run and already_filtered(source, criteria, target, view=view):
        copy_reference(source, target)  # which an older version left out when it was killed
        click.echo(f"dataset '{target.name}' is just this already; nothing to do")
        return
    judgement = judge_dataset(source, criteria)
    print_judgement(judgement, criteria, source)
    for warning in lopsided(judgement, source):
        click.echo(warning, err=True)
    if dry_run:
        click.echo("dry run: nothing was written")
        return
    if not judgement.accepted.any():
        click.echo("no image passes: nothing was written", err=True)
        sys.exit(1)
    beside = functools.partial(copy_reference, source, target)
    if not filter_dataset(source, criteria, judgement, target, view=view, write_beside=beside):
        click.echo(f"dataset '{target.name}' is just this already, written by another process; nothing to do")
        return
    click.echo(f"wrote {'view' if view else 'dataset'} '{target.name}': {judgement.accepted.sum():,} images; "
               f"rejects with reasons in manifests/{target.name}/rejects")  # fmt: skip

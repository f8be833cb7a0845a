"""`builder classify`: does synthetic data help a classifier, and at which ratio?"""

from __future__ import annotations

import math
from pathlib import Path

import click

from builder.cli.options import out_option, partial_option
from builder.errors import BuilderError

RATIOS = (0.0, 0.25, 0.5, 1.0)
RATES = {"scratch": 2e-3, "folder": 1e-4}  # learning rates of AdamW


@click.command()
@click.option("--real", metavar="NAME|PATH", required=True, help="Real dataset: its training, val and test patients.")
@click.option("--synthetic", multiple=True, metavar="NAME|PATH", help="Synthetic dataset; may be repeated.")
@click.option("--ratios", metavar="LIST", help="Synthetic shares of a batch, by comma; 0 is always among them. "
              "[default: 0,0.25,0.5,1; without --synthetic 0]")  # fmt: skip
@click.option("--seeds", type=click.IntRange(1), default=5, show_default=True, help="Trainings a ratio.")
@click.option("--real-limit", type=click.IntRange(1), metavar="N",
              help="Train on about N real crops: whole patients, other ones for each seed. [default: all]")  # fmt: skip
@click.option("--model", metavar="FOLDER", help="Start from this image classifier of transformers, with a new head. "
              "[default: a small ResNet from scratch]")  # fmt: skip
@click.option("--size", type=click.IntRange(8), default=64, show_default=True, help="Side of the images, px.")
@click.option("--steps", type=click.IntRange(1), default=250, show_default=True, help="Of training, at every ratio.")
@click.option("--batch-size", type=click.IntRange(2), default=32, show_default=True)
@click.option("--learning-rate", type=click.FloatRange(0, min_open=True), help="[default: 2e-3; with --model 1e-4]")
@click.option("--bootstrap", type=click.IntRange(100), default=2000, show_default=True,
              help="Resamples behind an interval.")  # fmt: skip
@click.option("--workers", type=click.IntRange(0), default=0, show_default=True, help="Processes that read ahead.")
@click.option("--allow-leak", metavar="REASON", help="Go on where test patients may have been seen; recorded.")
@click.option("--to", "target", type=click.Path(file_okay=False), help="Where all of it goes. [default: classify/REAL]")
@click.option("--name", help="Of the files of the answer. [default: of the synthetic datasets]")
@out_option
@partial_option
def classify(
    real: str, synthetic: tuple[str, ...], ratios: str | None, seeds: int, real_limit: int | None, model: str | None,
    size: int, steps: int, batch_size: int, learning_rate: float | None, bootstrap: int, workers: int,
    allow_leak: str | None, target: str | None, name: str | None, out: str, partial: bool,
) -> None:  # fmt: skip
    """Train a classifier on real and synthetic crops at several ratios; judge it on the test patients.

    Every ratio has the same steps, augmentation and balance of classes. Macro-F1, kappa and recalls with 95 %
    intervals over patients and seeds, the gain over real data alone, and whether it helps: table, JSON and plot.
    Run again, it goes on where it was; other settings lie beside.
    """
    if allow_leak is not None and not allow_leak.strip():
        raise BuilderError("--allow-leak has no reason", "say why, in words: they are recorded")
    shares = _ratios(ratios) if ratios is not None else RATIOS if synthetic else RATIOS[:1]

    from builder.classify.report import as_text, write_report
    from builder.classify.study import Question, Study
    from builder.classify.training import Recipe
    from builder.job.devices import prepare
    from builder.shards.dataset import find_dataset

    dataset = find_dataset(real, out, partial=partial)
    others = [find_dataset(reference, out, partial=partial) for reference in synthetic]
    rate = learning_rate or RATES["folder" if model else "scratch"]
    recipe = Recipe(model or "", size, steps, batch_size, rate, evaluations=min(Recipe.evaluations, steps))
    question = Question(dataset, others, shares, seeds, real_limit, recipe, allow_leak, bootstrap)
    folder = Path(target or f"classify/{dataset.name}")
    answer = Study(question, folder, device=prepare(0), workers=workers).run()
    limited = f"-at-{real_limit}" if real_limit else ""
    files = write_report(answer, folder, name or f"{'+'.join(other.name for other in others) or 'real'}{limited}")
    click.echo(as_text(answer))
    click.echo(f"wrote {', '.join(map(str, files))}")


def _ratios(text: str) -> list[float]:
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = []
    if not values or not all(map(math.isfinite, values)):
        raise BuilderError(f"--ratios {text} is not a list of numbers", "write --ratios 0,0.25,0.5,1")
    return values

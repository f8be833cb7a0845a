"""What a loader refuses before the first batch: unfinished data, other classes, a leak into the evaluation."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

from builder.errors import BuilderError
from builder.mixing.sources import Source
from builder.phases import ClassTable
from builder.shards.dataset import Dataset, find_dataset
from builder.shards.lineage import HELD_OUT, find_leak


def resolve(reference: str | Path | Dataset, origin: str, out: str, partial: bool) -> Dataset:
    """The dataset meant; BuilderError when it is of another origin, or not complete and `partial` is not set."""
    dataset = reference if isinstance(reference, Dataset) else find_dataset(str(reference), out, partial=True)
    info = dataset.info
    if info.get("origin") != origin:
        raise BuilderError(
            f"dataset '{dataset.name}' is {info.get('origin')}, and was given as {origin}",
            f"pass it as {info.get('origin')}=...",
        )
    if info.get("state") != "complete" and not partial:
        raise BuilderError(
            f"dataset '{dataset.name}' is not complete", "run its command again to finish it, or pass partial=True"
        )
    return dataset


def check_lineage(synthetic: Dataset, real: Dataset, allow_leak: str | None, splits: Sequence[str] = HELD_OUT) -> None:
    """Refuse a synthetic dataset whose generator saw patients of these splits of the real dataset (val and test).

    What can't be known not to leak is refused as well: an unknown lineage, patients hashed with another key, held-out
    samples without a patient. With `allow_leak` (the reason) it is a warning instead.
    """
    problem = find_leak(synthetic, real, splits)
    if problem is None:
        return
    if not allow_leak:
        raise BuilderError(
            problem, "use a generator trained on the training split of this dataset, or pass allow_leak='the reason'"
        )
    warnings.warn(f"{problem}; allowed, because: {allow_leak}", stacklevel=5)


def check_sizes(sources: Sequence[Source]) -> None:
    """Without a loading size, all stored images must be of one size."""
    dimensions = [(source.name, source.dimensions) for source in sources]
    smallest = [min(d[side] for _, d in dimensions) for side in (0, 1)]
    largest = [max(d[side] for _, d in dimensions) for side in (2, 3)]
    if smallest != largest:
        listed = "; ".join(f"'{name}' {d[0]}x{d[1]} to {d[2]}x{d[3]} px" for name, d in dimensions)
        raise BuilderError(
            f"the stored images differ in size: {listed}", "give the size to load them at, e.g. size=128"
        )


def class_weights(mode: str, source: Source, real: Source | None, classes: ClassTable) -> list[int]:
    """The weight of each class within a source, whole numbers; 0 where the source has no sample of it (with a warning).

    natural: as the source has them; match_real: as the real source has them; balance: all alike.
    """
    counts = [len(rows) for rows in source.members(len(classes))]
    if mode == "balance":
        weights = [1 if count else 0 for count in counts]
    elif mode == "match_real":
        if real is None:
            raise BuilderError(
                "classes='match_real' needs a real dataset to match", "pass real=..., or another class mode"
            )
        wanted = [len(rows) for rows in real.members(len(classes))]
        weights = [share if count else 0 for share, count in zip(wanted, counts, strict=True)]
    else:
        weights = counts
    missing = [code for code, count in zip(classes.codes, counts, strict=True) if not count]
    if missing:
        instead = "" if mode == "natural" else ": its other classes take that share"
        warnings.warn(f"'{source.name}' has no sample of {', '.join(missing)}{instead}", stacklevel=5)
    if not any(weights):
        raise BuilderError(
            f"'{source.name}' shares no class with the real dataset", "choose another class mode than match_real"
        )
    return weights

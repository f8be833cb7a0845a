"""From the datasets that are named to sources and a schedule: opened, checked against each other, and shared out."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from builder.errors import BuilderError
from builder.mixing.guards import check_lineage, check_sizes, class_weights, resolve
from builder.mixing.mix import Mix
from builder.mixing.ratio import RatioSchedule, batch_of, ratio_of
from builder.mixing.schedule import Deck, InOrder
from builder.mixing.sources import Source
from builder.phases import ClassTable
from builder.shards.dataset import Dataset
from builder.shards.lineage import SPLITS

Reference = str | Path | Dataset
DEFAULT_RATIO = 0.25


@dataclass
class Wish:
    """What is to be mixed, as `MixedLoader` was told."""

    real: Reference | None
    held_out: list[Reference]
    synthetic: list[Reference]
    ratio: float | Mapping[int, float] | None
    ratio_unit: str
    counts: Sequence[int] | None
    weights: Sequence[float] | None
    batch_size: int
    size: int | None
    out: str
    split: str
    classes: str
    epoch: str | int
    exhausted: str
    seed: int
    world: int
    allow_leak: str | None
    partial: bool


def listed(references: Reference | Iterable[Reference] | None) -> list[Reference]:
    """One dataset, several or none, as a list."""
    if references is None:
        return []
    return [references] if isinstance(references, str | Path | Dataset) else list(references)


@dataclass
class Mixture:
    """What came of a wish: sources (0: real, None without it; then the synthetic ones), and how they are shared out."""

    sources: list[Source | None]
    schedule: Mix | InOrder
    ratio: RatioSchedule
    batch_size: int
    classes: ClassTable

    @property
    def drawn(self) -> list[Source]:
        """The sources that are read."""
        if isinstance(self.schedule, InOrder):
            return [source for source in self.sources if source]
        return [s for s, deck in zip(self.sources, self.schedule.decks, strict=True) if s and deck]


def mixture(wish: Wish) -> Mixture:
    """Open and check what is to be mixed. BuilderError: what cannot be mixed, and why."""
    batch_size, weights, ratio = _shares(wish)
    datasets = _datasets(wish, ratio)
    classes = _one_class_table([dataset for dataset in datasets if dataset])
    sources = [None if d is None else Source(d, None if n else wish.split) for n, d in enumerate(datasets)]
    if wish.split != "train":
        schedule: Mix | InOrder = InOrder(len(sources[0] or ()))
    else:
        schedule = _mix(wish, sources, ratio, weights, batch_size, classes)
    mixed = Mixture(sources, schedule, ratio, batch_size, classes)
    if wish.size is None:
        check_sizes(mixed.drawn)
    return mixed


def _shares(wish: Wish) -> tuple[int, Sequence[float] | None, RatioSchedule]:
    """Batch size, weights of the synthetic datasets and ratio, by `counts` or by `ratio`."""
    given, batch_size, weights, share = wish.synthetic, wish.batch_size, wish.weights, wish.ratio
    if wish.split != "train":
        if (share not in (None, 0)) or given or wish.counts:
            raise BuilderError(
                f"the {wish.split} split is never mixed with synthetic data", "leave out synthetic, ratio and counts"
            )
        if wish.real is None:
            raise BuilderError(f"no real dataset is given for the {wish.split} split", "pass real=...")
    if wish.counts is not None:
        if share is not None or weights is not None:
            raise BuilderError("counts are given beside ratio or weights", "counts alone say them all")
        if len(wish.counts) != 1 + len(given):
            raise BuilderError(
                f"{len(wish.counts)} counts are given for one real and {len(given)} synthetic datasets",
                "give one each, real first",
            )
        batch_size, share, weights = batch_of(tuple(wish.counts))
    ratio = ratio_of(share, wish.ratio_unit, DEFAULT_RATIO, real=wish.real is not None, synthetic=bool(given))
    if weights is not None and len(weights) != len(given):
        raise BuilderError(f"{len(weights)} weights are given for {len(given)} synthetic datasets", "give one each")
    return batch_size, weights, ratio


def _datasets(wish: Wish, ratio: RatioSchedule) -> list[Dataset | None]:
    """The real dataset (or None) and the synthetic ones; these are not opened where none is ever drawn."""
    real = None if wish.real is None else resolve(wish.real, "real", wish.out, wish.partial)
    held_out = [resolve(reference, "real", wish.out, wish.partial) for reference in wish.held_out]
    given = wish.synthetic if max(ratio.shares) else []
    others = [resolve(reference, "synthetic", wish.out, wish.partial) for reference in given]
    for other in others:
        for dataset in held_out:
            check_lineage(other, dataset, wish.allow_leak, SPLITS)
        if real is None and not held_out:
            warnings.warn(
                f"no real dataset is given: the lineage of '{other.name}' is not checked against anything",
                stacklevel=4,
            )
        elif real is not None:
            check_lineage(other, real, wish.allow_leak)
    return [real, *others]


def _one_class_table(datasets: Sequence[Dataset]) -> ClassTable:
    first, *others = datasets
    for other in others:
        first.classes.require_same(other.classes, f"'{first.name}'", f"'{other.name}'")
    return first.classes


def _mix(
    wish: Wish,
    sources: Sequence[Source | None],
    ratio: RatioSchedule,
    weights: Sequence[float] | None,
    batch_size: int,
    classes: ClassTable,
) -> Mix:
    real, *others = sources
    decks: list[Deck | None] = []
    for number, source in enumerate(sources):
        if source is None or (number == 0 and min(ratio.shares) == 1):
            decks.append(None)
            continue
        shares = class_weights(wish.classes, source, real, classes)
        decks.append(Deck(source.members(len(classes)), shares, (wish.seed, number)))
    mix = Mix(
        decks[0],
        [deck for deck in decks[1:] if deck],
        [float(len(source)) for source in others if source] if weights is None else weights,
        ratio,
        None if wish.epoch == "real" else int(wish.epoch),
        wish.seed,
        stride=wish.world * batch_size,
        stop=wish.exhausted == "stop",
    )
    _refuse_what_is_never_drawn(mix, sources)
    return mix


def _refuse_what_is_never_drawn(mix: Mix, sources: Sequence[Source | None]) -> None:
    """BuilderError for a source of which no epoch draws any, as far as the ratio changes."""
    plans = mix.changing()
    totals = np.sum([plan.drawn for plan in plans], axis=0)
    for number, (source, deck, drawn) in enumerate(zip(sources, mix.decks, totals, strict=True)):
        if source and deck and not drawn:
            if number and not mix.weights[number - 1]:
                raise BuilderError(f"the weight of '{source.name}' is 0: none of it is ever drawn", "leave it out")
            raise BuilderError(
                f"at ratio {max(mix.ratio.shares):g}, an epoch of {plans[-1].length} samples has room for none of "
                f"'{source.name}'",
                "give a longer epoch (epoch=SAMPLES), or another ratio",
            )

"""Scores of a set: every figure of a synthetic dataset against patients that its generator never saw.

One protocol for all: the reference is a held-out split of the real dataset; N synthetic crops are drawn; the floor is
what N real training crops (other patients than the split's) score in their place.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tqdm import tqdm

from builder.errors import BuilderError, did_you_mean
from builder.quality.panel import patient_of
from builder.quality.reference import load_reference
from builder.quality.sets.comparison import Estimate, Naming, Side, compare
from builder.quality.sets.detect import TRAITS, traits
from builder.shards.dataset import Dataset, one_size, resize
from builder.shards.lineage import HELD_OUT, find_leak

if TYPE_CHECKING:
    from builder.quality.features.extractor import Extractor

POOLED = "pooled"
FEW_RESAMPLES = 20  # fewer have no 2.5 % quantile to speak of
# Columns of the manifests that are read; of hundreds of thousands of rows all would take gigabytes.
NEEDED = ("key", "phase", "patient", "source", "split", "shard", "offset", "size", "sha256", "width", "height")

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Figure:
    """One figure of a set. `floor`: what as many real training crops score; None with a note where there is none."""

    name: str
    value: float | None
    low: float | None
    high: float | None
    floor: float | None
    n_real: int
    n_synthetic: int
    note: str = ""
    gives_away: bool = False  # of a single trait: it alone tells synthetic from real


def set_scores(
    synthetic: Dataset,
    real: Dataset,
    split: str,
    extractor: Extractor,
    *,
    replicates: int = 200,
    max_n: int = 1000,
    seed: int = 0,
    allow_leak: str | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """All figures of `synthetic` against a held-out `split` of `real`, pooled and by phase; plain data for JSON.

    N of a phase: the least of its synthetic images, of its real training crops and `max_n`. Pooled: the phases that
    both have, in the proportions of the split. All images are first brought to the synthetic ones' size, when they
    have one. Depends on `seed` and the images, not on their order.
    Raises BuilderError for a split that is empty or not held out, a possible leak without the reason `allow_leak`,
    classes that differ, and features that are not finite.
    """
    if max_n < 1 or replicates < 0 or 0 < replicates < FEW_RESAMPLES:
        raise BuilderError(
            f"max-n is {max_n} and bootstrap {replicates}",
            f"give at least 1 image, and 0 resamples (no intervals) or at least {FEW_RESAMPLES}",
        )
    lineage = require_comparable(synthetic, real, split, allow_leak)
    size, made = draw(synthetic, max_n, seed)
    reference, training = held_out_and_training(real, split)
    there = {row["phase"] for row in (*reference, *made)}
    codes = [code for code in synthetic.classes.codes if code in there]
    by_phase = {code: _Choice.of(code, reference, made, training, max_n, seed) for code in codes}
    groups = {POOLED: _pooled(list(by_phase.values()), max_n, seed), **by_phase}

    real_rows = {row["key"]: row for choice in groups.values() for row in (*choice.reference, *choice.training)}
    made_rows = {row["key"]: row for choice in groups.values() for row in choice.synthetic}
    loaded_real = load_sides(real, list(real_rows.values()), extractor, size, progress=progress)
    loaded_made = load_sides(synthetic, list(made_rows.values()), extractor, size, progress=progress)
    naming = Naming(extractor.name, extractor.standard)
    copies, results = synthetic.table(("phase", "copy_score")), {}
    for name, choice in tqdm(groups.items(), "figures", unit="group", disable=not progress):
        figures = _figures(choice, loaded_real, loaded_made, naming, replicates, seed)
        results[name] = [*figures, _copies(synthetic, copies, None if name == POOLED else name)]
    return {
        "dataset": synthetic.name,
        "against": real.name,
        "split": split,
        "seed": seed,
        "max_n": max_n,
        "bootstrap": replicates,
        "image_size": size,
        "extractor": describe(extractor),
        "lineage": lineage,
        "allow_leak": allow_leak,
        "fingerprints": {dataset.name: dataset.info.get("fingerprint") for dataset in (synthetic, real)},
        "groups": {name: [vars(figure) for figure in figures] for name, figures in results.items()},
    }


def require_comparable(synthetic: Dataset, real: Dataset, split: str, allow_leak: str | None) -> str:
    """What is known of the lineage, in words; BuilderError when the comparison would not mean what it says."""
    if split not in HELD_OUT:
        reason = "the generator learnt from it" if split == "train" else did_you_mean(split, HELD_OUT)
        raise BuilderError(f"set figures are not taken against the split '{split}'", f"{reason}; name val or test")
    for dataset, origin in ((synthetic, "synthetic"), (real, "real")):
        found = dataset.info.get("origin")
        if found != origin:
            raise BuilderError(
                f"dataset '{dataset.name}' is {found}, and was given as {origin}",
                "write `builder metrics SYNTHETIC --against REAL`; `builder floors REAL` sets real against real",
            )
    synthetic.classes.require_same(real.classes, f"dataset '{synthetic.name}'", f"'{real.name}'")
    problem = find_leak(synthetic, real, (split,))
    stand_in = real.info.get("group_by")
    unknown = f"; but patients of '{real.name}' are unknown and stood in for by {stand_in}" if stand_in else ""
    if problem is None:
        return f"the generator of '{synthetic.name}' saw no patient of the {split} split of '{real.name}'{unknown}"
    if not allow_leak:
        raise BuilderError(
            f"{problem}; figures against them would flatter it",
            "compare with the dataset whose training split the generator learnt from, or give --allow-leak REASON",
        )
    return f"LEAK: {problem}; allowed, because: {allow_leak}"


def held_out_and_training(real: Dataset, split: str) -> tuple[Rows, Rows]:
    """The crops of the split, and training crops of other patients. BuilderError when the split is empty."""
    rows = real.table(NEEDED).to_pylist()
    reference = [row for row in rows if row["split"] == split]
    if not reference:
        raise BuilderError(f"dataset '{real.name}' has no crops in its split '{split}'", "name another split")
    patients = {patient_of(row) for row in reference}
    return reference, [row for row in rows if row["split"] == "train" and patient_of(row) not in patients]


# -- what is compared with what ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Choice:
    """The manifest rows of one comparison, in random order; `training` takes the place of `synthetic` for the floor."""

    codes: tuple[str, ...]
    reference: Rows
    synthetic: Rows
    training: Rows
    note: str = ""

    @classmethod
    def of(cls, code: str, reference: Rows, synthetic: Rows, training: Rows, max_n: int, seed: int) -> _Choice:
        """One phase: N synthetic and N training crops, the same N; without a training crop there is no floor."""
        own, made, train = (
            shuffled([row for row in rows if row["phase"] == code], seed) for rows in (reference, synthetic, training)
        )
        n = min(len(made), len(train) or max_n, max_n)
        notes = [
            f"no {what} of {code}" for what, rows in (("held-out crop", own), ("synthetic image", made)) if not rows
        ]
        if not train:
            notes.append(f"no training crop of {code}: no floor")
        return cls((code,), own, made[:n], train[:n], "; ".join(notes))


def _pooled(choices: Sequence[_Choice], max_n: int, seed: int) -> _Choice:
    """The phases that both sides have, synthetic and training crops in the proportions of the reference."""
    both = [choice for choice in choices if choice.reference and choice.synthetic]
    left_out = [code for choice in choices if not (choice.reference and choice.synthetic) for code in choice.codes]
    note = f"without {', '.join(left_out)}: missing on one side" if left_out else ""
    if not both:
        return _Choice((), [], [], [], note)
    reference = shuffled([row for choice in both for row in choice.reference], seed)
    shares = [len(choice.reference) / len(reference) for choice in both]
    n = min(max_n, *(math.floor(len(c.synthetic) / share) for c, share in zip(both, shares, strict=True)))
    counts = _apportioned(n, shares)
    parts = []
    for rows in ([c.synthetic for c in both], [c.training for c in both]):
        taken = [row for own, count in zip(rows, counts, strict=True) for row in own[:count]]
        parts.append(shuffled(taken, seed))
    synthetic, training = parts
    if len(training) < len(synthetic):
        training, note = [], "; ".join(filter(None, [note, "a phase has no training crop: no floor"]))
    return _Choice(tuple(code for c in both for code in c.codes), reference, synthetic, training, note)


def _apportioned(n: int, shares: Sequence[float]) -> list[int]:
    """n in whole numbers by shares that sum to 1: largest remainders first (Hamilton)."""
    counts = [math.floor(n * share) for share in shares]
    rest = sorted(range(len(shares)), key=lambda i: counts[i] - n * shares[i])
    for i in rest[: n - sum(counts)]:
        counts[i] += 1
    return counts


def draw(dataset: Dataset, most: int, seed: int) -> tuple[int | None, Rows]:
    """The size in px that all images have (else None), and the first `most` rows of each phase as `shuffled` has them.

    Manifests are read one after the other; only what may be drawn is kept.
    """
    drawn: dict[str, Rows] = {}
    limits: dict[str, bytes] = {}  # of phases that have enough: the place of the last one
    sizes = set()
    for _, table in dataset.tables(NEEDED):
        places = [_place(key, seed) for key in table["key"].to_pylist()]
        phases = table["phase"].to_pylist()
        early = [i for i, phase in enumerate(phases) if phase not in limits or places[i] < limits[phase]]
        for row in table.take(pa.array(early, pa.int64())).to_pylist():
            drawn.setdefault(row["phase"], []).append(row)
        for phase, rows in drawn.items():
            if len(rows) >= 2 * most:
                drawn[phase] = shuffled(rows, seed)[:most]
                limits[phase] = _place(drawn[phase][-1]["key"], seed)
        if table.num_rows:
            sizes.add(one_size(table))
    chosen = [row for rows in drawn.values() for row in shuffled(rows, seed)[:most]]
    return sizes.pop() if len(sizes) == 1 else None, chosen


def shuffled(rows: Rows, seed: int) -> Rows:
    """In an order that depends on the seed and the keys alone."""
    return sorted(rows, key=lambda row: _place(row["key"], seed))


def _place(key: str, seed: int) -> bytes:
    return hashlib.sha256(f"set/{seed}/{key}".encode()).digest()


# -- features and figures ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Loaded:
    """Features and traits of images, by key."""

    place: dict[str, int]
    features: np.ndarray
    traits: dict[str, np.ndarray]
    head: np.ndarray | None

    def side(self, rows: Rows, *, by_patient: bool) -> Side:
        """The images of manifest rows; of synthetic ones every image is its own group."""
        places = [self.place[row["key"]] for row in rows]
        features = self.features[places].astype(np.float64)
        return Side(
            features,
            [patient_of(row) if by_patient else row["key"] for row in rows],
            {name: values[places] for name, values in self.traits.items()},
            None if self.head is None else features @ self.head.T,
        )


def load_sides(dataset: Dataset, rows: Rows, extractor: Extractor, size: int | None, *, progress: bool) -> Loaded:
    """Features (from the cache where it has them) and traits of images, first brought to `size` px.

    BuilderError names the first image whose features are not finite.
    """
    from builder.quality.features.cache import dataset_features

    features = np.zeros((0, extractor.dimension), np.float32)
    if rows:
        features = dataset_features(dataset, extractor, image_size=size, rows=rows, progress=progress)
    bad = np.flatnonzero(~np.isfinite(features).all(1))
    if len(bad):
        raise BuilderError(
            f"{extractor.name} gives features that are not finite for {len(bad)} images of '{dataset.name}', "
            f"the first is {rows[bad[0]]['key']}",
            f"look at it, run `builder verify {dataset.name}`, or choose other --features",
        )
    found = [
        traits(pixels if size is None else resize(pixels, size), row)
        for row, pixels in tqdm(dataset.images(rows), f"traits of {dataset.name}", len(rows), disable=not progress)
    ]
    return Loaded(
        {row["key"]: place for place, row in enumerate(rows)},
        features,
        {name: np.array([row[name] for row in found]) for name in TRAITS},
        extractor.head if extractor.standard else None,
    )


def describe(extractor: Extractor) -> dict[str, Any]:
    """What a result says of the network that its figures stand on."""
    names = ("id", "name", "dimension", "input_range", "size", "resize", "weights_sha256", "standard")
    return {name: getattr(extractor, name) for name in names}


def _figures(
    choice: _Choice, real: Loaded, synthetic: Loaded, naming: Naming, replicates: int, seed: int
) -> list[Figure]:
    reference = real.side(choice.reference, by_patient=True)
    made = synthetic.side(choice.synthetic, by_patient=False)
    found = compare(reference, made, naming, replicates=replicates, seed=seed)
    floors: dict[str, Estimate] = {}
    if choice.training:
        floors = compare(reference, real.side(choice.training, by_patient=True), naming)
    figures = []
    for name, estimate in found.items():
        floor = floors[name].value if name in floors else None
        note = "; ".join(filter(None, [choice.note, estimate.note]))
        alone = estimate.gives_away and name.removeprefix("auc[").removesuffix("]") in TRAITS
        ends = estimate.value, estimate.low, estimate.high
        figures.append(Figure(name, *ends, floor, len(reference), len(made), note, alone))
    return figures


def _copies(synthetic: Dataset, table: pa.Table, code: str | None) -> Figure:
    """The share of images (of a phase, or all) from the reference's copy alarm on, with its exact binomial interval.

    Of all images that were scored, not of those drawn: `table` has their phase and copy_score. The floor is the share
    of held-out real crops that reach it.
    """
    from scipy.stats import binomtest

    try:
        alarm = load_reference(synthetic).copy
    except BuilderError as error:  # never scored, or by an older version: the other figures stand all the same
        return Figure("copies", None, None, None, None, 0, 0, f"{error.what}: {error.remedy}")
    if code is not None:
        table = table.filter(pc.equal(table["phase"], code))
    scores = table["copy_score"].to_numpy() if "copy_score" in table.column_names else np.full(len(table), np.nan)
    known = scores[~np.isnan(scores.astype(np.float32))]
    if not len(scores):
        return Figure("copies", None, None, None, None, 0, 0, f"no synthetic image of {code}")
    if not alarm or not len(known):
        return Figure("copies", None, None, None, None, 0, 0, "never scored for copies: run `builder score`")
    alarms = int((known >= np.float32(alarm["threshold"])).sum())  # in 32 bits, as scores are stored and filtered
    ends = binomtest(alarms, len(known)).proportion_ci(method="exact")
    note = f"copy_score >= {alarm['threshold']:.3g}: {alarms} images"
    if len(known) < len(scores):
        note += f"; {len(scores) - len(known)} images were never scored"
    return Figure(
        "copies", alarms / len(known), float(ends.low), float(ends.high), alarm["rate"], alarm["n"], len(known), note
    )

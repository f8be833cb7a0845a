"""Two sets of images side by side: all figures of one against the other, each with its interval. No disk is read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from builder.quality.feature_scores import unit_length
from builder.quality.sets.bootstrap import Counts, image_counts, interval, patient_counts, replicate
from builder.quality.sets.detect import GIVES_AWAY, TRAITS, Auc, probe_auc
from builder.quality.sets.distances import Frechet, Kernel, kernel_distance_blocks
from builder.quality.sets.diversity import Inception, VendiRatio
from builder.quality.sets.manifold import NAMES as MANIFOLD
from builder.quality.sets.manifold import NEIGHBOURS, Neighbours

FEW_IMAGES, FEW_PATIENTS = 100, 10  # on either side; below, a figure or its interval means little, and its note says so
BLOCK = 50  # images of a block of the kernel distance
SHARE, POSITIVE, ANY = (0.0, 1.0), (0.0, np.inf), (-np.inf, np.inf)

Measure = Callable[[Counts, Counts], float | dict[str, float]]


@dataclass(frozen=True)
class Side:
    """One set: features [N, D], the group of each image (patient; of a synthetic image its key), TRAITS -> [N], and
    logits [N, C] where the network has them. Rows in random order."""

    features: np.ndarray
    groups: Sequence[str]
    traits: dict[str, np.ndarray] = field(default_factory=dict)
    logits: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.features)


@dataclass(frozen=True)
class Estimate:
    """A figure's value, its 95 % interval and what to know about it; None where it could not be had."""

    value: float | None = None
    low: float | None = None
    high: float | None = None
    note: str = ""

    @property
    def gives_away(self) -> bool:
        """Of an AUC: the whole interval lies above GIVES_AWAY."""
        return self.low is not None and self.low > GIVES_AWAY


@dataclass(frozen=True)
class Naming:
    """FID, KID and IS are so named with the standard network only; else figures bear the name of their features."""

    features: str
    standard: bool

    def __call__(self, figure: str) -> str:
        standard = {"fd": "FID", "kd": "KID", "is": "IS"}
        return standard[figure] if self.standard and figure in standard else f"{figure}[{self.features}]"


def compare(real: Side, other: Side, naming: Naming, *, replicates: int = 0, seed: int = 0) -> dict[str, Estimate]:
    """All figures of `other` (synthetic images, or real ones in their place: the floor) against `real`, by name.

    `replicates` > 0 gives intervals: `real` resampled by patient, `other` by image. A figure that needs more images
    than there are has no value, and says so in its note. So does a note where a figure means little: few images, few
    patients, or for the Fréchet distance no more images than dimensions, where the covariances are singular.
    """
    table = _Table(real, other, replicates, seed)
    n = min(len(real), len(other))
    x, y = real.features, other.features
    dimension = x.shape[1]
    found: dict[str, Estimate] = {}

    def add(figure: str, bounds: tuple[float, float], least: int, make: Callable[[], Measure], note: str = "") -> None:
        found[naming(figure)] = table.measure({figure: bounds}, least, make, note)[figure]

    singular = f"N <= {dimension} dimensions" if n <= dimension else ""
    add("fd", POSITIVE, 2, lambda: Frechet(x, y), _joined(singular, _few(n)))
    add("kd", ANY, 2, lambda: Kernel(x, y), _blocks(x, y))
    if naming.standard and other.logits is not None:
        logits = other.logits
        add("is", POSITIVE, 1, lambda: _of_the_other(Inception(logits)))
    bounds = {name: POSITIVE if name == "density" else SHARE for name in MANIFOLD}
    # Of unit length: else flat and black images, whose features are short, are everything's neighbours.
    shares = table.measure(bounds, NEIGHBOURS + 1, lambda: Neighbours(unit_length(x), unit_length(y)), _few(n))
    found |= {naming(name): estimate for name, estimate in shares.items()}
    add("vendi_ratio", POSITIVE, 1, lambda: VendiRatio(x, y), _joined(f"at N = {n}", _few(n)))

    probe = probe_auc(x, y, real.groups, other.groups)
    if probe is not None:
        add("auc", SHARE, 1, lambda: probe, _few(n))
    else:
        found[naming("auc")] = Estimate(note="needs two patients and two synthetic images to leave some out")
    for trait in TRAITS:
        if trait in real.traits and trait in other.traits:
            found[f"auc[{trait}]"] = _either_way(table, Auc(real.traits[trait], other.traits[trait]), _few(n))
    return found


class _Table:
    """Resamples of the two sets, drawn once and used by every figure."""

    def __init__(self, real: Side, other: Side, replicates: int, seed: int) -> None:
        self._sizes = len(real), len(other)
        patients = len(set(real.groups))
        self._counts: tuple[Counts, Counts] | None = None
        self._note = ""
        if not replicates:
            return
        if len(other) == 1:
            self._note = "one synthetic image: no interval"
        elif patients < FEW_PATIENTS:
            self._note = f"only {patients} patients" if patients > 1 else "one patient: no interval"
        if patients > 1 and len(other) > 1:
            chance = np.random.default_rng(seed)
            self._counts = (
                patient_counts(real.groups, replicates, chance),
                image_counts(len(other), replicates, chance),
            )

    def measure(
        self, bounds: dict[str, tuple[float, float]], least: int, make: Callable[[], Measure], note: str = ""
    ) -> dict[str, Estimate]:
        """The figures that `make()` measures, named in `bounds`, which also hold their ranges."""
        if min(self._sizes) < least:
            n, m = self._sizes
            return dict.fromkeys(bounds, Estimate(note=f"needs {_images(least)} on either side, there are {n} and {m}"))
        measured = make()

        def figures(w: Counts, v: Counts) -> dict[str, float]:
            values = measured(w, v)
            return values if isinstance(values, dict) else dict.fromkeys(bounds, values)

        values = figures(*(np.ones(size, int) for size in self._sizes))
        drawn = replicate(figures, *self._counts) if self._counts else {}
        found = {}
        for name, limits in bounds.items():
            if not np.isfinite(values[name]):
                found[name] = Estimate(note="not defined for these images")
                continue
            ends = interval(values[name], drawn[name], limits) if name in drawn else None
            low, high = ends or (None, None)
            found[name] = Estimate(values[name], low, high, _joined(note, self._note))
        return found


def _either_way(table: _Table, auc: Auc, note: str) -> Estimate:
    """The AUC of a trait, whichever side has more of it: 0.5..1."""
    found = table.measure({"auc": SHARE}, 1, lambda: auc, note)["auc"]
    if found.value is None or found.value >= 0.5:
        return found
    low, high = (None if end is None else 1 - end for end in (found.high, found.low))
    return Estimate(1 - found.value, low, high, _joined("less in synthetic", found.note))


def _of_the_other(score: Inception) -> Measure:
    return lambda _, v: score(v)


def _blocks(x: np.ndarray, y: np.ndarray) -> str:
    values = kernel_distance_blocks(x, y, BLOCK)
    if not len(values):
        return _few(min(len(x), len(y)))
    return f"{len(values)} blocks of {BLOCK}: {values.mean():.3g} ± {values.std(ddof=1):.2g}"


def _few(n: int) -> str:
    return f"only {_images(n)}" if n < FEW_IMAGES else ""


def _images(n: int) -> str:
    return f"{n} image{'' if n == 1 else 's'}"


def _joined(*notes: str) -> str:
    return "; ".join(note for note in notes if note)

"""Scores of an image in feature space: distance to the phase's training crops, realism, and what the phase probe says.

All on features of unit length. Plain pooled features of flat, black or noisy images are short, so that they lie
*nearer* to any crop than another real crop does: of 60 flat images none was farther from the phantom's phase-P crops
than 95 % of real crops are, with unit length all of them are (efficientnet-lite0, 64 px).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from builder.quality.probe import Probe

NEIGHBOUR = 3  # k of the realism score's manifold, as in its paper


def unit_length(features: np.ndarray) -> np.ndarray:
    """Features [N, D] scaled to length 1, float64; rows of zeros stay zeros."""
    features = features.astype(np.float64)
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)


@dataclass(frozen=True)
class _Training:
    """The training crops of one phase in feature space."""

    features: np.ndarray  # [M, D], unit length
    patients: np.ndarray  # [M]
    radii: np.ndarray  # [M]: distance to the k-th nearest crop of another patient
    inner: np.ndarray  # [M]: whether the crop counts for realism


class FeatureScores:
    """feature_distance, realism, phase_probability and phase_margin; names and ranges as in shards.schema."""

    def __init__(
        self,
        features: Mapping[str, np.ndarray],
        patients: Mapping[str, Sequence[str]],
        probe: Probe | None,
    ) -> None:
        """`features`: phase -> float [M, D] of its training crops; `patients`: phase -> the patient of each.

        `probe`: fitted on features of unit length; None: there is none. Of phases it does not know it says nothing.
        """
        self._training = {code: _training(own, patients[code]) for code, own in features.items()}
        self._probe = probe

    def score(
        self, features: np.ndarray, codes: Sequence[str], leave_out: Sequence[str | None] | None = None
    ) -> list[dict[str, float | None]]:
        """One row of scores an image, from features [N, D] and phases; `leave_out`: patients whose crops don't count.

        realism (Kynkaanniemi et al., NeurIPS 2019, sec. 5): max over training crops r of radius(r) / |f - r|, with the
        half of the crops left out whose radius is above the median. At least 1 means: inside the real manifold. The
        radius reaches to the 3rd nearest crop of another patient, because photographs of one patient are near-copies.
        A value is None where nothing is left to compare with.
        """
        ready = unit_length(features)
        found: list[dict[str, float | None]] = [{} for _ in codes]
        for code in set(codes):
            places = [place for place, own in enumerate(codes) if own == code]
            training = self._training[code]
            distances = _distances(ready[places], training.features)
            for place, row in zip(places, distances, strict=True):
                if leave_out is not None and leave_out[place] is not None:
                    row[training.patients == leave_out[place]] = np.inf
                found[place] = {"feature_distance": _finite(row.min()), "realism": _realism(row, training)}
        self._add_phase(found, ready, codes)
        return found

    def _add_phase(self, found: list[dict[str, float | None]], features: np.ndarray, codes: Sequence[str]) -> None:
        for row in found:
            row.update(phase_probability=None, phase_margin=None)
        if self._probe is not None:
            for row, said, code in zip(found, self._probe.probabilities(features), codes, strict=True):
                if code in self._probe.codes:
                    row.update(phase_scores(said, self._probe.codes.index(code)))


def phase_scores(probabilities: np.ndarray, place: int) -> dict[str, float | None]:
    """phase_probability and phase_margin of one image whose phase has this place in `probabilities` [phases]."""
    own = float(probabilities[place])
    return {"phase_probability": own, "phase_margin": own - float(np.delete(probabilities, place).max())}


def _training(features: np.ndarray, patients: Sequence[str]) -> _Training:
    ready, groups = unit_length(features), np.array(patients)
    between = _distances(ready, ready)
    between[groups[:, None] == groups[None]] = np.inf
    nearest = np.sort(between, axis=1)
    # With few crops of other patients the farthest of them stands in for the k-th nearest.
    others = np.isfinite(nearest).sum(1)
    radii = nearest[np.arange(len(ready)), np.clip(np.minimum(NEIGHBOUR, others) - 1, 0, None)]
    there = np.isfinite(radii)
    inner = there & (radii <= np.median(radii[there])) if there.any() else there
    return _Training(ready, groups, radii, inner)


def _realism(distances: np.ndarray, training: _Training) -> float | None:
    counted = training.inner & np.isfinite(distances)
    if not counted.any():
        return None
    return float((training.radii[counted] / np.maximum(distances[counted], 1e-9)).max())


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _distances(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Euclidean distances [N, M] of unit or zero vectors [N, D] and [M, D]."""
    squares = (first**2).sum(1)[:, None] + (second**2).sum(1)[None] - 2 * first @ second.T
    return np.asarray(np.sqrt(np.maximum(squares, 0)))

"""The training crops of a real dataset as scorers need them: panels, features, all of them to look for copies in."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property

import numpy as np

from builder.errors import BuilderError
from builder.quality.copies import CopyIndex
from builder.quality.feature_scores import unit_length
from builder.quality.features.cache import dataset_features
from builder.quality.features.extractor import Extractor
from builder.quality.panel import Rows, panel_sha256, patient_of, rows_by_phase, spread
from builder.quality.reference import Reference
from builder.shards.dataset import Dataset, resize


class TrainingCrops:
    """Pixels, patients and features of the training split of `real`; each is read when it is first asked for.

    Features are of crops brought to `image_size`, or of their own size (None).
    """

    def __init__(self, real: Dataset, codes: Sequence[str], extractor: Extractor, image_size: int | None) -> None:
        """BuilderError when a phase has no training crop."""
        self.real, self.codes, self.extractor, self.image_size = real, tuple(codes), extractor, image_size
        self.rows = rows_by_phase(real, codes, ("train",))
        self._every = [row for row in real.table().to_pylist() if row["split"] == "train"]

    @cached_property
    def sha256(self) -> str:
        """SHA-256 over key, phase and pixel hash of every training crop."""
        return rows_sha256(self._every)

    @cached_property
    def features(self) -> dict[str, np.ndarray]:
        """Phase -> features float32 [M, D] of its training crops, in the order of `rows`."""
        ordered = [row for code in self.codes for row in self.rows[code]]
        features = dataset_features(self.real, self.extractor, image_size=self.image_size, rows=ordered)
        ends = np.cumsum([len(self.rows[code]) for code in self.codes])
        return dict(zip(self.codes, np.split(features, ends[:-1]), strict=True))

    def for_probe(self) -> tuple[list[str], Rows, np.ndarray]:
        """Phases that a probe can tell apart, training crops of theirs, and the features [N, D] of these, unit length.

        All of the dataset's phases with crops of at least two patients, also those that are not to be scored: a probe
        that does not know a phase would give its images to another.
        """
        by_phase = {code: [row for row in self._every if row["phase"] == code] for code in self.real.classes.codes}
        codes = [code for code, rows in by_phase.items() if len({patient_of(row) for row in rows}) > 1]
        rows = [row for code in codes for row in by_phase[code]]
        features = dataset_features(self.real, self.extractor, image_size=self.image_size, rows=rows)
        return codes, rows, unit_length(features)

    @cached_property
    def patients(self) -> dict[str, list[str]]:
        """Phase -> the patient of each of its training crops."""
        return {code: [patient_of(row) for row in rows] for code, rows in self.rows.items()}

    @cached_property
    def copy_index(self) -> CopyIndex:
        """All training crops of the dataset, whatever their phase, on the extractor's device."""
        images = [self.real.pixels(row) for row in self._every]
        keys, patients = [row["key"] for row in self._every], [patient_of(row) for row in self._every]
        return CopyIndex(images, keys, patients, self.extractor.device)

    def crop(self, row: dict[str, object]) -> np.ndarray:
        """The pixels of a crop of the dataset, of any split, at `image_size`."""
        pixels = self.real.pixels(row)
        return pixels if self.image_size is None else resize(pixels, self.image_size)


def panel_rows(rows: Rows, reference: Reference, code: str, *, reserves: bool) -> Rows:
    """The panel of a phase; with `reserves` also the crops that fill it when any one patient's are left out."""
    ordered = spread(rows, len(rows), f"panel/{reference.panel_seed}/{code}")
    size = reference.panel_size
    if not reserves:
        return ordered[:size]
    most = 0
    for patient in {patient_of(row) for row in ordered[:size]}:
        others = [place for place, row in enumerate(ordered) if patient_of(row) != patient]
        most = max(most, others[min(size, len(others)) - 1] + 1 if others else 0)
    return ordered[: max(most, size)]


def require_same_crops(crops: TrainingCrops, reference: Reference) -> None:
    """Refuse a dataset whose training crops are no longer those that the reference was made from."""
    panels = {code: panel_rows(crops.rows[code], reference, code, reserves=False) for code in reference.panel}
    if crops.sha256 != reference.training_sha256 or panel_sha256(panels) != reference.panel_sha256:
        raise BuilderError(
            f"dataset '{crops.real.name}' no longer holds the training crops that these scores stand on",
            f"bring back the dataset '{reference.against}' as it was, or run `builder score` to score all anew",
        )


def rows_sha256(rows: Rows) -> str:
    lines = sorted(f"{row['phase']} {row['key']} {row['sha256']}\n" for row in rows)
    return hashlib.sha256("".join(lines).encode()).hexdigest()

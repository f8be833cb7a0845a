"""What a dataset's scores stand on, kept as reference.json: panel, gates, the scale of real crops, yardsticks.

A yardstick is what known images would score: held-out real crops, crops of another phase, the same crops blurred or
noisy beyond use, flat images. With it, a filter says without torch what a threshold means.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import pyarrow as pa

from builder.config import fingerprint
from builder.documents import read_document, validate, write_document
from builder.errors import BuilderError
from builder.quality.gates import Gates
from builder.shards.dataset import Dataset
from builder.shards.schema import NUMERIC_SCORES, STAMP

SCORE_VERSION = 2  # of the code: raise it when a score's definition changes

KINDS = {
    "real": "real crops, held-out",
    "wrong phase": "real crops, another phase",
    "blurred": "real crops, blurred",
    "noisy": "real crops, noisy",
    "flat": "flat images (mean colour)",
}


@dataclass(frozen=True)
class Reference:
    """What scores are measured against; everything here is plain JSON and holds no pixel of a patient.

    `panel`: phase -> keys of training crops of dataset `against`. `probe`: see quality.probe, or None.
    `copy`: the calibrated alarm threshold of copy_score, see quality.copies. `gates`: phase -> score -> [low, high].
    `real`: phase -> score -> its sorted values on training crops, each scored as if its own patient were not there.
    `yardstick`: phase -> kind of image (see KINDS) -> one row of scores an image.
    `missing`: score -> why it was not computed. `image_size`: px that real crops are brought to, as the images that are
    scored have it; None: those are of several sizes. `code_versions`: score -> the version of its definition, for those
    that were defined anew since their first one.
    """

    against: str
    ssim_size: int
    ssim_stride: int
    panel_seed: int
    panel_size: int
    features: str  # id of the feature extractor
    lpips: str | None  # hash of its weights
    panel: dict[str, list[str]]
    panel_sha256: str
    training_sha256: str
    image_size: int | None = None
    score_version: int = SCORE_VERSION
    probe: dict[str, Any] | None = None
    copy: dict[str, Any] = field(default_factory=dict)
    gates: dict[str, Gates] = field(default_factory=dict)
    real: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    yardstick: dict[str, dict[str, list[dict[str, Any]]]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    code_versions: dict[str, int] = field(default_factory=dict)

    @cached_property
    def version(self) -> str:
        """Scores of equal version can be compared: SHA-256 over the protocol and the crops it is measured against."""
        names = (
            "score_version", "ssim_size", "ssim_stride", "features", "lpips", "panel_sha256", "training_sha256",
            "image_size",
        )  # fmt: skip
        anew = {"code_versions": self.code_versions} if self.code_versions else {}
        return fingerprint({**{name: getattr(self, name) for name in names}, **anew})

    def protocol(self) -> dict[str, Any]:
        """What dataset.json records under `scores`."""
        return {
            "version": self.version,
            "against": self.against,
            "panel_sha256": self.panel_sha256,
            "panel": {code: len(keys) for code, keys in self.panel.items()},
            "size": self.ssim_size,
            "stride": self.ssim_stride,
            "features": self.features,
            "lpips": self.lpips,
            "copy": self.copy,
            "probe": {k: v for k, v in (self.probe or {}).items() if k not in ("weight", "bias")},
            "missing": self.missing,
        }

    def to_json(self) -> dict[str, Any]:
        data = {**asdict(self), "version": self.version}
        if not self.code_versions:  # younger than some references
            del data["code_versions"]
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Reference:
        return cls(**{name: value for name, value in data.items() if name != "version"})


def reference_path(dataset: Dataset) -> str:
    return f"manifests/{dataset.name}/reference.json"


def has_reference(dataset: Dataset) -> bool:
    return dataset.storage.exists(reference_path(_scored(dataset)))


def load_reference(dataset: Dataset) -> Reference:
    """The reference that the scores of `dataset` stand on; of a filtered dataset, its parent's where it has none.

    BuilderError when there is none, when it is damaged or of another version, or when scoring by it was interrupted.
    """
    owner = _scored(dataset)
    path = reference_path(owner)
    remedy = f"run `builder score {owner.name} --against REAL`, with --partial where it is not complete"
    try:
        data = read_document(path, storage=owner.storage, remedy="score the dataset again")
    except FileNotFoundError:
        raise BuilderError(f"dataset '{dataset.name}' was never scored against real crops", remedy) from None
    if data.get("score_version") != SCORE_VERSION:
        raise BuilderError(f"the scores of '{dataset.name}' were made by another version of this program", remedy)
    from builder.quality.reference_document import ReferenceDocument  # pydantic takes 0.1 s

    validate(data, ReferenceDocument, path, remedy="score the dataset again")
    reference = Reference.from_json(data)
    for number in owner.shard_numbers()[:1]:  # scoring begins with this one; what it did not reach, its readers see
        if owner.shard_metadata(number).get(STAMP, reference.version) != reference.version:
            raise BuilderError(
                f"the scores of '{dataset.name}' are not of its reference: scoring was interrupted", remedy
            )
    return reference


def save_reference(dataset: Dataset, reference: Reference) -> None:
    """Write reference.json with its checksum."""
    write_document(reference_path(dataset), reference.to_json(), dataset.storage)


def copy_reference(source: Dataset, target: Dataset) -> None:
    """Give a filtered dataset the reference of its source: it can be filtered again when its source is gone.

    Nothing where the source was never scored, or the target has a reference of its own already.
    """
    if has_reference(source) and not target.storage.exists(reference_path(target)):
        load_reference(source)  # refuses what is damaged
        target.storage.write(reference_path(target), source.storage.read(reference_path(_scored(source))))


def yardstick_table(reference: Reference) -> dict[str, pa.Table]:
    """The yardsticks as tables that a filter can judge: kind in words -> columns `phase` and the numeric scores."""
    tables = {}
    for kind, words in KINDS.items():
        rows = [
            {"phase": code, **{name: _as_float(row.get(name)) for name in NUMERIC_SCORES}}
            for code, kinds in reference.yardstick.items()
            for row in kinds.get(kind, [])
        ]
        fields = [pa.field("phase", pa.string()), *(pa.field(name, pa.float32()) for name in NUMERIC_SCORES)]
        tables[words] = pa.Table.from_pylist(rows, schema=pa.schema(fields))
    return tables


def _as_float(value: float | None) -> float | None:
    """JSON's whole numbers may be longer than Arrow reads."""
    return None if value is None else float(value)


def _scored(dataset: Dataset) -> Dataset:
    """The dataset whose reference.json counts: this one, or the parent that it was filtered from."""
    if dataset.storage.exists(reference_path(dataset)) or not dataset.exists():
        return dataset
    parent = dataset.info.get("parent")
    return _scored(Dataset(parent, dataset.storage)) if parent else dataset

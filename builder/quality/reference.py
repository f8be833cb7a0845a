"""What a dataset's scores stand on: the panel, the gates and yardsticks. Built once, kept as reference.json.

A yardstick is what known images would score: held-out real crops, the same crops blurred beyond use, flat images.
With it, a filter says without torch what a threshold means.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image, ImageFilter

from builder.config import ScoreConfig, fingerprint
from builder.errors import BuilderError
from builder.quality.gates import Gates, make_gates
from builder.quality.panel import Rows, choose_panel, panel_sha256, rows_by_phase, spread
from builder.quality.statistics import image_statistics
from builder.shards.dataset import Dataset, resize
from builder.shards.schema import SCORE_NAMES

STAMP = "scores"  # in a manifest's schema metadata: the version of its scores
SCORE_VERSION = 1  # of the code: raise it when a score's definition changes
BLUR = 0.05  # Gaussian sigma as a share of the image's width; such an image shows no wound any more
GATE_CROPS = 300  # training crops of a phase that its gates are made from
REAL_CROPS, SPOILT_CROPS = 60, 24  # held-out crops of a phase behind a yardstick: as they are; blurred and flat

KINDS = {
    "real": "real crops, held-out",
    "blurred": "real crops, blurred",
    "flat": "flat images (mean colour)",
}


@dataclass(frozen=True)
class Reference:
    """`panel`: phase -> keys of training crops of dataset `against`. `gates`: phase -> statistic -> [low, high].
    `yardstick`: phase -> kind of image (see KINDS) -> one row of scores an image. `image_size`: px that real crops were
    brought to before the gates and yardsticks were taken, or None (native).
    """

    against: str
    ssim_size: int
    ssim_stride: int
    panel_seed: int
    panel_size: int
    panel: dict[str, list[str]]
    panel_sha256: str
    gates: dict[str, Gates]
    yardstick: dict[str, dict[str, list[dict[str, float]]]]
    image_size: int | None = None
    score_version: int = SCORE_VERSION

    @property
    def version(self) -> str:
        """Scores of equal version can be compared: SHA-256 over the protocol and the panel."""
        return fingerprint(
            {
                "score_version": self.score_version,
                "ssim_size": self.ssim_size,
                "ssim_stride": self.ssim_stride,
                "panel_sha256": self.panel_sha256,
            }
        )

    def protocol(self) -> dict[str, Any]:
        """What dataset.json records under `scores`."""
        return {
            "version": self.version,
            "against": self.against,
            "panel_sha256": self.panel_sha256,
            "panel": {code: len(keys) for code, keys in self.panel.items()},
            "size": self.ssim_size,
            "stride": self.ssim_stride,
        }

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "version": self.version}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Reference:
        return cls(**{name: value for name, value in data.items() if name != "version"})


def build_reference(
    real: Dataset, config: ScoreConfig, codes: Sequence[str], *, image_size: int | None = None
) -> Reference:
    """Panel and gates from the training crops of `real`, yardsticks from its validation and test crops.

    `image_size`: the size in px of the images to be judged; larger real crops are first brought to it, because
    sharpness, clipping and SSIM depend on it. A phase without held-out crops has empty yardsticks.
    Raises BuilderError when a phase has no training crop.
    """
    from builder.quality.scorer import Scorer

    panel = choose_panel(real, codes, config.panel, config.panel_seed)
    salt = f"reference/{config.panel_seed}"
    train = rows_by_phase(real, codes, ("train",))
    reference = Reference(
        against=real.name,
        ssim_size=config.ssim_size,
        ssim_stride=config.ssim_stride,
        panel_seed=config.panel_seed,
        panel_size=config.panel,
        panel={code: [row["key"] for row in rows] for code, rows in panel.items()},
        panel_sha256=panel_sha256(panel),
        gates={code: _gates(real, spread(train[code], GATE_CROPS, salt), image_size) for code in codes},
        yardstick={},
        image_size=image_size,
    )
    scorer = Scorer(reference, real, config)
    held_out = rows_by_phase(real, codes, ("val", "test"))
    for code in codes:
        crops = _crops(real, spread(held_out[code], REAL_CROPS, salt), image_size)
        known = {
            "real": crops,
            "blurred": [blurred(crop) for crop in crops[:SPOILT_CROPS]],
            "flat": [flat(crop) for crop in crops[:SPOILT_CROPS]],
        }
        reference.yardstick[code] = {kind: scorer.score(images, [code] * len(images)) for kind, images in known.items()}
    return reference


def reference_path(dataset: Dataset) -> str:
    return f"manifests/{dataset.name}/reference.json"


def has_reference(dataset: Dataset) -> bool:
    return dataset.storage.exists(reference_path(_scored(dataset)))


def load_reference(dataset: Dataset) -> Reference:
    """The reference that the scores of `dataset` stand on; of a filtered dataset, its parent's where it has none."""
    owner = _scored(dataset)
    path = reference_path(owner)
    try:
        return Reference.from_json(json.loads(owner.storage.read(path)))
    except FileNotFoundError:
        remedy = f"run `builder score {dataset.name} --against REAL`"
        raise BuilderError(f"dataset '{dataset.name}' was never scored against real crops", remedy) from None
    except (json.JSONDecodeError, TypeError) as error:
        raise BuilderError(f"{path} is damaged: {error}", "score the dataset again") from None


def save_reference(dataset: Dataset, reference: Reference) -> None:
    data = json.dumps(reference.to_json(), indent=1, sort_keys=True, allow_nan=False)
    dataset.storage.write(reference_path(dataset), data.encode() + b"\n")


def yardstick_table(reference: Reference) -> dict[str, pa.Table]:
    """The yardsticks as tables that a filter can judge: kind in words -> columns `phase` and the scores."""
    tables = {}
    for kind, words in KINDS.items():
        rows = [{"phase": code, **row} for code, kinds in reference.yardstick.items() for row in kinds.get(kind, [])]
        fields = [pa.field("phase", pa.string()), *(pa.field(name, pa.float32()) for name in SCORE_NAMES)]
        tables[words] = pa.Table.from_pylist(rows, schema=pa.schema(fields))
    return tables


def blurred(pixels: np.ndarray, share: float = BLUR) -> np.ndarray:
    """uint8 RGB [H, W, 3] blurred with a Gaussian whose sigma is this share of its width."""
    return np.asarray(Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(share * pixels.shape[1])))


def flat(pixels: np.ndarray) -> np.ndarray:
    """A flat image of the size and mean colour of uint8 RGB [H, W, 3]."""
    mean = pixels.reshape(-1, 3).mean(0).round().astype(np.uint8)
    return np.broadcast_to(mean, pixels.shape).copy()


def _gates(real: Dataset, rows: Rows, image_size: int | None) -> Gates:
    crops = _crops(real, rows, image_size)
    return make_gates([image_statistics(crop) for crop in crops], [image_statistics(blurred(crop)) for crop in crops])


def _crops(real: Dataset, rows: Rows, image_size: int | None) -> list[np.ndarray]:
    return [
        pixels if image_size is None or min(pixels.shape[:2]) <= image_size else resize(pixels, image_size)
        for pixels in map(real.pixels, rows)
    ]


def _scored(dataset: Dataset) -> Dataset:
    """The dataset whose reference.json counts: this one, or the parent that it was filtered from."""
    if dataset.storage.exists(reference_path(dataset)) or not dataset.exists():
        return dataset
    parent = dataset.info.get("parent")
    return _scored(Dataset(parent, dataset.storage)) if parent else dataset

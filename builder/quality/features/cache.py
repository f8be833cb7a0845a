"""Features of a dataset, computed once: one .npy a shard, under manifests/NAME/features/{extractor id}{-size}/.

A file's name ends in a hash over the pixel hashes of its shard's rows: when a shard is written anew, its old features
are not found. A file carries a seal (shards.sealed); one that is damaged is not used. Numpy only; torch is at work in
the extractor.
"""

from __future__ import annotations

import hashlib
import io
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from builder.errors import BuilderError
from builder.shards.dataset import FEATURES, Dataset, resize
from builder.shards.sealed import require_trailer, with_trailer
from builder.shards.writer import shard_name

if TYPE_CHECKING:
    from builder.quality.features.extractor import Extractor

CHUNK = 64  # images decoded at once


def dataset_features(
    dataset: Dataset,
    extractor: Extractor,
    *,
    image_size: int | None = None,
    rows: Sequence[dict[str, Any]] | None = None,
    progress: bool = True,
) -> np.ndarray:
    """Features float32 [N, dimension] of all images, in the order of `dataset.table()`, or of these manifest `rows`.

    `image_size`: px to which images are brought first (enlarged, too), by the project's resize, so that real and
    synthetic crops take one way; None: as they are. What is not in the cache is computed and kept, a whole shard at a
    time, of the shards that `rows` need. Images of a filtered dataset are looked up among its parents' features.
    BuilderError when an image cannot be read, or a row is not of this dataset.
    """
    wanted = None if rows is None else {row["sha256"] for row in rows}
    kept = _Cache(dataset, extractor, image_size)
    found: dict[str, np.ndarray] = {}
    in_order = []
    for number, table in dataset.tables(["sha256"]) if wanted is None or wanted else []:
        hashes = table["sha256"].to_pylist()
        if wanted is not None and wanted.isdisjoint(hashes):
            continue
        features = kept.shard(number, hashes, progress)
        if wanted is None:
            in_order.append(features)
        else:
            found |= {sha: own.copy() for sha, own in zip(hashes, features, strict=True) if sha in wanted}
    if rows is None:
        return np.concatenate([np.empty((0, extractor.dimension), np.float32), *in_order])
    missing = [row["key"] for row in rows if row["sha256"] not in found]
    if missing:
        raise BuilderError(
            f"dataset '{dataset.name}' holds no image {missing[0]} ({len(missing)} such rows)",
            "take the rows from its own manifests",
        )
    return np.stack([found[row["sha256"]] for row in rows]) if rows else np.empty((0, extractor.dimension), np.float32)


def save_features(
    dataset: Dataset,
    number: int,
    extractor: Extractor,
    image_size: int | None,
    pixel_hashes: Sequence[str],
    features: np.ndarray,
) -> None:
    """Keep the features [N, dimension] of shard `number`, whose rows have these pixel hashes (SHA-256, in order).

    Written whole or not at all; where that can't be done, a warning says so. Features that an earlier writing of this
    shard left are removed.
    """
    features = np.ascontiguousarray(features, np.float32)
    if features.shape != (len(pixel_hashes), extractor.dimension):
        raise ValueError(
            f"features are {list(features.shape)}, not [{len(pixel_hashes)}, {extractor.dimension}]: one row an image"
        )
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, features, allow_pickle=False)
    folder, name = _folder(dataset, extractor, image_size), _file(number, pixel_hashes)
    try:
        path = f"{folder}/{name}"
        dataset.storage.write(path, with_trailer(buffer.getvalue(), path))
        for other in dataset.storage.list(folder, ".npy"):
            if other.startswith(f"{shard_name(number)}-") and other != name:
                dataset.storage.remove(f"{folder}/{other}")
    except OSError as error:  # another's dataset, a full disk: the figures don't depend on the cache
        warnings.warn(f"features of '{dataset.name}' are not kept and will be computed again: {error}", stacklevel=2)


class _Cache:
    """The features of one dataset by one extractor, and its parents' where it was filtered from them."""

    def __init__(self, dataset: Dataset, extractor: Extractor, image_size: int | None) -> None:
        self._dataset, self._extractor, self._image_size = dataset, extractor, image_size
        self._of_parents: dict[str, np.ndarray] | None = None  # by pixel hash; read when first needed

    def shard(self, number: int, hashes: list[str], progress: bool) -> np.ndarray:
        """Features of a shard's rows: read, taken from the parents, or computed and kept."""
        features = self.read(number, hashes)
        if features is not None:
            return features
        known = self._parents()
        missing = [place for place, sha256 in enumerate(hashes) if sha256 not in known]
        features = np.empty((len(hashes), self._extractor.dimension), np.float32)
        for place, sha256 in enumerate(hashes):
            if sha256 in known:
                features[place] = known[sha256]
        if missing:
            self._compute(number, missing, features, progress)
            save_features(self._dataset, number, self._extractor, self._image_size, hashes, features)
        return features

    def read(self, number: int, hashes: list[str]) -> np.ndarray | None:
        """What is kept of a shard; None when nothing is, or a file that is damaged."""
        path = f"{_folder(self._dataset, self._extractor, self._image_size)}/{_file(number, hashes)}"
        try:
            payload, _ = require_trailer(self._dataset.storage.read(path), path)
            features = np.lib.format.read_array(io.BytesIO(payload), allow_pickle=False)
        except (FileNotFoundError, ValueError):  # DamagedError is one
            return None
        fits = features.shape == (len(hashes), self._extractor.dimension) and features.dtype == np.float32
        return features if fits and np.isfinite(features).all() else None

    def _parents(self) -> dict[str, np.ndarray]:
        if self._of_parents is None:
            self._of_parents = {}
            parent = self._dataset.info.get("parent")
            while parent:
                dataset = Dataset(parent, self._dataset.storage)
                self._of_parents.update(_Cache(dataset, self._extractor, self._image_size)._all())
                parent = dataset.info.get("parent") if dataset.exists() else None
        return self._of_parents

    def _all(self) -> Iterator[tuple[str, np.ndarray]]:
        for number, table in self._dataset.tables(["sha256"]):
            hashes: list[str] = table["sha256"].to_pylist()
            features = self.read(number, hashes)
            if features is not None:
                yield from zip(hashes, features, strict=True)

    def _compute(self, number: int, places: Sequence[int], features: np.ndarray, progress: bool) -> None:
        """Fill in the features of these rows of a shard."""
        rows = self._dataset.shard_table(number, ["key", "shard", "offset", "size"]).to_pylist()
        title = f"{self._extractor.name} of {self._dataset.name}, shard {number}"
        with tqdm(total=len(places), desc=title, unit="image", leave=False, disable=None if progress else True) as bar:
            for start in range(0, len(places), CHUNK):
                part = places[start : start + CHUNK]
                images = [self._dataset.pixels(rows[place]) for place in part]
                if self._image_size is not None:
                    images = [resize(image, self._image_size) for image in images]
                features[part] = self._extractor.of(images)
                bar.update(len(part))


def _folder(dataset: Dataset, extractor: Extractor, image_size: int | None) -> str:
    size = "" if image_size is None else f"-{image_size}px"
    return f"manifests/{dataset.name}/{FEATURES}/{extractor.id}{size}"


def _file(number: int, pixel_hashes: Sequence[str]) -> str:
    digest = hashlib.sha256("".join(pixel_hashes).encode()).hexdigest()
    return f"{shard_name(number)}-{digest[:16]}.npy"

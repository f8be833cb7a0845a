"""What a loader keeps of a dataset's manifests: a few columns, packed while they are read, some shards at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from builder.errors import BuilderError
from builder.shards.dataset import Dataset

COLUMNS = ("key", "label", "shard", "offset", "size", "split", "width", "height", "sha256")
HASH = 16  # hex digits of the pixels' SHA-256 that are kept of each sample: a tar of another run has other pixels
GROUP = 50_000  # rows that are held unpacked at once, about


@dataclass
class Columns:
    """Of N samples in manifest order."""

    keys: pa.Array
    shards: list[str]  # tars, in order of their first sample
    shard: np.ndarray  # int32 [N], number of the tar
    offset: np.ndarray  # int64 [N], bytes
    size: np.ndarray  # int32 [N], bytes
    labels: np.ndarray  # int16 [N]
    hashes: np.ndarray  # uint64 [N], the first HASH digits
    dimensions: tuple[int, int, int, int]  # least width and height, greatest width and height; px

    @property
    def nbytes(self) -> int:
        arrays = (self.shard, self.offset, self.size, self.labels, self.hashes)
        return int(self.keys.nbytes + sum(array.nbytes for array in arrays))


def read_columns(dataset: Dataset, split: str | None) -> Columns:
    """Of all samples, or of those of one split. BuilderError when there are none."""
    tars: dict[str, int] = {}
    parts = [_packed(table, split, tars) for table in _groups(dataset)]
    parts = [part for part in parts if len(part[0])]
    if not parts:
        raise _nothing(dataset, split)
    keys, *numbers, dimensions = zip(*parts, strict=True)
    shard, offset, size, labels, hashes = (np.concatenate(part) for part in numbers)
    least, greatest = np.min(dimensions, axis=0), np.max(dimensions, axis=0)
    bounds = (int(least[0]), int(least[1]), int(greatest[2]), int(greatest[3]))
    columns = Columns(pa.concat_arrays(keys), list(tars), shard, offset, size, labels, hashes, bounds)
    del parts, keys, numbers
    pa.default_memory_pool().release_unused()
    return columns


def _nothing(dataset: Dataset, split: str | None) -> BuilderError:
    splits = dataset.table(("split",))["split"]
    if split is None or not len(splits):
        return BuilderError(f"dataset '{dataset.name}' has no sample", "loosen the filter that made it")
    known = sorted(value for value in splits.unique().to_pylist() if value)
    found = (
        f"its splits are {', '.join(known)}"
        if known
        else "its samples have no split: pack it again, or `builder index ... --split train`"
    )
    return BuilderError(f"dataset '{dataset.name}' has no sample of the split '{split}'", found)


def _groups(dataset: Dataset) -> Iterator[pa.Table]:
    """The rows in order, about GROUP at a time."""
    waiting: list[pa.Table] = []
    rows = 0
    for _, table in dataset.tables(COLUMNS):
        waiting.append(table)
        rows += len(table)
        if rows >= GROUP:
            yield pa.concat_tables(waiting, promote_options="default")
            waiting, rows = [], 0
    if waiting:
        yield pa.concat_tables(waiting, promote_options="default")


def _packed(table: pa.Table, split: str | None, tars: dict[str, int]) -> tuple[Any, ...]:
    """Keys, tar, offset, size, label, hash and bounds of the rows of the split.

    Tars that were not met before get the next number.
    """
    keys, hashes = table["key"].combine_chunks(), _hashes(table["sha256"].combine_chunks())
    chosen: Any = slice(None)
    if split is not None:
        of_split = pc.fill_null(pc.equal(table["split"], split), False)
        keys, chosen = keys.filter(of_split.combine_chunks()), of_split.to_numpy()
    if not len(keys):
        return (keys,)
    encoded = table["shard"].combine_chunks().dictionary_encode()
    indices, names = encoded.indices.to_numpy()[chosen], encoded.dictionary.to_pylist()
    number = np.full(len(names), -1, np.int32)
    for index in np.unique(indices).tolist():
        number[index] = tars.setdefault(names[index], len(tars))
    width, height = (table[side].to_numpy()[chosen] for side in ("width", "height"))
    return (
        keys,
        number[indices],
        table["offset"].to_numpy()[chosen].astype(np.int64),
        table["size"].to_numpy()[chosen].astype(np.int32),
        table["label"].to_numpy()[chosen].astype(np.int16),
        hashes[chosen],
        (width.min(), height.min(), width.max(), height.max()),
    )


def _hashes(sha256: pa.Array) -> np.ndarray:
    """The first HASH hex digits of each, as numbers: uint64 [N]."""
    digits = pc.utf8_slice_codeunits(sha256, 0, HASH).buffers()[2].to_pybytes()[: HASH * len(sha256)]
    return np.frombuffer(bytes.fromhex(digits.decode()), ">u8").astype(np.uint64)

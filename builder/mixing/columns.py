"""What a loader keeps of a dataset's manifests: a few columns, packed while they are read, some shards at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

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
    parts = [_packed(table, tars) for table in _groups(dataset, split) if table.num_rows]
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
    found = f"its splits are {', '.join(known)}" if known else "its samples have no split: make it anew"
    return BuilderError(f"dataset '{dataset.name}' has no sample of the split '{split}'", found)


def _groups(dataset: Dataset, split: str | None) -> Iterator[pa.Table]:
    waiting: list[pa.Table] = []
    rows = 0
    for _, table in dataset.tables(COLUMNS):
        waiting.append(table)
        rows += len(table)
        if rows >= GROUP:
            yield _joined(waiting, split)
            waiting, rows = [], 0
    if waiting:
        yield _joined(waiting, split)


def _joined(tables: list[pa.Table], split: str | None) -> pa.Table:
    whole = pa.concat_tables(tables, promote_options="default").combine_chunks()
    return whole if split is None else whole.filter(pc.fill_null(pc.equal(whole["split"], split), False))


def _packed(table: pa.Table, tars: dict[str, int]) -> tuple:
    """Keys, tar, offset, size, label, hash and bounds of the rows; tars that were not met yet get the next number."""
    encoded = table["shard"].combine_chunks().dictionary_encode()
    number = np.array([tars.setdefault(tar, len(tars)) for tar in encoded.dictionary.to_pylist()], np.int32)
    width, height = table["width"].to_numpy(), table["height"].to_numpy()
    return (
        table["key"].combine_chunks(),
        number[encoded.indices.to_numpy()],
        table["offset"].to_numpy().astype(np.int64),
        table["size"].to_numpy().astype(np.int32),
        table["label"].to_numpy().astype(np.int16),
        _hashes(table["sha256"].combine_chunks()),
        (width.min(), height.min(), width.max(), height.max()),
    )


def _hashes(sha256: pa.Array) -> np.ndarray:
    """The first HASH hex digits of each, as numbers: uint64 [N]."""
    digits = pc.utf8_slice_codeunits(sha256, 0, HASH).buffers()[2].to_pybytes()[: HASH * len(sha256)]
    return np.frombuffer(bytes.fromhex(digits.decode()), ">u8").astype(np.uint64)

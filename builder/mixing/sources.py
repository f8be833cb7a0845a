"""Indexed reading: random access to the images of a dataset, in the tars where its manifest says they lie.

A view (a filtered manifest without tars of its own) reads like any dataset: its rows point into the parent's tars.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from builder.errors import BuilderError
from builder.shards.dataset import OTHER_PIXELS, Dataset, decode, resize
from builder.shards.writer import pixel_sha256

COLUMNS = ("key", "label", "shard", "offset", "size", "split", "width", "height", "sha256")
HASH = 16  # hex digits of the pixels' SHA-256 that are kept of each sample: a tar of another run has other pixels
OPEN_FILES = 128  # tars kept open by each process


class Source:
    """The samples of a dataset as columns (about 60 bytes a sample); rows are numbered in manifest order."""

    def __init__(self, dataset: Dataset, split: str | None = None) -> None:
        """All samples, or those of one split. BuilderError when there are none."""
        self.name = dataset.name
        self.storage = dataset.storage
        table = dataset.table(COLUMNS)
        if split is not None:
            splits = table["split"]
            table = table.filter(pc.fill_null(pc.equal(splits, split), False))
            if not table.num_rows:
                known = sorted(value for value in splits.unique().to_pylist() if value)
                found = f"its splits are {', '.join(known)}" if known else "its samples have no split: make it anew"
                raise BuilderError(f"dataset '{self.name}' has no sample of the split '{split}'", found)
        if not table.num_rows:
            raise BuilderError(f"dataset '{self.name}' has no sample", "loosen the filter that made it")
        shards = table["shard"].combine_chunks().dictionary_encode()
        self.shards: list[str] = shards.dictionary.to_pylist()
        self._places = [self.storage.holder(shard) for shard in self.shards]  # indexed tars lie elsewhere than the root
        self.keys: pa.Array = table["key"].combine_chunks()
        self.shard = shards.indices.to_numpy().astype(np.int32)
        self.offset = table["offset"].to_numpy().astype(np.int64)
        self.size = table["size"].to_numpy().astype(np.int32)
        self.labels = table["label"].to_numpy().astype(np.int16)
        self.hashes = _hashes(table["sha256"])
        width, height = table["width"], table["height"]
        self.dimensions = (pc.min(width).as_py(), pc.min(height).as_py(), pc.max(width).as_py(), pc.max(height).as_py())
        self._files: OrderedDict[int, int] = OrderedDict()

    def __len__(self) -> int:
        return len(self.labels)

    def __getstate__(self) -> dict[str, Any]:  # a worker process opens its own files
        return {**self.__dict__, "_files": OrderedDict()}

    def __del__(self) -> None:
        for file in getattr(self, "_files", {}).values():
            os.close(file)

    @property
    def _columns(self) -> tuple[np.ndarray, ...]:
        return self.shard, self.offset, self.size, self.labels, self.hashes

    @property
    def nbytes(self) -> int:
        """Memory of the columns."""
        return int(self.keys.nbytes + sum(c.nbytes for c in self._columns))

    def members(self, classes: int) -> list[np.ndarray]:
        """The rows (int32) of each class. BuilderError for a label outside the class table."""
        if self.labels.min() < 0 or self.labels.max() >= classes:
            raise BuilderError(
                f"dataset '{self.name}' has labels outside its {classes} classes", f"run `builder verify {self.name}`"
            )
        return [np.flatnonzero(self.labels == label).astype(np.int32) for label in range(classes)]

    def expect(self, rows: np.ndarray) -> None:
        """Have the system fetch the images of these rows into its cache, all at once, so that `pixels` needn't wait."""
        if not hasattr(os, "posix_fadvise"):  # macOS
            return
        for row in rows.tolist():
            shard = int(self.shard[row])
            if self._places[shard][0].is_local:
                try:
                    file = self._file(shard)
                except OSError:
                    return  # `pixels` tells it, with the key
                os.posix_fadvise(file, int(self.offset[row]), int(self.size[row]), os.POSIX_FADV_WILLNEED)

    def pixels(self, row: int, size: int | None) -> np.ndarray:
        """The image of a row, uint8 RGB [H, W, 3]; resized to [size, size, 3] unless `size` is None.

        BuilderError names shard and key when the tar is missing, cut short or of another run, or the image cannot be
        decoded.
        """
        try:
            payload = self._payload(row)
        except OSError as error:
            raise self.unreadable(row, error) from None
        return self.decoded(row, payload, size)

    def decoded(self, row: int, payload: bytes, size: int | None) -> np.ndarray:
        """As `pixels`, of the encoded image as it was read from the tar."""
        try:
            pixels = decode(payload)
            if int(pixel_sha256(pixels)[:HASH], 16) != self.hashes[row]:
                raise ValueError(OTHER_PIXELS)
        except (OSError, SyntaxError, ValueError) as error:
            raise self.unreadable(row, error) from None
        return pixels if size is None else resize(pixels, size)

    def unreadable(self, row: int, why: object) -> BuilderError:
        """The error that names the image of a row."""
        where = f"{self.keys[row].as_py()} in {self.shards[self.shard[row]]}"
        return BuilderError(f"the image {where} cannot be read: {why}", f"run `builder verify {self.name}`")

    def _payload(self, row: int) -> bytes:
        shard, offset, size = int(self.shard[row]), int(self.offset[row]), int(self.size[row])
        holder, path = self._places[shard]
        payload = os.pread(self._file(shard), size, offset) if holder.is_local else holder.read(path, offset, size)
        if len(payload) != size:
            raise OSError(f"the tar ends {size - len(payload)} bytes too early")
        return payload

    def _file(self, shard: int) -> int:
        """The open tar; pread keeps no position, so a file inherited by a forked worker is safe to share."""
        if shard not in self._files:
            if len(self._files) >= OPEN_FILES:
                os.close(self._files.popitem(last=False)[1])
            holder, path = self._places[shard]
            self._files[shard] = os.open(holder.path(path), os.O_RDONLY)
        self._files.move_to_end(shard)
        return self._files[shard]


def _hashes(sha256: pa.ChunkedArray) -> np.ndarray:
    """The first HASH hex digits of each, as numbers: uint64 [N]."""
    digits = "".join(pc.utf8_slice_codeunits(sha256, 0, HASH).to_pylist())
    return np.frombuffer(bytes.fromhex(digits), ">u8").astype(np.uint64)

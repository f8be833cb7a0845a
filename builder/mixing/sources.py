"""Indexed reading: random access to the images of a dataset, in the tars where its manifest says they lie.

A view (a filtered manifest without tars of its own) reads like any dataset: its rows point into the parent's tars.
"""

from __future__ import annotations

import hashlib
import os
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np

from builder.errors import BuilderError
from builder.mixing.columns import HASH, read_columns
from builder.shards.dataset import OTHER_PIXELS, Dataset, decode, resize
from builder.shards.writer import pixel_sha256

OPEN_FILES = 128  # tars kept open by each process


class Source:
    """The samples of a dataset as columns (about 60 bytes a sample); rows are numbered in manifest order."""

    def __init__(self, dataset: Dataset, split: str | None = None) -> None:
        """All samples, or those of one split. BuilderError when there are none."""
        self.name = dataset.name
        self.storage = dataset.storage
        columns = read_columns(dataset, split)
        self.shards, self.keys, self.dimensions = columns.shards, columns.keys, columns.dimensions
        self._places = [self.storage.holder(shard) for shard in self.shards]  # indexed tars lie elsewhere than the root
        self.shard, self.offset, self.size = columns.shard, columns.offset, columns.size
        self.labels, self.hashes = columns.labels, columns.hashes
        self.nbytes = columns.nbytes  # memory of the columns
        self._files: OrderedDict[int, int] = OrderedDict()

    def __len__(self) -> int:
        return len(self.labels)

    def __getstate__(self) -> dict[str, Any]:  # a worker process opens its own files
        return {**self.__dict__, "_files": OrderedDict()}

    def __del__(self, close: Callable[[int], None] = os.close) -> None:  # `os` may be gone when the interpreter ends
        for file in getattr(self, "_files", {}).values():
            close(file)

    @property
    def fingerprint(self) -> str:
        """Of which images these are, in which order: 16 hex digits."""
        return hashlib.sha256(self.hashes.tobytes()).hexdigest()[:16]

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
            self._files[shard] = holder.open_local(path)
        self._files.move_to_end(shard)
        return self._files[shard]

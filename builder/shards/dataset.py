"""A dataset on disk: find it, read its manifests and images. Used only when complete, unless asked otherwise."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from builder.display import printable
from builder.documents import read_document, write_document
from builder.errors import BuilderError, did_you_mean
from builder.images import read_hashed
from builder.phases import ClassTable
from builder.shards.index import Stamps, open_index
from builder.shards.received import ManifestError, OutsideError, checked, read_parquet, recorded, reopened
from builder.shards.sealed import DamagedError, open_parquet, without_seal
from builder.shards.storage import Storage
from builder.shards.writer import manifest_name, manifest_path, pixel_sha256

NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")  # a tar's member has room for 100 characters: name, class code and index
SHARD = re.compile(r"shard-\d{6,}\.parquet")  # the name of a manifest
REJECTS = "rejects"  # folder of the rows that a filter turned away, among the manifests
FEATURES = "features"  # folder of the caches of features: one folder an extractor, one file a shard
LOCK = ".lock"  # in the folder of the manifests, of a local dataset
OTHER_PIXELS = "its pixels are not those of the manifest: the tar is of another run, or damaged"


@dataclass(frozen=True)
class Dataset:
    """The dataset `name` under the output root of `storage`; it may not exist yet."""

    name: str
    storage: Storage

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name):
            raise BuilderError(
                f"dataset name '{self.name}' is not of [A-Za-z0-9_-], at most 64 characters",
                "choose another name (--name)",
            )

    # -- dataset.json ---------------------------------------------------------------------------------------------

    @property
    def info_path(self) -> str:
        return f"manifests/{self.name}/dataset.json"

    def exists(self) -> bool:
        return self.storage.exists(self.info_path)

    @property
    def info(self) -> dict[str, Any]:
        """dataset.json, read anew at each call: another process may have extended the dataset.

        BuilderError when it is not there, or damaged.
        """
        from builder.shards.dataset_document import DatasetDocument  # pydantic takes 0.1 s

        try:
            return read_document(self.info_path, DatasetDocument, self.storage, remedy=self._remake)
        except FileNotFoundError:
            raise BuilderError(
                f"there is no dataset '{self.name}' in {self.storage.root}", "see `builder list`"
            ) from None

    @property
    def _remake(self) -> str:
        return f"restore it, or `builder rm {self.name}` and make the dataset again"

    def write_info(self, info: dict[str, Any]) -> None:
        """Write dataset.json with its checksum."""
        write_document(self.info_path, info, self.storage)

    def clear(self) -> None:
        """Remove all of it but the lock, for who holds that (see shards.lock).

        dataset.json goes first, so that a removal that is killed leaves nothing that looks like a dataset; then the
        manifests, so that none of them ever lacks its tar.
        """
        self.storage.remove(self.info_path)
        folder = f"manifests/{self.name}"
        for name in self.storage.list(folder):
            if name != LOCK:
                self.storage.remove(f"{folder}/{name}")
        self.storage.sweep(folder)
        self.storage.remove(f"shards/{self.name}")

    @cached_property
    def classes(self) -> ClassTable:
        return ClassTable.from_json(self.info["classes"])

    # -- manifests ------------------------------------------------------------------------------------------------

    def shard_numbers(self, stamps: Stamps | None = None) -> list[int]:
        """The committed shards, in order."""
        names = self.storage.list(f"manifests/{self.name}", ".parquet") if stamps is None else stamps
        return sorted(int(name[6:-8]) for name in names if SHARD.fullmatch(name))

    def stamps(self) -> Stamps:
        """Size and stamp of every manifest, and of the index if there is one; see Storage.stamps."""
        return self.storage.stamps(f"manifests/{self.name}", ".parquet")

    def shard_table(self, number: int, columns: Sequence[str] | None = None) -> pa.Table:
        """The manifest of one shard: one row per image; see shards.schema."""
        return self.parse(number, self._read(number), columns)

    def shard_metadata(self, number: int) -> dict[str, str]:
        """What rides in a manifest's schema metadata: tar_sha256, for synthetic shards also start and stop."""
        with self._explained(number):
            return recorded(self.shard_schema(number))

    def shard_schema(self, number: int) -> pa.Schema:
        with self._explained(number):
            schema = open_parquet(self._read(number), name=manifest_name(number)).schema_arrow
            return schema.with_metadata(without_seal(schema.metadata))

    def tables(
        self, columns: Sequence[str] | None = None, stamps: Stamps | None = None
    ) -> Iterator[tuple[int, pa.Table]]:
        """Number and manifest of each committed shard, in order, of which few are in memory at once.

        From the index where that is in step, else from the manifests, read ahead. `stamps`: as they were just read.
        """
        stamps = self.stamps() if stamps is None else stamps
        index, numbers = open_index(self.storage, self.name, stamps), self.shard_numbers(stamps)
        others = [number for number in numbers if index is None or number not in index]
        read = self.storage.read_many([manifest_path(self.name, number) for number in others])
        chosen = None if columns is None else tuple(columns)
        for number in numbers:
            if index is None or number not in index:
                yield number, self.parse(number, next(read), chosen)
                continue
            rows = index.table(number, chosen)
            yield number, self.shard_table(number, chosen) if rows is None else rows

    def metadatas(self) -> Iterator[tuple[int, dict[str, str]]]:
        """Number and schema metadata of each committed shard, in order; as `tables`, without rows."""
        for number, table in self.tables(()):
            yield number, recorded(table.schema)

    def table(self, columns: Sequence[str] | None = None) -> pa.Table:
        """All rows of all committed shards, in order."""
        stamps = self.stamps()
        index = open_index(self.storage, self.name, stamps)
        if index is not None and len(index) == index.covers == len(self.shard_numbers(stamps)):
            rows = index.whole(None if columns is None else tuple(columns))
            if rows is not None:
                return rows
        tables = [table.replace_schema_metadata() for _, table in self.tables(columns, stamps)]
        if not tables:
            raise BuilderError(f"dataset '{self.name}' has no shards yet", "run the command that makes it to its end")
        return pa.concat_tables(tables, promote_options="default")

    def parse(self, number: int, manifest: bytes | OSError, columns: Sequence[str] | None = None) -> pa.Table:
        """The rows of a manifest, of its bytes. BuilderError when these are none, or not a manifest's."""
        with self._explained(number):
            if isinstance(manifest, OSError):
                raise manifest
            # A third of the time that pq.read_table takes, and threads don't pay for a few hundred rows.
            opened = open_parquet(manifest, name=manifest_name(number))
            table = read_parquet(lambda texts: reopened(opened, manifest, texts), columns)
            table = table.replace_schema_metadata(without_seal(table.schema.metadata))
            return checked(table, [recorded(table.schema)], columns)

    def rejects(self, name: str, columns: Sequence[str] | None = None) -> pa.Table:
        """The rows that a filter turned away, of the file `name` in the folder of rejects.

        BuilderError when it is not there, or damaged.
        """
        path = f"manifests/{self.name}/{REJECTS}/{name}"
        try:
            data = self.storage.read(path)
            opened = open_parquet(data, name=name)
            table = read_parquet(lambda texts: reopened(opened, data, texts), columns)
            return table.replace_schema_metadata(without_seal(table.schema.metadata))
        except (pa.ArrowException, DamagedError, ManifestError, OSError) as error:
            raise BuilderError(
                f"{path} cannot be read: {error}", f"`builder rm {self.name}`, and filter again"
            ) from None

    def _read(self, number: int) -> bytes:
        with self._explained(number):
            return self.storage.read(manifest_path(self.name, number))

    @contextmanager
    def _explained(self, number: int) -> Iterator[None]:
        """Turn what is wrong with a manifest into a BuilderError that names it."""
        where = manifest_path(self.name, number)
        try:
            yield
        except OutsideError as error:
            raise BuilderError(f"{where} cannot be used: {error}", error.remedy) from None
        except (pa.ArrowException, DamagedError, ManifestError, OSError) as error:
            raise BuilderError(
                f"{where} cannot be read: {printable(str(error))}",
                f"run `builder verify {self.name} --repair`, or remove this file: its shard is then not there",
            ) from None

    # -- images ---------------------------------------------------------------------------------------------------

    def payload(self, row: dict[str, Any]) -> bytes:
        """The encoded image of a manifest row."""
        return self.storage.read(row["shard"], row["offset"], row["size"])

    def pixels(self, row: dict[str, Any]) -> np.ndarray:
        """The image of a manifest row: uint8 RGB [H, W, 3].

        BuilderError names shard and key when it can't be read, or (where the row has `sha256`) its pixels are others.
        """
        return self._checked(row)[1]

    def checked_payload(self, row: dict[str, Any]) -> bytes:
        """The encoded image of a manifest row, after it was decoded and its pixels were compared with the row's.

        BuilderError as `pixels`.
        """
        return self._checked(row)[0]

    def _checked(self, row: dict[str, Any]) -> tuple[bytes, np.ndarray]:
        try:
            payload = self.payload(row)
            pixels = decode(payload)
            if "sha256" in row and pixel_sha256(pixels) != row["sha256"]:
                raise ValueError(OTHER_PIXELS)
            return payload, pixels
        except (OSError, SyntaxError, ValueError) as error:
            where = f"{row['key']} in {row['shard']}"
            raise BuilderError(
                f"the image {where} cannot be read: {error}", f"run `builder verify {self.name}`"
            ) from None

    def images(self, rows: Sequence[dict[str, Any]] | None = None) -> Iterator[tuple[dict[str, Any], np.ndarray]]:
        """Rows (default: all) with their pixels, uint8 RGB [H, W, 3]."""
        for row in self.table().to_pylist() if rows is None else rows:
            yield row, self.pixels(row)


def decode(payload: bytes) -> np.ndarray:
    """An encoded image that a dataset holds -> uint8 RGB [H, W, 3], by the door; ImageError (a ValueError) if not.

    The caller compares the pixels with the row's `sha256`.
    """
    return read_hashed(payload)


def resize(pixels: np.ndarray, size: int) -> np.ndarray:
    """The one resize of the project: uint8 RGB [H, W, 3] -> [size, size, 3], antialiased bicubic (PIL)."""
    if pixels.shape[:2] == (size, size):
        return pixels
    return np.asarray(Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC))


def one_size(table: pa.Table) -> int | None:
    """The size in px of the images of manifest rows when all are squares of one size; from `width` and `height`."""
    sizes = set(table["width"].to_pylist()) | set(table["height"].to_pylist())
    return int(sizes.pop()) if len(sizes) == 1 else None


def all_datasets(storage: Storage) -> list[Dataset]:
    names = [name for name in storage.list("manifests") if NAME.fullmatch(name)]
    return [dataset for dataset in (Dataset(name, storage) for name in names) if dataset.exists()]


def readable(datasets: Sequence[Dataset]) -> Iterator[tuple[Dataset, dict[str, Any]]]:
    """Datasets with their dataset.json, without those whose dataset.json is damaged."""
    for dataset in datasets:
        try:
            info = dataset.info
        except BuilderError:
            continue
        yield dataset, info


def find_dataset(reference: str | None, out: str = ".", *, partial: bool = False) -> Dataset:
    """The dataset that a command means: a NAME under `out`, a path to its folder, or nothing.

    Nothing means the newest complete synthetic dataset that was not filtered from another. A dataset that is not
    complete is refused unless `partial`.
    """
    dataset = _newest(Storage(out)) if not reference else _named(reference, out)
    if dataset.info.get("state") != "complete" and not partial:
        raise BuilderError(
            f"dataset '{dataset.name}' is not complete", "run its command again to finish it, or add --partial"
        )
    return dataset


def _newest(storage: Storage) -> Dataset:
    candidates = [
        (info.get("created", ""), dataset)
        for dataset, info in readable(all_datasets(storage))
        if info.get("state") == "complete" and info.get("origin") == "synthetic" and not info.get("parent")
    ]
    if not candidates:
        raise BuilderError(
            f"there is no complete synthetic dataset in {storage.root}", "make one with `builder shards`, or name one"
        )
    return max(candidates, key=lambda candidate: candidate[0])[1]


def _named(reference: str, out: str) -> Dataset:
    root, name = out, reference.rstrip("/")
    if "/" in name:
        folder, name = posixpath.split(name)
        root = posixpath.dirname(folder) or "." if PurePosixPath(folder).name in ("manifests", "shards") else folder
    dataset = Dataset(name, Storage(root))
    if not dataset.exists():
        known = [other.name for other in all_datasets(Storage(root))]
        remedy = did_you_mean(name, known) if known else "there are no datasets there yet"
        raise BuilderError(f"there is no dataset '{name}' in {root}", remedy)
    return dataset

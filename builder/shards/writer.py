"""Write one shard: a reproducible tar, then its Parquet manifest, whose arrival is the commit."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import tarfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from builder.errors import BuilderError
from builder.shards.commit import Pair, commit
from builder.shards.received import INDEXED as INDEXED
from builder.shards.schema import member_json, to_table
from builder.shards.sealed import encode_parquet, open_parquet, without_seal
from builder.shards.storage import Storage

IMAGES_PER_SHARD = 200  # of datasets that no config says it of
PNG_LEVEL = 6  # of zlib; part of the bytes, so fixed


@dataclass(frozen=True)
class Sample:
    """One image on its way to disk: its payload (an encoded PNG) and its row without place (shard, offset, size)."""

    row: dict[str, Any]
    payload: bytes


def encode_png(pixels: np.ndarray) -> bytes:
    """Encode uint8 RGB pixels [H, W, 3], without metadata: real and synthetic alike."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=PNG_LEVEL)
    return buffer.getvalue()


def pixel_sha256(pixels: np.ndarray) -> str:
    """SHA-256 of uint8 RGB pixels in row order."""
    return hashlib.sha256(np.ascontiguousarray(pixels).tobytes()).hexdigest()


def image_row(key: str, phase: str, label: int, origin: str, pixels: np.ndarray) -> dict[str, Any]:
    """The columns that every image has, from its pixels [H, W, 3]."""
    height, width = pixels.shape[:2]
    return {
        "key": key, "phase": phase, "label": label, "origin": origin,
        "sha256": pixel_sha256(pixels), "width": width, "height": height,
    }  # fmt: skip


def shard_name(number: int) -> str:
    return f"shard-{number:06d}"


def tar_path(dataset: str, number: int) -> str:
    return f"shards/{dataset}/{shard_name(number)}.tar"


def manifest_name(number: int) -> str:
    return f"{shard_name(number)}.parquet"


def manifest_path(dataset: str, number: int) -> str:
    return f"manifests/{dataset}/{manifest_name(number)}"


def write_shard(
    storage: Storage, dataset: str, number: int, samples: Sequence[Sample], metadata: dict[str, str] | None = None,
    *, shared: bool = False,
) -> bool:  # fmt: skip
    """Commit shard `number` of `dataset`. Interrupted anywhere, either nothing is visible or all of it is.

    `metadata` goes into the manifest's schema metadata, beside the tar's SHA-256. `shared`: others may be making the
    same shard, even with other bytes; the first stays (see shards.commit), and False says that it is another's.
    """
    tar, rows = _tar(samples, tar_path(dataset, number))
    digest = hashlib.sha256(tar).hexdigest()
    bound = {"tar_sha256": digest, "tar_bytes": str(len(tar))}
    paths = tar_path(dataset, number), manifest_path(dataset, number)
    manifest = encode_parquet(to_table(rows, {**bound, **(metadata or {})}), paths[1])
    try:
        if not storage.is_local:
            return _commit_objects(storage, paths, tar, manifest, digest)
        if shared:
            tar_file, manifest_file = (Path(storage.path(path)) for path in paths)
            return commit(Pair(tar_file, tar, manifest_file, manifest, digest))
        storage.write(paths[0], tar)
        storage.write(paths[1], manifest)
        return True
    except OSError as error:
        raise BuilderError(
            f"shard {number} of '{dataset}' cannot be written under {storage.root}: {error.strerror or error}",
            "make room or choose another --out; what was written before is safe, and the same command continues",
        ) from error


def _commit_objects(storage: Storage, paths: tuple[str, str], tar: bytes, manifest: bytes, digest: str) -> bool:
    """Commit on an object store, which has neither a lock nor a rename: the tar, then the manifest if there is none.

    Two jobs that make one shard with other bytes (other hardware) overwrite each other's tar. So who comes second to
    the manifest looks whose tar is there, and puts its own manifest if it is its own. Between those two requests the
    manifest names another tar; its readers notice, for they compare pixels, and so does `verify`.
    """
    tar_file, manifest_file = paths
    if storage.exists(manifest_file):
        return False
    storage.write(tar_file, tar)
    if storage.create(manifest_file, manifest):
        return True
    if recorded_metadata(storage.read(manifest_file)).get("tar_sha256") == digest:
        return False  # the same bytes: nobody's tar was changed
    if hashlib.sha256(storage.read(tar_file)).hexdigest() != digest:
        return False
    storage.write(manifest_file, manifest)
    return True


def recorded_metadata(manifest: bytes) -> dict[str, str]:
    """What rides in the schema metadata of a manifest, of its bytes.

    pyarrow's error when they are none, DamagedError when they are not those that were sealed.
    """
    found = without_seal(open_parquet(manifest).schema_arrow.metadata)
    return {key.decode(): value.decode() for key, value in found.items()}


def write_shards(
    storage: Storage,
    dataset: str,
    samples: Iterable[Sample],
    images_per_shard: int,
    metadata: dict[str, str] | None = None,
) -> None:
    """Commit samples as shards 0, 1, ... of `images_per_shard` images each; the last one may hold fewer."""
    left = iter(samples)
    for number in itertools.count():
        batch = list(itertools.islice(left, images_per_shard))
        if not batch:
            return
        write_shard(storage, dataset, number, batch, metadata)


def write_manifest(storage: Storage, path: str, table: pa.Table) -> None:
    """Write a table of rows to `path`, relative to the output root: sealed, whole or not at all."""
    storage.write(path, encode_parquet(table, path))


def _tar(samples: Sequence[Sample], path: str) -> tuple[bytes, list[dict[str, Any]]]:
    """The tar's bytes (equal samples give equal bytes: mtime 0, no owner) and the rows completed with their place."""
    buffer = io.BytesIO()
    rows = []
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:  # of keys up to 100 bytes: ustar
        for sample in samples:
            row = sample.row
            described = json.dumps(member_json(row), sort_keys=True).encode()
            members = {"png": sample.payload, "cls": str(row["label"]).encode(), "json": described}
            for extension, payload in members.items():
                info = tarfile.TarInfo(f"{row['key']}.{extension}")
                info.size, info.mode, info.mtime = len(payload), 0o644, 0
                tar.addfile(info, io.BytesIO(payload))
                if extension == "png":
                    padded = -(-len(payload) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                    offset = tar.offset - padded
            rows.append({**row, "shard": path, "offset": offset, "size": len(sample.payload)})
    return buffer.getvalue(), rows

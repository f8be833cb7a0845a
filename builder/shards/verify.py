"""Check what is on disk against what the manifests say."""

from __future__ import annotations

import hashlib
import io
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from builder.display import printable
from builder.documents import has_checksum, parse_json
from builder.errors import BuilderError
from builder.shards.beside import check_beside
from builder.shards.dataset import Dataset, decode
from builder.shards.index import Stamps
from builder.shards.schema import member_json
from builder.shards.sealed import sealed_file
from builder.shards.sequential import PIECE, Hashing, Sequential
from builder.shards.tars import MAX_TEXT, TarError, read_members
from builder.shards.writer import INDEXED, manifest_path, pixel_sha256, tar_path

FAST = ("key", "phase", "label", "shard", "offset", "size")  # columns that a look without the tars needs


@dataclass
class Report:
    """What is off, one line each: of the dataset as a whole, of single shards, by their number, and of the files beside
    them, by their kind (see shards.beside)."""

    images: int = 0
    general: list[str] = field(default_factory=list)
    beside: dict[str, list[str]] = field(default_factory=dict)
    unsealed: list[str] = field(default_factory=list)  # files without a checksum, of an older version: no finding
    shards: dict[int, list[str]] = field(default_factory=dict)

    @property
    def findings(self) -> list[str]:
        beside = [line for lines in self.beside.values() for line in lines]
        return [*self.general, *beside, *(line for number in sorted(self.shards) for line in self.shards[number])]

    def found(self, number: int, lines: list[str]) -> None:
        if lines:
            self.shards.setdefault(number, []).extend(lines)


def verify_dataset(dataset: Dataset, on_shard: Callable[[], object] = lambda: None) -> list[str]:
    """Everything that is off, one line each; an empty list means that all is well. See `check_dataset`."""
    return check_dataset(dataset, on_shard).findings


def check_dataset(dataset: Dataset, on_shard: Callable[[], object] = lambda: None, *, fast: bool = False) -> Report:
    """Compare everything on disk with everything else. Needs some 10 bytes of memory an image.

    Checked: dataset.json and its lineage; each manifest by its seal, and against its tar (hash, members, place and
    pixels of every image, label file, JSON); labels against the class table; keys unique; the plan without a gap; the
    count; reference, rejects, index and caches (see shards.beside).
    fast: manifests are read, and of tars only their sizes. A dataset that a job works on meanwhile is taken as partial.
    """
    info = dataset.info
    report = Report(general=_verify_info(dataset))
    if not has_checksum(dataset.storage.read(dataset.info_path)):
        report.unsealed.append(dataset.info_path)
    numbers = dataset.shard_numbers()
    manifests = dataset.storage.read_many([manifest_path(dataset.name, number) for number in numbers])
    sizes = _Sizes(dataset)
    keys, ranges = Keys(), []
    for number, manifest in zip(numbers, manifests, strict=True):
        try:
            table = dataset.parse(number, manifest, FAST if fast else None)
            report.found(number, _verify_place(dataset, number, manifest, report.unsealed))
        except BuilderError as error:
            report.found(number, [error.what])
            on_shard()
            continue
        metadata = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
        rows = table.to_pylist()
        if fast:
            report.found(number, _verify_sizes(number, rows, metadata, sizes))
            report.found(number, [f"{row['key']}: {said}" for row in rows for said in _verify_label(dataset, row)])
        else:
            report.found(number, _verify_shard(dataset, number, rows, metadata))
        keys.add(number, table["key"])
        if {"start", "stop"} <= metadata.keys():
            ranges.append((int(metadata["start"]), int(metadata["stop"])))
        report.images += table.num_rows
        on_shard()
    for key, (first, second) in keys.doubled(dataset):
        report.found(second, [f"{key}: stands in shard {first} and in shard {second}"])
    report.beside = check_beside(dataset, info)
    # Completed or extended in the meantime: the manifests that were read are of neither state.
    complete, recorded = info.get("state") == "complete" and dataset.info == info, info.get("count")
    report.general += _gaps(ranges, complete) if not info.get("parent") else []
    if complete and recorded != report.images:
        report.general.append(f"dataset.json counts {recorded} images, the manifests {report.images}")
    return report


def stray_tars(dataset: Dataset) -> list[str]:
    """Tars without a manifest: a killed run's leftovers, invisible to every reader and replaced when it continues."""
    committed = {tar_path(dataset.name, number) for number in dataset.shard_numbers()}
    names = dataset.storage.list(f"shards/{dataset.name}", ".tar")
    return [path for path in (f"shards/{dataset.name}/{name}" for name in names) if path not in committed]


def _verify_info(dataset: Dataset) -> list[str]:
    info = dataset.info
    findings = [f"dataset.json has no '{key}'" for key in ("name", "lineage") if key not in info]
    lineage = info.get("lineage") or {}
    if lineage.get("known") and not isinstance(lineage.get("patients"), list):
        findings.append("dataset.json: the lineage is said to be known, but lists no patients")
    return findings


def _verify_place(dataset: Dataset, number: int, manifest: bytes | OSError, unsealed: list[str]) -> list[str]:
    """Whether a manifest was sealed as that of this dataset; one of another says nothing of it."""
    path = manifest_path(dataset.name, number)
    sealed = None if isinstance(manifest, OSError) else sealed_file(manifest)
    if sealed is None:
        unsealed.append(path)
    return [] if sealed in (None, path) else [f"{path}: it was written as {sealed}, and stands in another's place"]


class Keys:
    """Which keys stand in two places: 8 bytes of memory an image, for a hash of each key."""

    def __init__(self) -> None:
        self._parts: list[np.ndarray] = []
        self._numbers: list[int] = []

    def add(self, number: int, keys: pa.ChunkedArray) -> None:
        self._parts.append(np.fromiter(map(hash, keys.to_pylist()), np.int64, len(keys)))
        self._numbers.append(number)

    def doubled(self, dataset: Dataset) -> list[tuple[str, tuple[int, int]]]:
        """Keys that stand twice, each with the two shards; they are read again only where hashes are equal."""
        if not self._parts:
            return []
        hashes = np.sort(np.concatenate(self._parts))
        twice = np.unique(hashes[1:][hashes[1:] == hashes[:-1]])
        del hashes
        found: list[tuple[str, tuple[int, int]]] = []
        first: dict[str, int] = {}
        for number, part in zip(self._numbers, self._parts, strict=True):
            if not len(twice) or not np.isin(part, twice).any():
                continue
            for key in dataset.shard_table(number, ["key"])["key"].to_pylist():
                if key in first:
                    found.append((key, (first[key], number)))
                elif np.isin(np.int64(hash(key)), twice):
                    first[key] = number
        return found


class _Sizes:
    """Sizes of the tars that manifests name: of a folder at once, when the first of it is asked for."""

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset
        self._folders: dict[str, Stamps] = {}

    def of(self, path: str) -> int | None:
        """In bytes; None when there is no such tar."""
        if not path.startswith("shards/"):  # of others, wherever it lies and whatever it is called
            stamp = self._dataset.storage.stamp(path)
            return None if stamp is None else stamp[0]
        folder, _, name = path.rpartition("/")
        if folder not in self._folders:
            self._folders[folder] = self._dataset.storage.stamps(folder, ".tar")
        found = self._folders[folder].get(name)
        return None if found is None else found[0]


def _verify_sizes(number: int, rows: list[dict[str, Any]], metadata: dict[str, str], sizes: _Sizes) -> list[str]:
    """Findings that need no tar to be read: it is there, of the size that was written, and holds all images' places."""
    findings = []
    ends: dict[str, int] = {}
    for row in rows:
        ends[row["shard"]] = max(ends.get(row["shard"], 0), row["offset"] + row["size"])
    for path, end in ends.items():
        size = sizes.of(path)
        written = metadata.get("tar_bytes") if len(ends) == 1 else None
        if size is None:
            findings.append(f"{path}: missing, though manifest {number} names it")
        elif written is not None and size != int(written):
            findings.append(f"{path}: {size:,} bytes, where {int(written):,} were written")
        elif size < end:
            findings.append(f"{path}: {size:,} bytes, but an image of manifest {number} ends at {end:,}")
    return findings


def _gaps(ranges: list[tuple[int, int]], complete: bool) -> list[str]:
    """Positions of the plan that two shards have, or (of a complete dataset) none, as far as shards say what they hold.

    While a job is at work, units are made in any order.
    """
    findings, end = [], 0
    for start, stop in ranges:
        if start > end and complete:
            findings.append(f"images {end:,} to {start - 1:,} of the plan are in no shard")
        elif start < end:
            findings.append(f"images {start:,} to {end - 1:,} of the plan are in two shards")
        end = stop
    return findings


def _verify_shard(dataset: Dataset, number: int, rows: list[dict[str, Any]], metadata: dict[str, str]) -> list[str]:
    """Findings of one manifest; in a view its rows may point into several tars of the parent."""
    findings = []
    by_tar = defaultdict(list)
    for row in rows:
        by_tar[row["shard"]].append(row)
    for path, tar_rows in by_tar.items():
        if INDEXED in metadata:
            findings += _verify_indexed(dataset, number, path, tar_rows, metadata)
            continue
        stamp = dataset.storage.stamp(path)
        if stamp is None:
            findings.append(f"{path}: missing, though manifest {number} names it")
            continue
        with Hashing(Sequential(dataset.storage, path, 0, stamp[0])) as stream:
            findings += _verify_members(path, stream, stamp[0], tar_rows, whole=path == tar_path(dataset.name, number))
            if stream.finish() != metadata.get("tar_sha256"):
                findings.append(_other_bytes(path, number))
        for row in tar_rows:
            payload = dataset.storage.read(path, row["offset"], row["size"])
            findings += [f"{row['key']}: {said}" for said in _verify_row(dataset, row, payload)]
    return findings


def _other_bytes(path: str, number: int) -> str:
    return f"{path}: its SHA-256 is not the one that manifest {number} names"


def _verify_indexed(
    dataset: Dataset, number: int, path: str, rows: list[dict[str, Any]], metadata: dict[str, str]
) -> list[str]:
    """Findings of a tar of others, which may be large: it is hashed in pieces, and each image is looked up."""
    storage, digest = dataset.storage, hashlib.sha256()
    stamp = storage.stamp(path)
    if stamp is None:
        return [f"{path}: missing, though manifest {number} names it"]
    with Sequential(storage, path, 0, stamp[0]) as stream:
        while piece := stream.read(PIECE):
            digest.update(piece)
    findings = [] if digest.hexdigest() == metadata.get("tar_sha256") else [_other_bytes(path, number)]
    for row in rows:
        payload = storage.read(path, row["offset"], row["size"])
        findings += [f"{row['key']}: {said}" for said in _verify_row(dataset, row, payload)]
    return findings


def _verify_members(
    path: str, stream: io.RawIOBase, size: int, rows: list[dict[str, Any]], *, whole: bool
) -> list[str]:
    """The tar's members against the rows: KEY.png, KEY.cls and KEY.json each; a view need not use all of a tar."""
    members: set[str] = set()
    texts: dict[str, bytes] = {}
    try:
        for member in read_members(stream, size):
            members.add(member.name)
            if member.name.endswith((".cls", ".json")):
                texts[member.name] = member.read(MAX_TEXT)
    except (TarError, OSError) as error:
        return [f"{path}: not a readable tar ({error})"]
    expected = {f"{row['key']}.{extension}" for row in rows for extension in ("png", "cls", "json")}
    findings = [f"{path}: member {name} is missing" for name in sorted(expected - members)]
    if whole:
        findings += [f"{path}: member {printable(name)} is not in the manifest" for name in sorted(members - expected)]
    for row in rows:
        label = texts.get(f"{row['key']}.cls")
        if label is not None and label.strip() != str(row["label"]).encode():
            findings.append(
                f"{path}: label file of {row['key']} says {printable(label, 40)}, the manifest {row['label']}"
            )
        described = texts.get(f"{row['key']}.json")
        if described is not None and row["origin"] == "synthetic" and not _describes(described, row):
            findings.append(f"{path}: {row['key']}.json does not say what the manifest says")
    return findings


def _describes(text: bytes, row: dict[str, Any]) -> bool:
    """Whether a JSON member says the same as its row; floats are stored in 32 bits in the manifest."""
    try:
        said = parse_json(text, "it")
    except BuilderError:
        return False
    if not isinstance(said, dict):
        return False
    expected = member_json(row)
    if said.keys() != expected.keys():
        return False
    return all(
        np.allclose(said[key], expected[key], rtol=1e-5)
        if isinstance(expected[key], float)
        else said[key] == expected[key]
        for key in expected
        if key != "box"
    )


def _verify_row(dataset: Dataset, row: dict[str, Any], payload: bytes) -> list[str]:
    findings = []
    try:
        pixels = decode(payload)
    except (OSError, SyntaxError, ValueError) as error:
        return [f"the image at its place in {row['shard']} cannot be read ({error})"]
    if pixel_sha256(pixels) != row["sha256"]:
        findings.append(f"its pixels in {row['shard']} are not those of the manifest")
    if pixels.shape[:2] != (row["height"], row["width"]):
        findings.append(
            f"it is {pixels.shape[1]}x{pixels.shape[0]} px, the manifest says {row['width']}x{row['height']}"
        )
    return findings + _verify_label(dataset, row)


def _verify_label(dataset: Dataset, row: dict[str, Any]) -> list[str]:
    if row["phase"] in dataset.classes.codes and dataset.classes.label(row["phase"]) == row["label"]:
        return []
    return [f"phase {row['phase']} with label {row['label']} is not in the class table"]

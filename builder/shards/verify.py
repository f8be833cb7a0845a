"""Check what is on disk against what the manifests say."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from builder.errors import BuilderError
from builder.shards.dataset import Dataset
from builder.shards.schema import member_json
from builder.shards.writer import pixel_sha256, tar_path


def verify_dataset(dataset: Dataset, on_shard: Callable[[], None] = lambda: None) -> list[str]:
    """Everything that is off, one line each; an empty list means that all is well.

    Checked: dataset.json and its lineage; each manifest against its tar (hash, members, place and pixels of every
    image, label file, JSON); labels against the class table; keys unique; the count; tars without a manifest.
    """
    findings = _verify_info(dataset)
    keys: dict[str, int] = {}
    count = 0
    for number in dataset.shard_numbers():
        try:
            rows = dataset.shard_table(number).to_pylist()
            found, seen = _verify_shard(dataset, number, rows), [row["key"] for row in rows]
        except BuilderError as error:
            found, seen = [error.what], []
        findings += found
        for key in seen:
            if key in keys:
                findings.append(f"{key}: stands in shard {keys[key]} and in shard {number}")
            keys[key] = number
        count += len(seen)
        on_shard()
    recorded = dataset.info.get("count")
    if dataset.info.get("state") == "complete" and recorded != count:
        findings.append(f"dataset.json counts {recorded} images, the manifests {count}")
    return findings


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


def _verify_shard(dataset: Dataset, number: int, rows: list[dict[str, Any]]) -> list[str]:
    """Findings of one manifest; in a view its rows may point into several tars of the parent."""
    findings = []
    expected_tar = dataset.shard_metadata(number).get("tar_sha256")
    by_tar = defaultdict(list)
    for row in rows:
        by_tar[row["shard"]].append(row)
    for path, tar_rows in by_tar.items():
        try:
            data = dataset.storage.read(path)
        except FileNotFoundError:
            findings.append(f"{path}: missing, though manifest {number} names it")
            continue
        if hashlib.sha256(data).hexdigest() != expected_tar:
            findings.append(f"{path}: its SHA-256 is not the one that manifest {number} names")
        findings += _verify_members(path, data, tar_rows, whole=path == tar_path(dataset.name, number))
        findings += [f"{row['key']}: {said}" for row in tar_rows for said in _verify_row(dataset, row, data)]
    return findings


def _verify_members(path: str, data: bytes, rows: list[dict[str, Any]], *, whole: bool) -> list[str]:
    """The tar's members against the rows: KEY.png, KEY.cls and KEY.json each; a view need not use all of a tar."""
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            members = {member.name: member for member in tar.getmembers()}
            texts = {
                name: tar.extractfile(member).read()  # type: ignore[union-attr]
                for name, member in members.items()
                if name.endswith((".cls", ".json"))
            }
    except (tarfile.TarError, EOFError, OSError) as error:
        return [f"{path}: not a readable tar ({error})"]
    expected = {f"{row['key']}.{extension}" for row in rows for extension in ("png", "cls", "json")}
    findings = [f"{path}: member {name} is missing" for name in sorted(expected - set(members))]
    if whole:
        findings += [f"{path}: member {name} is not in the manifest" for name in sorted(set(members) - expected)]
    for row in rows:
        label = texts.get(f"{row['key']}.cls")
        if label is not None and label.strip() != str(row["label"]).encode():
            findings.append(f"{path}: label file of {row['key']} says {label!r}, the manifest {row['label']}")
        described = texts.get(f"{row['key']}.json")
        if described is not None and row["origin"] == "synthetic" and not _describes(described, row):
            findings.append(f"{path}: {row['key']}.json does not say what the manifest says")
    return findings


def _describes(text: bytes, row: dict[str, Any]) -> bool:
    """Whether a JSON member says the same as its row; floats are stored in 32 bits in the manifest."""
    try:
        said = json.loads(text)
    except json.JSONDecodeError:
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


def _verify_row(dataset: Dataset, row: dict[str, Any], tar: bytes) -> list[str]:
    payload = tar[row["offset"] : row["offset"] + row["size"]]
    findings = []
    try:
        with Image.open(io.BytesIO(payload)) as image:
            pixels = np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError) as error:
        return [f"the image at its place in {row['shard']} cannot be read ({error})"]
    if pixel_sha256(pixels) != row["sha256"]:
        findings.append(f"its pixels in {row['shard']} are not those of the manifest")
    if pixels.shape[:2] != (row["height"], row["width"]):
        findings.append(
            f"it is {pixels.shape[1]}x{pixels.shape[0]} px, the manifest says {row['width']}x{row['height']}"
        )
    if row["phase"] not in dataset.classes.codes or dataset.classes.label(row["phase"]) != row["label"]:
        findings.append(f"phase {row['phase']} with label {row['label']} is not in the class table")
    return findings

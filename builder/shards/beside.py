"""Check what lies beside a dataset's shards: dataset.json, the reference of the scores, rejects, index and caches."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import numpy as np

from builder.documents import read_document
from builder.errors import BuilderError
from builder.shards.dataset import FEATURES, REJECTS, Dataset
from builder.shards.index import INDEX, open_index
from builder.shards.sealed import DamagedError, require_trailer

REFERENCE = "reference.json"


def check_beside(dataset: Dataset, info: dict[str, Any]) -> dict[str, list[str]]:
    """What is off, by kind of file: one line each with the remedy. `info` is dataset.json."""
    found = {
        "dataset.json": list(_check_names(dataset, info)),
        "reference": list(_check_reference(dataset, info)),
        "rejects": list(_check_rejects(dataset, info)),
        "index": list(_check_index(dataset)),
        "features": list(_check_features(dataset)),
    }
    return {kind: lines for kind, lines in found.items() if lines}


def _check_names(dataset: Dataset, info: dict[str, Any]) -> Iterator[str]:
    if info.get("name", dataset.name) != dataset.name:
        yield (
            f"{dataset.info_path} is that of the dataset '{info['name']}', in another's place: "
            f"put back the one of '{dataset.name}'"
        )


def _check_reference(dataset: Dataset, info: dict[str, Any]) -> Iterator[str]:
    """The reference of the scores is whole, and that which the scores were made by."""
    path = f"manifests/{dataset.name}/{REFERENCE}"
    recorded = (info.get("scores") or {}).get("version")
    remedy = (
        f"`builder rm {dataset.name}` and filter again"
        if info.get("parent")
        else f"`builder score {dataset.name} --against REAL` makes it again"
    )
    try:
        reference = read_document(path, storage=dataset.storage, remedy=remedy)
    except FileNotFoundError:
        if recorded is not None and info.get("state") == "complete":  # a partial dataset is still being made
            yield f"{path} is missing, though dataset.json says that the images are scored: {remedy}"
        return
    except BuilderError as error:
        yield f"{error.what}: {error.remedy}"
        return
    if recorded is not None and reference.get("version") != recorded:
        yield f"{path} is not the one that the images were scored by: {remedy}"


def _check_rejects(dataset: Dataset, info: dict[str, Any]) -> Iterator[str]:
    folder = f"manifests/{dataset.name}/{REJECTS}"
    rows, damaged = 0, False
    for name in dataset.storage.list(folder, ".parquet"):
        try:
            rows += dataset.rejects(name).num_rows
        except BuilderError as error:
            yield f"{error.what}: {error.remedy}"
            damaged = True
    recorded = info.get("rejected")
    if recorded is not None and rows != recorded and not damaged and info.get("state") == "complete":
        yield (
            f"{folder} holds {rows:,} rejects, where {recorded:,} images were turned away: "
            f"`builder rm {dataset.name}`, and filter again"
        )


def _check_index(dataset: Dataset) -> Iterator[str]:
    stamps = dataset.stamps()
    if INDEX not in stamps:
        return
    path, remedy = f"manifests/{dataset.name}/{INDEX}", f"`builder compact {dataset.name}` writes it anew"
    index = open_index(dataset.storage, dataset.name, stamps)
    if index is None:
        yield f"{path} is damaged and not used: {remedy}"
        return
    for said in index.findings():
        yield f"{path} is damaged and not used, {said}: {remedy}"


def _check_features(dataset: Dataset) -> Iterator[str]:
    for path, why in damaged_features(dataset):
        yield f"{path} is damaged ({why}); it is not used: remove it, or let --repair remove it"


def damaged_features(dataset: Dataset) -> Iterator[tuple[str, str]]:
    """The caches of features that are damaged, and how."""
    folder = f"manifests/{dataset.name}/{FEATURES}"
    for extractor in dataset.storage.list(folder):
        for name in dataset.storage.list(f"{folder}/{extractor}", ".npy"):
            path = f"{folder}/{extractor}/{name}"
            try:
                payload, sealed = require_trailer(dataset.storage.read(path), path)
                if not sealed:
                    _require_array(payload)
            except DamagedError as error:
                yield path, str(error)


def _require_array(data: bytes) -> None:
    """A cache of an older version has no seal; DamagedError where it is not even a whole array and nothing else."""
    file = io.BytesIO(data)
    try:
        np.lib.format.read_array(file, allow_pickle=False)
    except ValueError as error:
        raise DamagedError(str(error)) from None
    if file.read(1):
        raise DamagedError("something follows the array")

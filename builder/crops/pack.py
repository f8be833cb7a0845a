"""`builder pack`: photographs, boxes and labels become a real dataset of shards and manifests."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import numpy as np
import PIL
from tqdm import tqdm

from builder import __version__
from builder.config import CropsConfig, fingerprint
from builder.crops.cut import BadPhotographError, cut, decode
from builder.crops.plan import PackRequest, Plan, PlannedCrop, make_plan, require_all_phases
from builder.crops.problems import Problems
from builder.crops.split import split_patients
from builder.crops.summary import PackSummary, Tally
from builder.errors import BuilderError
from builder.identity import COLUMN, PatientKey, find_key, given_key, lineage_of
from builder.shards.dataset import Dataset
from builder.shards.lock import exclusive
from builder.shards.whole import all_or_nothing
from builder.shards.writer import Sample, encode_png, image_row, write_shards

__all__ = ["PackRequest", "PackSummary", "pack"]


def pack(request: PackRequest, dataset: Dataset, progress: bool = True) -> PackSummary:
    """Cut every box into a crop and commit the dataset; dataset.json says complete only at the very end.

    A complete dataset made from the same input is left as it is, and its summary returned; a partial one, which a
    killed run left, is begun anew. All input is checked before anything is written; what fails later (an unreadable
    photograph, a full disk) leaves nothing behind.

    Raises:
        BuilderError: a mistake in the input (see plan.make_plan), or a dataset of that name made from other input.
    """
    plan = make_plan(request, progress)
    key = given_key(request.key) if request.key is not None else find_key(dataset.storage, request.key_file)
    patients = {name: patient.hash(key) for name, patient in plan.patients.items()}
    # Printed, and not stored: where a key lies is nobody else's business.
    details = [f"patients are hashed with the key of fingerprint {key.fingerprint}: {key.origin}", *plan.details]
    splits = _split(plan, patients, request.crops)
    inputs = _inputs(request, plan, patients, key)
    info = {"name": dataset.name, **_info(request, plan, key, inputs)}
    with exclusive(dataset):
        if dataset.exists() and (existing := _existing(dataset, inputs)):
            existing.details = details
            return existing
        with all_or_nothing(dataset):
            dataset.write_info({**info, "state": "partial", "count": 0})
            summary = _write(request, dataset, plan, patients, splits, key, progress)
            dataset.write_info({**info, "state": "complete", "count": summary.count, "summary": summary.to_json()})
    summary.details = details
    return summary


# -- what decides the dataset -----------------------------------------------------------------------------------------


def _split(plan: Plan, patients: dict[str, str], crops: CropsConfig) -> dict[str, str]:
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for name, planned in plan.crops.items():
        counts[patients[name]].update(crop.phase for crop in planned)
    return split_patients(counts, {"train": crops.train, "val": crops.val, "test": crops.test}, crops.split_seed)


def _inputs(request: PackRequest, plan: Plan, patients: dict[str, str], key: PatientKey) -> dict[str, Any]:
    """What decides the pixels and rows, by name. Photographs count by path and length in bytes, not by content.

    What is made of names is sealed with the key: from plain hashes, somebody with a list of names could tell which of
    them are in the dataset.
    """
    photographs = [[name, plan.photographs.path(name).stat().st_size] for name in plan.photographs.names]
    crops = [[name, crop.box, crop.phase] for name, planned in plan.crops.items() for crop in planned]
    return {
        "classes": request.classes.to_json(),
        "photographs": key.seal(photographs),
        "boxes and labels": key.seal(crops),
        "patients": key.seal([patients, request.group_by]),
        "patient key": key.fingerprint,
        "crops": vars(request.crops),
        "size": request.freeze_size,
        "without-box": request.without_box,
        "skip-bad": request.skip_bad,
        "images_per_shard": request.images_per_shard,
    }


def _existing(dataset: Dataset, inputs: dict[str, Any]) -> PackSummary | None:
    """The summary of a complete dataset of the same input; None for a partial one, which may be begun anew."""
    info = dataset.info
    remedy = f"choose another name (--name), or remove it with `builder rm {dataset.name}`"
    if info.get("origin") != "real" or "inputs" not in info:
        raise BuilderError(f"dataset '{dataset.name}' exists, and was not made by `builder pack`", remedy)
    if info["state"] != "complete":
        return None
    if "patient_source" not in info["lineage"]:
        raise BuilderError(
            f"dataset '{dataset.name}' exists, packed by an earlier version: its order and fingerprints can be traced "
            "to the names of photographs, and its patients cannot be compared with others'",
            f"{remedy}, and pack it again",
        )
    if info["fingerprint"] != fingerprint(inputs):
        changed = [
            name for name in inputs if fingerprint({"": inputs[name]}) != fingerprint({"": info["inputs"].get(name)})
        ]
        raise BuilderError(
            f"dataset '{dataset.name}' exists, made from other input; changed: {', '.join(changed)}", remedy
        )
    summary = PackSummary.from_json(info["summary"])
    summary.notes.append("it was there already, made from the same input; nothing was written")
    return summary


def _info(request: PackRequest, plan: Plan, key: PatientKey, inputs: dict[str, Any]) -> dict[str, Any]:
    stand_ins = sorted({patient.source for patient in plan.patients.values()} - {COLUMN})
    return {
        "origin": "real",
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "classes": request.classes.to_json(),
        "config": {
            "name": request.config_name,
            "crops": vars(request.crops),
            "shards": {"images_per_shard": request.images_per_shard},
        },
        "group_by": " and ".join(stand_ins) or None,
        "inputs": inputs,
        "fingerprint": fingerprint(inputs),
        "lineage": lineage_of(key, plan.patients.values()),
        "parent": None,
        "licence": {"base": None, "data": request.licence},
        "versions": {"builder": __version__, "pillow": PIL.__version__, "numpy": np.__version__},
    }


# -- writing ----------------------------------------------------------------------------------------------------------


def _write(
    request: PackRequest,
    dataset: Dataset,
    plan: Plan,
    patients: dict[str, str],
    splits: dict[str, str],
    key: PatientKey,
    progress: bool,
) -> PackSummary:
    tally = Tally(request.classes.codes, request.model_size)
    photographs = set()
    total = sum(len(planned) for planned in plan.crops.values())
    bar = tqdm(total=total, desc=f"packing {dataset.name}", unit="crop", disable=not progress)

    def counted() -> Iterator[Sample]:
        for name, planned, row, payload in _samples(request, dataset.name, plan, patients, splits, key):
            tally.add(
                row, max(planned.box[2] - planned.box[0], planned.box[3] - planned.box[1]) if planned.box else None
            )
            photographs.add(name)
            bar.update()
            yield Sample(row, payload)

    with bar:
        write_shards(dataset.storage, dataset.name, counted(), request.images_per_shard)
    require_all_phases(request.classes, tally.phases)
    return tally.summary(dataset.name, len(photographs), plan.skipped, plan.notes)


def _samples(
    request: PackRequest, dataset: str, plan: Plan, patients: dict[str, str], splits: dict[str, str], site: PatientKey
) -> Iterator[tuple[str, PlannedCrop, dict[str, Any], bytes]]:
    """Photograph, planned crop, row and payload of every crop, each photograph decoded once.

    Photographs come in an order drawn from their names and the key, so that every shard mixes patients and phases,
    and nobody without the key knows which photograph a row is of. BuilderError, once all are read, naming all that
    cannot be decoded.
    """
    indices: Counter[str] = Counter()
    problems = Problems()
    for name in sorted(plan.crops, key=site.order):
        try:
            photograph = decode(plan.photographs.path(name), max_pixels=request.max_pixels)
        except BadPhotographError as error:
            if request.skip_bad:
                plan.skipped["unreadable photographs, left out"] += 1
            else:
                problems.add_error(error)
            continue
        if problems:  # nothing will be kept: only the other photographs that cannot be read are still looked for
            continue
        for planned in plan.crops[name]:
            crop = cut(
                photograph,
                planned.box,
                margin=request.crops.margin,
                max_size=request.crops.max_size,
                freeze_size=request.freeze_size,
            )
            key = f"{dataset}-{planned.phase}-{indices[planned.phase]:08d}"
            indices[planned.phase] += 1
            row = {
                **image_row(key, planned.phase, request.classes.label(planned.phase), "real", crop.pixels),
                "patient": patients[name],
                "split": splits[patients[name]],
                "source": site.photograph(name),
                "box": list(crop.box) if crop.box else None,
                "original_size": list(crop.original_size),
            }
            yield name, planned, row, encode_png(crop.pixels)
    problems.raise_if_any()

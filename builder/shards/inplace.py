"""WebDataset tars of others become a dataset where they lie: manifests that point into them, and no copy.

One tar, one manifest, written when the tar is read to its end; so an interrupted index goes on, tars that came since
are added, and tars that changed are read again. The images stay as they are, in any codec that builder.images reads.
"""

from __future__ import annotations

import io
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pyarrow.compute as pc

from builder.config import fingerprint
from builder.display import printable
from builder.documents import parse_json
from builder.errors import BuilderError
from builder.identity import INDEX, Patient, PatientKey, lineage_of, normalise
from builder.images import DEFAULT_MAX_PIXELS
from builder.phases import ClassTable
from builder.shards.dataset import Dataset
from builder.shards.foreign import IMAGES, SAYS, class_code, find_tars, foreign_info, read_foreign, split_name
from builder.shards.lock import exclusive
from builder.shards.received import INDEXED, MAX_KEY, VOUCHER, checked, is_key, read_parquet, reopened
from builder.shards.schema import to_table
from builder.shards.sealed import open_parquet
from builder.shards.sequential import Hashing, Sequential
from builder.shards.storage import READERS, Storage
from builder.shards.tars import MAX_TEXT, TarError, read_members
from builder.shards.verify import Keys
from builder.shards.whole import sweep_leftovers
from builder.shards.writer import image_row, manifest_name, manifest_path, write_manifest
from builder.trust import is_vouched, vouch

SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
PATIENT = {"patient": "patient", "patient_id": "patient", "group": "group"}  # in a .json, the first; what it names
OURS = {"key", "origin", "sha256"}  # in a .json that we wrote: its patient is a keyed hash already, as HASHED
HASHED = re.compile("[0-9a-f]{32}")
PATIENT_KEY, PATIENT_FORMS = "patient_key", "patient_forms"  # in the metadata of a manifest


@dataclass(frozen=True)
class Description:
    """What the tars do not say themselves.

    split: of samples whose .json names none; None: they have none. find_key: the key that patients are hashed with,
    asked for when the first patient is met. max_pixels: larger images are refused.
    """

    classes: ClassTable
    origin: str
    split: str | None
    find_key: Callable[[], PatientKey]
    licence: str = "not stated"
    max_pixels: int = DEFAULT_MAX_PIXELS


@dataclass
class Summary:
    """What an index came to."""

    images: int = 0
    tars: int = 0
    read: int = 0  # of these, tars that this run read
    turned: int = 0  # images of these that EXIF turned
    without: dict[str, int] = field(default_factory=lambda: {"split": 0, "patient": 0})


Progress = Callable[[Sequence[str]], Iterable[str]]


def index_tars(urls: Sequence[str], dataset: Dataset, description: Description, progress: Progress = iter) -> Summary:
    """Make or bring up to date `dataset`, whose manifests point into the tars at `urls`.

    `urls`: paths or fsspec URLs, with braces ({000..099}) or globs; of a folder, all *.tar in it. An image's key is the
    name of its sample, which must be unique over all tars; its class is said by a .cls, .json or .txt member (as in
    shards.foreign), its split and patient by the .json. What was indexed before and has not changed is not read again.

    Raises:
        BuilderError: no tars or images; a tar that is cut short or damaged, a sample without class, two of one key
            (naming tar and member); a patient in two splits; a name that is taken. What was indexed stays, partial.
    """
    tars = find_tars(urls, dataset.storage)
    inside = f"shards/{dataset.name}/"
    if any(tar.startswith(inside) for tar in tars):
        raise BuilderError(
            f"the tars lie in {dataset.storage.shown(inside)}, where the dataset '{dataset.name}' would have its own",
            "choose another --name: `builder rm` would remove them",
        )
    with exclusive(dataset):
        sweep_leftovers(dataset)
        info = _continued(dataset, _info(urls, dataset, description))
        waiting = _not_indexed(dataset, tars)
        summary = Summary(tars=len(tars), read=len(waiting))
        if waiting or not dataset.exists() or dataset.info["state"] != "complete":
            dataset.write_info(info)
            for tar in progress(list(waiting)):
                rows, metadata, turned = read_tar(dataset.storage, tar, description)
                path = manifest_path(dataset.name, waiting[tar])
                write_manifest(dataset.storage, path, to_table(rows, metadata))
                summary.turned += turned
        _vouch_again(dataset, set(tars))
        _check(dataset, summary)
        lineage = _lineage(dataset, summary, description.origin)
        dataset.write_info({**info, "state": "complete", "count": summary.images, "lineage": lineage})
    return summary


# -- which tars -------------------------------------------------------------------------------------------------------


def _not_indexed(dataset: Dataset, tars: Sequence[str]) -> dict[str, int]:
    """The tars to read, each with the number of its manifest: new ones, and those that changed since."""
    numbers, stamps = {}, {}
    for number, metadata in dataset.metadatas():
        tar = metadata[INDEXED]
        numbers[tar] = number
        if metadata.get(PATIENT_KEY, "unknown") == "unknown" or PATIENT_FORMS in metadata:  # else of an earlier version
            stamps[tar] = int(metadata["tar_bytes"]), metadata["tar_stamp"]
    gone = sorted(numbers.keys() - set(tars))
    if gone:
        raise BuilderError(
            f"{gone[0]} was indexed as part of '{dataset.name}', and is not among the tars any more",
            f"`builder rm {dataset.name}`, and index what there is; no tar is removed by that",
        )
    with ThreadPoolExecutor(READERS) as pool:
        now = dict(zip(numbers, pool.map(dataset.storage.stamp, numbers), strict=True))
    free = max(numbers.values(), default=-1) + 1
    for tar in tars:
        if tar not in numbers:
            numbers[tar], free = free, free + 1
    return {tar: numbers[tar] for tar in tars if tar not in now or now[tar] != stamps.get(tar)}


def _vouch_again(dataset: Dataset, tars: set[str]) -> None:
    """Vouch for tars that were indexed before, by another user or version: this user names them now."""
    for number in dataset.shard_numbers():
        metadata = dataset.shard_metadata(number)
        tar = metadata[INDEXED]
        if tar not in tars or is_vouched(tar, metadata.get(VOUCHER)) or not (voucher := vouch(tar)):
            continue
        metadata[VOUCHER] = voucher
        data = dataset.storage.read(manifest_path(dataset.name, number))
        opened = open_parquet(data, name=manifest_name(number))
        table = checked(read_parquet(lambda texts: reopened(opened, data, texts), None), [metadata])  # noqa: B023
        write_manifest(dataset.storage, manifest_path(dataset.name, number), table.replace_schema_metadata(metadata))


def _info(urls: Sequence[str], dataset: Dataset, description: Description) -> dict[str, Any]:
    info = foreign_info(dataset.name, description.classes, description.origin, {"indexed_from": list(urls)})
    decides = {"classes": info["classes"], "origin": description.origin, "split": description.split}
    licence = {"base": None, "data": description.licence}
    return {**info, "fingerprint": fingerprint(decides), "config": {"split": description.split}, "licence": licence}


def _continued(dataset: Dataset, info: dict[str, Any]) -> dict[str, Any]:
    """The dataset.json to go on with; BuilderError when the name is taken by anything but this."""
    if not dataset.exists():
        return info
    before = dataset.info
    mine = "indexed_from" in before and not before.get("parent")
    if mine and before["fingerprint"] == info["fingerprint"]:
        return {**before, **info, "created": before["created"]}  # what else it has, of scores, stays
    if mine and not dataset.shard_numbers():  # a first try that failed before any tar was read to its end
        return info
    raise BuilderError(
        f"dataset '{dataset.name}' exists, and was made with other classes, origin or split, or not by index",
        f"choose another --name, or `builder rm {dataset.name}` first",
    )


# -- one tar ----------------------------------------------------------------------------------------------------------


def read_tar(storage: Storage, tar: str, description: Description) -> tuple[list[dict[str, Any]], dict[str, str], int]:
    """Rows of a tar's images in order, the metadata of their manifest, and how many of them EXIF turned.

    The tar is read once, forwards. BuilderError as `index_tars`.
    """
    stamp = storage.stamp(tar)
    if stamp is None:
        raise BuilderError(f"there is no tar {tar} any more", "check the path or the pattern")
    with Hashing(Sequential(storage, tar, 0, stamp[0])) as stream:
        found, said, turned = _members(stream, stamp[0], tar, description.max_pixels)
        digest = stream.finish()
    if not found:
        raise BuilderError(f"{tar} holds no images", f"expected members that end in {', '.join(IMAGES)}")
    rows = [_described(row, said[key], tar, description) for key, row in found.items()]
    metadata = {"tar_sha256": digest, "tar_bytes": str(stamp[0]), "tar_stamp": stamp[1], INDEXED: tar}
    if voucher := vouch(tar):
        metadata[VOUCHER] = voucher
    if any(row["patient"] for row in rows):
        metadata |= _identity(said.values(), description)
    return rows, metadata, turned


def _members(
    stream: io.RawIOBase, size: int, tar: str, max_pixels: int
) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, bytes]], int]:
    """By key: what the pixels say of each image; what members beside it say. And how many images EXIF turned."""
    found: dict[str, dict[str, Any]] = {}
    said: dict[str, dict[str, bytes]] = defaultdict(dict)
    turned, shown = 0, printable(tar)
    try:
        for member in read_members(stream, size):
            key, suffix = split_name(member.name)
            kind, name = suffix.lower(), printable(member.name)
            if key.endswith("/") or not key or kind not in IMAGES + SAYS:
                continue
            if not is_key(key):
                raise BuilderError(
                    f"{shown} has a member '{name}', which cannot be the name of a sample",
                    f"rename it: no '..', no control characters, no / at its beginning, at most {MAX_KEY} bytes",
                )
            if kind in SAYS:
                said[key][kind] = member.read(MAX_TEXT)
                continue
            if key in found:
                raise BuilderError(
                    f"{shown} has two images of the sample '{key}': {found[key]['source']} and {name}",
                    "rename one of them",
                )
            image, is_turned = _image(key, member.read(), f"{name} in {shown}", max_pixels)
            found[key] = {**image, "shard": tar, "offset": member.offset, "size": member.size, "source": name}
            turned += is_turned
    except TarError as error:
        name = printable(error.member) if error.member else "its first member"
        raise BuilderError(f"{shown} cannot be read from {name} on: {error}", "fetch it again") from None
    return found, said, turned


def _image(key: str, payload: bytes, where: str, max_pixels: int) -> tuple[dict[str, Any], bool]:
    """The columns that the pixels give, and whether EXIF turned them (which other readers of tars may not do)."""
    pixels, header = read_foreign(payload, where, max_pixels)
    return image_row(key, "", 0, "", pixels), header.turned


def _described(row: dict[str, Any], said: Mapping[str, bytes], tar: str, description: Description) -> dict[str, Any]:
    """The row with what the members beside the image say of it."""
    where = f"{row['source']} in {tar}"
    phase = class_code(said, description.classes, where)
    told = _json(said, where)
    origin = told.get("origin", description.origin)
    if origin in ("real", "synthetic") and origin != description.origin:
        raise BuilderError(f"{where} says that it is {origin}", f"give --origin {origin}")
    split = description.split if told.get("split") is None else told["split"]
    if split is not None and str(split).lower() not in SPLITS:
        raise BuilderError(f"{where} is of the split '{printable(split, 40)}'", f"the splits are {', '.join(SPLITS)}")
    patient = _patient(told)
    hashed: str | None = None
    if patient is not None:
        hashed = patient.text if _is_hashed(told, patient) else patient.hash(description.find_key())
    return {
        **row, "phase": phase, "label": description.classes.label(phase), "origin": description.origin,
        "split": None if split is None else SPLITS[str(split).lower()], "patient": hashed,
    }  # fmt: skip


def _json(said: Mapping[str, bytes], where: str) -> dict[str, Any]:
    """What the .json member says; nothing where there is none, or it is no table."""
    told = parse_json(said.get(".json", b"{}"), f"the .json beside {where}", remedy="mend it or take it out")
    return told if isinstance(told, dict) else {}


def _patient(told: Mapping[str, Any]) -> Patient | None:
    """The patient as it is written; None where nothing names one."""
    named = (Patient(str(told[name]), INDEX, means) for name, means in PATIENT.items() if told.get(name) is not None)
    return next((patient for patient in named if normalise(patient.text)), None)


def _is_hashed(told: Mapping[str, Any], patient: Patient) -> bool:
    """Whether a member of ours brings the keyed hash of a patient, and not an id."""
    return told.keys() >= OURS and HASHED.fullmatch(patient.text) is not None


def _identity(said: Iterable[Mapping[str, bytes]], description: Description) -> dict[str, str]:
    """What a manifest records of its patients: the key they were hashed with, and the forms of their ids.

    The key is 'unknown' where a member of ours brought a patient that was hashed before.
    """
    patients = []
    for told in (_json(members, "") for members in said):
        if patient := _patient(told):
            if _is_hashed(told, patient):
                return {PATIENT_KEY: "unknown"}
            patients.append(patient)
    lineage = lineage_of(description.find_key(), patients)
    return {PATIENT_KEY: lineage["key_fingerprint"], PATIENT_FORMS: json.dumps(lineage["patient_forms"])}


# -- all of them ------------------------------------------------------------------------------------------------------


def _check(dataset: Dataset, summary: Summary) -> None:
    """What only all tars together show: a key that stands twice, a patient in two splits. Counts into the summary."""
    keys = Keys()
    for number, table in dataset.tables(("key", "split", "patient")):
        keys.add(number, table["key"])
        summary.images += table.num_rows
        for name in summary.without:
            summary.without[name] += table[name].null_count
    for key, (first, second) in keys.doubled(dataset):
        tars = " and ".join(dataset.shard_metadata(number)[INDEXED] for number in (first, second))
        raise BuilderError(
            f"the sample '{key}' stands in {tars}",
            "rename it in one of them, or index these tars as datasets of their own (--name)",
        )
    pairs = dataset.table(("patient", "split")).filter(pc.field("patient").is_valid())
    places = pairs.group_by("patient").aggregate([("split", "count_distinct")])
    astray = places.filter(pc.greater(places["split_count_distinct"], 1))["patient"].to_pylist()
    if astray:
        raise BuilderError(
            f"{len(astray)} patients stand in more than one split, such as {min(astray)} (its keyed hash)",
            "mend `split` in their .json members: a classifier would be judged on patients that it learnt from",
        )


def _forms(metadata: Mapping[str, str]) -> list[str]:
    """The forms of patients that a manifest's metadata lists."""
    forms = parse_json(metadata.get(PATIENT_FORMS, "[]").encode(), f"'{PATIENT_FORMS}' of a manifest")
    return [form for form in forms if isinstance(form, str)] if isinstance(forms, list) else []


def _lineage(dataset: Dataset, summary: Summary, origin: str) -> dict[str, Any]:
    """As dataset.json has it: known of real images that all have a patient, hashed with one known key."""
    metadatas = [metadata for _, metadata in dataset.metadatas() if PATIENT_KEY in metadata]
    keys = {metadata[PATIENT_KEY] for metadata in metadatas}
    if len(keys) > 1:
        raise BuilderError(
            f"the patients of '{dataset.name}' were hashed with different keys: {', '.join(sorted(keys))}",
            f"`builder rm {dataset.name}`, and index the tars with one key (--key-file)",
        )
    key = next(iter(keys - {"unknown"}), None)
    known = origin == "real" and key is not None and not summary.without["patient"]
    forms: set[str] = set().union(*(_forms(metadata) for metadata in metadatas))
    source = INDEX if key is not None else None
    return {
        "known": known, "key_fingerprint": key, "patients": [], "patient_source": source,
        "patient_forms": sorted(forms),
    }  # fmt: skip

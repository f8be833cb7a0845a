"""Judge the images of a dataset by what its manifests say, and write the accepted as a new dataset."""

from __future__ import annotations

import datetime
import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from builder.errors import BuilderError
from builder.shards.criteria import Criteria, Facts, Judgement, judge_facts
from builder.shards.dataset import REJECTS, Dataset
from builder.shards.lock import exclusive
from builder.shards.schema import SCORE_VERSIONS, STAMP
from builder.shards.whole import all_or_nothing
from builder.shards.writer import (
    IMAGES_PER_SHARD,
    INDEXED,
    Sample,
    encode_png,
    manifest_name,
    manifest_path,
    write_manifest,
    write_shards,
)

PLACE = ("shard", "offset", "size")
PNG_START, PNG_END = b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"
FEW = 8  # where less than this fraction of a tar's bytes is copied, its images are checked one by one
HISTORY = ("inputs", "summary", "adopted_from", "indexed_from")  # of dataset.json: of the source, not of the target


def judge_dataset(dataset: Dataset, criteria: Criteria) -> Judgement:
    """The verdict over every image of `dataset`, in the order of its manifests; reads the columns needed, and no image.

    BuilderError when a score that is asked for was never computed, or the scores are of several versions.
    """
    reader, parts, versions = Facts(criteria), [], set()
    for _, table in dataset.tables(reader.columns):
        versions.add((table.schema.metadata or {}).get(STAMP.encode()))
        parts.append(reader.of(table))
    if not parts:
        raise BuilderError(f"dataset '{dataset.name}' has no shards yet", "run the command that makes it to its end")
    if len(versions) > 1:
        raise BuilderError(
            f"the scores of '{dataset.name}' are of {len(versions)} versions: scoring it was interrupted",
            f"run `builder score {dataset.name} --against REAL` again to finish it",
        )
    facts = pa.concat_tables(parts)
    _require_scores(dataset, facts, criteria)
    return judge_facts(facts, criteria)


def filter_dataset(
    dataset: Dataset, criteria: Criteria, judgement: Judgement, target: Dataset, *, view: bool = False,
    write_beside: Callable[[], object] | None = None,
) -> bool:  # fmt: skip
    """Write what the judgement of `dataset` accepts as `target`, and the rest to its rejects, with the reasons.

    A view's manifests point into the source's tars; otherwise the images are repacked, byte for byte, into full
    shards, and what is copied is checked first (see `_Payloads`). The source is never touched. dataset.json says
    complete only when all else is there. Killed, the target stays partial, and the next run makes it anew; where it
    fails, nothing of it is kept.

    Args:
        dataset: The source.
        criteria: What was judged by; recorded.
        judgement: Of the images of `dataset`, in their order.
        target: The dataset to make.
        view: Write manifests alone.
        write_beside: Writes what belongs beside the manifests of `target`: the reference of its scores.

    Returns:
        Whether it was written; False: it was there already, made by the same filter.

    Raises:
        BuilderError: `target` is another dataset's name, or another process is writing it; an image or a tar of the
            source is damaged.
    """
    with exclusive(target):
        if already_filtered(dataset, criteria, target, view=view):
            return False
        with all_or_nothing(target):
            _write(dataset, criteria, judgement, target, view, write_beside)
    return True


def _write(
    dataset: Dataset, criteria: Criteria, judgement: Judgement, target: Dataset, view: bool,
    write_beside: Callable[[], object] | None,
) -> None:  # fmt: skip
    info = _begin(dataset, criteria, target, view=view)
    judged = _judged(dataset, judgement, target)
    if view:
        _write_view(judged, target)
    else:
        per_shard = info.get("config", {}).get("shards", {}).get("images_per_shard", IMAGES_PER_SHARD)
        of_source = dataset.shard_metadata(dataset.shard_numbers()[0])
        metadata = {name: of_source[name] for name in (STAMP, SCORE_VERSIONS) if name in of_source}
        write_shards(target.storage, target.name, _samples(judged, dataset), per_shard, metadata)
    if write_beside is not None:
        write_beside()
    count = int(judgement.accepted.sum())
    rejected = len(judgement.accepted) - count
    target.write_info({**info, "state": "complete", "count": count, "rejected": rejected})


def already_filtered(dataset: Dataset, criteria: Criteria, target: Dataset, *, view: bool) -> bool:
    """Whether `target` is just this; BuilderError when it is something else, finished or not.

    What an interrupted run of any filter over `dataset` left may be made anew.
    """
    if target.name == dataset.name:
        raise BuilderError(f"the filtered dataset cannot be '{dataset.name}' itself", "choose another --name")
    if not target.exists():
        return False
    info, source = target.info, dataset.info
    ours = info.get("parent") == dataset.name and "filter" in info
    if ours and info["state"] != "complete":
        return False
    same = info.get("filter") == criteria.to_json() and info.get("view") == view
    unchanged = info.get("parent_created") == source.get("created") and info.get("parent_count") == source.get("count")
    if ours and same and unchanged and info.get("scores") == source.get("scores"):
        return True
    raise BuilderError(
        f"dataset '{target.name}' exists and was made with other settings",
        f"choose another --name, or `builder rm {target.name}` first",
    )


def _require_scores(dataset: Dataset, facts: pa.Table, criteria: Criteria) -> None:
    """Refuse scores that were never computed; some images may lack one (they are turned away for it)."""
    for name in criteria.scores:
        if name != "duplicate_score" and facts[name].null_count == facts.num_rows:
            why = dataset.info.get("scores", {}).get("missing", {}).get(name)
            raise BuilderError(
                f"the score '{name}' of '{dataset.name}' was not computed" + (f": {why}" if why else ""),
                f"choose another score, or run `builder score {dataset.name} --against REAL`",
            )
    if criteria.no_duplicates:
        # The first image of a phase has no earlier one to be compared with.
        searched = facts.filter(facts["duplicate_score"].is_valid())["phase"].value_counts()
        counts = {entry["values"]: entry["counts"] for entry in searched.to_pylist()}
        for entry in facts["phase"].value_counts().to_pylist():
            if entry["counts"] - counts.get(entry["values"], 0) > 1:
                raise BuilderError(
                    f"duplicates were never looked for among the images of phase {entry['values']} in '{dataset.name}'",
                    f"run `builder score {dataset.name} --against REAL`, or filter without --no-duplicates",
                )


def _begin(dataset: Dataset, criteria: Criteria, target: Dataset, *, view: bool) -> dict[str, Any]:
    source = dataset.info
    info = {
        **{key: value for key, value in source.items() if key not in HISTORY},
        "name": target.name,
        "state": "partial",
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "parent": dataset.name,
        "parent_created": source.get("created"),
        "parent_count": source.get("count"),
        "filter": criteria.to_json(),
        "view": view,
    }
    target.write_info(info)
    return info


def _judged(dataset: Dataset, judgement: Judgement, target: Dataset) -> Iterator[tuple[int, pa.Table]]:
    """Number and accepted rows of each shard; the others are written to the target's rejects."""
    start = 0
    for number, table in dataset.tables():
        accepted = judgement.accepted[start : start + table.num_rows]
        if len(accepted) < table.num_rows:
            raise BuilderError(f"dataset '{dataset.name}' grew while it was filtered", "filter it again")
        if not accepted.all():
            rows = start + np.flatnonzero(~accepted)
            reasons = ["; ".join(said) for said in judgement.reasons_of(rows)]
            turned_away = table.filter(pa.array(~accepted)).append_column("reason", pa.array(reasons))
            path = f"manifests/{target.name}/{REJECTS}/{manifest_name(number)}"
            write_manifest(target.storage, path, turned_away)
        yield number, table.filter(pa.array(accepted))
        start += table.num_rows


def _write_view(judged: Iterable[tuple[int, pa.Table]], target: Dataset) -> None:
    for number, accepted in judged:
        if accepted.num_rows:
            write_manifest(target.storage, manifest_path(target.name, number), accepted)


def _samples(judged: Iterable[tuple[int, pa.Table]], dataset: Dataset) -> Iterator[Sample]:
    """The accepted images with their payloads, byte for byte; those of indexed tars in our codec, pixel for pixel."""
    for _, accepted in judged:
        metadata = {key.decode(): value.decode() for key, value in (accepted.schema.metadata or {}).items()}
        rows = accepted.to_pylist()
        payloads = None if INDEXED in metadata else _Payloads(dataset, rows, metadata)
        for row in rows:
            payload = encode_png(dataset.pixels(row)) if payloads is None else payloads.of(row)
            yield Sample({name: value for name, value in row.items() if name not in PLACE}, payload)


class _Payloads:
    """The encoded images of a manifest's rows, of which none is handed on unless it is as it was committed.

    A tar whose SHA-256 is the one that its manifest records holds the bytes that were committed, and each image of
    those had been decoded, or just been encoded, when its row was written. So where many of a tar's images are copied,
    the tar is read once, hashed, and cut up; that each piece begins and ends as a PNG does then shows that the row
    means one of its images. Where only few are copied, these are decoded, and their pixels compared with the row:
    that reads less.
    """

    def __init__(self, dataset: Dataset, rows: Sequence[Mapping[str, Any]], metadata: Mapping[str, str]) -> None:
        self._dataset, self._metadata = dataset, metadata
        self._copied: Counter[str] = Counter()  # bytes, by tar
        for row in rows:
            self._copied[row["shard"]] += row["size"]
        self._tars: dict[str, bytes | None] = {}  # None: it is not read as a whole

    def of(self, row: dict[str, Any]) -> bytes:
        """BuilderError when the image, or its tar, is missing or damaged."""
        path = row["shard"]
        if path not in self._tars:
            self._tars[path] = self._read(path)
        tar = self._tars[path]
        if tar is None:
            return self._dataset.checked_payload(row)
        payload = tar[row["offset"] : row["offset"] + row["size"]]
        if not (payload.startswith(PNG_START) and payload.endswith(PNG_END)):
            raise self._damaged(f"at the place of {row['key']} in {path} there is no image")
        return payload

    def _read(self, path: str) -> bytes | None:
        recorded, size = self._metadata.get("tar_sha256"), self._metadata.get("tar_bytes")
        if recorded is None or size is None or self._copied[path] * FEW < int(size):
            return None
        try:
            tar = self._dataset.storage.read(path)
        except OSError as error:
            raise self._damaged(f"{path} cannot be read: {error.strerror or error}") from None
        if hashlib.sha256(tar).hexdigest() != recorded:
            raise self._damaged(f"{path} is damaged: its SHA-256 is not the one that its manifest records")
        return tar

    def _damaged(self, what: str) -> BuilderError:
        return BuilderError(what, f"run `builder verify {self._dataset.name}`, which says what to do")

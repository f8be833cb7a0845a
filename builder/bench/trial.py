"""What the doctor sees when images are drawn: the old guide's five criteria, each a finding.

Loads without errors (see findings); images of every phase; seconds an image against 10; not flat and not stock-like by
the scores; no out-of-memory. Each takes what was measured, so that it can be judged without a model.
"""

from __future__ import annotations

import dataclasses
import resource
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from builder.bench.findings import GB, Finding
from builder.errors import BuilderError
from builder.quality.gates import Gates

if TYPE_CHECKING:
    from builder.job.spec import JobSpec
    from builder.quality.reference import Reference

MOST_SECONDS = 10.0  # an image: the old system's limit
LEAST_SHARE = 0.5  # of the images that must pass a kind of gate
FLAT = ("sharpness", "contrast", "clipped", "noise", "chroma_noise")
STOCK = ("realism", "phase_probability")  # like nothing among the crops, or not like those of the phase
QUICK, FULL = 4, 100  # images of a phase

Rows = Sequence[Mapping[str, Any]]


def every_phase(rows: Rows, codes: Sequence[str]) -> Finding:
    counts = Counter(row["phase"] for row in rows)
    said = "images: " + ", ".join(f"{code} {counts[code]}" for code in codes)
    missing = [code for code in codes if not counts[code]]
    if missing:
        return Finding("phases", said, f"no image of {', '.join(missing)} came out: see the findings beside this one")
    return Finding("phases", said)


def fast_enough(rows: Rows, batch_size: int, device: str) -> Finding:
    """Seconds an image by the clock of its batch, as the manifest has it."""
    seconds = sorted(row["seconds"] for row in rows)[len(rows) // 2]
    said = f"{seconds:.2f} s an image to draw (limit: {MOST_SECONDS:g})"
    if seconds <= MOST_SECONDS:
        return Finding("speed", said)
    remedy = (
        "draw on a GPU" if torch.device(device).type == "cpu" else
        f"try a batch size (now {batch_size}): `builder estimate --count 1 --probe-batch`, or --preset fast"
    )  # fmt: skip
    return Finding("speed", said, f"{remedy}; `builder bench generate` says where the time goes")


def not_flat(rows: Rows, gates: Mapping[str, Gates]) -> Finding:
    remedy = (
        "look at them (`builder sheet`): an unfinished training, another autoencoder than that of the weights, or a "
        "size other than trained at looks like this"
    )
    return _gated("not flat", rows, gates, FLAT, remedy)


def not_stock(rows: Rows, gates: Mapping[str, Gates]) -> Finding:
    remedy = (
        "the model answers from pretraining, not from the crops: minimal prompts as trained with, guidance 3-5, no "
        "perceptual loss, and the fine-tuned checkpoint, not its base"
    )
    return _gated("not stock-like", rows, gates, STOCK, remedy)


def _gated(name: str, rows: Rows, gates: Mapping[str, Gates], scores: Sequence[str], remedy: str) -> Finding:
    """The share of images within the gates of these scores, by phase; where one has none, it says nothing."""
    known = {code: {score: limits[score] for score in scores if score in limits} for code, limits in gates.items()}
    passed: dict[str, list[bool]] = {}
    for row in rows:
        own = known.get(row["phase"])
        if own:
            inside = all(_within(row.get(score), *limits) for score, limits in own.items())
            passed.setdefault(row["phase"], []).append(inside)
    if not passed:
        return Finding(name, f"not judged: real crops give no gate of {', '.join(scores)}")
    shares = {code: sum(each) / len(each) for code, each in passed.items()}
    said = "within the gates of real crops: " + ", ".join(f"{code} {share:.0%}" for code, share in shares.items())
    low = [code for code, share in shares.items() if share < LEAST_SHARE]
    return Finding(name, said, f"{', '.join(low)}: {remedy}" if low else "")


def _within(value: float | None, low: float | None, high: float | None) -> bool:
    return value is not None and (low is None or value >= low) and (high is None or value <= high)


def enough_memory(rows: Rows, peak: int | None) -> Finding:
    """Whether batches went through the networks whole. peak: bytes at most in use."""
    said = "peak memory not known" if peak is None else f"{peak / GB:.2f} GB at most"
    halved = [row["micro_batch"] for row in rows if row["micro_batch"]]
    if not halved:
        return Finding("out of memory", f"none; {said}")
    fits = min(halved)
    return Finding(
        "out of memory",
        f"{len(halved)} of {len(rows)} images were drawn in parts of {fits}, for want of memory; {said}",
        f"set sample.batch_size to {fits}: as fast, and the same pixels on every machine",
    )


def peak_memory(device: str) -> int | None:
    """Bytes at most in use so far: on the GPU, or of this process."""
    if torch.device(device).type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


def draw(spec: JobSpec, reference: Reference, per_phase: int, device: str) -> tuple[list[dict[str, Any]], Finding]:
    """`per_phase` images of each phase by a worker of the job, under `spec.out`: their rows, and whether that worked.

    It is the job itself, all scores and the commit included. What a BuilderError says is the finding.
    """
    from builder.bench.stages import IDLE, STAGES, measure_unit
    from builder.job.plan import Unit
    from builder.job.worker import Worker
    from builder.quality.reference import save_reference
    from builder.shards.dataset import Dataset
    from builder.shards.storage import Storage

    dataset = Dataset(spec.name, Storage(spec.out))
    save_reference(dataset, reference)
    count = _positions(spec, per_phase)
    try:
        stages = measure_unit(Worker(spec, device), Unit(0, 0, count))
    except BuilderError as error:
        return [], Finding("draws", error.what, error.remedy or "see `builder doctor` without --quick")
    spent = ", ".join(f"{stage} {stages.share(stage):.0%}" for stage in (*STAGES, IDLE))
    said = f"{count} images drawn, scored, written and read back; where the time went: {spent}"
    return dataset.table().to_pylist(), Finding("draws", said)


def _positions(spec: JobSpec, per_phase: int) -> int:
    """How far to go in the plan until each phase has so many images."""
    count = per_phase * len(spec.plan.codes)
    while min(spec.plan.counts(count).values()) < per_phase:
        count += 1
    return count


def goes_on(spec: JobSpec, reference: Reference, lineage: Mapping[str, Any]) -> list[Finding]:
    """Of what `draw` left under `spec.out`: whether verify, the gates' filter and mixing with real crops take it."""
    from builder.mixing import MixedLoader
    from builder.quality.gates import gate_ranges
    from builder.shards.criteria import Criteria
    from builder.shards.dataset import Dataset, find_dataset
    from builder.shards.filter import filter_dataset, judge_dataset
    from builder.shards.storage import Storage
    from builder.shards.verify import verify_dataset

    dataset = Dataset(spec.name, Storage(spec.out))
    real = find_dataset(spec.real, spec.real_out)
    count = dataset.table(["key"]).num_rows
    dataset.write_info(
        {
            "name": spec.name, "state": "complete", "origin": "synthetic", "created": "", "parent": None,
            "classes": spec.config.classes.to_json(), "config": spec.config.to_json(), "count": count,
            "lineage": dict(lineage), "licence": {"base": None, "data": None},
        }
    )  # fmt: skip
    wrong = verify_dataset(dataset)
    findings = [
        Finding("verify", f"{len(wrong)} findings: {wrong[0]}", "the disk or its file system is not sound")
        if wrong else Finding("verify", f"{count} images, all as their manifest says")
    ]  # fmt: skip
    criteria = Criteria(gates=tuple(gate_ranges(reference.gates)))
    judgement = judge_dataset(dataset, criteria)
    kept = int(judgement.accepted.sum())
    if not kept:
        return [*findings, Finding("filter", "no image passes the gates", "see 'not flat' and 'not stock-like'")]
    target = Dataset(f"{spec.name}-accepted", dataset.storage)
    filter_dataset(dataset, criteria, judgement, target)
    findings.append(Finding("filter", f"{kept} of {count} images pass the gates"))
    try:
        images, labels, origin = next(
            iter(MixedLoader(real, target, ratio=0.5, batch_size=min(8, 2 * kept), size=spec.config.sample.size,
                             allow_leak=spec.config.allow_leak or None))
        )  # fmt: skip
    except BuilderError as error:
        return [*findings, Finding("mixing", error.what, error.remedy or "see `builder shards`")]
    said = f"a batch of {len(images)}: {int(origin.sum())} synthetic, labels {sorted(set(labels.tolist()))}"
    return [*findings, Finding("mixing", said)]


def of_trial(rows: Rows, reference: Reference, spec: JobSpec, device: str) -> list[Finding]:
    """The findings on what was drawn."""
    return [
        every_phase(rows, spec.plan.codes),
        fast_enough(rows, spec.config.sample.batch_size, device),
        not_flat(rows, reference.gates),
        not_stock(rows, reference.gates),
        enough_memory(rows, peak_memory(device)),
    ]


def placed(spec: JobSpec, folder: Path) -> JobSpec:
    """The job with its output in `folder`."""
    return dataclasses.replace(spec, name="doctor", out=str(folder))

"""The same few people in datasets of every kind: packed by a column, a pattern or the photograph, or indexed."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from builder.crops.pack import PackRequest, pack
from builder.identity import PatientKey
from builder.models.checkpoint import Lineage
from builder.phases import HEALING_PHASES
from builder.shards.dataset import Dataset
from builder.shards.inplace import Description, index_tars
from builder.shards.storage import Storage
from builder.shards.writer import Sample, encode_png, image_row, write_shard

PHASES = "IPR"  # every person has one photograph of each
KINDS = ("column", "pattern", "photograph", "index")
PATTERN = r"^(.+)_[IPR]\.png$"


def packed(
    root: Path,
    name: str,
    names: Sequence[str],
    key: PatientKey,
    *,
    ids: Sequence[str] = (),
    group_by: str | None = None,
    per_shard: int = 200,
) -> Dataset:
    """Pack photographs NAME_PHASE.png, the person's `ids` in a column where they are given."""
    folder, table = root / f"{name}-photographs", root / f"{name}.csv"
    folder.mkdir(parents=True)
    lines = ["file,label,patient" if ids else "file,label"]
    for number, person in enumerate(names):
        for place, phase in enumerate(PHASES):
            pixels = np.random.default_rng([number, place]).integers(0, 256, (16, 16, 3), np.uint8)
            Image.fromarray(pixels).save(folder / f"{person}_{phase}.png")
            cell = ',"' + ids[number].replace('"', '""') + '"' if ids else ""
            lines.append(f'"{person}_{phase}.png",{phase}{cell}')
    table.write_text("\n".join(lines), encoding="utf-8")
    dataset = Dataset(name, Storage(root))
    request = PackRequest(
        folder, labels=table, without_box="whole", group_by=group_by, key=key.secret, images_per_shard=per_shard
    )
    pack(request, dataset, progress=False)
    return dataset


def indexed(root: Path, name: str, ids: Sequence[str], key: PatientKey) -> Dataset:
    """A tar of somebody's, with the patient in the .json members; two of three people are held out."""
    with tarfile.open(root / f"{name}.tar", "w") as tar:
        for number, text in enumerate(ids):
            for phase in PHASES:
                pixels = io.BytesIO()
                Image.new("RGB", (16, 16), (number, 0, 0)).save(pixels, "PNG")
                split = ("train", "val", "test")[number % 3]
                told = json.dumps({"phase": phase, "patient": text, "split": split}).encode()
                for suffix, data in ((".png", pixels.getvalue()), (".json", told)):
                    member = tarfile.TarInfo(f"{number:03d}_{phase}{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    dataset = Dataset(name, Storage(root))
    index_tars([str(root / f"{name}.tar")], dataset, Description(HEALING_PHASES, "real", None, lambda: key))
    return dataset


def of_kind(kind: str, root: Path, name: str, ids: Sequence[str], key: PatientKey) -> Dataset:
    """The people with these ids: in a column, in the names of the photographs, or in members of a tar."""
    if kind == "column":
        return packed(root, name, [f"photo{number}" for number in range(len(ids))], key, ids=ids)
    if kind == "index":
        return indexed(root, name, ids, key)
    names = [text.strip() for text in ids]  # no table can name a file with spaces around it
    return packed(root, name, names, key, group_by=PATTERN if kind == "pattern" else "photograph")


def lineage_from(real: Dataset, splits: Sequence[str] = ("train", "val", "test")) -> Lineage:
    """Of a generator that was trained on these splits of a dataset."""
    from builder.training.start import join_lineage  # with torch

    rows = real.table(("patient", "split")).to_pylist()
    return join_lineage(real.info["lineage"], sorted({row["patient"] for row in rows if row["split"] in splits}), None)


def synthetic(root: Path, name: str, lineage: Lineage) -> Dataset:
    """A synthetic dataset of a generator with this lineage: one crop of each phase."""
    samples = []
    for phase in PHASES:
        pixels = np.full((16, 16, 3), 128, np.uint8)
        row = image_row(f"{name}-{phase}-00000000", phase, HEALING_PHASES.label(phase), "synthetic", pixels)
        samples.append(Sample(row, encode_png(pixels)))
    dataset = Dataset(name, Storage(root))
    write_shard(dataset.storage, name, 0, samples)
    info = {"name": name, "state": "complete", "origin": "synthetic", "count": len(samples), "config": {}}
    dataset.write_info({**info, "classes": HEALING_PHASES.to_json(), "lineage": vars(lineage), "parent": None})
    return dataset

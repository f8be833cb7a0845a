"""The doors through which pictures come in: each puts pictures through the product's own code, one class a picture."""

from __future__ import annotations

import io
import itertools
import tarfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from builder.crops.pack import PackRequest, pack
from builder.mixing.sources import Source
from builder.mixing.stream import StreamSamples
from builder.phases import ClassTable, Phase
from builder.quality.sheet import CELL, HEADING_HEIGHT, LINE, MARGIN, TEXT_LINES, TITLE_HEIGHT, contact_sheet
from builder.quality.sheet import GAP as SHEET_GAP
from builder.shards.dataset import Dataset
from builder.shards.foreign import adopt
from builder.shards.inplace import Description, index_tars
from builder.shards.storage import Storage

Pictures = Mapping[str, bytes]  # name -> encoded picture; at most 64
Pixels = dict[str, np.ndarray]
SECRET = b"sixteen bytes of a test"


def table(names: Pictures) -> ClassTable:
    return ClassTable([Phase(f"K{number}", name, "a picture") for number, name in enumerate(names)])


def by_pack(folder: Path, pictures: Pictures, suffix: str = ".png") -> Pixels:
    """`builder pack`, the middle of each photograph, which is all of a square."""
    classes = table(pictures)
    photographs = tree(folder / "photographs", classes, pictures, suffix)
    request = PackRequest(photographs, classes=classes, without_box="whole", group_by="photograph", key=SECRET)
    packed = Dataset("packed", Storage(folder))
    pack(request, packed, progress=False)
    return _pixels(packed)


def by_score_of_a_folder(folder: Path, pictures: Pictures, suffix: str = ".png") -> Pixels:
    classes = table(pictures)
    source = tree(folder / "tree", classes, pictures, suffix)
    return _pixels(adopt(str(source), "tree", Storage(folder), classes))


def by_score_of_a_tar(folder: Path, pictures: Pictures, suffix: str = ".png") -> Pixels:
    tar = _tar(folder / "theirs.tar", pictures, suffix)
    return _pixels(adopt(str(tar), "tar", Storage(folder), table(pictures)))


def indexed(folder: Path, pictures: Pictures, suffix: str = ".png") -> Dataset:
    """`builder index`."""
    tar = _tar(folder / "indexed-theirs.tar", pictures, suffix)
    dataset = Dataset("indexed", Storage(folder))
    description = Description(table(pictures), "real", None, lambda: _no_patients())
    index_tars([str(tar)], dataset, description)
    return dataset


def by_index(folder: Path, pictures: Pictures, suffix: str = ".png") -> Pixels:
    return _pixels(indexed(folder, pictures, suffix))


def by_loader(dataset: Dataset) -> Pixels:
    source = Source(dataset)
    codes = dataset.classes.codes
    return {codes[source.labels[row]]: source.pixels(row, None) for row in range(len(source))}


def by_stream(dataset: Dataset) -> Pixels:
    source = Source(dataset)
    codes = dataset.classes.codes
    samples = itertools.islice(StreamSamples(source), len(source))
    return {codes[sample["cls"]]: sample["image"] for sample in samples}


def by_sheet(dataset: Dataset, out: Path) -> Pixels:
    """The contact sheet's cells: of each class one row, whose first cell is its picture."""
    from PIL import Image

    contact_sheet(dataset, out, per_phase=1)
    with Image.open(out) as image:
        sheet = np.asarray(image)
    height = HEADING_HEIGHT + CELL + TEXT_LINES * LINE + SHEET_GAP * 2
    tops = {code: TITLE_HEIGHT + number * height + HEADING_HEIGHT for number, code in enumerate(dataset.classes.codes)}
    return {code: sheet[top : top + CELL, MARGIN : MARGIN + CELL] for code, top in tops.items()}


def _pixels(dataset: Dataset) -> Pixels:
    return {row["phase"]: pixels for row, pixels in dataset.images()}


def tree(root: Path, classes: ClassTable, pictures: Pictures, suffix: str) -> Path:
    for code, picture in zip(classes.codes, pictures.values(), strict=True):
        (root / code).mkdir(parents=True)
        (root / code / f"picture{code}{suffix}").write_bytes(picture)
    return root


def _tar(path: Path, pictures: Pictures, suffix: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for label, picture in enumerate(pictures.values()):
            for name, payload in ((f"{label}{suffix}", picture), (f"{label}.cls", str(label).encode())):
                member = tarfile.TarInfo(name)
                member.size = len(payload)
                tar.addfile(member, io.BytesIO(payload))
    return path


def _no_patients() -> object:
    raise AssertionError("no picture names a patient")

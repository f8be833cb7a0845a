"""The packed dataset `base`: crops of very many rendered patients, without phases, for a generator to be pretrained on.

What SDXL is to a clinic's crops, the base is to the phantom's: a model that has seen many wounds and no label.
"""

from __future__ import annotations

import io
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from typing import Any

import numpy as np
import PIL
from PIL import Image

from builder import __version__
from builder.config import fingerprint, load_config
from builder.crops.cut import cut
from builder.demo.patients import ANGLES, make_patient
from builder.demo.phantom import JPEG_QUALITY, render_photograph
from builder.identity import PatientKey
from builder.phases import ClassTable, Phase
from builder.progress import progress
from builder.shards.dataset import Dataset
from builder.shards.lock import exclusive
from builder.shards.storage import Storage
from builder.shards.whole import all_or_nothing
from builder.shards.writer import Sample, encode_png, image_row, write_shards

BASE = "base"
BASE_PATIENTS = 3000  # about 42,000 crops
BASE_SEED = 1_000_000  # phantoms are of seeds below it, so that no patient stands in both
VALIDATION_SHARE = 0.03  # of the patients, the last ones: what a training is watched on
KEY = b"phantom"  # as the phantom's: nobody's secret
LICENCE = "phantom, CC0"


def ensure_base(root: str, name: str = BASE, patients: int = BASE_PATIENTS, workers: int = 2) -> Dataset:
    """The dataset `base` under an output root, rendered unless it is there and complete.

    Crops are cut as `builder pack` cuts them, with its default margin; each photograph goes through JPEG first.
    Patient k is the same whatever `patients` and `workers` are. A run that was killed is begun anew.

    Args:
        root: output root, a folder or a URL.
        name: of the dataset.
        patients: how many to render; about 14 crops each. Counts only when the dataset is made.
        workers: processes that render, 1 or more.

    Returns:
        The complete dataset. Its one class is that of configs/base.yaml.
    """
    dataset = Dataset(name, Storage(root))
    if dataset.exists() and dataset.info["state"] == "complete":
        return dataset
    dataset.storage.require_writable()
    config = load_config(BASE)
    (only,) = config.classes
    with exclusive(dataset), all_or_nothing(dataset):
        info = _info(name, config.classes, patients)
        dataset.write_info({**info, "state": "partial", "count": 0})
        samples = _Counted(_samples(name, only, config.classes, patients, workers))
        write_shards(dataset.storage, name, samples, config.shards.images_per_shard)
        dataset.write_info({**info, "state": "complete", "count": samples.count})
    return dataset


class _Counted:
    """Samples, counted as they pass."""

    def __init__(self, samples: Iterator[Sample]) -> None:
        self.samples, self.count = samples, 0

    def __iter__(self) -> Iterator[Sample]:
        for sample in self.samples:
            self.count += 1
            yield sample


def _samples(name: str, only: Phase, classes: ClassTable, patients: int, workers: int) -> Iterator[Sample]:
    key = PatientKey(KEY, "the phantom's")
    first_validation = patients + 1 - max(1, round(patients * VALIDATION_SHARE))
    numbers = progress(_rendered(range(1, patients + 1), workers), f"render {name}", "patient", patients)
    index = 0
    for number, crops in numbers:
        patient = key.hash(f"{BASE}-{number}")
        split = "val" if number >= first_validation else "train"
        for photograph, payload, box, side in crops:
            pixels = np.asarray(Image.open(io.BytesIO(payload)))
            row = {
                **image_row(f"{name}-{only.code}-{index:08d}", only.code, classes.label(only.code), "real", pixels),
                "patient": patient,
                "split": split,
                "source": key.hash(f"{BASE}-{number}-{photograph}"),
                "box": list(box),
                "original_size": [side, side],
            }
            index += 1
            yield Sample(row, payload)


_Crops = list[tuple[str, bytes, tuple[float, ...], int]]  # photograph, PNG, box in the crop, side at the photograph


def _rendered(numbers: range, workers: int) -> Iterator[tuple[int, _Crops]]:
    if workers <= 1:
        yield from map(_render, numbers)
        return
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(_render, numbers, chunksize=4)


def _render(number: int) -> tuple[int, _Crops]:
    """The crops of one patient, from all visits and angles."""
    patient = make_patient(number, BASE_SEED)
    crops: _Crops = []
    for visit in range(patient.visits):
        for angle in ANGLES:
            photograph = render_photograph(patient, visit, angle)
            buffer = io.BytesIO()
            Image.fromarray(photograph.pixels).save(buffer, "JPEG", quality=JPEG_QUALITY)
            image = Image.open(buffer).convert("RGB")
            for box in photograph.boxes:
                edges = (float(box.xmin), float(box.ymin), float(box.xmax), float(box.ymax))
                crop = cut(image, edges, margin=0.15, max_size=512)
                assert crop.box is not None
                crops.append((f"{visit}-{angle}", encode_png(crop.pixels), crop.box, crop.original_size[0]))
    return number, crops


def _info(name: str, classes: ClassTable, patients: int) -> dict[str, Any]:
    inputs = {"renderer": "phantom", "seed": BASE_SEED, "patients": patients}
    key = PatientKey(KEY, "the phantom's")
    return {
        "name": name,
        "origin": "real",
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "classes": classes.to_json(),
        "config": {"name": BASE},
        "group_by": "patient",
        "inputs": inputs,
        "fingerprint": fingerprint(inputs),
        "lineage": {"known": True, "key_fingerprint": key.fingerprint, "patients": []},  # a crop's is in its row
        "parent": None,
        "licence": {"base": None, "data": LICENCE},
        "versions": {"builder": __version__, "pillow": PIL.__version__, "numpy": np.__version__},
    }

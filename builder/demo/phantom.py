"""The phantom: wound photographs whose truth is known, in the files a hospital would hand over."""

import multiprocessing
import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from builder.demo.camera import HEIGHT, WIDTH, develop, stand
from builder.demo.clutter import draw_clutter
from builder.demo.noise import generator
from builder.demo.patients import ANGLES, Patient, make_patient, phase_of
from builder.demo.skin import draw_limb
from builder.demo.stock import restyle, scene_of
from builder.demo.tissue import draw_wound

BOX_COLUMNS = (
    "Filename", "Patient#", "Appt#", "DFU#", "DebriStat", "Camera", "Angle",
    "Bounding Box Number", "Xmin", "Ymin", "Xmax", "Ymax",
)  # fmt: skip
JPEG_QUALITY = 92
LABEL_COLUMNS = ("Filename", "Bounding Box Number", "Phase")


@dataclass(frozen=True)
class WoundBox:
    """One box: pixels (max exclusive), the phase code I, P or R, and the wound's number."""

    xmin: int
    ymin: int
    xmax: int
    ymax: int
    phase: str
    wound: int


@dataclass(frozen=True)
class Photograph:
    """One photograph: `pixels` uint8 (HEIGHT, WIDTH, 3) and the boxes of the wounds on it."""

    pixels: NDArray[np.uint8]
    boxes: list[WoundBox]


@dataclass(frozen=True)
class PhantomSummary:
    """What was written: counts, boxes per phase, and the sizes (longer side, pixels) of all boxes."""

    patients: int
    photographs: int
    phases: dict[str, int]
    box_sizes: list[int]

    @property
    def boxes(self) -> int:
        return sum(self.phases.values())

    def __str__(self) -> str:
        phases = ", ".join(f"{code} {count:,}" for code, count in self.phases.items())
        low, middle, high = np.percentile(self.box_sizes, (5, 50, 95))
        return (
            f"{self.photographs:,} photographs of {self.patients} patients with {self.boxes:,} boxes ({phases}), "
            f"longer side: 5 % {low:.0f}, 50 % {middle:.0f}, 95 % {high:.0f} px"
        )


def render_photograph(patient: Patient, visit: int, angle: str) -> Photograph:
    """The photograph of `patient` at `visit` (from 0) and `angle` (left, middle, right); always the same."""
    visit_rng = generator(*patient.seed, 301, visit)
    rng = generator(*patient.seed, 302, visit, ANGLES.index(angle))
    wounds = [wound for wound in patient.wounds if wound.healing[visit] is not None]
    reach = max(abs(wound.y) + 0.75 * wound.size(visit) for wound in wounds)
    sideways = max(abs(wound.x) + 0.75 * wound.size(visit) for wound in wounds)
    view = stand(rng, angle, free=max(0.0, min(HEIGHT / 2 - reach, WIDTH / 2 - sideways)))
    scene = draw_limb(patient, view, visit_rng, rng)
    boxes = [draw_wound(scene, wound, visit, view) for wound in wounds]
    draw_clutter(scene, boxes, rng)
    lit = scene.albedo * scene.shade[..., None] + scene.gloss[..., None]
    pixels = develop(lit, rng)
    return Photograph(
        pixels,
        [
            WoundBox(*_drawn_by_hand(box, rng), phase_of(healing), wound.number)
            for box, wound in zip(boxes, wounds, strict=True)
            if (healing := wound.healing[visit]) is not None
        ],
    )


def write_photographs(
    out: Path, *, patients: int = 233, seed: int = 0, workers: int = 2, stock: bool = False
) -> PhantomSummary:
    """Writes OUT/photographs/*.jpg, OUT/boxes.csv (the old system's columns) and OUT/labels.csv.

    `stock`: in the styles of picture libraries (builder.demo.stock), labelled PHASE_STYLE, of models named m001 and on.
    Patient k is the same whatever `patients` and `workers` are. The tables come last and each file appears
    whole, so that a run that was killed can simply be run again.
    """
    folder = out / "photographs"
    folder.mkdir(parents=True, exist_ok=True)
    jobs = [(folder, number, seed, stock) for number in range(1, patients + 1)]
    rows: list[tuple[str | int, ...]] = []
    labels: list[tuple[str | int, ...]] = []
    with tqdm(total=patients, desc="phantom", unit="patient") as bar:
        for patient_rows, patient_labels in _map(jobs, workers):
            rows += patient_rows
            labels += patient_labels
            bar.update()
    _write_table(out / "labels.csv", LABEL_COLUMNS, labels)
    _write_table(out / "boxes.csv", BOX_COLUMNS, rows)
    phases = Counter(str(label[2]) for label in labels)
    sizes = [max(int(r[10]) - int(r[8]), int(r[11]) - int(r[9])) for r in rows]
    codes = sorted(phases) if stock else "IPR"
    return PhantomSummary(patients, len({row[0] for row in rows}), {code: phases[code] for code in codes}, sizes)


_Tables = tuple[list[tuple[str | int, ...]], list[tuple[str | int, ...]]]
_Job = tuple[Path, int, int, bool]


def _map(jobs: list[_Job], workers: int) -> Iterator[_Tables]:
    if workers <= 1:
        yield from map(_write_patient, jobs)
        return
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=spawn) as pool:
        yield from pool.map(_write_patient, jobs)


def _write_patient(job: _Job) -> _Tables:
    folder, number, seed, stock = job
    patient = make_patient(number, seed)
    debridement = generator(*patient.seed, 303)
    rows: list[tuple[str | int, ...]] = []
    labels: list[tuple[str | int, ...]] = []
    for visit in range(patient.visits):
        debrided = int(debridement.random() < 0.3)
        for angle in ANGLES:
            photograph = render_photograph(patient, visit, angle)
            if stock:
                photograph = _in_stock(photograph, patient, visit, angle)
            name = f"p{number:03d}_a{visit + 1:02d}_{angle}.jpg"
            buffer = BytesIO()
            Image.fromarray(photograph.pixels).save(buffer, "JPEG", quality=JPEG_QUALITY)
            _write_whole(folder / name, buffer.getvalue())
            for i, box in enumerate(photograph.boxes, start=1):
                place = (box.xmin, box.ymin, box.xmax, box.ymax)
                who = f"m{number:03d}" if stock else number
                rows.append((name, who, visit + 1, box.wound, debrided, "phantom", angle, i, *place))
                labels.append((name, i, box.phase))
    return rows, labels


def _in_stock(photograph: Photograph, patient: Patient, visit: int, angle: str) -> Photograph:
    """The photograph in the style that its place among its patient's decides; each box bears it in its label."""
    number = ANGLES.index(angle)
    scene = scene_of(patient.number, visit, number)
    first = photograph.boxes[0]
    box = (first.xmin, first.ymin, first.xmax, first.ymax)
    pixels = restyle(photograph.pixels, box, scene, (*patient.seed, 304, visit, number))
    return Photograph(pixels, [replace(box, phase=f"{box.phase}_{scene}") for box in photograph.boxes])


def _drawn_by_hand(box: tuple[int, int, int, int], rng: np.random.Generator) -> tuple[int, int, int, int]:
    """The box as an annotator would draw it: a few percent off the truth, inside the photograph."""
    xmin, ymin, xmax, ymax = box
    slack = 0.03 * max(xmax - xmin, ymax - ymin)
    dx0, dy0, dx1, dy1 = np.round(rng.normal(0.3, 0.6, 4) * slack).astype(int)
    return max(0, xmin - dx0), max(0, ymin - dy0), min(WIDTH, xmax + dx1), min(HEIGHT, ymax + dy1)


def _write_table(path: Path, columns: tuple[str, ...], rows: list[tuple[str | int, ...]]) -> None:
    text = "\n".join(",".join(map(str, row)) for row in (columns, *rows)) + "\n"
    _write_whole(path, text.encode())


def _write_whole(path: Path, data: bytes) -> None:
    part = path.with_name(path.name + ".part")
    part.write_bytes(data)
    os.replace(part, path)

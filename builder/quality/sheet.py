"""Contact sheets: images of a dataset in rows by phase, with their keys and scores, as one PNG. PIL only."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image, ImageDraw, ImageFont

from builder.errors import BuilderError, did_you_mean
from builder.shards.dataset import Dataset, resize

CELL = 128  # px; side of an image on the sheet
GAP, MARGIN, BLOCK_GAP = 8, 16, 28
LINE = 14  # px; height of a line of text
TEXT_LINES = 3  # beneath an image: key, two lines of scores
TITLE_HEIGHT, HEADING_HEIGHT = 44, 24
INK, FAINT, PAPER = (20, 20, 20), (110, 110, 110), (255, 255, 255)

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class _Band:
    """One row of the sheet: a heading and the images of each block (the dataset; beside it, real crops)."""

    heading: str
    blocks: list[tuple[Dataset, Rows]]


def contact_sheet(
    dataset: Dataset,
    out_png: str | Path,
    *,
    by: str | None = None,
    per_phase: int = 8,
    against: Dataset | None = None,
    seed: int = 0,
) -> None:
    """Draw `per_phase` images of each phase to `out_png`: by `seed`, or the best, median and worst by a score.

    `against` puts as many of its crops of the same phases beside. BuilderError for an unknown score, no images, or
    classes that differ.
    """
    if per_phase < 1:
        raise BuilderError(f"{per_phase} images of each phase make no sheet", "ask for at least one (--per-phase)")
    if against:
        dataset.classes.require_same(against.classes, f"dataset '{dataset.name}'", f"'{against.name}'")
    table = dataset.table()
    bands: list[_Band] = []
    for code in dataset.classes.codes:
        rows = _of_phase(table, code)
        if not rows:
            continue
        chosen = _ranked(rows, by, per_phase) if by else {"": _shuffled(rows, seed)[:per_phase]}
        real = _shuffled(_of_phase(against.table(), code), seed) if against else []
        for number, (rank, own) in enumerate(chosen.items()):
            name = dataset.classes[code].name
            heading = f"{code}  {name}" + (f": {rank}" if rank else f", {len(rows):,} images")
            beside = real[number * per_phase : (number + 1) * per_phase]
            bands.append(_Band(heading, [(dataset, own), *([(against, beside)] if against else [])]))
    target = Path(out_png)
    target.parent.mkdir(parents=True, exist_ok=True)
    _draw(_title(dataset, by, against), bands, per_phase).save(target, "PNG", optimize=True)


def _of_phase(table: pa.Table, code: str) -> Rows:
    return list(table.filter(pc.equal(table["phase"], code)).to_pylist())


def _shuffled(rows: Rows, seed: int) -> Rows:
    """In an order that depends on the seed and the keys alone."""
    return sorted(rows, key=lambda row: hashlib.sha256(f"{seed}/{row['key']}".encode()).digest())


def _ranked(rows: Rows, by: str, n: int) -> dict[str, Rows]:
    """The n best, the n around the median and the n worst by a score, the best first; none twice if there are three."""
    if by not in rows[0] or not any(isinstance(row[by], float) for row in rows):
        numbers = [name for name in rows[0] if any(isinstance(row[name], float) for row in rows)]
        raise BuilderError(
            f"the dataset has no score '{by}'", did_you_mean(by, numbers) if numbers else "run `builder score` first"
        )
    scored = sorted((row for row in rows if row[by] is not None), key=lambda row: (-row[by], row["key"]))
    n = min(n, max(1, len(scored) // 3))
    start = max(0, (len(scored) - n) // 2)
    parts = {"best": scored[:n], "median": scored[start : start + n], "worst": scored[-n:]}
    return {f"{rank} by {by}": part for rank, part in parts.items()}


def _title(dataset: Dataset, by: str | None, against: Dataset | None) -> str:
    info = dataset.info
    parts = [f"{dataset.name} ({info.get('origin', 'unknown origin')})"]
    if against:
        parts.append(f"right: {against.name} ({against.info.get('origin', 'unknown origin')})")
    if by:
        parts.append(f"by {by}")
    return "    ".join(parts)


def _draw(title: str, bands: list[_Band], per_phase: int) -> Image.Image:
    block_width = per_phase * (CELL + GAP) - GAP
    blocks = max(len(band.blocks) for band in bands)
    width = max(2 * MARGIN + blocks * block_width + (blocks - 1) * BLOCK_GAP, 420)
    band_height = HEADING_HEIGHT + CELL + TEXT_LINES * LINE + GAP * 2
    sheet = Image.new("RGB", (width, TITLE_HEIGHT + len(bands) * band_height + MARGIN), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, 14), title, INK, font=ImageFont.load_default(18))
    for number, band in enumerate(bands):
        top = TITLE_HEIGHT + number * band_height
        draw.line((MARGIN, top, width - MARGIN, top), (210, 210, 210))
        draw.text((MARGIN, top + 4), band.heading, INK, font=ImageFont.load_default(14))
        for block, (dataset, rows) in enumerate(band.blocks):
            left = MARGIN + block * (block_width + BLOCK_GAP)
            if not rows:
                draw.text(
                    (left, top + HEADING_HEIGHT + CELL // 2), "no more images of this phase", FAINT, font=_small()
                )
            for column, row in enumerate(rows):
                _draw_cell(sheet, draw, (left + column * (CELL + GAP), top + HEADING_HEIGHT), dataset.pixels(row), row)
    return sheet


def _draw_cell(
    sheet: Image.Image, draw: ImageDraw.ImageDraw, at: tuple[int, int], pixels: np.ndarray, row: dict[str, Any]
) -> None:
    x, y = at
    sheet.paste(Image.fromarray(resize(pixels, CELL)), at)
    for line, text in enumerate(_caption(row)):
        draw.text((x, y + CELL + 3 + line * LINE), text, INK if line == 0 else FAINT, font=_small())


def _caption(row: dict[str, Any]) -> list[str]:
    """The key without the dataset's name, and the scores there are, two a line."""
    phase_and_index = "-".join(row["key"].rsplit("-", 2)[1:])
    shown = {"ssim": "ssim", "ssim_mean": "mean", "sharpness": "sharp", "clipped": "clip"}
    scores = [f"{short} {row[name]:.2f}" for name, short in shown.items() if row.get(name) is not None]
    return [phase_and_index, *("  ".join(scores[i : i + 2]) for i in range(0, len(scores), 2))]


def _small() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(11)

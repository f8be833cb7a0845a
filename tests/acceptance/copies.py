"""Are altered copies of training crops found, and do other patients' real crops stay without an alarm?

    python -m tests.acceptance.copies [--real phantom] [--out ROOT] [--copies 300] [--others DATASET]
                                      [--synthetic DATASET] [--pairs FOLDER]

The alarm is calibrated on the held-out (validation and test) crops of `--real`, and its false alarms are counted on
`--others`, a dataset of other patients (else it is calibrated on the validation and counted on the test crops):
required is a share of at most 0.1 % where there are 3,000 crops or more. Of each kind of copy, made from training crops
at their own size and at 64 px, at least 99 % must raise the alarm. The last kinds are beyond what is required, and only
shown. `--synthetic`: how many of its first 1,000 images raise an alarm. `--pairs`: draws the pairs with the highest
scores, the copies with the lowest and the alarms among the synthetic images there, beside their matches.
One thread. Other phantom patients: `builder demo phantom --seed 1 --name phantom1`.
"""

from __future__ import annotations

import argparse
import io
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.colors import hsv_to_rgb, rgb_to_hsv
from PIL import Image, ImageFilter
from scipy.stats import binomtest

from builder.quality.copies import CopyIndex, calibrate, find_duplicates
from builder.shards.dataset import Dataset, find_dataset, resize
from tests.acceptance.report import Report

LEAST_FOUND, MOST_ALARMS = 0.99, 0.001
ENOUGH = 3000  # real crops of which a share of 0.1 % can be shown
SYNTHETIC = 1000
SIZES = {"native": None, "64px": 64}
PAIRS, CELL = 12, 128  # pairs a sheet; px

Chance = np.random.Generator
Change = Callable[[np.ndarray, Chance], np.ndarray]  # uint8 RGB [H, W, 3] -> the like


def crop(pixels: np.ndarray, chance: Chance, share: float = 0.9, corner: bool = False) -> np.ndarray:
    """A crop of this share of either side, anywhere or in a corner."""
    height, width = (max(1, round(share * side)) for side in pixels.shape[:2])
    room = (pixels.shape[0] - height, pixels.shape[1] - width)
    top, left = (int(chance.choice([0, most])) if corner else int(chance.integers(most + 1)) for most in room)
    return pixels[top : top + height, left : left + width]


def larger(pixels: np.ndarray, chance: Chance) -> np.ndarray:
    """A view of which the crop is 90 %: the rest is mirrored."""
    room = [round(side / 9) for side in pixels.shape[:2]]
    before = [int(chance.integers(most + 1)) for most in room]
    return np.pad(pixels, (*((b, most - b) for b, most in zip(before, room, strict=True)), (0, 0)), "reflect")


def jpeg(pixels: np.ndarray, quality: int = 70) -> np.ndarray:
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, "JPEG", quality=quality)
    return np.asarray(Image.open(buffer))


def brightness(pixels: np.ndarray, factor: float) -> np.ndarray:
    return np.clip(pixels * factor, 0, 255).round().astype(np.uint8)


def hue(pixels: np.ndarray, degrees: float) -> np.ndarray:
    """The hue of HSV turned, as torchvision's and PIL's users do."""
    hsv = rgb_to_hsv(pixels / 255)
    hsv[..., 0] = (hsv[..., 0] + degrees / 360) % 1
    return np.asarray((hsv_to_rgb(hsv) * 255).round().astype(np.uint8))


def hue_yiq(pixels: np.ndarray, degrees: float) -> np.ndarray:
    """Chroma turned about the grey axis at the same luma (YIQ), as video hardware does."""
    to_yiq = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
    cos, sin = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    turn = np.linalg.inv(to_yiq) @ np.array([[1, 0, 0], [0, cos, -sin], [0, sin, cos]]) @ to_yiq
    return np.clip(pixels @ turn.T, 0, 255).round().astype(np.uint8)


def blur(pixels: np.ndarray, sigma: float = 1.0) -> np.ndarray:
    """Gaussian blur of `sigma` px at 64 px."""
    sigma *= max(pixels.shape[:2]) / 64
    return np.asarray(Image.fromarray(np.ascontiguousarray(pixels)).filter(ImageFilter.GaussianBlur(sigma)))


def everything(pixels: np.ndarray, chance: Chance) -> np.ndarray:
    recoloured = brightness(hue(crop(pixels, chance)[:, ::-1], 36), 1.1)
    return jpeg(blur(np.rot90(recoloured, chance.integers(4)), 0.7))


REQUIRED: dict[str, Change] = {
    "flip left to right": lambda x, _: x[:, ::-1],
    "flip top to bottom": lambda x, _: x[::-1],
    "quarter turn": lambda x, chance: np.rot90(x, chance.integers(1, 4)),
    "crop 90 %": crop,
    "crop 90 %, corner": lambda x, chance: crop(x, chance, corner=True),
    "crop 90 % and flip": lambda x, chance: crop(x, chance)[:, ::-1],
    "JPEG 70": lambda x, _: jpeg(x),
    "brightness +10 %": lambda x, _: brightness(x, 1.1),
    "brightness -10 %": lambda x, _: brightness(x, 0.9),
    "hue +10 % (HSV)": lambda x, _: hue(x, 36),
    "hue -10 % (HSV)": lambda x, _: hue(x, -36),
    "hue +10 % (YIQ)": lambda x, _: hue_yiq(x, 36),
    "hue -10 % (YIQ)": lambda x, _: hue_yiq(x, -36),
    "blur 1 px of 64": lambda x, _: blur(x),
}
BEYOND: dict[str, Change] = {
    "larger view, 90 %": larger,
    "crop 85 %": lambda x, chance: crop(x, chance, 0.85),
    "crop 80 %": lambda x, chance: crop(x, chance, 0.8),
    "noise 5 %": lambda x, chance: np.clip(x + chance.normal(0, 13, x.shape), 0, 255).astype(np.uint8),
    "enlarged to 512 px": lambda x, _: resize(x, 512),
    "crop, turn, hue, JPEG, blur": everything,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real", default="phantom", help="name under --out, or path")
    parser.add_argument("--out", default=".")
    parser.add_argument("--copies", type=int, default=300, help="training crops that copies are made of")
    parser.add_argument("--others", help="real dataset of other patients: name under --out, or path")
    parser.add_argument("--synthetic", help="name under --out, or path")
    parser.add_argument("--pairs", type=Path, help="folder for drawings")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    real = find_dataset(options.real, options.out)
    report = Report(f"copies of the training crops of '{real.name}'", seed=options.seed, copies=options.copies)
    rows = real.table().to_pylist()
    crops = {split: [real.pixels(row) for row in rows if row["split"] == split] for split in ("train", "val", "test")}
    keys = [row["key"] for row in rows if row["split"] == "train"]
    training = dict(zip(keys, crops["train"], strict=True))
    started = time.perf_counter()
    index = CopyIndex(crops["train"], keys)
    print(f"index of {len(index):,} crops: {time.perf_counter() - started:.1f} s")

    if options.others:
        held_out, other = (
            crops["val"] + crops["test"],
            [x for _, x in find_dataset(options.others, options.out).images()],
        )
    else:
        held_out, other = crops["val"], crops["test"]
    alarm = calibrate(index.search(held_out)[0])
    print(f"alarm from {alarm['threshold']:.4f} on, calibrated on {alarm['n']:,} held-out crops: {alarm}")
    threshold = float(alarm["threshold"])
    started = time.process_time()
    scores, found = index.search(other)
    milliseconds = (time.process_time() - started) / max(1, len(other)) * 1000
    print(f"search: {milliseconds:.2f} ms of one thread an image, in batches of 20, {len(other):,} images")
    judge_alarms(report, scores, threshold)
    if options.pairs:
        draw(options.pairs / f"{real.name}-others.png", scores, other, [training[str(key)] for key in found])

    chance = np.random.default_rng(options.seed)
    chosen = chance.permutation(len(keys))[: options.copies]
    lowest: list[tuple[float, np.ndarray, np.ndarray]] = []
    for size_name, size in SIZES.items():
        table = []
        for kind, change in (REQUIRED | BEYOND).items():
            sources = [crops["train"][place] for place in chosen]
            copies = [np.ascontiguousarray(change(resize(x, size) if size else x, chance)) for x in sources]
            scores, found = index.search(copies)
            share = float((scores >= threshold).mean())
            right = np.mean([key == keys[place] for key, place in zip(found, chosen, strict=True)])
            low = [float(np.quantile(scores, q)) for q in (0, 0.01, 0.5)]
            table.append([kind, len(scores), f"{share:.1%}", f"{right:.1%}", *low])
            if kind in REQUIRED:
                report.criterion(f"{share:.1%} found, {kind}, {size_name} (required >= 99 %)", share >= LEAST_FOUND)
                lowest += zip(scores.tolist(), copies, sources, strict=True)
        report.table(
            f"copies, {size_name}", ["kind", "N", "found", "right key", "score min", "1 %", "median"], table
        )  # fmt: skip
    if options.pairs:
        draw(options.pairs / f"{real.name}-copies.png", *zip(*lowest, strict=True), highest=False)
    if options.synthetic:
        judge_synthetic(find_dataset(options.synthetic, options.out), index, threshold, training, options.pairs)
    report.end()


def judge_alarms(report: Report, scores: np.ndarray, threshold: float) -> None:
    alarms = int((scores >= threshold).sum())
    interval = binomtest(alarms, len(scores)).proportion_ci(0.95, "exact")
    what = f"{alarms} alarms on {len(scores):,} real crops of other patients: {alarms / len(scores):.2%}"
    what += f" (exact 95 % interval {interval.low:.3%} to {interval.high:.3%}), highest score {scores.max():.3f}"
    if len(scores) >= ENOUGH:
        report.criterion(f"{what} (required <= 0.1 %)", alarms / len(scores) <= MOST_ALARMS)
    else:
        print(what)


def judge_synthetic(
    dataset: Dataset, index: CopyIndex, threshold: float, training: dict[str, np.ndarray], folder: Path | None
) -> None:
    """Prints how many synthetic images raise an alarm, and how many repeat an earlier one."""
    rows = dataset.table().slice(0, SYNTHETIC).to_pylist()
    images = [dataset.pixels(row) for row in rows]
    scores, found = index.search(images)
    matches = [training[str(key)] for key in found]
    low = [f"{q:.0%}: {np.quantile(scores, q):.3f}" for q in (0.5, 0.9, 0.99)]
    print(f"\n'{dataset.name}': {(scores >= threshold).mean():.1%} of {len(rows):,} raise an alarm; {', '.join(low)}")
    repeats, earlier = find_duplicates(images, [row["key"] for row in rows])
    print(f"'{dataset.name}': {(repeats >= threshold).mean():.1%} repeat an earlier one of these")
    if folder:
        draw(folder / f"{dataset.name}-alarms.png", scores, images, matches)
        by_key: dict[Any, np.ndarray] = {row["key"]: image for row, image in zip(rows, images, strict=True)}
        draw(folder / f"{dataset.name}-repeats.png", repeats[1:], images[1:], [by_key[key] for key in earlier[1:]])


def draw(
    file: Path,
    scores: Sequence[float] | np.ndarray,
    images: Sequence[np.ndarray],
    matches: Sequence[np.ndarray],
    *,
    highest: bool = True,
) -> None:
    """The PAIRS pairs with the highest (or lowest) scores, three a row; the scores are printed in that order."""
    order = np.argsort(scores, kind="stable")[:: -1 if highest else 1][:PAIRS]
    cells = [np.concatenate([resize(images[place], CELL), resize(matches[place], CELL)], 1) for place in order]
    cells = [np.pad(cell, ((4, 4), (4, 12), (0, 0)), constant_values=255) for cell in cells]
    cells += [np.full_like(cells[0], 255)] * (-len(cells) % 3)
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate([np.concatenate(cells[i : i + 3], 1) for i in range(0, len(cells), 3)])).save(file)
    print(f"{file}: {', '.join(f'{scores[place]:.3f}' for place in order)}")


if __name__ == "__main__":
    main()

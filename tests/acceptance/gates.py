"""Do the sanity gates let real wound crops through, and no flat, blurred or black image?

    python -m tests.acceptance.gates [--real phantom] [--out ROOT] [--planted 200] [--limit N]

Through the front door: held-out (validation and test) real crops, and images planted among them, are written as
foreign folder trees PHASE/*.png, scored with `builder score FOLDER --against REAL` and filtered with `builder filter`,
gates only. Required: at least 95 % of the real crops pass and none of the planted. Once with crops of native size, once
brought to 64 px by the project's resize. Happens in a temporary output root that links the real dataset.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from builder.quality.reference import blurred, flat
from builder.shards.dataset import Dataset, find_dataset, resize
from builder.shards.storage import Storage
from builder.shards.writer import encode_png
from tests.acceptance.report import Report

LOWEST_PASS = 0.95
SIZES = {"native": None, "64px": 64}

Spoil = Callable[[np.ndarray], np.ndarray]  # uint8 RGB [H, W, 3] of a crop -> of the same size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real", default="phantom", help="name under --out, or path")
    parser.add_argument("--out", default=".")
    parser.add_argument("--planted", type=int, default=200, help="planted images of a size")
    parser.add_argument("--limit", type=int, help="held-out crops in all; default: all")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    real = find_dataset(options.real, options.out)
    report = Report(f"gates made from '{real.name}'", seed=options.seed, planted=options.planted)
    chance = random.Random(options.seed)
    held_out = [row for row in real.table().to_pylist() if row["split"] in ("val", "test")]
    chance.shuffle(held_out)
    with tempfile.TemporaryDirectory(prefix="builder-gates-") as folder:
        root = Path(folder)
        for place in ("shards", "manifests"):
            (root / place).mkdir()
            (root / place / real.name).symlink_to(Path(real.storage.path(f"{place}/{real.name}")).absolute())
        crops = [(row["phase"], real.pixels(row)) for row in held_out[: options.limit]]
        planted = plant(crops, options.planted)
        for size_name, size in SIZES.items():
            kept, total = judged(root, f"real-{size_name}", [(p, "real", x) for p, x in crops], size, real.name)
            rows = [(code, total[code], kept[code], f"{kept[code] / total[code]:.1%}") for code in sorted(total)]
            report.table(f"held-out real crops, {size_name}", ["phase", "N", "pass", "share"], rows)
            share = kept.total() / total.total()
            report.criterion(
                f"{share:.1%} of {total.total()} real crops pass, {size_name} (required >= {LOWEST_PASS:.0%})",
                share >= LOWEST_PASS,
            )
            kept, total = judged(root, f"planted-{size_name}", planted, size, real.name, by_kind=True)
            rows = [(*group.split(" ", 1), total[group], kept[group]) for group in sorted(total)]
            report.table(f"planted images, {size_name}", ["phase", "kind", "N", "pass"], rows)
            report.criterion(
                f"{kept.total()} of {total.total()} planted images pass, {size_name} (required 0)", not kept.total()
            )
    report.end()


def black(crop: np.ndarray) -> np.ndarray:
    return np.zeros_like(crop)


def nearly_black(crop: np.ndarray) -> np.ndarray:
    """The crop at a thirty-second of its brightness: its shapes are still there, at levels 0 to 7."""
    return crop // 32


SPOILS: dict[str, Spoil] = {
    "flat": flat,
    "blurred 5 %": partial(blurred, share=0.05),
    "blurred 7 %": partial(blurred, share=0.07),
    "blurred 10 %": partial(blurred, share=0.10),
    "black": black,
    "nearly black": nearly_black,
}


def plant(crops: list[tuple[str, np.ndarray]], count: int) -> list[tuple[str, str, np.ndarray]]:
    """`count` spoilt crops (phase, kind, pixels): phases and kinds in turn, each from another crop while there are."""
    by_phase = {code: [x for phase, x in crops if phase == code] for code in sorted({phase for phase, _ in crops})}
    kinds, planted = list(SPOILS), []
    for number in range(count):
        place, phase_number = divmod(number, len(by_phase))
        code, own = list(by_phase.items())[phase_number]
        kind = kinds[place % len(kinds)]
        planted.append((code, kind, SPOILS[kind](own[place % len(own)])))
    return planted


def judged(
    root: Path, name: str, images: list[tuple[str, str, np.ndarray]], size: int | None, real: str, by_kind: bool = False
) -> tuple[Counter[str], Counter[str]]:
    """How many images (phase, kind, pixels) pass `builder score` and `builder filter`, and how many there are.

    Counted by phase, or by phase and kind; `size`: px that images are brought to first.
    """
    groups = {}
    for number, (phase, kind, pixels) in enumerate(images):
        file = root / name / phase / f"{number:06d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encode_png(resize(pixels, size) if size else pixels))
        groups[f"{phase}/{file.name}"] = f"{phase} {kind}" if by_kind else phase
    run_builder(root, "score", str(root / name), "--against", real, "--name", name)
    run_builder(root, "filter", name)
    accepted = Dataset(f"{name}-accepted", Storage(root))
    sources = accepted.table(["source"])["source"].to_pylist() if accepted.exists() else []
    return Counter(groups[source] for source in sources), Counter(groups.values())


def run_builder(root: Path, *arguments: str) -> None:
    """Run the command line; only a filter may end with 1, when it finds nothing to keep."""
    command = [sys.executable, "-m", "builder", *arguments, "--out", str(root)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    nothing_kept = done.returncode == 1 and "no image passes" in done.stderr
    if done.returncode and not nothing_kept:
        sys.exit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}")


if __name__ == "__main__":
    main()

"""Do the default thresholds let real wound crops through, and nothing flat, blurred, noisy, black or of another phase?

    python -m tests.acceptance.gates [--real phantom] [--out ROOT] [--planted 100] [--limit N]

Through the front door: held-out (validation and test) real crops, and what is planted among them, are written as a
foreign folder tree PHASE/*.png, scored with `builder score FOLDER --against REAL` and filtered with `builder filter`
without options. Required: at least 90 % of the real crops pass, at least 95 % of each kind of spoilt image are turned
away, and 90 % of real crops that bear the label of another phase. Once with crops of native size, once brought to 64 px
by the project's resize. Happens in a temporary output root that links the real dataset's tars.
"""

from __future__ import annotations

import argparse
import random
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from builder.quality.spoil import black, blurred, flat, noisy
from builder.shards.dataset import Dataset, find_dataset, resize
from builder.shards.storage import Storage
from builder.shards.writer import encode_png
from tests.acceptance.report import Report

LOWEST_PASS, LOWEST_TURNED_AWAY, LOWEST_WRONG = 0.90, 0.95, 0.90
SIZES = {"native": None, "64px": 64}

Spoil = Callable[[np.ndarray], np.ndarray]  # uint8 RGB [H, W, 3] of a crop -> of the same size
Labelled = tuple[str, str, np.ndarray]  # phase, kind, pixels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real", default="phantom", help="name under --out, or path")
    parser.add_argument("--out", default=".")
    parser.add_argument("--planted", type=int, default=100, help="planted images of a kind")
    parser.add_argument("--limit", type=int, help="held-out crops in all; default: all")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    real = find_dataset(options.real, options.out)
    report = Report(f"gates made from '{real.name}'", seed=options.seed, planted=options.planted)
    chance = random.Random(options.seed)
    held_out = [row for row in real.table().to_pylist() if row["split"] in ("val", "test")]
    chance.shuffle(held_out)
    crops = [(row["phase"], real.pixels(row)) for row in held_out[: options.limit]]
    images = [(code, "real", pixels) for code, pixels in crops]
    images += wrong_phase(crops, chance) + plant(crops, options.planted)
    with tempfile.TemporaryDirectory(prefix="builder-gates-") as folder:
        root = Path(folder)
        (root / "shards").mkdir()
        (root / "shards" / real.name).symlink_to(Path(real.storage.path(f"shards/{real.name}")).absolute())
        shutil.copytree(real.storage.path(f"manifests/{real.name}"), root / "manifests" / real.name)
        for size_name, size in SIZES.items():
            kept, total = judged(root, f"planted-{size_name}", images, size, real.name)
            show(report, size_name, kept, total)
    report.end()


def show(report: Report, size: str, kept: Counter[tuple[str, str]], total: Counter[tuple[str, str]]) -> None:
    """A table by phase and kind, and the criteria over all phases."""
    rows = [(*group, total[group], kept[group], f"{kept[group] / total[group]:.1%}") for group in sorted(total)]
    report.table(f"default gates, {size}", ["phase", "kind", "N", "pass", "share"], rows)
    for kind in dict.fromkeys(kind for _, kind in total):
        passed = sum(number for group, number in kept.items() if group[1] == kind)
        number = sum(number for group, number in total.items() if group[1] == kind)
        if kind == "real":
            said, met = f"pass (required >= {LOWEST_PASS:.0%})", passed >= LOWEST_PASS * number
            report.criterion(f"{passed} of {number} real crops ({passed / number:.1%}) {said}, {size}", met)
        else:
            lowest = LOWEST_WRONG if kind == "another phase" else LOWEST_TURNED_AWAY
            away = number - passed
            said = f"are turned away (required >= {lowest:.0%})"
            met = away >= lowest * number
            report.criterion(f"{away} of {number} of kind '{kind}' ({away / number:.1%}) {said}, {size}", met)


def nearly_black(crop: np.ndarray) -> np.ndarray:
    """The crop at a thirty-second of its brightness: its shapes are still there, at levels 0 to 7."""
    return crop // 32


SPOILS: dict[str, Spoil] = {
    "flat": flat,
    "blurred 5 %": partial(blurred, share=0.05),
    "blurred 7 %": partial(blurred, share=0.07),
    "blurred 10 %": partial(blurred, share=0.10),
    "noisy 5 %": partial(noisy, share=0.05),
    "noisy 10 %": partial(noisy, share=0.10),
    "noisy 20 %": partial(noisy, share=0.20),
    "black": black,
    "nearly black": nearly_black,
}


def plant(crops: list[tuple[str, np.ndarray]], count: int) -> list[Labelled]:
    """`count` spoilt crops of each kind: phases in turn, each from another crop while there are."""
    by_phase = {code: [x for phase, x in crops if phase == code] for code in sorted({phase for phase, _ in crops})}
    planted = []
    for kind, spoil in SPOILS.items():
        for number in range(count):
            place, phase_number = divmod(number, len(by_phase))
            code, own = list(by_phase.items())[phase_number]
            planted.append((code, kind, spoil(own[place % len(own)])))
    return planted


def wrong_phase(crops: list[tuple[str, np.ndarray]], chance: random.Random) -> list[Labelled]:
    """Every crop once, under the label of another phase."""
    codes = sorted({phase for phase, _ in crops})
    return [(chance.choice([c for c in codes if c != code]), "another phase", x) for code, x in crops if len(codes) > 1]


def judged(
    root: Path, name: str, images: list[Labelled], size: int | None, real: str
) -> tuple[Counter[tuple[str, str]], Counter[tuple[str, str]]]:
    """How many images of each phase and kind pass `builder score` and `builder filter`, and how many there are.

    `size`: px that images are brought to first.
    """
    groups = {}
    for number, (phase, kind, pixels) in enumerate(images):
        file = root / name / phase / f"{number:06d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encode_png(resize(pixels, size) if size else pixels))
        groups[f"{phase}/{file.name}"] = (phase, kind)
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

"""What does each preset cost, in time and in quality?

    OMP_NUM_THREADS=1 python -m tests.acceptance.presets [--real phantom --out ROOT --config demo --count 600]

The same COUNT images (same phases, same seeds) are drawn by the config as it is and by each of its presets, on one
thread. Speed: images/s, and passes of the denoiser an image. Quality: the figures of quality.sets in the default
features, as many images of each phase against as many crops of the real dataset's validation patients; each with its
95 % interval (real images resampled by patient) and its floor (as many training crops in the place of the synthetic
ones). Distance: how far the preset's images are from the config's own, pixel by pixel (mean absolute difference).
No criterion: these are figures to choose by. COUNT / phases above the validation crops of a phase is of no use.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence

import numpy as np
from tqdm import tqdm

from builder.config import PRESETS, Config, load_config
from builder.demo.phantom_dataset import PHANTOM, ensure_phantom
from builder.job.devices import prepare
from builder.job.plan import Plan
from builder.models.checkpoint import Checkpoint, resolve
from builder.quality.features import load_extractor
from builder.quality.panel import patient_of, rows_by_phase, spread
from builder.quality.sets.comparison import Naming, Side, compare
from builder.sampling.guidance import evaluations
from builder.sampling.sampler import Request, load_sampler
from builder.sampling.seeds import seed_of
from builder.shards.dataset import Dataset, find_dataset, resize
from tests.acceptance.report import Report

FIGURES = ("fd", "kd", "precision", "recall", "density", "coverage", "vendi_ratio", "auc")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real", default=PHANTOM)
    parser.add_argument("--out", default=".")
    parser.add_argument("--config", default="demo")
    parser.add_argument("--checkpoint", help="default: the config's")
    parser.add_argument("--count", type=int, default=600)
    parser.add_argument("--bootstrap", type=int, default=200)
    options = parser.parse_args()
    device = prepare(0)
    configs = {name or "as it is": load_config(options.config, [], name) for name in (None, *PRESETS)}
    config = configs["as it is"]
    checkpoint = resolve(options.checkpoint or config.checkpoint)
    if options.real == PHANTOM:
        ensure_phantom(options.out)
    real = find_dataset(options.real, options.out)
    report = Report("presets", real=real.name, config=config.name, checkpoint=checkpoint.name, count=options.count)

    extractor = load_extractor(config.score.features, device=device)
    codes, plan = config.classes.codes, Plan.of(config.classes.codes)
    counts = plan.counts(options.count)
    sides = {split: side(real, codes, counts, split, config.sample.size, extractor.of) for split in ("val", "train")}
    phases = [code for code, _ in plan.at(0, options.count)]
    taken = {code: sum(phase == code for phase in sides["val"][1]) for code in codes}
    rows, figures, first = [], {}, None
    for name, chosen in configs.items():
        pixels, seconds, passes = drawn(checkpoint, chosen, plan, options.count, device, name)
        first = pixels if first is None else first
        places = [place for code in codes for place in of_phase(phases, code)[: taken[code]]]
        made = Side(extractor.of(pixels[places]).astype(np.float64), [str(place) for place in places])
        naming = Naming(extractor.name, extractor.standard)
        figures[name] = compare(sides["val"][0], made, naming, replicates=options.bootstrap, seed=0)
        difference = np.abs(pixels.astype(int) - first).mean()
        sample = chosen.sample
        interval = "{:g}-{:g}".format(*sample.guidance_interval) if sample.guidance_interval else "all"
        speed = f"{len(pixels) / seconds:.2f}"
        rows.append((name, sample.steps, interval, passes, speed, f"{difference:.2f}"))
    columns = ["preset", "steps", "guided (sigma)", "passes/image", "images/s", "distance (levels)"]
    report.table(f"speed: {options.count} images each, batches of {config.sample.batch_size}", columns, rows)
    floors = compare(sides["val"][0], sides["train"][0], Naming(extractor.name, extractor.standard))
    table = []
    for figure in [f for f in next(iter(figures.values())) if f.partition("[")[0] in FIGURES]:
        cells = [f"{e.value:.4g} [{e.low:.4g}, {e.high:.4g}]" if (e := by[figure]).low is not None else
                 f"{e.value:.4g}" for by in figures.values()]  # fmt: skip
        table.append((figure, *cells, f"{floors[figure].value:.4g}" if figure in floors else "-"))
    heading = f"quality: {len(sides['val'][0])} images against as many crops ({counted(taken)}) of validation patients"
    report.table(heading, ["figure", *figures, "floor"], table)
    report.end()


def side(
    real: Dataset, codes: Sequence[str], counts: dict[str, int], split: str, size: int,
    features: Callable[[Sequence[np.ndarray]], np.ndarray],
) -> tuple[Side, list[str]]:  # fmt: skip
    """As many crops of each phase as there are of held-out ones and as are drawn, with their phases."""
    held_out = rows_by_phase(real, codes, ("val",))
    rows = rows_by_phase(real, codes, (split,))
    chosen = [
        row
        for code in codes
        for row in spread(rows[code], min(counts[code], len(held_out[code])), f"presets/{split}")
    ]  # fmt: skip
    crops = [resize(real.pixels(row), size) for row in chosen]
    found = Side(features(crops).astype(np.float64), [patient_of(row) for row in chosen])
    return found, [row["phase"] for row in chosen]


def drawn(
    checkpoint: Checkpoint, config: Config, plan: Plan, count: int, device: str, name: str
) -> tuple[np.ndarray, float, int]:
    """The first `count` images of the plan, uint8 [N, H, W, 3]; seconds without the first batch's warm-up; passes."""
    sampler = load_sampler(checkpoint, config, device)
    passes = evaluations(config.sample, sampler.scheduler_config)
    label = config.classes.label
    requests = [Request(code, label(code), seed_of(config.seed, label(code), i)) for code, i in plan.at(0, count)]
    size = config.sample.batch_size
    sampler.generate(requests[:size])
    parts, started = [], time.perf_counter()
    for start in tqdm(range(0, count, size), f"draw {name}", unit="batch"):
        parts.append(sampler.generate(requests[start : start + size]).pixels)
    return np.concatenate(parts), time.perf_counter() - started, passes


def of_phase(phases: Sequence[str], code: str) -> list[int]:
    return [place for place, phase in enumerate(phases) if phase == code]


def counted(taken: dict[str, int]) -> str:
    return ", ".join(f"{code} {number}" for code, number in taken.items())


if __name__ == "__main__":
    main()

"""How fast is the scoring, and where does the batch job's time go?

    make bench [ARGS="--real phantom --out ROOT --checkpoint demo"]
    OMP_NUM_THREADS=1 python -m tests.acceptance.bench [...]

On one CPU thread:
1. SSIM to a panel of 16 crops at 512 px, as the batch job computes it, on its sub-grid of windows and on the full grid,
   beside the plain loop: torchmetrics' SSIM, one pair after the other. Time an image, its resize included, and the
   largest deviation from the loop.
2. One worker of the job on one unit: time an image in each stage and of each scorer, images/s. Required: scoring takes
   at most 40 % of it.
Wall time is what a user waits; CPU time is the fairer figure where others share the cores.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace

import numpy as np
import torch
from torchmetrics.functional.image import structural_similarity_index_measure

from builder.bench.generate import Bench
from builder.bench.stages import COLUMNS, Clock
from builder.config import Config, load_config
from builder.demo.phantom_dataset import PHANTOM, ensure_phantom
from builder.errors import BuilderError
from builder.job.plan import Plan
from builder.job.spec import JobSpec
from builder.models.checkpoint import Checkpoint, resolve
from builder.quality.build import build_reference
from builder.quality.panel import choose_panel, rows_by_phase, spread
from builder.quality.reference import load_reference
from builder.quality.ssim import SIGMA, WINDOW, PanelSSIM, bring_to
from builder.sampling.device import dtype_name, resolve_dtype
from builder.shards.dataset import Dataset, find_dataset, resize
from tests.acceptance.report import Report

BORDER = WINDOW // 2  # px at each edge where torchmetrics' windows take in mirrored pixels
LOOP_IMAGES, GRID_IMAGES, FULL_IMAGES = 8, 64, 16
LARGEST_DEVIATION = 0.005
LARGEST_SCORE_SHARE = 0.40
LEAST_RATIO = 20  # of the panel's SSIM to the plain loop


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real", default=PHANTOM, help="name under --out, or path; the phantom is made if missing")
    parser.add_argument("--out", default=".")
    parser.add_argument("--config", default="demo")
    parser.add_argument("--checkpoint", help="default: the config's")
    parser.add_argument("--count", type=int, help="images of the unit; default: one shard of the config")
    parser.add_argument("--reference", help="dataset under --out whose reference to score by; default: a new one")
    options = parser.parse_args()
    torch.set_num_threads(1)
    config = load_config(options.config)
    if options.real == PHANTOM:
        ensure_phantom(options.out)
    real = find_dataset(options.real, options.out)
    report = Report("bench", real=real.name, config=config.name, seed=config.seed)
    bench_ssim(report, real, config)
    try:
        checkpoint = resolve(options.checkpoint or config.checkpoint)
    except BuilderError as error:
        if options.checkpoint:
            raise
        print(f"\nthe batch job is not measured: {error.what}")
    else:
        bench_job(report, real, config, checkpoint, options.count or config.shards.images_per_shard, options.reference)
    report.end()


def bench_ssim(report: Report, real: Dataset, config: Config) -> None:
    """Panel SSIM, on the sub-grid and on the full grid, against a loop over pairs."""
    size, stride, code = config.score.ssim_size, config.score.ssim_stride, config.classes.codes[0]
    panel = [real.pixels(row) for row in choose_panel(real, [code], config.score.panel, config.score.panel_seed)[code]]
    rows = spread(rows_by_phase(real, [code], ("val", "test"))[code], GRID_IMAGES, "bench")
    crops = [resize(real.pixels(row), config.sample.size) for row in rows]
    images = [torch.from_numpy(np.array(crop)).permute(2, 0, 1) for crop in crops]
    loop_images = images[:LOOP_IMAGES]

    clock = Clock()
    ready = [bring_to(torch.from_numpy(np.array(crop)).permute(2, 0, 1)[None], size) for crop in panel]
    pairs = clock.timed("loop", _loop)(loop_images, ready, size)
    mirrored, inner = pairs[..., 0], pairs[..., 1]
    numbers = {"loop": len(loop_images)}
    deviations = {"loop": [0.0, 0.0, float(np.abs(mirrored.max(1) - inner.max(1)).max())]}
    for step, number in ((stride, len(images)), (1, min(FULL_IMAGES, len(images)))):
        scorer = PanelSSIM({code: panel}, size, step)
        name = f"stride {step}"
        best, mean = clock.timed(name, scorer.score)(images[:number], [code] * number)
        numbers[name] = number
        best, mean = best[: len(loop_images)], mean[: len(loop_images)]
        against = ((best, inner.max(1)), (mean, inner.mean(1)), (best, mirrored.max(1)))
        deviations[name] = [float(np.abs(own - other).max()) for own, other in against]

    wall, cpu = ({name: 1000 * spent[name] / numbers[name] for name in numbers} for spent in (clock.wall, clock.cpu))
    table = [
        (name, numbers[name], f"{wall[name]:.1f}", f"{cpu[name]:.1f}", f"{cpu['loop'] / cpu[name]:.1f} x",
         *(f"{value:.5f}" for value in deviations[name]))
        for name in numbers
    ]  # fmt: skip
    heading = f"SSIM of {config.sample.size} px crops to a panel of {len(panel)} at {size} px; deviation from the loop"
    columns = ["", "N", "ms/image", "CPU ms/image", "speed", "ssim", "ssim_mean", "ssim, mirrored borders"]
    report.table(heading, columns, table)
    ratio = cpu["loop"] / cpu[f"stride {stride}"]
    report.criterion(
        f"stride {stride} is {ratio:.0f} times as fast as the loop (required >= {LEAST_RATIO})", ratio >= LEAST_RATIO
    )
    largest = max(deviations[f"stride {stride}"][:2])
    report.criterion(
        f"stride {stride} deviates by {largest:.5f} at most from all windows within the image "
        f"(required <= {LARGEST_DEVIATION})",
        largest <= LARGEST_DEVIATION,
    )


def _loop(images: list[torch.Tensor], panel: list[torch.Tensor], size: int) -> np.ndarray:
    """SSIM of each image [3, H, W] with each of the panel [1, 3, size, size], pair by pair: [N, K, 2].

    Last axis: torchmetrics' own mean, and the mean of the same map over the windows wholly within the image.
    """
    result = np.empty((len(images), len(panel), 2))
    for i, image in enumerate(images):
        enlarged = bring_to(image[None], size)
        for k, other in enumerate(panel):
            mean, similarity = structural_similarity_index_measure(
                enlarged, other, sigma=SIGMA, kernel_size=WINDOW, data_range=1.0, return_full_image=True
            )
            inner = similarity[..., BORDER:-BORDER, BORDER:-BORDER].mean()
            result[i, k] = float(mean), float(inner)
    return result


def bench_job(
    report: Report, real: Dataset, config: Config, checkpoint: Checkpoint, count: int, reference: str | None
) -> None:
    """One worker makes one unit in a temporary output root, its stages on the clock."""
    spec = JobSpec(
        config=replace(config, shards=replace(config.shards, images_per_shard=count)),
        plan=Plan.of(config.classes.codes),
        name="bench",
        out="",
        checkpoint=str(checkpoint.path),
        checkpoint_sha256=checkpoint.sha256,
        dtype=dtype_name(resolve_dtype(config.sample.dtype, "cpu")),
        real=real.name,
        real_out=real.storage.root,
    )
    started = time.perf_counter()
    if reference:
        made = load_reference(Dataset(reference, real.storage))
    else:
        made = build_reference(real, config.score, spec.plan.codes, image_size=config.sample.size)
    once = time.perf_counter() - started
    measured = Bench(spec, made)
    try:
        stages, _ = measured.stages(count)
    finally:
        measured.close()
    sample, share = config.sample, stages.share("score")
    heading = (
        f"one worker, one unit of {count} images: {sample.size} px, {sample.steps} steps of {sample.scheduler}, "
        f"guidance {sample.guidance:g}, batches of {sample.batch_size}, {spec.dtype}"
    )
    report.table(heading, COLUMNS, stages.table())
    report.criterion(
        f"scoring (all columns) takes {share:.1%} of the job's time (required <= {LARGEST_SCORE_SHARE:.0%})",
        share <= LARGEST_SCORE_SHARE,
    )
    print(
        f"{count / stages.seconds:.1f} images/s of one worker ({count / stages.cpu_seconds:.1f} a CPU second); "
        f"before: {once:.1f} s once a job for panel and gates; {stages.replaced} images replaced"
    )


if __name__ == "__main__":
    main()

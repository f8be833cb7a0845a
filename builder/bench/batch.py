"""Speed, memory and utilisation by batch size: which one to plan."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from builder.bench.flops import Cost, seconds
from builder.models.building import Pipeline
from builder.models.families import family_named
from builder.sampling.sampler import Request, Sampler

SIZES = (1, 2, 4, 8, 16, 32, 64)
NEAR = 0.97  # of the best rate is as good: a smaller batch loses less when it must be drawn again


@dataclass(frozen=True)
class Trial:
    """One batch size: images/s, utilisation (share of the measured peak in executed FLOPs), peak memory in bytes.

    peak: of the device; of a CPU, None. fits: False where the device's memory ran out.
    """

    batch_size: int
    rate: float
    utilisation: float
    peak: int | None
    fits: bool = True

    def __str__(self) -> str:
        memory = "" if self.peak is None else f", {self.peak / 1e9:.1f} GB at most"
        said = f"{self.rate:.2f} images/s, {self.utilisation:.0%} of the peak" if self.fits else "does not fit"
        return f"batch {self.batch_size}: {said}{memory}"


def random_pipeline(architecture: str, size: int, device: str) -> Pipeline:
    """A published model at its full size, with random weights, made on the device; BuilderError for an unknown one."""
    family = family_named(architecture)
    with torch.device(device):  # in the host's memory it would be drawn for minutes
        return family.build(family.architecture, size, 0)


def try_sizes(
    sampler: Sampler, codes: Sequence[str], cost: Cost, device_peak: float, sizes: Sequence[int] = SIZES,
    repeats: int = 2, on_trial: Callable[[Trial], None] = lambda trial: None,
) -> list[Trial]:  # fmt: skip
    """Draw batches of growing size until memory runs out; the first batch of each is not timed."""
    trials = []
    for size in sizes:
        trial = _try(sampler, codes, cost, device_peak, size, repeats)
        trials.append(trial)
        on_trial(trial)
        if not trial.fits:
            break
    return trials


def _try(
    sampler: Sampler, codes: Sequence[str], cost: Cost, device_peak: float, size: int, repeats: int
) -> Trial:  # fmt: skip
    cuda = sampler.device.type == "cuda"
    requests = [Request(codes[i % len(codes)], i % len(codes), i) for i in range(size)]
    if cuda:
        torch.cuda.reset_peak_memory_stats(sampler.device)
    fits = sampler.generate(requests).micro_batch == size
    started, busy = time.perf_counter(), seconds(sampler.device)
    for _ in range(repeats if fits else 0):
        fits = fits and sampler.generate(requests).micro_batch == size
    wall, busy = time.perf_counter() - started, seconds(sampler.device) - busy
    peak = torch.cuda.max_memory_allocated(sampler.device) if cuda else None
    if not fits:
        return Trial(size, 0.0, 0.0, peak, fits=False)
    return Trial(size, repeats * size / wall, repeats * size * cost.image / busy / device_peak, peak)


def proposed(trials: Sequence[Trial]) -> Trial | None:
    """The smallest batch that is as good as the fastest; None where not even one image fits."""
    fitting = [trial for trial in trials if trial.fits]
    best = max((trial.rate for trial in fitting), default=0.0)
    return next((trial for trial in fitting if trial.rate >= NEAR * best), None)

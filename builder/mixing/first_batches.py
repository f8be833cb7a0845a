"""What the first batches show: do real and synthetic images have one value range, and similar colours?

The old system fed synthetic images in 0-1 beside real ones in 0-255: the classifier saw them almost black.
"""

from __future__ import annotations

import warnings

import torch

from builder.errors import BuilderError

ENOUGH = 64  # images of each origin that are looked at
FEW = 8  # images of each origin from which the value range is judged
RANGES_APART = 16.0  # brightest value of one origin over that of the other
MEANS_APART = 1.0  # distance of the channel means, in standard deviations of an image's mean (Cohen's d)
SPREADS_APART = 1.5  # ratio of the mean contrasts (standard deviation within an image)


class FirstBatches:
    """Looks at the first ENOUGH images of each origin, then no more.

    judge_range: whether the value ranges may differ at all, that is whether each origin has a transform of its own.
    """

    def __init__(self, judge_range: bool) -> None:
        self._judge_range = judge_range
        self._seen: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
        self._counts = [0, 0]
        self._brightest = [0.0, 0.0]
        self._least = [0.0, 0.0]
        self.done = False

    def see(self, images: torch.Tensor, origin: torch.Tensor) -> None:
        """Take in a batch [B, 3, H, W] and its origins [B].

        BuilderError when the value ranges differ; a warning, once, when channels differ much in mean or contrast.
        """
        if images.ndim != 4:  # a transform made something else of them
            self.done = True
            return
        for number, seen in enumerate(self._seen):
            chosen = images[origin == number] if self._counts[number] < ENOUGH else images[:0]
            if len(chosen):
                flat = chosen.float().flatten(2)
                seen.append(torch.stack([flat.mean(2), flat.std(2, correction=0)]))  # [2, n, 3]
                self._brightest[number] = max(self._brightest[number], float(flat.abs().max()))
                self._least[number] = min(self._least[number], float(flat.min()))
                self._counts[number] += len(chosen)
        if self._judge_range and min(self._counts) >= FEW:
            self._check_range()
        if min(self._counts) >= ENOUGH:
            self._compare()
            self.done = True

    def _check_range(self) -> None:
        low, high = sorted(self._brightest)
        if high > RANGES_APART * low or min(self._least) < 0 <= max(self._least):
            (real_least, least), (real, synthetic) = self._least, self._brightest
            raise BuilderError(
                f"the images have different value ranges: real ones reach from {real_least:g} to {real:g}, "
                f"synthetic ones from {least:g} to {synthetic:g}",
                "let the transforms of both origins end in one range",
            )

    def _compare(self) -> None:
        (real_means, real_stds), (means, stds) = (torch.cat(seen, dim=1) for seen in self._seen)
        pooled = ((real_means.var(0) + means.var(0)) / 2).sqrt().clamp_min(max(self._brightest) / 255)
        shift = (means.mean(0) - real_means.mean(0)) / pooled
        contrast = (stds.mean(0) + 1e-6) / (real_stds.mean(0) + 1e-6)
        if shift.abs().max() > MEANS_APART or max(float(contrast.max()), float(1 / contrast.min())) > SPREADS_APART:
            warnings.warn(
                f"synthetic images differ from real ones by {_list(shift)} standard deviations in the mean of R, G, B, "
                f"and have {_list(contrast)} times their contrast: colour alone may tell a classifier their origin; "
                "`builder metrics` measures it",
                stacklevel=5,
            )


def _list(values: torch.Tensor) -> str:
    return ", ".join(f"{value:.2g}" for value in values.tolist())

"""Structural similarity (SSIM) of images to a panel of real crops: one pass over all of the panel.

SSIM (Wang, Bovik, Sheikh, Simoncelli, IEEE TIP 13(4), 2004) with the protocol of the scores: both images brought to
`size` px, RGB in [0, 1], 11-tap Gaussian window of sigma 1.5, C1 = 0.01^2, C2 = 0.03^2, Gaussian-weighted moments
without sample correction, mean over channels and over the windows that lie wholly inside the image, as scikit-image
does (torchmetrics computes the same map, but its mean takes in windows over mirrored borders). With `stride` s, every
s-th window in either direction is evaluated; an odd s is best: images enlarged by a multiple of s show every window
the same phase of their pixels (measured on 64 px images: stride 7 deviates by 0.004 at most from the full grid,
stride 8 by 0.016).

The one resize rule, for the panel and the scored images alike: antialiased bicubic (a = -0.5, PIL's kernel) in
float32, clamped to [0, 1], not rounded to 8 bits. An image that is not square is squashed to `size` x `size`.

Why it is fast: with mu_y the window's mean of a panel image y and g the window's weights, the covariance is
sum_u g_u (x_u - mu_x)(y_u - mu_y) = sum_u [g_u (y_u - mu_y)] x_u, because the bracket sums to nothing. The brackets of
all panel images are tables made once, so that the covariances of a batch with the whole panel are one batched matrix
product a row of windows, and need no difference of large numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby

import numpy as np
import torch
import torch.nn.functional as F

from builder.errors import BuilderError
from builder.quality.panel import each_by_phase

WINDOW, SIGMA = 11, 1.5
C1, C2 = 0.01**2, 0.03**2
BATCH = 16  # images of one matrix product: large enough for it, small enough for the cache
TABLE_BYTES = 256 * 2**20  # tables of one phase are kept up to here, else made anew for each batch (the full grid)


def bring_to(images: torch.Tensor, size: int) -> torch.Tensor:
    """uint8 [N, 3, H, W] -> float32 [N, 3, size, size] in [0, 1], by the one resize rule of this module."""
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise TypeError(f"images must be uint8 [N, 3, H, W], not {images.dtype} {list(images.shape)}")
    scaled = images.float() / 255
    if images.shape[2:] == (size, size):
        return scaled
    return F.interpolate(scaled, size=(size, size), mode="bicubic", antialias=True).clamp_(0, 1)


class PanelSSIM:
    """SSIM of images to the panel of their phase: the best and the mean over the panel's images."""

    def __init__(
        self,
        panels: Mapping[str, Sequence[np.ndarray]],
        size: int = 512,
        stride: int = 7,
        device: str | torch.device = "cpu",
    ) -> None:
        """`panels`: code -> images, uint8 RGB [H, W, 3] of any sizes, one or more. `size` and `stride` in px."""
        if size < WINDOW or stride < 1:
            raise BuilderError(
                f"SSIM at {size} px with stride {stride} is not possible", f"size >= {WINDOW}, stride >= 1"
            )
        self.size, self.stride, self.device = size, stride, torch.device(device)
        taps = torch.arange(WINDOW, dtype=torch.float64) - WINDOW // 2
        taps = torch.exp(-(taps**2) / (2 * SIGMA**2))
        taps /= taps.sum()
        self._weights = (taps[:, None] * taps).flatten().float().to(self.device)  # [121]
        self._panels = {code: _Panel(self, images) for code, images in panels.items()}

    def score(
        self, images: torch.Tensor | Sequence[torch.Tensor], codes: Sequence[str]
    ) -> tuple[np.ndarray, np.ndarray]:
        """The scores (best, mean), float64 [N] each, of images against the panels of their `codes`.

        `images`: uint8 [N, 3, H, W], or N images uint8 [3, H, W] of any sizes.
        A score does not depend on the other images of the call, nor on their order (to 1e-6).
        """
        each = self.each(images, codes)
        return np.array([row.max() for row in each]), np.array([row.mean() for row in each])

    def each(self, images: torch.Tensor | Sequence[torch.Tensor], codes: Sequence[str]) -> list[np.ndarray]:
        """The similarities of each image to the K images of its phase's panel, float64 [K], in the panel's order."""

        def similarity(part: Sequence[torch.Tensor], panel: _Panel) -> np.ndarray:
            return panel.similarity(self._ready(part))

        return each_by_phase(list(images), codes, self._panels, BATCH, similarity)

    def _ready(self, images: Sequence[torch.Tensor]) -> torch.Tensor:
        """Images uint8 [3, H, W] of any sizes -> float32 [N, 3, size, size] in [0, 1]."""
        runs = groupby(images, key=lambda image: image.shape)
        return torch.cat([bring_to(torch.stack(list(run)).to(self.device), self.size) for _, run in runs])

    @property
    def positions(self) -> int:
        """Windows in either direction."""
        return (self.size - WINDOW) // self.stride + 1

    def windows(self, images: torch.Tensor, row: int) -> torch.Tensor:
        """The windows of one row: centred images [3, size, size, N] -> [3 * positions, 121, N]."""
        top = row * self.stride
        strip = images[:, top : top + WINDOW].unfold(2, WINDOW, self.stride)  # 3, 11, positions, N, 11
        return strip.permute(0, 2, 1, 4, 3).reshape(3 * self.positions, WINDOW * WINDOW, images.shape[3])

    def moments(self, windows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and variance, [3 * positions, 1, N] each, of windows [3 * positions, 121, N]."""
        weights = self._weights.expand(len(windows), 1, -1)
        mean = torch.bmm(weights, windows)
        return mean, torch.bmm(weights, windows.square()) - mean.square()


class _Panel:
    """The tables of one phase's panel of K images."""

    def __init__(self, protocol: PanelSSIM, images: Sequence[np.ndarray]) -> None:
        self._protocol = protocol
        ready = [bring_to(torch.from_numpy(np.array(image)).permute(2, 0, 1)[None], protocol.size) for image in images]
        self._images = _centred(torch.cat(ready).to(protocol.device))
        self._length = len(images)
        bytes_all = 4 * 3 * protocol.positions**2 * len(images) * WINDOW**2
        self._kept = list(self._rows()) if bytes_all <= TABLE_BYTES else None
        if self._kept is not None:
            del self._images  # the tables hold all that is needed of them

    def __len__(self) -> int:
        return self._length

    def similarity(self, images: torch.Tensor) -> np.ndarray:
        """SSIM of images [N, 3, size, size] in [0, 1] with each of the panel's: float64 [N, K]."""
        centred = _centred(images)
        total = torch.zeros(len(self), len(images), dtype=torch.float64, device=images.device)
        for row, (table, mean_y, variance_y) in enumerate(self._kept or self._rows()):
            windows = self._protocol.windows(centred, row)
            mean_x, variance_x = self._protocol.moments(windows)
            mean_x = mean_x + 0.5
            luminance = (2 * mean_x * mean_y + C1) / (mean_x.square() + mean_y.square() + C1)
            structure = (2 * torch.bmm(table, windows) + C2) / (variance_x + variance_y + C2)
            total += luminance.mul_(structure).sum(0, dtype=torch.float64)
        return (total / (3 * self._protocol.positions**2)).T.cpu().numpy()

    def _rows(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """A row of windows: brackets [3 * positions, K, 121], means and variances [3 * positions, K, 1]."""
        for row in range(self._protocol.positions):
            windows = self._protocol.windows(self._images, row)
            mean, variance = self._protocol.moments(windows)
            table = ((windows - mean) * self._protocol._weights[:, None]).transpose(1, 2).contiguous()
            yield table, mean.transpose(1, 2) + 0.5, variance.transpose(1, 2)


def _centred(images: torch.Tensor) -> torch.Tensor:
    """[N, 3, H, W] in [0, 1] -> [3, H, W, N] in [-0.5, 0.5]: variances then lose fewer digits to their means."""
    return (images - 0.5).permute(1, 2, 3, 0).contiguous()

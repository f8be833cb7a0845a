"""Alignment of image pairs that differ by a small crop, shift or stretch, and their correlation where they overlap.

Gauss-Newton on the pixels (Lucas & Kanade, IJCAI 1981; the forward additive form of Baker & Matthews, IJCV 56(3), 2004)
with the gain of one image against the other among the unknowns, so that contrast does not count, as in Evangelidis &
Psarakis, IEEE TPAMI 30(10), 2008. The warp is a scale and a shift in either direction: all that a crop brought back to
a square can be. Such a warp is separable, hence two small matrix products an image, on any device.
"""

from __future__ import annotations

import numpy as np
import torch

LEAST_AREA = 0.7  # share of an image that must overlap the other
LEAST_SCALE, MOST_SCALE, MOST_SHIFT = 0.8, 1.25, 0.25  # shift: in half widths
MOST_MOVE = 0.1  # of a parameter in one step
BORDER = 2  # px left out at the template's edge: a crop's band-pass there saw mirrored pixels, the original's did not
DAMPING = 1e-3  # share of the diagonal added to it (Levenberg)


def positions(scale: torch.Tensor, shift: torch.Tensor, size: int) -> torch.Tensor:
    """Where the `size` pixels of a window lie in an image of as many pixels: px, [..., size].

    In units of half the image's width from its centre, the window's centre is at `shift` and its half width is `scale`.
    """
    unit = (torch.arange(size, dtype=scale.dtype, device=scale.device) * 2 + 1) / size - 1
    return ((scale[..., None] * unit + shift[..., None] + 1) * size - 1) / 2


def interpolation(at: torch.Tensor, size: int) -> torch.Tensor:
    """Linear interpolation of `size` pixels at positions in px [..., M] as matrices [..., M, size]; edges repeat."""
    pixel = torch.arange(size, dtype=at.dtype, device=at.device)
    return (1 - (at.clamp(0, size - 1)[..., None] - pixel).abs()).clamp_(min=0)


def align(
    template: torch.Tensor, image: torch.Tensor, warp: torch.Tensor, steps: int, floor: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Correlation of each pair after alignment, float32 [P] in [-1, 1], and the warp [P, 4] that it is reached at.

    `template`, `image`: zero-mean (band-passed) images, float32 [P, N, N]. `warp`: first guess [P, 4] of scale and
    shift along x, scale and shift along y, that lead from the template to the image (see `positions`). The correlation
    is sum(t i) / sqrt((sum(t^2) + n floor^2) (sum(i^2) + n floor^2))
    over the n pixels of the overlap; `floor` (rms, in grey levels) makes it vanish for images without structure.
    Pairs that overlap by less than LEAST_AREA get -1. The best of all steps counts, the first guess among them.
    """
    size = template.shape[1]
    unit = (torch.arange(size, dtype=template.dtype, device=template.device) * 2 + 1) / size - 1
    inner = torch.ones(size, dtype=template.dtype, device=template.device)
    inner[:BORDER] = inner[size - BORDER :] = 0
    low = torch.tensor([LEAST_SCALE, -MOST_SHIFT] * 2, device=warp.device)
    high = torch.tensor([MOST_SCALE, MOST_SHIFT] * 2, device=warp.device)
    best, best_warp = torch.full_like(warp[:, 0], -1), warp
    for step in range(steps + 1):
        at = positions(warp[:, 0::2].T, warp[:, 1::2].T, size)  # 2 (x, y), P, N
        columns, rows = interpolation(at, size)
        inside_x, inside_y = ((at >= -0.5) & (at <= size - 0.5)) * inner
        mask = inside_y[:, :, None] * inside_x[:, None, :]
        moments = _moments(template, rows @ image @ columns.transpose(1, 2), mask, unit)
        count = inside_x.sum(1) * inside_y.sum(1)
        correlation = moments[:, 0, 5] / torch.sqrt(
            (moments[:, 0, 0] + count * floor**2) * (moments[:, 5, 5] + count * floor**2)
        )
        correlation = correlation.where(count >= LEAST_AREA * inner.sum() ** 2, -1)
        better = correlation > best
        best, best_warp = correlation.where(better, best), warp.where(better[:, None], best_warp)
        if step < steps:
            warp = (warp + _move(moments)).clamp(low, high)
    return best, best_warp


def _moments(template: torch.Tensor, warped: torch.Tensor, mask: torch.Tensor, unit: torch.Tensor) -> torch.Tensor:
    """Products of template, the warped image's derivatives by the four parameters, and the warped image: [P, 6, 6]."""
    along_x, along_y = torch.zeros_like(warped), torch.zeros_like(warped)
    per_unit = len(unit) / 4  # central differences over two pixels; a unit is half the width
    along_x[:, :, 1:-1] = (warped[:, :, 2:] - warped[:, :, :-2]) * per_unit
    along_y[:, 1:-1] = (warped[:, 2:] - warped[:, :-2]) * per_unit
    parts = [template, along_x * unit, along_x, along_y * unit[:, None], along_y, warped]
    stacked = (torch.stack(parts, 1) * mask[:, None]).flatten(2)
    return stacked @ stacked.transpose(1, 2)


def _move(moments: torch.Tensor) -> torch.Tensor:
    """The Gauss-Newton step [P, 4]: least squares of warped + derivatives @ move = gain * template, gain unknown.

    Solved on unit diagonals (Jacobi scaling), so that the damping is the same for every unknown; pairs without
    structure stay where they are.
    """
    scale = moments[:, :5, :5].diagonal(dim1=1, dim2=2).clamp(min=1e-6).rsqrt()
    system = moments[:, :5, :5] * scale[:, :, None] * scale[:, None, :]
    system = system + DAMPING * torch.eye(5, dtype=system.dtype, device=system.device)
    solution = torch.linalg.solve(system, moments[:, :5, 5] * scale) * scale  # template's share, then minus the moves
    return -solution[:, 1:].clamp(-MOST_MOVE, MOST_MOVE)


def invert(warp: np.ndarray) -> np.ndarray:
    """The warp [..., 4] that leads back."""
    scale, shift = warp[..., 0::2], warp[..., 1::2]
    return np.stack([1 / scale, -shift / scale], -1).reshape(warp.shape)

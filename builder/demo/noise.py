"""Smooth random fields on small lattices, sampled through a homography: what all textures are made of."""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.spatial import cKDTree

Field = NDArray[np.floating]
"""Values per pixel, or a colour; single precision in all but name, as doubles would cost twice the time."""
Matrix = NDArray[np.float64]


def generator(*key: int) -> np.random.Generator:
    """The random numbers that belong to `key`, whatever else was drawn before or elsewhere."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(key)))


def smoothstep(low: float, high: float, x: Field) -> Field:
    """0 below `low`, 1 above `high`, a smooth ramp between; a falling one where low > high."""
    t = np.clip((x - np.float32(low)) * np.float32(1 / (high - low)), 0, 1)
    return t * t * (3 - 2 * t)


def resize(field: Field, width: int, height: int) -> Field:
    """`field` (h, w) or (h, w, 3) interpolated to (height, width[, 3])."""
    if field.ndim == 3:
        return np.stack([resize(field[..., c], width, height) for c in range(3)], axis=-1)
    image = Image.fromarray(np.ascontiguousarray(field, dtype=np.float32))
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))


def warp(lattice: Field, matrix: Matrix, width: int, height: int) -> Field:
    """`lattice` seen through `matrix` (pixel (x, y, 1) to lattice coordinates), as (height, width)."""
    coefficients = (matrix / matrix[2, 2]).ravel()[:8]
    image = Image.fromarray(lattice)
    warped = image.transform(
        (width, height), Image.Transform.PERSPECTIVE, tuple(coefficients), Image.Resampling.BICUBIC
    )
    return np.asarray(warped)


class Texture:
    """Noise of mean 0 and deviation about 1 that covers the square of side 2 * `reach` around the origin.

    `cells` are the lattice cells along a side: a grain measures 2 * reach / cells. Beyond the square it is 0.
    A `stretch` above 1 draws the grains out along x.
    """

    def __init__(self, rng: np.random.Generator, cells: int, reach: float, stretch: float = 1.0) -> None:
        self.lattice = rng.standard_normal((cells, max(2, round(cells / stretch))), dtype=np.float32)
        self.reach = reach

    def to_lattice(self) -> Matrix:
        """The matrix from the plane's coordinates to lattice coordinates."""
        rows, columns = self.lattice.shape
        sx, sy = columns / (2 * self.reach), rows / (2 * self.reach)
        return np.array([[sx, 0, columns / 2], [0, sy, rows / 2], [0, 0, 1]])

    def seen(self, plane: Matrix, width: int, height: int) -> Field:
        """The field on a pixel grid; `plane` takes a pixel to the plane's coordinates."""
        return warp(self.lattice, self.to_lattice() @ plane, width, height)

    def level(self, cover: float) -> float:
        """The value that the share `cover` (0-1) of the lattice lies above."""
        return float(np.quantile(self.lattice, 1 - min(max(cover, 0.0), 1.0)))


class Cobbles(Texture):
    """Rounded bumps with narrow gaps between them, 0 in a gap to 1 on a top: granulating tissue."""

    def __init__(self, rng: np.random.Generator, cells: float, reach: float) -> None:
        side = _COBBLE_CELLS * _COBBLE_PIXELS
        # A cut-out of one tile at a random place and turn: a tile of its own costs more than a photograph.
        tile = np.rot90(_cobble_tile(), int(rng.integers(4)))
        keep = min(side, round(cells * _COBBLE_PIXELS))
        left, top = rng.integers(0, side - keep + 1, 2)
        self.lattice = np.ascontiguousarray(tile[top : top + keep, left : left + keep])
        self.reach = reach


_COBBLE_CELLS, _COBBLE_PIXELS = 40, 8


@lru_cache(maxsize=1)
def _cobble_tile() -> Field:
    rng = generator(40)
    side = np.arange(-1, _COBBLE_CELLS + 1) + 0.5
    points = np.stack(np.meshgrid(side, side), axis=-1).reshape(-1, 2)
    points += rng.uniform(-0.42, 0.42, points.shape)
    pixels = (np.arange(_COBBLE_CELLS * _COBBLE_PIXELS) + 0.5) / _COBBLE_PIXELS
    where = np.stack(np.meshgrid(pixels, pixels), axis=-1)
    nearest, second = np.moveaxis(cKDTree(points).query(where, k=2)[0], -1, 0)
    height = rng.uniform(0.55, 1, points.shape[0])[cKDTree(points).query(where)[1]]
    gap = np.clip((second - nearest) / 0.55, 0, 1)
    return (np.sqrt(gap * (2 - gap)) * height).astype(np.float32)

"""The camera: where it stands, how the light falls, and what lens and sensor make of the scene."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from builder.demo.noise import Field, Matrix
from builder.demo.patients import ANGLES

WIDTH, HEIGHT = 400, 300
"""Pixels of every photograph."""

_DISTANCE = 700.0


@dataclass(frozen=True)
class View:
    """One standpoint: `to_plane` takes a pixel (x, y, 1) to the limb's plane, `to_image` goes back."""

    to_plane: Matrix
    to_image: Matrix
    light: tuple[float, float]
    """Where the light comes from, (x, y) in the image, length 0-1: 0 is the ring flash, 1 grazes the skin."""

    def project(self, points: NDArray[np.float64]) -> NDArray[np.float64]:
        """Points (n, 2) of the plane as pixels (n, 2)."""
        homogeneous = np.c_[points, np.ones(len(points))] @ self.to_image.T
        return homogeneous[:, :2] / homogeneous[:, 2:]


def stand(rng: np.random.Generator, angle: str, free: float) -> View:
    """A standpoint for `angle` (left, middle, right), up to `free` pixels off the picture's middle."""
    side = ANGLES.index(angle) - 1
    yaw = np.radians(side * rng.uniform(14, 30) + rng.normal(0, 3))
    pitch = np.radians(rng.normal(0, 6))
    roll, zoom = rng.normal(0, 0.06), np.exp(rng.normal(0, 0.05))
    turn = _rotation(pitch, 0) @ _rotation(yaw, 1) @ _rotation(roll, 2)
    x = WIDTH / 2 + rng.uniform(-1, 1) * min(free, 60)
    y = HEIGHT / 2 + rng.uniform(-1, 1) * min(free, 35)
    # The plane's two axes, turned and seen from _DISTANCE through a pinhole, then moved to (x, y).
    plane_to_camera = np.column_stack([turn[:, 0], turn[:, 1], [0, 0, 0]]) * zoom
    plane_to_camera[2] = plane_to_camera[2] / _DISTANCE + [0, 0, 1]
    to_image = np.array([[1, 0, x], [0, 1, y], [0, 0, 1]]) @ plane_to_camera
    direction, strength = rng.normal(-np.pi / 2 + side * 0.6, 0.9), rng.uniform(0.35, 0.9)
    light = (float(strength * np.cos(direction)), float(strength * np.sin(direction)))
    return View(np.linalg.inv(to_image), to_image, light)


def _rotation(angle: float, axis: int) -> Matrix:
    c, s = np.cos(angle), np.sin(angle)
    i, j = [a for a in range(3) if a != axis]
    matrix = np.eye(3)
    matrix[i, i], matrix[i, j], matrix[j, i], matrix[j, j] = c, -s, s, c
    return matrix


def develop(scene: Field, rng: np.random.Generator) -> NDArray[np.uint8]:
    """The photograph (HEIGHT, WIDTH, 3) of `scene` (the same shape, 0-1): balance, exposure, blur, noise."""
    warmth, tint = rng.normal(0, 0.055), rng.normal(0, 0.02)
    exposure = np.exp(rng.normal(0, 0.09))
    gains = np.array([1 + warmth, 1 - tint, 1 - warmth + tint], dtype=np.float32) * np.float32(exposure)
    # A soft shoulder instead of a hard clip, so that highlights keep some colour.
    exposed = scene * gains
    exposed = np.where(exposed < 0.8, exposed, 1 - 0.2 * np.exp((0.8 - exposed) / 0.2))
    image = Image.fromarray((np.clip(exposed, 0, 1) * 255).astype(np.uint8))
    image = image.filter(ImageFilter.GaussianBlur(float(rng.gamma(3.0, 0.16))))
    pixels = np.asarray(image).astype(np.float32)
    if rng.random() < 0.12:
        pixels = _shaken(pixels, steps=int(rng.integers(2, 5)), sideways=bool(rng.random() < 0.5))
    grain = rng.standard_normal((HEIGHT, WIDTH), dtype=np.float32)
    colour = rng.standard_normal((HEIGHT // 2, WIDTH // 2, 3), dtype=np.float32).repeat(2, 0).repeat(2, 1)
    level = np.float32(rng.uniform(1.0, 4.0))
    pixels += level * grain[..., None] + (0.5 * level) * colour
    return np.clip(pixels + 0.5, 0, 255).astype(np.uint8)


def _shaken(pixels: Field, steps: int, sideways: bool) -> Field:
    axis = 1 if sideways else 0
    return np.mean([np.roll(pixels, shift, axis) for shift in range(steps)], axis=0, dtype=np.float32)

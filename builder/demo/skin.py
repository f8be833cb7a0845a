"""Limb and skin: outline, tone, mottling, creases, pores, and the drape it lies on."""

from dataclasses import dataclass

import numpy as np
from scipy.ndimage import gaussian_filter

from builder.demo.camera import HEIGHT, WIDTH, View
from builder.demo.noise import Field, Matrix, Texture, generator, resize, smoothstep
from builder.demo.patients import Patient

# sRGB of the six Fitzpatrick types, between what a flash and a window make of them.
TONES = (
    np.array(
        [[238, 200, 182], [226, 180, 152], [206, 154, 122], [174, 120, 88], [130, 86, 62], [88, 59, 48]],
        dtype=np.float32,
    )
    / 255
)

# Blue and green drapes, white sheets, a grey table.
_DRAPES = (
    np.array([[74, 128, 186], [86, 150, 140], [206, 208, 212], [214, 210, 200], [84, 80, 78]], dtype=np.float32) / 255
)

# Low-frequency things are drawn on a grid four times coarser.
_COARSE = 4
_REACH = 460.0


@dataclass
class Scene:
    """What stands before the camera, per pixel of the photograph."""

    albedo: Field
    """Colour without light, (H, W, 3), 0-1."""
    shade: Field
    """Light that falls on it, (H, W), about 1 where it faces the lamp."""
    gloss: Field
    """Mirrored light to add, (H, W), 0-1."""
    body: Field
    """1 on skin, 0 beside it, (H, W)."""


def skin_tone(patient: Patient) -> Field:
    """The patient's colour (3,), 0-1: the Fitzpatrick type with some personal redness and depth."""
    rng = generator(*patient.seed, 101)
    tone = TONES[patient.fitzpatrick - 1] * np.float32(np.exp(rng.normal(0, 0.05)))
    ruddy = np.float32(rng.uniform(-0.02, 0.10))
    return tone * np.array([1 + 0.3 * ruddy, 1 - ruddy, 1 - 0.8 * ruddy], dtype=np.float32)


def draw_limb(patient: Patient, view: View, visit_rng: np.random.Generator, rng: np.random.Generator) -> Scene:
    """The limb without its wounds, on the drape of this visit."""
    textures = generator(*patient.seed, 102)
    width, height = WIDTH // _COARSE, HEIGHT // _COARSE
    coarse = view.to_plane @ np.diag([_COARSE, _COARSE, 1.0])

    def coarse_noise(cells: int) -> Field:
        return Texture(textures, cells, _REACH).seen(coarse, width, height)

    depth = _outline(patient, textures, coarse, width, height) + 3.0 * coarse_noise(14)
    shade = _rounded(depth, 0.3 * patient.limb_width, view.light)
    redness = 0.6 * coarse_noise(9) + 0.5 * coarse_noise(34)
    pigment = 0.6 * coarse_noise(12) + 0.5 * coarse_noise(50)
    mottling, spots = textures.uniform(0.02, 0.07), textures.uniform(0.015, 0.05)
    flush = np.stack([0.15 * redness, -redness, -0.8 * redness], axis=-1) * np.float32(mottling)
    darker = pigment[..., None] * np.array([0.6, 0.9, 1.1], dtype=np.float32) * np.float32(spots)
    skin = resize(skin_tone(patient) * (1 + flush - darker), WIDTH, HEIGHT)

    cos, sin = np.cos(patient.limb_turn), np.sin(patient.limb_turn)
    turned = np.array([[-sin, cos, 0], [cos, sin, 0], [0, 0, 1]]) @ view.to_plane
    creases = Texture(textures, 150, _REACH, stretch=4.0).seen(turned, WIDTH, HEIGHT)
    pores = rng.standard_normal((HEIGHT, WIDTH), dtype=np.float32)
    pores[1:] += pores[:-1]
    pores[:, 1:] += pores[:, :-1]
    roughness = textures.uniform(0.6, 1.4)
    skin *= (1 - np.float32(0.022 * roughness) * np.abs(creases) + np.float32(0.009 * roughness) * pores)[..., None]

    drape, drape_shade = _drape(visit_rng, coarse, width, height, depth)
    depth = resize(depth, WIDTH, HEIGHT)
    body = smoothstep(-0.8, 0.8, depth)
    albedo = drape + body[..., None] * (skin - drape)
    light = drape_shade + body * (resize(shade, WIDTH, HEIGHT) - drape_shade)
    sheen = resize(np.clip(shade - 1.06, 0, 1) * 0.5, WIDTH, HEIGHT) * body
    return Scene(albedo, light, sheen, body)


def _outline(patient: Patient, rng: np.random.Generator, to_plane: Matrix, width: int, height: int) -> Field:
    """Distance to the limb's outline in pixels, positive inside. A leg crosses the picture, a foot ends in it."""
    x, y = plane_coordinates(to_plane, width, height)
    cos, sin = np.cos(patient.limb_turn), np.sin(patient.limb_turn)
    half = patient.limb_width / 2
    along = cos * x + sin * y
    across = cos * y - sin * x + np.float32(rng.uniform(-0.25, 0.25) * half)
    leg = half * (1 + np.float32(rng.uniform(-0.0004, 0.0004)) * along) - np.abs(across)
    if patient.limb == "leg":
        return leg
    largest = max(abs(w.x) + 0.7 * w.diameter for w in patient.wounds)
    end = np.float32(max(largest, 90) + rng.uniform(0, 60) - 0.5 * half)
    beyond = np.maximum(along - end, 0)
    rounded = half - np.sqrt(across**2 + beyond**2)
    if patient.limb == "heel":
        return rounded
    # Five toes along the ball of the foot, the great toe first.
    for i, place in enumerate(np.linspace(-0.78, 0.8, 5)):
        radius = half * (0.29 if i == 0 else 0.23 - 0.012 * i)
        forward = end + half * (np.sqrt(1 - place**2) + 0.10 - 0.08 * abs(place))
        spread = np.maximum(np.abs(along - forward) - 0.16 * half, 0)
        rounded = np.maximum(rounded, radius - np.hypot(spread, across - place * half))
    return rounded


def plane_coordinates(to_plane: Matrix, width: int, height: int) -> tuple[Field, Field]:
    """x and y in the plane, each (height, width), of every pixel's middle."""
    m = to_plane.astype(np.float32)
    u = np.arange(width, dtype=np.float32) + 0.5
    v = (np.arange(height, dtype=np.float32) + 0.5)[:, None]
    scale = 1 / (m[2, 0] * u + m[2, 1] * v + m[2, 2])
    return (m[0, 0] * u + m[0, 1] * v + m[0, 2]) * scale, (m[1, 0] * u + m[1, 1] * v + m[1, 2]) * scale


def _rounded(depth: Field, radius: float, light: tuple[float, float]) -> Field:
    """Light on a body that is flat in the middle and round within `radius` of its outline."""
    inside = np.clip(depth, 0, radius)
    relief = gaussian_filter(np.sqrt(inside * (2 * radius - inside) + 1), 1.3)
    slope_y, slope_x = np.gradient(relief, _COARSE)
    steep = 1 / np.sqrt(1 + slope_x**2 + slope_y**2)
    facing = (1 - 0.8 * (slope_x * light[0] + slope_y * light[1])) * steep
    # Lamps are near: the side towards them gets more of it.
    height, width = depth.shape
    towards = light[0] * (np.linspace(-1, 1, width, dtype=np.float32)) + light[1] * np.linspace(-1, 1, height)[:, None]
    return (0.42 + 0.58 * np.clip(facing, 0.2, 1.5) + 0.14 * towards).astype(np.float32)


def _drape(rng: np.random.Generator, coarse: Matrix, width: int, height: int, depth: Field) -> tuple[Field, Field]:
    colour = _DRAPES[rng.choice(len(_DRAPES), p=(0.3, 0.15, 0.25, 0.15, 0.15))] * np.float32(rng.uniform(0.8, 1.05))
    folds = Texture(rng, 12, _REACH, stretch=2.0).seen(coarse, width, height)
    shade = 0.86 + 0.07 * folds - 0.10 * np.abs(folds)
    shadow = 1 - 0.5 * np.exp(np.minimum(depth, 0) / 14)
    return np.broadcast_to(colour, (HEIGHT, WIDTH, 3)), resize(shade * shadow, WIDTH, HEIGHT)

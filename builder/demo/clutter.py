"""Things that lie about: a paper ruler, gauze, a gloved finger. Beside the wound, seldom in its crop."""

import numpy as np
from PIL import Image, ImageDraw

from builder.demo.camera import HEIGHT, WIDTH
from builder.demo.skin import Scene

Box = tuple[int, int, int, int]


def draw_clutter(scene: Scene, boxes: list[Box], rng: np.random.Generator) -> None:
    """Lays a ruler, a gauze and a finger at most into `scene`; never on `boxes`, seldom in their margin."""
    if rng.random() < 0.30:
        _lay_ruler(scene, boxes, rng)
    if rng.random() < 0.15:
        _lay_gauze(scene, boxes, rng)
    if rng.random() < 0.10:
        _lay_finger(scene, boxes, rng)


def _lay_ruler(scene: Scene, boxes: list[Box], rng: np.random.Generator) -> None:
    xmin, ymin, xmax, ymax = boxes[0]
    margin = 0.5 * max(xmax - xmin, ymax - ymin)
    below = rng.random() < 0.5
    gap = rng.uniform(0.35, 0.9) * margin + 8
    y = ymax + gap if below else ymin - gap - 26
    x, turn, length = (xmin + xmax) / 2 + rng.normal(0, 40), rng.normal(0, 0.05), rng.uniform(150, 260)
    layer = Image.new("LA", (WIDTH, HEIGHT))
    draw = ImageDraw.Draw(layer)
    along, across = np.array([np.cos(turn), np.sin(turn)]), np.array([-np.sin(turn), np.cos(turn)])
    origin = np.array([x, y]) - along * length / 2

    def at(a: float, b: float) -> tuple[float, float]:
        px, py = origin + along * a + across * b
        return float(px), float(py)

    draw.polygon([at(0, 0), at(length, 0), at(length, 26), at(0, 26)], fill=(236, 255))
    for i, a in enumerate(np.arange(6, length - 4, 3.5)):
        draw.line([at(a, 0), at(a, 11 if i % 10 == 0 else 8 if i % 5 == 0 else 5)], fill=(40, 255))
        if i % 10 == 0:
            draw.text(at(a - 2, 12), str(i // 10), fill=(40, 255))
    _paste(scene, np.asarray(layer, dtype=np.float32) / 255, boxes, (1.0, 1.0, 0.97))


def _lay_gauze(scene: Scene, boxes: list[Box], rng: np.random.Generator) -> None:
    corner = rng.integers(0, 2, 2) * (WIDTH, HEIGHT)
    size = rng.uniform(70, 120)
    y, x = np.mgrid[:HEIGHT, :WIDTH].astype(np.float32)
    turn = rng.uniform(0.2, 1.2)
    a = np.cos(turn) * (x - corner[0]) + np.sin(turn) * (y - corner[1])
    b = np.cos(turn) * (y - corner[1]) - np.sin(turn) * (x - corner[0])
    cover = np.clip(size - np.maximum(np.abs(a), np.abs(b)), 0, 1)
    weave = 0.88 + 0.05 * np.sin(a * 1.9) * np.sin(b * 1.9) + 0.04 * np.sin(a * 0.09 + 1)
    _paste(scene, np.stack([weave, cover], axis=-1).astype(np.float32), boxes, (1.0, 1.0, 0.98))


def _lay_finger(scene: Scene, boxes: list[Box], rng: np.random.Generator) -> None:
    left = rng.random() < 0.5
    tip = rng.uniform(30, 70) if left else WIDTH - rng.uniform(30, 70)
    level, width, slant = rng.uniform(40, HEIGHT - 40), rng.uniform(18, 26), rng.normal(0, 0.3)
    y, x = np.mgrid[:HEIGHT, :WIDTH].astype(np.float32)
    beyond = np.maximum(x - tip, 0) if left else np.maximum(tip - x, 0)
    across = y - level - slant * (x - tip)
    depth = width - np.hypot(across, beyond)
    cover = np.clip(depth, 0, 1)
    shade = 0.6 + 0.4 * np.sqrt(np.clip(depth / width, 0, 1))
    colour = ((0.36, 0.44, 0.86), (0.42, 0.36, 0.74), (0.88, 0.88, 0.86))[int(rng.integers(3))]
    _paste(scene, np.stack([shade, cover], axis=-1).astype(np.float32), boxes, colour)


def _paste(scene: Scene, layer: np.ndarray, boxes: list[Box], colour: tuple[float, float, float]) -> None:
    """Covers the scene by `layer` (H, W, 2: brightness and cover, 0-1); what would touch a box is left out."""
    cover = layer[..., 1:]
    for xmin, ymin, xmax, ymax in boxes:
        if cover[max(ymin - 2, 0) : ymax + 2, max(xmin - 2, 0) : xmax + 2].any():
            return
    scene.albedo += cover * (layer[..., :1] * np.array(colour, dtype=np.float32) - scene.albedo)
    scene.shade += cover[..., 0] * (0.95 - scene.shade)
    scene.gloss *= 1 - cover[..., 0]

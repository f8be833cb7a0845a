"""Wound tissue: how it changes as a wound heals, and how it looks."""

from dataclasses import dataclass

import numpy as np

from builder.demo.camera import HEIGHT, WIDTH, View
from builder.demo.noise import Cobbles, Field, Matrix, Texture, generator, smoothstep
from builder.demo.patients import INFLAMMATORY_UNTIL, PROLIFERATIVE_UNTIL, Wound
from builder.demo.skin import Scene, plane_coordinates

_BEEFY = np.array([186, 42, 44], dtype=np.float32) / 255
_DUSKY = np.array([124, 44, 50], dtype=np.float32) / 255
_PALE_BED = np.array([200, 92, 92], dtype=np.float32) / 255
_SLOUGH = np.array([[214, 178, 84], [190, 152, 92], [224, 208, 156]], dtype=np.float32) / 255
_ESCHAR = np.array([[34, 27, 26], [74, 48, 34]], dtype=np.float32) / 255
_NEW_SKIN = np.array([230, 150, 146], dtype=np.float32) / 255
_CALLUS = np.array([236, 214, 168], dtype=np.float32) / 255
_SCAB = np.array([112, 58, 40], dtype=np.float32) / 255
_MACERATED = np.array([236, 224, 208], dtype=np.float32) / 255

# The textures of a wound reach this many of its radii; erythema ends before.
_REACH = 2.1


@dataclass(frozen=True)
class Appearance:
    """What the eye sees of a wound; every value 0-1, covers as a share of the bed's area."""

    slough: float
    necrosis: float
    dusk: float
    """0 a beefy red bed, 1 a dusky one."""
    pallor: float
    granulation: float
    erythema: float
    swelling: float
    closure: float
    """How far new epithelium has grown in from the edge, as a share of the radius."""
    callus: float
    maceration: float
    scab: float
    """How far what is left of the bed has dried to a crust."""
    wetness: float


def appearance(wound: Wound, healing: float) -> Appearance:
    """The look at a degree of healing (0-1). A wound leads or lags its phase, and has its own habits."""
    rng = generator(*wound.seed, 201)
    healing = healing + float(rng.normal(0, 0.035))
    inflamed = _fades(healing, INFLAMMATORY_UNTIL)
    closing = 1 - _fades(healing, PROLIFERATIVE_UNTIL)
    granulating = (1 - inflamed) * (1 - closing)
    within = float(np.clip(healing / INFLAMMATORY_UNTIL, 0, 1))
    sloughy, necrotic = float(rng.beta(1.6, 1.3)), rng.random() < 0.42
    red_bedded = rng.random() < 0.25
    u = rng.random(8)
    slough = inflamed * (0.22 if red_bedded else 0.40 + 0.5 * sloughy) * (1.1 - 0.25 * within)
    return Appearance(
        slough=slough + granulating * 0.26 * u[0] * u[1] ** 0.5,
        necrosis=inflamed * (0.14 + 0.45 * u[2]) * (1.15 - 0.5 * within) * necrotic,
        dusk=inflamed * (0.3 + 0.7 * u[3]) + granulating * 0.35 * u[3] + closing * 0.4 * u[3],
        pallor=0.8 * u[4] ** 1.5,
        granulation=granulating * (0.7 + 0.3 * u[5]) + 0.15 * inflamed,
        erythema=inflamed * (0.55 + 0.45 * u[6]) + granulating * 0.22 * u[6] + closing * 0.15,
        swelling=inflamed * (0.5 + 0.5 * u[6]) + 0.1 * granulating,
        closure=granulating * (0.04 + 0.2 * u[7]) + closing * (0.6 + 0.55 * u[7]),
        callus=(granulating * 0.6 * u[1] + closing * (0.3 + 0.7 * u[1])) * (u[2] < 0.65),
        maceration=inflamed * 0.6 * u[5] + granulating * 0.35 * u[5] * u[6],
        scab=closing * float(u[1] < 0.4) * (0.5 + 0.5 * u[0]),
        wetness=inflamed * (0.55 + 0.4 * u[0]) + granulating * (0.6 + 0.3 * u[3]) + closing * 0.08,
    )


def _fades(healing: float, until: float) -> float:
    return float(smoothstep(until + 0.06, until - 0.06, np.asarray(healing, dtype=np.float32)))


class _Patch:
    """The part of the photograph around a wound, in the wound's own coordinates (its radius is 1)."""

    def __init__(self, wound: Wound, visit: int, view: View) -> None:
        radius = wound.size(visit) / 2
        cos, sin, stretch = np.cos(wound.turn), np.sin(wound.turn), np.sqrt(wound.elongation)
        to_wound_plane = np.array([[cos, sin, 0], [-sin, cos, 0], [0, 0, 1]]) @ np.array(
            [[1, 0, -wound.x], [0, 1, -wound.y], [0, 0, 1.0]]
        )
        to_wound = np.diag([1 / (radius * stretch), stretch / radius, 1.0]) @ to_wound_plane
        corners = (
            np.array([[x, y, 1] for x in (-_REACH, _REACH) for y in (-_REACH, _REACH)]) @ np.linalg.inv(to_wound).T
        )
        pixels = view.project(corners[:, :2])
        self.left, self.top = np.clip(np.floor(pixels.min(0)), 0, [WIDTH - 1, HEIGHT - 1]).astype(int)
        right, bottom = np.clip(np.ceil(pixels.max(0)), [self.left + 1, self.top + 1], [WIDTH, HEIGHT]).astype(int)
        self.width, self.height = int(right - self.left), int(bottom - self.top)
        self.window = np.s_[self.top : bottom, self.left : right]
        self.matrix: Matrix = to_wound @ view.to_plane @ np.array([[1, 0, self.left], [0, 1, self.top], [0, 0, 1.0]])
        self.radius = radius
        self.x, self.y = plane_coordinates(self.matrix, self.width, self.height)

    def seen(self, texture: Texture) -> Field:
        return texture.seen(self.matrix, self.width, self.height)


class _Grain:
    """The textures of one wound as seen in a patch: the same at every visit and from every angle."""

    def __init__(self, wound: Wound, patch: _Patch, rng: np.random.Generator) -> None:
        self.rough = patch.seen(Texture(rng, 20, _REACH))
        self.broad = patch.seen(Texture(rng, 7, _REACH))
        self.slough_texture = Texture(rng, 11, _REACH)
        self.patches = patch.seen(self.slough_texture)
        self.strands = patch.seen(Texture(rng, 44, _REACH, stretch=2.5))
        self.necrosis_texture = Texture(rng, 9, _REACH)
        self.dead = patch.seen(self.necrosis_texture)
        # Detail of about 2 px, however large the wound.
        self.fine = patch.seen(Texture(rng, int(np.clip(_REACH * wound.diameter / 2.2, 30, 200)), _REACH))
        self.cobbles_per_radius = float(np.clip(wound.diameter / 2 / 3.2, 4.5, 8))
        self.cobbles = patch.seen(Cobbles(rng, 2 * _REACH * self.cobbles_per_radius, _REACH))


class _Tissues:
    """Which tissue lies where, each (height, width) of the patch and 0-1."""

    def __init__(self, look: Appearance, patch: _Patch, grain: _Grain, rng: np.random.Generator) -> None:
        ring = _ring(rng, patch)
        # 0 in the middle, 1 on the outline, and on beyond it.
        self.s = s = ring + 0.03 * grain.rough
        edge = 0.035 + 0.5 / patch.radius
        self.wound = smoothstep(1 + edge, 1 - edge, s)
        self.bed_until = 1 - look.closure
        self.bed = np.zeros_like(s)
        if look.closure < 1:
            inner = ring + 0.06 * grain.rough + 0.06 * grain.broad
            self.bed = smoothstep(self.bed_until + edge, self.bed_until - edge, inner) * self.wound
        self.slough_depth = grain.patches + 0.3 * grain.rough + 0.07 * grain.strands
        self.slough_depth -= np.float32(grain.slough_texture.level(look.slough))
        dead = grain.dead - 0.9 * (s - 0.55) - np.float32(grain.necrosis_texture.level(look.necrosis))
        # A cover close to nothing would leave a speck where the texture peaks.
        self.necrosis = smoothstep(-0.16, 0.2, dead) * self.bed * (look.necrosis > 0.03)
        self.slough = smoothstep(-0.3, 0.4, self.slough_depth) * self.bed
        self.slough *= (1 - self.necrosis) * (look.slough > 0.015)
        self.red = self.bed * (1 - self.slough) * (1 - self.necrosis)
        self.callus = look.callus * smoothstep(0.86, 1.0, s) * smoothstep(1.5, 1.1, s + 0.1 * grain.broad)
        self.new_skin = (self.wound - self.bed).clip(0, 1)
        self.scar_lines = _scar_lines(rng, patch, grain.rough) * self.new_skin * min(1.0, 2 * look.closure**2)
        # Grains stand out in places and melt together in others.
        prominence = look.granulation * np.clip(0.75 + 0.35 * grain.patches, 0.25, 1.2)
        self.grains = prominence * (grain.cobbles - 0.55)


def draw_wound(scene: Scene, wound: Wound, visit: int, view: View) -> tuple[int, int, int, int]:
    """Draws the wound into `scene` and returns its box (xmin, ymin, xmax, ymax) in pixels, max exclusive."""
    healing = wound.healing[visit]
    assert healing is not None, "the wound was not photographed at this visit"
    look, patch, rng = appearance(wound, healing), _Patch(wound, visit, view), generator(*wound.seed, 202)
    grain = _Grain(wound, patch, rng)
    tissues = _Tissues(look, patch, grain, rng)
    skin = scene.albedo[patch.window]
    albedo = _paint_bed(_paint_margin(skin, look, tissues, grain), look, tissues, grain, rng)
    skin += scene.body[patch.window][..., None] * (albedo - skin)
    swollen = look.swelling * smoothstep(1.3, 1.05, tissues.s) * (1 - tissues.bed)
    wet = look.wetness * (tissues.red + 0.85 * tissues.slough + 0.35 * tissues.necrosis)
    wet += 0.35 * swollen + 0.12 * tissues.new_skin
    _light(scene, patch, _relief(look, patch, tissues, grain), wet, view.light)
    return _box(patch, tissues.s)


def _paint_margin(skin: Field, look: Appearance, tissues: _Tissues, grain: _Grain) -> Field:
    """Skin around the bed: erythema, callus, maceration, and the new skin that closes in."""
    s, strands = tissues.s, grain.strands[..., None]
    # Erythema is red on light skin and dusky on dark skin, and fades outwards.
    halo = look.erythema * smoothstep(1.74, 1.02, s + 0.12 * grain.broad)
    albedo = skin * (1 - halo[..., None] * np.array([0.06, 0.46, 0.38], dtype=np.float32))
    albedo = _lay(albedo, _CALLUS * (0.3 + 0.7 * albedo) * (1 + 0.07 * strands), 0.9 * tissues.callus)
    white = look.maceration * smoothstep(0.95, 1.02, s) * smoothstep(1.26, 1.06, s + 0.06 * grain.rough)
    albedo = _lay(albedo, _MACERATED * (0.5 + 0.5 * albedo), 0.85 * white)
    # New skin takes after the skin it grows from, but is pinker and, on dark skin, paler.
    pink = 0.62 * _NEW_SKIN + 0.38 * albedo.mean((0, 1))
    fresh = tissues.new_skin * smoothstep(1.04, 0.8 + 0.15 * tissues.bed_until, s)
    albedo = _lay(albedo, pink * (1 + 0.04 * strands + 0.04 * grain.broad[..., None]), 0.86 * fresh)
    lines = tissues.scar_lines.clip(-1, 1)[..., None]
    return albedo * (1 - 0.13 * lines * np.array([0.5, 1, 0.9], dtype=np.float32))


def _paint_bed(skin: Field, look: Appearance, tissues: _Tissues, grain: _Grain, rng: np.random.Generator) -> Field:
    """The open bed: flesh, slough over it, necrosis over both, and the shadow along its rim."""
    rough, broad, strands = grain.rough[..., None], grain.broad[..., None], grain.strands[..., None]
    flesh = _BEEFY + look.dusk * (_DUSKY - _BEEFY)
    flesh = flesh + look.pallor * (1 - look.dusk) * (_PALE_BED - flesh)
    flesh = flesh + look.scab * (_SCAB - flesh)
    grains = tissues.grains[..., None] * np.array([0.35, 0.65, 0.6], dtype=np.float32)
    flesh = flesh * (1 + grains + 0.10 * broad + 0.08 * rough)
    albedo = _lay(skin, flesh, tissues.bed)
    slough = rng.dirichlet((1.2, 0.9, 0.9)).astype(np.float32) @ _SLOUGH
    slough = slough + 0.35 * (rough + broad).clip(-1, 1) * (_SLOUGH[1] - _SLOUGH[2])
    # Thin slough lets the bed shine through.
    slough = slough - (0.5 * smoothstep(1.0, 0.0, tissues.slough_depth))[..., None] * (slough - flesh)
    albedo = _lay(albedo, slough * (1 + 0.09 * strands + 0.06 * rough), 0.92 * tissues.slough)
    eschar = _ESCHAR[0] + rng.random() ** 1.5 * (_ESCHAR[1] - _ESCHAR[0])
    albedo = _lay(albedo, eschar * (1 + 0.25 * rough + 0.15 * strands), 0.95 * tissues.necrosis)
    rim = np.exp(-(((tissues.s - 1) / 0.07) ** 2)) * (tissues.bed_until > 0.7)
    shadow = 1 - (0.25 - 0.1 * look.granulation) * rim
    return albedo * (shadow * (1 + 0.06 * tissues.wound * grain.fine))[..., None]


def _relief(look: Appearance, patch: _Patch, tissues: _Tissues, grain: _Grain) -> Field:
    """Height of the surface in radii of the wound: a sunken bed, bumps on it, a swollen or callous margin."""
    relief = -0.13 * tissues.bed + 0.045 * tissues.slough + 0.03 * tissues.necrosis - 0.05 * tissues.new_skin
    relief += 0.008 * grain.rough * tissues.bed + 0.006 * grain.strands * tissues.slough
    relief += 0.055 * tissues.grains * tissues.red * (6 / grain.cobbles_per_radius)
    relief += 0.16 * look.swelling * np.exp(-(((tissues.s - 1.14) / 0.2) ** 2))
    relief += 0.07 * tissues.callus - 0.016 * tissues.scar_lines
    return relief + 0.09 / patch.radius * grain.fine * tissues.wound


def _ring(rng: np.random.Generator, patch: _Patch) -> Field:
    """Distance from the middle in units of the outline's distance in that direction: a lobed circle."""
    theta = np.linspace(-np.pi, np.pi, 129)
    outline = np.ones_like(theta)
    for lobes, strength in ((2, 0.07), (3, 0.09), (4, 0.05), (5, 0.045), (7, 0.02)):
        outline += strength * rng.normal() * np.cos(lobes * theta + rng.uniform(0, 2 * np.pi))
    outline = np.clip(outline, 0.68, 1.3)
    direction = np.arctan2(patch.y, patch.x)
    return np.hypot(patch.x, patch.y) / np.interp(direction, theta, outline).astype(np.float32)


def _scar_lines(rng: np.random.Generator, patch: _Patch, rough: Field) -> Field:
    """Contraction lines that run in towards the middle, about -1 to 1."""
    spokes = np.convolve(np.tile(rng.normal(size=44), 2), (0.5, 1, 0.5), "same")[22:67]
    spokes[-1] = spokes[0]
    direction = np.arctan2(patch.y, patch.x) + 0.16 * rough
    turns = (direction / (2 * np.pi)) % 1
    lines = np.interp(turns, np.linspace(0, 1, 45), spokes).astype(np.float32)
    return lines * smoothstep(0.08, 0.4, np.hypot(patch.x, patch.y))


def _lay(under: Field, colour: Field, cover: Field) -> Field:
    return under + cover[..., None] * (colour - under)


def _light(scene: Scene, patch: _Patch, relief: Field, wet: Field, light: tuple[float, float]) -> None:
    slope_y, slope_x = np.gradient(relief * patch.radius)
    facing = -(slope_x * light[0] + slope_y * light[1])
    body = scene.body[patch.window]
    scene.shade[patch.window] *= 1 + 0.5 * body * np.tanh(1.5 * facing)
    # Highlights sit where the surface leans a little towards the lamp.
    lean = np.hypot(slope_x + 0.30 * light[0], slope_y + 0.30 * light[1])
    glint = np.exp(-((lean / 0.11) ** 2)) * (np.hypot(slope_x, slope_y) > 0.02)
    scene.gloss[patch.window] += (0.6 * body * wet * glint).astype(np.float32)


def _box(patch: _Patch, s: Field) -> tuple[int, int, int, int]:
    inside = s < 1.02
    columns, rows = np.flatnonzero(inside.any(0)), np.flatnonzero(inside.any(1))
    left, top = patch.left, patch.top
    return int(left + columns[0]), int(top + rows[0]), int(left + columns[-1] + 1), int(top + rows[-1] + 1)

"""Copies are found however they are flipped, turned, cropped or recoloured; other pictures are not."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.colors import hsv_to_rgb, rgb_to_hsv
from PIL import Image, ImageFilter

from builder.errors import BuilderError
from builder.quality.alignment import align, invert
from builder.quality.copies import MOST_THRESHOLD, CopyIndex, calibrate, find_duplicates, lightness
from builder.shards.dataset import resize
from tests.conftest import textured

TRAINING = [textured(seed, size) for seed, size in enumerate([64, 47, 90, 130, 64, 33, 170, 75] * 5)]
KEYS = [f"train-{number:02d}" for number in range(len(TRAINING))]
GROUPS = [f"patient-{number // 2}" for number in range(len(TRAINING))]
ALIKE = 0.75  # all copies here score above, all others below

Change = Callable[[np.ndarray], np.ndarray]


@pytest.fixture(scope="module")
def index() -> CopyIndex:
    return CopyIndex(TRAINING, KEYS, GROUPS)


def crop(pixels: np.ndarray, top: float, left: float, share: float = 0.9) -> np.ndarray:
    """A crop of this share of either side; `top` and `left` in [0, 1] of the room there is."""
    height, width = (round(share * side) for side in pixels.shape[:2])
    y, x = round(top * (pixels.shape[0] - height)), round(left * (pixels.shape[1] - width))
    return pixels[y : y + height, x : x + width]


def jpeg(pixels: np.ndarray) -> np.ndarray:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=70)
    return np.asarray(Image.open(buffer))


def hue(pixels: np.ndarray, turn: float) -> np.ndarray:
    hsv = rgb_to_hsv(pixels / 255)
    hsv[..., 0] = (hsv[..., 0] + turn) % 1
    return np.asarray((hsv_to_rgb(hsv) * 255).round().astype(np.uint8))


def blur(pixels: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(pixels.shape[1] / 64)))


CHANGES: dict[str, Change] = {
    "none": lambda x: x,
    "flip left to right": lambda x: x[:, ::-1],
    "flip top to bottom": lambda x: x[::-1],
    "quarter turn": np.rot90,
    "half turn": lambda x: np.rot90(x, 2),
    "transpose": lambda x: x.swapaxes(0, 1),
    "crop, centre": lambda x: crop(x, 0.5, 0.5),
    "crop, corner": lambda x: crop(x, 1.0, 0.0),
    "crop and flip": lambda x: crop(x, 0.2, 0.8)[:, ::-1],
    "crop and turn": lambda x: np.rot90(crop(x, 0.0, 0.9)),
    "larger view": lambda x: np.pad(x, ((len(x) // 9, 0), (0, len(x) // 9), (0, 0)), "reflect"),
    "larger view, turned": lambda x: np.rot90(np.pad(x, ((len(x) // 9, 0), (0, len(x) // 9), (0, 0)), "reflect")),
    "JPEG 70": jpeg,
    "brighter": lambda x: np.clip(x * 1.1, 0, 255).astype(np.uint8),
    "darker": lambda x: (x * 0.9).astype(np.uint8),
    "hue +36 degrees": lambda x: hue(x, 0.1),
    "hue -36 degrees": lambda x: hue(x, -0.1),
    "blur": blur,
    "512 px": lambda x: resize(x, 512),
    "32 px": lambda x: resize(x, 32),
}


@pytest.mark.parametrize("size", [None, 64])
@pytest.mark.parametrize("change", list(CHANGES))
def test_copies_are_found(index: CopyIndex, change: str, size: int | None) -> None:
    brought = TRAINING if size is None else [resize(image, size) for image in TRAINING]
    scores, keys = index.search([np.ascontiguousarray(CHANGES[change](image)) for image in brought])
    assert keys == KEYS
    assert scores.min() > ALIKE and scores.max() <= 1


def test_unaltered_crops_score_nearly_one(index: CopyIndex) -> None:
    assert index.search(TRAINING)[0].min() > 0.97


def test_other_pictures_are_not_copies(index: CopyIndex) -> None:
    scores, keys = index.search([textured(seed, 40 + seed % 90) for seed in range(1000, 1200)])
    assert scores.max() < ALIKE - 0.1
    assert set(keys) <= set(KEYS)


def test_the_own_patient_can_be_left_out(index: CopyIndex) -> None:
    scores, keys = index.search(TRAINING, GROUPS)
    assert scores.max() < ALIKE
    assert all(GROUPS[KEYS.index(str(key))] != group for key, group in zip(keys, GROUPS, strict=True))
    kept = index.search(TRAINING[:3], [None, "patient-9", GROUPS[2]])
    assert kept[1][:2] == KEYS[:2] and kept[1][2] != KEYS[2]


def test_nothing_left_to_compare_with_scores_zero() -> None:
    scores, keys = CopyIndex(TRAINING[:2], KEYS[:2], ["a", "a"]).search(TRAINING[:2], ["a", None])
    assert keys == [None, KEYS[1]]
    assert scores[0] == 0 and scores[1] > 0.97


def test_scores_do_not_depend_on_the_batch_or_the_order(index: CopyIndex) -> None:
    images = [*TRAINING[:15], *(textured(seed) for seed in range(300, 330))]
    scores, keys = index.search(images)
    order = np.random.default_rng(0).permutation(len(images))
    shuffled = index.search([images[place] for place in order])
    np.testing.assert_allclose(shuffled[0], scores[order], atol=1e-6)
    assert shuffled[1] == [keys[place] for place in order]
    alone = [index.search([image]) for image in images]
    np.testing.assert_allclose([score[0] for score, _ in alone], scores, atol=1e-6)
    assert [key[0] for _, key in alone] == keys


def test_the_order_of_the_training_crops_does_not_count(index: CopyIndex) -> None:
    images = [textured(seed) for seed in range(300, 320)]
    backwards = CopyIndex(TRAINING[::-1], KEYS[::-1]).search(images)
    scores, keys = index.search(images)
    np.testing.assert_allclose(backwards[0], scores, atol=1e-6)
    assert backwards[1] == keys


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 2000), form=st.integers(1, 7))
def test_every_dihedral_form_scores_the_same(index: CopyIndex, seed: int, form: int) -> None:
    image = textured(seed)  # 64 px: turning commutes with no resize in between
    turned = np.ascontiguousarray(np.rot90(image[:, ::-1] if form & 4 else image, form & 3))
    scores, keys = index.search([image, turned])
    assert keys[0] == keys[1]
    assert scores[0] == pytest.approx(scores[1], abs=1e-4)


@settings(max_examples=15, deadline=None)
@given(
    number=st.integers(0, len(TRAINING) - 1), top=st.floats(0, 1), left=st.floats(0, 1), share=st.floats(0.88, 1)
)  # fmt: skip
def test_a_small_crop_is_found_wherever_it_lies(
    index: CopyIndex, number: int, top: float, left: float, share: float
) -> None:
    scores, keys = index.search([crop(TRAINING[number], top, left, share)])
    assert keys == [KEYS[number]] and scores[0] > ALIKE


@pytest.mark.parametrize("level", [0, 128, 255])
def test_flat_images_resemble_nothing(index: CopyIndex, level: int) -> None:
    flat = np.full((64, 64, 3), level, np.uint8)
    assert index.search([flat])[0][0] == pytest.approx(0, abs=1e-6)
    with_flat = CopyIndex([flat, TRAINING[0]], ["flat", "crop"]).search([flat, TRAINING[0]])
    assert with_flat[0] == pytest.approx([0, 0.99], abs=0.02)
    assert with_flat[1][1] == "crop"


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (2, 3), (5, 5), (11, 11), (11, 200)])
def test_tiny_images_get_a_score(index: CopyIndex, shape: tuple[int, int]) -> None:
    tiny = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    scores, _ = index.search([tiny])
    assert 0 <= scores[0] < ALIKE
    own = CopyIndex([tiny, TRAINING[0]], ["tiny", "crop"]).search([TRAINING[0]])
    assert own[1] == ["crop"]


def test_one_training_crop_and_no_image(index: CopyIndex) -> None:
    one = CopyIndex(TRAINING[:1], KEYS[:1])
    scores, keys = one.search(TRAINING[:2])
    assert keys == [KEYS[0]] * 2 and scores[0] > 0.97 > ALIKE > scores[1]
    scores, keys = index.search([])
    assert scores.shape == (0,) and scores.dtype == np.float64 and keys == []


def test_of_identical_training_crops_the_first_is_named() -> None:
    same = CopyIndex([TRAINING[0]] * 12 + [TRAINING[1]], [f"{number:02d}" for number in range(13)])
    for batch in (1, 7, 25):
        assert set(same.search([TRAINING[0]] * batch)[1]) == {"00"}


def test_bad_input_is_refused(index: CopyIndex) -> None:
    image = TRAINING[0]
    for bad in (image.astype(np.float32) / 255, image[..., 0], image[..., :2], image.astype(np.int64), image.tolist()):
        with pytest.raises(TypeError, match="uint8"):
            index.search([bad])
    with pytest.raises(TypeError, match="uint8"):
        CopyIndex([image / 255], ["a"])
    with pytest.raises(BuilderError, match="no training crops"):
        CopyIndex([], [])
    with pytest.raises(ValueError, match="of one length"):
        CopyIndex(TRAINING[:1], KEYS[:2])
    with pytest.raises(ValueError, match="of one length"):
        CopyIndex(TRAINING[:2], KEYS[:2], ["a"])
    with pytest.raises(ValueError, match="more images"):
        CopyIndex(TRAINING[:2], KEYS[:1])
    with pytest.raises(ValueError, match="exclude"):
        index.search(TRAINING[:2], ["a"])


def test_lightness_does_not_see_hue() -> None:
    image = textured(3)
    assert np.abs(lightness(hue(image, 0.1)) - lightness(image)).max() <= 1  # rounding to 8 bits
    assert lightness(image).shape == (64, 64)


def test_alignment_finds_a_known_warp() -> None:
    generator = np.random.default_rng(0)
    picture = torch.from_numpy(generator.normal(0, 10, (1, 1, 8, 8)))
    smooth = torch.nn.functional.interpolate(picture, size=(64, 64), mode="bicubic")[0].float()
    smooth -= smooth.mean()
    warp = torch.tensor([[0.93, 0.04, 0.9, -0.06]])
    at = [((warp[0, i] * ((torch.arange(64) * 2 + 1) / 64 - 1) + warp[0, i + 1] + 1) * 64 - 1) / 2 for i in (0, 2)]
    grid = torch.stack(torch.meshgrid(at[1], at[0], indexing="ij")[::-1], -1)
    template = torch.nn.functional.grid_sample(smooth[None], (grid[None] * 2 + 1) / 64 - 1, align_corners=False)[0]
    correlation, found = align(2 * template, smooth, torch.tensor([[1.0, 0, 1, 0]]), 8, 0.01)
    assert correlation[0] > 0.999
    np.testing.assert_allclose(found.numpy(), warp.numpy(), atol=2e-3)
    backwards, found = align(smooth, template, torch.tensor([[1.0, 0, 1, 0]]), 8, 0.01)
    assert backwards[0] > 0.99
    np.testing.assert_allclose(found.numpy(), invert(warp.numpy()), atol=0.02)


# -- duplicates -------------------------------------------------------------------------------------------------------


def duplicated() -> tuple[list[np.ndarray], list[str]]:
    """45 pictures of which some repeat an earlier one: 30 of 2 flipped, 31 of 25 shifted, 44 of 0."""
    images = [textured(seed) for seed in range(45)]
    images[30] = np.ascontiguousarray(images[2][::-1])
    images[31] = crop(textured(25), 0.5, 1.0, 0.97)
    images[44] = images[0]
    return images, [f"{number:02d}" for number in range(45)]


def test_repeats_are_found_among_the_earlier_images() -> None:
    images, keys = duplicated()
    scores, earlier = find_duplicates(images, keys)
    assert scores[0] == 0 and earlier[0] is None
    assert {place for place, score in enumerate(scores) if score > ALIKE} == {30, 31, 44}
    assert (earlier[30], earlier[31], earlier[44]) == ("02", "25", "00")
    assert all(found is not None and found < key for found, key in zip(earlier[1:], keys[1:], strict=True))


def test_what_is_found_depends_on_the_images_before_alone() -> None:
    images, keys = duplicated()
    scores, earlier = find_duplicates(images, keys)
    for count in (1, 20, 33):
        part = find_duplicates(iter(images[:count]), keys[:count])
        np.testing.assert_allclose(part[0], scores[:count], atol=1e-6)
        assert part[1] == earlier[:count]
    for first in (0, 7, 20, 44, 45):
        rest = find_duplicates(images, keys, first)
        np.testing.assert_allclose(rest[0], scores[first:], atol=1e-6)
        assert rest[1] == earlier[first:]


def test_no_image_has_no_duplicate() -> None:
    scores, earlier = find_duplicates([], [])
    assert scores.shape == (0,) and earlier == []


# -- calibration ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ["beta", "normal z"])
def test_the_threshold_holds_on_crops_it_was_not_made_from(shape: str) -> None:
    generator = np.random.default_rng(1)

    def draw(count: int) -> np.ndarray:
        values = generator.beta(20, 24, count) if shape == "beta" else np.tanh(generator.normal(0.49, 0.08, count))
        return np.asarray(values)

    for count, allowed in ((60, 0.01), (1000, 0.001), (4000, 0.001)):
        assert (draw(100_000) >= calibrate(draw(count))["threshold"]).mean() <= allowed


def test_calibration_says_how_sure_it_is() -> None:
    scores = np.append(np.linspace(0.3, 0.5, 999), 0.99)
    result = calibrate(scores, ["a", "b"] * 500)
    assert (result["alarms"], result["n"], result["rate"], result["patients"]) == (1, 1000, 0.001, 2)
    # Clopper & Pearson's limits solve (1 - p)^1000 = 0.975 from below; from above they are tabled: 1 of 1000, 0.5559 %.
    assert result["interval"][0] == pytest.approx(1 - 0.975 ** (1 / 1000), rel=1e-6)
    assert result["interval"][1] == pytest.approx(0.00555892, rel=1e-4)
    none = calibrate(scores[:-1])
    assert none["alarms"] == 0 and none["patients"] is None
    assert none["interval"] == pytest.approx([0, 1 - 0.025 ** (1 / 999)], rel=1e-6)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=80))
def test_any_scores_give_a_usable_threshold(scores: list[float]) -> None:
    result = calibrate(scores)
    assert 0.65 <= result["threshold"] <= MOST_THRESHOLD
    assert 0 <= result["interval"][0] <= result["rate"] <= result["interval"][1] <= 1


def test_no_scores_give_no_threshold() -> None:
    with pytest.raises(BuilderError, match="no real crops"):
        calibrate([])

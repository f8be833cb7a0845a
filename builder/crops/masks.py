"""Boxes from masks: which pixels of a mask are wound, and a box around each connected part of them.

Masks come as label images, as pictures of black and white, and in the alpha channel of cut-outs; lossless or as
JPEG; with the void border of Pascal VOC; and inverted. What cannot be told, or cannot be a mask, is refused.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from builder.crops.boxes import Box, BoxSource
from builder.crops.layouts import Edges
from builder.crops.photographs import Photographs, without_suffix
from builder.crops.problems import Problems
from builder.errors import BuilderError
from builder.images import DEFAULT_MAX_PIXELS, ImageError, Mask, open_mask

SPECK = 16  # px; smaller components of a mask are slips of the pen
THIN = 4  # px; so are those with a shorter side
MAX_LABELS = 32  # more different values than this are no labels but shades
MIN_CONTRAST = 64  # of 255, between the darkest and the brightest value of a mask in shades
MAX_MIDDLE = 0.15  # share of pixels that are neither dark nor bright; photographs have far more
ALIKE = 24  # of 255: colours of one part of a lossy mask lie this near to their median
MIN_ALIKE = 0.9  # share of pixels for which that must hold
VOID = 255  # the label of "no statement" in Pascal VOC, Cityscapes and ADE20K
VOID_COLOUR = 0xE0E0C0  # its colour in Pascal VOC
LAST_INDEX = 30  # labels up to here are numbers of classes, not shades of grey
INVERTED_BORDER = 0.9  # share of the border that is wound, from which a mask looks inverted
WHOLE = 0.98  # share of a side that is all of it
FRAME = 0.05  # a part as long as the photograph and thinner than this share of the other side is a frame
_ENDINGS = re.compile(r"[ _.-]*(masks?|seg|segm|segmentation|labels?|gt|groundtruth|annotation)$", re.IGNORECASE)
_REMEDY = "replace the mask, or leave it out"


@dataclass(frozen=True)
class Components:
    """Boxes (px) around the connected parts of a mask, the specks that were left out, and the mask's width, height."""

    boxes: list[Edges]
    specks: int
    extent: tuple[int, int]


def read_masks(
    folder: Path,
    photographs: Photographs,
    problems: Problems,
    *,
    inverted: bool = False,
    max_pixels: int = DEFAULT_MAX_PIXELS,
) -> BoxSource:
    """Masks named like their photographs (`a.png` or `a_mask.png` for `a.jpg`).

    Args:
        folder: where they lie; subfolders are searched.
        photographs: what their names are looked up in.
        problems: masks that cannot be used are noted there.
        inverted: the wounds are 0, and everything else is not.
        max_pixels: masks of more pixels are refused.
    """
    masks = Photographs(folder, kind="masks")
    source = BoxSource(in_pixels=True)
    source.passed_over = masks.listing
    mask_of: dict[str, str] = {}
    for mask_name in masks.names:
        with problems.collected():
            name = _photograph_of(mask_name, photographs)
            if name is None:
                source.missing.append(f"mask {folder / mask_name}")
                continue
            if (other := mask_of.setdefault(name, mask_name)) != mask_name:
                raise BuilderError(
                    f"the masks {other} and {mask_name} in {folder} are both of {name}", "keep one mask of a photograph"
                )
            source.faulty.add(name)
            found = components_of(masks.path(mask_name), inverted=inverted, max_pixels=max_pixels)
            source.faulty.discard(name)
            source.left_out["specks in masks, left out"] += found.specks
            if not found.boxes:
                source.empty.add(name)
            for number, edges in enumerate(found.boxes, start=1):
                where = f"mask {folder / mask_name} component {number}"
                source.boxes.append(Box(name, *edges, where, str(number), extent=found.extent))
    return source


def components_of(path: Path, *, inverted: bool = False, max_pixels: int = DEFAULT_MAX_PIXELS) -> Components:
    """A box around each connected component (8 neighbours) of a mask that is no speck.

    Raises:
        BuilderError: the file is no picture that is read, or no mask, or a mask that says no wound.
    """
    from scipy import ndimage

    try:
        mask = open_mask(path, max_pixels=max_pixels)
    except ImageError as error:
        raise BuilderError(f"the mask {path} cannot be read: {error.reason}", error.remedy) from None
    try:
        wound = wound_of(mask)
        if inverted:
            wound = ~wound
        _require_plausible(wound, inverted)
        labelled, count = ndimage.label(wound, structure=np.ones((3, 3)))
        areas = np.bincount(labelled.ravel(), minlength=count + 1)[1:]
        boxes, specks = [], 0
        for (rows, columns), area in zip(ndimage.find_objects(labelled), areas, strict=True):
            _require_part(rows, columns, wound.shape)
            if area < SPECK or min(rows.stop - rows.start, columns.stop - columns.start) < THIN:
                specks += 1
            else:
                boxes.append((float(columns.start), float(rows.start), float(columns.stop), float(rows.stop)))
    except BuilderError as error:
        raise BuilderError(f"the mask {path} {error.what}", error.remedy) from None
    return Components(boxes, specks, (wound.shape[1], wound.shape[0]))


def wound_of(mask: Mask) -> np.ndarray:
    """Which pixels of a mask are wound: bool [H, W].

    - Transparency: what is opaque. Refused where the colours of the opaque part are a second mask.
    - Up to MAX_LABELS different values, saved without loss: all that aren't 0 (black), less the void label.
    - Shades (lossy, or with soft edges): what is nearer to the brightest than to the darkest value.

    Raises:
        BuilderError: it cannot be told; the message continues "the mask X ...".
    """
    if mask.from_alpha:
        _require_one_mask(mask)
        return mask.labels > _halfway(mask.labels)
    values = None if mask.lossy else _few_values(mask.labels)
    if values is not None:
        return _labelled(mask, values)
    brightness = _brightness(mask.labels)
    if int(brightness.max()) == int(brightness.min()) == 0:
        return np.zeros(brightness.shape, bool)
    wound = brightness > _halfway(brightness)
    _require_two_tones(mask.labels, brightness, wound)
    return wound


def _few_values(labels: np.ndarray) -> np.ndarray | None:
    """The different values of a label image, ascending; None for more than MAX_LABELS."""
    if len(np.unique(labels[::7, ::7])) > MAX_LABELS:  # most pictures are told by a few of their pixels
        return None
    values = np.unique(labels)
    return values if len(values) <= MAX_LABELS else None


def _labelled(mask: Mask, values: np.ndarray) -> np.ndarray:
    """Wound in a label image: all that isn't black, without the void label where other labels stand beside it."""
    wound = mask.labels != 0
    codes = mask.indices if mask.indices is not None else mask.labels
    if mask.indices is None and mask.labels.dtype == np.int32:
        void = mask.labels == VOID_COLOUR
        return wound & ~void if (wound & ~void).any() else wound
    void = wound & (codes == VOID)
    others = np.unique(codes[wound & ~void])
    if not void.any() or not others.size:
        return wound
    return wound & ~void if int(others.max()) <= LAST_INDEX or _is_frame_or_outline(void) else wound


def _is_frame_or_outline(void: np.ndarray) -> bool:
    """Whether a label runs along the border of the picture, or is a thin line throughout."""
    from scipy import ndimage

    if _border(void) >= INVERTED_BORDER:
        return True
    core = ndimage.binary_erosion(void, structure=np.ones((3, 3)), iterations=4)
    return bool(core.sum() <= 0.02 * void.sum())


def _require_one_mask(mask: Mask) -> None:
    """Refuse a cut-out whose opaque part is itself black and white: which of the two is meant cannot be known."""
    opaque = mask.labels > _halfway(mask.labels)
    shown = mask.colours[opaque] if mask.colours is not None else np.zeros(0)
    values = np.unique(shown[:: max(1, shown.size // 10_000)])
    if 1 < len(values) <= 8 and values[0] == 0 and 0.001 < (shown == 0).mean() < 0.999:
        raise BuilderError(
            "has one mask in its transparency and another in its colours",
            "save the one that is meant alone",
        )


def _halfway(values: np.ndarray) -> float:
    return (float(values.min()) + float(values.max())) / 2


def _brightness(labels: np.ndarray) -> np.ndarray:
    """The brightest channel, 0-255: [H, W]."""
    if labels.dtype == np.int32:
        return np.maximum.reduce([labels >> 16, labels >> 8 & 255, labels & 255]).astype(np.uint8)
    return (labels >> 8).astype(np.uint8) if labels.dtype == np.uint16 else labels


def _require_two_tones(labels: np.ndarray, brightness: np.ndarray, wound: np.ndarray) -> None:
    """Refuse shades that are no mask: a photograph, or labels of which a lossy format left nothing."""
    low, high = int(brightness.min()), int(brightness.max())
    if high - low < MIN_CONTRAST:
        raise BuilderError(
            f"is no mask: its values reach only from {low} to {high} of 255",
            "save masks as PNG: lossy formats destroy small labels",
        )
    quarter = (high - low) / 4
    middle = float(((brightness > low + quarter) & (brightness < high - quarter)).mean())
    alike = min(_alike(labels, _core(part)) for part in (wound, ~wound))
    if middle > MAX_MIDDLE or alike < MIN_ALIKE:
        raise BuilderError(
            "is no mask: it shows many shades, as a photograph does",
            "give --boxes a folder of masks, black where there is no wound",
        )


def _core(part: np.ndarray) -> np.ndarray:
    """A part without its edges, which are soft in lossy masks; nothing of a part that is little more than edges."""
    from scipy import ndimage

    core: np.ndarray = ndimage.binary_erosion(part, structure=np.ones((3, 3)), iterations=2, border_value=1)
    return core


def _alike(labels: np.ndarray, part: np.ndarray) -> float:
    """The share of a part's pixels whose channels all lie within ALIKE of the part's median."""
    values = labels[part]
    channels = [values >> 16, values >> 8 & 255, values & 255] if labels.dtype == np.int32 else [_brightness(values)]
    near = np.ones(values.shape, bool)
    for channel in channels:
        near &= np.abs(channel.astype(np.int32) - int(np.median(channel))) <= ALIKE
    return float(near.mean()) if near.size else 1.0


def _border(part: np.ndarray) -> float:
    """The share of the picture's border pixels that belong to a part."""
    return float(np.concatenate([part[0], part[-1], part[1:-1, 0], part[1:-1, -1]]).mean())


def _require_plausible(wound: np.ndarray, inverted: bool) -> None:
    """Refuse a mask whose wound is the photograph, or what lies around the wound."""
    if wound.all():
        raise BuilderError("says that the whole photograph is wound", _REMEDY)
    if wound.mean() > 0.5 and _border(wound) >= INVERTED_BORDER:
        raise BuilderError(
            "looks inverted: what it marks surrounds something else" + (" (with --inverted-masks)" if inverted else ""),
            "leave --inverted-masks out, or mend the mask"
            if inverted
            else "make wounds the part that isn't black, or say --inverted-masks where they are black",
        )


def _require_part(rows: slice, columns: slice, shape: tuple[int, ...]) -> None:
    """Refuse a connected part that is as large as the photograph, or a frame along one of its sides."""
    height, width = rows.stop - rows.start, columns.stop - columns.start
    tall, wide = height >= WHOLE * shape[0], width >= WHOLE * shape[1]
    if tall and wide:
        raise BuilderError(
            "has a part that reaches from edge to edge of the photograph both ways: a frame, a void border, or no mask",
            _REMEDY,
        )
    at_edge = rows.start == 0 or columns.start == 0 or rows.stop == shape[0] or columns.stop == shape[1]
    if at_edge and ((wide and height <= FRAME * shape[0]) or (tall and width <= FRAME * shape[1])):
        raise BuilderError("has a thin part along a whole side: a frame, not a wound", "leave out the frame")


def _photograph_of(mask_name: str, photographs: Photographs) -> str | None:
    stem = without_suffix(mask_name)
    found = photographs.find(stem, f"mask {mask_name}")
    if found is None and (shorter := _ENDINGS.sub("", stem)) != stem and shorter.rpartition("/")[2]:
        found = photographs.find(shorter, f"mask {mask_name}")
    return found

"""From whatever a picture's numbers mean to 8-bit RGB: depth, transparency, colour profile. One rule for each.

- Depth: of a value with more than 8 bits, the highest 8 (16 bits: v // 256). Never clipped.
- Transparency: laid on white, as a page shows it, so colours that somebody hid never come back.
- Colour: by the embedded profile to sRGB; as the numbers stand where there is none, or one that can't be used.
"""

from __future__ import annotations

import io
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms

from builder.images.errors import CONVERT, ImageError
from builder.images.header import Header

PAPER = (255, 255, 255)
DARK = 16  # 16-bit pictures whose 8-bit values all lie below this hold 12 bits or fewer
_DEEP = ("I;16", "I;16L", "I;16B", "I;16N", "I")


def to_rgb(image: Image.Image, header: Header, profile: bytes | None) -> Image.Image:
    """The picture in mode RGB, sRGB. ImageError for numbers without a stated scale, or where nothing is visible."""
    image = eight_bits(image, header)
    colours, alpha = split_alpha(image, header)
    rgb = _in_srgb(colours, profile)
    if header.bits > 8 and max(high for _, high in _extrema(rgb)) < DARK:
        raise ImageError(
            f"its {header.bits}-bit values lie below a sixteenth of the range: a camera's 12 bits or fewer, unscaled",
            "scale its values to the whole range, or save it with 8 bits a channel",
        )
    if alpha is None:
        return rgb
    low, high = _extrema(alpha)[0]
    if high == 0:
        raise ImageError("it is wholly transparent: nothing in it is visible", "save it without transparency")
    if low == 255:
        return rgb
    return Image.composite(rgb, Image.new("RGB", rgb.size, PAPER), alpha)


def eight_bits(image: Image.Image, header: Header) -> Image.Image:
    """The picture with 8 bits a channel. The decoder has kept the high byte of colours; of greys it is taken here."""
    if image.mode == "F" or (image.mode in _DEEP and header.bits > 16):
        raise ImageError(f"its values are of the kind {image.mode}, which has no stated scale", CONVERT)
    if image.mode not in _DEEP:
        return image
    return Image.fromarray((deep_values(image, header) >> (header.bits - 8)).astype(np.uint8))


def deep_values(image: Image.Image, header: Header) -> np.ndarray:
    """The values of a grey picture of 9 to 16 bits, 0 black; uint16 [H, W]."""
    values = np.asarray(image).astype(np.uint16)
    return np.uint16((1 << header.bits) - 1) - values if header.inverted else values


def split_alpha(image: Image.Image, header: Header) -> tuple[Image.Image, Image.Image | None]:
    """The colours, and how opaque they are (mode L, 255 opaque); None where the format has no transparency here."""
    if header.key is not None:
        return image, _where_not(image, header.key)
    if image.mode in ("La", "RGBa"):
        image = image.convert(image.mode[:-1] + "A")
    if image.mode == "PA" or "transparency" in image.info or (image.palette and image.palette.mode == "RGBA"):
        image = image.convert("RGBA")
    if image.mode not in ("LA", "RGBA"):
        return image, None
    *bands, alpha = image.split()
    return (bands[0] if len(bands) == 1 else Image.merge("RGB", bands)), alpha


def _where_not(image: Image.Image, key: tuple[int, ...]) -> Image.Image:
    plain = image.convert("L") if len(key) == 1 else image
    values = np.asarray(plain).reshape(image.height, image.width, len(key))
    return Image.fromarray(np.where((values == key).all(axis=2), 0, 255).astype(np.uint8))


def _extrema(image: Image.Image) -> list[tuple[int, int]]:
    found = image.getextrema()
    return [found] if len(image.getbands()) == 1 else list(found)  # type: ignore[list-item, arg-type]


def _in_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    if image.mode == "LAB":
        converted = _transform(None, "LAB").apply(image)
        assert converted is not None
        return converted
    if profile:
        with_profile = image if image.mode in ("RGB", "L", "CMYK") else image.convert("RGB")
        try:
            return _transform(profile, with_profile.mode).apply(with_profile)
        except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
            pass  # broken, or of other channels than the picture: its numbers stand, as viewers have it
    return image if image.mode == "RGB" else image.convert("RGB")


@lru_cache(maxsize=8)
def _transform(profile: bytes | None, mode: str) -> ImageCms.ImageCmsTransform:
    source = ImageCms.createProfile("LAB") if profile is None else io.BytesIO(profile)
    known = ImageCms.ImageCmsProfile(source)
    return ImageCms.buildTransform(known, ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")), mode, "RGB")

"""The one door for pixels: every picture, of whatever origin, is opened here, by one set of rules.

`read_picture` and `read_pixels` give colours, `read_header` the size that these will have, `open_mask` labels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from builder.images import heif, jpeg, plain, png, tiff, webp
from builder.images.colour import deep_values, split_alpha, to_rgb
from builder.images.errors import CONVERT, ImageError, cut_short, damaged
from builder.images.formats import sniff
from builder.images.header import Codec, Header
from builder.images.limits import DEFAULT_MAX_PIXELS, HIGHEST_MAX_PIXELS, check_size, pillow_allows
from builder.images.orientation import upright
from builder.images.source import ByteSource, opened

CODECS: dict[str, Codec] = {
    "JPEG": jpeg,
    "PNG": png,
    "WebP": webp,
    "TIFF": tiff,
    "BMP": plain.BMP,
    "GIF": plain.GIF,
    "HEIF": heif,
}
_HEAD = 256  # bytes that tell the format
_SPARE = 64 << 20  # bytes of a file beside its pixels


@dataclass(frozen=True)
class Mask:
    """A picture as labels: numbers, not colours. No profile is applied, nothing is averaged, EXIF's turn is.

    labels: [H, W]. Of greys, the values as stored (uint8; uint16 of more than 8 bits; 0 and 255 of 1 bit). Of colours
        and palettes, 0xRRGGBB (int32), or the grey value (uint8) where all three are equal everywhere. 0 is black.
        Of a picture with transparency, how opaque each pixel is (uint8, 0 transparent).
    indices: of a picture with a palette, the numbers as stored (uint8 [H, W]); else None.
    from_alpha: the labels were taken from transparency. colours: what the picture shows beside it, as labels.
    lossy: compression has changed values near edges; by content, not by name.
    format: as builder.images.formats.READ has it.
    """

    labels: np.ndarray
    indices: np.ndarray | None
    from_alpha: bool
    colours: np.ndarray | None
    lossy: bool
    format: str


def read_header(picture: bytes | Path, *, max_pixels: int = DEFAULT_MAX_PIXELS) -> Header:
    """What the header says; its `size` is that of the pixels that `read_pixels` gives. Raises ImageError as it does."""
    with opened(picture) as source:
        return _header(source, max_pixels)[1]


def read_picture(picture: bytes | Path, *, max_pixels: int = DEFAULT_MAX_PIXELS) -> Image.Image:
    """As `read_pixels`, as a Pillow image of mode RGB, without metadata."""
    return _colours(picture, max_pixels)[0]


def read_described(picture: bytes | Path, *, max_pixels: int = DEFAULT_MAX_PIXELS) -> tuple[np.ndarray, Header]:
    """As `read_pixels` and `read_header`, at the cost of one of them."""
    image, header = _colours(picture, max_pixels)
    return np.asarray(image), header


def _colours(picture: bytes | Path, max_pixels: int) -> tuple[Image.Image, Header]:
    def use(codec: Codec, source: ByteSource, header: Header) -> tuple[Image.Image, Header]:
        image = to_rgb(codec.decode(source, header), header, codec.profile(source, header))
        return upright(image, header.orientation), header

    found: tuple[Image.Image, Header] = _decoded(picture, max_pixels, use)
    return found


def read_pixels(picture: bytes | Path, *, max_pixels: int = DEFAULT_MAX_PIXELS) -> np.ndarray:
    """The pixels of an encoded picture or of the file that holds it: uint8 sRGB [H, W, 3], upright.

    See docs/images.md for what each kind of picture becomes.

    Args:
        picture: the encoded bytes, or a path.
        max_pixels: pictures of more pixels are refused by their header; up to HIGHEST_MAX_PIXELS.

    Raises:
        ImageError: it isn't read, is damaged or cut short, is too large, or nothing in it is visible.
    """
    return np.asarray(read_picture(picture, max_pixels=max_pixels))


def read_hashed(picture: bytes) -> np.ndarray:
    """As `read_pixels`, where the caller compares the pixels with the hash that a dataset has of them.

    Then a PNG as this project writes them needs no other checks. Up to the highest limit: `--max-pixels` has judged
    the picture when it came in.
    """
    image = png.plain_rgb(picture, HIGHEST_MAX_PIXELS)
    return read_pixels(picture, max_pixels=HIGHEST_MAX_PIXELS) if image is None else np.asarray(image)


def part(image: Image.Image, box: tuple[int, int, int, int]) -> np.ndarray:
    """The pixels of a part (left, top, right, bottom, px) of a picture that was read here: uint8 RGB [H, W, 3]."""
    left, top, right, bottom = box
    with pillow_allows((right - left) * (bottom - top)):
        return np.asarray(image.crop(box))


def open_mask(picture: bytes | Path, *, max_pixels: int = DEFAULT_MAX_PIXELS) -> Mask:
    """A picture as labels; see Mask. What they mean, and whether they can be, is for the caller to judge.

    Raises ImageError as `read_pixels`, and for colours of 16 bits, whose labels would lose their low byte.
    """
    mask: Mask = _decoded(picture, max_pixels, _mask)
    return mask


def _mask(codec: Codec, source: ByteSource, header: Header) -> Mask:
    image = codec.decode(source, header)
    if header.bits > 8 and not image.mode.startswith("I"):
        raise ImageError(f"it is a mask in colours of {header.bits} bits", CONVERT)
    indices = np.asarray(upright(image, header.orientation)) if image.mode == "P" else None
    if image.mode.startswith("I"):
        deep = Image.fromarray(deep_values(image, header))
        labels = np.asarray(upright(deep, header.orientation))
        return Mask(labels, None, False, None, header.lossy, header.format)
    colours, alpha = split_alpha(image, header)
    labels = _labels(upright(colours, header.orientation))
    if alpha is None or alpha.getextrema() == (255, 255):
        return Mask(labels, indices, False, None, header.lossy, header.format)
    opacity = np.asarray(upright(alpha, header.orientation))
    return Mask(opacity, indices, True, labels, header.lossy, header.format)


def _labels(image: Image.Image) -> np.ndarray:
    if image.mode in ("1", "L"):
        return np.asarray(image.convert("L"))
    if image.mode == "LAB":
        raise ImageError("it is a mask in Lab colours", CONVERT)
    rgb = np.asarray(image.convert("RGB"))
    if (rgb[..., 0] == rgb[..., 1]).all() and (rgb[..., 0] == rgb[..., 2]).all():
        return np.ascontiguousarray(rgb[..., 0])
    wide = rgb.astype(np.int32)
    return wide[..., 0] << 16 | wide[..., 1] << 8 | wide[..., 2]


def _decoded(picture: bytes | Path, max_pixels: int, use: Callable[[Codec, ByteSource, Header], Any]) -> Any:
    with opened(picture) as source:
        codec, header = _header(source, max_pixels)
        width, height = header.stored
        with pillow_allows(width * height), _explained(header.format):
            return use(codec, source, header)


def _header(source: ByteSource, max_pixels: int) -> tuple[Codec, Header]:
    """The codec and the header, whose size is allowed."""
    kind = sniff(source.at(0, _HEAD))
    if source.size > 8 * max_pixels + _SPARE:
        raise ImageError(
            f"it is a {kind} of {source.size >> 20:,} MiB, more than a picture of {max_pixels:,} pixels can have",
            "save its first picture alone",
        )
    with _explained(kind):
        codec = CODECS[kind]
        header = codec.header(source)
    check_size(header.stored, max_pixels)
    return codec, header


@contextmanager
def _explained(kind: str) -> Iterator[None]:
    """Make an ImageError of whatever a decoder raises: of received bytes it may be anything, and it always means that
    this picture cannot be decoded."""
    try:
        yield
    except ImageError:
        raise
    except MemoryError:
        raise ImageError(f"there is not enough memory for this {kind}", "scale it down, or use more memory") from None
    except Exception as error:
        if "truncated" in str(error):
            raise cut_short(kind) from None
        raise damaged(kind, str(error) or type(error).__name__) from None

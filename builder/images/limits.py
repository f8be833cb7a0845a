"""How large a picture may be, checked from its header before memory is taken for its pixels."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from PIL import Image

from builder.errors import BuilderError
from builder.images.errors import ImageError

DEFAULT_MAX_PIXELS = 150_000_000  # of pictures from outside; phones that say 108 megapixels stay below
HIGHEST_MAX_PIXELS = 1 << 28  # of all, and of pictures that a dataset holds: about 2 GB while one is decoded
MAX_PROFILE_BYTES = 16 << 20  # of a colour profile; those of printers have up to 4 MB
MAX_SCANS = 100  # of a JPEG; a progressive one has about ten, and each one costs as much as decoding the whole

_lifting = threading.Lock()


def valid_max_pixels(value: int) -> int:
    """`value`, a limit in pixels. BuilderError outside 1 to HIGHEST_MAX_PIXELS."""
    if not 1 <= value <= HIGHEST_MAX_PIXELS:
        raise BuilderError(f"--max-pixels is {value}", f"it must be from 1 to {HIGHEST_MAX_PIXELS}")
    return value


def check_size(size: tuple[int, int], max_pixels: int) -> None:
    """ImageError for a picture without pixels, or with more than `max_pixels`."""
    width, height = size
    if width < 1 or height < 1:
        raise ImageError(f"its size is {width} x {height} px")
    if width * height <= max_pixels:
        return
    counted = f"it has {width} x {height} px, more than the limit of {max_pixels:,} pixels"
    if width * height <= HIGHEST_MAX_PIXELS:
        raise ImageError(counted, f"if you trust it, allow it with --max-pixels {width * height}; or scale it down")
    raise ImageError(counted, "scale it down; a picture of this size may be made to exhaust memory")


@contextmanager
def pillow_allows(pixels: int) -> Iterator[None]:
    """Within the block, Pillow's own limit (89 megapixels, for the whole process) doesn't stop a picture of ours.

    Only for sizes above that limit, and one thread after the other, so that no thread restores what another one needs.
    """
    if Image.MAX_IMAGE_PIXELS is None or pixels <= Image.MAX_IMAGE_PIXELS:
        yield
        return
    with _lifting:
        before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = before

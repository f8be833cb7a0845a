"""The one door for pixels: every picture of every origin is opened here, by one set of rules (docs/images.md).

Format by content, out of a list; the one EXIF tag that turns; depth, transparency and colour profiles; limits.
"""

from __future__ import annotations

from builder.images.door import (
    Mask,
    open_mask,
    part,
    read_described,
    read_hashed,
    read_header,
    read_picture,
    read_pixels,
)
from builder.images.errors import ImageError
from builder.images.formats import READ, SUFFIXES
from builder.images.header import Header
from builder.images.limits import DEFAULT_MAX_PIXELS, HIGHEST_MAX_PIXELS, valid_max_pixels

__all__ = [
    "DEFAULT_MAX_PIXELS",
    "HIGHEST_MAX_PIXELS",
    "READ",
    "SUFFIXES",
    "Header",
    "ImageError",
    "Mask",
    "open_mask",
    "part",
    "read_described",
    "read_hashed",
    "read_header",
    "read_picture",
    "read_pixels",
    "valid_max_pixels",
]

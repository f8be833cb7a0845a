"""HEIC and HEIF, as iPhones write them, by the optional library pillow-heif."""

from __future__ import annotations

import importlib
import io
from typing import Any

from PIL import Image

from builder.images.errors import ImageError
from builder.images.header import Header
from builder.images.limits import MAX_PROFILE_BYTES
from builder.images.source import ByteSource


def header(source: ByteSource) -> Header:
    """See Codec. Turned already: libheif follows the container's own turn, and EXIF's is to be ignored beside it."""
    library = _library()
    opened = library.open_heif(io.BytesIO(source.all()), convert_hdr_to_8bit=True)
    return Header("HEIF", opened.size, lossy=True, layout=opened)


def profile(source: ByteSource, header: Header) -> bytes | None:
    """See Codec."""
    found = header.layout.info.get("icc_profile")
    return found if isinstance(found, bytes) and 0 < len(found) <= MAX_PROFILE_BYTES else None


def decode(source: ByteSource, header: Header) -> Image.Image:
    """See Codec. Of several pictures, the primary one."""
    opened = header.layout
    return Image.frombytes(opened.mode, opened.size, bytes(opened.data), "raw", opened.mode, opened.stride)


def _library() -> Any:
    try:
        return importlib.import_module("pillow_heif")
    except ImportError:
        raise ImageError(
            "it is HEIC/HEIF, which needs the library pillow-heif",
            "run `pip install pillow-heif` (or 'builder[heif]'), or save it as JPEG",
        ) from None

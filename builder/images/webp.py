"""WebP: its chunks are walked here, and the decoder is handed those of the pixels only.

Source: RFC 9649.
"""

from __future__ import annotations

import io
from dataclasses import dataclass, field

from PIL import Image, WebPImagePlugin

from builder.images.errors import cut_short, damaged
from builder.images.header import Header
from builder.images.limits import MAX_PROFILE_BYTES
from builder.images.orientation import exif_orientation
from builder.images.source import ByteSource

_PIXELS = {b"VP8X", b"VP8 ", b"VP8L", b"ALPH", b"ANIM", b"ANMF"}
_ABOUT_METADATA = 0x20 | 0x08 | 0x04  # flags of VP8X: a profile, EXIF and XMP are there
_ALPHA = 0x10  # flag of VP8X: there is transparency
_MAX_EXIF = 1 << 20

Range = tuple[int, int]


@dataclass
class _Chunks:
    pixels: list[Range] = field(default_factory=list)  # whole chunks, heading and padding included
    profile: Range | None = None


def header(source: ByteSource) -> Header:
    """See Codec."""
    end = 8 + int.from_bytes(source.at(4, 4), "little")
    if end > source.size + 1:  # some writers forget to pad the last chunk
        raise cut_short("WebP")
    chunks, orientation, stored, lossy, position = _Chunks(), None, None, False, 12
    kinds = set()
    while position + 8 <= min(end, source.size):
        head = source.at(position, 8)
        kind, length = head[:4], int.from_bytes(head[4:], "little")
        if position + 8 + length > source.size:
            raise cut_short("WebP")
        content = (position + 8, length)
        if kind in _PIXELS:
            kinds.add(kind)
            chunks.pixels.append((position, 8 + length + length % 2))
            stored = stored or _size(kind, source.at(content[0], 10))
            lossy |= kind == b"VP8 " or (kind == b"ANMF" and source.at(content[0] + 16, 4) != b"VP8L")
        elif kind == b"ICCP":
            chunks.profile = chunks.profile or content
        elif kind == b"EXIF" and orientation is None and length <= _MAX_EXIF:
            orientation = exif_orientation(source.at(*content))
        position += 8 + length + length % 2
    if stored is None:
        raise damaged("WebP", "it doesn't say its size")
    if {b"VP8X", b"VP8 "} <= kinds and source.at(20, 1)[0] & _ALPHA and b"ALPH" not in kinds:
        raise damaged("WebP", "its transparency is missing")
    return Header("WebP", stored, orientation or 1, 8, lossy, layout=chunks)


def profile(source: ByteSource, header: Header) -> bytes | None:
    """See Codec."""
    place = header.layout.profile
    return None if place is None or place[1] > MAX_PROFILE_BYTES else source.at(*place)


def decode(source: ByteSource, header: Header) -> Image.Image:
    """See Codec. Of an animation, the first picture on its canvas."""
    content = bytearray(b"WEBP")
    for offset, length in header.layout.pixels:
        content += source.at(offset, length).ljust(length, b"\0")
    if content[4:8] == b"VP8X":
        content[12] &= ~_ABOUT_METADATA & 0xFF
    image = WebPImagePlugin.WebPImageFile(io.BytesIO(b"RIFF" + len(content).to_bytes(4, "little") + content))
    image.load()
    return image


def _size(kind: bytes, start: bytes) -> tuple[int, int] | None:
    """Width and height that a chunk says, of its first ten bytes."""
    if kind == b"VP8X":
        return 1 + int.from_bytes(start[4:7], "little"), 1 + int.from_bytes(start[7:10], "little")
    if kind == b"VP8 " and start[3:6] == b"\x9d\x01\x2a":
        return int.from_bytes(start[6:8], "little") & 0x3FFF, int.from_bytes(start[8:10], "little") & 0x3FFF
    if kind == b"VP8L" and start[:1] == b"\x2f":
        packed = int.from_bytes(start[1:5], "little")
        return 1 + (packed & 0x3FFF), 1 + (packed >> 14 & 0x3FFF)
    return None

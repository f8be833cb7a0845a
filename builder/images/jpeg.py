"""JPEG, and the first picture of an MPO: its segments are walked here, and the decoder is handed those of the pixels.

Source: ITU-T T.81, annex B; JFIF 1.02; Adobe TN 5116; ICC.1:2022, annex B.4.
"""

from __future__ import annotations

import io
import re
from dataclasses import dataclass, field

from PIL import Image, JpegImagePlugin

from builder.images.errors import CONVERT, ImageError, cut_short, damaged
from builder.images.header import Header
from builder.images.limits import MAX_PROFILE_BYTES, MAX_SCANS
from builder.images.orientation import exif_orientation
from builder.images.source import ByteSource

SOI, EOI, SOS = 0xD8, 0xD9, 0xDA
_BARE = {0x01, *range(0xD0, 0xD8)}  # markers without a segment
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_READ = {0xC0, 0xC1, 0xC2}  # baseline, extended, progressive: Huffman-coded
_JFIF = b"\xff\xe0\0\x10JFIF\0\1\1\0\0\1\0\1\0\0"  # says that the colours are YCbCr, and nothing else
_MARKER = re.compile(rb"\xff[^\0\xff]")
_IN_SCAN = re.compile(rb"\xff[^\0\xff\xd0-\xd7]")
_WINDOW = 1 << 16

Range = tuple[int, int]


@dataclass
class _Segments:
    kept: list[Range] = field(default_factory=list)  # whole segments, marker included
    profile: list[Range] = field(default_factory=list)  # contents of the ICC segments
    jfif: bool = False
    pixels: int = 0  # offset of the first scan


def header(source: ByteSource) -> Header:
    """See Codec. Read as far as the first scan."""
    segments, orientation, frame = _Segments(), None, b""
    position = 2
    while True:
        position, code = _next_marker(source, position)
        if code in _BARE:
            position += 2
            continue
        if code in (SOI, EOI):
            raise damaged("JPEG", "it ends before its pixels")
        length = int.from_bytes(source.at(position + 2, 2), "big")
        if length < 2 or position + 2 + length > source.size:
            raise cut_short("JPEG") if length >= 2 else damaged("JPEG", "a segment has no length")
        if code == SOS:
            segments.pixels = position
            break
        content = (position + 4, length - 2)
        if 0xE0 <= code <= 0xEF or code == 0xFE:
            start = source.at(content[0], min(content[1], 14))
            segments.jfif |= code == 0xE0 and start.startswith(b"JFIF\0") and content[1] >= 14
            if code == 0xE1 and orientation is None and start.startswith(b"Exif\0"):
                orientation = exif_orientation(source.at(*content))
            elif code == 0xE2 and start.startswith(b"ICC_PROFILE\0"):
                segments.profile.append(content)
            elif code == 0xEE and start.startswith(b"Adobe"):  # says how the colours are stored
                segments.kept.append((position, length + 2))
        else:
            segments.kept.append((position, length + 2))
            if code in _FRAMES:
                if frame or code not in _READ:
                    raise ImageError(f"it is a JPEG of a kind that is not read (frame {code & 15})", CONVERT)
                frame = source.at(*content)
        position += 2 + length
    if len(frame) < 6:
        raise damaged("JPEG", "it doesn't say its size")
    if frame[0] != 8:
        raise ImageError(f"it is a JPEG of {frame[0]} bits a channel", CONVERT)
    stored = (int.from_bytes(frame[3:5], "big"), int.from_bytes(frame[1:3], "big"))
    return Header("JPEG", stored, orientation or 1, 8, lossy=True, layout=segments)


def profile(source: ByteSource, header: Header) -> bytes | None:
    """See Codec. None where a part of it is missing."""
    parts = {}
    for offset, length in header.layout.profile:
        content = source.at(offset, length)
        if len(content) > 14:
            parts[content[12]] = content[14:]
            total = content[13]
    if not parts or sorted(parts) != list(range(1, total + 1)):
        return None
    whole = b"".join(parts[number] for number in sorted(parts))
    return whole if len(whole) <= MAX_PROFILE_BYTES else None


def decode(source: ByteSource, header: Header) -> Image.Image:
    """See Codec. A JPEG has no checksums: damage is known by a missing end, and by less than a bit for each block."""
    segments: _Segments = header.layout
    data = source.all()
    blocks = -(-header.stored[0] // 8) * -(-header.stored[1] // 8)
    if data.find(b"\xff\xd9", segments.pixels) < 0 or 8 * (len(data) - segments.pixels) < blocks:
        raise cut_short("JPEG")
    if data.count(b"\xff\xda", segments.pixels) > MAX_SCANS and _scans(data, segments.pixels) > MAX_SCANS:
        raise ImageError(f"it is a JPEG of more than {MAX_SCANS} scans", CONVERT)
    parts = [data[start : start + length] for start, length in segments.kept]
    head = b"\xff\xd8" + (_JFIF if segments.jfif else b"")
    stripped = b"".join([head, *parts, memoryview(data)[segments.pixels :]])
    image = JpegImagePlugin.JpegImageFile(io.BytesIO(stripped))
    image.load()
    return image


def _next_marker(source: ByteSource, position: int) -> tuple[int, int]:
    """Place and code of the next marker; what stands before it is passed over, as libjpeg does."""
    window = source.at(position, 2)  # where it mostly is
    while True:
        if found := _MARKER.search(window):
            return position + found.start(), window[found.start() + 1]
        if position + 2 > source.size:
            raise cut_short("JPEG")
        position += max(0, len(window) - 1)  # its last byte may be the first of a marker
        window = source.at(position, _WINDOW)
        if len(window) < 2:
            raise cut_short("JPEG")


def _scans(data: bytes, position: int) -> int:
    """How many scans the first picture has, from the first of them on."""
    scans = 0
    while found := _IN_SCAN.search(data, position):
        code = data[found.start() + 1]
        if code == EOI:
            break
        scans += code == SOS
        position = found.start() + 2 + int.from_bytes(data[found.start() + 2 : found.start() + 4], "big")
    return scans

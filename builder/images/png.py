"""PNG: its chunks are walked here, and the decoder is handed those of the pixels only.

So text, EXIF and profiles can neither fail nor fill memory, and an animation is its first picture.
Source: Portable Network Graphics (third edition), W3C 2025.
"""

from __future__ import annotations

import io
import zlib
from dataclasses import dataclass, field

from PIL import Image, PngImagePlugin

from builder.images.errors import ImageError, cut_short, damaged
from builder.images.header import Header
from builder.images.limits import MAX_PROFILE_BYTES
from builder.images.orientation import exif_orientation
from builder.images.source import ByteSource

SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PLAIN_START, _PLAIN_KIND = SIGNATURE + b"\0\0\0\rIHDR", b"\x08\2\0\0\0"  # 8 bits, RGB, deflate, not interlaced
_END = b"\0\0\0\0IEND\xaeB`\x82"
_PIXELS = {b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"}
_BESIDE = {b"tEXt", b"zTXt", b"iTXt", b"tIME", b"eXIf", b"iCCP", b"gAMA", b"cHRM", b"sRGB", b"sBIT", b"bKGD", b"hIST"}
_BESIDE |= {b"pHYs", b"sPLT", b"acTL", b"fcTL", b"fdAT", b"cICP", b"mDCV", b"cLLI", b"oFFs", b"vpAg", b"caNv", b"orNT"}
_RAW_EXIF = (b"Raw profile type exif\0", b"Raw profile type APP1\0")  # as ImageMagick wrote it before eXIf was there
_PIECE = 1 << 20  # bytes that are decompressed at a time
_MAX_TEXT = 1 << 20  # bytes of a chunk that is looked at for its EXIF

Range = tuple[int, int]  # offset and length of a chunk's content


@dataclass
class _Chunks:
    pixels: list[tuple[bytes, Range]] = field(default_factory=list)
    unknown: list[tuple[bytes, Range]] = field(default_factory=list)  # what its name doesn't explain
    profile: Range | None = None
    clean: bool = True  # nothing but the pixels' chunks, from the first byte to the last


def header(source: ByteSource) -> Header:
    """See Codec. The whole file is walked, chunk by chunk: EXIF may stand behind the pixels."""
    chunks, orientation, position = _Chunks(), None, 8
    kind = b""
    while kind != b"IEND":
        head = source.at(position, 8)
        length, kind = int.from_bytes(head[:4], "big"), head[4:]
        if len(head) < 8 or position + 12 + length > source.size:
            raise cut_short("PNG")
        place = (position + 8, length)
        if not chunks.pixels and (kind != b"IHDR" or length != 13):
            raise damaged("PNG", "it doesn't begin with its header")
        if kind in _PIXELS:
            chunks.pixels.append((kind, place))
        elif kind[:1].isupper():
            raise damaged("PNG", f"it has a part {kind.decode('latin-1')!r} that no reader knows")
        else:
            chunks.clean = False
            if kind not in _BESIDE:
                chunks.unknown.append((kind, place))
            if kind == b"iCCP":
                chunks.profile = chunks.profile or place
            elif orientation is None and kind in (b"eXIf", b"tEXt", b"zTXt"):
                orientation = _orientation(source, kind, place)
        position += 12 + length
    chunks.clean &= position == source.size
    values = source.at(*chunks.pixels[0][1])
    bits, colours = values[8], values[9]
    if colours == 3 and all(kind != b"PLTE" for kind, _ in chunks.pixels):
        raise damaged("PNG", "its palette is missing")
    return Header(
        "PNG",
        (int.from_bytes(values[:4], "big"), int.from_bytes(values[4:8], "big")),
        orientation or 1,
        bits,
        key=_key(source, chunks, bits, colours),
        layout=chunks,
    )


def plain_rgb(data: bytes, max_pixels: int) -> Image.Image | None:
    """The short way for a PNG as this project writes them: 8-bit RGB, and nothing but pixels in it.

    None for any other, and for one that can't be decoded or is too large: the long way says why. Of a sound one it
    gives the same pixels. Neither checksums nor the number of rows are looked at: the caller has a hash of the pixels.
    """
    if data[:16] != _PLAIN_START or data[24:29] != _PLAIN_KIND or data[-12:] != _END:
        return None
    if int.from_bytes(data[16:20], "big") * int.from_bytes(data[20:24], "big") > max_pixels:
        return None
    view, position, end = memoryview(data), 8, len(data) - 12
    while position < end:
        content = position + 8
        after = content + int.from_bytes(view[position : position + 4], "big")
        if after > end or (position > 8 and view[position + 4 : content] != b"IDAT"):
            return None
        position = after + 4
    try:
        image = PngImagePlugin.PngImageFile(io.BytesIO(data))
        image.load()
    except (OSError, SyntaxError, ValueError):
        return None
    return image


def profile(source: ByteSource, header: Header) -> bytes | None:
    """See Codec."""
    place: Range | None = header.layout.profile
    if place is None:
        return None
    return _inflated(source.at(*place).partition(b"\0")[2][1:], MAX_PROFILE_BYTES)


def decode(source: ByteSource, header: Header) -> Image.Image:
    """See Codec."""
    chunks: _Chunks = header.layout
    decisive = [*chunks.pixels, *chunks.unknown, *([(b"iCCP", chunks.profile)] if chunks.profile else [])]
    for kind, place in decisive:  # an unknown name may be a damaged one: of the transparency, say
        if not _is_sound(source, kind, place):
            raise damaged("PNG", f"the checksum of its part {kind.decode('latin-1')!r} is wrong")
    data = source.all()
    if not chunks.clean or header.key is not None:
        kept = [place for kind, place in chunks.pixels if kind != b"tRNS" or header.key is None]
        data = SIGNATURE + b"".join([data[start - 8 : start + length + 4] for start, length in kept])
    image = PngImagePlugin.PngImageFile(io.BytesIO(data))
    image.load()
    interlaced = source.at(28, 1) == b"\1"
    if (interlaced or _last_row_is_zero(image)) and not _complete(source, header, interlaced=interlaced):
        raise cut_short("PNG")
    return image


def _last_row_is_zero(image: Image.Image) -> bool:
    """So the decoder leaves rows, without a word, if the data end too early."""
    return image.crop((0, image.height - 1, image.width, image.height)).getbbox(alpha_only=False) is None


def _complete(source: ByteSource, header: Header, *, interlaced: bool) -> bool:
    """Whether the compressed data hold all rows."""
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[source.at(25, 1)[0]]
    missing = sum(
        (1 + -(-width * header.bits * channels // 8)) * height
        for width, height in _passes(*header.stored, interlaced=interlaced)
    )
    stream = zlib.decompressobj()
    for kind, place in header.layout.pixels:
        data = source.at(*place) if kind == b"IDAT" else b""
        while missing > 0 and (data or stream.unconsumed_tail):
            missing -= len(stream.decompress(stream.unconsumed_tail + data, _PIECE))
            data = b""
    return missing <= 0


def _passes(width: int, height: int, *, interlaced: bool) -> list[tuple[int, int]]:
    """Width and height of the picture, or of Adam7's seven parts of it; those without pixels have no rows."""
    if not interlaced:
        return [(width, height)]
    steps = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
    parts = [(-(-(width - x) // across), -(-(height - y) // down)) for x, y, across, down in steps]
    return [(columns, rows) for columns, rows in parts if columns > 0 and rows > 0]


def _key(source: ByteSource, chunks: _Chunks, bits: int, colours: int) -> tuple[int, ...] | None:
    """The transparent colour of a picture in greys (colour type 0) or RGB (2), in 8 bits."""
    place = next((place for kind, place in chunks.pixels if kind == b"tRNS"), None)
    if place is None or colours not in (0, 2):
        return None
    if bits == 16:
        raise ImageError(
            "it has 16 bits a channel and one colour that stands for transparent", "save it with an alpha channel"
        )
    content, wanted = source.at(*place), 1 if colours == 0 else 3
    if len(content) != 2 * wanted:
        raise damaged("PNG", "its transparent colour is incomplete")
    highest = (1 << bits) - 1
    return tuple(
        (int.from_bytes(content[at : at + 2], "big") & highest) * 255 // highest for at in range(0, 2 * wanted, 2)
    )


def _is_sound(source: ByteSource, kind: bytes, place: Range) -> bool:
    """Whether the checksum of a chunk is right."""
    checksum = int.from_bytes(source.at(place[0] + place[1], 4), "big")
    return zlib.crc32(source.at(*place), zlib.crc32(kind)) == checksum


def _orientation(source: ByteSource, kind: bytes, place: Range) -> int | None:
    if kind == b"eXIf":
        return exif_orientation(source.at(*place)) if place[1] <= _MAX_TEXT else None
    start = source.at(place[0], 32)
    name = next((name for name in _RAW_EXIF if start.startswith(name)), None)
    if name is None or place[1] > _MAX_TEXT:
        return None
    content = source.at(*place)[len(name) :]
    text = _inflated(content[1:], _MAX_TEXT) if kind == b"zTXt" else content
    digits = b"".join((text or b"").split()[2:])  # after the profile's name and length
    try:
        return exif_orientation(bytes.fromhex(digits.decode("ascii")))
    except ValueError:
        return None  # a text that is no EXIF says nothing of the orientation


def _inflated(content: bytes, limit: int) -> bytes | None:
    """Decompressed; None when it can't be, or would be longer than `limit` bytes."""
    stream = zlib.decompressobj()
    try:
        found = stream.decompress(content, limit)
    except zlib.error:
        return None
    return found if stream.eof else None

"""TIFF and BigTIFF, first picture: the decoder is handed a directory that holds the tags of the pixels only.

So tags of text, EXIF, GPS or other pages can fail nothing, and no decoder turns the picture behind our back.
Source: TIFF 6.0 with supplements 1 and 2; BigTIFF.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

from PIL import Image, TiffImagePlugin

from builder.images.errors import CONVERT, ImageError, cut_short, damaged
from builder.images.header import Header
from builder.images.limits import HIGHEST_MAX_PIXELS, MAX_PROFILE_BYTES
from builder.images.source import ByteSource

WIDTH, LENGTH, BITS, COMPRESSION, PHOTOMETRIC, ORIENTATION, SAMPLES = 256, 257, 258, 259, 262, 274, 277
STRIPS, ROWS, STRIP_BYTES, PLANAR = 273, 278, 279, 284
TILE_WIDTH, TILE_LENGTH, TILES, TILE_BYTES = 322, 323, 324, 325
EXTRA, SAMPLE_FORMAT, SUBSAMPLING, PROFILE, DNG = 338, 339, 530, 34675, 50706
_OF_DECODERS = {266, 292, 293, 317, 320, 332, 347, 512, 513, 514, 515, 517, 518, 519, 520, 521, 529, 532}
_PIXELS = {WIDTH, LENGTH, BITS, COMPRESSION, PHOTOMETRIC, SAMPLES, STRIPS, ROWS, STRIP_BYTES, PLANAR, TILE_WIDTH}
_PIXELS |= {TILE_LENGTH, TILES, TILE_BYTES, EXTRA, SAMPLE_FORMAT, SUBSAMPLING} | _OF_DECODERS
_INTEGERS = {1: 1, 3: 2, 4: 4, 16: 8}  # bytes of BYTE, SHORT, LONG, LONG8
_WIDTHS = {**_INTEGERS, 2: 1, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 17: 8, 18: 8}
_LOSSY = {6, 7, 34892, 50001}  # old and new JPEG, lossy DNG, WebP
_SINGLE = {WIDTH, LENGTH, COMPRESSION, PHOTOMETRIC, SAMPLES, ROWS, PLANAR, TILE_WIDTH, TILE_LENGTH}
_MAX_SAMPLES = 6
_MAX_ENTRIES = 4096


@dataclass(frozen=True)
class _Entry:
    raw: bytes  # as it stands in the directory
    kind: int
    count: int
    offset: int  # of its values


class _Directory:
    """The first directory of a TIFF."""

    def __init__(self, source: ByteSource) -> None:
        self._source, head = source, source.at(0, 16)
        self.order = "little" if head[:2] == b"II" else "big"
        self.big = 43 in head[2:4]
        self.word = 8 if self.big else 4  # bytes of an offset
        start = self._number(head[8:16] if self.big else head[4:8])
        width, counted = (20, 8) if self.big else (12, 2)
        count = self._number(source.at(start, counted))
        if not 0 < count <= _MAX_ENTRIES:
            raise damaged("TIFF", "it has no directory")
        block = source.at(start + counted, count * width)
        if len(block) < count * width:
            raise cut_short("TIFF")
        self.entries: dict[int, _Entry] = {}
        for at in range(0, len(block), width):
            raw = block[at : at + width]
            kind, number = self._number(raw[2:4]), self._number(raw[4 : 4 + self.word])
            inside = _WIDTHS.get(kind, 1) * number <= self.word
            offset = start + counted + at + 4 + self.word if inside else self._number(raw[-self.word :])
            self.entries.setdefault(self._number(raw[:2]), _Entry(raw, kind, number, offset))

    def values(self, tag: int) -> tuple[int, ...]:
        """The integers of a tag; none where it isn't there or holds no integers."""
        entry = self.entries.get(tag)
        if entry is None or entry.kind not in _INTEGERS:
            return ()
        width = _INTEGERS[entry.kind]
        if entry.offset + width * entry.count > self._source.size:
            raise cut_short("TIFF")
        data = self._source.at(entry.offset, width * entry.count)
        return tuple(self._number(data[at : at + width]) for at in range(0, len(data), width))

    def value(self, tag: int, default: int) -> int:
        found = self.values(tag)
        return found[0] if found else default

    def only_pixels(self, data: bytes, *, inverted: bool) -> bytes:
        """`data` with another directory behind it, which holds the tags of the pixels alone and names no other page.

        inverted: greys of which 0 is white; the decoder is told that it is black, for it doesn't turn deep ones round.
        """
        raw = {tag: entry.raw for tag, entry in self.entries.items() if tag in _PIXELS}
        if inverted:
            words = [(PHOTOMETRIC, 2), (3, 2), (1, self.word), (1, 2)]  # tag, SHORT, count, value: black is zero
            entry = b"".join(value.to_bytes(width, self.order) for value, width in words)  # type: ignore[arg-type]
            raw[PHOTOMETRIC] = entry.ljust(20 if self.big else 12, b"\0")
        kept = [raw[tag] for tag in sorted(raw)]
        padding = b"\0" * (-len(data) % 8)
        start = len(data) + len(padding)
        counted = len(kept).to_bytes(8 if self.big else 2, self.order)  # type: ignore[arg-type]
        place = start.to_bytes(self.word, self.order)  # type: ignore[arg-type]
        head = data[: 16 - self.word if self.big else 4]
        return b"".join(
            [head, place, memoryview(data)[len(head) + self.word :], padding, counted, *kept, bytes(self.word)]
        )

    def _number(self, raw: bytes) -> int:
        return int.from_bytes(raw, self.order)  # type: ignore[arg-type]


def header(source: ByteSource) -> Header:
    """See Codec."""
    directory = _Directory(source)
    if directory.big and directory.order == "big":
        raise ImageError("it is a BigTIFF in big-endian order, which is not read", CONVERT)
    if DNG in directory.entries or source.at(8, 2) == b"CR":
        raise ImageError("it is a camera's raw file", "develop it, and save it as PNG, TIFF or JPEG")
    stored = (directory.value(WIDTH, 0), directory.value(LENGTH, 0))
    bits = max(directory.values(BITS) or (1,))
    _check_layout(directory, bits)
    orientation = directory.value(ORIENTATION, 1)
    return Header(
        "TIFF",
        stored,
        orientation if 1 <= orientation <= 8 else 1,
        bits,
        lossy=directory.value(COMPRESSION, 1) in _LOSSY,
        inverted=directory.value(PHOTOMETRIC, 0) == 0 and bits > 8,
        layout=directory,
    )


def profile(source: ByteSource, header: Header) -> bytes | None:
    """See Codec."""
    entry = header.layout.entries.get(PROFILE)
    if entry is None or entry.kind not in (1, 7) or entry.count > MAX_PROFILE_BYTES:
        return None
    return source.at(entry.offset, entry.count)


def decode(source: ByteSource, header: Header) -> Image.Image:
    """See Codec."""
    directory: _Directory = header.layout
    _check_pieces(directory, header.stored, source.size)
    stripped = directory.only_pixels(source.all(), inverted=header.inverted)
    try:
        image = TiffImagePlugin.TiffImageFile(io.BytesIO(stripped))
    except (SyntaxError, KeyError) as error:  # of a layout or a compression that the decoder doesn't know
        raise ImageError(f"it is a TIFF of a kind that is not read ({error})", CONVERT) from None
    image.load()
    return image


def _check_layout(directory: _Directory, bits: int) -> None:
    """Refuse what the decoder would read wrongly without a word, or complain of on its own."""
    entries = directory.entries
    if any(entries[tag].kind not in _INTEGERS or entries[tag].count != 1 for tag in _SINGLE & entries.keys()):
        raise damaged("TIFF", "its directory makes no sense")
    if not 1 <= directory.value(SAMPLES, 1) <= _MAX_SAMPLES:
        raise ImageError(f"it has {directory.value(SAMPLES, 1)} channels", CONVERT)
    if 0 in directory.values(EXTRA):
        raise ImageError("it has a channel beside its colours that isn't said to be transparency", CONVERT)
    if directory.value(PLANAR, 1) == 2 and (bits != 8 or 1 in directory.values(EXTRA)):
        raise ImageError(f"it stores its channels of {bits} bits apart from each other", CONVERT)
    if directory.value(SAMPLE_FORMAT, 1) not in (1, 4) or bits > 16:
        raise ImageError(f"its values are signed or fractions, or have {bits} bits", CONVERT)
    ycbcr_as_stored = directory.value(PHOTOMETRIC, 0) == 6 and directory.value(COMPRESSION, 1) == 1
    if ycbcr_as_stored and set(directory.values(SUBSAMPLING) or (2, 2)) != {1}:
        raise ImageError("its colours are stored more coarsely than its brightness, without compression", CONVERT)


def _check_pieces(directory: _Directory, stored: tuple[int, int], size: int) -> None:
    """All strips or tiles are there, inside the file; where one is missing the decoder would leave black."""
    width, length = stored
    planes = directory.value(SAMPLES, 1) if directory.value(PLANAR, 1) == 2 else 1
    if TILES in directory.entries:
        across, down = directory.value(TILE_WIDTH, 0), directory.value(TILE_LENGTH, 0)
        if not 0 < across * down <= HIGHEST_MAX_PIXELS:
            raise damaged("TIFF", "the size of its tiles can't be")
        wanted = -(-width // across) * -(-length // down) * planes
        offsets, lengths = directory.values(TILES), directory.values(TILE_BYTES)
    elif STRIPS in directory.entries:
        rows = max(1, min(directory.value(ROWS, length), length))
        wanted = -(-length // rows) * planes
        offsets, lengths = directory.values(STRIPS), directory.values(STRIP_BYTES)
    else:
        return  # old JPEG compression may have neither; libtiff knows
    if len(offsets) < wanted:
        raise damaged("TIFF", f"it has {len(offsets)} of {wanted} pieces")
    if any(offset + count > size for offset, count in zip(offsets, lengths, strict=False)):
        raise cut_short("TIFF")

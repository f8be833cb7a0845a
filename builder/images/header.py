"""What the header of a picture says, and what each format has to offer to the door."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from PIL import Image

from builder.images.orientation import swaps_sides
from builder.images.source import ByteSource


@dataclass(frozen=True)
class Header:
    """What is known of a picture before its pixels are decoded.

    stored: width and height as stored, px. orientation: EXIF's, 1 to 8. bits: of each channel, as stored.
    lossy: whether its compression changes values. key: 8-bit values (one, or three) of the one transparent colour.
    inverted: whether 0 is white in values that the decoder doesn't turn round. layout: what its codec keeps for itself.
    """

    format: str
    stored: tuple[int, int]
    orientation: int = 1
    bits: int = 8
    lossy: bool = False
    key: tuple[int, ...] | None = None
    inverted: bool = False
    layout: Any = field(default=None, repr=False, compare=False)

    @property
    def size(self) -> tuple[int, int]:
        """Width and height (px) as people see it: the size of its pixels."""
        return self.stored[::-1] if swaps_sides(self.orientation) else self.stored

    @property
    def turned(self) -> bool:
        """Whether EXIF turns or mirrors it."""
        return self.orientation != 1


class Codec(Protocol):
    """A format: one module of this room. ImageError for what is damaged, cut short or not read."""

    def header(self, source: ByteSource) -> Header:
        """Of the header alone; no memory is taken for pixels."""

    def profile(self, source: ByteSource, header: Header) -> bytes | None:
        """The ICC profile that is embedded, or None; never more than MAX_PROFILE_BYTES."""

    def decode(self, source: ByteSource, header: Header) -> Image.Image:
        """The first picture as stored, loaded; not yet turned. The decoder gets to see no metadata."""

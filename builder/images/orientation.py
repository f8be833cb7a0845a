"""The one EXIF tag that is used: Orientation. It is read where it stands; nothing else of the block is looked at."""

from __future__ import annotations

from PIL import Image

TAG = 0x0112
_WIDTHS = {1: 1, 3: 2, 4: 4}  # bytes of BYTE, SHORT and LONG
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def exif_orientation(block: bytes) -> int | None:
    """Orientation (1 to 8) of an EXIF block, with or without its heading `Exif`; None where it says none.

    Only the first directory is walked, as far as the block goes, so a damaged block is at worst one that says none.
    Source: CIPA DC-008 (Exif 3.0), 4.5.4 and 4.6.5.
    """
    if block.startswith(b"Exif\0"):
        block = block[6:]
    order = {b"II*\0": "little", b"MM\0*": "big"}.get(block[:4])
    if order is None:
        return None

    def number(offset: int, width: int) -> int:
        return int.from_bytes(block[offset : offset + width], order)  # type: ignore[arg-type]

    first = number(4, 4)
    for entry in range(first + 2, min(first + 2 + 12 * number(first, 2), len(block) - 11), 12):
        if number(entry, 2) == TAG:
            width = _WIDTHS.get(number(entry + 2, 2))
            value = number(entry + 8, width) if width else 0
            return value if 1 <= value <= 8 else None
    return None


def swaps_sides(orientation: int) -> bool:
    """Whether an orientation swaps width and height."""
    return orientation >= 5


def upright(image: Image.Image, orientation: int) -> Image.Image:
    """The picture as people see it."""
    turn = _TURNS.get(orientation)
    return image if turn is None else image.transpose(turn)

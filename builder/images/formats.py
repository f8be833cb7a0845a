"""Which format a picture is of, by its first bytes. The names of files say nothing here."""

from __future__ import annotations

from builder.images.errors import CONVERT, ImageError

READ = ("JPEG", "PNG", "WebP", "TIFF", "BMP", "GIF", "HEIF")  # READ says it all: nothing else is ever decoded
SUFFIXES = frozenset(
    {
        ".jpg",
        ".jpeg",
        ".jpe",
        ".jfif",
        ".mpo",
        ".png",
        ".apng",
        ".webp",
        ".tif",
        ".tiff",
        ".bmp",
        ".dib",
        ".gif",
        ".heic",
        ".heif",
        ".hif",
    }
)
"""Endings of files that are taken for pictures when a folder is searched."""

_HEIF = {b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"hevm", b"hevs", b"mif1", b"msf1"}
_AVIF = {b"avif", b"avis"}
_RAW = "a camera's raw file"
_OTHERS = {
    b"%!PS": "EPS or PostScript",
    b"\xc5\xd0\xd3\xc6": "EPS",
    b"%PDF": "PDF",
    b"<svg": "SVG",
    b"<?xml": "XML or SVG",
    b"<!DOCTYPE": "HTML or SVG",
    b"<html": "HTML",
    b"8BPS": "Photoshop's PSD",
    b"\0\0\0\x0cjP  ": "JPEG 2000",
    b"\xff\x4f\xff\x51": "JPEG 2000",
    b"\0\0\0\x0cJXL ": "JPEG XL",
    b"\xff\x0a": "JPEG XL",
    b"\0\0\1\0": "an icon (ICO)",
    b"SIMPLE  =": "FITS",
    b"P1": "PBM",
    b"P2": "PGM",
    b"P3": "PPM",
    b"P4": "PBM",
    b"P5": "PGM",
    b"P6": "PPM",
    b"PK\3\4": "a ZIP",
    b"\x1f\x8b": "gzip",
    b"FUJIFILMCCD-RAW": _RAW,
    b"IIRO": _RAW,
    b"IIRS": _RAW,
    b"IIU\0": _RAW,
    b"version https://git-lfs": "a Git LFS pointer, not the file itself",
}


def sniff(head: bytes) -> str:
    """One of READ, of a picture that begins with `head` (its first 132 bytes or more, if it has them).

    ImageError for what isn't read, naming what it is where that is known.
    """
    if head[:3] == b"\xff\xd8\xff":
        return "JPEG"
    if head[:8] == b"\x89PNG\r\n\x1a\n":
        return "PNG"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WebP"
    if head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return "TIFF"
    if head[:6] in (b"GIF87a", b"GIF89a"):
        return "GIF"
    if head[:2] == b"BM":
        return "BMP"
    if head[4:8] == b"ftyp" and (kind := _boxed(head)):
        return kind
    raise ImageError(*_refusal(head))


def _boxed(head: bytes) -> str | None:
    """HEIF, of a file of boxes that begins with its brands; None for other brands."""
    length = min(int.from_bytes(head[:4], "big"), len(head))
    brands = {head[8:12]} | {head[place : place + 4] for place in range(16, length - 3, 4)}
    if brands & _AVIF and not brands & (_HEIF - {b"mif1", b"msf1"}):
        raise ImageError("it is AVIF, which is not read", CONVERT)
    return "HEIF" if brands & _HEIF else None


def _refusal(head: bytes) -> tuple[str, str]:
    if not head:
        return "it is empty", "fetch it again"
    if not any(head):
        return "it begins with nothing but zero bytes", "fetch it again"
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    name = next((name for start, name in _OTHERS.items() if text.startswith(start) or head.startswith(start)), None)
    if head[128:132] == b"DICM":
        name = "DICOM"
    read = ", ".join(READ)
    if name is None:
        return f"its content is no picture of a format that is read ({read})", CONVERT
    return f"it is {name} by its content, which is not read ({read} are)", CONVERT

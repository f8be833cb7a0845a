"""Pictures of many kinds, with what the door must make of them: written here byte by byte where a library would not."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image, ImageCms

SIDE = 32
WHITE = 255


def _plain() -> np.ndarray:
    pixels = np.zeros((SIDE, SIDE, 3), np.uint8)  # no two of its eight turns are equal
    pixels[..., 0] = np.linspace(20, 235, SIDE)[None]
    pixels[..., 1] = np.linspace(20, 235, SIDE)[:, None]
    pixels[6:18, 8:20] = (170, 40, 50)
    return pixels


RGB = _plain()
GREY = RGB[..., 0]
ERASED = (slice(6, 18), slice(8, 20))  # the part that is transparent in pictures with transparency
OPACITY = np.full((SIDE, SIDE), 255, np.uint8)
OPACITY[ERASED] = 0


def encoded(image: Image.Image | np.ndarray, kind: str = "PNG", **options: Any) -> bytes:
    """As Pillow writes it."""
    buffer = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(buffer, kind, **options)
    return buffer.getvalue()


def as_pillow_has_it(picture: bytes) -> np.ndarray:
    """RGB of a file without EXIF, profile or transparency: what lossy formats are compared with."""
    with Image.open(io.BytesIO(picture)) as image:
        return np.asarray(image.convert("RGB"))


def grey_rgb(values: np.ndarray) -> np.ndarray:
    return np.dstack([values] * 3)


def on_white(pixels: np.ndarray) -> np.ndarray:
    """With the erased part white."""
    shown = pixels.copy()
    shown[ERASED] = WHITE
    return shown


# -- PNG --------------------------------------------------------------------------------------------------------------


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(rows: np.ndarray, bits: int, colours: int, *before: bytes, after: bytes = b"", size: Any = None) -> bytes:
    """A PNG of packed rows (uint8 [H, bytes]); chunks `before` and `after` its pixels."""
    width, height = size or (SIDE, SIDE)
    header = struct.pack(">IIBBBBB", width, height, bits, colours, 0, 0, 0)
    data = zlib.compress(np.hstack([np.zeros((len(rows), 1), np.uint8), rows]).tobytes())
    return b"".join(
        [b"\x89PNG\r\n\x1a\n", chunk(b"IHDR", header), *before, chunk(b"IDAT", data), after, chunk(b"IEND", b"")]
    )


def deep(values: np.ndarray) -> np.ndarray:
    """Rows of 16-bit samples in a PNG's order."""
    return values.astype(">u2").reshape(len(values), -1).view(np.uint8)


def exif(orientation: int, *entries: tuple[int, int, int, bytes], heading: bytes = b"") -> bytes:
    """A little-endian EXIF block: Orientation, and entries (tag, type, count, four bytes)."""
    found = [(0x0112, 3, 1, struct.pack("<HH", orientation, 0)), *entries]
    packed = b"".join(struct.pack("<HHI", tag, kind, count) + value for tag, kind, count, value in found)
    return heading + b"II*\0\x08\0\0\0" + struct.pack("<H", len(found)) + packed + bytes(4)


def linear_profile() -> bytes:
    """sRGB's profile with the gamma 1.0: 55 becomes 128."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    for tag in (b"rTRC", b"gTRC", b"bTRC"):  # each an entry of the tag table: signature, offset, length
        at = profile.index(tag)
        offset = int.from_bytes(profile[at + 4 : at + 8])
        profile[offset : offset + 14] = b"curv" + bytes(4) + (1).to_bytes(4) + (256).to_bytes(2)
    return bytes(profile)


# -- TIFF -------------------------------------------------------------------------------------------------------------


def tiff(data: bytes, order: str, *tags: tuple[int, tuple[int, ...]], size: tuple[int, int] = (SIDE, SIDE)) -> bytes:
    """An uncompressed TIFF in one strip, of `tags` with SHORT values beside the usual ones."""
    end = {"little": "<", "big": ">"}[order]
    found = {256: size[:1], 257: size[1:], 259: (1,), 262: (1,), 273: (8,), 277: (1,), 278: size[1:], **dict(tags)}
    head = (b"II*\0" if order == "little" else b"MM\0*") + struct.pack(end + "I", 8 + len(data) + len(data) % 2)
    directory, outside = [], b""
    place = 8 + len(data) + len(data) % 2 + 2 + 12 * (len(found) + 1) + 4
    for tag, values in sorted(found.items()):
        packed = struct.pack(f"{end}{len(values)}H", *values)
        if len(packed) > 4:
            directory.append(struct.pack(end + "HHII", tag, 3, len(values), place + len(outside)))
            outside += packed
        else:
            directory.append(struct.pack(end + "HHI", tag, 3, len(values)) + packed.ljust(4, b"\0"))
    directory.append(struct.pack(end + "HHII", 279, 4, 1, len(data)))
    directory.sort(key=lambda entry: struct.unpack(end + "H", entry[:2]))
    count = struct.pack(end + "H", len(directory))
    return head + data + b"\0" * (len(data) % 2) + count + b"".join(directory) + bytes(4) + outside


# -- the kinds --------------------------------------------------------------------------------------------------------

Kinds = dict[str, tuple[bytes, np.ndarray, int]]  # picture, RGB that every door gives, by how much it may differ


def _exact(**kinds: tuple[bytes, np.ndarray]) -> Kinds:
    return {name.replace("_", " "): (picture, pixels, 0) for name, (picture, pixels) in kinds.items()}


def _lossy(**kinds: bytes) -> Kinds:
    return {name.replace("_", " "): (picture, as_pillow_has_it(picture), 0) for name, picture in kinds.items()}


def _turned() -> Kinds:
    """Stored so that EXIF's orientation 6 makes RGB of it."""
    stored = np.ascontiguousarray(np.rot90(RGB))
    block = exif(6)
    odd = exif(6, (0x0132, 11, 1, struct.pack("<f", 1.5)), (0x8769, 4, 1, b"\xff" * 4), heading=b"Exif\0\0")
    jpeg = encoded(stored, "JPEG", quality=95)
    upright = np.rot90(as_pillow_has_it(jpeg), -1)
    in_segment = b"\xff\xe1" + struct.pack(">H", len(odd) + 2) + odd
    flat = stored.reshape(SIDE, -1)
    return {
        **_exact(
            png_turned=(png(flat, 8, 2, chunk(b"eXIf", block)), RGB),
            png_turned_behind_its_pixels=(png(flat, 8, 2, after=chunk(b"eXIf", block)), RGB),
            tiff_turned=(encoded(stored, "TIFF", exif=block), RGB),
            tiff_turned_compressed=(encoded(stored, "TIFF", exif=block, compression="tiff_lzw"), RGB),
            webp_turned=(encoded(stored, "WEBP", lossless=True, exif=block), RGB),
        ),
        "jpeg turned, odd tags": (jpeg[:2] + in_segment + jpeg[2:], upright, 0),
    }


def _transparent() -> Kinds:
    rgba = np.dstack([RGB, OPACITY])
    premultiplied = np.dstack([np.where(OPACITY[..., None] == 0, 0, RGB), OPACITY]).astype(np.uint8)
    key = np.where(OPACITY == 0, 1, np.where(GREY > 128, 3, 2))  # two bits; 1 is the transparent one
    packed = (key[:, ::4] << 6 | key[:, 1::4] << 4 | key[:, 2::4] << 2 | key[:, 3::4]).astype(np.uint8)
    quantized = Image.fromarray(RGB).quantize(16)
    indices = np.array(quantized)
    indices[ERASED] = 20
    palette = np.zeros((21, 3), np.uint8)
    palette[:16] = np.array(quantized.getpalette()[: 16 * 3], np.uint8).reshape(-1, 3)
    gif = Image.fromarray(indices, "P")
    gif.putpalette(palette.tobytes())
    deep_rgba = deep(rgba.astype(np.uint16) * 257)
    return _exact(
        png_with_an_erased_part=(png(rgba.reshape(SIDE, -1), 8, 6), on_white(RGB)),
        png_16_bit_with_an_erased_part=(png(deep_rgba, 16, 6), on_white(RGB)),
        png_grey_with_an_erased_part=(
            png(np.dstack([GREY, OPACITY]).reshape(SIDE, -1), 8, 4), on_white(grey_rgb(GREY))
        ),
        png_palette_with_a_transparent_colour=(
            png(indices, 8, 3, chunk(b"PLTE", palette.tobytes()), chunk(b"tRNS", b"\xff" * 20 + b"\0")),
            on_white(palette[indices]),
        ),
        png_2_bit_with_a_transparent_grey=(
            png(packed, 2, 0, chunk(b"tRNS", b"\0\1")), on_white(grey_rgb((key * 85).astype(np.uint8)))
        ),
        png_rgb_with_a_transparent_colour=(
            png(RGB.reshape(SIDE, -1), 8, 2, chunk(b"tRNS", struct.pack(">HHH", 170, 40, 50))), on_white(RGB)
        ),
        webp_with_an_erased_part=(encoded(rgba, "WEBP", lossless=True, exact=True), on_white(RGB)),
        tiff_with_an_erased_part=(encoded(rgba, "TIFF"), on_white(RGB)),
        tiff_premultiplied=(
            tiff(premultiplied.tobytes(), "little", (258, (8,) * 4), (262, (2,)), (277, (4,)), (338, (1,))),
            on_white(RGB),
        ),
        gif_with_a_transparent_colour=(encoded(gif, "GIF", transparency=20), on_white(palette[indices])),
    )  # fmt: skip


def _deep() -> Kinds:
    values = GREY.astype(np.uint16) * 257 - (GREY > 128)  # 65534 - ...: no clipping, the high byte counts
    expected = grey_rgb((values >> 8).astype(np.uint8))
    rgb = RGB.astype(np.uint16) * 256 + 77
    return _exact(
        png_16_bit_grey=(png(deep(values), 16, 0), expected),
        png_16_bit_rgb=(png(deep(rgb), 16, 2), RGB),
        tiff_16_bit_little_endian=(tiff(values.astype("<u2").tobytes(), "little", (258, (16,))), expected),
        tiff_16_bit_big_endian=(tiff(values.astype(">u2").tobytes(), "big", (258, (16,))), expected),
        tiff_16_bit_white_is_zero=(
            tiff((65535 - values).astype("<u2").tobytes(), "little", (258, (16,)), (262, (0,))), expected
        ),
        tiff_16_bit_big_endian_white_is_zero=(
            tiff((65535 - values).astype(">u2").tobytes(), "big", (258, (16,)), (262, (0,))), expected
        ),
        tiff_16_bit_rgb=(
            tiff(rgb.astype("<u2").tobytes(), "little", (258, (16,) * 3), (262, (2,)), (277, (3,))), RGB
        ),
    )  # fmt: skip


def _colours() -> Kinds:
    dim = np.full((SIDE, SIDE, 3), 55, np.uint8)
    lab = Image.new("LAB", (SIDE, SIDE), (136, 128, 128))  # L* 53.4: sRGB's 127
    profile = linear_profile()
    cmyk = Image.fromarray(RGB).convert("CMYK")
    rgb = Image.fromarray(RGB)
    return {
        "png with a profile": (encoded(dim, icc_profile=profile), np.full_like(dim, 128), 1),
        "tiff with a profile": (encoded(dim, "TIFF", icc_profile=profile), np.full_like(dim, 128), 1),
        "jpeg with a profile": (encoded(dim, "JPEG", quality=100, icc_profile=profile), np.full_like(dim, 128), 2),
        "webp with a profile": (encoded(dim, "WEBP", lossless=True, icc_profile=profile), np.full_like(dim, 128), 1),
        "png with a broken profile": (encoded(dim, icc_profile=b"broken"), dim, 0),
        "tiff in Lab": (encoded(lab, "TIFF"), np.full_like(dim, 127), 2),
        **_exact(
            png_grey=(encoded(GREY), grey_rgb(GREY)),
            png_1_bit=(encoded(Image.fromarray(GREY > 128)), grey_rgb(np.where(GREY > 128, 255, 0).astype(np.uint8))),
            png_palette=(encoded(rgb.quantize(32)), np.asarray(rgb.quantize(32).convert("RGB"))),
            tiff_cmyk=(encoded(cmyk, "TIFF"), np.asarray(cmyk.convert("RGB"))),
            bmp=(encoded(RGB, "BMP"), RGB),
            bigtiff=(encoded(RGB, "TIFF", big_tiff=True), RGB),
        ),
        **_lossy(jpeg=encoded(RGB, "JPEG", quality=90), jpeg_cmyk=encoded(cmyk, "JPEG", quality=95)),
    }


def _several() -> Kinds:
    other = RGB[::-1, ::-1]
    both: dict[str, Any] = {"save_all": True, "append_images": [Image.fromarray(other)]}
    rgb = Image.fromarray(RGB)
    first = encoded(RGB, "JPEG", quality=95)
    return {
        **_exact(
            png_animated=(encoded(rgb, "PNG", **both), RGB),
            webp_animated=(encoded(rgb, "WEBP", lossless=True, **both), RGB),
            tiff_of_two_pages=(encoded(rgb, "TIFF", **both), RGB),
        ),
        "mpo": (encoded(rgb, "MPO", quality=95, **both), as_pillow_has_it(first), 0),
        "gif animated": (encoded(rgb, "GIF", **both), as_pillow_has_it(encoded(rgb, "GIF")), 0),
    }


def _long() -> Kinds:
    trash = b"\0\xff\xd8trailer" * 50
    text = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(64 << 20), 1))
    return {
        **_exact(
            png_with_bytes_behind=(encoded(RGB) + trash, RGB),
            bmp_with_bytes_behind=(encoded(RGB, "BMP") + trash, RGB),
            tiff_with_bytes_behind=(encoded(RGB, "TIFF") + trash, RGB),
            webp_with_bytes_behind=(encoded(RGB, "WEBP", lossless=True) + trash, RGB),
            png_with_64_MB_of_text=(png(RGB.reshape(SIDE, -1), 8, 2, text), RGB),
        ),
        "jpeg with bytes behind": (
            encoded(RGB, "JPEG", quality=90) + trash, as_pillow_has_it(encoded(RGB, "JPEG", quality=90)), 0
        ),
    }  # fmt: skip


def read_kinds() -> Kinds:
    """Everything that is read."""
    return {**_colours(), **_deep(), **_transparent(), **_turned(), **_several(), **_long()}


def refused_kinds() -> dict[str, tuple[bytes, str]]:
    """Everything that is refused, with a pattern of what is said."""
    fractions = np.ones((SIDE, SIDE), np.float32) / 2
    twelve = np.linspace(0, 4095, SIDE * SIDE).astype(np.uint16).reshape(SIDE, SIDE)
    clear = np.dstack([RGB, np.zeros((SIDE, SIDE), np.uint8)])
    flipped = bytearray(encoded(RGB))
    flipped[len(flipped) // 2] ^= 4
    extra = tiff(np.dstack([RGB, OPACITY]).tobytes(), "little", (258, (8,) * 4), (262, (2,)), (277, (4,)), (338, (0,)))
    cut = {
        f"{name} cut short": (picture[: len(picture) * 2 // 3], "cut short|damaged")
        for name, picture in {
            "png": encoded(RGB),
            "jpeg": encoded(RGB, "JPEG", quality=95),
            "webp": encoded(RGB, "WEBP", lossless=True),
            "tiff": encoded(RGB, "TIFF"),
            "tiff lzw": encoded(RGB, "TIFF", compression="tiff_lzw"),
            "bmp": encoded(RGB, "BMP"),
            "gif": encoded(Image.fromarray(RGB), "GIF"),
        }.items()
    }
    return {
        "eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n", "EPS or PostScript"),
        "pdf": (b"%PDF-1.7\n", "PDF"),
        "svg": (b'  <svg xmlns="http://www.w3.org/2000/svg"/>', "SVG"),
        "ppm": (b"P6\n1 1\n255\n\0\0\0", "PPM"),
        "nothing": (b"", "empty"),
        "a text": (b"not a picture at all", "no picture of a format that is read"),
        "heic without its library": (
            b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(99),
            "needs the library pillow-heif",
        ),
        "avif": (b"\0\0\0\x1cftypavif\0\0\0\0mif1avifmiaf" + bytes(99), "AVIF"),
        "png of 3.6 gigapixels": (png(np.zeros((1, 1), np.uint8), 8, 0, size=(60000, 60000)), "60000 x 60000 px"),
        "tiff of fractions": (encoded(Image.fromarray(fractions), "TIFF"), "fractions"),
        "tiff of 32 bits": (encoded(Image.fromarray(twelve.astype(np.int32)), "TIFF"), "32 bits"),
        "12 bits in 16": (png(deep(twelve), 16, 0), "below a sixteenth"),
        "wholly transparent": (encoded(clear), "wholly transparent"),
        "tiff with a channel of unknown meaning": (extra, "isn't said to be transparency"),
        "png without its palette": (png(GREY, 8, 3), "palette is missing"),
        "png with a flipped bit": (bytes(flipped), "checksum"),
        **cut,
    }

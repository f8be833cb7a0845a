"""The one door for pixels: what every kind of picture becomes, the same at every door."""

from __future__ import annotations

import io
import os
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from builder.images import ImageError, open_mask, read_header, read_pixels

UPRIGHT = np.zeros((24, 32, 3), np.uint8)  # no two of its eight turns are equal
UPRIGHT[..., 0] = np.linspace(20, 235, 32)[None]
UPRIGHT[..., 1] = np.linspace(20, 235, 24)[:, None]
UPRIGHT[6:18, 8:20] = (170, 40, 50)


TURNS = {
    1: lambda stored: stored,
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: stored[::-1, ::-1],
    4: lambda stored: stored[::-1],
    5: lambda stored: stored.swapaxes(0, 1),
    6: lambda stored: np.rot90(stored, -1),
    7: lambda stored: stored[::-1, ::-1].swapaxes(0, 1),
    8: lambda stored: np.rot90(stored),
}


def encoded(image: Image.Image | np.ndarray, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(buffer, kind, **options)
    return buffer.getvalue()


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 8), st.integers(1, 9), st.integers(1, 9), st.sampled_from(["PNG", "TIFF", "WEBP"]))
def test_header_and_pixels_agree_for_every_orientation_and_size(orientation, width, height, kind):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = np.arange(width * height * 3, dtype=np.uint8).reshape(height, width, 3)
    picture = encoded(stored, kind, exif=exif.tobytes(), **({"lossless": True} if kind == "WEBP" else {}))
    pixels = read_pixels(picture)
    assert (
        read_header(picture).size == pixels.shape[1::-1] == ((height, width) if orientation >= 5 else (width, height))
    )
    np.testing.assert_array_equal(pixels, TURNS[orientation](stored))


def test_a_pipe_a_folder_and_a_device_are_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "device.png").symlink_to("/dev/zero")
    for name in ("pipe", "folder", "device"):
        for read in (read_pixels, read_header, open_mask):
            with pytest.raises(ImageError, match=f"a {name}"):
                read(tmp_path / f"{name}.png")

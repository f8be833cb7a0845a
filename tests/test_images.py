"""The one door for pixels: what every kind of picture becomes, the same at every door."""

from __future__ import annotations

import os
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from builder.errors import BuilderError
from builder.images import ImageError, open_mask, read_hashed, read_header, read_pixels
from builder.images.orientation import exif_orientation
from builder.shards.dataset import resize
from builder.shards.foreign import adopt
from builder.shards.storage import Storage
from builder.shards.verify import check_dataset
from tests import doors
from tests.pictures import GREY, OPACITY, RGB, chunk, encoded, exif, png, read_kinds, refused_kinds, tiff

READ, REFUSED = read_kinds(), refused_kinds()
CODES = {name: f"K{number}" for number, name in enumerate(READ)}
DOORS: dict[str, Callable[..., doors.Pixels]] = {
    "pack": doors.by_pack,
    "score of a folder": doors.by_score_of_a_folder,
    "score of a tar": doors.by_score_of_a_tar,
    "index": doors.by_index,
}
READERS = ("loader", "stream", "sheet")  # of a dataset; what they are given has come through a door before
TURNS: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda stored: stored,
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: stored[::-1, ::-1],
    4: lambda stored: stored[::-1],
    5: lambda stored: stored.swapaxes(0, 1),
    6: lambda stored: np.rot90(stored, -1),
    7: lambda stored: stored[::-1, ::-1].swapaxes(0, 1),
    8: lambda stored: np.rot90(stored),
}


@pytest.fixture(scope="module")
def through_doors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, doors.Pixels]:
    """Every picture that is read, through every door, all under a name that ends in .png."""
    folder = tmp_path_factory.mktemp("doors")
    pictures = {name: picture for name, (picture, _, _) in READ.items()}
    found = {name: door(folder, pictures) for name, door in DOORS.items() if name != "index"}
    indexed = doors.indexed(folder, pictures)
    assert check_dataset(indexed).findings == []
    return {
        **found,
        "index": {row["phase"]: pixels for row, pixels in indexed.images()},
        "loader": doors.by_loader(indexed),
        "stream": doors.by_stream(indexed),
        "sheet": doors.by_sheet(indexed, folder / "sheet.png"),
    }


@pytest.mark.parametrize("door", [*DOORS, *READERS])
@pytest.mark.parametrize("kind", READ)
def test_every_kind_is_the_same_at_every_door(through_doors, kind, door):
    _, expected, tolerance = READ[kind]
    found = through_doors[door][CODES[kind]].astype(int)
    if door == "sheet":
        expected = resize(expected, len(found))
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= tolerance


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_refused_is_refused_at_every_door(tmp_path, monkeypatch, kind, door):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    picture, said = REFUSED[kind]
    with pytest.raises(BuilderError, match=said) as refused:
        DOORS[door](tmp_path, {"sound": encoded(RGB), "odd": picture})
    assert refused.value.remedy
    assert "K1" in refused.value.what or "1.png in" in refused.value.what  # the file, or the member, is named
    assert not (tmp_path / "manifests/packed/dataset.json").exists()


def test_masks_are_labels_of_the_same_pictures():
    grey, palette = open_mask(encoded(GREY)), open_mask(encoded(Image.fromarray(RGB).quantize(8)))
    np.testing.assert_array_equal(grey.labels, GREY)
    assert (grey.indices, grey.from_alpha, grey.lossy) == (None, False, False)
    assert palette.indices is not None
    assert len(np.unique(palette.indices)) == len(np.unique(palette.labels)) == 8
    for name, (picture, _, _) in READ.items():
        if "16 bit" in name and ("rgb" in name or "erased" in name):
            with pytest.raises(ImageError, match="16 bits"):
                open_mask(picture)
        elif name != "tiff in Lab":
            mask = open_mask(picture)
            assert mask.labels.shape == RGB.shape[:2]
            assert mask.from_alpha == any(word in name for word in ("erased", "transparent", "premultiplied"))
            assert mask.lossy == (mask.format == "JPEG")
    for name, (picture, _) in REFUSED.items():
        if name not in ("12 bits in 16", "wholly transparent"):
            with pytest.raises(ImageError):
                open_mask(picture)
    deep = np.arange(1024, dtype=np.uint16).reshape(32, 32)
    np.testing.assert_array_equal(open_mask(tiff(deep.astype("<u2").tobytes(), "little", (258, (16,)))).labels, deep)
    assert open_mask(encoded(RGB, "WEBP", quality=80)).lossy
    assert not open_mask(encoded(RGB, "WEBP", lossless=True)).lossy
    assert open_mask(encoded(RGB, "TIFF", compression="jpeg")).lossy


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 8), st.integers(1, 9), st.integers(1, 9), st.sampled_from(["PNG", "TIFF", "WEBP"]))
def test_header_and_pixels_agree_for_every_orientation_and_size(orientation, width, height, kind):
    stored = np.arange(width * height * 3, dtype=np.uint8).reshape(height, width, 3)
    picture = encoded(stored, kind, exif=exif(orientation), **({"lossless": True} if kind == "WEBP" else {}))
    pixels, header = read_pixels(picture), read_header(picture)
    assert header.size == pixels.shape[1::-1] == ((height, width) if orientation >= 5 else (width, height))
    assert header.turned == (orientation != 1)
    np.testing.assert_array_equal(pixels, TURNS[orientation](stored))
    np.testing.assert_array_equal(
        open_mask(encoded(stored[..., 0], "PNG", exif=exif(orientation))).labels, pixels[..., 0]
    )


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=80), st.sampled_from([b"", b"II*\0", b"MM\0*", b"Exif\0\0II*\0\x08\0\0\0", exif(6)[:30]]))
def test_no_exif_block_can_fail(block, start):
    assert exif_orientation(start + block) in (None, *range(1, 9))


def test_sizes_are_checked_by_the_header_alone():
    phone = png(np.zeros((1, 1), np.uint8), 1, 0, size=(16320, 12240))  # of its 200 megapixels nothing is there
    with pytest.raises(ImageError, match="more than the limit of 150,000,000 pixels") as refused:
        read_pixels(phone)
    assert "--max-pixels 199756800" in refused.value.remedy
    assert read_header(phone, max_pixels=200_000_000).size == (16320, 12240)
    tiny = Image.new("L", (1, 1))
    gif, bmp = encoded(tiny, "GIF"), encoded(tiny, "BMP")
    for huge in (
        gif[:6] + struct.pack("<HH", 65535, 65535) + gif[10:],
        bmp[:18] + struct.pack("<ii", 65535, 65535) + bmp[26:],
        tiff(b"\0", "little", (258, (8,)), size=(65535, 65535)),
    ):
        with pytest.raises(ImageError, match="65535 x 65535 px"):
            read_header(huge)


def test_pillow_s_own_limit_stops_no_picture_that_is_allowed(monkeypatch):
    """And stays as it was."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    for kind in ("PNG", "TIFF", "WEBP", "BMP", "GIF", "JPEG"):
        assert read_pixels(encoded(RGB, kind)).shape == RGB.shape
    assert Image.MAX_IMAGE_PIXELS == 100


def test_a_png_whose_data_end_early_is_cut_short():
    """Its checksums are right; and a picture that ends in black is whole."""
    black = RGB.copy()
    black[20:] = 0
    np.testing.assert_array_equal(read_pixels(encoded(black)), black)
    for rows in (0, 1, 31):
        with pytest.raises(ImageError, match="cut short"):
            read_pixels(png(RGB.reshape(32, -1)[:rows], 8, 2))


def test_the_short_way_of_hashed_pictures_gives_the_same_pixels():
    for picture, _, _ in READ.values():
        np.testing.assert_array_equal(read_hashed(picture), read_pixels(picture))
    for picture, said in REFUSED.values():
        if said != "checksum":  # the hash of its pixels tells
            with pytest.raises(ImageError):
                read_hashed(picture)


def test_a_pipe_a_folder_and_a_device_are_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "device.png").symlink_to("/dev/zero")
    for name in ("pipe", "folder", "device"):
        for read in (read_pixels, read_header, open_mask):
            with pytest.raises(ImageError, match=f"a {name}"):
                read(tmp_path / f"{name}.png")


def test_a_folder_to_score_may_hold_odd_names_and_hidden_files(tmp_path):
    folder = doors.tree(tmp_path / "tree", doors.table({"one": b""}), {"one": encoded(RGB)}, ".png") / "K0"
    (folder / "._pictureK0.png").write_bytes(b"\0\5\26\7, as macOS puts it beside a file")
    Path(os.fsdecode(os.fsencode(folder) + b"/Fu\xdf.png")).write_bytes(encoded(GREY))
    adopted = adopt(str(tmp_path / "tree"), "tree", Storage(tmp_path), doors.table({"one": b""}))
    assert sorted(adopted.table()["source"].to_pylist()) == ["K0/Fu\\udcdf.png", "K0/pictureK0.png"]


def test_no_other_plug_in_is_ever_started(tmp_path, monkeypatch):
    """Nor asked: what Pillow has registered, Ghostscript's among it, plays no part."""
    monkeypatch.setattr(Image, "open", lambda *args, **options: pytest.fail("Pillow chose the format"))
    for name in ("init", "preinit"):
        monkeypatch.setattr(Image, name, lambda: pytest.fail("Pillow's plug-ins were loaded"))
    assert len([read_pixels(picture) for picture, _, _ in READ.values()]) == len(READ)


def test_a_phone_s_heic_is_read_where_the_library_is(tmp_path):
    library = pytest.importorskip("pillow_heif", reason="pillow-heif is optional")
    library.from_pillow(Image.fromarray(RGB)).save(tmp_path / "a.heic", quality=95)
    assert np.abs(read_pixels(tmp_path / "a.heic").astype(int) - RGB).mean() < 8
    assert read_header(tmp_path / "a.heic").lossy


def test_a_wrong_checksum_counts_where_it_decides_pixels():
    """A profile does; of EXIF the orientation is used where it can be read, for a sound picture is never refused."""
    for kind, content in ((b"eXIf", exif(6)), (b"iCCP", b"x\0\0none"), (b"tEXt", b"Comment\0none")):
        damaged = bytearray(chunk(kind, content))
        damaged[-1] ^= 1
        picture = png(RGB.reshape(len(RGB), -1), 8, 2, bytes(damaged))
        if kind == b"iCCP":
            with pytest.raises(ImageError, match="checksum of its part 'iCCP'"):
                read_pixels(picture)
        else:
            np.testing.assert_array_equal(read_pixels(picture), np.rot90(RGB, -1) if kind == b"eXIf" else RGB)
    hidden = chunk(b"tRNS", struct.pack(">HHH", 170, 40, 50))
    for name in (b"tRNR", b"uRNS"):  # a bit of the name has flipped: what was transparent must not come back
        with pytest.raises(ImageError, match=r"checksum|no reader knows"):
            read_pixels(png(RGB.reshape(len(RGB), -1), 8, 2, hidden.replace(b"tRNS", name)))


def test_a_webp_whose_transparency_is_lost_is_damaged():
    """Its hidden colours must not come back."""
    picture = encoded(np.dstack([RGB, OPACITY]), "WEBP", quality=80)
    assert (read_pixels(picture)[8:16, 10:18] == 255).all()
    with pytest.raises(ImageError, match="transparency is missing"):
        read_pixels(picture.replace(b"ALPH", b"ALPX"))


def test_a_jpeg_of_endless_scans_is_refused():
    picture = encoded(RGB, "JPEG", quality=90, progressive=True)
    scan = picture.rindex(b"\xff\xda")
    with pytest.raises(ImageError, match="more than 100 scans"):
        read_pixels(picture[:-2] + picture[scan:-2] * 200 + picture[-2:])


def test_a_jpeg_of_a_large_size_and_little_data_is_cut_short():
    picture = bytearray(encoded(RGB, "JPEG", quality=90))
    frame = picture.index(b"\xff\xc0")
    picture[frame + 5 : frame + 9] = struct.pack(">HH", 12000, 12000)
    assert read_header(bytes(picture)).size == (12000, 12000)
    with pytest.raises(ImageError, match="cut short"):
        read_pixels(bytes(picture))


def test_the_command_line_names_the_limit(builder):
    for command in ("pack", "index", "score"):
        assert "[default: 150 million]" in " ".join(builder(command, "--help").output.split())
    assert builder("index", "none.tar", "--name", "x", "--max-pixels", "0").code == 2


def test_folder_and_file_names_say_nothing(tmp_path: Path):
    (tmp_path / "a.jpg").write_bytes(encoded(RGB, "TIFF"))
    np.testing.assert_array_equal(read_pixels(tmp_path / "a.jpg"), RGB)

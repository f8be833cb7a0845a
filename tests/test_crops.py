"""Packing: boxes, labels, geometry, patients, split, and what is on disk; bad input, each with its message."""

import errno
import io
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageCms, PngImagePlugin

from builder.config import CropsConfig
from builder.crops.boxes import read_boxes
from builder.crops.cut import box_fault, clip, cut, decode, photograph_size, square_around
from builder.crops.labels import Codes, read_labels
from builder.crops.pack import PackRequest, pack
from builder.crops.photographs import Photographs
from builder.crops.split import split_patients
from builder.demo.phantom_dataset import ensure_phantom
from builder.errors import BuilderError
from builder.identity import PatientKey, from_photograph
from builder.images import open_mask
from builder.phases import HEALING_PHASES, ClassTable, Phase
from builder.shards.dataset import Dataset
from builder.shards.lineage import SPLITS
from builder.shards.lock import exclusive
from builder.shards.storage import Storage

KEY = b"a key of the test"
ULCER = ClassTable([Phase("U", "ulcer", "PHASE_U, ulcer")])


def photograph(path: Path, width: int = 60, height: int = 40, seed: int = 0, **save) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **save)
    return path


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.fixture
def hospital(tmp_path: Path) -> PackRequest:
    """Nine patients with two photographs each, two boxes on the first; the files a hospital would hand over."""
    boxes = ["Filename,Patient#,Appt#,DFU#,DebriStat,Camera,Angle,Bounding Box Number,Xmin,Ymin,Xmax,Ymax"]
    labels = ["Filename,Bounding Box Number,Phase"]
    for patient in range(9):
        for number in range(2):
            name = f"p{patient}_{number}.png"
            photograph(tmp_path / "photos" / name, seed=10 * patient + number)
            for box in range(2 - number):
                boxes.append(f"{name},{patient},1,1,0,c,left,{box + 1},{5 + 20 * box},5,{15 + 20 * box},20")
                labels.append(f"{name},{box + 1},{'IPR'[(patient + box) % 3]}")
    return PackRequest(
        tmp_path / "photos",
        boxes=write(tmp_path / "boxes.csv", "\n".join(boxes)),
        labels=write(tmp_path / "labels.csv", "\n".join(labels)),
        key=KEY,
        images_per_shard=10,
    )


def dataset(tmp_path: Path, name: str = "real") -> Dataset:
    return Dataset(name, Storage(tmp_path / "out"))


def changed(request: PackRequest, **changes) -> PackRequest:
    return PackRequest(**{**vars(request), **changes})


# -- geometry --------------------------------------------------------------------------------

sides = st.integers(1, 500)


@given(sides, sides, st.tuples(*[st.floats(0, 1)] * 4), st.floats(0, 2))
def test_square_lies_inside_and_holds_its_box_whenever_it_can(width, height, corners, margin):
    xs, ys = sorted((corners[0] * width, corners[2] * width)), sorted((corners[1] * height, corners[3] * height))
    box = (xs[0], ys[0], xs[1], ys[1])
    assume(box_fault(box, width, height) is None)
    left, top, side = square_around(box, width, height, margin)
    assert side >= 1
    assert 0 <= left <= width - side
    assert 0 <= top <= height - side
    longer = max(box[2] - box[0], box[3] - box[1])
    assert side >= min(longer * (1 + 2 * margin) - 1e-3, width, height)
    if max(np.ceil(box[2]) - np.floor(box[0]), np.ceil(box[3]) - np.floor(box[1])) <= min(width, height):
        assert left <= box[0]
        assert box[2] <= left + side
        assert top <= box[1]
        assert box[3] <= top + side


def test_square_is_shifted_then_shrunk():
    assert square_around((40, 40, 60, 50), 100, 100, 0.5) == (30, 25, 40)
    assert square_around((0, 0, 20, 10), 100, 100, 0.5) == (0, 0, 40)  # shifted: as large, box in the corner
    assert square_around((10, 10, 40, 40), 100, 50, 0.5) == (0, 0, 50)  # shrunk to the shorter side
    assert square_around((10, 0, 90, 40), 100, 40, 0.0) == (30, 0, 40)  # box longer than the photograph is high


@settings(deadline=None)
@given(st.integers(20, 80), st.integers(20, 80), st.integers(0, 15), st.integers(0, 15), st.integers(1, 64))
def test_crop_keeps_native_pixels_or_is_scaled_with_its_box(width, height, x, y, max_size):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    box = (float(x), float(y), float(x + 5), float(y + 4))
    crop = cut(Image.fromarray(pixels), box, margin=0.4, max_size=max_size)
    left, top, side = square_around(box, width, height, 0.4)
    size = min(side, max_size)
    assert crop.pixels.shape == (size, size, 3)
    assert crop.pixels.dtype == np.uint8
    assert crop.original_size == (side, side)
    if size == side:
        assert (crop.pixels == pixels[top : top + side, left : left + side]).all()
    assert np.allclose(np.array(crop.box) * side / size + [left, top, left, top], box)
    frozen = cut(Image.fromarray(pixels), box, margin=0.4, max_size=max_size, freeze_size=33)
    assert frozen.pixels.shape == (33, 33, 3)
    assert frozen.original_size == (side, side)


def test_without_a_box_the_largest_middle_square_is_taken():
    crop = cut(Image.new("RGB", (60, 40)), None, margin=0.1, max_size=512)
    assert crop.pixels.shape == (40, 40, 3)
    assert crop.box is None


def test_box_of_rounding_is_clipped_and_others_are_faulty():
    assert box_fault((-0.5, 0, 60.9, 40), 60, 40) is None
    assert clip((-0.5, 0, 60.9, 40), 60, 40) == (0, 0, 60, 40)
    assert "no area" in (box_fault((5, 5, 5, 9), 60, 40) or "")
    assert "no area" in (box_fault((9, 5, 5, 9), 60, 40) or "")
    assert "outside" in (box_fault((50, 5, 70, 9), 60, 40) or "")
    assert "outside" in (box_fault((60, 5, 61, 9), 60, 40) or "")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    path = photograph(tmp_path / "a.png", 30, 20, exif=exif)
    turned = decode(path)
    assert turned.size == photograph_size(path) == ((20, 30) if orientation >= 5 else (30, 20))
    stored = np.asarray(Image.open(path))
    upright = {1: stored, 3: stored[::-1, ::-1], 6: np.rot90(stored, -1), 8: np.rot90(stored)}
    if orientation in upright:
        assert (np.asarray(turned) == upright[orientation]).all()


def test_exif_behind_the_pixels_of_a_png_is_found_without_decoding_them(tmp_path, monkeypatch):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    path = photograph(tmp_path / "a.png", 30, 20, exif=exif)
    data = path.read_bytes()
    start = data.index(b"eXIf") - 4
    stop = start + 12 + int.from_bytes(data[start : start + 4])
    path.write_bytes(data[:start] + data[stop:-12] + data[start:stop] + data[-12:])  # before the last chunk, IEND
    assert decode(path).size == (20, 30)
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", lambda self: pytest.fail("decoded"))
    assert photograph_size(path) == (20, 30)
    assert photograph_size(photograph(tmp_path / "b.png", 30, 20)) == (30, 20)


def test_a_colour_profile_is_applied_but_not_to_masks(tmp_path):
    """Linear light (gamma 1) is brightened to sRGB; a broken profile counts as none."""
    pixels = np.full((4, 4), 55, np.uint8)
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    for tag in (b"rTRC", b"gTRC", b"bTRC"):  # each an entry of the tag table: signature, offset, length
        at = profile.index(tag)
        offset = int.from_bytes(profile[at + 4 : at + 8])
        profile[offset : offset + 14] = b"curv" + bytes(4) + (1).to_bytes(4) + (256).to_bytes(2)  # gamma 1.0
    grey = Image.fromarray(np.dstack([pixels] * 3))
    for image in (grey, grey.convert("RGBA"), grey.quantize(2)):
        image.save(tmp_path / "a.png", icc_profile=bytes(profile))
        assert np.abs(np.asarray(decode(tmp_path / "a.png")).astype(int) - 128).max() <= 1
        assert (open_mask(tmp_path / "a.png").labels == 55).all()
        image.save(tmp_path / "a.png", icc_profile=b"broken")
        assert (np.asarray(decode(tmp_path / "a.png")) == 55).all()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
def test_every_8_bit_mode_becomes_rgb(tmp_path, mode):
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    Image.new("RGB", (7, 5), (200, 100, 50)).convert(mode).save(path)
    assert np.asarray(decode(path)).shape == (5, 7, 3)


# -- which photograph a table means -----------------------------------------------------------------------------------


def test_photographs_are_found_by_path_name_or_stem(tmp_path):
    for name in ("D/1.jpg", "P/1.jpg", "P/2.JPG", "P/3.a.png", ".hidden.png", "note.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    photographs = Photographs(tmp_path)
    assert photographs.names == ["D/1.jpg", "P/1.jpg", "P/2.JPG", "P/3.a.png"]
    found = {"D/1.jpg": "D/1.jpg", "2.jpg": "P/2.JPG", "2": "P/2.JPG", "x\\P\\2.png": "P/2.JPG", "3.a": "P/3.a.png"}
    assert {reference: photographs.find(reference, "here") for reference in found} == found
    assert photographs.find("D/2.jpg", "here") is None  # never the photograph of another folder
    assert photographs.find("4.jpg", "here") is None
    with pytest.raises(BuilderError, match=r"line 7.*several photographs.*D/1.jpg, P/1.jpg"):
        photographs.find("1.jpg", "line 7")


# -- boxes --------------------------------------------------------------------------------


def test_minimal_csv_in_any_case_with_semicolons(tmp_path):
    photograph(tmp_path / "p" / "a.png")
    path = write(
        tmp_path / "b.csv", "\ufeffFILE;XMin;ymin;xmax;YMAX;label;Patient\na.png;1;2;3.5;4;I;7\n\na.png;5;6;7;8;P;7\n"
    )
    source = read_boxes(path, Photographs(tmp_path / "p"))
    assert [(b.xmin, b.ymin, b.xmax, b.ymax, b.label, b.patient) for b in source.boxes] == [
        (1, 2, 3.5, 4, "I", "7"),
        (5, 6, 7, 8, "P", "7"),
    ]
    assert source.has_labels
    assert source.boxes[1].where.endswith("line 4")


def test_coco_boxes_and_categories(tmp_path):
    photograph(tmp_path / "p" / "a.png")
    coco = {
        "images": [{"id": 3, "file_name": "train/a.png", "width": 60, "height": 40, "patient": 5}],
        "categories": [{"id": 1, "name": "ulcer"}],
        "annotations": [{"image_id": 3, "bbox": [1, 2, 10, 20], "category_id": 1}] * 2,
    }
    path = write(tmp_path / "b.json", json.dumps(coco))
    source = read_boxes(path, Photographs(tmp_path / "p"))
    assert [(b.xmin, b.ymin, b.xmax, b.ymax, b.number, b.extent) for b in source.boxes] == [
        (1, 2, 11, 22, "1", (60, 40)),
        (1, 2, 11, 22, "2", (60, 40)),
    ]
    assert not source.has_labels
    assert source.boxes[0].label == ""
    assert read_boxes(path, Photographs(tmp_path / "p"), lambda text: text == "ulcer").boxes[0].label == "ulcer"


@pytest.mark.parametrize(
    ("image", "annotation", "message"),
    [
        ({"id": 1}, {"image_id": 1, "bbox": [1, 2, 3, 4]}, "annotation 0 is of image 1, which has no file name"),
        ({"id": 1, "file_name": "a"}, {"image_id": 1, "bbox": [1, 2, 3]}, "annotation 0 has the bbox"),
        ({"id": 1, "file_name": "a"}, {"image_id": 1, "bbox": [1, 2, 3, None]}, "annotation 0: a box of 1, 2, 3, None"),
    ],
)
def test_faulty_coco_names_the_annotation(tmp_path, image, annotation, message):
    photograph(tmp_path / "p" / "a.png")
    path = write(tmp_path / "b.json", json.dumps({"images": [image], "annotations": [annotation]}))
    with pytest.raises(BuilderError, match=message):
        read_boxes(path, Photographs(tmp_path / "p"))


@pytest.mark.parametrize("text", ["[1]", "{}", '{"images": [], "annotations": [{}]}', "{"])
def test_json_that_is_not_coco_is_refused(tmp_path, text):
    photograph(tmp_path / "p" / "a.png")
    with pytest.raises(BuilderError, match=r"b.json is not"):
        read_boxes(write(tmp_path / "b.json", text), Photographs(tmp_path / "p"))


def test_masks_give_a_box_for_each_component_and_drop_specks(tmp_path):
    photograph(tmp_path / "p" / "a.jpg")
    mask = np.zeros((40, 60), bool)
    mask[5:15, 10:20] = mask[15:25, 20:30] = True  # touch at a corner: one component
    mask[30:38, 40:50] = mask[0, 0] = True
    (tmp_path / "masks").mkdir()
    Image.fromarray(mask).save(tmp_path / "masks" / "a.png")
    source = read_boxes(tmp_path / "masks", Photographs(tmp_path / "p"))
    assert [(b.xmin, b.ymin, b.xmax, b.ymax) for b in source.boxes] == [(10, 5, 30, 25), (40, 30, 50, 38)]
    assert source.left_out["specks in masks, left out"] == 1
    assert source.boxes[0].extent == (60, 40)


# -- labels --------------------------------------------------------------------------------


def test_labels_are_codes_or_names_in_any_case(tmp_path):
    codes = Codes(HEALING_PHASES)
    assert [codes.get(text) for text in ("I", "i", " Remodeling ", "PROLIFERATIVE", "x")] == ["I", "I", "R", "P", None]
    assert codes.of_folder("depth/R/left/a.png") == "R"
    assert codes.of_folder("R.png") is None
    cased = Codes(ClassTable([Phase("a", "small", ""), Phase("A", "capital", "")]))
    assert cased.get("A") == "A"
    assert cased.get("a") == "a"


def test_label_file_by_box_and_by_photograph(tmp_path):
    for name in "abc":
        photograph(tmp_path / "p" / f"{name}.png")
    text = (
        "Filename,Bounding Box Number,Phase,Patient\na.png,1,I,9\na.png,2.0,P,9\nb.png,,R,\nc.png,1,I,\ngone.png,1,I,\n"
    )
    labels = read_labels(write(tmp_path / "l.csv", text), Photographs(tmp_path / "p"), Codes(HEALING_PHASES))
    assert [labels.code("a.png", n) for n in ("1", "2", "3", "")] == ["I", "P", None, None]
    assert labels.code("b.png", "5") == "R"
    assert labels.code("c.png", "") == "I"
    assert labels.unused == 1
    assert labels.patients == {"a.png": "9"}


def test_bad_label_names_file_and_line(tmp_path):
    photograph(tmp_path / "p" / "a.png")
    path = write(tmp_path / "l.csv", "file,label\na.png,I\na.png,Q\n")
    with pytest.raises(BuilderError, match=r"l.csv line 3: label 'Q' is not among the classes") as error:
        read_labels(path, Photographs(tmp_path / "p"), Codes(HEALING_PHASES))
    assert "I (inflammatory)" in error.value.remedy
    with pytest.raises(BuilderError, match=r"line 3: a.png has the labels I and P"):
        read_labels(write(path, "file,label\na.png,I\na.png,P\n"), Photographs(tmp_path / "p"), Codes(HEALING_PHASES))
    text = "file,label,patient\na.png,I,1\na.png,I,2\n"
    with pytest.raises(BuilderError, match=r"line 3: a.png belongs to two patients"):
        read_labels(write(path, text), Photographs(tmp_path / "p"), Codes(HEALING_PHASES))
    with pytest.raises(BuilderError, match="line 2 has 3 cells, the header 2"):
        read_labels(write(path, "file,label\na,b.png,I\n"), Photographs(tmp_path / "p"), Codes(HEALING_PHASES))
    with pytest.raises(BuilderError, match=r"no column 'phase' or 'label'"):
        read_labels(write(path, "file,foo\n"), Photographs(tmp_path / "p"), Codes(HEALING_PHASES))


# -- patients --------------------------------------------------------------------------------


def test_readers_hand_patients_on_as_they_are_written(tmp_path):
    photograph(tmp_path / "p" / "a.png")
    boxes = write(tmp_path / "b.csv", "file,xmin,ymin,xmax,ymax,patient\na.png,1,2,3,4,07\n")
    assert read_boxes(boxes, Photographs(tmp_path / "p")).boxes[0].patient == "07"
    labels = write(tmp_path / "l.csv", "file,label,patient\na.png,I,7.0\na.png,I,Patient 7\n")
    assert read_labels(labels, Photographs(tmp_path / "p"), Codes(HEALING_PHASES)).patients == {"a.png": "7.0"}


def test_stand_ins_for_unknown_patients():
    key = PatientKey(KEY, "")
    hashes = [from_photograph(f"{folder}/x_1.png", "photograph").hash(key) for folder in "ab"]
    assert hashes[0] != hashes[1]
    assert from_photograph("a/x_1.png", "^([a-z]+)_").hash(key) == from_photograph("b/x_2.png", "^([a-z]+)_").hash(key)
    for pattern in ("^([a-z]+)_", r"^\d()", "(-)?"):
        with pytest.raises(BuilderError, match=r"does not match a/1.png"):
            from_photograph("a/1.png", pattern)
    with pytest.raises(BuilderError, match=r"not a regular expression"):
        from_photograph("a/1.png", "(")


# -- split --------------------------------------------------------------------------------

SHARES = {"train": 0.7, "val": 0.15, "test": 0.15}
cohorts = st.dictionaries(
    st.text("0123456789abcdef", min_size=4, max_size=4),
    st.dictionaries(st.sampled_from("IPR"), st.integers(1, 9), min_size=1),
    min_size=1,
    max_size=60,
)


@given(cohorts, st.integers(0, 3))
def test_split_is_deterministic_and_reaches_every_split(crops, seed):
    split_of = split_patients(crops, SHARES, seed)
    assert set(split_of) == set(crops)
    assert split_of == split_patients(dict(reversed(crops.items())), SHARES, seed)
    for phase in "IPR":
        reached = {split_of[patient] for patient in crops if phase in crops[patient]}
        holders = sum(phase in counts for counts in crops.values())
        single = all(len(counts) == 1 for counts in crops.values())
        if holders >= 3 and (single or holders >= 9):
            assert reached == set(SPLITS)


@given(st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_split_shares_are_near_their_target(seed):
    rng = np.random.default_rng(seed)
    crops = {
        f"{patient:04d}": {p: int(n) for p, n in zip("IPR", rng.integers(0, (9, 20, 5)), strict=True) if n} or {"P": 1}
        for patient in range(200)
    }
    split_of = split_patients(crops, SHARES, seed)
    for phase in "IPR":
        counts: Counter[str] = Counter()
        for patient, split in split_of.items():
            counts[split] += crops[patient].get(phase, 0)
        for split, share in SHARES.items():
            assert abs(counts[split] / counts.total() - share) < 0.03


def test_split_by_another_seed_differs_and_shares_must_sum_to_one():
    crops = {f"{n}": {"I": 1} for n in range(50)}
    assert split_patients(crops, SHARES, 0) != split_patients(crops, SHARES, 1)
    assert set(split_patients(crops, {"train": 1.0, "val": 0.0, "test": 0.0}).values()) == {"train"}
    with pytest.raises(BuilderError, match=r"don't sum to 1"):
        split_patients(crops, {"train": 0.9, "val": 0.9, "test": 0.0})


# -- pack --------------------------------------------------------------------------------


def test_pack_makes_every_box_a_crop_with_its_row(hospital, tmp_path):
    real = dataset(tmp_path)
    summary = pack(hospital, real, progress=False)
    rows = real.table().to_pylist()
    assert summary.count == len(rows) == 27
    assert real.shard_numbers() == [0, 1, 2]
    assert Counter(row["phase"] for row in rows) == {"I": 9, "P": 9, "R": 9}
    assert {row["key"] for row in rows} == {f"real-{code}-{n:08d}" for code in "IPR" for n in range(9)}
    key = PatientKey(KEY, "")
    names = {key.photograph(path.name): path.name for path in hospital.photographs.iterdir()}
    for row, pixels in real.images(rows):
        name = names[row["source"]]  # the name itself, which has the patient's number, is nowhere
        assert name.removesuffix(".png").encode() not in real.storage.read(row["shard"])
        assert row["patient"] == key.hash(name[1])
        original = np.asarray(Image.open(hospital.photographs / name))
        left, _top = next(  # the box, found in the photograph, is one of those asked for
            (x, 5) for x in (5, 25)
            if (pixels[int(row["box"][1]) : int(row["box"][3]), int(row["box"][0]) : int(row["box"][2])]
                == original[5:20, x : x + 10]).all()
        )  # fmt: skip
        assert row["phase"] == "IPR"[(int(name[1]) + (left == 25)) % 3]
        assert row["width"] == row["height"] == 20
        assert row["original_size"] == [20, 20]
        assert Image.open(io.BytesIO(real.payload(row))).info == {}
    splits: dict[str, set[str]] = {}
    for row in rows:
        splits.setdefault(row["patient"], set()).add(row["split"])
    assert all(len(split) == 1 for split in splits.values())
    assert set.union(*splits.values()) == set(SPLITS)
    info = real.info
    assert info["state"] == "complete"
    assert info["count"] == 27
    assert info["origin"] == "real"
    assert info["lineage"] == {
        "known": True, "key_fingerprint": key.fingerprint, "patients": [],
        "patient_source": "column", "patient_forms": [key.form("7")],
    }  # fmt: skip
    text = str(summary)
    assert "27 crops from 18 photographs" in text
    assert "longer side of the boxes" in text


def test_same_input_is_there_already_and_other_input_is_refused(hospital, tmp_path):
    real = dataset(tmp_path)
    pack(hospital, real, progress=False)
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.*") if path.is_file()}
    assert "there already" in str(pack(hospital, real, progress=False))
    with pytest.raises(BuilderError, match=r"made from other input; changed: crops") as error:
        pack(changed(hospital, crops=CropsConfig(margin=0.3)), real, progress=False)
    assert "builder rm real" in error.value.remedy
    assert before == {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.*") if path.is_file()}


def test_a_partial_pack_is_begun_anew_with_the_same_bytes(hospital, tmp_path):
    whole, torn = dataset(tmp_path), Dataset("real", Storage(tmp_path / "torn"))
    pack(hospital, whole, progress=False)
    pack(hospital, torn, progress=False)
    torn.write_info({**torn.info, "state": "partial"})
    torn.storage.remove("shards/real/shard-000001.tar")
    torn.storage.write("shards/real/shard-000009.tar", b"left behind")
    pack(hospital, torn, progress=False)
    for folder in ("shards/real", "manifests/real"):
        assert whole.storage.list(folder) == torn.storage.list(folder)
        for name in whole.storage.list(folder):
            if name != "dataset.json":
                assert whole.storage.read(f"{folder}/{name}") == torn.storage.read(f"{folder}/{name}")


def test_a_dataset_of_another_kind_is_never_touched(hospital, tmp_path):
    made = dataset(tmp_path)
    made.write_info({"origin": "synthetic", "state": "partial", "classes": HEALING_PHASES.to_json()})
    with pytest.raises(BuilderError, match=r"was not made by `builder pack`"):
        pack(hospital, made, progress=False)
    assert made.info["origin"] == "synthetic"


def test_two_packs_of_one_name_do_not_meet(hospital, tmp_path):
    with exclusive(dataset(tmp_path)), pytest.raises(BuilderError, match="another job is writing dataset 'real'"):
        pack(hospital, dataset(tmp_path), progress=False)
    assert pack(hospital, dataset(tmp_path), progress=False).count == 27


def test_full_disk_leaves_nothing(hospital, tmp_path, monkeypatch):
    write_file = Storage.write

    def full(self, relative, data):
        if relative.endswith("000001.parquet"):
            raise OSError(errno.ENOSPC, "No space left on device")
        write_file(self, relative, data)

    monkeypatch.setattr(Storage, "write", full)
    with pytest.raises(BuilderError, match=r"No space left on device; nothing of it was kept"):
        pack(hospital, dataset(tmp_path), progress=False)
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("content", [b"", b"not an image", "truncated"])
def test_corrupt_photograph_is_named_or_skipped(hospital, tmp_path, content):
    path = hospital.photographs / "p3_1.png"
    if content == "truncated":  # its header is sound: found only when its pixels are decoded
        path.unlink()
        path = photograph(path.with_suffix(".jpg"))
        content = path.read_bytes()[:-1000]
    path.write_bytes(content)
    with pytest.raises(BuilderError, match=rf"{path.name} cannot be read") as error:
        pack(hospital, dataset(tmp_path), progress=False)
    assert "--skip-bad" in error.value.remedy
    assert not dataset(tmp_path).exists()
    assert not (tmp_path / "out" / "shards" / "real").exists()
    summary = pack(changed(hospital, skip_bad=True), dataset(tmp_path), progress=False)
    assert summary.count == 26
    assert summary.skipped == {"unreadable photographs, left out": 1}


@pytest.mark.parametrize(
    ("edges", "message"),
    [
        ("5,5,70,20", "boxes.csv line 2: the box .* reaches outside the photograph of 60 x 40 px"),
        ("-20,5,15,20", "outside"),
        ("5,5,5,20", "line 2: the box .* has no area"),
        ("15,5,5,20", "no area"),
    ],
)
def test_bad_boxes(hospital, tmp_path, edges, message):
    lines = hospital.boxes.read_text().splitlines()
    lines[1] = lines[1].replace("5,5,15,20", edges)
    write(hospital.boxes, "\n".join(lines))
    with pytest.raises(BuilderError, match=message):
        pack(hospital, dataset(tmp_path), progress=False)
    summary = pack(changed(hospital, skip_bad=True), dataset(tmp_path), progress=False)
    assert summary.count == 26
    assert summary.skipped == {"unusable boxes, left out": 1}


@pytest.mark.parametrize("value", ["five", "", "nan", "inf"])
def test_a_box_that_is_no_number(hospital, tmp_path, value):
    lines = hospital.boxes.read_text().splitlines()
    lines[1] = lines[1].replace(",5,5,15", f",{value},5,15")
    with pytest.raises(BuilderError, match=r"line 2: a box of .*"):
        pack(changed(hospital, boxes=write(hospital.boxes, "\n".join(lines))), dataset(tmp_path), progress=False)


def test_box_of_a_missing_photograph(hospital, tmp_path):
    (hospital.photographs / "p3_1.png").unlink()
    with pytest.raises(BuilderError, match=r"not in .*photos: .*boxes.csv line 13: p3_1.png"):
        pack(hospital, dataset(tmp_path), progress=False)
    summary = pack(changed(hospital, skip_bad=True), dataset(tmp_path), progress=False)
    assert summary.skipped == {"boxes without a photograph, left out": 1, "labels without a photograph, not used": 1}


def test_photograph_without_a_box(hospital, tmp_path):
    photograph(hospital.photographs / "extra.png")
    with hospital.labels.open("a") as file:
        file.write("\nextra.png,,R")
    with pytest.raises(BuilderError, match=r"extra.png has no box") as error:
        pack(hospital, dataset(tmp_path), progress=False)
    assert "--without-box skip" in error.value.remedy
    summary = pack(changed(hospital, without_box="skip"), dataset(tmp_path, "skip"), progress=False)
    assert summary.count == 27
    assert "photographs without a box, left out: 1" in str(summary)
    with pytest.raises(BuilderError, match=r"patient of .*extra.png is unknown"):
        pack(changed(hospital, without_box="whole"), dataset(tmp_path, "whole"), progress=False)
    whole = changed(hospital, without_box="whole", group_by="photograph")
    assert pack(whole, dataset(tmp_path, "whole"), progress=False).count == 28
    extra = PatientKey(KEY, "").photograph("extra.png")
    row = next(row for row in dataset(tmp_path, "whole").table().to_pylist() if row["source"] == extra)
    assert row["box"] is None
    assert (row["phase"], row["width"], row["height"]) == ("R", 40, 40)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"photographs": Path("/nowhere")}, "there is no folder"),
        ({"boxes": Path("/nowhere.csv")}, "box source /nowhere.csv is missing"),
        ({"boxes": None}, "no boxes are given"),
        ({"labels": Path("/nowhere.csv")}, "there is no file"),
        ({"labels": None}, "no label for .*p0_0.png"),
        ({"classes": ClassTable([*HEALING_PHASES, Phase("X", "extra", "")])}, "empty phase: no crop of X .extra."),
        ({"classes": ClassTable(HEALING_PHASES.phases[:2])}, "label 'R' is not among the classes"),
    ],
)
def test_bad_requests(hospital, tmp_path, changes, message):
    with pytest.raises(BuilderError, match=message):
        pack(changed(hospital, **changes), dataset(tmp_path), progress=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "changes",
    [{"without_box": "all"}, {"freeze_size": 0}, {"images_per_shard": 0}],
)
def test_impossible_values_are_refused_at_once(hospital, changes):
    with pytest.raises(BuilderError):
        changed(hospital, **changes)


def test_no_photographs(tmp_path):
    (tmp_path / "photos").mkdir()
    with pytest.raises(BuilderError, match=r"no photographs found in"):
        pack(PackRequest(tmp_path / "photos"), dataset(tmp_path), progress=False)


def test_one_photograph_of_two_patients(hospital, tmp_path):
    lines = hospital.boxes.read_text().splitlines()
    lines[1] = lines[1].replace("p0_0.png,0,", "p0_0.png,8,")
    with pytest.raises(BuilderError, match=r"p0_0.png belongs to several patients: 0, 8"):
        pack(changed(hospital, boxes=write(hospital.boxes, "\n".join(lines))), dataset(tmp_path), progress=False)


@pytest.mark.parametrize("root", ["I", "depth_rgb/I"])
def test_image_tree_by_phase_folder(tmp_path, root):
    parent = Path(root).parent
    for place, code in enumerate(("I", "proliferative", "r")):
        for number in range(3):
            photograph(tmp_path / "tree" / parent / code / f"{code}{number}.png", seed=10 * place + number)
    request = PackRequest(tmp_path / "tree", without_box="whole", group_by=r"\d", key=KEY, freeze_size=16)
    summary = pack(request, dataset(tmp_path), progress=False)
    assert {phase: sum(row.values()) for phase, row in summary.crops.items()} == {"I": 3, "P": 3, "R": 3}
    assert sum(summary.patients.values()) == 3
    assert "patients unknown: 9 photographs" in str(summary)
    assert {row["width"] for row in dataset(tmp_path).table().to_pylist()} == {16}
    photograph(tmp_path / "tree" / parent / "necrotic" / "n.png")
    with pytest.raises(BuilderError, match=r"folder of .*n.png: label 'necrotic' is not among the classes"):
        pack(request, dataset(tmp_path), progress=False)


def test_masks_of_one_class_and_a_mask_of_another_size(tmp_path):
    for number in range(3):
        photograph(tmp_path / "data" / "images" / f"{number}.jpg", seed=number)
        mask = np.zeros((40, 60), np.uint8)
        mask[10:20, 10:30] = 1
        (tmp_path / "data" / "masks").mkdir(exist_ok=True)
        Image.fromarray(mask).save(tmp_path / "data" / "masks" / f"{number}.png")
    request = PackRequest(
        tmp_path / "data", tmp_path / "data" / "masks", classes=ULCER, group_by="photograph", key=KEY
    )  # the masks lie among the photographs, and are not taken for some
    summary = pack(request, dataset(tmp_path), progress=False)
    assert summary.crops == {"U": {"train": 1, "val": 1, "test": 1}}
    Image.fromarray(mask[:20]).save(tmp_path / "data" / "masks" / "1.png")
    with pytest.raises(BuilderError, match=r"drawn on 60 x 20 px, the photograph has 60 x 40"):
        pack(request, dataset(tmp_path, "other"), progress=False)
    (tmp_path / "data" / "masks" / "1.png").write_bytes(b"")
    with pytest.raises(BuilderError, match=r"the mask .*1.png cannot be read"):
        pack(request, dataset(tmp_path, "other"), progress=False)


def test_labels_in_the_box_file(tmp_path):
    lines = ["file,xmin,ymin,xmax,ymax,label,patient"]
    for number, label in enumerate(["I", "proliferative", "r"]):
        photograph(tmp_path / "p" / f"{number}.png", seed=number)
        lines.append(f"{number},5,5,20,20,{label},{number}")
    boxes = write(tmp_path / "b.csv", "\n".join(lines))
    request = PackRequest(tmp_path / "p", boxes, key=KEY, group_by="photograph")
    summary = pack(request, dataset(tmp_path), progress=False)
    assert summary.phase_patients == {"I": 1, "P": 1, "R": 1}
    assert "--group-by was not needed" in str(summary)
    assert "is not in" in str(summary)
    write(boxes, boxes.read_text().replace(",r,", ",q,"))
    with pytest.raises(BuilderError, match=r"b.csv line 4: label 'q' is not among the classes"):
        pack(request, dataset(tmp_path, "other"), progress=False)


def test_a_root_that_cannot_be_written_to_is_said_before_anything_is_rendered(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(BuilderError, match=r"file cannot be written to: Not a directory"):
        ensure_phantom(str(tmp_path / "file"))
    assert "rendering" not in capsys.readouterr().out


def test_phantom_is_packed_once(tmp_path, capsys):
    made = ensure_phantom(str(tmp_path), patients=6, workers=1)
    assert made.info["state"] == "complete"
    assert "phantom: " in capsys.readouterr().out
    created = made.info["created"]
    assert {row["phase"] for row in made.table(["phase"]).to_pylist()} == {"I", "P", "R"}
    assert ensure_phantom(str(tmp_path), patients=6).info["created"] == created
    assert capsys.readouterr().out == ""

"""Boxes, masks and copies that can't be right are refused or read rightly; never is the whole photograph a wound."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from PIL import Image

from builder.crops.boxes import Box, BoxSource, read_boxes
from builder.crops.columns import CORNERS
from builder.crops.layouts import TO_EDGES, likelier_layout, written_as
from builder.crops.masks import components_of
from builder.crops.pack import PackRequest, pack
from builder.crops.photographs import Photographs
from builder.crops.plan import make_plan
from builder.crops.problems import Problems
from builder.crops.units import UNITS, boxes_in_pixels, look_like
from builder.errors import BuilderError
from builder.phases import HEALING_PHASES, ClassTable, Phase
from builder.shards.dataset import Dataset
from builder.shards.storage import Storage

SIZE = (320, 240)
BOX = (96, 72, 192, 168)
ULCER = ClassTable([Phase("U", "ulcer", "ulcer")])


def picture(path: Path, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    small = np.random.default_rng(seed).integers(90, 200, (24, 32, 3), dtype=np.uint8)
    Image.fromarray(small).resize(SIZE).save(path)
    return path


def clinic(root: Path, count: int = 3) -> Path:
    for place, code in enumerate("IPR"):
        for number in range(count):
            picture(root / "photos" / code / f"{code}{number}.png", 10 * place + number)
    return root / "photos"


def request(root: Path, **changes) -> PackRequest:
    return PackRequest(root / "photos", key=b"a key of the test", group_by=changes.pop("group_by", None), **changes)


def table(root: Path, box=BOX, name: str = "b.csv", count: int = 3, header: str = "xmin,ymin,xmax,ymax") -> Path:
    lines = [f"file,{header},patient"]
    lines += [f"{code}{n}.png,{','.join(map(str, box))},{code}{n}" for code in "IPR" for n in range(count)]
    (root / name).write_text("\n".join(lines))
    return root / name


def edges_of(plan) -> set:
    return {crop.box for crops in plan.crops.values() for crop in crops}


# -- units and layouts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("box", "unit"),
    [
        ((0.3, 0.3, 0.6, 0.7), "fraction"),
        ((0, 0, 1, 1), "fraction"),
        ((-0.004, 0.3, 0.6, 1.008), "fraction"),
        ((30, 30, 60, 70), "percent"),
        ((29.97, 30.1, 59.9, 70.02), "percent"),
        ((5, 5, 96, 100), "percent"),
    ],
)
def test_units_are_recognised_and_refused_or_read(tmp_path, box, unit):
    clinic(tmp_path)
    path = table(tmp_path, box)
    with pytest.raises(BuilderError, match=f"the 9 boxes look like {unit}s") as error:
        make_plan(request(tmp_path, boxes=path), progress=False)
    assert f"--box-units {unit}" in error.value.remedy
    plan = make_plan(request(tmp_path, boxes=path, box_units=unit), progress=False)
    (edges,) = edges_of(plan)
    whole = UNITS[unit]
    wanted = [min(max(value * side / whole, 0), side) for value, side in zip(box, (*SIZE, *SIZE), strict=True)]
    assert np.allclose(edges, wanted)


@pytest.mark.parametrize(
    ("box", "unit", "message"),
    [
        (BOX, "fraction", "9 of 9 boxes reach far above 1"),
        (BOX, "percent", "9 of 9 boxes reach far above 100"),
        ((0.3, 0.3, 0.6, 0.7), "percent", "look like fractions"),
        ((0.3, 0.3, 0.6, 0.7), "pixel", "less than 4 px"),
        ((200, 30, 203, 60), None, "is 3 x 30 px, less than 4 px"),
        ((300, 200, 420, 300), None, "reaches outside"),
    ],
)
def test_units_that_cannot_be_are_refused(tmp_path, box, unit, message):
    clinic(tmp_path)
    with pytest.raises(BuilderError, match=message):
        make_plan(request(tmp_path, boxes=table(tmp_path, box), box_units=unit), progress=False)


def test_percent_signs_say_percent(tmp_path):
    clinic(tmp_path)
    path = table(tmp_path, ("30 %", "30 %", "60 %", "70 %"))
    with pytest.raises(BuilderError, match="percent signs"):
        make_plan(request(tmp_path, boxes=path), progress=False)
    assert edges_of(make_plan(request(tmp_path, boxes=path, box_units="percent"), progress=False)) == {BOX}


@given(
    st.lists(st.tuples(*[st.floats(0, 1)] * 4), min_size=1, max_size=8),
    st.tuples(st.integers(200, 5000), st.integers(200, 5000)),
    st.sampled_from(["fraction", "percent"]),
)
def test_fractions_and_percents_say_the_same_boxes(corners, size, unit):
    boxes = []
    for x1, y1, x2, y2 in corners:
        xs, ys = sorted((x1, x2)), sorted((y1, y2))
        assume(xs[0] < xs[1] and ys[0] < ys[1])
        boxes.append(tuple(value * UNITS[unit] for value in (xs[0], ys[0], xs[1], ys[1])))
    source = BoxSource([Box("a", *box, "here") for box in boxes])
    assume(look_like(source.boxes, {"a": size}) == unit or unit == "percent")
    assume(unit == "fraction" or look_like(source.boxes, {"a": size}) != "fraction")
    problems = Problems()
    pixels = boxes_in_pixels(source, {"a": size}, unit, "b.csv", problems)
    problems.raise_if_any()
    for box, read in zip(boxes, pixels, strict=True):
        assert np.allclose(np.array(read.edges) / [*size, *size] * UNITS[unit], box)


def test_boxes_of_small_pictures_and_of_the_middle_are_pixels():
    def look(box, size, count=9):
        sizes = {str(n): size for n in range(count)}
        return look_like([Box(name, *box, "") for name in sizes], sizes)

    assert look((30, 30, 60, 70), (100, 90)) == "pixel"  # of a thumbnail
    assert look((55, 50, 95, 90), (150, 140)) == "pixel"  # in the middle of pictures of 150 px
    assert look((30, 30, 60, 70), (4000, 3000), 1) == "percent"  # one photograph is enough when it is large
    assert look((30, 30, 60, 70), (320, 240), 1) == "pixel"  # but not a small one
    assert look((96, 72, 192, 168), SIZE) == "pixel"
    assert look((70, 70, 100, 99), SIZE) == "percent"  # lower right in all nine


@given(st.sampled_from(sorted(TO_EDGES)), st.tuples(*[st.floats(-1e4, 1e4)] * 4))
def test_layouts_are_inverse_to_their_reading(layout, edges):
    assert np.allclose(TO_EDGES[layout](*written_as(edges, layout)), edges, atol=1e-6)


@pytest.mark.parametrize(
    ("header", "box", "other"),
    [
        ("xmin,ymin,xmax,ymax", (200, 120, 60, 50), "x, y, width, height"),
        ("x,y,width,height", (200, 120, 260, 170), "xmin, ymin, xmax, ymax"),
        ("x,y,width,height", (300, 120, 40, 50), "x_center, y_center, width, height"),
    ],
)
def test_another_layout_is_recognised(tmp_path, header, box, other):
    clinic(tmp_path)
    path = table(tmp_path, box, header=header)
    for skip in (False, True):  # else the boxes that happen to be possible would be packed
        with pytest.raises(
            BuilderError, match=f"9 of 9 boxes are impossible as {header.replace(',', ', ')}.*as {other}"
        ):
            make_plan(request(tmp_path, boxes=path, skip_bad=skip), progress=False)


def test_one_slip_is_no_other_layout():
    right = [((100.0, 80.0, 160.0, 120.0), SIZE)] * 20
    assert likelier_layout([*right, ((160.0, 80.0, 100.0, 120.0), SIZE)], CORNERS) is None


def test_a_box_drawn_on_a_picture_of_another_shape(tmp_path):
    clinic(tmp_path)
    lines = table(tmp_path, (0.3, 0.3, 0.6, 0.7)).read_text().splitlines()
    for size, fits in (("320,240", True), ("1280,960", True), ("240,320", False)):
        wide = [lines[0] + ",photo_w,photo_h", *(f"{line},{size}" for line in lines[1:])]
        (tmp_path / "b.csv").write_text("\n".join(wide))
        asked = request(tmp_path, boxes=tmp_path / "b.csv", box_units="fraction")
        if fits:
            assert len(make_plan(asked, progress=False).crops) == 9
        else:
            with pytest.raises(BuilderError, match="drawn on 240 x 320 px"):
                make_plan(asked, progress=False)


# -- COCO -------------------------------------------------------------------------------------------------------------


def coco(root: Path, change=lambda data: None) -> Path:
    """Each photograph with an ulcer and a ruler, and a crowd over all of it."""
    images, annotations = [], []
    for place, name in enumerate(f"{code}/{code}{n}.png" for code in "IPR" for n in range(3)):
        images.append({"id": place, "file_name": name, "width": 320, "height": 240, "patient_id": name})
        annotations += [
            {"id": 3 * place, "image_id": place, "category_id": 1, "iscrowd": 0, "bbox": [96, 72, 96, 96]},
            {"id": 3 * place + 1, "image_id": place, "category_id": 2, "bbox": [5, 5, 100, 12]},
            {
                "id": 3 * place + 2, "image_id": place, "category_id": 1, "iscrowd": 1, "bbox": [0, 0, 320, 240],
                "segmentation": {"counts": [1], "size": [240, 320]},
            },
        ]  # fmt: skip
    data = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": 1, "name": "ulcer"}, {"id": 2, "name": "ruler"}],
    }
    change(data)
    (root / "c.json").write_text(json.dumps(data))
    return root / "c.json"


def test_a_ruler_and_a_crowd_are_no_wounds(tmp_path):
    clinic(tmp_path)
    path = coco(tmp_path)
    with pytest.raises(BuilderError, match=r"several categories.*'ulcer' \(9 boxes\), 'ruler' \(9 boxes\)") as error:
        make_plan(request(tmp_path, boxes=path), progress=False)
    assert "--category" in error.value.remedy
    plan = make_plan(request(tmp_path, boxes=path, categories=("Ulcer",)), progress=False)
    assert edges_of(plan) == {BOX}
    assert plan.skipped["annotations of crowds (iscrowd), left out"] == 9
    assert plan.skipped["annotations of the category 'ruler', left out"] == 9
    assert plan.patients["I/I0.png"]
    with pytest.raises(BuilderError, match="no box has the category 'tape'"):
        make_plan(request(tmp_path, boxes=path, categories=("ulcer", "tape")), progress=False)


def only_ulcers(data: dict) -> None:
    data["annotations"] = data["annotations"][::3]


def as_text(data: dict) -> None:
    """Ids as texts and as floats, boxes as texts and floats, as some tools write them."""
    only_ulcers(data)
    for image in data["images"]:
        image["id"] = f"{image['id']}"
    for annotation in data["annotations"]:
        annotation |= {"image_id": float(annotation["image_id"]), "category_id": "1", "bbox": ["96", 72.0, 96.0, "96"]}


def as_polygons(data: dict) -> None:
    only_ulcers(data)
    for annotation in data["annotations"]:
        del annotation["bbox"]
        annotation["segmentation"] = [[96, 72, 192, 72, 192, 168], [100, 100, 110, 168, 120, 100]]


def with_encoded_masks(data: dict) -> None:
    only_ulcers(data)
    for annotation in data["annotations"]:
        annotation["segmentation"] = {"counts": "PYg02", "size": [240, 320]}


def with_patients_inside(data: dict) -> None:
    only_ulcers(data)
    for image in data["images"]:
        image["attributes"] = {"Subject ID": image.pop("patient_id")}


def with_unused_categories(data: dict) -> None:
    only_ulcers(data)
    data["categories"] += [{"id": 0, "name": "wounds", "supercategory": "none"}, {"id": 9, "name": "ruler"}]


@pytest.mark.parametrize(
    "change", [only_ulcers, as_text, as_polygons, with_encoded_masks, with_patients_inside, with_unused_categories]
)
def test_coco_as_tools_write_it(tmp_path, change):
    clinic(tmp_path)
    plan = make_plan(request(tmp_path, boxes=coco(tmp_path, change)), progress=False)
    assert edges_of(plan) == {BOX}
    assert len(plan.crops) == 9


def twice(data: dict) -> None:
    data["images"][1]["id"] = 0
    data["annotations"] = data["annotations"][:1]


def no_box(data: dict) -> None:
    data["annotations"] = [{"image_id": 0, "category_id": 1, "segmentation": {"counts": "x"}}]


def strange_patient(data: dict) -> None:
    only_ulcers(data)
    for image in data["images"]:
        image["Patient code 2"] = image.pop("patient_id")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (twice, r"image id 0 stands for I/I0.png and I/I1.png"),
        (no_box, "annotation 0 has the bbox None"),
        (strange_patient, "'Patient code 2' looks like the patient's"),
        (
            lambda data: data["annotations"].append({"image_id": 99, "bbox": [1, 2, 30, 40], "category_id": 1}),
            "image 99",
        ),
        (lambda data: data["annotations"].append(7), "annotations is no list"),
        (lambda data: data["images"].append({"id": [1]}), "images is no list"),
        (lambda data: data.update(images={"0": 1}), "images is no list"),
        (lambda data: data["annotations"].append({"image_id": 1, "bbox": [1, 2, 1e999, 40]}), "a box of 1, 2, inf, 40"),
    ],
)
def test_faulty_coco(tmp_path, change, message):
    clinic(tmp_path)
    with pytest.raises(BuilderError, match=message):
        make_plan(request(tmp_path, boxes=coco(tmp_path, change)), progress=False)


def test_coco_that_is_nested_too_deeply(tmp_path):
    clinic(tmp_path)
    (tmp_path / "c.json").write_text("[" * 100_000)
    with pytest.raises(BuilderError, match=r"c.json is not valid JSON"):
        make_plan(request(tmp_path, boxes=tmp_path / "c.json"), progress=False)


# -- masks ------------------------------------------------------------------------------------------------------------


def disc() -> np.ndarray:
    y, x = np.mgrid[:240, :320]
    return ((x - 143.5) / 48) ** 2 + ((y - 119.5) / 48) ** 2 <= 1


def frame(value: int) -> np.ndarray:
    void = disc().astype(np.uint8) * value
    void[:6] = void[-6:] = void[:, :6] = void[:, -6:] = 255
    return void


def palette(mask: np.ndarray) -> Image.Image:
    """As Pascal VOC: 0 black, 1 dark red, 255 (void) light."""
    image = Image.fromarray(mask, "P")
    image.putpalette([0, 0, 0, 128, 0, 0] + [0] * 759 + [224, 224, 192])
    return image


def cut_out(mask: np.ndarray, colours: Image.Image) -> Image.Image:
    colours = colours.convert("RGB")
    colours.putalpha(Image.fromarray(mask.astype(np.uint8) * 255))
    return colours


def grey(mask: np.ndarray, value: int = 255) -> Image.Image:
    return Image.fromarray(mask.astype(np.uint8) * value)


def coloured(mask: np.ndarray, colour: tuple[int, int, int]) -> Image.Image:
    return Image.fromarray(mask[..., None].astype(np.uint8) * np.array(colour, np.uint8))


def photo() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(60, 230, (24, 32, 3), dtype=np.uint8)).resize(SIZE)


WHITE = Image.new("RGB", SIZE, (255, 255, 255))
READ_RIGHTLY = {
    "white on black.png": (lambda: grey(disc()), {}),
    "one.png": (lambda: grey(disc(), 1), {}),
    "16 bits.png": (lambda: Image.fromarray(disc().astype(np.uint16)), {}),
    "one bit.png": (lambda: grey(disc()).convert("1"), {}),
    "red.png": (lambda: coloured(disc(), (255, 0, 0)), {}),
    "dark red.png": (lambda: coloured(disc(), (0, 0, 9)), {}),
    "alpha.png": (lambda: cut_out(disc(), WHITE), {}),
    "cut out.png": (lambda: cut_out(disc(), photo()), {}),
    "cut out.webp": (lambda: cut_out(disc(), photo()), {"quality": 80}),
    "void 80.png": (lambda: Image.fromarray(frame(80)), {}),
    "void 1.png": (lambda: Image.fromarray(frame(1)), {}),
    "void palette.png": (lambda: palette(frame(1)), {}),
    "void colour.png": (lambda: palette(frame(1)).convert("RGB"), {}),
    "lossy.jpg": (lambda: grey(disc()), {"quality": 60}),
    "lossy.webp": (lambda: grey(disc()), {"quality": 60}),
    "lossless.webp": (lambda: grey(disc(), 7).convert("RGB"), {"lossless": True, "exact": True}),
    "JPEG by content.png": (lambda: grey(disc()), {"format": "JPEG", "quality": 60}),
    "lossy red.jpg": (lambda: coloured(disc(), (200, 0, 0)), {"quality": 75}),
    "soft.png": (lambda: grey(disc()).resize((160, 120)).resize(SIZE), {}),
    "grey.tif": (lambda: grey(disc(), 100), {}),
}
REFUSED = {
    "inverted.png": (lambda: grey(~disc()), {}, "looks inverted"),
    "inverted.jpg": (lambda: grey(~disc()), {"quality": 80}, "looks inverted"),
    "inverted alpha.png": (lambda: cut_out(~disc(), photo()), {}, "looks inverted"),
    "void as wound.png": (lambda: Image.fromarray(frame(255)), {}, "frame"),
    "all.png": (lambda: grey(np.ones((240, 320), bool)), {}, "whole photograph is wound"),
    "nearly all.png": (lambda: grey(np.pad(np.ones((236, 316), bool), 2)), {}, "edge to edge"),
    "strip.png": (lambda: grey(np.arange(240)[:, None].repeat(320, 1) < 6), {}, "thin part along a whole side"),
    "photograph.png": (photo, {}, "many shades"),
    "photograph.jpg": (photo, {"quality": 90}, "many shades"),
    "grey photograph.png": (lambda: photo().convert("L"), {}, "many shades"),
    "labels as.jpg": (lambda: grey(disc(), 2), {}, "reach only from 0 to"),
    "two masks.png": (lambda: cut_out(disc(), grey(np.arange(320)[None].repeat(240, 0) < 140)), {}, "in its colours"),
    "no picture.png": (None, {}, "cannot be read"),
}  # fmt: skip


def written(folder: Path, name: str, make, save: dict) -> Path:
    folder.mkdir(exist_ok=True)
    if make is None:
        (folder / name).write_bytes(b"no picture")
    else:
        make().save(folder / name, **save)
    return folder / name


@pytest.mark.parametrize("name", READ_RIGHTLY)
def test_the_wound_of_a_mask_of_any_kind_is_found(tmp_path, name):
    found = components_of(written(tmp_path, name, *READ_RIGHTLY[name]))
    assert found.extent == SIZE
    (box,) = found.boxes
    assert np.abs(np.array(box) - BOX).max() <= 2


@pytest.mark.parametrize("name", REFUSED)
def test_a_mask_that_cannot_be_is_refused(tmp_path, name):
    make, save, message = REFUSED[name]
    with pytest.raises(BuilderError, match=message) as error:
        components_of(written(tmp_path, name, make, save))
    assert error.value.remedy


def test_inverted_masks_are_read_when_that_is_said(tmp_path):
    path = written(tmp_path, "a.png", lambda: grey(~disc()), {})
    assert components_of(path, inverted=True).boxes == [tuple(map(float, BOX))]
    with pytest.raises(BuilderError, match="with --inverted-masks"):
        components_of(written(tmp_path, "b.png", lambda: grey(disc()), {}), inverted=True)


def test_masks_are_matched_by_name_and_all_mistakes_are_said(tmp_path):
    for name in "abcd":
        picture(tmp_path / "photos" / f"{name}.png", ord(name))
    masks = tmp_path / "masks"
    for name in ("a_mask.png", "b.png", "b_mask.png", "c.png", "d.png"):
        written(masks, name, lambda: grey(~disc() if name == "c.png" else disc()), {})  # noqa: B023
    grey(np.zeros((240, 320), bool)).save(masks / "d.png")
    (masks / "notes.txt").touch()
    with pytest.raises(BuilderError, match=r"3 mistakes") as error:
        make_plan(request(tmp_path, boxes=masks, classes=ULCER, group_by="photograph"), progress=False)
    for part in ("b.png and b_mask.png", "c.png looks inverted", "d.png has no box; its mask marks no wound"):
        assert part in str(error.value)
    (masks / "b_mask.png").unlink()
    grey(disc()).save(masks / "c.png")
    asked = request(tmp_path, boxes=masks, classes=ULCER, group_by="photograph", without_box="skip")
    plan = make_plan(asked, progress=False)
    assert sorted(plan.crops) == ["a.png", "b.png", "c.png"]
    assert plan.skipped["files that are no masks by their name, passed over"] == 1


# -- copies, counts and what is said ----------------------------------------------------------------------------------


def test_identical_rows_are_taken_once(tmp_path):
    clinic(tmp_path)
    path = table(tmp_path)
    path.write_text(path.read_text() + "\nI0.png,96,72,192,168,I0\nP/P1.png,96.0,72,192,168,P1")
    plan = make_plan(request(tmp_path, boxes=path), progress=False)
    assert sum(map(len, plan.crops.values())) == 9
    assert plan.skipped["identical boxes, taken once"] == 2
    assert any("I/I0.png, P/P1.png" in detail for detail in plan.details)


def test_a_box_as_large_as_the_photograph_is_counted(tmp_path):
    clinic(tmp_path)
    plan = make_plan(request(tmp_path, boxes=table(tmp_path, (0, 1, 320, 240))), progress=False)
    assert plan.skipped["boxes that cover their whole photograph, taken"] == 9


def test_a_torn_table_is_said_once(tmp_path):
    clinic(tmp_path)
    path = table(tmp_path)
    path.write_text(path.read_text().replace("I1.png", '"I1.png'))
    with pytest.raises(BuilderError, match="line 3: ") as error:
        make_plan(request(tmp_path, boxes=path), progress=False)
    assert "has no box" not in str(error.value)


def test_one_box_with_two_labels_is_refused(tmp_path):
    clinic(tmp_path)
    rows = ["I0.png,96,72,192,168,I,1", "I0.png,96,72,192,168,P,1", "R0.png,96,72,192,168,R,1"]
    (tmp_path / "b.csv").write_text("\n".join(["file,xmin,ymin,xmax,ymax,phase,patient", *rows]))
    with pytest.raises(BuilderError, match=r"I0.png has the labels I and P for one box"):
        make_plan(request(tmp_path, boxes=tmp_path / "b.csv", without_box="skip"), progress=False)


def copied(root: Path, *pairs: tuple[str, str]) -> None:
    for source, copy in pairs:
        (root / "photos" / copy).write_bytes((root / "photos" / source).read_bytes())


def test_a_photograph_under_two_names_never_stands_in_two_splits(tmp_path):
    clinic(tmp_path, 5)
    pairs = [(f"{code}/{code}{n}.png", f"{code}/copy of {code}{n}.png") for code in "IPR" for n in range(5)]
    copied(tmp_path, *pairs)
    asked = request(tmp_path, without_box="whole", group_by="photograph", freeze_size=64)
    plan = make_plan(asked, progress=False)
    for source, copy in pairs:
        assert plan.patients[source] == plan.patients[copy]
    summary = pack(asked, Dataset("real", Storage(tmp_path / "out")), progress=False)
    assert summary.skipped["photographs that are another one's copy (equal bytes), kept in its split"] == 15
    assert "I/I0.png = I/copy of I0.png" in str(summary)
    assert "copy of" not in json.dumps(Dataset("real", Storage(tmp_path / "out")).info)  # names stay on the screen
    rows = Dataset("real", Storage(tmp_path / "out")).table().to_pylist()
    split_of: dict[bytes, set[str]] = {}
    for row in rows:
        split_of.setdefault(row["sha256"], set()).add(row["split"])
    assert len(split_of) == 15
    assert all(len(splits) == 1 for splits in split_of.values())


@pytest.mark.parametrize("group_by", [None, r"^(copy of .|.)"])
def test_one_photograph_of_two_patients_is_refused(tmp_path, group_by):
    clinic(tmp_path)
    copied(tmp_path, ("I/I0.png", "I/copy of I0.png"))
    path = table(tmp_path, header="xmin,ymin,xmax,ymax")
    path.write_text(path.read_text() + "\ncopy of I0.png,96,72,192,168,another")
    if group_by:
        path.write_text("\n".join(line.rpartition(",")[0] for line in path.read_text().splitlines()))
    with pytest.raises(BuilderError, match=r"are the same photograph .* of several patients"):
        make_plan(request(tmp_path, boxes=path, group_by=group_by), progress=False)


def test_the_known_patient_of_a_copy_stands_for_both(tmp_path):
    clinic(tmp_path)
    copied(tmp_path, ("I/I0.png", "I/another.png"))
    path = table(tmp_path)
    path.write_text(path.read_text() + "\nanother.png,96,72,192,168,")
    plan = make_plan(request(tmp_path, boxes=path, group_by="photograph"), progress=False)
    assert plan.patients["I/another.png"] == plan.patients["I/I0.png"]


def test_one_photograph_in_two_phase_folders_is_refused(tmp_path):
    clinic(tmp_path)
    copied(tmp_path, ("I/I0.png", "P/again.png"))
    with pytest.raises(BuilderError, match=r"again.png, the same file as I/I0.png, has the labels I and P"):
        make_plan(request(tmp_path, without_box="whole", group_by="photograph"), progress=False)


def test_all_mistakes_of_an_input_are_said_in_one_run(tmp_path):
    clinic(tmp_path)
    (tmp_path / "photos/I/torn.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    lines = table(tmp_path).read_text().splitlines()
    lines[1] = lines[1].replace("192", "900")
    lines[2] = lines[2].replace("96,72", "five,72")
    lines[3] = lines[3].rpartition(",")[0] + ","
    lines.append("gone.png,1,2,30,40,1")
    (tmp_path / "b.csv").write_text("\n".join(lines))
    (tmp_path / "l.csv").write_text("file,phase\nI0.png,Q\nI1.png,I\nP0.png,P\n")
    with pytest.raises(BuilderError) as error:
        make_plan(request(tmp_path, boxes=tmp_path / "b.csv", labels=tmp_path / "l.csv"), progress=False)
    for part in (
        "torn.png cannot be read", "b.csv line 2: the box", "b.csv line 3: a box of 'five'", "b.csv line 11: gone.png",
        "l.csv line 2: label 'Q'", "no label for", "I2.png",
    ):  # fmt: skip
        assert part in str(error.value), part


def test_all_photographs_that_are_cut_short_are_said_in_one_run(tmp_path):
    """Their headers are sound, so that is found only when their pixels are decoded."""
    clinic(tmp_path)
    for name in ("I/I0", "P/P1", "R/R2"):
        path = tmp_path / "photos" / f"{name}.png"
        Image.open(path).save(tmp_path / "photos" / f"{name}.jpg")
        path.unlink()
        path = path.with_suffix(".jpg")
        path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(BuilderError, match="3 mistakes") as error:
        pack(
            request(tmp_path, without_box="whole", group_by="photograph", freeze_size=16),
            Dataset("real", Storage(tmp_path / "out")),
            progress=False,
        )
    assert all(f"{name}.jpg cannot be read" in str(error.value) for name in ("I0", "P1", "R2"))
    assert not Dataset("real", Storage(tmp_path / "out")).exists()


def test_a_filled_patient_column_is_asked_for_where_there_is_one(tmp_path):
    clinic(tmp_path)
    path = table(tmp_path)
    path.write_text(path.read_text().replace(",I0\n", ",\n"))
    with pytest.raises(BuilderError, match=r"patient of .*I0.png is unknown: no row of it names one") as error:
        make_plan(request(tmp_path, boxes=path), progress=False)
    assert "photograph," not in error.value.remedy


def test_chosen_columns_must_be_there(tmp_path):
    clinic(tmp_path)
    with pytest.raises(BuilderError, match="no table has a column 'Case'"):
        make_plan(request(tmp_path, boxes=table(tmp_path), columns={"patient": "Case"}), progress=False)
    with pytest.raises(BuilderError, match="no role 'pation'"):
        make_plan(request(tmp_path, boxes=table(tmp_path), columns={"pation": "patient"}), progress=False)


@pytest.mark.parametrize(("size", "small"), [(256, 9), (250, 0), (None, 0)])
def test_crops_under_half_of_the_models_size_are_counted(tmp_path, size, small):
    """The crops are 125 px: a box of 96 px and its margins. Frozen ones count by what they were."""
    clinic(tmp_path)
    asked = request(tmp_path, boxes=table(tmp_path), model_size=size, freeze_size=16)
    summary = pack(asked, Dataset("real", Storage(tmp_path / "out")), progress=False)
    said = f"{small} of 9 crops are smaller than half of the model's {size} px"
    assert (said in str(summary)) == (small > 0)
    assert ("smaller than half" in str(summary)) == (small > 0)


@pytest.mark.parametrize("option", ["photographs", "--boxes", "--labels"])
def test_a_name_of_300_characters_gets_a_message(builder, tmp_path, option):
    clinic(tmp_path)
    table(tmp_path)
    words = {"photographs": "photos", "--boxes": "b.csv", "--labels": "b.csv", option: "n" * 300}
    result = builder(
        "pack", words["photographs"], "--boxes", words["--boxes"], "--labels", words["--labels"], "--name", "x",
    )  # fmt: skip
    assert result.code == 2
    assert "nnn" in result.output
    assert "Traceback" not in result.output


def test_options_of_the_command(builder, tmp_path):
    clinic(tmp_path)
    path = table(tmp_path, (30, 30, 60, 70))
    path.write_text(path.read_text().replace("patient", "Code of the patient"))
    words = ["pack", "photos", "--boxes", path.name, "--name", "x"]
    refused = builder(*words)
    assert refused.code == 2
    assert "--box-units percent" in refused.output
    assert "--column patient='Code of the patient'" in refused.output
    packed = builder(*words, "--box-units", "percent", "--column", "patient=Code of the patient")
    assert packed.code == 0
    assert "x: 9 crops from 9 photographs" in packed.output
    assert builder(*words, "--column", "patient").code == 2


def test_a_photograph_whose_name_is_not_utf8_is_packed(builder, tmp_path):
    clinic(tmp_path)
    folder = os.fsencode(tmp_path / "photos" / "I")
    os.rename(folder + b"/I0.png", folder + b"/Fu\xdf.png")
    table(tmp_path).write_text((tmp_path / "b.csv").read_text().replace("I0.png", "Fuß.png"))
    result = builder("pack", "photos", "--boxes", "b.csv", "--name", "x")
    assert result.code == 0, result.output
    assert "x: 9 crops from 9 photographs" in result.output


def test_phases_come_from_the_classes(tmp_path):
    """A COCO file whose categories are classes and others asks which are wounds."""
    clinic(tmp_path)

    def with_phases(data):
        data["categories"] = [{"id": 1, "name": "inflammatory"}, {"id": 2, "name": "ruler"}]

    source = coco(tmp_path, with_phases)
    with pytest.raises(BuilderError, match="some categories are classes and some are none"):
        read_boxes(source, Photographs(tmp_path / "photos"), lambda name: name == "inflammatory")
    assert HEALING_PHASES.codes == ("I", "P", "R")

"""Tables as people's spreadsheets and tools write them, read from real files; what cannot be read has its message."""

import csv
import io
import unicodedata
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from builder.crops.boxes import read_boxes
from builder.crops.columns import looks_like_patient, plain
from builder.crops.labels import Codes, read_labels
from builder.crops.listing import list_images
from builder.crops.numbers import number, require_no_groups
from builder.crops.photographs import Photographs
from builder.crops.problems import Problems
from builder.crops.tables import read_column, read_table
from builder.errors import BuilderError
from builder.phases import HEALING_PHASES

HEADER = ["file", "xmin", "ymin", "xmax", "ymax", "phase", "patient"]
ROWS = [["a.png", "10", "12.5", "30", "40", "I", "7"], ["Fuß.png", "5", "6", "25", "26.25", "P", "8"]]


@pytest.fixture
def photographs(tmp_path: Path) -> Photographs:
    (tmp_path / "p").mkdir()
    for name in ("a.png", "Fuß.png"):
        Image.new("RGB", (60, 50)).save(tmp_path / "p" / name)
    return Photographs(tmp_path / "p")


def as_csv(rows, separator=",", end="\n", quoting=csv.QUOTE_MINIMAL) -> str:
    text = io.StringIO()
    csv.writer(text, delimiter=separator, lineterminator=end, quoting=quoting).writerows(rows)
    return text.getvalue()


def with_commas(rows):
    return [[cell.replace(".", ",") if cell[:1].isdigit() else cell for cell in row] for row in rows]


def said(source):
    return [(box.photograph, *box.edges, box.label, box.patient) for box in source.boxes]


EXPECTED = [("a.png", 10, 12.5, 30, 40, "I", "7"), ("Fuß.png", 5, 6, 25, 26.25, "P", "8")]
PLAIN = as_csv([HEADER, *ROWS])
SEMICOLON = as_csv([HEADER, *with_commas(ROWS)], ";")
DIALECTS = {
    "comma": PLAIN.encode(),
    "BOM": PLAIN.encode("utf-8-sig"),
    "Windows line ends": as_csv([HEADER, *ROWS], end="\r\n").encode(),
    "Mac line ends": as_csv([HEADER, *ROWS], end="\r").encode(),
    "all quoted": as_csv([HEADER, *ROWS], quoting=csv.QUOTE_ALL).encode(),
    "tab": as_csv([HEADER, *ROWS], "\t").encode(),
    "bar": as_csv([HEADER, *ROWS], "|").encode(),
    "decimal commas": SEMICOLON.encode(),
    "decimal commas, quoted": as_csv([HEADER, *with_commas(ROWS)]).encode(),
    "Excel's sep=": ("sep=;\r\n" + SEMICOLON).encode(),
    "Excel's sep=, quoted": ('"sep=;"\n' + SEMICOLON).encode(),
    "cp1252": SEMICOLON.encode("cp1252"),
    "UTF-16": as_csv([HEADER, *ROWS], "\t").encode("utf-16"),
    "UTF-16 big endian": ("\ufeff" + PLAIN).encode("utf-16-be"),
    "UTF-16 without a mark": PLAIN.encode("utf-16-le"),
    "UTF-16 big endian without a mark": PLAIN.encode("utf-16-be"),
    "UTF-32": PLAIN.encode("utf-32"),
    "empty columns and rows": as_csv(
        [[*HEADER, "", ""], *([*row, "", ""] for row in ROWS), [""] * 12, []], ";"
    ).encode(),
    "titles above": ("Boxes of the clinic;;;\n\n" + SEMICOLON).encode(),
    "quoted newlines": as_csv([[*HEADER, "remark"], *([*row, 'two\nlines, "so"'] for row in ROWS)]).encode(),
    "a row without a box": (PLAIN + "a.png,,,,,I,7\n").encode(),
}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_csv_of_any_dialect_is_read_alike(tmp_path, photographs, dialect):
    (tmp_path / "b.csv").write_bytes(DIALECTS[dialect])
    source = read_boxes(tmp_path / "b.csv", photographs)
    assert said(source) == EXPECTED
    assert source.missing == []
    assert any("it was read as cp" in note for note in source.notes) == dialect.startswith("cp")


TEXT = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs", "Zl", "Zp")), max_size=12)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(st.tuples(st.floats(0, 4000, allow_subnormal=False).map(lambda x: round(x, 4)), TEXT), max_size=5),
    separator=st.sampled_from(",;\t|"),
    end=st.sampled_from(["\n", "\r\n", "\r"]),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"]),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
    comma=st.booleans(),
)
def test_what_is_written_is_read_again(tmp_path, photographs, rows, separator, end, encoding, quoting, comma):
    """Round trip: numbers and text in any separator, encoding and line end."""
    written = [[f"{x:.4f}".replace(".", ",") if comma else f"{x:.4f}", remark] for x, remark in rows]
    table = [["file", "xmin", "ymin", "xmax", "ymax", "remark"], *(["a", x, x, x, x, text] for x, text in written)]
    path = tmp_path / "round.csv"
    path.write_bytes(as_csv(table, separator, end, quoting).encode(encoding))
    source = read_boxes(path, photographs)
    assert [box.edges for box in source.boxes] == [(x,) * 4 for x, _ in rows]
    problems = Problems()
    read = [cells["remark"] for _, cells in read_table(path).rows({"remark": 5}, problems)]
    assert read == [text.strip() for _, text in rows]
    assert not problems


@pytest.mark.parametrize(
    "header",
    [
        ["Filename", "X min", "Y min", "X max", "Y max", "Phase", "Patient#"],
        ["image", "left", "top", "right", "bottom", "class", "Patient ID"],
        ["Image Name", "x1", "y1", "x2", "y2", "wound_type", "subject"],
        ["photo", "x0", "y0", "x1", "y1", "label", "patient_id"],
        ["img", "bbox_xmin", "bbox_ymin", "bbox_xmax", "bbox_ymax", "category", "MRN"],
        ["Dateiname", "links", "oben", "rechts", "unten", "Wundtyp", "Patienten-Nr."],
        ["Nom du fichier", "gauche", "haut", "droite", "bas", "étiquette", "N° patient"],
        ["Nombre de archivo", "izquierda", "arriba", "derecha", "abajo", "clase", "Paciente"],
        ["path", "minX", "minY", "maxX", "maxY", "Type", "Participant code"],
    ],
)
def test_columns_of_many_names(tmp_path, photographs, header):
    (tmp_path / "b.csv").write_text(as_csv([header, *ROWS]), encoding="utf-8")
    assert said(read_boxes(tmp_path / "b.csv", photographs)) == EXPECTED
    labels = [[row[0], row[5], row[6]] for row in ROWS]
    (tmp_path / "l.csv").write_text(as_csv([[header[0], *header[5:]], *labels]), encoding="utf-8")
    read = read_labels(tmp_path / "l.csv", photographs, Codes(HEALING_PHASES))
    assert read.codes == {("a.png", ""): "I", ("Fuß.png", ""): "P"}
    assert read.patients == {"a.png": "7", "Fuß.png": "8"}


@pytest.mark.parametrize(
    ("header", "values"),
    [
        ("x,y,width,height", "10,12,20,28"),
        ("left,top,w,h", "10,12,20,28"),
        ("bbox_x,bbox_y,bbox_width,bbox_height", "10,12,20,28"),
        ("x1,y1,w,h", "10,12,20,28"),
        ("x_center,y_center,width,height", "20,26,20,28"),
        ("xmin,ymin,xmax,ymax,width,height", "10,12,30,40,60,50"),  # width and height of the photograph
    ],
)
def test_layouts_of_a_box(tmp_path, photographs, header, values):
    (tmp_path / "b.csv").write_text(f"file,{header}\na.png,{values}\n")
    assert read_boxes(tmp_path / "b.csv", photographs).boxes[0].edges == (10, 12, 30, 40)


@pytest.mark.parametrize("name", ["Patient code (study)", "anonPatientKey", "patient uuid", "Proband Code"])
def test_a_column_that_looks_like_a_patients_is_never_passed_over(tmp_path, photographs, name):
    (tmp_path / "b.csv").write_text(as_csv([[*HEADER[:-1], name], *ROWS]), encoding="utf-8")
    with pytest.raises(BuilderError, match="looks like the patient's column") as error:
        read_boxes(tmp_path / "b.csv", photographs)
    assert f"--column patient='{name}'" in error.value.remedy
    assert "--group-by" not in str(error.value)
    chosen = read_boxes(tmp_path / "b.csv", photographs, chosen={"patient": name})
    assert said(chosen) == EXPECTED
    none = read_boxes(tmp_path / "b.csv", photographs, chosen={"patient": "none"})
    assert {box.patient for box in none.boxes} == {""}


@pytest.mark.parametrize("name", ["Patient age", "patient_sex", "Alter des Patienten", "remark", "DFU#", "Appt#"])
def test_a_patients_attribute_is_no_patient(name):
    assert not looks_like_patient(name)


@pytest.mark.parametrize(
    ("extra", "role"), [("Patient ID", "the patient"), ("wound_type", "the label"), ("image", "the file name")]
)
def test_two_columns_for_one_role_are_named(tmp_path, photographs, extra, role):
    (tmp_path / "b.csv").write_text(as_csv([[*HEADER, extra], *([*row, "x"] for row in ROWS)]), encoding="utf-8")
    with pytest.raises(BuilderError, match=f"several columns for {role}: .*'{extra}'") as error:
        read_boxes(tmp_path / "b.csv", photographs)
    assert "--column" in error.value.remedy


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"PK\x03\x04\x14\x00", "an Excel or LibreOffice workbook"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1", "an old Excel workbook"),
        (b"file,xmin\n\0\0\1,2", "zero bytes"),
        (b"", "is empty"),
        (b"\n \n", "is empty"),
        (b"name;value\na.png;1\n", "no column 'filename'"),
        (b'file,xmin,ymin,xmax,ymax\n"a.png,1,2,30,40\n', "line 2: unexpected end"),
        (b'file,xmin,ymin,xmax,ymax\n"a.png,1,2,30,40\na.png,1,2,30,40\n"a.png",1,2,30,40\n', "line 2"),
        (b"file,xmin,ymin,xmax,ymax\na.png,1,2,30,40,50\n", "line 2 has 6 cells, the header 5"),
        (b'file,xmin,ymin,xmax,ymax\n"a\nb.png",1,2,30,40\n', "line 2: the cell of 'file' goes on"),
        (b"file;xmin;ymin;xmax;ymax\na.png;1.204,5;2;30;40\n", "thousand separators: '1.204,5'"),
        (b"file;xmin;ymin;xmax;ymax\na.png;1'204;2;30;40\n", "thousand separators"),
        (b"file;xmin;ymin;xmax;ymax\na.png;1 204;2;30;40\n", "thousand separators"),
        (b"file;xmin;ymin;xmax;ymax\na.png;204;2;1,230;40\n", "thousand separators or decimal commas"),
        (b"file;xmin;ymin;xmax;ymax\na.png;204;2;1.230;40\n", "the point seems to separate thousands"),
    ],
)
def test_what_is_no_table_of_boxes_is_said(tmp_path, photographs, content, message):
    (tmp_path / "b.csv").write_bytes(content)
    with pytest.raises(BuilderError, match=message):
        read_boxes(tmp_path / "b.csv", photographs)


def test_all_mistakes_of_a_table_are_said_together(tmp_path, photographs):
    rows = [["a.png", "1", "2", "x", "4", "I", "7"], ["a.png", "1", "2", "y", "4", "I", "7"], [*ROWS[0], "more"]]
    (tmp_path / "b.csv").write_text(as_csv([HEADER, *rows]), encoding="utf-8")
    with pytest.raises(BuilderError) as error:
        read_boxes(tmp_path / "b.csv", photographs)
    for part in ("3 mistakes", "line 2: a box of '1', '2', 'x', '4'", "line 3: a box of", "line 4 has 8 cells"):
        assert part in str(error.value)
    assert str(error.value).count("must be numbers") == 1  # a remedy once for all of its kind
    many = as_csv([HEADER, *([["a.png", "1", "2", "x", str(n), "I", "7"] for n in range(400)])])
    (tmp_path / "b.csv").write_text(many, encoding="utf-8")
    with pytest.raises(BuilderError, match=r"400 mistakes") as error:
        read_boxes(tmp_path / "b.csv", photographs)
    assert "and 395 more of this kind" in str(error.value)
    assert len(str(error.value)) < 1500


@pytest.mark.parametrize(
    ("text", "value"),
    [("12", 12), ("-1.5", -1.5), ("12,5", 12.5), (",5", 0.5), ("1e2", 100), ("+7", 7), ("0,123", 0.123)],
)
def test_numbers(text, value):
    assert number(text) == value


@pytest.mark.parametrize("text", ["", "five", "nan", "inf", "1_000", "1,2,3", "0x10", "1e999", "\u0663"])
def test_no_numbers(text):
    assert number(text) != number(text)


@pytest.mark.parametrize(
    "cells",
    [
        ["12,5", "1,234"],
        ["115,234", "80,125", "201,875", "160,500"],
        ["1,234", "1,5"],
        ["0,312", "0,456"],
        ["12.345", "99.5"],
        ["1.250", "1024", "300"],
        ["12", "800"],
    ],
)
def test_decimals_are_no_thousands(cells):
    require_no_groups(cells, "t.csv")


def test_one_column_is_read_for_other_rooms(tmp_path):
    (tmp_path / "t.csv").write_bytes("Patient ID;remark\n007;x\n\n8;y\n".encode("utf-16"))
    assert read_column(tmp_path / "t.csv", "patient") == ["007", "8"]
    (tmp_path / "t.csv").write_text("name\nx\n")
    with pytest.raises(BuilderError, match="no column 'patient'"):
        read_column(tmp_path / "t.csv", "patient")


def test_names_are_compared_without_marks():
    assert {plain(name) for name in ("Patient#", "PATIENT", " patient ", "Pa\u0301tient")} == {"patient"}


# -- which photograph is meant, and what lies beside the photographs -------------------------------------------------


def touched(root: Path, *names: str) -> Photographs:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return Photographs(root)


def test_exact_names_come_first_then_composed_then_any_case(tmp_path):
    decomposed = unicodedata.normalize("NFD", "Größe.jpg")
    found = touched(tmp_path, "i0.JPG", "I0.jpg", decomposed, "B.png", "b.jpg")
    pairs = {
        "i0.JPG": "i0.JPG",
        "I0.jpg": "I0.jpg",
        "Größe.jpg": decomposed,
        "GRÖSSE.JPG": decomposed,
        "b.PNG": "B.png",
    }
    assert {reference: found.find(reference, "here") for reference in pairs} == pairs
    assert found.find("Größe", "here") == decomposed
    assert found.find("./i0.JPG", "here") == "i0.JPG"
    for unclear in ("I0.JPG", "i0.jpg", "c/i0.jPg"):
        with pytest.raises(BuilderError, match=r"several photographs: I0.jpg, i0.JPG"):
            found.find(unclear, "here")
    assert found.find("n" * 300 + ".jpg", "here") is None


def test_a_name_that_is_not_utf8_is_found_by_what_it_was(tmp_path):
    name = b"Fu\xdf.jpg".decode("utf-8", "surrogateescape")
    found = touched(tmp_path, name, "Fuchs.jpg")
    for reference in ("Fuß.jpg", "fuß", name):
        assert found.find(reference, "here") == name


def test_what_is_passed_over_is_counted(tmp_path):
    root, other = tmp_path / "p", tmp_path / "other"
    found = touched(
        root, "I/a.jpg", "I/b.JFIF", "I/c.xyz", "note.txt", "I/._a.jpg", "I/.ipynb_checkpoints/a-checkpoint.jpg",
        "@eaDir/a.jpg", "__MACOSX/a.jpg", ".thumbnails/a.jpg",
    )  # fmt: skip
    assert found.names == ["I/a.jpg", "I/b.JFIF"]
    assert found.listing.unread == {".xyz": 1, ".txt": 1}
    assert sorted(found.listing.hidden) == [
        ".thumbnails", "@eaDir", "I/._a.jpg", "I/.ipynb_checkpoints", "__MACOSX",
    ]  # fmt: skip
    touched(other, "deep/x.jpg")
    (other / "deep" / "again").symlink_to(other)
    for link, target in {"I/clinic": other, "J": root / "I", "I/up": root, "out": tmp_path, "gone": "nowhere"}.items():
        (root / link).symlink_to(target)
    found = Photographs(root)
    assert found.names == ["I/a.jpg", "I/b.JFIF", "I/clinic/deep/x.jpg"]
    assert sorted(found.listing.repeated) == ["I/clinic/deep/again", "I/up", "J", "out"]
    assert found.listing.broken == ["gone"]


def test_a_folder_without_photographs_says_what_it_holds(tmp_path):
    with pytest.raises(BuilderError, match=r"no photographs found in .*\.xml 2, \.txt 1"):
        touched(tmp_path, "a.xml", "b.xml", "c.txt")


def test_links_among_links_end(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.jpg").touch()
    (tmp_path / "a" / "b").symlink_to(tmp_path / "b")
    (tmp_path / "b" / "a").symlink_to(tmp_path / "a")
    assert list_images(tmp_path, frozenset({".jpg"})).images == ["a/a.jpg", "b/b.jpg"]

"""One identity of a patient: spelling, key, key file, what is compared, and what nobody without the key can tell."""

from __future__ import annotations

import errno
import hashlib
import hmac
import io
import json
import multiprocessing
import os
import random
import stat
import string
import tarfile
import unicodedata
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from builder.crops.pack import PackRequest, pack
from builder.errors import BuilderError
from builder.identity import (
    COLUMN,
    INDEX,
    KEY_VARIABLE,
    Patient,
    PatientKey,
    find_key,
    from_photograph,
    given_key,
    incomparable,
    key_file,
    lineage_of,
    normalise,
)
from builder.identity.spelling import form_of
from builder.phases import HEALING_PHASES
from builder.shards.dataset import Dataset
from builder.shards.inplace import Description, index_tars
from builder.shards.storage import Storage

KEY = PatientKey(b"the secret of one site", "test")

# -- spelling ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spellings", "one"),
    [
        (("7", "007", "7.0", " 7 ", "7.00", "7,0", "\uff17", "\u0667", "\u200b7\ufeff", "#7", '="007"', "-7", "P7",
          "p007", "P-007", "P\u2013007", "P\u2212007", "p_7", "Patient 7", "patient#007", "PATIENT ID: 7.0",
          "sub-07", "Pat. Nr. 7", "\U0001d7d5", "\u24fb", "P\u00a0007", "\uff30\uff10\uff10\uff17"), "7"),
        (("DFU-7", "dfu 007", "DFU_7", "Dfu7", "DFU\u00ad-7", "patient DFU 7", "DFU/7.0"), "dfu-7"),
        (("1000", "1,000", "1000.0", "1,000.0", "01000"), "1000"),
        (("Anna M\u00fcller", "M\u00fcller, Anna", "MU\u0308LLER ANNA", "anna  muller", "Muller_Anna",
          "Patient: Anna Mueller"), "anna-muller"),
        (("Patient A", "A", "a.", "ID a"), "a"), (("P", "p.", " P "), "p"),
        (("7-1", "007/01", "7 1", "7_1"), "7-1"),
        (("3F2504E0-4F89-11D3-9A0C-0305E82C3301", "{3f2504e0-4f89-11d3-9a0c-0305e82c3301}",
          "3f2504e04f8911d39a0c0305e82c3301"), "3f2504e04f8911d39a0c0305e82c3301"),
        (("", " ", "-", "nan", "NaN", "None", "null", "N/A", "#N/A", "\u200b", "?", "unknown", "."), ""),
        (("\u0130P\u0131", "ipi", "IPI"), "ipi"),
    ],
)  # fmt: skip
def test_spellings_of_one_patient(spellings: tuple[str, ...], one: str) -> None:
    assert {text: normalise(text) for text in spellings} == dict.fromkeys(spellings, one)


def test_different_patients_stay_different() -> None:
    ids = [
        "7",
        "71",
        "7-1",
        "1-7",
        "A7",
        "B7",
        "AB7",
        "A-B-7",
        "7a",
        "7.5",
        "0",
        "10",
        "Anna",
        "Anna M",
        "S7",
        "1000",
        "1",
    ]
    assert len({normalise(text) for text in ids}) == len(ids)


@given(st.text())
@example("\ud800")  # of a name that isn't UTF-8
def test_normalising_twice_is_normalising_once(text: str) -> None:
    one = normalise(text)
    assert normalise(one) == one
    assert " " not in one  # so that no id collides with what else the key hashes


NUMBERS = st.integers(0, 10**9)
PREFIXES = st.sampled_from(["", "P", "DFU", "Ward", "Patient", "\u00c4rzte"])


@given(PREFIXES, NUMBERS, st.randoms(use_true_random=False))
def test_whatever_happens_to_an_id_it_is_one_patient(prefix: str, number: int, chance: random.Random) -> None:
    assert normalise(spelled(prefix, number, chance)) == normalise(f"{prefix}{number}")
    assert normalise(spelled(prefix, number, chance)) != normalise(f"{prefix}{number + 1}")


def spelled(prefix: str, number: int, chance: random.Random) -> str:
    """An id as keyboards, spreadsheets and file systems leave it."""
    digits = "0" * chance.randrange(4) + str(number) + chance.choice(["", "", ".0", ".00", ",0"])
    text = prefix + (chance.choice(["", "-", " ", "_", "\u2013", "\u00a0", "/", ": ", "#"]) if prefix else "") + digits
    text = "".join(chance.choice([letter.upper(), letter.lower()]) for letter in text)
    text = unicodedata.normalize(chance.choice(["NFC", "NFD", "NFKC", "NFKD"]), text)
    if chance.random() < 0.3:
        text = text.translate({ord(plain): ord(plain) + 0xFEE0 for plain in string.ascii_letters + string.digits})
    for _ in range(chance.randrange(3)):
        place = chance.randrange(len(text) + 1)
        text = text[:place] + chance.choice(["\u200b", "\u200d", "\ufeff", "\u00ad", "\u2060"]) + text[place:]
    return chance.choice(["", " ", "\t"]) + text + chance.choice(["", " ", "\u3000"])


def test_forms_tell_how_an_id_is_built() -> None:
    forms = {
        "7": "0", "7-1": "0-0", "DFU 7": "dfu-0", "DFU B 7": "dfu-b-0", "Anna": "letters", "A M": "name",
        "Meier": "name",
        "7a": "letters and digits", "a7b8": "letters and digits", "0123456789abcdef": "code of 16",
    }  # fmt: skip
    assert {text: form_of(normalise(text)) for text in forms} == forms


# -- key --------------------------------------------------------------------------------------------------------------


def test_hashes_are_hmac_sha256_of_the_one_spelling() -> None:
    plain = hmac.new(KEY.secret, b"7", hashlib.sha256).hexdigest()[:32]  # RFC 2104
    assert KEY.hash("7") == KEY.hash("P-007") == plain
    assert PatientKey(b"another secret of a site", "").hash("7") != plain
    assert "secret" not in repr(KEY)
    with pytest.raises(BuilderError, match="names nobody"):
        KEY.hash(" - ")
    kept = {KEY.hash("7"), KEY.photograph("7"), KEY.seal("7") * 2, KEY.form("7") * 2, KEY.order("7").hex()[:32]}
    assert len(kept) == 5  # none says anything about another
    assert KEY.photograph("u\u0308.jpg") == KEY.photograph("\u00fc.jpg")
    assert KEY.photograph("\udcff.jpg")  # a name that isn't UTF-8


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"), (b" \r\n", "is empty"), (b"short", "has 5 bytes"),
        (b"a key in the first line\nanother one in the second", "2 lines"),
        (b"\0" * 64, "zero bytes"), (b"a key torn in the middle\0\0\0\0", "zero bytes"),
        ("a key of a notepad".encode("utf-16"), "byte order mark"),
        (b"\xef\xbb\xbfa key of a notepad", "byte order mark"),
        (b"x" * 5000, "larger than"),
    ],
)  # fmt: skip
def test_a_malformed_key_is_refused_with_a_remedy(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "patient.key"
    path.write_bytes(content)
    path.chmod(0o600)
    for key in (None, path):
        with pytest.raises(BuilderError, match=message) as refused:
            find_key(Storage(tmp_path), key)
        assert refused.value.remedy
    assert path.read_bytes() == content


def test_the_key_is_made_once_and_is_its_owners(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    storage = Storage(tmp_path / "out")
    made = find_key(storage)
    path = tmp_path / "out" / "patient.key"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and "newly made" in made.origin
    assert os.listdir(path.parent) == ["patient.key"]
    assert find_key(storage).secret == made.secret and "newly made" not in find_key(storage).origin
    monkeypatch.setenv(KEY_VARIABLE, "x" * 16)
    assert find_key(storage).secret == b"x" * 16
    assert find_key(storage, path).secret == made.secret
    for value, message in (("short", "has 5 bytes"), ("", "is empty")):
        monkeypatch.setenv(KEY_VARIABLE, value)
        with pytest.raises(BuilderError, match=message):
            find_key(storage)
    monkeypatch.delenv(KEY_VARIABLE)
    for nothing in (tmp_path / "none", tmp_path):
        with pytest.raises(BuilderError, match="cannot be read"):
            find_key(storage, nothing)
    with pytest.raises(BuilderError, match="no patient key"):
        find_key(Storage("memory://bucket"))
    with pytest.raises(BuilderError, match="has 5 bytes"):
        given_key(b"short")
    assert given_key(b"phantom").is_public  # nobody's secret
    assert given_key(b"\n a secret of bytes \n").secret == b"\n a secret of bytes \n"


def test_a_key_that_others_can_read_is_made_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "site.key"
    path.write_bytes(KEY.secret)
    path.chmod(0o644)
    with pytest.warns(UserWarning, match=r"mode 644\); now it is of mode 600"):
        assert find_key(Storage(tmp_path), path).secret == KEY.secret
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        find_key(Storage(tmp_path), path)
    path.chmod(0o640)
    monkeypatch.setattr(os, "chmod", lambda path, mode: None)  # as some mounts do
    with pytest.warns(UserWarning, match="its mode cannot be changed"):
        find_key(Storage(tmp_path), path)


@pytest.mark.parametrize("links", [True, False])
def test_a_full_disk_leaves_no_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool) -> None:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    if not links:
        monkeypatch.setattr(os, "link", _no_links)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", _full)
        with pytest.raises(BuilderError, match="No space left"):
            find_key(Storage(tmp_path))
    assert os.listdir(tmp_path) == []
    assert find_key(Storage(tmp_path)).secret.startswith(b"builder-")
    assert os.listdir(tmp_path) == ["patient.key"]


def _full(handle: int) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _no_links(*paths: Any) -> None:
    raise OSError(errno.EPERM, os.strerror(errno.EPERM))


@pytest.mark.parametrize("links", [True, False])
def test_first_uses_at_once_get_one_key(tmp_path: Path, links: bool) -> None:
    context = multiprocessing.get_context("fork")
    for attempt in range(5):
        start, found = context.Barrier(6), context.SimpleQueue()
        people = [
            context.Process(target=_first_use, args=(tmp_path / str(attempt), links, start, found)) for _ in range(6)
        ]
        for process in people:
            process.start()
        secrets = [found.get() for _ in people]
        for process in people:
            process.join()
        assert len(set(secrets)) == 1 and secrets[0].startswith(b"builder-")
        assert os.listdir(tmp_path / str(attempt)) == ["patient.key"]


def _first_use(root: Path, links: bool, start: Any, found: Any) -> None:
    os.environ.pop(KEY_VARIABLE, None)
    if not links:
        key_file.os.link = _no_links  # type: ignore[attr-defined]
    start.wait()
    try:
        found.put(find_key(Storage(root)).secret)
    except BuilderError as error:
        found.put(str(error).encode())


# -- what can be compared ---------------------------------------------------------------------------------------------


def lineage(*ids: str, source: str = COLUMN, said_by: str = "", key: PatientKey = KEY) -> dict[str, Any]:
    patients = [Patient(text, source, said_by) for text in ids]
    return {**lineage_of(key, patients), "patients": sorted(patient.hash(key) for patient in patients)}


@pytest.mark.parametrize(
    ("seen", "held", "why"),
    [
        (lineage("7"), lineage("8"), None),
        (lineage("7", "DFU 8"), lineage("9", "dfu_5"), None),
        (lineage("7", "DFU 8"), lineage("9"), "written in other ways"),
        (lineage("7"), lineage("DFU 8"), "written in other ways"),
        (lineage("AB"), lineage("AC"), None),
        (lineage("Anna Meier", "Bert Huber"), lineage("Huber, Bert", "ANNA MEIER"), None),
        (lineage("Anna Meier"), lineage("A. Meier"), "or as names"),
        (lineage("7"), lineage("9", "DFU 8"), "written in other ways"),
        (lineage("7"), lineage("8", source=INDEX, said_by="patient"), "patient column, the other from the members of"),
        (lineage("7", source=INDEX, said_by="group"), lineage("8", source=INDEX, said_by="patient"), "other ways"),
        (lineage("7", source="pattern", said_by="a"), lineage("8", source="pattern", said_by="a"), None),
        (lineage("7", source="pattern", said_by="a"), lineage("8", source="pattern", said_by="b"), "other patterns"),
        (lineage("a.jpg", "b.jpg", source="photograph"), lineage("b.jpg", "a.jpg", source="photograph"), None),
        (lineage("a.jpg", source="photograph"), lineage("b.jpg", source="photograph"), "other collections"),
        (lineage("7"), lineage("8", key=PatientKey(b"another secret of a site", "")), "different keys"),
        ({**lineage("7"), "patient_source": "column+photograph"}, lineage("8"), "a patient column and the photographs"),
        ({**lineage("7"), "patient_source": "seance"}, lineage("8"), "come from 'seance'"),
        ({**lineage("7"), "patient_source": None}, lineage("8"), "not recorded what stands for the patients of seen"),
        (lineage("7"), {"known": True, "key_fingerprint": KEY.fingerprint, "patients": []}, "of held"),
        ({**lineage("7"), "patient_forms": []}, {**lineage("8"), "patient_forms": []}, "other ways"),
        ({"known": True, "patients": []}, lineage("7"), "no key is recorded"),
    ],
)  # fmt: skip
def test_only_like_is_compared_with_like(seen: dict[str, Any], held: dict[str, Any], why: str | None) -> None:
    said = incomparable(seen, "seen", held, "held")
    assert (said is None) if why is None else (said is not None and why in said)


def test_the_phantoms_key_needs_no_record() -> None:
    phantom = {"known": True, "key_fingerprint": given_key(b"phantom").fingerprint, "patients": []}
    assert incomparable(phantom, "demo", phantom, "phantom") is None


# -- packs, indexes, and who looks at them ----------------------------------------------------------------------------

PEOPLE, SHOTS = 8, "IPR"


def photographs(folder: Path, names: list[str]) -> None:
    folder.mkdir(parents=True)
    for number, name in enumerate(names):
        pixels = np.random.default_rng(number).integers(0, 256, (24, 24, 3), np.uint8)
        Image.fromarray(pixels).save(folder / name)


def packed(
    root: Path, name: str, ids: list[str] | None, *, group_by: str | None = None, key: PatientKey = KEY
) -> Dataset:
    """Three photographs of each of eight people, named by `P000_I.png`; their ids stand in a column, if at all."""
    folder = root / "photographs"
    if not folder.exists():
        photographs(folder, [f"P{n:03d}_{phase}.png" for n in range(PEOPLE) for phase in SHOTS])
    table = root / f"{name}.csv"
    lines = ["file,label,patient" if ids else "file,label"]
    for number in range(PEOPLE):
        cell = ',"' + ids[number].replace('"', '""') + '"' if ids else ""
        lines += [f"P{number:03d}_{phase}.png,{phase}{cell}" for phase in SHOTS]
    table.write_text("\n".join(lines), encoding="utf-8")
    dataset = Dataset(name, Storage(root))
    request = PackRequest(folder, labels=table, without_box="whole", group_by=group_by, key=key.secret, freeze_size=16)
    pack(request, dataset, progress=False)
    return dataset


def indexed(root: Path, name: str, ids: list[str], *, said_by: str = "patient") -> Dataset:
    """The same people, of a tar of somebody's."""
    with tarfile.open(root / f"{name}.tar", "w") as tar:
        for number, text in enumerate(ids):
            for phase in SHOTS:
                buffer = io.BytesIO()
                Image.new("RGB", (16, 16), (number, 0, 0)).save(buffer, "PNG")
                split = ("train", "val", "test")[number % 3]
                told = json.dumps({"phase": phase, said_by: text, "split": split}).encode()
                for suffix, data in ((".png", buffer.getvalue()), (".json", told)):
                    member = tarfile.TarInfo(f"P{number:03d}_{phase}{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    dataset = Dataset(name, Storage(root))
    index_tars([str(root / f"{name}.tar")], dataset, Description(HEALING_PHASES, "real", None, lambda: KEY))
    return dataset


def test_a_pack_records_what_stands_for_its_patients(tmp_path: Path) -> None:
    numbers = [f"{n:03d}" for n in range(PEOPLE)]
    column = packed(tmp_path, "column", numbers).info
    assert column["lineage"] == {**lineage(*numbers), "patients": []} and column["group_by"] is None
    pattern = packed(tmp_path, "pattern", None, group_by=r"^P(\d+)_").info
    assert (pattern["lineage"]["patient_source"], pattern["group_by"]) == ("pattern", "pattern")
    photograph = packed(tmp_path, "photograph", None, group_by="photograph").info
    assert (photograph["lineage"]["patient_source"], photograph["group_by"]) == ("photograph", "photograph")
    some = [*numbers[:4], *[""] * 4]
    mixed = packed(tmp_path, "mixed", some, group_by="photograph").info
    assert mixed["lineage"]["patient_source"] == "column+photograph"
    assert any("can be known not to leak" in note for note in mixed["summary"]["notes"])
    index = indexed(tmp_path, "index", numbers).info
    assert index["lineage"] == {**lineage(*numbers, source=INDEX, said_by="patient"), "patients": []}


def test_a_pack_of_an_earlier_version_is_named(tmp_path: Path) -> None:
    dataset = packed(tmp_path, "old", [str(n) for n in range(PEOPLE)])
    info = dataset.info
    dataset.write_info({**info, "lineage": {"known": True, "key_fingerprint": KEY.fingerprint, "patients": []}})
    with pytest.raises(BuilderError, match="packed by an earlier version") as refused:
        packed(tmp_path, "old", [str(n) for n in range(PEOPLE)])
    assert "builder rm old" in refused.value.remedy


def test_an_index_of_an_earlier_version_is_read_again(tmp_path: Path) -> None:
    """Its patients were hashed as they were written."""
    from builder.shards.schema import to_table
    from builder.shards.writer import manifest_path, write_manifest

    dataset = indexed(tmp_path, "old", [f"P{n}" for n in range(PEOPLE)])
    metadata = {name: text for name, text in dataset.shard_metadata(0).items() if name != "patient_forms"}
    rows = [{**row, "patient": "0" * 32} for row in dataset.table().to_pylist()]
    write_manifest(dataset.storage, manifest_path("old", 0), to_table(rows, metadata))
    describe = Description(HEALING_PHASES, "real", None, lambda: KEY)
    assert index_tars([str(tmp_path / "old.tar")], dataset, describe).read == 1
    assert set(dataset.table()["patient"].to_pylist()) == {KEY.hash(str(n)) for n in range(PEOPLE)}
    assert index_tars([str(tmp_path / "old.tar")], dataset, describe).read == 0


def test_names_and_patients_stand_nowhere_in_a_dataset(tmp_path: Path) -> None:
    names = ["Anna Meier", "Bert Huber", "Cleo Sand", "Dora Lang", "Emil Kurz", "Fritz Berg", "Gerda Thal", "Hans Wald"]
    packed(tmp_path, "real", names)
    packed(tmp_path, "grouped", None, group_by="^P(00[0-7])_")
    secret = [*names, *(f"P{n:03d}_" for n in range(PEOPLE)), "P(00[0-7])", str(tmp_path), "photographs/"]
    for name in ("real", "grouped"):
        for file in [*(tmp_path / "manifests" / name).iterdir(), *(tmp_path / "shards" / name).iterdir()]:
            content = file.read_bytes()
            assert [text for text in secret if text.encode() in content] == [], file
    rows = Dataset("real", Storage(tmp_path)).table().to_pylist()
    written = json.dumps([rows, Dataset("real", Storage(tmp_path)).info], default=str)
    assert [text for text in secret if text in written] == []


def test_another_key_gives_another_order_split_and_fingerprint(tmp_path: Path) -> None:
    ids = [str(n) for n in range(PEOPLE)]
    both = [
        packed(tmp_path / str(n), "real", ids, key=PatientKey(f"the secret of site {n}".encode(), "")) for n in range(2)
    ]
    tables = [dataset.table().to_pylist() for dataset in both]
    assert [row["sha256"] for row in tables[0]] != [row["sha256"] for row in tables[1]]
    for column in ("patient", "source"):
        assert {row[column] for row in tables[0]}.isdisjoint(row[column] for row in tables[1])
    inputs = [dataset.info["inputs"] for dataset in both]
    for name in ("photographs", "boxes and labels", "patients", "patient key"):
        assert inputs[0][name] != inputs[1][name]
    assert from_photograph("x/P1.png", "photograph").text == "x/P1.png"


# -- the attacker, and the matrix of kinds: small runs of what tests/acceptance measures ------------------------------


def test_without_the_key_nobody_matches_rows_names_or_splits(tmp_path: Path) -> None:
    """And with it, everybody does: the same attack."""
    from tests.acceptance.reidentify import attack, one_packing, with_key

    packings = [one_packing(tmp_path / str(n), f"the secret of site {n}".encode()) for n in range(3)]
    found = attack(packings)
    assert len(found) > 20
    for name, tally in found.items():
        low, high = tally.interval(len(found))
        assert low <= tally.matches <= high, name
    assert [with_key(*packing) for packing in packings] == [(72, 72)] * 3


def test_the_attack_succeeds_where_the_key_is_public(tmp_path: Path) -> None:
    from tests.acceptance.reidentify import attack, guessed_hashes, one_packing

    packing = one_packing(tmp_path, b"phantom")
    found = attack([packing])
    assert found["row -> photograph, by SHA-256 of 'order NAME' (the order before)"].matches == 72
    assert found["patient -> split, by HMAC under b'phantom'"].matches == 24
    assert guessed_hashes(packing[0]) == 72 + 24


def test_no_pair_of_kinds_or_spellings_passes_the_guards(tmp_path: Path) -> None:
    from tests.acceptance.leaks import COMMANDS, controls, matrix
    from tests.people import KINDS

    spellings = ["p-1", "DFU-001"]
    found = matrix(tmp_path / "pairs", spellings)
    assert sum(found.values()) == len(COMMANDS) * (len(KINDS) * len(spellings)) ** 2
    assert [pair for pair in found if pair[-1] == "passed"] == []
    assert {pair[-1] for pair in found if pair[1:5] == ("column", "column", "p-1", "p-1")} == {"recognised"}
    assert {pair[-1] for pair in found if pair[1:5] == ("column", "column", "p-1", "DFU-001")} == {"refused"}
    passing = controls(tmp_path / "controls")
    assert passing == dict.fromkeys(passing, True)

"""Documents: every bit that flips is found, and what is no document of ours is refused with one message."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from builder.documents import encode_document, has_checksum, parse_document, read_document, write_document
from builder.errors import BuilderError
from builder.phases import HEALING_PHASES
from builder.shards.dataset_document import DatasetDocument
from builder.shards.storage import Storage

GOOD = {"state": "complete", "origin": "real", "classes": HEALING_PHASES.to_json(), "count": 3}
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abc", max_size=3), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


@given(st.dictionaries(st.text("xyz", max_size=4), PLAIN, max_size=4))
@settings(max_examples=60, deadline=None)
def test_comes_back(data: dict[str, object]) -> None:
    assert parse_document(encode_document(data), "it") == data


def test_every_flipped_bit_is_found() -> None:
    raw = encode_document(GOOD)
    for place in range(8 * len(raw)):
        damaged = bytearray(raw)
        damaged[place // 8] ^= 1 << place % 8
        try:
            found = parse_document(bytes(damaged), "dataset.json", DatasetDocument)
        except BuilderError:
            continue
        assert found == GOOD, f"bit {place} changes what is read"  # of white space: nothing is changed


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"", "damaged"),
        (b"[]", "not keys and values"),
        (b"\0" * 900, "damaged"),
        (b"\xff\xfe{}", "damaged"),
        (b'{"a": 1, "a": 2}', "stands twice"),
        (b'{"a": NaN}', "no JSON"),
        (b'{"a": 1e999}', "too large"),
        (b'{"a": ' + b"9" * 5000 + b"}", "too large"),
        (b'{"a": 18446744073709551616}', "too large"),
        (b'{"a": "\\ud800"}', "surrogates"),
        (b'{"a": ' + b"[" * 100 + b"]" * 100 + b"}", "nested"),
        (b'{"a": ' + b"[" * 200_000, "nested"),
        (b'{"checked": true}', "checksum"),
        (b'{"checked": false, "sha256": null}', "checksum"),
        (b'{"sha256": "00"}', "checksum"),
    ],
)
def test_refused(raw: bytes, said: str) -> None:
    with pytest.raises(BuilderError, match=said):
        parse_document(raw, "dataset.json")


def test_older_documents_are_accepted() -> None:
    raw = json.dumps(GOOD).encode()
    assert parse_document(raw, "dataset.json", DatasetDocument) == GOOD
    assert not has_checksum(raw)
    assert has_checksum(encode_document(GOOD))


@pytest.mark.parametrize(
    ("change", "place"),
    [
        ({"state": "done"}, "state"),
        ({"count": -1}, "count"),
        ({"count": True}, "count"),
        ({"count": "3"}, "count"),
        ({"classes": []}, "classes"),
        ({"classes": GOOD["classes"] * 2}, "same code"),
        ({"classes": [{"code": "../x", "name": "", "prompt": ""}]}, "classes.0.code"),
        ({"parent": "../other"}, "parent"),
        ({"parent": "other\n"}, "parent"),
        ({"lineage": {"known": 1}}, "lineage.known"),
        ({"lineage": {"patients": [1]}}, "lineage.patients.0"),
        ({"config": []}, "config"),
        ({"name": "\x1b[2J"}, r"\\x1b"),
    ],
)
def test_schema_names_the_place(change: dict[str, object], place: str) -> None:
    with pytest.raises(BuilderError, match=place) as caught:
        parse_document(encode_document({**GOOD, **change}), "dataset.json", DatasetDocument)
    assert str(caught.value).isprintable() or str(caught.value).replace("\n", "").isprintable()


def test_pipe_device_socket_and_folder_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    Path("folder").mkdir()
    Path("device").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("socket")
        for name in ("pipe", "folder", "device", "socket"):
            for storage in (None, Storage(".")):
                with pytest.raises(BuilderError, match=r"cannot be read|leads out of"):
                    read_document(name, storage=storage)
    with pytest.raises(FileNotFoundError):
        read_document("nothing")


def test_written_whole(tmp_path: Path) -> None:
    for storage, path in ((None, str(tmp_path / "a" / "x.json")), (Storage(tmp_path), "b/x.json")):
        write_document(path, GOOD, storage)
        assert read_document(path, DatasetDocument, storage) == GOOD
    with pytest.raises(ValueError, match="JSON"):
        write_document(tmp_path / "a" / "x.json", {"a": float("nan")})
    assert sorted(file.name for file in tmp_path.rglob("*") if file.is_file()) == ["x.json", "x.json"]

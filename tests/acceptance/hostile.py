"""Hostile inputs for the fuzzer: each maker takes a folder with a sound input and a random state, and spoils it."""

from __future__ import annotations

import gzip
import io
import json
import os
import random
import socket
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from builder.documents import encode_document

TEXTS = [
    "", " ", "..", "../..", "../secret.png", "/etc/hostname", "/etc/passwd", "file:///etc/passwd",
    "local:///etc/hostname",
    "http://127.0.0.1:9/x.tar", "https://127.0.0.1:9/x", "s3://bucket/x.tar", "gs://b/x", "memory://x/y", "ftp://a/b",
    "simplecache::http://127.0.0.1:9/x", "zip://x::/etc/passwd", "shards/clinic/../../secret.png", "\\\\host\\share",
    "a\\b",
    "\x00", "a\x00b", "\x1b[2J\x1b]0;x\x07", "a\nb", "\r", "\u202egnp", "\ud800", "é" * 300, "x" * 100_000, "NaN",
    "null",
    "canary_module:make", "os:getcwd", "canary_module.make", "dinov2:/etc", "-1", "1e999", "{}", "__class__", "%s%n",
    "$(id)",
    "shards/other/shard-000000.tar", "patient.key", "shards/clinic/shard-000000.tar/x", "~/.ssh/id_rsa", "CON", ".",
    "/",
]  # fmt: skip
VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, -(2**63), 10**30, 0.5, -0.0, 1e308, 5e-324, [], {}, [[]], [None],
    {"a": {}}, [1, "x", None], {"": ""}, {"known": "yes"}, ["x"] * 1000, {"version": []},
]  # fmt: skip
RAW = [b"NaN", b"Infinity", b"-Infinity", b"1e999", b"9" * 5000, b'"\\ud800"', b"[" * 200 + b"]" * 200, b"[" * 100_000,
       b'{"a":' * 500 + b"1" + b"}" * 500, b"\xff\xfe", b"'x'", b"01", b"tru", b'"\x01"', b""]  # fmt: skip

Maker = Callable[[Path, random.Random], "bool | None"]  # True: it is damage, False: nothing changed, None: either


def files_of(folder: Path) -> list[Path]:
    """The files below a folder, but for locks."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")


def spoil_bytes(folder: Path, r: random.Random) -> bool | None:
    """Flip, cut, zero, empty, delete or exchange bytes of a file."""
    path = r.choice(files_of(folder))
    whole = path.read_bytes()
    data = bytearray(whole)
    how = r.choice(["flip", "flip", "flip", "cut", "zero", "empty", "delete", "insert", "double", "other"])
    place = r.randrange(max(1, len(data)))
    if how == "flip" and data:
        data[place] ^= 1 << r.randrange(8)
    elif how == "cut":
        del data[place:]
    elif how == "zero":
        end = min(len(data), place + r.randrange(1, 600))
        data[place:end] = bytes(end - place)
    elif how == "empty":
        data.clear()
    elif how == "delete":
        path.unlink()
        return None if path.name == "index.parquet" else True
    elif how == "insert":
        data[place:place] = r.randbytes(r.randrange(1, 40))
    elif how == "double":
        data += data[place:]
    elif how == "other":
        data = bytearray(r.choice(files_of(folder)).read_bytes())
    path.unlink()
    path.write_bytes(data)
    if path.name == "index.parquet":
        return None  # it only saves reading
    if path.suffix == ".json":
        try:
            if json.loads(bytes(data)) == json.loads(whole):
                return False  # white space
        except ValueError:
            pass
    return bytes(data) != whole


def spoil_json(folder: Path, r: random.Random) -> bool | None:
    """Put a hostile value anywhere in a JSON document, with a sound checksum or none."""
    path = r.choice([path for path in files_of(folder) if path.suffix == ".json"])
    data = json.loads(path.read_bytes())
    for key in ("sha256", "checked") if isinstance(data, dict) else ():
        data.pop(key, None)
    places: list[tuple[Any, Any]] = []
    waiting = [data]
    while waiting:
        node = waiting.pop()
        for key in node if isinstance(node, dict) else range(len(node)):
            places.append((node, key))
            if isinstance(node[key], (dict, list)):
                waiting.append(node[key])
    for _ in range(r.choice([1, 1, 1, 2, 4])):
        node, key = r.choice(places)
        how = r.random()
        if how < 0.45:
            node[key] = r.choice(TEXTS)
        elif how < 0.75:
            node[key] = r.choice(VALUES)
        elif how < 0.85 and isinstance(node, dict):
            node.pop(key, None)
        elif how < 0.92 and isinstance(node, dict):
            node[r.choice(TEXTS)] = r.choice([*VALUES, *TEXTS])
        else:
            marker = "MARKER-OF-THE-FUZZER"
            node[key] = marker
            raw = json.dumps(data).encode().replace(f'"{marker}"'.encode(), r.choice(RAW), 1)
            path.unlink()
            path.write_bytes(raw)
            return None
    try:
        raw = encode_document(data) if r.random() < 0.7 and isinstance(data, dict) else json.dumps(data).encode()
    except (ValueError, TypeError):
        raw = json.dumps(data).encode()
    path.unlink()
    path.write_bytes(raw)
    return None


def spoil_manifest(folder: Path, r: random.Random) -> bool | None:
    """Rewrite a manifest with hostile columns, types, sizes or metadata."""
    path = r.choice([path for path in files_of(folder) if path.suffix == ".parquet"])
    table = pq.read_table(path)
    metadata = {key: value for key, value in (table.schema.metadata or {}).items() if not key.startswith(b"builder.")}
    table = table.replace_schema_metadata(metadata)
    name = r.choice(["shard", "shard", "shard", "offset", "size", "key", "sha256", "width", *table.column_names])
    place, field = table.schema.get_field_index(name), table.schema.field(name)
    how = r.choice(
        ["value", "value", "value", "value", "null", "drop", "type", "rename", "twice", "none", "many", "meta"]
    )
    if how == "value":
        if pa.types.is_integer(field.type):
            half = 2 ** (field.type.bit_width - 1)
            low, high = (0, 2**32 - 1) if field.type == pa.uint32() else (-half, half - 1)
            item: Any = r.choice([low, high, 0, max(low, -5), 1, min(high, 2**40), high - 1])
        elif pa.types.is_floating(field.type):
            item = r.choice([float("nan"), float("inf"), -1e38, 0.0])
        elif pa.types.is_string(field.type):
            item = r.choice([text for text in TEXTS if text != "\ud800"])
        else:
            item = None
        old = table[name].to_pylist()
        values = [item if r.random() < 0.7 or not i else old[i] for i in range(table.num_rows)]
        table = table.set_column(place, pa.field(name, field.type, True), pa.array(values, field.type))
    elif how == "null":
        table = table.set_column(place, pa.field(name, field.type, True), pa.nulls(table.num_rows, field.type))
    elif how == "drop":
        table = table.drop_columns([name])
    elif how == "type":
        kind = r.choice(
            [pa.string(), pa.int8(), pa.float64(), pa.list_(pa.int32()), pa.bool_(), pa.binary(), pa.null()]
        )
        item = {pa.string(): "7", pa.int8(): 7, pa.float64(): 7.5, pa.bool_(): True, pa.binary(): b"\xff\xfe"}.get(kind)
        table = table.set_column(place, name, pa.array([item] * table.num_rows, kind))
    elif how == "rename":
        table = table.rename_columns([r.choice(TEXTS[:5]) if n == name else n for n in table.column_names])
    elif how == "twice":
        table = table.append_column(name, table[name])
    elif how == "none":
        table = table.slice(0, 0)
    elif how == "many":
        count = r.choice([20_000, 300_000])
        text = pa.array(["y" * r.choice([1, 50_000])]).dictionary_encode()
        column = pa.DictionaryArray.from_arrays(pa.array([0] * count, pa.int8()), text.dictionary)
        table = pa.table(
            {**{n: pa.nulls(count, table.schema.field(n).type) for n in table.column_names}, "key": column}
        )
        table = table.replace_schema_metadata(metadata)
    elif how == "meta":
        key = r.choice(
            [b"start", b"stop", b"tar_sha256", b"tar_bytes", b"indexed", b"scores", b"voucher", b"patient_forms"]
        )
        text = r.choice([text for text in TEXTS if text != "\ud800"])
        value = r.choice([b"\xff\xfe", b"", b"-1", b"9" * 400, text.encode()])
        table = table.replace_schema_metadata({**metadata, key: value})
    path.unlink()
    pq.write_table(table, path, compression="zstd")
    return None


def spoil_place(folder: Path, r: random.Random) -> bool | None:
    """Put a pipe, a socket, a folder, a device or a link in the place of a file or folder."""
    everything = [*files_of(folder), *[path for path in folder.rglob("*") if path.is_dir()]]
    path = r.choice(everything)
    secret = next(parent / "outside" for parent in folder.parents if (parent / "outside").is_dir())
    if path.is_dir():
        path.rename(secret / f"{r.random()}")
    else:
        path.unlink()
    how = r.choice(["pipe", "socket", "folder", "link", "link", "device", "loop", "linked folder"])
    if how == "pipe":
        os.mkfifo(path)
    elif how == "socket":
        with socket.socket(socket.AF_UNIX) as made:
            here = os.open(path.parent, os.O_RDONLY)
            made.bind(f"/proc/self/fd/{here}/{path.name}"[:100])
            os.close(here)
    elif how == "folder":
        path.mkdir()
    elif how == "link":
        path.symlink_to(
            r.choice([secret / "canary.png", secret / "canary.json", Path("/etc/passwd"), Path("/nowhere")])
        )
    elif how == "device":
        path.symlink_to(r.choice(["/dev/zero", "/dev/full", "/dev/null", "/dev/tty"]))
    elif how == "loop":
        path.symlink_to(path.name)
    else:
        path.symlink_to(secret, target_is_directory=True)
    return None


# -- tars -------------------------------------------------------------------------------------------------------------


def header(name: bytes, size: int, kind: bytes = b"0", *, claimed: bytes = b"", link: bytes = b"") -> bytes:
    """A ustar header with a sound checksum; `claimed`: the bytes of its size field."""
    block = bytearray(512)
    block[0 : len(name[:100])] = name[:100]
    block[100:108], block[108:116], block[116:124] = b"0000644\0", b"0000000\0", b"0000000\0"
    block[124:136] = claimed or (b"%011o\0" % (size & 0o77777777777))
    block[136:148], block[156:157] = b"00000000000\0", kind
    block[257:265] = b"ustar\x0000"
    block[157 : 157 + len(link)] = link
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


def pax(records: dict[bytes, bytes], kind: bytes = b"x") -> bytes:
    body = b""
    for key, value in records.items():
        length = len(key) + len(value) + 3
        while len(str(length)) + len(key) + len(value) + 3 != length:
            length += 1
        body += b"%d %s=%s\n" % (length, key, value)
    return header(b"PaxHeader", len(body), kind) + padded(body)


def hostile_tar(sound: bytes, picture: bytes, r: random.Random) -> tuple[bytes, bool | None]:
    """The bytes of a hostile tar; and whether it must be refused (None: may be read)."""
    one = header(b"a.png", len(picture)) + padded(picture) + header(b"a.cls", 1) + padded(b"0")
    end = bytes(1024)
    how = r.randrange(16)
    if how == 0:
        data = bytearray(sound)
        for _ in range(r.choice([1, 1, 3, 50])):
            data[r.randrange(len(data))] ^= 1 << r.randrange(8)
        return bytes(data), None
    if how == 1:
        return sound[: r.randrange(len(sound.rstrip(b"\0")))], True
    if how == 2:
        size = r.choice([b"\x80" + (2 ** r.randrange(30, 80)).to_bytes(11, "big"), b"\xff" * 12, b"77777777777\0",
                         b"-0000000001\0", b"xxxxxxxxxxx\0", b"\x80" + b"\xff" * 11])  # fmt: skip
        return one + header(b"b.png", 0, claimed=size) + end, True
    if how == 3:
        kind = r.choice([b"1", b"2", b"3", b"4", b"6"])
        return one + header(r.choice([b"b.png", b"b.json", b"x"]), 0, kind, link=b"/etc/passwd") + end, True
    if how == 4:
        name = r.choice([b"../../x.png", b"/etc/x.png", b"a\nb.png", b"\x1b[2J.png", b"\xff\xfe.png", b"a\\b.png",
        b".png",
                         b"\xe2\x80\xae.png", b"x" * 100, b"./././a.png", b"a//a.png", b"..png",
                         b"d/../a.png"])  # fmt: skip
        return header(name, len(picture)) + padded(picture) + header(name[:-3] + b"cls", 1) + padded(b"0") + end, None
    if how == 5:
        value = r.choice([b"40000000000", b"-1", b"x", b"1e9", b"9" * 400, b"\xff", b"0x10", b""])
        return pax({b"size": value}) + one + end, None
    if how == 6:
        number = r.choice([b"40000000000", b"-5", b"x", b"999999999999999999999"])
        records = r.choice([
            {b"GNU.sparse.major": b"1", b"GNU.sparse.minor": b"0", b"GNU.sparse.realsize": number},
            {b"GNU.sparse.map": b"0,1,40000000000,1", b"GNU.sparse.size": number},
            {b"GNU.sparse.size": number, b"GNU.sparse.numblocks": b"1", b"GNU.sparse.offset": b"0"},
        ])  # fmt: skip
        return pax(records) + one + end, True
    if how == 7:
        return header(b"b.png", 512, b"S") + padded(picture[:512]) + one + end, True
    if how == 8:
        size = r.choice([10**9, 2**34, 300])
        return header(b"././@LongLink", size, r.choice([b"L", b"K", b"x", b"g"])) + b"x" * 400 + one + end, None
    if how == 9:
        return pax({b"path": b"y.png"}) * r.choice([1, 1500]) + one + end, None
    if how == 10:
        return gzip.compress(one + end + bytes(r.choice([0, 1 << 20]))), True
    if how == 11:
        return one + one + end, True
    if how == 12:
        text = r.choice([*RAW, *(json.dumps(value).encode() for value in VALUES),
                         *(json.dumps({"label": value}).encode() for value in (*VALUES, *TEXTS)),
                         *(json.dumps({"patient": value, "split": value}).encode() for value in VALUES)])  # fmt: skip
        return header(b"a.png", len(picture)) + padded(picture) + header(b"a.json", len(text)) + padded(
            text
        ) + end, None
    if how == 13:
        text = r.choice(
            [b"9" * 5000, b"-1", b"\xff", b"1e5", "٣".encode(), b"", b"0" * 100, b"0\n0", b"\x00", b"I" * 70_000]
        )
        last = r.choice([b"a.cls", b"a.txt"])
        return header(b"a.png", len(picture)) + padded(picture) + header(last, len(text)) + padded(text) + end, None
    if how == 14:
        records = {r.choice([b"path", b"hdrcharset", b"mtime", b"uid", b"linkpath", b"x"]): r.choice(
            [b"\xff\xfe", b"", b"BINARY", b"9" * 300, b"/etc/passwd", b"nan", b"a\x00b", b"../x.png"])}  # fmt: skip
        return pax(records, r.choice([b"x", b"g"])) + one + end, None
    body = r.choice(
        [b"%!PS-Adobe-3.0 EPSF-3.0\n", b"%PDF-1.4", b"<svg/>", b"GIF89a", b"BM", picture[:40], b"", b"\x00" * 90]
    )
    return header(b"a.png", len(body)) + padded(body) + header(b"a.cls", 1) + padded(b"0") + end, True


def sound_tar(pictures: list[bytes]) -> bytes:
    """A plain WebDataset tar of a few samples."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for number, picture in enumerate(pictures):
            for suffix, data in (("png", picture), ("cls", b"%d" % (number % 3))):
                info = tarfile.TarInfo(f"{number}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


# -- YAML -------------------------------------------------------------------------------------------------------------

YAML = [
    "b0: &b0 [x]\n" + "".join(f"b{i}: &b{i} [{','.join([f'*b{i - 1}'] * 9)}]\n" for i in range(1, 10)),
    "seed: 1\nseed: 2\n", "sample:\n  steps: 1\n  steps: 2\n", "? [a, b]\n: 1\n", "? {a: 1}\n: 1\n", "&x a: *x\n",
    "a: &a\n  b: *a\n", "<<: {seed: 1}\nseed: 2\n", "<<: 5\n", "[" * 5000, "{" * 5000, "- " * 3000 + "x",
    "seed: " + "9" * 100_000,
    "seed: !!python/object/apply:os.system ['id']\n", "!!python/name:os.system", "!x y", "!!binary abc", "!!set {a, b}",
    "!!timestamp 2001-99-99", "seed: 2001-99-99\n", "seed: 2001-13-45 99:99:99\n", "seed: .nan\n", "seed: .inf\n",
    "seed: 0x" + "f" * 99,
    "seed: 190:20:30\n", "seed: 0b" + "1" * 999, "\x00", "\x80\x81", "%YAML 9.9\n---\nseed: 1\n",
    "---\nseed: 1\n---\nseed: 2\n",
    "seed: 1\n  name: 2\n", "\t- x", "name: \"\\ud800\"\n", "name: \"\\x1b[2J\"\n",
    "extends: ../../../../etc/passwd\n", "extends: [1]\n",
    "extends: {a: 1}\n", "extends: \"\\0\"\n", "extends: x.yaml\n", "classes: 5\n", "classes: [{code: 1}]\n",
    "classes: []\n",
    "sample: []\n", "sample: 5\n", "5\n", "- 1\n", "~\n", "null: 1\n", "1: 2\n", "true: x\n", "1.5: x\n",
    "2001-01-01: x\n", "'': x\n",
    "train: {prompt_dropout: 2, ema_decay: 5}\n", "crops: {max_size: 0}\n", "model: {family: foo}\n",
    "score: {features: 5}\n",
    "name: " + "x" * 70_000 + "\n", "a" * 2_000_000, "x: |\n" + " y\n" * 1000, "seed: 1e999\n",
    "sample: {guidance: 1e999}\n", "*x",
    "sample: {steps: -1}\n", "sample: {steps: 1e30}\n", "sample: {steps: 10000000000000000000000}\n",
    "seed: -99999999999999999999\n",
]  # fmt: skip


def hostile_yaml(sound: bytes, r: random.Random) -> bytes:
    """A hostile config: of the list, a mutated one, or a value of the list in a sound one."""
    if r.random() < 0.4:
        return r.choice(YAML).encode("utf-8", "surrogatepass")
    data = bytearray(sound)
    if r.random() < 0.5:
        for _ in range(r.choice([1, 3, 20])):
            place = r.randrange(len(data))
            data[place : place + r.randrange(3)] = r.choice(
                [b"", b"\n", b":", b"&a ", b"*a", b"!", b"{", b"]", b"\xff", b"\t", b"-"]
            )
        return bytes(data)
    lines = bytes(data).split(b"\n")
    place = r.randrange(len(lines))
    key = lines[place].partition(b":")[0]
    text = r.choice([*(text for text in TEXTS if text != "\ud800"), *(json.dumps(value) for value in VALUES)])
    lines[place] = key + b": " + text.encode()
    return b"\n".join(lines)

"""Manifests from elsewhere: read within bounds, held against the schema, and kept from naming files outside the root.

Every reader of manifests goes through here (Dataset and Index do). A column that is not as `shards.schema` says, a
missing value, a place outside what a tar can have, or the name of a tar that is not this dataset's to name gives one
BuilderError that names manifest, column and value.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from builder.display import printable
from builder.shards.schema import IDENTITY, LIST_LENGTHS, REAL, SCHEMA, SYNTHETIC
from builder.trust import is_trusted, is_vouched

INDEXED = "indexed"  # in a manifest's schema metadata: the tar of others that it lists, in place (see shards.inplace)
VOUCHER = "voucher"  # beside it: that this user indexed that tar (see builder.trust)
OWN_TAR = re.compile(r"shards/[A-Za-z0-9_-]{1,64}/[A-Za-z0-9_-][A-Za-z0-9_.-]{0,254}\.tar")

MAX_ROWS = 5_000_000  # of a manifest or an index
MAX_BYTES = 4 << 30  # of its columns, unpacked
MAX_COLUMNS = 10_000
MAX_TEXT = 20_000  # characters of a text
MAX_UNPACKED = 1 << 30  # bytes of a text column
EXPANDED = 256 << 20  # bytes; texts that could take more are looked at packed first
MAX_KEY = 1000  # characters
MAX_SIDE = 1 << 16  # px
MAX_OFFSET = 1 << 50  # byte
REQUIRED = tuple(field.name for field in IDENTITY)
OPTIONAL = tuple(field.name for field in (*SYNTHETIC, *REAL))
RANGES = {
    "label": (0, 63), "offset": (0, MAX_OFFSET), "size": (1, 2**31 - 1), "width": (1, MAX_SIDE),
    "height": (1, MAX_SIDE),
}  # fmt: skip
NUMBERS = ("start", "stop", "tar_bytes")  # of the schema metadata
BAD_KEY = r"^$|^/|(^|/)\.\.(/|$)|[\\\x00-\x1f\x7f]"  # a key becomes the name of a file


class ManifestError(ValueError):
    """A manifest is not what the schema says; the message says how."""


class OutsideError(ManifestError):
    """A manifest names a tar outside the dataset's root."""

    remedy = (
        "if you indexed these tars, run the same `builder index` again; if you know what lies there and trust who made "
        "this dataset, confirm its folder with --trust-root PLACE (or BUILDER_TRUST_ROOTS)"
    )

    def __init__(self, shard: str) -> None:
        super().__init__(f"it points to '{printable(shard)}', which is not among the dataset's own tars")


def read_parquet(
    opened: Callable[[list[str]], pq.ParquetFile], columns: Sequence[str] | None, groups: Iterable[int] | None = None
) -> pa.Table:
    """The rows of a Parquet file of ours, with memory bounded by what it holds.

    Args:
        opened: Opens the file, such that the text columns it is given stay packed as dictionaries.
        columns: Of these; None: all. Those that it does not have are left out.
        groups: Of these row groups; None: of all.

    Raises:
        ManifestError: it claims more than a manifest can have.
        pa.ArrowException, OSError: it can't be read.
    """
    file = opened([])
    said = file.metadata
    groups = range(said.num_row_groups) if groups is None else list(groups)
    parts = [said.row_group(number) for number in groups]
    rows, size = sum(part.num_rows for part in parts), sum(part.total_byte_size for part in parts)
    if rows > MAX_ROWS or size > MAX_BYTES or said.num_columns > MAX_COLUMNS:
        raise ManifestError(f"it claims {rows:,} rows and {size:,} bytes: more than a manifest can have")
    chosen = None if columns is None else list(columns)
    texts = _long_texts(file, chosen, parts, rows) if rows * size > EXPANDED else []
    if texts:
        file = opened(texts)
    table = file.read_row_groups(list(groups), chosen, use_threads=False)
    for name in texts:
        place = table.schema.get_field_index(name)
        field = table.schema.field(place).with_type(pa.string())
        table = table.set_column(place, field, _unpacked(name, table.column(place)))
    return table


def _unpacked(name: str, column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A packed text column as plain text, when that takes no more memory than a manifest may. ManifestError else."""
    size = 0
    for chunk in column.chunks:
        if pa.types.is_dictionary(chunk.type):
            lengths = pc.fill_null(pc.cast(pc.binary_length(chunk.dictionary), pa.int64()), 0).to_numpy()
            used = chunk.indices.drop_null().to_numpy()
            size += int(lengths[used].sum()) if len(used) else 0
            if len(lengths) and int(lengths.max()) > MAX_TEXT:
                raise ManifestError(f"the column '{name}' has a text of {int(lengths.max()):,} bytes")
    if size > MAX_UNPACKED:
        raise ManifestError(f"the column '{name}' would take {size:,} bytes")
    return column.cast(pa.string())


def reopened(file: pq.ParquetFile, data: bytes, texts: list[str]) -> pq.ParquetFile:
    """A Parquet file of its bytes that was opened before, once more where text columns shall stay packed."""
    return pq.ParquetFile(io.BytesIO(data), read_dictionary=texts) if texts else file


def _long_texts(file: pq.ParquetFile, columns: Sequence[str] | None, parts: Iterable[Any], rows: int) -> list[str]:
    """The text columns that could take much memory once unpacked: one long text stands for many rows at no cost."""
    sizes: dict[str, int] = {}
    for part in parts:
        for place in range(part.num_columns):
            chunk = part.column(place)
            sizes[chunk.path_in_schema] = sizes.get(chunk.path_in_schema, 0) + chunk.total_uncompressed_size
    return [
        field.name
        for field in file.schema_arrow
        if pa.types.is_string(field.type)
        and (columns is None or field.name in columns)
        and rows * sizes.get(field.name, 0) > EXPANDED
    ]


def recorded(schema: pa.Schema) -> dict[str, str]:
    """The text in the schema metadata of a manifest. ManifestError when it is none, or a number there is none."""
    try:
        found = {
            key.decode(): value.decode() for key, value in (schema.metadata or {}).items() if key != b"ARROW:schema"
        }
    except UnicodeDecodeError as error:
        raise ManifestError(f"its metadata is no text: {error}") from None
    for name in NUMBERS:
        if name in found and not re.fullmatch(r"[0-9]{1,16}", found[name]):
            raise ManifestError(f"'{name}' in its metadata is {printable(found[name], 60)}, not a number")
    return found


def checked(table: pa.Table, metadatas: Iterable[Mapping[str, str]], columns: Sequence[str] | None = None) -> pa.Table:
    """The rows of a manifest when they are as the schema says; columns that older ones lack are null.

    Args:
        table: The rows, with the columns that were read.
        metadatas: What rides in the schema metadata of the manifests that the rows are of (see `recorded`).
        columns: What was asked for; None: all.

    Raises:
        ManifestError: they are not, or name a tar that the dataset may not name.
    """
    table, texts = _typed(table, columns)
    if table.num_rows:
        found = {name: table.column(place) for place, name in enumerate(table.schema.names) if name in REQUIRED}
        for name, column in found.items():
            if column.null_count:
                raise ManifestError(f"the column '{name}' has missing values")
        for place, name in texts:
            column = table.column(place)
            if column.null_count < len(column):
                _require_text(name, column)
        _require_ranges(found)
        for name, length in LIST_LENGTHS.items():
            if name in table.column_names:
                _require_length(name, table[name], length)
        if "shard" in found:
            require_places(pc.unique(found["shard"]).to_pylist(), metadatas)
    return table


def is_key(key: str) -> bool:
    """Whether a text can be the key of an image: it becomes the name of files and members."""
    try:
        return len(key.encode()) <= MAX_KEY and not re.search(BAD_KEY, key)
    except UnicodeEncodeError:
        return False


def require_places(shards: Iterable[str], metadatas: Iterable[Mapping[str, str]]) -> None:
    """Refuse tars that are neither of a dataset below the root, nor indexed by this user, nor confirmed."""
    foreign = [shard for shard in shards if not OWN_TAR.fullmatch(shard) or ".." in PurePosixPath(shard).parts]
    if not foreign:
        return
    known = {said[INDEXED]: said.get(VOUCHER) for said in metadatas if INDEXED in said}
    for shard in foreign:
        if not (shard in known and is_vouched(shard, known[shard])) and not is_trusted(shard):
            raise OutsideError(shard)


Places = list[tuple[int, str]]  # place and name of columns


def _typed(table: pa.Table, columns: Sequence[str] | None) -> tuple[pa.Table, Places]:
    """The rows with the columns that were asked for, each of its type; and which of them are text."""
    global _sound
    schema = table.schema
    if _sound is not None and _sound[0] == columns and schema.equals(_sound[1]):
        return table, _sound[2]  # as the manifest before it
    names = schema.names
    if len(set(names)) != len(names):
        raise ManifestError("two of its columns have the same name")
    for name in REQUIRED if columns is None else [name for name in columns if name in REQUIRED]:
        if name not in names:
            raise ManifestError(f"it has no column '{name}'")
    for place, name in enumerate(names):
        index = SCHEMA.get_field_index(name)
        if index < 0 or (found := schema.field(place).type) == SCHEMA.field(index).type:
            continue
        try:
            column = table.column(place)
            packed = pa.types.is_dictionary(found) and pa.types.is_string(found.value_type)
            column = _unpacked(name, column) if packed else column
            table = table.set_column(place, SCHEMA.field(index), column.cast(SCHEMA.field(index).type))
        except ManifestError:
            raise
        except (pa.ArrowException, ValueError):
            raise ManifestError(
                f"the column '{name}' is of the type {printable(str(found), 60)}, not {SCHEMA.field(index).type}"
            ) from None
    for name in OPTIONAL if columns is None else [name for name in columns if name in OPTIONAL]:
        if name not in names:
            field = SCHEMA.field(name)
            table = table.append_column(field, pa.nulls(table.num_rows, field.type))
    texts = [(place, field.name) for place, field in enumerate(table.schema) if pa.types.is_string(field.type)]
    if table.schema.equals(schema):
        _sound = columns, schema, texts
    return table, texts


# What was asked for, a schema that needs no change for it, and its text columns.
_sound: tuple[Sequence[str] | None, pa.Schema, Places] | None = None


def _require_length(name: str, column: pa.ChunkedArray, length: int) -> None:
    """Refuse lists of another length, or with missing numbers; a missing list is none."""
    if column.null_count == len(column):
        return
    lengths = pc.min_max(pc.list_value_length(column)).as_py()
    if lengths != {"min": length, "max": length} or pc.list_flatten(column).null_count:
        raise ManifestError(f"the column '{name}' has a list that is not of {length} numbers")


def _require_short(name: str, values: pa.Array | pa.ChunkedArray) -> None:
    longest = pc.max(pc.binary_length(values)).as_py()
    if longest is not None and longest > MAX_TEXT:
        raise ManifestError(f"the column '{name}' has a text of {longest:,} bytes")


def _require_text(name: str, column: pa.ChunkedArray) -> None:
    """Refuse a text column with what is no UTF-8, with long texts, or with characters that it may not have."""
    for chunk in column.chunks:
        lengths, data = _text(chunk)
        if not data.size:
            continue
        if int(data.max()) >= 128:
            chunk.validate(full=True)  # raises where it is not UTF-8
        if len(data) > MAX_TEXT and int(lengths.max()) > MAX_TEXT:
            raise ManifestError(f"the column '{name}' has a text of {int(lengths.max()):,} bytes")
        if name in ALPHABETS and not ALPHABETS[name][data].all():
            _refuse(name, chunk, pc.invert(pc.match_substring_regex(chunk, WHOLE[name])))
    if name in LENGTHS:
        least, most = LENGTHS[name]
        lengths = np.concatenate([_text(chunk)[0] for chunk in column.chunks])
        if int(lengths.min()) < least or int(lengths.max()) > most:
            _refuse(name, column, (lengths < least) | (lengths > most))


def _text(chunk: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """Of a text array: length of each text in bytes (int32 [N]), and all bytes in a row (uint8)."""
    if not len(chunk) or chunk.buffers()[2] is None:
        return np.zeros(len(chunk), np.int32), np.empty(0, np.uint8)
    ends = np.frombuffer(chunk.buffers()[1], np.int32)[chunk.offset : chunk.offset + len(chunk) + 1]
    return np.diff(ends), np.frombuffer(chunk.buffers()[2], np.uint8)[ends[0] : ends[-1]]


def _require_ranges(found: Mapping[str, pa.ChunkedArray]) -> None:
    for name, (low, high) in RANGES.items():
        if name in found:
            values = found[name].to_numpy()
            least, most = int(values.min()), int(values.max())
            if least < low or most > high:
                wrong = least if least < low else most
                raise ManifestError(f"the column '{name}' has {wrong}, and must lie from {low} to {high}")
    if "key" in found:
        chunks = [_text(chunk)[1] for chunk in found["key"].chunks]
        if any((chunk == ord("/")).any() for chunk in chunks):
            _refuse("key", found["key"], pc.match_substring_regex(found["key"], BAD_KEY))


def _refuse(name: str, values: pa.Array | pa.ChunkedArray, wrong: Any) -> None:
    places = np.flatnonzero(np.asarray(wrong))
    if len(places):
        raise ManifestError(f"the column '{name}' has '{printable(values[int(places[0])].as_py(), 80)}'")


def _alphabet(allowed: bytes) -> np.ndarray:
    table = np.zeros(256, bool)
    table[list(allowed)] = True
    return table


WORD = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz_"
ALPHABETS = {  # bytes that the texts of a column are made of
    "sha256": _alphabet(b"0123456789abcdef"),
    "phase": _alphabet(WORD),
    "origin": _alphabet(b"realsynthetic"),
    "key": _alphabet(bytes(set(range(32, 256)) - {ord("\\"), 127})),
}
WHOLE = {"sha256": "^[0-9a-f]*$", "phase": "^[A-Za-z0-9_]*$", "origin": "^[a-z]*$", "key": r"^[^\\\x00-\x1f\x7f]*$"}
LENGTHS = {"sha256": (64, 64), "phase": (1, 16), "origin": (4, 9), "key": (1, MAX_KEY)}  # least and most bytes

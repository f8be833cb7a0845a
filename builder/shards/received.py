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
from builder.shards.schema import IDENTITY, REAL, SCHEMA, SYNTHETIC
from builder.trust import is_trusted, is_vouched

INDEXED = "indexed"  # in a manifest's schema metadata: the tar of others that it lists, in place (see shards.inplace)
VOUCHER = "voucher"  # beside it: that this user indexed that tar (see builder.trust)
OWN_TAR = re.compile(r"shards/[A-Za-z0-9_-]{1,64}/[A-Za-z0-9_-][A-Za-z0-9_.-]{0,254}\.tar")

MAX_ROWS = 5_000_000  # of a manifest or an index
MAX_BYTES = 4 << 30  # of its columns, unpacked
MAX_COLUMNS = 10_000
MAX_TEXT = 20_000  # characters of a text
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
PATTERNS = {"sha256": r"^[0-9a-f]{64}$", "phase": r"^[A-Za-z0-9_]{1,16}$", "origin": r"^(real|synthetic)$"}
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
        for chunk in table[name].chunks:
            _require_short(name, chunk.dictionary)
        place = table.schema.get_field_index(name)
        field = table.schema.field(place).with_type(pa.string())
        table = table.set_column(place, field, table[name].cast(pa.string()))
    return table


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
    table = _typed(table, columns)
    for name in REQUIRED:
        if name in table.column_names and table[name].null_count:
            raise ManifestError(f"the column '{name}' has missing values")
    for field in table.schema:
        if pa.types.is_string(field.type):
            table[field.name].validate(full=True)  # that it is UTF-8
            if table[field.name].nbytes > MAX_TEXT:
                _require_short(field.name, table[field.name])
    if table.num_rows:
        _require_ranges(table)
        if "shard" in table.column_names:
            require_places(pc.unique(table["shard"]).to_pylist(), metadatas)
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


def _typed(table: pa.Table, columns: Sequence[str] | None) -> pa.Table:
    names = table.column_names
    if len(set(names)) != len(names):
        raise ManifestError("two of its columns have the same name")
    for name in REQUIRED if columns is None else [name for name in columns if name in REQUIRED]:
        if name not in names:
            raise ManifestError(f"it has no column '{name}'")
    for place, name in enumerate(names):
        index = SCHEMA.get_field_index(name)
        if index < 0 or (found := table.schema.field(place).type) == SCHEMA.field(index).type:
            continue
        try:
            table = table.set_column(place, SCHEMA.field(index), table[name].cast(SCHEMA.field(index).type))
        except (pa.ArrowException, ValueError):
            raise ManifestError(
                f"the column '{name}' is of the type {printable(str(found), 60)}, not {SCHEMA.field(index).type}"
            ) from None
    for name in OPTIONAL if columns is None else [name for name in columns if name in OPTIONAL]:
        if name not in names:
            field = SCHEMA.field(name)
            table = table.append_column(field, pa.nulls(table.num_rows, field.type))
    return table


def _require_short(name: str, values: pa.Array | pa.ChunkedArray) -> None:
    longest = pc.max(pc.binary_length(values)).as_py()
    if longest is not None and longest > MAX_TEXT:
        raise ManifestError(f"the column '{name}' has a text of {longest:,} bytes")


def _require_ranges(table: pa.Table) -> None:
    names = table.column_names
    for name, (low, high) in RANGES.items():
        if name in names:
            found = pc.min_max(table[name]).as_py()
            if found["min"] < low or found["max"] > high:
                wrong = found["min"] if found["min"] < low else found["max"]
                raise ManifestError(f"the column '{name}' has {wrong}, and must lie from {low} to {high}")
    for name, pattern in PATTERNS.items():
        if name in names:
            _refuse(name, table[name], pc.invert(pc.match_substring_regex(table[name], pattern)))
    if "key" in names:
        _refuse("key", table["key"], pc.match_substring_regex(table["key"], BAD_KEY))
        if pc.max(pc.binary_length(table["key"])).as_py() > MAX_KEY:
            raise ManifestError(f"the column 'key' has one of more than {MAX_KEY} bytes")


def _refuse(name: str, values: pa.ChunkedArray, wrong: Any) -> None:
    places = np.flatnonzero(np.asarray(wrong))
    if len(places):
        raise ManifestError(f"the column '{name}' has '{printable(values[int(places[0])].as_py(), 80)}'")

"""Write the index of a dataset (see shards.index): its rows once more, in one file."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from builder.errors import BuilderError
from builder.shards.dataset import Dataset
from builder.shards.index import INDEX, Entry, footer, open_index, seal_index
from builder.shards.lock import LockedError, exclusive
from builder.shards.schema import SCHEMA
from builder.shards.writer import manifest_name

GROUP = 50_000  # rows of a row group, about; some 40 MB with all columns


class _WiderError(Exception):
    """A manifest has a column that the index, as it is being written, has not."""

    def __init__(self, fields: list[pa.Field]) -> None:
        self.fields = fields


def compact(dataset: Dataset, on_shard: Callable[[], object] = lambda: None) -> int:
    """Write the index of `dataset` anew; returns the number of its rows. What is in step of an older one is read there.

    BuilderError when there is no shard, a manifest can't be read, or another process is writing the dataset.
    """
    schema = SCHEMA
    with exclusive(dataset), tempfile.TemporaryDirectory(prefix="builder-index-") as folder:
        path = Path(folder) / INDEX
        while True:
            try:
                rows = _write(dataset, schema, path, on_shard)
                break
            except _WiderError as wider:
                schema = pa.schema([*schema, *wider.fields])
        dataset.storage.write_file(f"manifests/{dataset.name}/{INDEX}", path)
    return rows


def in_step(dataset: Dataset) -> bool | None:
    """Whether the index covers just the shards there are, as they are; None when there is no index."""
    stamps = dataset.stamps()
    if INDEX not in stamps:
        return None
    index = open_index(dataset.storage, dataset.name, stamps)
    return index is not None and len(index) == index.covers == len(dataset.shard_numbers(stamps))


def keep_in_step(dataset: Dataset) -> None:
    """Write the index anew where there is one and it is out of step: for commands that change manifests.

    Nothing where another process (a rank of the same job, say) holds the dataset: an index that is out of step is only
    slower.
    """
    if in_step(dataset) is False:
        with suppress(LockedError):
            compact(dataset)


def _write(dataset: Dataset, schema: pa.Schema, path: Path, on_shard: Callable[[], object]) -> int:
    entries: list[Entry] = []
    waiting: list[pa.Table] = []
    group = start = 0
    stamps = dataset.stamps()
    with pq.ParquetWriter(path, schema, compression="zstd", write_page_checksum=True) as writer:
        for number, table in dataset.tables(stamps=stamps):
            added = [field for field in table.schema if schema.get_field_index(field.name) < 0]
            if added:
                raise _WiderError(added)
            metadata = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
            size, stamp = stamps[manifest_name(number)]
            entries.append(Entry(number, size, stamp, group, start, table.num_rows, metadata))
            waiting.append(_in(table, schema, number))
            start += table.num_rows
            if start >= GROUP:
                writer.write_table(pa.concat_tables(waiting), row_group_size=start)
                waiting, group, start = [], group + 1, 0
            on_shard()
        if start:
            writer.write_table(pa.concat_tables(waiting), row_group_size=start)
        if not entries:
            raise BuilderError(f"dataset '{dataset.name}' has no shards yet", "run the command that makes it first")
        groups = group + (1 if start else 0)
        chunks = groups * len(schema)  # a list of numbers is one column, too
        writer.add_key_value_metadata(footer(entries, chunks))
    seal_index(path)
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    return sum(entry.rows for entry in entries)


def _in(table: pa.Table, schema: pa.Schema, number: int) -> pa.Table:
    """The rows in the index's columns; those that an older manifest lacks are null."""
    try:
        columns = [
            table[field.name].cast(field.type) if field.name in table.column_names else pa.nulls(len(table), field.type)
            for field in schema
        ]
        return pa.table(columns, schema=schema)
    except (pa.ArrowException, ValueError) as error:
        raise BuilderError(f"manifest {number} has other columns than the rest: {error}", "score it again") from None

"""One index over many manifests: what it gives is what they say, and never what they said once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from builder.errors import BuilderError
from builder.quality.sets.scores import NEEDED, draw, shuffled
from builder.shards import compact as compacting
from builder.shards.compact import compact, in_step, keep_in_step
from builder.shards.dataset import Dataset
from builder.shards.index import INDEX, open_index
from builder.shards.storage import Storage
from builder.shards.writer import manifest_path, write_manifest
from tests.conftest import write_real


def from_manifests(dataset: Dataset, columns: Any = None) -> list[pa.Table]:
    return [dataset.shard_table(number, columns) for number in dataset.shard_numbers()]


def same(dataset: Dataset) -> None:
    """What is read by way of the index is what the manifests say, with what rides in their schema."""
    for columns in (None, ("key", "ssim"), ()):
        tables = list(dataset.tables(columns))
        assert [number for number, _ in tables] == dataset.shard_numbers()
        for (_, read), plain in zip(tables, from_manifests(dataset, columns), strict=True):
            assert read.select(plain.column_names).to_pydict() == plain.to_pydict()
            assert read.schema.metadata == plain.schema.metadata
    assert list(dataset.metadatas()) == [(n, dataset.shard_metadata(n)) for n in dataset.shard_numbers()]


def test_the_index_gives_what_the_manifests_say_and_no_manifest_is_opened(clinic: Dataset, monkeypatch) -> None:
    assert in_step(clinic) is None
    plain = clinic.table()
    assert compact(clinic) == 36
    same(clinic)
    assert in_step(clinic) is True

    read = Storage.read

    def no_manifest(storage: Storage, path: str, *where: int) -> bytes:
        assert path.endswith(INDEX), "a manifest was read"
        return read(storage, path, *where)

    monkeypatch.setattr(Storage, "read", no_manifest)
    assert clinic.table().equals(plain)


def test_row_groups_hold_whole_shards(clinic: Dataset, monkeypatch) -> None:
    monkeypatch.setattr(compacting, "GROUP", 1)
    compact(clinic)
    assert pq.ParquetFile(clinic.storage.path("manifests/clinic/index.parquet")).num_row_groups == 2
    same(clinic)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.lists(st.sampled_from(["score", "extend", "remove", "compact", "damage", "column"]), max_size=5))
def test_whatever_happens_to_the_manifests_no_old_row_is_read(
    changes: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    dataset = write_real(tmp_path_factory.mktemp("index"), per_phase=4, size=16)
    compact(dataset)
    for step, change in enumerate(changes):
        last = max(dataset.shard_numbers())
        table = dataset.shard_table(last)
        if change == "score":
            scores = pa.array([step / 10] * len(table), pa.float32())
            table = table.set_column(table.schema.get_field_index("ssim"), table.schema.field("ssim"), scores)
            write_manifest(dataset.storage, manifest_path("clinic", last), table)
        elif change == "column":
            table = table.append_column(f"extra{step}", pa.array(range(len(table))))
            write_manifest(dataset.storage, manifest_path("clinic", last), table)
        elif change == "extend":
            write_manifest(dataset.storage, manifest_path("clinic", last + 1), table)
        elif change == "remove" and last:
            dataset.storage.remove(manifest_path("clinic", last))
        elif change == "damage":
            dataset.storage.write("manifests/clinic/index.parquet", b"PAR1 no more")
        elif change == "compact":
            compact(dataset)
            assert in_step(dataset) is True
        same_rows(dataset)
    keep_in_step(dataset)
    assert in_step(dataset) is True
    same_rows(dataset)


def same_rows(dataset: Dataset) -> None:
    """As `same`; a column that a manifest lacks may come as nulls."""
    for (_, read), plain in zip(dataset.tables(), from_manifests(dataset), strict=True):
        assert read.select(plain.column_names).equals(plain)
        assert all(read[name].null_count == len(read) for name in read.column_names if name not in plain.column_names)


def test_only_what_changed_is_read_from_its_manifest(clinic: Dataset) -> None:
    compact(clinic)
    write_manifest(clinic.storage, manifest_path("clinic", 1), clinic.shard_table(1))
    index = open_index(clinic.storage, "clinic", clinic.stamps())
    assert index is not None
    assert 0 in index
    assert 1 not in index
    assert in_step(clinic) is False
    keep_in_step(clinic)
    assert in_step(clinic) is True


def test_no_index_over_nothing_and_none_is_made_unasked(clinic: Dataset, tmp_path: Path) -> None:
    keep_in_step(clinic)
    assert in_step(clinic) is None
    with pytest.raises(BuilderError, match="has no shards yet"):
        compact(Dataset("empty", clinic.storage))
    assert not clinic.storage.exists("manifests/empty/index.parquet")


def test_filter_after_a_new_score_reads_no_old_one(builder, clinic: Dataset) -> None:
    def write(score: float) -> None:
        for number in clinic.shard_numbers():
            table = clinic.shard_table(number)
            scores = pa.array([score] * len(table), pa.float32())
            table = table.set_column(table.schema.get_field_index("ssim"), table.schema.field("ssim"), scores)
            write_manifest(clinic.storage, manifest_path("clinic", number), table)

    write(0.2)
    assert "wrote" in builder("compact", "clinic").output
    asked = ("filter", "clinic", "--no-gates", "--min-ssim", "0.5", "--dry-run")
    assert f"all{0:>13}{36:>10}" in builder(*asked).output
    write(0.8)
    assert f"all{36:>13}{0:>10}" in builder(*asked).output
    said = builder("verify", "clinic").output
    assert "`builder compact clinic` brings it in step" in said
    assert "36 images in 2 shards" in said


def test_metrics_draws_the_same_images_whether_it_streams_or_not(clinic: Dataset) -> None:
    rows = clinic.table(NEEDED).to_pylist()
    for most in (1, 3, 100):
        size, drawn = draw(clinic, most, 7)
        assert size == 64
        for code in "IPR":
            expected = shuffled([row for row in rows if row["phase"] == code], 7)[:most]
            assert [row for row in drawn if row["phase"] == code] == expected


def test_a_shard_of_which_nothing_is_drawn(clinic: Dataset) -> None:
    """Many small shards: from most of them no image comes early enough."""
    table = clinic.table(NEEDED)
    for number in range(table.num_rows):
        write_manifest(clinic.storage, manifest_path("many", number), table.slice(number, 1))
    many = Dataset("many", clinic.storage)
    rows = table.to_pylist()
    expected = [shuffled([row for row in rows if row["phase"] == code], 7)[0] for code in "IPR"]
    assert sorted(draw(many, 1, 7)[1], key=lambda row: row["phase"]) == expected

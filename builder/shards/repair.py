"""Take damaged shards away, so that the job that made them makes them again; and how else a dataset is made again."""

from __future__ import annotations

from collections.abc import Iterable

from builder.shards.dataset import Dataset
from builder.shards.lock import exclusive
from builder.shards.verify import stray_tars
from builder.shards.writer import manifest_path, tar_path


def drop_shards(dataset: Dataset, numbers: Iterable[int]) -> None:
    """Remove shards of `dataset`, which is partial from then on: manifest first, so that no tar is missing from one.

    BuilderError when a job is writing the dataset.
    """
    with exclusive(dataset):
        dataset.write_info({**dataset.info, "state": "partial"})
        for number in numbers:
            dataset.storage.remove(manifest_path(dataset.name, number))
            dataset.storage.remove(tar_path(dataset.name, number))
        for path in stray_tars(dataset):
            dataset.storage.remove(path)


def is_of_a_job(dataset: Dataset) -> bool:
    """Whether its shards can be made again one by one: they are planned units of `builder shards`."""
    info = dataset.info
    return "fingerprint_keys" in info and not info.get("parent")


def is_unfinished(dataset: Dataset) -> bool:
    """Whether a job's dataset that was complete once lacks shards since: a repair was interrupted, or an extension."""
    info = dataset.info
    return is_of_a_job(dataset) and info.get("state") == "partial" and "count" in info


def how_to_remake(dataset: Dataset) -> str:
    """What to do about damage in a dataset whose shards can't be made again one by one."""
    info, name = dataset.info, dataset.name
    if info.get("parent"):
        source = f"`builder verify {info['parent']} --repair`, then " if info.get("view") else ""
        return f"{source}`builder rm {name}` and the `builder filter {info['parent']} --name {name} ...` that made it"
    if info.get("adopted_from"):
        return f"`builder rm {name}`, and adopt {info['adopted_from']} again"
    if info.get("indexed_from"):
        return f"`builder rm {name}` (their tars stay), and `builder index` with the options it was made with"
    return f"`builder rm {name}`, and `builder pack` with the options it was made with: it gives the same crops"

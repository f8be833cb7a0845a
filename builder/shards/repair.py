"""Mend a dataset: damaged shards step aside until the job that made them has made them again; caches are made anew.

Nothing is removed before what replaces it is there. A damaged shard is moved to the folder `damaged` (of the manifests,
and of the tars), so that its place is free for the job. When the job is done the folder is removed; when it fails, what
it did not make is moved back. A killed repair leaves the folder, and the next one, or the job itself, goes on.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from builder.shards.dataset import SHARD, Dataset
from builder.shards.lock import exclusive
from builder.shards.verify import stray_tars
from builder.shards.writer import manifest_name, manifest_path, shard_name, tar_path

ASIDE = "damaged"


def set_aside(dataset: Dataset, numbers: Iterable[int]) -> None:
    """Free the places of shards of `dataset`, which is partial from then on. Manifests go first: none lacks its tar.

    BuilderError when a job is writing the dataset.
    """
    with exclusive(dataset):
        dataset.write_info({**dataset.info, "state": "partial"})
        for number in numbers:
            manifest, tar = _aside(dataset, number)
            for path, aside in ((manifest_path(dataset.name, number), manifest), (tar_path(dataset.name, number), tar)):
                if dataset.storage.exists(path):
                    dataset.storage.move(path, aside)
        for path in stray_tars(dataset):
            dataset.storage.remove(path)


def put_back(dataset: Dataset) -> list[int]:
    """Move back what stepped aside and was not made again; the numbers of these shards."""
    back = []
    with exclusive(dataset):
        there = set(dataset.shard_numbers())
        for number in aside_numbers(dataset):
            manifest, tar = _aside(dataset, number)
            if number in there:
                continue
            for path, aside in ((tar_path(dataset.name, number), tar), (manifest_path(dataset.name, number), manifest)):
                if dataset.storage.exists(aside):
                    dataset.storage.move(aside, path)
            back.append(number)
    return back


@contextmanager
def aside(dataset: Dataset, numbers: Iterable[int]) -> Iterator[None]:
    """Within the block the shards' places are free; where it fails, what was not made again comes back."""
    set_aside(dataset, numbers)
    try:
        yield
    except Exception:
        put_back(dataset)
        raise
    drop_aside(dataset)


def drop_aside(dataset: Dataset) -> None:
    """Remove what stepped aside: all of it was made again."""
    for folder in (f"manifests/{dataset.name}/{ASIDE}", f"shards/{dataset.name}/{ASIDE}"):
        dataset.storage.remove(folder)


def aside_numbers(dataset: Dataset) -> list[int]:
    """The shards that stepped aside."""
    folder = f"manifests/{dataset.name}/{ASIDE}"
    return sorted(int(name[6:-8]) for name in dataset.storage.list(folder, ".parquet") if SHARD.fullmatch(name))


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


def _aside(dataset: Dataset, number: int) -> tuple[str, str]:
    return (
        f"manifests/{dataset.name}/{ASIDE}/{manifest_name(number)}",
        f"shards/{dataset.name}/{ASIDE}/{shard_name(number)}.tar",
    )

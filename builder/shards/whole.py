"""Make a dataset anew: all of it, or nothing; and what killed processes leave in one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from builder.errors import BuilderError
from builder.shards.dataset import FEATURES, REJECTS, Dataset
from builder.shards.lock import discard


@contextmanager
def all_or_nothing(dataset: Dataset) -> Iterator[None]:
    """Start from an empty dataset, and leave nothing of it when the block fails. Only for who holds its lock.

    A killed process leaves what it wrote, with a dataset.json that says `partial`; the next one begins with this.
    BuilderError instead of the error of a full disk, or of one that can't be written to.
    """
    dataset.clear()
    try:
        yield
    except Exception as error:
        dataset.clear()
        discard(dataset)
        failure = error if isinstance(error, OSError) else error.__cause__
        if isinstance(failure, OSError):
            raise BuilderError(
                f"dataset '{dataset.name}' cannot be written under {dataset.storage.root}: "
                f"{failure.strerror or failure}; nothing of it was kept",
                "make room or choose another --out, then run the same command again",
            ) from None
        raise


def sweep_leftovers(dataset: Dataset) -> None:
    """Remove what killed processes were writing, in all folders of a dataset; only for who holds its lock."""
    manifests = f"manifests/{dataset.name}"
    features = f"{manifests}/{FEATURES}"
    inner = [f"{features}/{name}" for name in dataset.storage.list(features)]
    for folder in (f"shards/{dataset.name}", manifests, f"{manifests}/{REJECTS}", *inner):
        dataset.storage.sweep(folder)

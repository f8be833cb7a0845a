"""Bring back what a dataset's scores stand on, where another dataset still has it."""

from __future__ import annotations

from builder.errors import BuilderError
from builder.quality.reference import load_reference, save_reference
from builder.shards.dataset import Dataset
from builder.shards.lock import exclusive


def mend_reference(dataset: Dataset) -> bool:
    """Take the reference of a filtered dataset again from the one it was filtered from.

    Returns:
        Whether that was done. False: there is no parent, or what it has now is not what these scores were made by.
    """
    info = dataset.info
    if not info.get("parent"):
        return False
    try:
        found = load_reference(Dataset(info["parent"], dataset.storage))
    except BuilderError:
        return False
    if found.version != (info.get("scores") or {}).get("version"):
        return False
    with exclusive(dataset):
        save_reference(dataset, found)
    return True

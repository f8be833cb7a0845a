"""Remove a dataset with all its leftovers."""

from __future__ import annotations

from builder.errors import BuilderError
from builder.shards.dataset import NAME, Dataset, all_datasets, readable
from builder.shards.lock import discard, exclusive
from builder.shards.storage import Storage


def remove_dataset(storage: Storage, name: str, *, force: bool = False) -> list[str]:
    """Remove the dataset `name` and what killed runs left of it; returns the folders removed.

    dataset.json goes first, so that a removal that is itself killed leaves nothing that looks like a dataset.
    BuilderError when nothing is there, when a job is writing it, or when a view or an index reads its tars (unless
    `force`). What an indexed dataset reads stays: its tars are not ours.
    """
    if not NAME.fullmatch(name):
        raise BuilderError(f"'{name}' is not the name of a dataset", "give the NAME that `builder list` shows")
    folders = [folder for folder in (f"manifests/{name}", f"shards/{name}") if storage.exists(folder)]
    if not folders:
        raise BuilderError(f"there is no dataset '{name}' in {storage.root}", "see `builder list`")
    views = [
        dataset.name
        for dataset, info in readable(all_datasets(storage))
        if dataset.name != name and (info.get("view") or info.get("indexed_from"))
    ]
    views = [view for view in views if _reads(Dataset(view, storage), name)]
    if views and not force:
        raise BuilderError(
            f"the datasets {', '.join(views)} read the images of '{name}'", "remove them first, or add --force"
        )
    dataset = Dataset(name, storage)
    with exclusive(dataset):
        dataset.clear()
        discard(dataset)
    return folders


def _reads(view: Dataset, name: str) -> bool:
    """Whether rows point into the tars of `name`: a view's parent, or its parent's parent; or what was indexed."""
    tars = (table["shard"][0].as_py() for _, table in view.tables(["shard"]) if table.num_rows)
    return any(tar.startswith(f"shards/{name}/") for tar in tars)

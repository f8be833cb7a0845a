"""Remove a dataset with all its leftovers."""

from __future__ import annotations

from builder.errors import BuilderError
from builder.shards.dataset import NAME, all_datasets
from builder.shards.storage import Storage


def remove_dataset(storage: Storage, name: str, *, force: bool = False) -> list[str]:
    """Remove the dataset `name` and what killed runs left of it; returns the folders removed.

    dataset.json goes first, so that a removal that is itself killed leaves nothing that looks like a dataset.
    BuilderError when nothing is there, or when a view points into its tars (unless `force`).
    """
    if not NAME.fullmatch(name):
        raise BuilderError(f"'{name}' is not the name of a dataset", "give the NAME that `builder list` shows")
    folders = [folder for folder in (f"manifests/{name}", f"shards/{name}") if storage.exists(folder)]
    if not folders:
        raise BuilderError(f"there is no dataset '{name}' in {storage.root}", "see `builder list`")
    views = [d.name for d in all_datasets(storage) if d.info.get("view") and d.info.get("parent") == name]
    if views and not force:
        raise BuilderError(
            f"the views {', '.join(views)} read the images of '{name}'", "remove them first, or add --force"
        )
    storage.remove(f"manifests/{name}/dataset.json")
    for folder in folders:
        storage.remove(folder)
    return folders

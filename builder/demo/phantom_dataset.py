"""The packed datasets `phantom` and `stock`: made once, when they are first needed, from rendered photographs."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from builder.config import load_config
from builder.crops.pack import PackRequest, pack
from builder.demo.base_dataset import BASE, ensure_base
from builder.demo.phantom import write_photographs
from builder.phases import HEALING_PHASES, ClassTable
from builder.shards.dataset import Dataset
from builder.shards.storage import Storage

PHANTOM, STOCK = "phantom", "stock"  # the names under which commands ask for them
STOCK_PATIENTS, STOCK_SEED = 120, 1000  # another cohort than the phantom's: no patient stands in both
KEY = b"phantom"  # nobody's secret: the patients are invented, and everybody's hashes must agree
LICENCE = "phantom, CC0"


def ensure_demo(name: str, root: str) -> Dataset | None:
    """The dataset `phantom`, `stock` or `base` under an output root, made if it isn't there; None for other names."""
    makers: dict[str, Callable[[str], Dataset]] = {PHANTOM: ensure_phantom, STOCK: ensure_stock, BASE: ensure_base}
    return makers[name](root) if name in makers else None


def ensure_phantom(root: str, name: str = PHANTOM, patients: int = 233, seed: int = 0, workers: int = 2) -> Dataset:
    """The phantom dataset `name` under an output root, rendered and packed unless it is there and complete.

    `patients` and `seed` count only when it is made. Prints what it does, and the pack's summary.
    """
    return _ensure(Dataset(name, Storage(root)), HEALING_PHASES, patients, seed, workers, stock=False)


def ensure_stock(
    root: str, name: str = STOCK, patients: int = STOCK_PATIENTS, seed: int = STOCK_SEED, workers: int = 2
) -> Dataset:
    """As `ensure_phantom`, of stock photographs; their classes are those of configs/stock.yaml."""
    classes = load_config(STOCK).classes
    return _ensure(Dataset(name, Storage(root)), classes, patients, seed, workers, stock=True)


def _ensure(dataset: Dataset, classes: ClassTable, patients: int, seed: int, workers: int, stock: bool) -> Dataset:
    if dataset.exists() and dataset.info["state"] == "complete":
        return dataset
    dataset.storage.require_writable()
    print(
        f"There is no dataset '{dataset.name}' yet: rendering the photographs of {patients} phantom patients "
        "and packing them."
    )
    with tempfile.TemporaryDirectory(prefix="builder-phantom-") as folder:
        out = Path(folder)
        write_photographs(out, patients=patients, seed=seed, workers=workers, stock=stock)
        request = PackRequest(
            out / "photographs",
            boxes=out / "boxes.csv",
            labels=out / "labels.csv",
            classes=classes,
            key=KEY,
            config_name=STOCK if stock else PHANTOM,
            licence=LICENCE,
        )
        print(pack(request, dataset))
    return dataset

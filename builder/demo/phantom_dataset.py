"""The packed dataset `phantom`: made once, when it is first needed, from rendered photographs."""

from __future__ import annotations

import tempfile
from pathlib import Path

from builder.crops.pack import PackRequest, pack
from builder.demo.phantom import write_photographs
from builder.shards.dataset import Dataset
from builder.shards.storage import Storage

PHANTOM = "phantom"  # the name under which commands ask for it
KEY = b"phantom"  # nobody's secret: the patients are invented, and everybody's hashes must agree
LICENCE = "phantom, CC0"


def ensure_phantom(
    storage_root: str, name: str = PHANTOM, patients: int = 233, seed: int = 0, workers: int = 2
) -> Dataset:
    """The phantom dataset `name` under an output root, rendered and packed unless it is there and complete.

    `patients` and `seed` count only when it is made. Prints what it does, and the pack's summary.
    """
    dataset = Dataset(name, Storage(storage_root))
    if dataset.exists() and dataset.info["state"] == "complete":
        return dataset
    print(
        f"There is no dataset '{name}' yet: rendering the photographs of {patients} phantom patients and packing them."
    )
    with tempfile.TemporaryDirectory(prefix="builder-phantom-") as folder:
        out = Path(folder)
        write_photographs(out, patients=patients, seed=seed, workers=workers)
        request = PackRequest(
            out / "photographs",
            boxes=out / "boxes.csv",
            labels=out / "labels.csv",
            key=KEY,
            config_name=PHANTOM,
            licence=LICENCE,
        )
        print(pack(request, dataset))
    return dataset

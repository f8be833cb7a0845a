"""Lineage: may a synthetic dataset be set beside the patients that a real dataset holds out?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from builder.shards.dataset import Dataset

HELD_OUT = ("val", "test")
NAMED = 5  # of the patients that leak, so many are named


def find_leak(synthetic: Dataset, real: Dataset, splits: Sequence[str] = HELD_OUT) -> str | None:
    """How the generator of `synthetic` saw, or may have seen, patients of these splits of `real`; None: it did not.

    What can't be known not to leak is a leak as well: an unknown lineage, patients hashed with another key, held-out
    samples without a patient.
    """
    seen: dict[str, Any] = synthetic.info.get("lineage") or {}
    if not seen.get("known"):
        return f"the lineage of '{synthetic.name}' is unknown: it may come from patients that '{real.name}' holds out"
    table = real.table(("patient", "split"))
    patients = table.filter(pc.is_in(table["split"], value_set=pa.array(list(splits))))["patient"].unique().to_pylist()
    if not patients:
        return None
    keys = [seen.get("key_fingerprint"), (real.info.get("lineage") or {}).get("key_fingerprint")]
    if keys[0] != keys[1] or keys[0] is None:
        return (
            f"the patients of '{synthetic.name}' and '{real.name}' cannot be compared: "
            f"they were hashed with different keys (fingerprints {keys[0]} and {keys[1]})"
        )
    if None in patients:
        return (
            f"held-out samples of '{real.name}' have no patient: the generator of '{synthetic.name}' may have seen them"
        )
    shared = sorted(set(patients) & set(seen.get("patients") or ()))
    if not shared:
        return None
    more = f" and {len(shared) - NAMED} more" if len(shared) > NAMED else ""
    return (
        f"the generator of '{synthetic.name}' was trained on {len(shared)} patients that '{real.name}' holds out: "
        f"{', '.join(shared[:NAMED])}{more}"
    )

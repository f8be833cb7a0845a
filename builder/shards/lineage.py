"""Lineage: may a synthetic dataset be set beside the patients that a real dataset holds out?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow.compute as pc

from builder.identity import PUBLIC_KEY, incomparable, is_invented
from builder.shards.dataset import Dataset

HELD_OUT = ("val", "test")
SPLITS = ("train", *HELD_OUT)
NAMED = 5  # of the patients that leak, so many are named
INVENTED = PUBLIC_KEY


def find_leak(synthetic: Dataset, real: Dataset, splits: Sequence[str] = HELD_OUT) -> str | None:
    """How the generator of `synthetic` saw, or may have seen, patients of these splits of `real`; None: it did not.

    What can't be known not to leak is a leak as well: an unknown lineage, patients that can't be compared (hashed with
    another key, or known from another source: see identity.incomparable), held-out samples without a patient.
    """
    seen = synthetic.info.get("lineage") or {}
    return leak_of(seen, f"'{synthetic.name}'", real, splits, who=f"the generator of '{synthetic.name}'")


def leak_of(
    seen: Mapping[str, Any], name: str, real: Dataset, splits: Sequence[str] = HELD_OUT, *, who: str = ""
) -> str | None:
    """As `find_leak`, of a lineage (as dataset.json and checkpoint.json have it) itself.

    name: what has this lineage, as the answer calls it; who: what saw the patients, if that is something else.
    """
    if not seen.get("known"):
        return f"the lineage of {name} is unknown: it may come from patients that '{real.name}' holds out"
    if is_invented(seen) and not is_invented(real.info.get("lineage") or {}):
        return None
    patients = patients_of(real, splits)
    if not patients:
        return None
    if None in patients:
        return f"held-out samples of '{real.name}' have no patient: {who or name} may have seen them"
    held = real.info.get("lineage") or {}
    shared = sorted(patients & set(seen.get("patients") or ()))
    if not shared or seen.get("key_fingerprint") != held.get("key_fingerprint"):
        return incomparable(seen, name, held, f"'{real.name}'")
    return f"{who or name} was trained on {len(shared)} patients that '{real.name}' holds out: {first_few(shared)}"


def patients_of(real: Dataset, splits: Sequence[str]) -> set[Any]:
    """The keyed hashes of the patients in these splits; None among them where a sample has no patient."""
    table = real.table(("patient", "split"))
    patients: set[Any] = set()
    for split in splits:
        held = pc.fill_null(pc.equal(table["split"], split), False)
        patients |= set(pc.unique(table["patient"].filter(held)).to_pylist())
    return patients


def first_few(patients: Sequence[str]) -> str:
    more = f" and {len(patients) - NAMED} more" if len(patients) > NAMED else ""
    return f"{', '.join(patients[:NAMED])}{more}"

"""Lineage: may a synthetic dataset be set beside the patients that a real dataset holds out?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow.compute as pc

from builder.shards.dataset import Dataset

HELD_OUT = ("val", "test")
SPLITS = ("train", *HELD_OUT)
NAMED = 5  # of the patients that leak, so many are named
INVENTED = "cf8ccfd2fece181e"  # fingerprint of the phantom's key, too short for a site's: its patients are nobody


def find_leak(synthetic: Dataset, real: Dataset, splits: Sequence[str] = HELD_OUT) -> str | None:
    """How the generator of `synthetic` saw, or may have seen, patients of these splits of `real`; None: it did not.

    What can't be known not to leak is a leak as well: an unknown lineage, patients hashed with another key, held-out
    samples without a patient.
    """
    seen = synthetic.info.get("lineage") or {}
    return leak_of(seen, f"'{synthetic.name}'", real, splits, who=f"the generator of '{synthetic.name}'")


def leak_of(
    seen: Mapping[str, Any], name: str, real: Dataset, splits: Sequence[str] = HELD_OUT, *, who: str = ""
) -> str | None:
    """As `find_leak`, of a lineage (known, key_fingerprint, patients) itself.

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
    keys = [seen.get("key_fingerprint"), (real.info.get("lineage") or {}).get("key_fingerprint")]
    if keys[0] != keys[1] or keys[0] is None:
        why = "no key is recorded" if None in keys else "they were hashed with different keys"
        return (
            f"the patients of {name} and '{real.name}' cannot be compared: {why} (fingerprints {keys[0]} and {keys[1]})"
        )
    shared = sorted(patients & set(seen.get("patients") or ()))
    if not shared:
        return None
    return f"{who or name} was trained on {len(shared)} patients that '{real.name}' holds out: {first_few(shared)}"


def is_invented(lineage: Mapping[str, Any]) -> bool:
    """Whether all patients of a lineage are rendered ones: they are nobody, and no other dataset can hold them out."""
    return bool(lineage.get("known")) and lineage.get("key_fingerprint") == INVENTED


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

"""Whether the patients of two lineages can be compared: one key, one source, ids built alike. If not, it is refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PUBLIC_KEY = "cf8ccfd2fece181e"  # fingerprint of the phantom's key, too short for a site's: its patients are nobody
MIXED = "+"  # between the sources of a dataset whose patients come from several, as in 'column+photograph'

SOURCES = {
    "column": "a patient column",
    "pattern": "a pattern of the file names",
    "photograph": "the photographs themselves",
    "index": "the members of indexed tars",
}
_OTHER_FORMS = {
    "pattern": "other patterns, or ids that are written in other ways",
    "photograph": "other collections of photographs",
}
_OTHER_IDS = "ids that are written in other ways (with and without a prefix, or as names)"
_PACK_ALIKE = "take both from one patient column, written in one way"


def is_invented(lineage: Mapping[str, Any]) -> bool:
    """Whether all patients of a lineage are rendered ones: they are nobody, and no other dataset can hold them out."""
    return bool(lineage.get("known")) and lineage.get("key_fingerprint") == PUBLIC_KEY


def incomparable(seen: Mapping[str, Any], name: str, held: Mapping[str, Any], real: str) -> str | None:
    """Why the hashes of two lineages say nothing about each other; None: they can be compared.

    Args:
        seen: lineage of what learned; `name`: as the answer calls it.
        held: lineage of the real dataset that holds patients out; `real`: as the answer calls it.

    Hashes can be compared when they were made with one key, of patients from one source (column, pattern, photograph,
    index), and when the ids of both sides are of the same forms: `DFU-7` here and `7` there may be one person, and so
    may `1.001` and `1001`. Ids that are names have no one spelling, so both sides must have the same names. A lineage
    that does not record its source (of an earlier version) can't be compared. The phantom's patients are numbered by
    one program: their key is enough.
    """
    keys = [seen.get("key_fingerprint"), held.get("key_fingerprint")]
    whose = f"the patients of {name} and {real} cannot be compared"
    if keys[0] != keys[1] or keys[0] is None:
        why = "no key is recorded" if None in keys else "they were hashed with different keys"
        return f"{whose}: {why} (fingerprints {keys[0]} and {keys[1]})"
    if keys[0] == PUBLIC_KEY:
        return None
    sources = [seen.get("patient_source"), held.get("patient_source")]
    for source, side in zip(sources, (name, real), strict=True):
        if source is None:
            return f"{whose}: it is not recorded what stands for the patients of {side} (made by an earlier version)"
        if source not in SOURCES:
            return f"{whose}: those of {side} come from {_in_words(str(source))}; {_PACK_ALIKE}"
    if sources[0] != sources[1]:
        origins = [_in_words(str(source)) for source in sources]
        return f"{whose}: one side comes from {origins[0]}, the other from {origins[1]}; {_PACK_ALIKE}"
    forms = [set(lineage.get("patient_forms") or ()) for lineage in (seen, held)]
    if not forms[1] or forms[0] != forms[1]:
        why = _OTHER_FORMS.get(
            str(sources[0]), "ids that are written in other ways (with and without a prefix, or as names)"
        )
        return f"{whose}: they come from {why}; {_PACK_ALIKE}"
    return None


def joined_forms(base: Mapping[str, Any], data: Mapping[str, Any]) -> list[str]:
    """The forms of a lineage that both go into."""
    return sorted({*(base.get("patient_forms") or ()), *(data.get("patient_forms") or ())})


def _in_words(source: str) -> str:
    return " and ".join(SOURCES.get(part, repr(part)) for part in source.split(MIXED))

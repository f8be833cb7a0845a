"""Whose photograph it is: one rule for the spelling of a patient, one keyed hash, one comparison of lineages.

No other room normalises, hashes or compares patients. `spelling` brings an id to one spelling, `key` hashes it,
`key_file` finds or makes the secret, `stand_ins` says what stands for a patient, and `comparison` says whether the
patients of two lineages can be compared at all.
"""

from builder.identity.comparison import PUBLIC_KEY, incomparable, is_invented, joined_forms
from builder.identity.key import PatientKey, given_key
from builder.identity.key_file import KEY_FILE, KEY_VARIABLE, find_key
from builder.identity.spelling import normalise
from builder.identity.stand_ins import COLUMN, INDEX, Patient, from_photograph, lineage_of

__all__ = [
    "COLUMN",
    "INDEX",
    "KEY_FILE",
    "KEY_VARIABLE",
    "PUBLIC_KEY",
    "Patient",
    "PatientKey",
    "find_key",
    "from_photograph",
    "given_key",
    "incomparable",
    "is_invented",
    "joined_forms",
    "lineage_of",
    "normalise",
]

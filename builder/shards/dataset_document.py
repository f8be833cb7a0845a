"""What dataset.json must say, as a pydantic model: a dataset that came from elsewhere is held against it when read.

Only keys that a command uses are described; others may be there, of versions to come, and are kept.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from builder.phases import MAX_PHASES
from builder.schemas import EMPTY, ClassEntry, Code, Count, Finite, LineageEntry, Name, Open, Short, Table, Text


class KeysEntry(Open):
    """What decided the images of a batch job; see job.spec."""

    checkpoint: Short | None = None
    dtype: Short | None = None
    phases: Annotated[list[Code], Field(max_length=MAX_PHASES)] | None = None
    weights: Annotated[list[Finite], Field(max_length=MAX_PHASES)] | None = None
    images_per_shard: Annotated[int, Field(ge=1, le=2**31)] | None = None


class DatasetDocument(Open):
    """dataset.json."""

    name: Name | None = None
    state: Literal["partial", "complete"]
    origin: Literal["real", "synthetic"]
    classes: Annotated[list[ClassEntry], Field(min_length=1, max_length=MAX_PHASES)]
    count: Count | None = None
    planned: Count | None = None
    asked: Text | None = None
    created: Short | None = None
    config: Table = EMPTY
    fingerprint: Short | None = None
    fingerprint_keys: KeysEntry | None = None
    checkpoint: Text | None = None
    checkpoint_voucher: Short | None = None
    lineage: LineageEntry | None = None
    parent: Name | None = None
    parent_created: Short | None = None
    parent_count: Count | None = None
    filter: Table | None = None
    view: bool | None = None
    licence: Table | None = None
    versions: Table = EMPTY
    scores: Table = EMPTY
    inputs: Table = EMPTY
    summary: Table = EMPTY
    group_by: Text | None = None
    adopted_from: Text | None = None
    indexed_from: list[Text] | None = None
    allow_leak: Text | None = None

    @model_validator(mode="after")
    def _codes_differ(self) -> DatasetDocument:
        codes = [entry.code for entry in self.classes]
        if len(set(codes)) != len(codes):
            raise ValueError("two classes have the same code")
        return self

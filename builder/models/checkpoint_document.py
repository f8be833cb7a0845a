"""What checkpoint.json and a run's history.json must say, as pydantic models: they are held against them when read."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from builder.phases import MAX_PHASES
from builder.schemas import EMPTY, ClassEntry, Code, Count, LineageEntry, Open, Short, Table, Text

Side = Annotated[int, Field(ge=1, le=2**20)]  # px


class FileEntry(Open):
    """A file of a checkpoint as it was written."""

    bytes: Count
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}\z")]


class CheckpointDocument(Open):
    """checkpoint.json; see models.checkpoint.Checkpoint."""

    family: Short = "sdxl"
    method: Short = "full"
    base: dict[Short, Text | None] = EMPTY
    classes: Annotated[list[ClassEntry], Field(max_length=MAX_PHASES)] | None = None
    prompts: dict[Code, Text] = EMPTY
    original_sizes: dict[Code, list[Side]] = EMPTY
    lineage: LineageEntry | None = None
    config: Table = EMPTY
    metrics: Table = EMPTY
    step: Count = 0
    epoch: Count = 0
    licence: dict[Short, Text | None] = EMPTY
    created: Short = ""
    files: Annotated[dict[Text, FileEntry], Field(max_length=10_000)] = EMPTY


class EntryDocument(Open):
    """One checkpoint of a run; `path` is the name of a folder in the run's."""

    model_config = ConfigDict(extra="forbid")

    step: Count
    epoch: Count
    path: Annotated[str, Field(pattern=r"^[A-Za-z0-9_][^/\\\x00-\x1f]{0,254}\z|^\z")]  # '' of imported histories
    metrics: Table = EMPTY
    created: Short = ""


class HistoryDocument(Open):
    """history.json; see models.history.History."""

    monitor: Short | None = None
    mode: Literal["min", "max"] = "min"
    checkpoints: list[EntryDocument]

"""Types that the models of our documents share: text and numbers within bounds. See builder.documents.

Imports pydantic, which takes 0.1 s: to be imported where a document is read.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

Short = Annotated[str, Field(max_length=200)]  # a name, a date, a hash
Text = Annotated[str, Field(max_length=20_000)]  # words, a path
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}\z")]  # of a dataset
Code = Annotated[str, Field(pattern=r"^[A-Za-z0-9_]{1,16}\z")]  # of a class
Count = Annotated[int, Field(ge=0, le=2**40)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Table = dict[str, Any]
EMPTY: Any = Field(default_factory=dict)  # defaults
NONE: Any = Field(default_factory=list)


class Open(BaseModel):
    """Keys that are not described are allowed, as of later versions; a value of another type is never converted."""

    model_config = ConfigDict(extra="allow", strict=True)


class ClassEntry(Open):
    """One class: its code in names of files, its name and prompt in words."""

    code: Code
    name: Text
    prompt: Text


class LineageEntry(Open):
    """The patients that were seen, by keyed hashes. Not `known`: nobody can say."""

    known: bool = False
    key_fingerprint: Short | None = None
    patients: list[Short] = NONE
    patient_source: Short | None = None
    patient_forms: list[Short] = NONE

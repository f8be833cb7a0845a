"""What reference.json must say, as pydantic models: it is held against them when it is read."""

from __future__ import annotations

from typing import Annotated

from pydantic import ConfigDict, Field, model_validator

from builder.phases import MAX_PHASES
from builder.schemas import EMPTY, Code, Finite, Name, Open, Short, Table, Text
from builder.shards.schema import NUMERIC_SCORES

Limit = Annotated[list[Finite | None], Field(min_length=2, max_length=2)]
Score = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,63}\z")]
Key = Annotated[str, Field(min_length=1, max_length=200)]


class ProbeEntry(Open):
    """The linear probe: logits = features @ weight.T + bias."""

    codes: Annotated[list[Code], Field(min_length=1, max_length=MAX_PHASES)]
    weight: list[list[Finite]]
    bias: list[Finite]


class CopyEntry(Open):
    """The alarm of copies."""

    threshold: Annotated[float, Field(ge=0, le=1)]


class ReferenceDocument(Open):
    """reference.json; see quality.reference.Reference."""

    model_config = ConfigDict(extra="forbid")

    against: Name
    ssim_size: Annotated[int, Field(ge=1, le=2**16)]
    ssim_stride: Annotated[int, Field(ge=1, le=2**16)]
    panel_seed: int
    panel_size: Annotated[int, Field(ge=1, le=2**20)]
    features: Short
    lpips: Short | None
    panel: dict[Code, list[Key]]
    panel_sha256: Short
    training_sha256: Short
    image_size: Annotated[int, Field(ge=1, le=2**16)] | None = None
    score_version: int
    probe: ProbeEntry | None = None
    copy_: CopyEntry | Annotated[Table, Field(max_length=0)] = Field(default_factory=dict, alias="copy")
    gates: dict[Code, dict[Score, Limit]] = EMPTY
    real: dict[Code, dict[Score, list[Finite]]] = EMPTY
    yardstick: dict[Code, dict[Short, list[dict[Score, Finite | Text | None]]]] = EMPTY
    missing: dict[Score, Text] = EMPTY
    code_versions: dict[Score, Annotated[int, Field(ge=1)]] = EMPTY
    version: Short | None = None

    @model_validator(mode="after")
    def _scores_are_numbers(self) -> ReferenceDocument:
        rows = [row for kinds in self.yardstick.values() for own in kinds.values() for row in own]
        for row in rows:
            for name in NUMERIC_SCORES:
                if isinstance(row.get(name), str):
                    raise ValueError(f"the score '{name}' of a yardstick is a text")
        return self

"""The classes of a dataset. The default is the healing phases I, P, R; a config may declare any other set."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

from builder.errors import BuilderError

MAX_PHASES = 64  # the seed of an image has six bits for its phase (see sampling.seeds)


@dataclass(frozen=True)
class Phase:
    """One class: `code` names it in keys and files, `prompt` is what the generator is trained and asked with."""

    code: str
    name: str
    prompt: str


class ClassTable:
    """The full, ordered table of classes; the position of a phase in it is its label (0-based)."""

    def __init__(self, phases: Sequence[Phase]) -> None:
        self.phases = tuple(phases)
        self._label = {phase.code: label for label, phase in enumerate(self.phases)}
        if not self.phases:
            raise BuilderError("the class table is empty", "declare at least one class under `classes:` in the config")
        if len(self._label) != len(self.phases):
            codes = [phase.code for phase in self.phases]
            raise BuilderError(f"two classes have the same code: {', '.join(codes)}", "give each class its own code")
        if len(self.phases) > MAX_PHASES:
            raise BuilderError(f"{len(self.phases)} classes are declared", f"at most {MAX_PHASES} are possible")
        for code in self.codes:
            if not re.fullmatch(r"[A-Za-z0-9_]{1,16}", code):
                raise BuilderError(
                    f"class code '{code}' is not of [A-Za-z0-9_], at most 16 characters",
                    "rename it: it becomes part of file names",
                )

    @property
    def codes(self) -> tuple[str, ...]:
        return tuple(phase.code for phase in self.phases)

    def label(self, code: str) -> int:
        """The label of a code; BuilderError when the code is not in the table."""
        if code not in self._label:
            raise BuilderError(f"'{code}' is not among the classes", f"the classes are {', '.join(self.codes)}")
        return self._label[code]

    def __getitem__(self, code: str) -> Phase:
        return self.phases[self.label(code)]

    def __len__(self) -> int:
        return len(self.phases)

    def __iter__(self) -> Iterator[Phase]:
        return iter(self.phases)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ClassTable) and self.phases == other.phases

    def __hash__(self) -> int:
        return hash(self.phases)

    def __repr__(self) -> str:
        return f"ClassTable({', '.join(self.codes)})"

    def select(self, selection: str) -> list[str]:
        """The codes that `selection` names, in table order: 'IPR' (one-letter codes), 'I,P,R', or '' for all."""
        if not selection.strip():
            return list(self.codes)
        if any(mark in selection for mark in ", "):
            wanted = [part for part in re.split(r"[,\s]+", selection) if part]
        else:
            wanted = [selection] if selection in self._label else list(selection)
        unknown = [code for code in wanted if code not in self._label]
        if unknown or not wanted:
            there = ", ".join(f"{phase.code} ({phase.name})" for phase in self)
            what = f"unknown phase {', '.join(repr(code) for code in unknown)}" if unknown else "there is no phase"
            raise BuilderError(
                f"{what} in '{selection}'", f"the phases are {there}; write them as {','.join(self.codes)}"
            )
        return [code for code in self.codes if code in wanted]

    def to_json(self) -> list[dict[str, str]]:
        return [asdict(phase) for phase in self.phases]

    @classmethod
    def from_json(cls, items: Sequence[dict[str, str]]) -> ClassTable:
        return cls([Phase(item["code"], item["name"], item["prompt"]) for item in items])

    def require_same(self, other: ClassTable, here: str, there: str) -> None:
        """Refuse two datasets whose labels mean different things."""
        if self.codes != other.codes:
            raise BuilderError(
                f"{here} has the classes {', '.join(self.codes)}, but {there} has {', '.join(other.codes)}",
                "labels would not mean the same; use datasets and checkpoints of one class table",
            )


HEALING_PHASES = ClassTable(
    [
        Phase("I", "inflammatory", "PHASE_I, diabetic foot ulcer, inflammatory phase wound"),
        Phase("P", "proliferative", "PHASE_P, diabetic foot ulcer, proliferative phase wound"),
        Phase("R", "remodeling", "PHASE_R, diabetic foot ulcer, remodeling phase wound"),
    ]
)

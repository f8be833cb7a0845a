"""What a pack made: crops per phase and split, patients, box sizes, and what was left out."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from builder.shards.lineage import SPLITS

QUANTILES = (5, 25, 50, 75, 95)


@dataclass
class PackSummary:
    """Counts of a packed dataset; `str()` is the table that the command prints.

    crops: phase -> split -> crops; patients: split -> patients; phase_patients: phase -> patients; photographs: those
    that gave a crop; box_sides: quantile (%) -> longer side of the boxes, px in the photograph; crop_sides: the same
    of the stored crops; skipped: what was left out or taken otherwise -> how often; notes: what the user should know;
    details: the same with names of files, printed only, because such names must not leave the site.
    """

    dataset: str
    crops: dict[str, dict[str, int]]
    patients: dict[str, int]
    phase_patients: dict[str, int]
    photographs: int
    box_sides: dict[str, float]
    crop_sides: dict[str, float]
    skipped: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    details: list[str] = field(default_factory=list)

    @property
    def count(self) -> int:
        return sum(sum(row.values()) for row in self.crops.values())

    def to_json(self) -> dict[str, Any]:
        """What dataset.json keeps of it: all but the details."""
        return {name: value for name, value in asdict(self).items() if name != "details"}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> PackSummary:
        return cls(**data)

    def __str__(self) -> str:
        header = (
            f"{'phase':<14}" + "".join(f"{split:>8}" for split in SPLITS) + f"{'all':>8}{'share':>8}{'patients':>10}"
        )
        lines = [f"{self.dataset}: {self.count} crops from {self.photographs} photographs", header]
        for phase, row in self.crops.items():
            total = sum(row.values())
            cells = "".join(f"{row[split]:>8}" for split in SPLITS)
            lines.append(
                f"{phase:<14}{cells}{total:>8}{total / max(self.count, 1):>8.1%}{self.phase_patients[phase]:>10}"
            )
        sums = [sum(row[split] for row in self.crops.values()) for split in SPLITS]
        lines.append(
            f"{'all':<14}"
            + "".join(f"{n:>8}" for n in sums)
            + f"{self.count:>8}{'':>8}{sum(self.patients.values()):>10}"
        )
        lines.append(f"{'patients':<14}" + "".join(f"{self.patients[split]:>8}" for split in SPLITS))
        for title, sides in (("longer side of the boxes", self.box_sides), ("side of the crops", self.crop_sides)):
            if sides:
                lines.append(f"{title}, px: " + ", ".join(f"{q} % {side:.0f}" for q, side in sides.items()))
        lines += [f"{what}: {count}" for what, count in self.skipped.items()]
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines + [f"  {detail}" for detail in self.details])


class Tally:
    """Collects the rows of a pack as they are written.

    `model_size` (px) is that of the model that the crops are meant for; None where it isn't known.
    """

    def __init__(self, phases: tuple[str, ...], model_size: int | None = None) -> None:
        self.model_size = model_size
        self.small = 0  # crops whose side in the photograph is under half of it
        self.crops = {phase: dict.fromkeys(SPLITS, 0) for phase in phases}
        self.patients: dict[str, set[str]] = {split: set() for split in SPLITS}
        self.phase_patients: dict[str, set[str]] = {phase: set() for phase in phases}
        self.box_sides: list[float] = []
        self.crop_sides: list[int] = []

    def add(self, row: dict[str, Any], box_side: float | None) -> None:
        """Count a manifest row; `box_side` is the longer side of its box in the photograph, px."""
        self.crops[row["phase"]][row["split"]] += 1
        self.patients[row["split"]].add(row["patient"])
        self.phase_patients[row["phase"]].add(row["patient"])
        self.crop_sides.append(row["width"])
        self.small += self.model_size is not None and 2 * min(row["original_size"]) < self.model_size
        if box_side is not None:
            self.box_sides.append(box_side)

    @property
    def phases(self) -> Counter[str]:
        return Counter({phase: sum(row.values()) for phase, row in self.crops.items()})

    def summary(self, dataset: str, photographs: int, skipped: Counter[str], notes: list[str]) -> PackSummary:
        remarks = [
            f"phase {phase} is not in {split} ({len(self.phase_patients[phase])} patients)"
            for phase, row in self.crops.items()
            for split, crops in row.items()
            if not crops
        ]
        if self.small:
            remarks.append(
                f"{self.small} of {len(self.crop_sides)} crops are smaller than half of the model's "
                f"{self.model_size} px (train.size of the config): training scales them up more than twice"
            )
        return PackSummary(
            dataset=dataset,
            crops=self.crops,
            patients={split: len(patients) for split, patients in self.patients.items()},
            phase_patients={phase: len(patients) for phase, patients in self.phase_patients.items()},
            photographs=photographs,
            box_sides=_quantiles(self.box_sides),
            crop_sides=_quantiles(self.crop_sides),
            skipped={what: count for what, count in skipped.items() if count},
            notes=notes + remarks,
        )


def _quantiles(sides: list[float] | list[int]) -> dict[str, float]:
    return {str(q): float(np.percentile(sides, q)) for q in QUANTILES} if sides else {}

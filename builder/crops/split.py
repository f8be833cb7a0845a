"""Train, validation and test by patient: no patient in two splits, phases spread as evenly as patients allow."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping

from builder.errors import BuilderError
from builder.shards.lineage import SPLITS

SWEEPS = 20  # of improvement; two or three are enough for hundreds of patients


def split_patients(
    crops: Mapping[str, Mapping[str, int]], shares: Mapping[str, float], seed: int = 0
) -> dict[str, str]:
    """Assign each patient to a split.

    Args:
        crops: patient hash -> phase -> number of crops.
        shares: split -> share of the crops wanted; they sum to 1, a split of share 0 stays empty.
        seed: another seed gives another, equally good split.

    Greedy, after iterative stratification (Sechidis et al. 2011), with patients in place of images: the phases with
    the fewest patients come first, their patients in an order drawn from (hash, seed); each goes where its phases are
    still missing, else where the squared deviation from the wanted numbers stays least. Then single patients move as
    long as that lowers the same cost. The result depends on nothing but the arguments.
    """
    wanted = {split: shares.get(split, 0.0) for split in SPLITS if shares.get(split, 0.0) > 0}
    if any(share < 0 for share in shares.values()) or not math.isclose(sum(wanted.values()), 1.0, abs_tol=1e-6):
        described = ", ".join(f"{split} {share:g}" for split, share in shares.items())
        raise BuilderError(f"the split shares ({described}) don't sum to 1", "mend crops.train, crops.val, crops.test")
    state = _State(crops, wanted)
    order = sorted(crops, key=lambda patient: hashlib.sha256(f"{seed}:{patient}".encode()).digest())
    phases = sorted(state.totals, key=lambda phase: (sum(1 for patient in order if crops[patient].get(phase)), phase))
    for phase in phases:
        for patient in order:
            if crops[patient].get(phase) and patient not in state.split_of:
                state.assign(patient, min(wanted, key=lambda split: state.cost(patient, split)))
    for _ in range(SWEEPS):
        if not state.improve(order):
            break
    return {patient: state.split_of[patient] for patient in sorted(crops)}


class _State:
    """How many crops and patients of each phase every split has so far, and how many it should have."""

    def __init__(self, crops: Mapping[str, Mapping[str, int]], wanted: Mapping[str, float]) -> None:
        self.crops = crops
        self.wanted = wanted
        self.split_of: dict[str, str] = {}
        self.totals: dict[str, int] = {}
        for counts in crops.values():
            for phase, count in counts.items():
                self.totals[phase] = self.totals.get(phase, 0) + count
        self.have = {split: dict.fromkeys(self.totals, 0) for split in wanted}
        self.holders = {split: dict.fromkeys(self.totals, 0) for split in wanted}

    def assign(self, patient: str, split: str) -> None:
        self._count(patient, split, 1)
        self.split_of[patient] = split

    def cost(self, patient: str, split: str) -> tuple[int, float]:
        """Lower is better: first the phases of the patient that the split has yet to see, then the growth of the
        squared deviation sum_phase ((have - wanted) / total)^2."""
        growth, unseen = 0.0, 0
        for phase, count in self.crops[patient].items():
            if count == 0:
                continue
            total = self.totals[phase]
            before = self.have[split][phase] / total - self.wanted[split]
            growth += (before + count / total) ** 2 - before**2
            unseen += self.holders[split][phase] == 0
        return -unseen, growth

    def improve(self, order: list[str]) -> bool:
        """Move every patient who would cost less in another split; True if one was moved."""
        moved = False
        for patient in order:
            here = self.split_of[patient]
            self._count(patient, here, -1)
            costs = {split: self.cost(patient, split) for split in self.wanted}
            best = min(costs, key=lambda split: costs[split])
            if costs[best] >= (costs[here][0], costs[here][1] - 1e-12):  # rounding must not send them to and fro
                best = here
            self.assign(patient, best)
            moved |= best != here
        return moved

    def _count(self, patient: str, split: str, sign: int) -> None:
        for phase, count in self.crops[patient].items():
            self.have[split][phase] += sign * count
            self.holders[split][phase] += sign * (count > 0)

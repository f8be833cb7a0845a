"""What stands twice in an input: identical boxes, and photographs that are the same file under several names."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from builder.crops.problems import Problems

if TYPE_CHECKING:
    from builder.crops.plan import Plan

SHOWN = 5  # pairs that are written out


def identical_files(paths: dict[str, Path]) -> list[list[str]]:
    """Groups of names whose files hold the same bytes, each sorted; names of files that nothing equals are in none.

    Only files of one length are read.
    """
    by_length: dict[int, list[str]] = defaultdict(list)
    for name, path in paths.items():
        by_length[path.stat().st_size].append(name)
    groups: list[list[str]] = []
    for names in by_length.values():
        if len(names) > 1:
            groups += _same((name, paths[name]) for name in names)
    return sorted(groups)


def _same(files: Iterable[tuple[str, Path]]) -> list[list[str]]:
    by_content: dict[bytes, list[str]] = defaultdict(list)
    for name, path in files:
        with path.open("rb") as file:
            by_content[hashlib.file_digest(file, "sha256").digest()].append(name)
    return [sorted(names) for names in by_content.values() if len(names) > 1]


def drop_repeated_boxes(plan: Plan, copies: Sequence[Sequence[str]], problems: Problems) -> None:
    """Take a box that stands twice on one photograph once, and count it; a box with two phases is noted as a mistake.

    A box on a copy of a photograph is compared with the boxes on the photograph, but stays.
    """
    first = {name: group[0] for group in copies for name in group}
    seen: dict[tuple[str, object], tuple[str, str]] = {}  # (photograph, box) -> phase, name
    repeated = []
    for name, crops in plan.crops.items():
        kept, own = [], set()
        for crop in crops:
            phase, other = seen.setdefault((first.get(name, name), crop.box), (crop.phase, name))
            if phase != crop.phase:
                box = "whole" if crop.box is None else "({:g}, {:g}, {:g}, {:g})".format(*crop.box)
                where = str(plan.photographs.path(name)) + (f", the same file as {other}," if other != name else "")
                problems.add(
                    f"{where} has the labels {phase} and {crop.phase} for one box ({box})",
                    "keep one of them",
                )
            elif crop.box in own:
                repeated.append(name)
                continue
            own.add(crop.box)
            kept.append(crop)
        plan.crops[name] = kept
    if repeated:
        plan.skipped["identical boxes, taken once"] += len(repeated)
        plan.details.append(f"identical boxes, taken once: on {_some(sorted(set(repeated)))}")


def join_copies(
    plan: Plan, copies: Sequence[Sequence[str]], stand_ins: set[str], group_by: str | None, problems: Problems
) -> None:
    """Give the same photograph under several names one patient, so that it is never in two splits.

    Args:
        plan: its patients are changed.
        copies: groups of names that are the same file.
        stand_ins: names whose patient is unknown.
        group_by: what stands in for unknown patients.
        problems: copies that the tables, or a pattern, give to several patients are noted there.
    """
    groups = [packed for group in copies if len(packed := [name for name in group if name in plan.patients]) > 1]
    for group in groups:
        told = [name for name in group if name not in stand_ins or group_by != "photograph"]
        if len({plan.patients[name].spelling for name in told}) > 1:
            listed = ", ".join(sorted({plan.patients[name].text for name in told}))
            problems.add(
                f"{' and '.join(group)} are the same photograph (equal bytes), but of several patients: {listed}",
                "keep one of them, with its right patient: a photograph in two splits would leak",
            )
            continue
        for name in group:
            plan.patients[name] = plan.patients[(told or group)[0]]
    if groups:
        plan.skipped["photographs that are another one's copy (equal bytes), kept in its split"] = sum(
            len(group) - 1 for group in groups
        )
        plan.details.append(f"copies (equal bytes): {_some([' = '.join(group) for group in groups])}")


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")

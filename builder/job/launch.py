"""Which rank of how many this process is, when a launcher started it: torchrun, accelerate launch, srun, a SLURM array.

Nothing but environment variables is read: the ranks of a job never speak with each other, and may start hours apart.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from builder.errors import BuilderError


@dataclass(frozen=True)
class Place:
    """Rank `rank` of `world`; `local` counts the ranks of one machine, for the choice of a device."""

    rank: int = 0
    world: int = 1
    local: int = 0
    launcher: str = "no launcher"


def place_of(environ: Mapping[str, str] = os.environ) -> Place:
    """This process's place; rank 0 of 1 without a launcher.

    In a SLURM array each task may hold several processes (torchrun or srun): their ranks lie within the task's.
    BuilderError for variables that are not numbers, or a rank beyond the world.
    """
    inner = _torchrun(environ) or _srun(environ) or Place()
    task, tasks = _array(environ)
    names = [name for name, there in (("SLURM array", tasks > 1), (inner.launcher, inner.world > 1)) if there]
    place = Place(
        rank=task * inner.world + inner.rank,
        world=tasks * inner.world,
        local=inner.local,
        launcher=" + ".join(names) or inner.launcher,
    )
    if not 0 <= place.rank < place.world:
        raise BuilderError(
            f"the launcher says rank {place.rank} of {place.world}", "unset its variables, or add --engine local"
        )
    return place


def _torchrun(environ: Mapping[str, str]) -> Place | None:
    """torchrun and accelerate launch."""
    if not {"RANK", "WORLD_SIZE"} <= environ.keys():
        return None
    return Place(
        _number(environ, "RANK"), _number(environ, "WORLD_SIZE"), _number(environ, "LOCAL_RANK", 0), "torchrun"
    )


def _srun(environ: Mapping[str, str]) -> Place | None:
    if not {"SLURM_PROCID", "SLURM_NTASKS"} <= environ.keys():
        return None
    tasks = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environ else "SLURM_NTASKS"
    return Place(
        _number(environ, "SLURM_PROCID"), _number(environ, tasks), _number(environ, "SLURM_LOCALID", 0), "srun"
    )


def _array(environ: Mapping[str, str]) -> tuple[int, int]:
    """Number of this task of a SLURM array, and of how many. A list of numbers with gaps wraps around."""
    if not {"SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT"} <= environ.keys():
        return 0, 1
    tasks = max(1, _number(environ, "SLURM_ARRAY_TASK_COUNT"))
    behind = _number(environ, "SLURM_ARRAY_TASK_ID") - _number(environ, "SLURM_ARRAY_TASK_MIN", 0)
    return behind // max(1, _number(environ, "SLURM_ARRAY_TASK_STEP", 1)) % tasks, tasks


def _number(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    value = environ.get(name, "")
    if not value and default is not None:
        return default
    try:
        return int(value)
    except ValueError:
        raise BuilderError(f"{name} is '{value}', not a number", "the launcher sets it: start the job by it") from None

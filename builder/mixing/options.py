"""What a loader's arguments must be; a mistake is one message."""

from __future__ import annotations

import operator
import os
from typing import Any

import torch

from builder.errors import BuilderError, did_you_mean


def one_of(value: str, known: tuple[str, ...], name: str) -> None:
    """BuilderError unless `value` is among `known`."""
    if value not in known:
        raise BuilderError(f"{name} is {value!r}", did_you_mean(str(value), known))


def whole(value: Any, name: str, least: int = 1) -> int:
    """A whole number (numpy's too) of at least `least`, as int: numpy's would make other keys, hence another order."""
    try:
        number = operator.index(value)
    except TypeError:
        number = least - 1
    if number < least or isinstance(value, bool):
        raise BuilderError(f"{name} is {value!r}", f"it must be a whole number of {least} or more")
    return number


def group_place() -> tuple[int, int] | None:
    """Rank and world of torch's process group, where there is one."""
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return None


def place(rank: int | None, world: int | None) -> tuple[int, int]:
    """Rank and world as given, of the process group, or as torchrun and accelerate say before there is a group."""
    if rank is None and world is None:
        if group := group_place():
            return group
        if int(os.environ.get("WORLD_SIZE", 1)) > 1 and "RANK" not in os.environ:
            raise BuilderError(
                "the environment has WORLD_SIZE, but no RANK",
                "make the loader when the process group is there (Lightning: in train_dataloader()), or pass rank= and "
                "world=",
            )
        rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if rank is None or world is None:
        raise BuilderError(f"rank is {rank} and world is {world}", "pass both, or neither")
    rank, world = whole(rank, "rank", 0), whole(world, "world")
    if rank >= world:
        raise BuilderError(f"rank {rank} of a world of {world}", "ranks count from 0 to world - 1")
    return rank, world

"""Which units are still to make: read off the committed manifests, so a killed run needs no other memory."""

from __future__ import annotations

from builder.errors import BuilderError
from builder.job.plan import Unit
from builder.shards.dataset import Dataset
from builder.shards.writer import manifest_path


def committed_units(dataset: Dataset) -> list[Unit]:
    """The units whose manifests are there, in order, with the range of the plan that each holds.

    BuilderError for a manifest that cannot be read or that no batch job wrote.
    """
    units = []
    for number in dataset.shard_numbers():
        metadata = dataset.shard_metadata(number)
        if not {"start", "stop"} <= metadata.keys():
            raise BuilderError(
                f"{manifest_path(dataset.name, number)} was not written by a batch job",
                "move it away, or use another --name",
            )
        units.append(Unit(number, int(metadata["start"]), int(metadata["stop"])))
    return units


def all_units(committed: list[Unit], count: int, images_per_shard: int) -> list[Unit]:
    """All units, committed or not, that cover the first `count` positions of the plan without a gap.

    Shards hold `images_per_shard` images each; only the last one of a run may hold fewer. A committed tail stays as
    it is and the extension starts a new shard behind it; a tail that was never committed is planned anew.
    Nothing beyond the last committed shard is given up: gaps below it are filled too, by as many units as are missing.
    """
    done = {unit.number: unit for unit in committed}
    left = sorted(committed, key=lambda unit: -unit.number)
    end = max([count, *(unit.stop for unit in committed)])
    units: list[Unit] = []
    start = 0
    while start < end:
        number = len(units)
        while left and left[-1].number < number:
            left.pop()
        bound = left[-1].start - (left[-1].number - number - 1) if left else end  # each missing unit has an image
        unit = done.get(number) or Unit(number, start, min(start + images_per_shard, max(bound, start + 1)))
        if unit.start != start:
            raise BuilderError(
                f"shard {number} begins at image {unit.start} of the plan, where {start} was due",
                "jobs of different COUNT have written here at once: remove the later shards, or start over",
            )
        units.append(unit)
        start = unit.stop
    return units

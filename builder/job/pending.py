"""Which units are still to make: read off the committed manifests, so a killed run needs no other memory."""

from __future__ import annotations

from builder.errors import BuilderError
from builder.job.plan import Unit
from builder.shards.dataset import Dataset
from builder.shards.writer import manifest_path


def committed_units(dataset: Dataset) -> list[Unit]:
    """The units whose manifests are there, in order, with the range of the plan that each holds.

    Only a few manifests are read, whatever their number. No unit holds more than `images_per_shard` images, so where
    two shards are as far apart as full units between them need, all of those are full; else the middle one is read.
    BuilderError for a manifest, of those, that cannot be read or that no batch job wrote.
    """
    numbers = dataset.shard_numbers()
    full = dataset.info.get("fingerprint_keys", {}).get("images_per_shard") if numbers and dataset.exists() else None
    return [_read_unit(dataset, number) for number in numbers] if full is None else _bisected(dataset, numbers, full)


def _bisected(dataset: Dataset, numbers: list[int], full: int) -> list[Unit]:
    found: dict[int, Unit] = {}

    def unit(place: int) -> Unit:
        number = numbers[place]
        if number not in found:
            found[number] = _read_unit(dataset, number)
        return found[number]

    def between(low: int, high: int) -> None:
        first, last = unit(low), unit(high)
        if high - low < 2:
            return
        if last.start - first.start == full * (last.number - first.number):
            for number in numbers[low + 1 : high]:
                start = first.start + full * (number - first.number)
                found[number] = Unit(number, start, start + full)
            return
        middle = (low + high) // 2
        between(low, middle)
        between(middle, high)

    between(0, len(numbers) - 1)
    return [found[number] for number in numbers]


def _read_unit(dataset: Dataset, number: int) -> Unit:
    metadata = dataset.shard_metadata(number)
    if not {"start", "stop"} <= metadata.keys():
        raise BuilderError(
            f"{manifest_path(dataset.name, number)} was not written by a batch job",
            "move it away, or use another --name",
        )
    return Unit(number, int(metadata["start"]), int(metadata["stop"]))


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

"""Ways to damage a file, and whether what is read of it afterwards is still the same."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path

FLIPS = 4  # single flipped bits a file, at random places
IDLE = (".lock", ".png", ".jsonl", ".log")  # nothing is read from these but by people

Damage = tuple[str, Callable[[], None]]


def damages(path: Path, others: list[Path], seed: int, flips: int = FLIPS) -> Iterator[Damage]:
    """Name and doing of each damage to a file. others: files of its kind, one of which takes its place."""
    chance = random.Random(f"{seed} {path.name}")
    data = path.read_bytes()
    for number in range(flips if data else 0):
        # The end of a file is small and means much (a footer, a directory), so every second flip falls there.
        low = max(0, len(data) - 400) if number % 2 else 0
        place, bit = chance.randrange(low, len(data)), chance.randrange(8)
        yield f"flip bit {bit} of byte {place}", lambda place=place, bit=bit: flip(path, place, bit)
    if data:
        cut = chance.randrange(len(data))
        yield f"truncate to {cut}", lambda: path.write_bytes(data[:cut])
        yield "zero", lambda: path.write_bytes(bytes(len(data)))
        yield "empty", lambda: path.write_bytes(b"")
    yield "delete", path.unlink
    if others:
        other = chance.choice(others)
        yield f"swap with {other.name}", lambda: path.write_bytes(other.read_bytes())


def flip(path: Path, place: int, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1 << bit
    path.write_bytes(bytes(data))


def reads_the_same(path: Path, before: bytes) -> bool:
    """The rule of what may pass unnoticed: what is read of the file is the same as before.

    That is so where the bytes are the same, where the data of a JSON document are (white space was hit), and where a
    file that only saves work (a cache, the index, a resume state beside the newest) is gone: then the work is done
    again, with the same result.
    """
    if not path.exists():
        return path.suffix == ".npy" or path.name == "index.parquet" or _is_spare_state(path)
    now = path.read_bytes()
    if now == before:
        return True
    if path.suffix == ".json" or path.name.endswith(".json"):
        try:
            return bool(json.loads(now) == json.loads(before))
        except ValueError:
            return False
    return False


def _is_spare_state(path: Path) -> bool:
    """A state from which training does not go on, or of the stage before the last."""
    later = [other for other in path.parent.glob("unet-*.pt") if other.name > path.name]
    return path.suffix == ".pt" and (bool(later) or not path.name.startswith("unet-"))


def files_of(root: Path) -> list[Path]:
    """All files under a folder that something is read from: not what workers of a job told each other (job/)."""
    return sorted(
        path for path in root.rglob("*") if path.is_file() and path.suffix not in IDLE and path.name not in IDLE
    )


def of_one_kind(path: Path, files: list[Path]) -> list[Path]:
    """The other files of the same kind: same suffix, other bytes; of JSON the same name."""
    return [
        other
        for other in files
        if other != path
        and other.suffix == path.suffix
        and (path.suffix != ".json" or other.name == path.name)
        and other.read_bytes() != path.read_bytes()
    ]

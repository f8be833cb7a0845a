"""Read a file of torch.save without running any of it: an unrestricted pickle is a program.

torch's restricted reader builds containers, numbers, text and tensors. On top of those, four names of numpy are known,
and stand for classes of this module instead of numpy's: a scalar becomes a plain number, and an array (a random state)
is left out. So the file reaches no code of numpy either. Any other name is refused.
"""

from __future__ import annotations

import pickle
import re
import struct
from pathlib import Path
from typing import Any

import torch

from builder.errors import BuilderError

FORMATS = {
    "f8": "d", "f4": "f", "f2": "e", "i8": "q", "i4": "i", "i2": "h", "i1": "b",
    "u8": "Q", "u4": "I", "u2": "H", "u1": "B", "b1": "?",
}  # fmt: skip


class Dtype:
    """A numpy.dtype as it was pickled: its code ('f8'), then its byte order."""

    def __init__(self, code: str, *_: object) -> None:
        self.code = code
        self.order = "<"

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = ">" if state[1] == ">" else "<"


class LeftOut:
    """Stands for a numpy array, of which nothing is kept."""

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


def scalar(dtype: Dtype, data: bytes) -> float | int | bool:
    """A numpy scalar as the plain number it is."""
    if dtype.code not in FORMATS:
        raise pickle.UnpicklingError(f"a numpy scalar of type {dtype.code}")
    value: float | int | bool = struct.unpack(dtype.order + FORMATS[dtype.code], data)[0]
    return value


ALLOWED: list[Any] = [
    (Dtype, "numpy.dtype"),
    *((scalar, f"{module}.scalar") for module in ("numpy.core.multiarray", "numpy._core.multiarray")),
    *((LeftOut, f"{module}._reconstruct") for module in ("numpy.core.multiarray", "numpy._core.multiarray")),
    (LeftOut, "numpy.ndarray"),
]


def read_pickled(path: Path) -> Any:
    """What torch.save wrote to `path`: plain data and memory-mapped CPU tensors; nothing in it is executed.

    BuilderError for a missing, truncated or foreign file, and for one that asks for any other class or function, by
    its name.
    """
    if not path.is_file():
        raise BuilderError(f"there is no file {path}", "check the path")
    others = torch.serialization.get_safe_globals()  # what other libraries allow is not allowed here
    torch.serialization.clear_safe_globals()
    try:
        with torch.serialization.safe_globals(ALLOWED):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a broken pickle may raise anything
        forbidden = re.search(r"GLOBAL (\S+)", str(error))
        if forbidden:
            raise BuilderError(
                f"{path} asks for {forbidden.group(1)}, which a file of weights has no need of; nothing was executed",
                "don't open it with other programs; if its maker is known, ask for plain data and tensors only",
            ) from None
        first = next(iter(str(error).strip().splitlines()), repr(error))
        if "mmap can only be used" in first:
            first = "it is not of the format that torch.save writes since 1.6"
        raise BuilderError(
            f"{path} cannot be read ({first}); nothing was executed",
            "copy the file again: it is cut short, damaged, or not a checkpoint of the old system",
        ) from None
    finally:
        torch.serialization.add_safe_globals(others)

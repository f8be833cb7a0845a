"""Nothing is loaded that doesn't fit exactly: what is missing, left over or of another shape is named."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from builder.errors import BuilderError
from builder.models.tensors import listed

Shapes = Mapping[str, tuple[int, ...]]


def require_exact(where: str, expected: Shapes, given: Shapes, remedy: str) -> None:
    """BuilderError, naming the first few weights, unless `given` has just the names and shapes of `expected`."""
    both = sorted(expected.keys() & given.keys())
    reshaped = [f"{key} {given[key]} for {expected[key]}" for key in both if given[key] != expected[key]]
    refuse_any(where, reshaped, "of another shape", remedy)
    refuse_any(where, sorted(expected.keys() - given.keys()), "missing", remedy)
    refuse_any(where, sorted(given.keys() - expected.keys()), "left over", remedy)


def refuse_any(where: str, keys: Sequence[str], problem: str, remedy: str) -> None:
    """BuilderError when there are such weights."""
    if keys:
        raise BuilderError(f"{where}: {len(keys)} weights are {problem}: {listed(list(keys))}", remedy)

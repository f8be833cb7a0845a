"""The published models' layouts, every layer of them, at a fraction of their width."""

from __future__ import annotations

import copy
import math
from typing import Any

WIDTHS = {"sdxl": 32, "sd15": 8}  # how much narrower: the largest fractions that leave whole heads


def narrow(architecture: dict[str, Any], factor: int, merges: int = 1500) -> dict[str, Any]:
    """The same layers, blocks and heads, `factor` times narrower, with a small vocabulary."""
    reduced = copy.deepcopy(architecture) | {"tokenizer": {"merges": merges}}
    for name, part in reduced.items():
        for key in ("block_out_channels", "hidden_size", "intermediate_size", "projection_dim"):
            if key in part:
                part[key] = _divided(part[key], factor)
        if name in ("vae", "unet"):
            part["norm_num_groups"] = math.gcd(part.get("norm_num_groups", 32), *part["block_out_channels"])
    return reduced


def _divided(value: Any, factor: int) -> Any:
    if isinstance(value, list):
        return [_divided(one, factor) for one in value]
    assert value % factor == 0, (value, factor)
    return value // factor

"""Weights in safetensors files, one tensor at a time: a model of 10 GB passes through a fraction of that memory."""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from builder.display import printable
from builder.documents import MAX_BYTES, parse_json
from builder.errors import BuilderError
from builder.files import read_file

NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,254}")  # the name of one file of a model
NAMED_KEYS = 10  # of a mismatch, in the error

# Of each tensor its dtype and shape: what a file's header says before the first tensor is read.
Layout = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


class StoredTensors:
    """The tensors of a model's folder, read when asked for: one safetensors file, or several with their index."""

    def __init__(self, folder: Path, stem: str) -> None:
        """Opens FOLDER/STEM.safetensors or what FOLDER/STEM.safetensors.index.json lists; BuilderError without."""
        from safetensors import SafetensorError, safe_open

        single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
        self._files: dict[str, Any] = {}  # name of a tensor -> the open file that holds it
        try:
            if single.is_file():
                files = [single]
            elif index.is_file():
                files = [folder / name for name in require_parts_inside(index)]
            else:
                raise BuilderError(f"{folder} has no {single.name}", "copy the whole checkpoint folder")
            for file in files:
                opened = safe_open(file, framework="pt")
                self._files |= dict.fromkeys(opened.keys(), opened)
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise BuilderError(f"the weights in {folder} cannot be read: {error}", "copy the folder again") from None

    def __iter__(self) -> Any:
        return iter(sorted(self._files))

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._files[name].get_tensor(name)
        return tensor

    @property
    def layout(self) -> Layout:
        slices = {name: file.get_slice(name) for name, file in self._files.items()}
        kinds = {text: kind for kind, text in NAMES.items()}
        for name, part in slices.items():
            if part.get_dtype() not in kinds:
                raise BuilderError(f"the weight {name} is stored as {part.get_dtype()}", "store it in floating point")
        return {name: (kinds[part.get_dtype()], tuple(part.get_shape())) for name, part in slices.items()}


def write_tensors(path: Path, layout: Layout, tensor: Callable[[str], Tensor]) -> None:
    """Write a safetensors file of these tensors, asking `tensor(name)` for each as its turn comes.

    BuilderError for a tensor that isn't finite: weights of a run that diverged make black images.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (kind, shape) in layout.items():
        begin, end = end, end + kind.itemsize * torch.Size(shape).numel()
        header[name] = {"dtype": NAMES[kind], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begins aligned
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, (kind, shape) in layout.items():
            values = tensor(name).detach()
            if not bool(torch.isfinite(values).all()):
                raise BuilderError(f"the weight {name} has values that are not finite", "take an earlier checkpoint")
            values = values.to(kind).expand(shape).contiguous()
            file.write(values.reshape(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())


def listed(names: list[str]) -> str:
    """The first ten of many names, and how many more there are."""
    more = f" and {len(names) - NAMED_KEYS} more" if len(names) > NAMED_KEYS else ""
    return ", ".join(names[:NAMED_KEYS]) + more


def require_parts_inside(index: Path) -> list[str]:
    """The files that a *.safetensors.index.json lists, sorted; none where there is no such index.

    BuilderError for one that is not a plain name: it would be read from outside the folder.
    """
    if not index.is_file():
        return []
    remedy = "copy the whole checkpoint folder again"
    data = parse_json(read_file(index, MAX_BYTES + 1), str(index), remedy=remedy)
    listed = data.get("weight_map") if isinstance(data, dict) else None
    if not isinstance(listed, dict) or not all(isinstance(name, str) for name in listed.values()):
        raise BuilderError(f"{index} has no 'weight_map' of names", remedy)
    for name in listed.values():
        if not PART.fullmatch(name):
            raise BuilderError(f"{index} names {printable(name)}, which is no file of its folder", remedy)
    return sorted(set(listed.values()))

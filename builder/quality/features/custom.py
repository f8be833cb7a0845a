"""One's own feature extractor: `module:callable`, importable from the working directory or PYTHONPATH.

`callable()` takes nothing and gives an nn.Module, or a function, that maps images float32 [N, 3, H, W], RGB in [0, 1],
to features [N, D]. An attribute `input_size` (px) on it has images brought to that size first; without one it sees
them at their own size. An nn.Module is put into evaluation mode and onto the device; its weights are hashed, and the
source file of the callable in either case, so that an edited one does not find the features of the old one.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from builder.errors import BuilderError
from builder.quality.features.extractor import BICUBIC, NATIVE, Extractor, normalised, weights_sha256

PROBE_SIZE = 64  # px of the grey image that tells the dimension, where no input_size is given


def custom(spec: str, device: str = "cpu") -> Extractor:
    """The extractor `module:callable`. BuilderError when it cannot be imported, or gives no features."""
    make = _imported(spec)
    try:
        network = make()
    except Exception as error:  # whatever one's own code raises
        raise BuilderError(
            f"'{spec}' fails: {error!r}", "call it in a Python shell; it must take no argument"
        ) from error
    if not callable(network):
        raise BuilderError(
            f"'{spec}' gives a {type(network).__name__}", "it must give an nn.Module, or a function of images"
        )
    if isinstance(network, nn.Module):
        network = network.eval().requires_grad_(False).to(device)
    size = getattr(network, "input_size", None)
    prepare = normalised(size)
    side = size or PROBE_SIZE
    grey = torch.full((1, 3, side, side), 128, dtype=torch.uint8, device=device)
    try:
        with torch.inference_mode():
            features = network(prepare(grey))
    except Exception as error:
        raise BuilderError(
            f"'{spec}' fails for an image of {side} px: {error!r}",
            "it must take float32 [N, 3, H, W] in [0, 1]; set its attribute input_size if it needs one size",
        ) from error
    if not isinstance(features, torch.Tensor) or features.ndim != 2 or len(features) != 1:
        got = list(features.shape) if isinstance(features, torch.Tensor) else type(features).__name__
        raise BuilderError(f"'{spec}' gives {got} for one image", "it must give a tensor [N, D]")
    return Extractor(
        name=spec.replace(":", "."),
        network=network,
        prepare=prepare,
        dimension=features.shape[1],
        input_range="RGB in [0, 1]",
        size=size,
        resize=BICUBIC if size else NATIVE,
        weights_sha256=_sha256(make, network),
        device=device,
    )


def _imported(spec: str) -> Any:
    module, _, name = spec.partition(":")
    remedy = "write module:callable; the module must be importable from the working directory or PYTHONPATH"
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise BuilderError(f"the feature extractor '{spec}' cannot be imported: {error}", remedy) from None
    if not callable(found):
        raise BuilderError(f"'{spec}' is no callable", remedy)
    return found


def _sha256(make: Any, network: Any) -> str:
    digest = hashlib.sha256()
    try:
        digest.update(Path(inspect.getfile(make)).read_bytes())
    except TypeError:  # a built-in or an object has no source; its repr would bear an address
        digest.update(f"{type(make).__module__}.{type(make).__qualname__}".encode())
    if isinstance(network, nn.Module):
        digest.update(weights_sha256(network).encode())
    return digest.hexdigest()

"""The families of generators: how one is built, put together, asked with a prompt, and conditioned."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from builder.errors import BuilderError, did_you_mean
from builder.models import architectures, sd15, sdxl
from builder.models.building import Architecture, Pipeline

Embedding = tuple[torch.Tensor, torch.Tensor]  # token states [77, width], pooled embedding [width, 0 where none]
Pixels = tuple[int, int]  # height and width, or top and left


@dataclass(frozen=True)
class Family:
    """What differs between two families of latent diffusion models, and nothing else."""

    name: str
    pipeline_class: str  # of diffusers; model_index.json names it
    weights: Mapping[str, tuple[Any, str]]  # part -> (class, stem of its weight file)
    tokenizers: tuple[str, ...]
    architecture: Architecture  # of the published model
    added: str | None  # the denoiser's addition_embed_type: what `conditioning` gives it
    size: int  # px of the images that the published model was trained at
    build: Callable[[Architecture, int, int], Pipeline]  # (architecture, size, seed), random weights
    assemble: Callable[[Mapping[str, Any], Mapping[str, Any]], Pipeline]  # (parts, settings of model_index.json)
    encode: Callable[[Pipeline, str], Embedding]
    unconditional: Callable[[Pipeline], Embedding]
    # (pooled [N, P], original sizes, offsets, target size) -> added_cond_kwargs of the denoiser
    conditioning: Callable[[torch.Tensor, Sequence[Pixels], Sequence[Pixels], Pixels], dict[str, torch.Tensor]]


FAMILIES: dict[str, Family] = {
    "sdxl": Family(
        "sdxl", "StableDiffusionXLPipeline", sdxl.WEIGHTS, sdxl.TOKENIZERS, architectures.SDXL, "text_time", 1024,
        sdxl.build, sdxl.assemble, sdxl.encode, sdxl.unconditional, sdxl.conditioning,
    ),
    "sd15": Family(
        "sd15", "StableDiffusionPipeline", sd15.WEIGHTS, sd15.TOKENIZERS, architectures.SD15, None, 512,
        sd15.build, sd15.assemble, sd15.encode, sd15.unconditional, sd15.conditioning,
    ),
}  # fmt: skip


def family_named(name: str) -> Family:
    """The family of this name; BuilderError for one that doesn't exist."""
    if name not in FAMILIES:
        raise BuilderError(f"unknown model family '{name}' (model.family)", did_you_mean(name, FAMILIES))
    return FAMILIES[name]


def family_of(pipeline: Pipeline | str) -> Family:
    """The family of a pipeline, or of the pipeline class that a model_index.json names."""
    name = pipeline if isinstance(pipeline, str) else type(pipeline).__name__
    for found in FAMILIES.values():
        if found.pipeline_class == name:
            return found
    known = ", ".join(f"{found.pipeline_class} ({found.name})" for found in FAMILIES.values())
    raise BuilderError(f"{name} is a pipeline of no known family", f"known: {known}")


def with_parts(pipeline: Pipeline, **parts: Any) -> Pipeline:
    """A pipeline like this one with some parts exchanged, e.g. the averaged denoiser or weights in half precision."""
    found = family_of(pipeline)
    kept = {name: pipeline.components[name] for name in (*found.weights, *found.tokenizers, "scheduler")}
    return found.assemble({**kept, **parts}, pipeline.config)

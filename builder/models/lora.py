"""Low-rank adapters of the denoiser (Hu 2021), by peft, in the file that diffusers reads and writes.

A linear layer W becomes W + alpha / rank * B A with A [rank, in] and B [out, rank]; only A and B are trained. The
file, pytorch_lora_weights.safetensors, holds them as `unet.<layer>.lora_A.weight` and `.lora_B.weight`, and in its
metadata rank, alpha and target layers; any diffusers pipeline takes it by `load_lora_weights`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from builder.errors import BuilderError
from builder.models.strict import require_exact

ADAPTER = "pytorch_lora_weights.safetensors"
METADATA = "lora_adapter_metadata"  # diffusers' key in the file's metadata: a JSON of peft's LoraConfig
PREFIX = "unet."

# Layers that are adapted, by the end of their names; a group may be given instead of its layers.
TARGETS: dict[str, tuple[str, ...]] = {
    "attention": ("to_q", "to_k", "to_v", "to_out.0"),
    "feed-forward": ("ff.net.0.proj", "ff.net.2"),
    "projection": ("proj_in", "proj_out"),
}


def add_lora(
    unet: Any,
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    targets: Sequence[str] = ("attention",),
    *,
    ranks: Mapping[str, int] | None = None,
    alphas: Mapping[str, float] | None = None,
    seed: int = 0,
) -> list[nn.Parameter]:
    """Freeze the denoiser, put an adapter on its target layers, and return the adapter's parameters, in order.

    targets: groups of TARGETS, or ends of layers' names. ranks, alphas: of single layers, by full name, where they
    differ. Drawn from `seed` (A normal, B zero), so that at first nothing changes; the adapter has the layers' dtype.
    Raises BuilderError for targets that the denoiser doesn't have, and impossible numbers.
    """
    from peft import LoraConfig

    if rank < 1 or alpha <= 0 or not 0 <= dropout < 1:
        raise BuilderError(
            f"a LoRA of rank {rank}, alpha {alpha}, dropout {dropout} cannot be",
            "rank is at least 1, alpha above 0, dropout from 0 to below 1",
        )
    if adapted(unet):
        raise BuilderError("the denoiser has a LoRA already", "fuse it first")
    layers = expand(targets)
    _require_layers(unet, layers)
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # peft says int, and computes with any number
        lora_dropout=dropout,
        target_modules=layers,
        init_lora_weights="gaussian",
        rank_pattern=dict(ranks or {}),
        alpha_pattern=dict(alphas or {}),
    )
    unet.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet.add_adapter(config)
    return [parameter for parameter in unet.parameters() if parameter.requires_grad]


def expand(targets: Sequence[str]) -> list[str]:
    """The ends of layers' names that groups and names stand for, each once, in order."""
    return list(dict.fromkeys(layer for target in targets for layer in TARGETS.get(target, (target,))))


def adapted(unet: Any) -> bool:
    """Whether the denoiser carries an adapter that is not fused."""
    return bool(getattr(unet, "peft_config", None))


def lora_state(unet: Any) -> dict[str, torch.Tensor]:
    """The adapter's weights by their names in diffusers' file; BuilderError where there is no adapter."""
    from peft import get_peft_model_state_dict

    _config(unet)
    return {PREFIX + name: weight for name, weight in get_peft_model_state_dict(unet).items()}


def load_lora_state(unet: Any, state: Mapping[str, torch.Tensor], where: str) -> None:
    """Copy weights into the adapter that is there; BuilderError unless names and shapes are exactly its own."""
    own = lora_state(unet)
    require_exact(
        where, _shapes(own), _shapes(state), "the adapter is for another model, or of another rank or other layers"
    )
    with torch.no_grad():
        for name, weight in own.items():
            weight.copy_(state[name])


def save_lora(unet: Any, folder: Path) -> Path:
    """Write the adapter to FOLDER/pytorch_lora_weights.safetensors, in the dtype it has, and return the file."""
    from safetensors.torch import save_file

    config = {f"{PREFIX}{key}": _plain(value) for key, value in _config(unet).to_dict().items()}
    metadata = {"format": "pt", METADATA: json.dumps(config, sort_keys=True)}
    weights = {name: weight.detach().cpu().contiguous() for name, weight in lora_state(unet).items()}
    save_file(weights, folder / ADAPTER, metadata=metadata)
    return folder / ADAPTER


def load_lora(unet: Any, file: Path) -> None:
    """Put the adapter of a file on a denoiser: layers, rank and alpha as the file's metadata says, and its weights.

    Raises BuilderError for a file that can't be read or says nothing of its rank and layers, and for weights that are
    missing, left over or of another shape.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            config = json.loads((opened.metadata() or {})[METADATA])
            state = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a mapping
        settings = {name: config[PREFIX + name] for name in ("r", "lora_alpha", "target_modules")}
        patterns = {"ranks": config[PREFIX + "rank_pattern"], "alphas": config[PREFIX + "alpha_pattern"]}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise BuilderError(
            f"{file} cannot be read as a LoRA: {error!r}",
            "give a file that `builder train` or diffusers' save_lora_weights wrote, with its metadata",
        ) from None
    unknown = [key for key in ("use_dora", "use_rslora", "lora_bias") if config.get(PREFIX + key)]
    if unknown:
        raise BuilderError(f"{file} is a LoRA of another kind: {', '.join(unknown)}", "fuse it with its own trainer")
    add_lora(unet, settings["r"], settings["lora_alpha"], targets=sorted(settings["target_modules"]), **patterns)
    load_lora_state(unet, state, str(file))


def fuse_lora(unet: Any) -> None:
    """Add the adapter to the weights it adapts and take it off: a plain denoiser, with the names it had before.

    Raises BuilderError when the weights are not finite afterwards.
    """
    _config(unet)
    try:
        unet.fuse_lora(safe_fusing=True)
    except ValueError as error:
        raise BuilderError(f"the LoRA cannot be fused: {error}", "take an earlier checkpoint") from None
    unet.unload_lora()


def _config(unet: Any) -> Any:
    if not adapted(unet):
        raise BuilderError("the denoiser has no LoRA", "add one first")
    return next(iter(unet.peft_config.values()))


def _require_layers(unet: nn.Module, layers: Sequence[str]) -> None:
    if not layers:
        raise BuilderError("a LoRA of no layers trains nothing", f"give groups: {', '.join(TARGETS)}")
    names = [name for name, module in unet.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    for layer in layers:
        if not any(name == layer or name.endswith(f".{layer}") for name in names):
            raise BuilderError(
                f"the denoiser has no layer '{layer}' that a LoRA could adapt",
                f"give groups ({', '.join(TARGETS)}) or layers ({', '.join(expand(list(TARGETS)))})",
            )


def _shapes(state: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(weight.shape) for name, weight in state.items()}


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else value

"""One .safetensors file with a whole model, in the layout of its first authors that ComfyUI and others keep.

Each weight that our networks have is looked up under the name it bears there (the inverse of what diffusers'
`from_single_file` does), so nothing can be missing or left over unnoticed. The file holds neither sizes nor
tokenizer: these are the published model's, or the architecture's that is given.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from builder.errors import BuilderError
from builder.models.building import Architecture, Pipeline
from builder.models.families import FAMILIES, Family
from builder.models.strict import refuse_any, require_exact

REMEDY = "give a whole SDXL 1.0 or Stable Diffusion 1.5 model in one file, or model.architecture if its sizes differ"
Found = tuple[str, Callable[[Tensor], Tensor]]  # name in the file, and how our weight is made of that one

CLIP = {"sdxl": "conditioner.embedders.0.transformer.", "sd15": "cond_stage_model.transformer."}
OPEN_CLIP = "conditioner.embedders.1.model."
UNET = "model.diffusion_model."
VAE = "first_stage_model."

# What such files carry beside the weights: averages of training (unused), constants, CLIP's temperature.
IGNORED = re.compile(
    r"model_ema\..*|.*\.position_ids|.*\.logit_scale|denoiser\..*|(alphas|betas|sqrt|log_one|posterior)\w*|logvar"
)
UNET_NAMES = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
RESNET_NAMES = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
VAE_NAMES = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
    "conv_shortcut": "nin_shortcut",
    "conv_norm_out": "norm_out",
}
OPEN_CLIP_NAMES = {
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.embeddings.token_embedding": "token_embedding",
    "text_model.final_layer_norm": "ln_final",
    "text_model.encoder.layers": "transformer.resblocks",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "fc1": "c_fc",
    "fc2": "c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
IN_PROJECTION = re.compile(r"(.*)self_attn\.([qkv])_proj\.(weight|bias)")
BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.*)")


def family_of_file(file: Path) -> Family:
    """The family of the model in a file, by the text encoders it holds; BuilderError for another model."""
    with _opened(file) as weights:
        names = list(weights.keys())
    for name, prefix in CLIP.items():
        if any(key.startswith(prefix) for key in names) and any(key.startswith(UNET) for key in names):
            return FAMILIES[name]
    raise BuilderError(f"{file} holds no model of a known family ({', '.join(FAMILIES)})", REMEDY)


def load_single_file(file: Path, architecture: Architecture | None = None) -> Pipeline:
    """The pipeline of a file, float32 on the CPU; `architecture` is the published model's where none is given.

    Raises BuilderError for a file that can't be read, or whose weights are not exactly those of the architecture.
    """
    family = family_of_file(file)
    with torch.device("meta"):  # no memory is filled with random weights first
        pipeline = family.build(architecture or family.architecture, family.size, 0)
    with _opened(file) as weights:
        used = {name for part in family.weights for name in _load(pipeline, part, weights, f"{file} ({part})")}
        rest = sorted(name for name in weights.keys() if name not in used and not IGNORED.fullmatch(name))  # noqa: SIM118
    refuse_any(str(file), rest, "left over", REMEDY)
    return pipeline


def _load(pipeline: Pipeline, part: str, weights: Any, where: str) -> set[str]:
    """Fill one network of the pipeline; the names in the file that were used."""
    model: nn.Module = getattr(pipeline, part)
    expected = model.state_dict()
    there = set(weights.keys())
    found = {name: source(pipeline, part, name) for name in expected}
    refuse_any(where, sorted({theirs for theirs, _ in found.values()} - there), "missing", REMEDY)
    state = {name: made(weights.get_tensor(theirs)).float() for name, (theirs, made) in found.items()}
    require_exact(where, _shapes(expected), _shapes(state), REMEDY)
    model.load_state_dict(state, assign=True)
    for module in model.modules():  # CLIP's only buffer, a constant that no file needs to hold
        positions = getattr(module, "position_ids", None)
        if isinstance(positions, Tensor):
            module.position_ids = torch.arange(positions.shape[-1]).expand((1, -1))
    return {theirs for theirs, _ in found.values()}


def source(pipeline: Pipeline, part: str, name: str) -> Found:
    """The name that a network's weight bears in the file, and how to make it of what stands there."""
    if part == "unet":
        return UNET + _unet_name(name, pipeline.unet.config), _same
    if part == "vae":
        levels = len(pipeline.vae.config.block_out_channels)
        return VAE + _vae_name(name, levels), _linear if ".to_" in name else _same
    if part == "text_encoder":
        prefix = CLIP["sdxl" if hasattr(pipeline, "text_encoder_2") else "sd15"]
        return f"{prefix}text_model.{name.removeprefix('text_model.')}", _same
    return _open_clip_source(name)


def _unet_name(name: str, config: Any) -> str:
    """Blocks are counted through: each level has its layers, and one more for its way down or the skip into it."""
    per_level = config.layers_per_block + 1
    if found := BLOCK.fullmatch(name):
        level, kind, layer, rest = int(found[2]), found[3], int(found[4]), found[5]
        if kind == "downsamplers":
            return f"input_blocks.{(level + 1) * per_level}.0.{rest.replace('conv', 'op', 1)}"
        if kind == "upsamplers":
            place = 2 if "CrossAttn" in config.up_block_types[level] else 1
            return f"output_blocks.{(level + 1) * per_level - 1}.{place}.{rest}"
        number = level * per_level + layer
        block = f"input_blocks.{1 + number}" if found[1] == "down" else f"output_blocks.{number}"
        return f"{block}.0.{_renamed(rest, RESNET_NAMES)}" if kind == "resnets" else f"{block}.1.{rest}"
    if found := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d+)\.(.*)", name):
        if found[1] == "attentions":
            return f"middle_block.{2 * int(found[2]) + 1}.{found[3]}"
        return f"middle_block.{2 * int(found[2])}.{_renamed(found[3], RESNET_NAMES)}"
    return _renamed(name, UNET_NAMES)


def _vae_name(name: str, levels: int) -> str:
    """The decoder's levels are counted from the finest, ours from the coarsest."""
    if found := re.fullmatch(r"(encoder|decoder)\.(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.*)", name):
        level = int(found[3]) if found[2] == "down" else levels - 1 - int(found[3])
        place = {"resnets": f"block.{found[5]}", "downsamplers": "downsample", "upsamplers": "upsample"}[found[4]]
        return f"{found[1]}.{found[2]}.{level}.{place}.{_renamed(found[6], VAE_NAMES)}"
    if found := re.fullmatch(r"(encoder|decoder)\.mid_block\.(resnets|attentions)\.(\d+)\.(.*)", name):
        kind = {"resnets": "block", "attentions": "attn"}[found[2]]
        return f"{found[1]}.mid.{kind}_{int(found[3]) + 1}.{_renamed(found[4], VAE_NAMES)}"
    return _renamed(name, VAE_NAMES)


def _open_clip_source(name: str) -> Found:
    if name == "text_projection.weight":
        return OPEN_CLIP + "text_projection", lambda weight: weight.T.contiguous()
    if found := IN_PROJECTION.fullmatch(name):  # query, key and value lie in one matrix
        place = "qkv".index(found[2])
        return (
            OPEN_CLIP + _renamed(f"{found[1]}attn.in_proj_{found[3]}", OPEN_CLIP_NAMES),
            lambda weight: weight.chunk(3)[place].clone(),
        )
    return OPEN_CLIP + _renamed(name, OPEN_CLIP_NAMES), _same


def _renamed(name: str, names: dict[str, str]) -> str:
    """Whole components of a dotted name, replaced."""
    for ours, theirs in names.items():
        name = re.sub(rf"(?<![^.]){re.escape(ours)}(?![^.])", theirs, name)
    return name


def _same(weight: Tensor) -> Tensor:
    return weight


def _linear(weight: Tensor) -> Tensor:
    """A 1 x 1 convolution as the linear layer that it is."""
    return weight[:, :, 0, 0] if weight.ndim == 4 else weight


def _shapes(state: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(weight.shape) for name, weight in state.items()}


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    try:
        opened = safe_open(file, framework="pt")
    except (OSError, SafetensorError) as error:
        raise BuilderError(f"{file} cannot be read: {error}", "copy the file again") from None
    with opened as weights:
        yield weights

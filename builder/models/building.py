"""What the families share when a model is built from a description of its parts: tokenizers, encoders, networks.

All sizes come from an architecture, `model.architecture` of the config or one of `architectures`:

    tokenizer: {merges: 1500}                      # how much of CLIP's vocabulary; CLIP itself: 48894
    text_encoder: {hidden_size: 32, num_hidden_layers: 2, ...}   # CLIPTextConfig
    vae: {block_out_channels: [...], latent_channels: 16, ...}   # AutoencoderKL
    unet: {block_out_channels: [...], ...}                       # UNet2DConditionModel
    scheduler: {prediction_type: epsilon, ...}     # of training; the sampler takes its noise levels from it

What follows from these (conditioning widths, sample size, vocabulary) is filled in.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from builder.errors import BuilderError, did_you_mean

# A diffusers pipeline of one of the families; diffusers imports lazily, so type checkers do not see what it has.
Pipeline = Any
Architecture = dict[str, Any]

MERGES = Path(__file__).parent / "tokenizer" / "merges.txt"
SMALL_VOCABULARY = 1500  # merges: enough to tell the prompts of a few classes apart
MAX_TOKENS = 77
DIFFUSION: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}


@contextmanager
def described(architecture: Architecture, known: Sequence[str], seed: int) -> Iterator[dict[str, Any]]:
    """The parts of an architecture, each present; within the block weights are drawn from `seed`.

    The caller's random state is left alone. Raises BuilderError for a part that the family doesn't have.
    """
    for part in architecture:
        if part not in known:
            raise BuilderError(f"unknown key 'model.architecture.{part}'", did_you_mean(part, known))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield {**{part: {} for part in known}, **architecture}


def clip_tokenizer(pad_token: str, merges: int = SMALL_VOCABULARY) -> CLIPTokenizer:
    """CLIP's tokenizer cut after its first `merges` merges: a prefix of a BPE's merges is a BPE."""
    lines = MERGES.read_text(encoding="utf-8").splitlines()[1 : merges + 1]
    pairs = [(first, second) for first, second in map(str.split, lines)]
    letters = list(bytes_to_unicode().values())
    tokens = [*letters, *(letter + "</w>" for letter in letters), *(first + second for first, second in pairs)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={token: number for number, token in enumerate(tokens)},
        merges=pairs,  # type: ignore[arg-type]  # annotated as lines, taken as pairs
        pad_token=pad_token,
        model_max_length=MAX_TOKENS,
    )


def text_config(given: dict[str, Any], tokenizer: CLIPTokenizer, part: str = "text_encoder") -> CLIPTextConfig:
    """The configuration of a CLIP text encoder; BuilderError for a key that it doesn't have."""
    hidden = given.get("hidden_size", 768)
    derived = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": MAX_TOKENS,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,  # the pooled embedding is read at this token
        "pad_token_id": tokenizer.pad_token_id,
    }
    _require_known(CLIPTextConfig, given, part, derived)
    sizes = {"intermediate_size": 4 * hidden, "projection_dim": hidden, **given, "hidden_size": hidden}
    return CLIPTextConfig(**sizes, **derived)


def spread(encoder: nn.Module) -> nn.Module:
    """Embeddings of unit scale: CLIP's 0.02 is meant for training, and these encoders stay as they are drawn."""
    for name, parameter in encoder.named_parameters():
        if name.endswith(("token_embedding.weight", "position_embedding.weight")):
            nn.init.normal_(parameter, std=1.0 if "token" in name else 0.3)
        elif parameter.ndim == 2:
            nn.init.xavier_normal_(parameter)
    return encoder.eval().requires_grad_(False)


def networks(
    parts: Mapping[str, Any], size: int, scheduler: dict[str, Any], unet: dict[str, Any], derived: dict[str, Any]
) -> dict[str, Any]:
    """Autoencoder, scheduler and denoiser for images of `size` px, by the names a pipeline gives them.

    scheduler, unet: the family's own defaults. derived: what the denoiser's conditioning demands.
    Raises BuilderError for a key that a part doesn't have, and for values that don't fit together.
    """
    vae = _from_config(AutoencoderKL, parts["vae"], "vae", sample_size=size)
    with torch.device("cpu"):  # noise levels are numbers, also where the networks are built without (on meta)
        solver = _from_config(
            DPMSolverMultistepScheduler, {**DIFFUSION, **scheduler, **parts["scheduler"]}, "scheduler",
            algorithm_type="dpmsolver++", solver_order=2, use_karras_sigmas=True,
        )  # fmt: skip
    channels = vae.config.latent_channels
    denoiser = _from_config(
        UNet2DConditionModel, {**unet, **parts["unet"]}, "unet",
        sample_size=latent_size(vae, size), in_channels=channels, out_channels=channels, **derived,
    )  # fmt: skip
    return {"vae": vae, "scheduler": solver, "unet": denoiser}


def latent_size(vae: Any, size: int) -> int:
    """Side of the latents of an image of `size` px; BuilderError where the autoencoder can't make that size."""
    shrink = 2 ** (len(vae.config.block_out_channels) - 1)
    if size % shrink:
        raise BuilderError(f"train.size {size} is not a multiple of the autoencoder's {shrink}", "choose another size")
    return size // shrink


def _from_config(kind: Any, given: dict[str, Any], part: str, **derived: Any) -> Any:
    _require_known(kind, given, part, derived)
    try:
        return kind(**{key: tuple(v) if isinstance(v, list) else v for key, v in given.items()}, **derived)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise BuilderError(
            f"model.architecture.{part} does not fit together: {error}", "see configs/demo.yaml"
        ) from None


def _require_known(kind: Any, given: dict[str, Any], part: str, derived: Mapping[str, Any]) -> None:
    known = [name for name in inspect.signature(kind.__init__).parameters if name not in ("self", *derived)]
    for key in given:
        if key not in known:
            raise BuilderError(f"unknown key 'model.architecture.{part}.{key}'", did_you_mean(key, known))

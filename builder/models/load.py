"""Load a diffusers folder: offline, safetensors only, strictly: a wrong weight file is an error, never ignored."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.schedulers import KarrasDiffusionSchedulers
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from builder.errors import BuilderError
from builder.models.checkpoint import Checkpoint, without_bars
from builder.models.sdxl import Pipeline

NAMED_KEYS = 5  # of a mismatch, in the error
WEIGHTS: dict[str, tuple[Any, str]] = {
    "text_encoder": (CLIPTextModel, "model"),
    "text_encoder_2": (CLIPTextModelWithProjection, "model"),
    "vae": (AutoencoderKL, "diffusion_pytorch_model"),
    "unet": (UNet2DConditionModel, "diffusion_pytorch_model"),
}


def load_pipeline(
    checkpoint: str | Path | Checkpoint, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> Pipeline:
    """The pipeline of a checkpoint folder on `device`, in evaluation mode; nothing is downloaded or unpickled.

    The networks are in `dtype`; the autoencoder stays in float32 when `dtype` is float16, in which SDXL's gives NaN.
    Raises BuilderError for missing files, for weights that are missing, left over or of another shape (the first
    few are named), and for a pipeline of another family.
    """
    folder = checkpoint.path if isinstance(checkpoint, Checkpoint) else Path(checkpoint)
    index = _read_json(folder / "model_index.json")
    kind = index.get("_class_name")
    if kind != "StableDiffusionXLPipeline":
        raise BuilderError(
            f"{folder} holds a {kind}, not a StableDiffusionXLPipeline", "give a checkpoint of the SDXL family"
        )
    parts: dict[str, Any] = {name: _weights(folder / name, *WEIGHTS[name]) for name in WEIGHTS}
    for name in ("tokenizer", "tokenizer_2"):
        with _explained(folder / name):
            parts[name] = CLIPTokenizer.from_pretrained(folder / name, local_files_only=True)
    with _explained(folder / "scheduler"):
        parts["scheduler"] = _scheduler(folder / "scheduler")
    for name in WEIGHTS:
        wanted = torch.float32 if name == "vae" and dtype == torch.float16 else dtype
        # Plain torch's `to`: diffusers' own warns at every cast.
        parts[name] = torch.nn.Module.to(parts[name], device, wanted).eval().requires_grad_(False)
    empty = bool(index.get("force_zeros_for_empty_prompt", True))
    return StableDiffusionXLPipeline(**parts, force_zeros_for_empty_prompt=empty, add_watermarker=False)


def _weights(folder: Path, kind: Any, stem: str) -> Any:
    _read_json(folder / "config.json")
    if not any((folder / f"{stem}{end}").is_file() for end in (".safetensors", ".safetensors.index.json")):
        raise BuilderError(
            f"{folder} has no {stem}.safetensors", "copy the whole checkpoint folder; other weight formats are not read"
        )
    with _explained(folder), without_bars():
        model, report = kind.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, torch_dtype=torch.float32,
            low_cpu_mem_usage=False, ignore_mismatched_sizes=True, output_loading_info=True,
        )  # fmt: skip
    _require_exact(folder, report)
    return model


def _require_exact(folder: Path, report: dict[str, Any]) -> None:
    """Refuse what from_pretrained would only warn of. Position ids are constants that old CLIP files carry along."""
    for problem, said in (
        ("mismatched_keys", "of another shape"),
        ("missing_keys", "missing"),
        ("unexpected_keys", "left over"),
    ):
        keys = sorted(
            key if isinstance(key, str) else f"{key[0]} {tuple(key[1])} for {tuple(key[2])}" for key in report[problem]
        )
        keys = [key for key in keys if not key.endswith("position_ids")]
        if keys:
            more = f" and {len(keys) - NAMED_KEYS} more" if len(keys) > NAMED_KEYS else ""
            raise BuilderError(
                f"{folder}: {len(keys)} weights are {said}: {', '.join(keys[:NAMED_KEYS])}{more}",
                "the weights and config.json are not of one model; copy the whole checkpoint folder again",
            )
    if report.get("error_msgs"):
        raise BuilderError(f"{folder}: {report['error_msgs'][0]}", "copy the whole checkpoint folder again")


def _scheduler(folder: Path) -> Any:
    import diffusers

    name = _read_json(folder / "scheduler_config.json").get("_class_name", "")
    if name not in KarrasDiffusionSchedulers.__members__:
        raise BuilderError(f"{folder}: unknown scheduler '{name}'", "use one of diffusers' discrete-time schedulers")
    return getattr(diffusers, name).from_pretrained(folder, local_files_only=True)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise BuilderError(f"{file} is missing", "copy the whole checkpoint folder") from None
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError) as error:
        raise BuilderError(f"{file} is not valid JSON: {error}", "copy the whole checkpoint folder again") from None


@contextlib.contextmanager
def _explained(folder: Path) -> Iterator[None]:
    """The libraries' errors about a broken folder are OSError, ValueError, RuntimeError or safetensors' own."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise BuilderError(f"{folder} cannot be loaded: {first}", "copy the whole checkpoint folder again") from None

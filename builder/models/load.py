"""Load a generator: a diffusers folder, a single file, or an adapter on its base; offline, safetensors only, strictly.

A wrong weight file is an error, never ignored.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.schedulers import KarrasDiffusionSchedulers
from transformers import CLIPTokenizer

from builder.display import printable
from builder.documents import MAX_BYTES, parse_json
from builder.errors import BuilderError
from builder.files import read_file
from builder.models.building import Architecture, Pipeline
from builder.models.checkpoint import DESCRIPTION, Checkpoint, read_checkpoint, read_description, without_bars
from builder.models.families import Family, family_of
from builder.models.grain import attach, head_of, load_grain
from builder.models.integrity import require_undamaged
from builder.models.lora import ADAPTER, fuse_lora, load_lora
from builder.models.single_file import load_single_file
from builder.models.source import locate, weights_sha256
from builder.models.strict import refuse_any
from builder.models.tensors import require_parts_inside
from builder.trust import may_read

ALIGNMENT = 64  # bytes: of what torch allocates on a CPU
REMEDY = "the weights and config.json are not of one model; copy the whole checkpoint folder again"


def load_pipeline(
    checkpoint: str | Path | Checkpoint,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    architecture: Architecture | None = None,
) -> Pipeline:
    """The pipeline of a checkpoint on `device`, in evaluation mode; nothing is downloaded or unpickled.

    checkpoint: a diffusers folder, a .safetensors file with a whole model (`architecture` gives its sizes where they
    are not the published model's), or a folder with an adapter, which is fused into the base that it names. Safety
    checkers and image encoders are left out. A grain head (`models.grain`) comes attached to its autoencoder.
    The networks are in `dtype`; the autoencoder stays in float32 when `dtype` is float16, in which SDXL's gives NaN.
    Raises BuilderError for missing files, for weights that are missing, left over or of another shape (the first
    few are named), for a pipeline of no known family, and for an adapter whose base is not there or has changed.
    """
    path = checkpoint.path if isinstance(checkpoint, Checkpoint) else Path(checkpoint)
    pipeline = _load(path, architecture or None)
    for name in family_of(pipeline).weights:
        wanted = torch.float32 if name == "vae" and dtype == torch.float16 else dtype
        # Plain torch's `to`: diffusers' own warns at every cast.
        part = getattr(pipeline, name)
        for module in (part, head_of(part)):
            if module is not None:
                _align(torch.nn.Module.to(module, device, wanted).eval().requires_grad_(False))
    return pipeline


def _align(model: torch.nn.Module) -> None:
    """Give weights that still lie in their mapped file memory of their own.

    Kernels round differently by alignment: else the last bits of an image depend on where in the file a weight stands.
    """
    for weight in (*model.parameters(), *model.buffers()):
        if weight.data_ptr() % ALIGNMENT:
            weight.data = weight.data.clone()


def _load(path: Path, architecture: Architecture | None, *, checked: bool = False) -> Pipeline:
    """The pipeline in float32 on the CPU. checked: all of it was just compared with a SHA-256."""
    if path.is_file():
        return load_single_file(path, architecture)
    if not checked:
        require_undamaged(path, read_checkpoint(path).files)
    adapter = (path / ADAPTER).is_file() and not (path / "model_index.json").is_file()
    return _load_adapted(path) if adapter else _load_folder(path)


def _load_folder(folder: Path) -> Pipeline:
    index = _read_json(folder / "model_index.json")
    family = family_of(str(index.get("_class_name")))
    parts: dict[str, Any] = {name: _weights(folder / name, *where) for name, where in family.weights.items()}
    attach(parts["vae"], load_grain(folder / "vae"))
    parts |= load_tokenizers(folder, family.tokenizers)
    with _explained(folder / "scheduler"):
        parts["scheduler"] = _scheduler(folder / "scheduler")
    _require_fitting(family, parts, folder)
    return family.assemble(parts, index)


def load_tokenizers(folder: Path, names: Sequence[str]) -> dict[str, CLIPTokenizer]:
    """The tokenizers of a checkpoint's folder, by name; BuilderError for one that is missing or damaged."""
    found: dict[str, CLIPTokenizer] = {}
    for name in names:
        with _explained(folder / name):
            found[name] = CLIPTokenizer.from_pretrained(folder / name, local_files_only=True)
    return found


def _require_fitting(family: Family, parts: dict[str, Any], folder: Path) -> None:
    """Parts of several models, each whole in itself, would only fail once an image is drawn."""
    unet = parts["unet"].config
    width = sum(parts[name].config.hidden_size for name in family.weights if name.startswith("text_encoder"))
    for said, has, needs in (
        ("conditioned on", unet.addition_embed_type or "nothing", family.added or "nothing"),
        ("fed with token states of width", unet.cross_attention_dim, width),
        ("fed with latent channels", unet.in_channels, parts["vae"].config.latent_channels),
    ):
        if has != needs:
            raise BuilderError(
                f"{folder} is no {family.pipeline_class}: the denoiser is {said} {has}, not {needs}",
                "its parts are not of one model; copy the whole checkpoint folder again",
            )


def _load_adapted(folder: Path) -> Pipeline:
    """The base that checkpoint.json names, the very same weights, with the adapter fused into its denoiser."""
    description = _description(folder)
    named = description.get("base") or {}
    if not named.get("reference") or not named.get("sha256"):
        raise BuilderError(f"{folder / DESCRIPTION} names no base for its LoRA", "give `base`: reference and sha256")
    if not may_read(named["reference"], named.get("voucher")):
        raise BuilderError(
            f"the LoRA in {folder} names the base {printable(named['reference'])}, which lies outside the working "
            "directory, and this user didn't train it",
            "put a copy of the base below the working directory, or confirm its place with --trust-root "
            "(or BUILDER_TRUST_ROOTS)",
        )
    try:
        base = locate(named["reference"])
    except BuilderError as error:
        raise BuilderError(f"the base of the LoRA in {folder} is not there: {error.what}", error.remedy) from None
    if weights_sha256(base) != named["sha256"]:
        raise BuilderError(
            f"the LoRA in {folder} was trained on another base than what '{named['reference']}' now is",
            f"bring back the base with sha256 {named['sha256']}, or take a fused checkpoint",
        )
    config = description.get("config") or {}
    pipeline = _load(base.path, config.get("model", {}).get("architecture") or None, checked=True)
    load_lora(pipeline.unet, folder / ADAPTER)
    fuse_lora(pipeline.unet)
    return pipeline


def _description(folder: Path) -> dict[str, Any]:
    try:
        return read_description(folder)
    except FileNotFoundError:
        raise BuilderError(f"{folder / DESCRIPTION} is missing", "copy the whole checkpoint folder") from None


def _weights(folder: Path, kind: Any, stem: str) -> Any:
    _read_json(folder / "config.json")
    require_parts_inside(folder / f"{stem}.safetensors.index.json")
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
        refuse_any(str(folder), [key for key in keys if not key.endswith("position_ids")], said, REMEDY)
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
        raw = read_file(file, MAX_BYTES + 1)
        # Diffusers writes -Infinity into the configs of its schedulers.
        data = parse_json(raw, str(file), remedy="copy the whole checkpoint folder again", constants=True)
    except FileNotFoundError:
        raise BuilderError(f"{file} is missing", "copy the whole checkpoint folder") from None
    except OSError as error:
        raise BuilderError(f"{file} cannot be read: {error.strerror}", "copy the whole checkpoint folder") from None
    if not isinstance(data, dict):
        raise BuilderError(f"{file} is not valid JSON of keys and values", "copy the whole checkpoint folder again")
    return data


@contextlib.contextmanager
def _explained(folder: Path) -> Iterator[None]:
    """The libraries' errors about a broken folder are OSError, ValueError, RuntimeError or safetensors' own."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise BuilderError(f"{folder} cannot be loaded: {first}", "copy the whole checkpoint folder again") from None

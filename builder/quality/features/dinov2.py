"""DINOv2 (Oquab 2023) through transformers: the class token after the last norm, as FD-DINOv2 (Stein 2023) takes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from builder.errors import BuilderError
from builder.quality.features.extractor import (
    BICUBIC,
    IMAGENET_MEAN,
    IMAGENET_STD,
    Extractor,
    normalised,
    weights_sha256,
)

LARGEST = 224  # px; position embeddings of a network trained at more are interpolated down
WANTED = ["config.json", "*.safetensors", "*.safetensors.index.json"]


def dinov2(source: str, device: str = "cpu", download: bool = False) -> Extractor:
    """DINOv2 from a local folder (config.json, safetensors), or from a hub id such as facebook/dinov2-small.

    A hub id is looked up in the local cache; only with `download` is it fetched. BuilderError when it is not there, or
    is no complete Dinov2Model.
    """
    if not source:
        raise BuilderError("dinov2 needs a folder", "write dinov2:FOLDER, or dinov2:facebook/dinov2-small")
    folder = Path(source) if Path(source).is_dir() else _from_hub(source, download)
    network = _load(folder, source).eval().requires_grad_(False).to(device)
    patch = network.config.patch_size
    size = min(LARGEST, network.config.image_size) // patch * patch
    return Extractor(
        name=f"dinov2-{Path(source).resolve().name if Path(source).is_dir() else source.rpartition('/')[2]}",
        network=lambda images: network(images).pooler_output,
        prepare=normalised(size, IMAGENET_MEAN, IMAGENET_STD),
        dimension=network.config.hidden_size,
        input_range="RGB in [0, 1], less ImageNet's mean, divided by its standard deviation",
        size=size,
        resize=BICUBIC,
        weights_sha256=weights_sha256(network),
        device=device,
    )


def _load(folder: Path, source: str) -> Any:
    from transformers import AutoConfig, Dinov2Model

    remedy = "give a folder of Dinov2Model.save_pretrained: config.json and model.safetensors"
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        if config.model_type != "dinov2":
            raise BuilderError(f"'{source}' holds a network of type {config.model_type}, not dinov2", remedy)
        with_info: Any = Dinov2Model.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, dtype=torch.float32, output_loading_info=True
        )
        network, loaded = with_info
    except BuilderError:
        raise
    except Exception as error:  # transformers and safetensors raise many kinds for a damaged folder
        raise BuilderError(f"'{source}' cannot be loaded as DINOv2: {str(error).splitlines()[0]}", remedy) from error
    # from_pretrained would only warn, and go on with random weights.
    wrong = [key for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for key in loaded[kind]]
    if wrong:
        raise BuilderError(f"the weights in '{source}' do not fit: {wrong[0]} and {len(wrong) - 1} more", remedy)
    return network


def _from_hub(source: str, download: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(source, allow_patterns=WANTED, local_files_only=not download))
    except (LocalEntryNotFoundError, HFValidationError, HfHubHTTPError, OSError) as error:
        raise BuilderError(
            f"'{source}' is no folder here, and "
            + (f"cannot be fetched from the hub: {error}" if download else "not in the hub's local cache"),
            "give a folder" if download else f"give a folder, or fetch it once: --download, or `hf download {source}`",
        ) from None

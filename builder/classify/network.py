"""The classifier: a small residual network from scratch, or a model folder of transformers with a new head."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from builder.errors import BuilderError

SMALL: dict[str, Any] = {  # He et al. 2016 in small: 310,000 parameters, 33 ms a step of 32 crops of 64 px on one core
    "embedding_size": 16,
    "hidden_sizes": [16, 32, 64, 128],
    "depths": [1, 1, 1, 1],
    "layer_type": "basic",
}
FILES = ("config.json", "preprocessor_config.json")


class Classifier(nn.Module):
    """Images, float32 [B, 3, S, S] in 0-1, to logits [B, classes]; normalises as the model wants it."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, model: nn.Module, mean: list[float], std: list[float]) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(pixel_values=(images - self.mean) / self.std).logits
        return logits


def build(folder: str, classes: int, size: int, seed: int) -> Classifier:
    """The network at its start: weights from scratch, or the new head of those in `folder`, depend on the seed alone.

    BuilderError when the folder holds no such model, or one that takes no images of `size` px.
    """
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(seed)
    if not folder:
        return Classifier(
            ResNetForImageClassification(ResNetConfig(**SMALL | {"num_labels": classes})), [0.5] * 3, [0.5] * 3
        )
    network = Classifier(_with_new_head(folder, classes), *_normalisation(Path(folder)))
    try:
        with torch.no_grad():
            network.eval()(torch.zeros(1, 3, size, size))
    except (RuntimeError, ValueError) as error:
        raise BuilderError(
            f"the model in {folder} does not take images of {size} px: {error}", "give its size, e.g. --size 224"
        ) from None
    return network


def model_sha256(folder: str) -> str:
    """Of the settings and weights of a model folder; "" for none."""
    if not folder:
        return ""
    names = [*FILES, *sorted(path.name for path in Path(folder).glob("*.safetensors"))]
    digest = hashlib.sha256()
    for path in (Path(folder) / name for name in names):
        if path.is_file():
            digest.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _with_new_head(folder: str, classes: int) -> nn.Module:
    """Its trained body under a head drawn anew, also where it had as many classes: they were others."""
    from transformers import AutoConfig, AutoModelForImageClassification

    if not (Path(folder) / "config.json").is_file():
        raise BuilderError(f"{folder} has no config.json", "give --model the folder of a transformers model")
    try:
        config = AutoConfig.from_pretrained(folder, num_labels=classes, local_files_only=True)
        model: Any = AutoModelForImageClassification.from_config(config)
        trained: Any = AutoModelForImageClassification.from_pretrained(
            folder, local_files_only=True, use_safetensors=True
        )
    except (OSError, ValueError, KeyError) as error:
        raise BuilderError(
            f"{folder} holds no image classifier of transformers: {error}",
            "it needs config.json and model.safetensors; builder downloads nothing here",
        ) from None
    if model.base_model is model:
        raise BuilderError(f"a {type(model).__name__} has no body apart from its head", "choose another --model")
    model.base_model.load_state_dict(trained.base_model.state_dict())
    found: nn.Module = model
    return found


def _normalisation(folder: Path) -> tuple[list[float], list[float]]:
    file = folder / "preprocessor_config.json"
    told = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return list(told.get("image_mean", [0.5] * 3)), list(told.get("image_std", [0.5] * 3))

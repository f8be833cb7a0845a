"""One training of the classifier: a fixed number of steps, the best validation step, its answers on test patients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn.metrics import f1_score
from torch.nn.functional import cross_entropy

from builder.classify.augment import view
from builder.classify.data import HeldOut
from builder.classify.network import Classifier, build
from builder.mixing import MixedLoader
from builder.shards.dataset import Dataset

BATCH = 128  # of judging
WARMUP = 0.05  # share of the steps


@dataclass(frozen=True)
class Recipe:
    """How a network is trained: the same for every ratio and seed.

    model: folder of a transformers model, or "" for a small one from scratch. size: px. evaluations: how often the
    validation patients are asked.
    """

    model: str = ""
    size: int = 64
    steps: int = 250
    batch_size: int = 32
    learning_rate: float = 2e-3
    weight_decay: float = 0.05
    evaluations: int = 10


def train_and_judge(
    recipe: Recipe, real: Dataset, synthetic: Sequence[Dataset], ratio: float, seed: int, val: HeldOut, test: HeldOut,
    *, device: str = "cpu", workers: int = 0, allow_leak: str | None = None, tick: Callable[[], object] = lambda: None,
) -> dict[str, Any]:  # fmt: skip
    """Train at `ratio` and answer for the test patients with the weights that did best on the validation patients.

    Every ratio takes recipe.steps steps of batches with equal shares of the classes, so rare ones are oversampled in
    real and synthetic crops alike. The seed decides weights, order and augmentation. `tick` is called at each step.
    Plain JSON: predictions [N] (labels), val [[step, macro-F1]], step (the chosen one), composition (of the loader).
    """
    from transformers import get_cosine_schedule_with_warmup

    network = build(recipe.model, len(real.classes), recipe.size, seed).to(device)
    loader = MixedLoader(
        real=real, synthetic=list(synthetic) or None, ratio=ratio, batch_size=recipe.batch_size, size=recipe.size,
        split="train", classes="balance", epoch=recipe.steps * recipe.batch_size, seed=seed, workers=workers,
        transform=view, dtype="float32", allow_leak=allow_leak, partial=True,
    )  # fmt: skip
    composition = loader.composition()
    optimizer = torch.optim.AdamW(network.parameters(), recipe.learning_rate, weight_decay=recipe.weight_decay)
    schedule = get_cosine_schedule_with_warmup(optimizer, round(WARMUP * recipe.steps), recipe.steps)
    asked = set(np.linspace(0, recipe.steps, recipe.evaluations + 1).round().astype(int).tolist())
    scores: list[tuple[int, float]] = []
    best: dict[str, torch.Tensor] = {}
    for step, (images, labels, _) in enumerate(loader, 1):
        network.train()
        cross_entropy(network(images.to(device)), labels.to(device)).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step in asked:
            score = macro_f1(val, predict(network, val, device))
            if score > max((earlier for _, earlier in scores), default=-1.0):
                best = deepcopy(network.state_dict())
            scores.append((step, score))
        tick()
    network.load_state_dict(best)
    chosen = max(scores, key=lambda pair: pair[1])[0]  # the first of equals, as above
    predictions = predict(network, test, device).tolist()
    return {"predictions": predictions, "val": scores, "step": chosen, "composition": composition}


@torch.no_grad()
def predict(network: Classifier, crops: HeldOut, device: str) -> np.ndarray:
    """The most likely label of each crop, int64 [N]."""
    network.eval()
    parts = [network(part.to(device).float() / 255).argmax(1).cpu() for part in crops.images.split(BATCH)]
    return torch.cat(parts).numpy()


def macro_f1(crops: HeldOut, predictions: np.ndarray) -> float:
    return float(f1_score(crops.labels.numpy(), predictions, average="macro", zero_division=0))

"""One stage of training (autoencoder or denoiser) and the loop that runs it: log, states, exact resume, safe stop.

All randomness of a step is drawn from a generator keyed by (seed, step), and the crops of a step are a function of
its number; so weights, averages and optimizer at step n are the whole state, and interrupted + resumed equals
uninterrupted bit for bit (same machine, same threads).
"""

from __future__ import annotations

import json
import math
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from builder.errors import BuilderError
from builder.training.ema import Ema

KEPT_STATES = 2
LOG_EVERY = 20  # steps


class Objective(Protocol):
    """What is trained: the network, and its loss on the batch of a step."""

    network: nn.Module

    def losses(self, step: int) -> dict[str, Tensor]:
        """Scalars by name; `loss` is the one that is minimised."""


class Stage:
    """A network with optimizer, learning-rate schedule and average."""

    def __init__(
        self, name: str, objective: Objective, *, steps: int, batch_size: int, learning_rate: float,
        warmup_steps: int, weight_decay: float, grad_norm: float, ema_decay: float,
    ) -> None:  # fmt: skip
        self.name, self.objective, self.steps, self.batch_size = name, objective, steps, batch_size
        self.warmup_steps, self.learning_rate, self.grad_norm = warmup_steps, learning_rate, grad_norm
        self.parameters = [p for p in objective.network.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=learning_rate, weight_decay=weight_decay)
        self.ema = Ema(objective.network, ema_decay)
        self.step = 0

    def rate(self, step: int) -> float:
        """Learning rate of a step: linear warm-up, then a cosine down to 0 at the last step."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))

    def train_step(self) -> dict[str, float]:
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate(self.step)
        losses = self.objective.losses(self.step)
        losses["loss"].backward()
        norm = nn.utils.clip_grad_norm_(self.parameters, self.grad_norm)
        if not torch.isfinite(norm):
            raise BuilderError(
                f"the {self.name} loss is not finite at step {self.step}",
                "lower the learning rate; run again to go on from the last state",
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update(self.objective.network, self.step)
        self.step += 1
        return {**{name: value.item() for name, value in losses.items()}, "grad_norm": norm.item()}

    def state_dict(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "network": self.objective.network.state_dict(),
            "ema": self.ema.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.objective.network.load_state_dict(state["network"])
        self.ema.model.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]


class States:
    """The resume states of a run: OUT/state/STAGE-00001000.pt, written whole, the last two of each stage kept."""

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self.folder, self.fingerprint = folder, fingerprint

    def _files(self, stage: str) -> list[Path]:
        return sorted(
            path for path in self.folder.glob(f"{stage}-*.pt") if re.fullmatch(rf"{stage}-\d{{8}}\.pt", path.name)
        )

    def save(self, stage: Stage) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        target = self.folder / f"{stage.name}-{stage.step:08d}.pt"
        part = target.with_suffix(".part")
        with part.open("wb") as file:
            torch.save({"fingerprint": self.fingerprint, **stage.state_dict()}, file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(target)
        for old in self._files(stage.name)[:-KEPT_STATES]:
            old.unlink()

    def restore(self, stage: Stage, device: torch.device) -> bool:
        """Continue from the newest state, if there is one. BuilderError when it is of another configuration."""
        files = self._files(stage.name)
        if not files:
            return False
        state = torch.load(files[-1], map_location=device, weights_only=True)
        if state["fingerprint"] != self.fingerprint:
            raise BuilderError(
                f"{files[-1]} was made with another model, data, or training configuration",
                "train into another folder, or remove this one to start anew",
            )
        stage.load_state_dict(state)
        return True


class TrainingInterrupted(Exception):  # noqa: N818 - not an error
    """Ctrl-C or SIGTERM arrived; the state is saved."""


@contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Within the block SIGINT and SIGTERM only set a flag, which the callable reads; a second SIGINT raises at once."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # signals are the main thread's affair
        yield asked.is_set
        return

    def ask(number: int, frame: Any) -> None:
        if asked.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.set()

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_stage(
    stage: Stage, states: States, log: Path, *, every: int, on_checkpoint: Callable[[int], None] | None = None
) -> None:
    """Train `stage` to its last step, saving a state every `every` steps, and when a signal asks to stop.

    `on_checkpoint(step)` runs after each state. One line of JSON in `log` per 20 steps: stage, step, mean losses, rate.
    Raises TrainingInterrupted after a signal.
    """
    bar = tqdm(total=stage.steps, initial=stage.step, desc=stage.name, unit="step", dynamic_ncols=True, smoothing=0.05)
    sums: dict[str, float] = {}
    started, counted = time.monotonic(), 0
    with bar, stop_signals() as stop, log.open("a", encoding="utf-8") as file:
        while stage.step < stage.steps:
            for name, value in stage.train_step().items():
                sums[name] = sums.get(name, 0.0) + value
            counted += 1
            bar.update()
            last = stage.step == stage.steps
            if stage.step % LOG_EVERY == 0 or last:
                speed = counted * stage.batch_size / (time.monotonic() - started)
                means = {name: value / counted for name, value in sums.items()}
                line = {
                    "stage": stage.name,
                    "step": stage.step,
                    "rate": stage.rate(stage.step - 1),
                    "images_per_s": speed,
                    **means,
                }
                file.write(
                    json.dumps({k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in line.items()}) + "\n"
                )
                file.flush()
                bar.set_postfix_str(f"loss {means['loss']:.4f}, {speed:.1f} images/s")
                sums, started, counted = {}, time.monotonic(), 0
            if stage.step % every == 0 or last or stop():
                states.save(stage)
                if stop() and not last:
                    raise TrainingInterrupted(
                        f"stopped at {stage.name} step {stage.step} of {stage.steps}; run the same command to go on"
                    )
                if on_checkpoint:
                    on_checkpoint(stage.step)
                    started = time.monotonic()

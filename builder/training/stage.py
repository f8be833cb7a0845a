"""One stage of training (autoencoder or denoiser) and the loop that runs it: log, states, exact resume, safe stop.

All randomness of a step is drawn from a generator keyed by (seed, step), and the crops of a step are a function of
its number; so weights, averages and optimizer at step n are the whole state, and interrupted + resumed equals
uninterrupted bit for bit (same machine, same threads).
"""

from __future__ import annotations

import functools
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from tqdm import tqdm

from builder.errors import BuilderError
from builder.training.division import Division, Whole, divide
from builder.training.ema import Ema
from builder.training.log import Log
from builder.training.processes import Processes, chunks
from builder.training.states import States

LOG_EVERY = 20  # steps
MOST_SKIPPED = 20  # steps in a row whose gradients overflow in fp16, before training gives up


class Objective(Protocol):
    """What is trained: the network, and its loss on a part of the batch of a step."""

    network: nn.Module

    def losses(self, step: int, part: range) -> dict[str, Tensor]:
        """Means over the images `part` of the step's batch, by name; `loss` is the one that is minimised."""


@runtime_checkable
class StatefulObjective(Protocol):
    """An objective that itself learns, e.g. a critic; its state belongs to a stage's."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Stage:
    """A network with optimizer, learning-rate schedule and average.

    Without `processes` every process computes all of it by itself. With them each takes its share of the batch, in
    passes of at most `micro_batch` images; they may divide the weights too. precision: bf16, fp16 or fp32; of these
    fp16 has its loss scaled. betas, fused: of AdamW; fused takes one kernel for all weights, and other last bits.
    """

    def __init__(
        self, name: str, objective: Objective, *, steps: int, batch_size: int, learning_rate: float,
        warmup_steps: int, weight_decay: float, grad_norm: float, ema_decay: float, ema_on_cpu: bool = False,
        optimizer: str = "adamw", precision: str = "fp32", micro_batch: int = 0, processes: Processes | None = None,
        betas: tuple[float, float] = (0.9, 0.999), fused: bool = False,
    ) -> None:  # fmt: skip
        self.name, self.objective, self.steps, self.batch_size = name, objective, steps, batch_size
        self.warmup_steps, self.learning_rate = warmup_steps, learning_rate
        self.processes = processes
        count, rank = (processes.count, processes.rank) if processes else (1, 0)
        self.parts = chunks(batch_size, micro_batch, rank, count)
        make = functools.partial(
            make_optimizer, optimizer, learning_rate=learning_rate, weight_decay=weight_decay, betas=betas, fused=fused
        )
        self.division: Division
        if processes:
            self.division = divide(
                objective.network, make, grad_norm=grad_norm, precision=precision, passes=len(self.parts),
                processes=processes,
            )  # fmt: skip
        else:
            self.division = Whole(objective.network, make, grad_norm=grad_norm, loss_scaling=precision == "fp16")
        objective.network = self.division.network
        self.ema = Ema(self.division.pieces, ema_decay, on_cpu=ema_on_cpu)
        self.skipped = 0
        self.step = 0
        self.since = Means()  # the last checkpoint

    def rate(self, step: int) -> float:
        """Learning rate of a step: linear warm-up, then a cosine down to 0 at the last step."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))

    def train_step(self) -> dict[str, float]:
        """One optimizer step; the means of its losses over the whole batch."""
        for group in self.division.optimizer.param_groups:
            group["lr"] = self.rate(self.step)
        means: dict[str, float] = {}
        for part in self.parts:
            with self.division.passing():
                losses = self.objective.losses(self.step, part)
                self._backward(losses["loss"], len(part))
            for name, value in losses.items():
                means[name] = means.get(name, 0.0) + value.item() * (len(part) / self.batch_size)
        if self.processes:
            means = dict(zip(means, self.processes.sums(list(means.values())), strict=True))
        means["grad_norm"] = self._update()
        self.step += 1
        return means

    def _backward(self, loss: Tensor, images: int) -> None:
        """Gradients of the mean over the whole batch: parts differ in size by an image where it cannot be shared."""
        total = len(self.parts) * (self.processes.count if self.processes else 1)
        self.division.backward(loss * (images * total / self.batch_size))

    def _update(self) -> float:
        """Take the step; the norm that the gradients had."""
        norm = self.division.step()
        finite = math.isfinite(norm)
        self.skipped = 0 if finite else self.skipped + 1
        if self.skipped > (MOST_SKIPPED if self.division.scaler.is_enabled() else 0):
            raise BuilderError(
                f"the {self.name} loss is not finite at step {self.step}",
                "lower the learning rate; run again to go on from the last state",
            )
        if finite:
            self.ema.update(self.step)
        return norm if finite else 0.0

    def showing(self, shown: nn.Module) -> AbstractContextManager[None]:
        """Within the block, in the first process, `shown` has the averaged weights. All processes take part."""
        return self.division.showing(shown, self.ema)

    def state_dict(self) -> dict[str, Any]:
        """Of whole tensors, in the first process; all take part."""
        return {
            "step": self.step,
            "skipped": self.skipped,
            "since": [self.since.sums, self.since.count],
            "network": self.division.whole(self.division.pieces),
            "ema": self.division.whole(self.ema.average),
            "optimizer": self.division.optimizer_state(),
            "scaler": self.division.scaler.state_dict(),
            "objective": self.objective.state_dict() if isinstance(self.objective, StatefulObjective) else {},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.division.load(state["network"])
        self.ema.load(self.division.own(state["ema"]))
        self.division.load_optimizer_state(state["optimizer"])
        self.division.scaler.load_state_dict(state["scaler"])
        if isinstance(self.objective, StatefulObjective):
            self.objective.load_state_dict(state["objective"])
        self.since.sums, self.since.count = state["since"]
        self.step, self.skipped = state["step"], state["skipped"]


def make_optimizer(
    name: str,
    parameters: list[nn.Parameter],
    learning_rate: float,
    weight_decay: float,
    betas: tuple[float, float] = (0.9, 0.999),
    fused: bool = False,
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019), or with its moments in 8 bits (Dettmers 2022).

    BuilderError for the latter without its package.
    """
    if name == "adamw":
        return torch.optim.AdamW(
            parameters, lr=learning_rate, weight_decay=weight_decay, betas=betas, fused=fused or None
        )
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise BuilderError(
            f"train.optimizer adamw8bit needs the package bitsandbytes: {error}",
            "pip install bitsandbytes, or set train.optimizer to adamw",
        ) from None
    made: torch.optim.Optimizer = AdamW8bit(parameters, lr=learning_rate, weight_decay=weight_decay, betas=betas)
    return made


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
    stage: Stage, states: States, log: Log, *, every: int,
    on_checkpoint: Callable[[int], bool] | None = None, writes: bool = True,
) -> None:  # fmt: skip
    """Train `stage` to its last step, saving a state every `every` steps, and when a signal asks to stop.

    `on_checkpoint(step)` runs in all processes after each state; where it says True in any, training ends.
    Only a process that `writes` saves states, and shows how far it is. One line in `log` per 20 steps: stage, step,
    mean losses, rate.
    Raises TrainingInterrupted, in all processes, after a signal to any.
    """
    group = stage.processes
    bar = tqdm(
        total=stage.steps, initial=stage.step, desc=stage.name, unit="step", dynamic_ncols=True, smoothing=0.05,
        disable=not writes,
    )  # fmt: skip
    lately = Means()
    with bar, stop_signals() as asked:
        while stage.step < stage.steps:
            losses = stage.train_step()
            lately.add(losses)
            stage.since.add(losses)
            bar.update()
            last = stage.step == stage.steps
            stop = group.any(asked()) if group else asked()
            if writes and (stage.step % LOG_EVERY == 0 or last):
                bar.set_postfix_str(_log(stage, lately, log))
                lately = Means()
            if stage.step % every == 0 or last or stop:
                state = stage.state_dict()
                if writes:
                    states.save(stage.name, stage.step, state)
                del state  # put together, it takes the memory of all
                if stop and not last:
                    if group:
                        group.wait()
                    raise TrainingInterrupted(
                        f"stopped at {stage.name} step {stage.step} of {stage.steps}; run the same command to go on"
                    )
                if on_checkpoint:
                    with lately.paused():
                        enough = on_checkpoint(stage.step)
                    stage.since = Means()
                    if group.any(enough) if group else enough:
                        if writes and lately.count:
                            _log(stage, lately, log)
                        return


def _log(stage: Stage, lately: Means, log: Log) -> str:
    """Write what the last steps lost, and say it."""
    speed = lately.count * stage.batch_size / lately.seconds
    means = lately.means()
    log.write(stage.name, stage.step, {"rate": stage.rate(stage.step - 1), "images_per_s": speed, **means})
    return f"loss {means['loss']:.4f}, {speed:.1f} images/s"


class Means:
    """Running means of losses, and the seconds they took."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.count, self.started = 0, time.monotonic()

    def add(self, losses: dict[str, float]) -> None:
        self.count += 1
        for name, value in losses.items():
            self.sums[name] = self.sums.get(name, 0.0) + value

    def means(self) -> dict[str, float]:
        return {name: value / self.count for name, value in self.sums.items()}

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time within the block does not count."""
        began = time.monotonic()
        yield
        self.started += time.monotonic() - began

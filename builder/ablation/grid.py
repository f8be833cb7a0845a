"""The grid of an ablation: one training per (prompts, method, perceptual weight), sampled at every guidance."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

from builder.config import Config
from builder.config.types import Method
from builder.errors import BuilderError
from builder.phases import ClassTable, Phase


@dataclass(frozen=True)
class Run:
    """One training of the grid; `config` is what it trains and asks with."""

    style: str
    method: Method
    perceptual_weight: float
    config: Config

    @property
    def name(self) -> str:
        return f"{self.style}-{self.method}-p{self.perceptual_weight:g}"


def runs_of(config: Config) -> list[Run]:
    """The trainings of `config.ablation`. BuilderError when its grid is empty or names what isn't there."""
    grid = config.ablation
    if not grid.guidance:
        raise BuilderError(
            f"the config '{config.name}' has no ablation.guidance", "give a grid, as configs/ablation.yaml does"
        )
    if not config.model.base:
        raise BuilderError(
            f"the config '{config.name}' has no model.base", "an ablation looks for what of a base remains: name one"
        )
    for axis in ("prompts", "perceptual_weight", "method"):
        if not getattr(grid, axis):
            raise BuilderError(
                f"ablation.{axis} is an empty axis of the grid", "give at least one value, or leave it out"
            )
    combinations = itertools.product(grid.prompts.items(), grid.method, grid.perceptual_weight)
    return [_run(config, *combination) for combination in combinations]


def _run(config: Config, prompts: tuple[str, dict[str, str]], method: Method, weight: float) -> Run:
    style, own = prompts
    rate = config.ablation.learning_rate.get(method, config.train.learning_rate)
    return Run(
        style,
        method,
        weight,
        replace(
            config,
            classes=with_prompts(config.classes, own),
            model=replace(config.model, method=method),
            train=replace(config.train, perceptual_weight=weight, learning_rate=rate),
        ),
    )


def with_prompts(classes: ClassTable, prompts: dict[str, str]) -> ClassTable:
    """The classes, asked for by other prompts (by code). BuilderError for a code that is not among them, and for a
    prompt that is missing while others are given."""
    for code in prompts:
        classes.label(code)
    missing = [code for code in classes.codes if prompts and code not in prompts]
    if missing:
        raise BuilderError(
            f"ablation.prompts has none for {', '.join(missing)}", "give one for each class, or none at all ({})"
        )
    return ClassTable([Phase(phase.code, phase.name, prompts.get(phase.code, phase.prompt)) for phase in classes])

"""The config as a whole, and its sections besides `model` and `train`: type, range, default and description of a key.

A section can be made like a dataclass (`SampleConfig(steps=12)`, `dataclasses.replace`), and is checked whenever it is
made: BuilderError names every key that can't be, with what it must be. The order of keys is that of recorded JSON.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from builder.config.section import section
from builder.config.training import LoraConfig, ModelConfig, TrainConfig, VaeTrainConfig
from builder.config.types import (
    MONITOR,
    Classes,
    Features,
    Flag,
    Method,
    Name,
    Numbers,
    Rate,
    Real,
    Text,
    Whole,
    problem,
)
from builder.phases import HEALING_PHASES, ClassTable

NEGATIVE_PROMPT = (
    "blurry, out of focus, low quality, jpeg artifacts, cartoon, illustration, painting, anime, text, watermark, logo"
)
__all__ = [
    "NEGATIVE_PROMPT",
    "AblationConfig",
    "Config",
    "CropsConfig",
    "LoraConfig",
    "ModelConfig",
    "SampleConfig",
    "ScoreConfig",
    "ShardsConfig",
    "TrainConfig",
    "VaeTrainConfig",
]


@section("sample.")
class SampleConfig:
    """How an image is drawn. Every key is part of the fingerprint."""

    size: Whole = Field(default=512, ge=8, le=4096, description="Side of the images, px.")
    steps: Whole = Field(default=25, ge=1, le=1000, description="Steps of the scheduler.")
    guidance: Real = Field(default=3.0, ge=1, le=100, description="Guidance scale; 1 samples without guidance.")
    scheduler: Literal["dpmpp_2m_karras", "dpmpp_2m", "ddim", "euler", "heun", "unipc"] = Field(
        default="dpmpp_2m_karras", description="Solver; see sampling.schedulers."
    )
    negative_prompt: Text = Field(default=NEGATIVE_PROMPT, description="What guidance leads away from.")
    batch_size: Whole = Field(
        default=8, ge=1, le=4096, description="Images of a batch; it changes the last bits of pixels."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="Precision of the denoiser; auto: float32 on a CPU, bfloat16 on a GPU."
    )
    guidance_interval: Annotated[list[float], Numbers(0, 100_000, 2, or_empty=True)] = Field(
        default_factory=list,
        description="[low, high] in sigma: steps at other noise levels are not guided (Kynkäänniemi 2024). Empty: all.",
    )
    compile: Flag = Field(
        default=False,
        description="torch.compile of the denoiser's repeated blocks; it changes the last bits of pixels.",
    )


@section("score.")
class ScoreConfig:
    """The evaluation protocol of the scores; versioned apart from the images."""

    ssim_size: Whole = Field(default=512, ge=11, le=4096, description="Side that SSIM and LPIPS are evaluated at, px.")
    ssim_stride: Whole = Field(
        default=7,
        ge=1,
        le=512,
        description="Every how many px a window is taken. Odd: an even one meets the same phase of "
        "an image enlarged 8 times again and again.",
    )
    panel: Whole = Field(
        default=16, ge=1, le=4096, description="Real crops of each class that an image is compared with."
    )
    panel_seed: Whole = Field(default=0, description="Seed that the panel is drawn with.")
    features: Features = Field(
        default="efficientnet-lite0", description="Network of the features; see quality.features."
    )
    lpips: Text = Field(
        default="auto",
        min_length=1,
        description="A file of torchvision's AlexNet weights; auto: torch's cache, if they are there; off.",
    )


@section("shards.")
class ShardsConfig:
    """Shards on disk."""

    images_per_shard: Whole = Field(
        default=200,
        ge=1,
        le=100_000,
        description="100-250 are small enough to lose, and large enough to read in one go.",
    )
    codec: Literal["png"] = Field(default="png", description="Images are kept without loss.")


@section("crops.")
class CropsConfig:
    """Crops cut from photographs, and their split by patient."""

    margin: Real = Field(default=0.15, ge=0, le=10, description="Margin kept around the box, share of its longer side.")
    max_size: Whole = Field(
        default=512, ge=1, le=65536, description="Cap of a crop's side, px; larger ones are scaled down."
    )
    train: Real = Field(default=0.70, ge=0, le=1, description="Share of the crops to train on.")
    val: Real = Field(default=0.15, ge=0, le=1, description="Share to choose checkpoints by.")
    test: Real = Field(default=0.15, ge=0, le=1, description="Share that is only looked at in the end.")
    split_seed: Whole = Field(default=0, description="Another one gives another, equally good split.")

    @model_validator(mode="after")
    def _shares_sum_to_1(self) -> CropsConfig:
        if abs(self.train + self.val + self.test - 1) > 1e-6:
            raise problem(
                "mend crops.train, crops.val, crops.test",
                f"the split shares (train {self.train:g}, val {self.val:g}, test {self.test:g}) don't sum to 1",
            )
        return self


def _only_full() -> list[Method]:
    return ["full"]


def _only_minimal() -> dict[str, dict[str, str]]:
    return {"minimal": {}}


@section("ablation.")
class AblationConfig:
    """The prompt study as a grid: (prompts, perceptual weight, method) is trained, and sampled at each guidance."""

    prompts: dict[Text, dict[Text, Text]] = Field(
        default_factory=_only_minimal,
        description="By the name of a style, a prompt for each class code; a style without any asks with the classes' "
        "own.",
    )
    guidance: Annotated[list[float], Numbers(1, 100)] = Field(default_factory=list, description="Guidance scales.")
    perceptual_weight: Annotated[list[float], Numbers(0, 1000)] = Field(
        default_factory=lambda: [0.0], description="Weights of the perceptual loss."
    )
    method: list[Method] = Field(default_factory=_only_full, description="As model.method.")
    learning_rate: dict[Method, Rate] = Field(
        default_factory=dict,
        description="Of a method, in place of train.learning_rate: adapters need more than whole weights.",
    )
    pretrain: Text = Field(
        default="",
        description="Config of the base, which is trained into checkpoints/PRETRAIN first where it isn't there.",
    )


@section("")
class Config:
    """One experiment, from crops to shards."""

    name: Name = Field(default="default", description="Name of what is made; by default that of the file.")
    classes: Classes = Field(default=HEALING_PHASES, description="The classes, in the order of their labels.")
    checkpoint: Text = Field(
        default="demo", description="Checkpoint to draw from: NAME, NAME:best, NAME:STEP or a path."
    )
    real: Text = Field(default="phantom", description="Packed real dataset: a name or a path.")
    seed: Whole = Field(default=0, description="Seed of the run.")
    allow_leak: Text = Field(
        default="", description="Why to go on where held-out patients may have been seen; recorded with what is made."
    )
    model: ModelConfig = Field(default_factory=ModelConfig, description="The network.")
    crops: CropsConfig = Field(default_factory=CropsConfig, description="Crops cut from photographs.")
    train: TrainConfig = Field(default_factory=TrainConfig, description="Training.")
    sample: SampleConfig = Field(default_factory=SampleConfig, description="How an image is drawn.")
    score: ScoreConfig = Field(default_factory=ScoreConfig, description="How images are scored.")
    shards: ShardsConfig = Field(default_factory=ShardsConfig, description="Shards on disk.")
    ablation: AblationConfig = Field(default_factory=AblationConfig, description="The prompt study.")

    @model_validator(mode="after")
    def _monitor_names_a_class(self) -> Config:
        found = MONITOR.fullmatch(self.train.monitor)
        code = found["code"] if found else None
        if code is not None and code not in self.classes.codes:
            raise problem(
                f"the classes are {', '.join(self.classes.codes)}",
                f"train.monitor is {self.train.monitor!r}, and '{code}' is not among the classes",
            )
        return self

    def to_json(self) -> dict[str, Any]:
        """Plain data, as dataset.json and checkpoint.json keep it."""
        return {field.name: _plain(getattr(self, field.name)) for field in dataclasses.fields(self)}


def _plain(value: Any) -> Any:
    if isinstance(value, ClassTable):
        return value.to_json()
    if dataclasses.is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return value

"""The sections `model` and `train`, with `model.lora` and `train.vae`: what is trained, and how."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from builder.config.section import section
from builder.config.types import MOST, Flag, Method, Monitor, Numbers, Real, Text, Whole, problem


@section("model.lora.")
class LoraConfig:
    """Low-rank adapters (Hu 2021)."""

    rank: Whole = Field(default=16, ge=1, le=1024, description="Rank of the two factors of an adapter.")
    alpha: Real = Field(default=16.0, gt=0, le=65536, description="The adapter's output is scaled by alpha / rank.")
    dropout: Real = Field(
        default=0.0, ge=0, lt=1, description="Share of an adapter's inputs that is dropped in training."
    )
    targets: list[Text] = Field(
        default_factory=lambda: ["attention"],
        min_length=1,
        description="Layers that get an adapter: attention, feed-forward, projection, or ends of layers' names.",
    )


@section("model.")
class ModelConfig:
    """The network, and what its training starts from."""

    family: Literal["sdxl", "sd15"] = Field(default="sdxl", description="Family of the generator; see models.families.")
    base: Text = Field(
        default="",
        description="What to start from: a checkpoint, a diffusers folder, a .safetensors file or a hub id. "
        "Empty: the model is built from `architecture`.",
    )
    base_lineage: Literal["", "public"] = Field(
        default="",
        description="public declares that the base saw none of this site's patients. Empty: its lineage is what "
        "its own checkpoint.json says.",
    )
    method: Method = Field(
        default="full", description="full trains all of the denoiser; lora leaves it as it is and trains adapters."
    )
    lora: LoraConfig = Field(default_factory=LoraConfig, description="The adapters, where method is lora.")
    architecture: dict[Text, Any] = Field(
        default_factory=dict,
        description="Sizes of the parts: of a model without a base, or of a single file that are not the published "
        "model's. See models.building.",
    )


@section("train.vae.")
class VaeTrainConfig:
    """Training of the autoencoder, only when the model is built from scratch."""

    steps: Whole = Field(default=0, ge=0, le=MOST, description="Optimizer steps; 0: it is not trained.")
    batch_size: Whole = Field(default=32, ge=1, le=65536, description="Images of a step.")
    learning_rate: Real = Field(default=1e-3, ge=0, le=1, description="Highest learning rate.")
    kl_weight: Real = Field(
        default=1e-4, ge=0, le=1000, description="Weight of the KL divergence to a standard normal."
    )
    gradient_weight: Real = Field(default=1.0, ge=0, le=1000, description="Weight of the L1 loss of image gradients.")
    guided_steps: Whole = Field(
        default=0, ge=0, le=MOST, description="Steps led by principal components at first; see training.vae."
    )
    warmup_steps: Whole = Field(default=100, ge=0, le=MOST, description="Steps of linear warm-up.")
    ema_decay: Real = Field(default=0.995, ge=0, lt=1, description="Decay of the average of weights, per step.")
    views: Flag = Field(
        default=False, description="Learn from the denoiser's views (train.cached_views) instead of whole crops."
    )
    autocast: Flag = Field(default=False, description="bfloat16 arithmetic on the CPU too; a GPU always uses it.")
    perceptual_weight: Real = Field(
        default=0.0,
        ge=0,
        le=1000,
        description="Weight of a perceptual distance on EfficientNet-Lite0, in both stages; 0: none.",
    )
    adversarial_steps: Whole = Field(
        default=0,
        ge=0,
        le=MOST,
        description="Steps after the others that train the decoder against two critics; see training.adversarial.",
    )
    adversarial_batch_size: Whole = Field(default=32, ge=1, le=65536, description="Images of an adversarial step.")
    adversarial_learning_rate: Real = Field(
        default=2e-4, ge=0, le=1, description="Highest learning rate of decoder and grain head; the encoder is frozen."
    )
    adversarial_weight: Real = Field(
        default=0.25, ge=0, le=1000, description="Weight of what the critics hold against a reconstruction."
    )
    critic_learning_rate: Real = Field(default=4e-4, ge=0, le=1, description="Highest learning rate of the critics.")
    grain_channels: Whole = Field(
        default=0, ge=0, le=1024, description="Channels of noise that a grain head makes texture of; 0: no head."
    )


@section("train.")
class TrainConfig:
    """Training of the denoiser on the training split of a packed dataset."""

    size: Whole = Field(default=512, ge=8, le=4096, description="Side of the training images, px.")
    steps: Whole = Field(default=10_000, ge=1, le=MOST, description="Optimizer steps.")
    batch_size: Whole = Field(
        default=8, ge=1, le=65536, description="Images of an optimizer step, over all processes and accumulated passes."
    )
    micro_batch: Whole = Field(
        default=0,
        ge=0,
        le=65536,
        description="Images of one pass on one device, the rest is accumulated; 0: all of a process's share.",
    )
    learning_rate: Real = Field(default=3e-5, ge=0, le=1, description="Highest learning rate.")
    warmup_steps: Whole = Field(
        default=500, ge=0, le=MOST, description="Steps of linear warm-up; a cosine to 0 follows."
    )
    weight_decay: Real = Field(default=0.01, ge=0, le=1, description="AdamW's weight decay.")
    optimizer: Literal["adamw", "adamw8bit"] = Field(
        default="adamw", description="adamw8bit saves memory, and needs the package bitsandbytes."
    )
    grad_norm: Real = Field(default=0.5, ge=0, le=1_000_000, description="Norm that gradients are clipped to.")
    precision: Literal["auto", "bf16", "fp16", "fp32"] = Field(
        default="auto", description="Arithmetic; auto: bf16 on a GPU, fp32 on a CPU. Weights are kept in float32."
    )
    gradient_checkpointing: Flag = Field(default=False, description="Compute activations twice, to save memory.")
    prompt_dropout: Real = Field(default=0.2, ge=0, le=1, description="Share of captions dropped, for guidance.")
    ema_decay: Real = Field(default=0.999, ge=0, lt=1, description="Decay of the average of weights, per step.")
    ema_device: Literal["device", "cpu"] = Field(
        default="device", description="cpu is slower, and leaves the GPU the memory of one set of weights."
    )
    class_balanced: Flag = Field(default=True, description="Draw each class equally often.")
    augment: Flag = Field(
        default=True, description="Draw views of crops anew; false: whole crops, of which latents are kept."
    )
    cached_views: Whole = Field(
        default=0,
        ge=0,
        le=100_000,
        description="Views of each crop, drawn and encoded once; 0: drawn anew at each step.",
    )
    margin: Annotated[list[float], Numbers(0, 10, 2)] = Field(
        default_factory=lambda: [0.05, 0.15],
        description="Margin around the box, share of its longer side: [low, high].",
    )
    scale: Annotated[list[float], Numbers(0.1, 10, 2)] = Field(
        default_factory=lambda: [0.9, 1.1], description="Scale of a view: [low, high]."
    )
    colour_jitter: Real = Field(
        default=0.02, ge=0, le=1, description="Of brightness and contrast, a share; colour is the class signal."
    )
    flips: Flag = Field(default=True, description="Flip horizontally and vertically, with and without `augment`.")
    min_snr_gamma: Real = Field(
        default=0.0, ge=0, le=1000, description="Gamma of min-SNR weighting (Hang 2023); 0: none."
    )
    noise_offset: Real = Field(
        default=0.0, ge=0, le=10, description="Weight of noise that is equal over an image; 0: none."
    )
    perceptual_weight: Real = Field(
        default=0.0,
        ge=0,
        le=1000,
        description="Weight of a perceptual loss, which pulls towards ImageNet's looks; 0: none.",
    )
    perceptual_network: Literal["vgg16", "efficientnet-lite0"] = Field(
        default="vgg16", description="Network of the perceptual loss; efficientnet-lite0 is installed."
    )
    perceptual_file: Text = Field(default="", description="File of torchvision's VGG-16 weights.")
    checkpoint_every: Whole = Field(default=1000, ge=1, le=MOST, description="Steps between checkpoints.")
    keep_checkpoints: Whole = Field(default=3, ge=1, le=100_000, description="The newest that stay, beside the best.")
    evaluate_every: Whole = Field(
        default=0, ge=0, le=MOST, description="Steps between evaluations, a multiple of checkpoint_every; 0: never."
    )
    evaluate_images: Whole = Field(
        default=50, ge=2, le=1_000_000, description="Images drawn of each class in an evaluation."
    )
    monitor: Monitor = Field(default="kd", description="Figure that the best checkpoint is chosen by.")
    monitor_mode: Literal["auto", "min", "max"] = Field(
        default="auto", description="Whether a lower or a higher figure is better; auto: as the figure is meant."
    )
    patience: Whole = Field(
        default=0,
        ge=0,
        le=100_000,
        description="Evaluations without a better one, after which training ends; 0: never.",
    )
    threads: Whole = Field(default=1, ge=1, le=1024, description="Threads of the CPU that torch uses.")
    vae: VaeTrainConfig = Field(default_factory=VaeTrainConfig, description="Training of the autoencoder.")

    @model_validator(mode="after")
    def _evaluate_checkpoints(self) -> TrainConfig:
        if self.evaluate_every % self.checkpoint_every:
            raise problem(
                "only checkpoints are evaluated: give a multiple",
                f"train.evaluate_every {self.evaluate_every} is not a multiple of train.checkpoint_every "
                f"{self.checkpoint_every}",
            )
        return self

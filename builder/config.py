"""Typed configuration: YAML, preset, `--set a.b=c`; unknown keys and impossible values are refused. Fingerprints."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from builder.errors import BuilderError, did_you_mean
from builder.phases import HEALING_PHASES, ClassTable

PRESETS = ("fast", "quality")
NEGATIVE_PROMPT = (
    "blurry, out of focus, low quality, jpeg artifacts, cartoon, illustration, painting, anime, text, watermark, logo"
)


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (Hu 2021); targets: groups (attention, feed-forward, projection), or ends of layers' names."""

    rank: int = 16
    alpha: float = 16.0  # the adapter's output is scaled by alpha / rank
    dropout: float = 0.0
    targets: list[str] = field(default_factory=lambda: ["attention"])

    def __post_init__(self) -> None:
        _at_least(self, "model.lora", rank=1, alpha=0, dropout=0)


@dataclass(frozen=True)
class ModelConfig:
    """The network. `base` is what to start from: a checkpoint, a diffusers folder, a .safetensors file, or a hub id.

    Without a base it is built from `architecture`, which otherwise only says the sizes of a single file that are not
    the published model's. `base_lineage: public` declares that the base saw none of this site's patients; by default
    its lineage is what its own checkpoint.json says.
    """

    family: str = "sdxl"
    base: str = ""
    base_lineage: str = ""
    method: str = "full"  # or lora: the denoiser stays as it is, adapters are trained
    lora: LoraConfig = field(default_factory=LoraConfig)
    architecture: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _one_of(self, "model", method=("full", "lora"), base_lineage=("", "public"))


@dataclass(frozen=True)
class VaeTrainConfig:
    """Training of the autoencoder, only when the model is built from scratch (steps 0: not trained)."""

    steps: int = 0
    batch_size: int = 32
    learning_rate: float = 1e-3
    kl_weight: float = 1e-4
    gradient_weight: float = 1.0
    guided_steps: int = 0  # led by principal components at first; see training.vae
    warmup_steps: int = 100
    ema_decay: float = 0.995
    autocast: bool = False  # bfloat16 arithmetic on the CPU too; a GPU always uses it

    def __post_init__(self) -> None:
        _at_least(self, "train.vae", steps=0, batch_size=1, learning_rate=0, kl_weight=0, gradient_weight=0)


@dataclass(frozen=True)
class TrainConfig:
    """Training of the denoiser on the training split of a packed dataset."""

    size: int = 512
    steps: int = 10_000
    batch_size: int = 8  # images of an optimizer step, over all processes and accumulated passes together
    micro_batch: int = 0  # images of one pass on one device; 0: all of a process's share. The rest is accumulated
    learning_rate: float = 3e-5
    warmup_steps: int = 500
    weight_decay: float = 0.01
    optimizer: str = "adamw"  # or adamw8bit, which needs bitsandbytes
    grad_norm: float = 0.5
    precision: str = "auto"  # bf16, fp16, fp32; auto: bf16 on a GPU, fp32 on a CPU. Weights are kept in float32
    gradient_checkpointing: bool = False
    prompt_dropout: float = 0.2
    ema_decay: float = 0.999
    ema_device: str = "device"  # or cpu: slower, and leaves the GPU the memory of one set of weights
    class_balanced: bool = True
    augment: bool = True  # False: whole crops, of which the latents are cached
    cached_views: int = 0  # of each crop, drawn and encoded once; 0: drawn anew, and encoded, at each step
    margin: list[float] = field(default_factory=lambda: [0.05, 0.15])  # around the box, share of its longer side
    scale: list[float] = field(default_factory=lambda: [0.9, 1.1])
    colour_jitter: float = 0.02  # of brightness and contrast; colour is the class signal
    flips: bool = True  # with and without `augment`
    min_snr_gamma: float = 0.0
    noise_offset: float = 0.0
    perceptual_weight: float = 0.0  # of a perceptual loss, which pulls towards ImageNet's looks
    perceptual_network: str = "vgg16"  # or efficientnet-lite0, which is installed
    perceptual_file: str = ""  # torchvision's vgg16 weights
    checkpoint_every: int = 1000
    keep_checkpoints: int = 3  # the newest, beside the best
    evaluate_every: int = 0  # steps, a multiple of checkpoint_every; 0: never
    evaluate_images: int = 50  # generated per phase
    monitor: str = "kd"  # figure that the best checkpoint is chosen by
    monitor_mode: str = "auto"  # min, max; auto: as the figure is meant
    patience: int = 0  # evaluations without a better one, after which training ends; 0: it never does
    threads: int = 1
    vae: VaeTrainConfig = field(default_factory=VaeTrainConfig)

    def __post_init__(self) -> None:
        _at_least(self, "train", size=8, steps=1, batch_size=1, learning_rate=0, weight_decay=0, grad_norm=0)
        _at_least(self, "train", prompt_dropout=0, ema_decay=0, min_snr_gamma=0, checkpoint_every=1)
        _at_least(self, "train", keep_checkpoints=1, threads=1, micro_batch=0, noise_offset=0, perceptual_weight=0)
        _at_least(self, "train", colour_jitter=0, evaluate_every=0, evaluate_images=2, patience=0, cached_views=0)
        _range(self, "train", margin=0.0, scale=0.1)
        _one_of(
            self, "train", optimizer=("adamw", "adamw8bit"), precision=("auto", "bf16", "fp16", "fp32"),
            ema_device=("device", "cpu"), monitor_mode=("auto", "min", "max"),
            perceptual_network=("vgg16", "efficientnet-lite0"),
        )  # fmt: skip
        if self.evaluate_every % self.checkpoint_every:
            raise BuilderError(
                f"train.evaluate_every {self.evaluate_every} is not a multiple of checkpoint_every "
                f"{self.checkpoint_every}",
                "only checkpoints are evaluated",
            )


@dataclass(frozen=True)
class SampleConfig:
    """How an image is drawn. Every key is part of the fingerprint.

    `guidance_interval`: [low, high] in sigma; steps at other noise levels are not guided (see sampling.guidance).
    """

    size: int = 512
    steps: int = 25
    guidance: float = 3.0
    scheduler: str = "dpmpp_2m_karras"
    negative_prompt: str = NEGATIVE_PROMPT
    batch_size: int = 8
    dtype: str = "auto"  # auto: float32 on CPU, bfloat16 on GPU
    guidance_interval: list[float] = field(default_factory=list)  # empty: all noise levels
    compile: bool = False  # torch.compile of the denoiser's repeated blocks: changes the last bits

    def __post_init__(self) -> None:
        _at_least(self, "sample", size=8, steps=1, guidance=1, batch_size=1)  # guidance 1 samples without guidance
        if self.guidance_interval:
            _range(self, "sample", guidance_interval=0.0)


@dataclass(frozen=True)
class ScoreConfig:
    """The evaluation protocol of the scores; versioned apart from the images."""

    ssim_size: int = 512
    ssim_stride: int = 7  # odd: an even one meets the same phase of an image enlarged 8 times again and again
    panel: int = 16
    panel_seed: int = 0
    features: str = "efficientnet-lite0"  # or inception, dinov2:FOLDER, module:callable
    lpips: str = "auto"  # a file of torchvision's AlexNet weights; auto: torch's cache, if they are there; off

    def __post_init__(self) -> None:
        _at_least(self, "score", ssim_size=11, ssim_stride=1, panel=1)  # SSIM's window is 11 px wide


@dataclass(frozen=True)
class ShardsConfig:
    """Shards on disk. 100-250 images make one: small enough to lose, large enough to read in one go."""

    images_per_shard: int = 200
    codec: str = "png"

    def __post_init__(self) -> None:
        _at_least(self, "shards", images_per_shard=1)
        if self.codec != "png":
            raise BuilderError(f"shards.codec is '{self.codec}'", "images are kept without loss, as png")


@dataclass(frozen=True)
class CropsConfig:
    """Crops cut from photographs: margin around the box (share of its longer side), size cap, split shares."""

    margin: float = 0.15
    max_size: int = 512
    train: float = 0.70
    val: float = 0.15
    test: float = 0.15
    split_seed: int = 0


@dataclass(frozen=True)
class AblationConfig:
    """The prompt study as a grid: every (prompts, perceptual weight, method) is trained, and sampled at every guidance.

    prompts: by the name of a style, a prompt for each class code; a style without any asks with the classes' own.
    learning_rate: of a method, in place of train.learning_rate: adapters need more than whole weights.
    pretrain: config of the base, which is trained into checkpoints/PRETRAIN first where it isn't there.
    """

    prompts: dict[str, dict[str, str]] = field(default_factory=lambda: {"minimal": {}})
    guidance: list[float] = field(default_factory=list)
    perceptual_weight: list[float] = field(default_factory=lambda: [0.0])
    method: list[str] = field(default_factory=lambda: ["full"])
    learning_rate: dict[str, float] = field(default_factory=dict)
    pretrain: str = ""


@dataclass(frozen=True)
class Config:
    """One experiment, from crops to shards."""

    name: str = "default"
    classes: ClassTable = HEALING_PHASES
    checkpoint: str = "demo"
    real: str = "phantom"
    seed: int = 0
    allow_leak: str = ""  # the reason to go on where held-out patients may have been seen; recorded with what is made
    model: ModelConfig = field(default_factory=ModelConfig)
    crops: CropsConfig = field(default_factory=CropsConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    score: ScoreConfig = field(default_factory=ScoreConfig)
    shards: ShardsConfig = field(default_factory=ShardsConfig)
    ablation: AblationConfig = field(default_factory=AblationConfig)

    def to_json(self) -> dict[str, Any]:
        """Plain data, as dataset.json and checkpoint.json keep it."""
        return {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}


def load_config(source: str | None = None, overrides: Sequence[str] = (), preset: str | None = None) -> Config:
    """Read a config: a path, the name of a file in `configs/`, or None for the defaults; then `a.b=c` overrides.

    A preset, of those in `configs/presets/`, stands between the two; nothing remembers its name, only its values.
    Raises BuilderError for a missing file, an unknown key (the nearest one is suggested) or a value of a wrong type.
    """
    data: dict[str, Any] = {}
    where = "the defaults"
    if source is not None:
        path = find_config(source)
        where = str(path)
        data = _read(path)
        data["name"] = data.get("name", path.stem)
    if preset is not None:
        if preset not in PRESETS:
            raise BuilderError(f"unknown preset '{preset}'", did_you_mean(preset, PRESETS))
        data = _merged(data, _read(find_config(f"presets/{preset}")))
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise BuilderError(f"--set {override} has no '='", "write --set sample.steps=12")
        _put(data, key.strip().split("."), _parse(value, f"--set {override}", "quote the value"), override)
    return _build(Config, data, where, "")


def _parse(text: str | bytes, what: str, remedy: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise BuilderError(f"{what} is not valid YAML: {error}", remedy) from None


def _read(path: Path, extended_by: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The keys of a YAML file; with `extends: OTHER` (a config beside it, or in configs/) on top of that one's."""
    data = _parse(path.read_bytes(), str(path), "mend the file") or {}
    if not isinstance(data, dict):
        raise BuilderError(f"{path} holds a {type(data).__name__}, not keys and values", "write `key: value` lines")
    base = data.pop("extends", None)
    if base is None:
        return data
    beside = path.parent / f"{base}.yaml"
    other = beside if beside.is_file() else find_config(str(base))
    chain = (*extended_by, path.resolve())
    if other.resolve() in chain:
        raise BuilderError(f"{path} extends itself", "name another config under `extends:`")
    return _merged({**_read(other, chain), "name": path.stem}, data)


def _merged(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    """`top` over `base`, key by key through all levels."""
    merged = dict(base)
    for key, value in top.items():
        both = isinstance(value, dict) and isinstance(base.get(key), dict)
        merged[key] = _merged(base[key], value) if both else value
    return merged


def config_from_json(data: dict[str, Any]) -> Config:
    """The config that dataset.json or checkpoint.json keeps."""
    config: Config = _build(Config, data, "the recorded config", "")
    return config


def find_config(source: str) -> Path:
    """The file that `source` names: itself, or configs/SOURCE.yaml here or in the checkout."""
    folders = [Path("configs"), Path(__file__).resolve().parent.parent / "configs"]
    candidates = [Path(source), *(folder / f"{source}.yaml" for folder in folders)]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    known = sorted({path.stem for folder in folders for path in folder.glob("*.yaml")})
    raise BuilderError(f"there is no config '{source}'", f"give a path, or one of: {', '.join(known)}")


def fingerprint(keys: dict[str, Any]) -> str:
    """SHA-256 over the canonical JSON of what decides the images; equal fingerprints promise equal images."""
    return hashlib.sha256(json.dumps(keys, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _put(data: dict[str, Any], keys: list[str], value: Any, override: str) -> None:
    *parents, last = keys
    for key in parents:
        data = data.setdefault(key, {})
        if not isinstance(data, dict):
            raise BuilderError(
                f"--set {override}: '{key}' has no keys below it", "see the config reference in the README"
            )
    data[last] = value


def _plain(value: Any) -> Any:
    if isinstance(value, ClassTable):
        return value.to_json()
    if dataclasses.is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    return value


def _build(kind: Any, data: Any, where: str, prefix: str) -> Any:
    if not isinstance(data, dict):
        raise BuilderError(
            f"{where}: '{prefix.rstrip('.')}' must hold keys and values, not {data!r}",
            "write `key: value` lines below it",
        )
    types_of = typing.get_type_hints(kind)
    known = [f.name for f in dataclasses.fields(kind)]
    values = {}
    for key, value in data.items():
        if key not in known:
            raise BuilderError(f"{where}: unknown key '{prefix}{key}'", did_you_mean(str(key), known))
        values[key] = _value(types_of[key], value, where, prefix + key)
    return kind(**values)


def _value(kind: Any, value: Any, where: str, key: str) -> Any:
    if dataclasses.is_dataclass(kind):
        return _build(kind, value, where, key + ".")
    if kind is ClassTable:
        return _classes(value, where)
    expected = typing.get_origin(kind) or kind
    if expected is float and isinstance(value, str):
        value = _number(value)  # YAML reads 1e-3 as text
    if expected is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, expected) or (expected in (int, float) and isinstance(value, bool)):
        name = getattr(kind, "__name__", str(kind))
        raise BuilderError(f"{where}: '{key}' is {value!r}", f"it must be of type {name}")
    return value


def _at_least(section: Any, name: str, **least: float) -> None:
    """Refuse numbers of a config section that are not finite or too small; such a job would hang or fail late."""
    for key, low in least.items():
        value = getattr(section, key)
        if not low <= value < math.inf:
            raise BuilderError(f"{name}.{key} is {value}", f"it must be a number of at least {low}")


def _one_of(section: Any, name: str, **allowed: tuple[str, ...]) -> None:
    for key, values in allowed.items():
        value = getattr(section, key)
        if value not in values:
            raise BuilderError(f"unknown {name}.{key} '{value}'", did_you_mean(value, [v for v in values if v]))


def _range(section: Any, name: str, **least: float) -> None:
    """Refuse what is not a pair of numbers, the lower one first and at least so large."""
    for key, low in least.items():
        value = getattr(section, key)
        numbers = [v for v in value if isinstance(v, (int, float)) and not isinstance(v, bool)]
        if len(value) != 2 or len(numbers) != 2 or not low <= numbers[0] <= numbers[1] < math.inf:
            raise BuilderError(f"{name}.{key} is {value}", f"it must be two numbers from {low} up, the lower one first")


def _number(text: str) -> Any:
    try:
        return float(text)
    except ValueError:
        return text


def _classes(items: Any, where: str) -> ClassTable:
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise BuilderError(f"{where}: 'classes' must be a list of code, name, prompt", "see configs/wound-type.yaml")
    for item in items:
        for key in item:
            if key not in ("code", "name", "prompt"):
                raise BuilderError(
                    f"{where}: unknown key 'classes.{key}'", did_you_mean(str(key), ("code", "name", "prompt"))
                )
        for key in ("code", "name", "prompt"):
            if not isinstance(item.get(key), str):
                raise BuilderError(f"{where}: a class has no '{key}' (text) in {item!r}", "give code, name and prompt")
    return ClassTable.from_json(items)

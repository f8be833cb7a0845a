"""Where training starts from: a built or loaded pipeline, what of it is trained, and what is known of its past."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from builder.config import Config
from builder.errors import BuilderError
from builder.identity import incomparable, is_invented, joined_forms
from builder.models.building import Pipeline, latent_size
from builder.models.checkpoint import Checkpoint, Lineage
from builder.models.families import family_named
from builder.models.load import load_pipeline
from builder.models.lora import add_lora
from builder.models.source import base_of, locate
from builder.sampling.class_words import require_class_words
from builder.training.diffusion import DTYPES, precision_on

DECLARED = "declared: saw none of this site's patients"


@dataclass(frozen=True)
class Start:
    """The pipeline to train, float32 on the CPU; the base it was loaded from, if any, and how it is recorded."""

    pipeline: Pipeline
    base: Checkpoint | None
    named: dict[str, str]  # reference and sha256 of the base; lineage where it was declared

    @property
    def from_scratch(self) -> bool:
        """Whether no pretraining on other images is behind it: built from an architecture, or upon such a model."""
        if self.base is None:
            return True
        model = self.base.config.get("model") or {}
        return bool(model.get("architecture")) and not model.get("base")

    @property
    def lineage(self) -> Lineage | None:
        """Of the base; None without one."""
        if self.base is None:
            return None
        return Lineage(True, None, []) if "lineage" in self.named else self.base.lineage


def start(config: Config, *, download: bool = False) -> Start:
    """Build or load what `config.model` says.

    Raises BuilderError for an unknown family, a base that isn't there, of another family or for other sizes, a LoRA
    without a base, a declared lineage that the base itself contradicts, and a prompt whose class word its tokenizer
    cuts off.
    """
    begin = _start(config, download=download)
    tokenizers = [begin.pipeline.components[name] for name in family_named(config.model.family).tokenizers]
    require_class_words(tokenizers, config.classes)
    return begin


def _start(config: Config, *, download: bool) -> Start:
    model = config.model
    family = family_named(model.family)
    if model.base:
        base = locate(model.base, download)
        if base.family != family.name:
            raise BuilderError(
                f"the base '{model.base}' is of the family {base.family}, and model.family is {family.name}",
                f"set model.family to {base.family}, or choose another base",
            )
        pipeline = load_pipeline(base, architecture=model.architecture or None)
        latent_size(pipeline.vae, config.train.size)
        named = base_of(base, model.base)
        if model.base_lineage:
            if base.lineage.patients:
                raise BuilderError(
                    f"model.base_lineage declares that '{model.base}' saw none of this site's patients, but its own "
                    f"checkpoint.json names {len(base.lineage.patients)}",
                    "leave model.base_lineage out",
                )
            named["lineage"] = DECLARED
        return Start(pipeline, base, named)
    if not model.architecture:
        raise BuilderError("the config has neither model.base nor model.architecture", "start from configs/demo.yaml")
    if model.method == "lora":
        raise BuilderError("a LoRA adapts a base, and the config names none", "set model.base, or model.method to full")
    if config.train.vae.steps < 1:
        raise BuilderError("a model from scratch needs its autoencoder trained", "set train.vae.steps")
    return Start(family.build(model.architecture, config.train.size, config.seed), None, {})


def make_trainable(pipeline: Pipeline, config: Config, device: torch.device) -> None:
    """Move the denoiser to the device; in it, only what `config.model.method` trains takes gradients, in float32."""
    unet: Any = pipeline.unet.to(device).train()
    if config.model.method == "lora":
        lora = config.model.lora
        add_lora(unet, lora.rank, lora.alpha, lora.dropout, lora.targets, seed=config.seed)
    else:
        unet.requires_grad_(True)
    if config.train.gradient_checkpointing:
        unet.enable_gradient_checkpointing()


def narrow_frozen(pipeline: Pipeline, config: Config, device: torch.device) -> None:
    """Weights of the denoiser that are not trained, in the precision of the arithmetic: half the memory."""
    dtype = DTYPES.get(precision_on(config.train.precision, device))
    for parameter in pipeline.unet.parameters() if dtype else ():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)


def join_lineage(data: dict[str, Any], patients: list[str], base: Lineage | None) -> Lineage:
    """The patients of these crops and of the base; unknown when either's are, or when they can't be compared.

    Rendered patients of a base, which are nobody's, are left out where the crops' are others.
    """
    key = data.get("key_fingerprint")
    known, forms = bool(data.get("known") and patients), list(data.get("patient_forms") or ())
    if base is not None and not (is_invented(asdict(base)) and key != base.key_fingerprint):
        before = asdict(base)
        comparable = not base.patients or incomparable(before, "the base", data, "the crops") is None
        known = known and base.known and comparable
        patients, forms = sorted({*patients, *base.patients}), joined_forms(before, data)
    return Lineage(known, key, patients, data.get("patient_source"), forms)

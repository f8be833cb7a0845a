"""Bring in a checkpoint of the old system: its denoiser beside the other parts of the base that it was trained from."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from builder.crops import tables
from builder.errors import BuilderError
from builder.identity import COLUMN, Patient, PatientKey, incomparable, joined_forms, lineage_of, normalise
from builder.models.checkpoint import Checkpoint, Lineage, new_folder, save_adapter, write_description
from builder.models.history import History, read_legacy_history
from builder.models.legacy import (
    LegacyCheckpoint,
    State,
    full_weights,
    is_adapter,
    read_legacy,
    split_adapter,
)
from builder.models.lora import add_lora
from builder.models.source import base_of
from builder.models.strict import refuse_any
from builder.models.tensors import StoredTensors, listed, write_tensors
from builder.phases import HEALING_PHASES, ClassTable, Phase

STEM = "diffusion_pytorch_model"
EARLIER = "take an earlier checkpoint"
ROUNDING = 2.0**-7  # of a weight kept in bfloat16, relative; float16 rounds less, but for the smallest
SMALLEST = 1e-6


@dataclasses.dataclass(frozen=True)
class Request:
    """What to import. weights: ema, raw, or '' as the file's own config says. alpha: LoRA's, if the file lacks it."""

    file: Path
    base: Checkpoint
    target: Path
    reference: str = ""  # of the base, as an adapter will find it; its folder if empty
    weights: str = ""
    alpha: float | None = None
    history: Path | None = None
    lineage: Lineage = dataclasses.field(default_factory=Lineage)


def import_legacy(request: Request) -> tuple[Checkpoint, list[str]]:
    """Write the old checkpoint as a folder of ours; returns it, and notes on what was found.

    A full fine-tune becomes a pipeline of its own: the weights keep their dtype, and the base's other parts are linked
    where the file system can, else copied. LoRA becomes an adapter of the base. The weights stay on disk and pass
    one by one. Nothing in the file is executed.

    Raises BuilderError for a file that is not of the old layout, for weights that are not exactly those of the base's
    UNet (the first ten are named), and for a target that exists.
    """
    base = request.base
    if base.method != "full":
        raise BuilderError(f"the base '{base.name}' is an adapter itself", "fuse it: builder checkpoint export --fuse")
    if base.path.is_file():
        raise BuilderError(f"the base {base.path} is a single file", "give its diffusers folder, or its id on the hub")
    if request.target.exists():
        raise BuilderError(f"{request.target} exists", "choose another --to, or remove it")
    legacy = read_legacy(request.file)
    which, why = (request.weights, "") if request.weights else legacy.preferred()
    unet = unet_on_meta(base)
    shapes = {name: tuple(parameter.shape) for name, parameter in unet.named_parameters()}
    state = legacy.weights(which, shapes)
    where = f"{request.file} ({which} weights)"
    history, notes = read_legacy_history(request.history) if request.history else (History(), [])
    notes = [f"{which} weights are taken: {why}", *notes] if why else notes
    made = _describe(request, legacy, which, history)
    if is_adapter(state):
        adapter, own_base = split_adapter(state, shapes, where)
        _require_base(own_base, base, where)
        missing = [layer for layer in adapter.layers if layer not in adapter.alphas]
        alphas = {**adapter.alphas, **dict.fromkeys(missing, _alpha(request, legacy) if missing else 0.0)}
        made = dataclasses.replace(made, method="lora")
        _put_adapter(unet, adapter.layers, alphas, where)
        made = save_adapter(unet, made)
    else:
        weights = full_weights(state, shapes, where)
        with new_folder(request.target) as folder:
            _write_parts(base, folder)
            layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in weights.items()}
            write_tensors(folder / "unet" / f"{STEM}.safetensors", layout, weights.__getitem__)
            made = write_description(made, folder)
    return made, notes


def unet_on_meta(base: Checkpoint) -> Any:
    """The UNet of a base, with names and shapes but no values: what weights have to fit."""
    folder = base.path / "unet"
    try:
        config = UNet2DConditionModel.load_config(folder, local_files_only=True)
        with torch.device("meta"):
            return UNet2DConditionModel.from_config(config)
    except (OSError, ValueError, TypeError) as error:
        raise BuilderError(f"{folder} does not describe a UNet: {error}", "copy the whole base folder") from None


def _put_adapter(unet: Any, layers: dict[str, tuple[Tensor, Tensor]], alphas: dict[str, float], where: str) -> None:
    """Put an adapter (layer -> down, up; alpha) on a denoiser, which needs no values of its own."""
    ranks = {layer: down.shape[0] for layer, (down, _) in layers.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    add_lora(
        unet, rank, alpha, targets=list(layers),
        ranks={layer: value for layer, value in ranks.items() if value != rank},
        alphas={layer: value for layer, value in alphas.items() if value != alpha},
    )  # fmt: skip
    sides = {f"{layer}.lora_A.default.weight": down for layer, (down, _) in layers.items()}
    sides |= {f"{layer}.lora_B.default.weight": up for layer, (_, up) in layers.items()}
    refuse_any(where, [name for name, side in sides.items() if not side.isfinite().all()], "not finite", EARLIER)
    unet.load_state_dict(sides, strict=False, assign=True)


def _write_parts(base: Checkpoint, folder: Path) -> None:
    """A diffusers folder's parts but its UNet's weights. Weights are linked: nobody changes them in place."""
    index = base.path / "model_index.json"
    shutil.copyfile(index, folder / index.name)
    for part in json.loads(index.read_text(encoding="utf-8")):
        for file in sorted((base.path / part).glob("*")):
            if part == "unet" and file.name != "config.json":
                continue
            target = folder / part / file.name
            target.parent.mkdir(exist_ok=True)
            source = file.resolve()  # the hub's cache holds links itself
            if file.suffix != ".safetensors" or not _linked(source, target):
                shutil.copyfile(source, target)


def _linked(source: Path, target: Path) -> bool:
    """Whether `target` could be made a second name of `source`: not on another disk, nor where it is forbidden."""
    try:
        os.link(source, target)
    except OSError:
        return False
    return True


def patients_of(file: Path, key: PatientKey, base: Checkpoint) -> Lineage:
    """The lineage that a CSV with a column `patient` (or `patient#`) states: its patients' hashes, and the base's.

    Raises BuilderError when the table has no patient, or the base's patients can't be compared with them.
    """
    patients = [Patient(text, COLUMN) for text in tables.read_column(file, "patient") if normalise(text)]
    if not patients:
        raise BuilderError(f"{file} names no patient", "write one patient a line under the header 'patient'")
    stated, before = lineage_of(key, patients), dataclasses.asdict(base.lineage)
    if base.lineage.patients and (why := incomparable(before, f"the base '{base.name}'", stated, str(file))):
        raise BuilderError(why, "give the same --key-file, or leave --trained-on out: the lineage is then unknown")
    hashes = {patient.hash(key) for patient in patients} | set(base.lineage.patients)
    stated |= {"patients": sorted(hashes), "patient_forms": joined_forms(before, stated)}
    return Lineage(**stated)


def _require_base(own: State, base: Checkpoint, where: str) -> None:
    """An adapter is of no use on another base: where the file holds the base's weights, they must be those of BASE."""
    if not own:
        return
    stored = StoredTensors(base.path / "unet", STEM)
    other = [
        name
        for name, tensor in own.items()
        if not torch.allclose(tensor.float(), stored[name].float(), rtol=ROUNDING, atol=SMALLEST)
    ]
    if other:
        raise BuilderError(
            f"{where}: {len(other)} of the base's weights that it holds differ from '{base.name}': {listed(other)}",
            "give --base the model that it was trained from",
        )


def _alpha(request: Request, legacy: LegacyCheckpoint) -> float:
    """LoRA's alpha: asked for, or in the old config. It scales the adapter, so it is not guessed."""
    lora = legacy.config.get("lora")
    found = request.alpha or (lora.get("alpha") if isinstance(lora, dict) else legacy.config.get("lora_alpha"))
    if isinstance(found, bool) or not isinstance(found, (int, float)) or found <= 0:
        raise BuilderError(
            f"{request.file} does not say its adapter's alpha", "give --lora-alpha; the old system used twice the rank"
        )
    return float(found)


def _describe(request: Request, legacy: LegacyCheckpoint, which: str, history: History) -> Checkpoint:
    """What checkpoint.json says of it: the old config's prompts, size and sampling where they stand there."""
    base, old = request.base, legacy.config
    prompts = _prompts(old)
    size = _section(old, "model").get("resolution")
    sample = {
        "size": size,
        "guidance": _section(old, "quality").get("guidance_scale"),
        "steps": _section(old, "quality").get("inference_steps_production"),
        "negative_prompt": _section(old, "prompts").get("negative"),
    }
    of_epoch = [entry.metrics for entry in history.entries if entry.epoch == legacy.epoch]
    with legacy.path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return Checkpoint(
        request.target,
        family=base.family,
        classes=_classes(prompts),
        prompts=prompts,
        # The old system told the model that every crop was as large as the training size.
        original_sizes={code: [size] for code in prompts} if isinstance(size, int) else {},
        base=base_of(base, request.reference or base.reference),
        lineage=request.lineage,
        config={
            "sample": {key: value for key, value in sample.items() if value is not None},
            "imported": {
                "file": legacy.path.name, "sha256": digest, "weights": which, "timestamp": legacy.timestamp,
                "config": old, "monitor": history.monitor, "mode": history.mode,
                "history": [dataclasses.asdict(entry) for entry in history.entries],
            },
        },
        metrics=legacy.metrics or next(iter(of_epoch), {}),
        epoch=legacy.epoch,
        licence=base.licence,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )  # fmt: skip


def _prompts(old: dict[str, Any]) -> dict[str, str]:
    """Prompts by phase; the models of one phase each had only one, beside the name of the phase."""
    section = _section(old, "prompts")
    by_phase = section.get("phase_prompts")
    if not isinstance(by_phase, dict):
        phase, positive = _section(old, "data").get("phase"), section.get("positive")
        by_phase = {phase: positive} if phase in HEALING_PHASES.codes else {}
    return {code: " ".join(text.split()) for code, text in by_phase.items() if isinstance(text, str)}


def _classes(prompts: dict[str, str]) -> ClassTable | None:
    if not prompts or not set(prompts) <= set(HEALING_PHASES.codes):
        return None
    return ClassTable([Phase(p.code, p.name, prompts.get(p.code, p.prompt)) for p in HEALING_PHASES])


def _section(config: dict[str, Any], name: str) -> dict[str, Any]:
    section = config.get(name)
    return section if isinstance(section, dict) else {}

"""Checkpoints of the old system: one .pt file a checkpoint, a dict whose `unet_lora_state` holds the denoiser.

With the method 'full' that is the UNet's state dict. With LoRA it is a peft model's: each adapted layer as
`X.base_layer`, `X.lora_A.default`, `X.lora_B.default`, the other weights of the base beside them, all under
`base_model.model.`; diffusers' own layouts of adapters (`X.lora.down`, `X.processor.to_q_lora.down`) are read too.
`ema_state` is a second such dict, or a list in the order of the parameters (diffusers' EMAModel).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from builder.errors import BuilderError
from builder.models.history import plain
from builder.models.strict import Shapes, refuse_any, require_exact
from builder.models.tensors import listed
from builder.models.unpickle import read_pickled

PREFIXES = ("module.", "_orig_mod.", "base_model.model.", "ema_model.", "unet.")  # of wrappers around the UNet
SHADOWS = ("shadow", "ema_model", "state_dict", "module")  # where an averager keeps named weights
PEFT = re.compile(r"(?P<layer>.+)\.lora_(?P<side>[AB])(\.(?P<adapter>[^.]+))?\.weight")
DIFFUSERS = re.compile(r"(?P<layer>.+)\.lora(_layer)?\.(?P<side>down|up)\.weight")
PROCESSOR = re.compile(
    r"(?P<layer>.+)\.processor\.(?P<projection>to_q|to_k|to_v|to_out)_lora\.(?P<side>down|up)\.weight"
)
ALPHA = re.compile(r"(?P<layer>.+?)(\.lora)?\.(network_)?alpha")
BASE_LAYER = re.compile(r"(?P<layer>.+)\.base_layer\.(?P<weight>weight|bias)")

USE_EMA = "use_ema_weights_for_inference"  # in the old config: whether images were drawn from the average
REMEDY = "give --base the model that it was trained from"
State = dict[str, Tensor]


@dataclass(frozen=True)
class Adapter:
    """Low-rank changes of weights: layer -> (down [r, in, ...], up [out, r, ...]); each adds alpha / r * up @ down."""

    layers: dict[str, tuple[Tensor, Tensor]]
    alphas: dict[str, float]  # by layer, where the file says so


@dataclass(frozen=True)
class LegacyCheckpoint:
    """An old .pt file, its tensors still on disk. metrics and config are plain JSON."""

    path: Path
    epoch: int
    state: State
    ema: Any
    metrics: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    timestamp: str = ""

    def preferred(self) -> tuple[str, str]:
        """Which weights its own system drew images from, 'ema' or 'raw', and why, in words.

        Where the file's config doesn't say, it is the average, if there is one.
        """
        said = _anywhere(self.config, USE_EMA)
        if said is False:
            other = "; --weights ema takes their average" if self.ema else ""
            return "raw", f"the file's config says {USE_EMA}: false{other}"
        if not self.ema:
            also = f", though its config says {USE_EMA}: true" if said else ""
            return "raw", f"the file holds no averaged weights{also}"
        if said:
            return "ema", f"the file's config says {USE_EMA}: true; --weights raw takes the last ones"
        return "ema", f"the file's config does not say {USE_EMA}; --weights raw takes the last ones"

    def weights(self, which: str, shapes: Shapes) -> State:
        """The state of the raw weights or of their average ('ema'), under names without wrappers' prefixes.

        shapes: of the UNet's weights, for an average that is a list. Raises BuilderError when there is no average, or
        it has a layout that is not known.
        """
        if which == "raw":
            return self.state
        if not self.ema:
            raise BuilderError(f"{self.path} holds no averaged weights", "import with --weights raw")
        return _averaged(self.ema, self.state, shapes, self.path)


def read_legacy(path: Path) -> LegacyCheckpoint:
    """Open an old checkpoint, memory-mapped, executing nothing; BuilderError says what is missing or not right."""
    data = read_pickled(path)
    if not isinstance(data, dict):
        raise BuilderError(f"{path} holds a {type(data).__name__}, not the old layout's dict", "give checkpoint_*.pt")
    missing = [key for key in ("epoch", "unet_lora_state") if key not in data]
    if missing:
        there = listed([str(key) for key in data]) or "nothing"
        raise BuilderError(f"{path} has no {' and no '.join(missing)}; it holds {there}", "give checkpoint_*.pt")
    state = data["unet_lora_state"]
    if not isinstance(state, dict) or not state or not _are_weights(state):
        raise BuilderError(f"unet_lora_state in {path} is not a dict of weights", "give checkpoint_*.pt")
    epoch = plain(data["epoch"])
    if not isinstance(epoch, int):
        raise BuilderError(f"epoch in {path} is {epoch!r}, not a whole number", "give checkpoint_*.pt")
    metrics, config = plain(data.get("metrics") or {}), plain(data.get("config") or {})
    for name, part in (("metrics", metrics), ("config", config)):
        if not isinstance(part, dict):
            raise BuilderError(f"{name} in {path} is not a dict", "give checkpoint_*.pt")
    return LegacyCheckpoint(
        path, epoch, unwrapped(state), data.get("ema_state"), metrics, config, str(data.get("timestamp", ""))
    )


def unwrapped(state: Mapping[str, Tensor]) -> State:
    """The same weights without the prefixes that wrappers (peft, DDP, torch.compile) put before every name."""
    names = list(state)
    for _ in PREFIXES:
        for prefix in PREFIXES:
            if all(name.startswith(prefix) for name in names):
                names = [name.removeprefix(prefix) for name in names]
    return dict(zip(names, state.values(), strict=True))


def is_adapter(state: State) -> bool:
    """Whether the state holds LoRA weights, beside those of the base or alone."""
    return any(pattern.fullmatch(name) for name in state for pattern in (PEFT, DIFFUSERS, PROCESSOR))


def full_weights(state: State, shapes: Shapes, where: str) -> State:
    """The UNet's weights, in its order; BuilderError unless names and shapes are exactly those of `shapes`."""
    require_exact(where, shapes, _shapes(state), REMEDY)
    return {name: state[name] for name in shapes}


def split_adapter(state: State, shapes: Shapes, where: str) -> tuple[Adapter, State]:
    """The adapter, and the weights of its base as far as the state holds them, under the UNet's own names.

    Every name is accounted for, each layer has both sides, and their shapes are those of the layer; else BuilderError.
    """
    sides: dict[str, dict[str, Tensor]] = {}
    alphas: dict[str, float] = {}
    base: State = {}
    adapters: set[str] = set()
    unknown: list[str] = []
    twice: list[str] = []

    def put(place: dict[str, Tensor], key: str, name: str) -> None:
        (twice if key in place else []).append(name)
        place[key] = state[name]

    for name, tensor in state.items():
        if found := PEFT.fullmatch(name):
            adapters.add(found["adapter"] or "")
            put(sides.setdefault(found["layer"], {}), {"A": "down", "B": "up"}[found["side"]], name)
        elif found := PROCESSOR.fullmatch(name):
            projection = found["projection"] + (".0" if found["projection"] == "to_out" else "")
            put(sides.setdefault(f"{found['layer']}.{projection}", {}), found["side"], name)
        elif found := DIFFUSERS.fullmatch(name):
            put(sides.setdefault(found["layer"], {}), found["side"], name)
        elif (found := ALPHA.fullmatch(name)) and tensor.numel() == 1:
            alphas[found["layer"]] = float(tensor)
        elif (found := BASE_LAYER.fullmatch(name)) and f"{found['layer']}.{found['weight']}" in shapes:
            put(base, f"{found['layer']}.{found['weight']}", name)
        elif name in shapes:
            put(base, name, name)
        else:
            unknown.append(name)
    if len(adapters) > 1:
        raise BuilderError(f"{where} holds several adapters: {listed(sorted(adapters))}", "save the one that is meant")
    refuse_any(where, twice, "there under two names", "save each weight once")
    unknown += [f"{layer} (adapted)" for layer in sides if f"{layer}.weight" not in shapes]
    unknown += [f"{layer}.alpha" for layer in alphas if layer not in sides]
    refuse_any(where, unknown, "left over", REMEDY)
    halves = [f"{layer} ({side})" for layer, pair in sides.items() for side in ("down", "up") if side not in pair]
    refuse_any(where, halves, "missing", "save both sides of every adapted layer")
    require_exact(where, {name: shapes[name] for name in base}, _shapes(base), REMEDY)
    layers = {layer: (pair["down"], pair["up"]) for layer, pair in sides.items()}
    reshaped = [said for layer, pair in layers.items() if (said := _misfit(layer, *pair, shapes[f"{layer}.weight"]))]
    refuse_any(where, reshaped, "of another shape", REMEDY)
    return Adapter(layers, alphas), base


def _misfit(layer: str, down: Tensor, up: Tensor, shape: tuple[int, ...]) -> str:
    """What is wrong with the two sides of a layer whose weight has this shape; empty where they fit it."""
    outputs, *inputs = shape
    rank = down.shape[0] if down.ndim else 0
    if tuple(down.shape) == (rank, *inputs) and tuple(up.shape) == (outputs, rank, *[1] * (len(inputs) - 1)):
        return ""
    return f"{layer} {tuple(up.shape)} x {tuple(down.shape)} for {shape}"


def _shapes(state: State) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in state.items()}


def _averaged(ema: Any, state: State, shapes: Shapes, path: Path) -> State:
    where = f"ema_state in {path}"
    if isinstance(ema, dict) and isinstance(ema.get("shadow_params"), (list, tuple)):
        return _in_order(list(ema["shadow_params"]), state, shapes, where)
    if isinstance(ema, dict):
        for named in (ema, *(ema[key] for key in SHADOWS if isinstance(ema.get(key), dict))):
            if named and _are_weights(named):
                return unwrapped(named)
    found = listed([str(key) for key in ema]) if isinstance(ema, dict) else f"a {type(ema).__name__}"
    raise BuilderError(
        f"{where} has a layout that is not known: {found}",
        "known are a state dict, `shadow` with names, `shadow_params` in order; or import with --weights raw",
    )


def _in_order(values: list[Any], state: State, shapes: Shapes, where: str) -> State:
    """Name a list of averages: it is in the order of all parameters, or of those that were trained."""
    low_rank = [name for name in state if any(p.fullmatch(name) for p in (PEFT, DIFFUSERS, PROCESSOR))]
    choices = [low_rank, list(state)] if low_rank else [list(shapes)]
    for names in choices:
        if len(names) == len(values) and _are_weights(dict(zip(names, values, strict=True))):
            named = dict(zip(names, values, strict=True))
            require_exact(
                where, {name: shapes.get(name, tuple(state[name].shape)) for name in names}, _shapes(named), REMEDY
            )
            return named
    counts = " or ".join(str(len(names)) for names in choices)
    raise BuilderError(
        f"{where}: shadow_params has {len(values)} entries, the model {counts} weights", "import with --weights raw"
    )


def _anywhere(config: Mapping[str, Any], name: str) -> bool | None:
    """The value of a switch, in whatever section of the config it stands; None where it stands nowhere."""
    if isinstance(config.get(name), bool):
        return bool(config[name])
    found = (_anywhere(part, name) for part in config.values() if isinstance(part, Mapping))
    return next((value for value in found if value is not None), None)


def _are_weights(state: Mapping[Any, Any]) -> bool:
    return all(
        isinstance(name, str)
        and isinstance(value, Tensor)
        and value.is_floating_point()
        and value.layout == torch.strided
        and value.device.type == "cpu"
        for name, value in state.items()
    )

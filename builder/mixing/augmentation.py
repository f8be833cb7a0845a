"""The old training script's interface to synthetic images, served from accepted shards instead of a diffusion model.

In the script of the old system (src/training/training_utils.py) the import line is all that changes:

    from builder.mixing import AugmentationConfig, GenerativeAugmentationManager, GenerativeAugmentationCallback

Which images these are is said by the environment's BUILDER_DATASET, or by `dataset=`. New code takes MixedLoader.
"""

from __future__ import annotations

import copy
import os
import random
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from builder.errors import BuilderError, did_you_mean
from builder.mixing.guards import check_lineage, resolve
from builder.mixing.schedule import keyed_shuffle
from builder.mixing.sources import Source
from builder.shards.dataset import Dataset

RGB = ("depth_rgb", "thermal_rgb")  # photographs by either camera: both were, and are, served the same crops
MAPS = ("depth_map", "thermal_map")
SWITCH = "depth_rgb"  # whose setting is the switch for all modalities, beside each one's own
ENVIRONMENT, REAL_ENVIRONMENT = "BUILDER_DATASET", "BUILDER_REAL"
OLD_SETTINGS = "src.utils.production_config"  # the old system's module of settings


class AugmentationConfig:
    """The old settings, in the old places.

    Each has the value that the old system's `src.utils.production_config` gives it, where the program has imported
    that module, else a default. What steered the diffusion model (`inference_steps`, `max_loaded_models`) is kept so
    that scripts find it, and changes nothing: the images are there already.

    generative_settings:
        output_size: {'height', 'width'} in px, where a call names none.
        prob: how often `should_generate` says yes, 0-1.
        mix_ratio_range: share of a batch that the old augmentation function replaces, (least, most).
        batch_size_limit: most images of one call.
        phases: codes of the phases that `should_generate` says yes to; None: all that the dataset has.
        max_value: what white is in the images: 255, or 1 where the training script divides its real images by 255.
    modality_settings[modality]: 'generative_augmentations' (its 'enabled' of depth_rgb is the switch for all), and
        'regular_augmentations', which the old augmentation function reads.
    """

    def __init__(self) -> None:
        size = _old_setting("IMAGE_SIZE", 128)
        self.generative_settings: dict[str, Any] = {
            "output_size": {"height": size, "width": size},
            "prob": _old_setting("GENERATIVE_AUG_PROB", 0.15),
            "mix_ratio_range": _old_setting("GENERATIVE_AUG_MIX_RATIO", (0.01, 0.05)),
            "inference_steps": _old_setting("GENERATIVE_AUG_INFERENCE_STEPS", 50),
            "batch_size_limit": _old_setting("GENERATIVE_AUG_BATCH_LIMIT", 32),
            "max_loaded_models": _old_setting("GENERATIVE_AUG_MAX_MODELS", 1),
            "phases": _old_setting("GENERATIVE_AUG_PHASES", None),
            "max_value": 255.0,
        }
        regular = bool(_old_setting("USE_GENERAL_AUGMENTATION", True))
        self.modality_settings: dict[str, dict[str, Any]] = {
            modality: {
                "regular_augmentations": _regular(regular, rgb=modality in RGB),
                "generative_augmentations": {"enabled": False},
            }
            for modality in (*RGB, *MAPS)
        }
        switch = self.modality_settings[SWITCH]["generative_augmentations"]
        switch["enabled"] = bool(_old_setting("USE_GENERATIVE_AUGMENTATION", True))


class Images(np.ndarray):
    """An array that also answers `.numpy()`, as the tensors did that the old callers got."""

    def numpy(self) -> np.ndarray:
        return self.view(np.ndarray)


class GenerativeAugmentationManager:
    """Synthetic images by phase, for the old training script; no model is loaded, no image is drawn.

    checkpoint_dir: of the old model; kept as an attribute, and not looked into.
    config: an AugmentationConfig, or the old system's own; it is read at every call.
    device: ignored.
    dataset: accepted synthetic images: a dataset's name in the working directory, a path, or a Dataset. Default: the
        environment's BUILDER_DATASET. One that was not filtered is served with a warning.
    real: the real dataset (name, path or Dataset) whose held-out patients the generator must not have seen. Default:
        the environment's BUILDER_REAL; without it nothing is checked, and a warning says so. allow_leak: the reason to
        use the images in spite of it.
    seed: of the order of the images, and of `should_generate`.

    The images of a phase come in shuffled order, each once, then in another order. All methods may be called from
    several threads; which thread gets which image is then left to chance. Made with the switch off (see
    AugmentationConfig), a manager needs no dataset, and generates nothing.

    checkpoint_path, config_path: the folder of the dataset's manifests, and its dataset.json. The old augmentation
        function asks only whether there are such attributes; there are none when switched off.
    BuilderError: no dataset is named, it is real or not complete, it lacks a phase that the config asks for, or leaks.
    """

    checkpoint_path: str
    config_path: str

    def __init__(
        self,
        checkpoint_dir: str | Path,
        config: Any,
        device: Any = None,
        *,
        dataset: str | Path | Dataset | None = None,
        real: str | Path | Dataset | None = None,
        allow_leak: str | None = None,
        seed: int = 0,
    ) -> None:
        self.checkpoint_dir = Path(checkpoint_dir)
        self.config = config
        self.device = device
        self._lock = threading.Lock()  # a Source is for one thread at a time
        self._own = threading.local()
        self._latest_phase: Any = None
        self._random = random.Random(seed)
        self._warned: set[str] = set()
        self._source: Source | None = None
        self._orders: dict[str, _Order] = {}
        if self._enabled(SWITCH):
            accepted = _accepted(dataset)
            _check(accepted, real, allow_leak)
            self._open(accepted, seed)

    def _open(self, dataset: Dataset, seed: int) -> None:
        self._source = Source(dataset)
        members = self._source.members(len(dataset.classes))
        for code, rows in zip(dataset.classes.codes, members, strict=True):
            if len(rows):
                self._orders[code] = _Order(rows, seed, code)
        missing = [phase for phase in self._phases if phase not in self._orders]
        if missing:
            raise BuilderError(
                f"dataset '{dataset.name}' has no image of {', '.join(missing)}, which is to be generated",
                f"it has {', '.join(self._orders)}: leave others out of GENERATIVE_AUG_PHASES (in the config: "
                "generative_settings['phases'])",
            )
        self.checkpoint_path = dataset.storage.path(f"manifests/{dataset.name}")
        self.config_path = dataset.storage.path(dataset.info_path)

    # -- what the old callers call --------------------------------------------------------------------------------

    def preload(self) -> None:
        """Nothing: there is no model to load before TensorFlow takes the GPUs."""

    def generate_images(
        self,
        modality: str,
        phase: str,
        batch_size: int = 1,
        target_height: int | None = None,
        target_width: int | None = None,
    ) -> Images | None:
        """The next images of a phase: float32 [N, target_height, target_width, 3] of RGB in 0-255.

        N is batch_size, at most the config's `batch_size_limit`. The values are in 0-255 because the old script's
        real images are (its EfficientNet scales them itself); the old manager gave 0-1, and beside them its images
        were almost black. A script that divides real images by 255 sets the config's `max_value` to 1.
        The square crops are fitted into other shapes in their middle, on black, as the old script fits real crops.

        None when switched off, and for maps (depth_map, thermal_map), of which there are no synthetic ones.
        BuilderError for a modality or phase that is not known, or an image that cannot be read.
        """
        source = self._source
        if source is None or not self._enabled(SWITCH) or not self._served(modality):
            return None
        code = _text(phase)
        if code not in self._orders:
            raise BuilderError(
                f"phase {phase!r} is not among those of dataset '{source.name}'",
                f"known: {', '.join(self._orders)}",
            )
        settings = self.config.generative_settings
        default = settings["output_size"]
        count = _positive(min(batch_size, settings["batch_size_limit"]), "batch_size")
        height = _positive(default["height"] if target_height is None else target_height, "target_height")
        width = _positive(default["width"] if target_width is None else target_width, "target_width")
        size = min(height, width)
        with self._lock:
            pixels = [source.pixels(row, size) for row in self._orders[code].take(count)]
        images = np.zeros((count, height, width, 3), np.float32)
        top, left = (height - size) // 2, (width - size) // 2
        images[:, top : top + size, left : left + size] = pixels
        images *= settings.get("max_value", 255.0) / 255.0
        return images.view(Images)

    def should_generate(self, modality: str) -> bool:
        """Whether to generate now: the modality is enabled, `current_phase` is among the phases, and the dice say so.

        With probability `prob` of the config. False where the phase is not known, as before: with a warning where
        TensorFlow only traces a graph, since then no image is ever mixed in.
        """
        if self._source is None or not self._enabled(SWITCH):
            return False
        if not self._enabled(modality) or not self._served(modality):
            return False
        phase = _text(self.current_phase)
        if phase is None and self.current_phase is not None:
            self._warn_once(
                f"current_phase is {type(self.current_phase).__name__}, which has no value while TensorFlow traces a "
                "graph: nothing is generated; set it, and call should_generate, within tf.py_function"
            )
        if phase not in self._phases:
            return False
        with self._lock:
            drawn = self._random.random()
        return drawn < float(self.config.generative_settings["prob"])

    @property
    def current_phase(self) -> Any:
        """The phase that `should_generate` is to judge: text, bytes, or a tensor of it.

        As this thread set it last (tf.data runs several at once), else as any did.
        """
        return getattr(self._own, "phase", self._latest_phase)

    @current_phase.setter
    def current_phase(self, phase: Any) -> None:
        self._own.phase = self._latest_phase = phase

    def cleanup(self) -> None:
        """Close the shards; a later call opens them again."""
        with self._lock:
            # As a worker process gets it: without open files. Those of the old one close when it goes.
            self._source = copy.copy(self._source)

    # -- what these ask -------------------------------------------------------------------------------------------

    @property
    def _phases(self) -> list[str]:
        wanted = self.config.generative_settings.get("phases", _old_setting("GENERATIVE_AUG_PHASES", None))
        return list(self._orders if wanted is None else wanted)

    def _enabled(self, modality: str) -> bool:
        _known(modality)
        return bool(self.config.modality_settings[modality]["generative_augmentations"]["enabled"])

    def _served(self, modality: str) -> bool:
        _known(modality)
        if modality in MAPS:
            self._warn_once(f"there are no synthetic images of {modality}: its real ones stay as they are")
        return modality in RGB

    def _warn_once(self, message: str) -> None:
        with self._lock:
            first = message not in self._warned
            self._warned.add(message)
        if first:
            warnings.warn(message, stacklevel=4)


def GenerativeAugmentationCallback(gen_manager: GenerativeAugmentationManager | None) -> Any:  # noqa: N802 - old name
    """A Keras callback that cleans up after training (of None: nothing). Needs TensorFlow, which the old script has."""
    from tensorflow.keras.callbacks import Callback

    class Cleanup(Callback):
        def on_train_end(self, logs: Any = None) -> None:
            if gen_manager is not None:
                gen_manager.cleanup()

    return Cleanup()


class _Order:
    """The rows of one phase, endlessly: each once in shuffled order, then in another order."""

    def __init__(self, rows: np.ndarray, *key: object) -> None:
        self._rows, self._key = rows, key
        self._round, self._place = -1, len(rows)

    def take(self, count: int) -> list[int]:
        taken: list[int] = []
        while len(taken) < count:
            if self._place == len(self._rows):
                self._round, self._place = self._round + 1, 0
                self._shuffled = self._rows[keyed_shuffle(len(self._rows), *self._key, self._round)]
            part = self._shuffled[self._place : self._place + count - len(taken)]
            taken += part.tolist()
            self._place += len(part)
        return taken


def _accepted(reference: str | Path | Dataset | None) -> Dataset:
    """The synthetic dataset meant, with a warning when nothing was ever filtered out of it."""
    reference = reference or os.environ.get(ENVIRONMENT)
    if not reference:
        raise BuilderError(
            "no dataset of synthetic images is named",
            f"set {ENVIRONMENT}=NAME (a name in the working directory, or a path) in the environment, or pass dataset=",
        )
    dataset = _complete(reference, "synthetic")
    if "filter" not in dataset.info:
        warnings.warn(
            f"dataset '{dataset.name}' was not filtered, bad images and copies of real ones are served too: "
            f"run `builder filter {dataset.name}` and name '{dataset.name}-accepted'",
            stacklevel=3,
        )
    return dataset


def _check(synthetic: Dataset, real: str | Path | Dataset | None, allow_leak: str | None) -> None:
    real = real or os.environ.get(REAL_ENVIRONMENT)
    if not real:
        warnings.warn(
            f"no real dataset is given (real=, or {REAL_ENVIRONMENT} in the environment): the lineage of "
            f"'{synthetic.name}' is not checked against anything",
            stacklevel=3,
        )
        return
    dataset = _complete(real, "real")
    dataset.classes.require_same(synthetic.classes, f"'{dataset.name}'", f"'{synthetic.name}'")
    check_lineage(synthetic, dataset, allow_leak)


def _complete(reference: str | Path | Dataset, origin: str) -> Dataset:
    dataset = resolve(reference, origin, ".", partial=True)
    if dataset.info["state"] != "complete":
        raise BuilderError(f"dataset '{dataset.name}' is not complete", "run its command again to finish it")
    return dataset


def _known(modality: str) -> None:
    if modality not in RGB + MAPS:
        raise BuilderError(f"there is no modality {modality!r}", did_you_mean(str(modality), RGB + MAPS))


def _positive(value: Any, name: str) -> int:
    if int(value) < 1:
        raise BuilderError(f"{name} is {int(value)}", "it must be 1 or more")
    return int(value)


def _text(value: Any) -> str | None:
    """What a phase says that comes as text, bytes or a tensor of these; None where it has no value (yet)."""
    if hasattr(value, "numpy"):
        try:
            value = value.numpy()
        except NotImplementedError:  # a tensor of a graph that is only traced
            return None
    if isinstance(value, bytes):
        return value.decode()
    return str(value) if isinstance(value, str) else None


def _old_setting(name: str, default: Any) -> Any:
    return getattr(sys.modules.get(OLD_SETTINGS), name, default)


def _regular(enabled: bool, *, rgb: bool) -> dict[str, Any]:
    """The old system's photometric augmentation of real images, which its own code carries out."""
    return {
        "enabled": enabled,
        "prob": 0.6,
        "brightness": {"enabled": True, "max_delta": 0.6 if rgb else 0.4},
        "contrast": {"enabled": True, "range": (0.6, 1.4)},
        "saturation": {"enabled": True, "range": (0.6, 1.4)} if rgb else {"enabled": False},
        "gaussian_noise": {"enabled": True, "stddev": 0.15 if rgb else 0.1},
    }

"""The old manager of generated images, serving accepted shards instead of a diffusion model.

Which images these are is said by the environment's BUILDER_DATASET, or by `dataset=`. New code takes MixedLoader.
"""

from __future__ import annotations

import copy
import os
import random
import threading
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from builder.errors import BuilderError, did_you_mean
from builder.legacy.served import ServedImages
from builder.legacy.settings import MAPS, RGB, SWITCH, WHITE, AugmentationConfig, old_setting, white_of
from builder.mixing.guards import check_lineage, resolve
from builder.mixing.schedule import keyed_shuffle
from builder.mixing.sources import Source
from builder.phases import HEALING_PHASES
from builder.shards.dataset import Dataset

ENVIRONMENT, REAL_ENVIRONMENT = "BUILDER_DATASET", "BUILDER_REAL"


class Images(np.ndarray):
    """An array that also answers `.numpy()`, as the tensors did that the old callers got."""

    def numpy(self) -> np.ndarray:
        return self.view(np.ndarray)


class GenerativeAugmentationManager:
    """Synthetic images by phase, for the old training script; no model is loaded, no image is drawn.

    The images of a phase come in shuffled order, each once, then in another order. All methods may be called from
    several threads; which thread gets which image is then left to chance. Made with the switch off (see
    AugmentationConfig), a manager needs no dataset, and generates nothing.

    Attributes:
        config: as given; it is read at every call, so settings may be changed later.
        served: how many images of each phase were served; a line is printed after every hundred.
        checkpoint_path, config_path: the folder of the dataset's manifests, and its dataset.json. The old augmentation
            function asks only whether there are such attributes; there are none when switched off.
    """

    checkpoint_path: str
    config_path: str

    def __init__(
        self,
        checkpoint_path: str | Path | None = None,
        config: Any = None,
        device: Any = None,
        *,
        base_dir: str | Path | None = None,
        checkpoint_dir: str | Path | None = None,
        dataset: str | Path | Dataset | None = None,
        real: str | Path | Dataset | None = None,
        allow_leak: str | None = None,
        seed: int = 0,
    ) -> None:
        """Open the dataset, unless the config is switched off.

        Args:
            checkpoint_path, base_dir, checkpoint_dir: where the old model was, by the name that the caller has for it
                (third version, second version, guide); kept as `model_path`, and not looked into.
            config: an AugmentationConfig, or the old system's own. Default: a new AugmentationConfig.
            device: ignored.
            dataset: accepted synthetic images: a dataset's name in the working directory, a path, or a Dataset.
                Default: the environment's BUILDER_DATASET. One that was not filtered is served with a warning.
            real: the real dataset (name, path or Dataset) whose held-out patients the generator must not have seen.
                Default: the environment's BUILDER_REAL; without it nothing is checked, and a warning says so.
            allow_leak: the reason to use the images in spite of it.
            seed: of the order of the images, and of `should_generate`.

        Raises:
            BuilderError: no dataset is named, it is real or not complete, it lacks a phase that the config asks for, or
                leaks; or the old model is named twice.
        """
        named = {"checkpoint_path": checkpoint_path, "base_dir": base_dir, "checkpoint_dir": checkpoint_dir}
        given = {name: value for name, value in named.items() if value is not None}
        if len(given) > 1:
            raise BuilderError(f"the old model is named twice, by {' and '.join(given)}", "give one of them")
        self.model_path = Path(next(iter(given.values()))) if given else None
        self.config = AugmentationConfig() if config is None else config
        self.device = device
        self.served = ServedImages({phase.code: phase.name for phase in HEALING_PHASES})
        self._lock = threading.Lock()  # a Source is for one thread at a time
        self._own = threading.local()
        self._latest_phase: Any = None
        self._random = random.Random(seed)
        self._warned: set[str] = set()
        self._source: Source | None = None
        self._orders: dict[str, _Order] = {}
        self._codes: tuple[str, ...] = ()  # of the dataset's classes, by label
        if self._enabled(SWITCH):
            accepted = _accepted(dataset)
            _check(accepted, real, allow_leak)
            self._open(accepted, seed)

    def _open(self, dataset: Dataset, seed: int) -> None:
        self._source, self._codes = Source(dataset), dataset.classes.codes
        self.served = ServedImages({phase.code: phase.name for phase in dataset.classes})
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
        if source is None or not self._enabled(SWITCH) or not self._has_images_of(modality):
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
        images *= white_of(self.config) / WHITE
        self.served.add(code, count)
        return images.view(Images)

    def should_generate(self, modality: str) -> bool:
        """Whether to generate now: the switch is on, `current_phase` is among the phases, and the dice say so.

        The switch is that of depth_rgb, also for thermal_rgb. The probability is the config's `prob`. False where the
        phase is not known, as before: with a warning where TensorFlow only traces a graph, since then no image is ever
        mixed in.
        """
        if not self._is_on_for(modality):
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

    def mix(self, modality: str, images: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Replace some images of a batch by synthetic ones of the same phase, as often as the config says.

        With probability `prob` a batch is mixed at all. Of one that is, a share drawn from `mix_ratio_range` is
        replaced; the number is rounded up or down at random so that it is right on average. Images of phases that the
        config leaves out, or of which the dataset has none, stay. `current_phase` is not asked.

        Args:
            modality: depth_rgb or thermal_rgb; of maps nothing is replaced.
            images: real images, [N, H, W, 3].
            labels: one-hot [N, classes], or labels [N], in the order of the dataset's classes.

        Returns:
            float32 [N, H, W, 3], and bool [N]: which of them are synthetic.

        Raises:
            BuilderError: labels do not fit the dataset's classes, or an image cannot be read.
        """
        mixed, replaced = np.array(images, np.float32), np.zeros(len(images), bool)
        if not len(images) or not self._is_on_for(modality):
            return mixed, replaced
        codes = self._codes_of(labels)
        settings = self.config.generative_settings
        low, high = settings["mix_ratio_range"]
        with self._lock:
            if self._random.random() >= float(settings["prob"]):
                return mixed, replaced
            wanted = len(images) * self._random.uniform(float(low), float(high))
            count = min(len(images), int(wanted + self._random.random()))
            chosen = self._random.sample(range(len(images)), count)
        height, width = images.shape[1:3]
        phases = set(self._phases)
        for code in sorted({codes[place] for place in chosen} & phases):
            places = [place for place in chosen if codes[place] == code]
            while places:
                made = self.generate_images(modality, code, len(places), height, width)
                if made is None:
                    return mixed, replaced  # switched off in between
                now, places = places[: len(made)], places[len(made) :]
                mixed[now], replaced[now] = made, True
        return mixed, replaced

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
        wanted = self.config.generative_settings.get("phases", old_setting("GENERATIVE_AUG_PHASES", None))
        return list(self._orders if wanted is None else wanted)

    def _codes_of(self, labels: np.ndarray) -> list[str]:
        """The phase of each label, which may be one-hot."""
        classes, labels = self._codes, np.asarray(labels)
        if labels.ndim == 2 and labels.shape[1] > 1:
            if labels.shape[1] != len(classes):
                raise BuilderError(
                    f"labels are one-hot of {labels.shape[1]} classes, the dataset has {', '.join(classes)}",
                    "serve a dataset of the script's own classes",
                )
            labels = labels.argmax(1)
        numbers = labels.reshape(len(labels)).astype(int).tolist()
        if numbers and not 0 <= min(numbers) <= max(numbers) < len(classes):
            raise BuilderError(
                f"there is a label {max(numbers, key=abs)}, the dataset has {', '.join(classes)}",
                "serve a dataset of the script's own classes",
            )
        return [classes[number] for number in numbers]

    def _is_on_for(self, modality: str) -> bool:
        """Whether images of this modality are mixed in; of a map that is switched on, a warning says that there are
        none."""
        _known(modality)
        if self._source is None or not self._enabled(SWITCH) or (modality in MAPS and not self._enabled(modality)):
            return False
        return self._has_images_of(modality)

    def _enabled(self, modality: str) -> bool:
        _known(modality)
        return bool(self.config.modality_settings[modality]["generative_augmentations"]["enabled"])

    def _has_images_of(self, modality: str) -> bool:
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


GenerativeAugmentationManagerSDXL = GenerativeAugmentationManager  # the third version's name

"""The old augmentation of batches of tf.data: synthetic images mixed in, real ones changed a little."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from builder.errors import BuilderError
from builder.legacy.manager import GenerativeAugmentationManager
from builder.legacy.settings import white_of

INPUT = "_input"  # behind a modality's name in the features of a batch
GREY = (0.2989, 0.587, 0.114)  # luma of R, G, B (ITU-R BT.601)

Features = Mapping[str, Any]


def create_enhanced_augmentation_fn(
    gen_manager: GenerativeAugmentationManager | None, config: Any
) -> Callable[[Features, Any], tuple[dict[str, Any], Any]]:
    """A function for `Dataset.map` over batches, as the old scripts call it.

    Of each image input (`depth_rgb_input`, ...) some images are replaced by synthetic ones of the same phase, as the
    config's `prob` and `mix_ratio_range` say. (The old function took the phase of a batch's first image for all of
    them.) The other images are changed as `regular_augmentations` of their modality says: each with probability
    `prob`, in brightness, contrast, saturation and noise. Synthetic images are not. Other inputs pass.

    Args:
        gen_manager: None: real images are changed, and none replaced.
        config: an AugmentationConfig; it is read when the function is mapped, but for what the manager reads.

    Returns:
        The function (features, label) -> (features, label). features: name -> [N, ...], images float32 [N, H, W, 3] in
        0..max_value of the config; label: one-hot [N, classes], or labels [N].

    Raises:
        BuilderError: TensorFlow is not installed.
    """
    tensorflow = _tensorflow()

    def apply_augmentation(features: Features, label: Any) -> tuple[dict[str, Any], Any]:
        changed = dict(features)
        for name, images in features.items():
            modality = name.removesuffix(INPUT)
            if name == modality or modality not in config.modality_settings:
                continue
            real = _changed(tensorflow, images, config, modality)
            if gen_manager is None:
                changed[name] = real
                continue
            mixed, synthetic = _mixed(tensorflow, gen_manager, modality, images, label)
            changed[name] = tensorflow.where(synthetic[:, None, None, None], mixed, real)
        return changed, label

    return apply_augmentation


def _tensorflow() -> Any:
    try:
        import tensorflow
    except ImportError:
        raise BuilderError("TensorFlow is not installed", "new code takes MixedLoader, which needs none") from None
    return tensorflow


def _mixed(
    tensorflow: Any, manager: GenerativeAugmentationManager, modality: str, images: Any, label: Any
) -> tuple[Any, Any]:
    """The batch with synthetic images in it, and which these are; also in a graph."""

    def mix(values: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return manager.mix(modality, values, labels)

    mixed, synthetic = tensorflow.numpy_function(mix, [images, label], [tensorflow.float32, tensorflow.bool])
    mixed.set_shape(images.shape)
    synthetic.set_shape(images.shape[:1])
    return mixed, synthetic


def _changed(tensorflow: Any, images: Any, config: Any, modality: str) -> Any:
    """Real images, each changed in brightness, contrast, saturation and noise with the config's probability.

    Brightness is shifted by a share of white; contrast is stretched about the mean of each channel, saturation about
    the luma; noise is normal. What leaves 0..white is cut off.
    """
    settings = config.modality_settings[modality]["regular_augmentations"]
    images = tensorflow.cast(images, tensorflow.float32)
    if not settings["enabled"]:
        return images
    random, white = tensorflow.random, white_of(config)
    each = [tensorflow.shape(images)[0], 1, 1, 1]
    values = images
    if settings["brightness"]["enabled"]:
        most = settings["brightness"]["max_delta"] * white
        values += random.uniform(each, -most, most)
    if settings["contrast"]["enabled"]:
        mean = tensorflow.reduce_mean(values, [1, 2], keepdims=True)
        values = mean + (values - mean) * random.uniform(each, *settings["contrast"]["range"])
    if settings["saturation"]["enabled"]:
        grey = tensorflow.reduce_sum(values * tensorflow.constant(GREY), 3, keepdims=True)
        values = grey + (values - grey) * random.uniform(each, *settings["saturation"]["range"])
    if settings["gaussian_noise"]["enabled"]:
        values += random.normal(tensorflow.shape(images), stddev=settings["gaussian_noise"]["stddev"] * white)
    values = tensorflow.clip_by_value(values, 0.0, white)
    return tensorflow.where(random.uniform(each) < settings["prob"], values, images)

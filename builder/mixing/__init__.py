"""Real and synthetic samples in one loader, at a ratio: `from builder.mixing import MixedLoader`."""

from builder.mixing.augmentation import (
    AugmentationConfig,
    GenerativeAugmentationCallback,
    GenerativeAugmentationManager,
)
from builder.mixing.loader import MixedLoader

__all__ = ["AugmentationConfig", "GenerativeAugmentationCallback", "GenerativeAugmentationManager", "MixedLoader"]

"""Real and synthetic samples in one loader, at a ratio: `from builder.mixing import MixedLoader`.

And the old training script's interface, which needs no torch: names are imported when they are asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from builder.mixing.augmentation import (
        AugmentationConfig,
        GenerativeAugmentationCallback,
        GenerativeAugmentationManager,
    )
    from builder.mixing.loader import MixedLoader

__all__ = ["AugmentationConfig", "GenerativeAugmentationCallback", "GenerativeAugmentationManager", "MixedLoader"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{'loader' if name == 'MixedLoader' else 'augmentation'}"), name)

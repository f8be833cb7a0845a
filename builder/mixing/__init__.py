"""Real and synthetic samples in one loader, at a ratio: `from builder.mixing import MixedLoader`.

And the old training script's interface (see builder.legacy), under the name that its files import it by. Names are
imported when they are asked for; the old interface needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from builder.legacy import (
        AugmentationConfig,
        GenerativeAugmentationCallback,
        GenerativeAugmentationManager,
        GenerativeAugmentationManagerSDXL,
        create_enhanced_augmentation_fn,
    )
    from builder.mixing.loader import MixedLoader

__all__ = [
    "AugmentationConfig",
    "GenerativeAugmentationCallback",
    "GenerativeAugmentationManager",
    "GenerativeAugmentationManagerSDXL",
    "MixedLoader",
    "create_enhanced_augmentation_fn",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("builder.mixing.loader" if name == "MixedLoader" else "builder.legacy"), name)

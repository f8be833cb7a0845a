"""The old training script's interface, served from accepted shards: no model is loaded, and no image is drawn.

| module | holds |
|---|---|
| `settings` | `AugmentationConfig`: the old settings in the old places |
| `manager` | `GenerativeAugmentationManager`, also called `GenerativeAugmentationManagerSDXL` |
| `served` | how many images of each phase were served, and what is printed of it |
| `augment` | `create_enhanced_augmentation_fn`, for batches of tf.data |
| `callback` | `GenerativeAugmentationCallback`, for Keras |

In the old files the name of the module is all that changes: `builder.mixing`, which hands these names on. See
docs/old-script.md. torch is not needed, and TensorFlow is imported only where it is there. Names load when asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from builder.legacy.augment import create_enhanced_augmentation_fn
    from builder.legacy.callback import GenerativeAugmentationCallback
    from builder.legacy.manager import GenerativeAugmentationManager, GenerativeAugmentationManagerSDXL
    from builder.legacy.settings import AugmentationConfig

_MODULE_OF = {
    "AugmentationConfig": "settings",
    "GenerativeAugmentationCallback": "callback",
    "GenerativeAugmentationManager": "manager",
    "GenerativeAugmentationManagerSDXL": "manager",
    "create_enhanced_augmentation_fn": "augment",
}

__all__ = [
    "AugmentationConfig",
    "GenerativeAugmentationCallback",
    "GenerativeAugmentationManager",
    "GenerativeAugmentationManagerSDXL",
    "create_enhanced_augmentation_fn",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)

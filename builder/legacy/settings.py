"""The old settings in the old places, with the values of the old system's module of settings where it is imported."""

from __future__ import annotations

import sys
from typing import Any

RGB = ("depth_rgb", "thermal_rgb")  # photographs by either camera: both were, and are, served the same crops
MAPS = ("thermal_map", "depth_map")
SWITCH = "depth_rgb"  # whose setting is the switch for generated images of both cameras
OLD_SETTINGS = "src.utils.production_config"  # the old system's module of settings
WHITE = 255.0


class AugmentationConfig:
    """The old settings, in the old places, with the defaults of the old system's third version.

    Each has the value that the old system's `src.utils.production_config` gives it, where the program has imported
    that module, else a default. What steered the diffusion model (`inference_steps`, `sdxl_resolution`,
    `guidance_scale`, `max_loaded_models`) is kept so that scripts find it, and changes nothing: the images are there.

    Attributes:
        generative_settings: what is served.
            output_size: {'height', 'width'} in px, where a call names none.
            prob: how often `should_generate` says yes, 0-1.
            mix_ratio_range: share of a batch that the augmentation function replaces, (least, most), 0-1.
            batch_size_limit: most images of one call.
            phases: codes of the phases that `should_generate` says yes to; None: all that the dataset has.
            max_value: what white is in the images: 255, or 1 where the script divides its real images by 255.
        modality_settings: by modality (depth_rgb, thermal_rgb, thermal_map, depth_map).
            generative_augmentations: its 'enabled' of depth_rgb switches both cameras' photographs; of maps there are
                no synthetic images.
            regular_augmentations: how the augmentation function changes real images. Lengths are shares of white.
    """

    def __init__(self) -> None:
        size = old_setting("IMAGE_SIZE", 128)
        self.generative_settings: dict[str, Any] = {
            "output_size": {"height": size, "width": size},
            "prob": old_setting("GENERATIVE_AUG_PROB", 0.15),
            "mix_ratio_range": old_setting("GENERATIVE_AUG_MIX_RATIO", (0.01, 0.05)),
            "inference_steps": old_setting("GENERATIVE_AUG_INFERENCE_STEPS", 50),
            "batch_size_limit": old_setting("GENERATIVE_AUG_BATCH_LIMIT", 32),
            "sdxl_resolution": old_setting("GENERATIVE_AUG_SDXL_RESOLUTION", 512),
            "guidance_scale": old_setting("GENERATIVE_AUG_SDXL_GUIDANCE_SCALE", 4.0),
            "max_loaded_models": old_setting("GENERATIVE_AUG_MAX_MODELS", 1),
            "phases": old_setting("GENERATIVE_AUG_PHASES", None),
            "max_value": WHITE,
        }
        regular = bool(old_setting("USE_GENERAL_AUGMENTATION", True))
        generative = bool(old_setting("USE_GENERATIVE_AUGMENTATION", True))
        self.modality_settings: dict[str, dict[str, Any]] = {
            modality: {
                "regular_augmentations": _regular(regular, rgb=modality in RGB),
                "generative_augmentations": {"enabled": generative and modality == SWITCH},
            }
            for modality in (*RGB, *MAPS)
        }


def old_setting(name: str, default: Any) -> Any:
    """A value of the old system's module of settings; `default` where the program has not imported that module."""
    return getattr(sys.modules.get(OLD_SETTINGS), name, default)


def white_of(config: Any) -> float:
    """What white is in the images of a script with this config: 255 unless it says otherwise."""
    return float(config.generative_settings.get("max_value", WHITE))


def _regular(enabled: bool, *, rgb: bool) -> dict[str, Any]:
    """How real images are changed: photographs in colour too, maps less."""
    return {
        "enabled": enabled,
        "prob": 0.5,
        "brightness": {"enabled": True, "max_delta": 0.1 if rgb else 0.08},
        "contrast": {"enabled": True, "range": (0.8, 1.2) if rgb else (0.85, 1.15)},
        "saturation": {"enabled": True, "range": (0.8, 1.2)} if rgb else {"enabled": False},
        "gaussian_noise": {"enabled": True, "stddev": 0.03 if rgb else 0.02},
    }

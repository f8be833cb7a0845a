"""The typed configuration: a YAML file, a preset and `--set a.b=c` become one frozen `Config`.

| module | holds |
|---|---|
| `models`, `training` | the sections and their keys: type, range, default and description of each |
| `section`, `types` | what makes a class a section; the types of keys that pydantic has no name for |
| `loading` | files, `extends`, presets and overrides, read into a `Config` |
| `errors` | what pydantic found, as one message for the user |
| `reference` | every key described, for messages and for a generated page |
| `hashing` | fingerprints |

Names are loaded when they are first asked for: pydantic takes a tenth of a second, and `builder --help` has no config.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from builder.config.hashing import fingerprint

if TYPE_CHECKING:
    from builder.config.loading import config_from_json, find_config, load_config
    from builder.config.models import (
        NEGATIVE_PROMPT,
        AblationConfig,
        Config,
        CropsConfig,
        LoraConfig,
        ModelConfig,
        SampleConfig,
        ScoreConfig,
        ShardsConfig,
        TrainConfig,
        VaeTrainConfig,
    )

PRESETS = ("fast", "quality")

_MODULE_OF = {
    "config_from_json": "loading",
    "find_config": "loading",
    "load_config": "loading",
    "NEGATIVE_PROMPT": "models",
    "AblationConfig": "models",
    "Config": "models",
    "CropsConfig": "models",
    "LoraConfig": "models",
    "ModelConfig": "models",
    "SampleConfig": "models",
    "ScoreConfig": "models",
    "ShardsConfig": "models",
    "TrainConfig": "models",
    "VaeTrainConfig": "models",
}

__all__ = [
    "NEGATIVE_PROMPT",
    "PRESETS",
    "AblationConfig",
    "Config",
    "CropsConfig",
    "LoraConfig",
    "ModelConfig",
    "SampleConfig",
    "ScoreConfig",
    "ShardsConfig",
    "TrainConfig",
    "VaeTrainConfig",
    "config_from_json",
    "find_config",
    "fingerprint",
    "load_config",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'builder.config' has no attribute '{name}'")
    return getattr(importlib.import_module(f"builder.config.{_MODULE_OF[name]}"), name)

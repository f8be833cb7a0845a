"""Samplers by name. All are deterministic: an image depends on its seed through the initial noise alone.

Noise levels and parameterisation (betas, prediction type, spacing) come from the checkpoint's scheduler config; only
the solver is chosen here. DPM-Solver++ 2M: Lu 2022; Karras spacing: Karras 2022; DDIM: Song 2021; UniPC: Zhao 2023.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from builder.errors import BuilderError, did_you_mean

_EVEN = {"use_karras_sigmas": False}
_KARRAS = {"use_karras_sigmas": True}
# A checkpoint's config may ask for a spacing of its own, which would contradict the name.
_OWN_SPACING = {"use_exponential_sigmas": False, "use_beta_sigmas": False, "use_lu_lambdas": False}
_DPM = {"algorithm_type": "dpmsolver++", "solver_order": 2, "solver_type": "midpoint"}

# Name: class in diffusers, and what it overrides in the checkpoint's scheduler config.
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "dpmpp_2m_karras": ("DPMSolverMultistepScheduler", {**_DPM, **_KARRAS}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {**_DPM, **_EVEN}),
    "ddim": ("DDIMScheduler", {"clip_sample": False}),  # latents have no fixed range to clip to
    "euler": ("EulerDiscreteScheduler", _EVEN),
    "heun": ("HeunDiscreteScheduler", {**_EVEN, "clip_sample": False}),  # two evaluations a step
    "unipc": ("UniPCMultistepScheduler", {**_EVEN, "solver_order": 2, "solver_type": "bh2"}),
}


def make_scheduler(name: str, checkpoint_config: Mapping[str, Any]) -> Any:
    """A fresh diffusers scheduler: solver `name`, noise levels of the checkpoint (`pipeline.scheduler.config`).

    BuilderError, with the nearest known name, for one that does not exist.
    """
    import diffusers

    if name not in SCHEDULERS:
        raise BuilderError(f"unknown scheduler '{name}' (sample.scheduler)", did_you_mean(name, SCHEDULERS))
    kind_name, overrides = SCHEDULERS[name]
    kind = getattr(diffusers, kind_name)
    known = inspect.signature(kind.__init__).parameters
    wanted = {**checkpoint_config, **_OWN_SPACING, **overrides}
    return kind.from_config({key: value for key, value in wanted.items() if key in known})

"""The grain head: fine texture that the latents cannot hold, made from noise and added to the decoded picture.

A photograph's grain (sensor noise, pores, fibrin) has far more numbers than the latents; a decoder can only average
over it, so its pictures are smooth. The head is a small convolutional network that reads the picture and channels of
unit noise at full resolution, and adds what it makes of them. The noise belongs to the image's seed
(`sampling.grain`), so the same seed has the same grain.

On disk the head is two files beside the autoencoder's own, `vae/grain.json` (its sizes) and `vae/grain.safetensors`
(its weights); the autoencoder stays a plain diffusers AutoencoderKL, which loads without the head and then gives
smoother pictures. To replay an image with plain diffusers: decode to floats (`output_type="pt"`, times 2, less 1),
draw `sampling.grain.grain_noise` of its seed, and call `load_grain(folder / "vae")(picture, noise)`.
In memory the head is attached to the autoencoder, outside its modules: so it is copied with it, and is none of its
weights.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from builder.errors import BuilderError
from builder.models.strict import require_exact
from builder.models.tensors import StoredTensors, write_tensors

STEM = "grain"
SIZES = f"{STEM}.json"
WEIGHTS = f"{STEM}.safetensors"
WIDTH = 32  # channels of the two hidden layers
REMEDY = "the head and its sizes are not of one model; copy the whole checkpoint folder again"
ATTACHED = "grain_head"


class GrainHead(nn.Module):
    """Picture and noise -> picture with grain. As it is made it changes nothing: its last layer is zero."""

    def __init__(self, noise_channels: int, width: int = WIDTH) -> None:
        """noise_channels: of unit noise that it reads, 1 or more. width: channels of its hidden layers."""
        super().__init__()
        self.noise_channels, self.width = noise_channels, width
        self.first = nn.Conv2d(3 + noise_channels, width, 3, padding=1)
        self.middle = nn.Conv2d(width, width, 3, padding=1)
        self.last = nn.Conv2d(width, 3, 3, padding=1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)  # type: ignore[arg-type]

    def forward(self, picture: Tensor, noise: Tensor) -> Tensor:
        """The picture with grain.

        Args:
            picture: decoded images [N, 3, H, W], around -1..1.
            noise: standard normal [N, noise_channels, H, W].

        Returns:
            Images [N, 3, H, W] in the picture's dtype.
        """
        hidden = functional.silu(self.first(torch.cat([picture, noise], dim=1)))
        hidden = functional.silu(self.middle(hidden))
        return picture + self.last(hidden).to(picture.dtype)


def new_head(noise_channels: int, seed: int) -> GrainHead:
    """A head with weights drawn from `seed`; the caller's random state is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return GrainHead(noise_channels)


def attach(vae: Any, head: GrainHead | None) -> None:
    """Give an autoencoder its head; None takes it away. `to` and `state_dict` of the autoencoder pass it by."""
    vae.__dict__.pop(ATTACHED, None)
    if head is not None:
        vae.__dict__[ATTACHED] = head


def head_of(vae: Any) -> GrainHead | None:
    """The head of an autoencoder; None where it has none."""
    found: GrainHead | None = vae.__dict__.get(ATTACHED)
    return found


def save_grain(vae: Any, folder: Path) -> None:
    """Write an autoencoder's head into its folder, weights as float16; without a head nothing is written.

    BuilderError for weights that are not finite.
    """
    head = head_of(vae)
    if head is None:
        return
    weights = {name: weight.detach().cpu() for name, weight in head.state_dict().items()}
    layout = {name: (torch.float16, tuple(weight.shape)) for name, weight in sorted(weights.items())}
    write_tensors(folder / WEIGHTS, layout, weights.__getitem__)
    sizes = {"noise_channels": head.noise_channels, "width": head.width}
    (folder / SIZES).write_text(json.dumps(sizes, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def load_grain(folder: Path) -> GrainHead | None:
    """The head in an autoencoder's folder, float32 on the CPU; None where there is none.

    BuilderError when one of its two files is missing or damaged, and when the weights are not just those of its sizes.
    """
    present = [(folder / name).is_file() for name in (SIZES, WEIGHTS)]
    if not any(present):
        return None
    if not all(present):
        missing, there = (SIZES, WEIGHTS) if present[1] else (WEIGHTS, SIZES)
        raise BuilderError(f"{folder} has {there}, but no {missing}", "copy the whole checkpoint folder again")
    head = _described(folder / SIZES)
    stored = StoredTensors(folder, STEM)
    expected = {name: tuple(weight.shape) for name, weight in head.state_dict().items()}
    given = {name: shape for name, (_, shape) in stored.layout.items()}
    require_exact(str(folder / WEIGHTS), expected, given, REMEDY)
    head.load_state_dict({name: stored[name].float() for name in expected})
    return head.eval().requires_grad_(False)


def _described(file: Path) -> GrainHead:
    """A head of the sizes in a file; BuilderError when that file says anything else than these."""
    try:
        sizes = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BuilderError(f"{file} cannot be read: {error}", "copy the whole checkpoint folder again") from None
    known = {"noise_channels", "width"}
    if not isinstance(sizes, dict) or set(sizes) != known:
        raise BuilderError(f"{file} does not give just {' and '.join(sorted(known))}", REMEDY)
    for name, value in sizes.items():
        if type(value) is not int or not 1 <= value <= 1024:
            raise BuilderError(f"{file}: {name} is {value!r}, not a whole number from 1 to 1024", REMEDY)
    return GrainHead(**sizes)

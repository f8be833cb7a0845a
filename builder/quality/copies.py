"""Copies: the training crop that an image most resembles, over flips, quarter turns, small crops and colour shifts.

SSIM and distances of features miss copies that are flipped, cropped or recoloured (Somepalli et al., CVPR 2023; Carlini
et al., USENIX Security 2023). Here two steps look at the pixels themselves. Everything is brought to 64 px, and colour
to one channel: lightness (max + min of R, G, B) / 2, which a change of hue leaves alone and brightness only scales.
1. Shortlist: low-frequency coefficients of the discrete cosine transform, without the lowest and normalised, are
   compared by matrix products in all eight dihedral forms (on the coefficients these are signs and a transpose), the
   whole image with windows of the training crops, and windows of the image with whole training crops.
2. Confirmation: the best candidates are aligned (quality.alignment); the score is the normalised cross-correlation of
   the band-passed lightness where they overlap, 1 for the same picture and 0 for a flat one.
The threshold from which on a score is an alarm comes from real crops of other patients: `calibrate`. Below it lie
pictures that share a layout, most of all one strong straight edge (a leg on a white sheet, twice: 0.78).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice, product
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter1d
from scipy.stats import binomtest

from builder.errors import BuilderError
from builder.quality.alignment import align, interpolation, invert, positions
from builder.shards.dataset import resize

SIZE = 64  # px; images are compared at this size, whatever their own
FINE, COARSE = 1.0, 4.0  # px; Gaussian sigmas of the band-pass
FLOOR = 0.5  # grey levels rms within the band; see alignment.align
WAVES, LOWEST = 12, 2  # frequencies of the descriptor: half waves across the image, from LOWEST to below WAVES
WINDOW = 0.9  # side of the windows, share of the image's
CANDIDATES = 8  # that are aligned
STEPS = ((2, 4), (1, 1))  # (reduction, steps of alignment), coarse to fine
CHUNK = 20  # images compared together
BLOCK = 256  # references of one matrix product, so that the products stay in the cache
UNIT = 4096  # length of a descriptor

TARGET = 1e-3  # share of other patients' real crops that may raise an alarm
TAIL = 0.2  # share of the scores that shapes the tail
LEAST_THRESHOLD, MOST_THRESHOLD = 0.65, 0.8  # real crops of different patients reach the one, altered copies the other
UNCALIBRATED: dict[str, Any] = {  # as `calibrate` gives it, where there are no other patients: the most careful alarm
    "threshold": LEAST_THRESHOLD, "alarms": 0, "n": 0, "rate": None, "interval": [0.0, 1.0], "patients": 0,
}  # fmt: skip


class CopyIndex:
    """Training crops, ready to be searched for what an image copies."""

    def __init__(
        self,
        images: Iterable[np.ndarray],
        keys: Sequence[str],
        groups: Sequence[str | None] | None = None,
        device: str = "cpu",
    ) -> None:
        """`images`: uint8 RGB [H, W, 3] of any sizes; `groups`: whose each is (patient), for `search(exclude=...)`.

        BuilderError when there are none, TypeError for another kind of image, ValueError for lengths that differ.
        """
        if not len(keys):
            raise BuilderError("there are no training crops to look for copies of", "check the split and the phases")
        self.keys = list(keys)
        self._groups = np.array([None] * len(keys) if groups is None else list(groups), dtype=object)
        self._references = _References(len(keys), windows=True, device=device)
        for chunk in _chunks(images):
            self._references.add(_Prepared.of(chunk, windows=True))
        if not len(keys) == len(self._groups) == len(self._references):
            raise ValueError("images, keys and groups must be of one length")

    def __len__(self) -> int:
        return len(self.keys)

    def search(
        self, images: Sequence[np.ndarray], exclude: Sequence[str | None] | None = None
    ) -> tuple[np.ndarray, list[str | None]]:
        """The scores, float64 [N] in [0, 1], and the keys of the training crops that the images most resemble.

        `exclude[i]`: the group that is left out for image i. Where that leaves no crop: score 0, key None.
        A score does not depend on the other images, nor on their order (to 1e-6). TypeError unless uint8 [H, W, 3].
        """
        left_out = [None] * len(images) if exclude is None else list(exclude)
        if len(left_out) != len(images):
            raise ValueError(f"exclude names {len(left_out)} groups for {len(images)} images")
        scores, places = [np.empty(0)], list[int | None]()
        for start, chunk in zip(range(0, len(images), CHUNK), _chunks(images), strict=True):
            allowed = [
                np.full(len(self), True) if group is None else self._groups != group
                for group in left_out[start : start + CHUNK]
            ]
            found = self._references.best(_Prepared.of(chunk, windows=True), np.stack(allowed))
            scores.append(found[0])
            places += found[1]
        return np.concatenate(scores), [None if place is None else self.keys[place] for place in places]


def find_duplicates(
    images: Iterable[np.ndarray], keys: Sequence[str], first: int = 0, device: str = "cpu"
) -> tuple[np.ndarray, list[str | None]]:
    """For each image of a phase, in order, the most similar EARLIER one: scores float64 [N] in [0, 1], and its key.

    The measure of `CopyIndex.search`, flips and quarter turns included, but only whole against whole (an offset of some
    5 % is still found): a generator repeats a picture in its frame. What is found for an image depends on the images
    before it alone; the first has none: score 0, key None. `first`: look up only the images from this place on, against
    all before them; the result begins there.
    """
    references = _References(len(keys), windows=False, device=device)
    scores, places = [np.empty(0)], list[int | None]()
    for chunk in _chunks(images):
        start = len(references)
        part = _Prepared.of(chunk, windows=False)
        references.add(part)
        asked = slice(max(0, first - start), None)
        numbers = np.arange(start, len(references))[asked]
        if len(numbers):
            found = references.best(part[asked], np.arange(len(references)) < numbers[:, None])
            scores.append(found[0])
            places += found[1]
    return np.concatenate(scores), [None if place is None else keys[place] for place in places]


def calibrate(scores: Sequence[float] | np.ndarray, patients: Sequence[str] | None = None) -> dict[str, Any]:
    """The alarm threshold, from the copy scores of real crops of patients that the training crops are not of.

    Above their 1 - TAIL quantile u the scores are taken to fall off exponentially (the generalised Pareto tail of
    Pickands, Ann. Statist. 3(1), 1975, at shape 0), with the mean excess m of the k scores there. The score that a next
    crop exceeds with probability TARGET, m itself being known from k values only, is then (Geisser, "Predictive
    Inference", 1993; for large k it is u + m log(TAIL / TARGET))
        threshold = u + m k ((TAIL / TARGET)^(1/k) - 1), within [LEAST_THRESHOLD, MOST_THRESHOLD].
    A bounded score falls off faster than that, so that the threshold errs towards fewer alarms, the more so the fewer
    scores there are: measured on phantoms, thresholds from 1,000 crops let 0.002 % of the others raise an alarm, from
    200 crops 0.04 %, from 60 crops 0.07 %. A normal tail on Fisher's z, tried too, lets 0.4 % (1,000 crops).
    Returns threshold, alarms (scores at or above it), n, rate = alarms / n, interval (exact 95 % by Clopper & Pearson,
    Biometrika 26, 1934; it treats crops of one patient as independent), patients (how many; None when not given).
    BuilderError without scores.
    """
    values = np.asarray(scores, dtype=np.float64)
    if not len(values):
        raise BuilderError(
            "there are no real crops of other patients to calibrate the copy alarm on", "pack crops of more patients"
        )
    start = float(np.quantile(values, 1 - TAIL))
    excess = values[values >= start] - start
    reach = len(excess) * ((TAIL / TARGET) ** (1 / len(excess)) - 1)
    threshold = min(max(start + float(excess.mean()) * reach, LEAST_THRESHOLD), MOST_THRESHOLD)
    alarms = int((values >= threshold).sum())
    interval = binomtest(alarms, len(values)).proportion_ci(0.95, "exact")
    return {
        "threshold": threshold,
        "alarms": alarms,
        "n": len(values),
        "rate": alarms / len(values),
        "interval": [float(interval.low), float(interval.high)],
        "patients": None if patients is None else len(set(patients)),
    }


def _chunks(images: Iterable[np.ndarray]) -> Iterator[list[np.ndarray]]:
    rest = iter(images)
    while chunk := list(islice(rest, CHUNK)):
        yield chunk


# -- preparation ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Prepared:
    """Images as they are compared."""

    bands: torch.Tensor  # float32 [N, 64, 64]: band-passed lightness, grey levels
    coefficients: np.ndarray  # float64 [N, windows, WAVES, WAVES]: weighted DCT of the whole image, then of its windows

    @classmethod
    def of(cls, images: Sequence[np.ndarray], windows: bool) -> _Prepared:
        light = np.stack([lightness(image) for image in images])
        bands = _blur(FINE) @ light @ _blur(FINE).T - _blur(COARSE) @ light @ _blur(COARSE).T
        down, across = _window_transforms(windows)
        return cls(torch.from_numpy(bands.astype(np.float32)), down @ light[:, None] @ across * _weights())

    def __len__(self) -> int:
        return len(self.bands)

    def __getitem__(self, part: slice) -> _Prepared:
        return _Prepared(self.bands[part], self.coefficients[part])


def lightness(image: np.ndarray) -> np.ndarray:
    """(max + min of R, G, B) / 2 at 64 px, float64 [64, 64] in grey levels; hue (of HSV or HSL) does not enter."""
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        what = f"{image.dtype} {list(image.shape)}" if isinstance(image, np.ndarray) else type(image).__name__
        raise TypeError(f"an image must be uint8 [H, W, 3], not {what}")
    red, green, blue = np.moveaxis(resize(image, SIZE).astype(np.float64), 2, 0)
    return (np.maximum(np.maximum(red, green), blue) + np.minimum(np.minimum(red, green), blue)) / 2


@cache
def _blur(sigma: float) -> np.ndarray:
    """Gaussian blur of a column of SIZE pixels as a matrix, edges mirrored."""
    return np.asarray(gaussian_filter1d(np.eye(SIZE), sigma, axis=0, mode="reflect"))


@cache
def _windows() -> np.ndarray:
    """Warps [10, 4] (see alignment.positions): the whole image, then 3 x 3 windows of side WINDOW."""
    offsets = (WINDOW - 1, 0.0, 1 - WINDOW)
    return np.array([(1, 0, 1, 0), *((WINDOW, x, WINDOW, y) for y, x in product(offsets, offsets))])


@cache
def _window_transforms(windows: bool) -> tuple[np.ndarray, np.ndarray]:
    """Matrices [W, WAVES, 64] and [W, 64, WAVES] between which an image becomes the DCT-II of each window."""
    wave, pixel = np.arange(WAVES)[:, None], np.arange(SIZE)
    transform = np.cos(np.pi * wave * (pixel + 0.5) / SIZE) * np.sqrt(np.where(wave == 0, 1, 2) / SIZE)
    warps = torch.from_numpy(_windows()[: None if windows else 1])
    across, down = (interpolation(positions(warps[:, i], warps[:, i + 1], SIZE), SIZE).numpy() for i in (0, 2))
    return transform @ down, np.swapaxes(transform @ across, 1, 2)


@cache
def _weights() -> np.ndarray:
    """[WAVES, WAVES]: sqrt(1 + frequency) against the natural fall-off of amplitudes; 0 outside the band."""
    wave = np.arange(WAVES)
    frequency = np.hypot(wave[:, None], wave)
    return np.sqrt(frequency + 1) * ((frequency >= LOWEST) & (frequency < WAVES))


def _descriptors(coefficients: np.ndarray) -> np.ndarray:
    """Descriptors float32 [..., D] of coefficients [..., WAVES, WAVES], of length UNIT (less for images nearly flat).

    Rounded to whole numbers: products of such vectors stay below 2^24, so that float32 sums are exact in any order, and
    the shortlist is the same on every device and in every batch.
    """
    values = coefficients[..., _weights() > 0]
    length = np.sqrt((values**2).sum(-1, keepdims=True) + (FLOOR * SIZE) ** 2)
    return np.rint(values * (UNIT / length)).astype(np.float32)


# The eight dihedral forms, numbered by bits: 4 transposes, then 2 flips top to bottom, then 1 flips left to right.


def _forms_of_coefficients(coefficients: np.ndarray) -> np.ndarray:
    """[..., WAVES, WAVES] -> [..., 8, WAVES, WAVES]: odd waves change their sign under a flip."""
    sign = (-1.0) ** np.arange(WAVES)
    transposed = np.swapaxes(coefficients, -1, -2)
    forms = [
        (transposed if form & 4 else coefficients) * (sign[:, None] if form & 2 else 1.0) * (sign if form & 1 else 1.0)
        for form in range(8)
    ]
    return np.stack(forms, -3)


def _forms_of_images(images: torch.Tensor) -> torch.Tensor:
    """[N, S, S] -> [N, 8, S, S]."""
    forms = []
    for form in range(8):
        turned = images.transpose(1, 2) if form & 4 else images
        flipped = [axis for axis, bit in ((1, 2), (2, 1)) if form & bit]
        forms.append(turned.flip(flipped) if flipped else turned)
    return torch.stack(forms, 1)


def _form_of_warp(warp: np.ndarray, form: int) -> np.ndarray:
    """Where a window [4] of an image lies in that form of the image."""
    scale_x, x, scale_y, y = (*warp[2:], *warp[:2]) if form & 4 else warp
    return np.array([scale_x, -x if form & 1 else x, scale_y, -y if form & 2 else y])


@cache
def _first_guesses(windows: bool) -> tuple[np.ndarray, np.ndarray]:
    """All ways to lay an image on a reference: the image's form [A], and the warp [A, 4] that alignment begins at.

    First the whole image on each window of the reference, forms running fastest; then each window of the image but the
    whole on the whole reference, forms again running fastest.
    """
    warps = _windows()[: None if windows else 1]
    on_windows = [(form, warp) for warp in warps for form in range(8)]
    of_windows = [(form, invert(_form_of_warp(warp, form))) for warp in warps[1:] for form in range(8)]
    forms, guesses = zip(*on_windows, *of_windows, strict=True)
    return np.array(forms), np.stack(guesses).astype(np.float32)


# -- references -------------------------------------------------------------------------------------------------------


class _References:
    """Up to `capacity` images that others are looked up among."""

    def __init__(self, capacity: int, windows: bool, device: str) -> None:
        self._windows, self._device, self._length = windows, torch.device(device), 0
        count, values = len(_windows()) if windows else 1, int((_weights() > 0).sum())
        # float16 halves the memory; its rounding (0.05 %) is far below that of the pixels.
        self._bands = torch.empty(capacity, SIZE, SIZE, dtype=torch.float16, device=self._device)
        self._descriptors = torch.empty(count, capacity, values, device=self._device)

    def __len__(self) -> int:
        return self._length

    def add(self, images: _Prepared) -> None:
        """Append images. ValueError beyond the capacity."""
        place = slice(self._length, self._length + len(images))
        if place.stop > len(self._bands):
            raise ValueError(f"there are more images than the {len(self._bands)} keys")
        self._bands[place] = images.bands.to(self._device)
        descriptors = torch.from_numpy(_descriptors(images.coefficients))
        self._descriptors[:, place] = descriptors.transpose(0, 1).to(self._device)
        self._length = place.stop

    def best(self, images: _Prepared, allowed: np.ndarray) -> tuple[np.ndarray, list[int | None]]:
        """Score, float64 [B], and place of the most similar reference that `allowed` [B, references] lets each have."""
        forms = torch.from_numpy(_descriptors(_forms_of_coefficients(images.coefficients))).to(self._device)
        candidates, usable = self._shortlist(forms, allowed)
        arrangement = self._arrange(forms, candidates)
        scores = self._confirm(images.bands.to(self._device), candidates, arrangement)
        scores = np.where(usable, scores.clip(0, 1), -1.0)
        chosen = scores.round(5).argmax(1)  # of references that are the same to rounding, the first of the shortlist
        rows = np.arange(len(scores))
        places = candidates.cpu().numpy()[rows, chosen]
        found = [
            int(place) if any_usable else None for place, any_usable in zip(places, usable[:, 0].tolist(), strict=True)
        ]
        return scores[rows, chosen].clip(0, 1), found

    def _shortlist(self, forms: torch.Tensor, allowed: np.ndarray) -> tuple[torch.Tensor, np.ndarray]:
        """Places [B, K] of the references with the best product in any arrangement, and whether they are allowed.

        `forms`: descriptors [B, windows, 8, D]. Equal products go by place, so that the choice is unique.
        """
        parts = []
        whole, rest = forms[:, 0].flatten(0, 1), forms[:, 1:].flatten(0, 2)
        for start in range(0, len(self), BLOCK):
            block = self._descriptors[:, start : min(start + BLOCK, len(self))]
            count, size = block.shape[:2]
            best = (whole @ block.flatten(0, 1).T).view(len(forms), 8 * count, size).amax(1)
            if self._windows:
                best = best.maximum((rest @ block[0].T).view(len(forms), -1, size).amax(1))
            parts.append(best)
        products = torch.cat(parts, 1).double().masked_fill(~torch.from_numpy(allowed).to(self._device), -torch.inf)
        place = torch.arange(len(self), device=self._device)
        values, candidates = (products * len(self) - place).topk(min(CANDIDATES, len(self)), 1)
        return candidates, torch.isfinite(values).cpu().numpy()

    def _arrange(self, forms: torch.Tensor, candidates: torch.Tensor) -> np.ndarray:
        """The arrangement (see _first_guesses) with the best product of each image and candidate: [B, K]."""
        chosen = self._descriptors[:, candidates]  # windows, B, K, D
        products = torch.einsum("bfd,wbkd->bkwf", forms[:, 0], chosen).flatten(2)
        if self._windows:
            of_windows = torch.einsum("bwfd,bkd->bkwf", forms[:, 1:], chosen[0]).flatten(2)
            products = torch.cat([products, of_windows], 2)
        return products.cpu().numpy().argmax(2)

    def _confirm(self, bands: torch.Tensor, candidates: torch.Tensor, arrangement: np.ndarray) -> np.ndarray:
        """Correlation after alignment with each candidate: float64 [B, K]."""
        forms, guesses = _first_guesses(self._windows)
        turned = _forms_of_images(bands)
        rows = torch.arange(len(bands), device=self._device)[:, None]
        form = torch.from_numpy(forms[arrangement]).to(self._device)
        template = turned[rows, form].flatten(0, 1)
        image = self._bands[candidates].flatten(0, 1).float()
        warp = torch.from_numpy(guesses[arrangement]).flatten(0, 1).to(self._device)
        for reduction, steps in STEPS:
            correlation, warp = align(_reduced(template, reduction), _reduced(image, reduction), warp, steps, FLOOR)
        return correlation.view(candidates.shape).double().cpu().numpy()


def _reduced(images: torch.Tensor, reduction: int) -> torch.Tensor:
    """Images [P, S, S] at a whole fraction of their size."""
    return images if reduction == 1 else F.avg_pool2d(images[:, None], reduction)[:, 0]

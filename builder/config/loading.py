"""Reading a config: a YAML file with what it extends, a preset, and overrides; then one check of all keys."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from builder.config import PRESETS
from builder.config.errors import as_builder_error
from builder.config.models import Config
from builder.display import printable
from builder.errors import BuilderError, did_you_mean
from builder.files import read_file


def load_config(source: str | None = None, overrides: Sequence[str] = (), preset: str | None = None) -> Config:
    """Read a config file, put a preset and overrides on top, and check all keys at once.

    Args:
        source: a path, the name of a file in `configs/`, or None for the defaults.
        overrides: `a.b=c` each; the value is YAML.
        preset: one of those in `configs/presets/`; it stands between the file and the overrides. Nothing remembers its
            name, only its values.

    Raises:
        BuilderError: for a missing file, and for keys that are unknown (the nearest one is suggested), of a wrong type
            or out of range: all of them together.
    """
    data: dict[str, Any] = {}
    where = "the defaults"
    if source is not None:
        path = find_config(source)
        where = str(path)
        data = _read(path)
        data["name"] = data.get("name", path.stem)
    if preset is not None:
        if preset not in PRESETS:
            raise BuilderError(f"unknown preset '{preset}'", did_you_mean(preset, PRESETS))
        data = _merged(data, _read(find_config(f"presets/{preset}")))
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise BuilderError(f"--set {override} has no '='", "write --set sample.steps=12")
        _put(data, key.strip().split("."), _parse(value, f"--set {override}", "quote the value"), override)
    return _checked(data, where, {override.partition("=")[0].strip(): f"--set {override}" for override in overrides})


def _checked(data: dict[str, Any], where: str, sources: Mapping[str, str] | None = None) -> Config:
    try:
        return TypeAdapter(Config).validate_python(data)
    except ValidationError as error:
        raise as_builder_error(error, Config, "", where, sources) from None


def _parse(text: str | bytes, what: str, remedy: str) -> Any:
    from builder.safe_yaml import parse_yaml

    return parse_yaml(text, what, remedy)


def _bytes(path: Path) -> bytes:
    from builder.safe_yaml import MAX_BYTES

    try:
        return read_file(path, MAX_BYTES + 1)
    except OSError as error:
        raise BuilderError(f"{printable(str(path))} cannot be read: {error.strerror}", "check the path") from None


def _read(path: Path, extended_by: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The keys of a YAML file; with `extends: OTHER` (a config beside it, or in configs/) on top of that one's."""
    data = _parse(_bytes(path), str(path), "mend the file") or {}
    if not isinstance(data, dict):
        raise BuilderError(f"{path} holds a {type(data).__name__}, not keys and values", "write `key: value` lines")
    base = data.pop("extends", None)
    if base is None:
        return data
    if not isinstance(base, str) or not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9_./-]{0,200}", base) or ".." in base:
        raise BuilderError(
            f"{path} extends '{printable(base, 60)}'", "name a config beside it, or one of configs/, without .yaml"
        )
    beside = path.parent / f"{base}.yaml"
    other = beside if beside.is_file() else find_config(str(base))
    chain = (*extended_by, path.resolve())
    if other.resolve() in chain:
        raise BuilderError(f"{path} extends itself", "name another config under `extends:`")
    return _merged({**_read(other, chain), "name": path.stem}, data)


def _merged(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    """`top` over `base`, key by key through all levels."""
    merged = dict(base)
    for key, value in top.items():
        both = isinstance(value, dict) and isinstance(base.get(key), dict)
        merged[key] = _merged(base[key], value) if both else value
    return merged


def config_from_json(data: dict[str, Any]) -> Config:
    """The config that dataset.json or checkpoint.json keeps. BuilderError for keys that can't be."""
    return _checked(data, "the recorded config")


def find_config(source: str) -> Path:
    """The file that `source` names: itself, or configs/SOURCE.yaml here or in the checkout."""
    folders = [Path("configs"), Path(__file__).resolve().parents[2] / "configs"]
    candidates = [Path(source), *(folder / f"{source}.yaml" for folder in folders)]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    known = sorted({path.stem for folder in folders for path in folder.glob("*.yaml")})
    raise BuilderError(f"there is no config '{source}'", f"give a path, or one of: {', '.join(known)}")


def _put(data: dict[str, Any], keys: list[str], value: Any, override: str) -> None:
    *parents, last = keys
    for key in parents:
        data = data.setdefault(key, {})
        if not isinstance(data, dict):
            raise BuilderError(
                f"--set {override}: '{key}' has no keys below it", "`builder config show` prints all keys"
            )
    data[last] = value

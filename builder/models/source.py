"""Where base weights come from: a checkpoint, a diffusers folder, one .safetensors file, or the Hugging Face hub."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

from builder.errors import BuilderError
from builder.models.checkpoint import Checkpoint, read_checkpoint, resolve
from builder.models.families import FAMILIES
from builder.models.single_file import family_of_file
from builder.trust import vouch

PICKLED = (".ckpt", ".pt", ".pth", ".bin")
HUB_ID = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)(@(?P<revision>[\w.-]+))?")


def locate(reference: str | Path, download: bool = False) -> Checkpoint:
    """The weights that `reference` means: a file, a folder, a checkpoint's name, or a hub's OWNER/NAME[@REVISION].

    Nothing is fetched unless `download` is True; what was fetched once is found again without. Raises BuilderError for
    a format that isn't read, and where there is nothing, saying what there is and how to fetch it.
    """
    path = Path(reference)
    if path.suffix in PICKLED:
        raise BuilderError(
            f"{reference}: pickled weights are not loaded, they can run code",
            "an old checkpoint: `builder checkpoint import`; else convert it to .safetensors",
        )
    if path.suffix == ".safetensors":
        if not path.is_file():
            raise BuilderError(f"there is no file {path}", "give the path of a .safetensors file")
        return Checkpoint(path, family=family_of_file(path).name)
    try:
        return resolve(reference)
    except BuilderError as error:
        found = HUB_ID.fullmatch(str(reference))
        if path.exists() or not found:
            raise
        return read_checkpoint(_from_hub(found["id"], found["revision"], download, error))


def base_of(checkpoint: Checkpoint, reference: str | Path) -> dict[str, str]:
    """How checkpoint.json names a base: the reference it was asked for by, the SHA-256 of its weights, our voucher."""
    voucher = vouch(str(reference))
    return {
        "reference": str(reference), "sha256": weights_sha256(checkpoint), **({"voucher": voucher} if voucher else {}),
    }  # fmt: skip


def weights_sha256(checkpoint: Checkpoint) -> str:
    """SHA-256 of what decides the images: of a single file its bytes, of a folder `Checkpoint.sha256`."""
    if not checkpoint.path.is_file():
        return checkpoint.sha256
    with checkpoint.path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _from_hub(name: str, revision: str | None, download: bool, missing: BuilderError) -> Path:
    """The folder of a hub's model in the local cache, fetched if asked; only what a family loads, in safetensors."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    options: dict[str, Any] = {"revision": revision, "allow_patterns": _patterns(), "local_files_only": not download}
    try:
        folder = Path(snapshot_download(name, **options))
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        if download:
            raise BuilderError(
                f"{name} cannot be fetched from the hub: {str(error).splitlines()[0]}",
                "check the name, the network, and whether its licence must be accepted there first",
            ) from None
        raise BuilderError(f"{missing.what}, nor has the hub's {name} been fetched", _remedy(missing)) from None
    if not (folder / "model_index.json").is_file():
        raise BuilderError(f"{name} in {folder} is not a whole pipeline: no model_index.json", _remedy(missing))
    return folder


def _patterns() -> list[str]:
    parts = {part: stem for family in FAMILIES.values() for part, (_, stem) in family.weights.items()}
    files = [
        "model_index.json",
        "scheduler/*.json",
        "tokenizer*/*.json",
        "tokenizer*/*.txt",
        "vae/grain.json",
        "vae/grain.safetensors",
    ]
    for part, stem in parts.items():
        files += [f"{part}/config.json", f"{part}/{stem}.safetensors"]
        files += [f"{part}/{stem}.safetensors.index.json", f"{part}/{stem}-*-of-*.safetensors"]
    return files


def _remedy(missing: BuilderError) -> str:
    return (
        "fetch it once with `--download`, where there is a network; later runs find it without. Or copy its diffusers "
        f"folder here and give the path; {missing.remedy}"
    )

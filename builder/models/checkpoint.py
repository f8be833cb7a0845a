"""Checkpoints on disk: a diffusers folder in safetensors, with `checkpoint.json` that says what it was trained on."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from builder.errors import BuilderError
from builder.phases import ClassTable

DEMO = Path(__file__).resolve().parent.parent / "demo" / "checkpoint"
FOLDER = Path("checkpoints")
DESCRIPTION = "checkpoint.json"
STEP = "step-"  # the folders of a training run: RUN/step-000100


@dataclass(frozen=True)
class Lineage:
    """The patients a generator has seen. `known` is False when nobody can say; then any reference might leak."""

    known: bool = False
    key_fingerprint: str | None = None
    patients: list[str] = field(default_factory=list)  # keyed hashes, sorted


@dataclass(frozen=True)
class Checkpoint:
    """A trained generator: its folder and what checkpoint.json says; a foreign diffusers folder has only the folder."""

    path: Path
    family: str = "sdxl"
    classes: ClassTable | None = None
    prompts: dict[str, str] = field(default_factory=dict)  # by class code, as trained with
    original_sizes: dict[str, list[int]] = field(default_factory=dict)  # by class code: quantiles of native sides, px
    lineage: Lineage = field(default_factory=Lineage)
    config: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    step: int = 0
    licence: dict[str, str] = field(default_factory=dict)  # base, data
    created: str = ""  # ISO 8601, UTC

    @property
    def name(self) -> str:
        """'demo', the folder's name, or of a training run RUN/step-000100."""
        if self.path == DEMO:
            return "demo"
        return f"{self.path.parent.name}/{self.path.name}" if self.path.name.startswith(STEP) else self.path.name

    @property
    def sha256(self) -> str:
        """SHA-256 over what decides the images: weights, and the settings of every part (scheduler, scale, tokens)."""
        total = hashlib.sha256(json.dumps(self.original_sizes, sort_keys=True).encode())
        parts = [path for path in self.path.glob("*/*") if path.suffix in (".safetensors", ".json", ".txt")]
        for file in sorted(parts, key=lambda path: path.relative_to(self.path).as_posix()):
            with file.open("rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
            total.update(f"{file.relative_to(self.path).as_posix()} {digest}\n".encode())
        return total.hexdigest()

    def to_json(self) -> dict[str, Any]:
        """What checkpoint.json holds: everything but the path."""
        data = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "path"}
        return {
            **data,
            "classes": self.classes.to_json() if self.classes else None,
            "lineage": dataclasses.asdict(self.lineage),
        }


def resolve(reference: str | Path) -> Checkpoint:
    """The checkpoint that `reference` names: 'demo', a folder, or a folder in ./checkpoints; a run means its last step.

    Raises BuilderError, listing what is there, when there is none.
    """
    for folder in [DEMO] if str(reference) == "demo" else [Path(reference), FOLDER / reference]:
        found = folder if (folder / "model_index.json").is_file() else last_step(folder)
        if found:
            return read_checkpoint(found)
    known = ["demo"] if (DEMO / "model_index.json").is_file() else []
    known += sorted(
        str(path.parent) for path in (*FOLDER.glob("*/model_index.json"), *FOLDER.glob("*/*/model_index.json"))
    )
    listed = (
        f"there are: {', '.join(known)}" if known else f"there are none in {FOLDER}/ yet; make one with `builder train`"
    )
    raise BuilderError(f"there is no checkpoint '{reference}' (a diffusers folder with model_index.json)", listed)


def last_step(run: Path) -> Path | None:
    """The checkpoint of the highest step in the folder of a training run."""
    steps = [path.parent for path in run.glob(f"{STEP}*/model_index.json")]
    return max(steps, key=lambda path: path.name, default=None)


def read_checkpoint(folder: Path) -> Checkpoint:
    """Describe a diffusers folder; without checkpoint.json its lineage is unknown."""
    file = folder / DESCRIPTION
    if not file.is_file():
        return Checkpoint(folder)
    try:
        data: dict[str, Any] = dict(json.loads(file.read_text(encoding="utf-8")))
        classes = ClassTable.from_json(data["classes"]) if data.get("classes") else None
        lineage = Lineage(**data.get("lineage", {}))
        known = {f.name for f in dataclasses.fields(Checkpoint)} - {"path", "classes", "lineage"}
        return Checkpoint(folder, classes=classes, lineage=lineage, **{key: data[key] for key in known if key in data})
    except (ValueError, KeyError, TypeError) as error:
        raise BuilderError(
            f"{file} cannot be read: {error!r}", "restore it, or remove it: the lineage is then unknown"
        ) from None


def save_checkpoint(pipeline: Any, checkpoint: Checkpoint) -> Checkpoint:
    """Write a diffusers pipeline to the folder `checkpoint.path`: float16 safetensors and checkpoint.json.

    The folder appears whole or not at all; one that is there already is replaced. The pipeline keeps its dtype.
    """
    import torch

    target = checkpoint.path
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".tmp-", dir=target.parent))
    try:
        modules = {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
        halves = {name: torch.nn.Module.to(copy.deepcopy(part), "cpu", torch.float16) for name, part in modules.items()}
        with without_bars():
            type(pipeline)(**{**pipeline.components, **halves, **_options(pipeline)}).save_pretrained(
                temporary, safe_serialization=True
            )
        text = json.dumps(checkpoint.to_json(), indent=1, sort_keys=True, allow_nan=False)
        (temporary / DESCRIPTION).write_text(text + "\n", encoding="utf-8")
        os.chmod(temporary, 0o755)
        if target.exists():
            shutil.rmtree(target)
        temporary.replace(target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return checkpoint


@contextlib.contextmanager
def without_bars() -> Iterator[None]:
    """Within the block transformers draws no progress bars: it has one for each file of weights."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _options(pipeline: Any) -> dict[str, Any]:
    """Constructor options of the pipeline that are not components, as its model_index.json keeps them."""
    return {key: value for key, value in pipeline.config.items() if key == "force_zeros_for_empty_prompt"}

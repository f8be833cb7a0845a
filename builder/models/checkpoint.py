"""Checkpoints on disk: a diffusers folder in safetensors, with `checkpoint.json` that says what it was trained on."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from builder.display import printable
from builder.documents import read_document, write_document
from builder.errors import BuilderError
from builder.files import TEMPORARY, fsync_folder, fsync_tree, full_disk_as_oserror
from builder.models.history import Entry, History
from builder.models.integrity import record_files
from builder.phases import ClassTable
from builder.shards.lock import held_file
from builder.trust import is_below, is_trusted

DEMO = Path(__file__).resolve().parent.parent / "demo" / "checkpoint"
FOLDER = Path("checkpoints")
DESCRIPTION = "checkpoint.json"
STEP = "step-"  # the folders of a training run: RUN/step-000100
CHOICE = re.compile(r"best|latest|(epoch|step)=(\d+)")  # of a run's checkpoints, written RUN:best
CHOICES = "RUN:best, RUN:latest, RUN:epoch=30, RUN:step=1200"


@dataclass(frozen=True)
class Lineage:
    """The patients a generator has seen. `known` is False when nobody can say; then any reference might leak.

    patients: keyed hashes, sorted. patient_source, patient_forms: what stood for the patients and how their ids are
    built, as in dataset.json (see identity.lineage_of); None where an earlier version did not record it.
    """

    known: bool = False
    key_fingerprint: str | None = None
    patients: list[str] = field(default_factory=list)
    patient_source: str | None = None
    patient_forms: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Checkpoint:
    """A trained generator: its folder and what checkpoint.json says; a foreign diffusers folder has only the folder."""

    path: Path
    family: str = "sdxl"
    method: str = "full"  # full: the folder holds a whole UNet; lora: an adapter of `base`, fused when it is loaded
    base: dict[str, str] = field(default_factory=dict)  # what it was trained from: reference, sha256
    classes: ClassTable | None = None
    prompts: dict[str, str] = field(default_factory=dict)  # by class code, as trained with
    original_sizes: dict[str, list[int]] = field(default_factory=dict)  # by class code: quantiles of native sides, px
    lineage: Lineage = field(default_factory=Lineage)
    config: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    step: int = 0
    epoch: int = 0
    licence: dict[str, str] = field(default_factory=dict)  # base, data
    created: str = ""  # ISO 8601, UTC
    files: dict[str, dict[str, Any]] = field(default_factory=dict)  # by path in the folder: bytes, sha256; {}: unknown

    @property
    def name(self) -> str:
        """'demo', the folder's name, or of a training run RUN/step-000100."""
        if self.path == DEMO:
            return "demo"
        return f"{self.path.parent.name}/{self.path.name}" if self.path.name.startswith(STEP) else self.path.name

    @property
    def reference(self) -> str:
        """What `resolve` finds it by, from the same working directory."""
        return "demo" if self.path == DEMO else str(self.path)

    @property
    def sha256(self) -> str:
        """SHA-256 over what decides the images: weights, and the settings of every part (scheduler, scale, tokens)."""
        total = hashlib.sha256(json.dumps(self.original_sizes, sort_keys=True).encode())
        parts = [path for path in self.path.glob("*/*") if path.suffix in (".safetensors", ".json", ".txt")]
        if self.method == "lora":  # the images are those of the base and the adapter together
            total.update(self.base.get("sha256", "").encode())
            parts += self.path.glob("*.safetensors")
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


def resolve(reference: str | Path, run: str = "") -> Checkpoint:
    """The checkpoint that `reference` names.

    'demo', a folder, or a folder in ./checkpoints; a training run means its last step, RUN:best, RUN:latest,
    RUN:epoch=30 and RUN:step=1200 choose another. Where `run` names a run (or one of its checkpoints), 'best',
    'latest', 'epoch=30' and 'step=1200' alone choose among its checkpoints.

    Raises BuilderError, listing what is there, when there is none.
    """
    text = str(reference)
    if found := _find(text):
        return read_checkpoint(found)
    name, _, choice = text.rpartition(":")
    if CHOICE.fullmatch(text):
        name, choice = _without_choice(run), text
        if not name or find_run(name) is None:
            raise BuilderError(
                f"'{text}' chooses among the checkpoints of a training run, and none is named",
                f"write one of {CHOICES}; {_listed()}",
            )
    folder = find_run(name) if name else None
    if folder is None:
        raise BuilderError(f"there is no checkpoint '{text}' (a diffusers folder with model_index.json)", _listed())
    if not CHOICE.fullmatch(choice):
        raise BuilderError(f"'{choice}' does not choose a checkpoint of '{name}'", f"write one of {CHOICES}")
    return read_checkpoint(folder / choose(run_history(folder), choice).path)


def choose(history: History, choice: str) -> Entry:
    """The checkpoint of a run that 'best', 'latest', 'epoch=30' or 'step=1200' means."""
    if choice in ("best", "latest"):
        return history.best() if choice == "best" else history.last
    key, _, number = choice.partition("=")
    return history.at(epoch=int(number)) if key == "epoch" else history.at(step=int(number))


def find_run(name: str) -> Path | None:
    """The folder of a training run: a path, or a folder in ./checkpoints."""
    return next((run for run in (Path(name), FOLDER / name) if last_step(run)), None)


def run_history(run: Path) -> History:
    """The history of the checkpoints that are there: RUN/history.json, and what stands in folders it doesn't know."""
    history = History.read(run)
    recorded = {entry.path for entry in history.entries}
    for folder in _steps(run):
        if folder.name not in recorded:
            found = read_checkpoint(folder)
            step = found.step or int(folder.name.removeprefix(STEP))
            history = history.with_entry(Entry(step, found.epoch, folder.name, found.metrics, found.created))
    return history.in_folders(run)


def is_checkpoint(folder: Path) -> bool:
    """Whether the folder holds a generator: a whole pipeline, or an adapter with its description."""
    return any((folder / name).is_file() for name in ("model_index.json", DESCRIPTION))


def last_step(run: Path) -> Path | None:
    """The checkpoint of the highest step in the folder of a training run."""
    return max(_steps(run), key=lambda path: int(path.name.removeprefix(STEP)), default=None)


def all_checkpoints() -> list[Path]:
    """The folders of all checkpoints: the demo's, those in ./checkpoints, and those of the runs there."""
    folders = [DEMO] if is_checkpoint(DEMO) else []
    for folder in sorted(FOLDER.glob("*")):
        folders += [folder] if is_checkpoint(folder) else []
        folders += sorted(_steps(folder), key=lambda path: int(path.name.removeprefix(STEP)))
    return folders


def _find(text: str) -> Path | None:
    for folder in [DEMO] if text == "demo" else [Path(text), FOLDER / text]:
        if found := folder if is_checkpoint(folder) else last_step(folder):
            return found
    return None


def _steps(run: Path) -> list[Path]:
    return [path for path in run.glob(f"{STEP}*") if re.fullmatch(rf"{STEP}\d+", path.name) and is_checkpoint(path)]


def _without_choice(run: str) -> str:
    """The run that a config's `checkpoint: RUN`, RUN:best or RUN/step-000100 speaks of."""
    name, _, choice = run.rpartition(":")
    run = name if CHOICE.fullmatch(choice) else run
    return str(Path(run).parent) if Path(run).name.startswith(STEP) else run


def _listed() -> str:
    known = ["demo" if folder == DEMO else str(folder) for folder in all_checkpoints()]
    if not known:
        return f"there are none in {FOLDER}/ yet; make one with `builder train`"
    return f"there are: {', '.join(known)}"


def read_checkpoint(folder: Path) -> Checkpoint:
    """Describe a diffusers folder; without checkpoint.json its lineage is unknown.

    BuilderError when checkpoint.json is damaged, or something in the folder leads out of it or is no file.
    """
    require_plain_files(folder)
    file = folder / DESCRIPTION
    if not file.is_file():
        return Checkpoint(folder, family=_foreign_family(folder))
    data = read_description(folder)
    classes = ClassTable.from_json(data["classes"]) if data.get("classes") else None
    said = data.get("lineage") or {}
    if unknown := sorted(said.keys() - {f.name for f in dataclasses.fields(Lineage)}):
        raise BuilderError(
            f"{file} is damaged: 'lineage.{printable(unknown[0])}' is not known here", "take a version that knows it"
        )
    lineage = Lineage(**said)
    known = {f.name for f in dataclasses.fields(Checkpoint)} - {"path", "classes", "lineage"}
    return Checkpoint(folder, classes=classes, lineage=lineage, **{key: data[key] for key in known if key in data})


def read_description(folder: Path) -> dict[str, Any]:
    """What checkpoint.json in a folder says. BuilderError when it is damaged; FileNotFoundError when there is none."""
    from builder.models.checkpoint_document import CheckpointDocument  # pydantic takes 0.1 s

    remedy = "restore it, or remove it: the lineage is then unknown"
    return read_document(folder / DESCRIPTION, CheckpointDocument, remedy=remedy)


def require_plain_files(folder: Path) -> None:
    """Refuse a checkpoint with pipes or devices in it, or with symbolic links that lead out of it.

    A folder of the hub's cache holds links to the files beside it, in the cache's folder of the same model.
    """
    real = os.path.realpath(folder)
    home = os.path.dirname(os.path.dirname(real)) if os.path.basename(os.path.dirname(real)) == "snapshots" else real
    waiting = [folder]
    while waiting:
        for entry in os.scandir(waiting.pop()):
            if entry.is_symlink():
                target = os.path.realpath(entry.path)
                if not (is_below(target, home) or is_trusted(target)):
                    raise BuilderError(
                        f"{printable(entry.path)} leads out of the checkpoint, to {printable(target)}",
                        "put a copy in its place; if you made this link yourself, confirm where it leads: "
                        f"--trust-root {printable(os.path.dirname(target))} (or BUILDER_TRUST_ROOTS)",
                    )
            elif entry.is_dir():
                waiting.append(Path(entry.path))
            if not (entry.is_file() or entry.is_dir()):
                raise BuilderError(f"{printable(entry.path)} is not a file", "copy the checkpoint again")


def _foreign_family(folder: Path) -> str:
    """The family of somebody else's diffusers folder; one that is none of ours is refused when it is loaded."""
    with contextlib.suppress(OSError, ValueError):
        if dict(json.loads((folder / "model_index.json").read_text())).get("_class_name") == "StableDiffusionPipeline":
            return "sd15"
    return "sdxl"


def save_checkpoint(pipeline: Any, checkpoint: Checkpoint) -> Checkpoint:
    """Write a diffusers pipeline to the folder `checkpoint.path`: float16 safetensors and checkpoint.json.

    The folder appears whole or not at all; one that is there already is replaced. The pipeline keeps its dtype.
    """
    import torch

    from builder.models.families import with_parts
    from builder.models.grain import save_grain

    modules = {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
    halves = {name: torch.nn.Module.to(copy.deepcopy(part), "cpu", torch.float16) for name, part in modules.items()}
    with new_folder(checkpoint.path, replace=True) as folder:
        with without_bars():
            with_parts(pipeline, **halves).save_pretrained(folder, safe_serialization=True)
        save_grain(pipeline.vae, folder / "vae")
        recorded = write_description(checkpoint, folder)
    return recorded


def save_adapter(unet: Any, checkpoint: Checkpoint) -> Checkpoint:
    """Write a denoiser's adapter (LoRA) to the folder `checkpoint.path`, with checkpoint.json, which names its base.

    Whole or not at all, as `save_checkpoint`; the weights keep their dtype.
    """
    from builder.models.lora import save_lora

    with new_folder(checkpoint.path, replace=True) as folder:
        save_lora(unet, folder)
        recorded = write_description(checkpoint, folder)
    return recorded


def write_description(checkpoint: Checkpoint, folder: Path) -> Checkpoint:
    """Write checkpoint.json, with its checksum, into a folder that is whole otherwise: it records every file there.

    Returns:
        The checkpoint with that record.
    """
    recorded = dataclasses.replace(checkpoint, files=record_files(folder, DESCRIPTION))
    write_document(folder / DESCRIPTION, recorded.to_json())
    return recorded


@contextlib.contextmanager
def new_folder(target: Path, replace: bool = False) -> Iterator[Path]:
    """A temporary folder that becomes `target` at the end of the block, or vanishes when the block fails.

    Args:
        target: The folder to make; only one process at a time makes it.
        replace: Whether a folder that is there gives way. It is renamed first and removed last: killed between the two
            renamings, `target` is missing, and who makes it the next time finishes.

    Raises:
        LockedError: another process is making `target`.
        OSError: also where a library only says in words that the disk is full.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    lock = target.parent / f".lock-{target.name}"
    with held_file(lock, f"another process is writing {target}", "wait for it, or choose another --to"):
        prefix = f"{TEMPORARY}{target.name}-"
        for left in target.parent.glob(f"{prefix}*"):  # of killed processes: nobody else is at work here
            shutil.rmtree(left, ignore_errors=True)
        temporary = Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))
        try:
            with full_disk_as_oserror(target):
                yield temporary
            os.chmod(temporary, 0o755)
            fsync_tree(temporary)
            if replace and target.exists():
                target.rename(temporary.with_name(f"{temporary.name}-before"))
            elif target.exists():
                raise BuilderError(f"{target} exists", "choose another --to, or remove it")
            temporary.replace(target)
            fsync_folder(target.parent)
            shutil.rmtree(temporary.with_name(f"{temporary.name}-before"), ignore_errors=True)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        finally:
            lock.unlink(missing_ok=True)  # while it is held, so that nobody holds a lock without a name


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

"""What the doctor looks at before anything is drawn: machine, torch build, room, and whether the model loads."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from builder.config import Config
from builder.errors import BuilderError
from builder.sampling.device import device_model, resolve_dtype
from builder.shards.storage import Storage

if TYPE_CHECKING:
    from builder.models.checkpoint import Checkpoint

PNG_BYTES_PER_PIXEL = 2.0
GB = 1e9


@dataclass(frozen=True)
class Finding:
    """What was looked at and how it is; where it is not fine, what to do."""

    name: str
    what: str
    remedy: str = ""

    @property
    def fine(self) -> bool:
        return not self.remedy


def torch_build(driver: Path = Path("/proc/driver/nvidia/version")) -> Finding:
    """Whether this torch can use the GPU that the machine has. `driver`: a file that an NVIDIA driver puts there."""
    build = f"torch {torch.__version__}, CUDA {torch.version.cuda or 'none'}"
    if driver.exists() and not torch.cuda.is_available():
        built = torch.version.cuda
        return Finding(
            "torch",
            f"{build}: there is an NVIDIA driver, but torch sees no GPU",
            "install the CUDA build of torch (leave TORCH_INDEX out)" if built is None else
            f"the driver is too old for CUDA {built}, or CUDA_VISIBLE_DEVICES hides the GPUs",
        )  # fmt: skip
    return Finding("torch", build)


def devices() -> Finding:
    """What the workers run on, with their memory."""
    if torch.cuda.is_available():
        found = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
        said = ", ".join(f"{each.name} ({each.total_memory / GB:.0f} GB)" for each in found)
        return Finding("devices", f"{len(found)} GPUs: {said}")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return Finding("devices", f"no GPU; {cores} cores of {device_model('cpu')}")


def precision(config: Config, device: str) -> Finding:
    """Whether the device computes in the denoiser's dtype."""
    dtype = resolve_dtype(config.sample.dtype, device)
    said = f"{str(dtype).removeprefix('torch.')} for sample.dtype {config.sample.dtype}"
    cuda = torch.device(device).type == "cuda"
    if cuda and dtype == torch.bfloat16 and not torch.cuda.is_bf16_supported(including_emulation=False):
        return Finding("dtype", f"{said}: {device_model(device)} has no bfloat16", "set sample.dtype to float16")
    if not cuda and dtype == torch.float16:
        return Finding("dtype", f"{said}: slow and inexact on a CPU", "set sample.dtype to auto or float32")
    return Finding("dtype", said)


def memory(weights: int, workers: int, device: str, available: int | None = None) -> Finding:
    """Whether the weights fit. weights: bytes of them in float32. available: bytes; None asks the machine.

    A worker holds all of them in the host's memory while it loads, in float32; on a CPU, ever after.
    """
    cuda = torch.device(device).type == "cuda"
    free = host_memory() if available is None else available
    needed = weights * workers
    said = f"{needed / GB:.1f} GB for the weights of {workers} workers to load"
    if free is None:
        return Finding("memory", f"{said}; how much there is could not be found out")
    said += f", {free / GB:.1f} GB free"
    if cuda:
        on_device, _ = torch.cuda.mem_get_info(device)
        said += f"; {on_device / GB:.1f} GB free on {device}"
        if on_device < weights:  # half of it in bfloat16; the rest for the images
            return Finding("memory", said, "free the GPU of other programs, or take one with more memory")
    if needed > free:
        return Finding("memory", said, f"take --workers {max(1, int(free // weights))}, or a machine with more memory")
    return Finding("memory", said)


def host_memory(source: Path = Path("/proc/meminfo")) -> int | None:
    """Bytes of memory that programs may still take; None where the system does not say."""
    try:
        lines = source.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    kilobytes = [int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    return 1024 * kilobytes[0] if kilobytes else None


def disk(out: str, count: int, size: int, free: int | None = None) -> Finding:
    """Whether `count` images of `size` px fit under the output root. free: bytes; None asks the disk."""
    needed = count * (PNG_BYTES_PER_PIXEL * size**2 + 4096)
    said = f"{count:,} images of {size} px take about {needed / GB:.2f} GB"
    storage = Storage(out)
    if not storage.is_local:
        return Finding("disk", f"{said}; {out} is no local folder, its room is not known")
    folder = Path(storage.path("")).resolve()
    while not folder.exists():
        folder = folder.parent
    if not os.access(folder, os.W_OK):
        return Finding("disk", f"{folder} cannot be written", "mend its permissions, or choose another --out")
    free = shutil.disk_usage(folder).free if free is None else free
    said += f"; {free / GB:.1f} GB are free in {folder}"
    return Finding("disk", said, "" if needed < free else "make room, choose another --out, or a smaller COUNT")


def caches() -> Finding:
    """Where the libraries keep what was downloaded."""
    hub = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    kept = Path(torch.hub.get_dir())
    found = [f"{path} ({_size(path) / GB:.1f} GB)" for path in (hub, kept) if path.exists()]
    return Finding("caches", ", ".join(found) or f"none ({hub}, {kept}): nothing was downloaded")


def checkpoint(reference: str, run: str, config: Config) -> tuple[Finding, Checkpoint | None]:
    """Whether the checkpoint is there and of these classes; it too, unless it is not."""
    from builder.models.checkpoint import resolve

    try:
        found = resolve(reference, run=run)
        if found.classes is not None:
            config.classes.require_same(found.classes, "the config", f"checkpoint '{found.name}'")
    except BuilderError as error:
        return _of_error("checkpoint", error, "give --checkpoint"), None
    return Finding("checkpoint", f"'{found.name}' in {found.path}, {weight_bytes(found) / GB:.2f} GB of weights"), found


def loads(found: Checkpoint) -> Finding:
    """Whether the weights are what the checkpoint's configuration says."""
    from builder.models.load import load_pipeline

    try:
        load_pipeline(found)
    except BuilderError as error:
        return _of_error("loads", error, "copy the whole checkpoint folder again")
    return Finding("loads", f"'{found.name}' loads, every weight in its place")


def weight_bytes(found: Checkpoint) -> int:
    """Bytes of a checkpoint's weight files."""
    return sum(file.stat().st_size for file in found.path.glob("**/*.safetensors"))


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file() and not file.is_symlink())


def _of_error(name: str, error: BuilderError, remedy: str) -> Finding:
    return Finding(name, error.what, error.remedy or remedy)


def all_fine(findings: Sequence[Finding]) -> bool:
    return all(finding.fine for finding in findings)

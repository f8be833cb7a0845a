"""Where and how precisely the sampler computes."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import TYPE_CHECKING

from builder.errors import BuilderError, did_you_mean

if TYPE_CHECKING:
    import torch

NO_MEMORY = (
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_INTERNAL_ERROR",
    "CUDA error: out of memory",
)
DTYPES = ("auto", "float32", "bfloat16", "float16")


def resolve_dtype(name: str, device: str) -> torch.dtype:
    """The denoiser's dtype: 'auto' is float32 on a CPU and bfloat16 elsewhere. BuilderError for an unknown name."""
    import torch

    if name not in DTYPES:
        raise BuilderError(f"unknown dtype '{name}' (sample.dtype)", did_you_mean(name, DTYPES))
    if name == "auto":
        return torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
    return getattr(torch, name)


def dtype_name(dtype: torch.dtype) -> str:
    """'float32' and so on, as the manifest records it."""
    return str(dtype).removeprefix("torch.")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of torch says that the device's memory is used up.

    Its own allocator raises OutOfMemoryError. cuBLAS and cuDNN, whose handles and workspaces are not its own, fail with
    a RuntimeError; cuDNN's says no more than INTERNAL_ERROR (measured on an H200 with 4 MB left, torch 2.11).
    """
    import torch

    said = str(error)
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(phrase in said for phrase in NO_MEMORY)
    )


def device_model(device: str) -> str:
    """The device's model: the GPU's name, or the CPU's as the system gives it."""
    import torch

    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()

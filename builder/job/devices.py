"""Which device a worker runs on, and how many workers this machine takes."""

from __future__ import annotations

import os


def default_workers() -> int:
    """One worker a GPU, or one a core where there is none."""
    import torch

    return torch.cuda.device_count() or cores()


def cores() -> int:
    """The cores this process may use; macOS knows no affinity."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def device_kind() -> str:
    """'cuda' or 'cpu': what the workers of this machine run on."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def prepare(worker: int) -> str:
    """Set this process up as worker number `worker`; returns its device.

    On CPU one thread: worker processes that share cores with several threads each get many times slower, and sums
    over several threads may differ in the last bit.
    """
    import torch

    from builder.arithmetic import settle

    settle()
    torch.set_num_threads(1)
    return f"cuda:{worker % torch.cuda.device_count()}" if device_kind() == "cuda" else "cpu"

"""Seconds, memory and utilisation of a device while something runs on it."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

INTERVAL = 0.1  # seconds between two samples


def gpu_now() -> tuple[float, float] | None:
    """Utilisation in % and memory in use in GB, of the first GPU, by its driver; None where nothing tells them."""
    try:
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(0)
        used = pynvml.nvmlDeviceGetMemoryInfo(handle).used / 1e9
        return float(pynvml.nvmlDeviceGetUtilizationRates(handle).gpu), used
    except Exception:  # no package, no driver, or one that does not answer: nvidia-smi may
        answer = _nvidia_smi("--query-gpu=utilization.gpu,memory.used")
        if not answer:
            return None
        utilisation, used_mib = answer[0].split(",")
        return float(utilisation), float(used_mib) * 2**20 / 1e9


def gpu_by_process() -> dict[int, float]:
    """GB of GPU memory by process id, as the driver knows them; empty where it does not say."""
    found = {}
    for line in _nvidia_smi("--query-compute-apps=pid,used_memory"):
        pid, _, mib = line.partition(",")
        if mib.strip().isdigit():
            found[int(pid)] = float(mib) * 2**20 / 1e9
    return found


def _nvidia_smi(query: str) -> list[str]:
    command = ["nvidia-smi", query, "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line for line in done.stdout.splitlines() if line.strip()] if done.returncode == 0 else []


class Sampled:
    """Calls `look` again and again on a thread while its block lasts, and keeps the answers in `samples`."""

    def __init__(self, look: Callable[[], Any], interval: float = INTERVAL) -> None:
        self.samples: list[Any] = []
        self._look, self._interval = look, interval
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def _sample(self) -> None:
        while not self._over.is_set():
            seen = self._look()
            if seen is not None:
                self.samples.append(seen)
            self._over.wait(self._interval)

    def __enter__(self) -> Sampled:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join(15)


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def measured(device: str, call: Callable[[], Any]) -> tuple[Any, dict[str, Any]]:
    """What `call` returns, and: seconds; GB at the peak (allocated, reserved); mean utilisation in % with its N.

    On the CPU there is neither memory of the device nor utilisation: None.
    """
    if device == "cuda":
        torch.cuda.init()  # before it there are no statistics to reset
        torch.cuda.reset_peak_memory_stats()
    synchronize(device)
    with Sampled(gpu_now if device == "cuda" else lambda: None) as watch:
        started = time.perf_counter()
        value = call()
        synchronize(device)
        seconds = time.perf_counter() - started
    used = [utilisation for utilisation, _ in watch.samples]
    cuda = device == "cuda"
    return value, {
        "seconds": seconds,
        "peak allocated GB": torch.cuda.max_memory_allocated() / 1e9 if cuda else None,
        "peak reserved GB": torch.cuda.max_memory_reserved() / 1e9 if cuda else None,
        "utilisation %": sum(used) / len(used) if used else None,
        "N utilisation": len(used),
    }


def free(device: str) -> None:
    """Give cached memory back."""
    import gc

    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def peak_resident_gb(pid: int | str = "self") -> float | None:
    """The most memory that a process has had at once, GB; None where it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return None
    for line in status.splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024 / 1e9
    return None


def descendants(root: int) -> dict[int, str]:
    """Process id -> command line, of a process and all that it started."""
    parents: dict[int, int] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            except (OSError, IndexError, ValueError):
                continue  # it has ended
    found = {}
    for pid in parents:
        ancestor = pid
        while ancestor != root and ancestor in parents:
            ancestor = parents[ancestor]
        if ancestor == root:
            try:
                found[pid] = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
    return found


def cores() -> int:
    return len(os.sched_getaffinity(0))

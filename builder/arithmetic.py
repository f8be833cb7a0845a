"""How exactly a GPU computes. These settings belong to the process, not to a thread, and change bits: so they are set.

Autotuning (cudnn.benchmark) chooses kernels by the clock and is off; of cudnn's kernels only deterministic ones are
used; float32 means float32. TF32 (8 bits of exponent, 10 of mantissa: nothing overflows) is asked for where it is good
enough, by the block of code that it is good enough for.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_one_at_a_time = threading.Lock()


def settle() -> None:
    """The settings of a process that makes or scores images."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True


@contextmanager
def convolutions(*, tf32: bool) -> Iterator[None]:
    """Launch float32 convolutions with or without TF32, whatever other threads ask for: one such block at a time."""
    cudnn = torch.backends.cudnn
    with _one_at_a_time, cudnn.flags(enabled=cudnn.enabled, benchmark=False, deterministic=True, allow_tf32=tf32):
        yield

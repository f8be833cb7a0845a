"""Part a, what goes wrong: values that are not finite, memory that runs out, libraries that cannot allocate."""

from __future__ import annotations

import dataclasses
import hashlib
import subprocess
import sys
from typing import Any

import numpy as np
import torch

from builder.config import Config
from builder.job.devices import prepare
from builder.models.checkpoint import DEMO, read_checkpoint
from builder.sampling.sampler import Batch, Request, Sampler, load_sampler
from builder.sampling.seeds import seed_of
from tests.acceptance.gpu.measure import free, measured
from tests.acceptance.gpu.setting import Result, Setting

NO_ROOM = """
import sys, torch
kind, left_mb = sys.argv[1], int(sys.argv[2])
torch.zeros(1, device="cuda")
held = []
for size in (2**30, 2**26, 2**21):  # fill the device from large to small, as another program would
    while torch.cuda.mem_get_info()[0] > size + left_mb * 2**20:
        try:
            held.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
        except torch.OutOfMemoryError:
            break
print("free MB", torch.cuda.mem_get_info()[0] // 2**20)
try:
    if kind == "cublas":
        a = held[-1].view(torch.bfloat16)[:4096].view(64, 64)
        torch.matmul(a, a)
    elif kind == "cudnn":
        a = held[-1].view(torch.float16)
        torch.nn.functional.conv2d(a[:65536].view(1, 16, 64, 64), a[:2304].view(16, 16, 3, 3), padding=1)
    else:
        from tests.acceptance.gpu.faults import demo_sampler, requests
        demo_sampler("cuda").generate(requests(8))
    torch.cuda.synchronize()
    print("no error")
except BaseException as error:
    print(f"{type(error).__module__}.{type(error).__name__}; OutOfMemoryError: "
          f"{isinstance(error, torch.OutOfMemoryError)}; {str(error).splitlines()[0][:200]}")
"""


class Faults:
    """Each method is a step. On a CPU running out of memory is played: there it would end the process."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.draws = setting.pick(12, 2)
        self.images = setting.pick(256, 4)

    def not_finite(self) -> Result:
        """Denoiser in fp16 of which a convolution overflows: flagged, and mended by the next higher precision."""
        sampler = demo_sampler(self._device(), steps=self.draws, dtype="float16")
        asked = requests(self.setting.pick(8, 2))
        clean = sampler.generate(asked)
        convolution = next(m for m in sampler._unet.modules() if isinstance(m, torch.nn.Conv2d))
        kept = convolution.weight.data.clone()
        convolution.weight.data = (convolution.weight.data.float() * 3e4).clamp(-6e4, 6e4).half()
        before = {name: value.clone() for name, value in sampler._unet.state_dict().items()}
        broken = sampler.generate(asked)
        precise, seen = measured(self.setting.device, lambda: sampler.generate(asked, precise=True))
        after = sampler._unet.state_dict()
        intact = all(torch.equal(after[name], value) for name, value in before.items())
        convolution.weight.data = kept
        again = sampler.generate(asked)
        return {
            "images": len(asked),
            "bad in fp16": sum(clean.bad),
            "bad when it overflows": sum(broken.bad),
            "bad in the next higher precision": sum(precise.bad),
            "weights as before": intact,
            "same images afterwards": bool(np.array_equal(again.pixels, clean.pixels)),
            **seen,
        }

    def out_of_memory(self) -> Result:
        """A batch that does not fit: halved; replayed at that size the pixels are the same."""
        sampler = demo_sampler(self._device(), steps=self.draws)
        asked = requests(self.images)
        whole, seen = measured(self.setting.device, lambda: sampler.generate(asked))
        halved = self._halved(sampler, asked, seen)
        later = sampler.generate(asked)
        fresh = demo_sampler(self._device(), steps=self.draws)
        replayed = fresh.generate(asked, micro_batch=halved.micro_batch)
        small = [fresh.generate(asked[at : at + halved.micro_batch]) for at in range(0, len(asked), halved.micro_batch)]
        apart = np.abs(halved.pixels.astype(int) - whole.pixels)
        return {
            "images": len(asked),
            "micro_batch": halved.micro_batch,
            "micro_batch of the next batch": later.micro_batch,
            "bytes": _digest(halved),
            "same when replayed": _digest(replayed) == _digest(halved),
            "same as batches of that size": bool(
                np.array_equal(np.concatenate([batch.pixels for batch in small]), halved.pixels)
            ),
            "same as whole": _digest(whole) == _digest(halved),
            "max difference to whole": int(apart.max()),
            "mean difference to whole": float(apart.mean()),
            "played": not self.setting.cuda,
            **seen,
        }

    def _halved(self, sampler: Sampler, asked: list[Request], seen: dict[str, Any]) -> Batch:
        if not self.setting.cuda:
            draw = sampler._draw

            def limited(part: Any, *rest: Any) -> Any:
                if len(part) > len(asked) // 2:
                    raise torch.OutOfMemoryError
                return draw(part, *rest)

            sampler._draw = limited  # type: ignore[method-assign]
            return sampler.generate(asked)
        free("cuda")
        base = torch.cuda.memory_reserved()
        # Of what is allocated, not of what is reserved: the allocator gives cached memory back before it fails.
        limit = base + 0.6 * (seen["peak allocated GB"] * 1e9 - base)
        try:
            torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.get_device_properties(0).total_memory)
            return sampler.generate(asked)
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)

    def allocation_failures(self) -> Result:
        """What torch raises where cuBLAS, cuDNN or a job find no memory because another program has taken it all."""
        if not self.setting.cuda:
            return {"skipped": "needs a GPU"}
        rows = []
        for kind, left in (("cublas", 4), ("cudnn", 4), ("sampler", 300)):
            try:
                done = subprocess.run(
                    [sys.executable, "-c", NO_ROOM, kind, str(left)], capture_output=True, text=True, timeout=40
                )
                said = done.stdout.strip().splitlines() or done.stderr.strip().splitlines()[-2:]
            except subprocess.TimeoutExpired:
                said = ["it took longer than 40 s"]
            rows.append({"who": kind, "MB left": left, "what came": " | ".join(said)})
        return {"rows": rows}

    def _device(self) -> str:
        if self.setting.cuda:
            return prepare(0)
        torch.set_num_threads(1)
        return "cpu"


def requests(count: int) -> list[Request]:
    """The first images of the healing phases' plan."""
    places = [("IPR"[place % 3], place % 3, place // 3) for place in range(count)]
    return [Request(code, label, seed_of(0, label, index)) for code, label, index in places]


def demo_sampler(device: str, **sample: Any) -> Sampler:
    """Of the checkpoint that ships, at its 64 px."""
    config = Config()
    changed = dataclasses.replace(config, sample=dataclasses.replace(config.sample, size=64, **sample))
    return load_sampler(read_checkpoint(DEMO), changed, device)


def _digest(batch: Batch) -> str:
    return hashlib.sha256(batch.pixels.tobytes()).hexdigest()[:16]

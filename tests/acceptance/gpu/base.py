"""Train the base that ships (configs/base.yaml) for the minutes that are left, and bring its checkpoint back.

The crops are rendered in the background while the other parts run. A short training on a few patients tells what a
step of each stage takes here; the steps of the real one are fitted to the time by it. Back come base.tar.0, base.tar.1,
... (of at most 15 MB; `cat base.tar.* | tar x`), and the losses and reconstructions within.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.acceptance.gpu.setting import Result

ROOT = Path(tempfile.gettempdir()) / "builder-gpu-base"  # stays between two runs on one machine
PIECE = 15_000_000  # bytes of a file that comes back
CALIBRATION = {"train.vae.steps": 60, "train.vae.adversarial_steps": 40, "train.steps": 60}
SHARES = {"vae": 0.2, "decoder": 0.3, "unet": 0.5}  # of the training time
STEPS = {"vae": "train.vae.steps", "decoder": "train.vae.adversarial_steps", "unet": "train.steps"}
BATCH = {"vae": "batch_size", "decoder": "adversarial_batch_size"}  # of train.vae
OVERHEAD_S = 25.0  # reading, encoding, checkpoints, packing
SMALL = [  # of the calibration in miniature and of the whole training there
    "train.size=16", "sample.size=16", "sample.steps=2", "train.batch_size=4", "train.warmup_steps=1",
    "train.vae.batch_size=4", "train.vae.adversarial_batch_size=4", "train.cached_views=1", "train.threads=1",
    "train.vae.perceptual_weight=0",
]  # fmt: skip


def render_in_background(patients: int, miniature: bool) -> subprocess.Popen[bytes] | None:
    """Start to render the crops with most of the cores, in a process that outlives this one; None in miniature."""
    if miniature:
        return None
    ROOT.mkdir(parents=True, exist_ok=True)
    workers = max(1, (os.cpu_count() or 4) - 4)
    words = ["nice", sys.executable, "-m", "builder", "demo", "base", "--workers", str(workers)]
    with (ROOT / "render.log").open("ab") as log:
        return subprocess.Popen(
            [*words, "--patients", str(patients), "--out", str(ROOT)], stdout=log, stderr=log, start_new_session=True
        )


def run(out: Path, minutes: float, miniature: bool) -> Result:
    """Train for about `minutes` and write the checkpoint's pieces into `out`; what was done, as numbers."""
    from builder.demo.base_dataset import ensure_base
    from builder.shards.lock import LockedError

    ends = time.time() + 60 * minutes
    with tempfile.TemporaryDirectory(prefix="builder-gpu-calibration-") as scratch:
        few = ensure_base(scratch, patients=3 if miniature else 40, workers=1 if miniature else 12)
        calibration = dict.fromkeys(CALIBRATION, 2) if miniature else CALIBRATION
        seconds = _train(few, Path(scratch) / "checkpoint", calibration, miniature)
        waited = time.time()
        whole = few
        while not miniature:
            try:
                whole = ensure_base(str(ROOT))
                break
            except LockedError:  # it is being rendered
                time.sleep(0.5)
        waited = time.time() - waited
        left = ends - time.time() - (0 if miniature else OVERHEAD_S)
        steps = dict(calibration)
        if not miniature:
            steps = {STEPS[stage]: max(50, int(left * share / seconds[stage])) for stage, share in SHARES.items()}
        target = Path(scratch) / "base" if miniature else ROOT / "checkpoints" / "base"
        started, crops = time.time(), whole.info["count"]
        took = _train(whole, target, steps, miniature)
        final = max(target.glob("step-*"))
        pieces = _bring_back(target, final, out)
    return {
        "rows": [
            {
                "crops": crops,
                "seconds": round(time.time() - started, 1),
                "waited for crops, s": round(waited, 1),
                **{f"{stage} steps": steps[key] for stage, key in STEPS.items()},
                **{f"{stage} ms/step": round(1000 * value, 1) for stage, value in took.items()},
                "pieces": pieces,
            }
        ]
    }


def _train(dataset: Any, out: Path, steps: dict[str, int], miniature: bool) -> dict[str, float]:
    """Train configs/base.yaml for these steps; seconds of a step, by stage, from the last lines of the log."""
    from builder.config import load_config
    from builder.training.run import train

    every = max(steps.values()) if miniature else max(100, steps["train.steps"])
    settings = [f"{key}={value}" for key, value in steps.items()]
    settings += [f"train.checkpoint_every={every}", f"train.vae.guided_steps={steps['train.vae.steps'] // 5}"]
    config = load_config("base", [*settings, *(SMALL if miniature else [])])
    train(config, dataset, out)
    last = {}
    for line in (out / "log.jsonl").read_text().splitlines():
        entry = json.loads(line)
        last[entry["stage"]] = entry
    images = {stage: getattr(config.train.vae, key) for stage, key in BATCH.items()} | {"unet": config.train.batch_size}
    return {stage: images[stage] / entry["images_per_s"] for stage, entry in last.items()}


def _bring_back(run_folder: Path, checkpoint: Path, out: Path) -> int:
    """Pack the checkpoint, the log and the pictures of a run into base.tar.N; the number of pieces."""
    with tempfile.TemporaryFile() as file:
        with tarfile.open(fileobj=file, mode="w") as tar:
            tar.add(checkpoint, "base/checkpoint")
            for name in ("log.jsonl", "loss.png", "reconstructions.png", "samples"):
                if (run_folder / name).exists():
                    tar.add(run_folder / name, f"base/{name}")
        file.seek(0)
        number = 0
        while piece := file.read(PIECE):
            (out / f"base.tar.{number}").write_bytes(piece)
            number += 1
    return number

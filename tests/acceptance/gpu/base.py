"""Train the base that ships (configs/base.yaml) for the minutes that are left, and bring its checkpoint back.

The crops are rendered in the background while the other parts run. A short training on a few patients tells what a
step of each stage takes here; the steps of the real one are fitted to the time by it. That one runs as a command of
its own and makes checkpoints on the way: where the time is over before the last step, it is told to stop, and the last
checkpoint comes back. Back come base.tar.0, base.tar.1, ... (of at most 15 MB; `cat base.tar.* | tar x`), with the
losses and reconstructions within.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

from tests.acceptance.gpu.setting import Result

ROOT = Path(tempfile.gettempdir()) / "builder-gpu-base"  # stays between two runs on one machine
PIECE = 15_000_000  # bytes of a file that comes back
CALIBRATION = {"train.vae.steps": 60, "train.vae.adversarial_steps": 40, "train.steps": 60}
SHARES = {"vae": 0.2, "decoder": 0.3, "unet": 0.5}  # of the training time
STEPS = {"vae": "train.vae.steps", "decoder": "train.vae.adversarial_steps", "unet": "train.steps"}
BATCH = {"vae": "batch_size", "decoder": "adversarial_batch_size"}  # of train.vae
READING_S = 0.0015  # a crop: its views drawn and encoded
OVERHEAD_S = 20.0  # starting, checkpoints
SAFETY = 0.8  # steps took up to a fifth longer than in the calibration
STOPPING_S = 20.0  # from being told to stop until everything is written
CHECKPOINTS = 6  # on the way
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
    ends = time.time() + 60 * minutes
    with tempfile.TemporaryDirectory(prefix="builder-gpu-calibration-") as scratch:
        few = _rendered(Path(scratch), patients=3 if miniature else 40, workers=1 if miniature else 12)
        calibration = dict.fromkeys(CALIBRATION, 2) if miniature else CALIBRATION
        _train(Path(scratch), Path(scratch) / "calibration", calibration, ends, miniature)
        seconds = _seconds_a_step(Path(scratch) / "calibration", miniature)
        waited = time.time()
        root, crops = (Path(scratch), few) if miniature else (ROOT, _rendered(ROOT))
        waited = time.time() - waited
        steps = dict(calibration)
        if not miniature:
            left = SAFETY * (ends - time.time() - OVERHEAD_S - STOPPING_S - READING_S * crops)
            steps = {STEPS[stage]: max(50, int(left * share / seconds[stage])) for stage, share in SHARES.items()}
        target = root / "checkpoints" / "base"
        started = time.time()
        _train(root, target, steps, ends - STOPPING_S, miniature)
        checkpoints = sorted(target.glob("step-*"))
        row = {
            "crops": crops,
            "seconds": round(time.time() - started, 1),
            "waited for crops, s": round(waited, 1),
            **{f"{stage} steps": steps[key] for stage, key in STEPS.items()},
            **{
                f"{stage} ms/step": round(1000 * value, 1)
                for stage, value in _seconds_a_step(target, miniature).items()
            },
            "checkpoint": checkpoints[-1].name if checkpoints else "none",
            "pieces": _bring_back(target, checkpoints[-1:], out),
        }
    return {"rows": [row]}


def _rendered(root: Path, patients: int | None = None, workers: int = 2) -> int:
    """The crops of the base under `root`, rendered here or, where somebody is at it, waited for; how many there are."""
    from builder.demo.base_dataset import BASE_PATIENTS, ensure_base
    from builder.shards.lock import LockedError

    while True:
        try:
            count: int = ensure_base(str(root), patients=patients or BASE_PATIENTS, workers=workers).info["count"]
            return count
        except LockedError:
            time.sleep(0.5)


def _train(root: Path, out: Path, steps: dict[str, int], ends: float, miniature: bool) -> None:
    """`builder train --config base` for these steps; told to stop when it is still at work at `ends`.

    Raises RuntimeError when it fails by itself.
    """
    settings = [f"{key}={value}" for key, value in steps.items()]
    settings += [f"train.checkpoint_every={max(1, steps['train.steps'] // CHECKPOINTS)}"]
    settings += [f"train.vae.guided_steps={steps['train.vae.steps'] // 5}", *(SMALL if miniature else [])]
    words = [sys.executable, "-m", "builder", "train", "--config", "base", "--real", "base"]
    words += ["--out", str(root), "--to", str(out), *(word for setting in settings for word in ("--set", setting))]
    out.mkdir(parents=True, exist_ok=True)
    with (out / "train.log").open("ab") as log:
        process = subprocess.Popen(words, stdout=log, stderr=log)
        try:
            code = process.wait(timeout=max(1.0, ends - time.time()))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(timeout=STOPPING_S / 2)
            except subprocess.TimeoutExpired:
                process.kill()
            return
    if code:
        raise RuntimeError(f"exit code {code}: {(out / 'train.log').read_text(errors='replace')[-1500:]}")


def _seconds_a_step(out: Path, miniature: bool) -> dict[str, float]:
    """By stage, from the last line of each in the log of a run."""
    from builder.config import load_config

    config = load_config("base", SMALL if miniature else [])
    last = {}
    for line in (out / "log.jsonl").read_text().splitlines():
        entry = json.loads(line)
        last[entry["stage"]] = entry
    images = {stage: getattr(config.train.vae, key) for stage, key in BATCH.items()} | {"unet": config.train.batch_size}
    return {stage: images[stage] / entry["images_per_s"] for stage, entry in last.items()}


def _bring_back(run_folder: Path, checkpoints: list[Path], out: Path) -> int:
    """Pack the checkpoint, the log and the pictures of a run into base.tar.N; the number of pieces."""
    with tempfile.TemporaryFile() as file:
        with tarfile.open(fileobj=file, mode="w") as tar:
            for checkpoint in checkpoints:
                tar.add(checkpoint, "base/checkpoint")
            for name in ("log.jsonl", "train.log", "loss.png", "reconstructions.png", "samples"):
                if (run_folder / name).exists():
                    tar.add(run_folder / name, f"base/{name}")
        file.seek(0)
        number = 0
        while piece := file.read(PIECE):
            (out / f"base.tar.{number}").write_bytes(piece)
            number += 1
    return number

"""Part a: does what holds on a CPU hold on this device? With the checkpoint that ships."""

from __future__ import annotations

import dataclasses
import hashlib
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from builder.job.devices import prepare
from builder.job.pending import all_units
from builder.job.regenerate import Regenerator, recorded_spec
from builder.job.worker import Worker
from builder.quality.build import build_reference
from builder.quality.reference import load_reference, reference_path
from builder.quality.scorer import Scorer
from builder.shards.dataset import Dataset, find_dataset
from builder.shards.schema import SCORE_NAMES
from builder.shards.storage import Storage
from tests.acceptance.gpu.faults import Faults, demo_sampler, requests
from tests.acceptance.gpu.measure import Sampled, descendants, free, gpu_by_process, gpu_now, measured, peak_resident_gb
from tests.acceptance.gpu.setting import Result, Setting, Step

NAME = "card"
UNSTEADY = ("seconds", "device")  # columns that differ between runs which make the same images
PATIENTS, SEED = 16, 5000  # of the phantom
ALEXNET = {0: (64, 3, 11), 3: (192, 64, 5), 6: (384, 192, 3), 8: (256, 384, 3), 10: (256, 256, 3)}
SHOWN = 24  # images made again


def steps(setting: Setting) -> list[Step]:
    checks, faults = Checks(setting), Faults(setting)
    group = "checks"
    return [
        Step("real crops", group, checks.real_crops, 90),
        Step("shards", group, checks.shards, 140),
        Step("regenerate", group, checks.regenerate, 60),
        Step("overlap", "overlap of drawing with scoring and writing", checks.overlap, 90),
        Step("scores", "scores on the device against the CPU's", checks.scores, 90),
        Step("flags", group, checks.flags, 60),
        Step("not finite", "faults", faults.not_finite, 60),
        Step("out of memory", "faults", faults.out_of_memory, 60),
        Step("reference", group, checks.reference, 60),
        Step("settings of a worker", group, checks.settings, 60),
        Step("allocation failures", "faults", faults.allocation_failures, 110),
    ]


class Checks:
    """Each method is a step; those after `shards` read the dataset that it makes."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.root = setting.scratch / "checks"
        self.count, self.batch, self.per_shard, self.draws = setting.pick((48, 8, 16, 12), (4, 2, 2, 1))
        self.real = setting.pick("phantom", "clinic")

    @cached_property
    def dataset(self) -> Dataset:
        return find_dataset(NAME, str(self.root))

    def real_crops(self) -> Result:
        """A small real dataset, and random weights in the shape of AlexNet's, so that LPIPS runs too."""
        self.root.mkdir(parents=True, exist_ok=True)
        if self.setting.miniature:
            from tests.conftest import write_real

            real = write_real(self.root, self.real, per_phase=6, size=24)
        else:
            from builder.demo.phantom_dataset import ensure_phantom

            real = ensure_phantom(str(self.root), patients=PATIENTS, seed=SEED, workers=min(16, os.cpu_count() or 1))
        random = torch.Generator().manual_seed(0)
        weights = {}
        for number, (out, into, side) in ALEXNET.items():
            scale = (2 / (into * side * side)) ** 0.5
            weights[f"features.{number}.weight"] = scale * torch.randn(out, into, side, side, generator=random)
            weights[f"features.{number}.bias"] = torch.zeros(out)
        torch.save(weights, self._alexnet)
        return {"crops": len(real.table(["key"]))}

    @property
    def _alexnet(self) -> Path:
        return self.root / "alexnet.pth"

    def shards(self) -> Result:
        """`builder shards` with two workers: bytes, memory of each process on the host and on the device."""
        workers = self.setting.pick(2, 1)
        small = self.setting.pick([], ["score.ssim_size=64"])
        settings = [
            f"shards.images_per_shard={self.per_shard}", f"sample.batch_size={self.batch}",
            f"sample.steps={self.draws}", f"score.lpips={self._alexnet}", *small,
        ]  # fmt: skip
        command = ["shards", "--phases", "IPR", "--count", str(self.count)]
        command += ["--name", NAME, "--out", str(self.root), "--real", self.real, "--workers", str(workers)]
        command += ["--allow-leak", "unit checks of a device: no figure is drawn from these images"]
        command += ["--engine", self.setting.pick("local", "inline"), "--size", "64"]
        command += [word for setting in settings for word in ("--set", setting)]
        before = gpu_now() if self.setting.cuda else None
        started = time.perf_counter()
        peaks: dict[int, dict[str, Any]] = {}
        said = self._commanded(command, lambda pid: self._look(pid, peaks))
        lines = [
            line.strip()
            for line in said.splitlines()
            if ("images/s" in line or "estimate" in line) and "%|" not in line
        ]
        return {
            "images": len(self.dataset.table(["key"])),
            "seconds in all": time.perf_counter() - started,
            "said": lines[-2:],
            "GPU GB in use before": before[1] if before else None,
            "processes": sorted(peaks.values(), key=lambda peak: -(peak["host GB"] or 0))[:8],
            "tars": self._tars(self.root),
        }

    def _commanded(self, words: list[str], look: Callable[[int], None]) -> str:
        """Run a command of builder's in a process of its own, which `look` is shown; what it printed."""
        printed = self.root / "printed.txt"
        if self.setting.cuda:
            with printed.open("w") as file:
                process = subprocess.Popen(
                    [sys.executable, "-m", "builder", *words], stdin=subprocess.DEVNULL, stdout=file, stderr=file
                )
                with Sampled(lambda: look(process.pid), 0.25):
                    code = process.wait()
        else:  # a fork has everything loaded
            forked = multiprocessing.get_context("fork").Process(target=_command, args=(words, printed))
            forked.start()
            assert forked.pid is not None
            pid = forked.pid
            with Sampled(lambda: look(pid), 0.25):
                forked.join()
            code = forked.exitcode or 0
        said = printed.read_text(errors="replace")
        if code:
            raise RuntimeError(f"exit code {code}: {said[-1500:]}")
        return said

    def _look(self, root: int, peaks: dict[int, dict[str, Any]]) -> None:
        on_gpu = gpu_by_process() if self.setting.cuda else {}
        for pid, command in descendants(root).items():
            peak = peaks.setdefault(pid, {"what": _what(pid, root, command), "host GB": 0.0, "GPU GB": 0.0})
            peak["host GB"] = max(peak["host GB"], peak_resident_gb(pid) or 0.0)
            peak["GPU GB"] = max(peak["GPU GB"], on_gpu.get(pid, 0.0))
            peak["GPU GB last"] = on_gpu.get(pid, 0.0)

    def _tars(self, root: Path) -> dict[str, str]:
        files = sorted((root / "shards" / NAME).glob("*.tar"))
        return {file.name: hashlib.sha256(file.read_bytes()).hexdigest()[:16] for file in files}

    def regenerate(self) -> Result:
        """Each image made again from its row, in another process than the one that made it."""
        again = Regenerator(self.dataset)
        keys = [row["key"] for row in self.dataset.table(["key"]).to_pylist()][:SHOWN]
        compared = [again.compare(key) for key in keys]
        return {
            "images": len(keys),
            "identical": sum(one.identical for one in compared),
            "max difference": max(one.max_difference for one in compared),
            "differences": sorted({said for one in compared for said in one.differences}),
        }

    def overlap(self) -> Result:
        """The same units by a worker that overlaps drawing with scoring and writing, and by one that does not."""
        spec, _ = recorded_spec(self.dataset, real=self.real)
        rows, made = [], {}
        for way in self.setting.pick((True, False, True), (True, False)):
            name = f"overlap {len(rows)}"
            other = self.root / name.replace(" ", "-")
            for file in ("dataset.json", Path(reference_path(self.dataset)).name):
                source = self.root / "manifests" / NAME / file
                (other / "manifests" / NAME).mkdir(parents=True, exist_ok=True)
                shutil.copy(source, other / "manifests" / NAME / file)
            device = self._device()
            worker = Worker(dataclasses.replace(spec, out=str(other)), device, overlap=way)
            units = all_units([], self.count, self.per_shard)
            if self.setting.cuda:
                worker.make(units[0], _ignore)  # warm
                self._emptied(other)
            _, seen = measured(self.setting.device, lambda: self._make(worker, units))  # noqa: B023 - called at once
            made[name] = (self._tars(other), self._rows(other))
            speed = self.count / seen.pop("seconds")
            rows.append({"overlap": way, "images": self.count, "images/s": speed, **seen})
            free(self.setting.device)
        first, second, *_ = made.values()
        return {
            "rows": rows,
            "tars equal, on and off": first[0] == second[0],
            "tars equal, on and on": first[0] == list(made.values())[-1][0] if len(made) > 2 else None,
            "rows equal, on and off": first[1] == second[1],
            "tars equal to the command's": first[0] == self._tars(self.root),
        }

    @staticmethod
    def _emptied(root: Path) -> None:
        """Take the shards away; what they are made by stays."""
        shutil.rmtree(root / "shards")
        for file in (root / "manifests" / NAME).rglob("*"):
            if file.suffix in (".parquet", ".npz", ".npy", ".safetensors"):
                file.unlink()

    @staticmethod
    def _make(worker: Worker, units: Sequence[Any]) -> None:
        for future in [worker.begin(unit, _ignore) for unit in units]:
            future.result()

    def _rows(self, root: Path) -> list[dict[str, Any]]:
        """Manifest rows without what differs between equal runs."""
        dataset = Dataset(NAME, Storage(str(root)))
        return dataset.table().drop_columns(list(UNSTEADY)).to_pylist()

    def scores(self) -> Result:
        """Every score of the same images by the device, by the device again, and by the CPU."""
        spec, _ = recorded_spec(self.dataset, real=self.real)
        table = self.dataset.table().to_pylist()
        pixels, codes = [self.dataset.pixels(row) for row in table], [row["phase"] for row in table]
        reference, real = load_reference(self.dataset), find_dataset(self.real, str(self.root))
        by: dict[str, list[dict[str, Any]]] = {}
        seconds = {}
        device = self._device()
        for who, where in (("device", device), ("again", device), ("cpu", "cpu")):
            if who == "again" and self.setting.miniature:
                by[who] = by["device"]
                continue
            scorer = Scorer(reference, real, spec.config.score, where)
            by[who], seen = measured(self.setting.device, lambda: scorer.score(pixels, codes))  # noqa: B023
            seconds[f"seconds, {who}"] = seen["seconds"]
        rows = []
        for name in sorted(by["cpu"][0]):
            values = [[row[name] for row in by[who]] for who in ("device", "again", "cpu")]
            numbers = [value for value in values[2] if isinstance(value, float | int)]
            if not numbers:
                continue
            apart = np.abs(np.array(values[0], float) - np.array(values[2], float))
            same = bool(np.array_equal(np.array(values[0], float), np.array(values[1], float), equal_nan=True))
            largest = max(map(abs, numbers))
            rows.append(
                {"column": name, "N": len(numbers), "max difference": float(np.nanmax(apart)), "of at most": largest,
                 "same again": same}
            )  # fmt: skip
        missing = sorted(set(SCORE_NAMES) - {row["column"] for row in rows})
        return {"rows": rows, "images": len(pixels), **seconds, "columns without numbers": missing}

    def flags(self) -> Result:
        """The process's arithmetic before scoring, while another thread scores, and after."""
        spec, _ = recorded_spec(self.dataset, real=self.real)
        fresh, device = _flags(), self._device()
        before = _flags()
        reference, real = load_reference(self.dataset), find_dataset(self.real, str(self.root))
        scorer = Scorer(reference, real, spec.config.score, device)
        table = self.dataset.table().to_pylist()
        pixels, codes = [self.dataset.pixels(row) for row in table], [row["phase"] for row in table]
        with Sampled(_flags, 0.0005) as seen:
            for _ in range(self.setting.pick(3, 1)):
                scorer.score(pixels, codes)
        during = sorted({str(flags) for flags in seen.samples})
        return {"before prepare": fresh, "after prepare": before, "seen while scoring": during, "after": _flags(),
                "N samples": len(seen.samples)}  # fmt: skip

    def reference(self) -> Result:
        """What the parent of the workers takes to make a reference, and what it keeps."""
        if self.setting.miniature:
            return {"skipped": "in miniature: `shards` has made one"}
        spec, _ = recorded_spec(self.dataset, real=self.real)
        real, device = find_dataset(self.real, str(self.root)), self._device()
        free(self.setting.device)
        before = self._reserved()
        made, seen = measured(
            self.setting.device,
            lambda: build_reference(
                real, spec.config.score, list(spec.plan.codes), image_size=spec.config.sample.size, device=device,
                progress=False,
            ),
        )  # fmt: skip
        del made
        kept = self._reserved()
        free(self.setting.device)
        return {**seen, "host peak GB": peak_resident_gb(), "reserved GB before": before, "reserved GB left": kept,
                "left after empty_cache": self._reserved(), "crops": len(real.table(["key"]))}  # fmt: skip

    def settings(self) -> Result:
        """Which device a worker draws on, and the devices that this process then has a context on."""
        sampler = demo_sampler(self._device(), steps=2)
        drawn = sampler.generate(requests(3))
        current = torch.cuda.current_device() if self.setting.cuda else None
        held = [n for n in range(torch.cuda.device_count()) if torch.cuda.memory_reserved(n)]
        return {"device": str(sampler.device), "current device": current, "devices with memory": held,
                "dtype": sampler.dtype_name, "model": sampler.device_model, "bad": sum(drawn.bad),
                "channels_last": next(p for p in sampler._unet.parameters() if p.ndim == 4).is_contiguous(
                    memory_format=torch.channels_last)}  # fmt: skip

    def _reserved(self) -> float | None:
        return torch.cuda.memory_reserved() / 1e9 if self.setting.cuda else None

    def _device(self) -> str:
        """As a worker's process is set up."""
        return prepare(0) if self.setting.cuda else _prepared_cpu()


def _command(words: list[str], printed: Path) -> None:
    """Run the command line `builder WORDS`, in a process that has just been forked."""
    from builder.cli import main

    with printed.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        sys.argv = ["builder", *words]
        main()


def _prepared_cpu() -> str:
    torch.set_num_threads(1)
    return "cpu"


def _flags() -> dict[str, bool]:
    cudnn = torch.backends.cudnn
    return {"deterministic": cudnn.deterministic, "benchmark": cudnn.benchmark, "allow_tf32": cudnn.allow_tf32,
            "matmul tf32": torch.backends.cuda.matmul.allow_tf32}  # fmt: skip


def _what(pid: int, root: int, command: str) -> str:
    if pid == root:
        return "parent"
    return "worker" if "spawn_main" in command or "forkserver" in command else command[:60]


def _ignore(images: int) -> None:
    """A report that nobody reads."""

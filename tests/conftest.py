"""Fixtures that several rooms' tests share: small real datasets, made with the product's own writer."""

from __future__ import annotations

import atexit
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings

from builder.cli import main
from builder.config import ScoreConfig
from builder.phases import HEALING_PHASES, ClassTable
from builder.shards.dataset import Dataset
from builder.shards.storage import Storage
from builder.shards.writer import Sample, encode_png, image_row, write_shard
from tests.lineages import ALIKE

if os.environ.get("BUILDER_TEST_STATE") is None:  # processes that a test starts, and that import this, share its state
    os.environ["XDG_STATE_HOME"] = os.environ["BUILDER_TEST_STATE"] = tempfile.mkdtemp(prefix="builder-state-")
    atexit.register(shutil.rmtree, os.environ["XDG_STATE_HOME"], ignore_errors=True)  # the user's own is not touched

settings.register_profile("untimed", deadline=None)  # a busy machine takes its time
settings.load_profile("untimed")


def textured(seed: int, size: int = 64) -> np.ndarray:
    """A random picture with structure at several scales: uint8 RGB [size, size, 3]."""
    from PIL import Image

    generator = np.random.default_rng(seed)
    picture = np.zeros((size, size, 3), np.float32)
    for cells, strength in ((4, 60.0), (12, 40.0), (size, 14.0)):
        grid = generator.normal(0, 1, (cells, cells, 3)).astype(np.float32)
        layers = [Image.fromarray(grid[..., c]).resize((size, size), Image.Resampling.BICUBIC) for c in range(3)]
        picture += strength * np.stack([np.asarray(layer) for layer in layers], -1)
    tint = generator.uniform(90, 170, 3)
    return np.clip(picture + tint, 1, 254).astype(np.uint8)


def write_real(
    root: Path, name: str = "clinic", per_phase: int = 12, size: int = 64, codes: str = "",
    classes: ClassTable = HEALING_PHASES,
) -> Dataset:  # fmt: skip
    """A real dataset of textured crops: six patients a phase, of which four train, one validates and one tests."""
    storage = Storage(root)
    samples = []
    for code in codes or classes.codes:
        number = ord(code) if len(code) == 1 else 128 + classes.label(code)
        for index in range(per_phase):
            pixels = textured(1000 * number + index, size)
            patient = index % 6
            row = image_row(f"{name}-{code}-{index:08d}", code, classes.label(code), "real", pixels) | {
                "patient": f"{number:02x}{patient:030x}",
                "split": ("train", "train", "train", "train", "val", "test")[patient],
                "source": f"{code}{index}.jpg",
                "box": [size / 8, size / 8, size * 7 / 8, size * 7 / 8],
                "original_size": [size, size],
            }
            samples.append(Sample(row, encode_png(pixels)))
    dataset = Dataset(name, storage)
    half = len(samples) // 2
    write_shard(storage, name, 0, samples[:half])
    write_shard(storage, name, 1, samples[half:])
    dataset.write_info(
        {
            "name": name, "state": "complete", "origin": "real", "created": "2026-01-01T00:00:00+00:00",
            "classes": classes.to_json(), "count": len(samples), "config": {}, "parent": None,
            "lineage": {"known": True, "key_fingerprint": "test", "patients": [], **ALIKE},
            "licence": {"base": None, "data": "CC0"},
        }
    )  # fmt: skip
    return dataset


@pytest.fixture
def clinic(tmp_path: Path) -> Dataset:
    return write_real(tmp_path)


def save_tiny_checkpoint(path: Path) -> Path:
    """A small SDXL with random weights, saved as training saves it: 16 px images, four channels of latents."""
    from builder.models.checkpoint import Checkpoint, Lineage, save_checkpoint
    from builder.models.sdxl import build
    from tests.test_models import ARCHITECTURE

    checkpoint = Checkpoint(
        path,
        classes=HEALING_PHASES,
        prompts={phase.code: phase.prompt for phase in HEALING_PHASES},
        original_sizes={"I": [20, 30], "P": [16], "R": [40]},
        lineage=Lineage(True, "test", ["49" + f"{0:030x}"], **ALIKE),
    )
    save_checkpoint(build(ARCHITECTURE, 16, 0), checkpoint)
    return path


@pytest.fixture(scope="module")
def real_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output root with the real dataset `clinic`, of small crops."""
    root = tmp_path_factory.mktemp("real")
    write_real(root, per_phase=12, size=24)
    return root


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """One torch thread, as in a worker: bits and speed depend on their number."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def known_references() -> dict[str, Any]:
    """References that jobs of this session have built, by what they are made from."""
    return {}


@pytest.fixture(scope="module")
def references_once(known_references: dict[str, Any]) -> Iterator[None]:
    """Jobs on the same crops with the same settings share what they measure by: most of a small job's time goes there.

    How a reference is built, and that it is always the same, is what test_quality and test_reference are about.
    """
    from builder.job import run as module

    build = module.build_reference

    def once(real: Dataset, config: ScoreConfig, codes: Sequence[str], **settings: Any) -> Any:
        rows = real.table(["key", "phase", "patient", "split", "sha256"]).to_pylist()
        made_from = repr((real.name, rows, config, list(codes), settings))
        if made_from not in known_references:
            known_references[made_from] = build(real, config, codes, **settings)
        return known_references[made_from]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "build_reference", once)
        yield


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")


class Result:
    """What a command line ended with: exit code, and what it printed to either stream."""

    def __init__(self, code: int, output: str) -> None:
        self.code, self.output = code, output


@pytest.fixture
def builder(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., Result]:
    """Run a command line in this process, in the test's own folder, through the real entry point."""
    monkeypatch.chdir(tmp_path)
    before = signal.getsignal(signal.SIGTERM)

    def run(*words: str | Path) -> Result:
        monkeypatch.setattr(sys, "argv", ["builder", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            main()
        signal.signal(signal.SIGTERM, before)  # the entry point's own handler is meant for a process of its own
        captured = capsys.readouterr()
        return Result(int(ended.value.code or 0), captured.out + captured.err)

    return run

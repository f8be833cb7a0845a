"""What a GPU is measured by (tests.acceptance.gpu), in miniature on the CPU; and what a bad step costs the others."""

from __future__ import annotations

import json
import math
import os
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from builder.models.checkpoint import read_checkpoint
from tests.acceptance.gpu import __main__ as gpu
from tests.acceptance.gpu import child
from tests.acceptance.gpu.child import Record
from tests.acceptance.gpu.report import write_report
from tests.acceptance.gpu.setting import Setting, Step

pytestmark = pytest.mark.no_cover


def steps(out: Path, part: str) -> dict[str, dict[str, Any]]:
    data = json.loads((out / f"part-{part}.json").read_text())
    assert data["ended"] and data["running"] is None
    return {step["name"]: step for step in data["steps"]}


def numbers(value: Any) -> Iterator[float]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for one in value:
            yield from numbers(one)
    elif isinstance(value, float):
        yield value


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpu")
    before = dict(os.environ)
    try:
        assert gpu.run(["a", "b", "c", "d"], 10.0, folder, True, "cpu", {}) == 0
    finally:
        os.environ.clear()
        os.environ.update(before)
    return folder


def test_every_step_ends_well_and_all_figures_are_finite(out: Path) -> None:
    for part in "abc":
        found = steps(out, part)
        assert not {name: step["error"] for name, step in found.items() if "error" in step}
        assert len(found) >= 4
        assert all(math.isfinite(number) for number in numbers(list(found.values())))


def test_the_checks_find_what_holds_on_a_cpu(out: Path) -> None:
    found = steps(out, "a")
    assert found["shards"]["images"] == found["regenerate"]["identical"] == 4
    overlap = found["overlap"]
    assert overlap["tars equal, on and off"] and overlap["rows equal, on and off"]
    assert overlap["tars equal to the command's"]
    broken = found["not finite"]
    assert broken["bad when it overflows"] == broken["images"] and broken["bad in the next higher precision"] == 0
    assert broken["weights as before"] and broken["same images afterwards"]
    memory = found["out of memory"]
    assert memory["micro_batch"] == memory["micro_batch of the next batch"] == memory["images"] // 2
    assert memory["same when replayed"] and memory["same as batches of that size"]
    assert {row["column"] for row in found["scores"]["rows"]} >= {"ssim", "lpips", "copy_score", "sharpness"}
    assert all(row["max difference"] == 0 for row in found["scores"]["rows"])


def test_drawing_and_training_are_set_beside_the_plain_way(out: Path) -> None:
    drawing, training = steps(out, "b"), steps(out, "c")
    assert drawing["plain 2"]["mean difference to ours at the same seeds, levels, N 2"] < 0.1
    what = [row["what"] for step in drawing.values() for row in step.get("rows", [])]
    assert [name.split(",")[0] for name in what].count("plain diffusers") == 1 and len(what) == 6
    rows = [row for step in training.values() for row in step.get("rows", [])]
    assert {row["method"] for row in rows} == {"LoRA, rank 16", "all weights"}
    assert all(row["images/s"] > 0 and row["ratio"] > 0 for row in rows)
    assert training["lora state"]["state GB"] < training["full state"]["state GB"]


def test_the_report_has_card_date_and_rows_and_the_folder_is_small(out: Path) -> None:
    text = (out / "results.md").read_text()
    assert text.startswith("# Measured on none (CPU)") and "torch " in text and "diffusers " in text
    for row in ("| ours, 2 steps | 2 |", "| plain diffusers, 2 steps | 2 |", "| LoRA, rank 16 | 2 |", "| lpips | 4 |"):
        assert row in text
    assert "FAILED" not in text
    files = [path for path in out.rglob("*") if path.is_file()]
    assert len(files) <= 7 and all(path.stat().st_size <= 15e6 for path in files)
    assert sum(path.stat().st_size for path in files if not path.name.startswith("base.tar.")) < 1e6


def test_the_base_is_trained_and_its_checkpoint_comes_back(out: Path, tmp_path: Path) -> None:
    (row,) = steps(out, "d")["base"]["rows"]
    assert row["checkpoint"] == "step-000002" and row["crops"] > 20
    packed = tmp_path / "base.tar"
    packed.write_bytes(b"".join(path.read_bytes() for path in sorted(out.glob("base.tar.*"))))
    with tarfile.open(packed) as tar:
        tar.extractall(tmp_path, filter="data")
    assert read_checkpoint(tmp_path / "base/checkpoint").config["name"] == "base"


def fine() -> dict[str, Any]:
    return {"value": 1.0}


def failing() -> dict[str, Any]:
    raise ValueError("no such kernel")


def dying() -> dict[str, Any]:
    os._exit(7)


def hanging() -> dict[str, Any]:
    time.sleep(600)
    return {}


def bad_steps(part: str, setting: Setting) -> list[Step]:
    return [
        Step("failing", "group", failing, 60),
        Step("dying", "group", dying, 60),
        Step("hanging", "group", hanging, 1),
        Step("fine", "group", fine, 60),
    ]


def test_a_step_that_fails_dies_or_hangs_costs_the_others_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import multiprocessing

    monkeypatch.setattr(child, "steps_of", bad_steps)
    monkeypatch.setattr(gpu, "_context", lambda device: multiprocessing.get_context("fork"))
    gpu.supervise("a", Setting("cpu", True, tmp_path, tmp_path, time.time() + 60))
    found = steps(tmp_path, "a")
    assert list(found) == ["failing", "dying", "hanging", "fine"]
    assert found["failing"]["error"] == "ValueError: no such kernel" and found["failing"]["traceback"]
    assert found["dying"]["error"] == "ended with exit code 7"
    assert found["hanging"]["error"] == "ended after its limit of 1 s"
    assert found["fine"]["value"] == 1.0
    text = write_report(tmp_path, {"card": "none"})
    assert "**failing**" in text and "FAILED: ValueError: no such kernel" in text and "value: 1" in text


def test_a_part_whose_time_is_over_skips_what_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "steps_of", bad_steps)
    monkeypatch.setattr(os, "setpgrp", lambda: None)
    child.run_part("a", Setting("cpu", True, tmp_path, tmp_path, time.time() + 1), ["failing"])
    assert all(step["skipped"] for step in steps(tmp_path, "a").values())
    assert [step["name"] for step in Record(tmp_path, "a").data["steps"]] == ["dying", "hanging", "fine"]

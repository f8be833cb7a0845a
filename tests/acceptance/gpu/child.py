"""Runs the steps of one part, in a process of its own, and writes down each as it ends."""

from __future__ import annotations

import importlib
import json
import os
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.acceptance.gpu.setting import Setting, Step

PARTS = {  # module of each part, and what it is about
    "a": ("checks", "unit checks on the device"),
    "b": ("generation", "drawing with SDXL's full width"),
    "c": ("training", "training steps at SDXL's full width"),
    "d": ("base", "training of the generator's base"),
}
LAST_LINES = 14  # of a traceback


def run_part(part: str, setting: Setting, done: Sequence[str]) -> None:
    """Run the steps of a part that are not `done`, until its time is over.

    Each is noted in OUT/part-X.json as it begins and as it ends.
    """
    os.setpgrp()  # so that whoever ends this process also ends what it has started
    os.environ["BUILDER_TRUST_ROOTS"] = str(setting.scratch)  # what the checks make, they may read
    record = Record(setting.out, part)
    for step in steps_of(part, setting):
        if step.name in done:
            continue
        if setting.seconds_left < 2:
            record.ended(step.name, step.group, {"skipped": "no time was left"}, 0.0)
            continue
        record.begins(step)
        say(f"part {part}: {step.name} ...")
        started, result = time.time(), {}
        try:
            result = step.run()
        except BaseException as error:
            result = {"error": f"{type(error).__name__}: {error}"[:2000], "traceback": last_lines()}
            del error  # it holds the tensors of its frames
        record.ended(step.name, step.group, result, time.time() - started)
        said = result.get("error") or result.get("skipped") or "done"
        say(f"part {part}: {step.name}: {said.splitlines()[0][:200]} ({time.time() - started:.1f} s)")
    record.finish()


def steps_of(part: str, setting: Setting) -> list[Step]:
    """The steps of a part, most important first."""
    module = importlib.import_module(f"tests.acceptance.gpu.{PARTS[part][0]}")
    if part == "d":
        minutes = (setting.seconds_left - 5) / 60  # it has to have written everything when the part's time is over
        return [Step("base", "base", lambda: module.run(setting.out, minutes, setting.miniature), 1e9)]
    return list(module.steps(setting))


class Record:
    """DIR/part-X.json: what ran, how it ended, and which step runs now. One process writes it at a time."""

    def __init__(self, out: Path, part: str) -> None:
        self.path = out / f"part-{part}.json"
        self.data: dict[str, Any] = {
            "part": part,
            "about": PARTS[part][1],
            "steps": [],
            "running": None,
            "ended": False,
        }
        if self.path.exists():
            self.data = json.loads(self.path.read_text())

    def begins(self, step: Step) -> None:
        self.data["running"] = {"name": step.name, "group": step.group, "since": time.time(), "limit": step.limit}
        self._write()

    def ended(self, name: str, group: str, result: dict[str, Any], seconds: float) -> None:
        self.data["steps"].append({"name": name, "group": group, "seconds": round(seconds, 2), **result})
        self.data["running"] = None
        self._write()

    def finish(self) -> None:
        self.data["ended"] = True
        self._write()

    def _write(self) -> None:
        text = json.dumps(self.data, indent=1, default=_plain)
        unfinished = self.path.with_name(f".{self.path.name}")
        unfinished.write_text(text)
        unfinished.replace(self.path)


def last_lines() -> list[str]:
    """The end of the traceback of the error in hand, without the lines that only underline."""
    lines = [line for line in traceback.format_exc().splitlines() if line.strip(" ^~")]
    return lines[-LAST_LINES:]


def _plain(value: Any) -> Any:
    if hasattr(value, "item") and getattr(value, "size", 1) == 1:
        return value.item()
    return str(value)


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)

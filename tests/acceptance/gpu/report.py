"""DIR/results.md: everything that the parts have found so far, with the card's name, the versions and the date."""

from __future__ import annotations

import datetime
import json
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft", "numpy")
APART = ("name", "group", "seconds", "rows", "traceback", "error", "skipped")  # shown in their own way


def environment(device: str | None) -> dict[str, Any]:
    """Where and with what this was measured. In a process of its own: a context on the GPU takes memory."""
    found = device or ("cuda" if _gpu_name() else "cpu")
    return {
        "card": (_gpu_name() or "none") if found == "cuda" else "none (CPU)",
        "device": found,
        "date": datetime.datetime.now().astimezone().isoformat(sep=" ", timespec="minutes"),
        "Python": platform.python_version(),
        **{package: _version(package) for package in PACKAGES},
        "builder": _commit(),
    }


def _gpu_name() -> str:
    try:
        query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
        done = subprocess.run(query, capture_output=True, text=True, timeout=20)
        if done.returncode == 0 and done.stdout.strip():
            return done.stdout.strip().splitlines()[0]
    except (OSError, subprocess.TimeoutExpired):
        pass  # torch may know without it
    ask = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')"
    return subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True).stdout.strip()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"


def _commit() -> str:
    import builder

    return str(builder.__version__)


def write_report(out: Path, about: dict[str, Any]) -> str:
    """Write OUT/results.md from the parts' JSON files there, and return its text."""
    lines = [f"# Measured on {about['card']}", ""]
    lines += [", ".join(f"{key} {value}" for key, value in about.items() if key != "card"), ""]
    for path in sorted(out.glob("part-?.json")):
        part = json.loads(path.read_text())
        lines += [f"## Part {part['part']}: {part['about']}", ""]
        groups: dict[str, list[dict[str, Any]]] = {}
        for step in part["steps"]:
            groups.setdefault(step["group"], []).append(step)
        for name, steps in groups.items():
            lines += [f"### {name}", "", *_group(steps), ""]
        if not part["ended"]:
            lines += ["This part has not ended.", ""]
    text = "\n".join(lines)
    (out / "results.md").write_text(text)
    return text


def _group(steps: list[dict[str, Any]]) -> list[str]:
    """The joined table of a group's steps, then what else each of them says."""
    lines = table([row for step in steps for row in step.get("rows", [])])
    for step in steps:
        name = f"**{step['name']}** ({step['seconds']:.1f} s)"
        if "error" in step:
            lines += [f"- {name} FAILED: {_inline(step['error'])}"]
            lines += [f"  - `{_inline(line)}`" for line in step.get("traceback", [])[-4:]]
        elif "skipped" in step:
            lines += [f"- {name}: skipped, {step['skipped']}"]
        said = [f"{key}: {_cell(value)}" for key, value in step.items() if key not in APART]
        if said:
            lines += [f"- {name}: {'; '.join(said)}"]
    return lines


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Rows as a Markdown table; a column for each key, in order of first appearance."""
    if not rows:
        return []
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(_cell(row.get(column)).replace("|", "/") for column in columns) + " |" for row in rows]
    return [*lines, ""]


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_cell(one)}" for key, one in value.items())
    if isinstance(value, list):
        return "; ".join(map(_cell, value)) or "none"
    return _inline(str(value))


def _inline(text: str) -> str:
    return " ".join(text.split())[:600]

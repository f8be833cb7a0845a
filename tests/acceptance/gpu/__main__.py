"""Run the parts one after the other, within the minutes that there are; see the package's docstring.

    python -m tests.acceptance.gpu --minutes 10 --out DIR [--parts a,b,c,d] [--miniature] [--device cuda|cpu]

Exit code: 0 when all parts ran, whatever their steps found; 1 when one could not.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.acceptance.gpu.base import render_in_background
from tests.acceptance.gpu.child import PARTS, Record, last_lines, run_part, say
from tests.acceptance.gpu.report import environment, write_report
from tests.acceptance.gpu.setting import Setting

SHARES = {"a": 0.32, "b": 0.32, "c": 0.20}  # of all the minutes, at most; d takes what is left
MOST_STARTS = 12  # of one part's process
GRACE = 3.0  # seconds after a part's end before it is killed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--parts", default="a,b,c,d", help="which, in this order [default: a,b,c,d]")
    parser.add_argument("--miniature", action="store_true", help="tiny widths and counts")
    parser.add_argument("--seconds", default="", help="the most that parts take, e.g. a=150,b=160,c=100")
    parser.add_argument("--patients", type=int, default=2000, help="of the base's crops, for part d [default: 2000]")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="[default: cuda where there is one]")
    options = parser.parse_args()
    parts = [part.strip() for part in options.parts.split(",") if part.strip()]
    if unknown := [part for part in parts if part not in PARTS]:
        parser.error(f"there is no part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    most = {part: 60 * options.minutes * share for part, share in SHARES.items()}
    for word in filter(None, options.seconds.split(",")):
        part, _, seconds = word.partition("=")
        most[part.strip()] = float(seconds)
    if "d" in parts:
        render_in_background(options.patients, options.miniature)
    sys.exit(run(parts, options.minutes, options.out, options.miniature, options.device, most))


def run(
    parts: list[str], minutes: float, out: Path, miniature: bool, device: str | None, most: dict[str, float]
) -> int:
    """Run `parts` in order, each for at most its seconds in `most`; the exit code."""
    ends = time.time() + 60 * minutes
    out = out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    for part in PARTS:
        (out / f"part-{part}.json").unlink(missing_ok=True)
    os.environ |= {"TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1", "DIFFUSERS_VERBOSITY": "error"}
    about = environment(device)
    device = about["device"]
    say(", ".join(f"{key} {value}" for key, value in about.items()))
    failed = []
    with tempfile.TemporaryDirectory(prefix="builder-gpu-") as scratch:
        for number, part in enumerate(parts):
            left = ends - time.time()
            last = number == len(parts) - 1
            seconds = left - GRACE if last else min(left - GRACE, most.get(part, left))
            setting = Setting(device, miniature, out, Path(scratch), time.time() + seconds)
            say(f"part {part}: {PARTS[part][1]}, at most {seconds:.0f} s")
            try:
                supervise(part, setting)
            except Exception as error:  # of this program, not of a step: the other parts shall run all the same
                Record(out, part).ended("part", "part", {"error": repr(error), "traceback": last_lines()}, 0.0)
                failed.append(part)
            text = write_report(out, about)
    for unfinished in out.glob(".part-?.json"):  # of a process that was ended while it wrote
        unfinished.unlink()
    print(text, flush=True)
    return 1 if failed else 0


def supervise(part: str, setting: Setting) -> None:
    """Run a part's process until all its steps have ended; one that hangs or dies loses the step in hand alone."""
    context = _context(setting.device)
    for _ in range(MOST_STARTS):
        done = [step["name"] for step in Record(setting.out, part).data["steps"]]
        process = context.Process(target=run_part, args=(part, setting, done))
        process.start()
        try:
            why = _wait(process, part, setting)
        finally:
            if process.is_alive():
                _kill(process.pid)
        record = Record(setting.out, part)
        if record.data["ended"]:
            return
        running: dict[str, Any] | None = record.data["running"]
        if running is None:  # it ended outside of any step: nothing of this part can be run
            raise RuntimeError(f"part {part}: its process ended {why} before a step began")
        record.ended(running["name"], running["group"], {"error": f"ended {why}"}, time.time() - running["since"])
        say(f"part {part}: {running['name']}: ended {why}")
        if setting.seconds_left < 2:
            record.finish()
            return
    raise RuntimeError(f"part {part}: its process was started {MOST_STARTS} times")


def _wait(process: Any, part: str, setting: Setting) -> str:
    """Wait for the process; end it when a step or the part takes too long. Says how it ended."""
    why = ""
    while process.is_alive():
        process.join(0.2)
        running = Record(setting.out, part).data["running"]
        if running and time.time() > running["since"] + running["limit"]:
            why = f"after its limit of {running['limit']:.0f} s"
        elif setting.seconds_left < -GRACE / 2:
            why = "when the part's time was over"
        if why and process.is_alive():
            _kill(process.pid)
            process.join()
    return why or f"with exit code {process.exitcode}"


def _kill(pid: int) -> None:
    """End a part's process and what it has started."""
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:  # it has no group of its own yet
        os.kill(pid, signal.SIGKILL)


def _context(device: str) -> Any:
    """On the CPU by a fork server that loads torch once; CUDA does not survive a fork."""
    if device != "cpu":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["builder.job.engines.preload", "builder.training.diffusion"])
    return context


if __name__ == "__main__":
    main()

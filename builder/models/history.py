"""The history of a training run: which checkpoints it wrote, how they scored, and which is the best.

RUN/history.json is always valid JSON: a score that is not finite is null there.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from builder.documents import MAX_BYTES, parse_json, read_document, write_document
from builder.errors import BuilderError, did_you_mean
from builder.files import read_file

FILE = "history.json"
MODES = ("min", "max")


def plain(value: Any) -> Any:
    """`value` as JSON can hold it: numpy's and torch's scalars become numbers, what is not finite becomes None.

    Tensors and arrays with several values are described, not kept; keys become text.
    """
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(entry) for entry in value]
    if callable(getattr(value, "item", None)) and math.prod(getattr(value, "shape", ())) == 1:
        return plain(value.item())
    return f"{type(value).__name__} {list(getattr(value, 'shape', ()))}"


@dataclass(frozen=True)
class Entry:
    """One checkpoint of a run. path: its folder, relative to the run's. metrics: by name, None where not finite."""

    step: int
    epoch: int
    path: str
    metrics: dict[str, Any] = field(default_factory=dict)
    created: str = ""  # ISO 8601, UTC


@dataclass(frozen=True)
class History:
    """The checkpoints of a run in the order of their steps; the best is that of lowest ('min') or highest `monitor`."""

    entries: tuple[Entry, ...] = ()
    monitor: str = ""
    mode: str = "min"

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise BuilderError(f"the mode of a monitor is '{self.mode}'", "it is min (lower is better) or max")

    def with_entry(self, entry: Entry) -> History:
        """The history with one more checkpoint, its metrics made plain; one of the same step is replaced."""
        entry = dataclasses.replace(entry, metrics=plain(entry.metrics))
        others = [other for other in self.entries if other.step != entry.step]
        return dataclasses.replace(self, entries=tuple(sorted([*others, entry], key=lambda each: each.step)))

    @property
    def metrics(self) -> list[str]:
        """The names of all metrics that a checkpoint of this run has as a number, sorted."""
        return sorted({name for entry in self.entries for name, value in entry.metrics.items() if _is_number(value)})

    @property
    def last(self) -> Entry:
        self._require_some()
        return self.entries[-1]

    def best(self, monitor: str = "", mode: str = "") -> Entry:
        """The best checkpoint by `monitor`, else by the run's own; of equals the earliest.

        Raises BuilderError when no monitor is known, or the metric is none that a checkpoint has.
        """
        self._require_some()
        monitor, mode = monitor or self.monitor, mode or self.mode
        require_monitor(monitor, self.metrics)
        if mode not in MODES:
            raise BuilderError(f"--mode is '{mode}'", "it is min (lower is better) or max")
        scored = [entry for entry in self.entries if _is_number(entry.metrics.get(monitor))]
        sign = 1 if mode == "min" else -1
        return min(scored, key=lambda entry: sign * entry.metrics[monitor])

    def at(self, *, epoch: int | None = None, step: int | None = None) -> Entry:
        """The checkpoint of an epoch (its last one) or of a step; BuilderError lists those there are."""
        for entry in reversed(self.entries):
            if (epoch is None or entry.epoch == epoch) and (step is None or entry.step == step):
                return entry
        asked = f"epoch {epoch}" if epoch is not None else f"step {step}"
        there = ", ".join(f"{entry.path} (epoch {entry.epoch}, step {entry.step})" for entry in self.entries)
        raise BuilderError(f"the run has no checkpoint of {asked}", f"there are: {there or 'none'}")

    def superfluous(self, keep: int, monitor: str = "", mode: str = "") -> list[Entry]:
        """The checkpoints to remove so that the best, the last and the `keep` newest others stay.

        Where no checkpoint has a score there is no best. BuilderError when scores exist but no monitor is known.
        """
        if not self.entries:
            return []
        stay = {self.last.step}
        if self.metrics:
            stay.add(self.best(monitor, mode).step)
        others = [entry for entry in self.entries if entry.step not in stay]
        return others[: max(0, len(others) - keep)]

    def in_folders(self, run: Path) -> History:
        """The history of those checkpoints whose folder is still there."""
        there = [entry for entry in self.entries if (run / entry.path).is_dir()]
        return dataclasses.replace(self, entries=tuple(there))

    def write(self, run: Path) -> None:
        """Write RUN/history.json with its checksum, whole or not at all."""
        data = {"monitor": self.monitor, "mode": self.mode, "checkpoints": [plain(vars(e)) for e in self.entries]}
        write_document(run / FILE, data)

    @classmethod
    def read(cls, run: Path) -> History:
        """The history in RUN/history.json; an empty one when there is no such file."""
        file = run / FILE
        if not file.is_file():
            return cls()
        from builder.models.checkpoint_document import HistoryDocument  # pydantic takes 0.1 s

        data = read_document(file, HistoryDocument, remedy="restore it, or remove it")
        entries = [Entry(**entry) for entry in data["checkpoints"]]
        return cls(tuple(sorted(entries, key=lambda e: e.step)), data.get("monitor") or "", data.get("mode", "min"))

    def _require_some(self) -> None:
        if not self.entries:
            raise BuilderError("the run has no checkpoint yet", "let it train up to its first one")


def require_monitor(monitor: str, metrics: Iterable[str]) -> None:
    """Refuse to choose by a metric that doesn't exist, naming those that do."""
    known = sorted(metrics)
    if not known:
        raise BuilderError("no checkpoint of the run has a score to choose by", "name a step, or take the latest")
    there = f"the metrics are: {', '.join(known)}"
    if not monitor:
        raise BuilderError("it is not said by which metric the best is chosen", f"give --monitor; {there}")
    if monitor not in known:
        bare = monitor.removeprefix("val_")  # the old system's mistake: it monitored val_fid, and wrote fid
        near = f"did you mean '{bare}'?" if bare in known else did_you_mean(monitor, known)
        remedy = there if near.startswith("known") else f"{near} {there}"
        raise BuilderError(f"no checkpoint has the metric '{monitor}'", remedy)


def read_legacy_history(path: Path) -> tuple[History, list[str]]:
    """An old checkpoint_history.json as a History (steps are unknown there: the epoch stands for them), and notes.

    `Infinity` and `NaN`, which Python wrote though they aren't JSON, become None. A monitor that no checkpoint has is
    reported in the notes, with the metric that was probably meant, and dropped unless that one exists.
    """
    try:
        raw = read_file(path, MAX_BYTES + 1)
    except OSError as error:
        raise BuilderError(f"{path} cannot be read: {error.strerror}", "check the path") from None
    data = plain(parse_json(raw, str(path), remedy="copy the file again", constants=True))
    rows = data.get("checkpoint_history") if isinstance(data, dict) else None
    if not isinstance(rows, list) or not all(
        isinstance(row, dict) and isinstance(row.get("epoch"), int) for row in rows
    ):
        raise BuilderError(f"{path} has no 'checkpoint_history' with epochs", "give the old checkpoint_history.json")
    mode = data.get("monitor_mode")
    history = History(monitor=str(data.get("monitor_metric") or ""), mode=mode if mode in MODES else "min")
    for row in rows:
        name, metrics = Path(str(row.get("path") or "")).name, row.get("metrics") or {}
        history = history.with_entry(Entry(row["epoch"], row["epoch"], name, metrics, str(row.get("timestamp") or "")))
    return _mended(history, path)


def _mended(history: History, path: Path) -> tuple[History, list[str]]:
    known = history.metrics
    if not history.monitor or history.monitor in known:
        return history, []
    bare = history.monitor.removeprefix("val_")
    if bare not in known:
        note = (
            f"{path} monitors '{history.monitor}', which no checkpoint has; the metrics are: {', '.join(known) or '-'}"
        )
        return dataclasses.replace(history, monitor=""), [note]
    mended = dataclasses.replace(history, monitor=bare)
    best = mended.best()
    note = (
        f"{path} monitors '{history.monitor}', but the metric is called '{bare}', so the best was never recorded: "
        f"by '{bare}' ({mended.mode}) it is epoch {best.epoch} ({best.metrics[bare]:g})"
    )
    return mended, [note]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)

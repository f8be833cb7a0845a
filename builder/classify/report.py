"""An answer as a table, as JSON and as a plot. Answers are the plain dicts of Study.run."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from builder import plotting
from builder.classify.data import PATIENTS
from builder.classify.figures import HARMS, HELPS, MACRO_F1, names_of
from builder.shards.storage import Storage

Answer = Mapping[str, Any]
VERDICT_COLOURS = {HELPS: "#15803d", HARMS: "#b91c1c"}
NEITHER_COLOUR = "#6b7280"
CLASS_COLOURS = ("#0b6e99", "#c2410c", "#4d7c0f", "#7e22ce", "#a16207", "#be185d")
TITLES = {MACRO_F1: "macro-F1", "kappa": "kappa"}


def as_text(answer: Answer) -> str:
    """What was asked, of how many; a table of figures and of gains; in words, which ratio helps."""
    return "\n".join([*_preamble(answer), "", *_tables(answer), "", *_verdicts(answer)])


def write_report(answer: Answer, out: Path, name: str) -> list[Path]:
    """OUT/NAME.json, NAME.txt and NAME.png."""
    storage = Storage(out)
    storage.write(f"{name}.json", json.dumps(answer, indent=1, allow_nan=False).encode() + b"\n")
    storage.write(f"{name}.txt", as_text(answer).encode() + b"\n")
    plot([("", answer)], out / f"{name}.png")
    return [out / f"{name}.{kind}" for kind in ("json", "txt", "png")]


def heading_of(answer: Answer) -> list[str]:
    """Over a plot: the datasets and their N, and what a reader of the figures must know."""
    names = ", ".join(f"{made['name']} ({made['crops']:,})" for made in answer["synthetic"]) or "no synthetic crops"
    lines = [
        f"synthetic: {names}; {answer['seeds']} seeds a ratio",
        f"trained: {_training(answer)} of '{answer['real']}'",
        f"tested: {_count(answer, answer['test'])}",
    ]
    if answer["unit"] != PATIENTS:
        lines.append(f"patients unknown: {answer['unit']} in their place")
    lines += [f"its generator learned from {made['learned_from']} {answer['unit']}" for made in _better_taught(answer)]
    if answer["leaks"]:
        lines += textwrap.wrap(f"LEAK allowed, because: {answer['allow_leak']}", 60)
    return lines


def _better_taught(answer: Answer) -> list[Mapping[str, Any]]:
    """The synthetic datasets whose generator learned from more of the real patients than the classifier ever sees."""
    most = max(counts["patients"] for counts in answer["training"])
    return [made for made in answer["synthetic"] if made["learned_from"] > most]


def _count(answer: Answer, counts: Mapping[str, int]) -> str:
    return f"{counts['crops']:,} crops of {counts['patients']} {answer['unit']}"


def _training(answer: Answer) -> str:
    """The real training crops, which differ by seed where they are limited."""
    crops, patients = ([counts[what] for counts in answer["training"]] for what in ("crops", "patients"))
    spans = [f"{min(n):,}" if min(n) == max(n) else f"{min(n):,}-{max(n):,}" for n in (crops, patients)]
    return f"{spans[0]} crops of {spans[1]} {answer['unit']}"


def _preamble(answer: Answer) -> list[str]:
    recipe = answer["recipe"]
    drawn = ", drawn anew for each seed" if answer["real_limit"] else ""
    network = f"the model in {recipe['model']}" if recipe["model"] else "a small ResNet from scratch"
    tested = ", ".join(f"{code} {_count(answer, counts)}" for code, counts in answer["test_classes"].items())
    lines = [
        f"real '{answer['real']}': trained on {_training(answer)}{drawn}; chosen on "
        f"{_count(answer, answer['val'])}; judged on {_count(answer, answer['test'])} ({tested})",
        *(f"synthetic '{made['name']}': {made['crops']:,} crops" for made in answer["synthetic"]),
        f"{network}, {recipe['size']} px, {recipe['steps']} steps of {recipe['batch_size']} at every ratio, classes "
        f"in equal shares, mirrored and shifted; seeds a ratio: {answer['seeds']}",
        f"intervals: {answer['level']:.0%}, {answer['replicates']:,} resamples of test {answer['unit']} and of seeds; "
        f"gains: from ratio 0, with the same {answer['unit']} and seeds",
    ]
    if answer["unit"] != PATIENTS:
        lines.append(f"patients are unknown: {answer['unit']} are resampled in their place, and near-copies may stand "
                     "in two splits, so that figures may be too good and intervals too narrow")  # fmt: skip
    lines += [
        f"the generator of '{made['name']}' learned from {made['learned_from']} training {answer['unit']}, more than "
        "the classifier sees: a gain holds what the others taught it, which a clinic of this size would not have"
        for made in _better_taught(answer)
    ]
    if answer["seeds"] == 1:
        lines.append("one seed: the intervals say nothing of the chance in training")
    lines += [f"LEAK: {leak}; allowed, because: {answer['allow_leak']}" for leak in answer["leaks"]]
    return lines


def _tables(answer: Answer) -> list[str]:
    names = names_of(answer["classes"])
    head = [TITLES.get(name, name.replace("_", " ")) for name in names]
    rows = [["ratio", *head]]
    rows += [[f"{row['ratio']:g}", *(_figure(row["figures"][name]) for name in names)] for row in answer["ratios"]]
    lines = _aligned(rows)
    gained = [row for row in answer["ratios"] if "gains" in row]
    if gained:
        rows = [["gain at", *head]]
        rows += [[f"{row['ratio']:g}", *(_figure(row["gains"][name], "+") for name in names)] for row in gained]
        lines += ["", *_aligned(rows)]
    return lines


def _figure(interval: Sequence[float | None], sign: str = "") -> str:
    value, low, high = (None if number is None else f"{number:{sign}.3f}" for number in interval)
    return f"{value} [{low}, {high}]" if low else f"{value}"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]


def _verdicts(answer: Answer) -> list[str]:
    lines = []
    for row in answer["ratios"]:
        if "verdict" in row:
            _, low, high = row["gains"][MACRO_F1]
            wide = f" (width {high - low:.3f})" if low is not None else ""
            lines.append(f"ratio {row['ratio']:g}: {row['verdict']}{wide}")
    if not lines:
        _, low, high = answer["ratios"][0]["figures"][MACRO_F1]
        if low is not None:
            lines.append(f"the interval of macro-F1 is {high - low:.3f} wide")
    return lines


def plot(answers: Sequence[tuple[str, Answer]], file: Path) -> None:
    """A column for each titled answer: the gain in macro-F1 by ratio above, the recall of each class below.

    All with intervals. An answer at ratio 0 alone shows macro-F1 itself.
    """
    pyplot = plotting.pyplot()
    width = 4.4 * max(len(answers), 1.35)
    figure, axes = pyplot.subplots(2, len(answers), figsize=(width, 6.6), squeeze=False, sharey="row")
    for (title, answer), (above, below) in zip(answers, axes.T, strict=True):
        _draw_gains(above, answer)
        _draw_recalls(below, answer)
        above.set_title("\n".join(filter(None, [title, *heading_of(answer)])), fontsize=8)
    for line in axes:
        for axis in line[1:]:
            axis.set_ylabel("")
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=100)
    pyplot.close(figure)


def _draw_gains(axis: Any, answer: Answer) -> None:
    gained = [row for row in answer["ratios"] if "gains" in row]
    for place, row in enumerate(gained):
        gain, colour = row["gains"][MACRO_F1], VERDICT_COLOURS.get(row["verdict"], NEITHER_COLOUR)
        _draw_interval(axis, place, gain, colour)
        top = gain[0] if gain[2] is None else gain[2]
        axis.annotate(row["verdict"].partition(":")[0], (place, top), (0, 4), textcoords="offset points",
                      fontsize=8, color=colour, ha="center")  # fmt: skip
    if gained:
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set(ylabel="gain in macro-F1 over ratio 0", xlim=(-0.5, len(gained) - 0.5))
        axis.margins(y=0.12)
        axis.set_xticks(range(len(gained)), [f"{row['ratio']:g}" for row in gained])
    else:
        _draw_interval(axis, 0, answer["ratios"][0]["figures"][MACRO_F1], NEITHER_COLOUR)
        axis.set(ylabel="macro-F1", xlim=(-1, 1), ylim=(0, 1))
        axis.set_xticks([0], ["0"])
    axis.set_xlabel("ratio (synthetic share of a batch)")
    axis.grid(axis="y", alpha=0.25)


def _draw_recalls(axis: Any, answer: Answer) -> None:
    codes, rows = answer["classes"], answer["ratios"]
    for number, code in enumerate(codes):
        shift = 0.12 * (number - (len(codes) - 1) / 2)
        colour = CLASS_COLOURS[number % len(CLASS_COLOURS)]
        for place, row in enumerate(rows):
            label = f"{code} ({answer['test_classes'][code]['patients']} {answer['unit']})" if place == 0 else None
            _draw_interval(axis, place + shift, row["figures"][f"recall_{code}"], colour, label)
    axis.set(ylabel=f"recall on test {answer['unit']}", ylim=(0, 1.03), xlim=(-0.5, len(rows) - 0.5))
    axis.set_xticks(range(len(rows)), [f"{row['ratio']:g}" for row in rows])
    axis.set_xlabel("ratio (synthetic share of a batch)")
    axis.legend(fontsize=7, loc="lower center", bbox_to_anchor=(0.5, 1), frameon=False, ncol=min(4, len(codes)))
    axis.grid(axis="y", alpha=0.25)


def _draw_interval(
    axis: Any, x: float, interval: Sequence[float | None], colour: str, label: str | None = None
) -> None:
    """A point at [value, low, high], with its bar where there are bounds."""
    value, low, high = interval
    around = None if value is None or low is None or high is None else [[value - low], [high - value]]
    axis.errorbar([x], [value], yerr=around, fmt="o", color=colour, markersize=4.5, capsize=3, linewidth=1.3,
                  label=label)  # fmt: skip

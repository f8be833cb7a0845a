"""An ablation as one table, one plot and one sheet of samples."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from builder import plotting
from builder.ablation.study import Figures, Row, Study, means_of
from builder.images import read_pixels

AXES: dict[str, Callable[[Row], str]] = {
    "prompts": lambda row: row.style,
    "method": lambda row: row.method,
    "perceptual weight": lambda row: f"{row.perceptual_weight:g}",
    "guidance": lambda row: f"{row.guidance:g}",
}
PLOTTED = ("pretraining_look", "phase_right", "kd", "kid", "recall")
COLOURS, LINES, MARKERS = ("#0b6e99", "#c2410c", "#4d7c0f", "#7e22ce"), ("-", "--", ":"), ("o", "^", "s", "D")


def table_of(study: Study) -> list[list[str]]:
    """Head, real crops, the base, every setting, and the mean over all settings that share a value of one axis."""
    names = study.figures
    lines = [["prompts", "method", "perceptual", "guidance", *names]]
    lines.append(["real crops", "", "", "", *_numbers(study.real, names)])
    lines.append(["the base itself", "", "", "", *_numbers(study.of_base, names)])
    shown: Figures = {"pretraining_look": study.pictures_look}
    lines.append(["what it was pretrained on", "", "", "", *_numbers(shown, names)])
    for row in study.rows:
        setting = [row.style, row.method, f"{row.perceptual_weight:g}", f"{row.guidance:g}"]
        lines.append([*setting, *_numbers(row.figures, names)])
    for axis, value_of in AXES.items():
        values = dict.fromkeys(map(value_of, study.rows))
        for value in values if len(values) > 1 else ():
            own = [row.figures for row in study.rows if value_of(row) == value]
            lines.append([f"mean, {axis} {value}", "", "", "", *_numbers(means_of(own, names), names)])
    return lines


def as_text(lines: list[list[str]]) -> str:
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def write_report(study: Study, out: Path) -> list[Path]:
    """OUT/ablation.json, ablation.txt (the table), ablation.png (the plot) and samples.png."""
    files = [out / name for name in ("ablation.json", "ablation.txt", "ablation.png", "samples.png")]
    files[0].write_text(json.dumps(study.to_json(), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    files[1].write_text(as_text(table_of(study)) + "\n", encoding="utf-8")
    plot(study, files[2])
    sheet(study, out, files[3])
    return files


def plot(study: Study, file: Path) -> None:
    """The figures over guidance: a line for each training; real crops (or their floor) and the base as levels."""
    pyplot = _pyplot()
    names = [name for figure in PLOTTED for name in study.figures if name.partition("[")[0].lower() == figure]
    figure, axes = pyplot.subplots(1, len(names), figsize=(4.2 * len(names), 4.4), squeeze=False)
    styles, methods, weights = (list(dict.fromkeys(map(AXES[axis], study.rows))) for axis in list(AXES)[:3])
    runs = dict.fromkeys((row.style, row.method, row.perceptual_weight) for row in study.rows)
    for axis, name in zip(axes[0], names, strict=True):
        for style, method, weight in runs:
            own = [r for r in study.rows if (r.style, r.method, r.perceptual_weight) == (style, method, weight)]
            own = sorted((row for row in own if row.figures.get(name) is not None), key=lambda row: row.guidance)
            axis.plot(
                [row.guidance for row in own],
                [row.figures[name] for row in own],
                color=COLOURS[styles.index(style) % len(COLOURS)],
                linestyle=LINES[methods.index(method) % len(LINES)],
                marker=MARKERS[weights.index(f"{weight:g}") % len(MARKERS)],
                label=f"{style}, {method}, perceptual {weight:g}",
                markersize=4.5,
                linewidth=1.2,
            )
        for level, label, colour in (
            (study.real.get(name), "real crops", "black"),
            (study.of_base.get(name), "base", "grey"),
        ):
            if level is not None:
                axis.axhline(level, color=colour, linewidth=0.9, linestyle=(0, (1, 2)), label=label)
        axis.set(title=name, xlabel="guidance scale")
        axis.grid(alpha=0.25)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncol=min(5, len(labels)), fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.04 + 0.05 * -(-len(labels) // 5), 1, 1))
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def sheet(study: Study, out: Path, file: Path) -> None:
    """Samples of the same seeds: a row for each training, a column for each guidance, phases one below the other."""
    pyplot = _pyplot()
    runs = list(dict.fromkeys((row.style, row.method, row.perceptual_weight) for row in study.rows))
    scales = list(dict.fromkeys(row.guidance for row in study.rows))
    pictures = {(r.style, r.method, r.perceptual_weight, r.guidance): out / r.samples for r in study.rows}
    figure, axes = pyplot.subplots(len(runs), len(scales), figsize=(2.4 * len(scales), 2.0 * len(runs)), squeeze=False)
    for line, run in zip(axes, runs, strict=True):
        for axis, scale in zip(line, scales, strict=True):
            axis.imshow(read_pixels(pictures[(*run, scale)]))
            axis.set_xticks([])
            axis.set_yticks([])
            if run == runs[0]:
                axis.set_title(f"guidance {scale:g}", fontsize=9)
        line[0].set_ylabel(f"{run[0]}, {run[1]}\nperceptual {run[2]:g}", fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def _numbers(figures: Figures, names: list[str]) -> list[str]:
    return ["-" if (value := figures.get(name)) is None else f"{value:.3g}" for name in names]


def _pyplot() -> Any:
    pyplot = plotting.pyplot()
    return pyplot

"""Is `builder classify` an instrument that works? A generator that is perfect must help, one that lies must not.

    python -m tests.acceptance.classify_controls [--out ROOT] [--real phantom] [--limit 100] [--seeds 5] [--to FOLDER]
                                                 [--also TITLE=ANSWER.json ...] [--png FILE]

Both controls stand in the place of synthetic crops, beside about `--limit` real training crops:

- `perfect`: crops of phantom patients of another seed, rendered and packed as those of `--real`, so that no generator
  could be better. Their patients are the lineage of this dataset, and none is a patient of `--real`. The lower bound of
  the gain in macro-F1 must lie above 0 at some ratio above 0.
- `shuffled`: the same crops with their labels dealt out anew at random, each class as frequent as before. At no ratio
  may they help.

`--also`: answers of `builder classify` that are drawn beside. Run again, it goes on where it was. One thread.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import tempfile
from pathlib import Path
from typing import Any

from builder.classify.figures import HELPS, MACRO_F1
from builder.classify.report import as_text, plot, write_report
from builder.classify.study import Question, Study
from builder.crops.pack import PackRequest, pack
from builder.demo.phantom import write_photographs
from builder.demo.phantom_dataset import KEY, LICENCE, ensure_demo
from builder.job.devices import prepare
from builder.phases import HEALING_PHASES
from builder.shards.dataset import Dataset, find_dataset
from builder.shards.storage import Storage
from builder.shards.writer import IMAGES_PER_SHARD, Sample, encode_png, image_row, write_shards
from tests.acceptance.report import Report
from tests.lineages import ALIKE

SEED = 2000  # of the other patients
PATIENTS = 110  # who have some 1,500 crops
PERFECT, SHUFFLED = "perfect", "shuffled"
RATIOS = (0.0, 0.25, 0.5, 1.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=".", help="output root of the datasets")
    parser.add_argument("--real", default="phantom", help="name under --out, or path")
    parser.add_argument("--limit", type=int, default=100, help="real training crops")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--to", type=Path, default=Path("classify/controls"), help="folder of the runs and answers")
    parser.add_argument("--also", action="append", default=[], metavar="TITLE=ANSWER.json")
    parser.add_argument("--png", type=Path, help="[default: controls.png in --to]")
    options = parser.parse_args()
    device = prepare(0)
    real = ensure_demo(options.real, options.out) or find_dataset(options.real, options.out)
    report = Report(f"controls of builder classify on '{real.name}'", limit=options.limit, seeds=options.seeds)
    answers = {}
    for synthetic in ensure_controls(options.out):
        question = Question(real, [synthetic], RATIOS, options.seeds, options.limit)
        answers[synthetic.name] = answer = Study(question, options.to, device=device).run()
        write_report(answer, options.to, synthetic.name)
        print(f"\n{as_text(answer)}", flush=True)
    shown = [("positive control: a perfect generator", answers[PERFECT]),
             ("negative control: labels shuffled", answers[SHUFFLED])]  # fmt: skip
    for also in options.also:
        title, _, file = also.partition("=")
        shown.append((title, json.loads(Path(file).read_text(encoding="utf-8"))))
    png = options.png or options.to / "controls.png"
    plot(shown, png)
    print(f"\ndrawn: {png}")
    judge(report, answers[PERFECT], answers[SHUFFLED])
    report.end()


def judge(report: Report, perfect: dict[str, Any], shuffled: dict[str, Any]) -> None:
    """The two criteria."""
    mixed = [row for row in perfect["ratios"] if row["ratio"] > 0]
    best = max(mixed, key=lambda row: row["gains"][MACRO_F1][1])
    low = best["gains"][MACRO_F1][1]
    report.criterion(f"a perfect generator helps: lower bound of its gain {low:+.3f} at ratio {best['ratio']:g} "
                     "(required > 0)", low > 0)  # fmt: skip
    wrong = [f"{row['ratio']:g}" for row in shuffled["ratios"] if row.get("verdict") == HELPS]
    report.criterion(f"shuffled labels help at no ratio (found: {', '.join(wrong) or 'none'})", not wrong)


def ensure_controls(root: str) -> list[Dataset]:
    """The datasets `perfect` and `shuffled` under an output root, made unless they are there."""
    perfect, shuffled = (Dataset(name, Storage(root)) for name in (PERFECT, SHUFFLED))
    if not complete(perfect):
        with tempfile.TemporaryDirectory(prefix="builder-controls-") as folder:
            others = _others(Path(folder))
            rows = others.table().to_pylist()
            patients = sorted({row["patient"] for row in rows})
            samples = [_sample(PERFECT, row, row["phase"], others) for row in rows]
            _write(perfect, samples, patients, others.info["lineage"]["key_fingerprint"])
    if not complete(shuffled):
        rows = perfect.table().to_pylist()
        dealt = random.Random(SEED).sample([row["phase"] for row in rows], len(rows))
        samples = [_sample(SHUFFLED, row, phase, perfect) for row, phase in zip(rows, dealt, strict=True)]
        lineage = perfect.info["lineage"]
        _write(shuffled, samples, lineage["patients"], lineage["key_fingerprint"])
    return [perfect, shuffled]


def complete(dataset: Dataset) -> bool:
    return dataset.exists() and dataset.info["state"] == "complete"


def _others(folder: Path) -> Dataset:
    """Phantom patients of another seed, packed as `builder demo phantom` does, under names that no other cohort has."""
    write_photographs(folder, patients=PATIENTS, seed=SEED, workers=1)
    boxes = folder / "boxes.csv"
    with open(boxes, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    with open(boxes, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows({**row, "Patient#": f"seed{SEED}-{row['Patient#']}"} for row in rows)
    dataset = Dataset("others", Storage(folder))
    request = PackRequest(folder / "photographs", boxes=boxes, labels=folder / "labels.csv", classes=HEALING_PHASES,
                          key=KEY, config_name="phantom", licence=LICENCE)  # fmt: skip
    print(pack(request, dataset))
    return dataset


def _sample(name: str, row: dict[str, Any], phase: str, source: Dataset) -> Sample:
    pixels = source.pixels(row)
    number = row["key"].rpartition("-")[2]
    label = HEALING_PHASES.label(phase)
    key = f"{name}-{row['phase']}-{number}" if name == PERFECT else f"{name}-{row['key'].partition('-')[2]}"
    return Sample(image_row(key, phase, label, "synthetic", pixels), encode_png(pixels))


def _write(dataset: Dataset, samples: list[Sample], patients: list[str], key_fingerprint: str) -> None:
    dataset.clear()
    info = {
        "name": dataset.name, "origin": "synthetic", "created": "2026-01-01T00:00:00+00:00",
        "classes": HEALING_PHASES.to_json(), "count": len(samples), "config": {}, "parent": None,
        "lineage": {"known": True, "key_fingerprint": key_fingerprint, "patients": patients, **ALIKE},
        "licence": {"base": None, "data": LICENCE},
    }  # fmt: skip
    dataset.write_info({**info, "state": "partial"})
    write_shards(dataset.storage, dataset.name, samples, IMAGES_PER_SHARD)
    dataset.write_info({**info, "state": "complete"})


if __name__ == "__main__":
    main()

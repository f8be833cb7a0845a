"""Make a reference from real crops: panel, probe, copy alarm, the scale of real crops, gates, yardsticks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from tqdm import tqdm

from builder.config import ScoreConfig
from builder.quality.copies import UNCALIBRATED, calibrate
from builder.quality.feature_scores import phase_scores
from builder.quality.features import load_extractor
from builder.quality.gates import Gates, make_gates
from builder.quality.image_scores import RANKED, SCORES
from builder.quality.lpips import load_alexnet, why_missing
from builder.quality.panel import Rows, panel_sha256, patient_of, rows_by_phase, spread
from builder.quality.probe import fit_probe
from builder.quality.reference import Reference
from builder.quality.scorer import Scorer
from builder.quality.spoil import blurred, flat, noisy
from builder.quality.statistics import image_statistics
from builder.quality.training_crops import TrainingCrops, panel_rows
from builder.shards.dataset import Dataset

REAL_CROPS = 300  # training crops of a phase that the scale of real crops, and with it the gates, are made from
HELD_OUT_CROPS, SPOILT_CROPS = 60, 24  # of a phase behind a yardstick: held-out crops as they are; each other kind
CHUNK = 32  # images scored together

Scores = dict[str, dict[str, float | None]]  # of the phase probe, by key

SPOILS: dict[str, Callable[[np.ndarray], np.ndarray]] = {"blurred": blurred, "noisy": noisy, "flat": flat}


def build_reference(
    real: Dataset, config: ScoreConfig, codes: Sequence[str], *, image_size: int | None = None, device: str = "cpu",
    progress: bool = True,
) -> Reference:  # fmt: skip
    """Everything that scores of images stand on, from the crops of `real`.

    Panel, probe, gates and scale come from its training split, each crop compared with other patients' only; yardsticks
    from validation and test crops. `image_size`: the size in px of the images to be judged; real crops are first
    brought to it, because sharpness, noise, features and SSIM depend on it. A phase without held-out crops has empty
    yardsticks. BuilderError when a phase has no training crop.
    """
    extractor = load_extractor(config.features, device=device)
    crops = TrainingCrops(real, codes, extractor, image_size)
    reference, left_out = _protocol(crops, config)
    salt = f"reference/{config.panel_seed}"
    known = _known_images(crops, salt)
    total = sum(row["split"] is not None for row in real.table(["split"]).to_pylist())
    total += sum(min(REAL_CROPS, len(rows)) for rows in crops.rows.values())
    total += sum(len(rows) for kinds in known.values() for rows in kinds.values())
    with tqdm(desc=f"reference from {real.name}", total=total, unit="image", disable=not progress) as bar:
        reference = replace(reference, copy=_calibrate(crops, bar))
        scorer = Scorer(reference, real, config, device, crops=crops, leave_out=True)
        real_rows = {code: _real_rows(scorer, crops, code, left_out, salt, bar) for code in codes}
        reference = replace(
            reference,
            real={code: _scale(rows) for code, rows in real_rows.items()},
            gates={code: _gates(crops, code, real_rows[code], salt) for code in codes},
        )
        scorer.reference = reference
        yardstick = {
            code: {kind: _yardstick(scorer, crops, code, kind, rows, bar) for kind, rows in kinds.items()}
            for code, kinds in known.items()
        }
        return replace(reference, yardstick=yardstick)


def _protocol(crops: TrainingCrops, config: ScoreConfig) -> tuple[Reference, Scores]:
    """The reference as far as scoring needs it, and by key what the probe said of training crops it had not seen."""
    no_lpips = why_missing(config)
    missing = {} if no_lpips is None else {"lpips": no_lpips, "lpips_mean": no_lpips}
    codes, rows, features = crops.for_probe()
    fitted = fit_probe(features, [row["phase"] for row in rows], [patient_of(row) for row in rows], codes)
    left_out: Scores = {}
    if isinstance(fitted, str):
        missing |= {"phase_probability": fitted, "phase_margin": fitted}
    else:
        if unknown := [code for code in crops.codes if code not in codes]:
            reason = f"phase {', '.join(unknown)} has crops of one patient: none can be left out"
            missing |= {"phase_probability": reason, "phase_margin": reason}
        left_out = {
            row["key"]: phase_scores(said, codes.index(row["phase"])) for row, said in zip(rows, fitted[1], strict=True)
        }
    reference = Reference(
        against=crops.real.name,
        ssim_size=config.ssim_size,
        ssim_stride=config.ssim_stride,
        panel_seed=config.panel_seed,
        panel_size=config.panel,
        features=crops.extractor.id,
        lpips=None if no_lpips else load_alexnet(config.lpips)[1],
        panel={},
        panel_sha256="",
        training_sha256=crops.sha256,
        image_size=crops.image_size,
        probe=None if isinstance(fitted, str) else fitted[0].to_json(),
        missing=missing,
        code_versions={kind.name: kind.code_version for kind in SCORES if kind.code_version > 1},
    )
    panels = {code: panel_rows(crops.rows[code], reference, code, reserves=False) for code in crops.codes}
    keys = {code: [row["key"] for row in own] for code, own in panels.items()}
    return replace(reference, panel=keys, panel_sha256=panel_sha256(panels)), left_out


def _calibrate(crops: TrainingCrops, bar: Any) -> dict[str, Any]:
    """The copy alarm, from every real crop of the dataset searched for among other patients' training crops."""
    rows = [row for row in crops.real.table().to_pylist() if row["split"]]
    scores: list[tuple[float, str]] = []  # and whose crop; without crops that no other patient's can be compared with
    for start in range(0, len(rows), CHUNK):
        chunk = rows[start : start + CHUNK]
        found = crops.copy_index.search([crops.real.pixels(row) for row in chunk], [patient_of(row) for row in chunk])
        scores += [(score, patient_of(row)) for score, key, row in zip(*found, chunk, strict=True) if key is not None]
        bar.update(len(chunk))
    if not scores:  # one patient: what the alarm lets pass is not known
        return UNCALIBRATED
    return calibrate([score for score, _ in scores], [patient for _, patient in scores])


def _real_rows(
    scorer: Scorer, crops: TrainingCrops, code: str, left_out: Scores, salt: str, bar: Any
) -> list[dict[str, Any]]:
    """Scores of training crops of a phase as if their patient were not there, also by the probe."""
    rows = spread(crops.rows[code], REAL_CROPS, salt)
    scores = _scored(scorer, [crops.crop(row) for row in rows], code, [patient_of(row) for row in rows], bar)
    for row, score in zip(rows, scores, strict=True):
        score.update(left_out.get(row["key"], {}))
    return scores


def _scale(rows: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Score -> its sorted values; without those that are missing, or not finite."""
    values = {score: [row[score] for row in rows if row[score] is not None] for score in RANKED.values()}
    return {score: sorted(float(value) for value in own) for score, own in values.items() if own}


def _gates(crops: TrainingCrops, code: str, rows: list[dict[str, Any]], salt: str) -> Gates:
    spoilt = [image_statistics(blurred(crops.crop(row))) for row in spread(crops.rows[code], REAL_CROPS, salt)]
    return make_gates(rows, spoilt, len(set(crops.patients[code])))


def _known_images(crops: TrainingCrops, salt: str) -> dict[str, dict[str, Rows]]:
    """Phase -> kind of yardstick -> the held-out crops that it is made of."""
    held_out = rows_by_phase(crops.real, crops.real.classes.codes, ("val", "test"))
    chosen = {code: spread(own, HELD_OUT_CROPS, salt) for code, own in held_out.items()}
    share = -(-SPOILT_CROPS // max(1, len(chosen) - 1))
    found: dict[str, dict[str, Rows]] = {}
    for code in crops.codes:
        others = [row for other, theirs in chosen.items() if other != code for row in theirs[:share]]
        few = chosen[code][:SPOILT_CROPS]
        found[code] = {"real": chosen[code], "wrong phase": others[:SPOILT_CROPS], **dict.fromkeys(SPOILS, few)}
    return found


def _yardstick(scorer: Scorer, crops: TrainingCrops, code: str, kind: str, rows: Rows, bar: Any) -> Rows:
    """Scores of held-out crops as images of a phase, as they are or spoilt."""
    images = [crops.crop(row) for row in rows]
    return _scored(scorer, [SPOILS[kind](image) for image in images] if kind in SPOILS else images, code, None, bar)


def _scored(
    scorer: Scorer, images: list[np.ndarray], code: str, patients: list[str] | None, bar: Any
) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for start in range(0, len(images), CHUNK):
        chunk = slice(start, start + CHUNK)
        rows += scorer.score(images[chunk], [code] * len(images[chunk]), patients[chunk] if patients else None)
        bar.update(len(images[chunk]))
    return rows

"""The ablation: its grid, the base's look, the way through all of it in small, and going on where it was."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from builder.ablation.grid import runs_of, with_prompts
from builder.ablation.probes import Pictures, fit_probes
from builder.ablation.report import table_of
from builder.ablation.study import Row, Study
from builder.config import AblationConfig, load_config
from builder.errors import BuilderError
from builder.models.checkpoint import Checkpoint, Lineage, save_checkpoint
from builder.models.sdxl import build
from builder.phases import HEALING_PHASES
from builder.quality.sets.comparison import Side
from tests.conftest import Result, write_real
from tests.test_configs import reduced
from tests.test_models import ARCHITECTURE

SHIPPED = ("ablation", "ablation-demo")
LONG = {code: f"professional photograph of a wound of the kind {code}, sharp focus" for code in "IPR"}


# -- the grid ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHIPPED)
def test_the_shipped_grids_are_the_prompt_study(name: str) -> None:
    config = load_config(name)
    runs = runs_of(config)
    assert len({run.name for run in runs}) == len(runs) == 8
    assert {run.style for run in runs} == {"minimal", "long"} and max(config.ablation.guidance) == 12
    rates = {run.method: run.config.train.learning_rate for run in runs}
    assert rates["lora"] > rates["full"]
    for run in runs:
        words = [len(phase.prompt.split()) for phase in run.config.classes]
        assert max(words) <= 12 if run.style == "minimal" else min(words) >= 20
        assert run.config.train.perceptual_weight == run.perceptual_weight
        assert run.config.classes.codes == HEALING_PHASES.codes


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"guidance": []}, "no ablation.guidance"),
        ({"guidance": [0.5]}, "ablation.guidance is .0.5."),
        ({"prompts": {"long": {"I": "a", "X": "b"}}}, "'X' is not among the classes"),
        ({"prompts": {"long": {"I": "a"}}}, "has none for P, R"),
        ({"method": ["dora"]}, "ablation.method.0. is 'dora'"),
        ({"perceptual_weight": []}, "empty axis"),
    ],
)
def test_a_grid_that_cannot_be_is_refused(change: dict[str, Any], said: str) -> None:
    config = load_config("ablation-demo")
    with pytest.raises(BuilderError, match=said):
        runs_of(replace(config, ablation=replace(config.ablation, **change)))


def test_a_style_without_prompts_asks_with_the_classes_own() -> None:
    assert with_prompts(HEALING_PHASES, {}) == HEALING_PHASES
    assert [phase.prompt for phase in with_prompts(HEALING_PHASES, LONG)] == list(LONG.values())
    assert load_config(None).ablation == AblationConfig()


# -- what is measured -------------------------------------------------------------------------------------------------


def crops(count: int, seed: int) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """Features [3 * count, 6] of real crops whose phase is their first three columns, of many patients."""
    random = np.random.default_rng(seed)
    phases = np.repeat(np.arange(3), count)
    features = random.normal(0, 0.3, (3 * count, 6))
    features[np.arange(3 * count), phases] += 2
    rows = [{"phase": "IPR"[p], "patient": f"{p}-{n % 9}", "key": str(n)} for n, p in enumerate(phases)]
    return features, rows


def shown(features: np.ndarray) -> Pictures:
    return Pictures(features, [f"model {number % 12}" for number in range(len(features))])


def test_pretraining_look_is_high_for_its_pictures_low_for_crops_and_between_for_mixtures() -> None:
    real, rows = crops(60, 0)
    pictures = crops(30, 1)[0] + [0, 0, 0, 2, 0, 0]  # the look of pretraining is the fourth column
    probes = fit_probes(shown(pictures), real, rows, HEALING_PHASES)
    assert probes.pictures_look > 0.9
    held_out, _ = crops(20, 2)
    shares = []
    for share in (0.0, 0.5, 1.0):
        images = held_out + np.array([0, 0, 0, 2, 0, 0]) * (np.arange(60) % 20 < 20 * share)[:, None]
        sides = {code: Side(images[20 * n : 20 * n + 20], [""] * 20) for n, code in enumerate("IPR")}
        judged = probes.judge(sides, ["I", "P", "R"])
        assert judged["phase_right"] > 0.9
        shares.append(judged["pretraining_look"])
    assert shares[0] < 0.1 < 0.4 < shares[1] < 0.6 < 0.9 < shares[2]
    swapped = {"I": sides["P"], "P": sides["R"], "R": sides["I"]}
    assert probes.judge(swapped, ["I", "P", "R"])["phase_right"] < 0.1


def test_probes_need_patients_to_leave_out() -> None:
    real, rows = crops(4, 0)
    one = [{**row, "patient": "only"} for row in rows]
    with pytest.raises(BuilderError, match="an ablation needs probes"):
        fit_probes(shown(real), real, one, HEALING_PHASES)


def test_the_table_has_every_setting_and_the_means_over_each_axis() -> None:
    rows = [
        Row(style, "full", 0.0, guidance, {"pretraining_look": look, "kd[x]": None}, "")
        for style, guidance, look in (
            ("minimal", 1.0, 0.1), ("minimal", 12.0, 0.3), ("long", 1.0, 0.4), ("long", 12.0, 0.8),
        )
    ]  # fmt: skip
    level: dict[str, float | None] = {"pretraining_look": 0.05, "kd[x]": 0.2}
    study = Study("s", "clinic", "base", 0, {"I": 5}, level, level, 0.97, rows)
    lines = {line[0] if line[0].startswith("mean") else tuple(line[:4]): line[4:] for line in table_of(study)}
    assert lines["long", "full", "0", "12"] == ["0.8", "-"]
    assert lines["mean, prompts minimal"] == ["0.2", "-"] and lines["mean, prompts long"] == ["0.6", "-"]
    assert lines["mean, guidance 12"] == ["0.55", "-"]
    assert not any(str(name).startswith("mean, method") for name in lines)  # one method: nothing to compare


# -- all of it, in small ----------------------------------------------------------------------------------------------

SMALL = """
extends: ablation-demo
model: {{base: {base}, base_lineage: public, lora: {{rank: 2}}}}
train:
  {{size: 16, steps: 2, batch_size: 4, warmup_steps: 1, checkpoint_every: 2, evaluate_images: 3}}
sample: {{size: 16, steps: 2, batch_size: 6}}
ablation: {{pretrain: "", guidance: [1, 6], perceptual_weight: [0.0, 0.1], method: [full, lora]}}
"""


def ran(result: Result) -> str:
    assert not result.code, result.output
    return result.output


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A config of four settings at two scales each, its real dataset and its base."""
    write_real(tmp_path, "phantoms", size=24)
    base = save_checkpoint(build(ARCHITECTURE, 16, 0), Checkpoint(tmp_path / "base", lineage=Lineage(True, None, [])))
    file = tmp_path / "small.yaml"
    file.write_text(SMALL.format(base=base.path) + "real: phantoms\n")
    return file


@pytest.mark.no_cover
def test_a_grid_is_trained_drawn_measured_and_reported(small: Path, builder, tmp_path: Path) -> None:
    said = ran(builder("ablate", small))
    folder = tmp_path / "checkpoints" / "small"
    study = json.loads((folder / "ablation.json").read_text())
    settings = {(row["style"], row["method"], row["perceptual_weight"], row["guidance"]) for row in study["rows"]}
    assert len(settings) == len(study["rows"]) == 2 * 2 * 2 * 2
    names = list(study["real"])
    assert names[:2] == ["pretraining_look", "phase_right"] and "kd[efficientnet-lite0]" in names
    for row in study["rows"]:
        assert set(row["figures"]) == set(names)
        assert 0 <= row["figures"]["pretraining_look"] <= 1 and row["figures"]["kd[efficientnet-lite0]"] is not None
        assert (folder / row["samples"]).is_file()
    # Two steps change little: what is drawn still looks as the base's images do, and not as crops do.
    assert study["of_base"]["pretraining_look"] > 0.8 > 0.4 > study["real"]["pretraining_look"]
    assert min(row["figures"]["pretraining_look"] for row in study["rows"]) > 0.5
    for name in ("ablation.png", "samples.png", "ablation.txt"):
        assert (folder / name).stat().st_size > 200
    assert "mean, prompts long" in said and "against the validation patients of 'phantoms'" in said


def test_run_again_it_goes_on_where_it_was(small: Path, builder, tmp_path: Path, monkeypatch) -> None:
    from builder.ablation import study as module

    ran(builder("ablate", small, "--set", "ablation.method=[full]", "--set", "ablation.perceptual_weight=[0.0]"))
    folder = tmp_path / "checkpoints" / "small"
    before = (folder / "ablation.json").read_text()
    trained = []
    real_train = module.train

    def counted(config: Any, dataset: Any, out: Path, **keywords: Any) -> Path:
        trained.append(out.name)
        return real_train(config, dataset, out, **keywords)

    monkeypatch.setattr(module, "train", counted)
    same = ["--set", "ablation.method=[full]", "--set", "ablation.perceptual_weight=[0.0]"]
    ran(builder("ablate", small, *same))
    assert not trained and (folder / "ablation.json").read_text() == before
    ran(
        builder("ablate", small, *same, "--set", "ablation.guidance=[1, 6, 3]")
    )  # one scale more: drawn, not trained anew
    assert trained == ["minimal-full-p0", "long-full-p0"]
    assert len(json.loads((folder / "ablation.json").read_text())["rows"]) == 6
    trained.clear()
    figures = json.loads((folder / "cells" / "long-full-p0-g6.json").read_text())
    refused = builder("ablate", small, *same, "--set", "train.learning_rate=0.5", "--set", "ablation.learning_rate={}")
    assert refused.code == 2 and "train.learning_rate: " in refused.output and ", 0.5 now" in refused.output
    assert json.loads((folder / "cells" / "long-full-p0-g6.json").read_text()) == figures


def test_the_base_is_trained_first_where_it_is_missing(small: Path, builder, tmp_path: Path) -> None:
    """ablation-demo's own way: pretraining from scratch on another dataset, then the grid upon it."""
    write_real(tmp_path, "pictures", size=16)
    (tmp_path / "first.yaml").write_text(
        "extends: demo\nreal: pictures\nmodel: {architecture: "
        + json.dumps(ARCHITECTURE)
        + "}\ntrain: {size: 16, steps: 2, batch_size: 4, warmup_steps: 1, cached_views: 1, checkpoint_every: 2, "
        "vae: {steps: 2, guided_steps: 1}}\nsample: {size: 16, steps: 2}\n"
    )
    words = [
        "--set", f"ablation.pretrain={tmp_path / 'first.yaml'}", "--set", "model.base=first",
        "--set", "model.base_lineage=''", "--set", "ablation.guidance=[1]", "--set", "ablation.method=[full]",
        "--set", "ablation.perceptual_weight=[0.0]", "--allow-leak", "both datasets have the same six patients",
    ]  # fmt: skip
    said = ran(builder("ablate", small, *words))
    assert "the base: training 'first'" in said and "what it was pretrained on" in said
    assert (tmp_path / "checkpoints" / "first" / "step-000002").is_dir()
    assert "the base: training" not in ran(builder("ablate", small, *words))


@pytest.mark.no_cover
def test_the_sdxl_study_runs_on_its_layout(builder, tmp_path: Path) -> None:
    """configs/ablation.yaml itself, at SDXL's layout and a fraction of its width, with an installed perceptual net."""
    real = write_real(tmp_path, size=48)
    base = save_checkpoint(reduced("sdxl"), Checkpoint(tmp_path / "base", lineage=Lineage(True, None, [])))
    settings = [
        f"model.base={base.path}", "train.size=64", "train.steps=2", "train.batch_size=4", "train.micro_batch=2",
        "train.warmup_steps=1", "train.checkpoint_every=2", "train.evaluate_images=6", "sample.size=64",
        "sample.steps=2", "model.lora.rank=2", "train.perceptual_network=efficientnet-lite0", "ablation.guidance=[1]",
        "ablation.perceptual_weight=[0.01]", "ablation.prompts={minimal: {}}", "train.precision=fp32",
    ]  # fmt: skip
    words = [word for setting in settings for word in ("--set", setting)]
    said = ran(builder("ablate", "ablation", "--real", real.name, *words))
    assert "mean, method lora" in said
    study = json.loads((tmp_path / "checkpoints" / "ablation" / "ablation.json").read_text())
    assert {row["method"] for row in study["rows"]} == {"full", "lora"}


def test_without_a_grid_or_a_base_it_says_so(builder, tmp_path: Path) -> None:
    write_real(tmp_path, "phantom")
    assert "no ablation.guidance" in builder("ablate", "demo").output
    missing = builder("ablate", "ablation-demo", "--set", "ablation.pretrain=''", "--real", "phantom")
    assert missing.code == 2 and "there is no checkpoint 'stock'" in missing.output

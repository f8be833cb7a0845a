"""The guards: each is triggered by what it is for, and by nothing else; leaks are refused; reasons are recorded."""

from __future__ import annotations

import dataclasses
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from builder.cli import main
from builder.config import Config, SampleConfig, TrainConfig, load_config
from builder.models.checkpoint import Checkpoint, Lineage, read_checkpoint, write_description
from builder.models.guards import GUARDS, before_job, before_training, leak_of_job, leak_of_training
from builder.phases import HEALING_PHASES, ClassTable, Phase
from builder.shards.dataset import Dataset, find_dataset
from tests.conftest import write_real
from tests.lineages import ALIKE

pytestmark = pytest.mark.usefixtures("references_once")

PROMPTS = {phase.code: phase.prompt for phase in HEALING_PHASES}
TRAIN_PATIENT, VAL_PATIENT = "49" + f"{0:030x}", "49" + f"{4:030x}"
LONG = "PHASE_I, open wound of the foot with red swollen margins and moist yellow slough in a deep bed"
TINY = """
name: tiny
real: clinic
sample: {size: 16, steps: 2, batch_size: 4}
score: {ssim_size: 64, panel: 2}
"""
LOUD = """
extends: tiny
name: tiny
classes:
  - {code: I, name: inflammatory, prompt: "PHASE_I, high quality, photorealistic, 8k, detailed, masterpiece"}
  - {code: P, name: proliferative, prompt: "PHASE_P, diabetic foot ulcer, proliferative phase wound"}
  - {code: R, name: remodeling, prompt: "PHASE_R, a scar that closed after many weeks of care and now is pale and dry"}
train: {perceptual_weight: 0.01}
"""


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write_real(tmp_path_factory.mktemp("guards"), size=24)


@pytest.fixture
def builder(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    """Run a command line in this process, in a directory with the real dataset `clinic` and two configs."""
    monkeypatch.chdir(tmp_path)
    write_real(tmp_path, size=24)
    (tmp_path / "tiny.yaml").write_text(TINY)
    (tmp_path / "loud.yaml").write_text(LOUD)
    before = signal.getsignal(signal.SIGTERM)

    def run(*words: str | Path) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["builder", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            main()
        signal.signal(signal.SIGTERM, before)
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out + captured.err

    return run


def a_config(*, prompt: str = PROMPTS["I"], guidance: float = 3.0, negative: str = "", weight: float = 0.0) -> Config:
    phases = [Phase("I", "inflammatory", prompt), *list(HEALING_PHASES)[1:]]
    return Config(
        classes=ClassTable(phases),
        sample=SampleConfig(guidance=guidance, negative_prompt=negative),
        train=TrainConfig(perceptual_weight=weight),
    )


def a_checkpoint(**changed: Any) -> Checkpoint:
    settings: dict[str, Any] = {
        "classes": HEALING_PHASES, "prompts": PROMPTS, "lineage": Lineage(True, "test", [TRAIN_PATIENT], **ALIKE)
    }  # fmt: skip
    return Checkpoint(Path("checkpoints/mine"), **{**settings, **changed})


def names(findings: Any) -> list[str]:
    return [finding.name for finding in findings]


# -- each guard, triggered and not -----------------------------------------------------------------------------


def test_what_the_study_advises_is_quiet(real: Dataset) -> None:
    config = a_config(guidance=5.0, negative=SampleConfig().negative_prompt)
    assert before_training(config, real) == []
    assert before_job(config, a_checkpoint(), real) == []


@pytest.mark.parametrize(
    "words",
    [
        "high quality", "High-Resolution", "photorealistic", "photo-realistic", "realistic", "8k", "4K", "detailed",
        "highly detailed", "high detail", "masterpiece", "best quality", "ultra-detailed", "sharp focus", "cinematic",
        "professional medical documentation", "clinical lighting", "award-winning", "hyperrealistic", "uhd",
    ],
)  # fmt: skip
def test_words_of_style_in_a_prompt_are_said(words: str, real: Dataset) -> None:
    config = a_config(prompt=f"PHASE_I, diabetic foot ulcer, {words}")
    for findings in (before_training(config, real), before_job(config, a_checkpoint(prompts={}), real)):
        assert names(findings) == ["prompt-style"]
        assert words.split()[0].lower() in findings[0].what and "prompt of I" in findings[0].what


@pytest.mark.parametrize(
    "prompt",
    [
        "PHASE_I, diabetic foot ulcer", "WOUND_K8K, sharp wound edges after debridement", "ulcer, exposed bone",
        "HD patient",
        "deep wound, raw bed, natural skin", "stage 4 pressure ulcer", "light pink scar", "retailed quantity of slough",
    ],
)  # fmt: skip
def test_clinical_words_are_no_style(prompt: str, real: Dataset) -> None:
    assert before_training(a_config(prompt=prompt), real) == []


def test_negative_prompts_are_exempt(real: Dataset) -> None:
    negative = "low quality, cartoon, illustration, 3d render, " + " ".join(["jpeg artifacts"] * 20)
    assert before_training(a_config(negative=negative), real) == []


def test_long_prompts_are_said(real: Dataset) -> None:
    twelve = " ".join(LONG.split()[:12])
    assert before_training(a_config(prompt=twelve), real) == []
    findings = before_training(a_config(prompt=twelve + " wound"), real)
    assert names(findings) == ["prompt-length"] and "13 words" in findings[0].what


def test_strong_guidance_is_said_of_models_that_learned_the_classes(real: Dataset) -> None:
    strong = a_config(guidance=5.1)
    assert names(before_training(strong, real)) == ["guidance"]
    assert names(before_job(strong, a_checkpoint(), real)) == ["guidance"]
    imported = a_checkpoint(classes=None, prompts={}, base={"reference": "sdxl", "sha256": "0"})
    assert names(before_job(strong, imported, real)) == ["guidance"]
    assert before_job(strong, Checkpoint(Path("published")), real) == []


def test_perceptual_loss_is_said(real: Dataset) -> None:
    assert names(before_training(a_config(weight=0.01), real)) == ["perceptual"]
    old = {"imported": {"config": {"quality": {"perceptual_loss": {"enabled": True, "weight": 0.01}}}}}
    for recorded in ({"train": {"perceptual_weight": 0.01}}, old):
        findings = before_job(a_config(), a_checkpoint(config=recorded), real)
        assert names(findings) == ["perceptual"] and "0.01" in findings[0].what
    old["imported"]["config"]["quality"]["perceptual_loss"]["enabled"] = False
    for recorded in ({"train": {"perceptual_weight": 0.0}}, old, {"imported": {"config": None}}, {"train": None}):
        assert before_job(a_config(), a_checkpoint(config=recorded), real) == []


def test_other_prompts_than_those_of_training_are_said(real: Dataset) -> None:
    checkpoint = a_checkpoint(prompts={**PROMPTS, "P": "proliferating"})
    findings = before_job(a_config(), checkpoint, real)
    assert names(findings) == ["prompts-differ"]
    assert PROMPTS["P"] in findings[0].what and "'proliferating'" in findings[0].what
    findings = before_job(a_config(), a_checkpoint(prompts={"I": PROMPTS["I"], "P": PROMPTS["P"]}), real)
    assert names(findings) == ["prompts-differ"] and "never saw" in findings[0].what
    assert before_job(a_config(), a_checkpoint(prompts={}), real) == []  # nobody knows what it was trained with


def test_figures_from_patients_that_were_trained_on_are_said(real: Dataset, tmp_path: Path) -> None:
    seen = a_checkpoint(lineage=Lineage(True, "test", [TRAIN_PATIENT, VAL_PATIENT], **ALIKE))
    findings = before_job(a_config(), seen, real)
    assert names(findings) == ["train-overlap"] and "1 patients" in findings[0].what
    assert before_job(a_config(), a_checkpoint(), real) == []  # the panel's patients are meant to be trained on


def test_one_picture_in_two_splits_is_said(tmp_path: Path) -> None:
    real = write_real(tmp_path, per_phase=6, size=24)
    rows = real.table(("split", "sha256"))
    assert before_training(a_config(), real) == []
    place = rows["split"].to_pylist().index("val")
    pixels = rows["sha256"].to_pylist()
    pixels[place] = pixels[rows["split"].to_pylist().index("train")]
    import pyarrow as pa

    class Twice(Dataset):
        def table(self, columns: Any = None) -> pa.Table:
            whole = super().table()
            named = whole.set_column(whole.schema.get_field_index("sha256"), "sha256", pa.array(pixels))
            return named.select(list(columns)) if columns else named

    twice = Twice(real.name, real.storage)
    for findings in (before_training(a_config(), twice), before_job(a_config(), a_checkpoint(), twice)):
        assert names(findings) == ["train-overlap"] and "1 held-out crops" in findings[0].what


# -- leaks -----------------------------------------------------------------------------------------------------


def with_info(real: Dataset, tmp_path: Path, **changed: Any) -> Dataset:
    """A copy of the dataset with another dataset.json."""
    shutil.copytree(real.storage.root, tmp_path / "copy", dirs_exist_ok=True)
    copy = find_dataset("clinic", str(tmp_path / "copy"))
    copy.write_info({**copy.info, **changed})
    return find_dataset("clinic", str(tmp_path / "copy"))


def public(config: Config) -> Config:
    return dataclasses.replace(config, model=dataclasses.replace(config.model, base_lineage="public"))


def test_a_job_leaks_by_patients_keys_and_ignorance(real: Dataset) -> None:
    assert leak_of_job(a_checkpoint(), real) is None
    for lineage, said in (
        (
            Lineage(True, "test", [VAL_PATIENT], **ALIKE),
            "checkpoint 'mine' was trained on 1 patients that 'clinic' holds out",
        ),
        (Lineage(), "the lineage of checkpoint 'mine' is unknown"),
        (Lineage(True, "other", []), "cannot be compared"),
    ):
        assert said in str(leak_of_job(a_checkpoint(lineage=lineage), real))


def test_a_training_leaks_by_its_base(real: Dataset) -> None:
    config = a_config()
    assert leak_of_training(config, real, None) is None
    assert leak_of_training(config, real, a_checkpoint()) is None
    for lineage, said in (
        (
            Lineage(True, "test", [VAL_PATIENT], **ALIKE),
            "the base 'mine' was trained on 1 patients that 'clinic' holds out",
        ),
        (Lineage(), "the lineage of the base 'mine' is unknown"),
    ):
        assert said in str(leak_of_training(config, real, a_checkpoint(lineage=lineage)))
    assert leak_of_training(public(config), real, a_checkpoint(lineage=Lineage())) is None
    assert leak_of_training(public(config), real, a_checkpoint(lineage=Lineage(True, "another site's", ["x"]))) is None
    contradicted = a_checkpoint(lineage=Lineage(True, "test", [VAL_PATIENT], **ALIKE))
    assert "1 patients" in str(leak_of_training(public(config), real, contradicted))


def test_a_training_leaks_by_its_own_split(real: Dataset, tmp_path: Path) -> None:
    unknown = with_info(real, tmp_path, lineage={"known": False, "key_fingerprint": None, "patients": []})
    assert "unknown" in str(leak_of_training(a_config(), unknown, None))

    class OnePatient(Dataset):
        def table(self, columns: Any = None) -> Any:
            import pyarrow as pa

            return pa.table({"patient": ["a", "b", "a"], "split": ["train", "train", "test"]}).select(list(columns))

    same = OnePatient(real.name, real.storage)
    assert "1 patients of 'clinic' are both trained on and held out: a" in str(leak_of_training(a_config(), same, None))


# -- the commands ----------------------------------------------------------------------------------------------


def leaking(tiny: Path, root: Path, lineage: Lineage | None = None) -> Path:
    target = root / "checkpoints" / "leaking"
    shutil.copytree(tiny, target)
    lineage = lineage or Lineage(True, "test", [TRAIN_PATIENT, VAL_PATIENT], **ALIKE)
    write_description(dataclasses.replace(read_checkpoint(target), lineage=lineage), target)
    return target


def test_shards_warns_of_everything_and_is_silenced_by_name(builder, tiny_checkpoint: Path, tmp_path: Path) -> None:
    words = ["shards", "--config", "loud.yaml", "--count", "3", "--checkpoint", tiny_checkpoint, "--engine", "inline"]
    code, output = builder(*words, "--guidance", "7")
    assert code == 0, output
    for name in ("prompt-style", "prompt-length", "guidance", "prompts-differ"):
        assert output.count(f"(--silence {name})") == 1
        assert GUARDS[name] in output
    assert "masterpiece" in output and output.count("warning: ") == 5  # two prompts differ
    silenced = ["--silence", "prompt-style", "--silence", "guidance", "--silence", "prompts-differ"]
    code, output = builder(*words, "--guidance", "7", *silenced)
    assert code == 0 and "nothing to do" in output
    assert output.count("warning: ") == 1 and "(--silence prompt-length)" in output
    assert "allow_leak" not in find_dataset("tiny-IPR", str(tmp_path)).info


def test_shards_as_advised_prints_no_warning(builder, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["shards", "--config", "tiny.yaml", "--count", "3", "--checkpoint", tiny_checkpoint, "--engine", "inline"]
    code, output = builder(*words)
    assert code == 0, output
    assert "warning" not in output and "LEAK" not in output


def test_shards_refuses_a_leak_before_any_work_and_records_the_reason(
    builder, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    words = ["shards", "--config", "tiny.yaml", "--count", "3", "--engine", "inline"]
    words += ["--checkpoint", str(leaking(tiny_checkpoint, tmp_path))]
    code, output = builder(*words)
    assert code == 2 and "holds out" in output and "--allow-leak REASON" in output
    assert not (tmp_path / "shards" / "tiny-IPR").exists() and not (tmp_path / "logs").exists()
    code, output = builder(*words, "--silence", "train-overlap")
    assert code == 2  # no warning, so that nothing silences it
    code, output = builder(*words, "--allow-leak", " ")
    assert code == 2 and "no reason" in output
    code, output = builder(*words, "--allow-leak", "a control experiment")
    assert code == 0, output
    assert "LEAK: " in output and "because: a control experiment" in output and "(--silence train-overlap)" in output
    info = find_dataset("tiny-IPR", str(tmp_path)).info
    assert info["allow_leak"] == info["config"]["allow_leak"] == "a control experiment"
    code, output = builder("filter", "tiny-IPR", "--min-ssim", "-1", "--no-gates")
    assert code == 0, output
    assert find_dataset("tiny-IPR-accepted", str(tmp_path)).info["allow_leak"] == "a control experiment"


def test_shards_refuses_an_unknown_lineage(builder, tiny_checkpoint: Path, tmp_path: Path) -> None:
    leaking(tiny_checkpoint, tmp_path, Lineage())
    code, output = builder("shards", "--config", "tiny.yaml", "--count", "3", "--checkpoint", "leaking")
    assert code == 2 and "the lineage of checkpoint 'leaking' is unknown" in output


def test_a_reason_that_is_not_needed_is_not_recorded(builder, tiny_checkpoint: Path, tmp_path: Path) -> None:
    words = ["shards", "--config", "tiny.yaml", "--count", "3", "--checkpoint", tiny_checkpoint, "--engine", "inline"]
    code, output = builder(*words, "--allow-leak", "to be sure")
    assert code == 0, output
    info = find_dataset("tiny-IPR", str(tmp_path)).info
    assert "allow_leak" not in info and info["config"]["allow_leak"] == "" and "LEAK" not in output


def test_best_of_the_configs_run_is_chosen_alone(builder, tiny_checkpoint: Path, tmp_path: Path) -> None:
    for step, kd in ((10, 0.5), (20, 0.1), (30, 0.3)):
        folder = tmp_path / "checkpoints" / "mine" / f"step-{step:06d}"
        shutil.copytree(tiny_checkpoint, folder)
        write_description(dataclasses.replace(read_checkpoint(folder), step=step, metrics={"kd": kd}), folder)
    words = ["shards", "--config", "tiny.yaml", "--set", "checkpoint=mine", "--count", "3", "--engine", "inline"]
    code, output = builder(*words, "--checkpoint", "step=20")
    assert code == 0, output
    assert find_dataset("tiny-IPR", str(tmp_path)).info["checkpoint"].endswith("mine/step-000020")
    code, output = builder(*words, "--checkpoint", "step=40")
    assert code == 2 and "20" in output and "30" in output
    code, output = builder("shards", "--config", "tiny.yaml", "--count", "3", "--checkpoint", "best")
    assert code == 2 and "none is named" in output


def test_train_warns_and_refuses_before_any_work(builder, tiny_checkpoint: Path, tmp_path: Path) -> None:
    base = leaking(tiny_checkpoint, tmp_path)
    words = ["train", "--config", "loud.yaml", "--set", f"model.base={base}", "--set", "sample.guidance=12"]
    code, output = builder(*words)
    assert code == 2 and "the base 'leaking' was trained on 1 patients" in output and "base_lineage=public" in output
    for name in ("prompt-style", "prompt-length", "guidance", "perceptual"):
        assert output.count(f"(--silence {name})") == 1
    assert not (tmp_path / "checkpoints" / "tiny").exists()
    _, output = builder(*words, *(word for name in GUARDS for word in ("--silence", name)))
    assert "warning" not in output and "the base 'leaking'" in output


def test_a_checkpoint_records_the_reason_of_its_leak(builder, tiny_checkpoint: Path, tmp_path: Path) -> None:
    settings = [f"model.base={leaking(tiny_checkpoint, tmp_path)}", "train.size=16", "train.steps=1"]
    settings += ["train.batch_size=2", "train.augment=false"]
    words = [word for setting in settings for word in ("--set", setting)]
    code, output = builder("train", "--config", "tiny.yaml", *words, "--allow-leak", "a control experiment")
    assert code == 0, output
    made = read_checkpoint(tmp_path / "checkpoints" / "tiny" / "step-000001")
    assert made.config["allow_leak"] == "a control experiment" and "because: a control experiment" in output
    assert VAL_PATIENT in made.lineage.patients


def test_other_processes_of_a_training_say_nothing(
    builder, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = leaking(tiny_checkpoint, tmp_path)
    monkeypatch.setenv("RANK", "1")
    code, output = builder("train", "--config", "loud.yaml", "--set", f"model.base={base}")
    assert code == 2 and "warning" not in output


def test_a_base_that_is_not_there_says_how_it_is_fetched(builder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code, output = builder("train", "--config", "tiny.yaml", "--set", "model.base=nobody/has-this")
    assert code == 2 and "--download" in output


def test_a_guard_that_does_not_exist_cannot_be_silenced(builder) -> None:
    code, output = builder("train", "--config", "tiny.yaml", "--silence", "prompts")
    assert code == 2 and all(name in output for name in GUARDS)


def test_the_shipped_checkpoint_and_configs_are_as_advised(real: Dataset) -> None:
    demo = read_checkpoint(Path(__file__).parents[1] / "builder" / "demo" / "checkpoint")
    assert before_job(load_config("demo"), demo, real) == []
    for file in sorted((Path(__file__).parents[1] / "configs").glob("*.yaml")):
        found = before_training(load_config(str(file)), real)
        said = ["prompt-style", "prompt-length"] if file.stem == "stock" else []  # its captions are what is warned of
        assert set(names(found)) == set(said), file

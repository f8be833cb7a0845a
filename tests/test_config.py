"""The typed config: what can't be is refused when it is read, all of it at once, with key and range."""

from __future__ import annotations

import dataclasses
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builder.config import Config, CropsConfig, SampleConfig, TrainConfig, config_from_json, load_config
from builder.config.reference import Key, keys, schema_at
from builder.config.types import EXTRACTORS
from builder.errors import BuilderError

KEYS = keys()
# Values that no key may have, whatever it is: not finite, of a type that YAML gives for something else.
NEVER = [".nan", "{a: {b: 1}}", "[[1]]", "2020-01-01"]


def refusal(*overrides: str) -> str:
    with pytest.raises(BuilderError) as raised:
        load_config(None, overrides)
    return f"{raised.value.what}\n{raised.value.remedy}"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.prompt_dropout=2", "train.prompt_dropout is 2 | a number from 0 to 1"),
        ("train.ema_decay=5", "train.ema_decay is 5 | a number from 0 to less than 1"),
        ("crops.max_size=0", "crops.max_size is 0 | a whole number from 1"),
        ("model.family=foo", "model.family is 'foo' | sdxl or sd15"),
        ("crops.test=0.5", "train 0.7, val 0.15, test 0.5 | don't sum to 1"),
        ("sample.guidance_interval=[5, 1]", "sample.guidance_interval is [5, 1] | the lower one first"),
        ("sample.guidance_interval=[1, 2, 3]", "two numbers"),
        ("sample.scheduler=ddimm", "sample.scheduler is 'ddimm' | did you mean 'ddim'?"),
        ("train.monitor=val_fid", "train.monitor is 'val_fid' | did you mean 'FID'?"),
        ("train.monitor=kd_X", "'X' is not among the classes | I, P, R"),
        ("score.features=inceptoin", "score.features is 'inceptoin' | did you mean 'inception'?"),
        ("score.features=inception:", "inception, dinov2:FOLDER"),
        ("score.features=dinov2", "dinov2:FOLDER"),
        ("sample.steps=true", "sample.steps is True | a whole number"),
        ("sample.steps=2.5", "sample.steps is 2.5"),
        ("sample.guidance=.inf", "sample.guidance is inf | a number from 1 to 100"),
        ("train.learning_rate=-1e-3", "train.learning_rate is -0.001"),
        ("train=", "train is None | `key: value` lines"),
        ("train.vae=3", "train.vae is 3 | `key: value` lines"),
        ("train.margin=[0.1]", "two numbers from 0 to 10"),
        ("model.lora.targets=[]", "at least one"),
        ("ablation.learning_rate={lorra: 1}", "unknown key 'ablation.learning_rate.lorra' | did you mean 'lora'?"),
        ("classes=[{code: A, name: a}]", "classes[0].prompt is missing"),
        ("classes=[{code: A-B, name: a, prompt: p}]", "class code 'A-B' | file names"),
        ("name=../x", "name is '../x' | without /"),
        ("train.vae.step=3", "unknown key 'train.vae.step' | did you mean 'steps'?"),
    ],
)
def test_a_value_that_cannot_be_is_refused_with_key_and_range(override: str, said: str) -> None:
    found = refusal(override)
    for part in said.split(" | "):
        assert part in found


def test_all_problems_are_reported_together_with_where_each_comes_from(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("train: {prompt_dropout: 2, stepz: 3}\nmodel: {family: foo}\ncrops: {max_size: 0}\n")
    with pytest.raises(BuilderError) as raised:
        load_config(str(file), ["train.ema_decay=5"])
    assert raised.value.what.startswith("5 things")
    for said in ("train.prompt_dropout is 2", "'train.stepz'", "model.family is 'foo'", "crops.max_size is 0"):
        assert f"{file}: unknown key {said}" in raised.value.what or f"{file}: {said}" in raised.value.what
    assert "--set train.ema_decay=5: train.ema_decay is 5" in raised.value.what


@pytest.mark.parametrize("key", KEYS, ids=lambda key: key.name)
def test_every_key_says_what_it_is_for_and_refuses_what_is_no_value_of_its_kind(key: Key) -> None:
    assert key.description.endswith(".") and key.kind
    free = ("model.architecture", "classes")  # of classes the default is no one's mistake, of architecture all is free
    for value in NEVER:
        if key.name not in free:
            assert key.name.rpartition(".")[2] in refusal(f"{key.name}={value}")


@pytest.mark.parametrize("key", [key for key in KEYS if "number from" in key.kind], ids=lambda key: key.name)
def test_a_range_holds_at_its_ends(key: Key) -> None:
    schema = schema_at(Config, key.name.split("."))
    if schema.get("type") == "array":
        return  # of lists, test_numbers_in_lists
    for bound, outside in (("minimum", -1), ("maximum", 1)):
        if bound not in schema:
            continue
        if key.name not in ("crops.train", "crops.val", "crops.test", "train.checkpoint_every", "train.evaluate_every"):
            load_config(None, [f"{key.name}={schema[bound]}"])
        assert f"{key.name} is" in refusal(f"{key.name}={schema[bound] + outside}")
    for bound in ("exclusiveMinimum", "exclusiveMaximum"):
        if bound in schema:
            assert f"{key.name} is" in refusal(f"{key.name}={schema[bound]}")


def test_every_number_has_finite_bounds_but_seeds() -> None:
    seeds = {"seed", "score.panel_seed", "crops.split_seed"}
    assert {key.name for key in KEYS if key.kind in ("a whole number", "a number")} == seeds


@given(low=st.integers(0, 9), high=st.floats(0, 10))
def test_numbers_in_lists_stay_what_they_are(low: int, high: float) -> None:
    """Whole numbers stay whole: lists enter fingerprints."""
    pair = [low, high]
    if low <= high:
        kept = SampleConfig(guidance_interval=pair).guidance_interval
        assert json.dumps(kept) == json.dumps(pair)
    else:
        with pytest.raises(BuilderError, match="lower one first"):
            SampleConfig(guidance_interval=pair)


def test_a_section_is_checked_whenever_it_is_made() -> None:
    with pytest.raises(BuilderError, match=r"sample\.steps is 0"):
        SampleConfig(steps=0)
    with pytest.raises(BuilderError, match=r"sample\.steps is 0.*\n.*sample\.guidance is 0"):
        dataclasses.replace(SampleConfig(), steps=0, guidance=0)
    with pytest.raises(BuilderError, match=r"unknown key .sample\.stepz."):
        SampleConfig(stepz=3)  # type: ignore[call-arg]
    with pytest.raises(BuilderError, match="don't sum to 1"):
        CropsConfig(test=0.5)
    with pytest.raises(dataclasses.FrozenInstanceError):
        SampleConfig().steps = 3  # type: ignore[misc]


@pytest.mark.parametrize("name", [None, "demo", "stock", "ablation-demo", "sd15-lora", "wound-type"])
def test_a_recorded_config_reads_back_and_travels_to_workers(name: str | None) -> None:
    config = load_config(name)
    recorded = json.dumps(config.to_json())
    assert config_from_json(json.loads(recorded)) == config
    assert json.dumps(config_from_json(json.loads(recorded)).to_json()) == recorded
    assert pickle.loads(pickle.dumps(config)) == config


def test_numbers_may_be_written_as_yaml_reads_them_as_text() -> None:
    config = load_config(None, ["train.learning_rate=1e-4", "ablation.learning_rate={lora: 1e-3}"])
    assert config.train.learning_rate == 1e-4 and config.ablation.learning_rate == {"lora": 1e-3}
    assert isinstance(load_config(None, ["sample.guidance=4"]).sample.guidance, float)


def test_choices_are_those_that_there_are() -> None:
    """Where adding a choice to its room was not followed by the config, or the other way round."""
    from builder.models.families import FAMILIES
    from builder.quality import features
    from builder.sampling.device import DTYPES
    from builder.sampling.schedulers import SCHEDULERS

    def choices(section: str, key: str) -> set[str]:
        return set(get_args(get_type_hints(get_type_hints(Config)[section])[key]))

    assert choices("model", "family") == set(FAMILIES)
    assert choices("sample", "scheduler") == set(SCHEDULERS)
    assert choices("sample", "dtype") == set(DTYPES)
    assert set(EXTRACTORS) == set(features.EXTRACTORS)


def test_what_a_config_may_monitor() -> None:
    for monitor in ("kd", "FID", "kd_I", "kd[efficientnet-lite0]", "vendi_ratio[x]_R", "auc"):
        assert load_config(None, [f"train.monitor={monitor}"]).train.monitor == monitor
    assert TrainConfig(monitor="kd_X").monitor == "kd_X"  # by itself it does not know the classes


# -- builder config -------------------------------------------------------------------------------------------------


def test_config_show_prints_every_key_and_marks_what_is_changed(builder) -> None:
    shown = builder("config", "show", "demo", "--set", "sample.steps=9")
    assert not shown.code
    lines = shown.output.splitlines()
    assert len(lines) == len(KEYS)
    assert "* sample.steps=9" in lines and '  sample.scheduler="dpmpp_2m_karras"' in lines
    settings = [word for line in lines for word in ("--set", line[2:])]
    again = builder("config", "show", *settings, "--json")
    assert json.loads(again.output) == load_config("demo", ["sample.steps=9"]).to_json()
    described = builder("config", "show", "--describe").output
    assert all(key.description in described for key in KEYS)


def test_config_check_says_everything_that_is_wrong(builder, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("extends: demo\ntrain: {prompt_dropout: 2}\nsample: {stepz: 3}\n")
    refused = builder("config", "check", "mine.yaml")
    assert refused.code == 2
    assert "train.prompt_dropout is 2" in refused.output and "sample.stepz" in refused.output
    (tmp_path / "mine.yaml").write_text("sample: {steps: 3}\n")
    fine = builder("config", "check", "mine.yaml")
    assert not fine.code
    assert fine.output == "mine.yaml is a valid config; other than the defaults: name, sample.steps\n"


def test_the_command_line_answers_without_what_takes_long_to_import() -> None:
    slow = {"pydantic", "numpy", "pyarrow", "torch"}
    code = f"import sys, builder.cli, builder.config; sys.exit(bool({slow} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

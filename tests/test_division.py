"""Weights divided over processes, on the CPU: FSDP and DeepSpeed's ZeRO-2, launched by accelerate as configs/ say."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from builder.config import Config, config_from_json
from builder.errors import BuilderError
from builder.models.checkpoint import Checkpoint, read_checkpoint, save_checkpoint
from builder.models.families import FAMILIES
from builder.shards.dataset import Dataset
from builder.shards.storage import Storage
from builder.training.diffusion import DiffusionObjective
from builder.training.division import require_adamw
from builder.training.fsdp import units_of
from builder.training.processes import Processes
from builder.training.run import train
from builder.training.stage import Stage, TrainingInterrupted
from builder.training.zero import engine_config
from tests.conftest import write_real
from tests.test_finetune import FEATURES, SIZE, TINY, config_of, equal, unet_weights

CONFIGS = Path(__file__).parents[1] / "configs" / "accelerate"
WAYS = {"FSDP": "fsdp.yaml", "DeepSpeed": "zero2.yaml"}
STEPS, STOP, SAVED = 4, 3, 2  # of a training; where it is stopped; of a state before that
CASES: dict[str, dict[str, Any]] = {
    "full": {"method": "full", "gradient_checkpointing": True, "evaluate_every": 2, "evaluate_images": 2},
    "lora": {"method": "lora"},
    "full-bf16": {"method": "full", "precision": "bf16"},
    "lora-bf16": {"method": "lora", "precision": "bf16", "ema_device": "cpu"},
    "full-fp16": {"method": "full", "precision": "fp16"},
}
EXACT = ("full", "lora")
LEFT_OUT = {"FSDP": "full-bf16", "DeepSpeed": "full-fp16"}  # DeepSpeed refuses fp16


# -- in each of the processes --------------------------------------------------------------------------------------


def said_by(config: Config, dataset: Dataset, out: Path, stop: int | None = None) -> list[dict[str, float]]:
    """What each step of a training said. In the last step before `stop` the first process is asked to end."""
    step, said = Stage.train_step, []

    def recorded(self: Stage) -> dict[str, float]:
        if stop and self.step == stop - 1 and os.environ.get("RANK", "0") == "0":
            os.kill(os.getpid(), signal.SIGTERM)
        said.append(step(self))
        return said[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stage, "train_step", recorded)
        train(config, dataset, out, device="cpu")
    return said


def work(root: str, out: Path, case: str) -> None:
    """A training to its end, and the same one stopped by a signal and gone on with."""
    config = config_from_json(json.loads((out / f"{case}.json").read_text()))
    dataset = Dataset("clinic", Storage(root))
    straight = said_by(config, dataset, out / case / "straight")
    with pytest.raises(TrainingInterrupted):
        said_by(config, dataset, out / case / "resumed", stop=STOP)
    resumed = said_by(config, dataset, out / case / "resumed")
    (out / case / f"said-{os.environ['RANK']}.json").write_text(json.dumps([straight, resumed]))


def blow_up(root: str, out: Path, case: str) -> None:
    """A training whose gradients are not finite in one of the processes: all give up, and nothing is saved."""
    config = config_from_json(json.loads((out / f"{case}.json").read_text()))
    losses = DiffusionObjective.losses

    def blown(self: DiffusionObjective, step: int, part: range) -> dict[str, torch.Tensor]:
        found = losses(self, step, part)
        return {**found, "loss": found["loss"] * (float("inf") if part.stop == config.train.batch_size else 1)}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DiffusionObjective, "losses", blown)
        with pytest.raises(BuilderError, match="not finite at step 0"):
            train(config, Dataset("clinic", Storage(root)), out / "blown", device="cpu")
    assert not (out / "blown" / "state").exists()


WORKER = """
import sys
from pathlib import Path
import torch.distributed
from tests.test_division import blow_up, work
for case in sys.argv[3:]:
    work(sys.argv[1], Path(sys.argv[2]), case)
blow_up(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
torch.distributed.barrier()
"""


# -- what they did -------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """Two processes' trainings of all cases, and one process's, step for step as much."""

    way: str
    folder: Path
    dataset: Dataset
    base: Path
    shown: str  # on the terminal

    def config(self, case: str) -> Config:
        return config_from_json(json.loads((self.folder / f"{case}.json").read_text()))

    def said(self, case: str) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
        """By the uninterrupted training, and by the other one after its interruption: the same in both processes."""
        first, second = (json.loads((self.folder / case / f"said-{rank}.json").read_text()) for rank in (0, 1))
        assert first == second
        return first[0], first[1]

    def state(self, case: str, name: str, step: int = STEPS) -> dict[str, Any]:
        (file,) = (self.folder / case / name / "state").glob(f"unet-{step:08d}-*.pt")
        state: dict[str, Any] = torch.load(file, weights_only=True)
        return state

    def checkpoint(self, case: str, name: str) -> Path:
        return self.folder / case / name / f"step-{STEPS:06d}"

    def cases(self) -> list[str]:
        return [case for case in CASES if case != LEFT_OUT[self.way]]


@pytest.fixture(scope="module", params=WAYS)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    if request.param == "DeepSpeed" and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("the package deepspeed is not installed: pip install 'builder[deepspeed]'")
    folder = tmp_path_factory.mktemp(request.param)
    dataset = write_real(folder, size=32)
    base = folder / "base"
    save_checkpoint(FAMILIES["sdxl"].build(TINY["sdxl"], SIZE, 0), Checkpoint(base, family="sdxl"))
    (base / "checkpoint.json").unlink()
    made = Run(request.param, folder, dataset, base, "")
    for case in made.cases():
        settings = {"steps": STEPS, "batch_size": 7, "micro_batch": 2, "checkpoint_every": SAVED, "ema_decay": 0.5}
        config = config_of({"sdxl": base}, **{**settings, **CASES[case]})
        (folder / f"{case}.json").write_text(json.dumps(config.to_json()))
    (folder / "worker.py").write_text(WORKER)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", CONFIGS / WAYS[made.way]]
    arguments = ["--num_processes", "2", folder / "worker.py", folder, folder, *made.cases()]
    paths = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    here = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(list(map(str, command + arguments)), env=here, capture_output=True, text=True, check=False)
    made.shown = done.stdout + done.stderr
    assert done.returncode == 0, made.shown[-5000:]
    return made


def differ(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    assert first.keys() == second.keys()
    return max(float((first[name].float() - second[name].float()).abs().max()) for name in first)


def test_interrupted_and_resumed_is_uninterrupted(run: Run) -> None:
    """To the last bit: losses, norms, weights, averages, moments, and what an evaluation found."""
    for case in run.cases():
        straight, resumed = run.said(case)
        assert len(straight) == STEPS and resumed == straight[STOP:], case
        first, second = run.state(case, "straight"), run.state(case, "resumed")
        assert equal(first["network"], second["network"]) and equal(first["ema"], second["ema"]), case
        for place, moments in first["optimizer"]["state"].items():
            assert equal(moments, second["optimizer"]["state"][place]) and moments["step"] == STEPS, case
        assert first["scaler"] == second["scaler"]
        checkpoints = [run.checkpoint(case, name) for name in ("straight", "resumed")]
        assert equal(*map(unet_weights, checkpoints)), case
        assert read_checkpoint(checkpoints[0]).metrics == read_checkpoint(checkpoints[1]).metrics, case


@pytest.mark.no_cover
def test_divided_is_one_process_with_twice_the_accumulation(run: Run) -> None:
    """Losses and norms agree to 1e-4 of their value, and samples and weights with them: sums are rounded in another
    order, and AdamW's first steps enlarge that. One process also goes on from what the divided ones saved."""
    for case in EXACT:
        straight, _ = run.said(case)
        plain = said_by(run.config(case), run.dataset, run.folder / case / "plain")
        assert plain[0]["loss"] != plain[1]["loss"]
        alone = run.folder / case / "alone"
        (alone / "state").mkdir(parents=True)
        (saved,) = (run.folder / case / "straight" / "state").glob(f"unet-{SAVED:08d}-*.pt")
        shutil.copy(saved, alone / "state")
        went_on = said_by(run.config(case), run.dataset, alone)
        for other, same in ((plain, straight), (went_on, straight[SAVED:])):
            for first, second in zip(other, same, strict=True):
                assert first == pytest.approx(second, rel=1e-4), case
        divided = unet_weights(run.checkpoint(case, "straight"))
        for name in ("plain", "alone"):
            assert differ(divided, unet_weights(run.checkpoint(case, name))) < 1e-3, case  # float16
        assert differ(divided, unet_weights(run.base)) > 2e-3

    figure = f"kd[{FEATURES.replace(':', '.')}]"
    figures = [read_checkpoint(run.checkpoint("full", name)).metrics[figure] for name in ("straight", "plain")]
    assert figures[0] == pytest.approx(figures[1], rel=0.05)
    average, weights = (run.state("full", "straight")[part] for part in ("ema", "network"))
    saved = {name: weight.half() for name, weight in unet_weights(run.checkpoint("full", "straight")).items()}
    assert equal({name: weight.half() for name, weight in average.items()}, saved)  # what is saved is the average
    assert not equal({name: weight.half() for name, weight in weights.items()}, saved)


@pytest.mark.no_cover
def test_mixed_precision_is_near_and_trains_float32(run: Run) -> None:
    for case in set(run.cases()) - set(EXACT):
        straight, _ = run.said(case)
        plain = said_by(run.config(case), run.dataset, run.folder / case / "plain")
        for name in ("loss", "grad_norm"):
            assert [step[name] for step in straight] == pytest.approx([step[name] for step in plain], rel=0.03), case
        state = run.state(case, "straight")
        trained = [*state["network"].values(), *state["ema"].values()]
        assert {weight.dtype for weight in trained} == {torch.float32}
        assert bool(state["scaler"]) == (case == "full-fp16")
        if case == "full-bf16":  # none was rounded to bf16, not even at the beginning
            rounded = [float((weight == weight.bfloat16()).float().mean()) for weight in state["network"].values()]
            assert sum(rounded) / len(rounded) < 0.1


def test_only_the_first_process_shows_bars(run: Run) -> None:
    # Each training reads the crops once: two processes, both showing it, would show it twice as often.
    assert run.shown.count("read clinic:   0%") == 3 * len(run.cases()) + 1


# -- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "Megatron"),
        ({"ACCELERATE_USE_FSDP": "true"}, "no processes were started"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "no processes were started"),
        ({"ACCELERATE_USE_DEEPSPEED": "true", "LOCAL_RANK": "0"}, "needs its package"),
    ],
)
def test_what_cannot_be_divided_is_refused(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], said: str
) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    with pytest.raises(BuilderError, match=said):
        Processes("cpu")


FULLY_SHARD = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"FSDP_VERSION": "1"}, "FSDP of version 1"),
        ({"FSDP_OFFLOAD_PARAMS": "true"}, "zero2.yaml"),
        ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, "train.gradient_checkpointing"),
        ({"FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP", "FSDP_MIN_NUM_PARAMS": "9"}, "TRANSFORMER_BASED_WRAP"),
        (
            {"FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "FSDP_TRANSFORMER_CLS_TO_WRAP": "T5Block"},
            "no modules T5Block",
        ),
    ],
)
def test_fsdp_as_it_is_not_done(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], said: str) -> None:
    for variable, value in {**FULLY_SHARD, **environment}.items():
        monkeypatch.setenv(variable, value)
    with pytest.raises(BuilderError) as raised:
        units_of(torch.nn.Sequential(torch.nn.Linear(2, 2)))
    assert said in f"{raised.value.what} {raised.value.remedy}"


@pytest.mark.parametrize(
    ("environment", "precision", "said"),
    [
        ({"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, "bf16", "fsdp.yaml"),
        ({"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "nvme"}, "bf16", "cpu or none"),
        ({}, "fp16", "train.precision fp16"),
        ({"ACCELERATE_DEEPSPEED_CONFIG_FILE": {"optimizer": {}}}, "bf16", "train.* says it"),
    ],
)
def test_deepspeed_as_it_is_not_done(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, environment: dict[str, Any], precision: str, said: str
) -> None:
    for variable, value in environment.items():
        if isinstance(value, dict):
            file = tmp_path / "deepspeed.json"
            file.write_text(json.dumps({"zero_optimization": {"stage": 2}, **value}))
            value = str(file)
        monkeypatch.setenv(variable, value)
    with pytest.raises(BuilderError) as raised:
        engine_config(4, 0.5, precision)
    assert said in f"{raised.value.what} {raised.value.remedy}"


def test_deepspeeds_config_is_train(monkeypatch: pytest.MonkeyPatch) -> None:
    """What accelerate's config file says of ZeRO, and what `train` says of the rest, whatever else that file says."""
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "cpu")
    monkeypatch.setenv("ACCELERATE_GRADIENT_CLIPPING", "1.0")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "7")
    config = engine_config(4, 0.5, "fp32")
    assert config["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
    assert (config["gradient_accumulation_steps"], config["gradient_clipping"]) == (4, 0.5)
    assert not config["bf16"]["enabled"] and engine_config(4, 0.5, "bf16")["bf16"]["enabled"]
    assert "auto" not in json.dumps(config)


def test_states_of_other_optimizers_are_not_divided() -> None:
    weight = [torch.nn.Parameter(torch.zeros(2))]
    require_adamw(torch.optim.AdamW(weight), "FSDP")
    with pytest.raises(BuilderError, match="cannot divide the states of SGD"):
        require_adamw(torch.optim.SGD(weight), "FSDP")

"""The history of a run, choosing and removing its checkpoints, and handing them on."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from builder.cli.checkpoint import checkpoint
from builder.documents import read_document, write_document
from builder.errors import BuilderError
from builder.models.checkpoint import read_checkpoint, resolve, run_history
from builder.models.exporting import export
from builder.models.history import Entry, History, plain, read_legacy_history
from builder.models.load import load_pipeline
from builder.models.prune import prune
from builder.models.tensors import StoredTensors, write_tensors

SCORES = {100: 9.0, 200: 4.0, 300: 5.0, 400: float("nan"), 500: 7.0}


def history_of(scores: dict[int, float], monitor: str = "kid", mode: str = "min") -> History:
    history = History(monitor=monitor, mode=mode)
    for step, score in scores.items():
        metrics = {"kid": np.float64(score), "loss": torch.tensor(1 / step), "coverage": score / 10}
        history = history.with_entry(Entry(step, step // 100, f"step-{step:06d}", metrics))
    return history


@pytest.fixture
def run(tmp_path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A training run of five checkpoints in ./checkpoints/clinic."""
    monkeypatch.chdir(tmp_path)
    run = Path("checkpoints/clinic")
    run.mkdir(parents=True)
    history = history_of(SCORES)
    history.write(run)
    for entry in history.entries:
        shutil.copytree(tiny_checkpoint, run / entry.path, copy_function=os.link)
        description = run / entry.path / "checkpoint.json"
        data = {**read_document(description), "step": entry.step, "epoch": entry.epoch}
        write_document(description, {**data, "metrics": entry.metrics})
    return run


def call(*words: str) -> str:
    done = CliRunner().invoke(checkpoint, words)
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.output


# -- history ----------------------------------------------------------------------------------------------------------


def test_history_round_trip(tmp_path: Path) -> None:
    history = history_of(SCORES)
    history.write(tmp_path)
    text = (tmp_path / "history.json").read_text()
    data = json.loads(text, parse_constant=pytest.fail)  # neither NaN nor Infinity
    assert data["checkpoints"][3]["metrics"] == {"kid": None, "loss": pytest.approx(1 / 400), "coverage": None}
    assert History.read(tmp_path) == history
    assert [path.name for path in tmp_path.iterdir()] == ["history.json"]
    assert History.read(tmp_path / "nowhere") == History()
    (tmp_path / "history.json").write_text(text[:-20])
    with pytest.raises(BuilderError, match=r"history\.json is damaged"):
        History.read(tmp_path)


json_like = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text() | st.integers(), inner, max_size=3),
    max_leaves=8,
)


@given(json_like)
def test_plain_is_json(value: Any) -> None:
    text = json.dumps(plain(value), allow_nan=False)
    assert plain(json.loads(text)) == plain(value)


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        (np.float32(0.5), 0.5), (np.int64(3), 3), (np.bool_(True), True), (torch.tensor(2.0), 2.0),
        (np.float64("inf"), None), (torch.tensor([1.5]), 1.5),
        (torch.zeros(2, 3), "Tensor [2, 3]"), ((1, {"a": float("nan")}), [1, {"a": None}]),
    ],
)  # fmt: skip
def test_plain_numbers(value: Any, wanted: Any) -> None:
    assert plain(value) == wanted
    assert type(plain(value)) is type(wanted)


def test_best_and_last() -> None:
    history = history_of(SCORES)
    assert history.best().step == 200
    assert history.best("kid", "max").step == 100
    assert history.best("loss").step == 500
    assert history.last.step == 500
    assert history_of({1: 2.0, 2: 1.0, 3: 1.0}).best().step == 2  # of equals the earliest
    assert history.with_entry(Entry(200, 2, "step-000200", {"kid": 99})).best().step == 300  # replaced
    assert history.at(epoch=3).step == 300 and history.at(step=400).epoch == 4
    with pytest.raises(BuilderError, match=r"no checkpoint of epoch 9\n.*step-000100 \(epoch 1, step 100\)"):
        history.at(epoch=9)


@pytest.mark.parametrize(
    ("history", "monitor", "said"),
    [
        (history_of(SCORES), "kidd", "no checkpoint has the metric 'kidd'.*did you mean 'kid'.*coverage, kid, loss"),
        (history_of(SCORES), "val_kid", "did you mean 'kid'"),
        (history_of(SCORES), "ssim", "the metrics are: coverage, kid, loss"),
        (history_of(SCORES, monitor=""), "", "--monitor; the metrics are: coverage, kid, loss"),
        (History(), "kid", "no checkpoint yet"),
        (History((Entry(1, 1, "step-1", {"kid": None}),)), "kid", "no checkpoint of the run has a score"),
    ],
)
def test_wrong_monitors_are_refused(history: History, monitor: str, said: str) -> None:
    with pytest.raises(BuilderError) as caught:
        history.best(monitor)
    assert re.search(said, str(caught.value), re.DOTALL)


def test_modes_are_min_and_max() -> None:
    with pytest.raises(BuilderError, match="mode"):
        History(mode="lowest")
    with pytest.raises(BuilderError, match="mode"):
        history_of(SCORES).best("kid", "lowest")


@given(st.dictionaries(st.integers(1, 10_000), st.floats(), min_size=1, max_size=12), st.integers(0, 12))
def test_best_and_last_are_never_superfluous(scores: dict[int, float], keep: int) -> None:
    history = History(monitor="kid")
    for step, score in scores.items():
        history = history.with_entry(Entry(step, step, f"step-{step:06d}", {"kid": score}))
    removed = {entry.step for entry in history.superfluous(keep)}
    assert history.last.step not in removed
    best = {history.best().step} if history.metrics else set()
    assert not best & removed
    others = sorted(set(scores) - best - {history.last.step})
    assert sorted(removed) == others[: max(0, len(others) - keep)]


OLD = """{"checkpoint_history": [
  {"epoch": 35, "path": "/w/checkpoint_epoch_0035.pt", "metrics": {"fid": 200.5, "is_mean": Infinity},
   "timestamp": "b"},
  {"epoch": 30, "path": "/w/checkpoint_epoch_0030.pt", "metrics": {"fid": 189.2, "is_mean": NaN}, "timestamp": "a"}],
 "best_checkpoint": null, "best_score": Infinity, "monitor_metric": "%s", "monitor_mode": "min"}"""


def test_old_history(tmp_path: Path) -> None:
    file = tmp_path / "checkpoint_history.json"
    file.write_text(OLD % "val_fid")
    history, notes = read_legacy_history(file)
    assert history.best() == Entry(30, 30, "checkpoint_epoch_0030.pt", {"fid": 189.2, "is_mean": None}, "a")
    assert history.monitor == "fid"
    assert notes == [
        f"{file} monitors 'val_fid', but the metric is called 'fid', so the best was never recorded: "
        "by 'fid' (min) it is epoch 30 (189.2)"
    ]
    history.write(tmp_path)
    json.loads((tmp_path / "history.json").read_text(), parse_constant=pytest.fail)
    file.write_text(OLD % "fid")
    assert read_legacy_history(file)[1] == []
    file.write_text(OLD % "accuracy")
    history, notes = read_legacy_history(file)
    assert history.monitor == "" and "the metrics are: fid" in notes[0]
    with pytest.raises(BuilderError, match="the metrics are: fid"):
        history.best()


@pytest.mark.parametrize("text", ["{", "[]", '{"checkpoint_history": {}}', '{"checkpoint_history": [{"path": "x"}]}'])
def test_broken_old_history(tmp_path: Path, text: str) -> None:
    (tmp_path / "old.json").write_text(text)
    with pytest.raises(BuilderError, match=r"old\.json"):
        read_legacy_history(tmp_path / "old.json")
    with pytest.raises(BuilderError, match="cannot be read"):
        read_legacy_history(tmp_path / "none.json")


# -- choosing ---------------------------------------------------------------------------------------------------------


def test_choices_of_a_run(run: Path) -> None:
    for reference, step in [
        ("clinic", 500), ("clinic:latest", 500), ("clinic:best", 200), ("clinic:epoch=3", 300),
        ("clinic:step=100", 100), (f"{run}:best", 200), (f"{run.resolve()}:best", 200),
        (run / "step-000300", 300), ("clinic/step-000300", 300),
    ]:  # fmt: skip
        assert resolve(reference).step == step
    for named in ("clinic", "clinic:latest", "checkpoints/clinic/step-000100"):
        assert resolve("best", run=named).step == 200
        assert resolve("epoch=3", run=named).step == 300
    assert resolve("demo", run="clinic").name == "demo"


@pytest.mark.parametrize(
    ("reference", "named", "said"),
    [
        ("clinic:epoch=9", "", r"no checkpoint of epoch 9.*step-000100 \(epoch 1"),
        ("clinic:bset", "", "'bset' does not choose.*RUN:best"),
        ("nowhere:best", "", "there is no checkpoint 'nowhere:best'.*clinic/step-000300"),
        ("best", "", "none is named.*RUN:best.*clinic/step-000300"),
        ("best", "demo", "none is named"),
        ("nowhere", "", "there are: demo, checkpoints/clinic/step-000100"),
    ],
)
def test_what_is_not_there_lists_what_is(run: Path, reference: str, named: str, said: str) -> None:
    with pytest.raises(BuilderError) as caught:
        resolve(reference, run=named)
    assert re.search(said, str(caught.value), re.DOTALL)


def test_a_run_without_a_history_file_has_its_folders(run: Path) -> None:
    (run / "history.json").unlink()
    history = run_history(run)
    assert [entry.step for entry in history.entries] == [100, 200, 300, 400, 500]
    assert history.best("kid").step == 200
    with pytest.raises(BuilderError, match="by which metric"):
        resolve("clinic:best")


def test_steps_are_ordered_by_number(run: Path) -> None:
    (run / "step-000500").rename(run / "step-1000000")
    assert resolve("clinic").path.name == "step-1000000"


def test_checkpoints_that_are_gone_are_not_chosen(run: Path) -> None:
    shutil.rmtree(run / "step-000200")
    assert resolve("clinic:best").step == 300
    assert len(History.read(run).entries) == 5  # what they scored is still known


# -- commands ---------------------------------------------------------------------------------------------------------


def test_list_and_show(run: Path) -> None:
    (run / "step-000300/checkpoint.json").write_text("{")
    lines = call("list").splitlines()
    assert lines[0].split()[:7] == ["name", "family", "method", "step", "epoch", "size", "lineage"]
    assert lines[1].split()[:5] == ["demo", "sdxl", "full", "7200", "-"]
    assert lines[2].split()[:5] == ["clinic/step-000100", "sdxl", "full", "100", "1"] and "kid 9" in lines[2]
    assert "1 patients" in lines[2]
    assert "damaged" in lines[4]
    shown = call("show", "clinic:best")
    for said in (
        "clinic/step-000200",
        "200, 2",
        "1 patients",
        "metric kid          4",
        "PHASE_I, diabetic",
        "20-30 px",
    ):
        assert said in shown


def test_list_without_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert call("list").splitlines()[1].startswith("demo ")


def test_best(run: Path) -> None:
    assert "checkpoints/clinic/step-000200" in call("best", "clinic")
    assert "checkpoints/clinic/step-000100" in call("best", "clinic", "--monitor", "coverage", "--mode", "max")
    with pytest.raises(BuilderError, match="'val_kid'"):
        call("best", "clinic", "--monitor", "val_kid")
    with pytest.raises(BuilderError, match="no training run 'demo'"):
        call("best", "demo")


def test_prune(run: Path) -> None:
    said = call("prune", "clinic", "--keep", "1", "--dry-run")
    assert [line.split()[2] for line in said.splitlines()] == [f"{run}/step-000100", f"{run}/step-000300"]
    assert len(list(run.glob("step-*"))) == 5
    said = call("prune", "clinic", "--keep", "1")
    assert said.startswith(f"removed {run}/step-000100")
    assert sorted(path.name for path in run.iterdir()) == ["history.json", "step-000200", "step-000400", "step-000500"]
    assert resolve("clinic:best").step == 200
    assert call("prune", "clinic", "--keep", "1") == "nothing to remove\n"
    call("prune", "clinic", "--keep", "0")
    assert [entry.step for entry in run_history(run).entries] == [200, 500]


def test_prune_needs_to_know_the_best(run: Path) -> None:
    history_of(SCORES, monitor="").write(run)
    with pytest.raises(BuilderError, match="by which metric"):
        prune(run, 0)
    assert [path.name for path, _ in prune(run, 1, "kid", "max", dry_run=True)] == ["step-000200", "step-000300"]


# -- export -----------------------------------------------------------------------------------------------------------


def test_export_of_a_whole_checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> None:
    found = read_checkpoint(tiny_checkpoint)
    export(found, tmp_path / "out/unet.safetensors")
    weights = load_file(tiny_checkpoint / "unet/diffusion_pytorch_model.safetensors")
    written = load_file(tmp_path / "out/unet.safetensors")
    assert weights.keys() == written.keys()
    assert all(torch.equal(written[key], value) for key, value in weights.items())
    export(found, tmp_path / "folder")
    assert read_checkpoint(tmp_path / "folder").sha256 == found.sha256
    with pytest.raises(BuilderError, match="exists"):
        export(found, tmp_path / "folder")
    with pytest.raises(BuilderError, match="no adapter to fuse"):
        export(found, tmp_path / "fused", fuse=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "out"]


@pytest.fixture
def adapter(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """An adapter of the tiny checkpoint, as training saves one."""
    from builder.models.checkpoint import Checkpoint, save_adapter
    from builder.models.lora import add_lora
    from builder.models.source import base_of

    base = read_checkpoint(tiny_checkpoint)
    unet = load_pipeline(base).unet
    generator = torch.Generator().manual_seed(0)
    for parameter in add_lora(unet, 2, 4.0, targets=["attention", "feed-forward"]):
        parameter.data.normal_(0, 0.2, generator=generator)
    folder = tmp_path / "adapter"
    save_adapter(unet, Checkpoint(folder, method="lora", base=base_of(base, base.reference)))
    return folder


def test_export_of_an_adapter(adapter: Path, tmp_path: Path) -> None:
    found = read_checkpoint(adapter)
    wanted = load_pipeline(found).unet.state_dict()
    export(found, tmp_path / "lora.safetensors")
    assert (tmp_path / "lora.safetensors").read_bytes() == (adapter / "pytorch_lora_weights.safetensors").read_bytes()
    export(found, tmp_path / "copy")
    assert read_checkpoint(tmp_path / "copy").sha256 == found.sha256
    export(found, tmp_path / "unet.safetensors", fuse=True)
    torch.testing.assert_close(load_file(tmp_path / "unet.safetensors"), dict(wanted), rtol=0, atol=0)
    export(found, tmp_path / "fused", fuse=True)
    fused = read_checkpoint(tmp_path / "fused")
    assert fused.method == "full" and fused.base == found.base
    halves = {key: value.half().float() for key, value in wanted.items()}
    torch.testing.assert_close(dict(load_pipeline(fused).unet.state_dict()), halves, rtol=0, atol=0)
    assert "lora" in call("show", str(adapter))


def test_hash_of_an_adapter_is_of_base_and_adapter(adapter: Path) -> None:
    before = read_checkpoint(adapter).sha256
    description = read_document(adapter / "checkpoint.json")
    write_document(adapter / "checkpoint.json", {**description, "base": {**description["base"], "sha256": "0"}})
    assert read_checkpoint(adapter).sha256 != before
    write_document(adapter / "checkpoint.json", description)
    assert read_checkpoint(adapter).sha256 == before
    file = adapter / "pytorch_lora_weights.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert read_checkpoint(adapter).sha256 != before


# -- tensors one at a time --------------------------------------------------------------------------------------------


@given(
    st.lists(
        st.tuples(st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]),
                  st.lists(st.integers(0, 4), max_size=3)),
        min_size=1, max_size=5,
    )
)  # fmt: skip
def test_tensors_are_written_as_safetensors_reads_them(tmp_path_factory, kinds: list[Any]) -> None:
    folder = tmp_path_factory.mktemp("tensors")
    tensors = {f"t{n}": torch.randn(shape).to(kind) for n, (kind, shape) in enumerate(kinds)}
    layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    write_tensors(folder / "x.safetensors", layout, tensors.__getitem__)
    assert all(torch.equal(value, tensors[name]) for name, value in load_file(folder / "x.safetensors").items())
    stored = StoredTensors(folder, "x")
    assert list(stored) == sorted(tensors) and stored.layout == layout
    assert all(torch.equal(stored[name], tensors[name]) for name in stored)


def test_sharded_weights_become_one_file(tiny_checkpoint: Path, tmp_path: Path) -> None:
    pipeline = load_pipeline(tiny_checkpoint)
    pipeline.unet.save_pretrained(tmp_path / "x/unet", max_shard_size="100KB")
    assert len(list((tmp_path / "x/unet").glob("*.safetensors"))) > 1
    export(read_checkpoint(tmp_path / "x"), tmp_path / "unet.safetensors")
    torch.testing.assert_close(load_file(tmp_path / "unet.safetensors"), dict(pipeline.unet.state_dict()))
    shutil.rmtree(tmp_path / "x/unet")
    with pytest.raises(BuilderError, match="diffusion_pytorch_model"):
        export(read_checkpoint(tmp_path / "x"), tmp_path / "again.safetensors")
    assert not list(tmp_path.glob(".tmp-*"))

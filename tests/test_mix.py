"""`builder mix`: the composition that is printed is the one that the loader gives."""

import json
from pathlib import Path

import pytest

from builder.mixing import MixedLoader
from tests.test_mixing import make, make_pair


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pair(tmp_path_factory.mktemp("mix"))


def test_the_table_says_what_an_epoch_draws(pair: Path, builder) -> None:
    done = builder("mix", "--real", "real", "--synthetic", "synth", "--ratio", "0.5", "--batch-size", 8, "--out", pair)
    assert done.code == 0
    lines = [line.split() for line in done.output.splitlines()]
    assert done.output.startswith("epoch 0: 10 steps of 8, 79 samples, synthetic 49.37%; 1 more fill the last step")
    assert lines[1][-5:] == ["most", "often", "I", "P", "R"]
    assert lines[2] == ["real", "real", "40", "40", "1.00", "1", "12", "24", "4"]
    assert lines[3] == ["synth", "synthetic", "27", "39", "1.44", "2", "13", "13", "13"]


def test_json_schedules_counts_and_ranks(pair: Path, builder) -> None:
    words = ["mix", "--real", "real", "--synthetic", "synth", "--out", pair, "--json"]
    done = builder(*words, "--ratio", "0:1,1:0.25", "--epochs", 2, "--world", 2, "--batch-size", 4)
    epochs = json.loads(done.output)["epochs"]
    assert [epoch["sources"][0]["drawn"] for epoch in epochs] == [0, 40]
    loader = MixedLoader("real", "synth", ratio=0.25, batch_size=4, world=2, rank=0, out=str(pair))
    assert epochs[1]["steps"] == len(loader)
    counted = json.loads(builder(*words, "--counts", "6,2").output)["epochs"][0]
    assert counted["batch_size"] == 8
    assert counted["sources"][1]["drawn"] == 13


def test_bench_says_how_fast(pair: Path, builder) -> None:
    words = ["mix", "--real", "real", "--synthetic", "synth", "--out", pair, "--bench", "--batches", 12]
    done = builder(*words, "--workers", 1, "--batch-size", 8)
    assert "samples/s over 96 samples with 1 workers; opened in" in done.output
    speed = json.loads(builder(*words, "--batch-size", 8, "--json").output)["speed"]
    assert speed["samples"] == 96
    assert 0 < speed["index_bytes_per_sample"] <= 100


def test_evaluation_is_shown_too(tmp_path: Path, builder) -> None:
    make(tmp_path, "real", {"I": 9, "P": 11}, splits={"a": "train", "b": "val"})
    done = builder("mix", "--real", "real", "--split", "val", "--out", tmp_path)
    assert done.output.startswith("epoch 0: 1 steps of 32, 9 samples, synthetic 0.00%\n")


@pytest.mark.parametrize(("words", "message"), [
    (["--ratio", "half"], "--ratio is 'half'"),
    (["--ratio", "0:1,x:2"], "--ratio is '0:1,x:2'"),
    (["--counts", "3;1"], "--counts is '3;1'"),
    (["--weights", "a"], "--weights is 'a'"),
    (["--epoch", "half"], "--epoch is 'half'"),
    (["--ratio", "1.5"], "ratio is 1.5"),
    (["--split", "val"], "the val split is never mixed"),
])  # fmt: skip
def test_a_mistake_is_one_message_and_exit_2(pair: Path, builder, words: list[str], message: str) -> None:
    done = builder("mix", "--real", "real", "--synthetic", "synth", "--out", pair, *words)
    assert done.code == 2
    assert message in done.output
    assert "Traceback" not in done.output

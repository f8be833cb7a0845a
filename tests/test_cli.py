"""The commands as a user types them: what they print, and that mistakes end in one message and exit code 2."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from builder.cli import cli
from builder.errors import BuilderError
from builder.phases import HEALING_PHASES
from builder.shards.dataset import Dataset, find_dataset
from builder.shards.storage import Storage
from tests.conftest import Result, textured, write_real

pytestmark = pytest.mark.usefixtures("references_once")

TINY = """
name: tiny
real: clinic
sample: {size: 16, steps: 2, batch_size: 4}
score: {ssim_size: 64, panel: 2}
shards: {images_per_shard: 8}
"""


QUIET_MAIN = """
import sys
sys.argv = {words}
import builder.cli
try:
    builder.cli.main()
except SystemExit as end:
    print("exit", end.code)
"""


@pytest.fixture(scope="module")
def made_once(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> Path:
    root = tmp_path_factory.mktemp("made")
    write_real(root, per_phase=12, size=24)
    (root / "tiny.yaml").write_text(TINY)
    words = ["--config", "tiny.yaml", "--count", "12", "--checkpoint", str(tiny_checkpoint), "--engine", "inline"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        cli.main(["shards", *words], standalone_mode=False)
    return root


@pytest.fixture
def made(builder, tmp_path: Path, made_once: Path) -> Path:
    """A working directory with the real dataset `clinic` and the synthetic `tiny-IPR` of 12 images."""
    shutil.copytree(made_once, tmp_path, dirs_exist_ok=True)
    return tmp_path


def refused(result: Result, *said: str) -> None:
    """One clear message, exit code 2, no traceback."""
    assert result.code == 2, result.output
    assert "Traceback" not in result.output
    assert result.output.count("error:") == 1
    for words in said:
        assert words in result.output


def test_help_answers_without_torch() -> None:
    script = QUIET_MAIN.format(words=["builder", "--help"])
    heavy = "print([m for m in ('torch', 'diffusers', 'transformers', 'pyarrow', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script + heavy], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("[]")
    assert all(name in done.stdout for name in cli.commands)


def test_the_way_from_shards_to_sheet(builder, made: Path) -> None:
    again = builder("shards", "--config", "tiny.yaml", "--count", "12", "--checkpoint", builder_checkpoint(made))
    assert "nothing to do" in again.output
    verified = builder("verify")
    assert verified.code == 0
    assert "12 images in 2 shards" in verified.output
    filtered = builder("filter", "--min-ssim", "-1", "--no-gates")
    assert filtered.code == 0
    assert "wrote dataset 'tiny-IPR-accepted': 12 images" in filtered.output
    assert "real crops" in filtered.output
    assert builder("filter", "--min-ssim", "-1", "--no-gates").output.count("nothing to do") == 1
    refused(builder("filter", "--min-ssim", "0", "--no-gates"), "made with other settings", "--name")
    drawn = builder("sheet", "--by", "ssim", "--against", "clinic")
    assert drawn.code == 0
    assert Image.open(made / "tiny-IPR-sheet.png").width > 300
    listed = builder("list")
    assert all(name in listed.output for name in ("clinic", "tiny-IPR", "tiny-IPR-accepted"))
    replayed = builder("regenerate", "tiny-IPR", "tiny-IPR-I-00000001", "--random", "3", "--save", "again")
    assert replayed.code == 0
    assert "4 of 4 identical" in replayed.output
    assert len(list((made / "again").iterdir())) >= 3
    removed = builder("rm", "tiny-IPR-accepted", "--yes")
    assert removed.code == 0
    refused(builder("verify", "tiny-IPR-accepted"), "no dataset")


def builder_checkpoint(made: Path) -> str:
    return str(Dataset("tiny-IPR", Storage(made)).info["checkpoint"])


def test_filter_and_verify_do_not_import_torch(made: Path) -> None:
    for words in (["verify"], ["filter", "--dry-run", "--where", "phase = 'I'"], ["list"]):
        script = QUIET_MAIN.format(words=["builder", *words])
        done = subprocess.run(
            [sys.executable, "-c", script + "print('torch' in sys.modules)"],
            capture_output=True,
            text=True,
            check=True,
            cwd=made,
        )
        assert done.stdout.strip().endswith("False"), done.stdout
        assert "exit 0" in done.stdout, done.stdout + done.stderr


def test_verify_exits_1_with_a_list_when_a_tar_is_cut(builder, made: Path) -> None:
    tar = made / "shards/tiny-IPR/shard-000001.tar"
    tar.write_bytes(tar.read_bytes()[:5000])
    result = builder("verify")
    assert result.code == 1
    assert "shard-000001.tar" in result.output


def test_a_disagreeing_regeneration_exits_1(builder, made: Path) -> None:
    dataset = find_dataset("tiny-IPR", str(made))
    from builder.shards.writer import write_manifest

    table = dataset.shard_table(0)
    rows = table.to_pylist()
    rows[0]["reserve"] = 1
    write_manifest(
        dataset.storage, "manifests/tiny-IPR/shard-000000.parquet", table.from_pylist(rows, schema=table.schema)
    )
    result = builder("regenerate", "tiny-IPR", rows[0]["key"])
    assert result.code == 1
    assert "differs by at most" in result.output and "0 of 1 identical" in result.output


def test_black_and_flat_images_never_pass_the_gates(builder, made: Path) -> None:
    """Planted through the front door: a folder of images, scored by `builder score`, then filtered."""
    planted = made / "planted"
    for code in HEALING_PHASES.codes:
        (planted / code).mkdir(parents=True)
        for i in range(3):
            real = textured(1000 * ord(code) + i, 24)
            flat = np.broadcast_to(real.reshape(-1, 3).mean(0).astype(np.uint8), real.shape)
            Image.fromarray(np.ascontiguousarray(flat)).save(planted / code / f"flat{i}.png")
            Image.fromarray(np.zeros_like(real)).save(planted / code / f"black{i}.png")
    scored = builder("score", "planted", "--against", "clinic", "--config", "tiny.yaml")
    assert scored.code == 0, scored.output
    result = builder("filter", "planted")
    assert result.code == 1
    assert "no image passes: nothing was written" in result.output


# -- bad input --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--phases", "IXR"], ["unknown phase 'X'", "I (inflammatory)"]),
        (["--count", "0"], ["COUNT is 0"]),
        (["--count", "-3"], ["COUNT is -3"]),
        (["--checkpoint", "nowhere"], ["no checkpoint 'nowhere'"]),
        (["--real", "nobody"], ["no dataset 'nobody'"]),
        (["--config", "demmo"], ["no config 'demmo'"]),
        (["--set", "sample.guidanse=4"], ["unknown key 'sample.guidanse'", "did you mean 'guidance'"]),
        (["--set", "sample.steps=many"], ["sample.steps is 'many'", "a whole number from 1 to 1,000"]),
        (["--set", "sample"], ["has no '='"]),
        (["--weights", "I=0"], ["weights must be positive"]),
        (["--weights", "I=x"], ["is not CODE=NUMBER"]),
        (["--engine", "cluster"], ["unknown engine"]),
        (["--workers", "0"], ["--workers is 0"]),
        (["--name", "a/b"], ["not of [A-Za-z0-9_-]"]),
        (["--name", "a" * 65], ["at most 64 characters"]),
        (["--phases", ","], ["there is no phase in ','"]),
        (["--weights", "I=nan"], ["weights must be positive"]),
        (["--count", "100000000"], ["seeds are there", "--seed"]),
        (["--guidance", "nan"], ["--guidance", "nan is not a finite number"]),
        (["--set", "sample.batch_size=0"], ["sample.batch_size is 0"]),
        (["--set", "shards.images_per_shard=0"], ["shards.images_per_shard is 0"]),
        (["--set", "shards.codec=jpg"], ["shards.codec is 'jpg'"]),
        (["--set", "sample.steps=["], ["is not valid YAML"]),
        (["--config", "wound-type"], ["the config has the classes D, P, S, V", "I, P, R"]),
        (["--size", "17"], ["17"]),
        (["--set", "sample.scheduler=ddimm"], ["ddim"]),
        (["--guidance", "3.5", "--name", "tiny-IPR"], ["guidance: 3.0 there, 3.5 now"]),
    ],
)
def test_bad_input_of_shards(builder, made: Path, words: list[str], said: list[str]) -> None:
    base = [
        "shards",
        "--config",
        "tiny.yaml",
        "--count",
        "12",
        "--checkpoint",
        builder_checkpoint(made),
        "--engine",
        "inline",
    ]
    new = [] if "--name" in words else ["--name", "fresh"]
    refused(builder(*base, *new, *words), *said)
    assert not list(made.glob("shards/fresh/*"))


def test_a_mistake_in_the_settings_can_be_mended_under_the_same_name(builder, made: Path) -> None:
    """Not even the size, which the gates depend on, is held against a run that made no shard."""
    words = ["shards", "--config", "tiny.yaml", "--count", "4", "--name", "fresh", "--engine", "inline"]
    words += ["--checkpoint", builder_checkpoint(made)]
    refused(builder(*words, "--size", "17"), "17")
    result = builder(*words)
    assert result.code == 0, result.output
    assert '"image_size": 16' in (made / "manifests/fresh/reference.json").read_text()


def test_one_damaged_dataset_is_listed_can_be_removed_and_stops_nobody(builder, made: Path) -> None:
    shutil.copytree(made / "manifests/tiny-IPR", made / "manifests/torn")
    for text in ("{", "[1]", "\udcff", '{"classes": [], "state": "complete"}', '{"classes": [{}]}'):
        (made / "manifests/torn/dataset.json").write_bytes(text.encode(errors="surrogateescape"))
        listed = builder("list")
        assert listed.code == 0
        assert "torn" in listed.output and "damaged" in listed.output
        refused(builder("verify", "torn"), "manifests/torn/dataset.json", "builder rm torn")
        assert builder("verify").code == 0
    assert builder("rm", "torn", "--yes").code == 0
    assert not (made / "manifests/torn").exists()


def test_a_filtered_dataset_stands_alone_and_is_no_job_to_continue(builder, made: Path) -> None:
    assert builder("filter", "--min-ssim=-1", "tiny-IPR", "--no-gates").code == 0
    words = ["shards", "--config", "tiny.yaml", "--count", "20", "--checkpoint", builder_checkpoint(made)]
    refused(builder(*words, "--name", "tiny-IPR-accepted", "--engine", "inline"), "no batch job made")
    assert builder("rm", "tiny-IPR", "--yes").code == 0
    again = builder("filter", "tiny-IPR-accepted", "--dry-run")
    assert again.code == 0, again.output
    assert "flat images" in again.output


def test_configs_that_extend_each_other_are_refused(builder, tmp_path: Path) -> None:
    (tmp_path / "one.yaml").write_text("extends: two\n")
    (tmp_path / "two.yaml").write_text("extends: one\n")
    refused(builder("shards", "--count", "1", "--config", "one.yaml"), "extends itself")


def test_a_full_disk_is_one_message_and_leaves_no_partial_shard(builder, made: Path, monkeypatch) -> None:
    """The disk is full from the second shard on: the tar, the log, everything."""
    real_fsync = os.fsync
    room = iter(range(2 * 2 + 2 * 3))  # two fsyncs a file: dataset.json, reference.json; tar and manifest; then half

    def fsync(handle: int) -> None:
        if next(room, None) is None:
            raise OSError(28, "No space left on device")
        real_fsync(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    words = ["--config", "tiny.yaml", "--count", "24", "--checkpoint", builder_checkpoint(made), "--engine", "inline"]
    refused(builder("shards", *words, "--name", "full"), "shard 1 of 'full' cannot be written", "No space left")
    monkeypatch.setattr(os, "fsync", real_fsync)
    assert Dataset("full", Storage(made)).shard_numbers() == [0]
    assert builder("verify", "full", "--partial").code == 0
    assert builder("shards", *words, "--name", "full").code == 0


def test_phases_are_written_either_way(builder, made: Path) -> None:
    for written in ("I,P,R", "IPR", "R P I"):
        result = builder(
            "shards",
            "--config",
            "tiny.yaml",
            "--count",
            "12",
            "--phases",
            written,
            "--checkpoint",
            builder_checkpoint(made),
        )
        assert result.code == 0, result.output
        assert "tiny-IPR" in result.output


def test_weights_of_another_shape_are_refused_with_the_layer(builder, made: Path, tiny_checkpoint: Path) -> None:
    from safetensors.torch import load_file, save_file

    broken = made / "broken"
    shutil.copytree(tiny_checkpoint, broken)
    path = broken / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights["conv_in.weight"] = weights["conv_in.weight"][:, :2].contiguous()
    save_file(weights, path)
    (broken / "checkpoint.json").unlink()  # as from elsewhere: its record of the files would speak first
    refused(
        builder(
            "shards",
            "--config",
            "tiny.yaml",
            "--count",
            "4",
            "--name",
            "fresh",
            "--checkpoint",
            broken,
            "--engine",
            "inline",
            "--allow-leak",
            "a test",
        ),
        "conv_in.weight",
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["filter", "--min-sssim", "0.7"], ["did you mean '--min-ssim'"]),
        (["filter", "--minimum-ssim", "0.7"], ["no such option"]),
        (["filter", "--min-ssim"], ["requires an argument"]),
        (["filter", "--max-ssim", "inf"], ["needs a number"]),
        (["filter", "--min-ssim", "0.7", "tiny-IPQ"], ["did you mean 'tiny-IPR'"]),
        (["filter", "--no-gates", "--name", "tiny-IPR"], ["cannot be 'tiny-IPR' itself", "--name"]),
        (["filter", "--where", "nope ="], ["no condition over the manifest"]),
        (["filter", "clinic"], ["never scored", "builder score clinic"]),
        (["verify", "tiny-IPQ"], ["did you mean 'tiny-IPR'"]),
        (["regenerate", "tiny-IPR"], ["no key is given"]),
        (["regenerate", "tiny-IPR", "unknown"], ["no image 'unknown'"]),
        (["rm", "nothing"], ["no dataset 'nothing'"]),
        (["sheet", "--by", "beauty"], ["beauty"]),
        (["score", "tiny-IPR", "--against", "tiny-IPQ"], ["no dataset"]),
        (["pack", "nowhere", "--name", "x"], ["nowhere"]),
    ],
)
def test_bad_input_of_the_other_commands(builder, made: Path, words: list[str], said: list[str]) -> None:
    refused(builder(*words), *said)


def test_nothing_to_work_on(builder) -> None:
    refused(builder("verify"), "no complete synthetic dataset")
    assert "no datasets" in builder("list").output


def test_pack_from_photographs_to_summary(builder, tmp_path: Path) -> None:
    for code in "IPR":
        (tmp_path / "photos" / code).mkdir(parents=True)
        for patient in range(4):
            picture = Image.fromarray(textured(10 * ord(code) + patient, 96))
            picture.save(tmp_path / "photos" / code / f"p{patient}-{code}.png")
    with open(tmp_path / "boxes.csv", "w") as file:
        file.write("file,xmin,ymin,xmax,ymax,patient\n")
        for code in "IPR":
            file.writelines(f"p{patient}-{code}.png,20,20,60,70,{patient}{code}\n" for patient in range(4))
    result = builder("pack", "photos", "--boxes", "boxes.csv", "--name", "mine")
    assert result.code == 0, result.output
    assert "12 crops" in result.output
    verified = builder("verify", "mine")
    assert verified.code == 0, verified.output
    os.truncate(tmp_path / "photos/I/p1-I.png", 300)
    refused(builder("pack", "photos", "--boxes", "boxes.csv", "--name", "other"), "p1-I.png", "--skip-bad")


def test_a_builder_error_survives_the_way_between_processes() -> None:
    import pickle

    error = pickle.loads(pickle.dumps(BuilderError("what", "remedy")))
    assert (error.what, error.remedy) == ("what", "remedy")


TRAINED = """
extends: tiny
name: trained
model:
  architecture: {architecture}
train:
  size: 16
  steps: 4
  batch_size: 4
  warmup_steps: 1
  checkpoint_every: 2
  vae: {{steps: 2, batch_size: 4, guided_steps: 2}}
"""


def test_train_then_shards_from_what_was_trained(builder, made: Path) -> None:
    import json

    from tests.test_models import ARCHITECTURE

    (made / "trained.yaml").write_text(TRAINED.format(architecture=json.dumps(ARCHITECTURE)))
    trained = builder("train", "--config", "trained.yaml")
    assert trained.code == 0, trained.output
    assert "checkpoints/trained/step-000004" in trained.output
    assert (made / "checkpoints/trained/loss.png").is_file()
    result = builder(
        "shards", "--config", "trained.yaml", "--count", "6", "--checkpoint", "trained", "--engine", "inline"
    )
    assert result.code == 0, result.output
    info = find_dataset("trained-IPR", str(made)).info
    assert info["lineage"]["known"]
    trained_on = {
        row["patient"] for row in find_dataset("clinic", str(made)).table().to_pylist() if row["split"] == "train"
    }
    assert set(info["lineage"]["patients"]) == trained_on


def test_demo_photographs_are_what_a_user_of_pack_has(builder, tmp_path: Path) -> None:
    rendered = builder("demo", "photographs", "clinic", "--patients", "5", "--workers", "1")
    assert rendered.code == 0, rendered.output
    packed = builder(
        "pack", "clinic/photographs", "--boxes", "clinic/boxes.csv", "--labels", "clinic/labels.csv", "--name", "c"
    )
    assert packed.code == 0, packed.output
    rows = find_dataset("c", str(tmp_path)).table().to_pylist()
    assert {row["phase"] for row in rows} == set("IPR")
    assert len({row["patient"] for row in rows}) == 5


def test_sigterm_ends_a_command_with_143_and_says_that_nothing_is_lost() -> None:
    code = (
        "import os, signal, sys, time, click, builder.cli as it; "
        "wait = lambda: [os.kill(os.getpid(), signal.SIGTERM), time.sleep(20)]; "
        "it.cli.add_command(click.Command('wait', callback=wait)); sys.argv = ['builder', 'wait']; it.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (143, "")
    assert done.stderr.strip() == "interrupted: what was committed is safe, and the same command continues"

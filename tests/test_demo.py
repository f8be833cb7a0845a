"""The checkpoint that ships with the package, and the main job on it: a newcomer's first command, in small."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from builder.config import load_config
from builder.demo.phantom_dataset import KEY, ensure_phantom
from builder.identity import PatientKey
from builder.mixing import MixedLoader
from builder.models.checkpoint import DEMO, resolve
from builder.phases import HEALING_PHASES
from builder.shards.dataset import Dataset, find_dataset
from builder.shards.storage import Storage
from builder.shards.verify import verify_dataset

COUNT = 24


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output root with a small phantom and the first images of the demo job."""
    from builder.job.plan import Plan
    from builder.job.run import run_job
    from builder.job.spec import JobSpec
    from builder.quality import build

    root = tmp_path_factory.mktemp("demo")
    ensure_phantom(str(root), patients=9, workers=1)
    config = load_config("demo")
    checkpoint = resolve("demo")
    spec = JobSpec(
        config=config, plan=Plan.of("IPR"), name="demo-IPR", out=str(root), checkpoint=str(checkpoint.path),
        checkpoint_sha256=checkpoint.sha256, dtype="float32", real="phantom", real_out=str(root),
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "HELD_OUT_CROPS", 12)  # yardsticks are for the eye of who filters; they cost a third
        patch.setattr(build, "SPOILT_CROPS", 4)
        run_job(spec, COUNT, lineage=vars(checkpoint.lineage), licence=checkpoint.licence, engine="inline")
    return root


def test_the_checkpoint_is_small_described_and_of_known_lineage() -> None:
    checkpoint = resolve("demo")
    weights = sum(path.stat().st_size for path in DEMO.rglob("*.safetensors"))
    assert weights <= 20e6
    assert checkpoint.classes == HEALING_PHASES
    assert checkpoint.prompts == {phase.code: phase.prompt for phase in HEALING_PHASES}
    assert checkpoint.lineage.known
    assert checkpoint.lineage.key_fingerprint == PatientKey(KEY, "test").fingerprint
    assert len(checkpoint.lineage.patients) == 155


def test_its_patients_are_the_phantoms_training_patients(job: Path) -> None:
    """Patient k is the same in a phantom of any size; a small phantom only splits otherwise."""
    rows = find_dataset("phantom", str(job)).table(["patient"])["patient"].to_pylist()
    assert len(set(rows) & set(resolve("demo").lineage.patients)) >= 5


def test_the_job_gives_whole_scored_wounds_of_three_phases(job: Path) -> None:
    dataset = Dataset("demo-IPR", Storage(job))
    assert verify_dataset(dataset) == []
    redness = {code: [] for code in "IPR"}
    for row, pixels in dataset.images():
        assert pixels.shape == (64, 64, 3)
        assert row["reserve"] == 0
        assert row["ssim"] > row["ssim_mean"] > 0
        centre = pixels[20:44, 20:44].astype(float)
        skin = np.concatenate([pixels[:6].reshape(-1, 3), pixels[-6:].reshape(-1, 3)]).astype(float)
        redness[row["phase"]].append((centre[..., 0] - centre[..., 1]).mean() - (skin[:, 0] - skin[:, 1]).mean())
    means = {code: np.mean(values) for code, values in redness.items()}
    assert means["P"] > means["R"] + 15  # granulation is red, epithelium pale
    assert means["P"] > means["I"] + 15  # slough and necrosis are not red either


def test_most_of_it_passes_the_gates(job: Path) -> None:
    from builder.quality.gates import gate_ranges
    from builder.quality.reference import load_reference
    from builder.shards.criteria import Criteria
    from builder.shards.filter import judge_dataset

    dataset = Dataset("demo-IPR", Storage(job))
    criteria = Criteria(gates=tuple(gate_ranges(load_reference(dataset).gates)))
    assert judge_dataset(dataset, criteria).accepted.sum() >= 0.8 * COUNT


def test_a_small_phantoms_held_out_patients_may_have_trained_the_checkpoint_and_that_is_refused(job: Path) -> None:
    """Of 9 patients other ones are held out than of 233: the loader notices that the checkpoint has seen some."""
    from builder.errors import BuilderError

    with pytest.raises(BuilderError, match="trained on"):
        MixedLoader("phantom", "demo-IPR", ratio=0.5, batch_size=8, size=64, out=str(job))
    with pytest.warns(UserWarning, match="a test of the loader"):
        loader = MixedLoader(
            "phantom", "demo-IPR", ratio=0.5, batch_size=8, size=64, out=str(job), allow_leak="a test of the loader"
        )
    images, labels, origin = next(iter(loader))
    assert images.shape == (8, 3, 64, 64)
    assert int(origin.sum()) == 4
    assert len(labels) == 8

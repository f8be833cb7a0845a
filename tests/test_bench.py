"""Timings, estimates, the doctor: each figure against what it is made of, each finding with and without its cause."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from builder.bench import findings, trial
from builder.bench.batch import Trial, proposed, try_sizes
from builder.bench.estimate import Forecast, bytes_per_image, newest_filtered, probe
from builder.bench.flops import Cost, cost_of, matrix_peak
from builder.bench.generate import JobTime, Round, spread
from builder.bench.plain import Loop, PlainLoop
from builder.bench.stages import IDLE, STAGES, Clock, measure_unit
from builder.config import Config, SampleConfig
from builder.job.plan import Unit
from builder.job.spec import JobSpec
from builder.job.worker import Worker
from builder.models import architectures
from builder.models.checkpoint import read_checkpoint
from builder.models.families import family_named
from builder.quality.reference import load_reference
from builder.shards.dataset import Dataset
from tests.conftest import Result, write_real
from tests.test_job import CONFIG, run, spec_of
from tests.test_sampling import ARCHITECTURE, PROMPTS, REQUESTS, SIZE, tiny_pipeline, tiny_sampler
from tests.test_sampling import CONFIG as SAMPLE
from tests.test_throughput import starve

TINY = ["--set", "sample.size=16", "--set", "sample.steps=2", "--set", "sample.batch_size=4",
        "--set", "score.ssim_size=64", "--set", "score.panel=2"]  # fmt: skip


pytestmark = pytest.mark.usefixtures("one_thread", "references_once")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> JobSpec:
    """A root with the real dataset 'clinic' and the synthetic one 'tiny-IPR', 8 images."""
    root = tmp_path_factory.mktemp("root")
    write_real(root, per_phase=12, size=24)
    spec = spec_of(root, root, tiny_checkpoint)
    run(spec, 8)
    return spec


# -- FLOPs -----------------------------------------------------------------------------------------------------------


def test_flops_of_sdxl_are_the_published_ones() -> None:
    family = family_named("sdxl")
    with torch.device("meta"):
        pipeline = family.build(architectures.SDXL, 512, 0)
    cost = cost_of(pipeline.unet, pipeline.vae, 512, passes=50)
    assert cost.denoise == pytest.approx(1.589e12, rel=1e-3) and cost.decode == pytest.approx(2.5145e12, rel=1e-3)
    assert cost.image == 50 * cost.denoise + cost.decode


def test_flops_counted_without_computing_are_those_of_what_is_computed() -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    pipeline = tiny_pipeline()
    cost = cost_of(pipeline.unet, pipeline.vae, SIZE, passes=8)
    latents, added = torch.randn(2, 4, 16, 16), {"text_embeds": torch.randn(2, 32), "time_ids": torch.randn(2, 6)}
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):  # the CPU's own kernel of attention is not counted
        with FlopCounterMode(display=False) as counted:
            pipeline.unet(latents, 1, encoder_hidden_states=torch.randn(2, 77, 64), added_cond_kwargs=added)
        assert counted.get_total_flops() == 2 * cost.denoise
        with FlopCounterMode(display=False) as counted:
            pipeline.vae.decode(latents)
        assert counted.get_total_flops() == 2 * cost.decode


def test_the_peak_is_that_of_a_product() -> None:
    assert 1e7 < matrix_peak("cpu", torch.float32, side=64) < 1e13


# -- stages ----------------------------------------------------------------------------------------------------------


def test_a_clock_adds_up_over_threads_and_errors() -> None:
    from concurrent.futures import ThreadPoolExecutor

    clock = Clock()

    def work(fail: bool) -> None:
        if fail:
            raise ZeroDivisionError

    timed = clock.timed("work", work)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(timed, [False] * 20))
    before = clock.wall["work"]
    with pytest.raises(ZeroDivisionError):
        timed(True)
    assert clock.wall["work"] > before > 0 and clock.cpu["work"] >= 0


@pytest.mark.parametrize("overlap", [False, True])
def test_the_stages_of_a_unit_make_up_its_time(made: JobSpec, tmp_path: Path, overlap: bool) -> None:
    from builder.job import worker as job
    from builder.quality.reference import save_reference
    from builder.shards.storage import Storage

    spec = dataclasses.replace(made, out=str(tmp_path), name="timed")
    save_reference(Dataset("timed", Storage(tmp_path)), load_reference(Dataset(made.name, Storage(made.out))))
    worker, write = Worker(spec, "cpu", overlap), job.write_shard
    stages = measure_unit(worker, Unit(0, 0, 6))
    assert worker.dataset.shard_numbers() == [0] and job.write_shard is write and "score" not in vars(worker.scorer)
    assert stages.images == 6 and stages.replaced == 0
    assert all(stages.wall[stage] > 0 for stage in STAGES) and stages.wall[IDLE] >= 0
    assert sum(stages.wall[part] for part in stages.parts) <= stages.wall["score"]
    if not overlap:
        assert sum(stages.wall[stage] for stage in (*STAGES, IDLE)) == pytest.approx(stages.seconds)
    table = stages.table()
    assert [row[0] for row in table][:3] == ["denoise", "decode", "score"] and table[-1][3] == "100.0%"


# -- the plain loop --------------------------------------------------------------------------------------------------


def test_the_plain_loop_draws_saves_and_compares_each_image(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    panels = {code: [rng.integers(0, 255, (20, 20, 3), np.uint8) for _ in range(2)] for code in PROMPTS}
    plain = PlainLoop(tiny_pipeline(), SAMPLE, PROMPTS, panels, size=32)
    calls: list[tuple[str, float | None]] = []
    compared = plain._compared
    plain._compared = lambda pixels, code: calls.append((code, compared(pixels, code)))  # type: ignore[method-assign]
    loop = plain.run(["I", "P", "I"], steps=2, batch=2, folder=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.png", "1.png", "2.png"]
    assert [code for code, _ in calls] == ["I", "P", "I"] and all(-1 <= (value or 0) < 1 for _, value in calls)
    assert loop.images == 3 and loop.draw > 0 and loop.save > 0 and loop.compare > 0
    own = panels["I"][0]
    assert compared(own, "I") == pytest.approx(1.0, abs=1e-4)  # of a panel's own crop


def test_ratios_and_their_spread() -> None:
    same, old = Loop(2, draw=3.0, save=1.0, compare=4.0), Loop(1, draw=20.0, save=0.0, compare=2.0)
    one, both = JobTime(100, 25.0, 80, 20.0), JobTime(100, 15.0, 80, 10.0)
    first = Round(same, old, one, both)
    assert list(first.ratios.values()) == pytest.approx([32, 16, 176, 160, 2, 25 / 15])
    slower = dataclasses.replace(first, all=JobTime(100, 25.0, 80, 20.0))
    found = spread([first, slower, slower])
    assert found[0][1:] == (16, 16, 32) and found[4][1:] == (1, 1, 2)


def test_bench_generate_measures_the_job_and_says_what_it_missed(
    made: JobSpec, builder: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builder.bench.generate.cores", lambda: 1)  # threads that others preempt wait for each other
    result = builder(
        "bench", "generate", "--config", "demo", *TINY, "--checkpoint", made.checkpoint, "--real", "clinic",
        "--reference", made.name, "--out", made.out, "--units", 1, "--images-per-unit", 8, "--repeats", 1,
        "--plain-images", 1, "--old-images", 1, "--workers", 1, "--json", tmp_path / "bench.json",
    )  # fmt: skip
    assert result.code == 0, result.output
    figures = json.loads((tmp_path / "bench.json").read_text())
    assert set(STAGES) < set(figures["stages"]) and figures["utilisation"] > 0
    assert set(figures["ratios"]["job / plain loop, same steps"]) == {"median", "least", "largest"}
    assert "repeat 1 of 1" in result.output and "of the measured peak" in result.output
    refused = builder("bench", "generate", "--reference", made.name, "--out", made.out, "--real", "clinic",
                      "--checkpoint", made.checkpoint)  # fmt: skip
    assert refused.code == 2 and "for images of 16 px, not 64" in refused.output


def test_a_full_size_model_is_drawn_from_beside_the_plain_pipeline(
    builder: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from builder.models.families import FAMILIES

    small = dataclasses.replace(FAMILIES["sdxl"], architecture=ARCHITECTURE)  # what full size takes is a GPU
    monkeypatch.setitem(FAMILIES, "sdxl", small)
    command = ("bench", "generate", "--architecture", "sdxl", "--set", "sample.size=32", "--set", "sample.steps=1")
    result = builder(*command, "--batch-sizes", "1,2", "--json", "sdxl.json")
    assert result.code == 0, result.output
    figures = json.loads((tmp_path / "sdxl.json").read_text())
    assert [each["batch_size"] for each in figures["trials"]] == [1, 2] and figures["plain"] > 0
    assert "times the plain pipeline" in result.output
    assert "growing numbers" in builder(*command, "--batch-sizes", "4,2").output


# -- batch size ------------------------------------------------------------------------------------------------------


class TestBatchSize:
    def test_sizes_grow_until_memory_runs_out(self, monkeypatch: pytest.MonkeyPatch) -> None:
        starve(monkeypatch, 4)
        said: list[Trial] = []
        trials = try_sizes(tiny_sampler(), "IP", Cost(1e6, 1e6, 8), 1e9, repeats=1, on_trial=said.append)
        assert [(each.batch_size, each.fits) for each in trials] == [(1, True), (2, True), (4, True), (8, False)]
        assert said == trials
        best = trials[1]
        assert best.utilisation > 0
        assert "does not fit" in str(trials[-1]) and "images/s" in str(best)

    def test_the_smallest_that_is_as_good_is_proposed(self) -> None:
        trials = [Trial(1, 1.0, 0.1, None), Trial(2, 1.96, 0.2, None), Trial(4, 2.0, 0.2, None)]
        assert proposed([*trials, Trial(8, 0.0, 0.0, None, fits=False)]) == trials[1]
        assert proposed([Trial(1, 0.0, 0.0, None, fits=False)]) is None


# -- estimate --------------------------------------------------------------------------------------------------------


class TestEstimate:
    def test_hours_and_gigabytes(self) -> None:
        forecast = Forecast(1_000_000, rate=5.0, devices=8, bytes_per_image=550_000)
        assert forecast.hours == pytest.approx(1e6 / 40 / 3600) and forecast.device_hours == pytest.approx(1e6 / 18000)
        assert forecast.gigabytes == pytest.approx(550)

    def test_a_probe_draws_whole_batches(self) -> None:
        drawn = probe(tiny_sampler(), REQUESTS)
        assert drawn.rate > 0 and drawn.payload > 100

    def test_size_and_share_of_a_former_dataset(self, made: JobSpec, builder: Callable[..., Result]) -> None:
        from builder.shards.storage import Storage

        dataset = Dataset(made.name, Storage(made.out))
        payload = bytes_per_image(dataset) - 4096
        assert payload == pytest.approx(np.mean(dataset.table()["size"].to_pylist()))
        assert newest_filtered(dataset) is None
        result = builder("filter", made.name, "--out", made.out, "--no-gates", "--where", '"index" < 1')
        assert result.code == 0, result.output
        accepted = Dataset(f"{made.name}-accepted", dataset.storage)
        assert newest_filtered(dataset) == newest_filtered(accepted) == accepted
        common = ("estimate", "--config", "demo", *TINY, "--checkpoint", made.checkpoint, "--out", made.out)
        result = builder(*common, "--count", 600, "--from", made.name, "--probe-images", 4, "--devices", 3)
        assert result.code == 0, result.output
        assert "accepted: I 33.3%, P 33.3%, R 50.0%; 600 accepted ones take COUNT=1,799; up to" in result.output
        assert re.search(r"scored in \d+ ms an image: \d+\.\d\d images/s a worker", result.output)
        assert re.search(r"1,799 images of 16 px on 3 devices at .* device-hours", result.output)
        (Path(made.out) / "manifests" / f"{made.name}-accepted" / "dataset.json").unlink()

    def test_of_a_published_model_from_its_flops(self, builder: Callable[..., Result]) -> None:
        result = builder(
            "estimate", "--count", 1_000_000, "--config", "sdxl-full", "--flops", "--architecture", "sdxl",
            "--peak-tflops", 800, "--devices", 8,
        )  # fmt: skip
        assert result.code == 0, result.output
        assert "50 passes of 1.589 TFLOP and a decoding of 2.515 are 81.95 TFLOP an image" in result.output
        assert "on 8 devices at 4.88 images/s each: 7.1 hours, 56.91 device-hours" in result.output

    def test_options_that_mean_nothing_alone_are_refused(self, builder: Callable[..., Result]) -> None:
        result = builder("estimate", "--count", 10, "--peak-tflops", 800)
        assert result.code == 2 and "add --flops" in result.output

    def test_a_batch_size_is_proposed(
        self, made: JobSpec, builder: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        starve(monkeypatch, 4)
        result = builder("estimate", "--config", "demo", *TINY, "--checkpoint", made.checkpoint, "--out", made.out,
                         "--count", 8, "--probe-images", 4, "--probe-batch")  # fmt: skip
        assert result.code == 0, result.output
        assert "batch 8: does not fit" in result.output and "proposed: --set sample.batch_size=" in result.output


# -- doctor: findings ------------------------------------------------------------------------------------------------


class TestFindings:
    def test_torch_build(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        driver = tmp_path / "version"
        assert findings.torch_build(driver).fine
        driver.write_text("NVRM")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(torch.version, "cuda", None)
        assert "install the CUDA build" in findings.torch_build(driver).remedy
        monkeypatch.setattr(torch.version, "cuda", "12.8")
        assert "CUDA_VISIBLE_DEVICES" in findings.torch_build(driver).remedy
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        assert findings.torch_build(driver).fine

    def test_devices(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert findings.devices().fine
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        card = SimpleNamespace(name="H100", total_memory=80e9)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: card)
        assert findings.devices().what == "2 GPUs: H100 (80 GB), H100 (80 GB)"

    def test_precision(self, monkeypatch: pytest.MonkeyPatch) -> None:
        half = Config(sample=SampleConfig(dtype="float16"))
        assert findings.precision(Config(), "cpu").fine and not findings.precision(half, "cpu").fine
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "T4")
        for supported in (True, False):
            monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: supported)  # noqa: B023
            assert findings.precision(Config(), "cuda:0").fine == supported
        assert findings.precision(half, "cuda:0").fine

    def test_memory(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        assert findings.memory(10**9, 2, "cpu", available=3 * 10**9).fine
        small = findings.memory(10**9, 8, "cpu", available=3 * 10**9)
        assert "take --workers 3" in small.remedy and "8.0 GB for the weights of 8 workers" in small.what
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5 * 10**9, 80 * 10**9))
        assert findings.memory(10**9, 1, "cuda:0", available=10**10).fine
        assert "free the GPU" in findings.memory(6 * 10**9, 1, "cuda:0", available=10**10).remedy
        table = tmp_path / "meminfo"
        table.write_text("MemTotal: 9 kB\nMemAvailable:    2048 kB\n")
        assert findings.host_memory(table) == 2 * 2**20
        assert findings.host_memory(tmp_path / "none") is None

    def test_disk(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        out = str(tmp_path / "not" / "yet")
        assert findings.disk(out, 1000, 64).fine
        assert "make room" in findings.disk(out, 1000, 512, free=10**8).remedy
        assert findings.disk("memory://bucket", 1000, 64).fine
        monkeypatch.setattr(os, "access", lambda path, mode: False)
        assert "permissions" in findings.disk(out, 1000, 64).remedy

    def test_caches(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
        monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "torch"))
        assert "nothing was downloaded" in findings.caches().what
        (tmp_path / "hub").mkdir()
        (tmp_path / "hub" / "weights").write_bytes(b"0" * 100)
        assert str(tmp_path / "hub") in findings.caches().what

    def test_checkpoint(self, tiny_checkpoint: Path, tmp_path: Path) -> None:
        import shutil

        from builder.phases import ClassTable, Phase

        finding, found = findings.checkpoint(str(tiny_checkpoint), "", Config())
        assert finding.fine and found is not None and findings.loads(found).fine
        missing, nothing = findings.checkpoint(str(tmp_path / "nowhere"), "", Config())
        assert not missing.fine and nothing is None and "there is no checkpoint" in missing.what
        others = Config(classes=ClassTable([Phase("X", "x", "an x")]))
        assert not findings.checkpoint(str(tiny_checkpoint), "", others)[0].fine
        broken = tmp_path / "broken"
        shutil.copytree(tiny_checkpoint, broken)
        next((broken / "unet").glob("*.safetensors")).unlink()
        lacking = findings.loads(read_checkpoint(broken))
        assert not lacking.fine and "diffusion_pytorch_model.safetensors is missing" in lacking.what


# -- doctor: the old guide's criteria --------------------------------------------------------------------------------

GATES: dict[str, dict[str, list[float | None]]] = {
    "I": {"sharpness": [0.2, 0.8], "realism": [0.5, None]},
    "P": {"sharpness": [0.2, 0.8]},
}
SOUND = {"phase": "I", "seconds": 2.0, "micro_batch": None, "sharpness": 0.5, "realism": 0.9}


def rows(**changes: Any) -> list[dict[str, Any]]:
    return [SOUND | changes, SOUND, SOUND | {"phase": "P"}]


class TestCriteria:
    def test_every_phase(self) -> None:
        assert trial.every_phase(rows(), "IP").fine
        assert "no image of R" in trial.every_phase(rows(), "IPR").remedy

    def test_seconds_an_image(self) -> None:
        assert trial.fast_enough(rows(), 8, "cpu").fine
        slow = [SOUND | {"seconds": 11.0}] * 3
        assert "draw on a GPU" in trial.fast_enough(slow, 8, "cpu").remedy
        assert "--probe-batch" in trial.fast_enough(slow, 8, "cuda:0").remedy

    def test_flat_and_stock_like_images(self) -> None:
        assert trial.not_flat(rows(), GATES).fine and trial.not_stock(rows(), GATES).fine
        assert trial.not_flat(rows(sharpness=0.1), GATES).fine  # half of the phase passes
        flat = [*rows(sharpness=0.1), SOUND | {"sharpness": None}]
        assert trial.not_flat(flat, GATES).remedy.startswith("I: ") and trial.not_stock(flat, GATES).fine
        stock = [*rows(realism=0.1), SOUND | {"realism": 0.1}]
        assert "pretraining" in trial.not_stock(stock, GATES).remedy and trial.not_flat(stock, GATES).fine
        assert "not judged" in trial.not_stock(rows(), {"P": GATES["P"]}).what

    def test_out_of_memory(self) -> None:
        assert trial.enough_memory(rows(), 2 * 10**9).what == "none; 2.00 GB at most"
        halved = trial.enough_memory(rows(micro_batch=4), None)
        assert "1 of 3 images were drawn in parts of 4" in halved.what and "batch_size to 4" in halved.remedy
        assert (trial.peak_memory("cpu") or 0) > 10**7


class TestDoctor:
    def command(self, made: JobSpec, *more: Any) -> list[Any]:
        return ["doctor", "--config", "demo", *TINY, "--checkpoint", made.checkpoint, "--real", "clinic",
                "--reference", made.name, "--out", made.out, "--count", 100, *more]  # fmt: skip

    def test_without_a_trial_all_is_fine_here(self, made: JobSpec, builder: Callable[..., Result]) -> None:
        result = builder(*self.command(made))
        assert result.code == 0 and result.output.endswith("all fine\n"), result.output
        for name in ("torch", "devices", "dtype", "caches", "disk", "checkpoint", "memory", "loads"):
            assert f"ok      {name}: " in result.output

    def test_a_missing_checkpoint_is_one_finding_with_its_remedy(self, builder: Callable[..., Result]) -> None:
        result = builder("doctor", "--checkpoint", "nowhere", "--quick")
        assert result.code == 1 and result.output.endswith("1 findings\n")
        assert (
            "FINDING checkpoint: there is no checkpoint 'nowhere'" in result.output and "        -> " in result.output
        )

    def test_the_full_trial_finds_that_a_random_model_draws_no_wounds(
        self, made: JobSpec, builder: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(trial, "FULL", 3)
        result = builder(*self.command(made, "--full"))
        assert result.code == 1, result.output
        assert "ok      draws: 9 images drawn, scored, written and read back" in result.output
        assert "ok      phases: images: I 3, P 3, R 3" in result.output
        assert "ok      out of memory: none" in result.output and "ok      verify: 9 images" in result.output
        assert "FINDING not flat" in result.output

    def test_filter_and_mixing_take_what_passes(self, made: JobSpec, tmp_path: Path) -> None:
        from builder.shards.storage import Storage

        reference = load_reference(Dataset(made.name, Storage(made.out)))
        wide = {code: {"sharpness": [0.0, 1.0]} for code in reference.gates}
        reference = dataclasses.replace(reference, gates=wide)  # type: ignore[arg-type]
        spec = trial.placed(made, tmp_path)
        drawn, finding = trial.draw(spec, reference, 2, "cpu")
        assert finding.fine and len(drawn) == 6
        lineage = dataclasses.asdict(read_checkpoint(Path(spec.checkpoint)).lineage)
        found = {each.name: each for each in trial.goes_on(spec, reference, lineage)}
        assert found["filter"].what == "6 of 6 images pass the gates"
        assert found["verify"].fine and "4 synthetic" in found["mixing"].what

    def test_an_error_while_drawing_is_a_finding(
        self, made: JobSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from builder.shards.storage import Storage

        starve(monkeypatch, 0)
        reference = load_reference(Dataset(made.name, Storage(made.out)))
        drawn, finding = trial.draw(trial.placed(made, tmp_path), reference, 1, "cpu")
        assert drawn == [] and not finding.fine and "too small for 1 image" in finding.what


def test_the_tiny_job_is_the_one_meant() -> None:
    """What the command lines above say is CONFIG."""
    from builder.config import load_config

    config = load_config("demo", TINY[1::2])
    assert (config.sample, config.score) == (
        dataclasses.replace(CONFIG.sample, guidance=config.sample.guidance), CONFIG.score
    )  # fmt: skip

"""What makes the job fast leaves its bits alone, or is recorded: intervals, micro-batches, compilation, overlap."""

from __future__ import annotations

import dataclasses
import gc
import logging
import shutil
import threading
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from builder.arithmetic import convolutions
from builder.config import Config, SampleConfig, config_from_json, load_config
from builder.errors import BuilderError
from builder.job import worker as worker_module
from builder.job.plan import Unit
from builder.job.regenerate import Regenerator
from builder.job.spec import JobSpec
from builder.job.worker import Worker
from builder.models.checkpoint import read_checkpoint
from builder.sampling.guidance import evaluations, guided_steps, noise_levels
from builder.sampling.sampler import Sampler, load_sampler
from builder.sampling.schedulers import SCHEDULERS, make_scheduler
from builder.shards.verify import verify_dataset
from tests.conftest import Result
from tests.test_job import CONFIG, pixels, run, spec_of, tars
from tests.test_sampling import CONFIG as SAMPLE
from tests.test_sampling import REQUESTS, tiny_pipeline, tiny_sampler

EVERYTHING = [0.0, 1000.0]


pytestmark = pytest.mark.usefixtures("one_thread", "references_once")


@pytest.fixture
def spec(tmp_path: Path, real_root: Path, tiny_checkpoint: Path) -> JobSpec:
    return spec_of(tmp_path / "out", real_root, tiny_checkpoint)


def denoised(sampler: Sampler, precise: bool = False, **changes: Any) -> tuple[np.ndarray, list[int]]:
    """The pixels of REQUESTS, and how many images the denoiser saw at each of its calls."""
    seen: list[int] = []
    hook = sampler._unet.register_forward_pre_hook(lambda module, given: seen.append(len(given[0])))
    drawn = sampler.generate(REQUESTS, precise, **changes).pixels
    hook.remove()
    return drawn, seen


class TestGuidanceInterval:
    def drawn(self, **changes: Any) -> tuple[np.ndarray, list[int]]:
        return denoised(tiny_sampler(dataclasses.replace(SAMPLE, **changes)))

    @pytest.mark.parametrize("scheduler", SCHEDULERS)
    def test_everything_is_full_guidance_and_nothing_is_none(self, scheduler: str) -> None:
        full, seen = self.drawn(scheduler=scheduler)
        assert set(seen) == {6}
        assert np.array_equal(self.drawn(scheduler=scheduler, guidance_interval=EVERYTHING)[0], full)
        plain, halves = self.drawn(scheduler=scheduler, guidance=1.0)
        assert set(halves) == {3} and not np.array_equal(plain, full)
        nowhere, halves = self.drawn(scheduler=scheduler, guidance_interval=[500.0, 1000.0])
        assert set(halves) == {3} and np.array_equal(nowhere, plain)

    @pytest.mark.parametrize("scheduler", SCHEDULERS)
    def test_the_batch_is_halved_at_every_step_outside(self, scheduler: str) -> None:
        """The levels are those of the noise in the latents; the denoiser sees no image more than is counted."""
        config = dataclasses.replace(SAMPLE, scheduler=scheduler, steps=6)
        solver = make_scheduler(scheduler, tiny_pipeline().scheduler.config)
        solver.set_timesteps(6)
        levels = noise_levels(solver)
        assert levels == sorted(levels, reverse=True) and levels[0] > 5 and levels[-1] >= 0
        low, high = levels[-2], levels[1]
        expected = [low < level <= high for level in levels]
        assert 0 < sum(expected) < len(expected)
        drawn, seen = self.drawn(scheduler=scheduler, steps=6, guidance_interval=[low, high])
        assert [count == 6 for count in seen] == expected == guided_steps(solver, 3.0, [low, high])
        within = dataclasses.replace(config, guidance_interval=[low, high])
        assert sum(seen) == 3 * evaluations(within, solver.config)
        assert not np.array_equal(drawn, self.drawn(scheduler=scheduler, steps=6)[0])
        assert not np.array_equal(drawn, self.drawn(scheduler=scheduler, steps=6, guidance=1.0)[0])

    def test_ddim_levels_agree_with_the_other_solvers(self) -> None:
        given = {**tiny_pipeline().scheduler.config, "timestep_spacing": "leading"}
        solvers = [make_scheduler(name, given) for name in ("ddim", "euler")]
        for solver in solvers:
            solver.set_timesteps(6)
        one, other = (dict(zip(map(float, s.timesteps), noise_levels(s), strict=True)) for s in solvers)
        common = sorted(set(one) & set(other))
        assert len(common) > 2
        assert [one[t] for t in common] == pytest.approx([other[t] for t in common], rel=1e-3)

    @pytest.mark.parametrize("interval", [[5.0], [5.0, 1.0], [-1.0, 2.0], [0.1, float("nan")], ["a", "b"]])
    def test_what_is_no_interval_is_refused(self, interval: list[Any]) -> None:
        with pytest.raises(BuilderError, match="guidance_interval"):
            SampleConfig(guidance_interval=interval)

    def test_fingerprints_of_before_stay_and_the_interval_is_a_key(self, spec: JobSpec) -> None:
        before = spec.keys()
        assert "guidance_interval" not in before and "compile" not in before
        recorded = spec.config.to_json()
        del recorded["sample"]["guidance_interval"], recorded["sample"]["compile"]  # as older datasets have it
        assert config_from_json(recorded) == spec.config
        with_interval = changed(spec, guidance_interval=[1, 5])
        assert with_interval.keys() == {**before, "guidance_interval": [1.0, 5.0]}
        with pytest.raises(BuilderError, match=r"guidance_interval: null there, \[1.0, 5.0\] now"):
            with_interval.require_same(before)
        with pytest.raises(BuilderError, match=r"guidance_interval: \[1.0, 5.0\] there, null now"):
            spec.require_same(with_interval.keys())

    def test_a_dataset_records_it_and_replays_it(self, spec: JobSpec) -> None:
        dataset = run(changed(spec, guidance_interval=[1.0, 5.0]), 4).dataset
        rows = dataset.table().to_pylist()
        assert [row["guidance_interval"] for row in rows] == [[1.0, 5.0]] * 4
        assert Regenerator(dataset).compare(rows[1]["key"]).identical


def changed(spec: JobSpec, **sample: Any) -> JobSpec:
    config = dataclasses.replace(spec.config, sample=dataclasses.replace(spec.config.sample, **sample))
    return dataclasses.replace(spec, config=config)


# -- out of memory ---------------------------------------------------------------------------------------------------


def starve(monkeypatch: pytest.MonkeyPatch, most: int, error: Exception | None = None) -> None:
    """Let the decoder run out of memory (or fail with `error`) above `most` images at once."""
    decode = Sampler._decode

    def limited(self: Sampler, latents: torch.Tensor) -> torch.Tensor:
        if len(latents) > most:
            raise error or torch.OutOfMemoryError(f"no room for {len(latents)} images")
        return decode(self, latents)

    monkeypatch.setattr(Sampler, "_decode", limited)


class TestOutOfMemory:
    def test_a_batch_is_halved_until_it_fits_and_stays_so(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        whole = tiny_sampler()
        ones = [whole.generate([request]).pixels[0] for request in REQUESTS]
        starve(monkeypatch, 1)
        sampler = tiny_sampler()
        with caplog.at_level(logging.WARNING, "builder.sampling"):
            batch = sampler.generate(REQUESTS)
        assert batch.micro_batch == 1 and np.array_equal(batch.pixels, ones)  # drawn as if each had been alone
        assert [record.args[0] for record in caplog.records] == [3, 2]  # type: ignore[index]
        _, seen = denoised(sampler)
        assert seen == [2] * 4 * 3  # both halves of one image, four steps, three images: nothing is tried in vain

    @pytest.mark.parametrize(
        "said",
        [
            "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
            "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR",
            "CUDA error: out of memory",
        ],
    )
    def test_a_library_that_finds_no_memory_is_out_of_memory_too(
        self, said: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        starve(monkeypatch, 1, RuntimeError(said))
        assert tiny_sampler().generate(REQUESTS).micro_batch == 1

    def test_another_error_is_not(self, monkeypatch: pytest.MonkeyPatch) -> None:
        starve(monkeypatch, 1, RuntimeError("CUDA error: device-side assert triggered"))
        with pytest.raises(RuntimeError, match="device-side assert"):
            tiny_sampler().generate(REQUESTS)

    def test_where_one_image_does_not_fit_the_remedy_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        starve(monkeypatch, 0)
        with pytest.raises(BuilderError, match="too small for 1 image of 32 px") as refused:
            tiny_sampler().generate(REQUESTS)
        assert "sample.size" in refused.value.remedy

    def test_precision_is_as_before_when_widening_ran_out(self, monkeypatch: pytest.MonkeyPatch) -> None:
        sampler = tiny_sampler()
        expected = sampler.generate(REQUESTS).pixels
        starve(monkeypatch, 2)
        assert sampler.generate(REQUESTS, precise=True).micro_batch == 2
        monkeypatch.undo()
        again = sampler.generate(REQUESTS)
        assert again.micro_batch == 3 and np.array_equal(again.pixels, expected)

    def test_it_is_recorded_shown_and_replayed(
        self, spec: JobSpec, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        starve(monkeypatch, 2)
        dataset = run(spec, 8).dataset
        monkeypatch.undo()
        assert "out of memory with 4 images at once" in capsys.readouterr().err
        rows = dataset.table().to_pylist()
        assert [row["batch_size"] for row in rows] == [4] * 8 and [row["micro_batch"] for row in rows] == [2] * 8
        assert verify_dataset(dataset) == []
        asked: list[Any] = []
        generate = Sampler.generate

        def noted(self: Sampler, requests: Any, precise: bool = False, micro_batch: int | None = None) -> Any:
            asked.append((len(requests), micro_batch))
            return generate(self, requests, precise, micro_batch)

        monkeypatch.setattr(Sampler, "generate", noted)
        assert Regenerator(dataset).compare(rows[5]["key"]).identical
        assert asked == [(4, 2)]
        monkeypatch.undo()
        other = run(dataclasses.replace(spec, name="other"), 4).dataset
        starve(monkeypatch, 2)  # a machine with less memory than the one that made it
        compared = Regenerator(other).compare(other.table(["key"])["key"][0].as_py())
        assert compared.identical or "images at once: 4 then, 2 now" in compared.differences[0]
        assert len(compared.differences) == 1

    def test_a_whole_batch_says_nothing_of_it(self, spec: JobSpec) -> None:
        dataset = run(spec, 4).dataset
        assert dataset.table()["micro_batch"].to_pylist() == [None] * 4


# -- memory, compilation, flags --------------------------------------------------------------------------------------


def test_text_encoders_leave_the_memory(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from builder.models import load

    kept: list[weakref.ref[Any]] = []
    load_pipeline = load.load_pipeline

    def watched(*args: Any, **keywords: Any) -> Any:
        pipeline = load_pipeline(*args, **keywords)
        kept.extend(weakref.ref(part) for part in (pipeline.text_encoder, pipeline.text_encoder_2))
        return pipeline

    monkeypatch.setattr(load, "load_pipeline", watched)
    config = Config(sample=dataclasses.replace(CONFIG.sample, size=16))
    sampler = load_sampler(read_checkpoint(tiny_checkpoint), config)
    gc.collect()
    assert len(kept) == 2 and all(reference() is None for reference in kept)
    assert sampler.generate(REQUESTS[:1]).pixels.shape == (1, 16, 16, 3)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_blocks_draw_nearly_the_same_and_are_a_key_of_the_fingerprint(spec: JobSpec) -> None:
    plain = tiny_sampler().generate(REQUESTS).pixels
    sampler = tiny_sampler(dataclasses.replace(SAMPLE, compile=True))
    compiled = sampler.generate(REQUESTS).pixels
    assert any(module._compiled_call_impl is not None for module in sampler._unet.modules())
    assert np.abs(plain.astype(int) - compiled).max() <= 1
    assert changed(spec, compile=True).keys()["compile"] is True


def test_a_denoiser_without_repeated_blocks_is_not_compiled() -> None:
    from builder.sampling.sampler import compile_blocks

    pipeline = tiny_pipeline()
    for module in pipeline.unet.modules():
        if hasattr(module, "transformer_blocks"):
            module.transformer_blocks = torch.nn.ModuleList()
    with pytest.raises(BuilderError, match=r"sample\.compile") as refused:
        compile_blocks(pipeline.unet)
    assert "false" in refused.value.remedy


def test_two_threads_never_compute_under_each_others_flags() -> None:
    """cudnn's flags are the process's: a decoder in TF32 and features in float32 must not overlap."""
    wrong: list[bool] = []
    before = torch.backends.cudnn.allow_tf32

    def ask(tf32: bool) -> None:
        for _ in range(200):
            with convolutions(tf32=tf32):
                if torch.backends.cudnn.allow_tf32 != tf32 or torch.backends.cudnn.benchmark:
                    wrong.append(tf32)

    threads = [threading.Thread(target=ask, args=(tf32,)) for tf32 in (True, False)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and torch.backends.cudnn.allow_tf32 == before


# -- overlap ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def workers(spec: JobSpec, tmp_path: Path) -> tuple[Worker, Worker]:
    """One that does everything in order, one with threads; of the same job in two roots."""
    run(spec, 4)
    other = dataclasses.replace(spec, out=str(tmp_path / "other"))
    run(other, 4)
    return Worker(spec, "cpu", overlap=False), Worker(other, "cpu", overlap=True)


class TestOverlap:
    def test_same_bytes_and_rows(self, workers: tuple[Worker, Worker]) -> None:
        batches: list[list[int]] = [[], []]
        units = [Unit(1, 4, 15), Unit(2, 15, 20)]
        for worker, heard in zip(workers, batches, strict=True):
            for unit in units:
                assert worker.make(unit, heard.append) == 0
        assert batches[0] == batches[1] == [4, 4, 3, 1, 4]
        one, two = (worker.dataset for worker in workers)
        assert tars(one.storage.root) == tars(two.storage.root)
        assert one.table().drop_columns(["seconds"]) == two.table().drop_columns(["seconds"])
        assert pixels(one) == pixels(two)

    def test_drawing_goes_on_while_a_batch_is_scored_and_a_unit_committed(
        self, workers: tuple[Worker, Worker], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Scoring waits until all the unit is drawn, committing until the next one is: neither may hold that up."""
        worker = workers[1]
        drawn, begun = threading.Event(), threading.Event()
        score, write = worker.scorer.score, worker_module.write_shard

        def late(*args: Any) -> Any:
            assert drawn.wait(60)
            return score(*args)

        def later(*args: Any, **keywords: Any) -> bool:
            assert begun.wait(60)
            return write(*args, **keywords)

        monkeypatch.setattr(worker.scorer, "score", late)
        monkeypatch.setattr(worker_module, "write_shard", later)
        first = worker.begin(Unit(1, 4, 12), lambda images: None)
        assert not first.done()
        drawn.set()
        second = worker.begin(Unit(2, 12, 16), lambda images: None)
        assert not first.done()
        begun.set()
        assert first.result(60) == second.result(60) == 0
        assert worker.dataset.shard_numbers() == [0, 1, 2]

    @pytest.mark.parametrize("overlap", [False, True])
    def test_an_error_on_a_thread_is_the_units_and_the_next_unit_is_made(
        self, workers: tuple[Worker, Worker], overlap: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        worker = workers[overlap]

        def broken(*args: Any) -> Any:
            raise ZeroDivisionError("a fault in scoring")

        with monkeypatch.context() as patch:
            patch.setattr(worker.scorer, "score", broken)
            with pytest.raises(ZeroDivisionError):
                worker.make(Unit(1, 4, 12), lambda images: None)
        (Path(worker.dataset.storage.root) / "shards/tiny-IPR/shard-000001.tar").mkdir()
        with pytest.raises(BuilderError, match="shard 1 of 'tiny-IPR' cannot be written"):
            worker.make(Unit(1, 4, 12), lambda images: None)
        (Path(worker.dataset.storage.root) / "shards/tiny-IPR/shard-000001.tar").rmdir()
        assert worker.dataset.shard_numbers() == [0]
        assert worker.make(Unit(1, 4, 12), lambda images: None) == 0
        assert worker.dataset.shard_numbers() == [0, 1]

    def test_a_batch_that_cannot_be_drawn_leaves_nothing_queued(
        self, workers: tuple[Worker, Worker], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        worker = workers[1]
        with monkeypatch.context() as patch:
            patch.setattr(worker_module, "make_batch", lambda *args: (_ for _ in ()).throw(ZeroDivisionError))
            with pytest.raises(ZeroDivisionError):
                worker.make(Unit(1, 4, 12), lambda images: None)
        assert worker.make(Unit(1, 4, 12), lambda images: None) == 0
        assert worker.dataset.shard_numbers() == [0, 1]


# -- presets ---------------------------------------------------------------------------------------------------------


class TestPresets:
    def test_they_stand_between_the_config_and_set_and_only_their_values_remain(self) -> None:
        plain, fast, quality = (load_config("demo", [], preset) for preset in (None, "fast", "quality"))
        assert fast.sample.steps == 12 and quality.sample.steps == 50
        assert fast.sample.guidance_interval == quality.sample.guidance_interval == [0.28, 5.42]
        kept = {"steps": plain.sample.steps, "guidance_interval": []}
        assert dataclasses.replace(fast, sample=dataclasses.replace(fast.sample, **kept)) == plain
        assert load_config("demo", ["sample.steps=9"], "fast").sample.steps == 9

    def test_passes_that_the_presets_say_of_sdxl(self) -> None:
        from builder.models.architectures import SDXL
        from builder.models.building import DIFFUSION

        passes = [
            evaluations(load_config("sdxl-full", [], preset).sample, {**DIFFUSION, **SDXL["scheduler"]})
            for preset in (None, "fast", "quality")
        ]
        assert passes == [50, 18, 75]

    def test_an_unknown_one_is_refused(self, builder: Any) -> None:
        result: Result = builder("shards", "--count", "3", "--preset", "fastest")
        assert result.code == 2 and "did you mean 'fast'?" in result.output

"""The old training script's interface: what its calls get, from which images, and what is refused or said."""

from __future__ import annotations

import importlib.util
import os
import sys
import types
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import builder.legacy
import builder.mixing
from builder.errors import BuilderError
from builder.legacy import callback as callback_room
from builder.legacy.manager import _Order
from builder.mixing import (
    AugmentationConfig,
    GenerativeAugmentationCallback,
    GenerativeAugmentationManager,
    GenerativeAugmentationManagerSDXL,
    create_enhanced_augmentation_fn,
)
from builder.shards.dataset import Dataset, resize
from tests.conftest import Result, write_real
from tests.lineages import ALIKE

PER_PHASE = 5
SIZE = 24
OLD_MODULE = "src.utils.production_config"


def write_synthetic(root: Path, name: str = "accepted", **info: Any) -> Dataset:
    """Five accepted images of each phase."""
    dataset = write_real(root, name, per_phase=PER_PHASE, size=SIZE, codes=info.pop("codes", ""))
    dataset.write_info({**dataset.info, "origin": "synthetic", "filter": {}, **info})
    return dataset


@pytest.fixture(scope="module")
def accepted(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write_synthetic(tmp_path_factory.mktemp("accepted"))


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("BUILDER_DATASET", raising=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="no real dataset is given")
        yield


def manage(dataset: Any, config: Any = None, **options: Any) -> GenerativeAugmentationManager:
    return GenerativeAugmentationManager("old/models", config or AugmentationConfig(), dataset=dataset, **options)


def keys(dataset: Dataset, images: np.ndarray | None) -> list[str]:
    """Which images of the dataset these are, by their pixels."""
    assert images is not None
    known = {pixels.tobytes(): row["key"] for row, pixels in dataset.images()}
    return [known[np.asarray(image).astype(np.uint8).tobytes()] for image in images]


def draw(manager: GenerativeAugmentationManager, phase: str, count: int) -> np.ndarray:
    images = manager.generate_images("depth_rgb", phase, count, SIZE, SIZE)
    assert images is not None
    return images


# -- the old calls -------------------------------------------------------------------------


def test_the_old_call_works_verbatim(
    builder: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lines of the old training script below its import, over what `builder filter` accepted."""
    made = write_real(tmp_path, "made", per_phase=PER_PHASE, size=SIZE)
    made.write_info({**made.info, "origin": "synthetic"})
    assert builder("filter", "made", "--no-gates", "--where", "key NOT LIKE '%00000000'").code == 0
    monkeypatch.setenv("BUILDER_DATASET", "made-accepted")

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        # fmt: off
        aug_config = AugmentationConfig()
        aug_config.generative_settings['output_size']['width'] = 32
        aug_config.generative_settings['output_size']['height'] = 32
        gen_manager = GenerativeAugmentationManager(
            checkpoint_dir='src/models/sdxl_checkpoints',
            config=aug_config
        )
        gen_manager.preload()
        # fmt: on
    assert [str(warning.message).split(" (")[0] for warning in said] == ["no real dataset is given"]
    assert said[0].filename == __file__

    assert hasattr(gen_manager, "checkpoint_path") and hasattr(gen_manager, "config_path")
    images = gen_manager.generate_images("depth_rgb", "P", batch_size=4)
    assert images is not None and images.shape == (4, 32, 32, 3) and images.dtype == np.float32
    assert type(images.numpy()) is np.ndarray and (images.numpy() == images).all()
    batch = np.zeros((8, 32, 32, 3), np.float32)
    batch[[3, 5]] = images[:2]
    assert (batch[5] == images[1]).all()
    gen_manager.cleanup()


def test_values_are_those_of_the_stored_pixels(accepted: Dataset) -> None:
    manager = manage(accepted)
    images = draw(manager, "I", PER_PHASE)
    assert sorted(keys(accepted, images)) == [f"accepted-I-{index:08d}" for index in range(PER_PHASE)]
    assert images.max() > 200, "0-255, as the real images beside them"
    thermal = manager.generate_images("thermal_rgb", "I", 1, SIZE, SIZE)
    assert len(keys(accepted, thermal)) == 1


def test_white_is_one_where_the_script_divides_real_images_by_255(accepted: Dataset) -> None:
    config = AugmentationConfig()
    config.generative_settings["max_value"] = 1
    scaled = draw(manage(accepted, config), "P", 3)
    np.testing.assert_allclose(scaled, draw(manage(accepted), "P", 3) / 255, rtol=1e-6)


def test_size_and_number_come_from_the_config_where_a_call_names_none(accepted: Dataset) -> None:
    config = AugmentationConfig()
    config.generative_settings |= {"output_size": {"height": 8, "width": 8}, "batch_size_limit": 4}
    manager = manage(accepted, config)
    for batch_size, made in ((1, 1), (4, 4), (99, 4)):
        images = manager.generate_images("depth_rgb", "R", batch_size)
        assert images is not None and images.shape == (made, 8, 8, 3)
    for wrong in ({"batch_size": 0}, {"target_height": 0}, {"target_width": -3}):
        with pytest.raises(BuilderError, match=f"{next(iter(wrong))} is"):
            manager.generate_images("depth_rgb", "R", **wrong)


@pytest.mark.parametrize("height, width", [(16, 20), (20, 16), (7, 12), (1, 3), (40, 40)])
def test_square_crops_are_fitted_into_the_middle(accepted: Dataset, height: int, width: int) -> None:
    images = manage(accepted).generate_images("depth_rgb", "I", 2, height, width)
    whole = draw(manage(accepted), "I", 2).astype(np.uint8)
    assert images is not None and images.shape == (2, height, width, 3)
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    inside = images[:, top : top + side, left : left + side]
    assert (inside == np.stack([resize(image, side) for image in whole])).all()
    assert images.sum() == inside.sum(), "black around"


def test_maps_get_none_and_one_warning(accepted: Dataset) -> None:
    config = AugmentationConfig()
    config.modality_settings["depth_map"]["generative_augmentations"]["enabled"] = True
    manager = manage(accepted, config)
    with pytest.warns(UserWarning, match="no synthetic images of depth_map") as said:
        assert manager.generate_images("depth_map", "I") is None
    assert len(said) == 1 and said[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert manager.generate_images("depth_map", "P") is None
        manager.current_phase = "I"
        assert manager.should_generate("depth_map") is False
        assert manager.should_generate("thermal_map") is False, "not enabled: nothing to warn of"


def test_unknown_modalities_and_phases_are_refused(accepted: Dataset) -> None:
    manager = manage(accepted)
    with pytest.raises(BuilderError, match=r"no modality 'depth_rbg'\n.*did you mean 'depth_rgb'"):
        manager.generate_images("depth_rbg", "I")
    with pytest.raises(BuilderError, match="no modality 'rgb'"):
        manager.should_generate("rgb")
    with pytest.raises(BuilderError, match=r"phase 'Q' is not among those of dataset 'accepted'\n.*known: I, P, R"):
        manager.generate_images("depth_rgb", "Q")
    assert draw(manager, b"I", 1).shape == (1, SIZE, SIZE, 3), "as a tensor's value comes"  # type: ignore[arg-type]


# -- order ---------------------------------------------------------------------------------


@given(st.integers(1, 12), st.lists(st.integers(1, 9), min_size=1, max_size=12))
@settings(max_examples=60, deadline=None)
def test_every_image_once_before_any_comes_again(count: int, batches: list[int]) -> None:
    rows = np.arange(100, 100 + count, dtype=np.int32)
    order = _Order(rows, 0, "I")
    taken = [row for batch in batches for row in order.take(batch)]
    assert len(taken) == sum(batches)
    for start in range(0, len(taken), count):
        part = taken[start : start + count]
        assert len(set(part)) == len(part) and set(part) <= set(rows.tolist())
    assert taken == _Order(rows, 0, "I").take(sum(batches)), "however it is cut into batches"


def test_order_is_another_in_each_round_phase_and_seed() -> None:
    rows = np.arange(40)
    order = _Order(rows, 0, "I")
    first, second = order.take(40), order.take(40)
    others = [_Order(rows, 0, "P").take(40), _Order(rows, 1, "I").take(40), rows.tolist()]
    assert len({tuple(taken) for taken in (first, second, *others)}) == 5


def test_the_seed_makes_the_run_repeatable(accepted: Dataset) -> None:
    def run(seed: int) -> list[str]:
        manager = manage(accepted, seed=seed)
        manager.current_phase = "I"
        dice = [str(manager.should_generate("depth_rgb")) for _ in range(40)]
        return [*dice, *keys(accepted, draw(manager, "I", 4)), *keys(accepted, draw(manager, "R", 3))]

    assert run(0) == run(0)
    assert len({tuple(run(seed)) for seed in range(4)}) == 4


def test_threads_share_one_order(accepted: Dataset) -> None:
    """tf.data calls from several threads at once."""
    manager = manage(accepted)
    phases = [code for code in "IPR" for _ in range(2 * PER_PHASE)]
    with ThreadPoolExecutor(8) as pool:
        drawn = list(pool.map(lambda phase: keys(accepted, draw(manager, phase, 1))[0], phases))
    assert [key.split("-")[1] for key in drawn] == phases
    assert set(Counter(drawn).values()) == {2}, "two rounds of each phase"


def test_each_thread_has_its_own_current_phase(accepted: Dataset) -> None:
    manager = manage(accepted)
    manager.current_phase = "I"
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(lambda: manager.current_phase).result() == "I", "set once, for all"
        pool.submit(setattr, manager, "current_phase", "R").result()
        assert pool.submit(lambda: manager.current_phase).result() == "R"
    assert manager.current_phase == "I"


# -- whether to generate -------------------------------------------------------------------


class Tensor:
    """As an eager tensor of a string; without a value, as TensorFlow's when it traces a graph."""

    def __init__(self, value: str | None) -> None:
        self.value = value

    def numpy(self) -> bytes:
        if self.value is None:
            raise NotImplementedError("numpy() is only available when eager execution is enabled.")
        return self.value.encode()


def always() -> AugmentationConfig:
    config = AugmentationConfig()
    config.generative_settings["prob"] = 1.0
    return config


@pytest.mark.parametrize("phase, yes", [
    ("I", True), (b"R", True), (Tensor("P"), True), (np.str_("I"), True), (None, False), ("Q", False), (7, False),
])  # fmt: skip
def test_the_phase_decides_in_every_form(accepted: Dataset, phase: Any, yes: bool) -> None:
    manager = manage(accepted, always())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        manager.current_phase = phase
        assert manager.should_generate("depth_rgb") is yes


@pytest.mark.parametrize("symbolic", [Tensor(None), object()])
def test_a_phase_without_a_value_is_told_once(accepted: Dataset, symbolic: Any) -> None:
    manager = manage(accepted, always())
    manager.current_phase = symbolic
    with pytest.warns(UserWarning, match=r"traces a graph.*within tf\.py_function") as said:
        assert not manager.should_generate("depth_rgb") and not manager.should_generate("depth_rgb")
    assert len(said) == 1


def test_probability_phases_and_modality_are_the_configs(accepted: Dataset) -> None:
    config = always()
    config.generative_settings |= {"prob": 0.3, "phases": ["I", "R"]}
    manager = manage(accepted, config)
    manager.current_phase = "I"
    assert 240 < sum(manager.should_generate("depth_rgb") for _ in range(1000)) < 360
    assert any(manager.should_generate("thermal_rgb") for _ in range(40)), "the switch of depth_rgb is its switch too"
    manager.current_phase = "P"
    assert not any(manager.should_generate("depth_rgb") for _ in range(40))
    assert draw(manager, "P", 1).any(), "but who asks for it gets it, as before"


def test_switched_off_after_all(accepted: Dataset) -> None:
    manager = manage(accepted, always())
    manager.current_phase = "I"
    assert manager.should_generate("depth_rgb")
    manager.config.modality_settings["depth_rgb"]["generative_augmentations"]["enabled"] = False
    assert manager.generate_images("depth_rgb", "I") is None and not manager.should_generate("depth_rgb")


def test_switched_off_needs_no_dataset() -> None:
    config = always()
    config.modality_settings["depth_rgb"]["generative_augmentations"]["enabled"] = False
    manager = manage(None, config)
    manager.current_phase = "I"
    assert manager.generate_images("depth_rgb", "I") is None and not manager.should_generate("depth_rgb")
    assert not hasattr(manager, "checkpoint_path"), "by which the old augmentation function knows"
    config.modality_settings["depth_rgb"]["generative_augmentations"]["enabled"] = True
    assert manager.generate_images("depth_rgb", "I") is None and not manager.should_generate("depth_rgb"), "too late"
    manager.preload()
    manager.cleanup()


# -- settings ------------------------------------------------------------------------------


def test_the_old_settings_module_is_heeded(accepted: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    old = types.ModuleType(OLD_MODULE)
    values = {
        "IMAGE_SIZE": 20, "USE_GENERATIVE_AUGMENTATION": True, "USE_GENERAL_AUGMENTATION": False,
        "GENERATIVE_AUG_PROB": 1.0, "GENERATIVE_AUG_MIX_RATIO": (0.2, 0.4), "GENERATIVE_AUG_INFERENCE_STEPS": 30,
        "GENERATIVE_AUG_BATCH_LIMIT": 3, "GENERATIVE_AUG_MAX_MODELS": 2, "GENERATIVE_AUG_PHASES": ["R"],
        "GENERATIVE_AUG_SDXL_RESOLUTION": 768, "GENERATIVE_AUG_SDXL_GUIDANCE_SCALE": 3.5,
    }  # fmt: skip
    for name, value in values.items():
        setattr(old, name, value)
    monkeypatch.setitem(sys.modules, OLD_MODULE, old)
    config = AugmentationConfig()
    assert config.generative_settings == {
        "output_size": {"height": 20, "width": 20}, "prob": 1.0, "mix_ratio_range": (0.2, 0.4), "inference_steps": 30,
        "batch_size_limit": 3, "max_loaded_models": 2, "phases": ["R"], "max_value": 255.0, "sdxl_resolution": 768,
        "guidance_scale": 3.5,
    }  # fmt: skip
    assert not config.modality_settings["thermal_rgb"]["regular_augmentations"]["enabled"]
    manager = manage(accepted, config)
    images = manager.generate_images("depth_rgb", "R", 16)
    assert images is not None and images.shape == (3, 20, 20, 3)
    for phase, yes in (("R", True), ("I", False)):
        manager.current_phase = phase
        assert manager.should_generate("depth_rgb") is yes

    del config.generative_settings["phases"], config.generative_settings["max_value"]  # the old system's own config
    manager = manage(accepted, config)
    manager.current_phase = "I"
    assert not manager.should_generate("depth_rgb") and draw(manager, "R", 1).max() > 1

    old.USE_GENERATIVE_AUGMENTATION = False  # type: ignore[attr-defined]
    assert manage(None).generate_images("depth_rgb", "I") is None


def test_the_config_has_what_the_old_augmentation_function_reads() -> None:
    config = AugmentationConfig()
    assert list(config.modality_settings) == ["depth_rgb", "thermal_rgb", "thermal_map", "depth_map"]
    for modality, parts in config.modality_settings.items():
        regular = parts["regular_augmentations"]
        assert regular["enabled"] and 0 < regular["prob"] < 1 and regular["brightness"]["max_delta"] > 0
        assert regular["saturation"]["enabled"] == modality.endswith("rgb") and regular["gaussian_noise"]["stddev"] > 0
        assert parts["generative_augmentations"]["enabled"] == (modality == "depth_rgb")
    config.modality_settings["depth_rgb"]["regular_augmentations"]["prob"] = 0
    assert AugmentationConfig().modality_settings["depth_rgb"]["regular_augmentations"]["prob"] > 0


# -- datasets ------------------------------------------------------------------------------


def test_a_dataset_has_to_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in (None, ""):
        if value is not None:
            monkeypatch.setenv("BUILDER_DATASET", value)
        with pytest.raises(BuilderError, match=r"no dataset .* is named\n.*BUILDER_DATASET=NAME.*dataset="):
            manage(None)


def test_dataset_may_be_a_name_a_path_or_a_dataset(accepted: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(accepted.storage.root)
    monkeypatch.setenv("BUILDER_DATASET", "elsewhere/nothing")
    for reference in (accepted, root / "shards" / "accepted", str(root / "manifests" / "accepted")):
        assert draw(manage(reference), "I", 1).any(), "goes before the environment"
    with pytest.raises(BuilderError, match="no dataset 'nothing'"):
        manage(None)
    monkeypatch.setenv("BUILDER_DATASET", str(root / "shards" / "accepted"))
    assert draw(manage(None), "I", 1).any()
    monkeypatch.chdir(root)
    assert draw(manage("accepted"), "I", 1).any()


def test_what_is_not_accepted_is_refused_or_said(tmp_path: Path) -> None:
    raw = write_synthetic(tmp_path, "raw")
    raw.write_info({key: value for key, value in raw.info.items() if key != "filter"})
    with pytest.warns(UserWarning, match=r"'raw' was not filtered.*`builder filter raw` and name 'raw-accepted'"):
        manage(raw)
    with pytest.raises(BuilderError, match=r"'part' is not complete\n  run its command again to finish it$"):
        manage(write_synthetic(tmp_path, "part", state="partial"))
    with pytest.raises(BuilderError, match="'clinic' is real"):
        manage(write_real(tmp_path))


def test_phases_without_images_are_told_at_once(tmp_path: Path) -> None:
    few = write_synthetic(tmp_path, codes="IP")
    assert draw(manage(few), "P", 1).any(), "no phases named: all that there are"
    config = AugmentationConfig()
    config.generative_settings["phases"] = ["I", "P", "R"]
    with pytest.raises(BuilderError, match=r"has no image of R, which is to be generated\n.*has I, P: .*_PHASES"):
        manage(few, config)


def test_lineage_is_checked_against_the_real_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = write_real(tmp_path)
    lineage = {"known": True, "key_fingerprint": "test", "patients": [], **ALIKE}
    clean = write_synthetic(tmp_path, "clean", lineage=lineage)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        manage(clean, real=real)
    held_out = next(row["patient"] for row in real.table().to_pylist() if row["split"] == "test")
    leaky = write_synthetic(
        tmp_path, "leaky", lineage={"known": True, "key_fingerprint": "test", "patients": [held_out], **ALIKE}
    )
    with pytest.raises(BuilderError, match=f"trained on 1 patients that 'clinic' holds out: {held_out}"):
        manage(leaky, real=str(tmp_path / "shards" / "clinic"))
    monkeypatch.setenv("BUILDER_REAL", str(tmp_path / "shards" / "clinic"))
    with pytest.raises(BuilderError, match="holds out"):
        manage(leaky)
    with pytest.warns(UserWarning, match="allowed, because: a control"):
        manage(leaky, real=real, allow_leak="a control")
    real.write_info({**real.info, "state": "partial"})
    with pytest.raises(BuilderError, match="'clinic' is not complete"):
        manage(clean, real=real)


def test_a_damaged_shard_is_named(tmp_path: Path) -> None:
    dataset = write_synthetic(tmp_path)
    shard = tmp_path / "shards" / "accepted" / "shard-000001.tar"
    os.truncate(shard, shard.stat().st_size // 3)
    with pytest.raises(BuilderError, match=r"accepted-R-\d{8} in shards/accepted/shard-000001\.tar cannot be read"):
        draw(manage(dataset), "R", PER_PHASE)


# -- the end of a training run -------------------------------------------------------------


def open_tars(root: str) -> int:
    return sum(os.path.realpath(f"/proc/self/fd/{number}").startswith(root) for number in os.listdir("/proc/self/fd"))


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts open files in /proc")
def test_cleanup_closes_the_shards_and_goes_on_in_order(accepted: Dataset) -> None:
    manager, root = manage(accepted), os.path.realpath(accepted.storage.path("shards"))
    before = open_tars(root)
    first = keys(accepted, draw(manager, "I", 2))
    assert open_tars(root) > before
    manager.cleanup()
    assert open_tars(root) == before
    rest = keys(accepted, draw(manager, "I", PER_PHASE - 2))
    assert len({*first, *rest}) == PER_PHASE


def test_the_callback_cleans_up_after_training(accepted: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    class Callback:
        def on_train_end(self, logs: Any = None) -> None: ...

    tensorflow = types.ModuleType("tensorflow")
    tensorflow.keras = types.SimpleNamespace(callbacks=types.SimpleNamespace(Callback=Callback))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tensorflow", tensorflow)
    manager = manage(accepted)
    calls: list[str] = []
    monkeypatch.setattr(manager, "cleanup", lambda: calls.append("cleanup"))
    for gen_manager in (manager, None):
        callback = GenerativeAugmentationCallback(gen_manager)
        assert isinstance(callback, Callback)
        callback.on_train_end()
    assert calls == ["cleanup"]


# -- the three forms of the call -------------------------------------------------------------


def test_every_name_is_that_of_the_old_modules() -> None:
    for name in builder.legacy.__all__:
        assert getattr(builder.mixing, name) is getattr(builder.legacy, name)
    assert GenerativeAugmentationManagerSDXL is GenerativeAugmentationManager


@pytest.mark.parametrize("name", ["checkpoint_path", "base_dir", "checkpoint_dir"])
def test_the_old_model_may_be_given_by_each_callers_name(
    accepted: Dataset, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("BUILDER_DATASET", str(Path(accepted.storage.root) / "shards" / "accepted"))
    config = AugmentationConfig()
    config.generative_settings["output_size"]["width"] = 12
    config.generative_settings["output_size"]["height"] = 16
    manager = GenerativeAugmentationManagerSDXL(**{name: "old/checkpoint_epoch_0030.pt"}, config=config)
    assert manager.model_path == Path("old/checkpoint_epoch_0030.pt")
    images = manager.generate_images("depth_rgb", "I", batch_size=2)
    assert images is not None and images.shape == (2, 16, 12, 3)
    positional = GenerativeAugmentationManager("old/models", config, "cuda:0")
    assert positional.generate_images("thermal_rgb", "R") is not None


def test_the_old_model_named_twice_is_refused(accepted: Dataset) -> None:
    with pytest.raises(BuilderError, match="named twice, by checkpoint_path and base_dir"):
        GenerativeAugmentationManager("a", base_dir="b", dataset=accepted)
    assert GenerativeAugmentationManager(dataset=accepted).config.generative_settings["prob"] == 0.15


def test_defaults_are_those_of_the_third_version() -> None:
    config = AugmentationConfig()
    for modality in ("depth_rgb", "thermal_rgb"):
        assert config.modality_settings[modality]["regular_augmentations"] == {
            "enabled": True, "prob": 0.5, "brightness": {"enabled": True, "max_delta": 0.1},
            "contrast": {"enabled": True, "range": (0.8, 1.2)}, "saturation": {"enabled": True, "range": (0.8, 1.2)},
            "gaussian_noise": {"enabled": True, "stddev": 0.03},
        }  # fmt: skip
    for modality in ("depth_map", "thermal_map"):
        assert config.modality_settings[modality]["regular_augmentations"] == {
            "enabled": True, "prob": 0.5, "brightness": {"enabled": True, "max_delta": 0.08},
            "contrast": {"enabled": True, "range": (0.85, 1.15)}, "saturation": {"enabled": False},
            "gaussian_noise": {"enabled": True, "stddev": 0.02},
        }  # fmt: skip
    kept = {"sdxl_resolution", "guidance_scale", "output_size", "prob", "mix_ratio_range", "inference_steps"}
    assert kept | {"batch_size_limit"} <= set(config.generative_settings)


# -- counts, and the callback ---------------------------------------------------------------


def test_a_line_after_every_hundred_and_a_summary_at_the_end(accepted: Dataset, capsys: Any) -> None:
    manager = manage(accepted)
    callback = GenerativeAugmentationCallback(manager)
    draw(manager, "I", 5)
    callback.on_train_begin()
    assert manager.served.counts == {"I": 0, "P": 0, "R": 0}, "counted from the start of the training"
    for _ in range(7):
        draw(manager, "I", 16)  # 112: crosses a hundred in the middle of a call
    assert capsys.readouterr().out == "  synthetic images served: 112 | by phase: I:112, P:0, R:0\n"
    draw(manager, "R", 28)
    assert capsys.readouterr().out == ""
    callback.on_train_end()
    said = capsys.readouterr().out
    assert "synthetic images served: 140" in said
    assert "phase I (inflammatory): 112 (80.0%)" in said and "phase R (remodeling): 28 (20.0%)" in said
    assert draw(manager, "P", 1).any(), "closed shards open again"


@pytest.mark.parametrize("gen_manager", [None, "off"])
def test_the_callback_of_nothing_prints_nothing(gen_manager: str | None, capsys: Any) -> None:
    config = always()
    config.modality_settings["depth_rgb"]["generative_augmentations"]["enabled"] = False
    callback = GenerativeAugmentationCallback(gen_manager and manage(None, config))  # type: ignore[arg-type]
    callback.on_train_begin()
    callback.on_train_end({})
    assert capsys.readouterr().out == ""


def test_without_keras_the_callback_has_what_a_loop_calls() -> None:
    if callback_room._keras_callback() is not None:
        pytest.skip("Keras is installed: tests/acceptance/old_script.py tries it")
    made = GenerativeAugmentationCallback(None)
    assert isinstance(made, GenerativeAugmentationCallback)
    made.set_params({"epochs": 1})  # type: ignore[attr-defined]
    made.set_model(object())  # type: ignore[attr-defined]
    assert made.on_epoch_end(0, logs={}) is None  # type: ignore[attr-defined]
    with pytest.raises(AttributeError, match="no attribute 'modle'"):
        _ = made.modle  # type: ignore[attr-defined]


# -- mixing into batches ----------------------------------------------------------------------


def batch_of(labels: list[int]) -> tuple[np.ndarray, np.ndarray]:
    return np.full((len(labels), SIZE, SIZE, 3), 7, np.float32), np.eye(3, dtype=np.float32)[labels]


@pytest.mark.parametrize("one_hot", [True, False])
def test_each_replaced_image_is_of_its_own_phase(accepted: Dataset, one_hot: bool) -> None:
    config = always()
    config.generative_settings |= {"mix_ratio_range": (0.5, 0.5), "batch_size_limit": 2}
    manager = manage(accepted, config)
    labels = [0, 1, 2, 2, 1, 0, 2, 1]
    images, hot = batch_of(labels)
    mixed, replaced = manager.mix("depth_rgb", images, hot if one_hot else np.array(labels))
    assert replaced.sum() == 4 and (images == 7).all(), "the caller's batch stays"
    assert (mixed[~replaced] == 7).all()
    phases = [key.split("-")[1] for key in keys(accepted, mixed[replaced])]
    assert phases == ["IPR"[labels[place]] for place in np.flatnonzero(replaced)]
    assert sum(manager.served.counts.values()) == 4


def test_how_many_are_replaced_is_right_on_average(accepted: Dataset) -> None:
    """A few per cent of a batch of 8 is less than one image."""
    config = always()
    config.generative_settings |= {"prob": 0.5, "mix_ratio_range": (0.02, 0.06)}
    manager = manage(accepted, config)
    images, labels = batch_of([0] * 8)
    found = [int(manager.mix("depth_rgb", images, labels)[1].sum()) for _ in range(1500)]
    assert set(found) == {0, 1}
    assert 0.11 < np.mean(found) < 0.21  # 8 x 0.5 x 0.04 = 0.16, standard error 0.009


@pytest.mark.parametrize(
    ("change", "modality"),
    [({}, "depth_map"), ({"prob": 0.0}, "depth_rgb"), ({"phases": ["R"]}, "depth_rgb"), (None, "thermal_rgb")],
)
def test_nothing_is_replaced_of_maps_of_other_phases_or_when_off(
    accepted: Dataset, change: dict[str, Any] | None, modality: str
) -> None:
    config = always()
    config.generative_settings["mix_ratio_range"] = (1, 1)
    config.modality_settings["depth_rgb"]["generative_augmentations"]["enabled"] = change is not None
    config.generative_settings |= change or {}
    images, labels = batch_of([0, 1])
    mixed, replaced = manage(accepted, config).mix(modality, images, labels)
    assert not replaced.any() and (mixed == images).all()


@pytest.mark.parametrize("labels", [np.eye(4)[[0, 1]], np.array([0, 3]), np.array([-1, 0])])
def test_labels_of_other_classes_are_refused(accepted: Dataset, labels: np.ndarray) -> None:
    with pytest.raises(BuilderError, match="the dataset has I, P, R"):
        manage(accepted, always()).mix("depth_rgb", batch_of([0, 1])[0], labels)


def test_the_augmentation_function_needs_tensorflow() -> None:
    if importlib.util.find_spec("tensorflow"):
        pytest.skip("TensorFlow is installed: tests/acceptance/old_script.py tries it")
    with pytest.raises(BuilderError, match="TensorFlow is not installed"):
        create_enhanced_augmentation_fn(None, AugmentationConfig())

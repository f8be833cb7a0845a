"""Old checkpoints: read without executing anything, imported weight for weight, and sampled before and after."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from builder.errors import BuilderError
from builder.identity import PatientKey
from builder.models.checkpoint import Checkpoint, Lineage, read_checkpoint, resolve
from builder.models.importing import Request, import_legacy, patients_of, unet_on_meta
from builder.models.legacy import read_legacy
from builder.models.load import load_pipeline
from builder.models.unpickle import read_pickled
from builder.phases import HEALING_PHASES

PROMPTS = {phase.code: phase.prompt for phase in HEALING_PHASES}
CONFIG = {
    "model": {"base_model": "stabilityai/stable-diffusion-xl-base-1.0", "resolution": 16, "training_method": "full"},
    "lora": {"rank": 2, "alpha": 6},
    "prompts": {"phase_prompts": PROMPTS, "negative": "blurry, text", "positive": "diabetic foot ulcer"},
    "quality": {"guidance_scale": 4.0, "inference_steps_production": 50},
}
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]


def write_old(path: Path, state: Any, ema: Any = None, **changed: Any) -> Path:
    """A checkpoint as the old system's training wrote it."""
    data = {
        "epoch": 30,
        "unet_lora_state": state,
        "lr_scheduler_state": {"base_lrs": [3e-5], "last_epoch": 7, "_step_count": 8, "lr_lambdas": [None]},
        "ema_state": ema,
        "metrics": {
            "train_loss": 0.08, "val_loss": np.float32(0.25), "fid": np.float64(189.5), "lpips_mean": np.float16(0.5),
            "images": np.int64(50), "best": np.bool_(True), "is_mean": float("nan"), "ssim_mean": np.float64("inf"),
            "kid": torch.tensor(0.5), "big": np.dtype(">f8").type(2.0),
        },
        "config": CONFIG,
        "extra_state": {"scaler": None, "tracker": {"best_score": float("inf")}},
        "random_state": {
            "torch": torch.get_rng_state(), "torch_cuda": [torch.get_rng_state()],
            "numpy": np.random.get_state(), "python": random.getstate(),
        },
        "timestamp": "2025-11-30T10:00:00",
        **changed,
    }  # fmt: skip
    torch.save({key: value for key, value in data.items() if value is not ...}, path)
    return path


def noisy(state: dict[str, torch.Tensor], seed: int, share: float = 0.2) -> dict[str, torch.Tensor]:
    """The weights, each changed by a random share of itself."""
    generator = torch.Generator().manual_seed(seed)
    return {key: value * (1 + share * torch.randn(value.shape, generator=generator)) for key, value in state.items()}


def drawn(pipeline: Any) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator("cpu").manual_seed(1)
    return pipeline(PROMPTS["P"], num_inference_steps=2, generator=generator, output_type="np").images


@pytest.fixture(scope="module")
def base(tiny_checkpoint: Path):
    return read_checkpoint(tiny_checkpoint)


@pytest.fixture(scope="module")
def source(base):
    """The base as it is loaded; its UNet's state dict is what training started from."""
    return load_pipeline(base.path)


@pytest.fixture(scope="module")
def tuned(source) -> dict[str, dict[str, torch.Tensor]]:
    state = source.unet.state_dict()
    return {"raw": noisy(state, 1), "ema": noisy(state, 2)}


def with_unet(base, state: dict[str, torch.Tensor]) -> Any:
    pipeline = load_pipeline(base.path)
    pipeline.unet.load_state_dict(state)
    return pipeline


# -- full fine-tunes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["raw", "ema"])
@pytest.mark.parametrize("layout", ["state dict", "shadow", "shadow_params", "prefixed"])
def test_full_round_trip(base, tuned, tmp_path: Path, which: str, layout: str) -> None:
    raw, average = tuned["raw"], tuned["ema"]
    if layout == "prefixed":
        raw = {f"module.{key}": value for key, value in raw.items()}
    ema = {
        "state dict": average,
        "prefixed": {f"module._orig_mod.{key}": value for key, value in average.items()},
        "shadow": {"decay": 0.999, "num_updates": 5, "shadow": average},
        "shadow_params": {"decay": 0.999, "optimization_step": 9, "shadow_params": list(average.values())},
    }[layout]
    file = write_old(tmp_path / "checkpoint_epoch_0030.pt", raw, ema)
    made, notes = import_legacy(Request(file, base, tmp_path / "made", weights=which))
    assert notes == []
    assert made.method == "full" and made.epoch == 30 and not made.lineage.known
    stored = load_file(made.path / "unet/diffusion_pytorch_model.safetensors")
    assert {key: value.dtype for key, value in stored.items()} == dict.fromkeys(tuned[which], torch.float32)
    assert all(torch.equal(stored[key], value) for key, value in tuned[which].items())
    assert read_checkpoint(made.path) == made


def test_samples_are_those_of_the_source_weights(base, tuned, tmp_path: Path) -> None:
    file = write_old(tmp_path / "old.pt", tuned["raw"], tuned["ema"])
    made, _ = import_legacy(Request(file, base, tmp_path / "made"))
    assert made.config["imported"]["weights"] == "ema"  # where there is an average
    before, after = drawn(with_unet(base, tuned["ema"])), drawn(load_pipeline(made.path))
    assert np.array_equal(before, after)
    assert np.abs(before - drawn(load_pipeline(base.path))).max() > 0.01


def test_half_precision_stays_as_it_was(base, tuned, tmp_path: Path) -> None:
    halves = {key: value.to(torch.bfloat16) for key, value in tuned["raw"].items()}
    made, _ = import_legacy(Request(write_old(tmp_path / "old.pt", halves), base, tmp_path / "made"))
    stored = load_file(made.path / "unet/diffusion_pytorch_model.safetensors")
    assert all(torch.equal(stored[key], value) and stored[key].dtype == value.dtype for key, value in halves.items())
    assert made.config["imported"]["weights"] == "raw"  # there is no average


def test_what_is_recorded(base, tuned, tmp_path: Path) -> None:
    made, _ = import_legacy(Request(write_old(tmp_path / "old.pt", tuned["raw"]), base, tmp_path / "made"))
    data = json.loads((made.path / "checkpoint.json").read_text(), parse_constant=pytest.fail)
    assert data["metrics"] == {
        "train_loss": 0.08, "val_loss": 0.25, "fid": 189.5, "lpips_mean": 0.5, "images": 50, "best": True,
        "is_mean": None, "ssim_mean": None, "kid": 0.5, "big": 2.0,
    }  # fmt: skip
    nothing = {"patients": [], "patient_source": None, "patient_forms": []}
    assert data["lineage"] == {"known": False, "key_fingerprint": None, **nothing}
    assert data["prompts"] == PROMPTS
    assert data["original_sizes"] == {code: [16] for code in PROMPTS}
    assert data["config"]["sample"] == {"size": 16, "guidance": 4.0, "steps": 50, "negative_prompt": "blurry, text"}
    assert data["config"]["imported"]["config"] == CONFIG
    assert data["base"].pop("voucher")  # that the user named it
    assert data["base"] == {"reference": str(base.path), "sha256": base.sha256}
    assert data["epoch"] == 30
    assert made.classes == HEALING_PHASES


def test_a_model_of_one_phase_has_one_prompt(base, tuned, tmp_path: Path) -> None:
    config = {"data": {"phase": "I"}, "prompts": {"positive": "Medical photograph of\n  an ulcer"}}
    file = write_old(tmp_path / "old.pt", tuned["raw"], config=config, metrics=..., timestamp=...)
    made, _ = import_legacy(Request(file, base, tmp_path / "made"))
    assert made.prompts == {"I": "Medical photograph of an ulcer"}
    assert made.metrics == {} and made.original_sizes == {}


def test_parts_of_the_base_are_linked_and_untouched(base, tuned, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("linked")
    before = base.sha256
    made, _ = import_legacy(Request(write_old(folder / "old.pt", tuned["raw"]), base, folder / "made"))
    assert os.path.samefile(
        made.path / "vae/diffusion_pytorch_model.safetensors", base.path / "vae/diffusion_pytorch_model.safetensors"
    )
    assert not os.path.samefile(made.path / "unet/config.json", base.path / "unet/config.json")
    assert base.sha256 == before != made.sha256


@pytest.mark.parametrize(
    ("said", "section", "has_ema", "taken", "why"),
    [
        (False, "training", True, "raw", "says use_ema_weights_for_inference: false; --weights ema"),
        (True, "training", True, "ema", "says use_ema_weights_for_inference: true; --weights raw"),
        (False, None, True, "raw", "use_ema_weights_for_inference: false"),
        (True, "inference", False, "raw", "no averaged weights, though its config says"),
        (None, None, True, "ema", "does not say use_ema_weights_for_inference"),
        (None, None, False, "raw", "holds no averaged weights"),
        ("no", "training", True, "ema", "does not say"),  # text is no switch
    ],
)
def test_the_files_own_config_says_which_weights_are_taken(
    tmp_path: Path, said: Any, section: str | None, has_ema: bool, taken: str, why: str
) -> None:
    switch = {} if said is None else {"use_ema_weights_for_inference": said}
    config = {**CONFIG, section: {"deeper": switch}} if section else {**CONFIG, **switch}
    weights = {"conv_in.weight": torch.zeros(2)}
    file = write_old(tmp_path / "old.pt", weights, weights if has_ema else None, config=config)
    which, reason = read_legacy(file).preferred()
    assert which == taken and why in reason


def test_which_weights_were_taken_is_told_and_recorded(base, tuned, tmp_path: Path) -> None:
    config = {**CONFIG, "training": {"use_ema_weights_for_inference": False}}
    file = write_old(tmp_path / "old.pt", tuned["raw"], tuned["ema"], config=config)
    made, notes = import_legacy(Request(file, base, tmp_path / "made"))
    assert made.config["imported"]["weights"] == "raw" and "raw weights are taken" in notes[0]
    found = load_pipeline(made.path).unet.state_dict()
    assert all(torch.equal(found[name], value) for name, value in tuned["raw"].items())
    chosen, notes = import_legacy(Request(file, base, tmp_path / "chosen", weights="ema"))
    assert chosen.config["imported"]["weights"] == "ema" and notes == []


# -- LoRA -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def peft_states(source) -> dict[str, dict[str, torch.Tensor]]:
    """State dicts of a peft model around the UNet, as the old training saved them: raw, and their average."""
    import copy

    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, lora_alpha=6, target_modules=TARGETS, lora_dropout=0.05, bias="none")
    state = get_peft_model(copy.deepcopy(source.unet), config).state_dict()
    low_rank = [key for key in state if ".lora_" in key]
    states = {}
    for seed, which in enumerate(("raw", "ema")):
        generator = torch.Generator().manual_seed(seed)
        drawn_ = {key: 0.2 * torch.randn(state[key].shape, generator=generator) for key in low_rank}
        states[which] = {**state, **drawn_}
    return states


def adapted(base, state: dict[str, torch.Tensor], scale: float) -> Any:
    """The base with W + scale * B A, computed here."""
    pipeline = load_pipeline(base.path)
    for name, module in pipeline.unet.named_modules():
        down = state.get(f"base_model.model.{name}.lora_A.default.weight")
        if down is not None:
            up = state[f"base_model.model.{name}.lora_B.default.weight"]
            module.weight.data += scale * (up @ down)
    return pipeline


def in_layout(state: dict[str, torch.Tensor], layout: str) -> dict[str, torch.Tensor]:
    """The same adapter under the names of another library."""
    own = {key.removeprefix("base_model.model."): value for key, value in state.items()}
    own = {key: value for key, value in own.items() if ".lora_" in key}
    if layout == "adapter alone":
        return {f"unet.{key.replace('.default', '')}": value for key, value in own.items()}
    sides = {key.replace("lora_A.default", "down").replace("lora_B.default", "up"): v for key, v in own.items()}
    if layout == "diffusers":
        return {key.replace(".down.", ".lora.down.").replace(".up.", ".lora.up."): v for key, v in sides.items()}
    processors = {}
    for key, value in sides.items():
        layer, side, _ = key.rsplit(".", 2)
        layer = layer.removesuffix(".0") if layer.endswith("to_out.0") else layer
        block, projection = layer.rsplit(".", 1)
        processors[f"{block}.processor.{projection}_lora.{side}.weight"] = value
    return processors


@pytest.mark.parametrize("which", ["raw", "ema"])
def test_lora_round_trip(base, peft_states, tmp_path: Path, which: str) -> None:
    """peft's whole state dict, as the old training saved it, with an average of the same layout."""
    file = write_old(tmp_path / "old.pt", peft_states["raw"], peft_states["ema"])
    made, _ = import_legacy(Request(file, base, tmp_path / "made", weights=which))
    assert made.method == "lora" and made.base["sha256"] == base.sha256
    assert sorted(path.name for path in made.path.iterdir()) == ["checkpoint.json", "pytorch_lora_weights.safetensors"]
    wanted, found = adapted(base, peft_states[which], 6 / 2), load_pipeline(made.path)
    for key, value in wanted.unet.state_dict().items():
        torch.testing.assert_close(found.unet.state_dict()[key], value, rtol=1e-5, atol=1e-6)
    before, after = drawn(wanted), drawn(found)
    assert np.abs(before - after).max() < 1e-3
    assert np.abs(before - drawn(load_pipeline(base.path))).max() > 0.01


@pytest.mark.parametrize("layout", ["adapter alone", "diffusers", "processors"])
@pytest.mark.parametrize("average", ["none", "shadow_params"])
def test_layouts_of_adapters(base, peft_states, tmp_path: Path, layout: str, average: str) -> None:
    states = peft_states
    if layout == "processors":  # older diffusers adapted attention only
        states = {name: {k: v for k, v in state.items() if ".ff." not in k} for name, state in states.items()}
    ema = None if average == "none" else {"shadow_params": list(in_layout(states["ema"], layout).values())}
    file = write_old(tmp_path / "old.pt", in_layout(states["raw"], layout), ema)
    made, _ = import_legacy(Request(file, base, tmp_path / "made"))
    wanted = adapted(base, states["raw" if average == "none" else "ema"], 6 / 2).unet.state_dict()
    found = load_pipeline(made.path).unet.state_dict()
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-6)


def test_ranks_and_alphas_of_single_layers(base, peft_states, tmp_path: Path) -> None:
    state = in_layout(peft_states["raw"], "adapter alone")
    layer = next(key for key in state if "to_q.lora_A" in key).removesuffix(".lora_A.weight")
    state[f"{layer}.lora_A.weight"], state[f"{layer}.lora_B.weight"] = torch.ones(1, 16), torch.ones(16, 1)
    state[f"{layer}.alpha"] = torch.tensor(5.0)
    made, _ = import_legacy(Request(write_old(tmp_path / "old.pt", state), base, tmp_path / "made"))
    key = layer.removeprefix("unet.") + ".weight"
    change = load_pipeline(made.path).unet.state_dict()[key] - load_pipeline(base.path).unet.state_dict()[key]
    torch.testing.assert_close(change, torch.full((16, 16), 5.0))


def test_alpha_is_not_guessed(base, peft_states, tmp_path: Path) -> None:
    file = write_old(tmp_path / "old.pt", peft_states["raw"], config={})
    with pytest.raises(BuilderError, match="alpha"):
        import_legacy(Request(file, base, tmp_path / "made"))
    made, _ = import_legacy(Request(file, base, tmp_path / "made", alpha=3.0))
    wanted = adapted(base, peft_states["raw"], 3 / 2).unet.state_dict()
    found = load_pipeline(made.path).unet.state_dict()
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_lora_with_wrong_weights(base, peft_states, tmp_path: Path) -> None:
    raw = peft_states["raw"]
    key = next(key for key in raw if "to_q.lora_A" in key)

    def refused(state: dict[str, torch.Tensor]) -> str:
        with pytest.raises(BuilderError) as caught:
            import_legacy(Request(write_old(tmp_path / "old.pt", state), base, tmp_path / "made"))
        assert not (tmp_path / "made").exists()
        return caught.value.what

    said = refused({k: v for k, v in raw.items() if k != key})
    assert "1 weights are missing" in said and "to_q (down)" in said
    assert "of another shape" in refused({**raw, key: torch.zeros(2, 99)})
    assert "left over: x.lora_magnitude_vector" in refused(
        {**raw, "base_model.model.x.lora_magnitude_vector": raw[key]}
    )
    alias = key.replace("lora_A.default", "lora.down")
    assert "there under two names" in refused({**raw, alias: raw[key]})
    assert "several adapters" in refused({**raw, key.replace("default", "other"): raw[key]})
    assert "not finite" in refused({**raw, key: torch.full_like(raw[key], float("inf"))})
    base_key = next(key for key in raw if key.endswith("to_q.base_layer.weight"))
    assert "of another shape" in refused({**raw, base_key: torch.zeros(3)})
    other = {k: v + 0.5 if k.endswith("base_layer.weight") else v for k, v in raw.items()}
    assert "differ from 'tiny'" in refused(other)


# -- refusals ---------------------------------------------------------------------------------------------------------


class Evil:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


class EvilEval:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return eval, (f"open({str(self.marker)!r}, 'w')",)


@pytest.mark.parametrize(("kind", "named"), [(Evil, "system"), (EvilEval, "eval")])
@pytest.mark.parametrize("place", ["metrics", "extra_state", "ema_state"])
def test_code_is_refused_and_not_executed(base, tuned, tmp_path: Path, kind: Any, named: str, place: str) -> None:
    marker = tmp_path / "executed"
    file = write_old(tmp_path / "old.pt", tuned["raw"], **{place: {"x": kind(marker)}})
    with pytest.raises(BuilderError, match=f"{named}.*nothing was executed"):
        import_legacy(Request(file, base, tmp_path / "made"))
    assert not marker.exists()
    assert not (tmp_path / "made").exists()
    torch.load(file, weights_only=False)  # the same file, opened as the old system did
    assert marker.exists()


@pytest.mark.parametrize(
    ("value", "named"),
    [(Path("x"), "pathlib"), (np.random.default_rng(0), "numpy"), (np.array, "numpy"), (len, "len")],
)
def test_other_names_are_refused_by_name(tmp_path: Path, value: Any, named: str) -> None:
    file = tmp_path / "old.pt"
    torch.save({"epoch": 1, "x": value}, file)
    with pytest.raises(BuilderError, match=f"asks for .*{named}"):
        read_pickled(file)


def test_what_others_allow_is_not_allowed_here(tmp_path: Path) -> None:
    file = tmp_path / "old.pt"
    torch.save({"x": Path("x")}, file)
    allowed = [type(Path("x"))]
    with torch.serialization.safe_globals(allowed):
        with pytest.raises(BuilderError, match="pathlib"):
            read_pickled(file)
        assert set(allowed) <= set(torch.serialization.get_safe_globals())  # and is allowed again


def test_numpys_old_module_path(tmp_path: Path) -> None:
    """numpy before 2 wrote numpy.core.multiarray; the pickle is rewritten as that one wrote it."""
    import pickle
    import zipfile

    file, old = tmp_path / "new.pt", tmp_path / "old.pt"
    torch.save({"fid": np.float64(3.5), "state": np.random.get_state()}, file)
    with zipfile.ZipFile(file) as new, zipfile.ZipFile(old, "w") as target:
        for name in new.namelist():
            data = new.read(name)
            if name.endswith("data.pkl"):
                assert b"numpy._core.multiarray" in data
                data = data.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
                assert pickle.loads(data)["fid"] == 3.5
            target.writestr(name, data)
    assert read_pickled(old)["fid"] == 3.5
    assert isinstance(read_pickled(old)["fid"], float)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.98])
def test_truncated_file(base, tuned, tmp_path: Path, share: float) -> None:
    file = write_old(tmp_path / "old.pt", tuned["raw"])
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    with pytest.raises(BuilderError, match=r"old\.pt cannot be read"):
        import_legacy(Request(file, base, tmp_path / "made"))


def test_files_that_are_something_else(tmp_path: Path) -> None:
    with pytest.raises(BuilderError, match="there is no file"):
        read_legacy(tmp_path / "none.pt")
    (tmp_path / "text.pt").write_text("not a checkpoint")
    with pytest.raises(BuilderError, match="cannot be read"):
        read_legacy(tmp_path / "text.pt")
    torch.save([1], tmp_path / "list.pt")
    with pytest.raises(BuilderError, match="holds a list"):
        read_legacy(tmp_path / "list.pt")
    torch.save({"epoch": 1}, tmp_path / "before.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(BuilderError, match=r"since 1\.6"):
        read_legacy(tmp_path / "before.pt")


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"unet_lora_state": ...}, "no unet_lora_state; it holds epoch, lr_scheduler_state"),
        ({"epoch": ...}, "has no epoch"),
        ({"unet_lora_state": {}}, "not a dict of weights"),
        ({"unet_lora_state": {"conv_in.weight": 3}}, "not a dict of weights"),
        ({"epoch": "thirty"}, "epoch in .* is 'thirty'"),
        ({"metrics": [1]}, "metrics in .* is not a dict"),
    ],
)
def test_missing_and_foreign_entries(tuned, tmp_path: Path, changed: dict[str, Any], said: str) -> None:
    with pytest.raises(BuilderError, match=said):
        read_legacy(write_old(tmp_path / "old.pt", tuned["raw"], **changed))


def test_every_weight_is_accounted_for(base, tuned, tmp_path: Path) -> None:
    raw = tuned["raw"]
    names = list(raw)

    def refused(state: dict[str, torch.Tensor]) -> str:
        with pytest.raises(BuilderError) as caught:
            import_legacy(Request(write_old(tmp_path / "old.pt", state), base, tmp_path / "made"))
        assert not (tmp_path / "made").exists()
        return caught.value.what

    said = refused({name: raw[name] for name in names[12:]})
    assert "12 weights are missing" in said and all(name in said for name in sorted(names[:12])[:10])
    assert said.endswith("and 2 more")
    said = refused({**raw, "stray.weight": torch.zeros(2)})
    assert "left over" in said and "stray.weight" in said
    said = refused({**raw, names[0]: torch.zeros(3, 3)})
    assert "of another shape" in said and names[0] in said and "(3, 3)" in said
    said = refused({**raw, names[3]: torch.full_like(raw[names[3]], float("nan"))})
    assert "not finite" in said and names[3] in said


@pytest.mark.parametrize(
    ("ema", "said"),
    [
        ({"decay": 0.9, "weights_of_old": [1]}, "layout that is not known: decay, weights_of_old"),
        ([torch.zeros(2)], "layout that is not known: a list"),
        ({"shadow_params": [torch.zeros(2)] * 3}, "shadow_params has 3 entries"),
    ],
)
def test_averages_of_unknown_layout(base, tuned, tmp_path: Path, ema: Any, said: str) -> None:
    file = write_old(tmp_path / "old.pt", tuned["raw"], ema)
    with pytest.raises(BuilderError, match=said):
        import_legacy(Request(file, base, tmp_path / "made"))
    made, _ = import_legacy(Request(file, base, tmp_path / "made", weights="raw"))
    assert made.path.is_dir()


def test_averages_in_another_order_are_noticed(base, tuned, tmp_path: Path) -> None:
    file = write_old(tmp_path / "old.pt", tuned["raw"], {"shadow_params": list(tuned["ema"].values())[::-1]})
    with pytest.raises(BuilderError, match="another shape"):
        import_legacy(Request(file, base, tmp_path / "made"))


def test_averages_that_are_not_there(base, tuned, tmp_path: Path) -> None:
    file = write_old(tmp_path / "old.pt", tuned["raw"])
    with pytest.raises(BuilderError, match="no averaged weights"):
        import_legacy(Request(file, base, tmp_path / "made", weights="ema"))
    with pytest.raises(BuilderError, match="exists"):
        import_legacy(Request(file, base, tmp_path))


def test_bases_that_cannot_be(base, tuned, peft_states, tmp_path: Path) -> None:
    file = write_old(tmp_path / "old.pt", peft_states["raw"])
    adapter, _ = import_legacy(Request(file, base, tmp_path / "adapter"))
    with pytest.raises(BuilderError, match="is an adapter itself"):
        import_legacy(Request(file, adapter, tmp_path / "made"))
    with pytest.raises(BuilderError, match="single file"):
        import_legacy(Request(file, Checkpoint(file), tmp_path / "made"))
    folder = Path(shutil.copytree(base.path, tmp_path / "broken"))
    (folder / "unet/config.json").unlink()
    with pytest.raises(BuilderError, match="does not describe a UNet"):
        import_legacy(Request(file, read_checkpoint(folder), tmp_path / "made"))


# -- memory -----------------------------------------------------------------------------------------------------------


# Peak and present memory as the kernel keeps them for the process itself: ru_maxrss begins with the parent's.
PEAK = """
import re, sys
from pathlib import Path
from builder.models.checkpoint import read_checkpoint
from builder.models.importing import Request, import_legacy, unet_on_meta
base, file, target = map(Path, sys.argv[1:])
memory = lambda what: 1024 * int(re.search(what + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
unet_on_meta(read_checkpoint(base))  # what libraries need, before the weights
before = memory("VmRSS")
import_legacy(Request(file, read_checkpoint(base), target, weights="raw"))
print(memory("VmHWM") - before)
"""


def test_memory_stays_below_one_and_a_half_times_the_weights(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """In a process of its own, with 200 MB of weights, and an average beside them that is not asked for."""
    shutil.copytree(tiny_checkpoint, tmp_path / "base")
    config = tmp_path / "base/unet/config.json"  # all that an import reads of the base's UNet
    config.write_text(json.dumps({**json.loads(config.read_text()), "block_out_channels": [64, 640]}))
    unet = unet_on_meta(read_checkpoint(tmp_path / "base"))
    state = {name: torch.ones(parameter.shape) for name, parameter in unet.named_parameters()}
    weights = sum(value.nbytes for value in state.values())
    assert weights > 180e6
    write_old(tmp_path / "old.pt", state, {key: value + 1 for key, value in state.items()})
    words = [sys.executable, "-c", PEAK, str(tmp_path / "base"), str(tmp_path / "old.pt"), str(tmp_path / "made")]
    done = subprocess.run(words, capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent)
    assert 0.1 * weights < int(done.stdout) < 1.5 * weights  # the file's pages count while they are mapped
    assert (tmp_path / "made/unet/diffusion_pytorch_model.safetensors").stat().st_size > weights


# -- lineage and history ----------------------------------------------------------------------------------------------


KEY = PatientKey(b"a secret of the site", "test")


def test_lineage_from_a_table_of_patients(base, tmp_path: Path) -> None:
    from dataclasses import replace

    table = tmp_path / "patients.csv"
    table.write_text("Patient#;Remark\n7;x\n07;again\n12.0;\n;no patient\n")
    foreign = replace(base, lineage=Lineage())
    lineage = patients_of(table, KEY, foreign)
    assert lineage == Lineage(True, KEY.fingerprint, sorted([KEY.hash("7"), KEY.hash("12")]), "column", [KEY.form("7")])
    seen = replace(base, lineage=Lineage(True, KEY.fingerprint, ["0" * 32], "column", [KEY.form("7")]))
    assert len(patients_of(table, KEY, seen).patients) == 3
    with pytest.raises(BuilderError, match="with different keys"):
        patients_of(table, KEY, base)
    table.write_text("Patient#\n\n")
    with pytest.raises(BuilderError, match="names no patient"):
        patients_of(table, KEY, foreign)
    table.write_text("Name\n7\n")
    with pytest.raises(BuilderError, match="no column"):
        patients_of(table, KEY, foreign)


def test_history_comes_along(base, tuned, tmp_path: Path) -> None:
    history = tmp_path / "checkpoint_history.json"
    history.write_text(
        '{"checkpoint_history": [{"epoch": 30, "path": "/old/checkpoint_epoch_0030.pt", "metrics": {"fid": 190.0,'
        ' "is_mean": NaN}, "timestamp": "t"}, {"epoch": 35, "path": "b.pt", "metrics": {"fid": 210.0}}],'
        ' "best_checkpoint": null, "best_score": Infinity, "monitor_metric": "val_fid", "monitor_mode": "min"}'
    )
    file = write_old(tmp_path / "old.pt", tuned["raw"], metrics=None)
    made, notes = import_legacy(Request(file, base, tmp_path / "made", history=history))
    assert made.metrics == {"fid": 190.0, "is_mean": None}  # the file has none; those of its epoch
    assert len(notes) == 2 and "'val_fid'" in notes[1] and "epoch 30 (190)" in notes[1]
    imported = read_checkpoint(made.path).config["imported"]
    assert imported["monitor"] == "fid"
    assert [(entry["epoch"], entry["path"]) for entry in imported["history"]] == [
        (30, "checkpoint_epoch_0030.pt"), (35, "b.pt"),
    ]  # fmt: skip


def test_import_from_the_command_line(base, tuned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from click.testing import CliRunner

    from builder.cli.checkpoint import checkpoint

    monkeypatch.chdir(tmp_path)
    (tmp_path / "site.key").write_text("a secret of the site")
    (tmp_path / "patients.csv").write_text("patient\n7\n8\n")
    write_old(tmp_path / "old.pt", tuned["raw"], tuned["ema"])
    words = ["import", "old.pt", "--base", str(base.path), "--to", "old", "--weights", "raw"]
    done = CliRunner().invoke(checkpoint, words)
    assert done.exit_code == 0, done.output
    assert "epoch 30, raw weights, full, lineage unknown" in done.output
    assert resolve("old").path == Path("checkpoints/old")
    shown = CliRunner().invoke(checkpoint, ["show", "old"]).output
    assert "old.pt (raw weights)" in shown and "metric fid" in shown and "unknown" in shown

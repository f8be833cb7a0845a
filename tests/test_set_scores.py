"""Scores of a set: agreement with others and with published definitions, invariants, bad input, leaks, the commands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import sqrtm

from builder.cli import cli
from builder.errors import BuilderError
from builder.phases import HEALING_PHASES
from builder.quality.features import load_extractor
from builder.quality.reference import Reference, load_reference, save_reference
from builder.quality.sets.bootstrap import image_counts, interval, patient_counts
from builder.quality.sets.comparison import Naming, Side, compare
from builder.quality.sets.detect import TRAITS, Auc, probe_auc, traits
from builder.quality.sets.distances import Frechet, Kernel, frechet_distance, kernel_distance, kernel_distance_blocks
from builder.quality.sets.diversity import Inception, Vendi, VendiRatio, vendi_score
from builder.quality.sets.floors import real_floors
from builder.quality.sets.manifold import Neighbours, manifold_scores
from builder.quality.sets.scores import set_scores, shuffled
from builder.shards.dataset import Dataset
from builder.shards.lineage import find_leak
from builder.shards.schema import STAMP
from builder.shards.storage import Storage
from builder.shards.writer import Sample, encode_png, image_row, write_manifest, write_shard
from tests.conftest import textured, write_real
from tests.lineages import ALIKE

FEATURES = "tests.test_set_scores:tiny_network"
PLAIN = Naming("tiny", standard=False)


class TinyNetwork(torch.nn.Module):
    """Deterministic features of 12 dimensions: a projection of the image at 8 px."""

    input_size = 8

    def __init__(self, dimension: int = 12) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("weight", torch.randn(3 * 64, dimension, generator=generator))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.leaky_relu(images.flatten(1) @ self.weight, 0.2)


def tiny_network() -> TinyNetwork:
    return TinyNetwork()


def broken_network() -> Any:
    """Features that are not finite for dark images."""

    def network(images: torch.Tensor) -> torch.Tensor:
        means = images.mean((2, 3))
        return torch.where(means < 0.1, torch.nan, means)

    return network


def ones(n: int) -> np.ndarray:
    return np.ones(n, int)


def draw(n: int, dimension: int, seed: int, shift: float = 0.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(shift, 1, (n, dimension))


def write_synthetic(
    root: Path, name: str = "made", per_phase: dict[str, int] | None = None, size: int = 32, *,
    lineage: dict[str, Any] | None = None, scores: dict[str, float] | None = None, flat: bool = False,
) -> Dataset:  # fmt: skip
    """A synthetic dataset of textured (or flat grey) images whose generator saw no held-out patient."""
    dataset = Dataset(name, Storage(root))
    samples = []
    for code, count in (per_phase or dict.fromkeys("IPR", 12)).items():
        for index in range(count):
            pixels = np.full((size, size, 3), 128, np.uint8) if flat else textured(7000 + 100 * ord(code) + index, size)
            row = image_row(f"{name}-{code}-{index:08d}", code, HEALING_PHASES.label(code), "synthetic", pixels)
            samples.append(Sample(row | (scores or {}), encode_png(pixels)))
    write_shard(dataset.storage, name, 0, samples)
    dataset.write_info(
        {
            "name": name, "state": "complete", "origin": "synthetic", "created": "2026-01-02T00:00:00+00:00",
            "classes": HEALING_PHASES.to_json(), "count": len(samples), "config": {}, "parent": None,
            "lineage": lineage or {"known": True, "key_fingerprint": "test", "patients": ["49" + f"{0:030x}"], **ALIKE},
        }
    )  # fmt: skip
    return dataset


def stands_on(synthetic: Dataset, reference: Reference) -> Dataset:
    """As if `synthetic` had been scored against this reference."""
    save_reference(synthetic, reference)
    metadata = synthetic.shard_metadata(0) | {STAMP: reference.version}
    table = synthetic.shard_table(0).replace_schema_metadata(metadata)
    write_manifest(synthetic.storage, f"manifests/{synthetic.name}/shard-000000.parquet", table)
    return synthetic


def scored(synthetic: Dataset, real: Dataset, **settings: Any) -> dict[str, Any]:
    settings = {"split": "val", "replicates": 20, "progress": False, "spec": FEATURES, **settings}
    return set_scores(synthetic, real, settings.pop("split"), load_extractor(settings.pop("spec")), **settings)


def figures_of(result: dict[str, Any], group: str = "pooled") -> dict[str, dict[str, Any]]:
    """By the figure's name, without the extractor's."""
    return {row["name"].replace("[tests.test_set_scores.tiny_network]", ""): row for row in result["groups"][group]}


# -- agreement with others --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "m"), [(60, 80), (20, 30), (40, 12), (2, 2)])  # of 40 dimensions: more, fewer, as many
def test_distances_agree_with_torchmetrics(n: int, m: int) -> None:
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import KernelInceptionDistance

    class Network(torch.nn.Module):
        num_features = 40

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return network(images.double() / 255)

    network = TinyNetwork(40).double()
    generator = torch.Generator().manual_seed(n)
    real, made = (torch.randint(0, high, (k, 3, 8, 8), generator=generator, dtype=torch.uint8) for k, high in
                  ((n, 256), (m, 200)))  # fmt: skip
    x, y = (Network()(images).numpy() for images in (real, made))
    fid = FrechetInceptionDistance(feature=Network()).set_dtype(torch.float64)
    fid.update(real, real=True)
    fid.update(made, real=False)
    assert frechet_distance(x, y) == pytest.approx(float(fid.compute()), rel=1e-4)
    equal = min(n, m)  # theirs draws subsets: all of both sets only when these are of one size
    kid = KernelInceptionDistance(feature=Network(), subsets=1, subset_size=equal).set_dtype(torch.float64)
    kid.update(real[:equal], real=True)
    kid.update(made[:equal], real=False)
    assert kernel_distance(x[:equal], y[:equal]) == pytest.approx(float(kid.compute()[0]), rel=1e-4)


@pytest.mark.parametrize(("n", "dimension"), [(50, 6), (9, 6), (40, 30)])
def test_frechet_distance_is_its_formula(n: int, dimension: int) -> None:
    x, y = draw(n, dimension, 1), draw(n + 5, dimension, 2, 0.5) * 2
    a, b = np.cov(x.T), np.cov(y.T)
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(a + b - 2 * np.real(sqrtm(a @ b)))
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-8)
    assert Frechet(x, y)(ones(n), ones(n + 5)) == pytest.approx(expected, rel=1e-8)


def test_kernel_distance_is_its_formula() -> None:
    x, y = draw(7, 3, 1), draw(5, 3, 2, 1.0)

    def mean(a: np.ndarray, b: np.ndarray, same: bool) -> float:
        pairs = [(p @ q / 3 + 1) ** 3 for i, p in enumerate(a) for j, q in enumerate(b) if not same or i != j]
        return float(np.mean(pairs))

    expected = mean(x, x, True) + mean(y, y, True) - 2 * mean(x, y, False)
    assert kernel_distance(x, y) == pytest.approx(expected, rel=1e-12)
    assert kernel_distance_blocks(x, y, 2) == pytest.approx(
        [kernel_distance(x[i : i + 2], y[i : i + 2]) for i in (0, 2)]
    )
    assert len(kernel_distance_blocks(x, y, 4)) == 0


def test_kernel_distance_of_one_distribution_is_zero_in_the_mean() -> None:
    values = [kernel_distance(draw(12, 4, 2 * seed), draw(12, 4, 2 * seed + 1)) for seed in range(400)]
    assert abs(np.mean(values)) < 4 * np.std(values) / np.sqrt(len(values))
    assert min(values) < 0 < max(values)


def test_manifold_scores_by_hand() -> None:
    """On a line, k = 1. Real 0, 1, 3 with radii 1, 1, 2; synthetic 0.5, 2, 9 with radii 1.5, 1.5, 7."""
    real, synthetic = np.array([[0.0], [1], [3]]), np.array([[0.5], [2], [9]])
    found = manifold_scores(real, synthetic, k=1)
    assert found["precision"] == pytest.approx(2 / 3)  # 9 lies in no real ball
    assert found["recall"] == pytest.approx(1)  # 0 and 1 within 1.5 of 0.5, 3 within 1.5 of 2
    assert found["density"] == pytest.approx((2 + 2 + 0) / 3)  # 0.5 in the balls of 0, 1; 2 in those of 1, 3
    assert found["coverage"] == pytest.approx(1)


@given(st.integers(0, 10_000), st.integers(1, 4), st.integers(6, 20), st.integers(6, 20))
@settings(max_examples=30, deadline=None)
def test_manifold_scores_are_their_published_definitions(seed: int, k: int, n: int, m: int) -> None:
    real, synthetic = draw(n, 2, seed), draw(m, 2, seed + 1, 0.7)

    def radius(own: np.ndarray, i: int) -> float:
        return sorted(float(np.linalg.norm(own[i] - other)) for j, other in enumerate(own) if j != i)[k - 1]

    def within(point: np.ndarray, own: np.ndarray, i: int) -> bool:
        return bool(np.linalg.norm(point - own[i]) <= radius(own, i))

    expected = {
        "precision": np.mean([any(within(s, real, i) for i in range(n)) for s in synthetic]),
        "recall": np.mean([any(within(r, synthetic, j) for j in range(m)) for r in real]),
        "density": sum(within(s, real, i) for s in synthetic for i in range(n)) / (k * m),
        "coverage": np.mean([any(within(s, real, i) for s in synthetic) for i in range(n)]),
    }
    assert manifold_scores(real, synthetic, k) == pytest.approx(expected)


@pytest.mark.parametrize("n", [1, 5, 30])
def test_vendi_score_has_its_closed_forms(n: int) -> None:
    assert vendi_score(np.full((n, 7), 3.0)) == pytest.approx(1)
    assert vendi_score(np.eye(n)) == pytest.approx(n)
    assert vendi_score(np.zeros((n, 3))) == pytest.approx(n)  # images without features are like no other
    halves = np.repeat(np.eye(2), [n, 3 * n], axis=0)  # shares 1/4, 3/4 of two orthogonal kinds
    assert vendi_score(halves) == pytest.approx(np.exp(-0.25 * np.log(0.25) - 0.75 * np.log(0.75)))
    assert VendiRatio(np.eye(n + 4), np.eye(n))(ones(n + 4), ones(n)) == pytest.approx(1)  # of equal N


def test_inception_score_has_its_closed_forms() -> None:
    sure = np.eye(5) * 200.0
    assert Inception(sure)(ones(5)) == pytest.approx(5)
    assert Inception(np.zeros((4, 3)))(ones(4)) == pytest.approx(1)
    assert Inception(sure)(np.array([1, 1, 0, 0, 0])) == pytest.approx(2)


def test_auc_agrees_with_scikit_learn() -> None:
    from sklearn.metrics import roc_auc_score

    real, made = draw(30, 1, 0)[:, 0].round(1), draw(40, 1, 1, 0.4)[:, 0].round(1)  # rounded: ties
    expected = roc_auc_score(np.repeat([0, 1], [30, 40]), np.concatenate([real, made]))
    assert Auc(real, made)(ones(30), ones(40)) == pytest.approx(expected)
    w = np.arange(30) % 3
    expected = roc_auc_score(np.repeat([0, 1], [w.sum(), 40]), np.concatenate([np.repeat(real, w), made]))
    assert Auc(real, made)(w, ones(40)) == pytest.approx(expected)


def test_the_probe_is_tried_on_patients_it_did_not_see() -> None:
    """Each patient bears marks of his own: a probe that may learn them tells his other photographs from anyone's."""
    groups, images = [f"p{i // 4}" for i in range(160)], [str(i) for i in range(160)]

    def marked(seed: int) -> np.ndarray:
        return draw(160, 200, seed) * 0.1 + np.repeat(draw(40, 200, seed + 1000), 4, axis=0)

    def auc(real: np.ndarray, other: np.ndarray, patients: list[str]) -> float:
        probe = probe_auc(real, other, patients, patients)
        assert probe is not None
        return probe(ones(160), ones(160))

    pairs = [(marked(2 * seed), marked(2 * seed + 1)) for seed in range(4)]
    assert np.mean([auc(real, other, groups) for real, other in pairs]) == pytest.approx(0.5, abs=0.12)
    assert min(auc(real, other, images) for real, other in pairs) > 0.99
    assert auc(pairs[0][0], pairs[0][1] + 1, groups) > 0.99
    assert probe_auc(*pairs[0], ["one"] * 160, groups) is None


def test_traits_show_what_was_done_to_an_image() -> None:
    row = {"size": 100, "width": 10, "height": 5}
    pixels = textured(3)
    noisy = np.clip(pixels + np.random.default_rng(0).normal(0, 12, pixels.shape), 0, 255).astype(np.uint8)
    before, after = traits(pixels, row), traits(noisy, row)
    assert set(TRAITS) <= set(before)
    assert after["noise"] > before["noise"]
    assert before["bytes_per_pixel"] == 2
    grey = traits(np.full((6, 6, 3), 90, np.uint8), row)
    assert grey["saturation"] == grey["noise"] == 0
    assert traits(np.full((1, 1, 3), 90, np.uint8), row)["noise"] == 0
    exact = np.random.default_rng(1).normal(128, 8, (200, 200, 1)).round().repeat(3, 2).astype(np.uint8)
    assert traits(exact, row)["noise"] == pytest.approx(8, rel=0.03)


# -- invariants -------------------------------------------------------------------------------------------------------


@given(st.integers(0, 10_000), st.integers(8, 25), st.integers(8, 25), st.integers(1, 12))
@settings(max_examples=30, deadline=None)
def test_figures_do_not_depend_on_order_or_turning(seed: int, n: int, m: int, dimension: int) -> None:
    x, y = draw(n, dimension, seed), draw(m, dimension, seed + 1, 0.3)
    chance = np.random.default_rng(seed)
    turn = np.linalg.qr(chance.normal(size=(dimension, dimension)))[0]
    p, q = chance.permutation(n), chance.permutation(m)
    for figure in (frechet_distance, kernel_distance, lambda a, b: manifold_scores(a, b, 2)["density"]):
        value = figure(x, y)
        assert figure(x[p], y[q]) == pytest.approx(value, rel=1e-6, abs=1e-9)
        assert figure(x @ turn, y @ turn) == pytest.approx(value, rel=1e-6, abs=1e-9)
    assert vendi_score(x[p] @ turn * 3) == pytest.approx(vendi_score(x), rel=1e-6)
    assert 1 - 1e-9 <= vendi_score(x) <= min(n, dimension) + 1e-9
    assert frechet_distance(x, y) == pytest.approx(frechet_distance(y, x), rel=1e-6)
    assert frechet_distance(x, x[p]) == pytest.approx(0, abs=1e-6)


@given(st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_counts_are_as_if_the_images_were_there_so_often(seed: int) -> None:
    x, y = draw(14, 5, seed), draw(11, 5, seed + 1, 0.5)
    chance = np.random.default_rng(seed)
    w, v = image_counts(14, 1, chance)[0], image_counts(11, 1, chance)[0]
    many, other = np.repeat(x, w, axis=0), np.repeat(y, v, axis=0)
    assert Frechet(x, y)(w, v) == pytest.approx(frechet_distance(many, other), rel=1e-6, abs=1e-8)
    assert Vendi(x)(w) == pytest.approx(vendi_score(many), rel=1e-6)
    keep = np.ones(14, int)
    keep[chance.integers(14)] = 0
    rest = keep.astype(bool)
    assert Kernel(x, y)(keep, ones(11)) == pytest.approx(kernel_distance(x[rest], y), rel=1e-9, abs=1e-12)
    assert Neighbours(x, y, 3)(keep, ones(11)) == pytest.approx(manifold_scores(x[rest], y, 3))


def test_an_image_drawn_twice_is_not_its_own_neighbour_nor_pair() -> None:
    x, y = draw(12, 3, 0), draw(12, 3, 1)
    twice = np.full(12, 2)
    assert Kernel(x, y)(twice, twice) == pytest.approx(kernel_distance(x, y), rel=1e-12)
    # Every neighbour stands there twice: with k = 2 the balls are those of k = 1, not points.
    doubled, plain = Neighbours(x, y, 2)(twice, twice), manifold_scores(x, y, 1)
    assert {name: doubled[name] for name in ("precision", "recall", "coverage")} == pytest.approx(
        {name: plain[name] for name in ("precision", "recall", "coverage")}
    )
    assert np.isnan(Neighbours(x, y, 3)(np.eye(12, dtype=int)[0], ones(12))["precision"])
    assert np.isnan(Frechet(x, y)(np.eye(12, dtype=int)[0], ones(12)))


def test_patients_are_drawn_whole() -> None:
    groups = ["a", "b", "a", "c", "b", "a"]
    counts = patient_counts(groups, 500, np.random.default_rng(0))
    assert (counts[:, 0] == counts[:, 2]).all() and (counts[:, 0] == counts[:, 5]).all()
    assert (counts[:, 0] + counts[:, 1] + counts[:, 3] == 3).all()
    assert counts[:, 3].mean() == pytest.approx(1, abs=0.15)
    assert (image_counts(7, 50, np.random.default_rng(0)).sum(1) == 7).all()


def test_intervals_hold_the_estimate_and_cover() -> None:
    """Of the mean of 40 draws, about 95 of 100 intervals hold the truth; of a biased figure all hold the estimate."""
    held = 0
    for seed in range(200):
        chance = np.random.default_rng(seed)
        values = chance.normal(0, 1, 40)
        counts = image_counts(40, 200, chance)
        low, high = interval(values.mean(), counts @ values / 40) or (np.nan, np.nan)
        held += low <= 0 <= high
    assert 175 <= held <= 199
    x, y = draw(60, 20, 0), draw(60, 20, 1)
    estimate = compare(
        Side(x, [str(i // 3) for i in range(60)]), Side(y, [str(i) for i in range(60)]), PLAIN, replicates=50
    )
    for figure in estimate.values():
        assert figure.value is not None and figure.low is not None and figure.high is not None
        assert figure.low <= figure.value <= figure.high
    assert interval(1.0, np.full(10, np.nan)) is None
    assert interval(0.99, np.linspace(0.5, 1.5, 50), (0, 1)) == pytest.approx((0.5145, 1), abs=1e-3)


def test_too_few_resamples_give_no_interval_that_looks_like_one(real: Dataset, tmp_path: Path) -> None:
    synthetic = write_synthetic(tmp_path)
    with pytest.raises(BuilderError, match="at least 20"):
        scored(synthetic, real, replicates=2)
    assert figures_of(scored(synthetic, real, replicates=0))["fd"]["low"] is None


def test_only_the_standard_network_gives_fid_kid_is() -> None:
    x, y = draw(20, 4, 0), draw(20, 4, 1)
    sides = [Side(z, [str(i) for i in range(20)], {}, z) for z in (x, y)]
    standard = compare(sides[0], sides[1], Naming("inception", standard=True))
    assert {"FID", "KID", "IS", "precision[inception]"} <= set(standard)
    other = compare(sides[0], sides[1], PLAIN)
    assert {"fd[tiny]", "kd[tiny]"} <= set(other) and not {"FID", "KID", "IS", "is[tiny]"} & set(other)
    assert other["fd[tiny]"].value == standard["FID"].value


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("figure", [frechet_distance, kernel_distance, manifold_scores])
def test_figures_say_what_is_wrong(figure: Any) -> None:
    good = draw(8, 3, 0)
    bad = good.copy()
    bad[2, 1] = np.nan
    with pytest.raises(BuilderError, match="1 of 8 images are not finite"):
        figure(good, bad)
    with pytest.raises(BuilderError, match="needs at least"):
        figure(good, good[:1])
    with pytest.raises(BuilderError, match="shape"):
        figure(good[0], good)


def test_all_equal_images_have_defined_figures() -> None:
    same, other = np.full((9, 4), 0.5), draw(9, 4, 0)
    groups = [str(i) for i in range(9)]
    equal = compare(Side(same, groups), Side(same, groups), PLAIN, replicates=20)
    values = {name: figure.value for name, figure in equal.items()}
    assert values["fd[tiny]"] == pytest.approx(0, abs=1e-9)
    assert values["kd[tiny]"] == pytest.approx(0, abs=1e-9)
    assert values["precision[tiny]"] == values["recall[tiny]"] == values["coverage[tiny]"] == 1
    assert values["vendi_ratio[tiny]"] == pytest.approx(1)
    assert values["auc[tiny]"] == pytest.approx(0.5)
    for sides in ((same, other), (other, same)):
        for figure in compare(Side(sides[0], groups), Side(sides[1], groups), PLAIN, replicates=20).values():
            assert figure.value is not None and np.isfinite(figure.value)


@pytest.mark.parametrize(("n", "m"), [(0, 5), (5, 0), (1, 1), (1, 9), (9, 1), (3, 3)])
def test_too_few_images_give_no_value_and_a_note(n: int, m: int) -> None:
    groups = [str(i) for i in range(9)]
    found = compare(Side(draw(n, 4, 0), groups[:n]), Side(draw(m, 4, 1), groups[:m]), PLAIN, replicates=10)
    for figure in found.values():
        assert (figure.value is None or np.isfinite(figure.value)) and figure.note
    assert found["precision[tiny]"].value is None


# -- datasets ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def real(tmp_path: Path) -> Dataset:
    return write_real(tmp_path, per_phase=36, size=40)


def test_every_figure_has_its_n_interval_and_floor(real: Dataset, tmp_path: Path) -> None:
    result = scored(write_synthetic(tmp_path), real)
    assert list(result["groups"]) == ["pooled", "I", "P", "R"]
    pooled, phase = figures_of(result), figures_of(result, "I")
    assert (phase["fd"]["n_real"], phase["fd"]["n_synthetic"]) == (6, 12)
    assert (pooled["fd"]["n_real"], pooled["fd"]["n_synthetic"]) == (18, 36)
    for name, figure in pooled.items():
        if name != "copies":
            assert figure["low"] <= figure["value"] <= figure["high"]
            assert np.isfinite(figure["floor"])
    assert pooled["copies"]["value"] is None and "was never scored" in pooled["copies"]["note"]
    assert result["image_size"] == 32 and result["allow_leak"] is None
    assert "one patient: no interval" in phase["fd"]["note"] and phase["fd"]["low"] is None
    assert "only 3 patients" in pooled["fd"]["note"] and "N <= 12" not in pooled["fd"]["note"]
    assert "N <= 12 dimensions" in phase["fd"]["note"]
    json.dumps(result, allow_nan=False)


def test_the_share_of_copies_comes_from_the_scores(real: Dataset, tmp_path: Path) -> None:
    synthetic = write_synthetic(tmp_path, scores={"copy_score": 0.97})
    stands_on(synthetic, Reference(
        against="clinic", ssim_size=64, ssim_stride=7, panel_seed=0, panel_size=2, features="tiny", lpips=None,
        panel={}, panel_sha256="", training_sha256="",
        copy={"threshold": 0.95, "alarms": 1, "n": 500, "rate": 0.002, "interval": [0.0, 0.01], "patients": 30},
    ))  # fmt: skip
    for group, n in (("pooled", 36), ("P", 12)):
        copies = figures_of(scored(synthetic, real), group)["copies"]
        assert (copies["value"], copies["floor"], copies["n_real"], copies["n_synthetic"]) == (1.0, 0.002, 500, n)
        assert copies["low"] == pytest.approx(0.025 ** (1 / n)) and copies["high"] == 1  # Clopper & Pearson
    at_threshold = write_synthetic(tmp_path, "edge", scores={"copy_score": 0.95})  # 32 bits: 0.949999988
    stands_on(at_threshold, load_reference(synthetic))
    assert figures_of(scored(at_threshold, real))["copies"]["value"] == 1
    one_phase = write_synthetic(tmp_path, "one_phase", {"I": 2}, scores={"copy_score": 0.1})
    stands_on(one_phase, load_reference(synthetic))
    assert figures_of(scored(one_phase, real), "P")["copies"]["note"] == "no synthetic image of P"
    unscored = write_synthetic(tmp_path, "unscored")
    stands_on(unscored, load_reference(synthetic))
    assert "never scored for copies" in figures_of(scored(unscored, real))["copies"]["note"]


def test_synthetic_images_unlike_real_ones_are_beyond_the_floor(real: Dataset, tmp_path: Path) -> None:
    alike, grey = scored(write_synthetic(tmp_path), real), scored(write_synthetic(tmp_path, "grey", flat=True), real)
    alike, grey = figures_of(alike), figures_of(grey)
    assert grey["fd"]["low"] > grey["fd"]["floor"] and grey["kd"]["value"] > alike["kd"]["value"]
    assert grey["vendi_ratio"]["value"] < 0.8 < alike["vendi_ratio"]["value"] < 1.25
    assert grey["recall"]["value"] == 0
    assert grey["auc[contrast]"]["gives_away"] and grey["auc[contrast]"]["value"] == 1
    assert "less in synthetic" in grey["auc[contrast]"]["note"]
    assert alike["auc[contrast]"]["value"] < 0.9


def test_results_depend_on_the_seed_alone(real: Dataset, tmp_path: Path) -> None:
    synthetic = write_synthetic(tmp_path, per_phase={"I": 20, "P": 40, "R": 9})
    one = scored(synthetic, real, max_n=15)
    assert scored(synthetic, real, max_n=15) == one
    assert figures_of(scored(synthetic, real, max_n=15, seed=1))["fd"]["value"] != figures_of(one)["fd"]["value"]
    rows = real.table().to_pylist()
    assert shuffled(rows, 3) == shuffled(rows[::-1], 3) != shuffled(rows, 4)
    assert figures_of(one)["fd"]["n_synthetic"] == 15 and figures_of(one, "R")["fd"]["n_synthetic"] == 9
    write_real(tmp_path / "turned", per_phase=36, size=40, codes="RPI")  # the same crops, in other shards
    turned = Dataset("clinic", Storage(tmp_path / "turned"))
    assert scored(synthetic, turned, max_n=15)["groups"] == one["groups"]


def test_a_phase_missing_on_one_side_is_said_and_left_out(real: Dataset, tmp_path: Path) -> None:
    without_r = scored(write_synthetic(tmp_path, per_phase={"I": 9, "P": 9}), real)
    assert "without R" in figures_of(without_r)["fd"]["note"]
    assert figures_of(without_r)["fd"]["n_real"] == 12 and figures_of(without_r)["fd"]["value"] is not None
    for figure in figures_of(without_r, "R").values():
        assert figure["value"] is None and figure["low"] is None
        assert figure["name"] == "copies" or "no synthetic image of R" in figure["note"]
    no_r_real = write_real(tmp_path / "other", "other", per_phase=12, codes="IP")
    result = scored(write_synthetic(tmp_path / "other"), no_r_real)
    assert "no held-out crop of R" in figures_of(result, "R")["fd"]["note"]
    only_r = scored(write_synthetic(tmp_path / "other", "r", per_phase={"R": 8}), no_r_real)
    assert all(figure["value"] is None for figure in only_r["groups"]["pooled"])


def test_one_image_and_all_equal_images(real: Dataset, tmp_path: Path) -> None:
    one = scored(write_synthetic(tmp_path, "one", per_phase={"I": 1}), real)
    assert figures_of(one)["fd"]["value"] is None and "needs 2 images" in figures_of(one)["fd"]["note"]
    json.dumps(one, allow_nan=False)
    equal = figures_of(scored(write_synthetic(tmp_path, "equal", flat=True), real))
    assert all(np.isfinite(figure["value"]) for name, figure in equal.items() if name != "copies")


def test_an_empty_split_the_training_split_and_wrong_origins_are_refused(real: Dataset, tmp_path: Path) -> None:
    synthetic = write_synthetic(tmp_path)
    with pytest.raises(BuilderError, match="learnt from it"):
        scored(synthetic, real, split="train")
    with pytest.raises(BuilderError, match="did you mean 'val'"):
        scored(synthetic, real, split="vall")
    with pytest.raises(BuilderError, match="'made' is synthetic, and was given as real"):
        scored(synthetic, synthetic)
    with pytest.raises(BuilderError, match="'clinic' is real, and was given as synthetic"):
        scored(real, real)
    few = write_real(tmp_path, "few", per_phase=4)  # patients 0 to 3 of a phase: all train
    with pytest.raises(BuilderError, match="'few' has no crops in its split 'val'"):
        scored(synthetic, few)


def test_features_that_are_not_finite_are_refused(real: Dataset, tmp_path: Path) -> None:
    dark = Dataset("dark", Storage(tmp_path))
    pixels = [np.full((16, 16, 3), level, np.uint8) for level in (90, 0, 120)]
    rows = [image_row(f"dark-I-{i:08d}", "I", 0, "synthetic", image) for i, image in enumerate(pixels)]
    samples = [Sample(row, encode_png(image)) for row, image in zip(rows, pixels, strict=True)]
    write_shard(dark.storage, "dark", 0, samples)
    dark.write_info(write_synthetic(tmp_path).info | {"name": "dark"})
    with pytest.raises(BuilderError, match="not finite"):
        scored(dark, real, spec="tests.test_set_scores:broken_network")


LEAKS = [
    ({"known": False, "key_fingerprint": None, "patients": []}, "the lineage of 'made' is unknown"),
    ({"known": True, "key_fingerprint": "other", "patients": [], **ALIKE}, "cannot be compared"),
    (
        {"known": True, "key_fingerprint": "test", "patients": ["49" + f"{4:030x}"], **ALIKE},
        "was trained on 1 patients",
    ),
]


@pytest.mark.parametrize(("lineage", "said"), LEAKS)
def test_a_leak_is_refused_or_stamped_into_the_result(
    real: Dataset, tmp_path: Path, lineage: dict[str, Any], said: str
) -> None:
    synthetic = write_synthetic(tmp_path, lineage=lineage)
    assert said in str(find_leak(synthetic, real))
    for reason in (None, ""):
        with pytest.raises(BuilderError, match=said):
            scored(synthetic, real, allow_leak=reason)
    result = scored(synthetic, real, allow_leak="a control")
    assert result["allow_leak"] == "a control" and said in result["lineage"] and "a control" in result["lineage"]


def test_what_keeps_patients_from_being_compared_is_named(real: Dataset, tmp_path: Path) -> None:
    synthetic = write_synthetic(tmp_path, lineage={"known": True, "key_fingerprint": None, "patients": [], **ALIKE})
    assert "no key is recorded" in str(find_leak(synthetic, real))
    table = real.shard_table(0)
    place, field = table.schema.get_field_index("patient"), table.schema.field("patient")
    nobody = table.set_column(place, field, pa.nulls(len(table), field.type))
    write_manifest(real.storage, "manifests/clinic/shard-000000.parquet", nobody)
    real.write_info(real.info | {"lineage": {"known": False}})
    assert "have no patient" in str(find_leak(write_synthetic(tmp_path), real))
    floors = real_floors(real, load_extractor(FEATURES), [4], repeats=1, progress=False)
    assert floors["without_patient"] == len(table)


def test_two_datasets_of_one_name_in_two_folders(real: Dataset, tmp_path: Path) -> None:
    twin = write_synthetic(tmp_path / "elsewhere", real.name)
    plain = write_synthetic(tmp_path)
    value, same = (figures_of(scored(made, real))["fd"]["n_synthetic"] for made in (twin, plain))
    assert value == same


def test_a_patient_of_the_other_held_out_split_is_no_leak_of_this_one(real: Dataset, tmp_path: Path) -> None:
    seen = {"known": True, "key_fingerprint": "test", "patients": ["49" + f"{5:030x}"], **ALIKE}  # of test
    synthetic = write_synthetic(tmp_path, lineage=seen)
    assert "saw no patient of the val split" in scored(synthetic, real)["lineage"]
    with pytest.raises(BuilderError, match="trained on 1 patients"):
        scored(synthetic, real, split="test")


def test_synthetic_images_have_no_floor(tmp_path: Path) -> None:
    with pytest.raises(BuilderError, match="it has no floor"):
        real_floors(write_synthetic(tmp_path), load_extractor(FEATURES), [4], progress=False)


def test_floors_say_which_n_is_too_large(real: Dataset) -> None:
    result = real_floors(real, load_extractor(FEATURES), [6, 16, 500], repeats=3, progress=False)
    tagged = "fd[tests.test_set_scores.tiny_network]"
    pooled, phase = result["groups"]["pooled"], result["groups"]["P"]
    assert pooled["16"]["figures"][tagged]["repeats"] == 3 and pooled["16"]["figures"][tagged]["sd"] > 0
    assert pooled["6"]["figures"][tagged]["mean"] > pooled["16"]["figures"][tagged]["mean"]  # biased at small N
    assert pooled["500"] == {"figures": {}, "note": "halves hold 54 crops"}
    assert phase["16"]["figures"][tagged]["mean"] > 0
    with pytest.raises(BuilderError, match="at least 2"):
        real_floors(real, load_extractor(FEATURES), [1], progress=False)


# -- commands ---------------------------------------------------------------------------------------------------------


def test_the_metrics_command_prints_a_table_and_writes_json(real: Dataset, tmp_path: Path) -> None:
    synthetic = write_synthetic(tmp_path)
    command = [
        "metrics",
        "made",
        "--against",
        "clinic",
        "--features",
        FEATURES,
        "--bootstrap",
        "20",
        "--out",
        str(tmp_path),
    ]
    result = CliRunner().invoke(cli, command, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    for said in (
        "against the val split of 'clinic'",
        "brought to 32 px",
        "saw no patient",
        "pooled",
        "phase R",
        "floor",
    ):
        assert said in result.output
    written = json.loads(synthetic.storage.read("manifests/made/metrics-val.json"))
    assert figures_of(written)["fd"]["floor"] is not None
    again = synthetic.storage.read("manifests/made/metrics-val.json")
    CliRunner().invoke(cli, command, catch_exceptions=False)
    assert synthetic.storage.read("manifests/made/metrics-val.json") == again  # no date, no chance
    target = tmp_path / "there" / "figures.json"
    CliRunner().invoke(cli, [*command, "--split", "test", "--json", str(target)], catch_exceptions=False)
    assert json.loads(target.read_text())["split"] == "test"
    refused = CliRunner().invoke(cli, [*command, "--split", "train"])
    assert isinstance(refused.exception, BuilderError)


def test_the_floors_command_prints_a_table(real: Dataset, tmp_path: Path) -> None:
    command = ["floors", "clinic", "--n", "8,900", "--repeats", "2", "--features", FEATURES, "--out", str(tmp_path)]
    result = CliRunner().invoke(cli, [*command, "--json", str(tmp_path / "f.json")], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "N = 8" in result.output and "N = 900 is too large" in result.output and "±" in result.output
    assert json.loads((tmp_path / "f.json").read_text())["repeats"] == 2
    assert isinstance(
        CliRunner().invoke(cli, ["floors", "clinic", "--n", "x", "--out", str(tmp_path)]).exception, BuilderError
    )

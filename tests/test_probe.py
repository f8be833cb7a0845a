"""The phase probe, its calibration, and the scores in feature space."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from builder.quality.feature_scores import FeatureScores, unit_length
from builder.quality.probe import Probe, calibration_error, fit_probe, judge_probe, reliability, softmax

CODES = ("I", "P", "R")


def clouds(
    seed: int, per_phase: int = 60, dimension: int = 24, apart: float = 3.0
) -> tuple[np.ndarray, list[str], list[str]]:
    """Features, phases and patients of three overlapping clouds; six crops a patient, near to each other."""
    generator = np.random.default_rng(seed)
    features, phases, patients = [], [], []
    for number, code in enumerate(CODES):
        centre = np.zeros(dimension)
        centre[number] = apart
        for person in range(per_phase // 6):
            own = centre + generator.normal(0, 0.8, dimension)
            features.append(own + generator.normal(0, 0.2, (6, dimension)))
            phases += [code] * 6
            patients += [f"{code}{person}"] * 6
    return np.concatenate(features), phases, patients


def fitted(seed: int = 0) -> tuple[Probe, np.ndarray]:
    features, phases, patients = clouds(seed)
    result = fit_probe(features, phases, patients, CODES)
    assert not isinstance(result, str)
    return result


def test_probabilities_sum_to_one_and_know_the_phase_of_patients_never_seen() -> None:
    probe, left_out = fitted()
    features, phases, _ = clouds(1)
    said = probe.probabilities(features)
    assert said.shape == (len(features), 3)
    assert np.allclose(said.sum(1), 1) and np.allclose(left_out.sum(1), 1)
    labels = np.array([CODES.index(phase) for phase in phases])
    assert judge_probe(said, labels, CODES)["accuracy"] > 0.75
    assert probe.record["n"] == 180 and probe.record["patients"] == 30
    assert 0.5 < probe.record["accuracy"] <= 1.0
    assert set(probe.record["recall"]) == set(CODES)


def test_the_record_is_of_predictions_for_patients_that_were_left_out() -> None:
    """Features that name the patient, and nothing else, must not look useful."""
    generator = np.random.default_rng(0)
    patients = [f"{number}" for number in range(40) for _ in range(5)]
    phases = [CODES[int(patient) % 3] for patient in patients]
    names = generator.normal(0, 1, (40, 64))
    features = np.stack([names[int(patient)] for patient in patients])
    result = fit_probe(features, phases, patients, CODES)
    assert not isinstance(result, str)
    probe, left_out = result
    labels = np.array([CODES.index(phase) for phase in phases])
    assert (left_out.argmax(1) == labels).mean() < 0.6
    assert probe.record["accuracy"] == pytest.approx((left_out.argmax(1) == labels).mean())


def test_a_probe_survives_json() -> None:
    probe, _ = fitted()
    again = Probe.from_json(json.loads(json.dumps(probe.to_json(), allow_nan=False)))
    features = clouds(2)[0]
    assert np.array_equal(again.probabilities(features), probe.probabilities(features))
    assert again.codes == CODES and again.record == probe.record


def test_two_phases_and_few_patients() -> None:
    features, phases, patients = clouds(3)
    two = [place for place, phase in enumerate(phases) if phase != "R"]
    result = fit_probe(features[two], [phases[p] for p in two], [patients[p] for p in two], ("I", "P"))
    assert not isinstance(result, str)
    labels = np.array([("I", "P").index(phases[place]) for place in two])
    assert (result[0].probabilities(features[two]).argmax(1) == labels).mean() > 0.8
    few = [place for place, patient in enumerate(patients) if patient[1:] in ("0", "1")]
    assert not isinstance(fit_probe(features[few], [phases[p] for p in few], [patients[p] for p in few], CODES), str)


def test_nothing_to_tell_apart_gives_a_reason_in_words() -> None:
    features, phases, patients = clouds(4)
    one = [place for place, phase in enumerate(phases) if phase == "I"]
    said = fit_probe(features[one], [phases[p] for p in one], [patients[p] for p in one], ("I",))
    assert isinstance(said, str) and "one phase" in said
    single = ["one" if phase == "R" else patient for phase, patient in zip(phases, patients, strict=True)]
    said = fit_probe(features, phases, single, CODES)
    assert isinstance(said, str) and "phase R" in said


def test_equal_features_are_undecided_and_finite() -> None:
    features, phases, patients = clouds(5)
    result = fit_probe(np.ones_like(features), phases, patients, CODES)
    assert not isinstance(result, str)
    assert np.allclose(result[0].probabilities(np.ones((2, features.shape[1]))), 1 / 3, atol=0.02)


def test_calibration_error_of_known_cases() -> None:
    sure_and_right = np.tile([0.8, 0.2], (100, 1))
    labels = np.repeat([0, 1], [80, 20])
    assert calibration_error(sure_and_right[:1].repeat(100, 0), np.zeros(100, int)) == pytest.approx(0.2)
    shuffled = np.random.default_rng(0).permutation(labels)
    assert calibration_error(sure_and_right, shuffled) < 0.1  # bins of 33 images: chance leaves a little
    assert sum(len(bin_) for *_, bin_ in reliability(sure_and_right, labels)) == 100


def test_temperature_mends_overconfidence() -> None:
    """Logits of which only half the size is justified: the out-of-fold fit halves them."""
    from builder.quality.probe import _fit_temperature

    generator = np.random.default_rng(0)
    logits = generator.normal(0, 2, (4000, 3))
    labels = np.array([generator.choice(3, p=row) for row in softmax(logits)])
    temperature, _ = _fit_temperature(2 * logits, labels)
    assert temperature == pytest.approx(2, rel=0.1)
    assert (
        calibration_error(softmax(2 * logits / temperature), labels)
        < 0.03
        < calibration_error(softmax(2 * logits), labels)
    )


# -- scores in feature space ------------------------------------------------------------------------------------------


def scores_of(features: np.ndarray, patients: list[str]) -> FeatureScores:
    return FeatureScores({"I": features}, {"I": patients}, None)


def test_feature_distance_and_realism_by_hand() -> None:
    """Training crops at angles 0, 10, 20, 30, 40 degrees, one patient each; chords are 2 sin(angle / 2)."""
    angles = np.radians([0, 10, 20, 30, 40])
    training = np.stack([np.cos(angles), np.sin(angles)], 1)
    scores = scores_of(7 * training, list("abcde"))  # any length: only directions count
    chord = lambda degrees: 2 * np.sin(np.radians(degrees) / 2)  # noqa: E731
    query = np.array([[np.cos(np.radians(25)), np.sin(np.radians(25))]])
    row = scores.score(query, ["I"])[0]
    assert row["feature_distance"] == pytest.approx(chord(5))
    # 3rd nearest others: 0 -> 30, 10 -> 20 (10, 10, 20), 20 -> 20 (10, 10, 20), 30 -> 20, 40 -> 30; the median is 20
    assert row["realism"] == pytest.approx(chord(20) / chord(5))


def test_a_patient_left_out_does_not_count() -> None:
    training = np.eye(4)
    scores = scores_of(np.concatenate([training, training + 0.01]), list("abcdabcd"))
    query = training[:1]
    near = scores.score(query, ["I"])[0]
    far = scores.score(query, ["I"], ["a"])[0]
    assert near["feature_distance"] == pytest.approx(0, abs=1e-6)
    assert far["feature_distance"] > 1
    nobody = scores_of(training[:1], ["a"]).score(query, ["I"], ["a"])[0]
    assert nobody["feature_distance"] is None and nobody["realism"] is None


def test_near_copies_of_one_patient_do_not_shrink_the_manifold() -> None:
    generator = np.random.default_rng(0)
    people = generator.normal(0, 1, (12, 8))
    single = FeatureScores({"I": people}, {"I": [str(i) for i in range(12)]}, None)
    copies = np.repeat(people, 5, 0) + generator.normal(0, 1e-3, (60, 8))
    many = FeatureScores({"I": copies}, {"I": [str(i // 5) for i in range(60)]}, None)
    query = people.mean(0, keepdims=True) + people[:1]
    alone, crowded = (s.score(query, ["I"])[0]["realism"] for s in (single, many))
    assert alone is not None and crowded is not None
    assert crowded > 0.5 * alone


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), count=st.integers(1, 12))
def test_scores_do_not_depend_on_company(seed: int, count: int) -> None:
    features, phases, patients = clouds(seed % 7, per_phase=12)
    own = [place for place, phase in enumerate(phases) if phase == "I"]
    scores = scores_of(features[own], [patients[place] for place in own])
    queries = np.random.default_rng(seed).normal(0, 1, (count, features.shape[1]))
    together = scores.score(queries, ["I"] * count)
    alone = [scores.score(query[None], ["I"])[0] for query in queries]
    for one, other in zip(together, alone, strict=True):
        assert one["realism"] == pytest.approx(other["realism"], rel=1e-6)
        assert one["feature_distance"] == pytest.approx(other["feature_distance"], rel=1e-6)


def test_length_does_not_count_for_any_score() -> None:
    features, phases, patients = clouds(6)
    result = fit_probe(unit_length(features), phases, patients, CODES)
    assert not isinstance(result, str)
    of_phase = {code: [place for place, phase in enumerate(phases) if phase == code] for code in CODES}
    scores = FeatureScores(
        {code: features[places] for code, places in of_phase.items()},
        {code: [patients[place] for place in places] for code, places in of_phase.items()},
        result[0],
    )
    queries, asked, _ = clouds(7)
    near, far = scores.score(queries, asked), scores.score(30 * queries, asked)
    for one, other in zip(near, far, strict=True):
        assert one == pytest.approx(other, rel=1e-9)
    said = result[0].probabilities(unit_length(queries))
    own = [row[CODES.index(code)] for row, code in zip(said, asked, strict=True)]
    assert [row["phase_probability"] for row in near] == pytest.approx(own)
    assert [row["phase_margin"] > 0 for row in near] == [
        value == row.max() for value, row in zip(own, said, strict=True)
    ]


def test_unit_length_leaves_zeros_alone() -> None:
    ready = unit_length(np.array([[3.0, 4.0], [0.0, 0.0]]))
    assert np.allclose(ready, [[0.6, 0.8], [0, 0]])

"""The phase probe: a calibrated linear classifier on features that says which phase an image looks like.

Multinomial logistic regression on principal components of the features (scikit-learn), trained on the training split
of the real crops. Its strength is chosen, and its temperature fitted (Guo et al., ICML 2017), on predictions for
patients that a fold left out, so that a probability of 0.8 is right about 8 times in 10 on patients never seen.
What it is good for is recorded beside it: accuracy, macro-F1, recall by phase and expected calibration error of those
same out-of-fold predictions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

COMPONENTS = 128  # principal components kept, or as many as the crops allow
STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0)  # inverse regularisation (C) that are tried
FOLDS = 5
BINS, BIN_IMAGES = 15, 30  # of the calibration error: at most so many bins, of at least so many images


@dataclass(frozen=True)
class Probe:
    """probabilities = softmax(features @ weight.T + bias), one column a phase in the order of `codes`."""

    codes: tuple[str, ...]
    weight: np.ndarray  # float64 [phases, dimension]; temperature, components and scale are folded in
    bias: np.ndarray  # float64 [phases]
    record: dict[str, Any]  # of the out-of-fold predictions: n, patients, accuracy, macro_f1, recall, ece, ...

    def probabilities(self, features: np.ndarray) -> np.ndarray:
        """float64 [N, phases] of features [N, dimension]; rows sum to 1."""
        return softmax(features.astype(np.float64) @ self.weight.T + self.bias)

    def to_json(self) -> dict[str, Any]:
        return {"codes": list(self.codes), "weight": self.weight.tolist(), "bias": self.bias.tolist(), **self.record}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Probe:
        record = {name: value for name, value in data.items() if name not in ("codes", "weight", "bias")}
        return cls(tuple(data["codes"]), np.array(data["weight"]), np.array(data["bias"]), record)


def fit_probe(
    features: np.ndarray, phases: Sequence[str], patients: Sequence[str], codes: Sequence[str], seed: int = 0
) -> tuple[Probe, np.ndarray] | str:
    """The probe, and the out-of-fold probabilities float64 [N, phases] of the crops that it was fitted on.

    `features`: float [N, D] of training crops; `patients`: the group of each, kept whole in a fold. Returns the reason,
    in words, when there is nothing to tell apart (one phase) or no patient to leave out.
    """
    if len(codes) < 2:
        return "there is one phase only: nothing to tell apart"
    labels = np.array([codes.index(phase) for phase in phases])
    groups = [
        len({patient for patient, own in zip(patients, labels, strict=True) if own == k}) for k in range(len(codes))
    ]
    if min(groups) < 2:
        return f"phase {codes[int(np.argmin(groups))]} has crops of {min(groups)} patient: none can be left out"
    tried = _out_of_fold(features, labels, _folds(labels, np.array(patients), min(FOLDS, min(groups)), seed), seed)
    losses = {strength: _fit_temperature(logits, labels)[1] for strength, logits in tried.items()}
    strength = min(losses, key=losses.__getitem__)
    temperature = _fit_temperature(tried[strength], labels)[0]
    weight, bias = _Space(features, seed).fit(labels, strength)
    left_out = softmax(tried[strength] / temperature)
    record = {
        **judge_probe(left_out, labels, codes),
        "n": len(labels),
        "patients": len(set(patients)),
        "strength": strength,
        "temperature": temperature,
    }
    return Probe(tuple(codes), weight / temperature, bias / temperature, record), left_out


def judge_probe(probabilities: np.ndarray, labels: np.ndarray, codes: Sequence[str]) -> dict[str, Any]:
    """accuracy, macro_f1, recall (by phase), log_loss (nats), ece of probabilities [N, phases] on true labels [N]."""
    from sklearn.metrics import f1_score, log_loss, recall_score

    guessed = probabilities.argmax(1)
    every = list(range(len(codes)))
    recall = recall_score(labels, guessed, labels=every, average=None, zero_division=0.0)
    return {
        "accuracy": float((guessed == labels).mean()),
        "macro_f1": float(f1_score(labels, guessed, labels=every, average="macro", zero_division=0.0)),
        "recall": {code: float(value) for code, value in zip(codes, recall, strict=True)},
        "log_loss": float(log_loss(labels, probabilities, labels=every)),
        "ece": calibration_error(probabilities, labels),
    }


def calibration_error(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Expected calibration error (Naeini et al., AAAI 2015): mean |accuracy - confidence| over bins of equal count.

    At most 15 bins, of at least 30 images each: with fewer, chance alone would look like miscalibration.
    """
    gaps = [len(bin_) * abs(right - said) for said, right, bin_ in reliability(probabilities, labels)]
    return float(sum(gaps) / len(labels))


def reliability(probabilities: np.ndarray, labels: np.ndarray) -> list[tuple[float, float, np.ndarray]]:
    """Of each bin of equal count, by rising confidence: mean confidence, accuracy, and the images that are in it."""
    confidence, right = probabilities.max(1), probabilities.argmax(1) == labels
    order = np.argsort(confidence, kind="stable")
    bins = np.array_split(order, max(1, min(BINS, len(order) // BIN_IMAGES)))
    return [(float(confidence[bin_].mean()), float(right[bin_].mean()), bin_) for bin_ in bins]


def softmax(logits: np.ndarray) -> np.ndarray:
    shifted = np.exp(logits - logits.max(1, keepdims=True))
    return np.asarray(shifted / shifted.sum(1, keepdims=True))


def _folds(labels: np.ndarray, groups: np.ndarray, count: int, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Folds that keep patients whole; one that would train without a phase is left out (few patients have it)."""
    from sklearn.model_selection import StratifiedGroupKFold

    splitter = StratifiedGroupKFold(count, shuffle=True, random_state=seed)
    found = splitter.split(labels[:, None], labels, groups)
    return [(train, test) for train, test in found if len(set(labels[train])) == len(set(labels))]


def _out_of_fold(
    features: np.ndarray, labels: np.ndarray, folds: list[tuple[np.ndarray, np.ndarray]], seed: int
) -> dict[float, np.ndarray]:
    """By strength, logits [N, phases] of every crop from models that saw no crop of its patient.

    Zeros, which say nothing, stand where no fold could be trained.
    """
    logits = {strength: np.zeros((len(labels), labels.max() + 1)) for strength in STRENGTHS}
    for train, test in folds:
        space = _Space(features[train], seed)
        for strength in STRENGTHS:
            weight, bias = space.fit(labels[train], strength)
            logits[strength][test] = features[test] @ weight.T + bias
    return logits


class _Space:
    """Principal components of features, on one scale: whitening would raise the noise of the last of them."""

    def __init__(self, features: np.ndarray, seed: int) -> None:
        from sklearn.decomposition import PCA

        count = min(COMPONENTS, len(features) - 1, features.shape[1])
        self._components = PCA(count, svd_solver="randomized", random_state=seed)
        with np.errstate(invalid="ignore"):  # of equal features no share of the variance is explained
            self._reduced = self._components.fit_transform(features)
        self._scale = max(float(self._reduced[:, 0].std()), 1e-12)

    def fit(self, labels: np.ndarray, strength: float) -> tuple[np.ndarray, np.ndarray]:
        """Weights [phases, D] and bias [phases] of the logits; centring, components and scale are folded in."""
        from sklearn.linear_model import LogisticRegression

        model = LogisticRegression(C=strength, max_iter=1000).fit(self._reduced / self._scale, labels)
        coefficients, intercept = model.coef_, model.intercept_
        if len(coefficients) == 1:  # scikit-learn keeps one row for two classes
            coefficients, intercept = (np.stack([-part / 2, part / 2]) for part in (coefficients[0], intercept[0]))
        weight = coefficients / self._scale @ self._components.components_
        return weight, intercept - weight @ self._components.mean_


def _fit_temperature(logits: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """The temperature that makes logits most probable, and the log loss (nats) with it."""
    from scipy.optimize import minimize_scalar

    def loss(log_temperature: float) -> float:
        chosen = softmax(logits / np.exp(log_temperature))[np.arange(len(labels)), labels]
        return float(-np.log(np.maximum(chosen, 1e-300)).mean())

    found = minimize_scalar(loss, bounds=(-3.0, 3.0), method="bounded")
    return float(np.exp(found.x)), float(found.fun)

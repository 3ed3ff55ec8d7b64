"""Proved here: one step maximizes the dual over its coordinate; passes of them reach scikit-learn's optimum, for each
loss on three data sets; the dual never falls, the gap is never below 0 and reaches 1e-9; a run that goes on from saved
duals is the same bits."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.datasets import load_breast_cancer, load_digits, load_iris
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.svm import LinearSVC

from lightning_decentral.errors import ConfigurationError
from lightning_decentral.primal_dual.coordinates import Coordinates
from lightning_decentral.primal_dual.losses import Loss, new_dual
from lightning_decentral.primal_dual.rows import Rows

LOSSES = ["squared", "logistic", "smoothed_hinge", "hinge"]
LAMBDA = 1e-2
Array = NDArray[np.float64]


def data_set(load: object) -> tuple[Array, Array]:
    features, labels = load(return_X_y=True)  # type: ignore[operator]
    features = (features - features.mean(0)) / (features.std(0) + 1e-3)
    return features / np.linalg.norm(features, axis=1).mean(), np.where(labels >= np.median(labels), 1.0, -1.0)


def solved(features: Array, labels: Array, name: str) -> tuple[Coordinates, Array]:
    own = Coordinates(Rows.of(features, labels), Loss(name), LAMBDA, len(labels))
    model = np.zeros(features.shape[1])
    for _ in range(100):
        own.ascend(model, 10 * len(labels))
        if own.gap(model) < 1e-13:
            break
    return own, model


def reference(features: Array, labels: Array, name: str) -> Array:
    strength = 1.0 / (LAMBDA * len(labels))
    if name == "squared":
        found: Array = Ridge(1.0 / strength, fit_intercept=False, solver="cholesky").fit(features, labels).coef_
        return found
    if name == "logistic":
        solver = LogisticRegression(C=strength, fit_intercept=False, tol=1e-10, solver="newton-cholesky")
    else:
        solver = LinearSVC(C=strength, loss="hinge", fit_intercept=False, tol=1e-9, max_iter=10**6)
    return solver.fit(features, labels).coef_[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize("load", [load_breast_cancer, load_digits, load_iris])
@pytest.mark.parametrize("name", LOSSES)
def test_the_optimum_is_scikit_learns(load: object, name: str) -> None:
    features, labels = data_set(load)
    own, model = solved(features, labels, name)
    assert 0.0 <= own.gap(model) < 1e-9
    np.testing.assert_allclose(own.model(), model, rtol=0.0, atol=1e-12)  # w is w(alpha)
    if name == "smoothed_hinge":  # scikit-learn has none: the gradient of P is 0 there
        margins = np.clip((1.0 - labels * (features @ model)) / 1.0, 0.0, 1.0)
        gradient = LAMBDA * model - (labels * margins) @ features / len(labels)
        assert np.abs(gradient).max() < 1e-6 * LAMBDA
        return
    np.testing.assert_allclose(model, reference(features, labels, name), rtol=0.0, atol=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_a_step_maximizes_the_dual_over_its_coordinate(name: str) -> None:
    rng, loss = np.random.default_rng(0), Loss(name, smoothing=0.5)
    for curvature in (0.0, 0.3, 50.0):
        for target in (-1.0, 1.0):
            share, score = rng.uniform(), 4.0 * rng.normal()
            dual = target * share

            def value(new: Array, dual=dual, score=score, target=target, curvature=curvature) -> Array:  # type: ignore[no-untyped-def]
                gain = -loss.conjugates(new, np.full_like(new, target))
                return gain - score * (new - dual) - curvature / 2 * (new - dual) ** 2

            best = new_dual(loss.code, loss.smoothing, dual, target, score, curvature)
            others = np.linspace(-8.0, 8.0, 4001) if name == "squared" else target * np.linspace(0.0, 1.0, 4001)
            assert value(np.array([best]))[0] >= value(others).max() - 1e-13


@pytest.mark.parametrize("name", LOSSES)
def test_the_dual_never_falls_and_the_gap_is_never_negative(name: str) -> None:
    features, labels = data_set(load_iris)
    own, model = Coordinates(Rows.of(features, labels), Loss(name), LAMBDA, len(labels)), np.zeros(4)
    before = -np.inf
    for _ in range(200):
        own.ascend(model, 1)
        gap = own.gap(model)
        dual = own.primal(model) - gap
        assert gap >= 0.0
        assert dual >= before - 1e-15
        before = dual
    assert own.primal(model) - before > 0.0


def test_going_on_is_the_same_bits() -> None:
    features, labels = data_set(load_iris)

    def begin() -> Coordinates:
        return Coordinates(Rows.of(features, labels), Loss("logistic"), LAMBDA, len(labels), seed=3)

    whole, model = begin(), np.zeros(4)
    whole.ascend(model, 487)
    first, part = begin(), np.zeros(4)
    first.ascend(part, 200)
    second = begin()
    second.duals, second.steps = first.duals.copy(), first.steps
    second.ascend(part, 287)
    assert np.array_equal(part, model)
    assert np.array_equal(second.duals, whole.duals)


def test_what_is_no_loss_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="needs one of squared, logistic"):
        Loss("huber")
    with pytest.raises(ConfigurationError, match=r"smoothing=0\.0, needs a positive"):
        Loss("smoothed_hinge", 0.0)

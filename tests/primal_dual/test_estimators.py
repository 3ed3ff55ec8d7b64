"""Proved here: the estimators pass scikit-learn's own checks, and find what its own find; on two processes they find
the same as on one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sklearn.datasets import load_breast_cancer, load_iris
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.utils.estimator_checks import parametrize_with_checks

from lightning_decentral.errors import ConfigurationError
from lightning_decentral.primal_dual import compiled
from lightning_decentral.primal_dual.estimators import PrimalDualClassifier, PrimalDualRegressor


@pytest.mark.filterwarnings("ignore")  # of data that the checks mean to be bad
@parametrize_with_checks([PrimalDualClassifier(max_iter=200), PrimalDualRegressor(max_iter=200)])
def test_scikit_learns_own_checks(estimator: Any, check: Any) -> None:
    check(estimator)


def test_three_classes_are_found_as_scikit_learn_finds_them() -> None:
    features, labels = load_iris(return_X_y=True, as_frame=False)
    features = (features - features.mean(0)) / features.std(0)
    mine = PrimalDualClassifier(regularization=1e-2, fit_intercept=False, tol=1e-12).fit(features, labels)
    for label, weights in zip(mine.classes_, mine.coef_, strict=True):
        theirs = LogisticRegression(C=1 / (1e-2 * len(labels)), fit_intercept=False, tol=1e-10).fit(
            features, labels == label
        )
        np.testing.assert_allclose(weights, theirs.coef_[0], rtol=0.0, atol=1e-5)
    assert mine.score(features, labels) > 0.8


def test_two_processes_find_the_same_as_one() -> None:
    features, targets = load_breast_cancer(return_X_y=True)
    features = ((features - features.mean(0)) / features.std(0))[:120]
    mine = PrimalDualRegressor(regularization=1.0, fit_intercept=False, tol=1e-8, workers=2, group=2)
    mine.fit(features, targets[:120])
    assert mine.n_iter_ % 20 == 0 < mine.n_iter_  # of each epoch 20 rounds, with a pass in each
    theirs = Ridge(alpha=120.0, fit_intercept=False).fit(features, targets[:120])
    np.testing.assert_allclose(mine.coef_, theirs.coef_, rtol=0.0, atol=1e-3)


def test_a_missing_compiler_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "HAS_COMPILER", False)
    with pytest.raises(ConfigurationError, match=r"needs the package numba.*\[linear\]"):
        PrimalDualRegressor().fit([[1.0], [2.0]], [1.0, 2.0])

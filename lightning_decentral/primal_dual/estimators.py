"""Linear models of this package for those who live in scikit-learn."""

from __future__ import annotations

import warnings
from typing import Any, Self

import numpy as np
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping

from lightning_decentral.algorithms import ACPD
from lightning_decentral.errors import ConfigurationError, to_install
from lightning_decentral.primal_dual.compiled import require_compiler
from lightning_decentral.primal_dual.coordinates import Coordinates
from lightning_decentral.primal_dual.data import LinearDataModule
from lightning_decentral.primal_dual.losses import Loss, Numbers
from lightning_decentral.primal_dual.module import PrimalDualModule
from lightning_decentral.primal_dual.rows import Rows
from lightning_decentral.strategies import AsyncStrategy

try:
    from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.utils import check_random_state
    from sklearn.utils.multiclass import check_classification_targets
    from sklearn.utils.validation import check_is_fitted, validate_data
except ImportError as error:
    raise ConfigurationError(
        "The estimators need the package scikit-learn, 1.6 or newer, which is not installed. Install it: "
        f"{to_install('linear')}."
    ) from error

_ROUNDS = 20  # of an epoch, between two looks at the gap


class _Linear(BaseEstimator):  # type: ignore[misc]
    """What both estimators have: they solve for one vector of weights."""

    coef_: Numbers
    intercept_: Any

    def _solve(self, features: Any, targets: Numbers, loss: Loss) -> tuple[Numbers, float, int]:
        """Return weights, an intercept, and how many passes over the samples it took."""
        require_compiler(type(self).__name__)
        seed = int(check_random_state(self.random_state).randint(2**31))
        if self.workers == 1:
            found, gap, passes = self._alone(features, targets, loss, seed)
        else:
            found, gap, passes = self._together(features, targets, loss, seed)
        if gap > self.tol:
            warnings.warn(
                f"The duality gap is {gap:.2g} after max_iter={self.max_iter}, above tol={self.tol:g}. Increase one.",
                ConvergenceWarning,
                stacklevel=3,
            )
        return (found[:-1], float(found[-1]), passes) if self.fit_intercept else (found, 0.0, passes)

    def _alone(self, features: Any, targets: Numbers, loss: Loss, seed: int) -> tuple[Numbers, float, int]:
        rows = Rows.of(features, targets, 1.0 if self.fit_intercept else None, empty=True)
        own, gap, passes = Coordinates(rows, loss, self.regularization, len(rows), seed), np.inf, 0
        model = np.zeros(rows.features)
        while passes < self.max_iter and gap > self.tol:
            some = min(passes + 1, self.max_iter - passes)  # the gap costs as much as a pass: it is looked at ever less
            own.ascend(model, some * len(rows))
            passes += some
            gap = own.gap(model)
        return model, gap, passes

    def _together(self, features: Any, targets: Numbers, loss: Loss, seed: int) -> tuple[Numbers, float, int]:
        method = ACPD(group=self.group, max_delay=self.max_delay, ratio=self.ratio)
        data = LinearDataModule(features, targets, intercept=self.fit_intercept, rounds=_ROUNDS)
        module = PrimalDualModule(data.features, loss.name, self.regularization, loss.smoothing, seed)
        trainer = Trainer(
            accelerator="cpu",
            devices=self.workers,
            strategy=AsyncStrategy(method, start_method="fork"),
            max_epochs=-(-self.max_iter // _ROUNDS),
            callbacks=[EarlyStopping("gap", patience=self.max_iter, stopping_threshold=self.tol)],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
        )
        trainer.fit(module, datamodule=data)
        gap = float(trainer.callback_metrics["gap"])
        passes = max(1, round(float(trainer.callback_metrics["passes"])))
        return module.weight.detach().numpy().copy(), gap, passes

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        return tags


class PrimalDualClassifier(ClassifierMixin, _Linear):  # type: ignore[misc]
    """A linear classifier with L2 regularization, trained by dual coordinates; on several processes by `ACPD`.

    Of several classes each is told from all others. The intercept is a weight as the others are, and regularized.

    Args:
        loss: ``"logistic"``, ``"smoothed_hinge"`` or ``"hinge"``.
        regularization: ``lambda``, above 0: 1 / (samples C) for scikit-learn's C.
        smoothing: of the smoothed hinge.
        fit_intercept: whether there is one.
        tol: the duality gap at which it ends.
        max_iter: passes over the data at most; with several workers rounds of each.
        workers: local processes, forked; 1: this one.
        group: of `ACPD`.
        max_delay: of `ACPD`.
        ratio: of `ACPD`.
        random_state: of the order of the rows.

    Attributes:
        classes_: the labels.
        coef_: weights, ``[1 or classes, features]``.
        intercept_: ``[1 or classes]``.
        n_iter_: passes over the samples that were made.

    Raises:
        ConfigurationError: without numba; for a hyper-parameter out of its range.

    Example:
        >>> import numpy as np
        >>> PrimalDualClassifier().fit(np.array([[0.0], [1.0]]), ["no", "yes"]).predict([[2.0]]).tolist()
        ['yes']
    """

    def __init__(
        self,
        loss: str = "logistic",
        regularization: float = 1e-4,
        smoothing: float = 1.0,
        fit_intercept: bool = True,
        tol: float = 1e-5,
        max_iter: int = 1000,
        workers: int = 1,
        group: int | None = None,
        max_delay: int = 10,
        ratio: float = 1.0,
        random_state: Any = None,
    ) -> None:
        self.loss = loss
        self.regularization = regularization
        self.smoothing = smoothing
        self.fit_intercept = fit_intercept
        self.tol = tol
        self.max_iter = max_iter
        self.workers = workers
        self.group = group
        self.max_delay = max_delay
        self.ratio = ratio
        self.random_state = random_state

    def fit(self, X: Any, y: Any) -> Self:
        """Train.

        Args:
            X: ``[samples, features]``, dense or sparse.
            y: labels of any kind.
        """
        X, y = validate_data(self, X, y, accept_sparse="csr", dtype=np.float64)
        check_classification_targets(y)
        self.classes_ = np.unique(y)
        if len(self.classes_) < 2:
            raise ValueError(f"PrimalDualClassifier got one class, {self.classes_[0]!r}, needs two at least.")
        loss = Loss(self.loss, self.smoothing)
        if not loss.classifies:
            raise ConfigurationError("PrimalDualClassifier got loss='squared', needs one of classes. Use 'logistic'.")
        positive = self.classes_[1:] if len(self.classes_) == 2 else self.classes_
        found = [self._solve(X, np.where(y == label, 1.0, -1.0), loss) for label in positive]
        self.coef_ = np.stack([weights for weights, _, _ in found])
        self.intercept_ = np.array([intercept for _, intercept, _ in found])
        self.n_iter_ = max(passes for _, _, passes in found)
        return self

    def decision_function(self, X: Any) -> Numbers:
        """Return scores: ``[samples]`` of the larger one of two classes, or ``[samples, classes]``."""
        check_is_fitted(self)
        X = validate_data(self, X, accept_sparse="csr", dtype=np.float64, reset=False)
        scores: Numbers = X @ self.coef_.T + self.intercept_
        return scores[:, 0] if len(self.classes_) == 2 else scores

    def predict(self, X: Any) -> Any:
        """Return the label of each sample."""
        scores = self.decision_function(X)
        return self.classes_[(scores > 0).astype(int) if scores.ndim == 1 else scores.argmax(1)]


class PrimalDualRegressor(RegressorMixin, _Linear):  # type: ignore[misc]
    """Least squares with L2 regularization, trained by dual coordinates; on several processes by `ACPD`.

    The intercept is a weight as the others are, and regularized.

    Args:
        regularization: ``lambda``, above 0: alpha / samples for the alpha of scikit-learn's Ridge.
        fit_intercept: whether there is one.
        tol: the duality gap at which it ends, in the square of the targets' unit.
        max_iter: passes over the data at most; with several workers rounds of each.
        workers: local processes, forked; 1: this one.
        group: of `ACPD`.
        max_delay: of `ACPD`.
        ratio: of `ACPD`.
        random_state: of the order of the rows.

    Attributes:
        coef_: weights, ``[features]``.
        intercept_: a number.
        n_iter_: passes over the samples that were made.

    Raises:
        ConfigurationError: without numba; for a hyper-parameter out of its range.

    Example:
        >>> import numpy as np
        >>> round(PrimalDualRegressor().fit(np.array([[0.0], [1.0]]), [1.0, 3.0]).predict([[2.0]]).item(), 1)
        5.0
    """

    def __init__(
        self,
        regularization: float = 1e-4,
        fit_intercept: bool = True,
        tol: float = 1e-5,
        max_iter: int = 1000,
        workers: int = 1,
        group: int | None = None,
        max_delay: int = 10,
        ratio: float = 1.0,
        random_state: Any = None,
    ) -> None:
        self.regularization = regularization
        self.fit_intercept = fit_intercept
        self.tol = tol
        self.max_iter = max_iter
        self.workers = workers
        self.group = group
        self.max_delay = max_delay
        self.ratio = ratio
        self.random_state = random_state

    def fit(self, X: Any, y: Any) -> Self:
        """Train.

        Args:
            X: ``[samples, features]``, dense or sparse.
            y: numbers.
        """
        X, y = validate_data(self, X, y, accept_sparse="csr", dtype=np.float64, y_numeric=True)
        self.coef_, self.intercept_, self.n_iter_ = self._solve(X, np.asarray(y, dtype=np.float64), Loss("squared"))
        return self

    def predict(self, X: Any) -> Numbers:
        """Return a number for each sample."""
        check_is_fitted(self)
        X = validate_data(self, X, accept_sparse="csr", dtype=np.float64, reset=False)
        found: Numbers = X @ self.coef_ + self.intercept_
        return found

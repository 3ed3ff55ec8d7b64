r"""The losses of linear models, their conjugates, and one exact step in one dual coordinate.

A model ``w`` of ``n`` rows ``x_i`` with targets ``y_i`` and a weight ``lambda`` of the regularization::

    primal   P(w)     =  (1/n) sum_i phi_i(x_i w)  +  (lambda/2) ||w||^2
    dual     D(alpha) = -(1/n) sum_i phi_i*(-alpha_i) - (lambda/2) ||w(alpha)||^2
    where    w(alpha) =  1 / (lambda n) sum_i alpha_i x_i

``P(w) >= D(alpha)`` for all of both; the *duality gap* ``P - D`` bounds how far ``P(w)`` is from the optimum.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_decentral.errors import ConfigurationError
from lightning_decentral.primal_dual.compiled import compiled

Numbers = NDArray[np.float64]

SQUARED, LOGISTIC, SMOOTHED_HINGE, HINGE = range(4)
_NAMES = {"squared": SQUARED, "logistic": LOGISTIC, "smoothed_hinge": SMOOTHED_HINGE, "hinge": HINGE}
_NEWTON_STEPS = 50  # two or three are enough; the bracket halves at least in each


@dataclass(frozen=True)
class Loss:
    """A loss of a row, by the score ``z = x_i w`` and the target ``y``.

    Args:
        name: ``"squared"``: ``(z - y)^2 / 2``. ``"logistic"``: ``log(1 + exp(-y z))``. ``"hinge"``:
            ``max(0, 1 - y z)``. ``"smoothed_hinge"``: the hinge, with a parabola where ``1 - smoothing < y z < 1``.
            All but the squared loss are for ``y`` of -1 and 1.
        smoothing: length of that parabola, above 0; of the smoothed hinge only.

    Raises:
        ConfigurationError: for another name, or a smoothing that is not positive.

    Example:
        >>> import numpy as np
        >>> Loss("hinge").values(np.array([0.0, 2.0]), np.array([1.0, 1.0])).tolist()
        [1.0, 0.0]
    """

    name: str = "logistic"
    smoothing: float = 1.0

    def __post_init__(self) -> None:
        if self.name not in _NAMES:
            raise ConfigurationError(f"Loss got {self.name!r}, needs one of {', '.join(_NAMES)}. Correct the name.")
        if not (math.isfinite(self.smoothing) and self.smoothing > 0.0):
            raise ConfigurationError(
                f"Loss got smoothing={self.smoothing}, needs a positive number. Use 'hinge' for none."
            )

    @property
    def code(self) -> int:
        """The number of the loss, for compiled loops."""
        return _NAMES[self.name]

    @property
    def classifies(self) -> bool:
        """Whether targets are the classes -1 and 1."""
        return self.name != "squared"

    def values(self, scores: Numbers, targets: Numbers) -> Numbers:
        """Tell the loss of each row.

        Args:
            scores: ``x_i w``, one for each row.
            targets: of these rows.
        """
        if self.name == "squared":
            return 0.5 * (scores - targets) ** 2
        margins = targets * scores
        if self.name == "logistic":
            return np.logaddexp(0.0, -margins)
        missing = np.maximum(0.0, 1.0 - margins)
        if self.name == "hinge":
            return missing
        return np.where(missing < self.smoothing, missing**2 / (2 * self.smoothing), missing - self.smoothing / 2)

    def conjugates(self, duals: Numbers, targets: Numbers) -> Numbers:
        """Tell ``phi_i*(-alpha_i)`` of each row; infinite where a dual variable is not possible.

        Args:
            duals: ``alpha_i``: of classes, ``y alpha`` is from 0 to 1.
            targets: of these rows.
        """
        if self.name == "squared":
            return 0.5 * duals**2 - targets * duals
        shares = targets * duals
        if self.name == "logistic":
            with np.errstate(divide="ignore", invalid="ignore"):
                found = _entropy_term(shares) + _entropy_term(1.0 - shares)
        else:
            found = -shares + (0.5 * self.smoothing * shares**2 if self.name == "smoothed_hinge" else 0.0)
        return np.where((shares < 0.0) | (shares > 1.0), np.inf, found)

    def gaps(self, scores: Numbers, duals: Numbers, targets: Numbers) -> Numbers:
        """Tell each row's part of the duality gap, ``phi(z) + phi*(-alpha) + z alpha``, which is 0 or more.

        Their mean is the gap where ``w`` is ``w(alpha)``; elsewhere ``(lambda/2) ||w - w(alpha)||^2`` comes on top.
        Sums of these lose no digits at a small gap, as a difference of ``P`` and ``D`` does.
        """
        found = self.values(scores, targets) + self.conjugates(duals, targets) + scores * duals
        return np.maximum(found, 0.0)  # below it only by rounding


def _entropy_term(shares: Numbers) -> Numbers:
    return np.where(shares > 0.0, shares * np.log(shares), 0.0)


@compiled
def new_dual(code: Any, smoothing: Any, dual: Any, target: Any, score: Any, curvature: Any) -> Any:
    """Maximize the dual over one coordinate, exactly; returns the new dual variable.

    The maximum of ``-phi*(-a) - z (a - alpha) - (q/2) (a - alpha)^2`` over ``a``.

    Args:
        code: of the loss.
        smoothing: of the smoothed hinge.
        dual: ``alpha`` before.
        target: ``y``.
        score: ``z``.
        curvature: ``q``, 0 or more.
    """
    if code == SQUARED:
        return (target - score + curvature * dual) / (1.0 + curvature)
    share, margin = target * dual, target * score
    if code == LOGISTIC:
        # u = logit(a) solves u + z + q (sigmoid(u) - a0) = 0, which increases with a slope of 1 to 1 + q/4.
        low, high = -margin - curvature * (1.0 - share), -margin + curvature * share
        u = -margin
        if 0.0 < share < 1.0:
            u = min(max(math.log(share / (1.0 - share)), low), high)
        sigmoid = 0.5
        for _ in range(_NEWTON_STEPS):
            sigmoid = 1.0 / (1.0 + math.exp(-u)) if u > -700.0 else 0.0
            rest = u + margin + curvature * (sigmoid - share)
            if rest > 0.0:
                high = u
            else:
                low = u
            step = rest / (1.0 + curvature * sigmoid * (1.0 - sigmoid))
            if abs(step) <= 1e-13 * (1.0 + abs(u)):
                break
            u = u - step
            if not low <= u <= high:
                u = 0.5 * (low + high)
        return target * sigmoid
    if code == SMOOTHED_HINGE:
        share += (1.0 - margin - smoothing * share) / (curvature + smoothing)
    elif curvature > 0.0:
        share += (1.0 - margin) / curvature
    else:
        share = 1.0 if margin < 1.0 else 0.0
    return target * min(max(share, 0.0), 1.0)

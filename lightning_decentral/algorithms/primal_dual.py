"""What primal-dual methods have in common: steps in dual coordinates take the place of gradients."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass, field

from lightning_decentral.errors import ConfigurationError
from lightning_decentral.protocol import AbstractAlgorithm


@dataclass(frozen=True)
class AbstractPrimalDual(AbstractAlgorithm):
    r"""Workers take steps in the dual variables of their own rows, and share what these add to the model.

    The "gradient" of a step is ``v - v'``: before, a worker's model is ``v``; after ``local_steps`` steps in dual
    coordinates, each of which moves it by ``sigma' / (lambda n) delta_i x_i``, it is ``v'``. Of these moves the mean
    over the workers, ``1 / K``, gets into the model, which is ``gamma`` times the change that they stand for, as
    ``sigma' = gamma K``; the dual variables keep the same share. So the model stays ``w(alpha)``.

    `PrimalDualModule` takes these steps. With any other module the method works on its gradients.

    Args:
        local_steps: in dual coordinates, between two exchanges: how many, or as a share of the worker's rows in (0, 1];
            ``None``: as many as it has rows.
    """

    alike_at_rest = True

    local_steps: int | float | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        name, steps = type(self).__name__, self.local_steps
        counts = isinstance(steps, int) and not isinstance(steps, bool) and steps >= 1
        shares = isinstance(steps, float) and 0.0 < steps <= 1.0
        if steps is not None and not counts and not shares:
            raise ConfigurationError(
                f"{name}(local_steps={steps!r}): needs a whole number of at least 1, or a share of the worker's rows "
                "in (0, 1] as a float. Leave it out for a pass over them."
            )

    def steps(self, rows: int) -> int:
        """Return how many steps a worker takes between two exchanges, at least 1.

        Args:
            rows: that it has.
        """
        if isinstance(self.local_steps, int):
            return self.local_steps
        return max(1, round(rows * (1.0 if self.local_steps is None else self.local_steps)))

    @abstractmethod
    def damping(self, trainers: int) -> float:
        """Return ``gamma``, the share of each worker's change that gets into the model, in (0, 1].

        Args:
            trainers: how many workers have data.
        """


def require_damping(method: str, gamma: float) -> None:
    """Refuse what is no share.

    Args:
        method: for the message.
        gamma: the share of each worker's change that gets into the model.
    """
    if not (isinstance(gamma, int | float) and math.isfinite(gamma) and 0.0 < gamma <= 1.0):
        raise ConfigurationError(
            f"{method}(gamma={gamma!r}): needs a number in (0, 1]. Use 1.0: the changes of all workers are added."
        )

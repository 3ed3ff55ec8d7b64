"""What FedAdam, FedYogi and FedAdagrad have in common (Reddi et al., 2021): an adaptive step of the server."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch.optim import Optimizer

from lightning_decentral.algorithms.federated import AbstractFederated
from lightning_decentral.algorithms.local_updates import OuterOptimizer
from lightning_decentral.errors import ConfigurationError

Adapts = Literal["adam", "yogi", "adagrad"]


@dataclass(frozen=True)
class AbstractFedOpt(AbstractFederated):
    r"""A server that divides each coordinate of its step by what that has been like so far.

    Update rule, for a round of the clients S, with :math:`p_k = n_k / n_S`; v begins at ``tau ** 2``, m at 0::

        d <- sum_{k in S} p_k (w_k - w)
        m <- beta_1 m + (1 - beta_1) d
        v <- the method's
        w <- w + server_learning_rate m / (sqrt(v) + tau)

    Unlike `torch.optim.Adam` it has no bias correction.

    Args:
        every: local steps of a round in which each worker is a client; `Clients` say how many otherwise.
        server_learning_rate: above 0; the paper tunes it, from 0.001 to 10.
        beta_1: of the momentum, in [0, 1).
        tau: how adaptive it is, above 0: the smaller, the more.
        clients: a population of which a few take part in each round; see `Clients`.
    """

    adapts: ClassVar[Adapts]

    server_learning_rate: float = 0.1
    beta_1: float = 0.9
    tau: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (0.0 <= self.beta_1 < 1.0 and self.tau > 0.0):
            raise ConfigurationError(
                f"{type(self).__name__} got beta_1={self.beta_1} and tau={self.tau}, needs one in [0, 1) and one above "
                "0. Use 0.9 and 0.001."
            )

    @property
    def square_decay(self) -> float:
        """What v keeps of itself, where it forgets."""
        return 1.0

    @property
    def outer_optimizer(self) -> OuterOptimizer:
        """The adaptive one."""
        options = {"lr": self.server_learning_rate, "beta_1": self.beta_1, "beta_2": self.square_decay, "tau": self.tau}
        return partial(AdaptiveServer, adapts=self.adapts, **options)


class AdaptiveServer(Optimizer):
    """The server's optimizer of FedAdam, FedYogi and FedAdagrad; its gradient is ``-d``.

    Args:
        params: of the common model.
        adapts: which of the three.
        lr: above 0.
        beta_1: of the momentum.
        beta_2: of the squares.
        tau: is added to the root, and squared the squares' beginning.
    """

    def __init__(self, params: Any, adapts: Adapts, lr: float, beta_1: float, beta_2: float, tau: float) -> None:
        super().__init__(params, {"adapts": adapts, "lr": lr, "beta_1": beta_1, "beta_2": beta_2, "tau": tau})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Make one update; a closure is not evaluated."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                    state["squares"] = torch.full_like(parameter, group["tau"] ** 2)
                square = parameter.grad.square()
                squares, forgets = state["squares"], 1.0 - group["beta_2"]
                if group["adapts"] == "adam":
                    squares.lerp_(square, forgets)
                elif group["adapts"] == "yogi":
                    squares.addcmul_(square, (squares - square).sign(), value=-forgets)
                else:
                    squares.add_(square)
                state["momentum"].lerp_(parameter.grad, 1.0 - group["beta_1"])
                parameter.addcdiv_(state["momentum"], squares.sqrt().add_(group["tau"]), value=-group["lr"])


@dataclass(frozen=True)
class AbstractDecayingFedOpt(AbstractFedOpt):
    """One whose squares are forgotten, in each round by what `beta_2` lacks of 1."""

    beta_2: float = 0.99

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.beta_2 < 1.0:
            raise ConfigurationError(
                f"{type(self).__name__}(beta_2={self.beta_2}): needs a number in [0, 1). Use 0.99."
            )

    @property
    def square_decay(self) -> float:
        """What v keeps of itself in a round."""
        return self.beta_2

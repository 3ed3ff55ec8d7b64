"""DiLoCo with eager updates: one round of delay, and the own difference at once (Kale, Douillard, Donchev, 2025)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from torch.optim import SGD

from lightning_decentral.algorithms.local_updates import OuterOptimizer, outer_step
from lightning_decentral.algorithms.overlapped_rounds import AbstractOverlappedRounds
from lightning_decentral.errors import ConfigurationError
from lightning_decentral.flat import AbstractVector
from lightning_decentral.worker import Worker


@dataclass(frozen=True)
class EagerDiLoCo(AbstractOverlappedRounds):
    r"""DiLoCo whose differences are averaged beside the whole next round; a worker's own counts at once.

    Update rule, at the end of round t, in which worker i has moved from its theta_i by ``-d_i(t)``::

        difference = (1/n) sum_j d_j(t - 1) + (d_i(t) - d_i(t - 1)) / n
        m_i       <- outer_momentum m_i + difference
        theta_i   <- theta_i - outer_learning_rate (difference + outer_momentum m_i)
        x_i       <- theta_i

    and the ``d_j(t)`` are averaged beside round t + 1. So the workers' models differ by what is new of each; those of
    the others are a round old. Before the first round all differences are 0.

    Args:
        every: local steps of a round.
        outer_learning_rate: above 0; DiLoCo's 0.7.
        outer_momentum: in [0, 1); DiLoCo's 0.9.
        outer: another outer optimizer; see `AbstractDiLoCo`.

    Cost:
        ``2 (n - 1) / n`` models sent in every ``every`` steps, beside them: nobody waits as long as an average takes
        less than a round. Four copies of the model in float32: the global one and its momentum, the last difference and
        what is averaged. A lost peer raises `PeerLost` at the end of the round.

    Differences with the paper:
        What is evaluated is the mean of the workers' models, which are no longer equal after a round.

    References:
        Satyen Kale, Arthur Douillard, Yanislav Donchev. Eager Updates For Overlapped Communication and Computation in
        DiLoCo. 2025, arXiv:2502.12996.

    Example:
        >>> EagerDiLoCo(every=100).period(8)
        100
    """

    every: int = 500
    outer_learning_rate: float = 0.7
    outer_momentum: float = 0.9
    outer: OuterOptimizer | None = None

    @property
    def has_outer_gradient(self) -> bool:
        return True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.outer_learning_rate > 0.0 and 0.0 <= self.outer_momentum < 1.0):
            raise ConfigurationError(
                f"{self} needs an outer_learning_rate above 0 and an outer_momentum in [0, 1). Use 0.7 and 0.9."
            )

    def init(self, worker: Worker) -> None:
        worker.state["global"] = worker.x.zeros_like().copy_(worker.x)
        worker.state["outer"] = [[]]

    def turn(self, worker: Worker, mean: AbstractVector | None) -> AbstractVector:
        state = worker.state
        merged: AbstractVector = state["global"]
        share = 1.0 / worker.world_size
        if mean is None:
            moved = state["moved"] = merged.clone().add_(worker.x, alpha=-1.0)
            difference = moved.clone().mul_(share)
        else:  # both in the memory of the last round's
            moved, difference = state["moved"], mean.add_(state["moved"], alpha=-share)
            difference.add_(moved.copy_(merged).add_(worker.x, alpha=-1.0), alpha=share)
        momentum = self.outer_momentum
        own = partial(SGD, lr=self.outer_learning_rate, momentum=momentum, nesterov=momentum > 0.0)
        outer_step(own if self.outer is None else self.outer, state["outer"], 0, merged, difference)
        worker.x.copy_(merged)
        return difference.copy_(moved)

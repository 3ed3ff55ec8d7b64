"""EASGD and EAMSGD: elastic averaging (Zhang, Choromanska, LeCun, 2015), in the synchronous form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from lightning_decentral.algorithms.local_updates import Rounds
from lightning_decentral.errors import ConfigurationError
from lightning_decentral.protocol import AbstractAlgorithm, AllReduce, Gradient, LocalStep, Mixing, Start
from lightning_decentral.worker import Worker


def elastic_mixing(pull: float, every: int) -> Mixing:
    """Tell how fast models come together if each goes a share of the way to the centre in each of so many steps.

    Args:
        pull: the share.
        every: steps from one pull to the next.
    """
    left = (1.0 - pull) ** (1.0 / every)
    steps = every
    while left**steps > 1e-3:
        steps += every
    return Mixing(1.0 - left, steps)


@dataclass(frozen=True)
class EASGD(AbstractAlgorithm):
    r"""Elastic averaging: workers and a centre, tied together by springs.

    Update rule, with ``beta = moving_rate`` and ``alpha = beta / n``, both 0 but in each ``every``-th step::

        x_i    <- x_i - learning_rate gradient_i(x_i) - alpha (x_i - centre)
        centre <- (1 - beta) centre + beta (1/n) sum_j x_j

    Gradient, mean and both differences are of the x_i and the centre before the step, so that the mean is computed
    beside the gradient. The workers are never made equal: they explore. With Nesterov's momentum in the worker's own
    optimizer (``torch.optim.SGD(momentum=0.99, nesterov=True)``) it is EAMSGD.

    Args:
        every: steps from one exchange to the next; the paper's tau: 1, 4, 16 or 64.
        moving_rate: beta, in (0, 1); the paper's 0.9. ``alpha = beta / n`` keeps it stable for every n.

    Cost:
        ``2 (n - 1) / n`` models sent in every ``every`` steps, hidden behind a gradient. Three copies of the model: the
        centre, which every worker has, the mean, and the worker's own of before the step. A lost peer raises
        `PeerLost`.

    Differences with the paper:
        This is the synchronous form; the paper's asynchronous one has a server with the centre. What is evaluated is
        the mean of the workers' models, not the centre, which follows it.

    References:
        Sixin Zhang, Anna Choromanska, Yann LeCun. Deep Learning with Elastic Averaging SGD. NeurIPS 2015,
        arXiv:1412.6651.

    Example:
        >>> EASGD(every=4).period(8)
        4
    """

    every: int = 4
    moving_rate: float = 0.9

    def __post_init__(self) -> None:
        Rounds(self.every).check("EASGD")
        if not 0.0 < self.moving_rate < 1.0:
            raise ConfigurationError(f"EASGD(moving_rate={self.moving_rate}): needs a number in (0, 1). Use 0.9.")

    def resolved(self, world_size: int) -> Self:
        return self

    def period(self, world_size: int) -> int:
        return self.every

    def mixing(self, world_size: int) -> Mixing:
        return elastic_mixing(self.moving_rate / world_size, self.every)

    def init(self, worker: Worker) -> None:
        worker.state["centre"] = worker.x.clone()

    async def step(self, worker: Worker) -> None:
        x, centre = worker.x, worker.state["centre"]
        if worker.step % self.every:
            await Gradient()
            await LocalStep()
            return
        before, mean = x.clone(), x.clone()
        averaging = await Start(AllReduce(mean))
        await Gradient()
        await LocalStep()
        x.add_difference_(before, centre, -self.moving_rate / worker.world_size)
        await averaging
        centre.mix_(centre, 1.0 - self.moving_rate, [(mean, self.moving_rate)])

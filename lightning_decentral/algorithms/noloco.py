"""NoLoCo: DiLoCo without an all-reduce (Kolehmainen et al., 2025)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from lightning_decentral.algorithms.base import AbstractGossip
from lightning_decentral.algorithms.local_updates import Rounds
from lightning_decentral.averaging import neighbor_exchange
from lightning_decentral.errors import ConfigurationError
from lightning_decentral.protocol import Gradient, LocalStep, Mixing
from lightning_decentral.topology import AbstractTopology, Complete, RandomMatching, TopologyLike
from lightning_decentral.worker import Worker


def random_pairs(size: int) -> AbstractTopology:
    """Choose `RandomMatching`; for a worker alone `Complete`."""
    return RandomMatching(size) if size > 1 else Complete(size)


@dataclass(frozen=True, repr=False)
class NoLoCo(AbstractGossip):
    r"""NoLoCo: many local steps, then an outer step with a partner's model only, another partner in every round.

    Update rule, for the round that worker i begins at its slow weights phi_i and ends at x_i; the mean is over i and
    its partner j::

        m_i   <- outer_momentum m_i + outer_learning_rate mean(x - phi) + pull (mean(phi) - phi_i)
        phi_i <- phi_i + m_i
        x_i   <- phi_i

    The mean of all slow weights moves as under DiLoCo with heavy-ball momentum; the pull keeps them together.

    Args:
        topology: who meets whom in which round; `RandomMatching` by default. A worker may have several neighbours,
            whose weights are taken.
        every: local steps of a round; the published code uses 50.
        outer_learning_rate: above 0; 0.7 there.
        outer_momentum: in [0, 1); 0.5 there.
        pull: towards the partner's slow weights, in [0, 2); 0.7 there.

    Cost:
        Two models sent to one partner in every ``every`` steps, whatever the number of workers: nobody waits for all.
        Two copies of the model, and a buffer for the two that are received. A lost partner raises `PeerLost`.

    References:
        Jari Kolehmainen, Nikolay Blagoev, John Donaghy, Oğuzhan Ersoy, Christopher Nies. NoLoCo: No-all-reduce Low
        Communication Training Method for Large Models. 2025, arXiv:2506.10911.

    Example:
        >>> NoLoCo(every=100).resolved(8).period(8)
        100
    """

    topology: TopologyLike = random_pairs
    every: int = 50
    outer_learning_rate: float = 0.7
    outer_momentum: float = 0.5
    pull: float = 0.7

    @property
    def has_outer_gradient(self) -> bool:
        return True

    def check(self, graph: AbstractTopology | None) -> None:
        Rounds(self.every).check("NoLoCo")
        if not (self.outer_learning_rate > 0.0 and 0.0 <= self.outer_momentum < 1.0 and 0.0 <= self.pull < 2.0):
            raise ConfigurationError(
                f"NoLoCo got outer_learning_rate={self.outer_learning_rate}, outer_momentum={self.outer_momentum} and "
                f"pull={self.pull}; it needs one above 0, one in [0, 1) and one in [0, 2). Use 0.7, 0.5 and 0.7."
            )

    def for_buffers(self) -> None:
        """Return nothing: its pairs bring momenta together, and no models."""
        return

    def period(self, world_size: int) -> int:
        return self.every * max(self.graph.period, 1)  # random pairs never repeat, but send as much each time

    def mixing(self, world_size: int) -> Mixing:
        mixing = super().mixing(world_size)
        gap = 1.0 - (1.0 - mixing.spectral_gap) ** (1.0 / self.every)
        return Mixing(gap, mixing.rounds_to_consensus * self.every)

    def init(self, worker: Worker) -> None:
        worker.state["slow"] = worker.x.clone()
        worker.state["momentum"] = worker.x.zeros_like()

    async def step(self, worker: Worker) -> None:
        await Gradient()
        await LocalStep()
        if (worker.step + 1) % self.every:
            return
        x, slow, momentum = worker.x, worker.state["slow"], worker.state["momentum"]
        number = (worker.step + 1) // self.every - 1
        weights = self.graph.weights(worker.rank, number)
        own = weights.get(worker.rank, 0.0)
        x.add_(slow, alpha=-1.0)  # what has been gained
        both = x.beside(slow)
        received = await neighbor_exchange(dataclasses.replace(worker, step=number), self.graph, both)
        momentum.mul_(self.outer_momentum).add_(x, alpha=self.outer_learning_rate * own)
        momentum.add_(slow, alpha=self.pull * (own - 1.0))
        for source, message in received.items():
            gained, theirs = message.apart(x, slow)
            momentum.add_(gained, alpha=self.outer_learning_rate * weights[source])
            momentum.add_(theirs, alpha=self.pull * weights[source])
        slow.add_(momentum)
        x.copy_(slow)

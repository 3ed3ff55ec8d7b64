"""CHOCO: gossip of compressed differences to public copies (Koloskova, Stich, Jaggi, 2019)."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_decentral.averaging.gossip import neighbor_exchange
from lightning_decentral.averaging.messages import compressed, require_contraction, require_fixed_size, require_share
from lightning_decentral.compression import AbstractCompressor
from lightning_decentral.errors import TopologyError
from lightning_decentral.flat import AbstractVector
from lightning_decentral.topology import AbstractTopology
from lightning_decentral.worker import Worker


@dataclass(frozen=True)
class Choco:
    r"""Average with the neighbours through compressed messages, with an error that vanishes.

    Every worker has a *public copy* of its value, which its neighbours know too. It sends the compressed difference
    between value and copy, and both ends add what was sent to the copy. The values move by the difference of the
    copies, so that nothing that compression loses is lost for good::

        q_i      <- C(x_i - public_i)                          # sent
        public_i <- public_i + q_i
        pull_i   <- pull_i + sum_j W[i, j] (q_j - q_i)         # = sum_j W[i, j] public_j - public_i
        x_i      <- x_i + consensus_step_size * pull_i

    The sum of all pulls is zero, so that the mean of the values stays; with a lossless compressor and step size 1 the
    last line is ``x_i <- sum_j W[i, j] x_j``.

    The paper keeps ``sum_j W[i, j] public_j`` and subtracts. Its rounding errors have the size of the model and add
    up; those of the pull have the size of the disagreement.

    A method calls `init` in its own ``init``; in each step it awaits `exchange`, at once or through `Start` behind the
    gradient, and passes its answer to `combine_`. What is remembered changes there alone, so that a checkpoint taken
    while an exchange is under way has the same public copies on all workers.

    Args:
        topology: a graph that stays the same.
        compressor: a contraction (its error is always smaller than the vector), with messages of fixed size.
        consensus_step_size: the paper's gamma, in (0, 1].

    Raises:
        TopologyError: if the graph changes with the step.
        ConfigurationError: for a compressor or step size that cannot work.

    Cost:
        One compressed message to each out-neighbour. Two copies of the value in ``worker.state``, in float32 for half
        precision, and three more from the exchange to `combine_`.

    References:
        Koloskova, Stich, Jaggi, *Decentralized Stochastic Optimization and Gossip Algorithms with Compressed
        Communication*, ICML 2019, arXiv:1902.00340.
    """

    topology: AbstractTopology
    compressor: AbstractCompressor
    consensus_step_size: float

    def __post_init__(self) -> None:
        require_constant(self.topology)
        require_fixed_size("CHOCO", self.compressor)
        require_share("CHOCO", "consensus_step_size", self.consensus_step_size)

    def init(self, worker: Worker, value: AbstractVector) -> None:
        """Begin with public copies of zero, for values like this one.

        Raises:
            ConfigurationError: if the compressor is no contraction for so many parameters.
        """
        require_contraction("CHOCO", self.compressor, value)
        worker.state["public"] = value.zeros_like()
        worker.state["pull"] = value.zeros_like()

    async def exchange(self, worker: Worker, value: AbstractVector) -> tuple[AbstractVector, AbstractVector] | None:
        """Tell the neighbours, and hear from them; ``value`` must not change meanwhile.

        Returns:
            By what the public copy and the pull change, for `combine_`; nothing for a worker alone.
        """
        weights = self.topology.weights(worker.rank, worker.step)
        if weights.keys() == {worker.rank}:
            return None
        public = worker.state["public"]
        work = public.zeros_like().add_difference_(value, public, 1.0)
        message = compressed(self.compressor, work, worker)
        received = await neighbor_exchange(worker, self.topology, message.vector)
        own, between, change = work, public.zeros_like(), public.zeros_like()
        message.decode_(message.payloads, own)
        for source, theirs in received.items():
            message.decode_(message.read(theirs), between)
            change.add_(between.add_(own, alpha=-1.0), alpha=weights[source])
        return own, change

    def combine_(
        self, worker: Worker, value: AbstractVector, heard: tuple[AbstractVector, AbstractVector] | None
    ) -> None:
        """Move the value towards those of the neighbours, by what `exchange` has answered."""
        if heard is not None:
            worker.state["public"].add_(heard[0])
            worker.state["pull"].add_(heard[1])
            value.add_(worker.state["pull"], alpha=self.consensus_step_size)


def require_constant(topology: AbstractTopology) -> None:
    """Refuse a graph that changes with the step."""
    if topology.period != 1:
        raise TopologyError(
            f"CHOCO needs a graph that stays the same, got {topology!r}, changing with the step: a neighbour knows the "
            "public copy only if it heard every message. Use Ring(n) or Exponential(n)."
        )

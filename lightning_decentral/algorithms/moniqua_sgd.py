"""Moniqua: decentralized SGD with modulo-quantized messages (Lu, De Sa, 2020)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from lightning_decentral.algorithms.dpsgd import AbstractDPSGD
from lightning_decentral.averaging import Moniqua
from lightning_decentral.errors import ConfigurationError
from lightning_decentral.topology import TopologyLike, one_peer_or_complete


@dataclass(frozen=True, repr=False)
class MoniquaSGD(AbstractDPSGD):
    r"""Moniqua: D-PSGD that sends the last digits of quantized models, *while* the gradient is computed.

    Update rule, with the gradient taken before the averaging, and ``rounded_j`` the model of worker j rounded to a
    lattice of step ``2 theta / (levels - 1)``, of which only ``log2(levels)`` bits per parameter are sent::

        x_i <- x_i + consensus_step_size * sum_j W[i, j] (rounded_j - rounded_i) - learning_rate * gradient_i(x_i)

    A neighbour knows which lattice point was meant because its own model is within ``theta`` of it. Any optimizer may
    apply the gradient; its state (momentum) stays local. The mean of all workers moves by the mean gradient, whatever
    rounding does; the workers stay apart by about the lattice's step.

    Args:
        topology: any graph and its mixing matrix, or a function of the number of workers. By default
            `OnePeerExponential` for 3 and more workers; `Complete` below.
        theta: how far, in any parameter, two neighbours may be apart. The error of rounding is proportional to it: at
            most ``theta / (levels - 1)``. The default is a wide one; it depends on model and learning rate, and
            `theta_for` computes it from these.
        levels: 2, 4, 16 or 256: 1, 2, 4 or 8 bits per parameter. With 2 or 4 the step size should be well below 1.
        consensus_step_size: of the averaging, in (0, 1]; smaller adds less of the rounding error.

    Raises:
        ConfigurationError: for numbers out of range.

    Cost:
        One message to each out-neighbour per step, 8 bits per parameter by default; compressing, sending and decoding
        are hidden behind forward and backward where cores or links are free. Extra memory: none between steps; one
        byte per parameter and in-neighbour from the exchange to the update, and the messages. If two workers
        are farther apart than ``theta`` their messages' check sums tell, and the training ends with a `DecodingError`;
        there is no second attempt. A lost peer raises `PeerLost`.

    Not to be confused with:
        Quantizing the model itself to so many bits: parameters are long, but the models of two workers differ little.

    References:
        Yucheng Lu, Christopher De Sa. Moniqua: Modulo Quantized Communication in Decentralized SGD. ICML 2020,
        arXiv:2002.11787.

    Example:
        >>> MoniquaSGD(theta=0.2).resolved(8).topology
        OnePeerExponential(size=8)
    """

    topology: TopologyLike = one_peer_or_complete
    theta: float = 1.0
    levels: int = 256
    consensus_step_size: float = 1.0

    @cached_property
    def averager(self) -> Moniqua:
        """The averager: Moniqua's."""
        return Moniqua(self.theta, self.levels, self.consensus_step_size)

    def theta_for(self, workers: int, largest_change: float) -> float:
        """Return the smallest `theta` that no run can exceed whose steps change no parameter by more than so much.

        The distance of two workers is a sum over all past steps of what these have changed, spread over the workers by
        the averaging since; rounding adds its share. The largest such sum, over all pairs that exchange, is computed
        from the mixing matrices. Real gradients have different signs and partly cancel: expect workers to be several
        times nearer.

        Args:
            workers: their number.
            largest_change: of a parameter, by the optimizer in one step. With SGD the learning rate times the largest
                gradient, over `1 - momentum`; clipping by value bounds that gradient. With Adam about the rate.

        Raises:
            ConfigurationError: for a change that is not positive, a graph that never repeats or that leaves workers
                apart, and where rounding alone would drive the workers apart.

        Example:
            >>> round(MoniquaSGD().theta_for(workers=8, largest_change=0.01), 4)
            0.0614
        """
        topology = self.resolved(workers).graph
        if not 0.0 < largest_change < float("inf"):
            raise ConfigurationError(
                f"theta_for got largest_change={largest_change!r}, needs a positive number, in the units of the "
                "parameters. Use the learning rate times the largest gradient."
            )
        if workers == 1:
            return largest_change  # nobody to be apart from
        if topology.period == 0 or not topology.is_connected:
            raise ConfigurationError(
                f"theta_for got {topology!r}, needs a connected graph whose rounds repeat. Watch the distance of the "
                "workers in a run, and take a multiple of it."
            )
        same = torch.eye(workers, dtype=torch.float64)
        matrices = [topology.mixing_matrix(step) for step in range(topology.period)]
        mixing = [same + self.consensus_step_size * (matrix - same) for matrix in matrices]
        spread = 0.0  # the largest sum, for changes of at most 1
        for step, matrix in enumerate(matrices):
            apart = torch.stack(
                [same[i] - same[j] for i, j in (matrix > 0).nonzero().tolist() if i != j] or [0 * same[0]]
            )
            total, before = torch.zeros(len(apart), dtype=torch.float64), step
            while (now := apart.abs().sum(1)).max() > 1e-9:
                total += now
                before -= 1
                apart = apart @ mixing[before % len(mixing)]
            spread = max(spread, float(total.max()))
        # Rounding moves a worker by at most the step of the lattice, 2 theta / (levels - 1), times what it gives away.
        away = self.consensus_step_size * max(float(1 - matrix.diagonal().min()) for matrix in matrices)
        share = spread * away * 2 / (self.levels - 1)
        if share >= 1.0:
            raise ConfigurationError(
                f"theta_for got levels={self.levels} and consensus_step_size={self.consensus_step_size:g} on "
                f"{topology!r}, with which rounding alone can drive workers apart without end; needs less of it. Use "
                "more levels."
            )
        return spread * largest_change / (1.0 - share)

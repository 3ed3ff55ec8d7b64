"""FedNova: federated averaging that counts each client's step, not its steps (Wang et al., 2020)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from torch.optim import SGD

from lightning_decentral.algorithms.federated import AbstractFederated
from lightning_decentral.algorithms.local_updates import OuterOptimizer
from lightning_decentral.errors import ConfigurationError
from lightning_decentral.federated.clients import Turn


@dataclass(frozen=True)
class FedNova(AbstractFederated):
    r"""FedNova: FedAvg in which a client that makes many local steps does not count more for that.

    Update rule, for a round of the clients S; client k makes :math:`\tau_k` local steps, and :math:`\|a_k\|` is how far
    they go with a constant gradient, in learning rates: :math:`\tau_k` itself for plain SGD::

        w <- w - server_learning_rate tau_eff sum_{k in S} p_k (w - w_k) / ||a_k||,   tau_eff = sum_{k in S} p_k ||a_k||

    FedAvg, with local epochs on unequal data, goes to the optimum of another loss than the mean of the clients'.

    Args:
        every: local steps of a round in which each worker is a client; `Clients` say how many otherwise.
        server_learning_rate: 1 in the paper.
        local_momentum: of the clients' SGD, heavy ball, in [0, 1): what the user's optimizer has. With it
            :math:`\|a_k\| = (\tau_k - m (1 - m^{\tau_k}) / (1 - m)) / (1 - m)`.
        clients: a population of which a few take part in each round; see `Clients`.

    Cost:
        As `FedAvg`: how many steps each client makes is known to all.

    Differences with the paper:
        It has further :math:`a_k`, for proximal and adaptive local steps, which are not here.

    References:
        Jianyu Wang, Qinghua Liu, Hao Liang, Gauri Joshi, H. Vincent Poor. Tackling the Objective Inconsistency Problem
        in Heterogeneous Federated Optimization. NeurIPS 2020, arXiv:2007.07481.

    Example:
        >>> FedNova(local_momentum=0.9).local_momentum
        0.9
    """

    local_momentum: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.local_momentum < 1.0:
            raise ConfigurationError(
                f"FedNova(local_momentum={self.local_momentum}): needs a number in [0, 1). Use that of the local SGD."
            )

    @property
    def outer_optimizer(self) -> OuterOptimizer:
        """A plain step."""
        return partial(SGD, lr=self.server_learning_rate)

    def weights(self, turns: Sequence[Turn]) -> list[float]:
        """Weigh each client so that its steps count as one of the mean length."""
        momentum = self.local_momentum
        lengths = [
            (turn.steps - momentum * (1.0 - momentum**turn.steps) / (1.0 - momentum)) / (1.0 - momentum)
            for turn in turns
        ]
        whole = sum(turn.weight for turn in turns)
        mean = sum(turn.weight * length for turn, length in zip(turns, lengths, strict=True)) / whole
        return [turn.weight * mean / length for turn, length in zip(turns, lengths, strict=True)]

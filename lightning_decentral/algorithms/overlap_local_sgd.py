"""Overlap-Local-SGD: an anchor model that is averaged beside the local steps (Wang, Liang, Joshi, 2020)."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_decentral.algorithms.overlapped_rounds import AbstractOverlappedRounds
from lightning_decentral.errors import ConfigurationError
from lightning_decentral.flat import AbstractVector
from lightning_decentral.protocol import Mixing
from lightning_decentral.worker import Worker


@dataclass(frozen=True)
class OverlapLocalSGD(AbstractOverlappedRounds):
    r"""Local steps, and after each round a pull towards an anchor: the average of all models of a round before.

    Update rule, at the end of a round of ``every`` local steps, with the mean of the x_j at the end of the last one::

        v   <- anchor_momentum v + mean - z
        z   <- z + v
        x_i <- (1 - pull) x_i + pull z

    and the x_i of now are averaged beside the next round. The anchor z begins at the common start.

    Args:
        every: local steps of a round.
        pull: in (0, 1]; the paper's alpha, 0.6.
        anchor_momentum: in [0, 1); 0: z is the mean.

    Cost:
        ``2 (n - 1) / n`` models sent in every ``every`` steps, beside them. Two copies of the model, the anchor and
        what is averaged; a third with a momentum. A lost peer raises `PeerLost` at the end of the round.

    Not to be confused with:
        `CoCoDSGD`, which replaces the model by the late average and loses no step; here the mean is pulled back, too.

    References:
        Jianyu Wang, Hao Liang, Gauri Joshi. Overlap Local-SGD: An Algorithmic Approach to Hide Communication Delays in
        Distributed SGD. ICASSP 2020, arXiv:2002.09539.

    Example:
        >>> OverlapLocalSGD(every=4, pull=0.5).period(8)
        4
    """

    pull: float = 0.6
    anchor_momentum: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (0.0 < self.pull <= 1.0 and 0.0 <= self.anchor_momentum < 1.0):
            raise ConfigurationError(f"{self} needs a pull in (0, 1] and an anchor_momentum in [0, 1). Use 0.6 and 0.")

    def mixing(self, world_size: int) -> Mixing:
        left = (1.0 - self.pull) ** (1.0 / self.every)
        return Mixing(1.0 - left, _steps_to(1e-3, left, self.every))

    def init(self, worker: Worker) -> None:
        worker.state["anchor"] = worker.x.clone()
        if self.anchor_momentum:
            worker.state["velocity"] = worker.x.clone().mul_(0.0)

    def turn(self, worker: Worker, mean: AbstractVector | None) -> AbstractVector:
        anchor, x = worker.state["anchor"], worker.x
        if mean is not None and not self.anchor_momentum:
            anchor.copy_(mean)
        elif mean is not None:
            velocity = worker.state["velocity"]
            velocity.mul_(self.anchor_momentum).add_difference_(mean, anchor, 1.0)
            anchor.add_(velocity)
        x.mix_(x, 1.0 - self.pull, [(anchor, self.pull)])
        return x.clone() if mean is None else mean.copy_(x)


def _steps_to(share: float, left: float, every: int) -> int:
    """Steps after which no more than a share of a disagreement is left, of which so much is left after one."""
    steps = every
    while left**steps > share:
        steps += every
    return steps

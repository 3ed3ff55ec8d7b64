"""CoCoD-SGD: computation and communication decoupled (Shen, Xu, Liu, Liang, Cheng, 2019)."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_decentral.algorithms.overlapped_rounds import AbstractOverlappedRounds
from lightning_decentral.flat import AbstractVector
from lightning_decentral.worker import Worker


@dataclass(frozen=True)
class CoCoDSGD(AbstractOverlappedRounds):
    r"""Local SGD whose average is computed beside the next round: what the worker has moved meanwhile is put on top.

    Update rule, for a round of ``every`` local steps that takes worker i from x_i to x_i + moved_i::

        x_i <- (1/n) sum_j x_j + moved_i                    # of the x_j when the round began

    Nothing is lost: the mean of all models moves by the mean of all steps. Nobody waits as long as an average takes
    less than a round.

    Args:
        every: local steps of a round.

    Cost:
        ``2 (n - 1) / n`` models sent in every ``every`` steps, beside them. Two copies of the model: what is averaged,
        and the worker's own of then. A lost peer raises `PeerLost` at the end of the round.

    Differences with the paper:
        The first average is that of the end of the first round, since all workers begin with equal models.

    References:
        Shuheng Shen, Linli Xu, Jingchang Liu, Xianfeng Liang, Yifei Cheng. Faster Distributed Deep Net Training:
        Computation and Communication Decoupled Stochastic Gradient Descent. IJCAI 2019, arXiv:1906.12043.

    Example:
        >>> CoCoDSGD(every=4).period(8)
        4
    """

    def init(self, worker: Worker) -> None:
        """Remember nothing before the first round has ended."""

    def turn(self, worker: Worker, mean: AbstractVector | None) -> AbstractVector:
        if mean is None:
            worker.state["own"] = worker.x.clone()
            return worker.x.clone()
        own: AbstractVector = worker.state["own"]
        worker.x.add_difference_(mean, own, 1.0)
        own.copy_(worker.x)
        return mean.copy_(worker.x)

"""SlowMo: slow momentum over rounds of local steps (Wang, Tantia, Ballas, Rabbat, 2020)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from torch.optim import SGD

from lightning_decentral.algorithms.local_updates import AbstractLocalUpdates, OuterOptimizer, Rounds
from lightning_decentral.errors import ConfigurationError


@dataclass(frozen=True, repr=False)
class SlowMo(AbstractLocalUpdates):
    r"""Local SGD whose averages have a momentum of their own.

    Update rule, for the round that begins at the common model x(0) and ends after ``every`` local steps::

        u <- slow_momentum u + (x(0) - (1/n) sum_i x_i)
        x <- x(0) - slow_learning_rate u

    It equals block momentum (BMUF) with its block learning rate 1.

    Args:
        every: local steps of a round. The paper uses 12 on CIFAR-10, 48 on ImageNet and WMT.
        slow_momentum: in [0, 1). The paper uses 0.4 to 0.8, more for more workers.
        slow_learning_rate: above 0; the paper uses 1.
        inner_state: what becomes of the local optimizer's momenta after an average; see `AbstractLocalUpdates`.

    Cost:
        As `LocalSGD`, and two copies of the model: the last common one and the momentum, in float32.

    Differences with the paper:
        The paper divides the difference by the learning rate of the local steps, so that the momentum's unit does not
        change with it. That is the same as long as the learning rate stays; after it was lowered the momentum here
        is, for some rounds, larger than the paper's.

    References:
        Jianyu Wang, Vinayak Tantia, Nicolas Ballas, Michael Rabbat. SlowMo: Improving Communication-Efficient
        Distributed SGD with Slow Momentum. ICLR 2020, arXiv:1910.00643.

    Example:
        >>> SlowMo(every=48, slow_momentum=0.6)
        SlowMo(every=48, slow_momentum=0.6, slow_learning_rate=1.0)
    """

    every: int = 12
    slow_momentum: float = 0.5
    slow_learning_rate: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (0.0 <= self.slow_momentum < 1.0 and self.slow_learning_rate > 0.0):
            raise ConfigurationError(
                f"{self} needs a slow_momentum in [0, 1) and a slow_learning_rate above 0. Use 0.5 and 1."
            )

    @property
    def rounds(self) -> Rounds:
        """The rounds: when what is averaged."""
        return Rounds(self.every)

    @property
    def outer_optimizer(self) -> OuterOptimizer | None:
        """The outer optimizer: heavy ball."""
        return partial(SGD, lr=self.slow_learning_rate, momentum=self.slow_momentum)

"""BMUF: blockwise model-update filtering (Chen, Huo, 2016)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial

from torch.optim import SGD

from lightning_decentral.algorithms.local_updates import AbstractLocalUpdates, OuterOptimizer, Rounds
from lightning_decentral.errors import ConfigurationError


@dataclass(frozen=True, repr=False)
class BMUF(AbstractLocalUpdates):
    r"""Local steps of a block, then the mean model, filtered by a momentum over blocks.

    Update rule, for a block that begins at the common model g and ends after ``every`` local steps of the workers::

        delta <- block_momentum delta + block_learning_rate ((1/n) sum_i x_i - g)
        w     <- w + delta
        g     <- w                                  # classical block momentum
        g     <- w + block_momentum delta           # Nesterov's

    and all workers begin the next block at g.

    Args:
        every: local steps of a block.
        block_momentum: in [0, 1). ``None``: ``1 - 1 / n`` for n workers, with which, as a sum over blocks, the workers'
            updates count in full.
        block_learning_rate: above 0; the paper uses 1.
        nesterov: whether blocks begin ahead of w.

    Cost:
        As `LocalSGD`, and two copies of the model in float32: the last common one and the momentum.

    Not to be confused with:
        `SlowMo`, which is the same without Nesterov's form, with a momentum that is chosen for the task.

    Differences with the paper:
        What is evaluated and saved is the mean of the workers' models, which with Nesterov's form is ahead of w.

    References:
        Kai Chen, Qiang Huo. Scalable Training of Deep Learning Machines by Incremental Block Training with Intra-block
        Parallel Optimization and Blockwise Model-Update Filtering. ICASSP 2016.

    Example:
        >>> BMUF().resolved(8).block_momentum
        0.875
    """

    every: int = 16
    block_momentum: float | None = None
    block_learning_rate: float = 1.0
    nesterov: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        momentum = self.block_momentum
        if not ((momentum is None or 0.0 <= momentum < 1.0) and self.block_learning_rate > 0.0):
            raise ConfigurationError(
                f"{self} needs a block_momentum in [0, 1) and a block_learning_rate above 0. Use None and 1."
            )

    def resolved(self, world_size: int) -> BMUF:
        momentum = 1.0 - 1.0 / world_size if self.block_momentum is None else self.block_momentum
        return dataclasses.replace(self, block_momentum=momentum)

    @property
    def rounds(self) -> Rounds:
        """The rounds: when what is averaged."""
        return Rounds(self.every)

    @property
    def outer_optimizer(self) -> OuterOptimizer:
        """The momentum over blocks."""
        momentum = self.block_momentum or 0.0
        return partial(SGD, lr=self.block_learning_rate, momentum=momentum, nesterov=self.nesterov and momentum > 0.0)

"""SparseLoCo: DiLoCo whose differences are sparse, in 2 bits (Sarfi, Therien, Lidin, Belilovsky, 2025)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial

from torch.optim import SGD

from lightning_decentral.algorithms.local_updates import AbstractLocalUpdates, Differences, OuterOptimizer, Rounds
from lightning_decentral.compression import AbstractCompressor, ChunkTopK
from lightning_decentral.errors import ConfigurationError


@dataclass(frozen=True, repr=False)
class SparseLoCo(AbstractLocalUpdates):
    r"""Local steps, then the largest 64 of each 4096 differences to the common model, in 2 bits, with error feedback.

    Update rule, for the round that begins at the common model theta and ends after ``every`` local steps at x_i::

        e_i   <- error_feedback e_i + theta - x_i
        c_i    = C(e_i)                                  # sent: 1/146 of float32
        e_i   <- e_i - c_i
        theta <- theta - outer_learning_rate (1/n) sum_j c_j
        x_i   <- theta

    The error takes the place of an outer momentum: what a worker has left out comes later.

    Args:
        every: local steps of a round; the run of Covenant-72B has 30.
        outer_learning_rate: above 0; the published code has 0.4 in its last configuration.
        compressor: C, of fixed size. ``None``: ``ChunkTopK()``, the paper's.
        error_feedback: in [0, 1]; the paper's 0.95.

    Cost:
        Per worker ``n - 1`` messages in every ``every`` steps, each 1/146 of the model: with 8 workers 1/37 of what
        `DiLoCo` sends. Two copies of the model in float32, the common one and the error, and the messages. A lost peer
        raises `PeerLost` at the next exchange.

    Differences with the paper:
        Chunks are of the parameters in their order, not of the tiles of each matrix. The standard deviation of the bins
        is that of the values themselves, not its unbiased estimate.

    References:
        Amir Sarfi, Benjamin Therien, Joel Lidin, Eugene Belilovsky. Communication Efficient LLM Pre-training with
        SparseLoCo. 2025, arXiv:2508.15706.

    Example:
        >>> SparseLoCo(every=15).resolved(8).compressor
        ChunkTopK(keep=64, chunk=4096)
    """

    every: int = 30
    outer_learning_rate: float = 0.4
    compressor: AbstractCompressor | None = None
    error_feedback: float = 0.95

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.outer_learning_rate > 0.0:
            raise ConfigurationError(f"{self} needs an outer_learning_rate above 0. Use 0.4, or 1 for the whole mean.")

    @property
    def rounds(self) -> Rounds:
        """The rounds: when what is averaged."""
        return Rounds(self.every)

    @property
    def exchange(self) -> Differences:
        """How differences travel."""
        return Differences(ChunkTopK() if self.compressor is None else self.compressor, self.error_feedback)

    def resolved(self, world_size: int) -> SparseLoCo:
        return dataclasses.replace(self, compressor=self.exchange.compressor)

    @property
    def outer_optimizer(self) -> OuterOptimizer:
        """An SGD without momentum."""
        return partial(SGD, lr=self.outer_learning_rate)

"""DiLoCo: distributed low-communication training (Douillard et al., 2023)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from torch.optim import SGD

from lightning_decentral.algorithms.local_updates import AbstractLocalUpdates, Differences, OuterOptimizer, Rounds
from lightning_decentral.compression import AbstractCompressor
from lightning_decentral.errors import ConfigurationError


@dataclass(frozen=True, repr=False)
class AbstractDiLoCo(AbstractLocalUpdates):
    """Local updates with an outer optimizer: Nesterov's SGD, or any other of torch's form.

    Args:
        every: local steps of a round.
        outer_learning_rate: above 0.
        outer_momentum: in [0, 1).
        outer: makes another outer optimizer of the global model's parameters, in the place of Nesterov's SGD with these
            two: a class of `torch.optim` with its options, as ``partial(torch.optim.Adam, lr=1e-3)``.
        compressor: of the differences that the workers send; none: these travel as they are.
        error_feedback: how much of what a message leaves out is added to the next one, in [0, 1].
        inner_state: what becomes of the local optimizer's momenta after an average; see `AbstractLocalUpdates`.
    """

    every: int = 500
    outer_learning_rate: float = 0.7
    outer_momentum: float = 0.9
    outer: OuterOptimizer | None = None
    compressor: AbstractCompressor | None = None
    error_feedback: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.outer_learning_rate > 0.0 and 0.0 <= self.outer_momentum < 1.0):
            raise ConfigurationError(
                f"{self} needs an outer_learning_rate above 0 and an outer_momentum in [0, 1). Use 0.7 and 0.9."
            )

    @property
    def outer_optimizer(self) -> OuterOptimizer:
        """What applies the mean difference to the global model."""
        if self.outer is not None:
            return self.outer
        momentum = self.outer_momentum
        return partial(SGD, lr=self.outer_learning_rate, momentum=momentum, nesterov=momentum > 0.0)

    @property
    def exchange(self) -> Differences:
        """How differences travel."""
        return Differences(self.compressor, self.error_feedback)


@dataclass(frozen=True, repr=False)
class DiLoCo(AbstractDiLoCo):
    r"""DiLoCo: many local steps, then one step of Nesterov's momentum along what the workers have moved on average.

    Update rule, for the round that begins at the common model theta and ends after ``every`` local steps::

        difference = theta - (1/n) sum_i x_i
        m          <- outer_momentum m + difference
        theta      <- theta - outer_learning_rate (difference + outer_momentum m)
        x_i        <- theta

    The local optimizer, AdamW in the paper, keeps its state. It is the same as FedMom with all clients.

    Args:
        every: local steps of a round; the paper uses 500. Fewer are more traffic and closer to synchronous training.
        outer_learning_rate: the paper's 0.7.
        outer_momentum: the paper's 0.9.
        outer: another outer optimizer; see `AbstractDiLoCo`.
        compressor: of the differences that the workers send; none: these travel as they are.
        error_feedback: how much of what a message leaves out is added to the next one, in [0, 1].
        inner_state: what becomes of the local optimizer's momenta after an average; see `AbstractLocalUpdates`.

    Cost:
        ``2 (n - 1) / n`` models sent in every ``every`` steps, for which all wait. Two copies of the model, in float32
        at least: the global one and its momentum. With a compressor ``2 (n - 1) / n`` messages, or ``n - 1`` if they
        are sparse or of low rank, and a third copy for what they left out. A lost peer raises `PeerLost` at the next
        average.

    Differences with the paper:
        Until the first round has ended every worker has its own model; what is evaluated and saved in the middle of a
        round is the mean of these, not the global model of the last round.

    References:
        Arthur Douillard, Qixuan Feng, Andrei A. Rusu, Rachita Chhaparia, Yani Donchev, Adhiguna Kuncoro, Marc'Aurelio
        Ranzato, Arthur Szlam, Jiajun Shen. DiLoCo: Distributed Low-Communication Training of Language Models. 2023,
        arXiv:2311.08105.

    Example:
        >>> DiLoCo(every=50).period(8)
        50
    """

    @property
    def rounds(self) -> Rounds:
        """What is averaged when."""
        return Rounds(self.every)

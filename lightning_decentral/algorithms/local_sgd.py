"""Local SGD (Stich, 2019) and post-local SGD (Lin, Stich, Patel, Jaggi, 2020)."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_decentral.algorithms.local_updates import AbstractLocalUpdates, Differences, OuterOptimizer, Rounds
from lightning_decentral.compression import AbstractCompressor


@dataclass(frozen=True, repr=False)
class LocalSGD(AbstractLocalUpdates):
    r"""Local SGD: every worker trains by itself, and after every few steps all models become their mean.

    Update rule, for step t counted from 1::

        x_i <- x_i - learning_rate * gradient_i(x_i)
        x_i <- (1/n) sum_j x_j                            if every divides t

    Any optimizer may make the local steps; its state stays the worker's own. With ``warm_up_steps`` it is post-local
    SGD: the models are averaged after each step in the beginning, as synchronous SGD does with SGD, and only later
    after every few.

    Args:
        every: local steps of a round, at least 1; post-local SGD uses 16. Or a schedule, ``{0: 1, 1000: 4, 5000: 16}``:
            from which step on how many. Rounds begin anew where it changes.
        delay: steps for which the mean is under way, beside the gradients; 0: everybody waits for it.
        local_share: with a delay, the weight of a worker's own model in what it goes on with, in [0, 1).
        fragments: into how many pieces the model is cut, which are averaged one after the other, for an even load of
            the link. Each is averaged every ``every`` steps.
        warm_up_steps: after each of these first steps the models are averaged. Post-local SGD: until the learning rate
            is lowered for the first time. Needs ``delay=0``.
        compressor: of the differences to the last common model, which the workers send then in the place of their
            models (Qsparse-local-SGD); none: models travel as they are.
        error_feedback: how much of what a message leaves out is added to the next one, in [0, 1].
        inner_state: what becomes of the local optimizer's momenta after an average; see `AbstractLocalUpdates`.

    Cost:
        ``2 (n - 1) / n`` models sent in every ``every`` steps. No extra memory without a delay; with one, a copy of the
        largest fragment. With a compressor ``2 (n - 1) / n`` messages in the place of models, or ``n - 1`` if they are
        sparse or of low rank, and two copies of the model: the last common one and what was left out. A lost peer
        raises `PeerLost` at the next average.

    Not to be confused with:
        Synchronous SGD: on data that differs between workers, the fixed point is off by a term proportional to
        ``(every - 1) learning_rate`` (client drift).

    References:
        Sebastian U. Stich. Local SGD Converges Fast and Communicates Little. ICLR 2019, arXiv:1805.09767.
        Tao Lin, Sebastian U. Stich, Kumar Kshitij Patel, Martin Jaggi. Don't Use Large Mini-Batches, Use Local SGD.
        ICLR 2020, arXiv:1808.07217. Debraj Basu, Deepesh Data, Can Karakus, Suhas Diggavi. Qsparse-local-SGD:
        Distributed SGD with Quantization, Sparsification, and Local Computations. NeurIPS 2019, arXiv:1906.02367.

    Example:
        >>> LocalSGD(every=16).period(8)
        16
    """

    every: int | dict[int, int] = 8
    delay: int = 0
    local_share: float = 0.0
    fragments: int = 1
    warm_up_steps: int = 0
    compressor: AbstractCompressor | None = None
    error_feedback: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.every, int):  # methods can be hashed
            object.__setattr__(self, "every", tuple(sorted(dict(self.every).items())))

    @property
    def rounds(self) -> Rounds:
        """What is averaged when."""
        return Rounds(self.every, self.fragments, self.delay, self.local_share, self.warm_up_steps)

    @property
    def outer_optimizer(self) -> OuterOptimizer | None:
        """The optimizer of the global model: none, since the mean is the global model."""
        return None

    @property
    def exchange(self) -> Differences:
        """How differences travel."""
        return Differences(self.compressor, self.error_feedback)

"""Streaming DiLoCo (Douillard et al., 2025): DiLoCo in fragments, beside the local steps."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_decentral.algorithms.diloco import AbstractDiLoCo
from lightning_decentral.algorithms.local_updates import Rounds


@dataclass(frozen=True, repr=False)
class StreamingDiLoCo(AbstractDiLoCo):
    r"""DiLoCo in fragments that are averaged one after the other, beside the local steps.

    The model is cut into ``fragments`` of nearly equal size; one of them begins its average in every
    ``every / fragments`` steps. It arrives ``delay`` steps later, and is merged into what the worker has by then::

        theta_p <- outer step with the mean difference of fragment p
        x_i,p   <- local_share x_i,p + (1 - local_share) theta_p

    So the link carries one fragment at a time, a ``fragments``-th of DiLoCo's peak, and nobody waits as long as an
    average takes less than ``delay`` steps.

    Args:
        every: local steps from one average of a fragment to its next; the paper uses 100.
        outer_learning_rate: as in `DiLoCo`.
        outer_momentum: as in `DiLoCo`.
        outer: as in `DiLoCo`.
        compressor: as in `DiLoCo`; the paper packs differences into 4 bits: `FP4`.
        error_feedback: as in `DiLoCo`; the paper has none: 0.
        fragments: at least 1, at most ``every`` and the number of parameters.
        delay: local steps, less than ``every / fragments``; the paper's tau, 1 to 5.
        local_share: the paper's alpha, 0.5; in [0, 1).
        by_layer: whether a fragment is made of whole layers that follow each other, as in the paper and in torchft. A
            layer is a module that has parameters of its own. There must be at least as many as fragments.
        early: whether a fragment's average begins ``delay`` steps before its round ends and arrives there, as in
            torchft, where ``local_share`` counts without a delay, too. By default it begins there and arrives ``delay``
            steps later, as in the paper, and where all wait for an average they go on with it alone.

    Cost:
        As `DiLoCo`, and a copy of the largest fragment while it is under way. Nothing is exposed but the merge, unless
        an average takes longer than the delay.

    Differences with the paper:
        By default fragments are equal parts of the parameters in their order, whatever layer they belong to, so that
        all have the same traffic. Without a compressor differences travel in float32; the paper packs them into 4
        bits. Layers follow each other in a fragment; the paper has a variant that takes every other one.

    References:
        Arthur Douillard, Yanislav Donchev, Keith Rush, Satyen Kale, Zachary Charles, Zachary Garrett, Gabriel Teston,
        Dave Lacey, Ross McIlroy, Jiajun Shen, Alexandre Rame, Arthur Szlam, Marc'Aurelio Ranzato, Paul Barham.
        Streaming DiLoCo with Overlapping Communication: Towards a Distributed Free Lunch. 2025, arXiv:2501.18512.

    Example:
        >>> StreamingDiLoCo(every=32, fragments=4, delay=2).rounds.begun_after(8)
        [0]
    """

    every: int = 100
    fragments: int = 4
    delay: int = 5
    local_share: float = 0.5
    by_layer: bool = False
    early: bool = False

    @property
    def rounds(self) -> Rounds:
        """What is averaged when."""
        return Rounds(self.every, self.fragments, self.delay, self.local_share, 0, self.by_layer, self.early)

"""Messages that are not finite: noticed by whoever receives them, named, and left out if that is wanted.

A worker whose own model has become NaN spreads it: an average with it is NaN as well, and after as many steps as the
graph is wide all models are. Whoever receives a model therefore reads it once; only if its sum is not finite is it
searched. A sum of finite values may be infinite: that alone means nothing.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Literal

import torch

from lightning_decentral.errors import PoisonedMessage
from lightning_decentral.flat import Vector

Poisoned = Literal["warn", "refuse", "raise"]

_HALF = (torch.float16, torch.bfloat16)


class Inspector:
    """Looks at the models that a worker receives.

    Args:
        policy: what happens to one that is not finite. ``"warn"``: a warning, the first time that it comes from a
            worker. ``"refuse"``: the same, and it is not used. ``"raise"``: `PoisonedMessage`.
        rank: of this worker.
        describe: where in the model of a number a message is not finite, in words, and in which step.
    """

    def __init__(self, policy: Poisoned, rank: int, describe: Callable[[int, Vector], str]) -> None:
        self.policy, self._rank, self._describe = policy, rank, describe
        self._named: set[tuple[int, int]] = set()

    @property
    def refuses(self) -> bool:
        """Whether what is not finite is left out."""
        return self.policy == "refuse"

    def admits(
        self,
        message: Vector,
        source: int,
        index: int,
        whole: Callable[[], Vector] | None = None,
        receiver: int | None = None,
    ) -> bool:
        """Whether a message of the ``index``-th model may be used.

        Args:
            message: as received.
            source: who has sent it.
            index: the number of the model.
            whole: makes the model of which the message is a part, with zeros for the rest.
            receiver: who gets it, if this is the worker that sends.

        Raises:
            PoisonedMessage: if it is not finite, and that ends the run.
        """
        if is_finite(message):
            return True
        pair = source, self._rank if receiver is None else receiver
        if pair not in self._named or self.policy == "raise":
            self._named.add(pair)
            follows = {
                "warn": "It is used all the same, and spreads. Find out why on that worker, and skip such updates in "
                "optimizer_step; or pass poisoned='refuse' or 'raise' to the strategy",
                "refuse": "It is left out from now on, as long as it is not finite",
                "raise": "Find out why on that worker, and go on from the last checkpoint; or pass poisoned='refuse' "
                "to the strategy, to go on without it",
            }[self.policy]
            where = self._describe(index, message if whole is None else whole())
            text = f"Worker {pair[1]} got from worker {source} a model that is not finite {where}. {follows}."
            if self.policy == "raise":
                raise PoisonedMessage(text)
            warnings.warn(text, stacklevel=2)
        return not self.refuses


def is_finite(vector: Vector) -> bool:
    """Whether a vector has neither NaN nor infinity: one pass over it, and a second one if its sum is not finite."""
    for buffer in vector.buffers:
        if not (buffer.is_floating_point() or buffer.is_complex()):
            continue  # a compressed message, which is never made of what is not finite
        total = buffer.sum(dtype=torch.float32) if buffer.dtype in _HALF else buffer.sum()
        if not bool(total.isfinite()) and not bool(buffer.isfinite().all()):
            return False
    return True

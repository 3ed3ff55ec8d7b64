"""Messages that are not finite: noticed by whoever receives them, named, and left out if that is wanted.

A worker whose own model has become NaN spreads it: an average with it is NaN as well, and after as many steps as the
graph is wide all models are. Whoever receives a model therefore reads it; only if a sum is not finite is it searched. A
sum of finite values may be infinite: that alone means nothing.

Reading all of every message costs a fortieth of a step where computing costs little. What only warns therefore reads
some elements of each message, and of a large one all within some messages: a loss that is NaN makes whole layers NaN.
"""

from __future__ import annotations

import cmath
import warnings
from collections.abc import Callable
from typing import Literal

import torch

from lightning_decentral.errors import PoisonedMessage
from lightning_decentral.flat import Vector

Poisoned = Literal["warn", "refuse", "raise"]

TURNS = 16
"""Messages in which each element is read once by who only warns."""

_HALF = (torch.float16, torch.bfloat16)
_SMALL = 1 << 16  # elements; so many are always read
_STRIDE = 4093  # of the elements that are read in each message: each of them costs a miss of the cache


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
        self._messages = 0

    @property
    def refuses(self) -> bool:
        """Whether what is not finite is left out."""
        return self.policy == "refuse"

    @property
    def looks_first(self) -> bool:
        """Whether a model is looked at before it is used, so that what is not finite gets no further than here."""
        return self.policy != "warn"

    def next_turn(self) -> int | None:
        """Tell which elements of the next message are read, for `is_finite`; none if all of them are."""
        self._messages += 1
        return self._messages % TURNS if self.policy == "warn" else None

    def admits(
        self,
        message: Vector,
        source: int,
        index: int,
        whole: Callable[[], Vector] | None = None,
        receiver: int | None = None,
    ) -> bool:
        """Tell whether a message of the ``index``-th model may be used.

        Args:
            message: as received.
            source: who has sent it.
            index: the number of the model.
            whole: makes the model of which the message is a part, with zeros for the rest.
            receiver: who gets it, if this is the worker that sends.

        Raises:
            PoisonedMessage: if it is not finite, and that ends the run.
        """
        if is_finite(message, self.next_turn() if whole is None else None):
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


def is_finite(vector: Vector, turn: int | None = None) -> bool:
    """Tell whether a vector has neither NaN nor infinity: one pass over it, and a second one if its sum is not finite.

    Args:
        vector: what is read.
        turn: from 0 to 15, to read some elements of a large buffer only: others in each turn, all in all of them.
    """
    for buffer in vector.buffers:
        if not (buffer.is_floating_point() or buffer.is_complex()):
            continue  # a compressed message, which is never made of what is not finite
        read = [buffer]
        if turn is not None and buffer.numel() > _SMALL:
            share = -(-buffer.numel() // TURNS)
            read = [buffer[::_STRIDE], buffer[turn * share : (turn + 1) * share]]
        for part in read:
            total = part.sum(dtype=torch.float32) if part.dtype in _HALF else part.sum()
            if not cmath.isfinite(total.item()) and not bool(part.isfinite().all()):
                return False
    return True

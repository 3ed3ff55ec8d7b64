"""Two workers that meet: each sends the last digits of its vector, and both move half way by the very same number."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_decentral.averaging.messages import Message, compressed, message_like
from lightning_decentral.compression import Lattice, Payload
from lightning_decentral.compression.validation import require_one_of
from lightning_decentral.errors import ConfigurationError, DecodingError
from lightning_decentral.flat import AbstractVector, Vector
from lightning_decentral.worker import Worker

_RESOLVED = 2.0**21  # steps of a lattice that a value may be large: float32 tells these apart, with two bits to spare
_FINEST, _COARSEST = -100, 100  # exponents of a lattice's step
_SEED_BITS = 53  # a double holds it exactly


@dataclass(frozen=True, eq=False)
class Opened:
    """What a worker has sent to open a meeting, and needs to read the answer.

    Args:
        message: its digits.
        lattice: they are of.
        vector: what travels: the digits, and which lattice they are of.
    """

    message: Message
    lattice: Lattice
    vector: AbstractVector


@dataclass(frozen=True)
class LatticePairs:
    r"""How two workers average by quantized messages, of which each reads the other's near its own vector.

    Who opens a meeting chooses a lattice: of a step so large that whatever lies within ``margin`` times the distance
    it expects is read rightly, and with a random shift. It sends the digits of its vector modulo ``levels``, with the
    step and the seed of the shift; the other one answers with its own digits. Each then knows by how many steps the
    two *rounded* vectors differ, and moves by half of that::

        a <- a + step / 2 * (rounded_b - rounded_a)
        b <- b - step / 2 * (rounded_b - rounded_a)

    These are whole numbers of steps, the same at both ends: the sum of the two stays, whatever rounding does. The step
    is a power of two, so that both ends compute with the same one in any precision.

    A vector that is too far away is noticed by the check sums of `Lattice`, at the end that answers, before anything
    has moved: it *refuses*, and the two meet again in full precision. Once the answering end could read, the other one
    can, since it reads the same number with the opposite sign.

    Args:
        levels: 256, 16 or 4: 8, 4 or 2 bits per element.
        margin: how many times the distance that is expected a lattice reaches; at least 1.

    Raises:
        ConfigurationError: for other numbers.

    Cost:
        ``log2(levels)`` bits per element each way, 4 bytes for every 4096 elements, and 16 bytes.

    References:
        Davies, Gurunanthan, Moshrefi, Ashkboos, Alistarh, *New Bounds for Distributed Mean Estimation and Variance
        Reduction*, ICLR 2021, arXiv:2002.09268.
    """

    levels: int = 256
    margin: float = 4.0

    def __post_init__(self) -> None:
        require_one_of("LatticePairs", "levels", self.levels, (4, 16, 256))
        if not 1.0 <= self.margin < math.inf:
            raise ConfigurationError(
                f"LatticePairs got margin={self.margin!r}, needs at least 1, or what is expected could not be read. "
                "Use 4."
            )

    def messages(self, value: AbstractVector) -> Mapping[str, AbstractVector]:
        """Tell the forms of what travels, beside the vector itself where digits are refused."""
        digits = message_like(Lattice(1.0, self.levels, dither=True), value)
        return {"digits and lattice": digits.beside(value.new_numbers(0.0, 0.0)), "refusal": value.new_numbers(0.0)}

    def opened(self, worker: Worker, value: AbstractVector, expected: float) -> Opened:
        """Open a meeting.

        Args:
            worker: draws the shift.
            value: of it; is not changed.
            expected: how far, in any element, the other one's is expected to be; 0 if nothing is known.
        """
        coarse = max(2.0 * self.margin * expected / (self.levels - 1), largest(value) / _RESOLVED)
        exponent = math.ceil(math.log2(coarse)) if 0.0 < coarse < math.inf else _FINEST  # what is infinite is refused
        exponent = min(max(exponent, _FINEST), _COARSEST)
        seed = worker.rng.getrandbits(_SEED_BITS)
        lattice = Lattice(2.0**exponent, self.levels, dither=True)
        message = compressed(lattice, value, worker, seed=seed)
        return Opened(message, lattice, message.vector.beside(value.new_numbers(float(exponent), float(seed))))

    def answer_(
        self, worker: Worker, value: AbstractVector, theirs: AbstractVector
    ) -> tuple[AbstractVector, float | None]:
        """Move half way to who has opened a meeting; or refuse, and stay.

        Args:
            worker: that answers.
            value: of it.
            theirs: what `Opened.vector` was there.

        Returns:
            What travels back, and how far the two were apart, in the element where they were farthest; none: refused.
        """
        numbers = value.new_numbers(0.0, 0.0)
        digits, lattice_of = theirs.apart(message_like(Lattice(1.0, self.levels, dither=True), value), numbers)
        exponent, seed = lattice_of.numbers()
        lattice = Lattice(2.0 ** int(exponent), self.levels, dither=True)
        if largest(value) > 2 * _RESOLVED * lattice.step:
            return value.new_numbers(0.0), None
        message = compressed(lattice, value, worker, seed=int(seed))
        steps = _steps_between(lattice, message, digits, value)
        if steps is None:
            return value.new_numbers(0.0), None
        _move_half(lattice, value, steps)
        return message.vector.beside(lattice_of), _farthest(lattice, steps)

    def close_(self, value: AbstractVector, opened: Opened, reply: AbstractVector) -> float | None:
        """Move half way to who has answered.

        Args:
            value: of the worker that has opened the meeting; it may have changed since.
            opened: by which.
            reply: what came back.

        Returns:
            How far the two were apart, as there; none: it has refused, and nothing has moved.
        """
        refusal = value.new_numbers(0.0)
        if reply.form == refusal.form:
            return None
        digits, _ = reply.apart(opened.message.vector, value.new_numbers(0.0, 0.0))
        steps = _steps_between(opened.lattice, opened.message, digits, value)
        assert steps is not None, "what the other end could read is the same number here, with the opposite sign"
        _move_half(opened.lattice, value, steps)
        return _farthest(opened.lattice, steps)


def largest(value: AbstractVector) -> float:
    """Tell the largest magnitude in a vector; 0 of one that has no values. Costs a pass, and a wait for the device."""
    if not isinstance(value, Vector):
        return 0.0
    ends = [torch.stack(buffer.aminmax()) for buffer in value.buffers if buffer.numel()]
    return max((float(each.abs().max()) for each in ends), default=0.0)


def _steps_between(
    lattice: Lattice, own: Message, digits: AbstractVector, near: AbstractVector
) -> tuple[Tensor, ...] | None:
    """Tell by how many steps the other end's rounded vector is above one's own; none if it is too far to tell."""
    if not isinstance(near, Vector):
        return ()
    payloads: tuple[Payload, ...] = own.read(digits)
    try:
        steps = tuple(
            lattice.steps_between(theirs, mine, buffer)
            for theirs, mine, buffer in zip(payloads, own.payloads, near.buffers, strict=True)
        )
    except DecodingError:
        return None
    # Half of the levels has two signs, of which the other end may read the other one.
    return None if any(2 * int(each.abs().max()) >= lattice.levels for each in map(_wide, steps)) else steps


def _wide(steps: Tensor) -> Tensor:
    return torch.stack(steps.aminmax()).int() if steps.numel() else steps.new_zeros(1)


def _move_half(lattice: Lattice, value: AbstractVector, steps: tuple[Tensor, ...]) -> None:
    if isinstance(value, Vector):
        for buffer, each in zip(value.buffers, steps, strict=True):
            lattice.add_steps_(buffer, [(each, 0.5)])


def _farthest(lattice: Lattice, steps: tuple[Tensor, ...]) -> float:
    return lattice.step * max((int(_wide(each).abs().max()) for each in steps), default=0)

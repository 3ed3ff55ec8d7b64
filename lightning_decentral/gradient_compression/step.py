"""What a way of aggregation works on: one group's gradients in one step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_decentral.compression import AbstractCompressor, Payload
from lightning_decentral.errors import CompressionError
from lightning_decentral.gradient_compression.finite import not_finite, refused
from lightning_decentral.gradient_compression.groups import Group
from lightning_decentral.gradient_compression.measuring import Measuring
from lightning_decentral.gradient_compression.momentum import mask


@dataclass(slots=True, eq=False)
class Step:
    """What holds from the begin of a backward pass to its end, and what must be remembered if all went well.

    Attributes:
        rank: this worker's.
        workers: how many there are.
        number: of exchanges before this one.
        seed: of random numbers; the same on all workers.
        epoch: for compressors that warm up.
        scale: of the loss.
        rates: for each parameter what a gradient is multiplied by before it changes the parameter.
        dense: whether all gradients are exchanged as they are.
        measuring: takes figures.
        rights: where PowerSGD starts: the last step's results, by parameter.
        groups: that were exchanged.
        velocities: of DGC, by parameter.
        new_rights: where PowerSGD starts next.
        refused: whether a gradient of any worker is not finite, or too large.
        names: of this worker's gradients for which that is so.
        failures: what any of it raised; nothing is exchanged any more then.
    """

    rank: int
    workers: int
    number: int = 0
    seed: int = 0
    epoch: int = 0
    scale: float = 1.0
    rates: Mapping[str, float] = field(default_factory=dict)
    dense: bool = False
    measuring: Measuring = field(default_factory=Measuring)
    rights: Mapping[str, Tensor] = field(default_factory=dict)
    groups: list[Group] = field(default_factory=list)
    velocities: dict[str, Tensor] = field(default_factory=dict)
    new_rights: dict[str, Tensor] = field(default_factory=dict)
    refused: bool = False
    names: list[str] = field(default_factory=list)
    failures: list[BaseException] = field(default_factory=list)

    @property
    def share(self) -> float:
        """A power of two with which a sum over the workers cannot overflow, and has the same digits."""
        return float(0.5 ** (self.workers - 1).bit_length())


@dataclass(slots=True, eq=False)
class Exchange:
    """The exchange of one group in one step.

    Attributes:
        step: the step.
        group: the group.
        x: its vector; the mean comes in its place.
        gradients: of its parameters, with their shapes and strides.
        factor: what brings the group's memories into the unit of this step's gradients.
    """

    step: Step
    group: Group
    x: Tensor
    gradients: Sequence[Tensor]
    factor: float | Tensor = 1.0

    @property
    def compressor(self) -> AbstractCompressor:
        """The compressor of this epoch."""
        assert self.group.scheme is not None
        return self.group.scheme.compressor.at_epoch(self.step.epoch)

    def factor_of(self, where: slice) -> float | Tensor:
        """Cut the factor for some of the vector's elements."""
        return self.factor[where] if isinstance(self.factor, Tensor) else self.factor

    def generator(self, compressor: AbstractCompressor, start: int = 0) -> torch.Generator | None:
        """Make random numbers for a compressor that draws some.

        They depend on the step and the elements (the vector's from ``start`` on) alone, and on the worker unless they
        are shared.
        """
        randomness = compressor.traits.randomness
        if randomness == "none" or self.x.is_meta:
            return None
        step, generator = self.step, torch.Generator(self.x.device)
        own = 0 if randomness == "shared" else step.rank + 1
        return generator.manual_seed(mixed(step.seed, step.number, min(self.group.numbers), own, start))

    def message(self, compressor: AbstractCompressor) -> tuple[Payload, Tensor | None, bool]:
        """Compress the vector, and remember what that leaves out.

        Returns:
            This worker's message; what it stands for if that was asked; and whether the gradient is not finite: then
            the message is one of the right size, so that the others need not wait.
        """
        step, memory, x = self.step, self.group.memory, self.x
        generator, sent = self.generator(compressor), None
        try:
            if memory is None:
                payload = compressor.compress(x, generator)
                sent = compressor.decompress(payload) if step.measuring.everything else None
            else:
                payload = compressor.compress(memory.add(x, self.factor).to(x.dtype), generator)
                sent = compressor.decompress(payload)
                memory.remove(sent)
                mask(step.velocities, self.group, compressor, sent)
        except CompressionError:
            self.blame()
            return compressor.compress(torch.zeros_like(x), self.generator(compressor)), None, True
        if sent is not None:
            step.measuring.compare(memory, x, sent)
        return payload, sent, False

    def blame(self) -> None:
        """Note the names of the parameters because of which a compressor has refused the vector."""
        self.step.names += refused(self.group.names, self.group.sizes, self.x)

    def blame_what_is_not_finite(self) -> None:
        """Note the names of the parameters whose gradient is not finite."""
        self.step.names += not_finite(self.group.names, self.group.sizes, self.x)

    def refuse(self) -> None:
        """Put NaN in the place of the mean, on all workers: a loss scaler skips the step then."""
        self.step.refused = True
        self.x.fill_(torch.nan)


def mixed(*numbers: int) -> int:
    """Make one seed from several numbers; neighbours give unrelated seeds."""
    seed = 0
    for number in numbers:
        seed = (seed ^ (number + 0x9E3779B97F4A7C15)) * 0xBF58476D1CE4E5B9 % 2**64
        seed ^= seed >> 31
    return seed % 2**63

"""What messages left out, by parameter.

It belongs to parameters and not to buckets, because DDP forms its buckets anew after the first step. In two phases
there are two kinds: of what a worker sends (its *own*), and of the mean of the part that it owns (*owned*).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import sqrt
from typing import Any

import torch
from torch import Tensor

from lightning_decentral.gradient_compression.groups import Group
from lightning_decentral.gradient_compression.measuring import sum_of_squares


class Residuals:
    """Finds the residual of every parameter in the memory of its group, and carries it from one group to the next.

    Args:
        rank: this worker's.
        workers: how many.
        device: where they lie.

    Attributes:
        rates: the unit of each parameter's residual: what gradients were multiplied by when it was left.
    """

    def __init__(self, rank: int, workers: int, device: torch.device) -> None:
        self._rank, self._workers, self._device = rank, workers, device
        self._homes: dict[str, tuple[Group, int, int]] = {}  # where each parameter is: from, to
        self._loaded: dict[str, Tensor] = {}  # out of a checkpoint, for groups that are still to come
        self._loaded_owned: dict[str, Tensor] = {}  # those of all owners: everybody takes its part
        self.rates: dict[str, float] = {}
        self._settled: Mapping[str, float] | None = None  # the rates, if every residual is in their unit

    def __contains__(self, name: object) -> bool:
        return name in self._homes or name in self._loaded

    # -- in a step -----------------------------------------------------------------------------------------------------

    def factor(self, group: Group, rates: Mapping[str, float]) -> float | Tensor:
        """Compute what brings a group's residuals into the unit of this step's gradients.

        Args:
            group: with memories or without.
            rates: of this step.

        Returns:
            One for all, or one for each element of the group's vector; 0 where the rate is 0.
        """
        if group.memory is None or rates is self._settled or rates == self._settled:
            return 1.0
        factors = [self.rates.get(name, rates[name]) / rates[name] if rates[name] else 0.0 for name in group.names]
        if len(set(factors)) == 1:
            return factors[0]
        each = torch.tensor(factors, dtype=torch.float64).repeat_interleave(torch.tensor(group.sizes))
        return each.to(group.memory.memory.dtype).to(self._device)

    def commit(self, groups: Iterable[Group], rates: Mapping[str, float], frozen: set[str]) -> None:
        """Take what this step's messages left out.

        Args:
            groups: that were exchanged.
            rates: of this step.
            frozen: parameters that the step does not change: their message is lost, and their residual rests.
        """
        for group in groups:
            if group.memory is None:
                continue
            kept = {name: self.own(name).clone() for name in frozen.intersection(group.names)}
            owned = {name: [each.clone() for _, each in self._owned(name)] for name in kept}
            for memory in group.memories:
                memory.commit()
            for name, residual in kept.items():
                self.own(name).copy_(residual)
                for (_, now), before in zip(self._owned(name), owned[name], strict=True):
                    now.copy_(before)
            self.rates.update({name: rates[name] for name in group.names if name not in kept})
        self._settled = None if frozen else rates

    def discard(self, groups: Iterable[Group]) -> None:
        """Leave all as it was before this step."""
        for group in groups:
            for memory in group.memories:
                memory.discard()

    # -- from group to group -------------------------------------------------------------------------------------------

    def move_into(self, group: Group) -> None:
        """Let a new group have what was remembered of its parameters.

        With new buckets the owners' parts change, too. What an owner remembers of the mean is then that many times as
        much in its own residual as there are workers: no message is needed, and the mean of all residuals is what it
        was.
        """
        assert group.memory is not None
        for name, (start, stop) in zip(group.names, group.borders, strict=True):
            residual = group.memory.memory[start:stop]
            if name in self:
                residual.copy_(self.own(name))
                self._loaded.pop(name, None)
            loaded = self._loaded_owned.pop(name, None)
            if loaded is None and name in self._homes:
                for where, owned in self._owned(name):
                    residual[where].add_(owned, alpha=self._workers)
            self._homes[name] = (group, start, stop)
            if loaded is not None and group.owner is None:
                residual.add_(loaded)
            elif loaded is not None:
                for where, owned in self._owned(name):
                    owned.copy_(loaded[where])

    # -- to be looked at and saved -------------------------------------------------------------------------------------

    def own(self, name: str) -> Tensor:
        """See what this worker's messages left out of a parameter's gradients."""
        if name in self._loaded:
            return self._loaded[name]
        group, start, stop = self._homes[name]
        assert group.memory is not None
        return group.memory.memory[start:stop]

    def owned(self, name: str) -> Tensor:
        """Copy what this worker remembers of a parameter's mean as an owner, with 0 in the parts of others."""
        whole = torch.zeros_like(self.own(name))
        if name in self._loaded_owned:  # on all workers
            return whole if self._rank else whole.copy_(self._loaded_owned[name])
        if name in self._homes:
            for where, owned in self._owned(name):
                whole[where].copy_(owned)
        return whole

    def _owned(self, name: str) -> list[tuple[slice, Tensor]]:
        """Find which elements of a parameter's mean this worker remembers as their owner, and see them."""
        group, start, stop = self._homes[name]
        found: list[tuple[slice, Tensor]] = []
        if group.owner is None:
            return found
        for piece in group.pieces:
            part, memory = piece.part(self._rank), group.owner.memory[piece.owned]
            low, high = max(part.start, start), min(part.stop, stop)
            if low < high:
                found.append((slice(low - start, high - start), memory[low - part.start : high - part.start]))
        return found

    def load(
        self, names: Iterable[str], state: Mapping[str, Any], own: Mapping[str, Tensor], owned: Mapping[str, Tensor]
    ) -> None:
        """Forget what there is, and take what a checkpoint has.

        Args:
            names: of the parameters that are to have residuals.
            state: the checkpoint, with the units.
            own: residuals of this worker.
            owned: those of all owners together; empty in older checkpoints.
        """
        self._homes, self._settled = {}, None
        self._loaded = {name: own[name].to(self._device) for name in names}
        self._loaded_owned = {name: owned[name].to(self._device) for name in names if name in owned}
        self.rates = {name: rate for name, rate in state["rates"].items() if name in self._loaded}


def norm_of(groups: Sequence[Group]) -> float:
    """Compute the norm of all that this worker has not sent yet."""
    squares = (sum_of_squares(memory.memory) for group in groups for memory in group.memories)
    return sqrt(sum(float(square) for square in squares))

"""The buffers of virtual workers, averaged in training: a vector of each worker, which its module's buffers follow."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import Module

from lightning_decentral.errors import ConfigurationError
from lightning_decentral.flat import Layout, Vector
from lightning_decentral.protocol import AbstractAlgorithm, AbstractAsynchronousAlgorithm
from lightning_decentral.strategies.buffers import averaged, check_buffers
from lightning_decentral.strategies.virtual import VirtualModels


def check_virtual_buffers(algorithm: AbstractAlgorithm, buffers: str) -> None:
    """Refuse a policy that a simulation does not have, or that does not fit the algorithm.

    Raises:
        ConfigurationError: for it.
    """
    check_buffers("SimulatedStrategy", algorithm, buffers)
    if buffers == "local":
        raise ConfigurationError(
            "SimulatedStrategy got buffers='local', which evaluates each worker with its own; it evaluates one model, "
            "and needs 'evaluation' or 'gossip'. Use real workers."
        )
    if buffers == "gossip" and isinstance(algorithm, AbstractAsynchronousAlgorithm):
        raise ConfigurationError(
            f"SimulatedStrategy got buffers='gossip' with {type(algorithm).__name__}, whose virtual workers call each "
            "other for their models only; it needs a method whose workers wait for each other, as DPSGD. Use "
            "'evaluation', or real workers."
        )


class VirtualBuffers:
    """What `BufferGossip` averages, of virtual workers.

    Args:
        module: the user's.
        workers: how many.

    Attributes:
        vectors: by rank.
    """

    def __init__(self, module: Module, workers: int) -> None:
        found = list(averaged(module))
        self._names = [name for name, *_ in found]
        tensors = [tensor for *_, tensor in found]
        self._variances = [place for place, (_, _, leaf, _) in enumerate(found) if leaf == "running_var"]
        self._layout = Layout(tensors)
        device = tensors[0].device if tensors else torch.device("cpu")
        self.vectors = [self._layout.new_vector(device) for _ in range(workers)]
        self._given = [self._layout.new_vector(device) for _ in range(workers)]  # what each module was given last
        self._changes: dict[int, Vector] = {}  # by a forward pass whose step goes on
        self._models: VirtualModels | None = None

    def follow(self, models: VirtualModels) -> None:
        """Begin at what the virtual models have now."""
        self._models = models
        for rank, (vector, given) in enumerate(zip(self.vectors, self._given, strict=True)):
            for view, value in zip(self._layout.views(vector), self._values(rank), strict=True):
                view.copy_(value)
            given.copy_(vector)

    def collect(self, rank: int) -> None:
        """Note by how much a worker's module differs from what it was given: its forward pass has changed that."""
        change = self._given[rank].empty_like()
        for view, value in zip(self._layout.views(change), self._values(rank), strict=True):
            view.copy_(value)
        self._changes[rank] = change.add_(self._given[rank], alpha=-1.0)

    def add(self, rank: int) -> None:
        """Let a worker's vector have what was changed."""
        self.vectors[rank].add_(self._changes.pop(rank))

    def give(self, rank: int) -> None:
        """Let a worker's module have its vector.

        No variance gets below zero, as it could where a worker's own weight is smaller than BatchNorm's momentum.
        """
        views = self._layout.views(self.vectors[rank])
        for place in self._variances:
            views[place].clamp_(min=0.0)
        for value, view in zip(self._values(rank), views, strict=True):
            value.copy_(view)
        self._given[rank].copy_(self.vectors[rank])

    def _values(self, rank: int) -> Sequence[Tensor]:
        assert self._models is not None
        return [value.data for value in self._models.belongings(rank, self._names)]

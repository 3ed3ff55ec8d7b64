"""DDP's buckets: which groups each has, and its gradients as one vector for each group."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from lightning_decentral.errors import ConfigurationError
from lightning_decentral.gradient_compression.groups import Group
from lightning_decentral.gradient_compression.scheme import UNCOMPRESSED, Scheme
from lightning_decentral.gradient_compression.sizes import chosen


class Buckets:
    """Cuts every new bucket into groups, once.

    Args:
        parameters: of the model, by name; those that are trained.
        schemes: how each is exchanged; those without an entry as they are.
        rank: this worker's.
        workers: how many.
        remembers: is called for each new group with memories.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        schemes: Mapping[str, Scheme],
        rank: int,
        workers: int,
        remembers: Callable[[Group], None],
    ) -> None:
        self._numbers = {name: number for number, name in enumerate(parameters)}
        self._schemes = schemes
        self._rank, self._workers = rank, workers
        self._remembers = remembers
        self._groups: dict[tuple[str, ...], list[Group]] = {}  # by the names of the parameters in a bucket

    @property
    def groups(self) -> list[Group]:
        """All groups that there are now."""
        return [group for groups in self._groups.values() for group in groups]

    def forget(self) -> None:
        """Cut all anew."""
        self._groups = {}

    def whole(self, bucket: Bucket) -> list[Group]:
        """Make one group of a bucket, whose gradients are exchanged as they are."""
        return [self._group(None, bucket, range(len(bucket.names)))]

    def groups_of(self, bucket: Bucket) -> list[Group]:
        """Cut a bucket into groups, or find those that it was cut into."""
        key = tuple(bucket.names)
        groups = self._groups.get(key)
        if groups is None:
            groups = self._cut(bucket)
            mine = set(key)
            self._groups = {other: each for other, each in self._groups.items() if mine.isdisjoint(other)}
            self._groups[key] = groups
        return groups

    def _cut(self, bucket: Bucket) -> list[Group]:
        members: dict[Scheme | None, list[int]] = {}
        for place, (name, gradient) in enumerate(zip(bucket.names, bucket.gradients, strict=True)):
            scheme = self._schemes.get(name) if gradient.is_floating_point() else None
            members.setdefault(scheme, []).append(place)
        groups = []
        for scheme, places in members.items():
            group, dtype = self._group(scheme, bucket, places), bucket.gradients[places[0]].dtype
            if scheme is not None:
                group.way = chosen(scheme, group.elements, self._workers, dtype)
                if group.way == "two_phase":
                    group.cut(scheme, self._workers, self._rank, dtype)
                if scheme.feedback:
                    group.remember(dtype, bucket.buffer.device)
                    self._remembers(group)
            groups.append(group)
        if any(group.way == "two_phase" for group in groups):  # what is not compressed goes along
            for group in groups:
                gradient = bucket.gradients[group.places[0]]
                if group.scheme is None and gradient.is_floating_point():
                    group.cut(UNCOMPRESSED, self._workers, self._rank, gradient.dtype)
        return groups

    def _group(self, scheme: Scheme | None, bucket: Bucket, places: Sequence[int]) -> Group:
        names = [bucket.names[place] for place in places]
        sizes = [bucket.gradients[place].numel() for place in places]
        return Group(scheme, names, [self._numbers[name] for name in names], list(places), sizes)


class Bucket:
    """A bucket in one step: its gradients as one vector for each group, in place where nothing lies between them.

    Args:
        names: of its parameters, in order.
        buffer: all gradients, one after the other.
        gradients: views of the buffer, with the parameters' shapes.
    """

    def __init__(self, names: Sequence[str], buffer: Tensor, gradients: Sequence[Tensor]) -> None:
        self.names = names
        self.buffer = buffer
        self.gradients = gradients
        self.flat: Sequence[Tensor] = ()  # the gradients again, but one-dimensional
        self._copies: list[tuple[Group, Tensor]] = []

    def open(self) -> None:
        """Look into the buffer.

        Raises:
            ConfigurationError: for sparse gradients.
        """
        if self.buffer.is_sparse:
            raise ConfigurationError(
                f"GradientCompression got a sparse gradient of {', '.join(self.names)}, needs dense ones. Make the "
                "layer with sparse=False, or remove the callback."
            )
        self.flat = torch.split(self.buffer, [gradient.numel() for gradient in self.gradients])

    def vector_of(self, group: Group) -> Tensor:
        """Give a group's vector."""
        if group.neighbours:
            start = self.flat[group.places[0]].storage_offset() - self.buffer.storage_offset()
            return self.buffer[start : start + group.elements]
        vector = torch.cat([self.flat[place] for place in group.places])
        self._copies.append((group, vector))
        return vector

    def close(self) -> None:
        """Write the vectors that are copies back into the buffer."""
        for group, vector in self._copies:
            places = [self.flat[place] for place in group.places]
            torch._foreach_copy_(places, list(torch.split(vector, group.sizes)))

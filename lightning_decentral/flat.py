"""Contiguous parameter buffers: what algorithms compute with and what travels.

`Vector` is a model as one flat tensor per dtype, with the few in-place operations that methods need. `Layout` says
where each parameter lies in it, and `FlatParameters` makes a module's parameters views of it, so that a whole model is
one operation and one message. `SizeOnlyVector` has the same operations and no values: the planner computes with it.

Half-precision values are averaged in float32 and rounded once: averaging in bfloat16 stalls before consensus.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Self

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from lightning_decentral.errors import ConfigurationError

_CHUNK = 1 << 18  # elements that are in the cache while they are worked on
_SCRATCH = 1 << 16  # the same where a temporary is needed: small enough for the allocator to have it at hand
_DEVICE_CHUNK = 1 << 24  # the same on an accelerator, which needs more to be busy
_HALF = (torch.float16, torch.bfloat16)


class AbstractVector(ABC):
    """A model-sized vector. Operations end in ``_`` where they work in place, and then return ``self``."""

    __slots__ = ()

    @property
    @abstractmethod
    def num_bytes(self) -> int:
        """The bytes that it takes on the wire."""

    @property
    @abstractmethod
    def form(self) -> tuple[tuple[int, object], ...]:
        """The number of elements and the type of each buffer: vectors of one form fit into each other's memory."""

    @abstractmethod
    def clone(self) -> Self:
        """Make a copy in new memory."""

    @abstractmethod
    def zeros_like(self) -> Self:
        """Zeros of this shape, in float32 where this is half precision: a sum must not be rounded at every step."""

    @abstractmethod
    def beside(self, *others: Self) -> Self:
        """Join this and ``others`` to one vector, to send them in one message: views, no copy."""

    @abstractmethod
    def new_numbers(self, *values: float) -> Self:
        """Make of a few numbers, in double precision, a vector to put `beside` this one: a weight, a version, a count.

        They travel, are added, multiplied and averaged as all else, in the planner too.
        """

    @abstractmethod
    def numbers(self) -> list[float]:
        """Read the values of a vector that `new_numbers` has made. Costs a wait for the device."""

    @abstractmethod
    def apart(self, *like: Self) -> tuple[Self, ...]:
        """Take apart what was put `beside` each other: views of this vector, with the forms of ``like`` in order."""

    @property
    @abstractmethod
    def borders(self) -> tuple[int, ...] | None:
        """The elements before which a layer begins, but for the first; ``None`` if nothing is known of layers."""

    @property
    @abstractmethod
    def parameter_borders(self) -> tuple[int, ...] | None:
        """The elements before which a parameter begins, but for the first; ``None`` if nothing is known of them."""

    @abstractmethod
    def slices(self, count: int, borders: Sequence[int] | None = None) -> list[Self]:
        """Cut this vector into so many pieces of nearly equal size, one after the other: views, no copy.

        Args:
            count: of pieces.
            borders: before which elements a piece may begin, in order; ``None``: before any.

        Raises:
            ConfigurationError: if it has fewer elements, or if there are too few borders.
        """

    @abstractmethod
    def overlaps(self, other: AbstractVector) -> bool:
        """Tell whether the two have some memory in common."""

    @abstractmethod
    def revision(self) -> object:
        """Something that is equal at two times if no operation on this vector has changed it in between."""

    @abstractmethod
    def copy_(self, other: Self) -> Self:
        """Take the values of ``other``."""

    @abstractmethod
    def add_(self, other: Self, alpha: float = 1.0) -> Self:
        """Add ``alpha * other``."""

    @abstractmethod
    def mul_(self, factor: float) -> Self:
        """Multiply by ``factor``."""

    @abstractmethod
    def add_difference_(self, plus: Self, minus: Self, alpha: float) -> Self:
        """Add ``alpha * (plus - minus)``."""

    @abstractmethod
    def approach_(self, theirs: Self) -> Self:
        """Move half way to ``theirs``, which becomes the difference ``theirs - self`` of before."""

    @abstractmethod
    def remainder_like(self) -> Self:
        """Zeros of this shape for what rounding leaves out, in bfloat16: half a copy of a float32 vector."""

    @abstractmethod
    def add_rest_(self, other: Self, rest: Self) -> Self:
        """Add ``other + rest``; ``rest``, a `remainder_like` this, becomes what rounding left out of the sum."""

    @abstractmethod
    def pull_(self, others: Sequence[tuple[Self, float]], total: Self, rest: Self) -> Self:
        """Add ``sum_k weight_k (other_k - self)`` to this, as `add_rest_` does, and to ``total``, which may be wider.

        Two workers that pull each other with the same weight add the same numbers with opposite signs, so that the sum
        of their totals stays what it was, but for the rounding of these totals themselves.
        """

    @abstractmethod
    def mix_(self, own: Self, own_weight: float, others: Sequence[tuple[Self, float]]) -> Self:
        """Become ``own_weight * own`` plus the weighted sum of ``others``; ``self`` may be one of them."""


class Vector(AbstractVector):
    """A model-sized vector: one contiguous 1-D tensor per dtype.

    Args:
        buffers: the tensors; kept, not copied.

    Example:
        >>> x = Vector([torch.tensor([1.0, 3.0])])
        >>> x.add_(x.clone(), alpha=0.5).buffers[0].tolist()
        [1.5, 4.5]
    """

    __slots__ = ("__weakref__", "_revised", "borders", "buffers", "parameter_borders")

    def __init__(self, buffers: Iterable[Tensor]) -> None:
        self.buffers = tuple(buffers)
        self.borders: tuple[int, ...] | None = None
        self.parameter_borders: tuple[int, ...] | None = None
        self._revised = [0] * len(self.buffers)  # before the buffers that there are now

    @property
    def num_bytes(self) -> int:
        return sum(buffer.numel() * buffer.element_size() for buffer in self.buffers)

    @property
    def form(self) -> tuple[tuple[int, object], ...]:
        return tuple((buffer.numel(), buffer.dtype) for buffer in self.buffers)

    @property
    def numel(self) -> int:
        """The number of elements."""
        return sum(buffer.numel() for buffer in self.buffers)

    def clone(self) -> Self:
        copy = type(self)(buffer.clone() for buffer in self.buffers)
        copy.borders, copy.parameter_borders = self.borders, self.parameter_borders
        return copy

    def zeros_like(self) -> Self:
        return type(self)(torch.zeros_like(buffer, dtype=_wide(buffer.dtype)) for buffer in self.buffers)

    def empty_like(self) -> Self:
        """Make a vector of this shape with undefined values."""
        return type(self)(torch.empty_like(buffer) for buffer in self.buffers)

    def beside(self, *others: Self) -> Self:
        return type(self)(buffer for vector in (self, *others) for buffer in vector.buffers)

    def new_numbers(self, *values: float) -> Self:
        device = self.buffers[0].device if self.buffers else "cpu"
        return type(self)([torch.tensor(values, dtype=torch.float64, device=device)])

    def numbers(self) -> list[float]:
        return [float(value) for buffer in self.buffers for value in buffer.tolist()]

    def apart(self, *like: Self) -> tuple[Self, ...]:
        buffers = iter(self.buffers)
        return tuple(type(self)(itertools.islice(buffers, len(each.buffers))) for each in like)

    def slices(self, count: int, borders: Sequence[int] | None = None) -> list[Self]:
        cuts, pieces = _cuts(self.numel, count, borders), []
        for begin, end in itertools.pairwise(cuts):
            piece, first = [], 0
            for buffer in self.buffers:
                inside = buffer[max(begin - first, 0) : max(end - first, 0)]
                piece += [inside] if inside.numel() else []
                first += buffer.numel()
            pieces.append(type(self)(piece))
        return pieces

    def overlaps(self, other: AbstractVector) -> bool:
        if not isinstance(other, Vector):
            return False
        others = [_memory(buffer) for buffer in other.buffers]
        return any(
            begin < other_end and other_begin < end
            for begin, end in map(_memory, self.buffers)
            for other_begin, other_end in others
        )

    def revision(self) -> object:
        return [before + buffer._version for before, buffer in zip(self._revised, self.buffers, strict=True)]

    def move(self) -> None:
        """Go to new memory, with the same values; what was there before stays as it is for who has kept it."""
        moved = tuple(buffer.clone() for buffer in self.buffers)
        for i, (old, new) in enumerate(zip(self.buffers, moved, strict=True)):
            self._revised[i] += old._version - new._version
        self.buffers = moved

    def copy_(self, other: Self) -> Self:
        for mine, their in zip(self.buffers, other.buffers, strict=True):
            mine.copy_(their)
        return self

    def add_(self, other: Self, alpha: float = 1.0) -> Self:
        for mine, their in zip(self.buffers, other.buffers, strict=True):
            mine.add_(their, alpha=alpha)
        return self

    def mul_(self, factor: float) -> Self:
        for mine in self.buffers:
            mine.mul_(factor)
        return self

    def add_difference_(self, plus: Self, minus: Self, alpha: float) -> Self:
        for mine, a, b in zip(self.buffers, plus.buffers, minus.buffers, strict=True):
            for m, p, q in _chunks(mine, a, b, most=_SCRATCH):
                if m.dtype in _HALF:
                    m.copy_(m.float().add_(p.float() - q, alpha=alpha))
                else:
                    m.add_(p.to(m.dtype) - q, alpha=alpha)  # not in half precision, which the difference may have
        return self

    def approach_(self, theirs: Self) -> Self:
        for mine, (their, place) in zip(self.buffers, theirs.sources(), strict=True):
            for m, t, p in _chunks(mine, their, place):
                # In half precision each is computed in float32, and rounded once.
                m.add_(torch.sub(t, m, out=p), alpha=0.5)
        return self

    def sources(self) -> list[tuple[Tensor, Tensor]]:
        """Return of each buffer where its values are read, and the place of what overwrites them now: here the same."""
        return [(buffer, buffer) for buffer in self.buffers]

    def remainder_like(self) -> Self:
        return type(self)(torch.zeros_like(buffer, dtype=torch.bfloat16) for buffer in self.buffers)

    def add_rest_(self, other: Self, rest: Self) -> Self:
        for mine, their, left in zip(self.buffers, other.buffers, rest.buffers, strict=True):
            room = _room(mine, 2)
            for m, t, r in _chunks(mine, their, left):
                _add_rest(m, t, 1.0, r, room[:, : m.numel()].unbind())
        return self

    def pull_(self, others: Sequence[tuple[Self, float]], total: Self, rest: Self) -> Self:
        if not others:
            return self.add_rest_(self.zeros_like(), rest)
        weights = [weight for _, weight in others]
        alike = len(set(weights)) == 1  # then the differences are added up first, and multiplied once
        for i, (mine, sums, left) in enumerate(zip(self.buffers, total.buffers, rest.buffers, strict=True)):
            room = _room(sums, 3)
            for m, s, r, *theirs in _chunks(mine, sums, left, *(o.buffers[i] for o, _ in others)):
                change, *temporary = room[:, : m.numel()].unbind()
                own = m if m.dtype == s.dtype else temporary[0].copy_(m)
                _subtract(theirs[0], own, out=change)
                if not alike:
                    change.mul_(weights[0])
                for t, weight in zip(theirs[1:], weights[1:], strict=True):
                    change.add_(_subtract(t, own, out=temporary[1]), alpha=1.0 if alike else weight)
                share = weights[0] if alike else 1.0
                s.add_(change, alpha=share)
                _add_rest(m, change, share, r, temporary)
        return self

    def mix_(self, own: Self, own_weight: float, others: Sequence[tuple[Self, float]]) -> Self:
        for i, mine in enumerate(self.buffers):
            terms = [(own.buffers[i], own_weight), *((other.buffers[i], weight) for other, weight in others)]
            # The term that lies in this very memory is among the first two of an average, which are used at once, and
            # else the first: afterwards its values are gone.
            if not (_is_average(terms) and any(value is mine for value, _ in terms[:2])):
                terms.sort(key=lambda term: term[0] is not mine)
            average = _is_average(terms)
            weights = [weight for _, weight in terms]
            # One pass over everything needs no chunks, which are for passes that follow each other.
            one_pass = average and len(terms) == 2 and mine.dtype not in _HALF
            most = mine.numel() if one_pass else _CHUNK
            for m, *values in _chunks(mine, *(value for value, _ in terms), most=most):
                if m.dtype in _HALF:
                    # mul(out=) would round this product to half precision
                    total = values[0].to(torch.float32, copy=True).mul_(weights[0])
                elif average:  # one pass for each further value, instead of one for each value
                    average_so_far, weight_so_far = values[0], weights[0]
                    for value, weight in zip(values[1:], weights[1:], strict=True):
                        weight_so_far += weight
                        average_so_far = torch.lerp(average_so_far, value, weight / weight_so_far, out=m)
                    continue
                else:
                    total = torch.mul(values[0], weights[0], out=m)
                for value, weight in zip(values[1:], weights[1:], strict=True):
                    total.add_(value, alpha=weight)
                if total is not m:
                    m.copy_(total)
        return self

    def parts(self, part_bytes: int) -> list[Self]:
        """Views of this vector one after the other, each of one buffer and of at most so many bytes; at least one."""
        slices = [
            type(self)([part])
            for buffer in self.buffers
            for part in torch.split(buffer, max(1, part_bytes // buffer.element_size()))
        ]
        return slices or [self]

    def squared_distance(self, other: Self) -> float:
        """Compute ``||self - other||^2`` in float64, without a copy of the model."""
        total = 0.0
        for mine, their in zip(self.buffers, other.buffers, strict=True):
            for m, t in _chunks(mine, their):
                difference = m.double() - t
                total += float(torch.dot(difference, difference))
        return total

    def fingerprint(self) -> list[int]:
        """Numbers that change, but for rare cases, when a value does. One pass that reads, as fast as memory is."""
        return [_bit_sum(buffer) for buffer in self.buffers]

    def state_dict(self) -> list[Tensor]:
        """Copies of the buffers, on the CPU, for a checkpoint."""
        return [buffer.detach().to("cpu", copy=True) for buffer in self.buffers]

    def load_state_dict(self, buffers: Sequence[Tensor]) -> None:
        """Take the values that `state_dict` gave."""
        self.copy_(type(self)(buffers))

    def __repr__(self) -> str:
        return f"Vector({', '.join(f'{buffer.numel()} x {buffer.dtype}' for buffer in self.buffers)})"


class LentVector(Vector):
    """A vector that may be overwritten, with values that may not: they are copied when they are first asked for.

    Args:
        buffers: memory of its own.
        values: that are lent, of the same form; without them it is a vector as any other.
    """

    __slots__ = ("_own", "_values")

    def __init__(self, buffers: Iterable[Tensor], values: Vector | None = None) -> None:
        super().__init__(buffers)
        self._values = values

    @property
    def buffers(self) -> tuple[Tensor, ...]:
        for values, own in self.sources():
            if values is not own:
                own.copy_(values)
        return self._own

    @buffers.setter
    def buffers(self, buffers: tuple[Tensor, ...]) -> None:
        self._own, self._values = buffers, None

    def sources(self) -> list[tuple[Tensor, Tensor]]:
        """Return what any vector does; it counts as overwritten now."""
        values, self._values = self._values, None
        return list(zip(self._own if values is None else values.buffers, self._own, strict=True))


@dataclass(frozen=True, slots=True)
class SizeOnlyVector(AbstractVector):
    """A vector of which only the size is known; every operation is free, and does nothing but to its numbers.

    Args:
        size_bytes: of all elements but the numbers.
        element_bytes: of one.
        known: the numbers that were put beside it (see `new_numbers`), which have values here too.
    """

    size_bytes: int
    element_bytes: int = 4
    known: Vector = field(default_factory=lambda: Vector(()), compare=False)

    @property
    def num_bytes(self) -> int:
        return self.size_bytes + self.known.num_bytes

    @property
    def form(self) -> tuple[tuple[int, object], ...]:
        own = ((self.size_bytes // self.element_bytes, self.element_bytes),) if self.size_bytes else ()
        return (*own, *self.known.form)

    def clone(self) -> Self:
        return dataclasses.replace(self, known=self.known.clone())  # another one: who asks for a copy may change it

    def zeros_like(self) -> Self:
        return dataclasses.replace(self, known=self.known.zeros_like())

    def beside(self, *others: Self) -> Self:
        size = self.size_bytes + sum(other.size_bytes for other in others)
        return dataclasses.replace(self, size_bytes=size, known=self.known.beside(*(other.known for other in others)))

    def new_numbers(self, *values: float) -> Self:
        return type(self)(0, self.element_bytes, self.known.new_numbers(*values))

    def numbers(self) -> list[float]:
        return self.known.numbers()

    def apart(self, *like: Self) -> tuple[Self, ...]:
        known = self.known.apart(*(each.known for each in like))
        return tuple(dataclasses.replace(each, known=own) for each, own in zip(like, known, strict=True))

    @property
    def borders(self) -> None:
        return None

    @property
    def parameter_borders(self) -> None:
        return None

    def slices(self, count: int, borders: Sequence[int] | None = None) -> list[Self]:
        cuts = _cuts(self.size_bytes // self.element_bytes, count, borders)
        sizes = [(end - begin) * self.element_bytes for begin, end in itertools.pairwise(cuts)]
        return [dataclasses.replace(self, size_bytes=size, known=Vector(())) for size in sizes]

    def overlaps(self, other: AbstractVector) -> bool:
        return self is other

    def revision(self) -> object:
        return None

    def copy_(self, other: Self) -> Self:
        self.known.copy_(other.known)
        return self

    def add_(self, other: Self, alpha: float = 1.0) -> Self:
        self.known.add_(other.known, alpha)
        return self

    def mul_(self, factor: float) -> Self:
        self.known.mul_(factor)
        return self

    def add_difference_(self, plus: Self, minus: Self, alpha: float) -> Self:
        self.known.add_difference_(plus.known, minus.known, alpha)
        return self

    def approach_(self, theirs: Self) -> Self:
        self.known.approach_(theirs.known)
        return self

    def remainder_like(self) -> Self:
        return dataclasses.replace(self, known=self.known.remainder_like())

    def add_rest_(self, other: Self, rest: Self) -> Self:
        self.known.add_rest_(other.known, rest.known)
        return self

    def pull_(self, others: Sequence[tuple[Self, float]], total: Self, rest: Self) -> Self:
        self.known.pull_([(other.known, weight) for other, weight in others], total.known, rest.known)
        return self

    def mix_(self, own: Self, own_weight: float, others: Sequence[tuple[Self, float]]) -> Self:
        self.known.mix_(own.known, own_weight, [(other.known, weight) for other, weight in others])
        return self


@dataclass(frozen=True, slots=True)
class _Slot:
    """Where one parameter lies: which buffer, from which element on, in which shape and memory format.

    The elements of a complex one are pairs of real ones.
    """

    buffer: int
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    is_complex: bool

    def view(self, buffer: Tensor) -> Tensor:
        """Return the parameter as a view of its buffer."""
        if not self.is_complex:
            return buffer.as_strided(self.shape, self.stride, buffer.storage_offset() + self.offset)
        pairs = buffer[self.offset : self.offset + 2 * math.prod(self.shape)].view(-1, 2)
        return torch.view_as_complex(pairs).as_strided(self.shape, self.stride)


class Layout:
    """Where each parameter lies in a `Vector`.

    One buffer per dtype, in order of first appearance; parameters in the order given. A dense parameter keeps its
    memory format (channels-last weights stay channels-last). A complex one lies there as its real and imaginary parts
    in turn, so that whatever works with a vector works with real numbers.

    Args:
        parameters: the tensors to lay out.
        layers: of each its layer's number, to know where layers begin; those of one layer follow each other.
    """

    def __init__(self, parameters: Sequence[Tensor], layers: Sequence[int] | None = None) -> None:
        self.dtypes: list[torch.dtype] = []
        self.sizes: list[int] = []
        self._slots: list[_Slot] = []
        for parameter in parameters:
            dtype = parameter.dtype.to_real()
            if dtype not in self.dtypes:
                self.dtypes.append(dtype)
                self.sizes.append(0)
            buffer = self.dtypes.index(dtype)
            dense = parameter.detach()
            if not (dense.is_contiguous() or _is_dense(dense)):
                dense = dense.contiguous()
            if dense.is_complex():
                self.sizes[buffer] += self.sizes[buffer] % 2  # a pair begins at an even place
            slot = _Slot(buffer, self.sizes[buffer], tuple(dense.shape), tuple(dense.stride()), dense.is_complex())
            self._slots.append(slot)
            self.sizes[buffer] += parameter.numel() * (2 if slot.is_complex else 1)
        self._borders = None if layers is None else self._begins_of(layers)
        self._parameter_borders = self._begins_of_parameters()
        self._shards: dict[tuple[int, int], list[tuple[int, _Slot]]] = {}

    def _begins_of(self, layers: Sequence[int]) -> tuple[int, ...]:
        """Return before which elements of a vector a layer begins, or goes on in another buffer; but the first."""
        before = [sum(self.sizes[:number]) for number in range(len(self.sizes))]
        places = sorted(
            (before[slot.buffer] + slot.offset, slot.buffer, layer)
            for slot, layer in zip(self._slots, layers, strict=True)
        )
        return tuple(place for (_, *last), (place, *layer) in itertools.pairwise(places) if last != layer)

    def _begins_of_parameters(self) -> tuple[int, ...]:
        """Return before which elements of a vector a parameter begins, at which it may be cut; but the first."""
        before = [0, *itertools.accumulate(self.sizes)]
        begins = {before[slot.buffer] + slot.offset for slot in self._slots} | set(before)
        if any(slot.is_complex for slot in self._slots):  # pairs begin at an even place in any piece, too
            begins = {begin for begin in begins if begin % 2 == 0}
        return tuple(sorted(begins - {0, before[-1]}))

    def new_vector(self, device: torch.device) -> Vector:
        """Make a vector of zeros with this layout."""
        vector = Vector(
            torch.zeros(size, dtype=dtype, device=device) for size, dtype in zip(self.sizes, self.dtypes, strict=True)
        )
        vector.borders, vector.parameter_borders = self._borders, self._parameter_borders
        return vector

    def views(self, vector: Vector) -> list[Tensor]:
        """Return the parameters as views of ``vector``, in order."""
        return [slot.view(vector.buffers[slot.buffer]) for slot in self._slots]

    def views_of_shard(self, vector: Vector, shard: tuple[int, int]) -> dict[int, Tensor]:
        """Return those parameters that lie in one shard of the model as views of ``vector``, which has only these.

        Args:
            vector: of the form of that shard.
            shard: its number, and of how many.

        Returns:
            The views, by the parameter's position.
        """
        return {position: slot.view(vector.buffers[slot.buffer]) for position, slot in self._slots_of(shard)}

    def positions_in(self, shard: tuple[int, int]) -> list[int]:
        """Return which parameters lie in one shard of the model; shards as for `views_of_shard`."""
        return [position for position, _ in self._slots_of(shard)]

    def _slots_of(self, shard: tuple[int, int]) -> list[tuple[int, _Slot]]:
        if shard not in self._shards:
            self._shards[shard] = self._find_slots(*shard)
        return self._shards[shard]

    def _find_slots(self, number: int, count: int) -> list[tuple[int, _Slot]]:
        before = [0, *itertools.accumulate(self.sizes)]
        begin, end = _cuts(before[-1], count, self._parameter_borders)[number : number + 2]
        buffers = [i for i in range(len(self.sizes)) if max(begin, before[i]) < min(end, before[i + 1])]
        found = []
        for position, slot in enumerate(self._slots):
            place = before[slot.buffer] + slot.offset
            if slot.buffer in buffers and begin <= place < end and 0 not in slot.shape:
                first = max(begin - before[slot.buffer], 0)
                moved = dataclasses.replace(slot, buffer=buffers.index(slot.buffer), offset=slot.offset - first)
                found.append((position, moved))
        return found

    def fingerprint(self) -> str:
        """Return a short text that is equal for equal layouts, to compare workers with."""
        return hashlib.sha256(repr((self.dtypes, self._slots)).encode()).hexdigest()[:16]


class FlatParameters:
    """Makes parameters views of one vector, and moves them from one vector to another without copying values.

    Args:
        parameters: trainable parameters of one device, each once (a tied parameter is one parameter).
        layers: of each its layer's number; see `layers_of`.

    Attributes:
        x: the vector that holds their values.
        lent: a vector whose memory others know, which it keeps.
    """

    def __init__(self, parameters: Sequence[torch.nn.Parameter], layers: Sequence[int] | None = None) -> None:
        self.parameters = list(parameters)
        self.layout = Layout(self.parameters, layers)
        device = self.parameters[0].device if self.parameters else torch.device("cpu")
        self.x = self.layout.new_vector(device)
        self._views: dict[int, tuple[Vector, list[tuple[tuple[Tensor, ...], list[Tensor]]]]] = {}
        self._bound: Vector | None = None
        self._bound_to: tuple[Tensor, ...] = ()  # its memory
        self.lent: Vector | None = None
        self._replaced: list[int] = []  # what `bind` has found
        self._addresses: list[int] = []  # of the views, to notice what was put in their place
        self._sparse: set[int] = set()  # positions of the parameters whose gradients are sparse
        self._gathers: Vector | None = None  # where gradients go as they are computed
        self._hooks: list[RemovableHandle] = []
        for view, parameter in zip(self._views_of(self.x), self.parameters, strict=True):
            view.copy_(parameter.detach())
        self.bind(self.x)

    def bind(self, vector: Vector) -> None:
        """Let the parameters be views of ``vector`` from now on. Must not happen under a running backward.

        What was put in the place of a view meanwhile is kept in the vector that was bound; the next `collect` tells.
        """
        if vector is self._bound and vector.buffers is self._bound_to:
            return  # what was put in the place of a view is not lost: `collect` finds it
        self._replaced = self.collect()
        views = self._views_of(vector)
        for parameter, view in zip(self.parameters, views, strict=True):
            parameter.data = view
        self._bound, self._bound_to = vector, vector.buffers
        self._addresses = [view.data_ptr() for view in views]

    def collect(self) -> list[int]:
        """Take over tensors that were put in the place of the views, as ``parameter.data = ...`` does.

        Their values go to the vector that is bound, in new memory, and the parameters are views of it again.

        Returns:
            The positions of these parameters.

        Raises:
            ConfigurationError: if one has another shape or type than its parameter had.
        """
        replaced, self._replaced = self._replaced, []
        if self._bound is None or self._addresses == [parameter.data_ptr() for parameter in self.parameters]:
            return replaced
        vector, values = self._bound, {}
        for position, view in enumerate(self._views_of(vector)):
            parameter = self.parameters[position]
            if parameter.data_ptr() == view.data_ptr():
                continue
            if parameter.shape != view.shape:
                raise ConfigurationError(
                    f"A parameter of shape {tuple(view.shape)} got data of shape {tuple(parameter.shape)} during "
                    "training, but all workers exchange models of one shape. Make a new parameter and a new optimizer "
                    "for it, or change the shape before fit."
                )
            if parameter.dtype != view.dtype:
                raise ConfigurationError(
                    f"A parameter of type {view.dtype} got data of type {parameter.dtype} during training, but all "
                    "workers exchange models of one type. Convert the module before fit, or a copy of it (with "
                    "copy.deepcopy), or let Trainer(precision=...) compute in another type."
                )
            values[position] = parameter.detach()
        if vector is not self.lent:  # who has put them there may keep what was there before, to put it back
            vector.move()
        views = self._views_of(vector)
        for position, value in values.items():
            views[position].data.copy_(value)  # of `data`: it is no change that the algorithm makes
        for parameter, view in zip(self.parameters, views, strict=True):
            parameter.data = view
        self._bound_to = vector.buffers
        self._addresses = [view.data_ptr() for view in views]
        replaced += values
        return replaced

    def versions(self) -> list[int]:
        """Count how often each parameter was changed in place, as autograd counts it (not through ``.data``)."""
        return [parameter._version for parameter in self.parameters]

    def swap(self, vector: Vector, other: Vector) -> None:
        """Let two vectors exchange their values, by exchanging their memory: no value is copied.

        The parameters stay views of whatever they are views of. Must not happen under a running backward.
        """
        vector.buffers, other.buffers = other.buffers, vector.buffers
        if self._bound is not None:
            self.bind(self._bound)

    @property
    def bound(self) -> Vector:
        """The vector of which the parameters are views now."""
        assert self._bound is not None
        return self._bound

    def adopt(self) -> None:
        """Let `x` take the values of the vector that the parameters are views of now, and bind to `x`."""
        self.collect()
        self.x.copy_(self.bound)
        self.bind(self.x)

    def forget_others(self, *keep: Vector) -> None:
        """Let go of vectors that were bound for a while (a consensus), so that their memory is freed."""
        kept = {id(self.x), id(self._bound), *(id(vector) for vector in keep)}
        self._views = {key: views for key, views in self._views.items() if key in kept}

    def release(self) -> None:
        """Give every parameter its own memory again, with the values of `x`."""
        self.collect()
        for parameter, view in zip(self.parameters, self._views_of(self.x), strict=True):
            parameter.data = view.clone(memory_format=torch.preserve_format)
        self._views.clear()
        self._bound, self._bound_to, self._addresses = None, (), []
        self._gathers = None
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    @property
    def sparse(self) -> frozenset[int]:
        """The positions of the parameters whose gradients are sparse, as far as `gather_gradient` has seen them."""
        return frozenset(self._sparse)

    def gather_gradient(self, into: Vector) -> Vector:
        """Move the gradients into ``into``; ``parameter.grad`` becomes a view of it.

        A parameter without a gradient on this worker gets a zero one, so that all workers apply the same update; one
        that is frozen now stays without.
        """
        views = self._views_of(into)
        for position, (view, parameter) in enumerate(zip(views, self.parameters, strict=True)):
            if parameter.grad is not None and parameter.grad.layout is not torch.strided:
                self._sparse.add(position)
                parameter.grad = view.copy_(parameter.grad.to_dense())
        given = [(v, p.grad) for v, p in zip(views, self.parameters, strict=True) if p.grad is not None]
        targets = [view for view, gradient in given if gradient.data_ptr() != view.data_ptr()]
        sources = [gradient for view, gradient in given if gradient.data_ptr() != view.data_ptr()]
        if targets:
            torch._foreach_copy_(targets, sources)
        for view, parameter in zip(views, self.parameters, strict=True):
            if parameter.grad is None:
                view.zero_()
                if not parameter.requires_grad:
                    continue
            parameter.grad = view
        return into

    def gather_early(self, into: Vector | None) -> None:
        """Move each gradient into ``into`` as soon as a backward pass has computed it, until told otherwise.

        Its own memory is free then for the gradient of the next layer, and `gather_gradient` finds it there: there is
        no moment with all gradients twice.

        Args:
            into: whose values are not needed any more; ``None``: gradients stay where autograd has put them.
        """
        self._gathers = into
        if into is not None and not self._hooks:
            self._hooks = [
                parameter.register_post_accumulate_grad_hook(partial(self._gather_one, position))  # type: ignore[no-untyped-call]
                for position, parameter in enumerate(self.parameters)
                if parameter.requires_grad
            ]

    def _gather_one(self, position: int, parameter: Tensor) -> None:
        gradient, into = parameter.grad, self._gathers
        if gradient is None or into is None or gradient.layout is not torch.strided or gradient.requires_grad:
            return
        view = self._views_of(into)[position]
        if gradient.data_ptr() != view.data_ptr() and gradient.dtype == view.dtype:
            parameter.grad = view.copy_(gradient)

    def views_of(self, gradient: Vector, shard: tuple[int, int] | None) -> list[Tensor | None]:
        """Return a gradient as that of each parameter; none of those that are frozen, or in no shard that it is of.

        Args:
            gradient: of the model, or of a shard of it.
            shard: which, and of how many; ``None``: the model.
        """
        if shard is None:
            views: dict[int, Tensor] = dict(enumerate(self.layout.views(gradient)))
        else:
            views = self.layout.views_of_shard(gradient, shard)
        given = (views.get(position) for position in range(len(self.parameters)))
        return [
            view if parameter.requires_grad else None for parameter, view in zip(self.parameters, given, strict=True)
        ]

    def show_gradient(self, gradient: Vector, shard: tuple[int, int] | None = None) -> None:
        """Let ``gradient`` be that of all parameters that are not frozen: views of it, or copies in their precision.

        Args:
            gradient: of the model, or of a shard of it: the other parameters have none then.
            shard: which, and of how many; ``None``: the model.
        """
        for parameter, view in zip(self.parameters, self.views_of(gradient, shard), strict=True):
            parameter.grad = None if view is None else view.to(parameter.dtype)
        self.sparsify_gradients()

    def sparsify_gradients(self) -> None:
        """Make gradients sparse again that `gather_gradient` found so: some optimizers take no others."""
        for position in self._sparse:
            gradient = self.parameters[position].grad
            if gradient is not None and gradient.layout is torch.strided:
                self.parameters[position].grad = gradient.to_sparse(1)  # rows that are zero on all workers are left out

    def _views_of(self, vector: Vector) -> list[Tensor]:
        _, known = self._views.setdefault(id(vector), (vector, []))
        for memory, views in known:
            if memory is vector.buffers:
                return views
        known.append((vector.buffers, self.layout.views(vector)))
        del known[:-2]  # a vector that swaps has two memories in turn
        return known[-1][1]


def layers_of(module: torch.nn.Module, parameters: Sequence[torch.nn.Parameter]) -> list[int]:
    """Tell of each parameter the number of its layer: of the first module that has it for its own."""
    owners: dict[int, int] = {}
    for number, layer in enumerate(module.modules()):
        for parameter in layer.parameters(recurse=False):
            owners.setdefault(id(parameter), number)
    return [owners.get(id(parameter), -1) for parameter in parameters]


def mean_over(vectors: Sequence[Vector]) -> Vector:
    """Take the mean of vectors, in new memory."""
    weight = 1.0 / len(vectors)
    mean = vectors[0].empty_like()
    return mean.mix_(vectors[0], weight, [(vector, weight) for vector in vectors[1:]])


def pack(value: object) -> object:
    """Return ``value`` with every `Vector`, also in lists and dicts, replaced by plain tensors for a checkpoint."""
    if isinstance(value, Vector):
        return {"__vector__": value.state_dict()}
    if isinstance(value, Mapping):
        return {key: pack(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(pack(item) for item in value)  # type: ignore[call-arg, attr-defined]
    return value


def unpack(value: object, device: torch.device) -> object:
    """Return what `pack` was given, with its vectors on ``device``."""
    if isinstance(value, Mapping):
        if "__vector__" in value:
            return Vector(buffer.to(device) for buffer in value["__vector__"])
        return {key: unpack(item, device) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(unpack(item, device) for item in value)  # type: ignore[call-arg, attr-defined]
    return value


def _bit_sum(buffer: Tensor) -> int:
    """Sum the memory's 8-byte words: smaller ones have to be widened, which takes many times longer."""
    raw = buffer.view(torch.uint8)
    whole = raw.numel() // 8 * 8 if raw.storage_offset() % 8 == 0 else 0
    return int(raw[:whole].view(torch.int64).sum()) + int(raw[whole:].sum())


def _is_average(terms: Sequence[tuple[Tensor, float]]) -> bool:
    """Tell whether a weighted sum is an average that can be computed by averaging with one term after the other."""
    weights = [weight for _, weight in terms]
    averages = len(terms) > 1 and min(weights) >= 0 < sum(weights[:2])
    return averages and math.isclose(sum(weights), 1.0, rel_tol=1e-12)


def _room(like: Tensor, count: int) -> Tensor:
    """New memory for some temporaries of a chunk's size, [count, elements], as wide as what is computed of a vector."""
    most = _CHUNK if like.device.type == "cpu" else _DEVICE_CHUNK
    return torch.empty((count, min(like.numel(), most)), dtype=_wide(like.dtype), device=like.device)


def _subtract(plus: Tensor, minus: Tensor, out: Tensor) -> Tensor:
    """Return ``plus - minus``, of which the first may be of half precision."""
    return torch.sub(plus, minus, out=out) if plus.dtype == out.dtype else out.copy_(plus).sub_(minus)


def _add_rest(mine: Tensor, change: Tensor, alpha: float, rest: Tensor, room: Sequence[Tensor]) -> None:
    """Compute ``mine + alpha change + rest``; what rounding leaves out is the new rest. Overwrite two temporaries."""
    added, after = room
    added.copy_(rest).add_(change, alpha=alpha)
    if mine.dtype == after.dtype:
        torch.add(mine, added, out=after)
        rest.copy_(mine.sub_(after).add_(added))
        mine.copy_(after)
    else:
        mine.copy_(added.add_(after.copy_(mine)))
        rest.copy_(added.sub_(after.copy_(mine)))


def _cuts(numel: int, count: int, borders: Sequence[int] | None = None) -> list[int]:
    """Return where nearly equal pieces of so many elements begin, at borders if there are some; and the end."""
    if borders is not None:
        if count > len(borders) + 1:
            raise ConfigurationError(
                f"A model of {len(borders) + 1} layers was to be cut into {count} fragments of whole layers, needs 1 "
                f"to {len(borders) + 1}. Use fewer fragments, or let them end within layers (by_layer=False)."
            )
        cuts, first = [0], 0
        for number in range(1, count):
            free = range(first, len(borders) - (count - 1 - number))  # the cuts that follow need borders, too
            best = min(free, key=lambda place: abs(borders[place] - numel * number / count))
            cuts.append(borders[best])
            first = best + 1
        return [*cuts, numel]
    if count < 1 or 0 < numel < count:  # of the planner's idle model nothing is left to cut
        raise ConfigurationError(
            f"A vector of {numel} elements was to be cut into {count} pieces, needs 1 to {numel}. Use fewer fragments."
        )
    return [numel * number // count for number in range(count + 1)]


def _memory(buffer: Tensor) -> tuple[int, int]:
    """Return where a buffer begins and ends."""
    begin = buffer.data_ptr()
    return begin, begin + buffer.numel() * buffer.element_size()


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in _HALF else dtype


def _chunks(*tensors: Tensor, most: int = _CHUNK) -> Iterable[tuple[Tensor, ...]]:
    size = tensors[0].numel()
    chunk = most if tensors[0].device.type == "cpu" else _DEVICE_CHUNK
    if size <= chunk:
        yield tensors
        return
    for start in range(0, size, chunk):
        yield tuple(tensor[start : start + chunk] for tensor in tensors)


def _is_dense(tensor: Tensor) -> bool:
    """Tell whether a tensor fills its memory without holes or overlaps, in some order of its dimensions."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True

"""What the user's module shows in a simulation: one virtual worker's model, or the consensus of all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from torch.nn.parameter import is_lazy

from lightning_decentral.flat import FlatParameters, Vector
from lightning_decentral.strategies.lightning_private import buffers_of, parameters_of, version_of
from lightning_decentral.tensors import find_masks, fingerprints, has_values
from lightning_decentral.worker import Worker

_SAMPLE = 1 << 16  # elements by which a change of a large tensor is noticed

Place = tuple[dict[str, Any], str]  # a module's dictionary of buffers or parameters, and the name there


class VirtualModels:
    """Puts virtual workers into a module by turns, and takes back what user code has changed there.

    A worker has its parameters, and its *belongings*: buffers, and parameters that no optimizer has (a momentum
    teacher). They may be replaced, grow, come and go. Workers share what none of them has changed, so that a frozen
    backbone is there twice, and not once for each. What user code changes in the consensus, all workers take.

    Args:
        module: the user's model.
        flat: of the parameters that are exchanged; they show the first worker.
        workers: the virtual workers.
        trains: whether a rank is one that trains: the belongings of the others say nothing of the data.

    Attributes:
        flat: as given.
        shown: the rank of the worker that the module shows; ``None``: the consensus.
        replaced: whether user code has given all workers parameters, as it does when it loads some.
    """

    def __init__(
        self, module: Module, flat: FlatParameters, workers: Sequence[Worker], trains: Callable[[int], bool]
    ) -> None:
        self.flat = flat
        self.shown: int | None = 0
        self.replaced = False
        self._module = module
        self._workers = workers
        self._training = [worker.rank for worker in workers if trains(worker.rank)]
        self._owned = {id(parameter) for parameter in flat.parameters}
        self._own: list[dict[str, Tensor | None]] = [{} for _ in workers]
        self._common = {name: _copy(holder[leaf]) for name, (holder, leaf) in self._places()}
        self._working: dict[str, Tensor | None] = {}  # copies of what is common that the module has
        self._marks: dict[str, object] = {}
        self._parameter_marks: list[int] = []
        self._put(0)

    def show(self, rank: int, vector: Vector) -> None:
        """Let the module be a worker, without copying.

        Args:
            rank: which.
            vector: its parameters: ``x``, or where its gradient is taken.
        """
        if rank == self.shown:  # its belongings are there
            self.flat.collect()
            self.flat.bind(vector)
            return
        self.settle()
        self.flat.bind(vector)
        self._put(rank)
        self.shown = rank

    def show_consensus(self, mean: Callable[[], Vector]) -> None:
        """Let the module be the consensus.

        Args:
            mean: computes that of the workers' parameters.
        """
        self.settle()
        with torch.inference_mode(False), torch.no_grad():  # user code may change it after the evaluation
            self.flat.bind(mean())
            self.flat.forget_others(*self._vectors())
            for name, (holder, leaf) in self._places():
                values = [self._own[rank].get(name, self._common.get(name)) for rank in self._training]
                if any(name in own for own in self._own):
                    _place(holder, leaf, self._agreed(name, values))
                else:
                    _place(holder, leaf, self._working_copy(name))
        self.shown = None
        self._parameter_marks = fingerprints(self.flat.parameters)
        self._marks = {name: _mark(holder[leaf], whole=True) for name, (holder, leaf) in self._places()}

    def give_all(self) -> None:
        """Let all workers have what the module shows."""
        self.flat.collect()
        for position in range(len(self.flat.parameters)):
            self._give_parameter(position)
        for name, (holder, leaf) in self._places():
            self._give(name, holder[leaf])

    def take_over(self, before: VirtualModels) -> None:
        """Let every worker keep what it had among other parameters.

        Args:
            before: what showed the same workers before; it has settled, and shows nothing any more.
        """
        old = {id(parameter): index for index, parameter in enumerate(before.flat.parameters)}
        for theirs, mine in zip(before._workers, self._workers, strict=True):
            assert isinstance(theirs.x, Vector)
            values = before.flat.layout.views(theirs.x)
            for vector in {id(v): v for v in (mine.x, mine.snapshot) if isinstance(v, Vector)}.values():
                for parameter, view in zip(self.flat.parameters, self.flat.layout.views(vector), strict=True):
                    if id(parameter) in old:
                        view.copy_(values[old[id(parameter)]])
        names = {name for name, _ in self._places()}
        self._own = [{name: value for name, value in own.items() if name in names} for own in before._own]
        self._common |= {name: value for name, value in before._common.items() if name in names}
        self._working = {}
        self._put(0)

    def belongings(self, rank: int, names: Sequence[str]) -> list[Tensor]:
        """Return what a worker has under some names, in memory of its own: what is put in there it has."""
        if rank == self.shown:
            places = dict(self._places())
            return [holder[leaf] for holder, leaf in map(places.__getitem__, names)]
        own = self._own[rank]
        for name in names:
            if name not in own:
                own[name] = _copy(self._common[name])
        return [value for name in names if (value := own[name]) is not None]

    # -- what user code has changed -----------------------------------------------------------------------------------

    def settle(self) -> None:
        """Take over what user code has put into the module since something was shown. Something must be shown next."""
        self.flat.collect()
        if self.shown is None:
            now = fingerprints(self.flat.parameters)
            for position, (before, after) in enumerate(zip(self._parameter_marks, now, strict=True)):
                if before != after:
                    self.replaced = True
                    self._give_parameter(position)
            for name, (holder, leaf) in self._places():
                if self._marks.get(name, self) != _mark(holder[leaf], whole=True):
                    self._give(name, holder[leaf])
            return
        own = self._own[self.shown]
        for name, (holder, leaf) in self._places():
            if name in own or self._marks.get(name, self) != _mark(holder[leaf]):
                own[name] = None if holder[leaf] is None else holder[leaf].data
                self._working.pop(name, None)

    def _give_parameter(self, position: int) -> None:
        value = self.flat.parameters[position].detach().clone()
        for vector in self._vectors():
            self.flat.layout.views(vector)[position].copy_(value)

    def _give(self, name: str, value: Tensor | None) -> None:
        """Let all workers have a belonging."""
        with torch.inference_mode(False), torch.no_grad():
            self._common[name] = _copy(value)
        self._working.pop(name, None)
        for own in self._own:
            own.pop(name, None)

    # -- belongings ---------------------------------------------------------------------------------------------------

    def _places(self) -> Iterator[tuple[str, Place]]:
        """Tell where the module has belongings now."""
        for path, module in self._module.named_modules():
            prefix = f"{path}." if path else ""
            buffers, parameters = buffers_of(module), parameters_of(module)
            for leaf in list(buffers):
                yield prefix + leaf, (buffers, leaf)
            for leaf, parameter in list(parameters.items()):
                if parameter is not None and id(parameter) not in self._owned and not is_lazy(parameter):
                    yield prefix + leaf, (parameters, leaf)

    def _put(self, rank: int) -> None:
        own = self._own[rank]
        self._marks = {}
        for name, (holder, leaf) in self._places():
            if name not in own and name not in self._common:  # another worker has brought it in
                own[name] = _copy(holder[leaf])
            if name in own:
                _place(holder, leaf, own[name])
            else:
                _place(holder, leaf, self._working_copy(name))
                self._marks[name] = _mark(holder[leaf])

    def _working_copy(self, name: str) -> Tensor | None:
        if name not in self._working:
            with torch.inference_mode(False), torch.no_grad():
                self._working[name] = _copy(self._common[name])
        return self._working[name]

    def _agreed(self, name: str, values: Sequence[Tensor | None]) -> Tensor | None:
        """Tell what real workers would have in the consensus of their values, or worker 0's."""
        first, present = values[0], [value for value in values if value is not None]
        if first is None or len(present) < len(values) or not all(has_values(value) for value in present):
            return _copy(first)
        alike = len({(value.dtype, value.shape) for value in present}) == 1
        if alike and all(find_masks({name: value})[0] for value in present):
            if "mask" in name.lower():
                self._give(name, first)
            return _copy(first)
        if not alike or not (first.is_floating_point() or first.is_complex()):
            return _copy(first)
        wide = torch.promote_types(first.dtype, torch.float32) if first.element_size() > 1 else torch.float32
        total = torch.zeros_like(first, dtype=wide, memory_format=torch.contiguous_format)
        for value in present:
            total += value.to(wide)
        return first.clone().copy_(total / len(values))  # in its memory format

    def _vectors(self) -> list[Vector]:
        found = {id(v): v for worker in self._workers for v in (worker.x, worker.snapshot) if isinstance(v, Vector)}
        return list(found.values())


def _place(holder: dict[str, Any], leaf: str, value: Tensor | None) -> None:
    """Let a module have a value, in the same object as before where that can hold it."""
    there = holder[leaf]
    if value is None or there is None:
        if not isinstance(there, Parameter):
            holder[leaf] = None if value is None else value.data  # an object of its own: it may get another value
        return
    kinds = [(tensor.dtype, tensor.layout, tensor.device) for tensor in (there, value)]
    if isinstance(there, Parameter) or (kinds[0] == kinds[1] and not there.is_inference()):
        there.data = value
    else:
        holder[leaf] = value.data


def _mark(tensor: Tensor | None, whole: bool = False) -> object:
    """Something that is another when the tensor is."""
    if tensor is None or not has_values(tensor):
        return tensor is None or (id(tensor), version_of(tensor))
    sample = tensor.detach()
    if not whole and tensor.numel() > _SAMPLE and tensor.is_contiguous():
        sample = sample.view(-1)[:: tensor.numel() // _SAMPLE]
    version = 0 if tensor.is_inference() else version_of(tensor)
    return (tensor.data_ptr(), version, tensor.dtype, tensor.shape, fingerprints([sample]))


def _copy(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().clone()

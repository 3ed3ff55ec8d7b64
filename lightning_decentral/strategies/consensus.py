"""The mean of all workers' models, in the module's place for an evaluation, a checkpoint, or the end of training.

It is made of what the optimizers have, which the steppers average, and of the *state beside* it: buffers, parameters
that no optimizer has (a momentum teacher), and the averages that callbacks keep. For the latter the workers compare a
fingerprint of each tensor first, and send what differs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.nn import Module

from lightning_decentral.engine.sampling import drawn, sampled
from lightning_decentral.engine.stepper import Stepper
from lightning_decentral.flat import Vector
from lightning_decentral.strategies.lightning_private import parameters_of
from lightning_decentral.tensors import find_directions, find_masks, fingerprints, give, has_values
from lightning_decentral.transport.communicator import Communicator


def model_at(places: Tensor, values: Tensor, keepers: Sequence[int], shards: Sequence[Vector]) -> Tensor:
    """Take the coordinates of the model: ``[sample]``.

    Args:
        places: which.
        values: those of each worker, ``[workers, sample]``.
        keepers: the workers whose mean it is; or who keep one shard each.
        shards: into which a worker's model is cut.
    """
    if len(shards) == 1:
        return values[list(keepers)].mean(0)
    ends = torch.tensor([shard.numel for shard in shards]).cumsum(0)
    owners = torch.tensor(list(keepers))[torch.searchsorted(ends, places, right=True)]
    return values[owners, torch.arange(len(places))]


def estimated_distance(values: Tensor, model: Tensor, numel: int) -> tuple[float, float]:
    """Estimate ``(1/n) sum_i ||x_i - mean||^2``, and the standard error of that, from coordinates that all drew.

    Args:
        values: ``[workers, sample]``.
        model: the mean, at these coordinates.
        numel: the number of coordinates from which they were drawn.
    """
    each = (values - model).square().mean(0)
    error = each.std() / len(each) ** 0.5 if len(each) > 1 else each.new_tensor(float("inf"))
    return numel * float(each.mean()), numel * float(error)


@dataclass(slots=True, eq=False)
class _Shown:
    """A tensor that has another value while the module is the consensus.

    Args:
        tensor: of the module.
        own: what it had before.
        mark: the fingerprint of what it has instead: user code that changes it has the last word.
    """

    tensor: Tensor
    own: Tensor
    mark: int

    @property
    def untouched(self) -> bool:
        """Whether it still has what the consensus has given it."""
        same = self.tensor.shape == self.own.shape and self.tensor.dtype == self.own.dtype
        return same and fingerprints([self.tensor]) == [self.mark]


class Consensus:
    """Lets a module be the mean of all workers' models for a while; this worker's own stays where it is.

    Args:
        module: the user's model.
        steppers: one for each optimizer; the list may change.
        communicator: reaches the other workers.
        owners: objects that may keep modules beside the user's, such as the callbacks of a `Trainer`: they are averaged
            too, since a callback may put them in the place of the user's.
        local_buffers: whether each worker keeps its own buffers in the consensus, too.

    Attributes:
        distance: ``(1/n) sum_i ||x_i - mean||^2`` when the module last became the mean; ``None`` before.
        merged: whether user code had changed frozen parameters on its way there, as one that adds a LoRA's product to
            them. What takes it out again must have this worker's own model.
    """

    def __init__(
        self,
        module: Module,
        steppers: list[Stepper],
        communicator: Communicator,
        owners: Sequence[object] = (),
        local_buffers: bool = False,
    ) -> None:
        self.distance: float | None = None
        self.merged = False
        self._module = module
        self._steppers = steppers
        self._communicator = communicator
        self._owners = owners
        self._local_buffers = local_buffers
        self._shown: list[_Shown] | None = None
        self._marks: list[list[int]] = []  # of the steppers' parameters, as the consensus has them
        self._frozen: list[int] | None = None  # fingerprints
        self._named: set[str] = set()  # what the user has been told of

    @property
    def entered(self) -> bool:
        """Whether the module is the mean now."""
        return self._shown is not None

    def watch(self) -> None:
        """Note what the frozen parameters are, before user code that may merge something into them."""
        self._frozen = self._marks_of_frozen()

    def _marks_of_frozen(self) -> list[int]:
        owned = {id(parameter) for stepper in self._steppers for parameter in stepper.flat.parameters}
        return fingerprints(p for p in self._module.parameters() if id(p) not in owned and has_values(p))

    def enter(self) -> None:
        """Let the module be the mean. All workers together, with no exchange under way."""
        self.merged = False
        if self._frozen is not None:
            changed = self._frozen != self._marks_of_frozen()
            self.merged, self._frozen = self._communicator.agree(changed, "max") > 0, None
        means = [stepper.mean() for stepper in self._steppers]
        self.distance = self._distance(means)
        for stepper, mean in zip(self._steppers, means, strict=True):
            stepper.flat.bind(mean)
        self._marks = [fingerprints(stepper.flat.parameters) for stepper in self._steppers]
        beside = self._beside()
        agreed = self._agree(beside)
        for tensor, value in _taken(agreed, beside, lasting=True):
            give(tensor, value)
        shown = [(tensor, _copy(tensor), value) for tensor, value in _taken(agreed, beside, lasting=False)]
        for tensor, _, value in shown:
            give(tensor, value)
        marks = fingerprints([tensor for tensor, _, _ in shown])
        self._shown = [_Shown(tensor, own, mark) for (tensor, own, _), mark in zip(shown, marks, strict=True)]

    def leave(self) -> None:
        """Let the module be this worker's own model again; what user code has changed meanwhile stays changed."""
        assert self._shown is not None
        for stepper, marks in zip(self._steppers, self._marks, strict=True):
            flat = stepper.flat
            now = fingerprints(flat.parameters)
            changed = [
                (parameter, _copy(parameter))
                for parameter, before, after in zip(flat.parameters, marks, now, strict=True)
                if before != after
            ]
            stepper.bind_live()
            flat.forget_others(stepper.snapshot)
            with stepper.monitor:
                for parameter, value in changed:
                    parameter.data.copy_(value)
        for each in self._shown:
            if each.untouched:
                give(each.tensor, each.own)
        self._shown = None

    def stay(self) -> None:
        """Let the mean, which the module is now, be this worker's own model from here on."""
        self._shown = None
        for stepper in self._steppers:
            stepper.flat.adopt()

    @contextmanager
    def live(self) -> Iterator[None]:
        """Give the module this worker's own model, even in the middle of a step or of an evaluation."""
        bound = [stepper.flat.bound for stepper in self._steppers]
        for stepper in self._steppers:
            stepper.flat.bind(stepper.x)
        hidden = [(each.tensor, _copy(each.tensor), each.own) for each in self._shown or [] if each.untouched]
        for tensor, _, own in hidden:
            give(tensor, own)
        try:
            yield
        finally:
            for stepper, vector in zip(self._steppers, bound, strict=True):
                stepper.flat.bind(vector)
            for tensor, value, _ in hidden:
                give(tensor, value)

    def measure(self) -> float:
        """Return ``(1/n) sum_i ||x_i - mean||^2`` now. All workers together."""
        return self._distance([stepper.mean() for stepper in self._steppers])

    def estimate(self, sample: int, seed: int) -> tuple[float, float]:
        """Estimate what `measure` returns from some coordinates, and its standard error. All workers together.

        Args:
            sample: how many coordinates, drawn with replacement.
            seed: of the draw; the same on all workers.
        """
        if not self._steppers:
            return 0.0, 0.0
        with ExitStack() as held:
            for stepper in self._steppers:
                stepper.settle()
                held.enter_context(stepper.monitor)
            vectors = [stepper.x for stepper in self._steppers]
            numel = sum(vector.numel for vector in vectors)
            places = drawn(numel, sample, seed)
            own = sampled(vectors, places)
        rows = [
            torch.frombuffer(bytearray(row), dtype=own.dtype)
            for row in self._communicator.gather(own.numpy().tobytes())
        ]
        algorithm, values, x = self._steppers[0].algorithm, torch.stack(rows), vectors[0]
        shards = [x] if algorithm.shards == 1 else x.slices(algorithm.shards, x.parameter_borders)
        return estimated_distance(values, model_at(places, values, algorithm.keepers(len(rows)), shards), numel)

    def mean(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Return a ``state_dict`` with its tensors averaged, as the consensus has them. All workers together.

        Args:
            state: of this worker; not changed.
        """
        tensors = {name: value for name, value in state.items() if isinstance(value, Tensor) and has_values(value)}
        agreed = self._agree(tensors)
        return {name: agreed[name].value if name in agreed else value for name, value in state.items()}

    def share_masks(self) -> None:
        """Let all workers prune the weights that worker 0 prunes. All workers together.

        A mask is computed from the weights, of which every worker has others.
        """
        pairs = {
            name: tensor
            for name, tensor in self._beside(callbacks=False).items()
            if _is_pruning_mask(name, self._module)
        }
        if pairs:
            for tensor, value in _taken(self._agree(pairs), pairs, lasting=True):
                give(tensor, value)

    def close(self) -> None:
        """Let go of the steppers; `distance` stays."""
        self._shown = None
        self._steppers = []

    def _distance(self, means: list[Vector]) -> float:
        local = sum(s.x.squared_distance(mean) for s, mean in zip(self._steppers, means, strict=True))
        return self._communicator.agree(local)

    # -- the state beside what the optimizers have --------------------------------------------------------------------

    def _beside(self, callbacks: bool = True) -> dict[str, Tensor]:
        """Buffers, and parameters that no stepper has, each once, by name."""
        seen = {id(parameter) for stepper in self._steppers for parameter in stepper.flat.parameters}
        found: dict[str, Tensor] = {}
        for prefix, module in self._modules(callbacks):
            for name, tensor in chain(module.named_parameters(prefix), module.named_buffers(prefix)):
                if id(tensor) not in seen and has_values(tensor):
                    seen.add(id(tensor))
                    found[name] = tensor
        return found

    def _modules(self, callbacks: bool = True) -> list[tuple[str, Module]]:
        return [("", self._module), *(self._kept_by_callbacks() if callbacks else ())]

    def _names_of_buffers(self) -> set[str]:
        return {name for prefix, module in self._modules() for name, _ in module.named_buffers(prefix)}

    def _kept_by_callbacks(self) -> Iterator[tuple[str, Module]]:
        for index, owner in enumerate(self._owners):
            for attribute, value in vars(owner).items():
                if isinstance(value, Module) and value is not self._module:
                    yield f"{_KEPT}{index} {type(owner).__name__}.{attribute}", value

    def _agree(self, tensors: Mapping[str, Tensor]) -> dict[str, _Agreed]:
        """Tell what all workers take in the place of tensors that differ between them, where they can take the same.

        One small message tells what each worker has. Integers are each worker's own, as are tensors of other shapes
        than elsewhere, and those that some workers do not have.
        """
        if self._communicator.world_size == 1:
            return {}
        marks = fingerprints(tensors.values())
        masks, directions = find_masks(tensors), find_directions(tensors.values())
        table = {
            name: [str(tensor.dtype), list(tensor.shape), mask or direction, mark]
            for (name, tensor), mask, direction, mark in zip(tensors.items(), masks, directions, marks, strict=True)
        }
        tables = [json.loads(each) for each in self._communicator.gather(json.dumps(table).encode())]
        self._name_what_differs(tables)
        kept = self._names_of_buffers() if self._local_buffers else set()
        mine: list[str] = []
        zeros: list[str] = []  # of which worker 0's is taken
        for name, tensor in sorted(tensors.items()):  # in one order on all workers
            entries = [each.get(name) for each in tables]
            if any(entry is None or entry[:2] != entries[0][:2] for entry in entries):
                continue
            if all(entry[3] == entries[0][3] for entry in entries):
                continue
            if all(entry[2] for entry in entries):
                zeros.append(name)
            elif (tensor.is_floating_point() or tensor.is_complex()) and name not in kept:
                mine.append(name)
        means = {name: _copy(tensors[name]).contiguous() for name in mine}
        self._average(list(means.values()))
        firsts = {name: _copy(tensors[name]).contiguous() for name in zeros}
        self._communicator.take_from(0, list(firsts.values()))
        agreed = {name: _Agreed(value, lasting=False) for name, value in means.items()}
        return agreed | {name: _Agreed(value, "mask" in name.lower()) for name, value in firsts.items()}

    def _average(self, values: Sequence[Tensor]) -> None:
        """Replace tensors by their means over the workers that train: who only serves has seen no batch."""
        size, algorithms = self._communicator.world_size, [stepper.algorithm for stepper in self._steppers[:1]]
        trainers = sum(all(each.trains(rank) for each in algorithms) for rank in range(size))
        if not all(each.trains(self._communicator.rank) for each in algorithms):
            for value in values:
                value.zero_()
        self._communicator.average_floating(values)
        if trainers < size:
            for value in values:
                value.mul_(size / trainers)

    def _name_what_differs(self, tables: Sequence[Mapping[str, Any]]) -> None:
        names = sorted({name for table in tables for name in table if not name.startswith(_KEPT)} - self._named)
        missing = [name for name in names if not all(name in table for table in tables)]
        other = [name for name in names if name not in missing and len({str(t[name][:2]) for t in tables}) > 1]
        if missing or other:
            self._named.update(missing, other)
            lists = [(missing, "that only some workers have"), (other, "of another shape or type on some workers")]
            what = ", ".join(f"{', '.join(each)} ({reason})" for each, reason in lists if each)
            rank_zero_warn(
                f"The model has tensors that cannot be averaged: {what}. Every worker keeps its own, and a checkpoint "
                "has worker 0's. If they matter, let all workers register them alike."
            )


_KEPT = "callback "  # begins the names of what callbacks keep


@dataclass(frozen=True, slots=True, eq=False)
class _Agreed:
    """What all workers take.

    Args:
        value: of this worker's memory.
        lasting: whether it replaces the worker's own, as a mask does.
    """

    value: Tensor
    lasting: bool


def _taken(
    agreed: Mapping[str, _Agreed], tensors: Mapping[str, Tensor], lasting: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    for name, each in agreed.items():
        if each.lasting == lasting:
            yield tensors[name], each.value


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().clone()


def _is_pruning_mask(name: str, module: Module) -> bool:
    """Tell whether `torch.nn.utils.prune` has put a buffer there: beside the weight that it masks."""
    path, _, leaf = name.rpartition(".")
    masked = leaf.removesuffix("_mask")
    return leaf != masked and f"{masked}_orig" in parameters_of(module.get_submodule(path))

"""What becomes of the workers' own buffers; and their averages in training, as one vector with steps of its own.

A buffer is changed by forward passes (BatchNorm's running statistics), and by no optimizer. All of a worker lie in one
vector, which a `Stepper` averages as it would parameters that user code changes in the middle of a step. In gossip that
is ``b_i <- sum_j W[i, j] b_j + what the forward pass has changed``, and hidden behind the gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal, get_args

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.nn import Module, Parameter

from lightning_decentral.engine.stepper import Stepper
from lightning_decentral.errors import ConfigurationError
from lightning_decentral.flat import FlatParameters, Vector
from lightning_decentral.protocol import AbstractAlgorithm
from lightning_decentral.strategies.alike import require_equal
from lightning_decentral.strategies.lightning_private import buffers_of, unsaved_buffers_of
from lightning_decentral.tensors import find_masks, has_values
from lightning_decentral.transport.communicator import Communicator

Buffers = Literal["local", "evaluation", "gossip"]
"""What becomes of the workers' own buffers: nothing; averaged to evaluate and save; averaged in training, too."""

INDEX_OF_BUFFERS = 1 << 10
"""The number that the vector of buffers has beside the optimizers'."""

_TYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_LOOKED_FIRST, _LOOKED_EVERY = 8, 64  # steps in which it is seen whether user code has put others in their place


def check_buffers(strategy: str, algorithm: AbstractAlgorithm, buffers: str) -> None:
    """Refuse a wrong policy, or one that does not fit the algorithm.

    Raises:
        ConfigurationError: for it.
    """
    if buffers not in get_args(Buffers):
        raise ConfigurationError(
            f"{strategy}(buffers={buffers!r}): needs one of {', '.join(map(repr, get_args(Buffers)))}. Use "
            "'evaluation', the default, which averages them when the model is evaluated or saved."
        )
    if buffers == "gossip" and algorithm.for_buffers() is None:
        raise ConfigurationError(
            f"{strategy} got buffers='gossip' with {type(algorithm).__name__}, which has no average of models that "
            "buffers could take part in; it needs a method that averages models with doubly stochastic weights, in "
            "rounds, or in pairs, as DPSGD, LocalSGD and ADPSGD do. Use 'evaluation', which averages them when the "
            "model is evaluated or saved."
        )


def tell_of_statistics(algorithm: AbstractAlgorithm, buffers: str, module: Module, size: int) -> None:
    """Say, before training, what becomes of BatchNorm's statistics where the model is one and its buffers are not.

    Args:
        algorithm: resolved.
        buffers: the policy.
        module: the user's.
        size: how many workers there are.

    Raises:
        ConfigurationError: if a worker would evaluate, and save, with the buffers of a model that has seen no batch.
    """
    keepers, trainers = algorithm.keepers(size), [rank for rank in range(size) if algorithm.trains(rank)]
    names = [name.removesuffix(".running_mean") for name, _, leaf, _ in averaged(module) if leaf == "running_mean"]
    if not names or len(keepers) == size:
        return
    layers = f"{names[0]!r}" if len(names) == 1 else f"{len(names)} layers, such as {names[0]!r}"
    if buffers == "local" and len(trainers) < size:
        raise ConfigurationError(
            f"{type(algorithm).__name__} got buffers='local' with BatchNorm statistics ({layers}), of which those of a "
            "server that does not train stay what they are at the beginning, and it evaluates and saves with them; it "
            "needs a mean. Use buffers='evaluation', the default, or a server that trains beside."
        )
    if buffers == "local":
        what = "each worker evaluates with its own, and a checkpoint has worker 0's (buffers='local')"
    else:
        what = f"the mean over the {len(trainers)} workers that train is evaluated and saved (buffers='evaluation')"
    rank_zero_info(
        f"{type(algorithm).__name__} has one model, but the BatchNorm statistics ({layers}) are each worker's own, of "
        f"its batches: {what}. GroupNorm has none."
    )


def gossip_of_buffers(
    module: Module, algorithm: AbstractAlgorithm, communicator: Communicator, seed: int
) -> BufferGossip:
    """Let the buffers of a module take part in the averages of an algorithm. All workers together.

    Args:
        module: the user's.
        algorithm: one that `check_buffers` admits.
        communicator: to the other workers.
        seed: of the algorithm.
    """
    averages = algorithm.for_buffers()
    assert averages is not None
    resolved = averages.resolved(communicator.world_size)
    found = BufferGossip(
        module, lambda tensors: Stepper(resolved, tensors, communicator, INDEX_OF_BUFFERS, seed, guarded=True)
    )
    layout = [] if found.stepper is None else [found.stepper.flat.layout.fingerprint()]
    require_equal([*found.names, *layout], "buffers to average")
    return found


class BufferGossip:
    """The floating-point buffers of a module, averaged in each step.

    Integers and booleans, masks, and buffers that are not finite at the beginning stay each worker's own. So do those
    that are not part of the ``state_dict``.

    Args:
        module: the user's. Its buffers become views of one vector.
        make_stepper: makes what averages a list of tensors. All workers together.

    Attributes:
        stepper: that has been made; none if there are no such buffers.
    """

    def __init__(self, module: Module, make_stepper: Callable[[list[Parameter]], Stepper]) -> None:
        self._places = [(holder, leaf, tensor) for _, holder, leaf, tensor in averaged(module)]
        self._watches = False  # in each step
        self.stepper: Stepper | None = None
        if not self._places:
            return
        self._flat = FlatParameters([tensor for _, _, tensor in self._places])  # type: ignore[misc]
        # The stepper moves its parameters from one memory to another. One tensor for all of a type stands for them.
        self._standing = [Parameter(values.clone(), requires_grad=False) for values in self._flat.x.buffers]
        self.stepper = make_stepper(self._standing)
        self._least = [torch.full_like(values, -torch.inf) for values in self._flat.x.buffers]
        for (_, leaf, _), view in zip(self._places, self._flat.layout.views(Vector(self._least)), strict=True):
            if leaf == "running_var":
                view.zero_()

    @property
    def names(self) -> list[str]:
        """What they are called, without the modules that have them."""
        return [leaf for _, leaf, _ in self._places]

    def begin(self, step: int) -> None:
        """Begin a step, unless one has begun: the exchange starts.

        Args:
            step: its number.
        """
        stepper = self.stepper
        if stepper is None or stepper.active:
            return
        if self._watches or step < _LOOKED_FIRST or step % _LOOKED_EVERY == 0:
            self._take_back()
        stepper.worker.step = step
        self._give()
        stepper.begin()
        self._take()

    def finish(self) -> None:
        """End the step that has begun, if any: the forward passes are made."""
        stepper = self.stepper
        if stepper is None or not stepper.active:
            return
        if self._watches or stepper.worker.step < _LOOKED_FIRST or stepper.worker.step % _LOOKED_EVERY == 0:
            self._take_back()
        self._give()
        if stepper.awaits_gradient:
            stepper.after_gradient()
        stepper.finish(False)
        self._take()

    def settle(self) -> None:
        """Let the averages have what user code has changed, and the module what others have, between two steps."""
        if self.stepper is not None and not self.stepper.active:
            self._take_back()
            self._give()
            self.stepper.settle()
            self._take()

    def begin_anew(self) -> None:
        """Begin at the values that the module has now."""
        if self.stepper is not None:
            self._take_back()
            self.stepper.abandon()
            self._give()
            self.stepper.begin_anew()

    def release(self) -> None:
        """Give every buffer its own memory again."""
        if self.stepper is not None:
            self._flat.release()
            self.stepper.flat.release()
            self.stepper = None

    def _give(self) -> None:
        """Let the stepper have what the module has."""
        for standing, values in zip(self._standing, self._flat.x.buffers, strict=True):
            standing.data.copy_(values)

    def _take(self) -> None:
        """Let the module have what the stepper has.

        No variance gets below zero, as it could where a worker's own weight is smaller than BatchNorm's momentum.
        """
        for standing, values, least in zip(self._standing, self._flat.x.buffers, self._least, strict=True):
            torch.maximum(standing.data, least, out=values)

    def _take_back(self) -> None:
        """Take over buffers that user code has put in the place of these, as ``self.centre = ...`` does."""
        for position, (holder, leaf, tensor) in enumerate(self._places):
            other = holder.get(leaf)
            if other is tensor:
                continue
            self._watches = True
            if other is None or other.shape != tensor.shape:
                what = "is gone" if other is None else f"has shape {tuple(other.shape)}, and had {tuple(tensor.shape)}"
                raise ConfigurationError(
                    f"Buffer {leaf!r} {what}, during training with buffers='gossip', which needs all workers to have "
                    "the same ones all the time. Keep its shape, or use buffers='evaluation'."
                )
            tensor.data.copy_(other.detach())
            holder[leaf] = self._places[position][2]
        self._watches |= bool(self._flat.collect())


def averaged(module: Module) -> Iterator[tuple[str, dict[str, Tensor | None], str, Tensor]]:
    """Tell which buffers are averaged: the name of each, where its module keeps it, by what name, and itself."""
    seen: set[int] = set()
    for path, owner in module.named_modules():
        unsaved = unsaved_buffers_of(owner)
        for leaf, tensor in buffers_of(owner).items():
            if tensor is None or leaf in unsaved or id(tensor) in seen or tensor.dtype not in _TYPES:
                continue
            seen.add(id(tensor))
            name = f"{path}.{leaf}" if path else leaf
            if has_values(tensor) and bool(tensor.isfinite().all()) and not find_masks({name: tensor})[0]:
                yield name, buffers_of(owner), leaf, tensor

"""Pipelines beside each other: the workers of one stage are replicas, and train it by a method of the package."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from lightning_decentral.engine.memory import OptimizerMemory
from lightning_decentral.engine.stepper import Stepper
from lightning_decentral.errors import ConfigurationError
from lightning_decentral.flat import Vector
from lightning_decentral.protocol import AbstractAlgorithm, AbstractAsynchronousAlgorithm
from lightning_decentral.transport.communicator import Communicator
from lightning_decentral.transport.subgroup import Subgroup


def check_data_parallel(algorithm: object, drains: bool) -> None:
    """Refuse what cannot train the replicas of a stage.

    Args:
        algorithm: the user's.
        drains: whether a checkpoint has nothing in flight.

    Raises:
        ConfigurationError: of what is no method, whose workers do not wait for each other, of a server, or of one that
            trains clients; and where a checkpoint would have to have each replica.
    """
    if not isinstance(algorithm, AbstractAlgorithm):
        raise ConfigurationError(
            f"PipelineStrategy(data_parallel={algorithm!r}): needs a method, such as DPSGD(Ring), LocalSGD(every=8) or "
            "DiLoCo(); None takes the mean of the gradients."
        )
    if isinstance(algorithm, AbstractAsynchronousAlgorithm):
        raise ConfigurationError(
            f"PipelineStrategy(data_parallel={algorithm!r}) got a method whose workers call each other, and needs one "
            "in which they exchange at the same updates. Use D-PSGD or another gossip method, or local updates, as "
            "LocalSGD and DiLoCo."
        )
    if getattr(algorithm, "clients", None) is not None or algorithm.shards > 1:
        raise ConfigurationError(
            f"PipelineStrategy(data_parallel={algorithm!r}) got a method that gives workers other data or parts of the "
            "model, and needs one whose workers have the same. Use FedAvg and its like without clients=."
        )
    if not drains:
        raise ConfigurationError(
            f"PipelineStrategy got data_parallel={algorithm!r} with drains=False, and needs one of them: a checkpoint "
            "has the mean of the replicas, with which nothing that is in flight could go on. Leave drains out."
        )


class Replica:
    """One worker's copy of a stage, which others have, too.

    Args:
        algorithm: resolved for as many workers as have it.
        communicator: of the run.
        ranks: of these workers.
        parameters: of the stage, that are trained.
        layers: of each parameter its layer's number; see `flat.layers_of`.
        optimizer: that trains them.
        index: of the stage.
        seed: that all workers share.
    """

    def __init__(
        self,
        algorithm: AbstractAlgorithm,
        communicator: Communicator,
        ranks: Sequence[int],
        parameters: Sequence[Parameter],
        layers: Sequence[int],
        optimizer: Optimizer,
        index: int,
        seed: int,
    ) -> None:
        self._group = Subgroup(communicator, ranks)
        self._stepper = Stepper(algorithm, parameters, self._group.as_communicator, index, seed, layers=layers)
        self._stepper.worker.memory = OptimizerMemory(lambda: optimizer.state, parameters)
        if self._stepper.snapshot is not self._stepper.x:
            raise ConfigurationError(
                f"PipelineStrategy(data_parallel={algorithm!r}) got a method that takes gradients at a vector of its "
                "own, and needs one that takes them at the weights, of which a pipeline has those of several updates. "
                "Use another method."
            )
        self._own: Vector | None = None  # while the mean is shown
        self._shown: Vector | None = None

    def begin(self) -> None:
        """Begin a step of the method: what it exchanges goes on beside the passes that lead to the next update."""
        self.show_own()
        self._stepper.begin()

    def update(self, gradients: Mapping[Parameter, Tensor], apply: Callable[[], Any]) -> None:
        """Make the step of the method that has begun, or a whole one, with an update that is due.

        Args:
            gradients: by parameter, which have them already.
            apply: lets the optimizer make the update.
        """
        self.show_own()
        stepper = self._stepper
        known = set(map(id, stepper.flat.parameters))
        if strangers := [parameter for parameter in gradients if id(parameter) not in known]:
            raise ConfigurationError(
                f"PipelineStrategy got {len(strangers)} parameters that are trained now and were not when training "
                f"began, and {type(stepper.algorithm).__name__} exchanges the same ones all the time. Let them be "
                "trainable from the beginning, with a learning rate of 0, or leave data_parallel out."
            )
        if not stepper.active:
            stepper.begin(gradient_is_there=True)
        if stepper.awaits_gradient:
            stepper.after_gradient()
        with stepper.updating() as wanted:
            if wanted:
                apply()
        stepper.updated |= wanted
        stepper.finish(stepper.updated)

    def show_mean(self) -> None:
        """Let the stage have the mean of its replicas, until `show_own`. All of them together, between two updates."""
        if self._own is not None:
            return
        stepper = self._stepper
        stepper.settle()
        stepper.rest()
        self._own = stepper.x.clone()
        self._group.mean(stepper.x)

    def note_shown(self) -> None:
        """Note what is shown, so that it counts if somebody changes it."""
        if self._own is not None and self._shown is None:
            self._shown = self._stepper.x.clone()

    def show_own(self) -> None:
        """Let the stage have this worker's own weights again, with what was changed of the mean."""
        own, shown, x = self._own, self._shown, self._stepper.x
        self._own = self._shown = None
        if own is not None:
            self._stepper.flat.collect()
            x.copy_(own if shown is None else own.add_difference_(x, shown, 1.0))

    def begin_anew(self) -> None:
        """Begin at the weights as they are now."""
        self._own = self._shown = None
        self._stepper.flat.collect()
        self._stepper.abandon()
        self._stepper.begin_anew()

    def release(self) -> None:
        """Give the parameters memory of their own again."""
        self._stepper.flat.release()

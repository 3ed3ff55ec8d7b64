"""The strategy for synchronous algorithms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor
from torch.optim import Optimizer

from lightning_decentral.engine.rest import come_to_rest
from lightning_decentral.engine.stepper import Stepper
from lightning_decentral.errors import ConfigurationError
from lightning_decentral.strategies.base import AbstractDecentralizedStrategy
from lightning_decentral.strategies.gradient_scalers import refuse_gradient_scaler
from lightning_decentral.strategies.poisoned import inspect_messages
from lightning_decentral.strategies.uneven import Ends
from lightning_decentral.transport.collectives import broadcast_from_zero
from lightning_decentral.transport.communicator import Communicator


class GossipStrategy(AbstractDecentralizedStrategy, asynchronous=False):
    """Trains with a synchronous decentralized algorithm: a worker waits for those it exchanges with, for nobody else.

    It is what `Strategy` becomes with a synchronous algorithm, and has its options but for ``share_epoch``. All workers
    go through the same number of batches (``uneven``).

    Raises:
        ConfigurationError: if the algorithm is asynchronous; otherwise as `Strategy`.

    Example:
        >>> from lightning_decentral.algorithms import D2
        >>> from lightning_decentral.topology import Ring
        >>> strategy = GossipStrategy(D2(topology=Ring(8, lazy=True)))
    """

    begins_before_batch = True

    @property
    def loads_first(self) -> bool:
        return self._ends is not None and self._ends.abreast

    def _clear(self) -> None:
        super()._clear()
        self._ends: Ends | None = None
        self._made_together: list[Callable[[], Any]] = []  # by user code, in the last batch
        self._made_already = 0  # of these, by this worker in a batch that it has not finished
        self._recorded = 0  # which batch that is

    def check_trainer(self, trainer: Trainer) -> None:
        refuse_gradient_scaler(self.algorithm, self.precision_plugin)

    def connect_workers(self, communicator: Communicator, steppers: list[Stepper]) -> None:
        if self.world_size > 1:
            assert self.lightning_module is not None
            trainer = self.lightning_module.trainer
            self._ends = Ends(trainer, communicator, self, self.uneven, self.exchange_timeout_seconds)
            inspect_messages(self.poisoned, self.lightning_module, communicator, steppers)

    def teardown(self) -> None:
        if self._ends is not None:
            self._ends.close()
            self._ends = None
        super().teardown()

    # -- steps without a batch ----------------------------------------------------------------------------------------

    @property
    def between_steps(self) -> bool:
        """Whether no step has begun that is not finished."""
        return not any(stepper.active for stepper in self._steppers)

    @property
    def knows_collectives(self) -> bool:
        """Whether it has made a batch, and so knows what user code makes together with all workers in each."""
        return self._recorded > 0

    def begin_empty_batch(self) -> None:
        """Begin a step for a batch that others have, unless one has begun."""
        self._begin_step()

    def finish_step(self, with_gradient: bool) -> int:
        """Finish the step that has begun, if any.

        Args:
            with_gradient: whether there is a gradient, of earlier batches of the step.

        Returns:
            How many updates of optimizers that counts as.
        """
        assert self._batches is not None
        module = self.lightning_module
        assert module is not None
        before = self.steps
        if with_gradient and module.automatic_optimization:
            trainer = module.trainer
            optimizer = module.optimizers()
            assert isinstance(optimizer, LightningOptimizer)
            batch_idx = trainer.fit_loop.epoch_loop.batch_idx
            module.optimizer_step(trainer.current_epoch, batch_idx, optimizer, lambda: torch.zeros(()))
        self._batches.complete()
        return self.steps - before

    def repeat_collectives(self) -> None:
        """Make what user code has made together with all workers in the last batch once more, with what it had then."""
        made, self._made_together = self._made_together, []
        gathered = [again() for again in made[self._made_already :]]
        self._made_already = 0
        with_gradient = [each for each in gathered if isinstance(each, Tensor) and each.requires_grad]
        if with_gradient:  # the others' backward passes through it
            torch.autograd.backward(with_gradient, [torch.zeros_like(each) for each in with_gradient])
        self._made_together = made

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self._ends is not None:
            self._ends.batch_is_there()
        super().on_train_batch_start(batch, batch_idx)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        before = self._made_together
        if self._ends is not None and self._ends.batches_begun != self._recorded:  # some optimizers make several
            self._made_together, self._recorded = [], self._ends.batches_begun
        try:
            return super().training_step(*args, **kwargs)
        except StopIteration:  # in the middle of what the others go on with
            self._made_already, self._made_together = len(self._made_together), before
            raise

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        if self._in_a_step:
            value = tensor.detach().clone() if isinstance(tensor, Tensor) else tensor
            self._made_together.append(lambda: self.reduce(_copy(value), group, reduce_op))
        return super().reduce(tensor, group, reduce_op)

    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        if self._in_a_step:
            value, needs_gradient = tensor.detach(), sync_grads and tensor.requires_grad
            self._made_together.append(lambda: self.all_gather(value.requires_grad_(needs_gradient), group, sync_grads))
        return super().all_gather(tensor, group, sync_grads)

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        if self._in_a_step:
            self._made_together.append(lambda: self.broadcast(obj, src))
        return super().broadcast(obj, src)

    def barrier(self, *args: Any, **kwargs: Any) -> None:
        if self._in_a_step:
            self._made_together.append(lambda: self.barrier(*args, **kwargs))
        super().barrier(*args, **kwargs)

    @property
    def _in_a_step(self) -> bool:
        """Whether user code computes a gradient or an update now.

        Raises:
            ConfigurationError: if another worker could not take part in what user code makes with all workers there.
        """
        if self._ends is None or not self._ends.in_a_step:
            return False
        if not self._ends.allows_collectives:
            raise ConfigurationError(
                "training_step makes something together with all workers (self.log(..., sync_dist=True) or "
                "self.all_gather), but a worker has no batch at all, and cannot know what. Give every worker at least "
                "one batch, or log without sync_dist."
            )
        return True

    def quiesce(self, what: str = "a meeting of all workers") -> None:
        """Make sure that all meet for the same thing.

        There is nothing else to wait for, but what the method keeps under way: exchanges of a step that has begun touch
        neither the mean nor the parameters before the next update.
        """
        if self._communicator is not None:
            come_to_rest(self._communicator, self._averaging, what)

    def replace_stepper(self, index: int, optimizer: Optimizer, stepper: Stepper) -> None:
        """Begin anew with the larger vector, at the same step: all workers unfreeze in it."""
        assert self._communicator is not None
        assert self._batches is not None
        if stepper.active:
            return  # in the middle of an accumulation: after it
        self._communicator.drain()
        known = {id(parameter) for parameter in stepper.flat.parameters}
        # What was unfrozen within a batch has made an update already, with this worker's gradient alone.
        broadcast_from_zero([p for p in self._batches.parameters(index) if id(p) not in known])
        stepper.flat.release()
        successor = self._make_stepper(index, optimizer)
        successor.guarded |= stepper.guarded
        successor.worker.step, successor.worker.version = stepper.worker.step, stepper.worker.version
        successor.worker.rng.setstate(stepper.worker.rng.getstate())
        self._steppers[index] = successor

    def change_optimizers(self) -> None:
        """Begin anew with these: all workers change them in the same step."""
        assert self._communicator is not None
        self._communicator.drain()
        for stepper in self._steppers:
            stepper.flat.release()
        self._steppers[:] = [self._make_stepper(index, optimizer) for index, optimizer in enumerate(self.optimizers)]


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value

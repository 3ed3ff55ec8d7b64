"""Each batch of Lightning's loop as one step of an algorithm, whatever user code does with optimizers and weights.

The exchange belongs to the batch. It begins with it, and ends with the optimizer's update; or with the batch, if user
code makes no update, or makes it past the optimizers that Lightning knows. Any further update in the same batch is the
worker's own. Methods that exchange gradients cannot do so: there every update has an exchange of its own, and a worker
that skips one takes part with a zero gradient and applies what the others have sent.

The file is long because user code may make updates in many ways, all of which end in the same steps.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Protocol

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn
from torch.nn import Module, Parameter
from torch.optim import LBFGS, Optimizer

from lightning_decentral.engine.rest import come_to_rest
from lightning_decentral.engine.serving import serve
from lightning_decentral.engine.stepper import Stepper
from lightning_decentral.errors import ConfigurationError
from lightning_decentral.protocol import AbstractAlgorithm
from lightning_decentral.strategies.buffers import BufferGossip
from lightning_decentral.strategies.lightning_private import (
    accumulates,
    is_last_ready,
    replace,
    replace_hooks_of_update,
    replace_is_accumulated,
    version_of,
)
from lightning_decentral.strategies.updates import Update, forget_gradients, prepare_hooks
from lightning_decentral.transport.communicator import Communicator

Closure = Callable[[], Any]


_WATCHED_BATCHES = 4  # in which updates are looked for that Lightning does not know of


class Host(Protocol):
    """What `Batches` needs of its strategy."""

    algorithm: AbstractAlgorithm
    optimizers: list[Optimizer]

    @property
    def loads_first(self) -> bool:
        """Whether the next step does not begin before its batch is there."""

    @property
    def ends_batches_together(self) -> bool:
        """Whether nobody trains on while a worker is at the end of its batches."""

    def prepare_step(self) -> bool:
        """Do what comes before the next batch is loaded; whether the step begins now."""

    def apply_update(self, optimizer: Optimizer, closure: Closure, **options: Any) -> Any:
        """Let Lightning call the optimizer: gradient scaler, clipping and hooks included."""

    def replace_stepper(self, index: int, optimizer: Optimizer, stepper: Stepper) -> None:
        """Follow an optimizer that has other parameters than before."""

    def change_optimizers(self) -> None:
        """There is another number of optimizers than before."""


class Batches:
    """Drives the steppers of a strategy through Lightning's batches.

    Args:
        host: the strategy.
        trainer: whose loop it is.
        module: the user's model.
        steppers: one for each optimizer; filled by the strategy, with `parameters` of each.
        communicator: reaches the other workers.
    """

    def __init__(
        self, host: Host, trainer: Trainer, module: Module, steppers: list[Stepper], communicator: Communicator
    ) -> None:
        self._host = host
        self._trainer = trainer
        self._steppers = steppers
        self._communicator = communicator
        self._manual = not trainer.lightning_module.automatic_optimization
        self._changes_weights = _changes_weights_in_forward(module)
        self._parameters: list[list[Parameter]] = []
        self._known: set[int] = set()  # the identities of all of them
        self._optimizers: list[Optimizer] = []
        self._hooks: list[Any] = []
        self._stepping: int | None = None
        self._updated: set[int] = set()
        self._stepped = False  # in this batch
        self._module = module
        self._watched_batches = 0
        self._versions: dict[int, int] = {}
        # Where user code decides whether an update is made, workers tell each other before they exchange gradients.
        self._announces = self._manual or is_overridden("optimizer_step", trainer.lightning_module)
        self._past_strategy: dict[int, Update] = {}
        self._update_under_way: Update | None = None
        self._evaluates_often: set[int] = set()
        self.buffers: BufferGossip | None = None
        self._follow_optimizers()
        loop = trainer.fit_loop.epoch_loop
        self._begun_at = 0  # batch of this epoch, if a gradient was given up in it; others begin at multiples
        self._replaced = [
            replace(loop.automatic_optimization, "run", partial(self._run_automatic, loop.automatic_optimization.run)),
            replace(loop.manual_optimization, "run", partial(self._run, loop.manual_optimization.run)),
            replace_is_accumulated(trainer, self._is_accumulated),
        ]
        self._replaced.append(replace_hooks_of_update(trainer, self._call_hooks))

    def parameters(self, index: int) -> list[Parameter]:
        """Return the parameters of an optimizer that are exchanged: all that were ever trainable, each once."""
        return self._parameters[index]

    def begin_with(self, parameters: Sequence[Sequence[Parameter]]) -> None:
        """Let each optimizer have these parameters, and what else it trains: those of the run that goes on."""
        if len(parameters) == len(self._optimizers):
            self._parameters = [list(each) for each in parameters]
            self._known = {id(parameter) for each in parameters for parameter in each}
            for index in range(len(self._optimizers)):
                self._grow(index)

    def expects_changes(self, index: int) -> bool:
        """Tell whether user code may be expected to change an optimizer's parameters while they are exchanged."""
        if self._host.algorithm.exchanges_gradients:
            return False
        return self._manual or self._changes_weights or isinstance(self._host.optimizers[index], LBFGS)

    def close(self) -> None:
        """Leave Lightning's loop and the optimizers as they were."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        for undo in self._replaced:
            undo()

    # -- a batch ------------------------------------------------------------------------------------------------------

    def before_batch(self) -> None:
        """Begin the step of the batch that is loaded next, if it may begin so early.

        In each step this is the way from Lightning's loop to the socket, and has to stay a short one.
        """
        if self._host.loads_first:
            return
        self.settle()
        if self._host.prepare_step():
            self._follow()
            for stepper in self._steppers:
                if not stepper.active and stepper.flat.parameters:
                    stepper.begin()
            self._begin_buffers()

    def _begin_buffers(self) -> None:
        if self.buffers is not None:
            self.buffers.begin(self._steppers[0].worker.step if self._steppers else 0)

    def begin(self) -> None:
        """Begin a step of every stepper that is not in the middle of one."""
        self._follow()
        for stepper in self._steppers:
            if not stepper.active and stepper.flat.parameters:  # there are none if another optimizer has them
                stepper.begin()
        self._begin_buffers()

    def settle(self) -> None:
        """Settle a batch whose hooks have been called: what they have changed counts from now on."""
        for stepper in self._steppers:
            stepper.settle()

    def step(self, optimizer: Optimizer, closure: Closure, **options: Any) -> Any:
        """Make an optimizer's update, with the exchange of this batch if it is the first.

        Args:
            optimizer: which.
            closure: computes the gradient, or does nothing if it is there.
            options: for the optimizer.
        """
        index = next(i for i, each in enumerate(self._host.optimizers) if each is optimizer)
        stepper = self._grown(index)
        if index in self._evaluates_often and stepper.guarded and not stepper.reads_gradients:
            # Its many points are those of a copy, and what has become of it counts as one update.
            output = self._host.apply_update(optimizer, closure, **options)
            if not self._manual:
                self.complete()
            return output
        update = self._update(index)
        before, self._stepping = self._stepping, index
        self._update_under_way = update
        try:
            output = self._host.apply_update(optimizer, partial(update.after, closure), **options)
        finally:
            self._stepping = before
            self._update_under_way = None
            update.close()
        if update.evaluations > 1:
            self._evaluates_often.add(index)
            stepper.guarded = True
        self._end_update(index, update)
        return output

    def _call_hooks(self, hooks: Callable[..., None], *arguments: Any, **options: Any) -> None:
        """Call the hooks before an update, clipping among them; not where the algorithm's step has no update."""
        if self._update_under_way is None or self._update_under_way.wanted:
            hooks(*arguments, **options)

    def complete(self) -> None:
        """End the steps of this batch, also those in which no update was made."""
        if not self._manual and accumulates(self._trainer):
            if any(stepper.begins_anew() for stepper in self._steppers):  # a server's, which has one optimizer
                self._begun_at = self._trainer.fit_loop.epoch_loop.batch_progress.current.ready
            return
        self._find_other_updates()
        if self._announces and any(stepper.reads_gradients for stepper in self._steppers):
            if self._manual:
                self._refuse_unseen_updates()
            while called := int(self._communicator.agree(0.0, "max")):
                self._join(called - 1)
        for index, stepper in enumerate(self._steppers):
            self._grow(index)
            if not stepper.active:
                continue
            if not stepper.reads_gradients:
                if stepper.awaits_gradient:
                    if stepper.serves:  # what user code leaves out is not sent either
                        forget_gradients(stepper)
                    stepper.after_gradient()
                if stepper.serves and stepper.awaits_update:  # with the gradients of others in it
                    stepper.update_beside()
                stepper.finish(stepper.updated)
            elif not self._announces:
                self._join(index)
        if self.buffers is not None:
            self.buffers.finish()

    def serve(self, follow: Callable[[], None]) -> None:
        """Make the steps of a worker that has no batches, until those that train have come to their end.

        Args:
            follow: is called after each step.
        """
        self._follow()
        (stepper,) = self._steppers  # a server needs automatic optimization, which has one optimizer
        serve(stepper, lambda: self._apply(0, stepper), follow)

    def _apply(self, index: int, stepper: Stepper) -> bool:
        """Let the optimizer apply what a step brings, past Lightning's loop; tell whether it has made an update."""
        before, self._stepping = self._stepping, index
        with stepper.updating() as wanted:
            if wanted:
                self._host.apply_update(self._host.optimizers[index], lambda: None)
        self._stepping = before
        updated = index in self._updated
        self._updated.discard(index)
        return updated

    def _refuse_unseen_updates(self) -> None:
        stepped, self._stepped = self._stepped, False
        for stepper, optimizer in zip(self._steppers, self._host.optimizers, strict=True):
            if stepper.changed_in_place and not stepped:
                method = type(stepper.algorithm).__name__
                raise ConfigurationError(
                    f"Parameters of {type(optimizer).__name__} were changed in a batch without a step of any optimizer "
                    f"that configure_optimizers returned, but {method} exchanges gradients in these steps, and needs "
                    "one. Call step of such an optimizer, or use a method that exchanges parameters, such as DPSGD."
                )

    def _is_accumulated(self) -> bool:
        """Tell whether a gradient has all its micro-batches with this one: as many after one that was given up."""
        ready = self._trainer.fit_loop.epoch_loop.batch_progress.current.ready
        return (ready - self._begun_at) % self._trainer.accumulate_grad_batches == 0

    def _run_automatic(self, run: Callable[..., Any], optimizer: Optimizer, batch_idx: int, kwargs: Any) -> Any:
        """Make a batch; Lightning forgets gradients in each whose number is a multiple of the micro-batches."""
        if batch_idx < self._begun_at:  # of another epoch
            self._begun_at = 0
        return self._run(run, optimizer, batch_idx - self._begun_at, kwargs)

    def _run(self, run: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        output = run(*arguments, **options)
        self.complete()
        if self._is_followed_by_a_meeting:
            self.end_before_a_meeting()
        return output

    def end_before_a_meeting(self) -> None:
        """Come to the end of the batches before hooks of an epoch's end, or a validation. All workers together."""
        algorithm, size = self._host.algorithm, self._communicator.world_size
        somebody_serves = not all(algorithm.trains(rank) for rank in range(size))  # until all others are at this end
        one_model = algorithm.shares_model or algorithm.shards > 1 or len(algorithm.keepers(size)) < size
        if (somebody_serves or one_model) and self._host.ends_batches_together:
            # What hooks keep of the weights now, and put back later, is that model, with the last update of everybody.
            come_to_rest(self._communicator, self._steppers, "the last batch before a meeting")
        for stepper in self._steppers:
            stepper.show_apart(meets=True)

    def end_early(self) -> None:
        """Come to the end of the batches after this one, since training stops with it; others may be at their last."""
        if not self._is_followed_by_a_meeting:  # otherwise it has been made with the batch
            self.end_before_a_meeting()

    @property
    def _is_followed_by_a_meeting(self) -> bool:
        """Whether hooks of an epoch's end, or of a validation, come after this batch."""
        loop = self._trainer.fit_loop.epoch_loop
        every = self._trainer.val_check_batch or 0
        validates = bool(every) and (loop.batch_idx + 1) % every == 0
        return validates or is_last_ready(self._trainer)

    def _exchange(self, index: int) -> None:
        """Make the exchange, since the gradient is there, unless this batch has made it."""
        stepper = self._steppers[index]
        if stepper.reads_gradients and self._announces:
            while (called := int(self._communicator.agree(index + 1.0, "max"))) != index + 1:
                self._join(called - 1)  # another worker has skipped an update that this one makes later, or the reverse
        if stepper.reads_gradients and not stepper.active and stepper.flat.parameters:
            stepper.begin(gradient_is_there=True)
        if stepper.awaits_gradient:
            stepper.after_gradient()

    def _update(self, index: int) -> Update:
        return Update(self._steppers[index], self._host.optimizers[index], partial(self._exchange, index))

    def _end_update(self, index: int, update: Update) -> None:
        stepper = self._steppers[index]
        if not update.entered:
            return  # the gradient was never computed: Lightning says so
        stepper.updated |= update.wanted and index in self._updated
        self._updated.discard(index)
        if stepper.active and (stepper.reads_gradients or not self._manual):
            stepper.finish(stepper.updated)
        else:
            stepper.show_updated()

    def _join(self, index: int) -> None:
        """Take part in an exchange of gradients without one, and apply what the others have sent."""
        stepper, optimizer = self._grown(index), self._host.optimizers[index]
        own = [
            None if p.grad is None else p.grad.clone() for p in stepper.flat.parameters
        ]  # user code may go on with it
        forget_gradients(stepper)
        if not stepper.active:
            stepper.begin(gradient_is_there=True)
        stepper.after_gradient()
        before, self._stepping = self._stepping, index
        with stepper.updating() as wanted:
            if wanted and stepper.show_gradient():
                self._host.apply_update(optimizer, lambda: None)
        self._stepping = before
        stepper.finish(index in self._updated)
        self._updated.discard(index)
        for parameter, gradient in zip(stepper.flat.parameters, own, strict=True):
            parameter.grad = gradient

    # -- updates of optimizers that Lightning does not know ------------------------------------------------------------

    def _find_other_updates(self) -> None:
        """Let parameters take part that user code updates by their gradients, past `configure_optimizers`.

        They are looked for in the first batches. A teacher, which has no gradient, stays this worker's own.
        """
        if self._watched_batches == _WATCHED_BATCHES or not self._steppers:
            return
        self._watched_batches += 1
        others = [p for p in self._module.parameters() if p.requires_grad and id(p) not in self._known]
        found = [p for p in others if p.grad is not None and self._versions.get(id(p), version_of(p)) != version_of(p)]
        self._versions = {id(parameter): version_of(parameter) for parameter in others}
        if not found:
            return
        stepper = self._steppers[0]
        if stepper.reads_gradients:
            raise ConfigurationError(
                f"{len(found)} parameters are updated by something else than an optimizer that configure_optimizers "
                f"returned, but {type(stepper.algorithm).__name__} exchanges gradients in the steps of these. Return "
                "the optimizer from configure_optimizers, or use a method that exchanges parameters, such as DPSGD."
            )
        self._known |= {id(parameter) for parameter in found}
        self._parameters[0] += found

    # -- optimizers and their parameters ------------------------------------------------------------------------------

    def _follow(self) -> None:
        """Exchange from now on what a fine-tuning callback unfreezes or adds."""
        now = self._host.optimizers
        if not _same(now, self._optimizers):
            self._follow_optimizers()
            if len(now) != len(self._steppers):
                self._host.change_optimizers()
        for index, (optimizer, stepper) in enumerate(zip(now, self._steppers, strict=True)):
            self._grow(index)
            if not _same(self._parameters[index], stepper.flat.parameters):
                self._host.replace_stepper(index, optimizer, stepper)

    def _follow_optimizers(self) -> None:
        """Take over the optimizers that there are now; parameters stay with the number that they had, if they can."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._optimizers = list(self._host.optimizers)
        self._evaluates_often = {i for i, optimizer in enumerate(self._optimizers) if isinstance(optimizer, LBFGS)}
        before, self._parameters = self._parameters, [[] for _ in self._optimizers]
        owners = {
            id(parameter): index
            for index in reversed(range(len(self._optimizers)))
            for parameter in _parameters_of(self._optimizers[index])
        }
        for index, parameters in enumerate(before):
            for parameter in parameters:
                self._parameters[owners.get(id(parameter), min(index, len(self._optimizers) - 1))].append(parameter)
        self._known = {id(parameter) for parameters in self._parameters for parameter in parameters}
        for index, optimizer in enumerate(self._optimizers):
            prepare_hooks(optimizer)
            self._hooks.append(optimizer.register_step_pre_hook(partial(self._before_update, index)))
            self._hooks.append(optimizer.register_step_post_hook(partial(self._after_update, index)))
            self._grow(index)

    def _grow(self, index: int) -> None:
        """Note which parameters have become trainable; what was trainable once stays in the model that is exchanged."""
        for group in self._host.optimizers[index].param_groups:  # three times in each step
            for parameter in group["params"]:
                if parameter.requires_grad and id(parameter) not in self._known:
                    self._known.add(id(parameter))
                    self._parameters[index].append(parameter)

    def _grown(self, index: int) -> Stepper:
        """Return the stepper of an optimizer that is about to make an update.

        A parameter that was unfrozen in this batch is exchanged from the next one on; or from now on where gradients
        are, because all workers must apply the same updates to it.
        """
        self._grow(index)
        stepper = self._steppers[index]
        if stepper.reads_gradients and not _same(self._parameters[index], stepper.flat.parameters):
            stepper.abandon()
            self._host.replace_stepper(index, self._host.optimizers[index], stepper)
        return self._steppers[index]

    # -- updates past the strategy ------------------------------------------------------------------------------------

    def _before_update(self, index: int, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        """Begin an optimizer's update: called by Lightning, or by user code on the optimizer itself."""
        stepper = self._steppers[index] if index < len(self._steppers) else None
        if self._stepping == index or stepper is None or (stepper.guarded and not stepper.reads_gradients):
            return None
        self._grown(index)
        update = self._past_strategy[index] = self._update(index)
        closure = args[1] if len(args) > 1 else kwargs.get("closure")  # args[0] is the optimizer
        if closure is None:
            update.enter()
            return None
        wrapped = partial(update.after, closure)
        if len(args) > 1:
            return (args[0], wrapped, *args[2:]), kwargs
        return args, {**kwargs, "closure": wrapped}

    def _after_update(self, index: int, optimizer: Optimizer, *_: Any) -> None:
        self._updated.add(index)
        self._stepped = True
        update = self._past_strategy.pop(index, None)
        if update is not None:
            update.close()
            self._end_update(index, update)


def _same(these: Sequence[Any], those: Sequence[Any]) -> bool:
    return len(these) == len(those) and all(map(operator.is_, these, those))


def _parameters_of(optimizer: Optimizer) -> Iterable[Parameter]:
    return (parameter for group in optimizer.param_groups for parameter in group["params"])


def _changes_weights_in_forward(module: Module) -> bool:
    """Tell whether a module is known to change parameters in its forward pass."""
    return any(
        isinstance(each, nn.Embedding | nn.EmbeddingBag) and each.max_norm is not None for each in module.modules()
    )

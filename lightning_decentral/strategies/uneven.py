"""Epochs that are not equally long on all workers, and stops that only some of them want.

In a synchronous method nobody can make a step alone, and validation and checkpoints are made together. So every worker
goes through the same number of batches: one that has none left makes *empty* ones, which exchange without a gradient of
their own, and counts them as if they were real. Whatever depends on a count (validation, checkpoints, learning rates,
``max_steps``) then happens at the same moment everywhere.

Nothing is sent as long as nothing happens. If the loaders' lengths are known, they are compared when the loaders are
made, and equal ones need no more than that. Otherwise a worker at its last batch, or one that wants to stop, asks how
far the others are (`RollCall`), and everybody makes all batches that anybody has begun. If that was the last one for
all, the epoch is over. Otherwise they go on together, and *meet* at each further batch: one small reduction says who
has it, whether anybody has another, and whether anybody wants to stop.

What has to be known for it of Lightning's private loops is in `loops`. The file is long because the cases are one
protocol: all workers must come to the same meetings in the same order, whichever of them each one is in.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from typing import Any, Literal, Protocol

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info

from lightning_decentral.strategies import lightning_private as private
from lightning_decentral.strategies.clocks import ask_rarely, look_at_own_clocks
from lightning_decentral.strategies.loops import (
    count_batches,
    count_updates,
    end_run,
    has_made_its_steps,
    is_over,
    makes_meetings,
    only_resumes_validation,
    require_same_settings,
    set_length,
    validate,
    validates_at_end,
)
from lightning_decentral.transport.communicator import Communicator
from lightning_decentral.transport.roll_call import RollCall

Uneven = Literal["continue", "stop"]


class Steps(Protocol):
    """What `Ends` needs of the strategy: its steps."""

    @property
    def between_steps(self) -> bool:
        """Whether no step has begun that is not finished."""

    @property
    def knows_collectives(self) -> bool:
        """Whether it has made a batch, and so knows what user code makes together with all workers in each."""

    def begin_empty_batch(self) -> None:
        """Begin a step for a batch that others have, unless one has begun."""

    def repeat_collectives(self) -> None:
        """Make what user code has made together with all workers in the last batch once more."""

    def finish_step(self, with_gradient: bool) -> int:
        """Finish the step that has begun, if any.

        Args:
            with_gradient: whether there is a gradient, of earlier batches of the step.

        Returns:
            How many updates of optimizers that counts as.
        """


@dataclass
class _Say:
    """What a worker says when all meet at a batch, or the largest of what all have said.

    Args:
        has: whether it has this batch.
        more: whether it has another one after it.
        stop: whether it wants to stop, and validate before.
        finish: whether it has made all steps that it should.
        ignorant: whether it does not know what user code makes together with all workers in a batch.
        batches: how many it has counted in this epoch, without this one.
        updates: how many of its optimizers it has counted in this run.
    """

    has: bool = False
    more: bool = False
    stop: bool = False
    finish: bool = False
    ignorant: bool = False
    batches: int = 0
    updates: int = 0


class Ends:
    """Lets all workers of a synchronous strategy end each epoch, and the run, together.

    Args:
        trainer: whose loop it is.
        communicator: reaches the other workers.
        steps: the strategy.
        rule: ``"continue"``: as long as any worker has batches. ``"stop"``: until the first one has none.
        timeout_seconds: after which a worker that does not say how far it is is taken for stuck.

    Attributes:
        abreast: whether the workers meet at each batch, because some have batches and others not.
    """

    def __init__(
        self, trainer: Trainer, communicator: Communicator, steps: Steps, rule: Uneven, timeout_seconds: float
    ) -> None:
        assert communicator.watch is not None
        self._trainer, self._communicator, self._steps, self._rule = trainer, communicator, steps, rule
        self._roll = RollCall(communicator.watch.store, communicator.rank, communicator.world_size, timeout_seconds)
        communicator.watch.listener = self._roll.listen
        self.abreast = False
        self._planned = False  # whether all know that all have the same number of batches
        self._last_of_all = False  # whether all know that this batch is the last one of the epoch
        self._said = _Say()  # at this batch, if they meet
        self._out = False  # whether this worker has no more batches in this epoch
        self._stop = False  # whether it wants to stop, until all do
        self._empty = False  # whether it is counting a batch that it has not
        self._gradients = 0  # batches of its own in a step that is not finished
        self._validated = False  # whether the last batch was followed by a validation
        self._closing = False  # whether the end of the epoch was agreed on, outside of a batch
        self._updates: int | None = None  # that the last batch counted as, with manual optimization
        self._told = False
        require_same_settings(trainer)
        fit: Any = trainer.fit_loop
        loop = self._loop = fit.epoch_loop
        self._advance, self._advanced = loop.advance, loop.on_advance_end
        self._update_schedules = loop.update_lr_schedulers
        self._set_up_data, self._epoch_ended = fit.setup_data, fit.on_advance_end
        self._replaced = [
            private.replace(loop, "advance", self._on_advance),
            private.replace(loop, "on_advance_end", self._on_advanced),
            private.replace(loop, "update_lr_schedulers", self._on_schedules),
            private.replace(fit, "setup_data", self._on_setup_data),
            private.replace(fit, "on_advance_end", self._on_epoch_ended),
            *look_at_own_clocks(trainer),
            *ask_rarely(trainer, timers=False),
        ]

    def close(self) -> None:
        """Leave Lightning's loops as they were."""
        for undo in self._replaced:
            undo()
        if self._communicator.watch is not None:
            self._communicator.watch.listener = None

    @property
    def in_a_step(self) -> bool:
        """Whether user code computes a gradient or an update of its own now."""
        batches = self._loop.batch_progress.current
        return batches.started > batches.processed and self._trainer.training and not self._empty

    @property
    def batches_begun(self) -> int:
        """How many batches this worker has begun, as Lightning counts them."""
        return int(self._loop.batch_progress.total.started)

    @property
    def allows_collectives(self) -> bool:
        """Whether user code may make something together with all workers in this batch."""
        return not (self.abreast and self._said.ignorant)

    # -- the epochs' lengths ------------------------------------------------------------------------------------------

    def _on_setup_data(self) -> None:
        """Loaders are made: compare their lengths, and whether anybody has nothing to do at all."""
        fit = self._trainer.fit_loop
        first = private.combined_loader(self._trainer) is None
        makes_loaders = first or private.reloads_loader(self._trainer)
        self._set_up_data()
        if not makes_loaders:
            return
        known = fit.max_batches < float("inf")
        says = int(fit.max_batches) if known else -1, int(first and is_over(self._trainer))
        numbers, over = zip(*self._communicator.meet("the loaders for training", *says), strict=True)
        lengths = [float("inf") if number < 0 else number for number in numbers]
        if any(over):
            end_run(self._trainer)
        self._planned = min(lengths) == max(lengths) != float("inf")
        # Who has no batch at all does not know what user code makes together with all workers in a step.
        self.abreast = first and not self._planned
        if min(lengths) == max(lengths):
            return
        length = min(lengths) if self._rule == "stop" and max(lengths) < float("inf") else max(lengths)
        self._tell(f"The workers have {', '.join(map(str, lengths))} batches in an epoch")
        set_length(self._trainer, length)
        self._planned = length == min(lengths)
        self.abreast &= not self._planned

    def _tell(self, what: str) -> None:
        if not self._told:
            self._told = True
            rule = (
                "an epoch ends for all with the first that has no more (uneven='stop')"
                if self._rule == "stop"
                else "who has no more goes on without gradients until all are through (uneven='continue')"
            )
            rank_zero_info(f"{what}: {rule}.")

    # -- a batch ------------------------------------------------------------------------------------------------------

    def _on_advance(self, fetcher: Any) -> None:
        """Lightning makes a batch."""
        loop = self._loop
        if not only_resumes_validation(self._trainer, fetcher):
            self._begin(fetcher)
        self._last_of_all = False
        ready, updates = loop.batch_progress.current.ready, loop.global_step
        try:
            self._advance(fetcher)
        except StopIteration:  # there was no batch, or user code has said that the epoch is over
            had_batch = loop.batch_progress.current.ready > ready
            if had_batch:
                count_batches(loop, ready)  # Lightning has counted half of it
            self._stay_in_place(fetcher, had_batch)
            raise
        if not self._trainer.lightning_module.automatic_optimization:
            self._updates = loop.global_step - updates

    def _stay_in_place(self, fetcher: Any, had_batch: bool) -> None:
        """Make an empty batch where others may have one and this worker has none, and those that follow."""
        loop = self._loop
        self._out = True
        loop.batch_progress.is_last_batch = False
        if not self.abreast:
            self._roll.ask(out=True, gone=True)
            answers = self._roll.answers(self._communicator.check)
            if all(answer.gone and answer.begun == self._roll.begun for answer in answers):
                loop.batch_progress.is_last_batch = True  # nobody has it
                with self._without_batch():
                    self._steps.finish_step(self._gradients > 0)
                self._roll.close()
                self._end(fetcher, stop=False, finish=False)
                return
        if had_batch or not self.abreast:
            if self._make_empty(fetcher, loads=not had_batch):
                return
            if self._ends_here():
                self._end(fetcher, self._said.stop, self._said.finish)
                return
        self._leave(fetcher)

    def _begin(self, fetcher: Any) -> None:
        """Count the next batch; or end the epoch here, if that was agreed on."""
        if self.abreast or self._roll.begin():
            return  # if they are abreast, they meet when the batch is there
        if self._roll.begun < self._last_begun():
            self._roll.begun += 1
        elif self._settle(fetcher):
            raise StopIteration

    def batch_is_there(self) -> None:
        """Learn that a batch was loaded; what is done with it depends on whether it is the last one."""
        loop = self._loop
        last = private.is_last_ready(self._trainer)
        if self._ends_by_plan():
            self._roll.loaded()
        elif self.abreast:
            self._meet(has=True, more=not last)
        elif not last:
            self._roll.loaded()
            if self._roll.under_way and self._roll.begun == self._last_begun():
                self._roll.say_out(False)
            return
        else:
            self._out = True
            self._roll.ask(out=True)
            self._last_of_all = self._is_last_of_all()
        if not self._ends_by_plan():
            loop.batch_progress.is_last_batch = self._last_of_all  # a step is finished with the last batch of all

    def _on_advanced(self, fetcher: Any) -> None:
        """Go on after a batch; or wait for the others, if it was the last."""
        loop = self._loop
        self._gradients = 0 if self._steps.between_steps else self._gradients + 1
        self._hide_stop()
        if self._ends_by_plan() or self._last_of_all:
            self._advanced(fetcher)
            self._show_stop()
            return
        if private.is_last_ready(self._trainer):  # it became known in the step, which has loaded its batches itself
            self._out, loop.batch_progress.is_last_batch = True, False
        self._validated = private.validates_now(self._trainer, fetcher)
        self._advanced(fetcher)
        self._hide_stop()  # a validation may want it
        if self._ends_here():
            self._end(fetcher, self._said.stop, self._said.finish)
        elif self._out or has_made_its_steps(loop) or (self._stop and not self.abreast):
            self._leave(fetcher)
        else:
            return
        raise StopIteration

    def _leave(self, fetcher: Any) -> None:
        """Make the batches that the others have and this worker has not, or does not want, and end with them."""
        if not self.abreast:
            self._roll.ask(self._out, self._stop, has_made_its_steps(self._loop))
            last = self._last_begun()
            while self._roll.begun < last:
                self._roll.begun += 1
                if self._make_empty(fetcher, loads=True):
                    return
            if self._settle(fetcher):
                return
        while True:
            if not self._ends_by_plan(ahead=1):
                self._meet(has=False)
                if not self._said.has:
                    break
            if self._make_empty(fetcher):
                return
            if self._ends_here():
                break
        self._end(fetcher, self._said.stop, self._said.finish)

    def _make_empty(self, fetcher: Any, loads: bool = False) -> bool:
        """Make a batch of the others.

        Args:
            fetcher: for Lightning.
            loads: whether the others may be loading it, and do not know yet if it is the last of all.

        Returns:
            Whether the epoch is over with it.
        """
        loop = self._loop
        progress = loop.batch_progress
        with self._without_batch():
            progress.increment_ready()
            at_last = loads and not self.abreast and self._roll.begun == self._last_begun()
            if at_last:
                self._roll.say_out(True)
            self._steps.begin_empty_batch()  # as the others do before they load it
            if at_last:
                self._last_of_all = self._is_last_of_all()
            progress.is_last_batch = self._last_of_all or self._ends_by_plan()
            self._call_callbacks("on_train_batch_start", None, loop.batch_idx)
            progress.increment_started()
            self._steps.repeat_collectives()
            if not private.accumulates(self._trainer):
                self._finish_step()
            progress.increment_processed()
            self._update_schedules("step", update_plateau_schedulers=False)
            if progress.is_last_batch:
                self._update_schedules("epoch", update_plateau_schedulers=False)
            self._call_callbacks("on_train_batch_end", None, None, loop.batch_idx)
            progress.increment_completed()
        self._hide_stop()
        self._validated = private.validates_now(self._trainer, fetcher)
        self._advanced(fetcher)
        self._hide_stop()
        if progress.is_last_batch:
            self._show_stop()
        return bool(progress.is_last_batch)

    def _finish_step(self) -> None:
        made = self._steps.finish_step(self._gradients > 0)
        count_updates(self._trainer, made if self._updates is None else self._updates)
        self._gradients = 0

    @contextmanager
    def _without_batch(self) -> Iterator[None]:
        self._empty = True
        try:
            yield
        finally:
            self._empty = False

    def _call_callbacks(self, hook: str, *arguments: Any) -> None:
        """Call the callbacks that may make something together with other workers; the others have seen all batches."""
        trainer = self._trainer
        everybody: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        trainer.callbacks = [each for each in everybody if makes_meetings(each)]  # type: ignore[attr-defined]
        try:
            private.call_callbacks(trainer, hook, *arguments)
        finally:
            trainer.callbacks = everybody  # type: ignore[attr-defined]

    def _on_schedules(self, interval: str, update_plateau_schedulers: bool) -> None:
        """Learning rates that change with the epoch do so when it is over for all."""
        ends = self._last_of_all or self._ends_by_plan()
        if interval != "epoch" or update_plateau_schedulers or ends:
            self._update_schedules(interval, update_plateau_schedulers=update_plateau_schedulers)

    # -- what all say, and what follows -------------------------------------------------------------------------------

    def _last_begun(self) -> int:
        """Return the last batch that any worker has begun."""
        return max(answer.begun for answer in self._roll.answers(self._communicator.check))

    def _is_last_of_all(self) -> bool:
        """Tell whether this batch is the last that anybody has begun, and nobody has another; this worker has not."""
        answers = self._roll.answers(self._communicator.check)
        last = max(answer.begun for answer in answers)
        self._roll.say_out(True)
        if self._roll.begun < last or any(a.begun == last and not (a.out or a.loading) for a in answers):
            return False
        unknown = [rank for rank, answer in enumerate(answers) if not answer.out]
        return all(self._roll.out(unknown, self._communicator.check))

    def _settle(self, fetcher: Any) -> bool:
        """Everybody has made what anybody has begun: end the roll call; whether the epoch is over, too."""
        answers = self._roll.answers(self._communicator.check)
        self._roll.close()
        stop, finish = any(answer.stop for answer in answers), any(answer.finish for answer in answers)
        some_are_out = any(answer.out for answer in answers)
        if stop or finish or (some_are_out and self._rule == "stop") or all(answer.out for answer in answers):
            self._end(fetcher, stop, finish)
            return True
        self.abreast = True
        self._tell("Some workers have no more batches in this epoch")
        return False

    def _meet(self, has: bool, more: bool = False) -> None:
        """Say something at a batch, and hear what anybody says."""
        loop = self._loop
        counted = loop.batch_progress.current.ready - int(has)
        ignorant = not (has or self._steps.knows_collectives)
        say = _Say(has, more, self._stop, has_made_its_steps(loop), ignorant, counted, loop.global_step)
        mine = astuple(say)
        rows = self._communicator.meet("a batch that only some workers have", *(int(value) for value in mine))
        self._said = _Say(*(type(own)(max(values)) for own, *values in zip(mine, *rows, strict=True)))
        stops = self._said.stop or self._said.finish
        some_are_out = not all(row[1] for row in rows)
        ends = not self._said.more or (some_are_out and self._rule == "stop")
        self._last_of_all = self._said.has and ends and not stops
        self._out |= not more
        self.abreast = some_are_out or stops
        if not has:  # these were no batches of its own: it counts what the others count
            count_batches(loop, self._said.batches)
            count_updates(self._trainer, self._said.updates - loop.global_step)

    def _ends_here(self) -> bool:
        """Tell whether all have agreed to stop after this batch."""
        return self.abreast and (self._said.stop or self._said.finish)

    def _end(self, fetcher: Any, stop: bool, finish: bool) -> None:
        """Do what Lightning does with a last batch: the epoch is over for all."""
        trainer, loop = self._trainer, self._loop
        self._stop = False
        if stop or (finish and not has_made_its_steps(loop)):
            trainer.should_stop = True
        loop.batch_progress.is_last_batch = True
        if not self._steps.between_steps:
            with self._without_batch():
                self._finish_step()
            self._update_schedules("step", update_plateau_schedulers=False)
        if stop or finish:
            loop.batch_progress.is_last_batch = False
        else:
            self._update_schedules("epoch", update_plateau_schedulers=False)
        due = not self._validated and (stop or (not finish and validates_at_end(trainer)))
        if due and private.validates_in_epoch(trainer):
            validate(trainer)

    def _ends_by_plan(self, ahead: int = 0) -> bool:
        """Tell whether this batch, or one ahead, is the last of the epoch, as all know from the loaders' lengths.

        A loader may have fewer batches than it said.
        """
        return self._planned and self._loop.batch_progress.current.ready + ahead >= self._trainer.num_training_batches

    def _hide_stop(self) -> None:
        """Keep a wish to stop from Lightning until it is agreed on."""
        if self._trainer.should_stop and private.can_stop_early(self._trainer):
            self._stop, self._trainer.should_stop = True, False

    def _show_stop(self) -> None:
        if self._stop:
            self._stop, self._trainer.should_stop = False, True

    # -- the end of the run -------------------------------------------------------------------------------------------

    def _on_epoch_ended(self) -> None:
        """Learn that an epoch is over, for all: whoever has made its last one ends the run for all."""
        self._epoch_ended()
        says = int(is_over(self._trainer)), int(self._roll.under_way)
        over, asked = zip(*self._communicator.meet("the end of an epoch", *says), strict=True)
        self._out = self._last_of_all = False
        self.abreast = self._said.ignorant
        if any(asked):
            self._roll.close()
        if any(over):
            end_run(self._trainer)

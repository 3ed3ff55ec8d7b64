"""What all workers do together in the middle of Lightning's loop, and what becomes of it when one of them fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import RunningStage, TrainerFn, TrainerStatus
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_decentral.errors import PeerLost, WorkerFailed
from lightning_decentral.strategies import lightning_private as private
from lightning_decentral.tensors import give
from lightning_decentral.traffic import Traffic
from lightning_decentral.transport.collectives import is_few, is_transport_error
from lightning_decentral.transport.communicator import Communicator
from lightning_decentral.transport.connections import ConnectionSettings
from lightning_decentral.transport.few_numbers import is_reduction, operation_of
from lightning_decentral.transport.liveness import Watch, meet
from lightning_decentral.transport.ragged import gather_rows, is_everybody
from lightning_decentral.transport.rejoining import has_left, rejoin_process_group


class AbstractMeetingStrategy(DDPStrategy):
    """Meets the other workers, makes the collectives that Lightning asks for, and names who is lost.

    While a run goes on, workers that meet tell each other what for: two that meet for different things get an error in
    the place of a wait without end.
    """

    exchange_timeout_seconds: float
    """After which an exchange has failed; each class has it as an option."""

    def _clear(self) -> None:
        """Let what changes in a run be as before one. Each of the classes that drive a run adds what it has."""
        self._communicator: Communicator | None = None
        self._watch: Watch | None = None
        self._gathered_ragged = False

    @property
    def traffic(self) -> Traffic:
        """What this worker sent and waited for since training began."""
        return self._communicator.traffic if self._communicator is not None else Traffic()

    def _connection_settings(self, shared_memory: bool) -> ConnectionSettings:
        """Tell how the workers reach each other once they have met."""
        assert self.cluster_environment is not None
        return ConnectionSettings(
            self.root_device,
            self.cluster_environment.main_address,
            self.exchange_timeout_seconds,
            private.timeout_of(self) or timedelta(minutes=30),
            shared_memory,
            self._watch,
        )

    def setup_environment(self) -> None:
        assert self.lightning_module is not None
        private.take_over_sigterm(self.lightning_module.trainer)
        super().setup_environment()

    def setup_distributed(self) -> None:
        """Meet the other workers; from here on, who is lost is named."""
        try:
            if has_left():  # after an error that user code has caught
                self.set_world_ranks()
                environment = self.cluster_environment
                assert environment is not None
                rejoin_process_group(
                    private.backend_of(self),
                    environment.main_address,
                    environment.main_port,
                    self.global_rank,
                    self.world_size,
                    self.exchange_timeout_seconds,
                    private.timeout_of(self),
                )
            super().setup_distributed()
        except RuntimeError as error:
            if not is_transport_error(error):
                raise
            reason = str(error).splitlines()[0][:300]
            raise PeerLost(
                f"Worker {self.global_rank} of {self.world_size} could not connect with the others: at least one has "
                "ended, did not come in time, or cannot be reached. Look at what the workers have printed, and start "
                f"the run again; if they are only slow to start, raise `timeout`. ({reason})"
            ) from error
        assert self.cluster_environment is not None
        assert self.lightning_module is not None
        if self.world_size > 1 and self.lightning_module.trainer.state.fn == TrainerFn.FITTING:
            address = self.cluster_environment.main_address
            self._watch = meet(address, self.global_rank, self.world_size, self.exchange_timeout_seconds)

    # -- collectives that Lightning makes -----------------------------------------------------------------------------

    def barrier(self, *args: Any, **kwargs: Any) -> None:
        if self._interrupted:
            return
        self.check_collective("barrier")
        with self._named_failures():
            if self._communicator is not None:
                self._communicator.barrier("a barrier")
            else:
                super().barrier(*args, **kwargs)

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        if self._interrupted:
            return obj
        self.check_collective("broadcast")
        with self._named_failures():
            self._meet("a broadcast")
            return super().broadcast(obj, src)

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        if self._interrupted:
            return tensor
        self.check_collective("reduce")
        with self._named_failures():
            if is_everybody(group) and self._communicator is not None and not self.in_a_batch:
                operation = operation_of(reduce_op)
                if is_few(tensor) and is_reduction(operation):  # a barrier and a sum would be many messages more
                    give(tensor, self._communicator.reduce(tensor, operation))
                    return tensor
                self._communicator.meet("the reduction of a value")
            return super().reduce(tensor, group, reduce_op)

    def total(self, tensor: Tensor) -> Tensor:
        """Return the sum over all workers, also where what some of them log counts for all. All workers together."""
        total: Tensor = self.reduce(tensor, reduce_op="sum")
        return total

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        return decision if self._interrupted else super().reduce_boolean_decision(decision, all)

    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        """Return the tensors of all workers, ``[workers, ...]``.

        If their numbers of rows differ, the rows of all workers follow each other, ``[1, rows, ...]``:
        ``flatten(0, 1)``, ``reshape(-1)`` or a mean over everything come out right, and no row is made up.
        """
        if self._interrupted or self.world_size == 1:
            return tensor.unsqueeze(0)
        self.check_collective("all_gather")
        gathered = self.gather_rows(tensor, group, sync_grads)
        rows = [len(each) if each.ndim else 1 for each in gathered]
        if len(set(rows)) == 1:
            return torch.stack(gathered)
        if not self._gathered_ragged:
            self._gathered_ragged = True
            rank_zero_warn(
                f"all_gather got {rows} rows from the workers: they follow each other in one tensor, of shape "
                f"{(1, sum(rows), *gathered[0].shape[1:])}, instead of one row of it for each worker."
            )
        return torch.cat(gathered).unsqueeze(0)

    def gather_rows(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> list[Tensor]:
        """Return the tensors of all workers, by rank, which may have unequal numbers of rows."""
        with self._named_failures():
            return gather_rows(tensor, group, sync_grads, None if self.in_a_batch else self._communicator)

    def check_collective(self, name: str) -> None:
        """Refuse what would make all workers wait for each other, where the strategy promises that nobody waits."""

    def _meet(self, what: str) -> None:
        """Make sure that all workers do the same where they do something together.

        In a batch, where synchronous workers keep step anyway, it would cost more than what they do.
        """
        if self._communicator is not None and not self.in_a_batch:
            self._communicator.meet(what)

    @property
    def in_a_batch(self) -> bool:
        """Whether Lightning's loop is between the beginning and the end of a training batch."""
        trainer = private.trainer_of(self.lightning_module)
        if trainer is None or trainer.state.stage != RunningStage.TRAINING:
            return False
        progress: Any = trainer.fit_loop.epoch_loop.batch_progress.current
        return bool(progress.processed < progress.ready or progress.completed < progress.started)

    @property
    def _interrupted(self) -> bool:
        """Whether this worker has raised: nobody may wait for the others then.

        Lightning tells callbacks of an exception, some of which save a checkpoint, before it tells the strategy.
        """
        trainer = private.trainer_of(self.lightning_module)
        return trainer is not None and trainer.state.status == TrainerStatus.INTERRUPTED

    # -- failures -----------------------------------------------------------------------------------------------------

    def _check_failure(self) -> None:
        if self._communicator is not None:
            self._communicator.check()

    @contextmanager
    def _named_failures(self) -> Iterator[None]:
        with named_failures(self._watch):
            yield


@contextmanager
def named_failures(watch: Watch | None) -> Iterator[None]:
    """Turn a connection's error into who was lost, and tell the others; none of a worker alone."""
    try:
        yield
    except RuntimeError as error:
        if watch is None or isinstance(error, PeerLost | WorkerFailed) or not is_transport_error(error):
            raise
        failure = watch.diagnose(error)
        watch.publish(failure)
        raise failure from error


def publish_exception(watch: Watch, exception: BaseException, rank: int) -> None:
    """Tell the others that this worker has raised, and the exception what has happened elsewhere, if that was first."""
    if isinstance(exception, RuntimeError) and watch.failure is None and is_transport_error(exception):
        watch.publish(watch.diagnose(exception))
    watch.publish(exception)
    failure = watch.failure
    if failure is not None and watch.failed_rank != rank and str(failure) != str(exception):
        exception.add_note(str(failure))

"""What the gossip and the asynchronous strategy share: an algorithm inside Lightning's training loop."""

from __future__ import annotations

import signal
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loops.fetchers import _DataLoaderIterDataFetcher
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import RunningStage, TrainerFn, TrainerStatus
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

from lightning_decentral.compression.fused import is_fused
from lightning_decentral.engine.stepper import Stepper
from lightning_decentral.errors import ConfigurationError, PeerLost, WorkerFailed
from lightning_decentral.protocol import AbstractAlgorithm
from lightning_decentral.simulation.cluster import Traffic
from lightning_decentral.strategies.batches import Batches
from lightning_decentral.strategies.checkpoints import WorkerCheckpoints
from lightning_decentral.strategies.consensus import Consensus
from lightning_decentral.strategies.records import described, log_run
from lightning_decentral.strategies.remembered import parameter_names
from lightning_decentral.tensors import check_parameters, has_values
from lightning_decentral.transport.collectives import broadcast_from_zero, is_transport_error
from lightning_decentral.transport.communicator import Communicator
from lightning_decentral.transport.connections import gather_objects
from lightning_decentral.transport.liveness import Watch, meet
from lightning_decentral.transport.ragged import gather_rows, is_everybody
from lightning_decentral.transport.rejoining import has_left, leave_process_group, rejoin_process_group

_KNOWN = ("lightning", "pytorch_lightning", "lightning_decentral")  # whose hooks before a batch leave weights alone

StartMethod = Literal["popen", "spawn", "fork", "forkserver"]


class AbstractDecentralizedStrategy(DDPStrategy):
    """Runs an algorithm in which every worker has a model of its own.

    Lightning's loop computes gradients and calls the optimizer; around them the algorithm's coroutine makes its
    exchanges. Evaluation and checkpoints use the *consensus*, the mean of all workers' models.

    Args:
        algorithm: the method; its topology's defaults are filled in for the number of workers.
        process_group_backend: ``"gloo"`` or ``"nccl"``; ``None``: what fits the device.
        timeout: for what all workers do together at the end of an epoch, waiting for the slowest included.
        exchange_timeout_seconds: after which an exchange has failed and the peer is named.
        start_method: how worker processes are started.
        resume: ``"exact"``: every worker goes on from its own file, and a missing or damaged one is an error.
            ``"consensus"``: all start from the averaged model of the main file.
        worker_checkpoints: whether each worker writes its own state beside a checkpoint.
        average_at_end: whether the model is the consensus once ``fit`` has returned.
        seed: of the algorithm's random choices; all workers must have the same.
        shared_memory: whether workers of one host exchange with their neighbours through shared memory.
    """

    is_distributed = True  # Lightning's property warns whenever it is read
    begins_before_batch: ClassVar[bool]
    """Whether a step's exchange goes on while its batch is loaded, unless hooks might change weights until then."""

    def __init__(
        self,
        algorithm: AbstractAlgorithm,
        process_group_backend: str | None,
        timeout: timedelta,
        exchange_timeout_seconds: float,
        start_method: StartMethod,
        resume: Literal["exact", "consensus"],
        worker_checkpoints: bool,
        average_at_end: bool,
        seed: int,
        shared_memory: bool,
    ) -> None:
        super().__init__(process_group_backend=process_group_backend, timeout=timeout, start_method=start_method)
        if not isinstance(algorithm, AbstractAlgorithm):
            raise ConfigurationError(
                f"{type(self).__name__}(algorithm={algorithm!r}): needs an algorithm object, such as "
                "lightning_decentral.algorithms.DPSGD()."
            )
        if not exchange_timeout_seconds > 0:
            raise ConfigurationError(
                f"{type(self).__name__}(exchange_timeout_seconds={exchange_timeout_seconds}): needs a positive number."
            )
        if resume not in ("exact", "consensus"):
            raise ConfigurationError(f"{type(self).__name__}(resume={resume!r}): needs 'exact' or 'consensus'.")
        is_fused()  # refuses a wrong value of its environment variable before any process starts
        self.algorithm = algorithm
        self.exchange_timeout_seconds = exchange_timeout_seconds
        self.resume = resume
        self.worker_checkpoints = worker_checkpoints
        self.average_at_end = average_at_end
        self.seed = seed
        self.shared_memory = shared_memory
        self._configured = algorithm
        self._communicator: Communicator | None = None
        self._watch: Watch | None = None
        self._steppers: list[Stepper] = []
        self._batches: Batches | None = None
        self._consensus: Consensus | None = None
        self._epoch = -1
        self._checkpoints = WorkerCheckpoints(self)
        self._dumped: dict[str, Any] | None = None
        self._loop: Any = None
        self._begins_before_batch = False
        self._gathered_ragged = False
        self._connector: Any = None

    # -- what callbacks read ------------------------------------------------------------------------------------------

    @property
    def traffic(self) -> Traffic:
        """What this worker sent and waited for since training began."""
        return self._communicator.traffic if self._communicator is not None else Traffic()

    @property
    def last_consensus_distance(self) -> float | None:
        """``(1/n) sum_i ||x_i - mean||^2`` when the models were last averaged for evaluation or a checkpoint."""
        return None if self._consensus is None else self._consensus.distance

    @property
    def staleness(self) -> int:
        """How many versions of the parameters lay between the last gradient's snapshot and its update."""
        return max((stepper.worker.staleness for stepper in self._steppers), default=0)

    @property
    def steps(self) -> int:
        """Steps that this worker has made."""
        return sum(stepper.worker.step for stepper in self._steppers)

    def consensus_distance(self) -> float:
        """``(1/n) sum_i ||x_i - mean||^2`` now. All workers must call it together; it costs one all-reduce."""
        assert self._consensus is not None
        return self._consensus.measure()

    # -- setting up ---------------------------------------------------------------------------------------------------

    def set_world_ranks(self) -> None:
        super().set_world_ranks()
        if self.parallel_devices:  # Lightning calls this in Trainer(): a wrong topology is refused before any process
            self.algorithm = self._configured.resolved(self.num_nodes * self.num_processes)

    def setup_distributed(self) -> None:
        """Meet the other workers; from here on, who is lost is named."""
        try:
            if has_left():  # after an error that user code has caught
                self.set_world_ranks()
                environment = self.cluster_environment
                assert environment is not None
                rejoin_process_group(
                    self._get_process_group_backend(),
                    environment.main_address,
                    environment.main_port,
                    self.global_rank,
                    self.world_size,
                    self.exchange_timeout_seconds,
                    self._timeout,
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

    def setup(self, trainer: Trainer) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            if getattr(trainer, "_val_check_time_interval", None) is not None:
                raise ConfigurationError(
                    f"{type(self).__name__} got a val_check_interval in time, but each worker has its own clock, and "
                    "all must validate together. Use a number of batches, or check_val_every_n_epoch."
                )
            self.check_trainer(trainer)
        with self._named_failures():
            super().setup(trainer)
        if trainer.state.fn == TrainerFn.FITTING:
            self._replace_broadcasts(trainer)
            with self._named_failures():
                self._start(trainer)
            log_run(trainer, described(self.algorithm, self.world_size))

    @abstractmethod
    def check_trainer(self, trainer: Trainer) -> None:
        """Refuse settings of the Trainer that cannot work with this strategy."""

    def configure_ddp(self) -> None:
        """No wrapper: instead of reducing gradients, give all workers the same start."""
        assert self.model is not None
        check_parameters(self.model)
        named = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        named = {name: tensor for name, tensor in named.items() if has_values(tensor)}
        require_equal([_described(*each) for each in named.items()], "parameters or buffers")
        broadcast_from_zero([tensor for name, tensor in named.items() if self._checkpoints.leaves(name, tensor)])

    def _start(self, trainer: Trainer) -> None:
        assert self.cluster_environment is not None
        self._communicator = Communicator(
            self.root_device,
            self.cluster_environment.main_address,
            self.exchange_timeout_seconds,
            self._timeout or timedelta(minutes=30),
            self.shared_memory,
            self._watch,
        )
        self._checkpoints.restore_module()
        assert self.model is not None
        self._batches = Batches(self, trainer, self.model, self._steppers, self._communicator)
        self._batches.begin_with(self._checkpoints.parameters(self.model))
        self._refuse_shared_parameters()
        for index, optimizer in enumerate(self.optimizers):
            self._steppers.append(self._make_stepper(index, optimizer))
        require_equal(self._layout(), "trainable parameters")
        self._checkpoints.restore_steppers(self._steppers)
        self._consensus = Consensus(self.model, self._steppers, self._communicator, trainer.callbacks)  # type: ignore[attr-defined]
        self.connect_workers(self._communicator, self._steppers)

    def _layout(self) -> list[str]:
        """What the models that are exchanged are made of, to compare workers with."""
        assert self.model is not None
        layout = []
        for index, stepper in enumerate(self._steppers):
            names = parameter_names(stepper, self.model)
            parts = [_described(*each) for each in zip(names, stepper.flat.parameters, strict=True)]
            parts.append(f"the memory format {stepper.flat.layout.fingerprint()}")
            layout += [f"{part} (optimizer {index})" for part in parts]
        return layout

    @abstractmethod
    def connect_workers(self, communicator: Communicator, steppers: list[Stepper]) -> None:
        """Open whatever connections the algorithm needs beyond the process groups. All workers together."""

    def _make_stepper(self, index: int, optimizer: Optimizer) -> Stepper:
        assert self._communicator is not None
        assert self._batches is not None
        parameters, guarded = self._batches.parameters(index), self._batches.expects_changes(index)
        return Stepper(self.algorithm, parameters, self._communicator, index, self.seed, guarded)

    def _refuse_shared_parameters(self) -> None:
        """Each gradient is exchanged once, by the optimizer that it is for; parameters may have several optimizers."""
        owners: dict[int, int] = {}
        for index, optimizer in enumerate(self.optimizers if self.algorithm.exchanges_gradients else ()):
            for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
                if owners.setdefault(id(parameter), index) != index:
                    raise ConfigurationError(
                        f"Optimizers {owners[id(parameter)]} and {index} have a parameter in common, of shape "
                        f"{tuple(parameter.shape)}, but {type(self.algorithm).__name__} exchanges the gradient of each "
                        "once. Give every parameter to one optimizer, or use a method that exchanges parameters, such "
                        "as DPSGD."
                    )

    def _replace_broadcasts(self, trainer: Trainer) -> None:
        """Lightning broadcasts rank 0's SIGTERM before every batch (2.5.2 and later): a barrier in each step.

        Here a worker that receives SIGTERM stops after its batch, and the others raise its `SIGTERMException`. What
        comes in the broadcast's place is the beginning of the step, before its batch is loaded.
        """
        loop = trainer.fit_loop.epoch_loop
        if getattr(loop, "_broadcast_sigterm_tensor", None) is not None:
            loop._broadcast_sigterm_tensor = self._before_batch  # type: ignore[method-assign]
            self._loop = loop

    # -- training -----------------------------------------------------------------------------------------------------

    def process_dataloader(self, dataloader: Any) -> Any:
        assert self.lightning_module is not None
        if self.lightning_module.trainer.state.stage == RunningStage.TRAINING:
            # Before the loader's iterator is made: that draws a random number, as it did in the run that goes on.
            self._checkpoints.restore_random_state(in_epoch=False)
        return super().process_dataloader(dataloader)

    def on_train_start(self) -> None:
        assert self.lightning_module is not None
        trainer = self.lightning_module.trainer
        _take_over_sigterm(trainer)
        if self._connector is None:  # and not after a search, which ran in the same loop
            connector = self._connector = trainer._logger_connector
            connector.epoch_end_reached = partial(  # type: ignore[method-assign]
                self._reduce_first, trainer, connector.epoch_end_reached
            )
        self._checkpoints.restore_random_state(in_epoch=False)
        guarded = any(stepper.guarded for stepper in self._steppers)
        self._begins_before_batch = (
            self.begins_before_batch and not guarded and not _may_change_weights_before_batch(trainer)
        )

    def _before_batch(self) -> None:
        """All hooks of the last step have been called; the next step's batch is loaded after this."""
        assert self._batches is not None
        self._batches.settle()
        self._begin_epoch()
        self._checkpoints.restore_random_state(in_epoch=True)
        if self._begins_before_batch:
            self._begin_step()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self._checkpoints.restore_random_state(in_epoch=True)  # Lightning before 2.5.2 calls nothing before a batch
        self._begin_epoch()
        self._begin_step()

    def _begin_epoch(self) -> None:
        """Before the first step of an epoch: callbacks prune at the end of one, each worker by its own weights."""
        assert self.lightning_module is not None
        epoch = self.lightning_module.trainer.current_epoch
        if self._consensus is not None and epoch != self._epoch:
            self._epoch = epoch
            self._consensus.share_masks()

    def _reduce_first(self, trainer: Trainer, epoch_end_reached: Callable[[], None]) -> None:
        """Let all workers reduce an epoch's metrics at its end, before anything else that they do together.

        A progress bar reads them on worker 0 alone, in a callback: earlier than what a module gathers in the same hook.
        """
        epoch_end_reached()
        if trainer.training and not self._interrupted:
            self.before_reductions(trainer)
            trainer.callback_metrics  # noqa: B018

    def before_reductions(self, trainer: Trainer) -> None:
        """All workers are about to reduce what they have logged in an epoch."""

    def _begin_step(self) -> None:
        assert self._batches is not None
        self._check_failure()
        self._batches.begin()

    def optimizer_step(
        self,
        optimizer: Optimizer,
        closure: Callable[[], Any],
        model: LightningModule | Module | None = None,
        **kwargs: Any,
    ) -> Any:
        assert self._batches is not None
        self._check_failure()
        return self._batches.step(optimizer, closure, model=model, **kwargs)

    def apply_update(self, optimizer: Optimizer, closure: Callable[[], Any], **options: Any) -> Any:
        """Let Lightning call the optimizer: gradient scaler, clipping and hooks included."""
        return super().optimizer_step(optimizer, closure, **options)

    @abstractmethod
    def replace_stepper(self, index: int, optimizer: Optimizer, stepper: Stepper) -> None:
        """The optimizer has other parameters than before."""

    @abstractmethod
    def change_optimizers(self) -> None:
        """There is another number of optimizers than before."""

    def on_train_end(self) -> None:
        self.quiesce("the end of training")
        if self._consensus is not None and self.average_at_end and self.world_size > 1:
            self._consensus.enter()
            self._consensus.stay()
        self._checkpoints.finish()
        if self._communicator is not None:
            self._communicator.barrier()  # whoever is done early must not take its connections down

    # -- evaluation on the consensus ----------------------------------------------------------------------------------

    @abstractmethod
    def quiesce(self, what: str = "a meeting of all workers") -> None:
        """Wait until no exchange of any worker is under way. All workers together, for the same thing.

        Args:
            what: they do then, as it is named in messages.
        """

    def on_validation_start(self) -> None:
        if self._consensus is not None and self._steppers:
            self.quiesce("a validation")
            self._consensus.enter()

    def on_validation_end(self) -> None:
        if self._consensus is not None and self._consensus.entered:
            self._consensus.leave()

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The consensus. All workers must call it together, as they do in ``trainer.save_checkpoint``."""
        assert self.lightning_module is not None
        consensus = self._consensus
        if consensus is None or not self._steppers or self._interrupted or consensus.entered:
            self._dumped = self.lightning_module.state_dict()
            return self._dumped
        self.quiesce("a checkpoint")
        consensus.enter()
        try:
            self._dumped = {key: _own(value) for key, value in self.lightning_module.state_dict().items()}
            return self._dumped
        finally:
            consensus.leave()

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        if self._interrupted:  # the others have stopped: save what there is, a plain checkpoint of this worker
            self._checkpoints.save_alone(checkpoint, filepath, storage_options)
            return
        dumped, self._dumped = self._dumped or {}, None
        self._checkpoints.save(checkpoint, filepath, storage_options, dumped)

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        return self._checkpoints.load(checkpoint_path, weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        if not self._steppers:
            super().load_model_state_dict(checkpoint, strict)
            return
        # In the middle of a run, as at the end of a search for a learning rate: nobody may be in the middle of a step.
        assert self._communicator is not None
        with self._named_failures():
            self._communicator.drain()
            self.quiesce()
            for stepper in self._steppers:
                stepper.abandon()
            super().load_model_state_dict(checkpoint, strict)
            self._checkpoints.restore_module()
            for stepper in self._steppers:
                stepper.begin_anew()
            self._checkpoints.restore_steppers(self._steppers)
            self.quiesce()

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        self._checkpoints.load_optimizers(checkpoint, super().load_optimizer_state_dict)

    def remove_checkpoint(self, filepath: str | Path) -> None:
        self._checkpoints.remove(filepath)

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
            if is_everybody(group):
                self._meet("the reduction of a value")
            return super().reduce(tensor, group, reduce_op)

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        return decision if self._interrupted else super().reduce_boolean_decision(decision, all)

    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        """The tensors of all workers, ``[workers, ...]``.

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
        """The tensors of all workers, by rank, which may have unequal numbers of rows."""
        with self._named_failures():
            return gather_rows(tensor, group, sync_grads, None if self.in_a_batch else self._communicator)

    def check_collective(self, name: str) -> None:
        """Refuse what would make all workers wait for each other, where the strategy promises that nobody waits."""

    def _meet(self, what: str) -> None:
        """All workers are about to do something together: make sure that they do the same.

        In a batch, where synchronous workers keep step anyway, it would cost more than what they do.
        """
        if self._communicator is not None and not self.in_a_batch:
            self._communicator.meet(what)

    @property
    def in_a_batch(self) -> bool:
        """Whether Lightning's loop is between the beginning and the end of a training batch."""
        module = self._lightning_module
        trainer = None if module is None else module._trainer
        if trainer is None or trainer.state.stage != RunningStage.TRAINING:
            return False
        progress: Any = trainer.fit_loop.epoch_loop.batch_progress.current
        return bool(progress.processed < progress.ready or progress.completed < progress.started)

    @property
    def _interrupted(self) -> bool:
        """Whether this worker has raised: nobody may wait for the others then.

        Lightning tells callbacks of an exception, some of which save a checkpoint, before it tells the strategy.
        """
        module = self._lightning_module
        trainer = None if module is None else module._trainer
        return trainer is not None and trainer.state.status == TrainerStatus.INTERRUPTED

    # -- the end, good or bad -----------------------------------------------------------------------------------------

    def on_exception(self, exception: BaseException) -> None:
        watch, self._watch = self._watch, None
        if watch is not None:
            if isinstance(exception, RuntimeError) and watch.failure is None and is_transport_error(exception):
                watch.publish(watch.diagnose(exception))
            watch.publish(exception)
            failure = watch.failure
            if failure is not None and watch.failed_rank != self.global_rank and str(failure) != str(exception):
                exception.add_note(str(failure))
        if self._communicator is not None or watch is not None:
            self._checkpoints.abandon()
            if self._communicator is not None:
                self._communicator.close(failed=True)
                self._communicator = None
            elif watch is not None:
                watch.close()
            if self.root_device.type == "cpu":  # a CUDA group would wait for its peers
                leave_process_group()

    def teardown(self) -> None:
        if self._interrupted:
            self._checkpoints.abandon()
        else:
            self._checkpoints.finish()
        if self._batches is not None:
            self._batches.close()
            self._batches = None
        if self._connector is not None:
            self._connector.__dict__.pop("epoch_end_reached", None)
            self._connector = None
        if self._loop is not None:
            del self._loop._broadcast_sigterm_tensor
            self._loop = None
        for stepper in self._steppers:
            stepper.flat.release()
        self._steppers = []
        if self._consensus is not None:
            self._consensus.close()
        self._checkpoints.forget()
        if self._communicator is not None:
            self._communicator.close(failed=self._interrupted)
            self._communicator = None
        elif self._watch is not None:
            self._watch.close()
        self._watch = None
        super().teardown()

    def _check_failure(self) -> None:
        if self._communicator is not None:
            self._communicator.check()

    @contextmanager
    def _named_failures(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            watch = self._watch
            if watch is None or isinstance(error, PeerLost | WorkerFailed) or not is_transport_error(error):
                raise
            failure = watch.diagnose(error)
            watch.publish(failure)
            raise failure from error


def require_equal(layout: list[str], what: str) -> None:
    """Refuse models that differ between workers: broadcasting and averaging them would hang, or mix up parameters."""
    layouts = gather_objects(layout)
    different = [rank for rank, other in enumerate(layouts) if other != layouts[0]]
    if different:
        pairs = zip_longest(layouts[different[0]], layouts[0], fillvalue="nothing")
        theirs, first = next((theirs, first) for theirs, first in pairs if theirs != first)
        raise ConfigurationError(
            f"Workers {different} have other {what} than worker 0: worker {different[0]} has {theirs} where worker 0 "
            f"has {first}. All workers must build the same model and optimizers, in the same order: make sure that "
            "neither depends on the rank."
        )


def _described(name: str, tensor: Tensor) -> str:
    return f"{name} of shape {tuple(tensor.shape)}, {str(tensor.dtype).removeprefix('torch.')}"


def _own(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def _take_over_sigterm(trainer: Trainer) -> None:
    """Lightning's SIGTERM handler broadcasts too, and blocks where the others do not listen: put ours in its place."""
    handlers = getattr(signal.getsignal(signal.SIGTERM), "signal_handlers", [])
    notifier = getattr(trainer._signal_connector, "_sigterm_notifier_fn", None)
    if notifier in handlers:
        handlers[handlers.index(notifier)] = partial(_note_sigterm, trainer)


def _note_sigterm(trainer: Trainer, signum: int, frame: Any) -> None:
    """Take note of a SIGTERM and hand it on to the processes that this one started; the loop stops after its batch."""
    if not trainer.received_sigterm and trainer.strategy.launcher is not None:
        trainer.strategy.launcher.kill(signum)
    trainer._signal_connector.received_sigterm = True


def _may_change_weights_before_batch(trainer: Trainer) -> bool:
    """Whether code that is neither Lightning's nor ours runs between loading a batch and the step, or may end it.

    A module that takes the loader's iterator loads its batches itself, and nobody knows which one is the last.
    """
    if isinstance(trainer.fit_loop._data_fetcher, _DataLoaderIterDataFetcher):
        return True
    hooks = [each.on_train_batch_start for each in (*trainer.callbacks, trainer.lightning_module)]  # type: ignore[attr-defined]
    return any(hook.__module__.partition(".")[0] not in _KNOWN for hook in hooks)

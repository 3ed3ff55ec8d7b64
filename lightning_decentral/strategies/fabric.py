"""The strategy for Fabric: the same methods, on the same engine, in a training loop that the user writes.

It is one class, of what Fabric calls in the order in which it does: hence its length.
"""

from __future__ import annotations

import atexit
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, ModuleList
from torch.optim import LBFGS, Optimizer

from lightning_decentral.algorithms import DPSGD
from lightning_decentral.engine.memory import OptimizerMemory
from lightning_decentral.engine.rest import come_to_rest
from lightning_decentral.engine.stepper import Stepper
from lightning_decentral.errors import ConfigurationError
from lightning_decentral.federated.algorithm import AbstractFederatedAlgorithm
from lightning_decentral.flat import layers_of
from lightning_decentral.protocol import AbstractAlgorithm, AbstractAsynchronousAlgorithm
from lightning_decentral.strategies import fabric_private as private
from lightning_decentral.strategies.alike import (
    described_steppers,
    described_tensors,
    refuse_layers_that_wait,
    refuse_shared_parameters,
    require_equal,
)
from lightning_decentral.strategies.buffers import BufferGossip, Buffers, check_buffers, gossip_of_buffers
from lightning_decentral.strategies.consensus import Consensus
from lightning_decentral.strategies.fabric_checkpoints import FabricCheckpoints
from lightning_decentral.strategies.fabric_steps import Model, Trained, trainable, unwrapped
from lightning_decentral.strategies.gradient_scalers import refuse_gradient_scaler
from lightning_decentral.strategies.meetings import named_failures, publish_exception
from lightning_decentral.strategies.poisoned import Poisoned, check_poisoned, inspect_messages
from lightning_decentral.strategies.strategy import Resume, StartMethod, refuse_open_rounds, refuse_servers
from lightning_decentral.strategies.two_momenta import refuse_two_momenta
from lightning_decentral.tensors import check_parameters, has_values
from lightning_decentral.traffic import Traffic
from lightning_decentral.transport.collectives import broadcast_from_zero
from lightning_decentral.transport.communicator import Communicator
from lightning_decentral.transport.connections import ConnectionSettings
from lightning_decentral.transport.lagging import Lagging
from lightning_decentral.transport.liveness import Watch, meet
from lightning_decentral.transport.rejoining import leave_process_group


def _refuse_what_needs_the_trainer(algorithm: AbstractAlgorithm) -> None:
    """Refuse methods of which a loop of the user's would make something else than the Trainer's does.

    Args:
        algorithm: resolved.

    Raises:
        ConfigurationError: if it has a population of clients, a server that makes updates beside gradients, or one
            model in shared memory.
    """
    name = type(algorithm).__name__
    if isinstance(algorithm, AbstractFederatedAlgorithm) and algorithm.population is not None:
        raise ConfigurationError(
            f"FabricStrategy got {name} with {algorithm.population}, but in a loop of yours nobody gives a worker the "
            "data of the client whose turn it is, nor lets the optimizer and the buffers forget between two of them; "
            f"it needs the Trainer's loop. Use Trainer(strategy=Strategy(...)), or leave clients out: {name}(every=...)"
            ", of which each worker is one client."
        )
    if isinstance(algorithm, AbstractAsynchronousAlgorithm) and algorithm.updates_in_answers:
        raise ConfigurationError(
            f"FabricStrategy got {name}, whose server makes updates while its own loop computes a gradient, and needs "
            "a loop that lets it: the Trainer's. Use the Trainer, or a method without such a server, as ADPSGD or "
            "FedBuff."
        )
    if algorithm.shares_model:
        raise ConfigurationError(
            f"FabricStrategy got {name}, whose workers have one model in memory that they share, and needs a loop that "
            "knows when all of them change its weights: the Trainer's. Use the Trainer, or a method whose workers have "
            "models of their own, as ADPSGD."
        )


class FabricStrategy(private.AbstractFabricStrategy):
    """Trains with a decentralized algorithm in a loop around Fabric, as `Strategy` does in a Trainer.

    A step of the algorithm begins with the first forward pass, with gradients, of a module that ``fabric.setup`` has
    returned, and ends with ``optimizer.step()``; several backward passes before that are one gradient. Each optimizer
    has steps of its own. All workers must make equally many, and the first one before they do anything else that
    differs between them. ``fabric.strategy`` has what is not in Fabric: `consensus` and `average`, which all workers
    call together.

    Args:
        algorithm: the method; `DPSGD` by default. Its topology's defaults are filled in for the number of workers.
        process_group_backend: as in `Strategy`.
        timeout: for what all workers do together, waiting for the slowest included.
        exchange_timeout_seconds: as in `Strategy`.
        start_method: how worker processes are started.
        resume: ``"exact"``: after ``fabric.load`` every worker goes on from its own file. ``"consensus"``: all start
            from the averaged model of the main file.
        worker_checkpoints: whether each worker writes its own state beside what ``fabric.save`` writes.
        seed: of the algorithm's random choices; all workers must have the same.
        shared_memory: as in `Strategy`.
        poisoned: as in `Strategy`.
        buffers: as in `Strategy`; with ``"gossip"`` they are averaged in the steps of the first optimizer.

    Raises:
        ConfigurationError: if an option does not fit the algorithm, or its topology the number of workers (when
            ``Fabric`` is made, before any process starts).
        PeerLost: if a worker is killed or cut off while others need it.
        WorkerFailed: if another worker raised an exception.

    Example:
        >>> from lightning.fabric import Fabric
        >>> from lightning_decentral.algorithms import DiLoCo
        >>> fabric = Fabric(strategy=FabricStrategy(DiLoCo(every=100)), accelerator="cpu", devices=4)
        >>> fabric.strategy.algorithm.every
        100
    """

    def __init__(
        self,
        algorithm: AbstractAlgorithm | None = None,
        *,
        process_group_backend: str | None = None,
        timeout: timedelta = timedelta(minutes=30),
        exchange_timeout_seconds: float = 300.0,
        start_method: StartMethod = "popen",
        resume: Resume = "exact",
        worker_checkpoints: bool = True,
        seed: int = 0,
        shared_memory: bool = True,
        poisoned: Poisoned = "warn",
        buffers: Buffers = "evaluation",
    ) -> None:
        super().__init__(process_group_backend=process_group_backend, timeout=timeout, start_method=start_method)
        algorithm = DPSGD() if algorithm is None else algorithm
        if not isinstance(algorithm, AbstractAlgorithm):
            raise ConfigurationError(
                f"FabricStrategy(algorithm={algorithm!r}): needs an algorithm object, such as "
                "lightning_decentral.algorithms.DPSGD(). A name is for Fabric: Fabric(strategy='dpsgd')."
            )
        if not exchange_timeout_seconds > 0:
            raise ConfigurationError(
                f"FabricStrategy(exchange_timeout_seconds={exchange_timeout_seconds}): needs a positive number."
            )
        if resume not in ("exact", "consensus"):
            raise ConfigurationError(f"FabricStrategy(resume={resume!r}): needs 'exact' or 'consensus'.")
        refuse_open_rounds("FabricStrategy", algorithm)
        check_poisoned("FabricStrategy", poisoned)
        check_buffers("FabricStrategy", algorithm, buffers)
        self.algorithm = self._configured = algorithm
        self.exchange_timeout_seconds = exchange_timeout_seconds
        self.resume = resume
        self.worker_checkpoints = worker_checkpoints
        self.seed = seed
        self.shared_memory = shared_memory
        self.poisoned: Poisoned = poisoned
        self.buffers: Buffers = buffers
        self._clear()

    def _clear(self) -> None:
        self._models: list[Model] = []
        self._optimizers: list[Optimizer] = []
        self._trained: list[Trained] = []
        self._buffers: BufferGossip | None = None
        self._communicator: Communicator | None = None
        self._watch: Watch | None = None
        self._consensus: Consensus | None = None
        self._checkpoints = FabricCheckpoints(self)

    # -- what users read ----------------------------------------------------------------------------------------------

    @property
    def traffic(self) -> Traffic:
        """What this worker sent and waited for since the first step."""
        return self._communicator.traffic if self._communicator is not None else Traffic()

    @property
    def steps(self) -> int:
        """The steps that this worker has made."""
        return sum(trained.stepper.worker.step for trained in self._trained)

    @property
    def last_consensus_distance(self) -> float | None:
        """The value of ``(1/n) sum_i ||x_i - mean||^2`` when the models were last averaged."""
        return None if self._consensus is None else self._consensus.distance

    @contextmanager
    def consensus(self) -> Iterator[None]:
        """Let the models be the mean of all workers' in the ``with`` block, and each worker's own after it.

        All workers together. For evaluation: no step is made inside, and what the block changes in a parameter counts.

        Raises:
            ConfigurationError: if workers meet for different things.
        """
        with self._at_rest("an evaluation") as consensus:
            if consensus is not None:
                consensus.enter()
            try:
                yield
            finally:
                if consensus is not None:
                    consensus.leave()

    def average(self) -> None:
        """Let every worker's own models become the mean of all workers', as at the end of training.

        All workers together.
        """
        with self._at_rest("an average") as consensus:
            if consensus is not None:
                consensus.enter()
                consensus.stay()

    # -- setting up ---------------------------------------------------------------------------------------------------

    def know_ranks(self) -> None:
        """Refuse a wrong topology when ``Fabric`` is made, before any process starts."""
        if self.parallel_devices:
            size = self.num_nodes * self.num_processes
            self.algorithm = self._configured.on_hosts(self.num_processes).resolved(size)
            check_buffers("FabricStrategy", self.algorithm, self.buffers)
            refuse_servers(self.algorithm, size)
            _refuse_what_needs_the_trainer(self.algorithm)

    def know_others(self) -> None:
        """Watch the other workers from here on."""
        if self.world_size > 1 and self._watch is None:
            assert self.cluster_environment is not None
            address = self.cluster_environment.main_address
            self._watch = meet(address, self.global_rank, self.world_size, self.exchange_timeout_seconds)
            # Whatever ends the script ends the run: Fabric calls nothing at the end.
            atexit.register(self._leave)
            sys.excepthook = partial(self._note_uncaught, sys.excepthook)

    def setup_module(self, module: Module) -> Module:  # type: ignore[override]  # no wrapper of torch's
        """Wrap a module: its forward pass begins steps, and nothing reduces gradients. All workers start alike."""
        self._refuse_late("a module")
        check_parameters(module)
        if isinstance(self.algorithm, AbstractAsynchronousAlgorithm):
            refuse_layers_that_wait("FabricStrategy", module)
        named = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        named = {name: tensor for name, tensor in named.items() if has_values(tensor)}
        with named_failures(self._watch):
            require_equal(described_tensors(named.items()), "parameters or buffers")
            broadcast_from_zero(list(named.values()))
        model = Model(module, self._begin)
        self._models.append(model)
        return model

    def setup_optimizer(self, optimizer: Optimizer) -> Optimizer:
        self._refuse_late("an optimizer")
        self._optimizers.append(optimizer)
        return optimizer

    def _refuse_late(self, what: str) -> None:
        if self._communicator is not None:
            raise ConfigurationError(
                f"fabric.setup got {what} after the first step, but the workers have agreed on what they exchange "
                "before it. Set up all modules and optimizers before the first forward pass."
            )

    def start(self) -> None:
        """Meet the others with what was set up, unless that is done. All workers together."""
        if self._communicator is not None or not self._optimizers:
            return
        algorithm = self.algorithm
        refuse_gradient_scaler(algorithm, self.precision)
        refuse_two_momenta(algorithm, self._optimizers)
        if algorithm.exchanges_gradients:
            refuse_shared_parameters(algorithm, self._optimizers)
        assert self.cluster_environment is not None
        settings = ConnectionSettings(
            self.root_device,
            self.cluster_environment.main_address,
            self.exchange_timeout_seconds,
            private.timeout_of(self) or timedelta(minutes=30),
            self.shared_memory,
            self._watch,
        )
        self._communicator = communicator = Communicator(settings)
        if self.world_size > 1 and not isinstance(algorithm, AbstractAsynchronousAlgorithm):
            communicator.lagging = Lagging(communicator.store, self.global_rank, self.world_size)
        known: set[int] = set()
        for index, optimizer in enumerate(self._optimizers):
            parameters = [p for p in trainable(optimizer) if id(p) not in known]
            known.update(map(id, parameters))
            guarded = isinstance(optimizer, LBFGS) and not algorithm.exchanges_gradients
            layers = layers_of(ModuleList(model.module for model in self._models), parameters)
            stepper = Stepper(algorithm, parameters, communicator, index, self.seed, guarded, layers)
            stepper.worker.memory = OptimizerMemory(partial(getattr, optimizer, "state"), parameters)
            owned = set(map(id, parameters))
            models = [model for model in self._models if any(id(p) in owned for p in model.parameters())]
            self._trained.append(Trained(optimizer, stepper, models))
        steppers = [trained.stepper for trained in self._trained]
        modules = [model.module for model in self._models]
        module = modules[0] if len(modules) == 1 else ModuleList(modules)
        require_equal(described_steppers(steppers, module), "trainable parameters")
        if self.buffers == "gossip" and self.world_size > 1:
            self._buffers = gossip_of_buffers(module, algorithm, communicator, self.seed)
        self._consensus = Consensus(module, steppers, communicator, local_buffers=self.buffers == "local")
        self._checkpoints.attach(module, steppers, self._consensus, communicator)
        if self.world_size > 1:
            inspect_messages(self.poisoned, module, communicator, steppers)
        if isinstance(algorithm, AbstractAsynchronousAlgorithm):
            communicator.open_edges(algorithm, [stepper.callee for stepper in self._averaging])

    @property
    def _averaging(self) -> list[Stepper]:
        """All that averages something: the optimizers' steppers, and that of the buffers."""
        beside = None if self._buffers is None else self._buffers.stepper
        return [*(trained.stepper for trained in self._trained), *([] if beside is None else [beside])]

    # -- steps --------------------------------------------------------------------------------------------------------

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _begin(self, model: Model) -> None:
        """Begin, with a forward pass that has gradients, a step of each of the model's optimizers that is in none."""
        with named_failures(self._watch):
            self.start()
        if self._communicator is None or (self._consensus is not None and self._consensus.entered):
            return
        self._communicator.check()
        for trained in self._trained:
            if model in trained.models and not trained.stepper.active:
                trained.begin()
                if self._buffers is not None and trained is self._trained[0]:
                    self._buffers.begin(trained.stepper.worker.step)

    def optimizer_step(self, optimizer: Any, **kwargs: Any) -> Any:
        with named_failures(self._watch):
            self.start()
        trained = next((each for each in self._trained if each.optimizer is optimizer), None)
        if trained is None or not trained.stepper.flat.parameters:
            return super().optimizer_step(optimizer, **kwargs)
        assert self._communicator is not None
        assert self._consensus is not None
        self._communicator.check()
        if self._consensus.entered:
            raise ConfigurationError(
                f"{type(optimizer).__name__}.step was called inside `with fabric.strategy.consensus():`, where the "
                "models are the mean of all workers. Make steps outside of it."
            )
        output = trained.step(partial(super().optimizer_step, optimizer), kwargs.pop("closure", None), **kwargs)
        if self._buffers is not None and trained is self._trained[0]:
            self._buffers.finish()
        return output

    def clip_gradients_norm(self, module: Module, optimizer: Optimizer, *args: Any, **kwargs: Any) -> Tensor:
        self._exchange_gradient(optimizer)
        return super().clip_gradients_norm(module, optimizer, *args, **kwargs)

    def clip_gradients_value(self, module: Module, optimizer: Optimizer, *args: Any, **kwargs: Any) -> None:
        self._exchange_gradient(optimizer)
        super().clip_gradients_value(module, optimizer, *args, **kwargs)

    def _exchange_gradient(self, optimizer: Optimizer) -> None:
        """Let a method that exchanges gradients do so before they are clipped: what is clipped is what is applied."""
        for trained in self._trained:
            if trained.optimizer is optimizer and trained.stepper.reads_gradients:
                trained.enter()

    # -- meetings -----------------------------------------------------------------------------------------------------

    @contextmanager
    def _at_rest(self, what: str) -> Iterator[Consensus | None]:
        """Hold all workers between two steps, for something that they do together."""
        with named_failures(self._watch):
            self.start()
            if self._communicator is None:
                yield None
                return
            with self._meeting(what):
                come_to_rest(self._communicator, self._averaging, what)
            for trained in self._trained:
                trained.stepper.settle()
            if self._buffers is not None:
                self._buffers.settle()
            yield self._consensus

    def _meeting(self, what: str) -> AbstractContextManager[None]:
        """Let others know, as long as the block lasts, that this worker meets all others."""
        lagging = None if self._communicator is None else self._communicator.lagging
        return nullcontext() if lagging is None else lagging.meeting(what)

    @contextmanager
    def _among_all(self, what: str, group: Any = None) -> Iterator[None]:
        """Do something with all workers: whoever waits in a step for one that is here is told that it does not come."""
        with named_failures(self._watch), self._meeting(what):
            of_all = group is None or group.size() == self.world_size  # at an end all workers are, equally often
            if self._communicator is None or not of_all:
                yield
                return
            with self._communicator.standstill.at_the_end():
                yield

    def barrier(self, *args: Any, **kwargs: Any) -> None:
        with self._among_all("a barrier"):
            if self._communicator is not None:
                self._communicator.barrier("a barrier")
            else:
                super().barrier(*args, **kwargs)

    def all_reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        with self._among_all("fabric.all_reduce", group):
            return super().all_reduce(tensor, group, reduce_op)

    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        with self._among_all("fabric.all_gather", group):
            return super().all_gather(tensor, group, sync_grads)

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        with self._among_all("fabric.broadcast"):
            return super().broadcast(obj, src)

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def save_checkpoint(
        self, path: str | Path, state: dict[str, Any], storage_options: Any = None, filter: Any = None
    ) -> None:
        """Write the consensus, and each worker's own state beside it. All workers together."""
        with self._at_rest("a checkpoint"):
            convert = partial(self.converted, state, filter or {})
            self._checkpoints.save(path, convert, storage_options)

    def load_checkpoint(
        self, path: str | Path, state: Any = None, strict: bool = True, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Give every worker its own state, or the consensus. All workers together."""
        load: Callable[..., dict[str, Any]] = super().load_checkpoint
        if not state or not self._optimizers:
            return load(path, state, strict, weights_only)
        with self._at_rest("the loading of a checkpoint"):
            remainder = self._checkpoints.load(path, partial(load, state=state, strict=strict), weights_only)
            if self._buffers is not None:
                self._buffers.begin_anew()
            return remainder

    def get_module_state_dict(self, module: Module) -> dict[str, Any]:
        return super().get_module_state_dict(unwrapped(module))

    def load_module_state_dict(self, module: Module, state_dict: dict[str, Any], strict: bool = True) -> None:
        super().load_module_state_dict(unwrapped(module), state_dict, strict)

    # -- the end, good or bad -----------------------------------------------------------------------------------------

    def teardown(self) -> None:
        """End the run: let go of the models, and of the other workers. All workers together."""
        self._leave()
        super().teardown()

    def _leave(self) -> None:
        """End the run once all workers have come to its end."""
        atexit.unregister(self._leave)
        if self._watch is None and self._communicator is None:
            return
        try:
            with named_failures(self._watch):
                if self._communicator is not None:
                    come_to_rest(self._communicator, self._averaging, "the end of the run")
        except BaseException as error:
            self._fail(error)
            raise
        self._close(failed=False)

    @contextmanager
    def leaving(self) -> Iterator[None]:
        """Tell the others how a process that was started for the run ends."""
        try:
            yield
        except BaseException as error:
            self._fail(error)
            raise
        self._leave()

    def _note_uncaught(
        self,
        before: Callable[..., Any],
        kind: type[BaseException],
        error: BaseException,
        trace: TracebackType | None,
    ) -> None:
        """Tell the others what ends this script."""
        self._fail(error)
        before(kind, error, trace)

    def _fail(self, error: BaseException) -> None:
        if self._watch is not None:
            publish_exception(self._watch, error, self.global_rank)
            self._close(failed=True)
            if self.root_device.type == "cpu":  # a CUDA group would wait for its peers
                leave_process_group()

    def _close(self, failed: bool) -> None:
        self._checkpoints.close(failed)
        for trained in self._trained:
            trained.close()
        if self._buffers is not None:
            self._buffers.release()
        if self._consensus is not None:
            self._consensus.close()
        if self._communicator is not None:
            self._communicator.close(failed)
        elif self._watch is not None:
            self._watch.close()
        self._clear()

"""Virtual workers: any number of them, in one process, on the user's own LightningModule.

The file is long because each hook of Lightning decides which worker's model comes next; what is put there is in
`strategies.virtual`.
"""

from __future__ import annotations

import copy
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.accelerators import CUDAAccelerator
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.trainer.states import RunningStage, TrainerFn
from torch import Tensor
from torch.nn import Module, Parameter
from torch.optim import Optimizer

from lightning_decentral.algorithms import ADPSGD, FedAvg
from lightning_decentral.engine.memory import OptimizerMemory
from lightning_decentral.engine.sampling import drawn, sampled
from lightning_decentral.errors import ConfigurationError, ProtocolError
from lightning_decentral.federated.algorithm import AbstractFederatedAlgorithm
from lightning_decentral.federated.clients import Clients
from lightning_decentral.flat import AbstractVector, FlatParameters, Vector, layers_of
from lightning_decentral.protocol import AbstractAlgorithm, Gradient, LocalStep
from lightning_decentral.simulation.beside import Beside
from lightning_decentral.simulation.cluster import Cluster
from lightning_decentral.simulation.cluster_file import ClusterFile
from lightning_decentral.simulation.simulator import Demands, Simulator
from lightning_decentral.strategies.buffers import Buffers
from lightning_decentral.strategies.clients import (
    ROUNDS,
    Rounds,
    loaded_worker,
    require_same,
    resume_worker,
    saved_worker,
    with_clients,
)
from lightning_decentral.strategies.consensus import estimated_distance, model_at
from lightning_decentral.strategies.files import whole
from lightning_decentral.strategies.lightning_private import only_forward
from lightning_decentral.strategies.loops import set_length
from lightning_decentral.strategies.records import described, log_run
from lightning_decentral.strategies.strategy import refuse_open_rounds
from lightning_decentral.strategies.two_momenta import refuse_two_momenta
from lightning_decentral.strategies.updates import prepare_hooks
from lightning_decentral.strategies.updates_beside import refuse_norms_of_shards, refuse_other_parameters
from lightning_decentral.strategies.virtual import VirtualModels
from lightning_decentral.strategies.virtual_buffers import VirtualBuffers, check_virtual_buffers
from lightning_decentral.tensors import check_parameters
from lightning_decentral.traffic import Traffic
from lightning_decentral.worker import Worker

DEFAULT_WORKERS = 8  # when neither the argument nor a cluster file says how many


class SimulatedStrategy(SingleDeviceStrategy):
    """Trains with ``workers`` virtual workers in one process, in the order of a virtual clock.

    Every batch of the training loader goes to the virtual worker whose gradient is due next, so that workers share an
    epoch according to their simulated speed. Each has its own parameters, optimizer state, buffers (BatchNorm), and
    parameters that no optimizer owns (a momentum teacher); evaluation, checkpoints, and what happens between two epochs
    use their mean. Logs ``virtual_seconds`` and ``virtual_bytes`` with every step.

    With ``clients`` it is federated learning: one worker, which is the clients of a round one after the other. An epoch
    is a round then; see `Clients`.

    Args:
        algorithm: the method; `ADPSGD` by default, or `FedAvg` with clients.
        workers: how many virtual workers. ``None``: as many as the cluster file has hosts, or 8 without a file.
        cluster: how long computing and sending take: a `Cluster`, or the path of a cluster file, which has to say how
            long a gradient takes (``compute``); see `ClusterFile`.
        seed: of the workers' random choices and the cluster's jitter.
        clients: a population of clients, or how many there are, in the place of ``workers`` and ``cluster``. Their data
            is that of a `ClientData`, or the loader's, divided evenly.
        per_round: how many of them take part in each round, where ``clients`` is a number.
        buffers: ``"evaluation"``: each virtual worker has its own, and evaluation the means. ``"gossip"``: they travel
            with the averages of the models, too, as under `Strategy`; with methods whose workers wait for each other.

    Cost:
        With clients: what the method keeps on one worker, however many clients there are; and a vector of each one that
        has taken part, if the method is stateful. Without: one copy of the model, its optimizer state and the buffers
        that it changes per virtual worker (two with an asynchronous algorithm), and its pending gradient. Each batch
        copies one model, and compares it.

    Raises:
        ConfigurationError: with manual optimization, several optimizers, or a gradient scaler; if the algorithm does
            not fit the number of workers; if the cluster file cannot be read, or has another number of hosts.

    A checkpoint holds the consensus; resuming starts all virtual workers from it. With clients it holds all that the
    method remembers, and resuming is exact.

    Example:
        >>> strategy = SimulatedStrategy(workers=64, cluster=Cluster(compute_seconds=0.25, slowdown={3: 10.0}))
        >>> from lightning_decentral.algorithms import FedMom
        >>> strategy = SimulatedStrategy(FedMom(), clients=1000, per_round=20)
    """

    def __init__(
        self,
        algorithm: AbstractAlgorithm | None = None,
        workers: int | None = None,
        cluster: Cluster | str | Path | None = None,
        seed: int = 0,
        clients: Clients | int | None = None,
        per_round: int | None = None,
        buffers: Buffers = "evaluation",
    ) -> None:
        super().__init__(device="cpu")
        if clients is not None:
            algorithm = with_clients(
                "SimulatedStrategy", FedAvg() if algorithm is None else algorithm, clients, per_round
            )
        self._population = algorithm.population if isinstance(algorithm, AbstractFederatedAlgorithm) else None
        if self._population is not None:
            if workers not in (None, 1) or cluster is not None:
                raise ConfigurationError(
                    f"SimulatedStrategy got workers={workers} and cluster={cluster!r} with {self._population}, needs "
                    "neither: one worker is all clients in turn, whose speeds are in Clients(step_seconds=, "
                    "speed_spread=). Leave them out."
                )
            workers = 1
        if workers is not None and workers < 1:
            raise ConfigurationError(f"SimulatedStrategy(workers={workers}): needs at least 1.")
        if isinstance(cluster, str | Path):
            file = ClusterFile.read(cluster)
            if workers not in (None, len(file.hosts)):
                raise ConfigurationError(
                    f"SimulatedStrategy(workers={workers}, cluster={str(cluster)!r}): the file has {len(file.hosts)} "
                    "hosts, and needs one worker for each. Leave workers out, or change the number of hosts."
                )
            workers, cluster = len(file.hosts), file.model()
        workers = DEFAULT_WORKERS if workers is None else workers
        self.cluster = Cluster() if cluster is None else cluster
        self.cluster.check_ranks(workers)
        algorithm = ADPSGD() if algorithm is None else algorithm
        refuse_open_rounds("SimulatedStrategy", algorithm)
        self.algorithm = algorithm.on_hosts(self.cluster.workers_per_site).resolved(workers)
        check_virtual_buffers(self.algorithm, buffers)
        self.workers = workers
        self.buffers = buffers
        self.seed = seed
        self._simulator: Simulator | None = None
        self._models: VirtualModels | None = None
        self._demands: Demands | None = None
        self._due: Worker | None = None
        self._gradients: list[list[Tensor | None]] = []
        self._optimizer_states: list[Any] = []
        self._unseen: deque[int] = deque()  # who was updated, and not shown to user code since
        self._seen: Vector | None = None  # the weights in a forward pass: a copy, for they may be on their way
        self._memory: Vector | None = None  # for that
        self._changes: dict[int, Vector] = {}  # by how much it did, by rank
        self._moments: _Moments | None = None
        self._optimizer: Optimizer | None = None
        self._updated = False
        self._staleness = 0
        self._stale: dict[int, Counter[int]] = {}  # by rank: how many updates were how stale
        self._goes_back = False  # whether a checkpoint was loaded in the middle of the run
        self._earlier_seconds = 0.0  # of the virtual clock, until then
        self._earlier_traffic: list[Traffic] = []
        self._last_reports: list[Mapping[str, Any]] = []  # of the run that has ended
        self._hook: Any = None
        self._rounds: Rounds | None = None
        self._buffers: VirtualBuffers | None = None
        self._resumed: Mapping[str, Any] | None = None  # what a checkpoint has of rounds

    # -- what callbacks read ------------------------------------------------------------------------------------------

    @property
    def virtual_seconds(self) -> float:
        """The virtual clock."""
        if self._rounds is not None:
            return self._rounds.seconds
        return self._earlier_seconds + self._simulator.seconds if self._simulator is not None else 0.0

    @property
    def traffic(self) -> Traffic:
        """What all virtual workers together sent, and waited for."""
        total = Traffic() if self._rounds is None else Traffic(bytes_sent=int(self._rounds.bytes))
        for one in self._earlier_traffic + (self._simulator.traffic if self._simulator is not None else []):
            total.bytes_sent += one.bytes_sent
            total.messages += one.messages
            total.exchanges += one.exchanges
            total.calls_answered += one.calls_answered
            total.exposed_seconds += one.exposed_seconds
        return total

    @property
    def staleness(self) -> int:
        """The staleness of the last update, in versions of the parameters."""
        return self._staleness

    def stalenesses(self) -> dict[int, Counter[int]]:
        """Return how many updates of which virtual worker were how stale, by rank."""
        return {rank: Counter(self._stale[rank]) for rank in sorted(self._stale)}

    @property
    def report(self) -> Mapping[str, Any]:
        """What the algorithm tells of the run so far: see `AbstractAlgorithm.report`."""
        return next(iter(self.reports), {})

    @property
    def reports(self) -> list[Mapping[str, Any]]:
        """What all virtual workers tell that tell something, as the servers of a model in shards, by rank."""
        workers = self._simulator.workers if self._simulator is not None else []
        reports = [self.algorithm.report(worker) for worker in workers]
        return copy.deepcopy([report for report in reports if report] or self._last_reports)

    @property
    def steps(self) -> int:
        """The steps that all virtual workers that train have made together."""
        workers = self._simulator.workers if self._simulator is not None else []
        return sum(worker.step for worker in workers if self.algorithm.trains(worker.rank))

    @property
    def due_rank(self) -> int:
        """The rank of the virtual worker whose gradient is computed now; 0 before training."""
        return 0 if self._due is None else self._due.rank

    @property
    def last_consensus_distance(self) -> float | None:
        """The value of ``(1/n) sum_i ||x_i - mean||^2`` now."""
        return self._simulator.consensus_distance() if self._simulator is not None else None

    def consensus_distance(self) -> float:
        """Compute ``(1/n) sum_i ||x_i - mean||^2`` now."""
        return self._simulator.consensus_distance() if self._simulator is not None else 0.0

    def estimate_consensus_distance(self, sample: int) -> tuple[float, float]:
        """Estimate that from so many coordinates, with its standard error."""
        living = self._simulator.living() if self._simulator is not None else []
        if not living:
            return 0.0, 0.0
        x, shards = living[0], self.algorithm.shards
        places = drawn(x.numel, sample, self.steps)
        values = torch.stack([sampled([x], places) for x in living])
        pieces = [x] if shards == 1 else x.slices(shards, x.parameter_borders)
        return estimated_distance(values, model_at(places, values, range(len(living)), pieces), x.numel)

    # -- setting up ---------------------------------------------------------------------------------------------------

    @property
    def root_device(self) -> torch.device:
        return torch.device("cuda", 0) if isinstance(self.accelerator, CUDAAccelerator) else torch.device("cpu")

    def setup(self, trainer: Trainer) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            assert self.model is not None
            check_parameters(self.model)
        super().setup(trainer)
        if trainer.state.fn != TrainerFn.FITTING:
            return
        self._moments = _Moments(self, trainer.callbacks)  # type: ignore[attr-defined]
        assert self.lightning_module is not None
        if not self.lightning_module.automatic_optimization or len(self.optimizers) != 1:
            raise ConfigurationError(
                "SimulatedStrategy needs automatic optimization with one optimizer, got "
                f"{len(self.optimizers)} and automatic_optimization={self.lightning_module.automatic_optimization}. "
                "Use GossipStrategy with real workers for it."
            )
        if getattr(self.precision_plugin, "scaler", None) is not None:
            raise ConfigurationError(
                "SimulatedStrategy cannot share one gradient scaler among virtual workers, got precision='16-mixed'. "
                "Use 'bf16-mixed' or '32-true'."
            )
        refuse_two_momenta(self.algorithm, self.optimizers)
        refuse_norms_of_shards(self.algorithm, trainer)
        if self._population is not None:
            assert isinstance(self.algorithm, AbstractFederatedAlgorithm)
            self._rounds = Rounds(trainer, self.algorithm, 0, 1)
            if self._resumed is not None:
                self._rounds.load_state_dict(self._resumed["rounds"])
        log_run(trainer, described(self.algorithm, self.workers))

    @property
    def rounds(self) -> Rounds | None:
        """The rounds of a run with clients."""
        return self._rounds

    def process_dataloader(self, dataloader: Any) -> Any:
        dataloader = super().process_dataloader(dataloader)
        assert self.lightning_module is not None
        if self._rounds is None or self.lightning_module.trainer.state.stage != RunningStage.TRAINING:
            return dataloader
        dataloader = self._rounds.follow(dataloader)
        self.algorithm = self._rounds.algorithm
        return dataloader

    def on_train_start(self) -> None:
        # Only now: a resumed run has its optimizer state by now, and every virtual worker starts with it.
        self._earlier_seconds, self._earlier_traffic = 0.0, []
        if self._rounds is not None:
            self._rounds.begin()
        self._begin()

    def _begin(self, go_on: bool = False) -> None:
        """Let all virtual workers begin with the module and the optimizer as they are.

        Args:
            go_on: whether each keeps its own model and optimizer state, and only the parameters or the optimizer are
                others: the algorithm begins anew.
        """
        assert self.model is not None
        self._goes_back = False
        optimizer = self.optimizers[0]
        before, simulated = self._models, self._simulator
        if before is not None and simulated is not None:
            before.settle()
            simulated.close()
            self._earlier_seconds += simulated.seconds
            self._earlier_traffic += simulated.traffic
        known = [] if before is None else before.flat.parameters
        parameters = [*known, *_new_parameters(optimizer, known)]
        if known and len(parameters) > len(known):
            refuse_other_parameters(self.algorithm, optimizer)
        flat = FlatParameters(parameters, layers_of(self.model, parameters))
        start = [flat.x, *(flat.x.clone() for _ in range(self.workers - 1))]
        beside = None
        if self.buffers == "gossip":
            averages = self.algorithm.for_buffers()
            assert averages is not None
            self._buffers = VirtualBuffers(self.model, self.workers)
            beside = Beside(averages, self._buffers.vectors, self._buffers.add, self._buffers.give)
        self._simulator = Simulator(self.algorithm, start, self.cluster, self.seed, beside)
        for worker in self._simulator.workers:
            worker.read_gradient = lambda rank=worker.rank: self._read_gradient(rank)  # type: ignore[misc]
            worker.memory = OptimizerMemory(lambda rank=worker.rank: self._optimizer_states[rank], parameters)  # type: ignore[misc]
        self._models = VirtualModels(self.model, flat, self._simulator.workers, self.algorithm.trains)
        if go_on and before is not None and simulated is not None:
            self._models.take_over(before)
            for mine, theirs in zip(self._simulator.workers, simulated.workers, strict=True):
                trains = self.algorithm.trains(mine.rank)
                made = [each.step for each in simulated.workers if self.algorithm.trains(each.rank)]
                mine.step = max(made) if trains else theirs.step
                mine.version = theirs.version
                mine.rng.setstate(theirs.rng.getstate())
        if self._buffers is not None:
            self._buffers.follow(self._models)
        self._gradients = [[None] * len(flat.parameters) for _ in range(self.workers)]
        self._unseen, self._seen, self._memory, self._changes = deque(), None, None, {}
        if not go_on or optimizer is not self._optimizer:
            self._optimizer_states = [_copy_state(optimizer) for _ in range(self.workers)]
            if self._hook is not None:
                self._hook.remove()
            prepare_hooks(optimizer)
            self._hook = optimizer.register_step_post_hook(self._note_update)
            self._optimizer = optimizer
        if self._rounds is not None:
            (worker,) = self._simulator.workers
            saved, self._resumed = self._resumed, None
            other = None if saved is None else loaded_worker(worker, saved, self.root_device)
            resume_worker(worker, self._rounds, other)
        self._demands = self._simulator.demands()
        self._due = self._next_gradient(next(self._demands))

    def _note_update(self, *_: Any) -> None:
        self._updated = True

    def _views_of(self, gradient: AbstractVector, request: LocalStep, worker: Worker) -> list[Tensor | None]:
        """Return a gradient that the algorithm brings, as that of each parameter."""
        assert self._models is not None
        assert isinstance(gradient, Vector)
        target = request.target(worker)
        assert isinstance(target, Vector)
        if gradient.form != target.form:  # wider than the parameters
            gradient = target.empty_like().copy_(gradient)
        return self._models.flat.views_of(gradient, request.shard)

    def _read_gradient(self, rank: int) -> Vector:
        assert self._models is not None
        layout = self._models.flat.layout
        vector = layout.new_vector(self.root_device)
        views = layout.views(vector)
        for view, gradient in zip(views, self._gradients[rank], strict=True):
            if gradient is not None:
                view.copy_(gradient.to_dense() if gradient.layout is not torch.strided else gradient)
        self._gradients[rank] = list(views)
        return vector

    # -- training -----------------------------------------------------------------------------------------------------

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.show_due()

    def show_due(self) -> None:
        """Let the module be the worker whose gradient is due, where that is taken."""
        assert self._simulator is not None
        assert self._models is not None
        assert self.lightning_module is not None
        optimizer = self.optimizers[0]
        if self._only_forward:
            self.show_consensus()
            return
        if self._models.shown is None:
            self._models.settle()
        taken = any(optimizer.state is each for each in self._optimizer_states)
        if not taken or (not optimizer.state and any(self._optimizer_states)):  # user code has loaded or cleared it
            self._optimizer_states = [_copy_state(optimizer) for _ in range(self.workers)]
        grown = optimizer is not self._optimizer or _new_parameters(optimizer, self._models.flat.parameters)
        if self._goes_back:  # the optimizer has its state by now
            self._begin()
        elif grown or self._models.replaced:  # what is on its way belongs to other models
            self._begin(go_on=True)
        models, due = self._models, self._due
        assert due is not None
        assert isinstance(due.snapshot, Vector)
        if self._rounds is not None:
            models.show(due.rank, due.snapshot)
            batch = self.lightning_module.trainer.fit_loop.epoch_loop.batch_idx
            self._rounds.before_batch(batch, self.lightning_module, [optimizer])
        if self._seen is None or models.shown != due.rank:
            models.show(due.rank, due.snapshot)
            self._memory = due.snapshot.empty_like() if self._memory is None else self._memory
            self._seen = self._memory.copy_(due.snapshot)
        models.show(due.rank, self._seen)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        output = super().training_step(*args, **kwargs)
        assert self.lightning_module is not None
        if self._rounds is not None:  # they change with rounds, which a callback reports
            return output
        self.lightning_module.log_dict(
            {"virtual_seconds": self.virtual_seconds, "virtual_bytes": float(self.traffic.bytes_sent)},
            on_step=True,
            on_epoch=False,
        )
        return output

    def optimizer_step(
        self,
        optimizer: Optimizer,
        closure: Callable[[], Any],
        model: LightningModule | Module | None = None,
        **kwargs: Any,
    ) -> Any:
        assert self._due is not None
        assert self._models is not None
        assert self._simulator is not None
        assert self._demands is not None
        assert self.lightning_module is not None
        if self._only_forward:
            return super().optimizer_step(optimizer, closure, model, **kwargs)  # there is no gradient, and no step
        due, models, parameters = self._due, self._models, self._models.flat.parameters
        result = closure()
        self._gradients[due.rank] = [parameter.grad for parameter in parameters]
        self._note_changes(due)
        if self._buffers is not None:
            self._buffers.collect(due.rank)
        output = None
        request, worker = self._demands.send(None)
        while not isinstance(request, Gradient):
            target = worker.x if request.at is None else request.at  # of which one shard is updated, perhaps
            assert isinstance(target, Vector)
            models.show(worker.rank, target)
            changes = self._changes.pop(worker.rank, None)
            if changes is not None:
                target.add_(changes)
            self._staleness = worker.staleness
            self._stale.setdefault(worker.rank, Counter())[worker.staleness] += 1
            applied = (
                self._gradients[worker.rank]
                if request.gradient is None
                else self._views_of(request.gradient, request, worker)
            )
            for parameter, gradient in zip(parameters, applied, strict=True):
                was_sparse = parameter.grad is not None and parameter.grad.layout is not torch.strided
                dense = gradient is not None and gradient.layout is torch.strided
                parameter.grad = gradient.to_sparse(1) if was_sparse and dense and gradient is not None else gradient
            optimizer.state = self._optimizer_states[worker.rank]
            evaluated: list[bool] = []
            self._updated = False
            output = super().optimizer_step(optimizer, partial(_evaluate, result, evaluated), model, **kwargs)
            if not evaluated:
                raise MisconfigurationException(
                    "The closure hasn't been executed: the optimizer did not call the closure that its step was given. "
                    "Call it there, as torch's own optimizers do; in your `optimizer_step` hook, pass "
                    "`optimizer_closure` on to `optimizer.step`."
                )
            assert isinstance(worker.x, Vector)
            models.show(worker.rank, worker.x)
            self._unseen.append(worker.rank)
            before, steps = worker, worker.step
            request, worker = self._demands.send(self._updated)
            if before.step > steps:
                self._gradients[before.rank] = [None] * len(parameters)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None
        self._due = worker
        self._show_updated(due.rank, worker.rank)
        return output

    @property
    def _only_forward(self) -> bool:
        """Whether batches are for batch normalization alone, as after stochastic weight averaging."""
        assert self.lightning_module is not None
        return only_forward(self.lightning_module.trainer)

    def _note_changes(self, due: Worker) -> None:
        """Keep for the update by how much user code has changed weights in the forward pass, while they are sent."""
        seen, self._seen = self._seen, None
        assert seen is not None
        assert self._models is not None
        assert isinstance(due.snapshot, Vector)
        self._models.flat.collect()
        if not all(torch.equal(now, then) for now, then in zip(seen.buffers, due.snapshot.buffers, strict=True)):
            self._changes[due.rank] = seen.clone().add_(due.snapshot, alpha=-1.0)

    def _show_updated(self, due: int, next_due: int) -> None:
        """Let user code at the end of a batch see a worker that was updated and not seen since.

        Each is seen once between its update and its next gradient, as a real one is: what user code does to its weights
        then (a constraint, a moving average) is done to all.
        """
        assert self._models is not None
        assert self._simulator is not None
        unseen = self._unseen
        rank = next((each for each in (next_due, due) if each in unseen), unseen[0] if unseen else due)
        self._unseen = deque(each for each in unseen if each != rank)
        x = self._simulator.workers[rank].x
        assert isinstance(x, Vector)
        self._models.show(rank, x)

    def _next_gradient(self, demand: tuple[Any, Worker]) -> Worker:
        request, worker = demand
        if not isinstance(request, Gradient):
            raise ProtocolError(
                f"{type(self.algorithm).__name__} got `LocalStep` of worker {worker.rank} before any worker has "
                "computed a gradient; SimulatedStrategy needs a batch first. Wait for what others bring, in `Until`."
            )
        return worker

    # -- evaluation on the consensus ----------------------------------------------------------------------------------

    def show_consensus(self) -> None:
        """Let the module be the consensus, until the next batch."""
        if self._simulator is None or self._models is None or self._models.shown is None:
            return
        # All are equal with a method that applies the same gradients, but for what user code does to each after its
        # update: who is still to be seen by it is left out.
        unseen = set(self._unseen) if self.algorithm.same_updates else set()
        simulator = self._simulator
        self._models.show_consensus(lambda: simulator.consensus(unseen if len(unseen) < self.workers else ()))

    def end_round(self) -> bool:
        """Tell whether a round of clients is over now; what belongs to its end is done then."""
        if self._rounds is None or self._models is None or self._simulator is None:
            return False
        if self._models.shown is None:  # a callback has looked at the consensus, which is of one
            self._models.settle()
            self._models.show(0, self._worker_x)
        assert self.lightning_module is not None
        return self._rounds.end_round(self.lightning_module, self._simulator.workers)

    @property
    def _worker_x(self) -> Vector:
        assert self._simulator is not None
        x = self._simulator.workers[0].x
        assert isinstance(x, Vector)
        return x

    def on_validation_start(self) -> None:
        self.end_round()
        self.show_consensus()

    def on_train_end(self) -> None:
        if self._rounds is not None and self._simulator is not None and self._rounds.under_way:
            assert isinstance(self.algorithm, AbstractFederatedAlgorithm)
            self.algorithm.abandon_round(self._simulator.workers[0])  # a part of a round is no round
        self.show_consensus()
        if self._simulator is not None:
            self._last_reports = self.reports
            self._simulator.close()
            self._simulator = None

    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.lightning_module is not None
        models = self._models
        if self._simulator is None or models is None:
            return self.lightning_module.state_dict()
        rank, vector = models.shown, models.flat.bound
        self.show_consensus()
        state = {k: v.clone() if isinstance(v, Tensor) else v for k, v in self.lightning_module.state_dict().items()}
        if rank is not None:
            models.show(rank, vector)
        return state

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return an optimizer's state; of one model in shards, what the optimizer of each server has of its own."""
        shards = self.algorithm.shards
        if shards == 1 or self._models is None or self._simulator is None:
            return super().optimizer_state(optimizer)
        flat, before, whole = self._models.flat, optimizer.state, defaultdict[Any, Any](dict)
        for server in self.algorithm.keepers(self.workers):
            owned = [flat.parameters[position] for position in flat.layout.positions_in((server, shards))]
            known = self._optimizer_states[server]
            whole |= {parameter: known[parameter] for parameter in owned if parameter in known}
        optimizer.state = whole
        try:
            return super().optimizer_state(optimizer)
        finally:
            optimizer.state = before

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        if self._rounds is not None and self._simulator is not None:
            checkpoint[ROUNDS] = saved_worker(self._simulator.workers[0], self._rounds)
        whole(self.checkpoint_io).save_checkpoint(checkpoint, filepath, storage_options=storage_options)

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        checkpoint: dict[str, Any] = super().load_checkpoint(checkpoint_path, weights_only)
        assert self.lightning_module is not None
        if self._population is not None and self.lightning_module.trainer.state.fn == TrainerFn.FITTING:
            self._resumed = checkpoint.get(ROUNDS)
            if self._resumed is not None:
                require_same(self._resumed, self.algorithm)
        return checkpoint

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        super().load_model_state_dict(checkpoint, strict)
        if self._rounds is not None:
            self._rounds.go_back(None if self._resumed is None else self._resumed["rounds"])
        if self._simulator is None:
            return
        # In the middle of a run: there is one model in it, and all virtual workers go on from that.
        assert self._models is not None
        self._goes_back = True
        self._models.give_all()

    def teardown(self) -> None:
        if self._models is not None:
            self._models.flat.adopt()
            self._models.flat.release()
            self._models = None
        if self._moments is not None:
            self._moments.leave()
            self._moments = None
        if self._hook is not None:
            self._hook.remove()
        self._simulator, self._demands, self._due, self._optimizer, self._hook = None, None, None, None, None
        self._resumed = None
        self._gradients, self._optimizer_states, self._seen, self._memory = [], [], None, None
        super().teardown()


class _Moments(Callback):
    """Tells a strategy of moments for which it has no hook, before any other callback.

    Between two epochs there is one model: the consensus.
    """

    def __init__(self, strategy: SimulatedStrategy, callbacks: list[Callback]) -> None:
        self._strategy, self._callbacks = strategy, callbacks
        callbacks.insert(0, self)

    def leave(self) -> None:
        """Be no callback any more."""
        if self in self._callbacks:
            self._callbacks.remove(self)

    def on_train_epoch_start(self, trainer: Any, *_: Any) -> None:
        self._strategy.show_consensus()
        if self._strategy.rounds is not None and not trainer.fast_dev_run:
            set_length(trainer, self._strategy.rounds.batches)

    def on_train_batch_start(self, *_: Any) -> None:
        self._strategy.show_due()

    def on_train_epoch_end(self, *_: Any) -> None:
        self._strategy.end_round()
        self._strategy.show_consensus()


def _new_parameters(optimizer: Optimizer, known: Sequence[Parameter]) -> list[Parameter]:
    """Return the trainable parameters of an optimizer, but for those that are known."""
    old = {id(parameter) for parameter in known}
    every = (parameter for group in optimizer.param_groups for parameter in group["params"])
    return [parameter for parameter in every if parameter.requires_grad and id(parameter) not in old]


def _evaluate(result: Any, evaluated: list[bool]) -> Any:
    """Answer an optimizer that calls its closure: the gradient is there."""
    evaluated.append(True)
    return result


def _copy_state(optimizer: Optimizer) -> Any:
    """Copy an optimizer's state, with its tensors copied."""
    copies: Any = defaultdict(dict)
    for parameter, state in optimizer.state.items():
        copies[parameter] = {k: v.clone() if isinstance(v, Tensor) else v for k, v in state.items()}
    return copies

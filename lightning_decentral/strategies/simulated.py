"""Virtual workers: any number of them, in one process, on the user's own LightningModule."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.accelerators import CUDAAccelerator
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

from lightning_decentral.algorithms import ADPSGD
from lightning_decentral.errors import ConfigurationError
from lightning_decentral.flat import FlatParameters, Vector
from lightning_decentral.protocol import AbstractAlgorithm, Gradient
from lightning_decentral.strategies.files import whole
from lightning_decentral.transport.cluster_file import ClusterFile
from lightning_decentral.transport.network import Cluster, Traffic
from lightning_decentral.transport.simulator import Demands, Simulator
from lightning_decentral.transport.tensors import check_parameters
from lightning_decentral.worker import Worker

DEFAULT_WORKERS = 8  # when neither the argument nor a cluster file says how many


class SimulatedStrategy(SingleDeviceStrategy):
    """Trains with ``workers`` virtual workers in one process, in the order of a virtual clock.

    Every batch of the training loader goes to the virtual worker whose gradient is due next, so that workers share an
    epoch according to their simulated speed. Each has its own parameters, optimizer state and buffers (BatchNorm);
    evaluation and checkpoints use their mean. Logs ``virtual_seconds`` and ``virtual_bytes`` with every step.

    Args:
        algorithm: the method; `ADPSGD` by default.
        workers: how many virtual workers. ``None``: as many as the cluster file has hosts, or 8 without a file.
        cluster: how long computing and sending take: a `Cluster`, or the path of a cluster file, which has to say how
            long a gradient takes (``compute``); see `ClusterFile`.
        seed: of the workers' random choices and the cluster's jitter.

    Cost:
        One copy of the model, its optimizer state and its buffers per virtual worker (two with an asynchronous
        algorithm), and its pending gradient.

    Raises:
        ConfigurationError: with manual optimization, several optimizers, or a gradient scaler; if the algorithm does
            not fit the number of workers; if the cluster file cannot be read, or has another number of hosts.

    A checkpoint holds the consensus; resuming starts all virtual workers from it.

    Example:
        >>> strategy = SimulatedStrategy(workers=64, cluster=Cluster(compute_seconds=0.25, slowdown={3: 10.0}))
    """

    def __init__(
        self,
        algorithm: AbstractAlgorithm | None = None,
        workers: int | None = None,
        cluster: Cluster | str | Path | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(device="cpu")
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
        self.algorithm = (ADPSGD() if algorithm is None else algorithm).resolved(workers)
        self.workers = workers
        self.seed = seed
        self._simulator: Simulator | None = None
        self._flat: FlatParameters | None = None
        self._demands: Demands | None = None
        self._due: Worker | None = None
        self._gradients: list[list[Tensor | None]] = []
        self._optimizer_states: list[Any] = []
        self._buffers: list[list[Tensor]] = []
        self._module_buffers: list[Tensor] = []
        self._kept: list[Vector] = []
        self._updated = False
        self._staleness = 0
        self._goes_back = False  # whether a checkpoint was loaded in the middle of the run
        self._earlier_seconds = 0.0  # of the virtual clock, until then
        self._earlier_traffic: list[Traffic] = []
        self._hook: Any = None

    # -- what callbacks read ------------------------------------------------------------------------------------------

    @property
    def virtual_seconds(self) -> float:
        """The virtual clock."""
        return self._earlier_seconds + self._simulator.seconds if self._simulator is not None else 0.0

    @property
    def traffic(self) -> Traffic:
        """What all virtual workers together sent, and waited for."""
        total = Traffic()
        for one in self._earlier_traffic + (self._simulator.traffic if self._simulator is not None else []):
            total.bytes_sent += one.bytes_sent
            total.messages += one.messages
            total.exchanges += one.exchanges
            total.calls_answered += one.calls_answered
            total.exposed_seconds += one.exposed_seconds
        return total

    @property
    def staleness(self) -> int:
        """Staleness of the last update, in versions of the parameters."""
        return self._staleness

    @property
    def steps(self) -> int:
        """Steps that all virtual workers together have made."""
        return sum(worker.step for worker in self._simulator.workers) if self._simulator is not None else 0

    @property
    def last_consensus_distance(self) -> float | None:
        """``(1/n) sum_i ||x_i - mean||^2`` now."""
        return self._simulator.consensus_distance() if self._simulator is not None else None

    def consensus_distance(self) -> float:
        """``(1/n) sum_i ||x_i - mean||^2`` now."""
        return self._simulator.consensus_distance() if self._simulator is not None else 0.0

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

    def on_train_start(self) -> None:
        # Only now: a resumed run has its optimizer state by now, and every virtual worker starts with it.
        self._earlier_seconds, self._earlier_traffic = 0.0, []
        self._begin()

    def _begin(self) -> None:
        """Let all virtual workers begin with the module and the optimizer as they are."""
        assert self.model is not None
        self._goes_back = False
        optimizer = self.optimizers[0]
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        self._flat = FlatParameters(parameters)
        start = [self._flat.x, *(self._flat.x.clone() for _ in range(self.workers - 1))]
        self._simulator = Simulator(self.algorithm, start, self.cluster, self.seed)
        self._kept = [vector for w in self._simulator.workers for vector in (w.x, w.snapshot)]  # type: ignore[misc]
        for worker in self._simulator.workers:
            worker.read_gradient = lambda rank=worker.rank: self._read_gradient(rank)  # type: ignore[misc]
        self._gradients = [[None] * len(parameters) for _ in range(self.workers)]
        self._optimizer_states = [_copy_state(optimizer) for _ in range(self.workers)]
        self._module_buffers = list(self.model.buffers())
        self._buffers = [[b.detach().clone() for b in self._module_buffers] for _ in range(self.workers)]
        if self._hook is not None:
            self._hook.remove()
        self._hook = optimizer.register_step_post_hook(self._note_update)
        self._demands = self._simulator.demands()
        self._due = self._next_gradient(next(self._demands))

    def _note_update(self, *_: Any) -> None:
        self._updated = True

    def _read_gradient(self, rank: int) -> Vector:
        assert self._flat is not None
        vector = self._flat.layout.new_vector(self.root_device)
        views = self._flat.layout.views(vector)
        for view, gradient in zip(views, self._gradients[rank], strict=True):
            if gradient is not None:
                view.copy_(gradient.to_dense() if gradient.layout is not torch.strided else gradient)
        self._gradients[rank] = list(views)
        return vector

    # -- training -----------------------------------------------------------------------------------------------------

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        assert self._simulator is not None
        if self._goes_back:  # the optimizer has its state by now
            self._earlier_seconds += self._simulator.seconds
            self._earlier_traffic += self._simulator.traffic
            self._begin()
        assert self._due is not None
        self._load(self._due.snapshot, self._due.rank)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        output = super().training_step(*args, **kwargs)
        assert self.lightning_module is not None
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
        assert self._flat is not None
        assert self._demands is not None
        result = closure()
        self._gradients[self._due.rank] = [parameter.grad for parameter in self._flat.parameters]
        output = None
        request, worker = self._demands.send(None)
        while not isinstance(request, Gradient):
            self._load(worker.x if request.at is None else request.at, worker.rank)
            self._staleness = worker.staleness
            for parameter, gradient in zip(self._flat.parameters, self._gradients[worker.rank], strict=True):
                was_sparse = parameter.grad is not None and parameter.grad.layout is not torch.strided
                dense = gradient is not None and gradient.layout is torch.strided
                parameter.grad = gradient.to_sparse(1) if was_sparse and dense and gradient is not None else gradient
            optimizer.state = self._optimizer_states[worker.rank]
            self._updated = False
            output = super().optimizer_step(optimizer, lambda: result, model, **kwargs)
            self._gradients[worker.rank] = [None] * len(self._flat.parameters)
            self._load(worker.x, worker.rank)
            request, worker = self._demands.send(self._updated)
        for parameter in self._flat.parameters:
            parameter.grad = None
        self._due = worker
        return output

    def _next_gradient(self, demand: tuple[Any, Worker]) -> Worker:
        request, worker = demand
        assert isinstance(request, Gradient), "every step begins with a gradient"
        return worker

    def _load(self, vector: Any, rank: int) -> None:
        """Let the module be one virtual worker, without copying."""
        assert self._flat is not None
        self._flat.bind(vector)
        for buffer, value in zip(self._module_buffers, self._buffers[rank], strict=True):
            buffer.data = value

    # -- evaluation on the consensus ----------------------------------------------------------------------------------

    def on_validation_start(self) -> None:
        if self._simulator is not None:
            self._load_consensus()

    def on_validation_end(self) -> None:
        self._leave_consensus()

    def on_train_end(self) -> None:
        if self._simulator is not None:
            self._load_consensus()
        self._simulator = None

    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.lightning_module is not None
        if self._simulator is None:
            return self.lightning_module.state_dict()
        self._load_consensus()
        state = {k: v.clone() if isinstance(v, Tensor) else v for k, v in self.lightning_module.state_dict().items()}
        self._leave_consensus()
        return state

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        whole(self.checkpoint_io).save_checkpoint(checkpoint, filepath, storage_options=storage_options)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        super().load_model_state_dict(checkpoint, strict)
        if self._simulator is None:
            return
        # In the middle of a run: there is one model in it, and all virtual workers go on from that.
        assert self._flat is not None
        self._goes_back = True
        loaded = self._flat.bound.clone()
        for vector in self._kept:
            vector.copy_(loaded)
        for buffers in self._buffers:
            for buffer, value in zip(buffers, self._module_buffers, strict=True):
                buffer.copy_(value)

    def _load_consensus(self) -> None:
        assert self._flat is not None
        assert self._simulator is not None
        self._flat.bind(self._simulator.consensus())
        for index, buffer in enumerate(self._module_buffers):
            values = [worker_buffers[index] for worker_buffers in self._buffers]
            buffer.data = torch.stack(values).mean(0) if buffer.is_floating_point() else values[0].clone()

    def _leave_consensus(self) -> None:
        if self._simulator is not None and self._due is not None:
            assert self._flat is not None
            self._load(self._due.snapshot, self._due.rank)
            self._flat.forget_others(*self._kept)

    def teardown(self) -> None:
        if self._flat is not None:
            self._flat.adopt()
            self._flat.release()
            self._flat = None
        self._simulator, self._demands, self._due = None, None, None
        self._gradients, self._optimizer_states, self._buffers, self._module_buffers = [], [], [], []
        self._kept = []
        super().teardown()


def _copy_state(optimizer: Optimizer) -> Any:
    """An optimizer's state, with its tensors copied."""
    copies: Any = defaultdict(dict)
    for parameter, state in optimizer.state.items():
        copies[parameter] = {k: v.clone() if isinstance(v, Tensor) else v for k, v in state.items()}
    return copies

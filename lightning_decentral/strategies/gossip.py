"""The strategy for synchronous algorithms."""

from __future__ import annotations

from datetime import timedelta
from typing import Literal

from lightning.pytorch import Trainer
from torch.optim import Optimizer

from lightning_decentral.algorithms import DPSGD
from lightning_decentral.errors import ConfigurationError
from lightning_decentral.protocol import (
    AbstractAlgorithm,
    AbstractAsynchronousAlgorithm,
    AbstractErrorFeedbackAlgorithm,
)
from lightning_decentral.strategies.base import AbstractDecentralizedStrategy, StartMethod
from lightning_decentral.transport.process_group import Communicator, Stepper, broadcast_from_zero


class GossipStrategy(AbstractDecentralizedStrategy):
    """Trains with a synchronous decentralized algorithm: a worker waits for those it exchanges with, for nobody else.

    Args:
        algorithm: the method; `DPSGD` by default.
        process_group_backend: ``"gloo"`` or ``"nccl"``; ``None``: what fits the device.
        timeout: for what all workers do together at the end of an epoch, waiting for the slowest included.
        exchange_timeout_seconds: after which an exchange has failed and the peer is named. A neighbour's computation is
            part of the wait.
        start_method: how worker processes are started.
        resume: ``"exact"``: every worker goes on from its own file, and a missing or damaged one is an error.
            ``"consensus"``: all start from the averaged model of the main file.
        worker_checkpoints: whether each worker writes its own state beside a checkpoint.
        average_at_end: whether the model is the consensus once ``fit`` has returned.
        seed: of the algorithm's random choices; all workers must have the same.
        shared_memory: whether workers of one host exchange with their neighbours through memory that they share (Linux)
            instead of TCP. It takes no more processor time than copying the model once; what is left out is traffic.

    Raises:
        ConfigurationError: if the algorithm is asynchronous, or its topology does not fit the number of workers (when
            the ``Trainer`` is made, before any process starts).
        PeerLost: if a worker is killed or cut off while others need it.
        WorkerFailed: if another worker raised an exception.

    Example:
        >>> from lightning_decentral.algorithms import D2
        >>> from lightning_decentral.topology import Ring
        >>> strategy = GossipStrategy(D2(topology=Ring(8, lazy=True)))
    """

    begins_before_batch = True

    def __init__(
        self,
        algorithm: AbstractAlgorithm | None = None,
        process_group_backend: str | None = None,
        timeout: timedelta = timedelta(minutes=30),
        exchange_timeout_seconds: float = 300.0,
        start_method: StartMethod = "popen",
        resume: Literal["exact", "consensus"] = "exact",
        worker_checkpoints: bool = True,
        average_at_end: bool = True,
        seed: int = 0,
        shared_memory: bool = True,
    ) -> None:
        algorithm = DPSGD() if algorithm is None else algorithm
        if isinstance(algorithm, AbstractAsynchronousAlgorithm):
            raise ConfigurationError(
                f"GossipStrategy needs a synchronous algorithm, got {algorithm!r}. Use AsyncStrategy for it."
            )
        super().__init__(
            algorithm,
            process_group_backend=process_group_backend,
            timeout=timeout,
            exchange_timeout_seconds=exchange_timeout_seconds,
            start_method=start_method,
            resume=resume,
            worker_checkpoints=worker_checkpoints,
            average_at_end=average_at_end,
            seed=seed,
            shared_memory=shared_memory,
        )

    def check_trainer(self, trainer: Trainer) -> None:
        algorithm = self.algorithm
        remembers = isinstance(algorithm, AbstractErrorFeedbackAlgorithm) and algorithm.remembers_gradients
        if remembers and getattr(self.precision_plugin, "scaler", None) is not None:
            raise ConfigurationError(
                f"{type(algorithm).__name__} got a gradient scaler (precision='16-mixed'), which changes the unit of "
                "the gradients that it remembers. Use 'bf16-mixed' or '32-true'."
            )

    def connect_workers(self, communicator: Communicator, steppers: list[Stepper]) -> None:
        pass

    def quiesce(self, what: str = "a meeting of all workers") -> None:
        """Make sure that all meet for the same thing.

        There is nothing to wait for: exchanges under way touch neither the mean nor the parameters before the next
        update.
        """
        if self._communicator is not None:
            self._communicator.barrier(what)

    def replace_stepper(self, index: int, optimizer: Optimizer, stepper: Stepper) -> None:
        """All workers unfreeze in the same step: begin anew with the larger vector, at the same step."""
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
        """All workers change them in the same step: begin anew with these."""
        assert self._communicator is not None
        self._communicator.drain()
        for stepper in self._steppers:
            stepper.flat.release()
        self._steppers[:] = [self._make_stepper(index, optimizer) for index, optimizer in enumerate(self.optimizers)]

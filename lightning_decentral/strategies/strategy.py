"""The strategy of every method with real workers, its options, and which kind of strategy an algorithm needs."""

from __future__ import annotations

from datetime import timedelta
from typing import Any, ClassVar, Literal

from lightning_decentral.algorithms import DPSGD
from lightning_decentral.compression.fused import is_fused
from lightning_decentral.errors import ConfigurationError
from lightning_decentral.protocol import AbstractAlgorithm, AbstractAsynchronousAlgorithm, AbstractOpenRounds
from lightning_decentral.strategies.buffers import Buffers, check_buffers
from lightning_decentral.strategies.meetings import AbstractMeetingStrategy
from lightning_decentral.strategies.poisoned import Poisoned, check_poisoned
from lightning_decentral.strategies.uneven import Uneven

StartMethod = Literal["popen", "spawn", "fork", "forkserver"]
Resume = Literal["exact", "consensus"]

_KINDS: dict[bool, type[Strategy]] = {}  # by whether the algorithm is asynchronous


class Strategy(AbstractMeetingStrategy):
    """Trains with a decentralized algorithm: every worker has a model of its own, and exchanges with a few others.

    The algorithm decides how. With a synchronous one the object is a `GossipStrategy`, with an asynchronous one an
    `AsyncStrategy`. Lightning's loop computes gradients and calls the optimizer; around them the algorithm makes its
    exchanges. Evaluation and checkpoints use the *consensus*, the mean of all workers' models.

    Args:
        algorithm: the method; `DPSGD` by default. Its topology's defaults are filled in for the number of workers.
        process_group_backend: ``"gloo"`` or ``"nccl"``; ``None``: what fits the device. Asynchronous exchanges use gloo
            connections between pairs, whatever it is.
        timeout: for what all workers do together at the end of an epoch, waiting for the slowest included.
        exchange_timeout_seconds: after which an exchange has failed and the peer is named. In a synchronous method a
            neighbour's computation is part of the wait; an asynchronous worker answers while it computes.
        start_method: how worker processes are started.
        resume: ``"exact"``: every worker goes on from its own file, and a missing or damaged one is an error.
            ``"consensus"``: all start from the averaged model of the main file.
        worker_checkpoints: whether each worker writes its own state beside a checkpoint.
        average_at_end: whether the model is the consensus once ``fit`` has returned.
        seed: of the algorithm's random choices; all workers must have the same.
        shared_memory: whether workers of one host exchange in memory that they share (Linux) instead of through TCP. A
            synchronous exchange then takes no more processor time than copying the model once. An asynchronous call
            does so if the algorithm's answers depend on the parameters only (``answers_in_parts``): the caller does the
            averaging at both ends, and the one that is called is not even woken.
        poisoned: what happens to a received model that is not finite, which a worker whose loss has become NaN sends.
            ``"warn"``: whoever receives it names worker, step and parameter, and goes on; it spreads. ``"refuse"``: the
            same, but what is not finite is left out, of averages with others (the whole model; part by part, where
            calls are answered so) and of the consensus. ``"raise"``: `PoisonedMessage`, which ends the run. These
            two read all of each received model; to warn, a large one is read in part, all of it within 16 messages.
        uneven: of synchronous algorithms only: what happens in an epoch in which some workers have fewer batches.
            ``"continue"`` (``None``): they go on without gradients of their own until all are through, and count the
            batches that they do not have. ``"stop"``: the epoch ends for all with the first that has no more. Nothing
            is sent for it as long as all are equal.
        buffers: what becomes of the workers' own buffers, which forward passes change, as BatchNorm's statistics.
            ``"evaluation"``: each worker keeps its own while training; to evaluate, to save, and at the end they are
            the mean over the workers. ``"gossip"``: in each step they are averaged as the models are, on the same graph
            or in the same rounds, and never compressed; the bytes of the buffers are sent beside those of the models.
            ``"local"``: each worker keeps its own and is evaluated with them; a checkpoint's main file has worker 0's.
            Integers are never averaged.
        share_epoch: of asynchronous algorithms only: whether workers share one epoch of data (``None``: yes). Falls
            back to equal shards, and says so, with ``max_steps``, ``limit_train_batches``, a ``val_check_interval`` or
            checkpoints by steps, several training loaders, or an own sampler: these count each worker's steps, which
            must then be equal.

    Raises:
        ConfigurationError: if an option does not fit the algorithm, or its topology the number of workers (when the
            ``Trainer`` is made, before any process starts).
        PeerLost: if a worker is killed or cut off while others need it.
        WorkerFailed: if another worker raised an exception.

    Example:
        >>> from lightning_decentral.algorithms import ADPSGD, D2
        >>> from lightning_decentral.topology import Ring
        >>> type(Strategy(D2(topology=Ring(8, lazy=True)))).__name__, type(Strategy(ADPSGD())).__name__
        ('GossipStrategy', 'AsyncStrategy')
    """

    default: ClassVar[type[AbstractAlgorithm]] = DPSGD
    """The algorithm of a strategy that is not told which."""
    ends_open_rounds: ClassVar[bool] = False
    """Whether it lets workers that come and go end their rounds together."""

    def __init_subclass__(cls, asynchronous: bool | None = None, **options: Any) -> None:
        super().__init_subclass__(**options)
        if asynchronous is not None:
            _KINDS[asynchronous] = cls

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
        average_at_end: bool = True,
        seed: int = 0,
        shared_memory: bool = True,
        poisoned: Poisoned = "warn",
        uneven: Uneven | None = None,
        buffers: Buffers = "evaluation",
        share_epoch: bool | None = None,
    ) -> None:
        super().__init__(process_group_backend=process_group_backend, timeout=timeout, start_method=start_method)
        name = type(self).__name__
        algorithm = self.default() if algorithm is None else algorithm
        if not isinstance(algorithm, AbstractAlgorithm):
            raise ConfigurationError(
                f"{name}(algorithm={algorithm!r}): needs an algorithm object, such as "
                "lightning_decentral.algorithms.DPSGD(). A name is for the Trainer: Trainer(strategy='dpsgd')."
            )
        asynchronous = isinstance(algorithm, AbstractAsynchronousAlgorithm)
        kind, other = _KINDS[asynchronous], _KINDS[not asynchronous]
        if type(self) is Strategy:
            self.__class__ = kind
        elif isinstance(self, other):
            needs = "a synchronous" if asynchronous else "an asynchronous"
            raise ConfigurationError(
                f"{name} needs {needs} algorithm, got {algorithm!r}. Use {kind.__name__} for it, or Strategy, which "
                "takes both."
            )
        elif not isinstance(self, kind):
            raise ConfigurationError(
                f"{name} is derived from Strategy, which only chooses what to be, and needs a base class that trains "
                f"with {algorithm!r}. Derive it from {kind.__name__}."
            )
        if not self.ends_open_rounds:
            refuse_open_rounds(name, algorithm)
        _check_fits(name, algorithm, asynchronous, uneven, share_epoch)
        if not exchange_timeout_seconds > 0:
            raise ConfigurationError(
                f"{name}(exchange_timeout_seconds={exchange_timeout_seconds}): needs a positive number."
            )
        if resume not in ("exact", "consensus"):
            raise ConfigurationError(f"{name}(resume={resume!r}): needs 'exact' or 'consensus'.")
        check_poisoned(name, poisoned)
        check_buffers(name, algorithm, buffers)
        is_fused()  # refuses a wrong value of its environment variable before any process starts
        self.algorithm: AbstractAlgorithm = algorithm
        self.exchange_timeout_seconds = exchange_timeout_seconds
        self.resume = resume
        self.worker_checkpoints = worker_checkpoints
        self.average_at_end = average_at_end
        self.seed = seed
        self.shared_memory = shared_memory
        self.poisoned: Poisoned = poisoned
        self.buffers: Buffers = buffers
        self.uneven: Uneven = uneven or "continue"
        self.share_epoch = share_epoch is not False
        self._clear()


def _check_fits(
    name: str, algorithm: AbstractAlgorithm, asynchronous: bool, uneven: str | None, share_epoch: bool | None
) -> None:
    """Refuse options that mean nothing to a kind of algorithm."""
    method = type(algorithm).__name__
    if asynchronous and uneven is not None:
        raise ConfigurationError(
            f"{name} got uneven={uneven!r} with {method}, which is asynchronous: its workers need no equal numbers of "
            "batches. It needs a synchronous algorithm. Leave it out; share_epoch says how an epoch is divided."
        )
    if not asynchronous and share_epoch is not None:
        raise ConfigurationError(
            f"{name} got share_epoch={share_epoch} with {method}, which is synchronous: its workers make the same "
            "steps. It needs an asynchronous algorithm. Leave it out; uneven says what happens where shards differ."
        )
    if uneven not in (None, "continue", "stop"):
        raise ConfigurationError(f"{name}(uneven={uneven!r}): needs 'continue' or 'stop'.")


def refuse_open_rounds(name: str, algorithm: AbstractAlgorithm) -> None:
    """Refuse what `AbstractAlgorithm.opened` returns for rounds, which nobody would end: the workers would train apart.

    Args:
        name: of the strategy.
        algorithm: that the user has given.

    Raises:
        ConfigurationError: if it is that.
    """
    if isinstance(algorithm, AbstractOpenRounds):
        raise ConfigurationError(
            f"{name} got {algorithm!r}, whose workers average when those that are there meet, which only OpenStrategy "
            "makes them do; it needs a method that averages by itself. Leave `.opened()` out, or use OpenStrategy."
        )


def refuse_servers(algorithm: AbstractAlgorithm, size: int) -> None:
    """Refuse workers that have no data, in a loop in which all have some: that of Fabric, or of a synchronous method.

    Args:
        algorithm: resolved.
        size: how many workers there are.

    Raises:
        ConfigurationError: if there are any.
    """
    serving = [rank for rank in range(size) if not algorithm.trains(rank)]
    if serving:
        raise ConfigurationError(
            f"{type(algorithm).__name__} got workers {serving} that do not train, but in this loop all workers have "
            "batches. Leave server='dedicated' out, if that is it, or use it with an asynchronous method in the "
            "`Trainer`; otherwise SimulatedStrategy, or a loop of your own around `engine.stepper.Stepper` and "
            "`engine.serving.serve`."
        )

"""The strategy for workers that come and go.

The file is long because Lightning's loop asks one object for all that workers do together, and each of these things is
another one where a worker may be missing.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections.abc import Sequence
from contextlib import nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor
from torch.optim import Optimizer

from lightning_decentral.engine.stepper import Stepper
from lightning_decentral.errors import ConfigurationError, PeerLost
from lightning_decentral.membership import Member, Members, Patience
from lightning_decentral.protocol import AbstractAlgorithm, AbstractAsynchronousAlgorithm, AbstractOpenRounds
from lightning_decentral.strategies import lightning_private as private
from lightning_decentral.strategies.alike import described_steppers, described_tensors
from lightning_decentral.strategies.asynchronous import AsyncStrategy
from lightning_decentral.strategies.base import AbstractDecentralizedStrategy
from lightning_decentral.strategies.clocks import look_at_own_clocks
from lightning_decentral.strategies.epoch_metrics import EpochMetrics
from lightning_decentral.strategies.log import log
from lightning_decentral.strategies.loops import searches_for_rate
from lightning_decentral.strategies.newcomers import Newcomers, handed_over, take_over
from lightning_decentral.strategies.poisoned import inspect_messages
from lightning_decentral.strategies.shared_epoch import SharedEpochs, SharedEpochSampler, why_not_shared
from lightning_decentral.strategies.updates_beside import refuse_what_no_server_applies
from lightning_decentral.transport.communicator import Communicator
from lightning_decentral.transport.connections import ConnectionSettings
from lightning_decentral.transport.copies import from_text, to_text
from lightning_decentral.transport.few_numbers import is_reduction, operation_of, reduced
from lightning_decentral.transport.jobs import JOB, listed
from lightning_decentral.transport.living import NotMade, never_averages
from lightning_decentral.transport.membership import Membership
from lightning_decentral.transport.open_edges import OpenEdges

_VERSION = "1"  # of what workers say to each other
_DEPART_SECONDS = 10.0  # after SIGTERM, for what others have not of this worker: schedulers kill 30 seconds after it
OnLoss = Literal["continue", "stop"]
"""What the others do when a worker is lost."""
_ROUNDS = "lightning_decentral_rounds"  # in a checkpoint: what all workers have in common beside their model


def _lost(rank: int, why: str) -> PeerLost:
    return PeerLost(
        f"Worker {rank} does not take part, or is another one than before, and {why}. Start the run again from its "
        "last checkpoint.",
        (rank,),
    )


class OpenStrategy(AsyncStrategy):
    """Trains with workers that may die, come back, join and leave: those that are there go on.

    Each worker is a process of its own, started by hand, by a script or as a job of its own; none starts others. They
    meet at a store that outlives them (``lightning-decentral rendezvous``), at ``MASTER_ADDR`` and ``MASTER_PORT``. The
    rank is Lightning's: ``NODE_RANK`` with ``Trainer(devices=1, num_nodes=...)``. The run begins when ``num_nodes``
    workers are there, and shares each epoch of data among who is there; ``num_nodes`` may be exceeded later.

    A worker that is killed is left out after one and a half heartbeats, and the data that it had not finished go to
    others. One that starts takes model, optimizers and the place in the loop from another one, which makes the copy
    between two of its steps. A worker that gets SIGTERM hands over after its batch what others have not of it, and
    leaves. Validation, checkpoints and the end are of all that are there. A checkpoint is an ordinary one, of the mean
    of the models and one worker's optimizers; of local updates it has the common model and what the outer optimizer
    remembers, too. ``max_steps`` is a count of the steps of all workers together; where it is reached, the epoch ends
    for all.

    Args:
        algorithm: an asynchronous one that averages in pairs, on a topology for any number of workers; `ADPSGD` by
            default. Or one of local updates, as `LocalSGD` and `DiLoCo`, of whole models: all that are there average at
            the end of a round, and of an epoch, and wait for the slowest of them. Or `DPSGD`: all that are there make
            each step together. Or `APSGD`, `FedBuff` or another method with a server, worker 0, which has to stay.
        on_loss: ``"continue"``: the others go on. ``"stop"``: the run ends for all with `PeerLost`, which names who was
            lost, or has left before the end.
        heartbeat_seconds: a worker whose heart has stood still for one and a half of these is left out; 5 by default.
            On a machine with several times as many busy processes as cores, the hearts of live workers stand still for
            seconds.
        grace: of local updates: how many MADs after the median time of a round those that are at its end wait for all
            others, which are then asked to end their round after the step that they are in, however many they have
            made (`Patience`; learnt from the rounds before). A worker that is asked for ``exchange_timeout_seconds``
            without coming is left out. ``None``: the slowest that lives is waited for.
        quorum: with ``grace``, which share of the living has to be at the end of a round before; in (0, 1], by default
            half of them.
        least_workers: how many have to be there for the run to begin, 1 or more; whoever waits for them in vain is
            refused. ``None``: those that have come in time, unless they are fewer than ``num_nodes`` and there are
            other jobs at the rendezvous, of whose names this one's may be a misspelling.
        options: as of `AsyncStrategy`, but that ``shared_memory`` and ``worker_checkpoints`` are not used.
            ``exchange_timeout_seconds`` is for one call, and for how long the first workers wait for the others.

    Raises:
        ConfigurationError: if the algorithm, the launcher or a setting of the ``Trainer`` does not fit (several devices
            of one host: when the ``Trainer`` is made); if the workers that train are of another program; if the rank is
            taken; if too few workers come to begin.
        PeerLost: if the rendezvous has ended, or this worker was left out.

    Example:
        >>> from lightning_decentral.algorithms import ADPSGD
        >>> strategy = OpenStrategy(ADPSGD(), heartbeat_seconds=5.0)
    """

    ends_batches_together = False
    ends_open_rounds = True

    def __init__(
        self,
        algorithm: AbstractAlgorithm | None = None,
        *,
        on_loss: OnLoss = "continue",
        heartbeat_seconds: float = 5.0,
        grace: float | None = None,
        quorum: float | None = None,
        least_workers: int | None = None,
        **options: Any,
    ) -> None:
        if options.get("buffers") == "gossip":
            raise ConfigurationError(
                "OpenStrategy got buffers='gossip', which needs the same workers all the time. Use 'evaluation', which "
                "averages them when the model is evaluated or saved, or AsyncStrategy."
            )
        self._method = "ADPSGD" if algorithm is None else type(algorithm).__name__  # which `opened` may replace
        super().__init__(algorithm.opened() if isinstance(algorithm, AbstractAlgorithm) else algorithm, **options)
        if not heartbeat_seconds > 0:
            raise ConfigurationError(f"OpenStrategy(heartbeat_seconds={heartbeat_seconds}): needs a positive number.")
        if 4 * heartbeat_seconds > self.exchange_timeout_seconds:
            raise ConfigurationError(
                f"OpenStrategy(heartbeat_seconds={heartbeat_seconds}, exchange_timeout_seconds="
                f"{self.exchange_timeout_seconds}): a call must not fail before its worker is known to be lost. Make "
                "the time-out at least four heartbeats."
            )
        if not self.share_epoch:
            raise ConfigurationError(
                "OpenStrategy got share_epoch=False, but the data of a lost worker must go to others. Leave it out."
            )
        if on_loss not in get_args(OnLoss):
            raise ConfigurationError(f"OpenStrategy(on_loss={on_loss!r}): needs 'continue' or 'stop'.")
        if least_workers is not None and least_workers < 1:
            raise ConfigurationError(f"OpenStrategy(least_workers={least_workers}): needs 1 or more, or None.")
        self.least_workers = least_workers
        self.on_loss: OnLoss = on_loss
        self.heartbeat_seconds = heartbeat_seconds
        self._patience = None
        if grace is not None:
            self._patience = Patience(grace, 0.5 if quorum is None else quorum, self.exchange_timeout_seconds)
        elif quorum is not None:
            raise ConfigurationError(
                f"OpenStrategy got quorum={quorum} without grace, but then all that live are waited for; it needs "
                "both. Write grace=3.0, or leave it out."
            )
        rounds = self.algorithm if isinstance(self.algorithm, AbstractOpenRounds) else None
        if grace is not None and (rounds is None or not rounds.may_end_early):
            raise ConfigurationError(
                f"OpenStrategy(grace={grace}) got {self.algorithm!r}, whose workers have no rounds of local steps that "
                "could end early; it needs local updates. Use DiLoCo or LocalSGD; or leave it out: ADPSGD never waits "
                "for the slowest, and the workers of DPSGD make each step together."
            )
        self.worker_checkpoints = self.shared_memory = False

    def _clear(self) -> None:
        super()._clear()
        self._membership: Membership | None = None
        self._newcomers: Newcomers | None = None
        self._edges: OpenEdges | None = None
        self._graphs: dict[tuple[int, ...], AbstractAsynchronousAlgorithm] = {}
        self._began: int | None = None  # the epoch that this worker has begun last
        self._stops_at: int | None = None
        self._announced: int | None = None
        self._led: bool | None = None
        self._validates: tuple[int, int] | None = None  # which part of the samples, and of how many
        self._ahead: int | None = None  # the batch with which this worker joins an epoch that goes on
        self._sampler: SharedEpochSampler | None = None
        self._told_members: frozenset[Member] = frozenset()
        self._needed: dict[int, int] = {}  # the lives of those without whom the others cannot go on, by rank
        self._resumed: dict[str, Any] | None = None  # what a checkpoint has of the rounds
        self._round_began: float | None = None  # when it made its first step of this round
        self._leaves_by: float | None = None  # after SIGTERM: how long it waits for others
        self._hurried: tuple[int, int] | None = None  # of which epoch, and which round of it

    # -- setting up ---------------------------------------------------------------------------------------------------

    def set_world_ranks(self) -> None:
        # Lightning calls this in Trainer(). Its launcher would start the others, and kill this process with them.
        if self.parallel_devices and self.num_processes > 1:
            raise ConfigurationError(
                f"OpenStrategy got devices={self.num_processes}, of which Lightning starts the others and ends all "
                "with one; it needs workers that are started one by one. Use Trainer(devices=1, num_nodes=...), and "
                "start each with its own NODE_RANK."
            )
        super().set_world_ranks()

    def setup_distributed(self) -> None:
        """Connect to the rendezvous; there is no process group of all workers."""
        reset_seed()
        self.set_world_ranks()
        assert self.cluster_environment is not None
        assert self.lightning_module is not None
        if self.lightning_module.trainer.state.fn != TrainerFn.FITTING:
            return
        self.algorithm = self._among((self.global_rank,))  # until it is known who else is there
        environment = self.cluster_environment
        self._membership = Membership(
            environment.main_address, environment.main_port, self.global_rank, self.heartbeat_seconds
        )

    def setup(self, trainer: Trainer) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            super().setup(trainer)
            return
        # Each worker evaluates by itself. DDP's set-up would send worker 0's weights, in a group that is not there.
        assert self.accelerator is not None
        assert self.model is not None
        self.accelerator.setup(trainer)
        self.model = self.precision_plugin.convert_module(self.model)
        self.model_to_device()
        self.setup_precision_plugin()

    def check_trainer(self, trainer: Trainer) -> None:
        super().check_trainer(trainer)
        if searches_for_rate(trainer):
            raise ConfigurationError(
                "OpenStrategy got a search for a learning rate (LearningRateFinder, or Tuner.lr_find), which trains "
                "and goes back to the start, and needs workers of which none comes or goes meanwhile. Search in one "
                "process before, with Trainer(devices=1) and no strategy, and give all workers the rate that it finds."
            )

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """What Lightning deals the samples by: those of validations. The shared epoch replaces it for training."""
        if self._membership is None:
            return {"num_replicas": 1, "rank": 0}
        size = max(1, self.world_size)
        place, parts = self._validates or (self.global_rank % size, size)
        return {"num_replicas": parts, "rank": place}

    @property
    def is_global_zero(self) -> bool:
        """Whether this worker writes what is written once: the first of those that are there."""
        if self._membership is None:
            return self.global_rank == 0 if self._led is None else self._led
        return self._membership.leads if self._membership.takes_part else self.global_rank == 0

    def configure_ddp(self) -> None:
        """Wrap nothing, and agree on nothing: whoever joins takes a copy."""

    def _make_communicator(self) -> Communicator:
        settings = ConnectionSettings(
            self.root_device, "", self.exchange_timeout_seconds, timedelta(minutes=30), shared_memory=False
        )
        return Communicator(settings, self._membership, most_workers=max(2, self.world_size))

    def connect_workers(self, communicator: Communicator, steppers: list[Stepper]) -> None:
        assert self._membership is not None
        assert self.lightning_module is not None
        assert isinstance(self.algorithm, AbstractAsynchronousAlgorithm)
        inspect_messages(self.poisoned, self.lightning_module, communicator, steppers)
        if self.algorithm.updates_in_answers:
            refuse_what_no_server_applies(self.algorithm, self.lightning_module.trainer)
        for index, stepper in enumerate(steppers):
            self._prepare(index, stepper)
            if self.algorithm.needs:  # a server has to know who is there
                stepper.callee.look = partial(self._look, stepper)
        callees = [stepper.callee for stepper in steppers]
        self._edges = communicator.calls.open_to_members(self.algorithm, callees, self._membership, self._neighbors)

    def _among(self, ranks: tuple[int, ...]) -> AbstractAsynchronousAlgorithm:
        """Return the algorithm for those that are there."""
        found = self._graphs.get(ranks)
        if found is None:
            configured: Any = self._configured  # which is `opened`
            found = self._graphs[ranks] = configured.among(ranks, max(self.world_size, ranks[-1] + 1))
            assert isinstance(found, AbstractAsynchronousAlgorithm)
        return found

    @property
    def _needs(self) -> tuple[int, ...]:
        """The workers without whom the others do not go on."""
        assert self._membership is not None
        assert isinstance(self._configured, AbstractAsynchronousAlgorithm)
        there = {*self._needed, *self._membership.members.ranks} if self.on_loss == "stop" else ()
        return tuple(sorted({*self._configured.needs, *there}))

    def _neighbors(self, members: Members) -> Sequence[int]:
        algorithm, mine = self._among(members.ranks), self.global_rank
        called = algorithm.peers(mine)
        return [rank for rank in members.ranks if rank in called or mine in algorithm.peers(rank)]

    def replace_stepper(self, index: int, optimizer: Optimizer, stepper: Stepper) -> None:
        raise ConfigurationError(
            f"OpenStrategy got other trainable parameters in {type(optimizer).__name__} than at the start, but workers "
            "that join need the same all the time. Freeze nothing and unfreeze nothing, or use AsyncStrategy."
        )

    # -- joining ------------------------------------------------------------------------------------------------------

    def on_train_start(self) -> None:
        AbstractDecentralizedStrategy.on_train_start(self)
        assert self.lightning_module is not None
        membership, trainer = self._membership, self.lightning_module.trainer
        assert membership is not None
        reason = why_not_shared(trainer, counts_together=True)
        self._claiming = membership.connect()
        epochs = SharedEpochs(trainer, self.global_rank, self.world_size, self._claim_batches, self._begin_sharing)
        reason = reason or epochs.share(private.combined_loader(trainer).flattened[0])
        if reason is not None:
            raise ConfigurationError(
                f"OpenStrategy cannot share the epochs: {reason}. The data of a lost worker must go to others. Leave "
                "the setting out, or use AsyncStrategy."
            )
        self._epochs = epochs
        self._metrics = EpochMetrics(self.lightning_module, lambda: membership.meets, self.gather_rows)
        self._newcomers = Newcomers(trainer, self._steppers, membership)
        membership.listener = self._listen
        membership.between_steps = partial(self._while_waiting, trainer)
        self._follow_loop(trainer)
        self._resume_rounds()
        told: list[str] = []
        began = time.monotonic()
        founded, self._ahead = membership.enter(
            *(self._identity(trainer), trainer.current_epoch, partial(self._take_over, told)),
            lambda epoch: self._num_batches(epoch, epochs.sampler),
        )
        if founded and membership.jobs_before:
            log.warning(self._founds_beside(membership))
        self._tell(f"takes part after {time.monotonic() - began:.2f} s ({'; '.join(told) or 'the first one'})")
        epochs.start(0, joins=not founded)

    def _founds_beside(self, membership: Membership) -> str:
        return (
            f"Worker {self.global_rank} founds the job {membership.job!r} at a rendezvous that also has "
            f"{listed(membership.jobs_before)}. If it was to join, start it again with that name in {JOB}."
        )

    def _resume_rounds(self) -> None:
        """Go on with what the rounds of the checkpoint had in common; who joins takes it from another worker then."""
        saved, self._resumed = self._resumed, None
        if saved is None or self.resume != "exact":
            return
        if saved["algorithm"] != repr(self._configured) or len(saved["rounds"]) != len(self._steppers):
            rank_zero_warn(
                f"The checkpoint is of {saved['algorithm']}, and {self._configured!r} goes on: with the model and the "
                "optimizers, and the algorithm begins anew."
            )
            return
        for stepper, step, given in zip(self._steppers, saved["steps"], saved["rounds"], strict=True):
            take_over(stepper, step, given)

    def _take_over(self, told: list[str], members: Members) -> Members | None:
        """Take a copy; return of which entry it is, if it is whole."""
        assert self._newcomers is not None
        assert self.lightning_module is not None
        told.clear()
        taken = self._newcomers.take(members, told.append)
        return taken if self.lightning_module.trainer.current_epoch == members.epoch else None

    def _identity(self, trainer: Trainer) -> dict[str, str]:
        """Tell what all workers must have in common."""
        assert self.model is not None
        assert self._epochs is not None
        named = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        layout = [*described_tensors(named.items()), *described_steppers(self._steppers, self.model)]
        sampler = self._epochs.sampler
        order = f"shuffled with seed {sampler.seed}" if sampler.shuffle else "in order"
        digest = hashlib.sha256("\n".join(layout).encode()).hexdigest()[:16]
        return {
            "version": _VERSION,
            "method": repr(self._configured),
            "model": f"{len(named)} tensors, {sum(each.numel() for each in named.values())} numbers, digest {digest}",
            "data": f"{sampler.size} samples in {sampler.num_batches} batches of {sampler.batch_size}, {order}",
            "optimizers": ", ".join(type(optimizer).__name__ for optimizer in self.optimizers),
            "max_steps": str(trainer.max_steps),
        }

    def _listen(self, store: Any) -> None:
        """Follow what changes, at each heartbeat."""
        assert self._membership is not None
        assert self._edges is not None
        assert self._newcomers is not None
        self._edges.follow(store)
        self._newcomers.listen(store)
        self._look_for_needed(store)
        members = self._membership.members
        rounds = self._configured
        may_hurry = isinstance(rounds, AbstractOpenRounds) and rounds.may_end_early and members.phase == "training"
        if may_hurry and self._membership.is_hurried(store):
            self._hurried = members.epoch, members.round
        if self._stops_at is None and store.check([f"stop/{self._membership.members.epoch}"]):
            self._stops_at = self._membership.members.epoch
        if frozenset(self._membership.members.living) != self._told_members:
            self._tell_changes(self._membership.members)

    def _look_for_needed(self, store: Any) -> None:
        """End the run if a worker is gone without whom the others cannot go on; at each heartbeat."""
        assert self._membership is not None
        if self._membership.failure is not None:  # who is lost after that one is lost because of it
            return
        lost = self._membership.lost_of(self._needs, self._needed, store)
        if lost is not None:
            self._membership.failure = _lost(lost, f"{self._method} needs it")

    def _tell_changes(self, members: Members) -> None:
        before, self._told_members = self._told_members, frozenset(members.living)
        came, gone = (
            sorted(each.rank for each in change)
            for change in (self._told_members - before, before - self._told_members)
        )
        what = [f"{came} joined"] * bool(came) + [f"{gone} left or lost"] * bool(gone)
        self._tell(f"sees workers {list(members.ranks)} in epoch {members.epoch}: {', '.join(what)}")

    def _tell(self, what: str) -> None:
        log.info("worker %d %s", self.global_rank, what)

    # -- data ---------------------------------------------------------------------------------------------------------

    def _begin_sharing(self, epoch: int, sampler: SharedEpochSampler) -> None:
        """Begin an epoch, with all that are there; or join it."""
        membership = self._membership
        assert membership is not None
        assert self._newcomers is not None
        assert self.lightning_module is not None
        if self._began == epoch or not membership.takes_part:
            return
        self._began, self._stops_at, self._round_began = epoch, None, None
        self._newcomers.begin_epoch()
        if membership.members.phase == "gathering":
            self._wait_for_others(membership)
        if self._ahead is None or membership.members.phase != "training":
            membership.advance(
                f"begin/{epoch}",
                lambda members: members.training(epoch),
                lambda members: members.phase == "training" and members.epoch == epoch,
            )
        for rank in self._needs:
            if rank not in membership.members.ranks:
                raise _lost(rank, f"{self._method} needs it")
        dealt = membership.members.dealt
        place = self._ahead if membership.life not in dealt else dealt.index(membership.life)
        assert place is not None
        self._ahead = None
        if max(place + 1, len(dealt)) > sampler.num_batches:
            raise ConfigurationError(
                f"OpenStrategy got {len(dealt)} workers for {sampler.num_batches} batches in an epoch; each needs one. "
                "Start fewer workers, or make the batches smaller."
            )
        sampler.rank, sampler.world_size = place, len(dealt)
        self._sampler = sampler
        self._note_claims(epoch, [place])
        self._tell_lightning_who_leads()

    def _tell_lightning_who_leads(self) -> None:
        """Let loggers and messages be those of the first of the workers that are there."""
        rank_zero_only.rank = 0 if self.is_global_zero else max(1, self.global_rank)  # type: ignore[attr-defined]

    def _wait_for_others(self, membership: Membership) -> None:
        began = time.monotonic()
        wanted = max(self.world_size, self.least_workers or 1)

        def over() -> bool:
            members = membership.members
            waited = time.monotonic() - began > self.exchange_timeout_seconds
            return len(members.living) >= wanted or members.phase != "gathering" or waited

        if not over():
            self._tell(f"waits until {wanted} workers are there, at most {self.exchange_timeout_seconds:g} s")
        membership.wait_in_training(over)
        here = len(membership.members.living)
        if membership.members.phase != "gathering" or here >= wanted or here >= (self.least_workers or wanted):
            return
        beside = membership.living_jobs()
        if self.least_workers is None and not beside:
            return
        raise ConfigurationError(
            f"Worker {self.global_rank} got {here} worker{'s' * (here != 1)} in the job {membership.job!r} within "
            f"{self.exchange_timeout_seconds:g} s; it needs {self.least_workers or wanted} to begin"
            + (f", for there is also {listed(beside)} at this rendezvous" if beside else "")
            + f". Start the others with the same name in {JOB}; to begin with those that come, as "
            "a job of its own, write OpenStrategy(least_workers=1)."
        )

    def _claim_batches(self, epoch: int, count: int, held: Sequence[int]) -> list[int]:
        """Claim batches on a connection of its own, for it may be beside a step; and note whose they are."""
        membership, sampler = self._membership, self._sampler
        assert membership is not None
        assert sampler is not None
        claimed = membership.claim(self._num_batches(epoch, sampler), count, epoch, self._claiming)
        dealt = sampler.world_size
        in_hand = [*sampler.taken.copy(), *(number + dealt for number in held), *claimed]
        self._note_claims(epoch, in_hand, self._claiming)
        return [batch - dealt for batch in claimed or [sampler.num_batches]]

    def _num_batches(self, epoch: int, sampler: SharedEpochSampler) -> int:
        """Tell how many batches all workers take of an epoch: all of it, or what is left of ``max_steps``."""
        assert self.lightning_module is not None
        most = self.lightning_module.trainer.max_steps
        return sampler.num_batches if most == -1 else min(sampler.num_batches, most - epoch * sampler.num_batches)

    def _note_claims(self, epoch: int, batches: Sequence[int], store: Any = None) -> None:
        assert self._membership is not None
        (store or self._membership.store).set(f"claimed/{epoch}/{self._membership.life}", json.dumps(list(batches)))

    # -- steps --------------------------------------------------------------------------------------------------------

    def _begin_step(self) -> None:
        membership = self._membership
        assert membership is not None
        assert self._newcomers is not None
        membership.check()
        if not any(stepper.active for stepper in self._steppers):
            for stepper in self._steppers:
                self._follow(stepper)
            self._newcomers.serve()
            self._end_round_if_due(membership)
            self._round_began = self._round_began or time.monotonic()
        super()._begin_step()

    def _follow(self, stepper: Stepper) -> bool:
        """Let a stepper know who is there; tell whether what it waits for cannot come any more in this epoch."""
        membership = self._membership
        assert membership is not None
        members = membership.members
        if self.global_rank in members.ranks:
            stepper.follow(self._among(members.ranks))
        return not membership.takes_part or (members.phase == "training" and members.closed)

    def _look(self, stepper: Stepper) -> bool:
        assert self._membership is not None
        self._membership.check()
        return self._follow(stepper)

    def _end_round_if_due(self, membership: Membership) -> None:
        """Average with all that are there, where the steps of a round of local updates are made."""
        algorithm = self._configured
        if not isinstance(algorithm, AbstractOpenRounds):
            return
        hurried = self._hurried == (membership.members.epoch, membership.members.round)
        if any(algorithm.is_due(stepper.worker) for stepper in self._steppers) or hurried:
            self._end_round(membership, hurried)

    def _end_round(self, membership: Membership, hurried: bool) -> None:
        began = time.monotonic()
        assert self._newcomers is not None
        self._newcomers.await_guests()
        if not membership.end_round(self._round_began or began, self._patience):
            return  # an epoch ends before
        met = time.monotonic()
        epoch, number = (
            membership.members.epoch,
            membership.members.round,
        )  # others may go on as soon as all have made it
        ranks = list(self._average())
        waited, seconds = met - began, time.monotonic() - met
        log.debug(
            "worker %d averaged round %d of epoch %d with workers %s in %.2f s, after waiting for %.2f s%s",
            *(self.global_rank, number, epoch, ranks, seconds, waited, ", asked to end it" * hurried),
        )
        membership.go_on(Members.averaged, lambda members: (members.epoch, members.round) > (epoch, number))
        self._round_began = None

    def _average(self) -> tuple[int, ...]:
        """Let the algorithm end its round with all that are there, and again without those that are lost meanwhile;
        return the ranks of who has made it last."""
        communicator = self._communicator
        assert communicator is not None
        ranks = communicator.meet_for_exchanges(again=False)
        for stepper in self._steppers:
            deadline = time.monotonic() + self.exchange_timeout_seconds
            while True:
                stepper.follow(self._among(ranks))
                try:
                    stepper.end_round()
                    break
                except NotMade as failure:
                    if failure.here and time.monotonic() > deadline:
                        seconds = self.exchange_timeout_seconds
                        raise never_averages(self.global_rank, failure.members, seconds) from failure
                    ranks = communicator.meet_for_exchanges(again=True)
        return ranks

    def _follow_loop(self, trainer: Trainer) -> None:
        """Let the end of an epoch be where all that are there meet."""
        loop = trainer.fit_loop.epoch_loop
        self._replaced.append(
            private.replace(loop, "on_advance_end", partial(self._after_batch, trainer, loop.on_advance_end))
        )
        self._replaced.append(
            private.replace(
                trainer.fit_loop, "on_advance_end", partial(self._after_epoch, trainer, trainer.fit_loop.on_advance_end)
            )
        )
        self._replaced += look_at_own_clocks(trainer)

    def _after_batch(self, trainer: Trainer, finish: Any, fetcher: Any) -> None:
        assert self._membership is not None
        noticed = trainer.received_sigterm
        if noticed and self._departs():
            raise SIGTERMException
        epoch = trainer.current_epoch
        if self._stops_at == epoch:
            trainer.should_stop = True
        stops = trainer.should_stop and private.can_stop_early(trainer)
        if stops and self._announced != epoch:
            self._announced = epoch
            self._membership.store.set(f"stop/{epoch}", "")
        if stops or trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            self._end_epoch(trainer)
        with private.unnoticed_sigterm(trainer) if noticed else nullcontext():
            finish(fetcher)

    def _while_waiting(self, trainer: Trainer) -> None:
        """Give copies while this worker waits for others; for a while only, if it is to leave."""
        assert self._newcomers is not None
        self._newcomers.serve()
        if trainer.received_sigterm:
            now = time.monotonic()
            self._leaves_by = self._leaves_by or now + min(_DEPART_SECONDS, self.exchange_timeout_seconds)
            if now > self._leaves_by:
                raise SIGTERMException

    def _departs(self) -> bool:
        """Hand over what others have not of this worker, give its batches back, and leave; within some seconds.

        Returns:
            Whether it has left. Not if all others may be at the end of the epoch: it makes the batches that it has
            taken first, which nobody would take any more.
        """
        membership, epochs = self._membership, self._epochs
        assert membership is not None
        assert epochs is not None
        assert self._edges is not None
        began, seconds = time.monotonic(), min(_DEPART_SECONDS, self.exchange_timeout_seconds)
        self._leaves_by = self._leaves_by or began + seconds
        if self._finishes_first(membership, epochs):
            return False
        late = threading.Timer(seconds, self._edges.close, (0.0, True))  # a call to one that stands still breaks then
        late.daemon = True
        late.start()
        try:
            if membership.members.phase == "training":
                self._hand_over(membership)
        except (PeerLost, SIGTERMException) as failure:  # the others do not come in time, or are lost
            log.info("worker %d leaves with what others have not of it: %s", self.global_rank, failure or "too late")
        finally:
            late.cancel()
        if self._began == membership.members.epoch and membership.failure is None:
            unfinished = epochs.unfinished()
            self._note_claims(self._began, unfinished)
            if unfinished and self._trains_on(membership) and not membership.gives_back(self._batches_of(epochs)):
                return False
            self._tell(
                f"leaves after SIGTERM, {time.monotonic() - began:.2f} s after its batch; {len(unfinished)} batches "
                "that it had taken go to others"
            )
        self._leave()
        return True

    def _trains_on(self, membership: Membership) -> bool:
        """Tell whether this worker, which is to leave, could make its batches before it does."""
        assert self._leaves_by is not None
        trains = membership.takes_part and membership.members.phase == "training" and membership.failure is None
        return trains and self._began is not None and time.monotonic() <= self._leaves_by

    def _finishes_first(self, membership: Membership, epochs: SharedEpochs) -> bool:
        if not self._trains_on(membership) or not epochs.unfinished():
            return False
        return membership.all_claimed(self._batches_of(epochs))

    def _batches_of(self, epochs: SharedEpochs) -> int:
        assert self._began is not None
        return self._num_batches(self._began, epochs.sampler)

    def _hand_over(self, membership: Membership) -> None:
        if isinstance(self._configured, AbstractOpenRounds):
            if self._round_began is not None and not membership.members.closed:
                membership.hurry()
                self._end_round(membership, hurried=True)
            return
        assert self._edges is not None
        for stepper in self._steppers:
            self._follow(stepper)
            stepper.depart(self._edges.open_to)

    def _end_epoch(self, trainer: Trainer) -> None:
        """Meet all that are there at the end of an epoch's batches; once."""
        membership = self._membership
        assert membership is not None
        if not membership.takes_part or membership.members.phase != "training":
            return
        epoch = self._began
        assert isinstance(self._configured, AbstractAsynchronousAlgorithm)
        if isinstance(self._configured, AbstractOpenRounds) or self._configured.needs:
            membership.close_rounds()  # and nobody waits for this worker's part in an update of a server
        membership.advance(
            f"end/{epoch}",
            lambda members: members.meeting(),
            lambda members: members.phase == "meeting" and members.epoch == epoch,
        )
        if isinstance(self._configured, AbstractOpenRounds) and self._configured.ends_with_epoch:
            self._average()
        self._tell_lightning_who_leads()
        self._agree_to_stop(trainer)

    def _after_epoch(self, trainer: Trainer, finish: Any) -> None:
        finish()
        self._agree_to_stop(trainer)

    def _agree_to_stop(self, trainer: Trainer) -> None:
        """Stop if one of those that are there does, or all together have made the steps that they were to make."""
        assert self._membership is not None
        assert self._sampler is not None
        assert self._began is not None
        if self._membership.meets:
            through = 0 <= trainer.max_steps <= (self._began + 1) * self._sampler.num_batches
            said = self._membership.gather("whether to stop", bytes([trainer.should_stop or through]))
            self._validates = [member.life for member in said].index(self._membership.life), len(said)
            private.deal_validation(trainer, *self._validates)
            trainer.should_stop = any(each == b"\x01" for each in said.values())

    def _reduce_first(self, trainer: Trainer, epoch_end_reached: Any) -> None:
        self._end_epoch(trainer)  # where user code has ended it
        super()._reduce_first(trainer, epoch_end_reached)

    # -- what all that are there do together --------------------------------------------------------------------------

    @property
    def _together(self) -> bool:
        return self._membership is not None and self._membership.meets and not self._interrupted

    def barrier(self, *args: Any, **kwargs: Any) -> None:
        if self._together:
            assert self._membership is not None
            self._membership.gather("a barrier")

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """Return what the first of those that are there has: plain values."""
        if not self._together:
            return obj
        assert self._membership is not None
        given = self._membership.gather("a broadcast", to_text(obj).encode())
        return from_text(next(iter(given.values())))

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        if not self._together:
            return super().reduce(tensor, group, reduce_op) if self.in_a_batch and not self._deciding else tensor
        rows = self.gather_rows(tensor if isinstance(tensor, Tensor) else torch.tensor(tensor))
        operation = operation_of(reduce_op)
        if is_reduction(operation):
            return reduced(torch.stack(rows), operation)
        raise ConfigurationError(
            f"OpenStrategy got reduce_op={reduce_op!r}, needs mean, sum, product, max or min. Gather the values "
            "instead."
        )

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        if not self._together:
            return decision
        assert self._membership is not None
        given = [each == b"\x01" for each in self._membership.gather("a decision", bytes([decision])).values()]
        return sum(given) == len(given) if all else any(given)

    def gather_rows(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> list[Tensor]:
        if not self._together:
            return [tensor]
        assert self._membership is not None
        form = to_text((str(tensor.dtype).removeprefix("torch."), list(tensor.shape))).encode()
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        rows = []
        for given in self._membership.gather("all_gather", len(form).to_bytes(4, "big") + form + raw).values():
            length = 4 + int.from_bytes(given[:4], "big")
            name, shape = from_text(given[4:length])
            values = torch.frombuffer(bytearray(given[length:]), dtype=torch.uint8) if given[length:] else None
            kind = getattr(torch, name)
            row = torch.empty(shape, dtype=kind) if values is None else values.view(kind).view(shape)
            rows.append(row.to(tensor.device))
        return rows

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """Let the first of those that are there write the file; if it is lost meanwhile, the next one."""
        membership = self._membership
        takes_part = self._together or (self._interrupted and bool(self._steppers))
        if takes_part and "optimizer_states" in checkpoint and isinstance(self._configured, AbstractOpenRounds):
            checkpoint[_ROUNDS] = {
                "algorithm": repr(self._configured),
                "steps": [stepper.worker.step for stepper in self._steppers],
                "rounds": [handed_over(stepper) for stepper in self._steppers],
            }
        if self._interrupted:
            self._save_own(checkpoint, filepath, storage_options)
            return
        while True:
            writes = self.is_global_zero
            super().save_checkpoint(checkpoint, filepath, storage_options)
            if membership is None or not self._together:
                return
            self._checkpoints.finish()
            if any(membership.gather("a checkpoint", b"written" if writes else b"").values()):
                return

    def _save_own(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any) -> None:
        """Write what this worker has, as it leaves the others, who go on: into a file of its own, beside theirs."""
        stem, suffix = os.path.splitext(os.fspath(filepath))  # which may be of another file system
        path, files = f"{stem}-of-worker-{self.global_rank}{suffix}", self._checkpoints.files
        kept = files.kept(checkpoint)
        files.run(lambda: files.plugin.save_checkpoint(kept, path, storage_options=storage_options))
        self._tell(f"writes its own checkpoint, {path}")

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        loaded = super().load_checkpoint(checkpoint_path, weights_only)
        self._resumed = loaded.get(_ROUNDS)
        return loaded

    # -- the end ------------------------------------------------------------------------------------------------------

    def on_train_end(self) -> None:
        super().on_train_end()
        self._leave()

    def on_exception(self, exception: BaseException) -> None:
        self._leave()
        super().on_exception(exception)

    def teardown(self) -> None:
        self._leave()
        if self._newcomers is not None:
            self._newcomers.close()
        if self._membership is not None:
            self._membership.close()  # before that is gone which its heartbeat looks at
        super().teardown()
        self._membership = None

    def _leave(self) -> None:
        """Leave the others, who go on without this worker."""
        membership = self._membership
        if membership is not None and membership.takes_part:
            self._led = membership.leads
            try:
                membership.leave()
            except RuntimeError as error:  # the rendezvous has ended
                log.info("worker %d could not say that it leaves: %s", self.global_rank, error)

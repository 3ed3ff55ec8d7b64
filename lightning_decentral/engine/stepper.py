"""One optimizer's parameters as a decentralized model: what the training loop calls around its passes and updates.

The file is long because each of these decides what user code sees of the weights, and what becomes of its changes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

from lightning_decentral.conduct import Conduct
from lightning_decentral.engine.answering import Answering
from lightning_decentral.engine.monitor import Monitor
from lightning_decentral.engine.program import Program
from lightning_decentral.engine.update_lengths import UpdateLengths
from lightning_decentral.errors import ConfigurationError, ProtocolError
from lightning_decentral.flat import FlatParameters, Vector
from lightning_decentral.protocol import (
    AbstractAlgorithm,
    AbstractAsynchronousAlgorithm,
    AbstractOpenRounds,
    Gradient,
    LocalStep,
)
from lightning_decentral.transport.communicator import Communicator
from lightning_decentral.worker import Worker

_NUMBERS = 1 << 62  # fewer than a meeting can tell of
_PROBED_FIRST, _PROBED_EVERY = 8, 64  # steps in which changes are looked for that autograd does not count


class Stepper:
    """Drives one algorithm for the parameters of one optimizer.

    The training loop calls, for each step: `begin` (exchanges start), the forward and backward passes,
    `after_gradient` (whatever the algorithm does with the gradient), the update inside `updating`, and `finish`.

    User code may change parameters while they are exchanged: in a forward pass, by a step of an optimizer of its own,
    by ``weight.data = ...``. A *guarded* stepper shows it a copy then, and adds by how much it was changed to the
    model; an unguarded one lets the values count that user code has set, and is guarded from then on.

    Args:
        algorithm: resolved for this world size.
        parameters: the optimizer's parameters.
        communicator: moves the vectors.
        index: the optimizer's number.
        seed: that all workers share.
        guarded: whether user code is expected to change parameters in the middle of a step. Costs a copy of the model,
            and three passes over it in each step.
        layers: of each parameter its layer's number, for algorithms that take a model apart; see `flat.layers_of`.

    Attributes:
        worker: what the algorithm sees.
        flat: the parameters.
        x: this worker's own model.
        snapshot: the model at which the gradient is taken; the same object as ``x`` for most synchronous algorithms.
        guarded: whether user code sees a copy.
        updated: whether an update was made in this step.
        reads_gradients: whether the algorithm exchanges gradients.
        conduct: refuses what the protocol forbids.
        callee: what others call.
        lengths: measures updates, once somebody has asked for it.
        stale: how many of its updates were how stale.
    """

    def __init__(
        self,
        algorithm: AbstractAlgorithm,
        parameters: Sequence[torch.nn.Parameter],
        communicator: Communicator,
        index: int,
        seed: int,
        guarded: bool = False,
        layers: Sequence[int] | None = None,
    ) -> None:
        self.algorithm = algorithm
        self.communicator = communicator
        self.index = index
        self.flat = FlatParameters(parameters, layers)
        self.monitor = Monitor(communicator.device)
        self.x = self.flat.x
        self._asynchronous = isinstance(algorithm, AbstractAsynchronousAlgorithm) and algorithm.is_called
        # Who takes no gradient, or whom nobody calls, needs no copy that stays as it is while calls change the model.
        self._separate = communicator.world_size > 1 and _changes_beside(algorithm, communicator.rank)
        self.snapshot = self.x.clone() if self._separate else self.x
        self.worker = Worker(communicator.rank, communicator.world_size, self.x, self.snapshot)
        self.worker.read_gradient = self._read_gradient
        self._seed = seed + 1_000_003 * index
        self.worker.seed(self._seed)
        self.guarded = guarded
        self.updated = False
        self.lengths: UpdateLengths | None = None
        self.stale = Counter[int]()
        self._rested: tuple[int, int] | None = None  # at which step and version it last did
        self._meets = False
        self.reads_gradients = algorithm.exchanges_gradients
        self._keeps_changes = False  # this step, if user code makes any while the gradient is computed
        self._gradient: Vector | None = None
        self._copy: Vector | None = None  # that user code sees, if guarded
        self._copied: Vector | None = None  # of what, while it does
        self._shown = self.x  # what the parameters are views of, but for evaluation
        self._versions = self.flat.versions()
        self._fingerprint: list[int] | None = None
        self.conduct = Conduct(algorithm, self.worker)
        self.callee = Answering(algorithm, self.worker, self.conduct, self.monitor, self.flat, communicator, index)
        self._program = Program(
            algorithm, self.worker, self.conduct, self.monitor, self.flat, communicator, self.callee
        )
        algorithm.init(self.worker)
        self.callee.open()
        # An algorithm may take its gradients at a vector of its own, which its steps set.
        self._ahead = self.worker.snapshot is not self.snapshot
        assert isinstance(self.worker.snapshot, Vector)
        self.snapshot = self.worker.snapshot

    def share(self) -> None:
        """Let all workers of this host have one model, in memory that they share. All workers together.

        Raises:
            ConfigurationError: if they are not all on one host, or the model is not in its memory.
        """
        if self.communicator.world_size > 1:
            shared = self.communicator.common_memory(type(self.algorithm).__name__, self.index, self.x)
            self.flat.swap(self.x, shared)
            self.flat.lent = self.x

    def follow(self, algorithm: AbstractAsynchronousAlgorithm) -> None:
        """Go over to an algorithm that differs in who takes part; between two steps, or where one waits in `Until`."""
        with self.monitor:
            algorithm.notice(self.worker)
            self.algorithm = algorithm
            self._program.follow(algorithm)
            self.callee.follow(algorithm)
            self.conduct.follow(algorithm)

    @property
    def active(self) -> bool:
        """Whether a step has begun and not finished."""
        return self._program.active

    @property
    def awaits_update(self) -> bool:
        """Whether the step, or an answer that it makes one for, wants an update now."""
        return isinstance(self._program.reached, LocalStep)

    @property
    def serves(self) -> bool:
        """Whether gradients are sent to a server, or this worker is one."""
        return isinstance(self.algorithm, AbstractAsynchronousAlgorithm) and self.algorithm.updates_in_answers

    def update_beside(self) -> None:
        """Make the update that the step wants now as an answer would, where the training loop makes none."""
        reached = self._program.reached
        assert isinstance(reached, LocalStep)
        assert isinstance(reached.gradient, Vector)
        with self.monitor:
            beside = self.callee.update_beside
            updated = beside is not None and beside(reached.gradient, reached.shard)
        self.made(updated)

    @property
    def awaits_gradient(self) -> bool:
        """Whether a step has begun, and its gradient is not there yet."""
        return isinstance(self._program.reached, Gradient)

    def begin(self, gradient_is_there: bool = False) -> None:
        """Begin a step: the parameters are the snapshot from here to the update.

        Args:
            gradient_is_there: whether the gradient was computed already, at what user code sees now.
        """
        if not gradient_is_there:
            self.settle(show=False)
            self._meets = False
            self._take_snapshot()
        self._program.begin()
        self._keeps_changes = self.reads_gradients and not self.conduct.is_averaged(self.x)
        self.updated = False
        if not gradient_is_there:
            if self._gradient is not None and (self.serves or not self._asynchronous):
                self.flat.gather_early(None if self.conduct.is_under_way(self._gradient) else self._gradient)
            self._show(self.snapshot, copy=self.guarded)
            self._fingerprint = self._shown.fingerprint() if self._is_probed else None

    def begins_anew(self) -> bool:
        """Let the algorithm say, between two micro-batches, whether the gradient begins anew, at the model as it is.

        What was computed so far is forgotten then. Of a guarded stepper it is not asked: what user code has changed
        meanwhile belongs to a gradient that comes to its end.
        """
        if self.guarded or not self._program.begins_anew():
            return False
        self._take_snapshot()
        self._show(self.snapshot)
        self._fingerprint = self._shown.fingerprint() if self._is_probed else None
        for parameter in self.flat.parameters:
            parameter.grad = None
        return True

    def after_gradient(self) -> None:
        """Go on to the update, since the gradient is there."""
        set_by_user = [] if self.guarded or self._keeps_changes else self._set_by_user()
        apart = self._stays_apart
        changes = self._take_changes()
        self.updated |= changes is not None or bool(set_by_user)
        if self.awaits_gradient:  # or the step was told that what it waits for cannot come any more
            self.conduct.gradient_is_there()
            self.communicator.standstill.gradients += 1
            self._program.advance(None)
        if apart:
            self._measure_staleness()
            self._take_snapshot()  # with what has been averaged meanwhile
            assert self._copy is not None
            self._copy.add_(self.snapshot)  # it held the changes
            self._copied = self.snapshot
            return
        if changes is None and not set_by_user:
            return
        target = self._target
        with self.monitor:
            if changes is not None:
                target.add_(changes)
            if set_by_user:
                views = self.flat.layout.views(target)
                for position, value in set_by_user:
                    views[position].copy_(value)
                self.guarded = True

    @contextmanager
    def updating(self) -> Iterator[bool]:
        """Holds the worker still while the optimizer updates ``x``; yields whether the algorithm wants an update.

        May be entered again in the same step: what follows the first update is this worker's own affair.
        """
        if self._stays_apart:
            self._refuse_another_vector()
            self.flat.bind(self._shown)
            yield from self._directed()
            return
        with self.monitor:
            changes = self._take_changes()
            target = self._target
            if changes is not None:
                target.add_(changes)
            self.flat.bind(target)
            if not self.updated:
                self._measure_staleness()
            with nullcontext() if self.lengths is None else self.lengths.around(target):
                yield from self._directed()

    def _refuse_another_vector(self) -> None:
        reached = self._program.reached
        if isinstance(reached, LocalStep) and reached.at is not None:
            raise ProtocolError(
                f"{type(self.algorithm).__name__} got, in step {self.worker.step} of worker {self.worker.rank}, "
                "`LocalStep` with `at=`, of a model that user code changes while others call; it needs an update of "
                "`worker.x` there. Leave `at=` out, or the changes."
            )

    def _directed(self) -> Iterator[bool]:
        """Let the parameters have what the update applies in the place of their gradients, if there is something.

        Yields whether the algorithm wants an update, which is made then.
        """
        reached = self._program.reached
        wanted = not self.active or isinstance(reached, LocalStep)
        given = reached if isinstance(reached, LocalStep) and not self.updated else LocalStep()
        if given.gradient is None:
            self.flat.sparsify_gradients()
            yield wanted
            return
        assert isinstance(given.gradient, Vector)
        self.flat.show_gradient(given.gradient, given.shard)
        yield wanted
        for parameter in self.flat.parameters:
            parameter.grad = None  # or what user code does with it later would be done to a vector of the algorithm

    def show_updated(self) -> None:
        """Let the parameters be the updated model, for what user code does in the rest of the batch."""
        if self._stays_apart:
            return
        if self._separate:
            self._take_snapshot()
            self._show(self.snapshot)
        else:
            self._show(self._target)

    def show_gradient(self) -> bool:
        """Let parameters have the gradient that the algorithm has made, where it is not zero; tell if there is any."""
        assert self._gradient is not None
        found = False
        for parameter, view in zip(self.flat.parameters, self.flat.layout.views(self._gradient), strict=True):
            shown = bool(view.any())
            parameter.grad = view if shown else None
            found |= shown
        self.flat.sparsify_gradients()
        return found

    def made(self, updated: bool) -> None:
        """Go on with the step after its update, made or skipped, until the training loop has something to do again."""
        if not self._stays_apart:
            with self.monitor:
                changes = self._take_changes()
                if changes is not None:
                    self._target.add_(changes)
                replaced = self.flat.collect()  # what an optimizer has put in the place of parameters
                if replaced and self.algorithm.shares_model and self.communicator.world_size > 1:
                    self._refuse_replacement(replaced[0])
                self.worker.version += int(updated or changes is not None)
        if self.awaits_update:
            self._program.advance(updated)

    def _refuse_replacement(self, position: int) -> None:
        name, worker = type(self.algorithm).__name__, self.worker
        raise ConfigurationError(
            f"{name} got, in step {worker.step} of worker {worker.rank}, new data for parameter {position} in an "
            "update (as by `p.data = ...`), which would undo what the others have written meanwhile into the model "
            "that all share; it needs an optimizer that changes parameters in place. Use one, such as torch's, or "
            "APSGD, whose server makes one update after the other."
        )

    def finish(self, updated: bool) -> None:
        """Run the rest of the step, since the update was made or skipped."""
        apart = self._stays_apart
        self.made(updated)
        self.end(apart)

    def end(self, apart: bool = False) -> None:
        """End the step."""
        self._program.end()
        self.worker.step += self.conduct.counts
        if not apart:
            self._show_idle()

    @property
    def went_on(self) -> bool:
        """Whether this worker's model may have changed since it last rested, or a step is under way."""
        return self.active or self._rested != (self.worker.step, self.worker.version)

    def rest(self) -> None:
        """Bring to an end what the algorithm keeps under way. All workers together, between two steps."""
        if not self.active:
            self._program.rest()
            self._rested = self.worker.step, self.worker.version

    def end_round(self) -> None:
        """Let the algorithm average with all that are there. All of them together, between two steps."""
        algorithm = self.algorithm
        assert isinstance(algorithm, AbstractOpenRounds)
        self.settle()
        self._program.run_between_steps(algorithm.end_round(self.worker))

    def depart(self, neighbors: Sequence[int]) -> None:
        """Let the algorithm hand over what others have not of this worker, which is about to leave; between two steps.

        Args:
            neighbors: to whom there is a connection.
        """
        algorithm = self.algorithm
        assert isinstance(algorithm, AbstractAsynchronousAlgorithm)
        self.settle()
        self.conduct.let_call(neighbors)
        self._program.run_between_steps(algorithm.depart(self.worker, neighbors))
        self.settle()

    @property
    def changed_in_place(self) -> bool:
        """Whether user code has changed parameters in place since they were shown to it (not through ``.data``)."""
        return self._versions != self.flat.versions()

    def settle(self, show: bool = True) -> None:
        """Let ``x`` have what user code has changed since the last step.

        Args:
            show: whether user code sees parameters after this, before the next step begins.
        """
        if self.active:
            return
        with self.monitor:
            sees_copy = self._copied is not None
            changes = self._take_changes()
            if changes is not None and not self._changed_by_all:
                self.x.add_(changes)
                self.worker.version += 1
            replaced = bool(self.flat.collect())
            if self._separate and (replaced or self.changed_in_place):
                self.guarded = True  # calls of others change x while it does so
        if sees_copy and show:
            self.show_apart()

    @property
    def _changed_by_all(self) -> bool:
        """Whether what user code changes now all workers change, in the one model that they have: worker 0 does it."""
        return self.algorithm.shares_model and self._meets and self.worker.rank > 0

    def show_apart(self, meets: bool = False) -> None:
        """Let user code see a copy of an asynchronous worker's model, until a step begins.

        What it puts in the place of parameters, and takes out again, does not get into the memory that others read.

        Args:
            meets: whether all workers are about to meet, for a validation or the end of an epoch.
        """
        self._meets |= meets
        if self._separate and not self.active and self._copied is None:  # or it would lose what has changed
            if not self.guarded:  # now and then, when no call is under way
                self.communicator.leases.trim()
            self._take_snapshot()
            self._show(self.snapshot, copy=True)

    @property
    def _is_probed(self) -> bool:
        """Whether this step looks for changes that autograd does not count: two passes over the model."""
        step = self.worker.step
        may_be_lost = not (self.guarded or self._keeps_changes or self.algorithm.shares_model)
        return may_be_lost and (step < _PROBED_FIRST or step % _PROBED_EVERY == 0)

    @property
    def _target(self) -> Vector:
        """What the optimizer changes."""
        at = self._program.reached.at if isinstance(self._program.reached, LocalStep) else None
        assert at is None or isinstance(at, Vector)
        return self.x if at is None else at

    @property
    def _stays_apart(self) -> bool:
        """Whether user code and optimizer have a copy to themselves, and others see what they have made of it at once.

        Who calls must not meet a model that the optimizer has changed, and a constraint has not been put on yet.
        """
        return self._separate and self.guarded and self._copied is not None

    def _measure_staleness(self) -> None:
        self.callee.note_answers()
        self.worker.staleness = self.worker.version - self.worker.snapshot_version
        self.stale[self.worker.staleness] += 1

    def _take_snapshot(self) -> None:
        if not self._separate:  # the snapshot is `x`
            self.worker.snapshot_version = self.worker.version
            return
        with self.monitor:
            self.snapshot.copy_(self.x)
            self.callee.note_answers()
            self.worker.snapshot_version = self.worker.version

    def _show_idle(self) -> None:
        """Let the parameters be the model between two steps: a copy of a guarded one that calls may change."""
        if self._separate and self.guarded:
            self.show_apart()
        else:
            self._show(self.x)

    def _show(self, vector: Vector, copy: bool = False) -> None:
        """Let the parameters be views of a vector, or of a copy of it."""
        self._copied = vector if copy else None
        if not self.guarded and not copy:
            self._copy = None
        if copy:
            if self._copy is None:
                self._copy = self.x.empty_like()
            vector = self._copy.copy_(vector)
        self._shown = vector
        self.flat.bind(vector)
        self._versions = self.flat.versions()

    def _take_changes(self) -> Vector | None:
        """Return by how much user code has changed the copy that it saw, if it has; the copy is used up."""
        copied, self._copied = self._copied, None
        if copied is None:
            return None
        self.flat.collect()
        assert self._copy is not None
        changes = self._copy.add_(copied, alpha=-1.0)
        return changes if any(bool(buffer.any()) for buffer in changes.buffers) else None

    def _set_by_user(self) -> list[tuple[int, Tensor]]:
        """Parameters that user code has changed since the step began, with the values that it has given them."""
        replaced = self.flat.collect()
        now = self.flat.versions()
        changed = [i for i, (before, after) in enumerate(zip(self._versions, now, strict=True)) if before != after]
        changed = sorted({*replaced, *changed})
        if not changed and self._fingerprint is not None and self._fingerprint != self._shown.fingerprint():
            changed = list(range(len(now)))  # through ``.data``, which autograd does not count
        return [(i, self.flat.parameters[i].detach().clone()) for i in changed]

    def abandon(self) -> None:
        """Drop a step that has begun, so that `x` can be given other values. All workers, with nothing under way."""
        self._program.abandon()
        self._show(self.x)

    def begin_anew(self) -> None:
        """Let the algorithm begin at `x` as it is now, as if there had been no step."""
        worker = self.worker
        with self.monitor:
            worker.state.clear()
            worker.step = worker.version = worker.staleness = worker.snapshot_version = 0
            worker.seed(self._seed)
            self.algorithm.init(worker)
            assert isinstance(worker.snapshot, Vector)
            self.snapshot = worker.snapshot
            self._rested = None
        self.flat.forget_others(self.snapshot)

    def mean(self) -> Vector:
        """Take the mean of ``x`` over the workers that keep the model, in new memory. All workers together.

        Of one that is cut into shards, what its keepers have of it. Where all have the same bits, nothing is sent but a
        number that tells so.
        """
        self.settle()
        with self.monitor:
            mean = self.x.clone()
        size, shards = self.communicator.world_size, self.algorithm.shards
        if self.algorithm.alike_at_rest and size > 1:
            told = self.communicator.meet("a mean of the models", sum(mean.fingerprint()) % _NUMBERS)
            if len({row[0] for row in told}) == 1:
                return mean
        keepers = self.algorithm.keepers(size)
        if shards == 1:
            return self.communicator.consensus(mean, None if len(keepers) == size else keepers)
        for keeper, shard in zip(keepers, mean.slices(shards, mean.parameter_borders), strict=True):
            self.communicator.consensus(shard, (keeper,))
        return mean

    def bind_live(self) -> None:
        """Let the parameters be what training uses, after they were something else."""
        self.flat.bind(self._shown)

    def _read_gradient(self) -> Vector:
        self.reads_gradients |= not self._asynchronous  # whose others do not wait for it
        if self._gradient is None:
            self._gradient = self.x.clone()
        return self.flat.gather_gradient(self._gradient)


def _changes_beside(algorithm: AbstractAlgorithm, rank: int) -> bool:
    if not isinstance(algorithm, AbstractAsynchronousAlgorithm) or not algorithm.is_called:
        return False
    return algorithm.trains(rank) and algorithm.changes_beside(rank)

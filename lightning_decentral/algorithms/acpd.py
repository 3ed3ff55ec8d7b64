"""ACPD: a straggler-agnostic, communication-efficient distributed primal-dual method (Huo and Huang, 2019)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from lightning_decentral.algorithms.compressed_calls import SERVER, Place, require_place
from lightning_decentral.algorithms.primal_dual import AbstractPrimalDual, require_damping
from lightning_decentral.algorithms.server import known_count, require_count, trainers_at
from lightning_decentral.averaging.messages import add_decoded_, compressed, decoded, same_types
from lightning_decentral.compression import AbstractCompressor, Identity, TopK
from lightning_decentral.compression.validation import require_ratio
from lightning_decentral.flat import AbstractVector
from lightning_decentral.protocol import (
    AbstractAsynchronousAlgorithm,
    AllReduce,
    Call,
    Gradient,
    LocalStep,
    Mixing,
    Until,
)
from lightning_decentral.worker import Worker


@dataclass(frozen=True)
class ACPD(AbstractPrimalDual, AbstractAsynchronousAlgorithm):
    r"""ACPD: a server answers groups of the first workers that come, and only large changes travel, both ways.

    Of worker ``k`` of ``K``. It computes at ``v_k = w_k + e_k``: the model as it knows it, and what it has changed and
    not sent yet (the paper's ``sigma' r_k``)::

        v_k <- an update from v_k                    # local steps in dual coordinates; or your optimizer's step
        s_k  = the largest of e_k = v_k - w_k        # sent; v_k <- v_k - s_k
        server:  w   <- w + s_k / K
                 p_j <- p_j + s_k / K  for all j     # what worker j has not been told yet
        q_k  = the largest of p_k, when the group is complete;  p_k <- p_k - q_k
        w_k <- w_k + q_k;  v_k <- v_k + q_k

    A *group* is complete with the first ``group`` workers that have sent something; every ``max_delay``-th with all of
    them, so that nobody falls behind by more. At every moment ``w_k + p_k = w``, and ``w + (1/K) sum_k e_k`` is the
    model that has all changes: with `PrimalDualModule` it is ``w(alpha)``.

    Whenever all workers meet (an evaluation, a checkpoint) they settle what is unsent, by one all-reduce. For looks at
    the gap without it see ``look_every`` of `PrimalDualModule`.

    Args:
        group: ``B``, 1 to ``K``; ``None``: half of the workers that train, rounded up. ``K`` with ``ratio=1`` is
            `CoCoAPlus`.
        max_delay: ``T``, in groups, at least 1; 1: every group has all workers.
        ratio: share of the elements that travel, in (0, 1], each way.
        gamma: share of each worker's change that counts, in (0, 1]; 1: they are added, with ``sigma' = K``.
        server: ``"beside"``: worker 0 trains and serves. ``"dedicated"``: it serves only, and has no rows.
        local_steps: in dual coordinates, between two exchanges: how many, or as a share of the worker's rows in (0, 1];
            ``None``: as many as it has rows.

    Cost:
        A worker sends and receives ``ratio`` of the elements in each step, each with a position of 4 bytes; with
        ``ratio=1`` all, without. Memory: the model as a worker knows it, beside its own; at the server, worker 0, one
        vector for each worker that trains, and two more if it trains itself. A lost worker ends the run with
        `PeerLost`; so does the server.

    Differences with the paper:
        The server is worker 0, which trains too unless it is told not to, and exchanges with itself as the others do
        with it. All is scaled by ``sigma'``, which the paper multiplies ``r_k`` with: the method needs no ``lambda``,
        and works on gradients. Of parameters in half precision changes are added up, and sent, in float32. The
        published code sends positions in 8 bytes, sorts the first 1000 of them only, and leaves ``sigma'`` out of the
        denominator of its coordinate steps.

    References:
        Zhouyuan Huo, Heng Huang. Straggler-Agnostic and Communication-Efficient Distributed Primal-Dual Algorithm for
        High-Dimensional Data Mining. 2019, arXiv:1910.04235.

    Example:
        >>> ACPD().resolved(8).group
        4
    """

    group: int | None = None
    max_delay: int = 10
    ratio: float = 0.01
    gamma: float = 1.0
    server: Place = field(default="beside", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_damping("ACPD", self.gamma)
        require_ratio("ACPD", self.ratio)
        require_count("ACPD", "max_delay", self.max_delay)
        require_place("ACPD", self.server)
        if self.group is not None:
            require_count("ACPD", "group", self.group)

    def resolved(self, world_size: int) -> Self:
        trainers = trainers_at("ACPD", self.server, world_size)
        if self.group is None:
            return dataclasses.replace(self, group=-(-trainers // 2))
        require_count("ACPD", "group", self.group, trainers, ", the number of workers that train")
        return self

    def trains(self, rank: int) -> bool:
        return rank != SERVER or self.server == "beside"

    def damping(self, trainers: int) -> float:
        """Return ``gamma``."""
        return self.gamma

    @property
    def compressor(self) -> AbstractCompressor:
        """What makes the messages."""
        return Identity() if self.ratio == 1.0 else TopK(self.ratio)

    def keepers(self, world_size: int) -> tuple[int, ...]:
        return (SERVER,)

    def peers(self, rank: int) -> tuple[int, ...]:
        return () if rank == SERVER else (SERVER,)

    def mixing(self, world_size: int) -> Mixing:
        return Mixing(1.0, 1)  # there is one model

    def messages(self, worker: Worker) -> dict[str, AbstractVector]:
        return {"the largest changes": compressed(self.compressor, worker.x.zeros_like(), worker).vector}

    def init(self, worker: Worker) -> None:
        if worker.world_size == 1:
            return
        state = worker.state
        if self.trains(worker.rank):
            state["known"] = worker.x.zeros_like().add_(worker.x)  # w_k; all that is added up is in float32 at least
        if worker.rank == SERVER:
            if self.trains(SERVER):
                state["unsent"] = worker.x.zeros_like()  # e_0; the others' is x - w_k
            trainers = self._trainers(worker)
            state["pending"] = [worker.x.zeros_like() for _ in range(trainers)]  # of the last so many workers
            state.update(groups=0, came=[], answers={}, counts=[0] * worker.world_size)

    def _trainers(self, worker: Worker) -> int:
        return trainers_at("ACPD", self.server, worker.world_size)

    # -- a step -------------------------------------------------------------------------------------------------------

    async def step(self, worker: Worker) -> None:
        if worker.world_size == 1:
            await Gradient()
            await LocalStep()
        elif not self.trains(worker.rank):
            groups = worker.state["groups"]
            await Until(lambda: worker.state["groups"] > groups)
        elif worker.rank == SERVER:
            await self._step_of_server(worker)
        else:
            await self._step_of_worker(worker)

    async def _step_of_worker(self, worker: Worker) -> None:
        x, known = worker.x, worker.state["known"]
        await Gradient()
        await LocalStep()
        sent = self._take(known.clone().mul_(-1.0).add_(x), worker, x)
        answer = await Call(SERVER, sent)
        for vector in (x, known):
            self._add(vector, known, answer, 1.0)

    async def _step_of_server(self, worker: Worker) -> None:
        x, state = worker.x, worker.state
        known, unsent, pending = state["known"], state["unsent"], state["pending"][SERVER]
        worker.snapshot.copy_(known).add_(unsent)
        await Gradient()
        await LocalStep()
        # Others have changed x and p_0 meanwhile, both by the same; whatever else is new in x is the update.
        unsent.add_(x).add_(known, alpha=-1.0).add_(pending, alpha=-1.0)
        x.copy_(known).add_(pending)
        answer = await self._exchange(worker, SERVER, self._take(unsent, worker, unsent))
        add_decoded_(known, self.compressor, answer, 1.0)

    def _take(self, changes: AbstractVector, worker: Worker, out_of: AbstractVector) -> AbstractVector:
        """Make a message of the largest changes, which are gone from a vector then."""
        message = compressed(self.compressor, changes, worker).vector
        self._add(out_of, changes, message, -1.0)
        return message

    def _add(self, vector: AbstractVector, changes: AbstractVector, message: AbstractVector, share: float) -> None:
        """Add a message of changes, which are in float32 where the model is in half precision."""
        if same_types(vector, changes):
            add_decoded_(vector, self.compressor, message, share)
        else:
            vector.add_(decoded(changes, self.compressor, message), alpha=share)

    async def on_call(self, worker: Worker, source: int, theirs: AbstractVector) -> AbstractVector:
        return await self._exchange(worker, source, theirs)

    async def _exchange(self, worker: Worker, source: int, theirs: AbstractVector) -> AbstractVector:
        """Take what a worker has sent; when its group is complete, give what it has to know.

        Args:
            worker: the server.
            source: who has sent it.
            theirs: what was sent.
        """
        state, trainers = worker.state, self._trainers(worker)
        for vector in (worker.x, *state["pending"]):
            self._add(vector, state["pending"][0], theirs, 1.0 / trainers)
        state["came"].append(source)
        state["counts"][source] += 1
        groups = state["groups"]
        full = (groups + 1) % self.max_delay == 0
        if len(state["came"]) >= (trainers if full else self._needed):
            # All answers are made now: before those who wait have woken up, others may have sent their next changes.
            state["answers"].update((each, self._answer(worker, each)) for each in state["came"])
            state["groups"], state["came"] = groups + 1, []
        elif not await Until(lambda: state["groups"] > groups):
            state["came"].remove(source)  # the others have come to their end
            return self._answer(worker, source)
        answer: AbstractVector = state["answers"].pop(source)
        return answer

    def _answer(self, worker: Worker, source: int) -> AbstractVector:
        """Make the message of what a worker has to know."""
        pending: AbstractVector = worker.state["pending"][source - worker.world_size]
        return self._take(pending, worker, pending)

    @property
    def _needed(self) -> int:
        return known_count(self, self.group)

    async def rest(self, worker: Worker) -> None:
        """Let all workers have all changes: the model is ``w + (1/K) sum_k e_k``."""
        x, state, size = worker.x, worker.state, worker.world_size
        if size == 1:
            return
        changes = x.zeros_like()  # e_k
        if worker.rank != SERVER:
            changes.add_(x).add_(state["known"], alpha=-1.0)
        elif self.trains(SERVER):
            changes.add_(state["unsent"])
        whole = changes.mul_(size / self._trainers(worker))  # the mean is over all, and of those who train it counts
        if worker.rank == SERVER:
            whole.add_(x, alpha=size)
        await AllReduce(whole)
        x.copy_(whole)
        if self.trains(worker.rank):
            state["known"].copy_(whole)
        if worker.rank == SERVER:
            for vector in (*state["pending"], *([state["unsent"]] if self.trains(SERVER) else [])):
                vector.mul_(0.0)

    def report(self, worker: Worker) -> Mapping[str, Any]:
        """Tell how many groups were complete, and how many messages of whom have come."""
        if worker.rank != SERVER or worker.world_size == 1:
            return {}
        return {"groups": worker.state["groups"], "counts": worker.state["counts"]}

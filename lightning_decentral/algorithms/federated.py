"""FedAvg and its relatives: clients begin at a common model, and a server steps along what they have moved."""

from __future__ import annotations

import dataclasses
import functools
import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch

from lightning_decentral.algorithms.local_updates import OuterOptimizer, outer_step
from lightning_decentral.averaging.messages import same_types
from lightning_decentral.errors import ConfigurationError
from lightning_decentral.federated.algorithm import AbstractFederatedAlgorithm
from lightning_decentral.federated.clients import Clients, Round, Turn
from lightning_decentral.flat import AbstractVector, Vector
from lightning_decentral.protocol import AbstractErrorFeedbackAlgorithm, AllReduce, Gradient, LocalStep
from lightning_decentral.worker import Worker


@dataclass(frozen=True)
class AbstractFederated(AbstractFederatedAlgorithm, AbstractErrorFeedbackAlgorithm):
    r"""Rounds: a few clients begin at the common model w, and the server steps along what they have moved.

    ::

        w_k        <- w, then the local steps of client k
        difference <- sum_k p_k (w - w_k)                 # over the clients of the round
        w          <- the server's optimizer's step with `difference` as the gradient

    There is no process of a server: all workers make its step, with the same numbers. With `Clients` each worker is
    several clients in turn; without, each worker is one client, whose optimizer keeps its state.

    Subclasses are frozen dataclasses that say what the server's optimizer is.

    Args:
        every: local steps of a round without ``clients``, at least 1; with them, they say how many.
        server_learning_rate: of the server's optimizer, above 0.
        clients: who takes part in which round; none: each worker is a client, and all take part with the same weight.
    """

    every: int = 10
    server_learning_rate: float = 1.0
    clients: Clients | None = field(default=None, kw_only=True)

    @property
    @abstractmethod
    def outer_optimizer(self) -> OuterOptimizer:
        """What applies the difference to the common model."""

    def __post_init__(self) -> None:
        name = type(self).__name__
        if self.every < 1:
            raise ConfigurationError(f"{name}(every={self.every}): needs at least 1 step. Use 1 for each step.")
        if not self.server_learning_rate > 0.0:
            raise ConfigurationError(
                f"{name}(server_learning_rate={self.server_learning_rate}): needs a number above 0. Leave it out for "
                "the paper's."
            )
        if self.remembers_clients and self.clients is not None and not self.clients.stateful:
            raise ConfigurationError(
                f"{name} got {self.clients}, which remember nothing from one round to the next, but it keeps a vector "
                "of the model's size for each client; it needs clients that can. Use Clients(..., stateful=True) for "
                "a few that always come back, or FedAvg, FedMom or FedProx for many that do not."
            )

    @property
    def has_outer_gradient(self) -> bool:
        return True

    @property
    def population(self) -> Clients | None:
        """The clients; none: each worker is one, and takes part in each round."""
        return self.clients

    def of_population(self, population: Clients) -> Self:
        return dataclasses.replace(self, clients=population)

    def resolved(self, world_size: int) -> Self:
        return self

    def period(self, world_size: int) -> int:
        return self.every if self.clients is None else self._steps(0, world_size)

    # -- who does what in a round -------------------------------------------------------------------------------------

    def round(self, number: int, workers: int) -> Round:
        return _plan(self, number, workers)[0]

    def drawn(self, number: int, workers: int) -> Round:
        """Draw a round, which depends on these hyper-parameters, its number and the number of workers alone."""
        if self.clients is None:
            drawn = Round(tuple(Turn(rank, self.every, 1.0 / workers) for rank in range(workers)), workers)
        else:
            drawn = self.clients.round(number)
        weights = self.weights(drawn.turns)
        turns = (dataclasses.replace(turn, weight=own) for turn, own in zip(drawn.turns, weights, strict=True))
        return dataclasses.replace(drawn, turns=tuple(turns))

    def weights(self, turns: Sequence[Turn]) -> list[float]:
        """Tell how much each client of a round counts in the difference; as the clients say, by default."""
        return [turn.weight for turn in turns]

    def shares(self, number: int, workers: int) -> list[list[Turn]]:
        return _plan(self, number, workers)[1]

    def _steps(self, number: int, workers: int) -> int:
        """Steps of all workers in a round: as many as the one with the most has turns for."""
        return _plan(self, number, workers)[2]

    def turn(self, worker: Worker) -> Turn | None:
        state = worker.state
        if state["planned"] != state["round"]:
            share = self.shares(state["round"], worker.world_size)[worker.rank]
            state["turns"] = [dataclasses.astuple(turn) for turn in share]
            state["steps"] = self._steps(state["round"], worker.world_size)
            state["planned"] = state["round"]
        end = 0
        for own in state["turns"]:
            turn = Turn(*own)
            end += turn.steps
            if state["made"] < end:
                return turn
        return None

    def enter_round(self, worker: Worker, number: int) -> None:
        worker.state["round"] = number

    def abandon_round(self, worker: Worker) -> None:
        worker.x.copy_(worker.state["global"])
        worker.state.update(made=0, moved=0.0)
        worker.state.pop("total", None)

    def drift(self, worker: Worker) -> float:
        return float(worker.state["drift"])

    # -- a worker's program -------------------------------------------------------------------------------------------

    def init(self, worker: Worker) -> None:
        worker.state["global"] = worker.x.zeros_like().copy_(worker.x)
        worker.state["outer"] = [[]]
        # The number of the round, its steps so far, the number for which `turns` and `steps` are, and what the clients
        # have moved: weight times squared length.
        worker.state.update(round=0, made=0, planned=-1, turns=[], steps=0, moved=0.0, drift=0.0)

    def regrouped(self, states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return the common model, what the server's optimizer remembers, and where the round is."""
        names = ("global", "outer", "round", *(() if self.clients else ("made",)))
        return {name: states[0][name] for name in names}

    async def step(self, worker: Worker) -> None:
        state = worker.state
        turn = self.turn(worker)
        await Gradient()
        if turn is None:
            self.wait(worker)
        else:
            await self.local_step(worker, turn)
        state["made"] += 1
        ended = turn is not None and self.turn(worker) != turn
        if turn is not None and ended:
            self.end_turn(worker, turn)
            state["moved"] += turn.weight * _squared_distance(worker.x, state["global"])
            self._keep(worker, turn)
        if state["made"] == state["steps"]:
            await self._end_round(worker)

    async def local_step(self, worker: Worker, turn: Turn) -> None:
        """Make one local step of a client; the gradient is there."""
        await LocalStep()

    def wait(self, worker: Worker) -> None:
        """Wait in a step in which it is nobody's turn here; nothing is done by default."""

    def end_turn(self, worker: Worker, turn: Turn) -> None:
        """End a client's turn: it has made its last step of a round, and its model is ``x``; nothing is done by
        default."""

    def sent_beside(self, worker: Worker) -> list[AbstractVector]:
        """Tell what is summed over all clients beside the difference; nothing by default."""
        return []

    def end_server_step(self, worker: Worker, sums: Sequence[AbstractVector]) -> None:
        """End the server's step; nothing more is done by default.

        Args:
            worker: whose.
            sums: of what was sent beside.
        """

    def _keep(self, worker: Worker, turn: Turn) -> None:
        """Add what a client has moved to the sum; the worker's last client of a round leaves it where it is."""
        state = worker.state
        before, x = state["global"], worker.x
        if sum(own[1] for own in state["turns"]) == state["made"]:
            return
        if "total" not in state:
            state["total"] = x.zeros_like()
        state["total"].add_difference_(before, x, turn.weight)
        x.copy_(before)

    async def _end_round(self, worker: Worker) -> None:
        state, x = worker.state, worker.x
        before = state["global"]
        weight = state["turns"][-1][2] if state["turns"] else 0.0
        in_place = same_types(x, before)
        difference = x.mul_(-1.0).add_(before) if in_place else before.clone().add_(x, alpha=-1.0)
        difference.mul_(weight)
        if "total" in state:
            difference.add_(state.pop("total"))
        beside, moved = self.sent_beside(worker), x.new_numbers(state["moved"])
        await AllReduce(difference.beside(*beside, moved))
        for vector in (difference, *beside, moved):
            vector.mul_(worker.world_size)  # a sum
        whole = sum(turn.weight for turn in self.round(state["round"], worker.world_size).turns)
        square = moved.numbers()[0] / whole - _squared_length(difference) / whole**2
        outer_step(self.outer_optimizer, state["outer"], 0, before, difference)
        self.end_server_step(worker, beside)
        x.copy_(before)
        state.update(round=state["round"] + 1, made=0, moved=0.0, drift=math.sqrt(max(square, 0.0)))


@functools.lru_cache(maxsize=8)
def _plan(algorithm: AbstractFederated, number: int, workers: int) -> tuple[Round, list[list[Turn]], int]:
    """Return a round, the turns of each worker, and how many steps it has; all workers of a simulation ask for the
    same."""
    drawn = algorithm.drawn(number, workers)
    pinned = algorithm.clients is None or algorithm.clients.stateful
    shares = drawn.of_workers(workers, pinned)
    return drawn, shares, max(sum(turn.steps for turn in share) for share in shares)


def _squared_distance(one: AbstractVector, other: AbstractVector) -> float:
    if isinstance(one, Vector) and isinstance(other, Vector):
        return one.squared_distance(other)
    return 0.0  # the planner's have no values


def _squared_length(vector: AbstractVector) -> float:
    buffers: Any = vector.buffers if isinstance(vector, Vector) else ()
    return sum(float(torch.linalg.vector_norm(buffer, dtype=torch.float64)) ** 2 for buffer in buffers)

"""SCAFFOLD: federated averaging with control variates against the drift of clients (Karimireddy et al., 2020)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch.optim import SGD

from lightning_decentral.algorithms.federated import AbstractFederated
from lightning_decentral.algorithms.local_updates import OuterOptimizer
from lightning_decentral.federated.clients import Turn
from lightning_decentral.flat import AbstractVector
from lightning_decentral.protocol import LocalStep
from lightning_decentral.worker import Worker


@dataclass(frozen=True)
class SCAFFOLD(AbstractFederated):
    r"""SCAFFOLD: FedAvg whose clients correct each gradient by how theirs differs from that of all.

    Update rule, for a round of the clients S of N; c is the server's control variate, c_k that of client k, 0 at
    first::

        x   <- the user's optimizer with the gradient g_k(x) - c_k + c           # local steps, from x = w
        c_k' = the mean of g_k(x) over the client's local steps
        w   <- w - server_learning_rate sum_{k in S} p_k (w - x_k)
        c   <- c + sum_{k in S} q_k (c_k' - c_k)          # q_k: 1 / N, or by the samples among all clients
        c_k <- c_k'

    Its fixed point is the optimum of the clients' mean loss, by the same weights, however many local steps there are
    and however data differ.

    Args:
        every: local steps of a round in which each worker is a client; `Clients` say how many otherwise.
        server_learning_rate: the paper's 1.
        clients: a population of which a few take part in each round, and come back: ``Clients(..., stateful=True)``.

    Cost:
        Twice FedAvg's bytes. Two more copies of the model in each worker, a copy of the gradient, and one vector of the
        model's size for each client that has taken part.

    Differences with the paper:
        With plain SGD of a constant rate ``c_k'`` is the paper's option II, ``c_k - c + (w - x_k) / (steps rate)``;
        written as a mean of gradients it holds for every optimizer and schedule. Clients count by their samples, as
        `Clients` say; the paper's count alike.

    References:
        Sai Praneeth Karimireddy, Satyen Kale, Mehryar Mohri, Sashank Reddi, Sebastian Stich, Ananda Theertha Suresh.
        SCAFFOLD: Stochastic Controlled Averaging for Federated Learning. ICML 2020, arXiv:1910.06378.

    Example:
        >>> SCAFFOLD(every=20).vectors_sent
        2
    """

    remembers_clients = True
    remembers_gradients = True
    vectors_sent = 2

    @property
    def outer_optimizer(self) -> OuterOptimizer:
        """A plain step."""
        return partial(SGD, lr=self.server_learning_rate)

    def init(self, worker: Worker) -> None:
        super().init(worker)
        worker.state["control"] = worker.x.zeros_like()
        worker.state["change"] = worker.x.zeros_like()  # of all controls of this worker's clients, in a round
        worker.state["sum"] = worker.x.zeros_like()  # of the gradients of a turn
        worker.state["controls"] = {}  # by client

    def regrouped(self, states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return what goes on: with `Clients` the controls, too; those of workers begin anew with their number."""
        kept = super().regrouped(states)
        if self.clients is not None:
            kept["control"] = states[0]["control"]
            kept["controls"] = {client: own for state in states for client, own in state["controls"].items()}
        return kept

    def enter_round(self, worker: Worker, number: int) -> None:
        super().enter_round(worker, number)
        for client in [each for each in worker.state["controls"] if each % worker.world_size != worker.rank]:
            del worker.state["controls"][client]  # another worker has it: there were others before

    async def local_step(self, worker: Worker, turn: Turn) -> None:
        state, gradient = worker.state, worker.gradient
        state["sum"].add_(gradient)
        gradient.add_(state["control"])
        if turn.client in state["controls"]:
            gradient.add_(state["controls"][turn.client], alpha=-1.0)
        await LocalStep()

    def wait(self, worker: Worker) -> None:
        worker.gradient  # noqa: B018 - all workers read theirs in the same steps

    def end_turn(self, worker: Worker, turn: Turn) -> None:
        state = worker.state
        controls, mean = state["controls"], state["sum"].mul_(1.0 / turn.steps)
        share = 1.0 / worker.world_size if self.clients is None else self.clients.share(turn.client)
        state["change"].add_(mean, alpha=share)
        if turn.client in controls:
            state["change"].add_(controls[turn.client], alpha=-share)
        controls[turn.client], state["sum"] = mean, worker.x.zeros_like()

    def sent_beside(self, worker: Worker) -> list[AbstractVector]:
        return [worker.state["change"]]

    def end_server_step(self, worker: Worker, sums: Sequence[AbstractVector]) -> None:
        state = worker.state
        state["control"].add_(sums[0])
        state["change"] = worker.x.zeros_like()

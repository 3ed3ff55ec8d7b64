"""EASGD and EAMSGD in the asynchronous form (Zhang, Choromanska, LeCun, 2015)."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_decentral.algorithms.centre import AbstractCentre
from lightning_decentral.algorithms.easgd import elastic_mixing
from lightning_decentral.algorithms.server import SERVER
from lightning_decentral.errors import ConfigurationError
from lightning_decentral.flat import AbstractVector
from lightning_decentral.protocol import Call, Gradient, LocalStep, Mixing, Start
from lightning_decentral.worker import Worker


@dataclass(frozen=True)
class AsyncEASGD(AbstractCentre):
    r"""Asynchronous elastic averaging: each worker is tied to a centre by a spring, and pulls it at its own times.

    In each ``every``-th step of worker ``i``, with ``alpha = moving_rate / n`` for n workers that train, and ``x_i``
    the worker's model as the step begins::

        d      <- x_i - centre                      # at the server, when the worker's model arrives
        centre <- centre + alpha d
        x_i    <- x_i - alpha d - learning_rate gradient_i(x_i)

    The others are plain steps. An exchange conserves ``x_i + centre``. It is made beside the gradient. With Nesterov's
    momentum in the workers' own optimizers (``torch.optim.SGD(momentum=0.99, nesterov=True)``) it is EAMSGD.

    Args:
        every: steps of a worker from one exchange to the next; the paper's tau: 1, 4, 16 or 64.
        moving_rate: beta, in (0, 1); the paper's 0.9. ``alpha = beta / n`` keeps it stable for every n.
        server: ``"beside"``: worker 0 trains and serves. ``"dedicated"``: it serves only.

    Raises:
        ConfigurationError: for numbers out of range.

    Cost:
        A model sent and one received in each ``every``-th step of a worker, hidden behind a gradient. The server
        receives and sends as much as all others together. Memory: a copy of the model (the snapshot), and the centre at
        the server, in float32 at least. A lost worker ends the run with `PeerLost`; so does the server.

    Differences with the paper:
        The server is worker 0, which by default trains, too. An exchange is of one moment: in the published code the
        centre may change between what a worker reads and what it adds.

    References:
        Sixin Zhang, Anna Choromanska, Yann LeCun. Deep Learning with Elastic Averaging SGD. NeurIPS 2015,
        arXiv:1412.6651.

    Example:
        >>> AsyncEASGD(every=16).period(8)
        16
    """

    every: int = 4
    moving_rate: float = 0.9

    @property
    def steps_between(self) -> int:
        return self.every

    def check(self, workers: int | None) -> None:
        if not 0.0 < self.moving_rate < 1.0:
            raise ConfigurationError(
                f"AsyncEASGD(moving_rate={self.moving_rate!r}): needs a number in (0, 1). Use 0.9."
            )

    def mixing(self, world_size: int) -> Mixing:
        return elastic_mixing(self.moving_rate / self.trainers(world_size), self.every)

    async def step(self, worker: Worker) -> None:
        if not self.trains(worker.rank):
            await self.serve(worker)
            return
        x, state, alpha = worker.x, worker.state, self.moving_rate / self.trainers(worker.world_size)
        self.go_on(worker)
        pulled = exchanging = None
        if state["steps"] % self.every == 0 and worker.rank == SERVER:
            pulled = self._pull(worker, SERVER, x.clone())
        elif state["steps"] % self.every == 0:
            exchanging = await Start(Call(SERVER, worker.snapshot))
        state["steps"] += 1
        await Gradient()
        if exchanging is not None:
            pulled = await exchanging
        if pulled is not None:
            x.add_(pulled, alpha=-alpha)
        await LocalStep()

    async def on_call(self, worker: Worker, source: int, theirs: AbstractVector) -> AbstractVector:
        return self._pull(worker, source, theirs)

    def _pull(self, worker: Worker, source: int, theirs: AbstractVector) -> AbstractVector:
        """Let a worker pull the centre; give by how much they differed."""
        state = worker.state
        centre: AbstractVector = state["centre"]
        self.note(worker, source)
        theirs.add_(centre, alpha=-1.0)
        centre.add_(theirs, alpha=self.moving_rate / self.trainers(worker.world_size))
        state["version"] += 1
        state["given"][source] = state["version"]
        return theirs

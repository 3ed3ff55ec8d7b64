"""EASGD and EAMSGD in the asynchronous form (Zhang, Choromanska, LeCun, 2015)."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_decentral.algorithms.centre import AbstractCentre
from lightning_decentral.algorithms.compressed_calls import SERVER, message, news
from lightning_decentral.algorithms.easgd import elastic_mixing
from lightning_decentral.algorithms.open_easgd import OpenEASGD
from lightning_decentral.averaging.messages import add_decoded_, decoded, message_like
from lightning_decentral.errors import ConfigurationError
from lightning_decentral.flat import AbstractVector
from lightning_decentral.protocol import AbstractAsynchronousAlgorithm, Call, Gradient, LocalStep, Mixing, Start
from lightning_decentral.worker import Worker


@dataclass(frozen=True, repr=False)
class AsyncEASGD(AbstractCentre):
    r"""Asynchronous elastic averaging: each worker is tied to a centre by a spring, and pulls it at its own times.

    In each ``every``-th step of worker ``i``, with ``alpha = moving_rate / n`` for n workers that train, and ``x_i``
    the worker's model as the step begins::

        d      <- x_i - centre                      # at the server, when the worker's model arrives
        centre <- centre + alpha d
        x_i    <- x_i - alpha d - learning_rate gradient_i(x_i)

    The others are plain steps. An exchange conserves ``x_i + centre``. It is made beside the gradient. With Nesterov's
    momentum in the workers' own optimizers (``torch.optim.SGD(momentum=0.99, nesterov=True)``) it is EAMSGD.

    **Compression.** With a ``compressor`` worker ``i`` sends ``C(x_i - u_i)``, and both add it to ``u_i``, its model as
    the server knows it: what a message leaves out the next ones bring. With a ``model_compressor`` the server answers
    ``C(d)``, and both ends move by that: what it leaves out is in the next difference. So an exchange conserves
    ``x_i + centre`` whatever is left out. Worker 0's own exchanges are whole.

    Args:
        every: steps of a worker from one exchange to the next; the paper's tau: 1, 4, 16 or 64.
        moving_rate: beta, in (0, 1); the paper's 0.9. ``alpha = beta / n`` keeps it stable for every n.
        server: ``"beside"``: worker 0 trains and serves. ``"dedicated"``: it serves only.
        compressor: of what the server does not know yet of a worker's model: any contraction with messages of fixed
            size, as ``TopK(0.01)``. ``None``: the model is sent.
        model_compressor: of the difference with which the server answers; the same. ``None``: it is sent as it is.

    Raises:
        ConfigurationError: for numbers out of range.

    Cost:
        A model sent and one received in each ``every``-th step of a worker, hidden behind a gradient. The server
        receives and sends as much as all others together. Memory: a copy of the model (the snapshot), and the centre at
        the server, in float32 at least. A lost worker ends the run with `PeerLost`; so does the server.
        With `OpenStrategy` only the server does: a lost worker's replica is lost, and the centre stays.

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

    def init(self, worker: Worker) -> None:
        super().init(worker)
        if self.compressor is not None:
            worker.state.update({f"told: {rank}": worker.x.clone() for rank in self.callers(worker)})
            worker.state.update({"told": worker.x.clone()} if self.peers(worker.rank) else {})

    def messages(self, worker: Worker) -> dict[str, AbstractVector]:
        given = {"a change of a model": self.compressor, "a difference": self.model_compressor}
        return {name: message_like(each, worker.x) for name, each in given.items() if each is not None}

    def mixing(self, world_size: int) -> Mixing:
        return elastic_mixing(self.moving_rate / self.trainers(world_size), self.every)

    def opened(self) -> AbstractAsynchronousAlgorithm:
        self.check_opened()
        return OpenEASGD(self)

    async def step(self, worker: Worker) -> None:
        if not self.trains(worker.rank):
            await self.serve(worker)
            return
        x, state, alpha = worker.x, worker.state, self.moving_rate / self.trainers(worker.world_size)
        self.go_on(worker)
        pulled, exchanging, number = None, None, 0
        if state["steps"] % self.every == 0 and worker.rank == SERVER:
            pulled = self._difference(worker, x.clone())
            self._pull(worker, SERVER, pulled)
        elif state["steps"] % self.every == 0:
            number, sent = self.next_call(worker), worker.snapshot
            if self.compressor is not None:
                sent = news(self.compressor, state["told"], sent, worker, number)
            exchanging = await Start(Call(SERVER, sent))
        state["steps"] += 1
        await Gradient()
        if exchanging is not None:
            pulled = await exchanging
            if self.model_compressor is not None:
                pulled = decoded(x, self.model_compressor, pulled, number)
        if pulled is not None:
            x.add_(pulled, alpha=-alpha)
        await LocalStep()

    async def on_call(self, worker: Worker, source: int, theirs: AbstractVector) -> AbstractVector:
        number = self.next_answer(worker, source)
        if self.compressor is not None:
            told: AbstractVector = worker.state[f"told: {source}"]
            add_decoded_(told, self.compressor, theirs, 1.0, number)
            theirs = told.clone()
        difference = answer = self._difference(worker, theirs)
        if self.model_compressor is not None:
            answer = message(self.model_compressor, difference, worker, number).vector
            difference = decoded(worker.x, self.model_compressor, answer, number)
        self._pull(worker, source, difference)
        return answer

    def _difference(self, worker: Worker, theirs: AbstractVector) -> AbstractVector:
        """Return by how much a worker's model differs from the centre, in the place of the model."""
        return theirs.add_(worker.state["centre"], alpha=-1.0)

    def _pull(self, worker: Worker, source: int, difference: AbstractVector) -> None:
        """Let a worker pull the centre."""
        state = worker.state
        self.note(worker, source)
        state["centre"].add_(difference, alpha=self.moving_rate / self.trainers(worker.world_size))
        state["version"] += 1
        state["given"][source] = state["version"]

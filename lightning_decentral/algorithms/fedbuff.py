"""FedBuff: buffered asynchronous aggregation of local updates (Nguyen et al., 2022)."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Self

from lightning_decentral.algorithms.centre import AbstractBufferedUpdates
from lightning_decentral.algorithms.server import known_count, require_count
from lightning_decentral.errors import ConfigurationError
from lightning_decentral.flat import AbstractVector
from lightning_decentral.worker import Worker


@dataclass(frozen=True, repr=False)
class FedBuff(AbstractBufferedUpdates):
    r"""FedBuff: workers make local steps at their own speed; a server adds what they bring, several at a time.

    Of worker ``i``, and of the server when the next ``K`` have come, of whichever workers; ``tau`` is how many updates
    the server has made since the worker got the model::

        b_i, x_i <- x                                    # the answer to its last message
        x_i      <- every local steps, by your optimizer
        send d_i = x_i - b_i
        x        <- x + server_learning_rate * (1/K) sum_k d_k / sqrt(1 + tau_k)

    Args:
        every: local steps of a round, at least 1.
        buffer: ``K``, at least 1; the paper uses 10. ``None``: 10, or as many as there are workers that
            train if these are fewer.
        server_learning_rate: above 0; 1 takes the mean of what has come, the default.
        by_speed: whether slow workers make fewer local steps (DyLU), as `DelayedNesterov` says.
        server: ``"beside"``: worker 0 trains and serves. ``"dedicated"``: it serves only.
        compressor: of what workers send, with error feedback: any contraction with messages of fixed size, as
            ``TopK(0.01)``. ``None``: it is sent as it is.
        model_compressor: of what a worker has not been told yet of the model; the same. ``None``: the model is sent.

    Raises:
        ConfigurationError: for numbers out of range.

    Cost:
        A model sent and a model received for each ``every`` steps of a worker, for which it waits. Memory: where its
        round began, on each worker; at the server the model and the sum besides, in float32 at least. A lost worker
        ends the run with `PeerLost`; so does the server. With `OpenStrategy` only the server does: the others may be
        lost, come back and join.

    Differences with the paper:
        The workers are all there, and train all the time; a client that was sampled trains once. The sum is not
        encrypted. What is evaluated and saved is the server's model with, besides, what waits in the buffer and the
        mean of what workers have made since their last messages; training goes on from the server's model alone.

    References:
        John Nguyen, Kshitiz Malik, Hongyuan Zhan, Ashkan Yousefpour, Mike Rabbat, Mani Malek, Dzmitry Huba. Federated
        Learning with Buffered Asynchronous Aggregation. AISTATS 2022, arXiv:2106.06639.

    Example:
        >>> FedBuff(every=4).resolved(3)
        FedBuff(server='beside', every=4, buffer=3, server_learning_rate=1.0, by_speed=False)
    """

    every: int = 10
    buffer: int | None = None
    server_learning_rate: float = 1.0
    by_speed: bool = False

    @property
    def steps_between(self) -> int:
        return self.every

    @property
    def adapts(self) -> bool:
        return self.by_speed

    def check(self, workers: int | None) -> None:
        if self.buffer is not None:
            require_count("FedBuff", "buffer", self.buffer)
        if not 0.0 < self.server_learning_rate < math.inf:
            raise ConfigurationError(
                f"FedBuff(server_learning_rate={self.server_learning_rate!r}): needs a number above 0. Use 1.0."
            )

    def for_trainers(self, trainers: int) -> Self:
        return self if self.buffer is not None else dataclasses.replace(self, buffer=min(10, trainers))

    def weight(self, staleness: int) -> float:
        """Tell what a difference of this staleness counts."""
        return self.server_learning_rate / (known_count(self, self.buffer) * math.sqrt(1.0 + staleness))

    def receive(self, worker: Worker, difference: AbstractVector, staleness: int) -> None:
        state, needed = worker.state, known_count(self, self.buffer)
        centre: AbstractVector = state["centre"]
        weight = self.weight(staleness)
        if needed > 1:
            if "buffered" not in state:
                state["buffered"] = worker.x.zeros_like()
            state["buffered"].add_(difference, alpha=weight)
            state["heard"] = state.get("heard", 0) + 1
            if state["heard"] < needed:
                return
            centre.add_(state["buffered"])
            state["buffered"].mul_(0.0)
            state["heard"] = 0
        else:
            centre.add_(difference, alpha=weight)
        state["version"] += 1

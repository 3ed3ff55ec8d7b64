"""EF21: compressed differences to gradients that all workers know (Richtarik, Sokolov, Fatkhullin, 2021)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_decentral.averaging import CompressedMean
from lightning_decentral.averaging.messages import compressed, require_contraction, require_fixed_size, same_types
from lightning_decentral.compression import AbstractCompressor, TopK
from lightning_decentral.flat import mean_over
from lightning_decentral.protocol import AbstractErrorFeedbackAlgorithm, Gradient, LocalStep, Start
from lightning_decentral.worker import Worker


@dataclass(frozen=True)
class EF21(AbstractErrorFeedbackAlgorithm):
    r"""EF21: each worker sends the compressed difference between its gradient and what the others know of it.

    Every worker has an estimate ``g_i`` of its gradient, which moves by what it sends, and knows the mean ``g`` of all
    estimates. All workers have the same ``x``, which the optimizer moves by ``g`` as if it were the gradient::

        c_i  = C(gradient_i(x) - g_i)                # sent
        g_i <- g_i + c_i
        g   <- g + (1/n) sum_j c_j
        x   <- x - learning_rate * g

    What compression leaves out vanishes as the gradients settle, on data that differs between workers too: with full
    gradients it comes to the exact optimum, where error feedback with a constant learning rate stays near it. With
    noisy ones each message is mostly noise.

    Args:
        compressor: a contraction with messages of fixed size, biased or not. ``None``: ``TopK(0.05)``.

    Raises:
        ConfigurationError: for a compressor that is no contraction or has messages of changing size, and with a
            gradient scaler (float16).

    Cost:
        Per worker and step ``n - 1`` compressed messages, or ``2 (n - 1) / n`` if the compressor is linear; the
        worker's own is decoded while they are on their way. Extra memory: two copies of the model, ``g_i`` and ``g``
        (float32 for half precision), what is compressed, and the messages. A lost peer raises `PeerLost`.

    Not to be confused with:
        Error feedback (`SAEF` with ``step_ahead=0``), which sends updates and remembers what it left out of them.

    References:
        Peter Richtarik, Igor Sokolov, Ilyas Fatkhullin. EF21: A New, Simpler, Theoretically Better, and Practically
        Faster Error Feedback. NeurIPS 2021, arXiv:2106.05203.

    Example:
        >>> EF21().resolved(4)
        EF21(compressor=TopK(ratio=0.05))
    """

    compressor: AbstractCompressor | None = None

    exchanges_gradients = True
    same_updates = True
    remembers_gradients = True

    def __post_init__(self) -> None:
        require_fixed_size("EF21", self._compressor)

    def resolved(self, world_size: int) -> EF21:
        return dataclasses.replace(self, compressor=self._compressor)

    def init(self, worker: Worker) -> None:
        require_contraction("EF21", self._compressor, worker.x)
        worker.state["estimate"] = worker.x.zeros_like()
        worker.state["mean"] = worker.x.zeros_like()

    def regrouped(self, states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return the mean of the estimates, for everybody: it is what all workers know."""
        mean = mean_over([state["estimate"] for state in states])
        return {"estimate": mean, "mean": mean.clone()}

    async def step(self, worker: Worker) -> None:
        estimate, mean = worker.state["estimate"], worker.state["mean"]
        await Gradient()
        gradient = worker.gradient
        if same_types(estimate, gradient):
            work = gradient.add_(estimate, alpha=-1.0)
        else:  # half precision
            work = estimate.zeros_like().add_difference_(gradient, estimate, 1.0)
        message = compressed(self._compressor, work, worker)
        exchange = CompressedMean(worker, message)
        arriving = await Start(exchange.request())
        message.decode_(message.payloads, work)
        estimate.add_(work)
        exchange.add_(mean, work, await arriving, 1.0)
        gradient.copy_(mean)
        await LocalStep()

    @property
    def _compressor(self) -> AbstractCompressor:
        return TopK(0.05) if self.compressor is None else self.compressor

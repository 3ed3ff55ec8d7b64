"""SAEF: error feedback whose gradients are taken a step ahead of the error (Xu, Huo, Huang, 2021); DEF and plain EF."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_decentral.averaging import CompressedMean
from lightning_decentral.averaging.messages import compressed, require_contraction, require_fixed_size, same_types
from lightning_decentral.compression import AbstractCompressor, TopK
from lightning_decentral.errors import ConfigurationError
from lightning_decentral.flat import mean_over
from lightning_decentral.protocol import AbstractErrorFeedbackAlgorithm, AllReduce, Gradient, LocalStep, Start
from lightning_decentral.worker import Worker


@dataclass(frozen=True)
class SAEF(AbstractErrorFeedbackAlgorithm):
    r"""Step-ahead error feedback with error averaging: compressed updates, gradients where nothing was left out.

    All workers have the same ``x``. Each remembers in ``e`` what its messages left out, so that ``x - e`` is where it
    would be had everything been sent; there it takes its gradient. In step t, with ``u_i`` what the worker's own
    optimizer subtracts (learning rate times momentum, for SGD)::

        if (t + 1) % averaging_period == 0:  e_i <- (1/n) sum_j e_j
        y_i     = x - step_ahead * e_i                # the gradient, and the optimizer's step, are here
        delta_i = e_i + u_i(y_i)
        e_i    <- delta_i - C(delta_i)                # C(...) is sent
        x      <- x - (1/n) sum_j C(delta_j)

    With a ``server_compressor`` D the last line is, with one more error ``s``, the same on all workers::

        total = s + (1/n) sum_j C(delta_j);  s <- total - D(total);  x <- x - D(total)

    With ``step_ahead=1`` this is SAEF, with 0.3 DEF and with 0 plain error feedback (EF). Nothing is lost: the mean of
    ``x - e_i`` moves by the mean of ``u_i``, whatever the compressor. For one worker SAEF's ``x - e`` is exactly what
    uncompressed training makes, with any optimizer; with ``averaging_period=1`` it is, for any number of workers,
    synchronous momentum SGD. ``e`` has the unit of the parameters, so that a change of the learning rate needs no
    correction.

    Evaluation, checkpoints and callbacks between batches see ``x``, never ``y_i``.

    Args:
        compressor: a contraction with messages of fixed size, biased or not. ``None``: ``TopK(0.05)``, the paper's.
        averaging_period: average the errors, uncompressed, once in so many steps; the paper's 20. ``None``: never.
        step_ahead: how much of the error the gradient is ahead of ``x``, in [0, 1].
        server_compressor: what the paper's server compresses the mean with once more, a contraction. Here every worker
            does so, alike: it reproduces the paper and saves no bytes. ``None``: not at all.

    Raises:
        ConfigurationError: for numbers out of range, and for a compressor that is no contraction or has messages of
            changing size.

    Cost:
        Per worker and step ``n - 1`` compressed messages, or ``2 (n - 1) / n`` if the compressor is linear
        (`RandomBlock`), which are on their way while the worker computes what its own left out; and an all-reduce of
        the model every ``averaging_period`` steps. Nothing is hidden behind the gradient, which needs the last message.
        Extra memory: two copies of the model, ``y`` and ``e`` (float32 for half precision), a third, ``s``, with a
        ``server_compressor``, and the messages. A lost peer raises `PeerLost`.

    Not to be confused with:
        Error feedback of gradients, as in `callbacks.GradientCompression`: there the momentum acts on what was sent,
        here it is each worker's own, and what it makes is sent.

    References:
        An Xu, Zhouyuan Huo, Heng Huang. Step-Ahead Error Feedback for Distributed Training with Compressed Gradient.
        AAAI 2021, arXiv:2008.05823. An Xu, Heng Huang. Detached Error Feedback for Distributed SGD with Random
        Sparsification. ICML 2022, arXiv:2004.05298. Sebastian U. Stich, Jean-Baptiste Cordonnier, Martin Jaggi.
        Sparsified SGD with Memory. NeurIPS 2018, arXiv:1809.07599.

    Example:
        >>> SAEF().resolved(4)
        SAEF(compressor=TopK(ratio=0.05), averaging_period=20, step_ahead=1.0, server_compressor=None)
        >>> plain = SAEF(TopK(0.1), averaging_period=None, step_ahead=0.0)
    """

    compressor: AbstractCompressor | None = None
    averaging_period: int | None = 20
    step_ahead: float = 1.0
    server_compressor: AbstractCompressor | None = None

    def __post_init__(self) -> None:
        require_fixed_size("SAEF", self._compressor)
        period, share = self.averaging_period, self.step_ahead
        if period is not None and not (type(period) is int and period >= 1):
            raise ConfigurationError(
                f"SAEF got averaging_period={period!r}, needs a whole number of steps of at least 1, or None. Use 20, "
                "or None to never average the errors."
            )
        if not (type(share) in (int, float) and 0.0 <= share <= 1.0):
            raise ConfigurationError(
                f"SAEF got step_ahead={share!r}, needs a number in [0, 1]. Use 1.0 for SAEF, 0.3 for DEF, and 0.0 for "
                "plain error feedback."
            )

    def resolved(self, world_size: int) -> SAEF:
        return dataclasses.replace(self, compressor=self._compressor)

    def period(self, world_size: int) -> int:
        return self.averaging_period or 1

    def init(self, worker: Worker) -> None:
        require_contraction("SAEF", self._compressor, worker.x)
        worker.snapshot = worker.x.clone()
        worker.state["error"] = worker.x.zeros_like()
        if self.server_compressor is not None:
            require_contraction("SAEF's server_compressor", self.server_compressor, worker.x)
            worker.state["server"] = worker.x.zeros_like()

    def regrouped(self, states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return the mean of the errors, for everybody: the sum over the workers, divided by their number, is what it
        was."""
        return {name: mean_over([state[name] for state in states]) for name in states[0]}

    async def step(self, worker: Worker) -> None:
        x, ahead, error = worker.x, worker.snapshot, worker.state["error"]
        if self.averaging_period is not None and (worker.step + 1) % self.averaging_period == 0:
            await AllReduce(error)
        ahead.copy_(x).add_(error, alpha=-self.step_ahead)
        await Gradient()
        await LocalStep(at=ahead)
        narrow = not same_types(error, ahead)  # half precision: x - y is not e, and rounding x must not lose anything
        if narrow:
            error.add_difference_(x.clone().add_(error, alpha=-self.step_ahead), ahead, 1.0)
        else:
            error.mul_(1.0 - self.step_ahead).add_difference_(x, ahead, 1.0)  # the same, without a copy: now delta
        message = compressed(self._compressor, error, worker)
        mean = CompressedMean(worker, message)
        arriving = await Start(mean.request())
        scratch = error.zeros_like() if narrow else ahead
        message.decode_(message.payloads, scratch)
        error.add_(scratch, alpha=-1.0)
        before = x.clone() if narrow else x
        if self.server_compressor is not None:
            server = worker.state["server"]
            mean.add_(server, scratch, await arriving, 1.0)
            once_more = compressed(self.server_compressor, server, worker, alike=True)
            once_more.decode_(once_more.payloads, scratch)
            server.add_(scratch, alpha=-1.0)
            x.add_(scratch, alpha=-1.0)
        elif narrow:
            total = error.zeros_like()
            mean.add_(total, scratch, await arriving, 1.0)
            scratch = total
            x.add_(scratch, alpha=-1.0)
        else:
            mean.add_(x, scratch, await arriving, -1.0)
        if narrow:  # by which x has moved, and by which it should have
            error.add_difference_(x, before, 1.0).add_(scratch)

    @property
    def _compressor(self) -> AbstractCompressor:
        return TopK(0.05) if self.compressor is None else self.compressor

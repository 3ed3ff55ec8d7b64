"""Gradients from values of the loss alone, and what all zeroth-order optimizers share.

A gradient is estimated as a sum of *directions*, each times one number, a quotient of differences of the loss. The
directions follow from a seed and a counter, so workers that share both need to exchange the numbers only.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_decentral.errors import ConfigurationError
from lightning_decentral.optimizers.layerwise import Closure, check_positive
from lightning_decentral.optimizers.proximal import Proximal

Loss = Callable[[list[Tensor]], Tensor]
"""The loss of a batch (a number), or of each of its samples (``[samples]``), at the given values of all parameters.

Called with tensors in the order of the optimizer's parameters. It has to depend on them only: no dropout, no statistics
of the batch, no side effect, no ``backward``. Unless ``chunk_size=1`` it is called under ``torch.vmap``.
"""

_CHUNK_BYTES = 2**26
_ROUNDINGS = 8


class AbstractEstimator(ABC):
    """How directions are chosen and differences are taken."""

    mu: float
    two_sided: bool

    @abstractmethod
    def num_directions(self, numbers: int) -> int:
        """Tell how many directions there are, for so many parameters."""

    @abstractmethod
    def blocks(self, size: int, like: Tensor, draw: int) -> Iterator[Tensor]:
        """Return all directions, up to ``size`` of them at a time: ``[size or less, numbers]``.

        Args:
            size: at least 1; it does not change the directions.
            like: the parameters, ``[numbers]``: how many, dtype and device.
            draw: which estimate this is for; the same number gives the same directions.
        """

    @abstractmethod
    def combine(self, quotients: Tensor, size: int, like: Tensor, draw: int) -> Tensor:
        """Return the gradients that belong to quotients ``[rows, directions]``: ``[rows, numbers]``."""


@dataclass(frozen=True)
class CooSGE(AbstractEstimator):
    """Every coordinate, both ways: ``sum_j (f(x + mu e_j) - f(x - mu e_j)) / (2 mu) e_j``.

    Exact on quadratics, for any ``mu``. ``2 d`` evaluations for ``d`` parameters, and ``d`` numbers to exchange.

    Args:
        mu: half the distance of the two points, > 0. The error is of the order ``mu^2`` by curvature and
            ``epsilon |f| / mu`` by rounding: in float32 1e-3 to 1e-2 times the size of the parameters.

    Example:
        >>> CooSGE(mu=1e-2)
        CooSGE(mu=0.01)
    """

    mu: float = 1e-3
    two_sided = True

    def __post_init__(self) -> None:
        check_positive("CooSGE", mu=self.mu)

    def num_directions(self, numbers: int) -> int:
        return numbers

    def blocks(self, size: int, like: Tensor, draw: int) -> Iterator[Tensor]:
        numbers = like.numel()
        for first in range(0, numbers, size):
            block = torch.zeros(min(size, numbers - first), numbers, dtype=like.dtype, device=like.device)
            block.view(-1)[first :: numbers + 1] = 1  # row i has its one in column first + i
            yield block

    def combine(self, quotients: Tensor, size: int, like: Tensor, draw: int) -> Tensor:
        return quotients


@dataclass(frozen=True)
class GauSGE(AbstractEstimator):
    """Random directions: the mean over ``u ~ N(0, I)`` of ``(f(x + mu u) - f(x)) / mu u``.

    Unbiased on quadratics; elsewhere off by up to ``mu L (d + 3)^1.5 / 2`` for gradients of Lipschitz constant ``L``.
    Its variance is about ``(d + 1) / directions`` times the square of the gradient. ``directions + 1`` evaluations, and
    ``directions`` numbers to exchange, whatever ``d``.

    Args:
        directions: how many, at least 1; the paper: 1.
        mu: length of the difference, per coordinate, > 0; see `CooSGE`.
        seed: of the directions. Workers must have the same.

    Example:
        >>> GauSGE(directions=16)
        GauSGE(directions=16, mu=0.001, seed=0)
    """

    directions: int = 1
    mu: float = 1e-3
    seed: int = 0
    two_sided = False

    def __post_init__(self) -> None:
        if self.directions < 1:
            raise ConfigurationError(f"GauSGE(directions={self.directions}): needs at least 1. Some dozen are common.")
        check_positive("GauSGE", mu=self.mu)

    def num_directions(self, numbers: int) -> int:
        return self.directions

    def blocks(self, size: int, like: Tensor, draw: int) -> Iterator[Tensor]:
        # The generator keeps 32 bits of its seed, so neighbours are hashed apart. It runs on the CPU, row by row: so
        # the directions are the same on every device and for every size of a block.
        digest = hashlib.sha256(f"{self.seed} {draw}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))
        for first in range(0, self.directions, size):
            rows = [
                torch.randn(like.numel(), generator=generator, dtype=like.dtype)
                for _ in range(min(size, self.directions - first))
            ]
            yield torch.stack(rows).to(like.device)

    def combine(self, quotients: Tensor, size: int, like: Tensor, draw: int) -> Tensor:
        total = torch.zeros(len(quotients), like.numel(), dtype=like.dtype, device=like.device)
        first = 0
        for block in self.blocks(size, like, draw):
            total += quotients[:, first : first + len(block)] @ block
            first += len(block)
        return total / self.directions


class AbstractZerothOrder(Optimizer, ABC):
    """An optimizer that only ever calls the loss.

    `estimate` takes the place of ``backward``: it calls the loss at points around the parameters and writes the
    estimated gradient to ``.grad``. ``step`` is the proximal step ``x <- prox(x - lr grad)``.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        estimator: AbstractEstimator | None,
        prox: Proximal | None,
        chunk_size: int | None,
    ) -> None:
        name = type(self).__name__
        check_positive(name, lr=lr)
        if chunk_size is not None and chunk_size < 1:
            raise ConfigurationError(f"{name}(chunk_size={chunk_size}): needs at least 1, or None. 1: no vmap.")
        super().__init__(params, {"lr": lr, "prox": prox})
        self.estimator = CooSGE() if estimator is None else estimator
        self.chunk_size = chunk_size
        self._gather: Callable[[Tensor], Tensor] | None = None
        parameters = self._parameters()
        kinds = {(parameter.dtype, parameter.device) for parameter in parameters}
        if len(kinds) != 1 or not parameters[0].is_floating_point():
            raise ConfigurationError(
                f"{name} got parameters of the kinds {sorted(map(str, kinds))}; it needs some that are to be trained, "
                "all of one floating-point dtype and on one device. Convert the model, or use an optimizer for each."
            )
        self.param_groups[0]["draws"] = 0  # how many sets of directions were drawn; saved with the groups

    def share_scalars(self, gather: Callable[[Tensor], Tensor] | None) -> None:
        """Work on one model together with other workers, by exchanging quotients of the loss and nothing else.

        Every worker has the same parameters, the same estimator with the same seed, and calls `estimate` equally often
        with its own share of the data. All take the same step, bit for bit that of one process which is given the
        shares of all workers in the order of their ranks. Each sends one number for each direction.

        Args:
            gather: takes a tensor ``[rows, numbers]`` of this worker and returns those of all workers by rank,
                ``[workers, rows, numbers]``. ``None``: one worker.
        """
        self._gather = gather

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> float | None:  # type: ignore[override]
        """Return the proximal step ``x <- prox(x - lr grad)``, with the gradient that `estimate` left.

        Args:
            closure: calls `estimate` and returns the loss; for loops that are written this way.

        Returns:
            What the closure returned, or ``None``.
        """
        loss = None if closure is None else closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad, alpha=group["lr"])
                    if group["prox"] is not None:
                        parameter.copy_(group["prox"](parameter, group["lr"]))
        return loss

    @torch.no_grad()
    def gradient_mapping(self) -> Tensor:
        """Tell how far from stationary: ``||x - prox(x - lr grad)|| / lr``, with the gradient that `estimate` left."""
        total = torch.zeros((), dtype=torch.float64)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    moved = parameter - group["lr"] * parameter.grad
                    moved = moved if group["prox"] is None else group["prox"](moved, group["lr"])
                    total += ((parameter - moved) / group["lr"]).double().square().sum().cpu()
        return total.sqrt()

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"] if p.requires_grad]

    def _point(self) -> Tensor:
        """Return all parameters, ``[numbers]``, in a copy."""
        return torch.cat([parameter.detach().reshape(-1) for parameter in self._parameters()])

    def _split(self, vectors: Tensor) -> list[Tensor]:
        """Return ``[..., numbers]`` in pieces ``[..., *shape]``, one for each parameter."""
        parameters = self._parameters()
        pieces = torch.split(vectors, [parameter.numel() for parameter in parameters], dim=-1)
        return [piece.reshape(*vectors.shape[:-1], *p.shape) for piece, p in zip(pieces, parameters, strict=True)]

    def _write_gradient(self, gradient: Tensor) -> None:
        for parameter, piece in zip(self._parameters(), self._split(gradient), strict=True):
            parameter.grad = piece.clone()

    def _next_draw(self) -> int:
        self.param_groups[0]["draws"] += 1
        return int(self.param_groups[0]["draws"])

    def _block_size(self, point: Tensor) -> int:
        return self.chunk_size or max(1, _CHUNK_BYTES // max(1, point.numel() * point.element_size()))

    def _quotients(self, estimator: AbstractEstimator, loss: Loss, point: Tensor, draw: int) -> tuple[Tensor, Tensor]:
        """Differences of the loss along all directions, over their distance.

        Returns:
            The quotients of each sample, ``[directions, samples]``, and the mean of the losses that were evaluated.
        """
        limit = _ROUNDINGS * torch.finfo(point.dtype).eps * point.abs().amax().item()
        if estimator.mu < limit:
            raise ConfigurationError(
                f"{type(self).__name__} got {estimator!r} for parameters of {point.dtype} up to "
                f"{point.abs().amax().item():.3g}; it needs mu of at least {limit:.2g}, or the difference is lost to "
                "rounding. Take a larger mu, or float32 or float64 parameters."
            )
        before = [parameter.grad for parameter in self._parameters()]
        size, mu = self._block_size(point), estimator.mu
        centre = None if estimator.two_sided else self._losses(loss, point.unsqueeze(0))  # [1, samples]
        quotients, means = [], []
        for block in estimator.blocks(size, point, draw):
            plus = self._losses(loss, point + mu * block)  # [block, samples]
            if centre is None:
                minus = self._losses(loss, point - mu * block)
                quotients.append((plus - minus) / (2 * mu))
                means.append((plus.mean() + minus.mean()) * len(block) / 2)
            else:
                quotients.append((plus - centre) / mu)
        if any(p.grad is not old for p, old in zip(self._parameters(), before, strict=True)):
            raise ConfigurationError(
                f"{type(self).__name__} got a loss that calls backward (parameters have new gradients); it needs one "
                "that only computes. Remove backward: the gradient is estimated from the values."
            )
        mean = sum(means, torch.zeros_like(point[0])) / point.numel() if centre is None else centre.mean()
        return torch.cat(quotients), mean

    def _gradient(
        self, losses: Sequence[Loss], quotients: Callable[[Loss], tuple[Tensor, Tensor]], point: Tensor, draw: int
    ) -> tuple[Tensor, Tensor]:
        """Return the estimate from what `_quotients` returns, the mean over samples, losses and workers.

        Returns:
            The gradient, ``[numbers]``, and the mean loss of this worker.
        """
        rows, means = [], []
        for loss in self._checked_losses(losses):
            values, mean = quotients(loss)  # [directions, samples]
            rows.append(values.mean(1))
            means.append(mean)
        average = self._of_all_workers(torch.stack(rows)).mean(0, keepdim=True)
        return self.estimator.combine(average, self._block_size(point), point, draw)[0], torch.stack(means).mean()

    def _losses(self, loss: Loss, points: Tensor) -> Tensor:
        """Return the losses ``[points, samples]`` at each of ``[points, numbers]``."""
        name = type(self).__name__

        def checked(parameters: list[Tensor]) -> Tensor:
            value = loss(parameters)
            if isinstance(value, (int, float)):
                value = torch.tensor(float(value), dtype=points.dtype, device=points.device)
            if not isinstance(value, Tensor) or value.dim() > 1:
                got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
                raise ConfigurationError(
                    f"{name} got a loss that returns {got}; it needs a tensor, either the loss of the batch or those "
                    "of its samples, [samples]. Return it from the function."
                )
            return value

        try:
            if self.chunk_size == 1:
                values = torch.stack([checked(self._split(point)) for point in points])
            else:
                values = torch.vmap(checked, randomness="error")(self._split(points))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            if "backward()" in str(error) or "does not require grad" in str(error):
                raise ConfigurationError(
                    f"{name} got a loss that calls backward; it needs one that only computes. Remove backward: the "
                    "gradient is estimated from the values."
                ) from error
            if "vmap" in str(error):
                raise ConfigurationError(
                    f"{name} got a loss that torch.vmap cannot evaluate at several points at once ({error}); it needs "
                    "one without random numbers, .item() and in-place changes of buffers. Call eval() on the model, or "
                    "set chunk_size=1 to have it called for one point at a time."
                ) from error
            raise
        return values.unsqueeze(1) if values.dim() == 1 else values

    def _of_all_workers(self, rows: Tensor) -> Tensor:
        """Return the rows of all workers, by rank; checked to be finite, on all workers alike."""
        if self._gather is not None:
            rows = self._gather(rows).reshape(-1, rows.shape[1])
        if not torch.isfinite(rows).all():
            raise FloatingPointError(
                f"{type(self).__name__} got a loss that is NaN or infinite near the present parameters; it needs "
                "finite values. Lower the learning rate or mu, or look for the sample that causes it."
            )
        return rows

    def _checked_losses(self, losses: Sequence[Loss]) -> Sequence[Loss]:
        if not losses or not all(callable(loss) for loss in losses):
            raise ConfigurationError(
                f"{type(self).__name__} got {', '.join(type(loss).__name__ for loss in losses) or 'nothing'}; it needs "
                "a function of the parameters. Pass the function itself and not its value."
            )
        return losses

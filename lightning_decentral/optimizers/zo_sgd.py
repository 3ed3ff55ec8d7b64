"""Zeroth-order SGD, plain (Ghadimi, Lan, 2013) and proximal (Ghadimi, Lan, Zhang, 2016)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lightning_decentral.optimizers.proximal import Proximal
from lightning_decentral.optimizers.zeroth_order import AbstractEstimator, AbstractZerothOrder, Loss


class ZOProxSGD(AbstractZerothOrder):
    """Proximal SGD with estimated gradients; the baseline of `ZOProxSVRG` and `ZOProxSAGA`.

    ``x <- prox(x - lr estimate(batch, x))``

    Args:
        params: parameters or groups, all of one dtype. A group may set ``lr`` and ``prox``.
        lr: learning rate.
        estimator: `CooSGE` (default) or `GauSGE`.
        prox: applied after the gradient step, to each tensor: `L1`, `Box`, `Ridge`, `GroupLasso`, any function of a
            tensor and the learning rate; ``None``: nothing.
        chunk_size: at how many points the loss is evaluated in one call. ``None``: as many as keep the copies of the
            parameters within 64 MB. 1: called plainly, one point at a time, for what `torch.vmap` cannot do.

    Raises:
        ConfigurationError: ``mu`` is lost in the rounding of the parameters' dtype; a loss that returns nothing, calls
            ``backward`` or cannot be vectorized.
        FloatingPointError: A loss that is NaN or infinite.

    Cost:
        Evaluations of the loss: those of the estimator. Memory: as many copies of the parameters as are evaluated
        together, and of the activations.

    References:
        Saeed Ghadimi, Guanghui Lan, Hongchao Zhang. Mini-batch Stochastic Approximation Methods for Nonconvex
        Stochastic Composite Optimization. Mathematical Programming 155, 2016, arXiv:1308.6594.

    Example:
        >>> import torch
        >>> from lightning_decentral.optimizers import L1
        >>> x = torch.nn.Parameter(torch.tensor([1.0, 0.1]))
        >>> optimizer = ZOProxSGD([x], lr=0.5, prox=L1(0.2))
        >>> def loss(parameters):
        ...     return (parameters[0] - torch.tensor([2.0, 0.1])).square().sum() / 2
        >>> for _ in range(20):
        ...     value = optimizer.estimate(loss)
        ...     _ = optimizer.step()
        >>> x.data.round(decimals=2)
        tensor([1.8000, 0.0000])
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        estimator: AbstractEstimator | None = None,
        prox: Proximal | None = None,
        chunk_size: int | None = None,
    ) -> None:
        super().__init__(params, lr, estimator, prox, chunk_size)

    @torch.no_grad()
    def estimate(self, *losses: Loss) -> Tensor:
        """Estimate the gradient of the mean loss, and write it to ``.grad``.

        Args:
            losses: of this worker's batch; or of several batches of equal weight.

        Returns:
            This worker's loss, within ``O(mu^2)``: the mean of what was evaluated.
        """
        point, draw = self._point(), self._next_draw()
        gradient, mean = self._gradient(
            losses, lambda loss: self._quotients(self.estimator, loss, point, draw), point, draw
        )
        self._write_gradient(gradient)
        return mean


class ZOSGD(ZOProxSGD):
    """SGD with estimated gradients: ``x <- x - lr estimate(batch, x)``.

    Args:
        params: parameters or groups, all of one dtype. A group may set ``lr``.
        lr: learning rate.
        estimator: `CooSGE` (default) or `GauSGE`.
        chunk_size: see `ZOProxSGD`; which also tells cost and errors.

    References:
        Saeed Ghadimi, Guanghui Lan. Stochastic First- and Zeroth-Order Methods for Nonconvex Stochastic Programming.
        SIAM Journal on Optimization 23(4), 2013, arXiv:1309.5549.

    Example:
        >>> import torch
        >>> x = torch.nn.Parameter(torch.tensor([1.0, 0.1]))
        >>> optimizer = ZOSGD([x], lr=0.5)
        >>> def loss(parameters):
        ...     return (parameters[0] - torch.tensor([2.0, 0.1])).square().sum() / 2
        >>> for _ in range(20):
        ...     value = optimizer.estimate(loss)
        ...     _ = optimizer.step()
        >>> x.data.round(decimals=2)
        tensor([2.0000, 0.1000])
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        estimator: AbstractEstimator | None = None,
        chunk_size: int | None = None,
    ) -> None:
        super().__init__(params, lr, estimator, None, chunk_size)

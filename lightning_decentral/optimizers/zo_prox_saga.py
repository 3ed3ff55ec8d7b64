"""Variance-reduced proximal zeroth-order descent with a table (Huang et al., 2019)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_decentral.errors import ConfigurationError
from lightning_decentral.optimizers.proximal import Proximal
from lightning_decentral.optimizers.zeroth_order import AbstractEstimator, AbstractZerothOrder, Loss


class ZOProxSAGA(AbstractZerothOrder):
    """ZO-ProxSAGA: the last estimate of every component is remembered and taken off.

    A *component* is a sample, or a batch that always has the same samples. With a table of estimates, zeros at first::

        v <- mean over the batch (estimate_i(x) - table_i) + mean of the whole table
        table_i <- estimate_i(x)    for i in the batch
        x <- prox(x - lr v)

    Args:
        params: parameters or groups, all of one dtype. A group may set ``lr`` and ``prox``.
        lr: learning rate.
        components: how many there are, of all workers together.
        estimator: `CooSGE` (default) or `GauSGE`.
        prox: see `ZOProxSGD`.
        chunk_size: see `ZOProxSGD`.

    Raises:
        ConfigurationError: Indices that do not fit the losses or the table; and what `ZOProxSGD` raises.
        FloatingPointError: A loss that is NaN or infinite.

    Cost:
        Evaluations: those of `ZOProxSGD`, and no pass over all data. **Memory: a copy of the parameters for each
        component.** With several workers one number for each direction *and component* of a batch is exchanged, and
        every worker has the whole table.

    Not to be confused with:
        The paper starts with a table of estimates at the first point; zeros are as unbiased, and free. The table keeps
        estimates and not points: with `GauSGE` an old estimate has its own directions.

    References:
        Feihu Huang, Bin Gu, Zhouyuan Huo, Songcan Chen, Heng Huang. Faster Gradient-Free Proximal Stochastic Methods
        for Nonconvex Nonsmooth Optimization. AAAI 2019, arXiv:1902.06158.

    Example:
        >>> import torch
        >>> targets = torch.tensor([[1.0], [3.0]])
        >>> x = torch.nn.Parameter(torch.zeros(1))
        >>> optimizer = ZOProxSAGA([x], lr=0.3, components=2)
        >>> for step in range(40):
        ...     batch = targets[[step % 2]]
        ...     def loss(parameters):
        ...         return (parameters[0] - batch).square().sum(1) / 2  # one for each sample
        ...     value = optimizer.estimate(loss, indices=[step % 2])
        ...     _ = optimizer.step()
        >>> x.data.round(decimals=1)  # plain SGD would be drawn to the last sample
        tensor([2.])
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        components: int,
        estimator: AbstractEstimator | None = None,
        prox: Proximal | None = None,
        chunk_size: int | None = None,
    ) -> None:
        super().__init__(params, lr, estimator, prox, chunk_size)
        if not 1 <= components <= 2**24:
            raise ConfigurationError(
                f"ZOProxSAGA(components={components}): needs 1 to 2^24, as many as there are samples or fixed batches. "
                "The table has a copy of the parameters for each."
            )
        self.components = components

    @torch.no_grad()
    def estimate(self, *losses: Loss, indices: Tensor | Sequence[int] | Sequence[Tensor]) -> Tensor:
        """Estimate the gradient of all data from a batch, and write it to ``.grad``.

        Args:
            losses: of this worker's batch, ``[samples]``, one for each component in it; or of several batches.
            indices: which components these are, 0 to ``components - 1``: one for each sample; with several losses, a
                tensor for each of them.

        Returns:
            This worker's loss, within ``O(mu^2)``: the mean of what was evaluated.
        """
        point, draw = self._point(), self._next_draw()
        given = [indices] if len(losses) == 1 else list(indices)
        if len(given) != len(losses):
            raise ConfigurationError(
                f"ZOProxSAGA.estimate got {len(losses)} losses and {len(given)} sets of indices; it needs one for "
                "each. Pass a list of tensors."
            )
        rows, means = [], []
        for loss, own in zip(self._checked_losses(losses), given, strict=True):
            numbers = torch.as_tensor(own, device=point.device).reshape(-1)
            if numbers.is_floating_point() or not ((numbers >= 0) & (numbers < self.components)).all():
                raise ConfigurationError(
                    f"ZOProxSAGA.estimate got indices {numbers.tolist()[:8]}; it needs integers from 0 to "
                    f"{self.components - 1}. Let the data set return the number of each sample."
                )
            quotients, mean = self._quotients(self.estimator, loss, point, draw)
            if quotients.shape[1] != len(numbers):
                raise ConfigurationError(
                    f"ZOProxSAGA.estimate got {quotients.shape[1]} losses and {len(numbers)} indices; it needs a loss "
                    "for each component. Return the losses of the samples, [samples], and not their mean."
                )
            # One row for each component: its quotients, then its number, exact in float32 below 2^24.
            rows.append(torch.cat([quotients.T.to(point.dtype), numbers.to(point.dtype)[:, None]], dim=1))
            means.append(mean)
        if torch.finfo(point.dtype).eps * self.components > 1:
            raise ConfigurationError(
                f"ZOProxSAGA got parameters of {point.dtype}, in which numbers up to {self.components} are not exact. "
                "Use float32."
            )
        everything = self._of_all_workers(torch.cat(rows))
        estimates = self.estimator.combine(everything[:, :-1], self._block_size(point), point, draw)  # [rows, numbers]
        places = everything[:, -1].long()
        # The table lies with the first parameter, so that it is saved with the optimizer.
        state = self.state[self._parameters()[0]]
        if "table" not in state:
            state["table"] = torch.zeros(self.components, point.numel(), dtype=point.dtype, device=point.device)
            state["table_mean"] = torch.zeros_like(point)
        table, mean_of_table = state["table"], state["table_mean"]
        self._write_gradient((estimates - table[places]).mean(0) + mean_of_table)
        last = {place: row for row, place in enumerate(places.tolist())}  # a component may be there twice
        unique = torch.tensor(list(last), device=point.device)
        newest = estimates[list(last.values())]
        mean_of_table += (newest - table[unique]).sum(0) / self.components
        table[unique] = newest
        return torch.stack(means).mean()

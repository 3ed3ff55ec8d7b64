"""Variance-reduced proximal zeroth-order descent with snapshots (Huang et al., 2019)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lightning_decentral.errors import ConfigurationError
from lightning_decentral.optimizers.proximal import Proximal
from lightning_decentral.optimizers.zeroth_order import AbstractEstimator, AbstractZerothOrder, Loss


class ZOProxSVRG(AbstractZerothOrder):
    """ZO-ProxSVRG: the noise of a batch is measured at a snapshot, with the same directions, and taken off.

    At a snapshot ``s <- x`` (once per epoch) the gradient of all data ``full <- estimate(all data, s)``. Then::

        v <- estimate(batch, x) - estimate(batch, s) + full
        x <- prox(x - lr v)

    At the snapshot itself ``v`` is ``full``, exactly; near it, and near the optimum, batches hardly differ.

    Args:
        params: parameters or groups, all of one dtype. A group may set ``lr`` and ``prox``.
        lr: learning rate.
        estimator: `CooSGE` (default) or `GauSGE`, of the batches.
        snapshot_estimator: of the full gradient; ``None``: the same. The noise of its directions stays until the next
            snapshot: with `GauSGE` for the batches, `CooSGE` here or more directions.
        prox: see `ZOProxSGD`.
        chunk_size: see `ZOProxSGD`.

    Raises:
        ConfigurationError: No snapshot before the first estimate; and what `ZOProxSGD` raises.
        FloatingPointError: A loss that is NaN or infinite.

    Cost:
        Evaluations: twice those of `ZOProxSGD` in a step, and those of all data in a snapshot (``2 d`` passes over the
        data with `CooSGE`). Memory: two copies of the parameters more.

    References:
        Feihu Huang, Bin Gu, Zhouyuan Huo, Songcan Chen, Heng Huang. Faster Gradient-Free Proximal Stochastic Methods
        for Nonconvex Nonsmooth Optimization. AAAI 2019, arXiv:1902.06158.

    Example:
        >>> import torch
        >>> targets = torch.tensor([[1.0], [3.0]])
        >>> x = torch.nn.Parameter(torch.zeros(1))
        >>> optimizer = ZOProxSVRG([x], lr=0.5)
        >>> def loss_of(batch):
        ...     return lambda parameters: (parameters[0] - batch).square().sum(1) / 2  # one for each sample
        >>> for _ in range(3):
        ...     _ = optimizer.snapshot(loss_of(target[None]) for target in targets)
        ...     for target in targets:
        ...         loss = optimizer.estimate(loss_of(target[None]))
        ...         _ = optimizer.step()
        >>> x.data.round(decimals=1)  # plain SGD would be drawn to the last sample
        tensor([2.])
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        estimator: AbstractEstimator | None = None,
        prox: Proximal | None = None,
        snapshot_estimator: AbstractEstimator | None = None,
        chunk_size: int | None = None,
    ) -> None:
        super().__init__(params, lr, estimator, prox, chunk_size)
        self.snapshot_estimator = self.estimator if snapshot_estimator is None else snapshot_estimator

    @torch.no_grad()
    def snapshot(self, *shares: Iterable[Loss]) -> Tensor:
        """Remember the parameters, and estimate the gradient of all data there.

        Args:
            shares: the losses of all batches of this worker; samples count equally where a loss returns one number for
                each. Several shares have equal weight, as those of several workers.

        Returns:
            The mean loss of this worker's data, within ``O(mu^2)``.
        """
        point, draw = self._point(), self._next_draw()
        rows, means = [], []
        for share in shares:
            total, mean, samples = torch.zeros((), dtype=torch.float64, device=point.device), 0.0, 0
            for loss in share:
                self._checked_losses([loss])
                quotients, value = self._quotients(self.snapshot_estimator, loss, point, draw)
                total = total + quotients.double().sum(1)
                mean += value.item() * quotients.shape[1]
                samples += quotients.shape[1]
            if not samples:
                raise ConfigurationError(
                    "ZOProxSVRG.snapshot got no losses; it needs those of all batches. Pass a list, or an iterator "
                    "that is not used up."
                )
            rows.append((total / samples).to(point.dtype))
            means.append(mean / samples)
        if not rows:
            raise ConfigurationError("ZOProxSVRG.snapshot got nothing; it needs the losses of all batches. Pass them.")
        average = self._of_all_workers(torch.stack(rows)).mean(0, keepdim=True)
        full = self.snapshot_estimator.combine(average, self._block_size(point), point, draw)[0]
        for parameter, here, gradient in zip(self._parameters(), self._split(point), self._split(full), strict=True):
            self.state[parameter]["snapshot"] = here.clone()
            self.state[parameter]["full_gradient"] = gradient.clone()
        return torch.tensor(sum(means) / len(means), dtype=point.dtype)

    @torch.no_grad()
    def estimate(self, *losses: Loss) -> Tensor:
        """Estimate the gradient of all data from a batch, and write it to ``.grad``.

        Args:
            losses: of this worker's batch; or of several batches of equal weight.

        Returns:
            This worker's loss, within ``O(mu^2)``: the mean of what was evaluated.
        """
        parameters = self._parameters()
        if any("snapshot" not in self.state[parameter] for parameter in parameters):
            raise ConfigurationError(
                "ZOProxSVRG.estimate was called before the first snapshot; it needs the gradient of all data. Call "
                "optimizer.snapshot(losses of all batches) at the beginning of every epoch."
            )
        point, draw = self._point(), self._next_draw()
        there = torch.cat([self.state[parameter]["snapshot"].reshape(-1) for parameter in parameters])
        full = torch.cat([self.state[parameter]["full_gradient"].reshape(-1) for parameter in parameters])

        def differences(loss: Loss) -> tuple[Tensor, Tensor]:
            here, mean = self._quotients(self.estimator, loss, point, draw)
            return here - self._quotients(self.estimator, loss, there, draw)[0], mean

        change, mean = self._gradient(losses, differences, point, draw)
        self._write_gradient(full + change)
        return mean

"""Linear scaling of the learning rate with the batch, and gradual warm-up (Goyal et al., 2017)."""

from __future__ import annotations

import functools

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lightning_decentral.errors import ConfigurationError


def warmup_factor(step: int, scale: float, warmup_steps: int, total_steps: int | None, power: float) -> float:
    """Tell what `GradualWarmup` multiplies the learning rate by.

    Args:
        step: number of finished steps, from 0.
        scale: the factor at the end of the warm-up, > 0.
        warmup_steps: length of the warm-up.
        total_steps: length of the training, or ``None``: no decay.
        power: of the decay.

    Example:
        >>> [warmup_factor(step, 4.0, 3, 5, 2.0) for step in range(6)]
        [1.0, 2.0, 3.0, 4.0, 1.0, 0.0]
    """
    if step < warmup_steps:
        return 1 + (scale - 1) * step / warmup_steps
    if total_steps is None:
        return scale
    progress = min(1.0, (step - warmup_steps) / (total_steps - warmup_steps))
    return float(scale * (1 - progress) ** power)


class GradualWarmup(LambdaLR):
    r"""Linear scaling with gradual warm-up, and polynomial decay.

    ``lr_t = lr (1 + (scale - 1) t / warmup_steps)`` during the warm-up, then ``lr scale`` times
    ``(1 - (t - warmup_steps) / (total_steps - warmup_steps))^power``. The optimizer's own ``lr`` is the one for the
    small batch; ``scale`` is how many times larger the batch is: the linear scaling rule. ``warmup_steps=0`` is linear
    scaling without warm-up, as `CLARS` is used.

    Args:
        optimizer: any.
        scale: batch of a step, of all workers and with accumulation, over the batch that ``lr`` is for; > 0.
        warmup_steps: steps (or epochs, whatever ``step()`` is called after) until ``lr scale`` is reached. The paper: 5
            epochs.
        total_steps: end of the decay; ``None``: none.
        power: of the decay, > 0; 2 in the paper of `CLARS`.

    Raises:
        ConfigurationError: A number out of its range.

    References:
        Priya Goyal, Piotr Dollár, Ross Girshick, Pieter Noordhuis, Lukasz Wesolowski, Aapo Kyrola, Andrew Tulloch,
        Yangqing Jia, Kaiming He. Accurate, Large Minibatch SGD: Training ImageNet in 1 Hour. 2017, arXiv:1706.02677.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
        >>> scheduler = GradualWarmup(optimizer, scale=8192 / 256, warmup_steps=500)
        >>> optimizer.param_groups[0]["lr"]
        0.1
    """

    def __init__(
        self,
        optimizer: Optimizer,
        scale: float,
        warmup_steps: int = 0,
        total_steps: int | None = None,
        power: float = 2.0,
    ) -> None:
        if not (0 < scale < float("inf") and 0 < power < float("inf") and warmup_steps >= 0):
            raise ConfigurationError(
                f"GradualWarmup got scale={scale}, power={power} and warmup_steps={warmup_steps}; it needs a scale and "
                "a power above 0 and at least 0 steps. scale is the batch over the batch that lr was chosen for."
            )
        if total_steps is not None and total_steps <= warmup_steps:
            raise ConfigurationError(
                f"GradualWarmup got total_steps={total_steps} and warmup_steps={warmup_steps}; training has to be "
                "longer than its warm-up. Shorten the warm-up, or leave total_steps out."
            )
        factor = functools.partial(
            warmup_factor, scale=scale, warmup_steps=warmup_steps, total_steps=total_steps, power=power
        )
        super().__init__(optimizer, factor)

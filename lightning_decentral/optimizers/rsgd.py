"""SGD with residuals (Xu, Huo, Huang, 2020); a reconstruction."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_decentral.errors import ConfigurationError
from lightning_decentral.optimizers.layerwise import (
    AbstractLayerwise,
    Closure,
    blocks,
    check_fraction,
    check_not_negative,
    check_positive,
)

Residual = Literal["ema", "block", "topk"]
"""Which part of the way to the explorer the exploited iterate goes: `RSGD`."""


class RSGD(AbstractLayerwise):
    r"""SGD with momentum and residuals: gradients are taken at an explorer, evaluated is an iterate that follows it.

    The explorer ``y`` runs momentum SGD. The exploited iterate ``x`` moves by a part ``C`` of the way to it, and the
    rest is the residual ``e``::

        m <- momentum m + gradient(y) + weight_decay y;    y <- y - lr m
        x <- x - C(x - y);                                  e = x - y is what was left out

    ``y`` is momentum SGD to the last bit, whatever ``C``. ``C`` may be

    * ``"ema"``: ``fraction`` times its argument. Then ``x`` is the exponential moving average of the trajectory:
      ``x <- (1 - fraction) x + fraction y``;
    * ``"block"``: a random block of each tensor, ``fraction`` of it; all other numbers wait;
    * ``"topk"``: the numbers that are furthest behind, ``fraction`` of each tensor.

    **A reconstruction.** The pseudocode of the paper was not at hand; the rule follows from its abstract and from the
    authors' later work on error feedback (SAEF, DEF), of which it is the case of one worker.

    While training, the parameters are ``y``. `eval` exchanges them for ``x`` and `train` brings ``y`` back; in
    Lightning the callback `EvaluateExploited` does both.

    Args:
        params: parameters or groups, as for every optimizer. A group may set each of what follows.
        lr: learning rate.
        momentum: in [0, 1).
        weight_decay: L2 penalty, at ``y``.
        residual: ``"ema"``, ``"block"`` or ``"topk"``.
        fraction: in (0, 1]; 1: ``x`` is ``y``, and this is momentum SGD.
        seed: of the blocks. Workers must have the same.

    Raises:
        ConfigurationError: A hyper-parameter out of its range; a sparse gradient; a step between `eval` and `train`.

    Cost:
        Memory: two copies of the parameters. A step of ``"ema"`` is one pass more than momentum SGD; ``"topk"`` sorts.

    Not to be confused with:
        RSGDM (2024), another method; heavy-ball SGD, which is what ``"ema"`` becomes if the gradient is taken at ``x``;
        version 3 of the arXiv entry, which is another paper (DEF).

    References:
        An Xu, Zhouyuan Huo, Heng Huang. Exploit Where Optimizer Explores via Residuals. 2020, arXiv:2004.05298v2.

    Example:
        >>> import torch
        >>> y = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = RSGD([y], lr=0.5, momentum=0.0, fraction=0.5)
        >>> y.square().sum().backward()
        >>> _ = optimizer.step()
        >>> y.data  # SGD
        tensor([0., 0.])
        >>> optimizer.eval()
        >>> y.data  # half of the way behind it
        tensor([0.5000, 0.5000])
        >>> optimizer.train()
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        residual: Residual = "ema",
        fraction: float = 0.1,
        seed: int = 0,
    ) -> None:
        check_positive("RSGD", lr=lr)
        check_fraction("RSGD", momentum=momentum)
        check_not_negative("RSGD", weight_decay=weight_decay)
        if not 0 < fraction <= 1:
            raise ConfigurationError(f"RSGD(fraction={fraction}): needs a number in (0, 1]. 1 is momentum SGD.")
        if residual not in ("ema", "block", "topk"):
            raise ConfigurationError(f"RSGD got residual={residual!r}; it needs 'ema', 'block' or 'topk'. Use one.")
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "residual": residual,
            "fraction": fraction,
            "seed": seed,
            "steps": 0,
            "evaluating": False,
        }
        super().__init__(params, defaults)

    @property
    def evaluating(self) -> bool:
        """Whether the parameters are the exploited iterate now."""
        return bool(self.param_groups[0]["evaluating"])

    def eval(self) -> None:
        """Make the exploited iterate ``x`` the parameters; nothing happens if it is already."""
        if not self.evaluating:
            self._swap()

    def train(self) -> None:
        """Make the explorer ``y`` the parameters again; nothing happens if it is already."""
        if self.evaluating:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for group in self.param_groups:
            group["evaluating"] = not group["evaluating"]
            for parameter in group["params"]:
                state = self.state[parameter]
                if "other" in state:
                    kept = parameter.clone()
                    parameter.copy_(state["other"])
                    state["other"].copy_(kept)

    def step(self, closure: Closure | None = None) -> float | None:  # type: ignore[override]
        """Update the explorer, and let the exploited iterate follow.

        Args:
            closure: clears the gradients, computes the loss, calls ``backward`` and returns the loss.

        Returns:
            The loss of the closure, or ``None``.

        Raises:
            ConfigurationError: A sparse gradient; or `eval` was called and `train` was not.
        """
        if self.evaluating:
            raise ConfigurationError(
                "RSGD.step was called while the parameters are the exploited iterate; it needs gradients at the "
                "explorer. Call optimizer.train() after an evaluation; in Lightning use the callback EvaluateExploited."
            )
        return super().step(closure)

    def _update(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        group["steps"] += 1
        # One generator for all blocks: what is drawn does not depend on how the layers are cut.
        generator = torch.Generator().manual_seed(group["seed"] * 1_000_003 + group["steps"])
        for block in blocks(parameters):
            self._update_block(group, block, generator)

    def _update_block(self, group: dict[str, Any], parameters: list[Tensor], generator: torch.Generator) -> None:
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(parameter)
                state["other"] = parameter.detach().clone(
                    memory_format=torch.contiguous_format
                )  # x while training, y while evaluating
        buffers = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
        followers = [self.state[parameter]["other"] for parameter in parameters]
        # The operations of torch.optim.SGD, in its order: the explorer has its bits.
        if group["weight_decay"]:
            gradients = list(torch._foreach_add(gradients, parameters, alpha=group["weight_decay"]))
        torch._foreach_mul_(buffers, group["momentum"])
        torch._foreach_add_(buffers, gradients)
        torch._foreach_add_(parameters, buffers, alpha=-group["lr"])
        if group["residual"] == "ema":
            torch._foreach_lerp_(followers, parameters, group["fraction"])
        elif group["residual"] == "block":
            for follower, parameter in zip(followers, parameters, strict=True):
                _follow_block_(follower, parameter, group["fraction"], generator)
        else:
            for follower, parameter in zip(followers, parameters, strict=True):
                _follow_largest_(follower, parameter, group["fraction"])


def _follow_block_(follower: Tensor, leader: Tensor, fraction: float, generator: torch.Generator) -> None:
    """Take over one block of the leader's numbers, at a random place; it may go on at the beginning."""
    numbers = follower.numel()
    if not numbers:
        return
    length = max(1, round(fraction * numbers))
    first = int(torch.randint(numbers, (), generator=generator))
    places = (torch.arange(length, device=follower.device) + first) % numbers
    values = leader.reshape(-1)[places]
    follower.view(-1)[places] = values


def _follow_largest_(follower: Tensor, leader: Tensor, fraction: float) -> None:
    """Take over the numbers that differ most."""
    if not follower.numel():
        return
    places = (
        (leader - follower).reshape(-1).abs().topk(max(1, round(fraction * follower.numel())), sorted=False).indices
    )
    follower.view(-1)[places] = leader.reshape(-1)[places]

"""Decent-DP (Wang et al., ICLR 2025): D-PSGD, averaging each bucket while the next gradient is computed.

As its README says: the wrapper makes one optimizer per bucket, of a function that it is given, and calls them in the
backward pass. ``zero_grad`` comes between forward and backward as in the README's loop: *before* the forward pass it
would drop the first update, which is applied at the second forward.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from decent_dp.ddp import DecentralizedDataParallel
from loguru import logger
from torch import Tensor
from torch.nn import functional as F

from lightning_decentral.lab.bench.contenders.loop import gloo_group
from lightning_decentral.lab.bench.record import Recorder
from lightning_decentral.lab.bench.task import Task, flat_parameters
from lightning_decentral.lab.bench.to_a_loss import CLIP, Loop


def run(task: Task, recorder: Recorder, options: Mapping[str, str]) -> None:
    """Train one worker on ``options["topology"]``."""
    logger.remove()
    model = task.model(recorder.rank)

    def optimizer(named: list[tuple[str, Tensor]]) -> torch.optim.Optimizer:
        return task.optimizer([parameter for _, parameter in named])

    with gloo_group():
        wrapped = DecentralizedDataParallel(model, optim_fn=optimizer, topology=options["topology"])
        while recorder.more:
            images, labels = task.batch(recorder.rank, recorder.world_size, recorder.step)
            recorder.begin_step()
            loss = F.cross_entropy(wrapped(images), labels)
            wrapped.zero_grad()
            loss.backward()
            recorder.end_step(loss.detach())
        for work in wrapped._comm_ops:  # begun for a step that does not come
            if work is not None:
                work.wait()
        recorder.finish(flat_parameters(model))


def race_to_a_loss(loop: Loop) -> None:
    """Train one worker of the race to a loss, with one peer in each step."""
    logger.remove()
    names = dict(loop.model.named_parameters())
    schedules: Any = loop.model.configure_optimizers()
    factor = schedules["lr_scheduler"]["scheduler"].lr_lambdas[0]

    def optimizer(named: list[tuple[str, Tensor]]) -> torch.optim.Optimizer:
        decayed = [value for name, value in named if names[name].dim() >= 2]
        others = [value for name, value in named if names[name].dim() < 2]
        groups = [{"params": decayed, "weight_decay": loop.model.weight_decay}, {"params": others, "weight_decay": 0.0}]
        return torch.optim.AdamW(
            [group for group in groups if group["params"]], lr=loop.model.learning_rate, betas=(0.9, 0.95)
        )

    def scheduler(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)

    wrapped = DecentralizedDataParallel(
        loop.model, optim_fn=optimizer, lr_scheduler_fn=scheduler, topology="one-peer-exp", grad_clip_norm=CLIP
    )
    loop.run(
        lambda batch: loop.pass_through(wrapped, batch, wrapped.zero_grad),
        lambda: wrapped.global_avg(will_revert=True),
        wrapped.revert_global_avg,
    )
    for work in wrapped._comm_ops:  # begun for a step that does not come
        if work is not None:
            work.wait()

"""What torch alone offers: no communication, `DistributedDataParallel` with and without hooks, local SGD.

``ddp_fp16`` is ``fp16_compress_hook``: ``bf16_compress_hook`` is refused where there is no NCCL. PowerSGD gets one
single bucket: with the two that DDP makes by default, its hook aborts on gloo (``gloo::EnforceNotMet``) or hangs.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.distributed.algorithms.ddp_comm_hooks.post_localSGD_hook import PostLocalSGDState, post_localSGD_hook
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.distributed.optim import PostLocalSGDOptimizer
from torch.nn.parallel import DistributedDataParallel

from lightning_decentral.lab.bench.contenders.loop import gloo_group, train
from lightning_decentral.lab.bench.record import Recorder
from lightning_decentral.lab.bench.task import PERIOD, Task, flat_parameters


def run(task: Task, recorder: Recorder, options: Mapping[str, str]) -> None:
    """Train one worker; ``options["method"]`` is the contender's name."""
    model = task.model(recorder.rank)
    method = options["method"]
    if method == "none":
        train(task, recorder, model, task.optimizer(model.parameters()))
    else:
        with gloo_group():
            _train_together(task, recorder, model, method)
    recorder.finish(flat_parameters(model))


def _train_together(task: Task, recorder: Recorder, model: nn.Module, method: str) -> None:
    optimizer = task.optimizer(model.parameters())
    if method == "torch_local_sgd":
        averager = PeriodicModelAverager(period=PERIOD, warmup_steps=0)
        train(task, recorder, model, optimizer, lambda: averager.average_parameters(model.parameters()))
        return
    if method == "ddp_powersgd":
        wrapped = DistributedDataParallel(model, bucket_cap_mb=2 * task.actual_bytes // 2**20 + 1)
        # Compressed from the second step on; the warm-start steps of the default would be all of a short race.
        wrapped.register_comm_hook(
            PowerSGDState(None, matrix_approximation_rank=1, start_powerSGD_iter=2), powerSGD_hook
        )
    else:
        wrapped = DistributedDataParallel(model)
    if method == "ddp_fp16":
        wrapped.register_comm_hook(None, fp16_compress_hook)
    if method == "torch_post_local_sgd":
        # All-reduce in the warm-up, local steps after it.
        alone, _ = dist.new_subgroups(group_size=1)
        start = task.warm_up_steps
        state = PostLocalSGDState(None, alone, start_localSGD_iter=start, post_local_gradient_allreduce=False)
        wrapped.register_comm_hook(state, post_localSGD_hook)
        averager = PeriodicModelAverager(period=PERIOD, warmup_steps=start)
        train(task, recorder, wrapped, PostLocalSGDOptimizer(optimizer, averager))
        return
    train(task, recorder, wrapped, optimizer)

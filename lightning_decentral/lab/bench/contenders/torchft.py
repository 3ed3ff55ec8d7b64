"""torchft: fault-tolerant LocalSGD and DiLoCo. Every worker is a replica group of its own.

``use_async_quorum=False``: with the default, the first averaging destroys the model, because replicas that are thought
to recover contribute zeros. The lighthouse, which coordinates the replicas, runs in worker 0's process.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import TCPStore
from torch.nn.utils import clip_grad_norm_
from torchft.coordination import LighthouseServer
from torchft.local_sgd import DiLoCo, LocalSGD
from torchft.manager import Manager
from torchft.process_group import ProcessGroupGloo

from lightning_decentral.lab.bench.contenders.loop import address_of_this_host, gloo_group, train
from lightning_decentral.lab.bench.record import Recorder
from lightning_decentral.lab.bench.task import PERIOD, STREAMING_DELAY, STREAMING_PERIOD, Task, flat_parameters
from lightning_decentral.lab.bench.to_a_loss import CLIP, Loop

_LIMIT = timedelta(minutes=5)
_PERIOD, _DELAY = 32, 2  # in the race to a loss
_LOSS_SECONDS = 30.0  # after which a worker is lost that gives no answer


def run(task: Task, recorder: Recorder, options: Mapping[str, str]) -> None:
    """Train one worker with ``options["method"]``."""
    logging.disable(logging.WARNING)
    model = task.model(recorder.rank)
    optimizer = task.optimizer(model.parameters())
    with (
        gloo_group(),
        managed(recorder.rank, recorder.world_size) as manager,
    ):  # the group is only for waiting for each other at the end
        if options["method"] == "local_sgd":
            averaging: LocalSGD | DiLoCo = LocalSGD(manager, model, optimizer, sync_every=PERIOD)
        elif options["method"] == "diloco":
            averaging = DiLoCo(manager, [model], optimizer, _outer(model), sync_every=PERIOD)
        else:
            fragments = [model[:2], model[2:]]  # of nearly equal size
            averaging = DiLoCo(
                manager,
                fragments,
                optimizer,
                [_outer(fragment) for fragment in fragments],
                sync_every=STREAMING_PERIOD,
                use_bucketization=True,  # or each parameter's average waits by itself
                fragment_sync_delay=STREAMING_DELAY,
                fragment_update_alpha=0.5,
            )
        with averaging:
            train(task, recorder, model, optimizer)
        dist.barrier()
    recorder.finish(flat_parameters(model))


def race_to_a_loss(loop: Loop) -> None:
    """Train one worker of the race to a loss with streaming DiLoCo, as this package's contender there."""
    model = loop.model
    made: Any = model.configure_optimizers()
    optimizer, scheduler = made["optimizer"], made["lr_scheduler"]["scheduler"]
    assert model.positions is not None
    fragments: list[nn.Module] = [
        nn.ModuleList([model.tokens]),
        nn.ModuleList([model.positions, model.norm]),
        *model.blocks,
    ]
    outer = [_outer(fragment) for fragment in fragments]
    own: list[Tensor] = []

    def together() -> None:
        own[:] = [] if loop.may_lose else [parameter.detach().clone() for parameter in model.parameters()]
        if own:
            mean = torch.cat([value.reshape(-1) for value in own]).div_(loop.world_size)
            dist.all_reduce(mean)
            for parameter, part in zip(model.parameters(), mean.split([value.numel() for value in own]), strict=True):
                parameter.data.copy_(part.view_as(parameter))

    def apart() -> None:
        for parameter, value in zip(model.parameters(), own or (), strict=bool(own)):
            parameter.data.copy_(value)

    def give() -> dict[str, Any]:
        return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}

    def take(state: dict[str, Any]) -> None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])

    least = loop.world_size - 1 if loop.may_lose else loop.world_size
    limit = timedelta(seconds=_LOSS_SECONDS) if loop.may_lose else timedelta(minutes=5)
    with managed(loop.rank, least, limit, give, take) as manager:
        averaging = DiLoCo(
            *(manager, fragments, optimizer, outer),
            sync_every=_PERIOD,
            use_bucketization=True,
            fragment_sync_delay=_DELAY,
            fragment_update_alpha=0.5,
        )

        def step(batch: Tensor) -> None:
            optimizer.zero_grad()
            loop.pass_through(model, batch, lambda: None)
            clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            scheduler.step()

        with averaging:
            loop.run(step, together, apart)
        if not loop.may_lose:
            dist.barrier()


def _outer(model: torch.nn.Module) -> torch.optim.SGD:
    """Make the outer optimizer of the paper (Douillard et al., 2023, arXiv:2311.08105)."""
    return torch.optim.SGD(model.parameters(), lr=0.7, momentum=0.9, nesterov=True)


@contextmanager
def managed(
    rank: int,
    least: int,
    limit: timedelta = _LIMIT,
    give: Callable[[], Any] = dict,
    take: Callable[[Any], None] = lambda state: None,
) -> Iterator[Manager]:
    """Make the manager of one worker, and in worker 0's process what coordinates all.

    Args:
        rank: of this worker.
        least: so many workers go on.
        limit: after which a worker that does not answer is lost.
        give: what a worker that recovers takes from this one.
        take: takes it; by default nobody recovers.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]) + 1
    lighthouse = None
    if rank == 0:
        lighthouse = LighthouseServer(bind=f"{address}:{port}", min_replicas=least)
    here = address_of_this_host()
    store = TCPStore(here, 0, is_master=True, wait_for_workers=False)  # each replica group needs one
    try:
        manager = Manager(
            pg=ProcessGroupGloo(timeout=limit),
            load_state_dict=take,
            state_dict=give,
            min_replica_size=least,
            use_async_quorum=False,
            timeout=limit,
            quorum_timeout=_LIMIT,
            connect_timeout=_LIMIT,
            rank=0,
            world_size=1,
            store_addr=here,
            store_port=store.port,
            lighthouse_addr=f"http://{address}:{port}",
            replica_id=f"worker_{rank}",
            hostname=here,
            init_sync=False,  # all start from the same model
        )
        try:
            yield manager
        finally:
            manager.shutdown(wait=False)
    finally:
        if lighthouse is not None:
            lighthouse.shutdown()

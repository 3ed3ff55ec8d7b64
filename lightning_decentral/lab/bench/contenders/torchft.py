"""torchft: fault-tolerant LocalSGD and DiLoCo. Every worker is a replica group of its own.

``use_async_quorum=False``: with the default, the first averaging destroys the model, because replicas that are thought
to recover contribute zeros. The lighthouse, which coordinates the replicas, runs in worker 0's process.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import TCPStore
from torchft.coordination import LighthouseServer
from torchft.local_sgd import DiLoCo, LocalSGD
from torchft.manager import Manager
from torchft.process_group import ProcessGroupGloo

from lightning_decentral.lab.bench.contenders.loop import address_of_this_host, gloo_group, train
from lightning_decentral.lab.bench.record import Recorder
from lightning_decentral.lab.bench.task import PERIOD, STREAMING_DELAY, STREAMING_PERIOD, Task, flat_parameters

_LIMIT = timedelta(minutes=5)


def run(task: Task, recorder: Recorder, options: Mapping[str, str]) -> None:
    """Train one worker with ``options["method"]``."""
    logging.disable(logging.WARNING)
    model = task.model(recorder.rank)
    optimizer = task.optimizer(model.parameters())
    with gloo_group(), _manager(recorder) as manager:  # the group is only for waiting for each other at the end
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
                fragment_sync_delay=STREAMING_DELAY,
                fragment_update_alpha=0.5,
            )
        with averaging:
            train(task, recorder, model, optimizer)
        dist.barrier()
    recorder.finish(flat_parameters(model))


def _outer(model: torch.nn.Module) -> torch.optim.SGD:
    """Make the outer optimizer of the paper (Douillard et al., 2023, arXiv:2311.08105)."""
    return torch.optim.SGD(model.parameters(), lr=0.7, momentum=0.9, nesterov=True)


@contextmanager
def _manager(recorder: Recorder) -> Iterator[Manager]:
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]) + 1
    lighthouse = None
    if recorder.rank == 0:
        lighthouse = LighthouseServer(bind=f"{address}:{port}", min_replicas=recorder.world_size)
    here = address_of_this_host()
    store = TCPStore(here, 0, is_master=True, wait_for_workers=False)  # each replica group needs one
    try:
        manager = Manager(
            pg=ProcessGroupGloo(timeout=_LIMIT),
            load_state_dict=lambda state: None,  # nobody recovers here
            state_dict=dict,
            min_replica_size=recorder.world_size,
            use_async_quorum=False,
            timeout=_LIMIT,
            quorum_timeout=_LIMIT,
            connect_timeout=_LIMIT,
            rank=0,
            world_size=1,
            store_addr=here,
            store_port=store.port,
            lighthouse_addr=f"http://{address}:{port}",
            replica_id=f"worker_{recorder.rank}",
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

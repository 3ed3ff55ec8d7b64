"""hivemind: `hivemind.Optimizer` with local updates; whoever is there averages when the group has seen enough samples.

Averaging is asked for after 8 steps of all workers together, but a round is found through a distributed hash table and
takes seconds: meanwhile nobody makes steps. Peers listen on the address of their host only.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from datetime import timedelta

import hivemind
from torch import nn
from torch.distributed import TCPStore
from torch.nn import functional as F

from lightning_decentral.lab.bench.contenders.loop import address_of_this_host, train
from lightning_decentral.lab.bench.record import Recorder
from lightning_decentral.lab.bench.task import PERIOD, Task, flat_parameters


def run(task: Task, recorder: Recorder, options: Mapping[str, str]) -> None:
    """Train one worker; there are no options."""
    logging.getLogger("hivemind").setLevel(logging.ERROR)
    model = task.model(recorder.rank)
    store = TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]) + 1,
        is_master=recorder.rank == 0,
        wait_for_workers=False,
        timeout=timedelta(minutes=5),
    )
    others = store.get("peers").decode().split() if recorder.rank else []
    here = f"/ip4/{address_of_this_host()}/tcp/0"
    dht = hivemind.DHT(initial_peers=others, host_maddrs=[here], start=True)
    try:
        if recorder.rank == 0:
            store.set("peers", " ".join(str(address) for address in dht.get_visible_maddrs()))
        optimizer = hivemind.Optimizer(
            dht=dht,
            run_id="bench",
            target_batch_size=PERIOD * task.batch_size * recorder.world_size,
            batch_size_per_step=task.batch_size,
            optimizer=task.optimizer(model.parameters()),
            use_local_updates=True,
            matchmaking_time=1.0,  # by default 5, for the internet; these hosts are near
            averaging_timeout=10.0,  # what a round costs in which somebody does not take part
        )
        try:
            train(task, recorder, model, optimizer)
            recorder.finish(flat_parameters(model))
            _go_on_until_all_are_done(task, recorder, model, optimizer, store)
        finally:
            optimizer.shutdown()
    finally:
        dht.shutdown()


def _go_on_until_all_are_done(
    task: Task, recorder: Recorder, model: nn.Module, optimizer: hivemind.Optimizer, store: TCPStore
) -> None:
    """Make steps that are not counted: the others' averagings would wait in vain for a worker that makes none."""
    if store.add("done", 1) == recorder.world_size:
        store.set("all", "done")
    step = recorder.step
    while not store.check(["all"]):
        images, labels = task.batch(recorder.rank, recorder.world_size, step)
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        step += 1
    left = store.add("left", 1)
    while recorder.rank == 0 and left < recorder.world_size:  # its process has the store
        time.sleep(0.05)
        left = store.add("left", 0)

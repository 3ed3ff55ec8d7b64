"""Leaving the process group after an error, and forming it again where user code goes on."""

from __future__ import annotations

import os
import time
from datetime import timedelta

import torch.distributed as dist

from lightning_decentral.errors import PeerLost

_POLL_SECONDS = 0.1
_CONNECT_SECONDS = 5.0  # for one attempt to reach the store
_departures = 0  # how often this process has left a process group because of an error


def leave_process_group() -> None:
    """Close all connections of this process, so that the others notice at once."""
    global _departures
    if dist.is_initialized():
        dist.destroy_process_group()
        _departures += 1


def has_left() -> bool:
    """Tell whether this process has left a process group, and is in no other."""
    return _departures > 0 and not dist.is_initialized()


def rejoin_process_group(
    backend: str, address: str, port: int, rank: int, world_size: int, wait_seconds: float, timeout: timedelta | None
) -> None:
    """Form a process group again where user code has caught an error on all workers, and fits once more.

    Worker 0 may still have the store of the group before, at the same port, when another one is here already: what is
    found there is of no use. So all meet in the new store first, which has the number of departures in its names.

    Args:
        backend: of the group.
        address: of worker 0.
        port: of its store.
        rank: of this worker.
        world_size: how many workers there are.
        wait_seconds: for the others to come.
        timeout: of what the group does; ``None``: the back end's own.

    Raises:
        PeerLost: if they do not come.
    """
    name = f"again/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{_departures}"
    kept_by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun's, which stays
    deadline = time.monotonic() + wait_seconds
    here = [f"{name}/{other}" for other in range(world_size)]
    store: dist.Store | None = None
    while True:
        try:
            if store is None:
                hosts = rank == 0 and not kept_by_agent
                limit = timedelta(seconds=min(wait_seconds, _CONNECT_SECONDS))
                # Several tenants: the old one is still open where somebody keeps the error, and with it all its frames.
                store = dist.TCPStore(
                    address, port, is_master=hosts, timeout=limit, wait_for_workers=False, multi_tenant=True
                )
            if rank == 0 or store.check(here[:1]):  # otherwise it is the old one
                store.set(here[rank], "")
                if store.check(here):
                    break
            else:
                store = None
        except RuntimeError:  # worker 0 has just closed the old one, or the port is not free yet
            store = None
        if time.monotonic() > deadline:
            raise PeerLost(
                f"Worker {rank} fits again after an error, but the other workers did not come within "
                f"{wait_seconds:g} s. Catch the error on all workers and fit again on all of them, or on none."
            )
        time.sleep(_POLL_SECONDS)
    group_store = dist.PrefixStore(name, store)
    dist.init_process_group(backend, timeout=timeout, store=group_store, rank=rank, world_size=world_size)

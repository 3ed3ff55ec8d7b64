"""Which threads a run has left behind, of any name."""

from __future__ import annotations

import threading
from collections.abc import Collection

# Not ours: fsspec's event loop, tqdm's monitor, wandb's service and the pool of torch's compiler live as long as the
# process; Lightning's launcher of scripts looks after its processes every five seconds.
_OTHERS = ("fsspecIO", "tqdm", "wandb-", "ThreadPoolExecutor-", "child-process-observer")


def threads_besides(known: Collection[threading.Thread]) -> list[str]:
    """The names of the threads that run now and are neither `known` nor one of a library that stays."""
    running = [thread for thread in threading.enumerate() if thread not in known]
    return [thread.name for thread in running if not thread.name.startswith(_OTHERS)]

"""Which threads a run has left behind, of any name."""

from __future__ import annotations

import threading
from collections.abc import Collection

# Not ours: fsspec's event loop, tqdm's monitor, wandb's service and the pool of torch's compiler live as long as the
# process.
_OTHERS = ("fsspecIO", "tqdm", "wandb-", "ThreadPoolExecutor-")


def _looks_after_nobody(thread: threading.Thread) -> bool:
    """Whether it is Lightning's observer of the scripts that it has started, and there are none: it ends by itself.

    With some, it kills this process, seconds later and in the middle of another test, when one of them fails.
    """
    return thread.name == "child-process-observer" and not getattr(thread, "_child_processes", True)


def threads_besides(known: Collection[threading.Thread]) -> list[str]:
    """The names of the threads that run now and are neither `known` nor one of a library that stays."""
    running = [thread for thread in threading.enumerate() if thread not in known and not _looks_after_nobody(thread)]
    return [thread.name for thread in running if not thread.name.startswith(_OTHERS)]

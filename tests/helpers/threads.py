"""Which threads a run has left behind, of any name."""

from __future__ import annotations

import threading
from collections.abc import Collection

# Of libraries, one for the whole life of a process: fsspec's event loop, tqdm's monitor.
_OTHERS = ("fsspecIO", "tqdm")


def threads_besides(known: Collection[threading.Thread]) -> list[str]:
    """The names of the threads that run now and are neither `known` nor a library's for the life of the process."""
    running = [thread for thread in threading.enumerate() if thread not in known]
    return [thread.name for thread in running if not thread.name.startswith(_OTHERS)]

"""Workers that meet after fewer exchanges than others have begun: these would wait for an exchange that never comes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from lightning_decentral.errors import ConfigurationError

_LOOK_SECONDS = 1.0


class Lagging:
    """Tells a worker that waits for an exchange who is at a meeting with fewer exchanges behind it.

    Both would wait until a time-out: whoever meets waits for all, and whoever exchanges for the one that meets.

    Args:
        store: that all workers share.
        rank: of this worker.
        world_size: of all.

    Attributes:
        begun: how many exchanges this worker has begun.
    """

    def __init__(self, store: dist.Store, rank: int, world_size: int) -> None:
        self.begun = 0
        self._store, self._rank = store, rank
        self._others = [other for other in range(world_size) if other != rank]
        self._met = 0
        self._looked = 0.0
        self._seen: dict[int, str] = {}

    @contextmanager
    def meeting(self, what: str) -> Iterator[None]:
        """Let others know that this worker meets them, as long as the block lasts."""
        self._met += 1
        self._store.set(f"meets/{self._rank}", f"{self.begun} {self._met} {what}")
        try:
            yield
        finally:
            self._store.set(f"meets/{self._rank}", "")

    def look(self, since: float) -> None:
        """Look for such a worker, now and then.

        Args:
            since: when this worker began to wait, by ``time.monotonic``.

        Raises:
            ConfigurationError: if there is one for longer than a moment.
        """
        now = time.monotonic()
        if now - max(since, self._looked) < _LOOK_SECONDS:
            return
        self._looked = now
        known = [other for other in self._others if self._store.check([f"meets/{other}"])]
        told = {other: self._store.get(f"meets/{other}").decode() for other in known}
        meeting = {other: text for other, text in told.items() if text}
        for other, text in meeting.items():
            count, _, what = text.split(" ", 2)
            if int(count) < self.begun and self._seen.get(other) == text:
                raise ConfigurationError(
                    f"Worker {other} is at {what} after {count} exchanges, and worker {self._rank} waits for its "
                    f"exchange number {self.begun}: the workers do not make equally many steps. Call optimizer.step() "
                    "on all of them after each backward pass; where one has nothing to apply, with gradients of zero."
                )
        self._seen = meeting

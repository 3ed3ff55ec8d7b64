"""Which jobs are on one rendezvous: so that a worker with a mistyped name for its job is told what else is there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

import torch.distributed as dist

from lightning_decentral.errors import ConfigurationError
from lightning_decentral.membership import Members

_PREFIX = "lightning_decentral_jobs"
_MOST = 100  # that are looked at, the newest ones
JOB = "LIGHTNING_DECENTRAL_JOB"
"""The environment variable with the name of the job, if a rendezvous has several."""


@dataclass(frozen=True)
class Job:
    """Another job, as its log has it.

    Args:
        name: of it.
        ranks: of the workers that take part.
        beats: how often all their hearts have beaten together.
    """

    name: str
    ranks: tuple[int, ...]
    beats: int

    def __str__(self) -> str:
        return f"{self.name!r} with {len(self.ranks)} worker{'s' * (len(self.ranks) != 1)} {list(self.ranks)}"


def enlist(store: dist.Store, name: str) -> None:
    """Let others know that there is a job of this name; before it has a log.

    Args:
        store: the whole of it.
        name: of the job.
    """
    names = dist.PrefixStore(_PREFIX, store)
    names.set(str(names.add("number", 1)), json.dumps(name))


def other_jobs(store: dist.Store, name: str) -> tuple[Job, ...]:
    """List the other jobs in which somebody takes part, by name.

    Those whose workers were all killed are among them, as nobody has written into their log that they are lost:
    `still_living` tells them apart later.

    Args:
        store: the whole of it.
        name: of this worker's job.
    """
    names = dist.PrefixStore(_PREFIX, store)
    newest = int(names.add("number", 0))
    found: dict[str, Job] = {}
    for number in range(max(1, newest - _MOST + 1), newest + 1):
        if not names.check([str(number)]):
            continue  # it is about to be named
        other = json.loads(names.get(str(number)))
        if not isinstance(other, str) or other == name or other in found:
            continue
        log = store_of(store, other)
        if not log.check(["head"]):
            continue
        try:
            members = Members.from_json(log.get(f"log/{int(log.get('head'))}"))
        except ConfigurationError:  # of another version
            continue
        if members.phase != "over":
            beats = sum(int(log.add(f"beat/{life}", 0)) for life in members.lives)
            found[other] = Job(other, members.ranks, beats)
    return tuple(found[other] for other in sorted(found))


def still_living(now: tuple[Job, ...], before: tuple[Job, ...]) -> tuple[Job, ...]:
    """Return those jobs in which a heart has beaten, or somebody has come or gone, since they were looked at before."""
    seen: Mapping[str, Job] = {job.name: job for job in before}
    return tuple(job for job in now if job != seen.get(job.name))


def listed(jobs: tuple[Job, ...]) -> str:
    """Return the jobs and who takes part in them, for a message."""
    return f"the job{'s' * (len(jobs) != 1)} " + "; ".join(map(str, jobs))


def store_of(store: dist.Store, name: str, place: str = "") -> dist.Store:
    """Return the part of a store that is of one job, and of one place in it."""
    return dist.PrefixStore(f"lightning_decentral/{name}/{place}", store)
